"""Clusters of features: heads that say which cluster a feature belongs to, and how much two such answers tell of each other.

Ji, Henriques and Vedaldi, "Invariant information clustering", ICCV 2019, https://arxiv.org/abs/1807.06653; displacements
and the balance as in Peng, Pedersoli and Desrosiers, "Boosting semi-supervised image segmentation with global and local mutual
information regularization", MELBA 2021, https://arxiv.org/abs/2103.04813.

    x, y     what a head says of two views, probabilities                        (S, n, K) or maps (S, n, K, *), S heads
    P        Σ_n x_n y_nᵀ, made symmetric and brought to a sum of 1               (S, K, K)
    L        - Σ_ij P_ij [ln(P_ij + e) - λ ln(P_i + e) - λ ln(P_j + e)]           (S,); λ = 1: minus the mutual information

λ above 1 asks for clusters of equal size. Of maps every pixel is a case; with displacements up to d, x is looked at u rows
and v columns further on and L is the mean over the (2d+1)² displacements, each with a P of its own.
Sums are over the crops of all workers.
"""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.methods import gather

REDUCED = 1e-5  # e of `reduced`


class Clusters(nn.Module):
    """S heads that assign features to K clusters: a linear layer on every pixel, or two with a rectifier between, and softmax.

    `forward` takes features (n, c) or maps (n, c, *) to probabilities (S, n, K[, *]) in float32.
    """

    def __init__(self, channels: int, clusters: int, heads: int = 1, hidden: int | None = None, temperature: float = 1.0):
        super().__init__()
        self.clusters, self.temperature = clusters, temperature
        self.heads = nn.ModuleList(_head(channels, clusters, hidden) for _ in range(heads))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            features = x.float().movedim(1, -1)
            z = torch.stack([head(features) for head in self.heads]) / self.temperature
            return z.softmax(-1).movedim(-1, 2)


def _head(channels: int, clusters: int, hidden: int | None) -> nn.Sequential:
    layers = [nn.Linear(channels, hidden), nn.LeakyReLU(0.01)] if hidden else []
    return nn.Sequential(*layers, nn.Linear(hidden or channels, clusters))


def pooled(maps: Tensor) -> Tensor:
    """The mean of a map (n, c, *) over its pixels, (n, c) in float32."""
    return maps.float().flatten(2).mean(2)


def within(valid: Tensor, sides: torch.Size) -> Tensor:
    """Cells of a coarser map that show valid pixels alone: (m, *) bool to (m, *sides) bool."""
    if valid.shape[1:] == sides:
        return valid
    pool = F.adaptive_max_pool2d if valid.dim() == 3 else F.adaptive_max_pool3d
    return pool((~valid)[:, None].float(), tuple(sides))[:, 0] == 0


def cells(maps: Tensor, places: Tensor) -> Tensor:
    """The cells of maps (m, c, *) at flat places (m, p), crop by crop, (m p, c)."""
    taken = places[:, None].expand(-1, maps.shape[1], -1)
    return maps.flatten(2).gather(2, taken).movedim(1, -1).flatten(0, 1)


def joint(x: Tensor, y: Tensor, valid: Tensor | None = None, symmetric: bool = True) -> Tensor:
    """P, (S, K, K).

    x, y    (S, n, K) or (S, n, K, *)
    valid   (n, *) bool, pixels that count
    """
    if valid is not None:
        x = x * valid[:, None]
    a, b = (each.movedim(2, -1).flatten(1, -2) for each in (x, y))
    with torch.autocast(x.device.type, enabled=False):
        return normalised(gather.total(torch.einsum("snk,snl->skl", a, b)), symmetric)


def normalised(counts: Tensor, symmetric: bool = True) -> Tensor:
    """Counts (*, K, K) as joint probabilities."""
    p = counts / counts.sum((-2, -1), keepdim=True).clamp_min(1e-30)
    return (p + p.transpose(-2, -1)) / 2 if symmetric else p


def negative_information(p: Tensor, balance: float = 1.0, tiny: float = 1e-10) -> Tensor:
    """L of joint probabilities (*, K, K), (*); `balance` is λ, `tiny` is e."""
    rows, columns = p.sum(-1, keepdim=True), p.sum(-2, keepdim=True)
    ratio = (p + tiny).log() - balance * (rows + tiny).log() - balance * (columns + tiny).log()
    return -(p * ratio).sum((-2, -1))


def reduced(p: Tensor, alpha: float, balance: float = 1.0, attached: bool = True) -> Tensor:
    """L of joint probabilities (*, K, K) whose target lies between them and a diagonal: see `hooks/redundancy_reduction.py`."""
    size = p.shape[-1]
    target = alpha * torch.eye(size, dtype=p.dtype, device=p.device) / size + (1 - alpha) * p
    if not attached:
        target = target.detach()
    marginals = (p.sum(-1, keepdim=True) + REDUCED).log() + (p.sum(-2, keepdim=True) + REDUCED).log()
    return (balance * p * marginals - target * (p + REDUCED).log()).sum((-2, -1))


def displaced(x: Tensor, y: Tensor, reach: int) -> Tensor:
    """Σ over pixels of x, displaced by up to `reach` cells on each axis, against y: (displacements, S, K, K), as counts.

    x, y   (S, n, K, *), 0 where a pixel does not count; beyond the map all is 0
    """
    axes, sides = x.dim() - 3, x.shape[3:]
    padded = F.pad(x, [reach] * (2 * axes))
    each = []
    for shift in itertools.product(range(2 * reach + 1), repeat=axes):
        window = padded
        for axis, (first, side) in enumerate(zip(shift, sides, strict=True), start=3):
            window = window.narrow(axis, first, side)
        a, b = (part.movedim(2, -1).flatten(1, -2) for part in (window, y))
        each.append(torch.einsum("snk,snl->skl", a, b))
    return torch.stack(each)


def local_information(
    x: Tensor,
    y: Tensor,
    reach: int = 0,
    balance: float = 1.0,
    shift: bool = False,
    patch: int | None = None,
    symmetric: bool = True,
    tiny: float = 1e-16,
) -> Tensor:
    """The mean of L over displacements and patches, (S,).

    x, y    (S, n, K, *), 0 where a pixel does not count
    shift   take the least count off all, as the published code does: it magnifies what flat counts tell, and changes the value
    patch   side of windows at every half of it, the last flush with the border, each with counts of its own; None: the map
    """
    losses = []
    for window in windows(x.shape[3:], patch):
        a, b = (each[(slice(None), slice(None), slice(None), *window)] for each in (x, y))
        counts = gather.total(displaced(a, b, reach))
        if shift:
            counts = counts - counts.detach().amin((0, 2, 3), keepdim=True) + tiny
        losses.append(negative_information(normalised(counts, symmetric), balance, tiny).mean(0))
    return torch.stack(losses).mean(0)


def windows(sides: torch.Size, patch: int | None) -> Iterator[tuple[slice, ...]]:
    """Where `patch` sized windows lie in a map of `sides`."""
    each = [starts(side, patch) for side in sides]
    for corner in itertools.product(*each):
        yield tuple(slice(first, first + (patch or side)) for first, side in zip(corner, sides, strict=True))


def starts(side: int, patch: int | None) -> list[int]:
    """First cells of the windows along an axis."""
    if patch is None or patch >= side:
        return [0]
    return sorted({*range(0, side - patch, max(patch // 2, 1)), side - patch})
