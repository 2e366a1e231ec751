"""Warps and changes of colour for labelled pictures, batched, on the device of the slices: the augmentation of PDCR.

Li et al., "Contrastive and selective hidden embeddings for medical image segmentation", IEEE TMI 2022,
https://arxiv.org/abs/2201.08779; its code takes them from imgaug (https://github.com/aleju/imgaug).

    warp      A = [a cos t, -b sin(t + u); a sin t, b cos(t + u)]     scales a, b, rotation t, shear u about the middle
              out(x) = in(A⁻¹ (x - d))                                x = (column, row) in pixels, shift d
    colour    (h, s, v) of each pixel -> (h + dh mod 1, clip(s + ds), clip(v + dv))      one draw for all of a picture

Flips are the chain's (`augment.py`). Images are read bilinearly, 0 beyond the frame; a label is that of the nearest pixel.
Where nothing was drawn, image and label stay as they are to the bit. Only pictures of three channels have colours.

Differences from the source: beyond the frame a label is UNLABELLED, not background; hue turns by exactly the drawn share of the
circle, in float32 (there in steps of 1/180); `brightness` is ours, 0 there. With the source's numbers, warp_p = colour_p = 1.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from medssl.methods.protocol import UNLABELLED
from medssl.methods.settings import Pictures


def varied(images: Tensor, labels: Tensor, config: Pictures, rng: Generator) -> tuple[Tensor, Tensor]:
    """Images (n, c, h, w) float32 of intensities in [0, 1] and class ids (n, h, w) int64, each with its own draw.

    Raises ValueError for volumes.
    """
    if images.dim() != 4:
        raise ValueError("warp_p and colour_p change slices; set them to 0 where network.spatial_dims is 3")
    n = len(images)
    if config.warp_p:
        drawn = _uniform((n,), rng) < config.warp_p
        matrix, shift = draw_warp(n, config, rng)
        moved, ids = warp(images, labels, matrix, shift)
        images = torch.where(drawn.view(-1, 1, 1, 1), moved, images)
        labels = torch.where(drawn.view(-1, 1, 1), ids, labels)
    if config.colour_p and images.shape[1] == 3:
        drawn = _uniform((n,), rng) < config.colour_p
        by = (2 * _uniform((n, 3), rng) - 1) * torch.tensor(
            (config.hue, config.saturation, config.brightness), device=rng.device
        )
        images = torch.where(drawn.view(-1, 1, 1, 1), recoloured(images, by), images)
    return images, labels


def draw_warp(n: int, config: Pictures, rng: Generator) -> tuple[Tensor, Tensor]:
    """A (n, 2, 2) on (column, row) from the middle, and d (n, 2) as a share of the sides."""
    low, high = config.warp_scale
    a, b = (low + _uniform((n, 2), rng) * (high - low)).unbind(1)
    turn, shear = (
        (2 * _uniform((n, 2), rng) - 1) * torch.tensor((config.warp_rotation, config.warp_shear), device=rng.device)
    ).unbind(1)
    t, u = turn * (math.pi / 180), (turn + shear) * (math.pi / 180)
    rows = torch.stack([a * t.cos(), -b * u.sin()], 1), torch.stack([a * t.sin(), b * u.cos()], 1)
    return torch.stack(rows, 1), (2 * _uniform((n, 2), rng) - 1) * config.warp_shift


def warp(images: Tensor, labels: Tensor, matrix: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Images and class ids as `draw_warp`'s matrix and shift move them; see the module."""
    sides = torch.tensor([images.shape[3], images.shape[2]], device=images.device)
    (a, b), (c, d) = matrix[:, 0].unbind(1), matrix[:, 1].unbind(1)
    inverse = torch.stack([d, -b, -c, a], 1).view(-1, 2, 2) / (a * d - b * c).view(-1, 1, 1)
    rows, columns = (torch.arange(side, device=images.device) + 0.5 - side / 2 for side in images.shape[2:])
    x = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)  # (h, w, 2) from the middle, pixels
    at = (x - (shift * sides)[:, None, None]) @ inverse.mT[:, None]
    grid = at / (sides / 2)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    ids = (labels - UNLABELLED)[:, None].float()  # class ids are exact in float32; 0 beyond the frame means UNLABELLED
    ids = F.grid_sample(ids, grid, mode="nearest", padding_mode="zeros", align_corners=False)[:, 0]
    return images, ids.round().long() + UNLABELLED


def recoloured(images: Tensor, by: Tensor) -> Tensor:
    """Pictures (n, 3, h, w) of red, green and blue, clipped to [0, 1], with (n, 3) added to hue, saturation and value."""
    h, s, v = hsv(images.clamp(0, 1)).unbind(1)
    dh, ds, dv = by.view(-1, 3, 1, 1).unbind(1)
    return rgb(torch.stack([(h + dh) % 1, (s + ds).clamp(0, 1), (v + dv).clamp(0, 1)], 1))


def hsv(images: Tensor) -> Tensor:
    """Hue as a share of the circle, saturation and value, (n, 3, h, w), of red, green and blue; greys have hue 0."""
    r, g, b = images.unbind(1)
    value, largest = images.max(1)
    chroma = value - images.amin(1)
    span = torch.where(chroma > 0, chroma, 1)
    sector = torch.stack([(g - b) / span, (b - r) / span + 2, (r - g) / span + 4], 1).gather(1, largest[:, None])[:, 0]
    saturation = chroma / torch.where(value > 0, value, 1)
    return torch.stack([torch.where(chroma > 0, sector / 6 % 1, 0), saturation, value], 1)


def rgb(images: Tensor) -> Tensor:
    """Red, green and blue, (n, 3, h, w), of hue, saturation and value."""
    h, s, v = images.unbind(1)
    k = (torch.tensor([5.0, 3.0, 1.0], device=images.device).view(1, 3, 1, 1) + 6 * h[:, None]) % 6
    return v[:, None] * (1 - s[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


def _uniform(shape: tuple[int, ...], rng: Generator) -> Tensor:
    return torch.rand(shape, generator=rng, device=rng.device)
