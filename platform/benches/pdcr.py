"""What PDCR costs: steps with its terms against steps without, at the paper's settings.

A step without is forward and backward of DeepLabV3+ with Xception on colour images of 512 px. The terms are timed by
themselves, forward and backward as far as the maps that they read, and added: in the noise of so long a step they would vanish.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from medssl.methods import segment
from medssl.methods.hooks import pdcr
from medssl.methods.networks import deeplab
from medssl.methods.protocol import Step, Views
from medssl.platform.bench import Row

SIDE, BATCH = 512, 2  # pixels, and as many images as a processor can bear (paper: 4 on each GPU)
WIDTH = 32  # of the network, the paper's
ROUNDS = 5  # of the terms


def run() -> list[Row]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step, terms = seconds(device)
    what = f"steps with PDCR, DeepLabV3+/Xception, {BATCH} colour images of {SIDE} px, {device.type}"
    return [Row(what, "steps/min", 60 / (step + terms), "the same without", 60 / step, target=0.9)]


def seconds(device: torch.device) -> tuple[float, float]:
    """Of a step without PDCR, and of its terms."""
    torch.manual_seed(0)
    network = deeplab.DeepLabV3Plus(3, 2, deeplab.Config(width=WIDTH)).to(device).train()
    method, given = segment.Segment(network, segment.Config(side=SIDE)), views(device)
    taken = [_timed(lambda: method.loss(given, Step(0, 10)).total.backward(), device) for _ in range(2)]
    hook = pdcr.PDCR(network, pdcr.Config())
    logits = network(given.images[0])
    maps = {name: each.detach().requires_grad_() for name, each in hook.taps.taken(logits).items()}
    labels, logits = given.labels, logits.detach()
    assert labels is not None

    def terms(labels: Tensor = labels) -> None:
        hook.taps.passes[logits] = maps
        rng = torch.Generator(device).manual_seed(0)
        torch.stack(list(hook.contrast(logits, labels, rng).values())).sum().backward()

    terms()  # the first pays for what is allocated once
    return min(taken), statistics.median(_timed(terms, device) for _ in range(ROUNDS))


def _timed(work: Callable[[], None], device: torch.device) -> float:
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def views(device: torch.device) -> Views:
    """Noise, labelled with a disc that lies in no diagonal."""
    rng = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    disc = (y - SIDE // 2) ** 2 + (x - SIDE // 3) ** 2 < (SIDE // 5) ** 2
    images = torch.rand(BATCH, 3, SIDE, SIDE, generator=rng)
    return Views([images.to(device)], labels=disc.long().expand(BATCH, SIDE, SIDE).contiguous().to(device))
