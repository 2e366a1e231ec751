"""U-Net: a contracting path that says what, an expanding path that says where, and skips that join them.

Ronneberger, Fischer and Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015,
https://arxiv.org/abs/1505.04597. In two or three dimensions.

    level l = 0 … L-1     a map of width · 2^l channels at 1 / 2^l of the resolution
    encoder               two convolutions per level; between levels max-pooling, or the next convolution has stride 2 (`down`)
    decoder               2x2 up-convolution, concatenation with the encoder's map of that level, two convolutions
    head                  1x1 convolution to k logits

Differences from the paper: convolutions are padded, so logits have the sides of the input; each is followed by a
normalisation and a leaky rectifier, as in nnU-Net (Isensee et al. 2021, https://doi.org/10.1038/s41592-020-01008-z).
Sides need not be multiples of 2^(L-1): pooling rounds up, and the decoder crops what it has up-sampled to the skip.
With `down` "stride" the network is nnU-Net's plain U-Net, and MONAI's DynUNet (`platform/export.py`).

The encoder is what pretraining trains and hands on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.methods.gather import JointBatchNorm

LEVELS = 5  # of the paper
GROUPS = 8  # of group normalisation; Wu and He 2018 (https://arxiv.org/abs/1803.08494) find the number to matter little


@dataclass(frozen=True, kw_only=True)
class Config:
    width: int = 32  # channels of the finest level; doubles with every level (paper: 64)
    levels: int | None = None  # resolutions; None: 5, and in a run, as many of them as leave small crops 4 pixels
    spatial_dims: Literal[2, 3] = 2
    norm: Literal["instance", "batch", "group"] = "instance"  # see `normalisation`
    down: Literal["pool", "stride"] = "pool"  # what halves the resolution: max-pooling, or the next convolution

    def __post_init__(self) -> None:
        if min(self.width, self.levels or 1) < 1 or self.levels == 0:
            raise ValueError(f"width is {self.width} and levels {self.levels}: expected at least 1")


def normalisation(kind: str, channels: int, spatial_dims: int) -> nn.Module:
    """A normalisation layer of `channels` features.

    One encoder is pretrained and fine-tuned, so the choice has to serve both, and they disagree (EXPERIMENTS.md, one seed).
    Fine-tuning wants "instance", nnU-Net's habit: 400 steps from scratch on the phantom give a test Dice of 0.50, "batch" 0.45,
    "group" 0.23. Pretraining would rather have "group": "instance" centres every channel of the coarsest map, whose
    mean is the very feature that is compared, and only the rectifier after it keeps that mean from being one constant (a linear
    probe of it for a slice's position on the hippocampus data: R² 0.43 against 0.85 before training, 0.89 against 0.93
    after 200 steps of SimSiam). The lesser evil is the default. Its statistics belong to one slice, so they depend neither on
    the batch nor on the number of workers nor on the mode; those of "batch" are joint over all workers.
    """
    if kind == "group":
        return nn.GroupNorm(math.gcd(GROUPS, channels), channels)
    if kind == "instance":
        return (nn.InstanceNorm2d if spatial_dims == 2 else nn.InstanceNorm3d)(channels, affine=True)
    return JointBatchNorm(channels)


def block(inputs: int, outputs: int, config: Config, stride: int = 1) -> nn.Sequential:
    """Twice 3x3 convolution, normalisation, leaky rectifier; sides are divided by the stride and rounded up."""
    convolution = nn.Conv2d if config.spatial_dims == 2 else nn.Conv3d
    layers: list[nn.Module] = []
    for channels, step in ((inputs, stride), (outputs, 1)):
        layers += [
            convolution(channels, outputs, kernel_size=3, stride=step, padding=1, bias=False),  # the normalisation has a bias
            normalisation(config.norm, outputs, config.spatial_dims),
            nn.LeakyReLU(0.01, inplace=True),
        ]
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """The contracting path: an image (n, c, h, w) to one map per level, from the finest to the coarsest.

    channels   of each map, in the same order
    """

    def __init__(self, in_channels: int, config: Config):
        super().__init__()
        self.channels = tuple(config.width * 2**level for level in range(config.levels or LEVELS))
        self.pooled = config.down == "pool"
        strides = [1, *[1 if self.pooled else 2] * (len(self.channels) - 1)]
        levels = zip((in_channels, *self.channels[:-1]), self.channels, strides, strict=True)
        self.blocks = nn.ModuleList(block(above, own, config, stride) for above, own, stride in levels)
        self.centred = config.norm == "instance"
        self.pool = (nn.MaxPool2d if config.spatial_dims == 2 else nn.MaxPool3d)(2, ceil_mode=True)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        sides = x.shape[2:]
        for level, stage in enumerate(self.blocks):
            x = self.pool(x) if level and self.pooled else x
            if self.centred and math.prod(-(-side // 2**level) for side in sides) == 1:
                raise ValueError(f"level {level + 1} of the U-Net sees one pixel, which instance norm erases; use fewer levels")
            x = stage(x)
            maps.append(x)
        return maps


class Decoder(nn.Module):
    """The expanding path: the encoder's maps to one map (n, channels[0], h, w), or, after the first `blocks`, a coarser one."""

    def __init__(self, channels: Sequence[int], config: Config):
        super().__init__()
        up = nn.ConvTranspose2d if config.spatial_dims == 2 else nn.ConvTranspose3d
        ends = list(zip(channels[1:], channels[:-1], strict=True))[::-1]  # (coarse, fine), from the coarsest
        self.ups = nn.ModuleList(up(coarse, fine, kernel_size=2, stride=2) for coarse, fine in ends)
        self.blocks = nn.ModuleList(block(2 * fine, fine, config) for _, fine in ends)

    def forward(self, maps: Sequence[Tensor], blocks: int | None = None) -> Tensor:
        *skips, x = maps
        for up, stage, skip in list(zip(self.ups, self.blocks, reversed(skips), strict=True))[:blocks]:
            x = cut(up(x), skip.shape[2:])  # an odd side was rounded up on the way down
            x = stage(torch.cat([skip, x], dim=1))
        return x


def filled(x: Tensor, sides: Sequence[int]) -> Tensor:
    """Images (n, c, h, w) padded with 0 below and to the right, to at least `sides` pixels."""
    missing = [max(wanted - side, 0) for wanted, side in zip(sides, x.shape[2:], strict=True)]
    return F.pad(x, [pad for length in reversed(missing) for pad in (0, length)]) if any(missing) else x


def cut(x: Tensor, sides: Sequence[int]) -> Tensor:
    """The first `sides` pixels of maps (n, c, h, w): `filled` undone."""
    return x[(slice(None), slice(None), *(slice(side) for side in sides))]


class UNet(nn.Module):
    """A segmentation network whose `encoder` can be trained and moved apart from the rest.

    in_channels   c of the input (n, c, h, w), or (n, c, d, h, w) with spatial_dims 3; any sides
    classes       k of the logits (n, k, h, w), background included
    """

    def __init__(self, in_channels: int, classes: int, config: Config | None = None):
        super().__init__()
        config = config or Config()
        self.encoder = Encoder(in_channels, config)
        self.decoder = Decoder(self.encoder.channels, config)
        self.head = (nn.Conv2d if config.spatial_dims == 2 else nn.Conv3d)(config.width, classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.decoder(self.encoder(x)))
        return logits


NETWORK = UNet
