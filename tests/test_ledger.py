"""The ledger keeps what it was given, whole, once, and never mixes contracts."""

import math
import os
import signal
import subprocess
import sys
import time

import pytest

from medssl.platform import ledger, metrics
from medssl.platform.errors import RunError, UsageError
from medssl.platform.records import Score


def scores(patients: int = 3, shift: float = 0.0) -> list[Score]:
    """Two volumes per patient, two classes, Dice and HD95, with undefined and infinite numbers among them."""
    found = []
    for patient in range(patients):
        for side in ("left", "right"):
            for class_id, name in enumerate(("liver", "spleen")):
                missed = (patient, side, name) == (1, "left", "spleen")
                absent = (patient, side, name) == (2, "right", "liver")
                value = math.nan if absent else 0.0 if missed else (patient + 1) / 10 + class_id / 100 + shift
                distance = math.nan if absent else math.inf if missed else patient + class_id + 1.0
                for metric, number in (("dice", value), ("hd95_mm", distance)):
                    found.append(Score(f"p{patient}", f"p{patient}_{side}", "test", name, metric, number))
    return found


def test_what_is_read_is_what_was_written(tmp_path):
    ledger.write(tmp_path, "a1", "c", scores())
    table = ledger.read(tmp_path, ["a1"])
    assert table.column_names == ["stage", "contract", "patient", "volume", "part", "class_name", "metric", "value"]
    found = {tuple(repr(value) for value in list(row.values())[2:]) for row in table.to_pylist()}
    assert found == {tuple(map(repr, vars(score).values())) for score in scores()}


def test_the_scores_of_a_run_sum_up_as_they_did_before_they_were_written(tmp_path):
    ledger.write(tmp_path, "a1", "c", scores())
    assert repr(metrics.aggregate(ledger.scores(tmp_path, "a1")).mean) == repr(metrics.aggregate(scores()).mean)


def test_entering_the_same_again_in_any_order_changes_nothing(tmp_path):
    path = ledger.write(tmp_path, "a1", "c", scores())
    before = path.stat().st_mtime_ns, path.read_bytes()
    assert ledger.write(tmp_path, "a1", "c", scores()[::-1]) == path
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before


@pytest.mark.parametrize("change", ["value", "contract", "fewer"])
def test_other_scores_of_a_finished_stage_are_refused(tmp_path, change):
    path = ledger.write(tmp_path, "a1", "c", scores())
    before = path.read_bytes()
    other = {"value": scores(shift=1e-9), "contract": scores(), "fewer": scores()[1:]}[change]
    with pytest.raises(RunError, match="holds other scores of stage a1"):
        ledger.write(tmp_path, "a1", "d" if change == "contract" else "c", other)
    assert path.read_bytes() == before


def test_means_per_patient_equal_those_of_the_metric_contract(tmp_path):
    ledger.write(tmp_path, "a1", "c", scores())
    ledger.write(tmp_path, "b2", "c", scores(shift=0.05))
    table = ledger.read(tmp_path, ["a1", "b2", "a1"])
    for metric in ("dice", "hd95_mm"):
        found = ledger.by_patient(table, metric, "test")
        for stage, shift in (("a1", 0.0), ("b2", 0.05)):
            assert found[stage] == pytest.approx(metrics.aggregate(scores(shift=shift)).by_patient[metric])
    assert ledger.by_patient(table, "dice", "val") == {}


def test_a_patient_without_any_defined_number_is_kept_as_undefined(tmp_path):
    ledger.write(tmp_path, "a1", "c", [Score("p0", "p0", "test", "liver", "hd95_mm", math.inf)])
    found = ledger.by_patient(ledger.read(tmp_path, ["a1"]), "hd95_mm", "test")
    assert math.isnan(found["a1"]["p0"])


def test_runs_of_different_contracts_are_not_compared(tmp_path):
    for stage, contract in (("a1", "c"), ("a2", "c"), ("b1", "d")):
        ledger.write(tmp_path, stage, contract, scores())
    assert len(ledger.read(tmp_path, ["a1", "a2"])) == 2 * len(scores())
    with pytest.raises(UsageError, match=r"contract c: a1, a2; contract d: b1"):
        ledger.read(tmp_path, ["a1", "a2", "b1"])


def test_the_contract_holds_data_split_and_metric_rule(monkeypatch):
    base = ledger.contract("data", "split")
    assert base == ledger.contract("data", "split")
    others = {ledger.contract("data2", "split"), ledger.contract("data", "split2"), ledger.contract("split", "data")}
    monkeypatch.setattr(metrics, "VERSION", metrics.VERSION + 1)
    others.add(ledger.contract("data", "split"))
    assert len(others) == 4
    assert base not in others


def test_missing_and_broken_entries_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"no scores of a1, a2, a3 and 1 more in .*scores; finish these runs first"):
        ledger.read(tmp_path, ["a1", "a2", "a3", "a4"])
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "a1.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match=r"a1.parquet cannot be read as a ledger of scores"):
        ledger.read(tmp_path, ["a1"])


def test_nothing_to_read_is_an_empty_table(tmp_path):
    table = ledger.read(tmp_path, [])
    assert len(table) == 0
    assert ledger.by_patient(table, "dice", "test") == {}


def test_a_kill_while_writing_leaves_whole_files_only(tmp_path):
    writer = f"""
import itertools, pathlib
from medssl.platform import ledger
from medssl.platform.records import Score
scores = [Score(f"p{{i}}", f"p{{i}}", "test", "liver", "dice", i / 7) for i in range(3000)]
for n in itertools.count():
    ledger.write(pathlib.Path({str(tmp_path)!r}), f"s{{n}}", "c", scores)
"""
    process = subprocess.Popen([sys.executable, "-c", writer])
    folder, deadline = tmp_path / "scores", time.monotonic() + 60
    while len(list(folder.glob("*.parquet"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    stages = [path.stem for path in folder.glob("*.parquet")]
    assert len(stages) >= 3
    assert len(ledger.read(tmp_path, stages)) == 3000 * len(stages)


def test_a_hundred_thousand_scores_are_summarised(tmp_path):
    for stage in range(10):
        rows = [
            Score(f"p{n % 100}", f"v{n % 500}", "test", f"organ{n // 500 % 10}", f"metric{n // 5000}", n / 10_000)
            for n in range(10_000)
        ]
        ledger.write(tmp_path, f"s{stage}", "c", rows)
    found = ledger.by_patient(ledger.read(tmp_path, [f"s{stage}" for stage in range(10)]), "metric1", "test")
    assert len(found) == 10
    assert all(len(patients) == 100 for patients in found.values())


def test_a_ledger_of_a_hundred_thousand_scores_in_a_thousand_files_is_ranked_rightly(tmp_path):
    from medssl.platform.benches import ledger as bench

    owners = bench.fill(tmp_path)
    board = bench.ranked(tmp_path, owners)
    expected = bench.by_pandas(tmp_path, owners)
    assert len(board.rows) == bench.ARMS
    assert {row.arm: row.mean for row in board.rows} == pytest.approx(expected)
