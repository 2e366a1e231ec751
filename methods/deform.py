"""Affine and elastic deformation of labelled slices, both in one resampling, batched, on the device of the slices.

Chaitanya, Erdil, Karani and Konukoglu, "Contrastive learning of global and local features for medical image segmentation with
limited annotations", NeurIPS 2020, https://arxiv.org/abs/2006.10511, its fine-tuning; numbers are those of the authors'
code (https://github.com/krishnabits001/domain_specific_cl), elastic deformation is that of Simard, Steinkraus and Platt 2003
(https://doi.org/10.1109/ICDAR.2003.1227801) on a coarse grid.

    affine    one of: rotation by U(-15, 15) degrees; zoom by U(0.95, 1.05); for every other image a mirror of its columns;
              rotation by a multiple of 45 degrees                                      A: about the middle of the slice
    elastic   v: g x g nodes of N(0, sigma²) pixels for rows and for columns, brought to s x s bicubically    (n, 2, s, s)

    out(r) = in(A⁻¹ [r - v(r)])       the bracket is cut to the frame

Images are read bilinearly, 0 beyond the frame; a label is that of the nearest pixel, UNLABELLED beyond the frame. Where nothing
was drawn, image and label stay as they are to the bit.

Differences from the source: one resampling instead of two; labels keep one class (there they are moved as maps per class, and
become soft); each image has its own draw (there elastic deformation takes the batch from a random row on); zoom is not rounded;
nodes come to the full size by torch's bicubic kernel, cut to the range of the nodes as there. Slices only.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from medssl.methods.protocol import UNLABELLED
from medssl.methods.settings import Deformation


def deformed(images: Tensor, labels: Tensor, config: Deformation, rng: Generator) -> tuple[Tensor, Tensor]:
    """Images (n, c, s, s) float and class ids (n, s, s) int64, each with its own draw; s may differ between the axes.

    Raises ValueError for volumes.
    """
    if images.dim() != 4:
        raise ValueError("affine_p and elastic_p deform slices; set them to 0 where network.spatial_dims is 3")
    n, sides = len(images), images.shape[2:]
    linear, turned = affine(n, config, rng)
    bent = _uniform(n, rng) < config.elastic_p
    field = elastic(n, (sides[0], sides[1]), config, rng) * bent.view(-1, 1, 1, 1)
    at = points(linear, field)
    moved = (turned | bent).view(-1, 1, 1)
    return torch.where(moved[:, None], sampled(images, at), images), torch.where(moved, nearest(labels, at), labels)


def affine(n: int, config: Deformation, rng: Generator) -> tuple[Tensor, Tensor]:
    """A⁻¹ of n images, (n, 2, 2) on (row, column) from the middle, and which images it moves, (n,) bool."""
    drawn = _uniform(n, rng) < config.affine_p
    kind = (_uniform(n, rng) * 4).long()
    angle = torch.deg2rad((2 * _uniform(n, rng) - 1) * config.rotation)
    low, high = config.rescale
    zoom = low + _uniform(n, rng) * (high - low)
    mirror, eighth = _uniform(n, rng) < 0.5, (_uniform(n, rng) * 8).floor()
    angle = torch.where(kind == 3, eighth * (math.pi / 4), torch.where(kind == 0, angle, 0)) * drawn
    zoom = torch.where(drawn & (kind == 1), zoom, 1)
    mirror &= drawn & (kind == 2)
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    sign = torch.where(mirror, -1.0, 1.0)
    rows = torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1) * sign[:, None]
    return torch.stack(rows, 1), (angle != 0) | (zoom != 1) | mirror


def elastic(n: int, sides: tuple[int, int], config: Deformation, rng: Generator) -> Tensor:
    """v of n images in pixels, rows then columns, (n, 2, *sides). The outer nodes are the corners of the image."""
    nodes = torch.randn(n, 2, *[config.elastic_nodes] * 2, generator=rng, device=rng.device) * config.elastic_sigma
    field = F.interpolate(nodes, size=sides, mode="bicubic", align_corners=True)
    return field.maximum(nodes.amin((2, 3), keepdim=True)).minimum(nodes.amax((2, 3), keepdim=True))


def points(linear: Tensor, field: Tensor) -> Tensor:
    """Where each output pixel is read, (n, 2, h, w): row and column, of A⁻¹ (n, 2, 2) and v (n, 2, h, w)."""
    last = torch.tensor([side - 1.0 for side in field.shape[2:]], device=field.device).view(2, 1, 1)
    axes = [torch.arange(side, dtype=field.dtype, device=field.device) for side in field.shape[2:]]
    at = torch.stack(torch.meshgrid(*axes, indexing="ij")) - field
    at = at.clamp(min=0).minimum(last) - last / 2
    return torch.einsum("nij,njhw->nihw", linear, at) + last / 2


def sampled(images: Tensor, at: Tensor) -> Tensor:
    """Images (n, c, h, w) at points (n, 2, h, w), bilinearly, 0 beyond the frame."""
    last = torch.tensor([max(side - 1, 1) for side in images.shape[2:]], device=at.device).view(2, 1, 1)
    grid = (2 * at / last - 1).flip(1).movedim(1, -1)  # grid_sample wants column, row
    return F.grid_sample(images, grid.to(images.dtype), mode="bilinear", padding_mode="zeros", align_corners=True)


def nearest(labels: Tensor, at: Tensor) -> Tensor:
    """Class ids (n, h, w) at points (n, 2, h, w); UNLABELLED beyond the frame."""
    height, width = labels.shape[1:]
    row, column = at.round().long().unbind(1)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    place = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    return labels.flatten(1).gather(1, place.flatten(1)).view_as(labels).where(inside, UNLABELLED)


def _uniform(n: int, rng: Generator) -> Tensor:
    return torch.rand(n, generator=rng, device=rng.device)
