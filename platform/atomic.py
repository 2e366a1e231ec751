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


def write(path: Path, fill: Callable[[BinaryIO], object], *, durable: bool = True) -> None:
    """Create or replace `path` with what `fill` writes, in one step: readers see the old file or the new one, never half.

    durable    also across a loss of power, for some 30 ms; without it, across the death of any process
    Raises RunError when the disk is full; the half-written file is removed and the old one stays.
    """
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
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"{path}: no space left on the disk; free some or choose another folder, then run again") from error
        raise


def write_text(path: Path, text: str) -> None:
    write(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[bool]:
    """Try to own `folder`: yields whether this process is now its only owner. The kernel lets go when the process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
