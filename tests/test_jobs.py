"""Sweeps as jobs of a real Ray head on this machine, through the command line: they outlive whoever submitted them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from medssl import cli
from medssl.platform import atomic, catalogue, checkpoint, jobs, stages
from medssl.platform.datasets import phantom
from medssl.platform.errors import RunError, UsageError
from medssl.platform.site import Site
from medssl.platform.sweep import Sweep

SPACE = """
QUESTION = "Does pretraining matter?"
CONTROL = "scratch"

def arms():
    return {"scratch": {"pretrain": None}, "simsiam": {}}
"""
SMALL = {
    "network": {"width": 4, "levels": 2},
    "pretrain": {"side": 16, "d": 16, "bottleneck": 8, "training": {"steps": 4, "batch": 8}},
    "finetune": {"side": 16, "training": {"steps": 6, "batch": 4, "evaluations": 1}},
    "evaluate": {"inference": "whole"},
    "resources": {"checkpoint_seconds": 0.05},
}
SWEEP = ["sweep", "matters.py", "--data", "tiny", "-p", "small.yaml", "--pretrainings", "1", "--finetunings", "1"]
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[str]:
    """The dashboard's address of a head with one core. Where it was started, it was told where data and runs lie.

    This process stands in a folder of its own, with a space and settings that only travelling brings to a job.
    """
    from ray.cluster_utils import Cluster

    root = tmp_path_factory.mktemp("laptop")
    (root / "matters.py").write_text(SPACE)
    (root / "small.yaml").write_text(yaml.safe_dump(SMALL))
    sockets = tempfile.mkdtemp(prefix="r", dir="/tmp")  # whose names must be short
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            patch.setenv(name, "")  # restored, whatever is set meanwhile
            patch.delenv(name)
        told = {"MEDSSL_DATA": root / "there" / "data", "MEDSSL_RUNS": root / "there" / "runs"}
        told["MEDSSL_SHUTDOWN"] = f"echo >> {root / 'shutdowns'}"
        told["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        for name, value in (ENVIRONMENT | told).items():
            patch.setenv(name, str(value))
        phantom.generate(root / "scans" / "tiny", patients=8)
        smaller = {"spacing_mm": (12.0, 12.0, 24.0), "pad": 32}
        catalogue.prepare(str(root / "scans" / "tiny"), changes=smaller, workers=1, say=lambda text: None)
        port = free_port()
        ports = {"dashboard_port": port, "dashboard_agent_listen_port": free_port(), "metrics_export_port": free_port()}
        made = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": True, "temp_dir": sockets, **ports})
        Path(sockets, "ray_current_cluster").write_text(made.address)  # as `ray start` does; else a job takes any Ray it finds
        patch.chdir(root)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            made.shutdown()
            shutil.rmtree(sockets, ignore_errors=True)


def typed(command: str, *words: str, address: str) -> str:
    """What `medssl cluster COMMAND` prints."""
    told = CliRunner().invoke(cli.app, ["cluster", command, "--address", address, *words], catch_exceptions=False)
    assert told.exit_code == 0, told.output
    return told.stdout


def wait_for(condition: Callable[[], Any], seconds: float = 180.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"nothing happened in {seconds:.0f} s")


def ended(address: str, job: str) -> str:
    """How a job ended."""

    def status() -> str | None:
        (one,) = [one for one in json.loads(typed("status", "--json", address=address)) if one["job"] == job]
        return one["status"] if one["ended"] else None

    return wait_for(status)


def shutdowns() -> int:
    return len(file.read_text().splitlines()) if (file := Path("shutdowns")).exists() else 0


@pytest.mark.slow
def test_a_submitted_sweep_outlives_its_submitter_and_leaves_its_scores_its_price_and_no_cluster(head):
    command = [sys.executable, "-m", "medssl.cli", "cluster", "submit", "--address", head, *SWEEP]
    with subprocess.Popen([*command, "--price", "2", "--shutdown-when-done"], start_new_session=True) as laptop:
        (job,) = wait_for(lambda: jobs.running(head))
        os.killpg(laptop.pid, signal.SIGKILL)
    assert job["command"].startswith("sweep matters.py --data tiny")
    assert ended(head, job["job"]) == "SUCCEEDED", typed("logs", address=head)
    site = Site.here()
    sweep = Sweep.open(site.find_sweep(None))
    assert {stage.id for chain in sweep.chains() for stage in chain.stages} == site.finished()
    board = json.loads((sweep.folder / "leaderboard.json").read_text())
    assert {row["arm"] for row in board["rows"]} == {"scratch", "simsiam"}
    said = typed("logs", job["job"][:20], address=head)
    assert "machine-hours" in said
    assert "1 machine is still up for 2.00 an hour" in said
    wait_for(lambda: shutdowns() == 1)


@pytest.mark.slow
def test_a_stopped_job_can_be_gone_on_with_and_a_cluster_goes_down_only_when_nothing_runs(head):
    site, before = Site.here(), shutdowns()
    job = typed("submit", *SWEEP, "-o", "pretrain.training.steps=600", address=head).strip()
    begun = wait_for(lambda: list(site.runs.glob("stages/simsiam-*/checkpoint.pt")))[0].parent
    assert "RUNNING" in typed("status", address=head)
    with pytest.raises(UsageError, match=f"{job}.* still runs; --yes"):
        typed("down", address=head)
    assert typed("stop", job, address=head).strip() == job
    assert ended(head, job) == "STOPPED"
    assert shutdowns() == before

    def let_go() -> bool:
        with atomic.owned(begun) as mine:
            return mine

    wait_for(let_go)  # its worker ends with the driver
    done = checkpoint.load(begun / "checkpoint.pt")["step"]
    assert 0 < done < 600
    sweep = Sweep.open(site.find_sweep(None))
    store = catalogue.open_store("tiny", say=print)
    (chain,) = [chain for chain in sweep.chains() if chain.pretraining and chain.pretraining.id == begun.name]
    stages.run_chain(chain, stages.Work(site, store.root, catalogue.split(store, sweep.split)))
    assert "continues: 600 steps" in (begun / "messages.log").read_text()
    assert json.loads((begun / "progress.json").read_text())["from"] >= done
    assert typed("down", address=head) == "the cluster is going down\n"
    wait_for(lambda: shutdowns() == before + 1)


@pytest.mark.slow
def test_a_job_does_not_begin_where_its_runs_would_be_lost(head):
    job = typed("submit", "--env", "MEDSSL_RUNS=runs", "status", address=head).strip()
    assert ended(head, job) == "FAILED"
    assert "MEDSSL_RUNS is 'runs' on the head, expected an absolute path or a URI" in typed("logs", job, address=head)


def test_what_is_typed_wrongly_is_refused_before_a_cluster_is_asked(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "small.yaml").write_text("")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match=r"small\.yaml: lies outside this folder"):
        jobs.submit(["sweep", "iou-interval", "-p", "../small.yaml"], None)
    with pytest.raises(UsageError, match="--env MEDSSL_RUNS: expected NAME=VALUE"):
        jobs.submit(["sweep", "iou-interval"], None, ["MEDSSL_RUNS"])


def test_the_address_that_was_typed_is_asked_whatever_ray_finds_in_the_environment(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:3")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:2")
    with pytest.raises(RunError, match=r"no Ray cluster answers at http://127\.0\.0\.1:1;"):
        jobs.running("http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sweep", "iou-interval"], True),
        (["sweep", "iou-interval", "--address=10.0.0.1:6379"], False),
        (["sweep", "iou-interval", "--address", "auto"], False),
        (["data", "prepare", "/shared/scans"], True),
        (["data", "check", "/shared/scans"], False),
        (["pretrain", "simsiam"], False),
    ],
)
def test_a_command_that_can_use_a_cluster_is_told_which_unless_it_was(words, expected):
    assert jobs.spreads(words) is expected
