"""The name you type is the file that opens: methods, networks, hooks, presets, spaces, data sets, benches, found by listing."""

import ast
import dataclasses
import difflib
import functools
import importlib
import typing
from pathlib import Path
from types import ModuleType

from medssl.methods import settings as shared
from medssl.platform.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "method": "methods",
    "network": "methods/networks",
    "hook": "methods/hooks",
    "preset": "methods/presets",
    "space": "search_spaces",
    "dataset": "platform/datasets",
    "bench": "platform/benches",
}


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """ "did you mean …? found: …" for an error about `word`."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return (f"did you mean {close[0]}? " if close else "") + "found: " + ", ".join(known)


def names(kind: str) -> list[str]:
    """Every name of a kind, sorted. A method is a file of methods/ with a `METHOD`; the other folders hold one kind each."""
    files = sorted((ROOT / FOLDERS[kind]).glob(f"[a-z]*{_suffix(kind)}"))
    if kind == "method":
        files = [file for file in files if "\nMETHOD" in file.read_text()]
    return sorted(file.stem.replace("_", "-") if kind == "space" else file.stem for file in files)


def path(kind: str, name: str) -> Path:
    """The file that defines `name`. Raises UsageError with the nearest name."""
    if name.replace("_", "-") not in [known.replace("_", "-") for known in names(kind)]:
        raise UsageError(f'no {kind} "{name}" in {FOLDERS[kind]}/; {nearest(name, names(kind))}')
    stem = name.replace("_", "-") if kind == "preset" else name.replace("-", "_")
    return ROOT / FOLDERS[kind] / f"{stem}{_suffix(kind)}"


def _suffix(kind: str) -> str:
    return ".yaml" if kind == "preset" else ".py"


def load(kind: str, name: str) -> ModuleType:
    """Import the module that defines `name`."""
    file = path(kind, name)
    return importlib.import_module(f"medssl.{FOLDERS[kind].replace('/', '.')}.{file.stem}")


def summary(kind: str, name: str) -> str:
    """The first line of a file's docstring, of a preset its first comment."""
    if kind == "preset":
        return path(kind, name).read_text().partition("\n")[0].removeprefix("#").strip()
    return (ast.get_docstring(ast.parse(path(kind, name).read_text())) or "").partition("\n")[0]


@functools.cache
def constant(kind: str, name: str, constant_name: str, default: typing.Any = None) -> typing.Any:
    """The literal that a file gives a name at its top level (`NAME = …`), read from its source without importing it."""
    for node in ast.parse(path(kind, name).read_text()).body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", None) for target in node.targets] == [constant_name]:
            return ast.literal_eval(node.value)
    return default


@functools.cache
def settings(kind: str, name: str, class_name: str = "Config") -> type:
    """The settings dataclass of a method or network, read from its source without importing the file (nor torch).

    The class body may use `dataclass`, `field`, `Literal`, and the names of methods/settings.py.
    """
    file = path(kind, name)
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            scope = {
                "dataclass": dataclasses.dataclass,
                "field": dataclasses.field,
                "Literal": typing.Literal,
                "settings": shared,
            }
            scope |= {key: value for key, value in vars(shared).items() if not key.startswith("_")}
            exec(compile(ast.Module([node], []), str(file), "exec"), scope)
            found = scope[class_name]
            assert isinstance(found, type)
            return found
    raise UsageError(f"{file.name} has no class {class_name}")
