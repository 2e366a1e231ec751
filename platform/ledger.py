"""The ledger of scores: one Parquet file per finished run, written once, never changed.

    RUNS/scores/<stage>.parquet     stage · contract · patient · volume · part · class_name · metric · value

The contract of a score is what it was measured on and how: data, split and metric rule. Scores of different contracts
are never put side by side. PyArrow is imported late.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medssl.platform import atomic, metrics
from medssl.platform.errors import RunError, UsageError
from medssl.platform.records import Part, Score

if TYPE_CHECKING:
    import pyarrow

TEXT = ("stage", "contract", "patient", "volume", "part", "class_name", "metric")


def contract(data: str, split: str) -> str:
    """The contract of scores: a hash of the data's content, the split's content, and the metric rule in force."""
    return hashlib.sha256(json.dumps([data, split, metrics.VERSION]).encode()).hexdigest()[:16]


def write(runs: Path, stage: str, contract: str, scores: Sequence[Score]) -> Path:
    """Enter the scores of a finished run. Entering the same again, in any order, changes nothing.

    The file appears whole or not at all, and no kill leaves half of it.
    Raises RunError when the ledger holds other scores of this stage.
    """
    path = _path(runs, stage)
    table = _table(stage, contract, scores)
    if not path.exists():
        _put(path, table)
    elif not _same(_load(path), table):
        raise RunError(
            f"{path} holds other scores of stage {stage}, and the ledger is append-only; "
            "if the file is wrong, move it away and run again"
        )
    return path


def holds(runs: Path, stage: str) -> bool:
    """Whether a run has been scored."""
    return _path(runs, stage).exists()


def read(runs: Path, stages: Iterable[str]) -> "pyarrow.Table":
    """The scores of several runs in one table. Raises UsageError when one is missing or their contracts differ."""
    import pyarrow

    stages = list(dict.fromkeys(stages))
    if missing := [stage for stage in stages if not _path(runs, stage).exists()]:
        raise UsageError(f"no scores of {_some(missing)} in {runs / 'scores'}; finish these runs first")
    table = pyarrow.concat_tables([_table("", "", []), *(_load(_path(runs, stage)) for stage in stages)])
    by_contract: dict[str, list[str]] = {}
    for pair in table.group_by(["contract", "stage"]).aggregate([]).to_pylist():
        by_contract.setdefault(pair["contract"], []).append(pair["stage"])
    if len(by_contract) > 1:
        found = "; ".join(f"contract {contract}: {_some(sorted(held))}" for contract, held in sorted(by_contract.items()))
        raise UsageError(
            f"these runs were scored on different data, splits or metric rules and cannot be compared ({found}); "
            "choose runs of one contract"
        )
    return table


def scores(runs: Path, stage: str) -> list[Score]:
    """The scores of one run, as `metrics.aggregate` takes them. Raises UsageError when it has none."""
    return [Score(**row) for row in read(runs, [stage]).drop_columns(["stage", "contract"]).to_pylist()]


def by_patient(table: "pyarrow.Table", metric: str, part: Part) -> dict[str, dict[str, float]]:
    """One value per run and patient: mean over classes, then over the patient's volumes; NaN where nothing is defined.

    Infinite and undefined numbers are left out of the means, as `metrics.CONTRACT` says.
    """
    import pyarrow.compute as pc

    table = table.filter((pc.field("metric") == metric) & (pc.field("part") == part))
    finite = pc.if_else(pc.is_finite(table["value"]), table["value"], None)
    table = table.set_column(table.schema.get_field_index("value"), "value", finite)
    for keys in (["stage", "patient", "volume"], ["stage", "patient"]):
        table = table.group_by(keys, use_threads=False).aggregate([("value", "mean")])
        table = table.rename_columns({"value_mean": "value"})
    values: dict[str, dict[str, float]] = {}
    for row in table.to_pylist():
        values.setdefault(row["stage"], {})[row["patient"]] = math.nan if row["value"] is None else row["value"]
    return values


def _path(runs: Path, stage: str) -> Path:
    return runs / "scores" / f"{stage}.parquet"


def _table(stage: str, contract: str, scores: Sequence[Score]) -> "pyarrow.Table":
    """The scores as the ledger keeps them, in one fixed order of rows."""
    import pyarrow

    columns = {name: [getattr(score, name) for score in scores] for name in (*TEXT[2:], "value")}
    columns |= {"stage": [stage] * len(scores), "contract": [contract] * len(scores)}
    schema = pyarrow.schema([*((name, pyarrow.string()) for name in TEXT), ("value", pyarrow.float64())])
    return pyarrow.table(columns, schema).sort_by([(name, "ascending") for name in TEXT])


def _put(path: Path, table: "pyarrow.Table") -> None:
    import pyarrow.parquet

    atomic.write(path, lambda file: pyarrow.parquet.write_table(table, file, compression="zstd"))


def _load(path: Path) -> "pyarrow.Table":
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            return file.read(use_threads=False)  # the files are small
    except pyarrow.ArrowInvalid as error:
        raise RunError(f"{path} cannot be read as a ledger of scores ({error}); move it away and run again") from error


def _same(first: "pyarrow.Table", second: "pyarrow.Table") -> bool:
    """Whether the tables say the same, NaN being equal to NaN."""
    import numpy as np

    texts = first.select(TEXT).equals(second.select(TEXT))
    return texts and np.array_equal(first["value"].to_numpy(), second["value"].to_numpy(), equal_nan=True)


def _some(stages: Sequence[str]) -> str:
    """The first few of many stages, and how many more there are."""
    return ", ".join(stages[:3]) + (f" and {len(stages) - 3} more" if len(stages) > 3 else "")
