"""The scalars of a stage as data: `scalars.jsonl` in its folder, a line per report, appended while it trains.

    {"step": 120, "seconds": 34.2, "loss/total": 0.41, "collapse": 0.03, "lr": 0.05}

`seconds` is the time that processes have spent on the stage so far, what a kill made them repeat included. What is not a
finite number is null. A stage that was killed and continued reports some steps twice, and a kill can cut a line in two:
`read` gives the history of the weights that were kept. When the stage ends, `table` writes it as `scalars.parquet`, a row per
number: step, seconds, group ("loss/mean_teacher"), metric ("mse"), value.
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medssl.platform import atomic

NAME = "scalars.jsonl"
TABLE = "scalars.parquet"
Row = dict[str, float]


class History:
    """Appends to a stage's scalars; one process at a time, the one that owns the stage."""

    def __init__(self, folder: Path):
        path = folder / NAME
        lines = _lines(path)
        self.spent = lines[-1]["seconds"] if lines else 0.0
        self.begun = time.monotonic()
        self.file = path.open("a")
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self.file.write("\n")  # what a kill cut short stays a line of its own

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """One report; a few microseconds, and on its way to the disk when this returns."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        seconds = round(self.spent + time.monotonic() - self.begun, 3)
        self.file.write(json.dumps({"step": step, "seconds": seconds, **finite}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read(folder: Path) -> list[Row]:
    """The rows of a stage, a step once, steps ascending; empty when it has reported nothing.

    A step that comes again takes back everything from there on: the stage had been continued from an earlier checkpoint.
    Rows of one step are joined, the last value of a name counts. null is NaN.
    """
    rows: list[Row] = []
    for line in _lines(folder / NAME):
        while rows and rows[-1]["step"] > line["step"]:
            rows.pop()
        row = {name: math.nan if value is None else value for name, value in line.items()}
        if rows and rows[-1]["step"] == line["step"]:
            rows[-1] |= row
        else:
            rows.append(row)
    return rows


def table(folder: Path) -> None:
    """Write what `read` gives, one row per number; groups are what stands before the last / of a name."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"step": int(row["step"]), "seconds": row["seconds"], "group": group, "metric": metric, "value": value}
        for row in read(folder)
        for name, value in row.items()
        for group, _, metric in [name.rpartition("/")]
        if name not in ("step", "seconds")
    ]
    kinds = {"step": pyarrow.int64(), "seconds": pyarrow.float64(), "group": pyarrow.string(), "metric": pyarrow.string()}
    found = pyarrow.Table.from_pylist(rows, pyarrow.schema([*kinds.items(), ("value", pyarrow.float64())]))
    atomic.write(folder / TABLE, lambda file: pyarrow.parquet.write_table(found, file, compression="zstd"))


def spent(folder: Path) -> float:
    """Seconds that processes have reported to have spent on a stage, repeats after kills included."""
    lines = _lines(folder / NAME)
    return lines[-1]["seconds"] if lines else 0.0


def series(rows: list[Row], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one scalar, where it was reported and is a number."""
    found = [(row["step"], row[name]) for row in rows if not math.isnan(row.get(name, math.nan))]
    return [step for step, _ in found], [value for _, value in found]


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines in the order they were written; one that a kill cut short is no line."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict)]
