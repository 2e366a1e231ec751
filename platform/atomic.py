"""Files that are whole or absent, and folders that one process owns at a time."""

import contextlib
import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from medssl.platform.errors import RunError


@contextlib.contextmanager
def _room(path: Path) -> Iterator[None]:
    """Says in one sentence what kept `path` from being written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"{path}: no space left on the disk; free some or choose another folder, then run again") from error
        if error.errno == errno.EFBIG:
            raise RunError(
                f"{path}: larger than a file may be here (ulimit -f); raise the limit, or choose another folder"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise RunError(f"{path}: may not be written here ({error.strerror}); choose another folder") from error
        raise


def write(path: Path, fill: Callable[[BinaryIO], object], *, durable: bool = True) -> None:
    """Create or replace `path` with what `fill` writes, in one step: readers see the old file or the new one, never half.

    durable    also across a loss of power, for some 30 ms; without it, across the death of any process
    Raises RunError when the disk is full or read-only; the half-written file is removed and the old one stays.
    """
    with _room(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                fill(file)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp gives 0600, and stores are shared
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


def write_text(path: Path, text: str) -> None:
    write(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    write(path, lambda file: file.write(json.dumps(value, indent=1).encode() + b"\n"), durable=durable)


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[bool]:
    """Try to own `folder`: yields whether this process is now its only owner. The kernel lets go when the process dies."""
    with _room(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
