"""MAE: hide most patches of a slice and reconstruct their pixels from the rest.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, https://arxiv.org/abs/2111.06377. Section and table
numbers are that paper's.

    x       one view of a slice, in t patches of p pixels per side           (n, c, s, s[, s])
    m       1 for hidden patches, `mask` of the t in every slice             (n, t)
    y       pixels of a patch, normalised by its own mean and deviation      (n, t, p^D c)
    ŷ       reconstruction                                                   (n, t, p^D c)

    y = (patch - mean) / √(variance + 1e-6)                                  sec. 4.1, table 1d
    L = Σ m mean (ŷ - y)² / Σ m                                              sec. 3, hidden patches only

There are two ways from x and m to ŷ, chosen by the encoder:

`TokenDecoder`, for a Vision Transformer, the paper's own: the encoder runs on the visible patches alone; a small
Transformer sees its tokens and a learned token at every hidden place, and ends in one linear layer to pixels.

`MapDecoder`, for every encoder that needs a whole image (U-Net, ResNet, Swin): hidden patches are filled with 0 in the image,
and a light pyramid over the encoder's maps (Lin et al. 2017, https://arxiv.org/abs/1612.03144: 1x1 convolutions, added from
coarse to fine) gives the pixels. Masking the image of such a network is SimMIM, Xie et al. 2022, https://arxiv.org/abs/2111.09886
(there a learned token after the patch embedding, hidden patches of 32, and an L1 loss), and in 3D medical work the MAE of
Wald et al. 2024, https://arxiv.org/abs/2412.17041 (hidden blocks of 16 voxels are 0 there too, but the network's own decoder
reconstructs, and pixels are not normalised by patch; authors' code).
Zeros take part in its convolutions and normalisations, which in fine-tuning are gone.

Differences from the paper: images are slices or volumes; the view is resized by an antialiased bilinear instead of a
bicubic filter, and flipped along every axis with `flip_p`, not from left to right alone, for a slice lacks the up of a
photograph. The encoder's positions are learned, as in ViT, those of the decoder are the paper's fixed sines and cosines;
weights start as in ViT, not from Xavier's law (app. A.1). The deviation of a patch is that of its pixels, not its unbiased
estimate.
Transfers: the encoder. The decoder is dropped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from medssl.methods import augment, crops, gather, pairs, settings
from medssl.methods.networks import unetr
from medssl.methods.optimizers import decay_groups
from medssl.methods.protocol import Batch, Loss, Method, Step, Views

PATCH = 16  # pixels, of encoders without patches of their own
EPS = 1e-6  # added to the variance of a patch


@dataclass(frozen=True, kw_only=True)
class Config(settings.Chain):
    side: int | None = None  # pixels of a view, rounded up to whole patches; None: as for pairs of crops, at most 96
    scale: tuple[float, float] = (0.2, 1.0)  # area of the box, as a fraction of the slice (authors' code)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height of the box
    mask: float = 0.75  # share of the patches that is hidden, fig. 5
    patch: int | None = None  # pixels per side of a hidden patch; None: the ViT's own, 16 for other encoders
    d: int = 512  # size of a token in the decoder of a ViT, table 1b
    depth: int = 8  # its blocks, table 1a
    heads: int = 16  # its heads (authors' code)
    width: int = 32  # channels of the decoder of other encoders
    # The paper crops and flips, table 1e: of the chain only the flip is left.
    zoom_p: float = 0.0
    rot90_p: float = 0.0
    intensity_scale_p: float = 0.0
    intensity_shift_p: float = 0.0
    blur_p: float = 0.0
    noise_p: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side is not None and self.side < 1:
            raise ValueError(f"side is {self.side}: expected at least 1 pixel")
        if self.patch is not None and self.patch < 1:
            raise ValueError(f"patch is {self.patch}: expected at least 1 pixel")
        if not 0 < self.mask < 1:
            raise ValueError(f"mask is {self.mask}: expected a share of the patches, 0 < mask < 1")
        if not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"scale {self.scale} must lie in (0, 1] and ratio {self.ratio} above 0, each low first")
        if min(self.depth, self.heads, self.width) < 1:
            raise ValueError(f"depth is {self.depth}, heads {self.heads} and width {self.width}: expected at least 1")
        if self.d < 6 or self.d % self.heads:
            raise ValueError(f"d is {self.d} and heads {self.heads}: expected d to be at least 6 and a multiple of heads")


@dataclass(frozen=True, kw_only=True)
class Training(settings.Training):  # table 8
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float = 7.5e-5  # at batch 128: the paper's 1.5e-4 · batch / 256
    end_lr: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    warmup: float = 0.05  # 40 of 800 epochs
    epochs: float = 800
    batch: int = 128  # the paper: 4096


class MAE(nn.Module):
    """Trains `encoder`, whose forward gives maps from the finest to the coarsest and whose `channels` are theirs.

    Raises ValueError when `patch` is not that of a Vision Transformer.
    """

    def __init__(self, encoder: nn.Module, config: Config | None = None):
        super().__init__()
        self.config = config = config or Config()
        self.encoder = encoder
        self.decoder: TokenDecoder | MapDecoder
        if isinstance(encoder, unetr.Encoder):
            if config.patch not in (None, encoder.patch):
                raise ValueError(f"patch is {config.patch}: the encoder has patches of {encoder.patch} pixels; leave it out")
            self.patch, self.decoder = encoder.patch, TokenDecoder(encoder, config)
        else:
            self.patch = config.patch or PATCH
            self.decoder = MapDecoder(encoder, self.patch, config)

    def augment(self, batch: Batch, rng: Generator) -> Views:
        """One random-resized, flipped crop of every slice, and which of its patches are hidden: equally many in each."""
        if self.config.side is None:
            raise ValueError("mae: the side of a view is not known; set pretrain.side to a number of pixels")
        count = -(-self.config.side // self.patch)  # patches per axis
        corner, extent = crops.single(batch["size"], self.config.scale, self.config.ratio, rng)
        view = augment.view(batch["image"], corner, extent, count * self.patch, self.config, rng)
        t = count ** batch["size"].shape[1]
        mask = draw_mask(len(view), t, hidden_patches(t, self.config.mask), rng)
        return Views([view], [corner], [extent], masks=[mask])

    def loss(self, views: Views, step: Step) -> Loss:
        (x,), (mask,) = views.images, views.masks
        prediction, feature = self.decoder(self.encoder, x, mask)
        error = (prediction.float() - normalised(patches(x, self.patch))).square().mean(2)
        reconstruction = gather.mean((error * mask).sum(), mask.sum())
        # No collapse index: nothing here is trained to be alike, and the features of like slices may be.
        return Loss({"reconstruction": reconstruction}, pairs.feature_health(feature, step))

    def after_step(self, step: Step) -> None:
        """Nothing follows the optimizer."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return decay_groups(self, weight_decay)

    def transferable_state(self) -> dict[str, Tensor]:
        return self.encoder.state_dict()


# -------------------------------------------------------------------------------------------------------------- patches


def hidden_patches(t: int, share: float) -> int:
    """How many of t patches are hidden. Raises ValueError unless some are hidden and some are visible."""
    hidden = round(t * share)
    if not 0 < hidden < t:
        raise ValueError(
            f"mae: hiding {share:g} of {t} patch(es) leaves none hidden or none visible; use a larger pretrain.side"
        )
    return hidden


def draw_mask(n: int, t: int, hidden: int, rng: Generator) -> Tensor:
    """Which patches are hidden, (n, t) bool: `hidden` of each row, every such set equally likely."""
    order = torch.rand(n, t, generator=rng, device=rng.device).argsort(1)
    return torch.zeros(n, t, dtype=torch.bool, device=rng.device).scatter_(1, order[:, :hidden], True)


def patches(images: Tensor, patch: int) -> Tensor:
    """(n, c, *spatial), whose sides are multiples of `patch`, as (n, t, pixels · c): patches in row-major order."""
    axes = range(images.dim() - 2)
    for axis in axes:
        images = images.unflatten(2 + 2 * axis, (-1, patch))
    places, pixels = ([start + 2 * axis for axis in axes] for start in (2, 3))
    return images.permute(0, *places, *pixels, 1).flatten(1 + len(axes)).flatten(1, len(axes))


def normalised(pixels: Tensor) -> Tensor:
    """Patches (n, t, pixels), each with mean 0 and deviation 1; one of a single value becomes 0."""
    variance, mean = torch.var_mean(pixels.float(), dim=2, correction=0, keepdim=True)
    return (pixels - mean) / (variance + EPS).sqrt()


def shown(images: Tensor, mask: Tensor, patch: int) -> Tensor:
    """`images` with 0 in the patches that `mask` (n, t) hides."""
    keep = (~mask).unflatten(1, [side // patch for side in images.shape[2:]])
    for axis in range(1, keep.dim()):
        keep = keep.repeat_interleave(patch, axis)
    return images * keep[:, None]


def first_convolution(encoder: nn.Module) -> nn.Conv2d | nn.Conv3d:
    """The layer that takes the image in, which tells its channels and dimensions. Raises ValueError when there is none."""
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            return module
    raise ValueError(
        f"mae: the encoder {type(encoder).__name__} has no convolution, so that its input's channels are not known"
    )


# ------------------------------------------------------------------------------------------------------------- decoders


class TokenDecoder(nn.Module):
    """A small Transformer over the tokens of visible patches and a learned token in place of each hidden one."""

    def __init__(self, encoder: unetr.Encoder, config: Config):
        super().__init__()
        d, pixels = config.d, math.prod(encoder.patch_embed.proj.weight.shape[1:])
        self.config = config
        self.embed = nn.Linear(encoder.channels[-1], d)
        self.mask_token = nn.Parameter(torch.zeros(d))
        self.blocks = nn.ModuleList(unetr.Block(d, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(d, eps=1e-6)
        self.head = nn.Linear(d, pixels)
        self.apply(unetr.initialise)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, encoder: unetr.Encoder, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction (n, t, pixels · c), and the mean (n, f) of the encoder's visible patch tokens."""
        embedded = encoder.embed(images)
        t = embedded.shape[1]
        order = mask.byte().argsort(dim=1, stable=True)  # visible patches first, each kind from left to right
        visible = order[:, : t - hidden_patches(t, self.config.mask), None]  # from the settings: the host need not wait
        first, seen = encoder.encode(embedded.gather(1, visible.expand(-1, -1, embedded.shape[2])))
        feature = seen.mean(1)
        first, seen = self.embed(first)[:, None], self.embed(seen)
        everywhere = self.mask_token.to(seen.dtype).expand(len(seen), t, -1)
        x = everywhere.scatter(1, visible.expand(-1, -1, seen.shape[2]), seen)
        sides = [side // encoder.patch for side in images.shape[2:]]
        x = torch.cat([first, x + sines(sides, x.shape[2], x.device).to(x.dtype)], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 1:])), feature


def sines(sides: Sequence[int], d: int, device: torch.device) -> Tensor:
    """Fixed positions (t, d) of a grid: of every axis d/2D sines and cosines, of wavelengths from 2π towards 20000π.

    Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, sec. 3.5, for each axis by itself. Columns left over are 0.
    """
    count = d // (2 * len(sides))
    frequency = 10000 ** (-torch.arange(count, device=device) / count)
    places = torch.meshgrid(*(torch.arange(side, device=device) for side in sides), indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in places]
    columns = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
    return F.pad(columns, (0, d - columns.shape[1]))


class MapDecoder(nn.Module):
    """A pyramid over an encoder's maps of an image whose hidden patches are 0, from the coarsest to the pixels."""

    def __init__(self, encoder: nn.Module, patch: int, config: Config):
        super().__init__()
        first = first_convolution(encoder)
        kind: type[nn.Conv2d | nn.Conv3d] = nn.Conv2d if isinstance(first, nn.Conv2d) else nn.Conv3d
        channels = cast("tuple[int, ...]", encoder.channels)
        self.patch = patch
        self.laterals = nn.ModuleList(kind(inputs, config.width, kernel_size=1) for inputs in channels)
        self.smooth = nn.ModuleList(kind(config.width, config.width, kernel_size=3, padding=1) for _ in channels)
        self.head = kind(config.width, first.in_channels, kernel_size=1)

    def forward(self, encoder: nn.Module, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction (n, t, pixels · c), and the feature (n, f) that fine-tuning's coarsest map averages to."""
        maps = encoder(shown(images, mask, self.patch))
        mode = "bilinear" if images.dim() == 4 else "trilinear"
        x, *finer = [lateral(z) for lateral, z in zip(self.laterals, maps, strict=True)][::-1]
        *smooth, last = self.smooth
        for convolution, level in zip(smooth, finer, strict=True):
            x = level + F.interpolate(F.gelu(convolution(x)), level.shape[2:], mode=mode, align_corners=False)
        x = F.interpolate(F.gelu(last(x)), images.shape[2:], mode=mode, align_corners=False)
        return patches(self.head(x), self.patch), pairs.feature(maps)


METHOD: type[Method] = MAE
