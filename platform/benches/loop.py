"""What the loop and the stream cost: steps and slices against the bare operation on data already in memory."""

import statistics
import time
from collections.abc import Callable
from itertools import islice, repeat
from typing import Any

import torch
from torch import Generator
from torch.utils.data import DataLoader, TensorDataset

from medssl.methods import optimizers, segment, simsiam
from medssl.methods.networks import unet
from medssl.methods.protocol import Batch, Step, Views
from medssl.methods.settings import Training
from medssl.platform import loop, stream
from medssl.platform.bench import Row

ROUNDS = 7  # ours and the rival take turns, so that a busy machine disturbs both
SECONDS = 1.0  # of each turn


def run() -> list[Row]:
    """The loop around two methods, and the stream of slices in memory; on the device that training would use."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [_steps("segment", device), _steps("simsiam", device), *_slices(device)]


def _steps(name: str, device: torch.device) -> Row:
    """`loop.train` with reports, against forward, backward and update of the same network on the same views."""
    batch = 16
    method, training, views = _fixed(name, batch, device)
    steps, bare = _calibrated(method, training, views)
    data: Batch = {"image": views.images[0]}

    def ours() -> None:
        loop.train(method, lambda start: repeat(data), training, steps=steps, seed=0, device=device)

    fast, slow = alternate(ours, lambda: bare(steps))
    what = f"{name}, U-Net, {batch} slices of 96 px in memory, {device.type}"
    return Row(what, "steps/s", steps / fast, "bare forward, backward and update", steps / slow, target=0.95)


def _fixed(name: str, batch: int, device: torch.device) -> tuple[Any, Training, Views]:
    """A method whose views are there already: the augmentation has a bench of its own."""
    torch.manual_seed(0)
    network = unet.UNet(1, 14, unet.Config(width=8))
    images = [torch.rand(batch, 1, 96, 96, device=device) for _ in range(2)]
    method: Any
    training: Training
    if name == "simsiam":
        method, training = simsiam.SimSiam(network.encoder), simsiam.Training(batch=batch, stop_on_collapse=False)
        views = Views(images)
    else:
        method, training = segment.Segment(network), segment.Training(batch=batch)
        views = Views(images[:1], labels=torch.randint(0, 14, (batch, 96, 96), device=device))

    def augment(batch: Batch, rng: Generator) -> Views:
        return views

    method.augment = augment
    return method.to(device).train(), training, views


def _calibrated(method: Any, training: Training, views: Views) -> tuple[int, Callable[[int], None]]:
    """The bare training, and how many of its steps take about SECONDS."""

    def bare(steps: int) -> None:
        optimizer = optimizers.build(method, training)
        for index in range(steps):
            optimizer.zero_grad()
            loss = method.loss(views, Step(index, steps))
            loss.total.backward()
            optimizer.step()
        loss.total.item()  # waits for the device

    bare(2)
    begun = time.perf_counter()
    bare(3)
    return max(3, round(3 * SECONDS / (time.perf_counter() - begun))), bare


def _slices(device: torch.device) -> list[Row]:
    """Batches of the stream, its start included, against indexing the same array with the same rows."""
    n, batch, batches = 20_000, 128, 300
    set_ = in_memory(n, device)
    pairs = TensorDataset(set_.image, set_.position)
    rows = list(islice(stream.indices(n, batch, seed=0), batches))

    def ours() -> None:
        for data in islice(stream.node_batches(set_, batch, seed=0), batches):
            data["image"][0, 0, 0, 0].item()

    def plain() -> None:
        for index in rows:
            set_.image[torch.from_numpy(index).to(device)][0, 0, 0, 0].item()

    def first() -> None:
        next(stream.node_batches(set_, batch, seed=0))["image"][0, 0, 0, 0].item()

    fast, slow = alternate(ours, plain)
    start, loader = alternate(first, lambda: next(iter(DataLoader(pairs, batch, shuffle=True))))
    count = batch * batches
    what = f"batch of {batch} slices of 64 px, from {n:,} in memory, {device.type}"
    return [
        Row(what, "slices/s", count / fast, "indexing the images alone", count / slow, target=0.8),
        Row(f"first {what}", "batches/s", 1 / start, "torch's DataLoader, no workers", 1 / loader),
    ]


def in_memory(n: int, device: torch.device, sides: tuple[int, int] = (64, 64)) -> stream.Slices:
    """n slices of noise, as a training holds them."""
    numbers = torch.arange(n)
    names = tuple(str(i) for i in range(n))
    return stream.Slices(
        image=torch.randint(0, 256, (n, 1, *sides), dtype=torch.uint8),
        label=None,
        labelled=torch.zeros(n, dtype=torch.bool),
        size=torch.tensor(sides).repeat(n, 1),
        position=torch.rand(n),
        patient=numbers,
        volume=numbers,
        slice_index=torch.zeros(n, dtype=torch.int64),
        spacing_mm=torch.ones(n, 3),
        patient_names=names,
        volume_names=names,
    ).to(device)


def alternate(ours: Callable[[], None], rival: Callable[[], None]) -> tuple[float, float]:
    """Median seconds of each, taking turns; the first turn of each does not count."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS + 1):
        for side, work in zip(seconds, (ours, rival), strict=True):
            begun = time.perf_counter()
            work()
            side.append(time.perf_counter() - begun)
    fast, slow = (statistics.median(side[1:]) for side in seconds)
    return fast, slow
