"""Local contrast: a region of a slice finds itself in another view of the slice among the regions around it.

Chaitanya, Erdil, Karani and Konukoglu, "Contrastive learning of global and local features for medical image segmentation with
limited annotations", NeurIPS 2020, https://arxiv.org/abs/2006.10511; the second of its three stages, the first being
`global_contrast.py`. What the paper leaves out is that of the authors' code (https://github.com/krishnabits001/domain_specific_cl).

    x1, x2   a slice, whole, with two draws of brightness and contrast; nothing moves    (n, c, s, s)
    f        head g2 of the first `blocks` blocks of the decoder                         (2n, C, h, w)
    u        regions of f: K x K windows, flattened, K = 3 also mapped to d              (2n, A, e)

    s_ab  = cos(u_a, u_b) / τ
    l     = - log exp(s_+) / (exp(s_+) + Σ_- exp(s_-))
    L     = mean of l over regions and ordered pairs of maps

For a pair of maps (i, j) the anchor is a region of map i and its positive the same region of map j; its negatives are the
regions nearest to it that do not overlap with it, in map i and in map j. The strategies say which maps make pairs:

    random           L^R   the two views of a slice, both ways
    correspondence   L^D   x1 of a slice with its x2, and with x1 of the slices of its partition in other volumes

The encoder is frozen: its weights get no gradient (a batch norm in it goes on normalising by the batch, as in the source).
For L^D batches are those of `platform/partitions.py`, for L^R any.

Differences from the source: regions lie on a generated grid, as many as one likes, with generated negatives;
`regions="paper"` gives its 13 regions and hand-typed negatives, of which some overlap their anchor at `blocks=1`.
Brightness and contrast are drawn for each image and apart. The loss is the mean over its terms (`scale="rows"`: the sum over
the number of regions of all maps, 1 and 1.5 times the mean for the two strategies at 3 volumes), a log-sum-exp in float32.
All other volumes of the batch correspond (there the two others of 3).
Transfers: the encoder as it came, and the decoder's first `blocks` blocks. The head is dropped. Slices only, and a network
with the decoder of `networks/unet.py`.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from medssl.methods import augment, gather, pairs, settings
from medssl.methods.gather import JointBatchNorm
from medssl.methods.global_contrast import brightened, frames, partition
from medssl.methods.mae import first_convolution
from medssl.methods.networks.unet import Decoder
from medssl.methods.optimizers import decay_groups
from medssl.methods.protocol import Batch, Loss, Method, Step, Views

ENCODERS = ("unet", "unet_chaitanya")  # networks whose decoders have blocks that can be trained apart
TRANSFERS = "encoder+decoder"
VIEWS = "whole slices"
SLICES_ONLY = True

# The source's 13 regions and the negatives of each, K = 3 and K = 1, as row and column of a grid of 5 x 5 corners.
PAPER: Mapping[int, Mapping[str, str]] = {
    3: {
        "00": "02 11 12 20 21", "02": "00 04 11 13 22", "04": "02 12 13 23 24", "20": "00 11 22 40 31", "22": "11 13 31 33 20",
        "24": "04 22 44 13 33", "40": "20 21 42 31 32", "42": "22 40 44 31 33", "44": "23 24 42 33 32", "11": "00 02 20 22 13",
        "13": "02 04 11 22 24", "31": "20 22 40 42 33", "33": "22 24 42 44 31",
    },
    1: {
        "00": "02 20 22 11 13", "02": "00 04 22 11 13", "04": "02 22 24 31 13", "20": "00 22 40 11 31", "22": "11 13 31 33 20",
        "24": "04 22 44 13 33", "40": "20 22 42 31 11", "42": "22 40 44 31 33", "44": "22 24 42 33 31", "11": "00 02 20 22 13",
        "13": "02 04 22 24 33", "31": "20 22 40 02 11", "33": "22 24 42 44 13",
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    strategy: Literal["random", "correspondence"] = "random"
    blocks: int = 3  # of the decoder, from the coarsest, that are trained
    region: Literal[1, 3] = 3  # K: side of a region, in pixels of the map
    regions: int | Literal["paper"] = 13  # A: how many, on a generated grid; or the paper's 13 with its table of negatives
    negatives: int = 5  # of each region, from each of the two maps; the source takes 4 for L^D
    partitions: int = 4  # S, of which a slice corresponds to those of its own
    side: int | None = None  # pixels of a view, which shows the whole slice; None: of the largest, at most 96; paper: 192
    brightness: float = 0.3  # x + o, o uniform in ±
    contrast: float = 0.3  # (x - mean) f + mean, f uniform in 1 ±
    temperature: float = 0.1  # τ
    d: int | None = 128  # what a region of 3 x 3 is mapped to; None: it stays as it is, 9 C numbers
    scale: Literal["mean", "rows"] = "mean"  # the sum is divided by the number of terms, or by that of the regions of all maps

    def __post_init__(self) -> None:
        for name in ("blocks", "negatives", "partitions", "temperature", "side", "d"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}: expected more than 0")
        if self.region not in (1, 3):
            raise ValueError(f"region is {self.region}: expected 1 or 3 pixels")
        if self.regions != "paper" and self.regions < 2:
            raise ValueError(f'regions is {self.regions}: expected 2 or more, or "paper"')
        if self.regions == "paper" and self.negatives > 5:
            raise ValueError(f"negatives is {self.negatives}: the table of the paper has 5; set regions to a number for more")
        if min(self.brightness, self.contrast) < 0:
            raise ValueError(f"brightness is {self.brightness} and contrast {self.contrast}: expected at least 0")


@dataclass(frozen=True, kw_only=True)
class Training(settings.Training):
    steps: int | None = 10_000  # at any number of slices
    optimizer: settings.Optimizer = "adam"
    lr: float = 1e-3
    end_lr: float = 1e-3  # no schedule
    weight_decay: float = 0.0
    batch: int = 10  # of L^D 12: 3 volumes of 4 partitions
    stop_on_collapse: bool = False  # the loss itself keeps regions apart


class LocalContrast(nn.Module):
    """Trains the first blocks of the decoder of `network`, a U-Net; what else it has is frozen.

    Raises ValueError for another network, one of 3D, or one with fewer blocks.
    """

    def __init__(self, network: nn.Module, config: Config | None = None):
        super().__init__()
        self.config = config = config or Config()
        decoder = getattr(network, "decoder", None)
        if not isinstance(decoder, Decoder) or isinstance(first_convolution(network), nn.Conv3d):
            raise ValueError("local_contrast trains the decoder of a 2D U-Net; set network=unet and network.spatial_dims=2")
        if config.blocks > len(decoder.blocks):
            raise ValueError(
                f"local_contrast: blocks is {config.blocks}, and the decoder of {len(decoder.blocks) + 1} levels has "
                f"{len(decoder.blocks)}; lower it, or raise network.levels"
            )
        self.network = network.requires_grad_(False)
        for part in (*decoder.ups[: config.blocks], *decoder.blocks[: config.blocks]):
            part.requires_grad_(True)
        channels = cast("tuple[int, ...]", cast(nn.Module, network.encoder).channels)
        self.head = Head(channels[-1 - config.blocks], config.region, config.d)

    def augment(self, batch: Batch, rng: Generator) -> Views:
        """Every slice twice, unmoved; `groups` hold each slice's partition and volume, both (n,) int64."""
        config = self.config
        image, corner, extent, position = frames(batch, config.side, rng, "local_contrast")
        assert config.side is not None
        whole = augment.crop(image, corner, extent, config.side)
        groups = {"partition": partition(position, config.partitions), "volume": batch["volume"]}
        images = [brightened(whole, config.brightness, config.contrast, rng) for _ in range(2)]
        return Views(images, [corner] * 2, [extent] * 2, groups=groups)

    def loss(self, views: Views, step: Step) -> Loss:
        n, config = len(views.images[0]), self.config
        with torch.no_grad():
            maps = self.network.encoder(torch.cat(views.images))  # type: ignore[operator]
        f = self.head.maps(self.network.decoder(maps, config.blocks))  # type: ignore[operator]
        regions = layout(config.regions, config.region, config.negatives, (f.shape[2], f.shape[3]))
        u = self.head.regions(cut_out(f, regions.corners, config.region))
        joint = torch.cat([gather.rows(part)[0] for part in u.split(n)])
        where, whose = (gather.rows(views.groups[key])[0] for key in ("partition", "volume"))
        each = terms(joint, map_pairs(config.strategy, where, whose), regions.negatives.to(u.device), config.temperature)
        contrast = each.mean() if config.scale == "mean" else each.sum() / (each.shape[1] * len(joint))
        rows = u[:n].flatten(0, 1)
        return Loss({"contrast": contrast}, pairs.health(rows, rows, step))

    def after_step(self, step: Step) -> None:
        """Nothing follows the optimizer."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return decay_groups(self, weight_decay)  # of what asks for a gradient

    def transferable_state(self) -> dict[str, Tensor]:
        """The encoder, as it came, and the trained blocks, by their names in the network."""
        parts = [f"decoder.{kind}.{block}." for kind in ("ups", "blocks") for block in range(self.config.blocks)]
        return {key: value for key, value in self.network.state_dict().items() if key.startswith(("encoder.", *parts))}


class Head(nn.Module):
    """g2: `maps` (n, C, h, w) to maps of the same shape; `regions`, K x K windows of them flattened, (n, A, K² C) to (n, A, d).

    Two 1x1 convolutions, the first normalised and rectified. Regions of one pixel stay as they are, as do all without d.
    """

    def __init__(self, channels: int, region: int, d: int | None):
        super().__init__()
        self.maps = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False), JointBatchNorm(channels), nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 1, bias=False),
        )  # fmt: skip
        mapped = d is not None and region > 1
        self.regions = nn.Linear(region**2 * channels, d or 0, bias=False) if mapped else nn.Identity()


# ---------------------------------------------------------------------------------------------------------------- regions


@dataclass(frozen=True)
class Regions:
    """Windows of a map: the A regions, then those that serve as negatives only."""

    corners: Tensor  # (W, 2) int64, W >= A: row and column of each window's first pixel
    negatives: Tensor  # (A, m) int64, into `corners`


@functools.cache
def layout(regions: int | Literal["paper"], region: int, negatives: int, sides: tuple[int, int]) -> Regions:
    """Regions of `region` pixels a side on a map of `sides`. Raises ValueError where they, or their negatives, do not fit."""
    return _paper(region, negatives, sides) if regions == "paper" else _grid(regions, region, negatives, sides)


def _paper(region: int, negatives: int, sides: tuple[int, int]) -> Regions:
    """The source's. The last corner is 4 pixels from the end for K = 3, so that it never sees the last row and column."""
    reach = [side - (4 if region == 3 else 1) for side in sides]
    if min(reach) < 4:
        raise ValueError(
            f"the paper's regions of {region} x {region} need a larger map than {_by(sides)}; raise blocks or side"
        )
    table = PAPER[region]
    names = dict.fromkeys([*table, *(name for row in table.values() for name in row.split())])  # regions first, no name twice
    place = {name: number for number, name in enumerate(names)}
    corners = [[int(digit) * most // 4 for digit, most in zip(name, reach, strict=True)] for name in names]
    return Regions(
        torch.tensor(corners), torch.tensor([[place[name] for name in row.split()[:negatives]] for row in table.values()])
    )


def _grid(count: int, region: int, negatives: int, sides: tuple[int, int]) -> Regions:
    """⌊√count⌋ rows of as many regions each, one more in some, from edge to edge; the nearest windows apart as negatives."""
    rows = int(count**0.5)
    reach = [side - region for side in sides]
    corners = [
        (top, left)
        for row, top in enumerate(_spread(rows, reach[0]))
        for left in _spread(count * (row + 1) // rows - count * row // rows, reach[1])
    ]
    if min(reach) < 0 or len(set(corners)) < count:
        raise ValueError(f"{count} regions of {region} x {region} do not fit a map of {_by(sides)}; use fewer, or raise blocks")
    at = torch.tensor(corners)
    apart = at[:, None] - at
    far = apart.square().sum(2).masked_fill(apart.abs().amax(2) < region, torch.iinfo(torch.int64).max)
    most = int((apart.abs().amax(2) >= region).sum(1).min())
    if most < negatives:
        raise ValueError(
            f"a region of {region} x {region} has {most} others apart from it on a map of {_by(sides)}, and {negatives} "
            "negatives are asked for; use fewer negatives, more regions, or raise blocks"
        )
    return Regions(at, far.argsort(dim=1, stable=True)[:, :negatives])


def _spread(count: int, reach: int) -> list[int]:
    """Whole numbers from 0 to `reach`, evenly; a single one in the middle."""
    return [round(reach * i / (count - 1)) for i in range(count)] if count > 1 else [reach // 2]


def _by(sides: tuple[int, int]) -> str:
    return " x ".join(map(str, sides))


def cut_out(f: Tensor, corners: Tensor, region: int) -> Tensor:
    """Windows of maps (n, C, h, w) at corners (W, 2), flattened by row, column and channel: (n, W, K² C)."""
    corners = corners.to(f.device)
    offsets = torch.arange(region, device=f.device)
    rows, columns = (corners[:, axis, None] + offsets for axis in (0, 1))
    return f.movedim(1, -1)[:, rows[:, :, None], columns[:, None, :]].flatten(2)


# ------------------------------------------------------------------------------------------------------------------- loss


def map_pairs(strategy: str, where: Tensor, whose: Tensor) -> Tensor:
    """Ordered pairs of maps, (p, 2) int64: the first has the anchors. Maps are x1 of all N slices, then x2.

    where, whose   (N,) int64: partition and volume of each slice
    """
    n = len(where)
    one = torch.arange(n, device=where.device)
    views = torch.stack([one, one + n], 1)
    if strategy == "random":
        return torch.cat([views, views.flip(1)])
    corresponding = (where[:, None] == where) & (whose[:, None] != whose)
    return torch.cat([views, corresponding.nonzero()])


def terms(u: Tensor, pairs: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """l of each pair of maps and region, (p, A), in float32, of float64 windows in float64.

    u (maps, W, e), of any length; the first A windows are regions      pairs (p, 2) int64      negatives (A, m) int64 into W
    """
    with torch.autocast(u.device.type, enabled=False):
        u = F.normalize(u if u.dtype == torch.float64 else u.float(), dim=2, eps=1e-6)
        mine, theirs = (u[of] for of in pairs.unbind(1))
        anchors = mine[:, : len(negatives)]
        within, across = (anchors @ others.mT / temperature for others in (mine, theirs))  # (p, A, W)
        index = negatives.expand(len(pairs), -1, -1)
        rivals = torch.cat([within.gather(2, index), across.gather(2, index)], 2).logsumexp(2)
        return F.softplus(rivals - across.diagonal(dim1=1, dim2=2))


METHOD: type[Method] = LocalContrast
