"""UNETR: a Vision Transformer that sees the whole image at once, and a convolutional decoder over four of its depths.

Hatamizadeh et al., "UNETR: Transformers for 3D Medical Image Segmentation", WACV 2022, https://arxiv.org/abs/2103.10504.
Encoder: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, https://arxiv.org/abs/2010.11929. In two or three
dimensions; p is the patch, D the number of dimensions, t = Π ceil(side / p) the patches in row-major order.

    z_0 = [cls, E x_1, …, E x_t] + pos                                                   (n, 1 + t, d)
    z'_l = z_{l-1} + MSA(LN(z_{l-1})),  z_l = z'_l + MLP(LN(z'_l))                        l = 1 … L
    MSA = W_o [softmax(q_h k_hᵀ / √(d/H)) v_h], h = 1 … H
    maps   z_{L/4}, z_{L/2}, z_{3L/4}, LN(z_L) without the class token                   (n, d, ceil(h / p), ceil(w / p))
    skips  image, and the maps brought by deconvolutions to 1/2, 1/4, 1/8 of the resolution; widths w, 2w, 4w, 8w
    decoder  from LN(z_L) up, as a U-Net: deconvolution, concatenation with the skip, residual block

Differences from the paper: the encoder has a class token, which self-supervised methods need; in segmentation it takes
part in the attention and is then dropped. Convolutional blocks are residual, as in the authors' code. Normalisations have
a scale and a shift. Sides need not be multiples of the patch: images are padded with 0 below and to the right, so that the
last patches may be part padding, and logits are cropped to the image. A deconvolution from patches to 1/8 of the resolution
has stride p/8, which for the paper's patch of 16 is its 2; other patches must be multiples of 8.
Positions are learned for a grid of `grid` patches per axis and interpolated to any other (bicubic; trilinear in 3D), as in
ViT, sec. 3.2. In 2D the encoder's parameters have the names of timm's VisionTransformer.

The encoder is what pretraining trains and hands on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.methods.networks.unet import normalisation


@dataclass(frozen=True, kw_only=True)
class Config:
    patch: int = 16  # pixels per side of a patch
    d: int = 768  # size of a token, ViT-B, as are depth, heads and mlp_ratio
    depth: int = 12  # blocks; the decoder reads after every quarter of them
    heads: int = 12
    mlp_ratio: float = 4.0  # hidden over outer size of a block's MLP
    drop_path: float = 0.0  # probability of leaving out a branch of the last block for a slice; rises linearly from 0
    width: int = 16  # channels of the decoder's finest level; doubles with every level
    grid: int = 6  # patches per axis whose positions are stored; 6 of 16 pixels are 96
    spatial_dims: Literal[2, 3] = 2
    norm: Literal["instance", "batch", "group"] = "instance"  # of the decoder, see `unet.normalisation`

    def __post_init__(self) -> None:
        if min(self.patch, self.d, self.depth, self.heads, self.width, self.grid) < 1 or self.mlp_ratio <= 0:
            raise ValueError(
                f"patch is {self.patch}, d {self.d}, depth {self.depth}, heads {self.heads}, width {self.width}, grid "
                f"{self.grid} and mlp_ratio {self.mlp_ratio}: expected at least 1, and mlp_ratio above 0"
            )
        if self.patch % 8:
            raise ValueError(f"patch is {self.patch}: expected a multiple of 8, which the decoder can bring back")
        if self.depth % 4:
            raise ValueError(f"depth is {self.depth}: expected a multiple of 4, for the decoder reads after every quarter")
        if self.d % self.heads:
            raise ValueError(f"d is {self.d} and heads {self.heads}: expected d to be a multiple of heads")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path is {self.drop_path}: expected 0 <= drop_path < 1")


# ------------------------------------------------------------------------------------------------------------- encoder


class Attention(nn.Module):
    """Every token looks at every other of its image: (n, t, d) to (n, t, d)."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (n, heads, t, d / heads)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """Two layers on every token by itself."""

    def __init__(self, d: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(d, hidden)
        self.fc2 = nn.Linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Attention and MLP, each on normalised tokens and added to them: (n, t, d) to (n, t, d).

    drop_path   in training, the probability that a slice goes without a branch (Huang et al. 2016,
                https://arxiv.org/abs/1603.09382); drawn from torch's global generator
    """

    def __init__(self, d: int, heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(d, eps=1e-6)
        self.attn = Attention(d, heads)
        self.norm2 = nn.LayerNorm(d, eps=1e-6)
        self.mlp = MLP(d, int(d * mlp_ratio))
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._kept(self.attn(self.norm1(x)))
        return x + self._kept(self.mlp(self.norm2(x)))

    def _kept(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        keep = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * keep / (1 - self.drop_path)


class PatchEmbed(nn.Module):
    """One linear layer on the pixels of every patch: (n, c, h, w) to (n, d, ceil(h / p), ceil(w / p))."""

    def __init__(self, in_channels: int, config: Config):
        super().__init__()
        convolution = nn.Conv2d if config.spatial_dims == 2 else nn.Conv3d
        self.patch = config.patch
        self.proj = convolution(in_channels, config.d, kernel_size=config.patch, stride=config.patch)

    def forward(self, images: Tensor) -> Tensor:
        short = [-side % self.patch for side in images.shape[2:]]
        if any(short):
            images = F.pad(images, [pad for end in reversed(short) for pad in (0, end)])
        out: Tensor = self.proj(images)
        return out


class Encoder(nn.Module):
    """The Vision Transformer: an image (n, c, h, w) to its tokens after each quarter of the blocks, laid out as maps.

    channels   of each map, in the same order; here all maps have the same sides, too
    patch      pixels per side of a patch
    """

    def __init__(self, in_channels: int, config: Config):
        super().__init__()
        d, depth = config.d, config.depth
        self.channels, self.patch, self.stored = (d,) * 4, config.patch, (config.grid,) * config.spatial_dims
        self.patch_embed = PatchEmbed(in_channels, config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(self.stored), d))  # the class token's position first
        drops = [config.drop_path * level / (depth - 1) for level in range(depth)]
        self.blocks = nn.ModuleList(Block(d, config.heads, config.mlp_ratio, drop) for drop in drops)
        self.norm = nn.LayerNorm(d, eps=1e-6)
        self.apply(initialise)
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, images: Tensor) -> list[Tensor]:
        sides = [-(-side // self.patch) for side in images.shape[2:]]
        x, maps = self._with_class(self.embed(images)), []
        for number, block in enumerate(self.blocks, start=1):
            x = block(x)
            if number % (len(self.blocks) // 4) == 0:
                maps.append(x)
        maps[-1] = self.norm(x)
        return [z[:, 1:].transpose(1, 2).unflatten(2, sides) for z in maps]

    def tokens(self, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The normalised class token (n, d) and patch tokens (n, t, d) of an image; arguments as for `embed`."""
        return self.encode(self.embed(images, mask, mask_token))

    def embed(self, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """Patch embeddings with their positions, (n, t, d).

        mask         (n, t) bool: patches whose embedding is replaced by `mask_token` before positions are added
        mask_token   anything that broadcasts to (n, t, d); required with a mask
        """
        x = self.patch_embed(images)
        sides, x = x.shape[2:], x.flatten(2).transpose(1, 2)
        if mask is not None:
            assert mask_token is not None
            x = torch.where(mask[..., None], mask_token.to(x.dtype), x)
        return x + self.positions(sides)

    def encode(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """The blocks over any subset of what `embed` gives, (n, t, d) in any order, with the class token.

        Returns, normalised, the class token (n, d) and the given tokens (n, t, d).
        """
        x = self._with_class(embedded)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0], x[:, 1:]

    def positions(self, sides: Sequence[int]) -> Tensor:
        """Positions (1, t, d) of a grid of patches: those stored, interpolated where its sides are others."""
        stored = self.pos_embed[:, 1:]
        if tuple(sides) == self.stored:
            return stored
        grid = stored.transpose(1, 2).unflatten(2, self.stored)
        mode = "bicubic" if len(self.stored) == 2 else "trilinear"
        return F.interpolate(grid.float(), tuple(sides), mode=mode, align_corners=False).flatten(2).transpose(1, 2)

    def _with_class(self, x: Tensor) -> Tensor:
        first = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([first.expand(len(x), -1, -1).to(x.dtype), x], dim=1)


def initialise(module: nn.Module) -> None:
    """Weights of linear layers from a normal of 0.02 cut at ±2, biases 0, as ViT implementations have it."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------------------------- decoder


class Residual(nn.Module):
    """Twice 3x3 convolution and normalisation around a shortcut, leaky rectifiers between and after; the resolution stays."""

    def __init__(self, inputs: int, outputs: int, config: Config):
        super().__init__()
        convolution = nn.Conv2d if config.spatial_dims == 2 else nn.Conv3d
        self.body = nn.Sequential(
            convolution(inputs, outputs, kernel_size=3, padding=1, bias=False),
            normalisation(config.norm, outputs, config.spatial_dims),
            nn.LeakyReLU(0.01, inplace=True),
            convolution(outputs, outputs, kernel_size=3, padding=1, bias=False),
            normalisation(config.norm, outputs, config.spatial_dims),
        )
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(
                convolution(inputs, outputs, kernel_size=1, bias=False),
                normalisation(config.norm, outputs, config.spatial_dims),
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.body(x) + self.shortcut(x), 0.01)


def deconvolution(inputs: int, outputs: int, stride: int, config: Config) -> nn.Module:
    """A transposed convolution that enlarges by `stride` without overlaps."""
    up = nn.ConvTranspose2d if config.spatial_dims == 2 else nn.ConvTranspose3d
    return up(inputs, outputs, kernel_size=stride, stride=stride, bias=False)


def lift(outputs: int, doublings: int, config: Config) -> nn.Sequential:
    """Tokens brought from 1/p to 1/8 of the resolution, and from there doubled so many times."""
    layers = [deconvolution(config.d, outputs, config.patch // 8, config)]
    for _ in range(doublings):
        layers += [deconvolution(outputs, outputs, 2, config), Residual(outputs, outputs, config)]
    return nn.Sequential(*layers)


class Decoder(nn.Module):
    """The image and the encoder's four maps to one map (n, width, h, w)."""

    def __init__(self, in_channels: int, config: Config):
        super().__init__()
        fine, half, quarter, eighth = (config.width * 2**level for level in range(4))
        self.image = Residual(in_channels, fine, config)
        self.lifts = nn.ModuleList([lift(half, 2, config), lift(quarter, 1, config), lift(eighth, 0, config)])
        levels = [(config.d, eighth, config.patch // 8), (eighth, quarter, 2), (quarter, half, 2), (half, fine, 2)]
        self.ups = nn.ModuleList(deconvolution(*level, config) for level in levels)
        self.blocks = nn.ModuleList(Residual(2 * outputs, outputs, config) for _, outputs, _ in levels)

    def forward(self, images: Tensor, maps: Sequence[Tensor]) -> Tensor:
        *early, x = maps
        skips = [self.image(images), *(up(z) for up, z in zip(self.lifts, early, strict=True))]
        for up, block, skip in zip(self.ups, self.blocks, reversed(skips), strict=True):
            crop = (..., *(slice(side) for side in skip.shape[2:]))  # the image alone has sides that are no whole patches
            x = block(torch.cat([up(x)[crop], skip], dim=1))
        return x


class UNETR(nn.Module):
    """A segmentation network whose `encoder` can be trained and moved apart from the rest.

    in_channels   c of the input (n, c, h, w), or (n, c, d, h, w) with spatial_dims 3; any sides above 8 pixels
    classes       k of the logits (n, k, h, w), background included
    """

    def __init__(self, in_channels: int, classes: int, config: Config | None = None):
        super().__init__()
        config = config or Config()
        self.encoder = Encoder(in_channels, config)
        self.decoder = Decoder(in_channels, config)
        self.head = (nn.Conv2d if config.spatial_dims == 2 else nn.Conv3d)(config.width, classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.decoder(x, self.encoder(x)))
        return logits


NETWORK = UNETR
