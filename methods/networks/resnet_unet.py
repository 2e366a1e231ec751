"""ResNet U-Net: a residual network as the contracting path of a U-Net.

Encoder: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, https://arxiv.org/abs/1512.03385, table 1, with
torchvision's parameter names, so that its weights fit. Decoder: that of segmentation_models_pytorch
(https://github.com/qubvel-org/segmentation_models.pytorch), which the study of BYOL on ACDC (https://arxiv.org/abs/2209.00314)
fine-tunes. In two or three dimensions. With w = `width` and e = 1 (18 and 34 layers) or 4 (50 layers):

    encoder   7x7 convolution of stride 2 to w channels; max-pooling and four stages of residual blocks of w, 2w, 4w, 8w
              channels inside and e times as many outside; maps of w, ew, 2ew, 4ew, 8ew channels at 1/2, 1/4, 1/8, 1/16, 1/32
    decoder   five times: nearest up-sampling by 2, concatenation with the encoder's map of that resolution (none at full
              resolution), two 3x3 convolutions, each with batch norm and rectifier; 4w, 2w, w, w/2, w/4 channels
    head      3x3 convolution to k logits

Differences from the paper of the encoder: a bottleneck's stride is in its 3x3 convolution, as in torchvision, and there is no
classifier. Batch norms are joint over all workers. Sides need not be multiples of 32: strides round up, and the decoder crops
what it has up-sampled; sides of 32 pixels and less are padded with 0 to 33, so that the coarsest map is not a single pixel,
which a batch of one slice could not normalise. (The encoder on its own leaves them: then batch norm refuses, in a sentence,
what has one value per channel.)

The encoder is what pretraining trains and hands on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.methods.gather import JointBatchNorm
from medssl.methods.networks.unet import cut, filled

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}  # per stage, table 1
LEAST = 33  # pixels per side from which the coarsest map has more than one


@dataclass(frozen=True, kw_only=True)
class Config:
    layers: Literal[18, 34, 50] = 50  # with weights, counted as in the paper's names; the ACDC study: 50
    width: int = 64  # w: channels of the finest map, and in the first stage's blocks
    spatial_dims: Literal[2, 3] = 2

    def __post_init__(self) -> None:
        if self.layers not in (18, 34, 50):
            raise ValueError(f"layers is {self.layers}: expected 18, 34 or 50")
        if self.width < 4 or self.width % 4:
            raise ValueError(f"width is {self.width}: expected a multiple of 4, for the decoder ends in a quarter of it")


class Block(nn.Module):
    """A residual block: x (n, c, h, w) to relu(F(x) + x), with `outputs` channels at 1/stride of the resolution.

    bottleneck   1x1, 3x3, 1x1 convolutions, the outer ones of four times the channels; else twice 3x3
    """

    def __init__(self, inputs: int, inner: int, stride: int, bottleneck: bool, dims: int):
        super().__init__()
        outputs = 4 * inner if bottleneck else inner
        if bottleneck:
            self.conv1, self.bn1 = convolution(inputs, inner, 1, dims), JointBatchNorm(inner)
            self.conv2, self.bn2 = convolution(inner, inner, 3, dims, stride), JointBatchNorm(inner)
            self.conv3, self.bn3 = convolution(inner, outputs, 1, dims), JointBatchNorm(outputs)
        else:
            self.conv1, self.bn1 = convolution(inputs, inner, 3, dims, stride), JointBatchNorm(inner)
            self.conv2, self.bn2 = convolution(inner, outputs, 3, dims), JointBatchNorm(outputs)
        self.bottleneck = bottleneck
        self.downsample: nn.Module | None = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(convolution(inputs, outputs, 1, dims, stride), JointBatchNorm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        if self.bottleneck:
            branch = self.bn3(self.conv3(F.relu(branch, inplace=True)))
        return F.relu(branch + (self.downsample(x) if self.downsample else x), inplace=True)


def convolution(inputs: int, outputs: int, kernel: int, dims: int, stride: int = 1) -> nn.Module:
    """Without a bias, which the batch norm after it would remove; sides are divided by the stride and rounded up."""
    return (nn.Conv2d if dims == 2 else nn.Conv3d)(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def stage(inputs: int, inner: int, blocks: int, stride: int, bottleneck: bool, dims: int) -> nn.Sequential:
    """Blocks of equal width, the first of which changes resolution and channels."""
    outputs = 4 * inner if bottleneck else inner
    first = Block(inputs, inner, stride, bottleneck, dims)
    return nn.Sequential(first, *(Block(outputs, inner, 1, bottleneck, dims) for _ in range(blocks - 1)))


class Encoder(nn.Module):
    """The residual network: an image (n, c, h, w) to five maps, from the finest (1/2) to the coarsest (1/32).

    channels   of each map, in the same order
    """

    def __init__(self, in_channels: int, config: Config):
        super().__init__()
        w, dims, bottleneck = config.width, config.spatial_dims, config.layers == 50
        e, blocks = 4 if bottleneck else 1, BLOCKS[config.layers]
        self.channels = (w, e * w, 2 * e * w, 4 * e * w, 8 * e * w)
        self.conv1, self.bn1 = convolution(in_channels, w, 7, dims, stride=2), JointBatchNorm(w)
        self.maxpool = (nn.MaxPool2d if dims == 2 else nn.MaxPool3d)(3, stride=2, padding=1)
        self.layer1 = stage(w, w, blocks[0], 1, bottleneck, dims)
        self.layer2 = stage(e * w, 2 * w, blocks[1], 2, bottleneck, dims)
        self.layer3 = stage(2 * e * w, 4 * w, blocks[2], 2, bottleneck, dims)
        self.layer4 = stage(4 * e * w, 8 * w, blocks[3], 2, bottleneck, dims)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):  # He et al. 2015, https://arxiv.org/abs/1502.01852
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [F.relu(self.bn1(self.conv1(x)), inplace=True)]
        x = self.maxpool(maps[0])
        for each in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = each(x)
            maps.append(x)
        return maps


class Decoder(nn.Module):
    """The expanding path: the encoder's maps to one map (n, width / 4, *sides) at full resolution."""

    def __init__(self, channels: Sequence[int], config: Config):
        super().__init__()
        w, dims = config.width, config.spatial_dims
        outputs = (4 * w, 2 * w, w, w // 2, w // 4)
        skips = (*reversed(channels[:-1]), 0)
        inputs = [below + skip for below, skip in zip((channels[-1], *outputs), skips, strict=False)]
        self.blocks = nn.ModuleList(double(*ends, dims) for ends in zip(inputs, outputs, strict=True))

    def forward(self, maps: Sequence[Tensor], sides: Sequence[int]) -> Tensor:
        *skips, x = maps
        for block, skip in zip(self.blocks, [*reversed(skips), None], strict=True):
            wanted = sides if skip is None else skip.shape[2:]
            x = cut(F.interpolate(x, scale_factor=2, mode="nearest"), wanted)  # an odd side was rounded up on the way down
            x = block(x if skip is None else torch.cat([x, skip], dim=1))
        return x


def double(inputs: int, outputs: int, dims: int) -> nn.Sequential:
    """Twice 3x3 convolution, batch norm, rectifier; the resolution stays."""
    first, second = convolution(inputs, outputs, 3, dims), convolution(outputs, outputs, 3, dims)
    rectifier = nn.ReLU(inplace=True)
    return nn.Sequential(first, JointBatchNorm(outputs), rectifier, second, JointBatchNorm(outputs), rectifier)


class ResNetUNet(nn.Module):
    """A segmentation network whose `encoder` can be trained and moved apart from the rest.

    in_channels   c of the input (n, c, h, w), or (n, c, h, w, z) with spatial_dims 3; any sides
    classes       k of the logits (n, k, h, w), background included
    """

    def __init__(self, in_channels: int, classes: int, config: Config | None = None):
        super().__init__()
        config = config or Config()
        self.encoder = Encoder(in_channels, config)
        self.decoder = Decoder(self.encoder.channels, config)
        self.head = (nn.Conv2d if config.spatial_dims == 2 else nn.Conv3d)(config.width // 4, classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        padded = filled(x, [max(side, LEAST) for side in x.shape[2:]])
        return cut(self.head(self.decoder(self.encoder(padded), padded.shape[2:])), x.shape[2:])


NETWORK = ResNetUNet
