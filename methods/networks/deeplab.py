"""DeepLabV3+: a dilated encoder, a pyramid of dilated convolutions, and a decoder that looks once at the fine map.

Chen, Zhu, Papandreou, Schroff and Adam, "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation",
ECCV 2018, https://arxiv.org/abs/1802.02611, at output stride 16, as PDCR (https://arxiv.org/abs/2201.08779) uses it. The
encoder is the paper's modified Xception (fig. 4; Chollet, https://arxiv.org/abs/1610.02357) or the ResNet-50 of
`resnet_unet.py`, with torchvision's names, whose last stage is dilated by 2. With w = `width`, 32 in the paper:

    stem1, stem2        3x3 convolutions to w channels, stride 2, and 2w
    block1, 2, 3        three separable convolutions and a shortcut each, stride 2: 4w, 8w, 22.75w channels at 1/4, 1/8, 1/16
    block4 … block19    likewise without a stride
    block20             the last two to 32w; exit3, exit4, exit5: separable, dilated by 2, to 48w, 48w, 64w
    pyramid             1x1 and three 3x3 convolutions, dilated by 6, 12, 18, and the mean of the image, 8w each; 1x1 to 8w
    decoder             fine map (1/4) to 1.5w by 1x1 (`low`); pyramid raised to it, both joined (`join`); twice 3x3 to 8w
    head                1x1 to k logits, raised to the sides of the image

Each convolution is followed by batch norm, joint over all workers, and a rectifier; blocks begin with theirs, whose output
the shortcut reads too, as in the code of PDCR. Up-sampling is bilinear and aligns corners, as there; dropout too is PDCR's.
Differences from the paper: pyramid and decoder use plain convolutions, as PDCR's do; any sides. A batch of one slice cannot
be trained: the mean of the image is normalised over the batch.

What pretraining trains and hands on is the encoder, the pyramid not included.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.methods.gather import JointBatchNorm
from medssl.methods.networks import resnet_unet

RATES = (6, 12, 18)  # of the pyramid, at output stride 16: section 4 of the paper
MIDDLE = 16  # blocks without a stride: figure 4


@dataclass(frozen=True, kw_only=True)
class Config:
    backbone: Literal["xception", "resnet50"] = "xception"
    width: int = 32  # w: everything is proportional to it; the ResNet's own is twice this
    dropout: tuple[float, float, float] = (0.5, 0.5, 0.1)  # after the pyramid, and each 3x3 convolution of the decoder

    def __post_init__(self) -> None:
        if self.backbone not in ("xception", "resnet50"):
            raise ValueError(f'backbone is {self.backbone}: expected "xception" or "resnet50"')
        if self.width < 4 or self.width % 4:
            raise ValueError(f"width is {self.width}: expected a multiple of 4, for maps of 22.75 times as many channels")
        if len(self.dropout) != 3 or not all(0 <= p < 1 for p in self.dropout):
            raise ValueError(f"dropout is {self.dropout}: expected three probabilities below 1")


def unit(inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1, dropout: float = 0.0) -> nn.Sequential:
    """Convolution, batch norm, rectifier and, if any, dropout."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, dilation * (kernel // 2), dilation, bias=False)
    layers = [convolution, JointBatchNorm(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Dropout(dropout)) if dropout else nn.Sequential(*layers)


def separable(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """3x3 convolution of each channel, batch norm, 1x1 convolution across channels, batch norm."""
    depthwise = nn.Conv2d(inputs, inputs, 3, stride, dilation, dilation, groups=inputs, bias=False)
    pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
    return nn.Sequential(depthwise, JointBatchNorm(inputs), pointwise, JointBatchNorm(outputs))


class Block(nn.Module):
    """Three separable convolutions, between rectifiers, and a shortcut: (n, c, h, w) at 1/stride of the resolution.

    channels   into the first, and out of each of the three
    rectify    begin with a rectifier
    """

    def __init__(self, channels: tuple[int, int, int, int], stride: int = 1, rectify: bool = True):
        super().__init__()
        strides, ends = (1, 1, stride), itertools.pairwise(channels)
        self.first, self.second, self.third = (separable(*pair, step) for pair, step in zip(ends, strides, strict=True))
        self.rectify = rectify
        self.shortcut: nn.Module | None = None
        if stride > 1 or channels[0] != channels[3]:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels[0], channels[3], 1, stride, bias=False), JointBatchNorm(channels[3])
            )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x) if self.rectify else x
        branch = self.third(F.relu(self.second(F.relu(self.first(x), inplace=True)), inplace=True))
        return branch + (self.shortcut(x) if self.shortcut else x)


class Xception(nn.Module):
    """The modified Xception: an image (n, c, h, w) to maps at 1/2, 1/4 (the decoder's), 1/8, and 1/16.

    channels   of each map, in the same order
    """

    def __init__(self, in_channels: int, width: int):
        super().__init__()
        w, middle = width, 91 * width // 4
        self.channels = (2 * w, 4 * w, 8 * w, 64 * w)
        self.stem1, self.stem2 = unit(in_channels, w, 3, stride=2), unit(w, 2 * w, 3)
        self.block1 = nn.Sequential(Block((2 * w, 4 * w, 4 * w, 4 * w), stride=2, rectify=False), nn.ReLU(inplace=True))
        self.block2 = Block((4 * w, 8 * w, 8 * w, 8 * w), stride=2)
        self.block3 = Block((8 * w, middle, middle, middle), stride=2)
        for number in range(4, 4 + MIDDLE):
            self.add_module(f"block{number}", Block((middle,) * 4))
        self.block20 = Block((middle, middle, 32 * w, 32 * w))
        ends = (32 * w, 48 * w, 48 * w, 64 * w)
        self.exit3, self.exit4, self.exit5 = (
            nn.Sequential(*separable(inputs, outputs, dilation=2), nn.ReLU(inplace=True))
            for inputs, outputs in itertools.pairwise(ends)
        )
        initialised(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [self.stem2(self.stem1(x))]
        for block in (self.block1, self.block2):
            maps.append(block(maps[-1]))
        x = maps[-1]
        for number in range(3, 5 + MIDDLE):
            x = self.get_submodule(f"block{number}")(x)
        return [*maps, self.exit5(self.exit4(self.exit3(F.relu(x, inplace=True))))]


class ResNet(resnet_unet.Encoder):
    """ResNet-50 at output stride 16: maps at 1/2, 1/4 (the decoder's), 1/8, 1/16, 1/16."""

    def __init__(self, in_channels: int, width: int):
        super().__init__(in_channels, resnet_unet.Config(layers=50, width=2 * width), dilated=True)


class Pyramid(nn.Module):
    """What lies around each cell at several distances: (n, c, h, w) to (n, 8w, h, w)."""

    def __init__(self, inputs: int, outputs: int, dropout: float):
        super().__init__()
        self.branches = nn.ModuleList([unit(inputs, outputs, 1), *(unit(inputs, outputs, 3, dilation=r) for r in RATES)])
        self.mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), *unit(inputs, outputs, 1))
        self.join = Join()
        self.project = unit((2 + len(RATES)) * outputs, outputs, 1, dropout=dropout)
        initialised(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.join([branch(x) for branch in self.branches], self.mean(x))
        return self.project(x)


class Join(nn.Module):
    """Maps side by side, the last one raised to the sides of the others; a module, so that what is joined has a name."""

    def forward(self, maps: Sequence[Tensor], coarse: Tensor) -> Tensor:
        return torch.cat([*maps, raised(coarse, maps[0].shape[2:])], dim=1)


def raised(x: Tensor, sides: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(sides), mode="bilinear", align_corners=True)


def initialised(module: nn.Module) -> None:
    for each in module.modules():
        if isinstance(each, nn.Conv2d):  # He et al. 2015, https://arxiv.org/abs/1502.01852
            nn.init.kaiming_normal_(each.weight)


class Decoder(nn.Module):
    """Fine map (n, c, h, w) and pyramid (n, 8w, ·, ·) to (n, 8w, h, w)."""

    def __init__(self, fine: int, width: int, dropout: Sequence[float]):
        super().__init__()
        w, low = width, 3 * width // 2
        self.low = unit(fine, low, 1)
        self.join = Join()
        self.conv1 = unit(8 * w + low, 8 * w, 3, dropout=dropout[0])
        self.conv2 = unit(8 * w, 8 * w, 3, dropout=dropout[1])
        initialised(self)

    def forward(self, fine: Tensor, pyramid: Tensor) -> Tensor:
        x: Tensor = self.conv2(self.conv1(self.join([self.low(fine)], pyramid)))
        return x


class DeepLabV3Plus(nn.Module):
    """A segmentation network whose `encoder` can be trained and moved apart from the rest.

    in_channels   c of the input (n, c, h, w); any sides
    classes       k of the logits (n, k, h, w), background included
    """

    def __init__(self, in_channels: int, classes: int, config: Config | None = None):
        super().__init__()
        config = config or Config()
        w = config.width
        self.encoder = (Xception if config.backbone == "xception" else ResNet)(in_channels, w)
        self.pyramid = Pyramid(self.encoder.channels[-1], 8 * w, config.dropout[0])
        self.decoder = Decoder(self.encoder.channels[1], w, config.dropout[1:])
        self.head = nn.Conv2d(8 * w, classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.encoder(x)
        return raised(self.head(self.decoder(maps[1], self.pyramid(maps[-1]))), x.shape[2:])


NETWORK = DeepLabV3Plus
