"""Clusters of several nodes on this machine, for real: nodes die, come and go, and a sweep ends as if nothing had happened."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from medssl.methods import gather
from medssl.methods.optimizers import decay_groups
from medssl.methods.protocol import Loss, Views
from medssl.methods.settings import Training
from medssl.platform import catalogue, checkpoint, loop, places, planner, sweep, train
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
    "pretrain": {"side": 16, "d": 16, "bottleneck": 8, "training": {"steps": 60, "batch": 8}},
    "finetune": {"side": 16, "training": {"steps": 6, "batch": 4, "evaluations": 1}},
    "evaluate": {"inference": "whole"},
    "resources": {"checkpoint_seconds": 0.05},
}
QUICK = {"health_check_period_ms": 500, "health_check_failure_threshold": 3, "health_check_initial_delay_ms": 0}
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """No Ray but the test's own, in a temporary folder of its own: others on this machine must not find it."""
    import ray

    before = ray.is_initialized()
    ray.shutdown()
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # sockets have short names
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items() | {("RAY_TMPDIR", folder)}:
            patch.setenv(name, value)
        yield
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
    if before:  # what `ray_local` had started
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """A prepared folder of eight small phantoms."""
    data, source = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("scans") / "tiny"
    phantom.generate(source, patients=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSSL_DATA", str(data))
        catalogue.prepare(str(source), changes={"spacing_mm": (12.0, 12.0, 24.0), "pad": 32}, workers=1, say=lambda text: None)
    return data


@pytest.fixture
def here(scans, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MEDSSL_DATA", str(scans))
    monkeypatch.setenv("MEDSSL_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rates.py").write_text(SPACE)
    (tmp_path / "wide.py").write_text(WIDE)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    return tmp_path


def run(space: str = "rates.py", k: int = 2, **changes: Any) -> str:
    request = sweep.Request(space, "tiny", k, 1, files=(Path("small.yaml"),), **changes)
    return sweep.run(request, time_budget=None, address=None, say=lambda text: None)


def outcome() -> dict[str, float]:
    site = Site.here()
    return {identity: done["test"] for identity in site.finished() if "test" in (done := site.done(identity) or {})}


def unfinished(kind: str) -> list[Path]:
    """Folders of stages that have a checkpoint to continue from."""
    files = [file for file in Site.here().runs.glob("stages/*/checkpoint.pt") if not file.with_name("done.json").exists()]
    return [file.parent for file in files if json.loads(file.with_name("run.json").read_text())["kind"] == kind]


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    pytest.fail(f"nothing happened in {seconds:.0f} s")


@contextlib.contextmanager
def cluster(*cpus: int) -> Iterator[Any]:
    """A head without cores and a node for each number of them; this process is connected to the head."""
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": QUICK, "include_dashboard": False})
    try:
        for count in cpus:
            made.add_node(num_cpus=count)
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@contextlib.contextmanager
def beside(work: Callable[[], None]) -> Iterator[None]:
    """`work` in a thread while the body runs; what it raises is raised here."""
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if raised:
        raise raised[0]


# Groups of workers


class Regression(torch.nn.Module):
    """Learns the mean of the joint batch: what it ends at depends on every slice of every worker."""

    def __init__(self) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.zeros(()))

    def augment(self, batch: Any, rng: Any) -> Views:
        return Views([batch["image"]])

    def loss(self, views: Views, step: Any) -> Loss:
        wrong = (self.value - views.images[0]) ** 2
        return Loss({"wrong": gather.mean(wrong.sum(), len(wrong))})

    def after_step(self, step: Any) -> None: ...

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return decay_groups(self, weight_decay)

    def transferable_state(self) -> dict[str, Any]:
        return self.state_dict()


STEPS, BATCH = 24, 8


def learn(payload: dict[str, Any], rank: int, world: int, device: torch.device) -> dict[str, Any]:
    """A training that saves every step; where its workers were is left in the folder."""
    import ray

    folder, file, method, losses = payload["folder"], payload["folder"] / "state.pt", Regression(), {}
    if world > 1:
        with (folder / f"nodes-{rank}").open("a") as nodes:
            nodes.write(ray.get_runtime_context().get_node_id() + "\n")

    def batches(start: int) -> Iterator[dict[str, torch.Tensor]]:
        for step in range(start, STEPS):
            time.sleep(payload["pause"])
            joint = torch.from_numpy(np.random.default_rng(step).normal(size=BATCH).astype(np.float32))
            yield {"image": joint.chunk(world)[rank]}

    resume = checkpoint.load(file) if file.exists() else None
    loop.train(
        method, batches, Training(batch=BATCH, optimizer="sgd", lr=0.1), steps=STEPS, seed=0, rank=rank, world=world,
        resume=resume, report_seconds=0, save_seconds=0, save=lambda state: checkpoint.save(file, state),
        on_step=lambda step, terms, *_: losses.update({step: terms["wrong"]}),
    )  # fmt: skip
    return {"value": float(method.value.detach()), "began": resume["step"] if resume else 0, "losses": losses}


@pytest.mark.slow
def test_a_group_over_two_nodes_survives_the_loss_of_one_and_ends_where_one_worker_would(alone, tmp_path, monkeypatch):
    """Two workers of two cores on two nodes of two: they cannot share one. One of these is killed on the way."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    expected = train.launch(
        learn, {"folder": tmp_path / "one", "pause": 0.0}, workers=1, gpu=False, folder=tmp_path / "one", name="workers"
    )
    with cluster(2, 2, 2) as made:  # a third one to go to: nodes that a thread starts would end with it
        folder = tmp_path / "two"

        def lose() -> None:
            wait_for(lambda: (folder / "state.pt").exists() and checkpoint.load(folder / "state.pt")["step"] >= 4)
            lost = (folder / "nodes-1").read_text().split()[0]
            made.remove_node(next(node for node in made.worker_nodes if node.node_id == lost), allow_graceful=False)

        with beside(lose):
            payload = {"folder": folder, "pause": 0.4}
            got = train.launch(learn, payload, workers=2, gpu=False, folder=folder, name="workers", cpus_per_worker=2)
        nodes = [(folder / f"nodes-{rank}").read_text().split() for rank in (0, 1)]
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert all(first != second for first, second in zip(*nodes, strict=True)), "the workers were on two nodes, each time"
    assert len(nodes[0]) == 2, "the group was started twice"
    assert 4 <= got["began"] < STEPS, "from the last checkpoint"
    assert got["value"] == pytest.approx(expected["value"], rel=1e-5)
    assert got["losses"] == pytest.approx({step: expected["losses"][step] for step in got["losses"]}, rel=1e-4)


# Sweeps


@pytest.mark.slow
def test_sweeps_end_alike_undisturbed_after_a_lost_node_and_after_a_lost_head(alone, here, monkeypatch):
    """The same question three times over; four arms of two-worker stages at a time find their place between."""
    with cluster(2, 2, 2) as made:
        run()
        undisturbed = outcome()
        assert len(undisturbed) == 6

        monkeypatch.setenv("MEDSSL_RUNS", str(here / "lost-node"))

        def lose() -> None:
            wait_for(lambda: unfinished("pretrain"))
            before.update(finished())
            made.remove_node(next(iter(made.worker_nodes)), allow_graceful=False)

        before: dict[Path, int] = {}
        with beside(lose):
            run()
        assert outcome() == undisturbed, "to the last bit"
        assert before.items() <= finished().items(), "no finished stage ran again"

        monkeypatch.setenv("MEDSSL_RUNS", str(here / "wide"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(places, "share", lambda resources, machines: ({"CPU": 0.0, "memory": float(2**20)}, 4))
            run("wide.py", k=1, overrides=("resources.workers=2",))
        assert len(outcome()) == 4, "four groups of two workers asked for eight cores of four; none waited for ever"

    monkeypatch.setenv("MEDSSL_RUNS", str(here / "lost-head"))
    with cluster(2) as made:
        command = [sys.executable, "-m", "medssl.cli", "sweep", "rates.py", "--data", "tiny", "-p", "small.yaml"]
        driver = subprocess.Popen([*command, "--finetunings", "1", "--address", made.address], stderr=subprocess.DEVNULL)
        try:
            wait_for(lambda: unfinished("pretrain") and finished())
        finally:
            made.remove_node(made.head_node, allow_graceful=False) if driver.poll() is None else None
            driver.kill()
            driver.wait()
    before = finished()
    assert len(outcome()) < 6
    with cluster(2):
        run()
    assert outcome() == undisturbed
    assert before.items() <= finished().items()


# Autoscaling


@contextlib.contextmanager
def growing(folder: Path, most: int) -> Iterator[str]:
    """A head without cores that starts nodes of one core on this machine when something waits, and stops idle ones.

    As `ray.cluster_utils.AutoscalingCluster`, whose template is not in the wheel and whose `ray stop --force` would end the
    Ray of others. Every process of it carries a mark, by which it is ended.
    """
    import ray

    head = "f" * 56
    node = {"resources": {"CPU": 1, "object_store_memory": 10**8}, "node_config": {}, "min_workers": 0, "max_workers": most}
    kinds = {"ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}, "worker": node}
    port = 20000 + os.getpid() % 20000
    provider = {"type": "fake_multinode", "launch_multiple": True, "head_node_id": head, "gcs_address": f"127.0.0.1:{port}"}
    config = {"cluster_name": "growing", "max_workers": most, "idle_timeout_minutes": 0.05, "upscaling_speed": 10}
    config |= {"provider": provider, "available_node_types": kinds, "head_node_type": "ray.head.default", "auth": {}}
    for name in ("file_mounts",):
        config[name] = {}
    for name in ("setup_commands", "initialization_commands", "head_setup_commands", "worker_setup_commands"):
        config[name] = []
    for name in ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude"):
        config[name] = []
    (folder / "growing.yaml").write_text(json.dumps(config))
    mark = f"MEDSSL_TEST={folder}"
    given = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "MEDSSL_TEST": str(folder)}
    given |= {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": head, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": head}
    start = [str(Path(sys.executable).with_name("ray")), "start", "--head", f"--port={port}", "--num-cpus=0"]
    start += ["--include-dashboard=false", f"--autoscaling-config={folder / 'growing.yaml'}", "--node-ip-address=127.0.0.1"]
    try:
        subprocess.run(start, env=os.environ | given, check=True, stdout=subprocess.DEVNULL)
        ray.init(address=f"127.0.0.1:{port}", log_to_driver=False, logging_level="ERROR")
        yield f"127.0.0.1:{port}"
    finally:
        ray.shutdown()
        for file in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark.encode() in file.read_bytes().split(b"\0") and int(file.parent.name) != os.getpid():
                    os.kill(int(file.parent.name), signal.SIGKILL)


def workers() -> int:
    import ray

    return sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())


@pytest.mark.slow
def test_waiting_stages_bring_nodes_up_and_idle_ones_leave_until_none_is_left(alone, here, monkeypatch):
    monkeypatch.setenv("MEDSSL_CLUSTER", "2x1x0")
    with growing(here, most=2):
        assert workers() == 0
        seen: list[int] = []
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.2):
                seen.append(workers())

        with beside(watch):
            try:
                run(k=1)
            finally:
                done.set()
        assert len(outcome()) == 3
        assert max(seen) == 2, "two places of one core each, as far as the cluster can grow"
        wait_for(lambda: workers() == 0, 60)


# Streams


@pytest.mark.slow
def test_a_store_larger_than_the_object_store_streams_sharded_in_order_and_from_any_step(alone, tmp_path):
    """160 MB of pixels through an object store of 80 MB, for two workers: each slice once per epoch, whatever the start."""
    import ray

    from medssl.platform import stream

    store = large(tmp_path / "store")
    count = sum(volume.slices for volume in store.volumes)
    ray.shutdown()
    ray.init(num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        batch, steps = 64, count // 64

        def take(rank: int, start: int, stop: int) -> list[list[int]]:
            batches = stream.ray_batches(store, None, None, batch, seed=3, start=start, rank=rank, world=2)
            return [next(batches)["index"].tolist() for _ in range(start, stop)]

        whole = [take(rank, 0, steps) for rank in (0, 1)]
        assert sorted(index for part in whole for step in part for index in step) == list(range(count))
        assert take(1, steps // 2, steps) == whole[1][steps // 2 :]
        assert ray.cluster_resources()["object_store_memory"] < sum(file.stat().st_size for file in store.files)
    finally:
        ray.shutdown()


def large(root: Path) -> Any:
    """A store of 640 incompressible slices of 512 x 512 in ten files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from medssl.platform import geometry, ingest
    from medssl.platform.store import Store, VolumeRecord

    rng, side, depth, files, records = np.random.default_rng(0), 512, 64, [], []
    (root / "slices").mkdir(parents=True)
    for number in range(10):
        name = f"v{number}"
        shape = {"height": side, "width": side, "channels": 1, "spacing_mm": (1.0, 1.0, 1.0), "foreground": None}
        place = [
            {"patient": name, "volume": name, "slice_index": k, "position": k / (depth - 1), "label": None}
            for k in range(depth)
        ]
        rows = [each | {"image": rng.bytes(side * side)} | shape for each in place]
        files.append(root / "slices" / f"part-{number:05}.parquet")
        pq.write_table(pa.Table.from_pylist(rows, ingest.schema()), files[-1])
        known = (name, name, None, False, depth, side, side, 1, (1.0, 1.0, 1.0), None)
        records.append(VolumeRecord(*known, geometry={}, digest=""))
    preset = geometry.Preset(None, None, (1.0, 99.0), foreground_box=False, pad=0, dtype="uint8")
    about = ("test", ("background", "x"), None, "", "", {}, preset, "hash", "source")
    store = Store(root, *about, files=tuple(files), volumes=tuple(records))
    (root / "manifest.json").write_text(json.dumps(store.manifest()))
    return Store.open(root)


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
    (line,) = planner.packing(2 * gb, hands, Resources(cpus=2))
    assert "-o resources.gpus=0.25: 4 stages of 2 GB find place on each GPU of 24 GB" in line
    assert places.share(Resources(cpus=2, gpus=0.25), machines(1, 16, 2))[1] == 8
    assert planner.packing(2 * gb, hands, Resources(cpus=2, gpus=1.0)) == [], "who has said it is not told"
    with pytest.raises(UsageError, match=r"needs 30.6 GB, the GPU has 24.0; lower training.batch"):
        places.fraction(30 * gb, 24 * gb)


def finished() -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in Site.here().runs.rglob("done.json")}
