"""Stages as runs of W&B and MLflow, against the real packages offline; skipped where these extras are not installed."""

import importlib
import importlib.util
import json
import time
from pathlib import Path

import pytest

from medssl.platform import config, trackers
from medssl.platform.board import Board
from medssl.platform.errors import UsageError

RECORD = {"kind": "pretrain", "stage": "simsiam-abc", "arm": "middle", "pretraining": 1, "config": {"network": {"width": 4}}}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A stage's folder; trackers stay offline and leave nothing elsewhere."""
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "runs" / "stages" / "simsiam-abc"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(RECORD))
    return folder


def tell(folder: Path, names: tuple[str, ...], steps: range, fail: bool = False) -> trackers.Runs:
    """A stage that reports some steps and ends, or dies on the way."""
    with trackers.opened(names, folder, "overlap-toy-1", folder.parents[1]) as runs, Board(folder, runs) as board:
        for step in steps:
            board.scalars(step, {"loss/total": 1.0 / step, "collapse": 0.1})
        if fail:
            raise KeyboardInterrupt
        runs.end({"status": "finished", "step": steps[-1], "test": 0.75, "monitors": {"collapse": 0.1}})
    return runs


def mlflow_run(folder: Path):
    """The only run in the store of a run store, with its client."""
    client = trackers._client(folder.parents[1])
    (run,) = client.search_runs([trackers._experiment(client)])
    return client, run


@pytest.mark.slow
def test_mlflow_gets_the_scalars_the_configuration_and_the_end_of_a_stage(folder):
    pytest.importorskip("mlflow", reason="extra [mlflow] is not installed")
    trackers.check(["mlflow"], folder.parents[1])
    with pytest.raises(KeyboardInterrupt):
        tell(folder, ("mlflow",), range(1, 3), fail=True)
    assert mlflow_run(folder)[1].info.status == "FAILED"
    tell(folder, ("mlflow",), range(2, 5))  # continued from a checkpoint of step 1
    client, run = mlflow_run(folder)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "middle #2 pretrain")
    assert run.data.tags["medssl.group"] == "overlap-toy-1/middle"
    assert run.data.params["config.network.width"] == "4"
    assert run.data.metrics["final/test"] == 0.75
    assert run.data.metrics["final/monitors.collapse"] == 0.1
    told = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "loss/total")}
    assert told == pytest.approx({step: 1.0 / step for step in range(1, 5)})


@pytest.mark.slow
def test_wandb_offline_leaves_a_run_under_the_stage_with_all_that_was_told(folder):
    pytest.importorskip("wandb", reason="extra [wandb] is not installed")
    trackers.check(["wandb"], folder.parents[1])
    assert tell(folder, ("wandb",), range(1, 4)).lost == {}
    (file,) = folder.glob("wandb/offline-run-*/run-simsiam-abc.wandb")
    rows, run, summary = until_written(file)
    assert (run.run_id, run.run_group, run.job_type, run.display_name) == (
        "simsiam-abc", "overlap-toy-1/middle", "pretrain", "middle #2 pretrain",
    )  # fmt: skip
    assert json.loads(next(item.value_json for item in run.config.update if item.key == "config")) == RECORD["config"]
    assert [(row["_step"], row["loss/total"]) for row in rows] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert summary["test"] == 0.75


def until_written(file: Path):
    """Its records, once the process that W&B writes in has ended the run."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        *found, ended = records(file)
        if ended:
            return found
        time.sleep(0.05)
    pytest.fail("the run was not ended within 30 s")


def records(file: Path):
    """What an offline run's file holds: rows of history, the run, its summary, and whether the run has ended.

    It is LevelDB's log format after 7 bytes: blocks of 32 KiB of pieces, each checksum (4), length (2), kind (1), bytes.
    """
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    rows, run, summary, ended = [], None, {}, False
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a piece: the next block
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind not in (1, 4):  # more of this record is to come
            continue
        record, whole = wandb_internal_pb2.Record.FromString(whole), b""
        what = record.WhichOneof("record_type")
        if what == "history":
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
        elif what == "run":
            run = run or record.run
        elif what == "summary":
            summary |= {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.summary.update}
        ended |= what == "exit"
    return rows, run, summary, ended


class Broken:
    """A tracker whose network goes away after the first row."""

    def __init__(self):
        self.rows = 0

    def log(self, step, values):
        self.rows += 1
        if self.rows > 1:
            raise ConnectionError("no route to host\nand more")

    def end(self, done):
        raise AssertionError("it was left out before")

    def close(self, failed):
        raise AssertionError("it was left out before")


def test_a_tracker_that_fails_is_left_out_and_named_and_the_others_go_on(tmp_path):
    runs, told = trackers.Runs(), []
    runs.begin("broken", Broken)
    runs.begin("missing", lambda: importlib.import_module("no_such_tracker"))
    with Board(tmp_path, runs) as board:
        for step in range(3):
            board.scalars(step, {"loss": 1.0})
            told.append(sorted(runs.open))
    runs.end({})
    runs.close(failed=False)
    assert told == [["broken"], [], []]
    assert runs.lost == {"broken": "no route to host", "missing": "No module named 'no_such_tracker'"}
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 3


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_refused_by_the_extra_that_brings_it(tmp_path, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UsageError, match=rf"{name} is not installed; pip install medssl\[{name}\]"):
        trackers.check([name], tmp_path)


def test_wandb_without_an_account_is_refused_before_anything_starts(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="extra [wandb] is not installed")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UsageError, match="WANDB_MODE=offline"):
        trackers.check(["wandb"], tmp_path)


def test_an_unknown_tracker_is_refused():
    with pytest.raises(UsageError, match=r"resources\.trackers"):
        config.build({"resources": {"trackers": ["tensorboard"]}})
    assert config.build({"resources": {"trackers": ["wandb", "mlflow"]}}).resources.trackers == ("wandb", "mlflow")
