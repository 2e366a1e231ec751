"""What a stack of three hooks costs: steps of its loss and gradient against the bare forward passes that it needs.

The rival runs the network over the same crops as often as the stack must: labelled crops, x and T x with gradients, and the
teacher's pass over x without. What is left is the price of terms, of T and of the teacher's rule.
"""

import time
from collections.abc import Callable

import torch
from torch import Generator

from medssl.methods import segment
from medssl.methods.networks import unet
from medssl.methods.protocol import Step
from medssl.platform import find
from medssl.platform.bench import Row
from medssl.platform.benches.loop import alternate

STACK = ("consistency", "entropy_minimisation", "mean_teacher")
SIDE, SLICES, SECONDS = 96, 8, 1.0  # pixels of a crop, labelled and unlabelled slices each, and of a turn


def run() -> list[Row]:
    """Two student passes more than supervised training, and one of a teacher; on the device that training would use."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    network = unet.UNet(1, 4, unet.Config(width=8))
    hooks = {}
    for name in STACK:
        module = find.load("hook", name)
        hooks[name] = module.HOOK(network, module.Config())
    method = segment.Segment(network, segment.Config(side=SIDE, crops=1), hooks).to(device).train()
    views = method.augment(_batch(device), Generator(device).manual_seed(0))
    teacher, pair = hooks["mean_teacher"].teacher, views.unlabelled
    assert pair is not None

    def stack() -> None:
        method.zero_grad()
        method.loss(views, Step(5, 10)).total.backward()
        method.after_step(Step(5, 10))

    def bare() -> None:
        method.zero_grad()
        teacher(pair.image)
        sum(network(x).mean() for x in (views.images[0], pair.image, pair.moved)).backward()

    count = _count(bare)
    ours, rival = alternate(_times(stack, count, device), _times(bare, count, device))
    what = f"segment with {', '.join(STACK)}, U-Net, {SLICES} + {SLICES} crops of {SIDE} px, {device.type}"
    return [Row(what, "steps/s", count / ours, "the forward and backward passes that it needs", count / rival, target=0.8)]


def _batch(device: torch.device) -> dict[str, torch.Tensor]:
    size = torch.full((SLICES, 2), SIDE, device=device)
    image = torch.rand(SLICES, 1, SIDE, SIDE, device=device)
    label = torch.randint(0, 4, (SLICES, SIDE, SIDE), device=device, dtype=torch.uint8)
    return {"image": image, "label": label, "size": size, "unlabelled_image": image.flip(2), "unlabelled_size": size}


def _times(work: Callable[[], None], count: int, device: torch.device) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(count):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return repeated


def _count(work: Callable[[], None]) -> int:
    """How often `work` fits into SECONDS."""
    work()
    begun = time.perf_counter()
    work()
    return max(1, round(SECONDS / (time.perf_counter() - begun)))
