"""The scalars of a stage as data: whole, in order, a step once, whatever was killed on the way."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest

from medssl.platform import history
from medssl.platform.board import Board
from medssl.platform.history import History


def written(folder, steps, **values):
    log = History(folder)
    for step in steps:
        log.add(step, {"loss": step / 10, **values})
    log.close()


def test_what_the_board_is_told_is_read_back_to_the_last_digit(tmp_path):
    with Board(tmp_path) as board:
        board.scalars(1, {"loss/total": 1 / 3, "collapse": math.nan})
        board.scalars(2, {"loss/total": 1e-9, "collapse": 0.5})
    rows = history.read(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    assert history.series(rows, "loss/total") == ([1, 2], [1 / 3, 1e-9])
    assert history.series(rows, "collapse") == ([2], [0.5]), "what is undefined is left out"
    for line in (tmp_path / history.NAME).read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_the_table_of_a_stage_has_a_row_for_every_number_by_group_and_metric(tmp_path):
    import pyarrow.parquet

    log = History(tmp_path)
    log.add(1, {"loss/mean_teacher/mse": 0.25, "labelled": math.nan})
    log.add(2, {"loss/mean_teacher/mse": 0.125})
    log.close()
    history.table(tmp_path)
    rows = pyarrow.parquet.read_table(tmp_path / history.TABLE).to_pylist()
    assert [(row["step"], row["group"], row["metric"]) for row in rows] == [
        (1, "loss/mean_teacher", "mse"), (1, "", "labelled"), (2, "loss/mean_teacher", "mse"),
    ]  # fmt: skip
    assert [row["value"] for row in rows if row["group"]] == [0.25, 0.125]
    assert math.isnan(rows[1]["value"])
    (tmp_path / "none").mkdir()
    history.table(tmp_path / "none")
    assert pyarrow.parquet.read_table(tmp_path / "none" / history.TABLE).num_rows == 0


def test_a_continued_stage_takes_back_what_it_repeats(tmp_path):
    written(tmp_path, [10, 20, 30, 40], from_first=1.0)
    written(tmp_path, [25, 30, 45])  # continued from a checkpoint at step 20
    rows = history.read(tmp_path)
    assert [row["step"] for row in rows] == [10, 20, 25, 30, 45]
    assert "from_first" not in rows[3]


def test_rows_of_one_step_are_joined_and_the_last_value_counts(tmp_path):
    log = History(tmp_path)
    log.add(5, {"loss": 1.0, "lr": 0.1})
    log.add(5, {"validation": 0.7, "loss": 2.0})
    (row,) = history.read(tmp_path)
    assert (row["loss"], row["lr"], row["validation"]) == (2.0, 0.1, 0.7)


def test_seconds_go_on_where_the_process_before_ended(tmp_path):
    (tmp_path / history.NAME).write_text('{"step": 10, "seconds": 1000.0, "loss": 1.0}\n')
    written(tmp_path, [20])
    assert 1000.0 <= history.read(tmp_path)[-1]["seconds"] < 1060.0
    assert history.spent(tmp_path) == history.read(tmp_path)[-1]["seconds"]


def test_a_line_that_a_kill_cut_short_is_no_line_and_harms_no_other(tmp_path):
    written(tmp_path, [10, 20])
    path = tmp_path / history.NAME
    path.write_bytes(path.read_bytes()[:-9])
    written(tmp_path, [15, 25])
    assert [row["step"] for row in history.read(tmp_path)] == [10, 15, 25]


def test_a_killed_writer_leaves_every_report_it_made(tmp_path):
    code = f"""
import itertools, pathlib
from medssl.platform.history import History
log = History(pathlib.Path({str(tmp_path)!r}))
for step in itertools.count(1):
    log.add(step, {{"loss": 1 / step}})
    print(step, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = [process.stdout.readline() for _ in range(50)]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    steps = [row["step"] for row in history.read(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= int(told[-1])


def test_a_stage_that_has_reported_nothing_has_no_history(tmp_path):
    assert history.read(tmp_path) == []
    assert history.spent(tmp_path) == 0.0


def test_ten_thousand_reports_are_kept(tmp_path):
    written(tmp_path, range(10_000), a=1.0, b=2.0, c=3.0)
    assert len(history.read(tmp_path)) == 10_000
