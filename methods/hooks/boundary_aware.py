"""Boundary-aware information maximisation: clusters of pixels that are balanced, and unsure where the image has an edge.

Peng, Wang, Chen, Pedersoli and Desrosiers, "Boundary-aware information maximization for self-supervised medical image
segmentation", Medical Image Analysis 2024, https://doi.org/10.1016/j.media.2024.103150, https://arxiv.org/abs/2202.02371.

    q     clusters of every cell of a layer's map, of x and of T x                                  (S, m, K, *)
    E     edges of the image, |∇I| by differences to the pixel before, to [0, 1] per crop, ^power   (m, 1, *)
    H     - Σ_k q_k ln q_k, to [0, 1] per crop                                                      (S m, 1, *)
    L_CC  - mean of  cov(E, H)² / (var E var H)  in windows of `window` cells, both views
    L     redundancy · L_RR (`redundancy_reduction.py`) + boundary · L_CC

Differences from the published code (https://github.com/jizongFox/Contrast-You), whose forms `edges` and `cross_correlation`
give for known values: its differences go round the image's border and make an edge there, ours are 0 there; windows in which
both maps are flat have nothing to correlate and scored as perfect there, here they count nowhere, and neither do windows that
reach beyond the map or show what is not slice. Negative covariance has no gradient, as there.
K = 40, three linear heads, windows of 5 and power 0.75 are those of the experiments on ACDC; boundary 1 against redundancy 1,
on prostates 0.1. As a hook it stands beside the supervised loss; the paper pretrains with it (`methods/boundary_aware.py`).
Transfers: nothing of its own.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from medssl.methods import agreement, clusters, settings
from medssl.methods.augment import Pair
from medssl.methods.hooks.mutual_information import moved
from medssl.methods.protocol import Loss, Step
from medssl.methods.ramps import weight
from medssl.methods.segment import Drawn, Hook, Pass, initial
from medssl.methods.taps import Taps, channels

TINY = 1e-5  # below it a window is flat
SPREAD = 1e-6  # of the range that a map is divided by


@dataclass(frozen=True, kw_only=True)
class Config(settings.Boundary, settings.Hook):
    weight: float = 0.1
    layer: str = "decoder"  # a module of the network


class BoundaryAware(nn.Module):
    predictor = None

    def __init__(self, network: nn.Module, config: Config):
        super().__init__()
        self.config = config
        self.taps = Taps(network, [config.layer])
        with initial("boundary_aware"):
            c = channels(network, config.layer)
            self.head = clusters.Clusters(c, config.clusters, config.heads, config.hidden)

    def draw(self, pair: Pair, rng: Generator) -> Drawn:
        return {}

    def terms(self, pass_: Pass, drawn: Drawn, step: Step) -> Loss:
        config, factor, pair = self.config, weight(self.config, step), pass_.pair
        x, y = (self.head(self.taps.taken(logits)[config.layer]) for logits in (pass_.image, pass_.moved))
        terms = {}
        if config.redundancy:
            p = clusters.joint(moved(x, pass_), y, clusters.within(pair.valid, y.shape[3:]))
            terms["redundancy"] = factor * config.redundancy * clusters.reduced(p, config.alpha, config.balance).mean()
        if config.boundary:
            views = ((pair.image, x, pair.inside), (pair.moved, y, pair.valid))
            losses = [boundary(*view, config.window, config.power) for view in views]
            terms["boundary"] = factor * config.boundary * torch.stack(losses).mean()
        return Loss(terms)

    def after_step(self, network: nn.Module, step: Step) -> None:
        pass


def boundary(image: Tensor, q: Tensor, valid: Tensor, window: int, power: float) -> Tensor:
    """L_CC of one view, (): image (m, c, *), q (S, m, K, *) of the same or coarser cells, valid (m, *)."""
    with torch.autocast(image.device.type, enabled=False):
        heads, sides = len(q), q.shape[3:]
        valid = clusters.within(valid, sides)[:, None]
        mode = "bilinear" if len(sides) == 2 else "trilinear"
        picture = F.interpolate(image.float().mean(1, keepdim=True), tuple(sides), mode=mode, align_corners=False)
        edge, shown = edges(picture, power, valid=valid), 1 - dilated((~valid).float(), window)
        unsure = entropies(q.flatten(0, 1), torch.cat([valid] * heads))
        correlation, told = cross_correlation(unsure, torch.cat([edge] * heads), window)
        counts = told & (torch.cat([shown] * heads) > 0)
        return -agreement.average(correlation[:, 0], counts[:, 0])


def edges(image: Tensor, power: float, border: Literal["flat", "circular"] = "flat", valid: Tensor | None = None) -> Tensor:
    """E of images (m, 1, *); `border` says what lies before the first pixel: itself, or, as published, the last one."""
    total = torch.zeros_like(image)
    for axis in range(2, image.dim()):
        step = image - image.roll(1, axis)
        if border == "flat":
            step = torch.cat([torch.zeros_like(step.narrow(axis, 0, 1)), step.narrow(axis, 1, step.shape[axis] - 1)], axis)
        total = total + step.square()
    return ranged(total.sqrt(), valid) ** power


def entropies(q: Tensor, valid: Tensor | None = None) -> Tensor:
    """H of maps (m, K, *), (m, 1, *)."""
    return ranged(-(q * (q + 1e-16).log()).sum(1, keepdim=True), valid)


def ranged(maps: Tensor, valid: Tensor | None = None) -> Tensor:
    """Each of (m, 1, *) brought to [0, 1] by its least and greatest value; by those of valid pixels, where others become 0."""
    axes = tuple(range(2, maps.dim()))
    if valid is None:
        low, high = maps.amin(axes, keepdim=True), maps.amax(axes, keepdim=True)
        return (maps - low) / (high - low + SPREAD)
    low = maps.where(valid, torch.inf).amin(axes, keepdim=True)
    high = maps.where(valid, -torch.inf).amax(axes, keepdim=True)
    return torch.where(valid, (maps - low) / (high - low + SPREAD), 0)


def dilated(mask: Tensor, window: int) -> Tensor:
    """1 where a window (m, 1, *) holds a 1 or reaches beyond the map."""
    reach, axes = window // 2, mask.dim() - 2
    pool = F.max_pool2d if axes == 2 else F.max_pool3d
    return pool(F.pad(mask, [reach] * (2 * axes), value=1.0), window, 1)


def cross_correlation(a: Tensor, b: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """cov² / (var var) in the window about each cell, 0 beyond the map, and whether not both are flat there; (m, 1, *)."""
    axes = a.dim() - 2
    pool, n = F.avg_pool2d if axes == 2 else F.avg_pool3d, window**axes

    def summed(x: Tensor) -> Tensor:
        return pool(x, window, 1, window // 2) * n

    sa, sb, saa, sbb, sab = (summed(x) for x in (a, b, a * a, b * b, a * b))
    cross, va, vb = (sab - sa * sb / n).clamp_min(TINY), saa - sa * sa / n, sbb - sb * sb / n
    return cross.square() / (va.clamp_min(TINY) * vb.clamp_min(TINY)), (va > TINY) | (vb > TINY)


HOOK: type[Hook] = BoundaryAware
