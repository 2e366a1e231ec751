"""Several workers are one: equal losses, equal parameters, whatever dies."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from medssl.methods import gather, segment, simsiam
from medssl.methods.networks import unet
from medssl.methods.optimizers import decay_groups
from medssl.methods.protocol import Batch, Loss, Step, Views
from medssl.methods.settings import Training
from medssl.platform import checkpoint, loop, stream, train
from medssl.platform.errors import RunError

COUNT, BATCH, SIDE = 24, 8, 16
STEPS = 2 * COUNT // BATCH  # two epochs


def slices() -> stream.Slices:
    """Random slices, a third of them without a label."""
    rng = torch.Generator().manual_seed(0)
    numbers = torch.arange(COUNT)
    label = torch.randint(0, 3, (COUNT, SIDE, SIDE), generator=rng, dtype=torch.uint8)
    label[::3] = 255  # workers hold unequal numbers of labelled slices
    return stream.Slices(
        image=torch.randint(0, 256, (COUNT, 1, SIDE, SIDE), generator=rng, dtype=torch.uint8),
        label=label,
        labelled=torch.ones(COUNT, dtype=torch.bool),
        size=torch.full((COUNT, 2), SIDE),
        position=torch.linspace(0, 1, COUNT),
        patient=numbers,
        volume=numbers,
        slice_index=numbers,
        spacing_mm=torch.ones(COUNT, 3),
        patient_names=tuple(f"{i:02}" for i in range(COUNT)),
        volume_names=tuple(f"{i:02}" for i in range(COUNT)),
    )


def two_views(batch: Batch) -> Views:
    """Views that the batch alone decides, so that they do not depend on who makes them."""
    x = batch["image"].float() / 255
    return Views([x, x.flip(3) ** 2], labels=batch["label"].long())


class FixedSimSiam(simsiam.SimSiam):
    def augment(self, batch: Batch, rng: Generator) -> Views:
        return two_views(batch)


class FixedSegment(segment.Segment):
    def augment(self, batch: Batch, rng: Generator) -> Views:
        views = two_views(batch)
        return Views(views.images[:1], labels=views.labels)


class Contrast(nn.Module):
    """InfoNCE over the joint batch: every slice is a negative of every other one, whoever holds it."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(16, 8)

    def augment(self, batch: Batch, rng: Generator) -> Views:
        return two_views(batch)

    def loss(self, views: Views, step: Step) -> Loss:
        z1, z2 = (nn.functional.normalize(self.head(self.encoder(x)[-1].mean((2, 3)))) for x in views.images)
        everyone, first = gather.rows(z2)
        target = torch.arange(first, first + len(z1))
        nce = nn.functional.cross_entropy(z1 @ everyone.T / 0.2, target, reduction="sum")
        return Loss({"nce": gather.mean(nce, len(z1))})

    def after_step(self, step: Step) -> None: ...

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return decay_groups(self, weight_decay)

    def transferable_state(self) -> dict[str, Tensor]:
        return self.encoder.state_dict()


def build(name: str) -> Any:
    torch.manual_seed(0)
    net = unet.UNet(1, 3, unet.Config(width=4, levels=3, norm="batch"))
    if name == "simsiam":
        return FixedSimSiam(net.encoder, simsiam.Config(d=16, bottleneck=8))
    frozen = segment.Config(freeze_encoder=0.5)  # workers must agree on what they do not move
    return FixedSegment(net, frozen) if name == "segment" else Contrast(net.encoder)


def work(payload: dict[str, Any], rank: int, world: int, device: torch.device) -> dict[str, Any]:
    """A small stage for each method; a group takes 15 s to start, so they share one."""
    (payload["folder"] / f"{rank}.pid").write_text(str(os.getpid()))
    return {name: stage(name, payload["folder"], payload["pause"], rank, world) for name in payload["methods"]}


def stage(name: str, folder: Path, pause: float, rank: int, world: int) -> dict[str, Any]:
    """Trains, saves every step, and gives losses step by step and the parameters."""
    file, method, data, losses = folder / f"{name}.pt", build(name), slices(), dict[int, dict[str, float]]()

    def batches(start: int) -> Iterator[Batch]:
        for batch in stream.node_batches(data, BATCH, seed=5, start=start, rank=rank, world=world):
            time.sleep(pause)
            yield batch

    def save(state: checkpoint.State) -> None:
        checkpoint.save(file, state)

    training = Training(batch=BATCH, optimizer="sgd", lr=0.005)
    resume = checkpoint.load(file) if file.exists() else None
    outcome = loop.train(
        method, batches, training, steps=STEPS, seed=0, rank=rank, world=world, resume=resume, report_seconds=0,
        save_seconds=0, save=save, on_step=lambda step, terms, *_: losses.update({step: terms}),
    )  # fmt: skip
    parameters = {name: parameter.detach().numpy() for name, parameter in method.named_parameters()}
    return {"status": outcome.status, "losses": losses, "parameters": parameters, "began": resume["step"] if resume else 0}


def refuse(payload: Any, rank: int, world: int, device: torch.device) -> None:
    """One worker gives up while the other waits for it."""
    if rank == 1:
        raise RunError("the scan is broken; repair it")
    torch.distributed.barrier()


@pytest.fixture(autouse=True)
def by_value() -> Iterator[None]:
    """Workers cannot import the tests."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def run(folder: Path, workers: int, methods: list[str], pause: float = 0) -> Any:
    folder.mkdir(exist_ok=True)
    payload = {"folder": folder, "methods": methods, "pause": pause}
    return train.launch(work, payload, workers=workers, gpu=False, folder=folder, name="workers")


def assert_equal(one: Any, several: Any) -> None:
    assert several["losses"].keys() == one["losses"].keys()
    for step, terms in one["losses"].items():
        assert several["losses"][step] == pytest.approx(terms, rel=1e-4, abs=1e-5), f"step {step}"
    for name, parameter in one["parameters"].items():
        np.testing.assert_allclose(several["parameters"][name], parameter, rtol=1e-3, atol=1e-5, err_msg=name)


def test_one_worker_is_this_process(tmp_path: Path) -> None:
    run(tmp_path, 1, ["contrast"])
    assert (tmp_path / "0.pid").read_text() == str(os.getpid())


@pytest.mark.slow
def test_two_workers_equal_one_with_the_joint_batch(ray_local: None, tmp_path: Path) -> None:
    """Two epochs step by step: losses over the joint batch, and the parameters that all their gradients led to."""
    methods = ["contrast", "simsiam", "segment"]
    one, two = run(tmp_path / "one", 1, methods), run(tmp_path / "two", 2, methods)
    pids = {(tmp_path / "two" / f"{rank}.pid").read_text() for rank in (0, 1)}
    assert len(pids | {str(os.getpid())}) == 3
    for name in methods:
        assert_equal(one[name], two[name])


@pytest.mark.slow
def test_a_killed_worker_costs_no_step(ray_local: None, tmp_path: Path) -> None:
    """SIGKILL in the middle: the group starts again from the last checkpoint and ends where it would have."""
    undisturbed = run(tmp_path / "one", 1, ["simsiam"])["simsiam"]
    folder = tmp_path / "two"
    killed: list[int] = []

    def kill() -> None:
        while not (folder / "simsiam.pt").exists() or checkpoint.load(folder / "simsiam.pt")["step"] < 2:
            time.sleep(0.02)
        killed.append(int((folder / "1.pid").read_text()))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    two = run(folder, 2, ["simsiam"], pause=0.5)["simsiam"]
    killer.join()
    assert int((folder / "1.pid").read_text()) != killed[0]
    assert 2 <= two["began"] < STEPS
    undisturbed["losses"] = {step: terms for step, terms in undisturbed["losses"].items() if step > two["began"]}
    assert_equal(undisturbed, two)


@pytest.mark.slow
def test_what_a_worker_refuses_is_raised_as_it_is_and_not_tried_for_ever(ray_local: None, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"^the scan is broken; repair it$"):
        train.launch(refuse, None, workers=2, gpu=False, folder=tmp_path, name="workers")
    assert not (tmp_path / "workers.error").exists()
