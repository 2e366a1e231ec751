"""The files that bring up a Ray cluster for sweeps, filled from the templates of platform/clusters/.

    aws, gcp      Ray's cluster launcher: `ray up`
    kubernetes    KubeRay: a RayCluster, or a RayJob when a command is given, which takes its cluster down when it ends
    slurm         a job script for `sbatch`, which needs a command

Where the ordinary tools start machines, medssl only writes what they read. No file holds a credential: the machines' own role
opens the object store.
"""

import importlib.metadata
import re
import shlex
from collections.abc import Mapping, Sequence

from medssl.platform import find, jobs
from medssl.platform.errors import UsageError

FOLDER = find.ROOT / "platform" / "clusters"

# What `-o` may change, with its default. Machines: `max` of them, of `cpus` and `gpus` each.
CLOUD = {"name": "medssl", "max": "8", "idle": "5", "cpus": "8", "gpus": "1"}
SETTINGS: Mapping[str, Mapping[str, str]] = {
    "aws": CLOUD | {"machine": "g6.2xlarge", "region": "eu-central-1", "store": "s3://YOUR-BUCKET/medssl"},
    "gcp": CLOUD
    | {"machine": "g2-standard-8", "region": "europe-west4", "zone": "europe-west4-a", "project": "YOUR-PROJECT"}
    | {"store": "gs://YOUR-BUCKET/medssl", "image": "projects/ubuntu-os-cloud/global/images/family/ubuntu-2404-lts-amd64"},
    "kubernetes": CLOUD
    | {"memory": "32Gi", "store": "s3://YOUR-BUCKET/medssl", "claim": "medssl-data", "account": "medssl"}
    | {"image": "rayproject/ray:{{ray}}-py311-gpu", "repository": "git+https://YOUR-HOST/medssl.git"}
    | {"spot": "YOUR-SPOT-LABEL"},
    "slurm": {"name": "medssl", "account": "", "time": "24:00:00", "nodes": "1", "cpus": "8", "gpus": "1", "scratch": ""}
    | {"prepare": ""},
}  # fmt: skip
KINDS = tuple(SETTINGS)

# The long options of sbatch (Slurm 24.11), which may be given as `-o sbatch.NAME=VALUE`; flags take no value.
SBATCH = frozenset((FOLDER / "sbatch.txt").read_text().split())


def render(kind: str, changes: Sequence[str] = (), command: Sequence[str] = ()) -> str:
    """The file of a kind of cluster, as text.

    changes   "name=value" of SETTINGS; for slurm also "sbatch.NAME=VALUE" and "sbatch.FLAG"
    command   the words behind `medssl` that the cluster shall run, for kubernetes and slurm
    Raises UsageError for an unknown kind, setting or directive, naming the nearest.
    """
    if kind not in SETTINGS:
        raise UsageError(f'no kind of cluster "{kind}"; {find.nearest(kind, KINDS)}')
    settings, directives = _settled(kind, changes)
    if command and kind in ("aws", "gcp"):
        raise UsageError(f"a cluster on {kind} gets its sweeps by `medssl cluster submit`; leave out the command")
    if kind == "slurm":
        return _slurm(settings, directives, command)
    settings["ray"] = importlib.metadata.version("ray")
    settings["idle_seconds"] = str(60 * int(settings["idle"]))
    if kind == "kubernetes":
        settings["kind"] = _resource(settings, command)
    return _filled(f"{kind}.yaml", settings)


def _settled(kind: str, changes: Sequence[str]) -> tuple[dict[str, str], dict[str, str | None]]:
    """Settings and, of slurm, further directives."""
    settings, directives = dict(SETTINGS[kind]), dict[str, str | None]()
    for change in changes:
        name, given, value = change.partition("=")
        if "\n" in value or '"' in value:
            raise UsageError(f"-o {name}: the value may hold neither quotes nor line breaks")
        if kind == "slurm" and name.startswith("sbatch."):
            directive = name.removeprefix("sbatch.")
            if directive not in SBATCH:
                raise UsageError(f"-o {name}: sbatch knows no such directive; {find.nearest(directive, SBATCH)}")
            directives[directive] = value if given else None
        elif name not in settings:
            raise UsageError(f'-o {change}: no setting "{name}" of {kind}; {find.nearest(name, settings)}')
        else:
            settings[name] = value
    for name in sorted({"max", "idle", "cpus", "gpus", "nodes"} & settings.keys()):
        if not settings[name].isdigit():
            raise UsageError(f"-o {name}={settings[name]}: expected a whole number")
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,48}[a-z0-9])?", settings["name"]):
        raise UsageError(f"-o name={settings['name']}: expected at most 50 small letters, digits and hyphens")
    return settings, directives


def _filled(file: str, settings: Mapping[str, str]) -> str:
    """A template with every {{name}} replaced, also those within values."""
    text = (FOLDER / file).read_text()
    while names := set(re.findall(r"\{\{(\w+)\}\}", text)):
        for name in names:
            text = text.replace("{{" + name + "}}", settings[name])
    return text


def _resource(settings: Mapping[str, str], command: Sequence[str]) -> str:
    """A RayCluster, or a RayJob around its specification."""
    spec = _filled("kubernetes_spec.yaml", settings).rstrip()

    def head(kind: str) -> str:
        return f"apiVersion: ray.io/v1\nkind: {kind}\nmetadata: {{name: {settings['name']}}}\nspec:\n"

    if not command:
        return head("RayCluster") + _indented(spec, 2)
    words = ["python", "-m", "medssl.cli", *command, *(["--address", "auto"] if jobs.spreads(command) else [])]
    job = f"  entrypoint: {shlex.join(words)}\n  shutdownAfterJobFinishes: true\n"
    return head("RayJob") + job + f"  ttlSecondsAfterFinished: 60\n  rayClusterSpec:\n{_indented(spec, 4)}"


def _indented(text: str, by: int) -> str:
    return "\n".join(" " * by + line for line in text.splitlines())


def _slurm(settings: Mapping[str, str], directives: Mapping[str, str | None], command: Sequence[str]) -> str:
    """The job script of a sweep."""
    if not command:
        raise UsageError("a Slurm job needs its sweep: medssl cluster render slurm -- sweep SPACE …")
    if not re.fullmatch(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}", settings["time"]):
        raise UsageError(f"-o time={settings['time']}: expected minutes, hours:minutes:seconds or days-hours")
    accounts = [account for account in settings["account"].replace(" ", "").split(",") if account]
    given: dict[str, str | None] = {"job-name": settings["name"], "dependency": "singleton", "time": settings["time"]}
    if len(accounts) == 1:
        given["account"] = accounts[0]
    given |= {"nodes": settings["nodes"], "ntasks-per-node": "1", "cpus-per-task": settings["cpus"]}
    if settings["gpus"] != "0":
        given["gpus-per-node"] = settings["gpus"]
    given |= {"output": f"{settings['name']}-%j.log"} | dict(directives)
    submit = ["#     sbatch sweep.sbatch"]
    if len(accounts) > 1:
        submit = [f"#     for account in {' '.join(accounts)}; do sbatch --account=$account sweep.sbatch; done"]
    scratch = "# data are read where they lie; -o scratch=FOLDER copies them to every node first"
    if place := settings["scratch"]:
        scratch = (
            f'srun --ntasks-per-node=1 bash -c "mkdir -p {place}/data && cp -ru \\"$MEDSSL_DATA/.\\" {place}/data"\n'
            f"export MEDSSL_DATA={place}/data"
        )
    line = shlex.join(["medssl", *command]) + (' --address "$head:$port"' if jobs.spreads(command) else "")
    filled = {"command": line, "submit": "\n".join(submit), "scratch": scratch}
    filled["directives"] = "\n".join(f"#SBATCH --{name}{'' if value is None else f'={value}'}" for name, value in given.items())
    filled["prepare"] = settings["prepare"] or "# -o prepare='module load …; source …' goes here"
    return _filled("slurm.sh", {**settings, **filled})
