"""Where things lie: prepared data, stages, scores, sweeps; and what is finished.

    data/<set>/                        manifest.json, slices/, splits/                         (MEDSSL_DATA, default ./data)
    runs/stages/<method>-<hash>/       run.json, checkpoint.pt, done.json, log.txt, tensorboard/   (MEDSSL_RUNS, default ./runs)
    runs/scores/<stage>.parquet        one file per scored fine-tuning
    runs/sweeps/<space>-<set>-<hash>/  sweep.json, study.db, arms.json, spending.json, leaderboard.*, log.txt

MEDSSL_RUNS may be the URI of a store that all machines reach (`mirror.py`); runs/ is then a local copy under MEDSSL_CACHE.
A stage is finished when its done.json exists; it is written last. The folder's lock belongs to the process that works on it.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medssl import __version__
from medssl.platform import atomic, find
from medssl.platform.errors import UsageError
from medssl.platform.mirror import Mirror


@dataclass(frozen=True)
class Site:
    data: Path
    runs: Path
    remote: str | None = None  # the store that `runs` is a local copy of

    @classmethod
    def here(cls) -> "Site":
        """The folders that the environment names, absolute: workers start elsewhere."""
        data, runs = Path(os.environ.get("MEDSSL_DATA", "data")).absolute(), os.environ.get("MEDSSL_RUNS", "runs")
        if "://" not in runs:
            return cls(data, Path(runs).absolute())
        cache = Path(os.environ.get("MEDSSL_CACHE", "~/.cache/medssl")).expanduser().absolute()
        return cls(data, cache / runs.rstrip("/").replace("://", "-").replace("/", "-"), runs.rstrip("/"))

    @property
    def mirror(self) -> Mirror | None:
        return Mirror(self.remote, self.runs) if self.remote else None

    def bring(self, identity: str) -> None:
        """Make what a stage has left on other machines local; nothing to do without a remote store."""
        if self.mirror:
            self.mirror.bring(identity)

    def refresh(self) -> None:
        """Make what listings and leaderboards read local."""
        if self.mirror:
            self.mirror.refresh()

    def push(self, sweep: Path) -> None:
        """Let other machines see a sweep's folder."""
        if self.mirror:
            self.mirror.push(sweep)

    def stage(self, identity: str) -> Path:
        return self.runs / "stages" / identity

    def done(self, identity: str) -> dict[str, Any] | None:
        """What a finished stage left, or None."""
        try:
            return json.loads((self.stage(identity) / "done.json").read_text())
        except FileNotFoundError:
            return self.mirror.done(identity) if self.mirror else None

    def finished(self) -> set[str]:
        """The ids of all finished stages."""
        here = {file.parent.name for file in (self.runs / "stages").glob("*/done.json")}
        return here | self.mirror.finished() if self.mirror else here

    def find_stage(self, name: str) -> Path:
        """A stage's folder by its id, an unambiguous beginning of it, or a path."""
        if (Path(name) / "run.json").is_file():
            return Path(name).absolute()
        known = sorted(file.parent.name for file in (self.runs / "stages").glob("*/run.json"))
        hits = [identity for identity in known if identity == name] or [entry for entry in known if entry.startswith(name)]
        if len(hits) != 1:
            what = f"no run {name!r}" if not hits else f"{name!r} begins {len(hits)} runs"
            raise UsageError(f"{what} in {self.runs / 'stages'}; {find.nearest(name, known or ['none yet'])}")
        self.bring(hits[0])
        return self.stage(hits[0])

    def find_weights(self, name: str) -> Path:
        """Where given weights lie, absolute: the folder of a finished pretraining, or a file. Raises UsageError for neither."""
        path = Path(name).absolute()
        own = path.name == "encoder.pt" and (path.parent / "run.json").is_file()  # one pretraining, one identity
        if path.is_file() and not own:
            return path
        if path.suffix in (".pt", ".pth", ".ckpt", ".tar", ".bin", ".safetensors") and not own:
            raise UsageError(f"start.weights={name}: no such file")
        folder = path.parent if own else self.find_stage(name)
        run = json.loads((folder / "run.json").read_text())
        if run["kind"] != "pretrain" or not (folder / "done.json").is_file():
            tuned = f"; of a fine-tuning, give its file {folder / 'best.pt'}" if (folder / "best.pt").is_file() else ""
            raise UsageError(f"start.weights={name}: {folder.name} is not a finished pretraining{tuned}")
        return folder

    def find_sweep(self, name: str | None) -> Path:
        """A sweep's folder by its name or the beginning of it; the newest one when no name is given."""
        known = sorted((self.runs / "sweeps").glob("*/sweep.json"), key=lambda file: file.stat().st_mtime)
        hits = [file for file in known if name is None or file.parent.name.startswith(name)]
        if not hits:
            names = [file.parent.name for file in known]
            missing = f"no sweep {name!r}" if name else "no sweep yet"
            raise UsageError(f"{missing} in {self.runs / 'sweeps'}; {find.nearest(name or '', names or ['none yet'])}")
        return hits[-1].parent


def provenance() -> dict[str, Any]:
    """Versions, machine and commit, written beside every run."""
    packages = ["torch", "ray", "optuna", "pyarrow", "monai", "numpy", "scipy", "nibabel"]
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    git = subprocess.run(["git", "-C", str(find.ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "medssl": __version__,
        "commit": git.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "versions": versions,
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "system": platform.system()},
        "command": " ".join(["medssl", *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def spent(folder: Path) -> float:
    """Seconds that processes have given to a stage so far, what kills made them repeat included."""
    try:
        seen = json.loads((folder / "progress.json").read_text())
    except (FileNotFoundError, ValueError):
        return 0.0
    return float(seen.get("before", 0.0) + seen["at"] - seen["begun"])


class Progress:
    """A stage's progress file: rewritten at most once a second, read by whoever shows the sweep."""

    def __init__(self, folder: Path, total: int):
        self.file, self.total, self.last = folder / "progress.json", total, 0.0
        self.before = spent(folder)
        self.begun: float | None = None
        self.first = 0

    def show(self, step: int, text: str) -> None:
        """`step` steps are done. The first call says where this process began."""
        now = time.time()
        if self.begun is None:
            self.begun, self.first = now, step
        if now - self.last >= 1 or step >= self.total:
            self.last = now
            seen = {"step": step, "from": self.first, "total": self.total, "text": text, "begun": self.begun, "at": now}
            seen["before"] = self.before
            atomic.write_json(self.file, seen, durable=False)
