"""SimSiam with the CT study's encoder against bare compute, and with a small one against the study's own training loop.

The first encoder is the study's Swin UNETR (C = 48, pairs of 96 px), where compute is what costs: all of our training, from
the slices in memory on, against forward, backward and update on views that are already there. The second is a small U-Net's,
where feeding it costs too: against a DataLoader that reads slices from PNG files, as the study keeps them, and takes each
through its MONAI chain, with the same method and optimizer after it. There a CPU has one thread on both sides, and the loader
works in the process that trains, which is the study's default; beside a GPU it has a process per core.
Slices have a usual size of the study's preparation. On a GPU both sides train in bfloat16 and its memory is told.
"""

import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medssl.methods import optimizers, simsiam
from medssl.methods.networks import swin_unetr, unet
from medssl.methods.protocol import Step, Views
from medssl.methods.settings import Training
from medssl.platform import loop, stream
from medssl.platform.bench import Row
from medssl.platform.benches import pairs
from medssl.platform.benches.loop import alternate, in_memory

INTERVAL = (0.3, 0.6)
SIDES = (pairs.HEIGHT, pairs.WIDTH)
SLICES = 256


def run() -> list[Row]:
    """Both comparisons, on the device that training would use."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    try:
        rows = [_against_compute(device)]
        if device.type == "cpu":
            torch.set_num_threads(1)
        return [*rows, _against_source(device)]
    finally:
        torch.set_num_threads(threads)


def _against_compute(device: torch.device) -> Row:
    """Where compute costs: nothing of what surrounds it may show."""
    batch, steps = (128, 30) if device.type == "cuda" else (4, 2)
    method, training = _simsiam(swin_unetr.SwinUNETR(1, 14).encoder, batch, device)
    views = [torch.rand(batch, 1, pairs.SIDE, pairs.SIDE, device=device) for _ in range(2)]
    fast, slow = alternate(
        _ours(method, training, steps, device), _plain(method, training, steps, lambda: itertools.repeat(views))
    )
    what = f"simsiam, Swin encoder of C = 48, {batch} pairs of {pairs.SIDE} px a step, {device.type}"
    if device.type == "cuda":
        what += f", {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    rival, target = "bare forward, backward and update", 0.95 if device.type == "cpu" else 0.9
    return Row(what, "pairs/s", steps * batch / fast, rival, steps * batch / slow, target)


def _against_source(device: torch.device) -> Row:
    """Where feeding costs: a batch at a time on the device, against a sample at a time on the host."""
    batch, steps, workers = (128, 20, len(os.sched_getaffinity(0))) if device.type == "cuda" else (16, 4, 0)
    method, training = _simsiam(unet.UNet(1, 14, unet.Config(width=8)).encoder, batch, device)
    with tempfile.TemporaryDirectory() as folder:
        loader = _loader(Path(folder), batch, workers)
        endless = itertools.chain.from_iterable(itertools.repeat(loader))
        moved = ([made[view].as_tensor().to(device) for view in ("view0", "view1")] for made in endless)
        fast, slow = alternate(_ours(method, training, steps, device), _plain(method, training, steps, lambda: moved))
    what = f"simsiam, U-Net encoder of width 8, {batch} pairs of {pairs.SIDE} px a step, {device.type}"
    rival = f"the CT study's loop: PNG, DataLoader with {workers} workers, MONAI chain"
    return Row(what, "pairs/s", steps * batch / fast, rival, steps * batch / slow, 3.0 if device.type == "cpu" else 10.0)


def _simsiam(encoder: nn.Module, batch: int, device: torch.device) -> tuple[simsiam.SimSiam, Training]:
    method = simsiam.SimSiam(encoder, simsiam.Config(side=pairs.SIDE, iou=INTERVAL))
    precision: Any = "bf16" if device.type == "cuda" else "fp32"
    return method.to(device).train(), simsiam.Training(batch=batch, precision=precision, stop_on_collapse=False)


def _ours(method: Any, training: Training, steps: int, device: torch.device) -> Callable[[], None]:
    """Steps of the loop, with its slices, samples, views, reports."""
    slices = in_memory(SLICES, device, SIDES)

    def work() -> None:
        def batches(start: int) -> Iterable[Any]:
            return stream.node_batches(slices, training.batch, seed=0, start=start)

        loop.train(method, batches, training, steps=steps, seed=0, device=device)

    return work


def _plain(method: Any, training: Training, steps: int, views: Callable[[], Iterator[list[Tensor]]]) -> Callable[[], None]:
    """As many steps as a script would do them: next views, loss, gradient, update."""
    kind = loop.AUTOCAST[training.precision]

    def work() -> None:
        optimizer = optimizers.build(method, training)
        for index, each in zip(range(steps), views(), strict=False):
            optimizer.zero_grad()
            with torch.autocast(each[0].device.type, kind, enabled=kind is not None):
                total = method.loss(Views(each), Step(index, steps)).total
            total.backward()
            optimizer.step()
        total.item()  # waits for the device

    return work


def _loader(folder: Path, batch: int, workers: int) -> Any:
    """The study's pretraining loader over slices as PNG files of 8 bits, which it writes first; batches of two views."""
    from monai import data
    from monai import transforms as mt
    from PIL import Image

    rng = np.random.default_rng(0)
    files = [folder / f"{number}.png" for number in range(SLICES)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, SIDES, dtype=np.uint8)).save(file)
    chain = pairs.rival(INTERVAL)
    transform = mt.Compose(
        [
            mt.LoadImaged("image", reader="PILReader", reverse_indexing=False),
            mt.EnsureChannelFirstd("image", channel_dim="no_channel"),
            mt.ScaleIntensityRanged("image", 0, 255, 0, 1),
            lambda loaded: chain(loaded["image"]),
        ]
    )
    items = data.Dataset([{"image": str(file)} for file in files], transform)
    return data.DataLoader(items, workers, batch_size=batch, shuffle=True, drop_last=True, persistent_workers=workers > 0)
