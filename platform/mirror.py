"""A run store in the cloud: stages work in a local folder, and what others need goes to a URI that every machine reaches.

    URI/done/<stage>.json          what the stage left in its done.json; written after all its files: no marker, not finished
    URI/stages/<stage>/…           its files; of one that runs also its last checkpoint but one every `EVERY` seconds
    URI/scores/<stage>.parquet     as in a local store
    URI/sweeps/<sweep>/…           the question, its arms, the study, the leaderboards
    URI/claims/<name>@…            who works on a stage or a sweep, renewed every `BEAT` seconds

Any filesystem that PyArrow opens: s3://, gs://, file://, hdfs://. Object stores show an object whole or not at all; elsewhere a
file is moved into its place. Credentials are those of the machine.

No such store can create a file only where there is none, so a claim is laid in two moves: say that one wants it, wait `SETTLE`
seconds for whoever says so at the same time, and take it if nobody has it and one's own name is the first of those who want
it. That relies on listings that show what was written before, as those of S3, GCS and file systems do, and on writes that
take less than `SETTLE`: where one takes longer, or a machine that stood still for `EXPIRES` wakes up, two may do one stage.
They leave the same, so it costs time and nothing else. Of clocks only the store's counts.
"""

import contextlib
import functools
import json
import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from medssl.platform import atomic
from medssl.platform.errors import RunError

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

EVERY = 120.0  # seconds between two uploads of a running stage: what a machine that dies can lose, and its checkpoint
BEAT = 20.0  # seconds between two signs of life of a claim
EXPIRES = 90.0  # seconds without one after which it is void: what a machine that dies keeps others waiting
SETTLE = 1.0  # seconds: more than a write takes
AGAIN = 5.0  # seconds between two looks whether a stage that another machine claims is done
AT_ONCE = 8  # files on their way
LIGHT = ("run.json", "done.json", "log.txt", "probe.json", "progress.json")  # what listings and leaderboards read of a stage
OWN = (".lock", "study.db-journal")  # of one machine


def _fill(content: bytes, file: BinaryIO) -> None:
    file.write(content)


@dataclass(frozen=True)
class Mirror:
    """The store at `uri`, whose local folder is `runs`."""

    uri: str
    runs: Path

    def done(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage left, whoever ran it; None where none has finished it."""
        files, root = self._opened
        try:
            with files.open_input_stream(f"{root}/done/{stage}.json") as file:
                return json.loads(file.read())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unreachable(error) from error

    def finished(self) -> set[str]:
        return {Path(entry.path).stem for entry in self._list("done")}

    def bring(self, stage: str) -> None:
        """The files of a stage that are missing here; all of them where it has gone further on another machine.

        One that was finished here by a process that died before it could say so is uploaded instead.
        """
        folder = self.runs / "stages" / stage
        ended, resumable = (folder / "done.json").exists(), (folder / "checkpoint.pt").exists()
        there = self._list(f"stages/{stage}")
        if self.done(stage) is not None:
            further = resumable or not ended  # what lies here is of a process that never finished
        elif ended:
            return self.finish(stage)
        else:
            further = bool(there) and self._step(stage) > _step(folder)
        self._pull(sorted((entry for entry in there if further or not self._local(entry).exists()), key=_last))
        if further and (folder / "done.json").exists():
            (folder / "checkpoint.pt").unlink(missing_ok=True)
        scores = (entry for entry in self._list("scores") if Path(entry.path).stem == stage)
        return self._pull(entry for entry in scores if not self._local(entry).exists())

    def keep(self, stage: str) -> None:
        """Upload what a running stage has left so far, its checkpoint last."""
        self._push(sorted(self._files(self.runs / "stages" / stage), key=lambda file: file.name == "checkpoint.pt"))

    def finish(self, stage: str) -> None:
        """Upload a finished stage, its scores, and then the marker; its checkpoint is not needed any more."""
        folder = self.runs / "stages" / stage
        scores = self.runs / "scores" / f"{stage}.parquet"
        self._push([*self._files(folder), *([scores] if scores.exists() else [])])
        files, root = self._opened
        for entry in self._list(f"stages/{stage}"):
            if Path(entry.path).name == "checkpoint.pt":
                files.delete_file(entry.path)
        self._put((folder / "done.json").read_bytes(), f"{root}/done/{stage}.json")

    def push(self, sweep: Path) -> None:
        """Upload the files of a sweep's folder, Tune's own folder left out."""
        self._push(file for file in sweep.glob("*") if file.is_file() and _shared(file))

    def refresh(self) -> None:
        """What listings and leaderboards read: light files and scores of finished stages, and sweeps; weights stay away."""
        new = {stage for stage in self.finished() if not (self.runs / "stages" / stage / "done.json").exists()}
        wanted = [entry for entry in self._list("scores") if Path(entry.path).stem in new]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for entries in pool.map(lambda stage: self._list(f"stages/{stage}"), sorted(new)):
                wanted += [entry for entry in entries if Path(entry.path).name in LIGHT]
        wanted += [entry for entry in self._list("sweeps", recursive=True) if self._newer(entry)]
        self._pull(sorted(wanted, key=_last))

    # Claims

    @contextlib.contextmanager
    def claimed(self, name: str) -> Iterator[bool]:
        """Try to be the only machine that works on `name`, as the body runs: yields whether this one is.

        For one process per machine: those that share `runs` have a lock for that, and what they left, killed, is void.
        """
        files, root = self._opened
        wants, has = (f"{root}/claims/{name}@{self._machine}.{what}" for what in ("wants", "has"))
        try:
            self._put(b"{}", wants)
            alone = self._first(name, wants)
            if alone:
                time.sleep(SETTLE)
                alone = self._first(name, wants)
            if not alone:
                yield False
                return
            self._put(b"{}", has)
            with self._renewed(has):
                yield True
        finally:
            for path in (wants, has):
                with contextlib.suppress(OSError):
                    files.delete_file(path)

    @functools.cached_property
    def _machine(self) -> str:
        """A name of the local folder, which is what processes of one machine share."""
        file = self.runs / ".machine"
        if not file.exists():
            atomic.write_text(file, uuid.uuid4().hex)
        return file.read_text()

    def _first(self, name: str, own: str) -> bool:
        """Whether no other machine has `name`, and this one, which has just said at `own` that it wants it, is the first to."""
        others = {entry.path: entry for entry in self._list("claims") if Path(entry.path).name.startswith(f"{name}@")}
        mine = others.pop(own, None)
        for path in [path for path in others if path.startswith(own.removesuffix("wants"))]:
            del others[path]  # of a process of this machine that was killed
        if mine is None:
            return False  # somebody has cleared it away
        alive = [path for path, entry in others.items() if (mine.mtime_ns - entry.mtime_ns) / 1e9 < EXPIRES]
        return not any(path.endswith(".has") or (path.endswith(".wants") and path < own) for path in alive)

    @contextlib.contextmanager
    def _renewed(self, path: str) -> Iterator[None]:
        """A sign of life at `path` every `BEAT` seconds, as long as the body runs."""
        ended = threading.Event()

        def renew() -> None:
            while not ended.wait(BEAT):
                with contextlib.suppress(RunError):  # the next one may come through
                    self._put(b"{}", path)

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    # Files there and here

    @functools.cached_property
    def _opened(self) -> "tuple[FileSystem, str]":
        """The file system, and the store's path in it. AWS_ENDPOINT_URL names an S3 server other than Amazon's."""
        from pyarrow import fs

        scheme, _, path = self.uri.partition("://")
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        try:
            if scheme == "s3" and endpoint:
                kind, _, host = endpoint.rpartition("://")
                return fs.S3FileSystem(endpoint_override=host.rstrip("/"), scheme=kind or "https"), path.rstrip("/")
            opened, root = fs.FileSystem.from_uri(self.uri)
        except (OSError, ValueError, ImportError) as error:
            raise self._unreachable(error) from error
        return opened, root.rstrip("/")

    def _list(self, folder: str, recursive: bool | None = None) -> "list[FileInfo]":
        from pyarrow import fs

        files, root = self._opened
        deep = folder.startswith("stages/") if recursive is None else recursive
        try:
            return [
                entry
                for entry in files.get_file_info(fs.FileSelector(f"{root}/{folder}", allow_not_found=True, recursive=deep))
                if entry.is_file
            ]
        except OSError as error:
            raise self._unreachable(error) from error

    def _local(self, entry: "FileInfo") -> Path:
        return self.runs / entry.path.removeprefix(f"{self._opened[1]}/")

    def _newer(self, entry: "FileInfo") -> bool:
        here = self._local(entry)
        if not here.exists():
            return True
        about = here.stat()
        return (about.st_size, about.st_mtime_ns) != (entry.size, entry.mtime_ns)  # `_pull` leaves it equal

    def _step(self, stage: str) -> int:
        files, root = self._opened
        try:
            with files.open_input_stream(f"{root}/stages/{stage}/progress.json") as file:
                return int(json.loads(file.read())["step"])
        except FileNotFoundError:
            return -1

    def _files(self, folder: Path) -> list[Path]:
        return [file for file in sorted(folder.rglob("*")) if file.is_file() and _shared(file) and "workers" not in file.parts]

    def _pull(self, entries: "Iterable[FileInfo]") -> None:
        """Download, one after the other: the last of a stage says that it is whole."""
        files, _ = self._opened
        for entry in entries:
            with files.open_input_stream(entry.path) as source:
                content = source.read()
            here = self._local(entry)
            atomic.write(here, functools.partial(_fill, content), durable=False)
            os.utime(here, ns=(entry.mtime_ns, entry.mtime_ns))

    def _push(self, paths: Iterable[Path]) -> None:
        _, root = self._opened
        for path in paths:
            self._put(path.read_bytes(), f"{root}/{path.relative_to(self.runs)}")

    def _put(self, content: bytes, path: str) -> None:
        """Write one file there, whole or not at all."""
        files, _ = self._opened
        whole = files.type_name in ("s3", "gcs", "abfs")
        try:
            if not whole:
                files.create_dir(path.rpartition("/")[0])
            temporary = path if whole else f"{path}.{os.getpid()}"
            with files.open_output_stream(temporary) as sink:
                sink.write(content)
            if not whole:
                files.move(temporary, path)
        except OSError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> RunError:
        return RunError(f"MEDSSL_RUNS={self.uri}: {error}; is the store there, and may this machine read and write it?")


def _shared(file: Path) -> bool:
    return file.name not in OWN and not file.name.startswith(".")


def _last(entry: "FileInfo") -> bool:
    """What says that a stage is whole, or from where to go on, comes last."""
    return Path(entry.path).name in ("done.json", "checkpoint.pt")


def _step(folder: Path) -> int:
    if not (folder / "checkpoint.pt").exists():
        return -1
    try:
        return int(json.loads((folder / "progress.json").read_text())["step"])
    except (FileNotFoundError, ValueError, KeyError):
        return -1
