"""What a run has to say, through one logger: all of it into the run's folder, and on the console what its level lets through.

    logs.LOGGER.info("continues from step %d", step)        "medssl", or `logging.getLogger("medssl.methods.x")` in methods/

`medssl --log info …` sets the level of the console, which is `warning`; the file has every level. Numbers of the training are
not messages: they are in TensorBoard, in history and in log.txt (`board.py`).
"""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from medssl.platform.errors import UsageError

LEVELS = ("debug", "info", "warning", "error")
LOGGER = logging.getLogger("medssl")
FORMAT = "%(asctime)s %(levelname)-7s %(message)s"


def console(level: str) -> None:
    """Show messages from `level` upwards on standard error. Raises UsageError for a level that is none."""
    if level not in LEVELS:
        raise UsageError(f"--log {level}: expected one of {', '.join(LEVELS)}")
    for handler in [handler for handler in LOGGER.handlers if handler.name == "console"]:
        LOGGER.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.name = "console"
    _attach(handler, level.upper())


@contextlib.contextmanager
def written(folder: Path) -> Iterator[None]:
    """While it lasts, every message goes to `messages.log` in the folder of a run, too."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / "messages.log")
    _attach(handler, "DEBUG")
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        handler.close()


def _attach(handler: logging.Handler, level: str) -> None:
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter(FORMAT))
    LOGGER.setLevel(logging.DEBUG)
    LOGGER.propagate = False  # Ray and Optuna have roots of their own
    LOGGER.addHandler(handler)
