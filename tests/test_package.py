"""The laws of the house: what may import what, and the standard library's `platform` staying itself."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medssl.platform import find

ROOT = find.ROOT
SOURCES = [file for file in ROOT.rglob("*.py") if not {".venv", "build", ".types"} & set(file.relative_to(ROOT).parts)]


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def imports(file: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_platform_is_no_package_that_could_shadow_the_standard_librarys():
    assert not list((ROOT / "platform").rglob("__init__.py"))


@pytest.mark.parametrize(
    "arguments",
    [("-c", "import platform, torch; print(platform.system())"), ("cli.py", "--version"), ("-m", "pytest", "--version")],
    ids=["python -c", "python cli.py", "python -m pytest"],
)
def test_the_standard_platform_survives_from_the_root(arguments):
    done = python(*arguments)
    assert done.returncode == 0, done.stderr


def test_the_standard_platform_survives_in_a_ray_worker(ray_local):
    import ray

    @ray.remote
    def system() -> str:
        import subprocess
        import sys

        code = "import platform; print(platform.system())"
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert ray.get(system.remote()).strip() == os.uname().sysname


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_arrows_point_one_way(file):
    place = file.relative_to(ROOT).parts
    names = imports(file)
    if place[0] == "tests":
        return
    if place[0] != "platform" and place != ("cli.py",):
        assert not any(name.split(".")[0] == "ray" for name in names), "only platform/ and cli.py import ray"
    if place[0] == "methods":
        assert not any(name.startswith(("medssl.platform", "medssl.search_spaces", "medssl.cli")) for name in names)
    if place[0] == "platform":
        assert not any(name.startswith("medssl.cli") for name in names)
        assert "platform" not in place[1:]
    assert not any(name.split(".")[0] == "utils" for name in names)


def test_help_and_version_load_neither_torch_nor_ray():
    code = (
        "import sys; sys.argv = ['medssl', '--help']\n"
        "from medssl import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'monai', 'numpy', 'scipy', 'pyarrow', 'matplotlib', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_methods_run_without_ray_and_without_the_platform():
    """A finder refuses both; every method and network must import all the same."""
    code = f"""
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'ray' or name.startswith('medssl.platform'):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
for file in {[str(f.relative_to(ROOT)) for f in (ROOT / "methods").rglob("[a-z]*.py")]!r}:
    importlib.import_module('medssl.' + file[:-3].replace('/', '.'))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_nothing_that_came_from_a_person_is_tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert listed
    assert not [name for name in listed if name.endswith((".nii", ".nii.gz", ".dcm", ".parquet", ".pt", ".safetensors"))]


@pytest.mark.parametrize("command", ["sweep", "test", "check", "bench"])
def test_make_has_the_readmes_targets(command):
    assert f"\n{command}:" in (ROOT / "Makefile").read_text()


def test_the_cluster_file_is_one_that_ray_accepts():
    import yaml
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text())))
