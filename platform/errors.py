"""Errors that a user can act on. `cli.py` prints their one sentence; anything else is a bug and keeps its traceback."""

from pathlib import Path


class UsageError(Exception):
    """What was asked for cannot be meant: an unknown name, a wrong type, a value out of range. Exit code 2."""

    exit_code = 2


class RunError(Exception):
    """What was asked for failed: a broken scan, a full disk, a diverged training. Exit code 1."""

    exit_code = 1


class Problem(RunError):
    """What is wrong with one file: `data prepare` raises the first, `data check` lists all."""

    def __init__(self, file: Path, what: str) -> None:
        super().__init__(file, what)
        self.file = file
        self.what = what

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"
