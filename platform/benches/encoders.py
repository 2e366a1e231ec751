"""SimSiam with the CT study's encoder against bare compute, and with a small one against the study's own training loop.

The first encoder is the study's Swin UNETR (C = 48, pairs of 96 px), where compute is what costs: all of our training, from
the slices in memory on, against forward, backward and update on views that are already there. The second is a small U-Net's,
where feeding it costs too, that of `make sweep`: the phantom's slices and its settings, against a DataLoader that reads these
slices from PNG files, as the study keeps its own, and takes each through its MONAI chain, with the same method and optimizer
after it. On a CPU both sides compute with torch's own number of threads, and the loader works in the process that trains,
which is the study's default; beside a GPU it has a process per core. In the first comparison slices have a usual size of the
study's preparation.
On a GPU both sides train in bfloat16; its memory is told, and what share of the rate of a large bfloat16 matrix product on the
same card our steps reach, by the operations of matrix products and convolutions that torch counts in them.
"""

import dataclasses
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medssl.methods import optimizers, simsiam
from medssl.methods.networks import swin_unetr, unet
from medssl.methods.protocol import Step, Views
from medssl.methods.settings import Training
from medssl.platform import config, ingest, loop, stream
from medssl.platform.bench import Row
from medssl.platform.benches import pairs
from medssl.platform.benches.loop import alternate, in_memory
from medssl.platform.datasets import phantom

INTERVAL = (0.3, 0.6)
SIDES = (pairs.HEIGHT, pairs.WIDTH)
SLICES = 256
PATIENTS = 6


def run() -> list[Row]:
    """Both comparisons, on the device that training would use."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [_against_compute(device), _against_source(device)]


def _against_compute(device: torch.device) -> Row:
    """Where compute costs: nothing of what surrounds it may show."""
    batch, steps = (128, 30) if device.type == "cuda" else (4, 2)
    method, training = _simsiam(swin_unetr.SwinUNETR(1, 14).encoder, batch, device)
    views = [torch.rand(batch, 1, pairs.SIDE, pairs.SIDE, device=device) for _ in range(2)]
    fast, slow = alternate(
        _ours(method, training, steps, in_memory(SLICES, device, SIDES), device),
        _plain(method, training, steps, lambda: itertools.repeat(views)),
    )
    what = f"simsiam, Swin encoder of C = 48, {batch} pairs of {pairs.SIDE} px a step, {device.type}"
    if device.type == "cuda":
        what += f", {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
        reached = operations(method, training, views) * steps / fast
        what += f", {reached / product_rate(device):.0%} of the card's bf16 rate"
    rival, target = "bare forward, backward and update", 0.95 if device.type == "cpu" else 0.9
    return Row(what, "pairs/s", steps * batch / fast, rival, steps * batch / slow, target)


def operations(method: Any, training: Training, views: list[Tensor]) -> float:
    """Of a step's forward and backward pass, those of matrix products and convolutions: two for a product and its sum."""
    from torch.utils.flop_counter import FlopCounterMode

    kind = loop.AUTOCAST[training.precision]
    with FlopCounterMode(display=False) as counted:
        with torch.autocast(views[0].device.type, kind, enabled=kind is not None):
            total = method.loss(Views(views), Step(0, 1)).total
        total.backward()
    return float(counted.get_total_flops())


def product_rate(device: torch.device, side: int = 8192, times: int = 20) -> float:
    """Operations per second of a bfloat16 matrix product of `side`, after a first one."""
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    float((a @ a)[0, 0])
    begun = time.perf_counter()
    for _ in range(times):
        product = a @ a
    float(product[0, 0])  # waits for the device
    return times * 2 * side**3 / (time.perf_counter() - begun)


def _against_source(device: torch.device) -> Row:
    """Where feeding costs: a batch at a time on the device, against a sample at a time on the host."""
    steps, workers = (40, len(os.sched_getaffinity(0))) if device.type == "cuda" else (8, 0)
    with tempfile.TemporaryDirectory() as folder:
        slices, experiment = phantoms(Path(folder), device)
        method, training = small(experiment, device)
        loader = png_loader(slices, Path(folder), method.config, training.batch, workers)
        endless = itertools.chain.from_iterable(itertools.repeat(loader))
        moved = ([made[view].as_tensor().to(device) for view in ("view0", "view1")] for made in endless)
        fast, slow = alternate(_ours(method, training, steps, slices, device), _plain(method, training, steps, lambda: moved))
    pairs_of = f"{training.batch} pairs of {method.config.side} px a step"
    what = f"simsiam, U-Net encoder of `make sweep` on phantoms, {pairs_of}, {device.type}"
    rival = f"the CT study's loop: PNG, DataLoader with {workers} workers, MONAI chain"
    count, target = steps * training.batch, 3.0 if device.type == "cpu" else 10.0
    return Row(what, "pairs/s", count / fast, rival, count / slow, target)


def phantoms(folder: Path, device: torch.device) -> tuple[stream.Slices, config.Experiment]:
    """Slices of a few phantoms, and what `make sweep` trains on them: the data set's own settings."""
    phantom.generate(folder / "scans", patients=PATIENTS)
    store = ingest.prepare(folder / "scans", folder / "store", changes=phantom.PRESET_CHANGES, workers=1)
    return stream.Slices.read(store).to(device), config.build(config.suited(phantom.DEFAULTS, {}))


def small(experiment: config.Experiment, device: torch.device) -> tuple[simsiam.SimSiam, Training]:
    """SimSiam around the experiment's encoder."""
    assert experiment.pretrain
    assert experiment.pretrain.training
    torch.manual_seed(0)
    encoder = unet.UNet(1, 14, experiment.network.settings).encoder
    precision: Any = "bf16" if device.type == "cuda" else "fp32"
    training = dataclasses.replace(experiment.pretrain.training, precision=precision, stop_on_collapse=False)
    return simsiam.SimSiam(encoder, experiment.pretrain.settings).to(device).train(), training


def _simsiam(encoder: nn.Module, batch: int, device: torch.device) -> tuple[simsiam.SimSiam, Training]:
    method = simsiam.SimSiam(encoder, simsiam.Config(side=pairs.SIDE, iou=INTERVAL))
    precision: Any = "bf16" if device.type == "cuda" else "fp32"
    return method.to(device).train(), simsiam.Training(batch=batch, precision=precision, stop_on_collapse=False)


def _ours(method: Any, training: Training, steps: int, slices: stream.Slices, device: torch.device) -> Callable[[], None]:
    """Steps of the loop, with its slices, samples, views, reports."""

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


def png_loader(slices: stream.Slices, folder: Path, config_: simsiam.Config, batch: int, workers: int) -> Any:
    """The study's pretraining loader over slices as PNG files of 8 bits, which it writes first; batches of two views."""
    from monai import data
    from monai import transforms as mt
    from PIL import Image

    assert config_.side
    assert config_.iou
    files = [folder / f"{number}.png" for number in range(len(slices.image))]
    for file, image, (height, width) in zip(files, slices.image.cpu().numpy(), slices.size.tolist(), strict=True):
        Image.fromarray(image[0, :height, :width]).save(file)
    chain = pairs.rival(config_.iou, config_.side)
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
