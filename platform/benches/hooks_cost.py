"""What hooks cost: steps with a stack of them against steps of the same network, on the same views, without."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from medssl.methods import segment
from medssl.methods.networks import deeplab
from medssl.methods.protocol import Step, Views
from medssl.platform import find
from medssl.platform.bench import Row

ROUNDS = 3  # with and without take turns, so that a busy machine disturbs both


def run() -> list[Row]:
    """PDCR at its paper's settings: DeepLabV3+ with Xception, colour images of 512 px; a batch that a processor can bear."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with_pdcr, without = _seconds(deeplab.DeepLabV3Plus(3, 2), {"pdcr": {}}, views(2, 3, 512, 2, device))
    what = f"steps with PDCR, DeepLabV3+/Xception, 2 colour images of 512 px, {device.type}"
    return [Row(what, "steps/s", 1 / with_pdcr, "the same without", 1 / without, target=0.9)]


def views(n: int, channels: int, side: int, classes: int, device: torch.device) -> Views:
    """Labelled crops, a disc of each class in noise."""
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(n, channels, side, side, generator=rng)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    labels = torch.zeros(n, side, side, dtype=torch.long)
    for k in range(1, classes):
        labels[:, (y - side * k // (classes + 1)).square() + (x - side // 3).square() < (side // 5) ** 2] = k
    return Views([images.to(device)], labels=labels.to(device))


def _seconds(network: nn.Module, hooks: Mapping[str, Mapping[str, Any]], given: Views) -> tuple[float, float]:
    """Median seconds of forward and backward with the hooks, of which none wants unlabelled slices, and without."""
    device = given.images[0].device
    network = network.to(device).train()
    config = segment.Config(side=given.images[0].shape[-1])
    plain = segment.Segment(network, config)
    modules = {name: find.load("hook", name) for name in hooks}
    stacked = {name: module.HOOK(network, module.Config(**hooks[name])) for name, module in modules.items()}
    given = Views(given.images, labels=given.labels, drawn={name: {} for name in hooks})
    method = segment.Segment(network, config, stacked)
    taken: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * ROUNDS + 1):
        hooked = turn % 2 == 1
        begun = time.perf_counter()
        (method if hooked else plain).loss(given, Step(0, 10)).total.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        network.zero_grad()
        if turn:  # the first pays for what is allocated once
            taken[hooked].append(time.perf_counter() - begun)
    return statistics.median(taken[True]), statistics.median(taken[False])
