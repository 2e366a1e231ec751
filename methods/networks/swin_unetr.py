"""Swin UNETR: a Swin Transformer that attends within shifted windows, and a convolutional decoder over its five maps.

Hatamizadeh et al., "Swin UNETR", BrainLes 2021, https://arxiv.org/abs/2201.01266. Encoder: Liu et al., "Swin Transformer",
ICCV 2021, https://arxiv.org/abs/2103.14030. In two or three dimensions; the layers are MONAI's, so its weights fit. With
C = `width`:

    encoder   patches of 2 pixels to C channels, then four stages of `depths` blocks, each ending in a merging of neighbours
              that halves the resolution and doubles the channels; maps of C, 2C, 4C, 8C, 16C channels at 1/2 … 1/32,
              each normalised over its channels, without scale or shift
    decoder   a residual block on the image and on each map but that of 8C; from the coarsest up: 2x2 up-convolution,
              concatenation, residual block
    head      1x1 convolution to k logits

State: `encoder.*` is MONAI's `swinViT.*`, `decoder.*` its `encoder1` … `decoder1`, `head.*` its `out.*`.

Differences from the paper: the convolutions' normalisation may be "group" instead of "instance" (never "batch", whose
statistics would differ between workers). Defaults are those of the study on abdominal CT
(https://github.com/dittohed/exploring-ssl-for-ct): stochastic depth (`drop_path`) while the encoder is pretrained on its own,
none while the whole network is trained. Any sides will do. The network pads images with 0, below and to the right, to a
multiple of 32 and to at least 64 pixels, for instance norm has nothing to say about a coarsest map of one pixel; logits are
cut back to the image. The encoder on its own, as pretraining uses it, pads odd maps only, and images of less than 32 pixels,
whose last stage would attend to a single one; at 1 / 2^l its maps have the sides of the image over 2^l, rounded up.

The encoder is what pretraining trains and hands on, its last merging, which a Swin for classification lacks, included.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from medssl.methods.networks.unet import cut, filled

STRIDE = 32  # image pixels per pixel of the coarsest map
GROUPS = 8  # of group normalisation, as in the U-Net


@dataclass(frozen=True, kw_only=True)
class Config:
    width: int = 48  # C: channels of the finest map; doubles with every map
    depths: tuple[int, int, int, int] = (2, 2, 2, 2)  # blocks per stage; every second one shifts its windows
    heads: int = 3  # of attention in the first stage; doubles with every stage
    window: int = 7  # pixels of a map per side of a window; less where the map is smaller
    drop_path: float = 0.1  # of pretraining: probability of leaving out a branch of the last block; rises linearly from 0
    spatial_dims: Literal[2, 3] = 2
    norm: Literal["instance", "group"] = "instance"  # of the decoder; "instance" has no scale and shift here, as in MONAI

    def __post_init__(self) -> None:
        if min(self.width, self.heads, self.window, *self.depths) < 1:
            raise ValueError(
                f"width is {self.width}, heads {self.heads}, window {self.window} and depths {self.depths}: expected at least 1"
            )
        if self.width % self.heads:
            raise ValueError(f"width is {self.width} and heads {self.heads}: expected width to be a multiple of heads")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path is {self.drop_path}: expected 0 <= drop_path < 1")


class Encoder(nn.Module):
    """The Swin Transformer: an image (n, c, h, w) to five maps, from the finest to the coarsest.

    channels   of each map, in the same order
    """

    def __init__(self, in_channels: int, config: Config):
        super().__init__()
        from monai.networks.nets.swin_unetr import SwinTransformer

        swin = SwinTransformer(
            in_chans=in_channels,
            embed_dim=config.width,
            window_size=(config.window,) * config.spatial_dims,
            patch_size=(2,) * config.spatial_dims,
            depths=config.depths,
            num_heads=[config.heads * 2**stage for stage in range(4)],
            drop_path_rate=config.drop_path,
            spatial_dims=config.spatial_dims,
        )
        self.channels = tuple(config.width * 2**level for level in range(5))
        self.patch_embed: nn.Module = swin.patch_embed
        self.layers1, self.layers2, self.layers3, self.layers4 = swin.layers1, swin.layers2, swin.layers3, swin.layers4

    def forward(self, x: Tensor) -> list[Tensor]:
        sides = x.shape[2:]
        x = self.patch_embed(filled(x, [max(side, STRIDE) for side in sides]))
        maps = [x]
        for (stage,) in (self.layers1, self.layers2, self.layers3, self.layers4):
            x = _stage(stage, x)
            maps.append(x)
        normalised = [F.layer_norm(each.movedim(1, -1), each.shape[1:2]).movedim(-1, 1) for each in maps]
        return [cut(each, [math.ceil(side / 2**level) for side in sides]) for level, each in enumerate(normalised, 1)]


def _stage(stage: Any, x: Tensor) -> Tensor:
    """One of MONAI's stages, (n, c, h, w) to (n, 2c, ceil(h/2), ceil(w/2)): its own forward, which needs einops for no more
    than moving the channels to the end."""
    from monai.networks.nets.swin_unetr import compute_mask, get_window_size

    sides = x.shape[2:]
    window, shift = get_window_size(sides, stage.window_size, stage.shift_size)
    whole = [math.ceil(side / length) * length for side, length in zip(sides, window, strict=True)]
    mask = compute_mask(whole, window, shift, x.device)
    x = x.movedim(1, -1).contiguous()
    for block in stage.blocks:
        x = block(x, mask)
    merged: Tensor = stage.downsample(x).movedim(-1, 1)
    return merged


class Decoder(nn.Module):
    """The convolutional part: the image and its five maps to one map (n, width, h, w). Names are MONAI's."""

    def __init__(self, in_channels: int, config: Config):
        super().__init__()
        from monai.networks.blocks import UnetrBasicBlock, UnetrUpBlock

        c, dims = config.width, config.spatial_dims
        norm = ("group", {"num_groups": math.gcd(GROUPS, c)}) if config.norm == "group" else "instance"

        def branch(inputs: int, outputs: int) -> nn.Module:
            return UnetrBasicBlock(dims, inputs, outputs, kernel_size=3, stride=1, norm_name=norm, res_block=True)

        def up(inputs: int, outputs: int) -> nn.Module:
            return UnetrUpBlock(dims, inputs, outputs, 3, upsample_kernel_size=2, norm_name=norm, res_block=True)

        self.encoder1, self.encoder2 = branch(in_channels, c), branch(c, c)
        self.encoder3, self.encoder4 = branch(2 * c, 2 * c), branch(4 * c, 4 * c)
        self.encoder10 = branch(16 * c, 16 * c)
        self.decoder5, self.decoder4, self.decoder3 = up(16 * c, 8 * c), up(8 * c, 4 * c), up(4 * c, 2 * c)
        self.decoder2, self.decoder1 = up(2 * c, c), up(c, c)

    def forward(self, image: Tensor, maps: Sequence[Tensor]) -> Tensor:
        half, quarter, eighth, sixteenth, coarsest = maps
        x = self.decoder5(self.encoder10(coarsest), sixteenth)
        x = self.decoder4(x, self.encoder4(eighth))
        x = self.decoder3(x, self.encoder3(quarter))
        x = self.decoder2(x, self.encoder2(half))
        out: Tensor = self.decoder1(x, self.encoder1(image))
        return out


class SwinUNETR(nn.Module):
    """A segmentation network whose `encoder` can be trained and moved apart from the rest.

    in_channels   c of the input (n, c, h, w), or (n, c, h, w, z) with spatial_dims 3; any sides
    classes       k of the logits (n, k, h, w), background included
    """

    def __init__(self, in_channels: int, classes: int, config: Config | None = None):
        super().__init__()
        config = config or Config()
        self.encoder = Encoder(in_channels, config)
        self.decoder = Decoder(in_channels, config)
        from monai.networks.blocks import UnetOutBlock

        self.head = UnetOutBlock(config.spatial_dims, config.width, classes)
        self.train()

    def train(self, mode: bool = True) -> "SwinUNETR":
        """Stochastic depth stays off: it belongs to pretraining, which trains the encoder alone."""
        from monai.networks.layers import DropPath

        super().train(mode)
        for module in self.encoder.modules():
            if isinstance(module, DropPath):
                module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        padded = filled(x, [max(math.ceil(side / STRIDE), 2) * STRIDE for side in x.shape[2:]])
        return cut(self.head(self.decoder(padded, self.encoder(padded))), x.shape[2:])


NETWORK = SwinUNETR
