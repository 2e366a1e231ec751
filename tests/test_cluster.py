"""Clusters of several nodes on this machine, for real: nodes die, come and go, and a sweep ends as if nothing had happened."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from medssl.platform import catalogue, places, plan, planner, spaces, stages, sweep
from medssl.platform.config import Resources
from medssl.platform.datasets import phantom
from medssl.platform.errors import UsageError
from medssl.platform.site import Site

SPACE = """
QUESTION = "Does the rate matter?"
CONTROL = "scratch"

def arms():
    rates = {f"{rate}": {"pretrain.training.lr": rate} for rate in (0.01, 0.02)}
    return {"scratch": {"pretrain": None}} | rates
"""
WIDE = """
QUESTION = "Do four arms of two workers wait for each other?"
CONTROL = "0.01"

def arms():
    return {f"{rate}": {"pretrain": None, "finetune.training.lr": rate} for rate in (0.01, 0.02, 0.03, 0.04)}
"""
SMALL = {
    "network": {"width": 4, "levels": 2},
    "pretrain": {"side": 16, "d": 16, "bottleneck": 8, "training": {"steps": 200, "batch": 8}},
    "finetune": {"side": 16, "training": {"steps": 6, "batch": 4, "evaluations": 1}},
    "evaluate": {"inference": "whole"},
    "resources": {"checkpoint_seconds": 0.05},
}
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process more for each group, which looks for nodes that leave politely
    "OMP_NUM_THREADS": "1",
}
PATIENCE = 180  # seconds of a scenario
Play = Callable[[str], None]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Eight small phantoms as data, a space of three arms and one of four, and what the first comes to without Ray."""
    root = tmp_path_factory.mktemp("prepared")
    (root / "rates.py").write_text(SPACE)
    (root / "wide.py").write_text(WIDE)
    (root / "small.yaml").write_text(yaml.safe_dump(SMALL))
    phantom.generate(root / "scans" / "tiny", patients=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSSL_DATA", str(root / "data"))
        patch.setenv("MEDSSL_RUNS", str(root / "runs"))
        patch.chdir(root)
        smaller = {"spacing_mm": (12.0, 12.0, 24.0), "pad": 32}
        store = catalogue.prepare(str(root / "scans" / "tiny"), changes=smaller, workers=1, say=lambda text: None)
        space = spaces.load_space("rates.py")
        request = sweep.Request("rates.py", "tiny", 1, 1, "grid", files=(Path("small.yaml"),))
        bound, arms = sweep.fitted(request, space, store, space.arms(), say=lambda text: None)
        split = catalogue.split(store, bound.split)
        site, scores = Site.here(), {}
        for label, settings in arms.items():
            chain = plan.chain(label, 0, 1, plan.resolve(bound.experiment(settings), store, split), store, split)
            stages.run_chain(chain, stages.Work(site, store.root, split))
            scores |= {stage.id: (site.done(stage.id) or {})["test"] for stage in chain.finetunings}
    assert len(scores) == 3
    (root / "undisturbed.json").write_text(json.dumps(scores))
    return root


@pytest.fixture
def play(tmp_path) -> Iterator[Play]:
    """Plays a scenario of clusters.py in a process of its own, and ends whatever is left of it, Ray's processes too."""
    ray = tempfile.mkdtemp(prefix="r", dir="/tmp")  # sockets have short names
    mark = {"MEDSSL_TEST": str(tmp_path)}

    def play(name: str) -> None:
        there = {"MEDSSL_DATA": str(tmp_path / "data"), "MEDSSL_RUNS": str(tmp_path / "runs"), "RAY_TMPDIR": ray}
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | ENVIRONMENT | there | mark
        command = [sys.executable, str(Path(__file__).with_name("clusters.py")), name]
        with (tmp_path / "said").open("w") as said:
            scenario = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=said, stderr=subprocess.STDOUT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                scenario.wait(PATIENCE)
        if scenario.returncode != 0:
            how = "was not done in time" if scenario.returncode is None else f"ended with {scenario.returncode}"
            pytest.fail(f"{name} {how}:\n{(tmp_path / 'said').read_text()[-4000:]}")

    yield play
    end(*mark.items())
    shutil.rmtree(ray, ignore_errors=True)


def end(mark: tuple[str, str]) -> None:
    """Kill every process that has the mark in its environment, until none is left or ten seconds are over."""
    for _ in range(100):  # those that were being started when the others died, too
        found = []
        for file in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if "=".join(mark).encode() in file.read_bytes().split(b"\0"):
                    found.append(int(file.parent.name))
        if not found:
            return
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process, os.WNOHANG)
        time.sleep(0.1)


@pytest.fixture
def sweeping(prepared, tmp_path, play) -> Play:
    """The same in a copy of the prepared folder."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("runs"))
    return play


@pytest.mark.slow
def test_a_group_over_two_nodes_survives_the_loss_of_one_and_ends_where_one_worker_would(play):
    play("group_loses_a_node")


@pytest.mark.slow
def test_a_group_that_may_shrink_goes_on_with_what_is_left_and_ends_where_one_worker_would(play):
    play("group_shrinks")


@pytest.mark.slow
def test_a_sweep_that_loses_a_node_goes_on_from_its_checkpoint_and_ends_as_if_it_had_not(sweeping):
    sweeping("sweep_loses_a_node")


@pytest.mark.slow
def test_four_arms_of_two_workers_find_their_place_on_two_nodes_of_two_cores(sweeping):
    sweeping("groups_share_a_cluster")


@pytest.mark.slow
def test_a_sweep_whose_head_died_finds_all_that_was_finished_on_the_next_cluster(sweeping):
    sweeping("sweep_loses_its_head")


@pytest.mark.slow
def test_volumes_are_prepared_on_all_nodes_and_a_lost_one_takes_only_what_it_was_at(sweeping):
    sweeping("volumes_lose_a_node")


@pytest.mark.slow
def test_waiting_stages_bring_nodes_up_and_idle_ones_leave_until_none_is_left(sweeping):
    sweeping("cluster_grows_and_shrinks")


@pytest.mark.slow
def test_a_store_larger_than_the_object_store_streams_sharded_in_order_and_from_any_step(play):
    play("store_larger_than_the_object_store")


# Places


def machines(count: int, cpus: float, gpus: float = 0.0) -> list[places.Machine]:
    return [{"CPU": cpus, "GPU": gpus}] * count


@pytest.mark.parametrize(
    ("resources", "cluster", "expected"),
    [
        (Resources(), [{"CPU": 0.0}, *machines(2, 4)], 8),  # the head serves none
        (Resources(workers=2), machines(2, 2), 2),
        (Resources(workers=2, cpus=3), machines(3, 4), 1),  # three workers find place, not four: none is split over two
        (Resources(workers=4, cpus=2), machines(2, 4), 1),
        (Resources(workers=4, min_workers=2), machines(3, 1), 1),  # smaller than asked for, rather than none
        (Resources(workers=4, min_workers=2), machines(8, 1), 2),
        (Resources(cpus=2, gpus=0.25), machines(1, 64, 8), 32),
        (Resources(gpus=0.4), machines(1, 64, 2), 4),  # twice on each GPU, not five times on two
        (Resources(), machines(2, 8, 4), 8),
        (Resources(workers=2, gpus=0.5), machines(2, 8, 2), 2),  # workers of one stage have a GPU each
    ],
)
def test_as_many_trials_run_at_a_time_as_their_workers_find_place_machine_by_machine(resources, cluster, expected):
    share, at_once = places.share(resources, cluster)
    assert at_once == expected
    if resources.workers > 1:
        assert share["CPU"] == 0, "a trial must not hold what its workers wait for"


def test_a_cluster_without_machines_says_how_it_can_be_told_that_it_grows(monkeypatch):
    with pytest.raises(UsageError, match="MEDSSL_CLUSTER=8x16x1"):
        places.share(Resources(), machines(1, 0))
    with pytest.raises(UsageError, match="needs 2 workers of 1 CPU each, the cluster has 1 CPU"):
        places.share(Resources(workers=4, min_workers=2), machines(1, 1))
    monkeypatch.setenv("MEDSSL_CLUSTER", "8x16x1")
    assert places.share(Resources(), places.planned())[1] == 8
    monkeypatch.setenv("MEDSSL_CLUSTER", "many")
    with pytest.raises(UsageError, match="MEDSSL_CLUSTER=many: expected"):
        places.planned()


def test_small_stages_share_a_gpu_as_far_as_memory_cores_and_kernels_allow():
    gb = 1e9
    assert places.fraction(5.4 * gb, 24 * gb, busy=0.1) == 0.3333  # three of 6 GB within 90 % of 24
    assert places.fraction(0.1 * gb, 24 * gb, cpus=2, cores=16, gpus=2, busy=0.1) == 0.25  # four of two cores
    assert places.fraction(0.1 * gb, 24 * gb, busy=0.3) == 0.3333
    assert places.fraction(0.1 * gb, 24 * gb, busy=0.9) == 1.0, "a busy GPU is not shared"
    assert places.fraction(20 * gb, 24 * gb) == 1.0
    for peak in np.random.default_rng(0).uniform(0.1, 23, 50) * gb:
        share = places.fraction(peak, 24 * gb, busy=0.01)
        together = int(1 / share + 1e-9)
        assert together == 1 or together * (peak + places.CONTEXT) <= places.MOST * 24 * gb
    hands = planner.Hands(16, 2, 1, "a GPU", 24 * gb)
    (line,) = planner.packing(2 * gb, None, hands, Resources(cpus=2))
    assert "-o resources.gpus=0.25: 4 stages of 2 GB find place on each GPU of 24 GB" in line
    assert "worth it while one stage keeps the GPU less than half busy" in line, "nobody has measured it"
    (line,) = planner.packing(2 * gb, 0.3, hands, Resources(cpus=2))
    assert "-o resources.gpus=0.3333: 3 stages" in line
    assert "keep it 30% busy" in line
    (line,) = planner.packing(2 * gb, 0.7, hands, Resources(cpus=2))
    assert "none: a stage of 2 GB leaves room, but was measured to keep its GPU 70% busy" in line
    assert planner.packing(20 * gb, 0.7, hands, Resources(cpus=2)) == [], "nor would there be room"
    assert places.share(Resources(cpus=2, gpus=0.25), machines(1, 16, 2))[1] == 8
    assert planner.packing(2 * gb, None, hands, Resources(cpus=2, gpus=1.0)) == [], "who has said it is not told"
    with pytest.raises(UsageError, match=r"needs 30.6 GB, the GPU has 24.0; lower training.batch"):
        places.fraction(30 * gb, 24 * gb)
