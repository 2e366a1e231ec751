"""Global contrast: slices at the same height of different volumes attract, slices at other heights repel.

Chaitanya, Erdil, Karani and Konukoglu, "Contrastive learning of global and local features for medical image segmentation with
limited annotations", NeurIPS 2020, https://arxiv.org/abs/2006.10511; the first of its three stages. What the paper leaves out
is that of the authors' code (https://github.com/krishnabits001/domain_specific_cl).

    x0         a slice, whole                                                                  (n, c, s, s)
    x1, x2     windows of it, 100 of 192 pixels a side, brought to s, brightness and contrast   (n, c, s, s)
    p          partition, ⌊S · position⌋, of S: how high in its volume the slice lies           (n,)
    z          head g1 of the encoder's coarsest map, v views of N slices of all workers        (vN, d)

    s_ab  = cos(z_a, z_b) / τ
    l_ab  = - log exp(s_ab) / (exp(s_ab) + Σ_{k in N(a)} exp(s_ak))         for a positive pair, in this order
    L     = mean of l_ab over the pairs, both orders of each

Only the pair's own positive stands in its denominator. The strategies say what the pairs and the negatives N(a) are:

    random                 G^R    views x1, x2       the views of one slice        every other slice
    partition-negatives    G^D-   views x0, x1, x2   the views of one slice        slices of other partitions
    partition-positives    G^D    views x0, x1       the views of one slice; the same view of slices of one partition in
                                                     different volumes            slices of other partitions

So partitions need volumes that are roughly registered: the same organ from the same end. No label is read. A batch of m
volumes with a slice of each partition (`platform/partitions.py`) has every pair it can; any other batch works, too. What has
no negative, as in a batch of one partition alone, costs 0 and moves nothing; one volume alone leaves the pairs of views. The
monitors `negatives` and `positives`, per embedding, show either.

Differences from the source: brightness and contrast are drawn for each image and apart (there one of each per batch, both from
one number). No image is blank (there a third of a batch is). All volumes of a partition are paired (there each with its two
neighbours in a ring: `pairing="ring"`). The loss is the mean over the pairs (there the sum over the number of embeddings,
1, 2 and 4 times the mean for the three strategies: `scale="rows"`), a log-sum-exp in float32. Windows stay inside the
slice. The head flattens a map of `grid` x `grid` cells, to which the coarsest map is averaged, so that its size does not depend
on `side`; 6 is the map of the paper's U-Net at 192 pixels, where nothing is averaged. Sides of 192 are the paper's.
In 3D an element is a cube at a random place of its volume, its position that along z, and windows are cubes inside it.
Transfers: the encoder. The head is dropped.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from medssl.methods import augment, gather, pairs, settings
from medssl.methods.mae import first_convolution
from medssl.methods.optimizers import decay_groups
from medssl.methods.protocol import Batch, Loss, Method, Step, Views, intensities

VIEWS = "whole slices"
LIGHTEST = 1.5  # intensities end here after brightness and contrast
ROUNDING = 1e-5  # positions are float32: 7/10 of 10 partitions begins the eighth


@dataclass(frozen=True, kw_only=True)
class Config:
    strategy: Literal["random", "partition-negatives", "partition-positives"] = "partition-positives"
    partitions: int = 4  # S
    side: int | None = (
        None  # pixels of a view, which shows the whole slice; None: of the largest, at most 96 (3D: as cubes); paper: 192
    )
    window: float = 100 / 192  # side of a window, as a fraction of the slice's
    starts: tuple[float, float] = (10 / 192, 70 / 192)  # where windows begin, on each axis, as fractions of the slice
    brightness: float = 0.3  # x + o, o uniform in ±
    contrast: float = 0.3  # (x - mean) f + mean, f uniform in 1 ±
    temperature: float = 0.1  # τ
    grid: int = 6  # cells per axis of the map that the head flattens
    hidden: int = 1024  # hidden size of the head
    d: int = 128  # size of z
    pairing: Literal["all", "ring"] = "all"  # each volume with all others of the batch, or with the next, around
    scale: Literal["mean", "rows"] = "mean"  # the sum over pairs is divided by their number, or by that of the embeddings

    def __post_init__(self) -> None:
        for name in ("partitions", "grid", "hidden", "d", "temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected more than 0")
        if self.side is not None and self.side < 1:
            raise ValueError(f"side is {self.side}: expected at least 1 pixel")
        if not 0 < self.window <= 1 or not 0 <= self.starts[0] <= self.starts[1] <= 1:
            raise ValueError(
                f"window is {self.window} and starts {self.starts}: expected fractions of the slice, 0 < window <= 1 and "
                "0 <= low <= high <= 1"
            )
        if min(self.brightness, self.contrast) < 0:
            raise ValueError(f"brightness is {self.brightness} and contrast {self.contrast}: expected at least 0")
        if self.partitions == 1 and self.strategy != "random":
            raise ValueError(f'partitions is 1: strategy "{self.strategy}" has no negatives then; use 2 or more')


@dataclass(frozen=True, kw_only=True)
class Training(settings.Training):
    steps: int | None = 10_000  # at any number of slices
    optimizer: settings.Optimizer = "adam"
    lr: float = 1e-3
    end_lr: float = 1e-3  # no schedule
    weight_decay: float = 0.0
    batch: int = 24  # 6 volumes of 4 partitions; the loss sees twice as many images
    stop_on_collapse: bool = False  # the loss itself keeps partitions apart; young features may still look collapsed


class GlobalContrast(nn.Module):
    """Trains `encoder`, whose forward gives maps from the finest to the coarsest and whose `channels` are theirs."""

    def __init__(self, encoder: nn.Module, config: Config | None = None):
        super().__init__()
        self.config = config = config or Config()
        self.encoder = encoder
        dims = 3 if isinstance(first_convolution(encoder), nn.Conv3d) else 2
        features = cast("tuple[int, ...]", encoder.channels)[-1]
        self.head = Head(features, config.grid, dims, config.hidden, config.d)

    def augment(self, batch: Batch, rng: Generator) -> Views:
        """The strategy's views of every slice; `groups` hold each slice's partition and volume, both (n,) int64."""
        config = self.config
        image, corner, extent, position = frames(batch, config.side, rng, "global_contrast")
        assert config.side is not None
        whole = [augment.crop(image, corner, extent, config.side)] if config.strategy != "random" else []
        corners, extents = [corner] * len(whole), [extent] * len(whole)
        for _ in range(1 if config.strategy == "partition-positives" else 2):
            first, box = windows((batch["size"] - corner).minimum(extent), extent, config, rng)
            corners, extents = [*corners, corner + first], [*extents, box]
            window = augment.crop(image, corner + first, box, config.side)
            whole.append(brightened(window, config.brightness, config.contrast, rng))
        groups = {"partition": partition(position, config.partitions), "volume": batch["volume"]}
        return Views(whole, corners, extents, groups=groups)

    def loss(self, views: Views, step: Step) -> Loss:
        n, config = len(views.images[0]), self.config
        maps = self.encoder(torch.cat(views.images))
        z = self.head(maps[-1])
        # All workers compute the loss of all rows: with some hundred rows that costs less than what it saves in thought.
        joint = [gather.rows(part)[0] for part in z.chunk(len(views.images))]
        where, whose = (gather.rows(views.groups[key])[0] for key in ("partition", "volume"))
        positives = positive_pairs(config.strategy, len(joint), where, whose, config.pairing)
        negatives = negative_mask(config.strategy, len(joint), where)
        each = terms(torch.cat(joint), positives, negatives, config.temperature)
        contrast = each.mean() if config.scale == "mean" else each.sum() / len(negatives)
        counts = {"positives": len(positives) / len(negatives), "negatives": negatives.sum(1).float().mean()}
        watched = {key: torch.as_tensor(count, device=z.device) for key, count in counts.items()}
        return Loss({"contrast": contrast}, watched | pairs.health(pairs.feature(maps)[:n], z[:n], step))

    def after_step(self, step: Step) -> None:
        """Nothing follows the optimizer."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return decay_groups(self, weight_decay)

    def transferable_state(self) -> dict[str, Tensor]:
        return self.encoder.state_dict()


class Head(nn.Module):
    """g1: a map (n, features, ...) to z (n, d). Averaged to `grid` cells per axis, flattened, two layers without biases."""

    def __init__(self, features: int, grid: int, spatial_dims: int, hidden: int, d: int):
        super().__init__()
        self.cells = (nn.AdaptiveAvgPool2d if spatial_dims == 2 else nn.AdaptiveAvgPool3d)(grid)
        self.layers = nn.Sequential(
            nn.Linear(features * grid**spatial_dims, hidden, bias=False), nn.ReLU(inplace=True),
            nn.Linear(hidden, d, bias=False),
        )  # fmt: skip
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.layers(self.cells(x).flatten(1))
        return z


# --------------------------------------------------------------------------------------------------------- pairs and loss


def partition(position: Tensor, count: int) -> Tensor:
    """Which of `count` equal parts of the volume each position (n,) in [0, 1] lies in, int64 from 0; 1 belongs to the last."""
    return (position * count + ROUNDING).floor().long().clamp(0, count - 1)


def positive_pairs(strategy: str, views: int, where: Tensor, whose: Tensor, pairing: str = "all") -> Tensor:
    """Ordered positive pairs of rows, (p, 2) int64. Rows are the first view of all N slices, then their second, …

    where, whose   (N,) int64: partition and volume of each slice
    pairing        "ring" pairs a slice with the next one of its partition in the order of the batch, around, and counts the
                   views of a slice once for each of its two neighbours, as the source does
    """
    n = len(where)
    place = torch.arange(n, device=where.device)
    row, view = place.repeat(views), torch.arange(views, device=where.device).repeat_interleave(n)
    own = (row[:, None] == row) & (view[:, None] != view)
    if strategy != "partition-positives":
        return own.nonzero()
    if pairing == "all":
        where, whose = where.repeat(views), whose.repeat(views)
        across = (where[:, None] == where) & (whose[:, None] != whose) & (view[:, None] == view)
        return (own | across).nonzero()
    following = _next_of_partition(where)
    apart = whose[following] != whose
    one, other = ((x[apart] + n * torch.arange(views, device=x.device)[:, None]).flatten() for x in (place, following))
    return torch.cat([own.nonzero(), own.nonzero(), torch.stack([one, other], 1), torch.stack([other, one], 1)])


def _next_of_partition(where: Tensor) -> Tensor:
    """For each slice, the next one of its partition in the batch; for the last, the first."""
    order = where.argsort(stable=True)
    grouped = where[order]
    follows = torch.arange(1, len(where) + 1, device=where.device)
    last = grouped != torch.cat([grouped[1:], grouped.new_full((1,), -1)])
    follows = torch.where(last, torch.searchsorted(grouped, grouped), follows)
    return torch.empty_like(order).index_copy_(0, order, order[follows])


def negative_mask(strategy: str, views: int, where: Tensor) -> Tensor:
    """Which rows are negatives of which, (views N, views N) bool; rows and `where` as for `positive_pairs`."""
    kind = torch.arange(len(where), device=where.device) if strategy == "random" else where
    kind = kind.repeat(views)
    return kind[:, None] != kind


def terms(z: Tensor, pairs: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """l_ab of each ordered pair, (p,), in float32, of float64 embeddings in float64; 0 where a row has no negatives.

    z (m, d), of any length      pairs (p, 2) int64, the anchor first      negatives (m, m) bool, a row for each anchor
    """
    with torch.autocast(z.device.type, enabled=False):
        z = F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1, eps=1e-6)
        s = z @ z.T / temperature
        rivals = s.masked_fill(~negatives, -torch.inf).logsumexp(1)
        anchor, partner = pairs.unbind(1)
        return F.softplus(rivals[anchor] - s[anchor, partner])  # -log e^s / (e^s + e^rivals), neither of them alone


# ------------------------------------------------------------------------------------------------------------------ views


def frames(batch: Batch, side: int | None, rng: Generator, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a view shows before anything is cut from it: image, corners and extents (n, D) int64, positions (n,).

    A slice whole, in a square as large as the longest side of the batch; of a volume, a cube of `side` at a random place, whose
    position is 0 where it lies lowest and 1 where it lies highest. Raises ValueError for the method `name` without a side.
    """
    if side is None:
        raise ValueError(f"{name}: the side of a view is not known; set pretrain.side to a number of pixels")
    image, size = batch["image"], batch["size"]
    if size.shape[1] == 2:
        height, width = image.shape[2:]
        longest = max(height, width)
        image = F.pad(image, (0, longest - width, 0, longest - height))
        return image, torch.zeros_like(size), torch.full_like(size, longest), batch["position"]
    reach = (size - side).clamp(min=0)
    corner = (torch.rand(size.shape, generator=rng, device=size.device) * (reach + 1)).long().minimum(reach)
    return image, corner, torch.full_like(size, side), corner[:, 2] / reach[:, 2].clamp(min=1)


def windows(size: Tensor, extent: Tensor, config: Config, rng: Generator) -> tuple[Tensor, Tensor]:
    """A window in each frame: corners, from the frame's, and extents, (n, D) int64 each.

    size     (n, D) int64, pixels of the frame that are image; a window stays inside
    extent   (n, D) int64, sides of the frames, of which `config.window` is the window's share
    """
    box = (config.window * extent).round().long().clamp(min=1).minimum(size)
    low, high = ((start * size).round().long() for start in config.starts)
    drawn = torch.rand(size.shape, generator=rng, device=size.device) * (high - low)
    return (low + drawn.long()).minimum(size - box), box


def brightened(images: Tensor, brightness: float, contrast: float, rng: Generator) -> Tensor:
    """Images (n, c, *spatial) with their own offset o and then factor f each: (x + o - mean) f + mean, cut to [0, 1.5].

    o is uniform in ± `brightness`, f in 1 ± `contrast`; the mean is that of the channel after the offset.
    """
    images = intensities(images)
    shape = [-1] + [1] * (images.dim() - 1)
    offset, factor = (
        ((2 * torch.rand(len(images), generator=rng, device=images.device) - 1) * width).view(shape)
        for width in (brightness, contrast)
    )
    images = images + offset
    mean = images.mean(dim=tuple(range(2, images.dim())), keepdim=True)
    return ((images - mean) * (1 + factor) + mean).clamp(0, LIGHTEST)


METHOD: type[Method] = GlobalContrast
