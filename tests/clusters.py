"""The scenarios of test_cluster.py: each is played by a process of its own, `python clusters.py NAME`, in a folder of its own.

So none disturbs the Ray of other tests, and the one process that starts Ray's is also the one by whose end they end.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medssl.methods import gather
from medssl.methods.optimizers import decay_groups
from medssl.methods.protocol import Loss, Views
from medssl.methods.settings import Training
from medssl.platform import checkpoint, loop, places, sweep, train, trials
from medssl.platform.site import Site

QUICK = {"health_check_period_ms": 500, "health_check_failure_threshold": 3, "health_check_initial_delay_ms": 0}
HERE = Path.cwd()


def run(space: str = "rates.py", **changes: Any) -> str:
    request = sweep.Request(space, "tiny", 1, 1, files=(Path("small.yaml"),), **changes)
    return sweep.run(request, time_budget=None, address=None, say=lambda text: None)


def typed(address: str) -> "subprocess.Popen[bytes]":
    """The same as it is typed. What its driver holds, the cluster holds as long as it lives."""
    command = [sys.executable, "-m", "medssl.cli", "sweep", "rates.py", "--data", "tiny", "-p", "small.yaml"]
    return subprocess.Popen([*command, "--pretrainings", "1", "--finetunings", "1", "--address", address])


def outcome() -> dict[str, float]:
    """The test score of each finished fine-tuning."""
    site = Site.here()
    return {identity: done["test"] for identity in site.finished() if "test" in (done := site.done(identity) or {})}


def finished() -> dict[Path, int]:
    """When each finished stage had ended."""
    return {file: file.stat().st_mtime_ns for file in Site.here().runs.rglob("done.json")}


def undisturbed() -> dict[str, float]:
    """The same where nothing was lost, and no Ray was there."""
    return json.loads((HERE / "undisturbed.json").read_text())


def unfinished() -> list[Path]:
    """Folders of pretrainings that have a checkpoint to continue from."""
    files = [file for file in Site.here().runs.glob("stages/*/checkpoint.pt") if not file.with_name("done.json").exists()]
    return [file.parent for file in files if json.loads(file.with_name("run.json").read_text())["kind"] == "pretrain"]


def wait_for(condition: Callable[[], Any], seconds: float = 100.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"nothing happened in {seconds:.0f} s")


@contextlib.contextmanager
def cluster(*cpus: int) -> Iterator[Any]:
    """A head without cores and a node for each number of them; this process is connected to the head."""
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": QUICK, "include_dashboard": False})
    try:
        for count in cpus:
            made.add_node(num_cpus=count, wait=False)
        made.wait_for_nodes(60)
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@contextlib.contextmanager
def beside(work: Callable[[], None]) -> Iterator[None]:
    """`work` in a thread while the body runs; what it raises is raised here.

    It must start no node: the kernel ends Ray's processes with the thread that started them.
    """
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


STEPS, BATCH = 24, 12  # which one, two or three workers can share


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
    began = resume["step"] if resume else 0
    return {"value": float(method.value.detach()), "began": began, "losses": losses, "world": world}


def loses(made: Any, folder: Path) -> Callable[[], None]:
    """Kills the node of the second worker of a group, once four steps are saved."""

    def lose() -> None:
        wait_for(lambda: (folder / "state.pt").exists() and checkpoint.load(folder / "state.pt")["step"] >= 4)
        lost = (folder / "nodes-1").read_text().split()[0]
        made.remove_node(next(node for node in made.worker_nodes if node.node_id == lost), allow_graceful=False)

    return lose


def group_loses_a_node() -> None:
    """Two workers on two nodes of one core: they cannot share one. One of these is killed on the way."""
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "20"  # a place that was on the lost node is given up
    alone, folder = HERE / "one", HERE / "two"
    alone.mkdir()
    folder.mkdir()
    expected = train.launch(learn, {"folder": alone, "pause": 0.0}, workers=1, gpu=False, folder=alone, name="workers")
    with cluster(1, 1, 1) as made:  # a third one to go to
        with beside(loses(made, folder)):
            payload = {"folder": folder, "pause": 0.4}
            got = train.launch(learn, payload, workers=2, gpu=False, folder=folder, name="workers")
        nodes = [(folder / f"nodes-{rank}").read_text().split() for rank in (0, 1)]
    assert all(first != second for first, second in zip(*nodes, strict=True)), "the workers were on two nodes, each time"
    assert len(nodes[0]) == 2, "the group was started twice"
    assert 4 <= got["began"] < STEPS, "from the last checkpoint"
    np.testing.assert_allclose(got["value"], expected["value"], rtol=1e-5)
    same = {step: expected["losses"][step] for step in got["losses"]}
    np.testing.assert_allclose(list(got["losses"].values()), list(same.values()), rtol=1e-4)


def group_shrinks() -> None:
    """One to three workers are asked for, and there is place for two. One of their nodes is killed; the other goes on alone."""
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "5"
    alone, folder = HERE / "one", HERE / "several"
    alone.mkdir()
    folder.mkdir()
    expected = train.launch(learn, {"folder": alone, "pause": 0.0}, workers=1, gpu=False, folder=alone, name="workers")
    with cluster(1, 1) as made, beside(loses(made, folder)):
        payload = {"folder": folder, "pause": 0.4}
        got = train.launch(learn, payload, workers=3, least=1, gpu=False, folder=folder, name="workers")
    assert (folder / "nodes-1").exists(), "two at first"
    assert got["world"] == 1
    assert 4 <= got["began"] < STEPS, "from the last checkpoint"
    np.testing.assert_allclose(got["value"], expected["value"], rtol=1e-5)
    same = {step: expected["losses"][step] for step in got["losses"]}
    np.testing.assert_allclose(list(got["losses"].values()), list(same.values()), rtol=1e-4)


# Sweeps


def sweep_loses_a_node() -> None:
    """The node that holds a half-done pretraining is killed; what was finished stays, and nothing comes out otherwise."""
    continued: list[Path] = []
    before: dict[Path, int] = {}
    import ray

    with cluster(1, 1) as made:

        def lose() -> None:
            def node() -> Any:
                for folder in unfinished():
                    continued[:] = [folder]
                    for each in made.worker_nodes:
                        if parent(owner(folder)) == each.all_processes["raylet"][0].process.pid:
                            return each
                return None

            lost = wait_for(node)
            before.update(finished())
            made.remove_node(lost, allow_graceful=False)

        with beside(lose):
            run()
        copy = trials._copy(Site.here().data / "tiny", "seed-0")
        ray.wait([copy], fetch_local=False)
        for node in [*made.worker_nodes]:
            made.remove_node(node, allow_graceful=False)
        begun = time.monotonic()
        assert trials._shared(copy) is None, "what a node held for others"
        assert time.monotonic() - begun < trials.PATIENCE / 2, "is not waited for when it dies"
    assert outcome() == undisturbed(), "to the last bit"
    assert before.items() <= finished().items(), "no finished stage ran again"
    assert "continues" in (continued[0] / "messages.log").read_text(), "from its checkpoint"


def owner(folder: Path) -> int:
    """The process that is at a stage, by its lock; 0 where there is none."""
    file = (folder / ".lock").stat().st_ino
    locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return next((int(lock[4]) for lock in locks if lock[1] == "FLOCK" and int(lock[5].split(":")[-1]) == file), 0)


def parent(process: int) -> int:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def groups_share_a_cluster() -> None:
    """Four arms at a time ask for eight cores of four: twice as many as a sweep would let run."""
    places.share = lambda resources, machines: ({"CPU": 0.0, "memory": float(2**20)}, 4)
    with cluster(2, 2):
        run("wide.py", overrides=("resources.workers=2",))
    assert len(outcome()) == 4


def sweep_loses_its_head() -> None:
    """The head and the driver die half-way; a new cluster looks up what is finished and does the rest."""
    with cluster(1) as made:
        driver = typed(made.address)
        wait_for(lambda: (unfinished() and finished()) or driver.poll() is not None)
        assert driver.poll() is None
        import ray

        ray.shutdown()  # this process looks on no longer
        made.remove_node(made.head_node, allow_graceful=False)
        driver.kill()
        driver.wait()
    before = finished()
    assert before
    assert len(outcome()) < len(undisturbed())
    with cluster(1):
        run()
    assert outcome() == undisturbed()
    assert before.items() <= finished().items()


# Preparing volumes


def volumes_lose_a_node() -> None:
    """Eight volumes on two nodes of one core: one driver gives up on its way, the next loses a node, and little is redone."""
    from medssl.platform import catalogue, ingest

    begun, expected = HERE / "begun", json.loads((HERE / "data" / "tiny" / "manifest.json").read_text())["content_hash"]
    whole = ingest.ingest_volume

    def slowly(task: ingest.VolumeTask) -> None:
        import ray

        with begun.open("a") as file:
            file.write(f"{task.case.volume} {ray.get_runtime_context().get_node_id()}\n")
        time.sleep(0.5)
        whole(task)

    ingest.ingest_volume = slowly
    again = {"changes": {"spacing_mm": (12.0, 12.0, 24.0), "pad": 32}, "name": "again"}

    def prepare(hear: Callable[[str], None]) -> Any:
        return catalogue.prepare(str(HERE / "scans" / "tiny"), **again, address=made.address, say=hear)

    def starts() -> list[list[str]]:
        return [line.split() for line in begun.read_text().splitlines()] if begun.exists() else []

    def done() -> int:
        return len(list((HERE / "data" / "again" / ".work").glob("*.arrow")))

    with cluster(1, 1) as made:

        def give_up(text: str) -> None:
            if "1 of 8" in text:
                raise KeyboardInterrupt

        catalogue._telling = lambda what, say: lambda count, total, of: say(f"{count} of {total}")
        with contextlib.suppress(KeyboardInterrupt):
            prepare(give_up)
        wait_for(lambda: done() >= 1)
        time.sleep(1.0)  # what was being prepared then is prepared or dropped
        kept, before = done(), len(starts())
        assert before <= 4, "two at a time"
        heard: list[str] = []

        def lose() -> None:
            wait_for(lambda: len(starts()) >= before + 3)
            lost = starts()[-1][1]
            made.remove_node(next(node for node in made.worker_nodes if node.node_id == lost), allow_graceful=False)

        with beside(lose):
            store = prepare(heard.append)
    assert int(heard[0].split()[0]) >= kept >= 1, "what the first had prepared stays"
    assert store.content_hash == expected
    assert len({node for _, node in starts()}) == 2, "on both nodes"
    assert len(starts()) - before <= 8 - kept + 1, "the lost node took the one volume that it was at"


# Autoscaling


@contextlib.contextmanager
def growing(most: int) -> Iterator[str]:
    """A head without cores that starts nodes of one core on this machine when something waits, and stops idle ones.

    As `ray.cluster_utils.AutoscalingCluster`, whose `ray stop --force` would end the Ray of others, and which needs a template
    that is not in the wheel: so the same provider is named as an external one, which needs none.
    """
    import ray

    head = "f" * 56
    node = {"resources": {"CPU": 1, "object_store_memory": 10**8}, "node_config": {}, "min_workers": 0, "max_workers": most}
    kinds = {"ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}, "worker": node}
    port = 20000 + os.getpid() % 20000
    provider = {"type": "external", "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"}
    provider |= {"launch_multiple": True, "head_node_id": head, "gcs_address": f"127.0.0.1:{port}"}
    provider |= {"disable_node_updaters": True, "disable_launch_config_check": True}
    config = {"cluster_name": "growing", "max_workers": most, "idle_timeout_minutes": 0.05, "upscaling_speed": 10}
    config |= {"provider": provider, "available_node_types": kinds, "head_node_type": "ray.head.default", "auth": {}}
    config |= {"file_mounts": {}, "cluster_synced_files": [], "rsync_exclude": [], "initialization_commands": []}
    config |= {f"{some}setup_commands": [] for some in ("", "head_", "worker_")}
    config |= {f"{some}_start_ray_commands": [] for some in ("head", "worker")}
    (HERE / "growing.yaml").write_text(json.dumps(config))
    given = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1"}
    given |= {"RAY_CLOUD_INSTANCE_ID": head, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": head}
    start = [str(Path(sys.executable).with_name("ray")), "start", "--head", f"--port={port}", "--num-cpus=0"]
    start += ["--include-dashboard=false", f"--autoscaling-config={HERE / 'growing.yaml'}", "--node-ip-address=127.0.0.1"]
    subprocess.run(start, env=os.environ | given, check=True)
    ray.init(address=f"127.0.0.1:{port}", log_to_driver=False, logging_level="ERROR")
    yield f"127.0.0.1:{port}"
    ray.shutdown()  # its processes are ended by whoever ends this one


def nodes() -> int:
    import ray

    return sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())


def cluster_grows_and_shrinks() -> None:
    os.environ["MEDSSL_CLUSTER"] = "2x1x0"
    with growing(most=2) as address:
        assert nodes() == 0
        driver, seen = typed(address), [0]
        while driver.poll() is None:
            seen.append(nodes())
            time.sleep(0.2)
        assert driver.returncode == 0
        assert outcome() == undisturbed()
        assert max(seen) == 2, "two places of one core each, as far as the cluster can grow"
        wait_for(lambda: nodes() == 0)


# Streams


def store_larger_than_the_object_store() -> None:
    """100 MB of pixels through an object store of 80 MB, for two workers: each slice once per epoch, whatever the start."""
    import ray

    from medssl.platform import stream

    store = large(HERE / "store")
    count = sum(volume.slices for volume in store.volumes)
    ray.init(num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    batch, steps = 64, count // 64

    def take(rank: int, start: int, stop: int) -> list[list[int]]:
        batches = stream.ray_batches(store, None, None, batch, seed=3, start=start, rank=rank, world=2)
        return [next(batches)["index"].tolist() for _ in range(start, stop)]

    whole = [take(rank, 0, steps) for rank in (0, 1)]
    assert sorted(index for part in whole for step in part for index in step) == list(range(count))
    assert take(1, steps // 2, steps) == whole[1][steps // 2 :]
    assert ray.cluster_resources()["object_store_memory"] < sum(file.stat().st_size for file in store.files)
    ray.shutdown()


def large(root: Path) -> Any:
    """A store of 384 incompressible slices of 512 x 512 in six files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from medssl.platform import geometry, ingest
    from medssl.platform.store import Store, VolumeRecord

    rng, side, depth, files, records = np.random.default_rng(0), 512, 64, [], []
    (root / "slices").mkdir(parents=True)
    for number in range(6):
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


if __name__ == "__main__":
    globals()[sys.argv[1]]()
