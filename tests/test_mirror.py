"""A run store that machines share over the network: seen whole or not at all, and a stage goes on on another machine."""

import json
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from medssl.platform import catalogue, checkpoint, ledger, loop, mirror, plan, single, stages
from medssl.platform.datasets import phantom
from medssl.platform.errors import RunError
from medssl.platform.records import Score
from medssl.platform.site import Site

SCORES = [Score("p1", "v1", "test", "x", "dice", 0.5)]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """An S3 server on this machine, and its address."""
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield "http://{}:{}".format(*running.get_host_and_port())
    running.stop()


@pytest.fixture(params=["file", "s3"])
def uri(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "file":
        return f"file://{tmp_path / 'store'}/runs"
    import boto3

    address = request.getfixturevalue("server")
    for name, value in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    bucket = f"bucket{abs(hash(str(tmp_path)))}"
    boto3.client("s3", endpoint_url=address).create_bucket(Bucket=bucket)
    return f"s3://{bucket}/runs"


@pytest.fixture
def machines(uri: str, tmp_path: Path) -> tuple[Site, Site]:
    """Two that share nothing but the store."""
    return Site(tmp_path, tmp_path / "one", uri), Site(tmp_path, tmp_path / "two", uri)


def leave(site: Site, step: int, **files: str) -> Path:
    """A running stage as it stands after some steps."""
    folder = site.stage("simsiam-1")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"checkpoint.pt": f"state {step}", "run.json": "{}", **files}.items():
        (folder / name).write_text(text)
    (folder / "progress.json").write_text(json.dumps({"step": step}))
    return folder


def test_a_stage_goes_on_on_another_machine_and_is_finished_for_all_when_its_marker_is_there(machines):
    one, two = machines
    assert one.mirror
    assert two.mirror
    leave(one, 10)
    one.mirror.keep("simsiam-1")
    assert two.done("simsiam-1") is None
    assert two.finished() == set()
    two.bring("simsiam-1")
    assert (two.stage("simsiam-1") / "checkpoint.pt").read_text() == "state 10"

    folder = leave(two, 20, **{"encoder.pt": "weights", "log.txt": "log"})
    two.mirror.keep("simsiam-1")
    one.bring("simsiam-1")
    assert (one.stage("simsiam-1") / "checkpoint.pt").read_text() == "state 20", "what has gone further"
    leave(one, 15)
    one.mirror.bring("simsiam-1")
    assert (one.stage("simsiam-1") / "checkpoint.pt").read_text() == "state 20"
    leave(one, 25)
    one.bring("simsiam-1")
    assert (one.stage("simsiam-1") / "checkpoint.pt").read_text() == "state 25", "nor is anything lost that is only here"

    (folder / "done.json").write_text('{"step": 20}')
    (folder / "checkpoint.pt").unlink()
    ledger.write(two.runs, "simsiam-1", "contract", SCORES)
    two.mirror.finish("simsiam-1")
    three = Site(one.data, one.runs.with_name("three"), one.remote)
    assert three.done("simsiam-1") == {"step": 20}
    assert three.finished() == {"simsiam-1"}
    three.refresh()
    seen = {file.name for file in three.stage("simsiam-1").iterdir()}
    assert seen == {"run.json", "progress.json", "log.txt", "done.json"}, "weights and checkpoints stay away"
    assert ledger.scores(three.runs, "simsiam-1") == SCORES
    assert three.find_stage("simsiam") == three.stage("simsiam-1")
    assert (three.stage("simsiam-1") / "encoder.pt").read_text() == "weights", "they come when they are asked for"
    assert not (three.stage("simsiam-1") / "checkpoint.pt").exists()


def test_a_machine_that_dies_while_it_uploads_has_finished_nothing(machines, monkeypatch):
    one, two = machines
    folder = leave(one, 10, **{"done.json": "{}", "encoder.pt": "weights"})
    (folder / "checkpoint.pt").unlink()
    put, count = mirror.Mirror._put, len(list(folder.iterdir()))
    for dies in range(count + 1):
        written: list[str] = []

        def dying(self: mirror.Mirror, content: bytes, path: str, dies: int = dies, written: list[str] = written) -> None:
            if len(written) == dies:
                raise KeyboardInterrupt
            written.append(path)
            put(self, content, path)

        monkeypatch.setattr(mirror.Mirror, "_put", dying)
        with pytest.raises(KeyboardInterrupt):
            one.mirror.finish("simsiam-1")
        assert two.finished() == set()
        two.refresh()
        assert not two.stage("simsiam-1").exists()
    monkeypatch.setattr(mirror.Mirror, "_put", put)
    one.bring("simsiam-1")
    assert two.finished() == {"simsiam-1"}, "whoever looks it up there next says so"
    leave(two, 5, **{"encoder.pt": "unfinished"})
    two.refresh()
    two.bring("simsiam-1")
    assert (two.stage("simsiam-1") / "encoder.pt").read_text() == "weights"
    assert not (two.stage("simsiam-1") / "checkpoint.pt").exists()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims as ever, in less time; an S3 server counts whole seconds."""
    for name, seconds in {"BEAT": 0.5, "EXPIRES": 2.5, "SETTLE": 0.3, "AGAIN": 0.1}.items():
        monkeypatch.setattr(mirror, name, seconds)


def test_of_machines_that_want_a_stage_at_the_same_time_one_has_it_at_a_time_and_each_in_its_turn(uri, hasty, tmp_path):
    working, most, turns = [], [], []

    def work(number: int) -> None:
        site = Site(tmp_path, tmp_path / f"machine-{number}", uri)
        while True:
            with site.owned(site.stage("simsiam-1")) as mine:
                if mine:
                    working.append(number)
                    most.append(len(working))
                    time.sleep(0.2)
                    working.remove(number)
                    turns.append(number)
                    return
            time.sleep(0.1 * (1 + number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert max(most) == 1
    assert sorted(turns) == [0, 1, 2, 3]


def test_a_claim_holds_while_its_machine_lives_and_ends_some_time_after_it_died(machines, hasty, monkeypatch):
    one, two = machines
    with one.owned(one.stage("simsiam-1")) as mine:
        assert mine
        until = time.monotonic() + 4
        while time.monotonic() < until:
            with two.owned(two.stage("simsiam-1")) as too:
                assert not too, "it gives signs of life"
            time.sleep(0.2)
        with two.owned(two.stage("simsiam-2")) as other:
            assert other
        claim = next(entry.path for entry in two.mirror._list("claims") if entry.path.endswith(".has"))
    died = time.monotonic()
    one.mirror._put(b"{}", claim)  # a kill takes nothing back
    with one.owned(one.stage("simsiam-1")) as again:
        assert again, "on its own machine there is the lock to say that it is dead"
    one.mirror._put(b"{}", claim)
    while True:
        with two.owned(two.stage("simsiam-1")) as mine:
            if mine:
                break
    assert mirror.EXPIRES - 1 < time.monotonic() - died < mirror.EXPIRES + 5


def test_a_stage_that_another_machine_is_at_is_waited_for_and_not_done_twice(machines, hasty, tmp_path, monkeypatch):
    one, two = machines
    stage = plan.Stage("pretrain", "simsiam-1", 0, 20, None)
    job = stages.Job(cast(Any, None), stage, stages.Work(two, tmp_path, cast(Any, None)))
    monkeypatch.setattr(stages, "_do", lambda *_: pytest.fail("done twice"))
    with ThreadPoolExecutor(1) as pool:
        with one.owned(one.stage("simsiam-1")) as mine:
            assert mine
            waiting = pool.submit(stages.fulfil, job)
            leave(one, 20, **{"done.json": '{"step": 20}', "encoder.pt": "weights"})
            time.sleep(0.5)
            assert not waiting.done()
            one.mirror.finish("simsiam-1")
        assert waiting.result(20) == {"step": 20}
    assert (two.stage("simsiam-1") / "encoder.pt").read_text() == "weights"


def test_a_sweep_is_seen_from_everywhere_as_it_was_last_left(machines):
    one, two = machines
    sweep = one.runs / "sweeps" / "question"
    (sweep / "tune").mkdir(parents=True)
    (sweep / "tune" / "state.json").write_text("Tune's own")
    (sweep / ".lock").write_text("")
    (sweep / "sweep.json").write_text("first")
    one.push(sweep)
    two.refresh()
    (sweep / "sweep.json").write_text("second")
    one.push(sweep)
    two.refresh()
    assert {file.name: file.read_text() for file in two.find_sweep(None).iterdir()} == {"sweep.json": "second"}


def test_a_store_that_cannot_be_reached_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    site = Site(tmp_path, tmp_path / "runs", f"file://{tmp_path}/file/runs")
    folder = leave(site, 1)
    with pytest.raises(RunError, match=r"MEDSSL_RUNS=file://.*is the store there"):
        site.push(folder)
    assert Site.here().remote is None


def test_a_uri_is_a_local_copy_and_a_remote_store(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDSSL_CACHE", str(tmp_path))
    monkeypatch.setenv("MEDSSL_RUNS", "gs://bucket/medssl/runs/")
    here = Site.here()
    assert here.remote == "gs://bucket/medssl/runs"
    assert here.runs.parent == tmp_path


SMALL = [
    "network.width=4", "network.levels=2", "pretrain.side=16", "pretrain.d=8", "pretrain.bottleneck=4",
    "pretrain.training.steps=9", "pretrain.training.batch=8", "resources.checkpoint_seconds=0",
]  # fmt: skip
TUNE = [
    "network.width=4", "network.levels=2", "finetune.side=16", "finetune.training.steps=4", "finetune.training.batch=4",
    "finetune.training.evaluations=1", "evaluate.inference=whole", "resources.checkpoint_seconds=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data, source = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("scans") / "tiny"
    phantom.generate(source, patients=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSSL_DATA", str(data))
        catalogue.prepare(str(source), changes={"spacing_mm": (12.0, 12.0, 24.0), "pad": 32}, workers=1, say=lambda text: None)
    return data


def test_a_group_that_may_change_keeps_its_sizes_and_its_uploads_though_one_worker_is_left_of_it(
    machines, scans, monkeypatch, tmp_path
):
    """As Ray Train calls that one; before it there were two, from step 0 and again from step 4."""
    one, two = machines
    monkeypatch.setenv("MEDSSL_DATA", str(scans))
    tree = {"pretrain": {"name": "simsiam"}}
    overrides = [*SMALL, "resources.workers=2", "resources.min_workers=1", "finetune.training.batch=4"]
    experiment, store, split = single._experiment("tiny", [], overrides, tree, lambda text: None)
    chain = plan.chain("arm", 0, 0, experiment, store, split)
    job = stages.Job(chain, chain.pretraining, stages.Work(one, store.root, split))
    job.folder.mkdir(parents=True)
    sizes = job.folder / "workers.json"
    stages._note_size(sizes, 0, 2)
    stages._note_size(sizes, 4, 2)
    done = stages._tracked(job, 0, 1, torch.device("cpu"))
    assert done["workers"] == [{"step": 0, "workers": 1}], "without a checkpoint it began anew"
    assert two.mirror
    assert "simsiam" in two.mirror._list(f"stages/{job.stage.id}")[0].path, "where the process that finishes it can find it"
    stages._note_size(sizes, 4, 2)
    stages._note_size(sizes, 7, 1)
    stages._note_size(sizes, 7, 2)
    assert json.loads(sizes.read_text()) == [{"step": at, "workers": count} for at, count in ((0, 1), (4, 2), (7, 2))]


def test_a_chain_that_three_machines_share_ends_as_on_one(uri, scans, tmp_path, monkeypatch):
    """The first dies in the pretraining, the second goes on with it, the third fine-tunes from what it finds."""
    monkeypatch.setenv("MEDSSL_DATA", str(scans))

    def pretrain() -> str:
        return single.pretrain("simsiam", None, "tiny", 0, [], SMALL, say=lambda text: None).partition(":")[0]

    def finetune(start: str) -> str:
        return single.finetune(start, "tiny", 0, [], TUNE, say=lambda text: None)

    monkeypatch.setenv("MEDSSL_RUNS", str(tmp_path / "alone"))
    stage = pretrain()
    expected = finetune(stage)
    monkeypatch.setenv("MEDSSL_RUNS", uri)
    monkeypatch.setattr(mirror, "EVERY", 0.0)
    monkeypatch.setattr(loop, "SAVING", math.inf)  # save after every step, whatever it costs
    monkeypatch.setenv("MEDSSL_CACHE", str(tmp_path / "one"))
    save, saves = checkpoint.save, []

    def dying(path: Path, state: checkpoint.State) -> None:
        if len(saves) == 1:
            raise KeyboardInterrupt
        saves.append(path)
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        pretrain()
    monkeypatch.setattr(checkpoint, "save", save)
    begun = Site.here().stage(stage)
    assert (begun / "checkpoint.pt").exists()
    monkeypatch.setenv("MEDSSL_CACHE", str(tmp_path / "two"))
    assert pretrain() == stage
    progress = json.loads((Site.here().stage(stage) / "progress.json").read_text())
    assert 1 <= progress["from"] < 9, "from where the first one was"
    monkeypatch.setenv("MEDSSL_CACHE", str(tmp_path / "three"))
    Site.here().refresh()  # as the command line does
    assert finetune(stage) == expected, "to the last bit"
    assert os.listdir(tmp_path / "three")
    assert single.evaluate_run(expected.partition(":")[0])["test"]["mean"]["dice"] >= 0
