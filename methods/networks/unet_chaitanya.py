"""The U-Net of global and local contrast: six levels, narrow, each block of its decoder to be pretrained by itself.

Chaitanya, Erdil, Karani and Konukoglu, "Contrastive learning of global and local features for medical image segmentation with
limited annotations", NeurIPS 2020, https://arxiv.org/abs/2006.10511; sizes are those of the authors' code
(https://github.com/krishnabits001/domain_specific_cl).

    encoder    levels of 16, 32, 64, 128, 128, 128 channels, two convolutions each, max-pooling between them
    decoder    up: nearest neighbour, twice the side, then a 2x2 convolution that sees a row and a column of 0 at the end
               block: the skip beside it, two convolutions; in the last block one
    head       two convolutions of 16 channels, and one to k logits without bias

All other convolutions are 3x3 with bias, a batch norm (over all workers) and a rectifier. Weights are drawn as in He et al.
2015 (https://arxiv.org/abs/1502.01852), biases are 0. For an image of 1 channel and 4 classes: 885,552 weights in the encoder,
1,204,928 in the decoder, 5,280 in the head.

Differences from the source: no two layers begin equal (there all of one shape do, for they share a seed), and running
statistics begin at 0 and 1 (there both at 0). Sides need not be multiples of 32, as in `unet.py`. Slices only.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from medssl.methods.gather import JointBatchNorm
from medssl.methods.networks import unet


@dataclass(frozen=True, kw_only=True)
class Config:
    width: int = 16  # channels of the finest level; doubles with every level up to eight times as many
    levels: int = 6

    def __post_init__(self) -> None:
        if self.width < 1 or self.levels < 2:
            raise ValueError(f"width is {self.width} and levels {self.levels}: expected at least 1 and 2")


def layers(inputs: int, outputs: int, kernel: int = 3) -> list[nn.Module]:
    """Convolution, normalisation, rectifier."""
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2 if kernel % 2 else 0)
    return [convolution, JointBatchNorm(outputs, eps=1e-3, momentum=0.01), nn.ReLU(inplace=True)]


class Encoder(nn.Module):
    """An image (n, c, h, w) to one map per level, from the finest to the coarsest; `channels` are theirs."""

    def __init__(self, in_channels: int, config: Config):
        super().__init__()
        self.channels = tuple(config.width * min(2**level, 8) for level in range(config.levels))
        levels = zip((in_channels, *self.channels[:-1]), self.channels, strict=True)
        self.blocks = nn.ModuleList(nn.Sequential(*layers(above, own), *layers(own, own)) for above, own in levels)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        for level, block in enumerate(self.blocks):
            x = block(self.pool(x) if level else x)
            maps.append(x)
        return maps


class Decoder(unet.Decoder):
    """As that of `unet.py`, other layers: blocks from the coarsest to the finest, of which the first few can be run alone."""

    def __init__(self, channels: tuple[int, ...]):
        nn.Module.__init__(self)
        ends = list(zip(channels[1:], channels[:-1], strict=True))[::-1]  # (coarse, fine), from the coarsest
        self.ups = nn.ModuleList(
            nn.Sequential(nn.Upsample(scale_factor=2), nn.ZeroPad2d((0, 1, 0, 1)), *layers(coarse, fine, 2))
            for coarse, fine in ends
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(*layers(2 * fine, fine), *(layers(fine, fine) if number < len(ends) else []))
            for number, (_, fine) in enumerate(ends, 1)
        )


class UNet(nn.Module):
    """in_channels: c of the input (n, c, h, w), of any sides; classes: k of the logits (n, k, h, w), background included."""

    def __init__(self, in_channels: int, classes: int, config: Config | None = None):
        super().__init__()
        config = config or Config()
        self.encoder = Encoder(in_channels, config)
        self.decoder = Decoder(self.encoder.channels)
        last = nn.Conv2d(config.width, classes, 3, padding=1, bias=False)
        self.head = nn.Sequential(*layers(config.width, config.width), *layers(config.width, config.width), last)
        self.apply(_begin)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.decoder(self.encoder(x)))
        return logits


def _begin(module: Any) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


NETWORK = UNet
