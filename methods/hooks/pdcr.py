"""PDCR: hidden features pulled together or pushed apart by how much of each class lies around them.

Pixel-level, distance-aware contrast of "Contrastive and Selective Hidden Embeddings for Medical Image Segmentation",
IEEE TMI 2022, https://arxiv.org/abs/2201.08779, from labelled slices only. In each image, N cells of a feature map give vectors
a_i, and the label around each cell, in a window, gives ratios w_i (k classes, background included):

    D_ij = ½ Σ_k |w_i - w_j|   divergence, in [0, 1]: total variation; for two classes the difference of foreground ratios
    s_ij = (cos(a_i, a_j) - 1) / τ
    ℓ_ij = - (1 - D_ij) s_ij + log Σ_m exp(D_im s_im),   mean over images and pairs i, j

Windows are the cell's receptive field (`ratio` "receptive-field"), or patches of several sizes about its centre
("hierarchical"), with one loss each or, with `average` "ratios", one for all. Stride, centre and receptive field follow from
the network (`receptive.py`), ratios from average pooling of the one-hot label: pixels without a label, and those outside the
crop, count nowhere; a cell without a labelled pixel is in no pair. Three terms: maps of the encoder, each with itself;
of the decoder, likewise; and pairs of maps (`cross`), brought by strided convolutions to one grid and `adapted` channels.

N vectors that are all alike have ℓ = log N: every term is weight · (ℓ - log N), 0 for features that tell nothing and
negative when they separate the classes. No gradient changes by it.

What differs from the paper's 2D code, which cannot be run: there attraction was weighted by D and repulsion by 1 - D, which
collapses the features (the 3D code and the abstract have it as here); windows were transposed and off-centre, NaN in images
that are not square, and those of `cross` in the corner; losses were sums over images and pairs, so its weights do not
transfer: the defaults keep their numbers on the mean, to be searched anew. The nine outer cells of maps are not left out.
In its 3D code D is Σ over the foreground classes, s has the greatest cosine for 1, τ is 0.5, and both weights are 0.01.
`pdcr` gives those forms too, for known values; training has the one above. Defaults name the maps of `networks/deeplab.py`.

What is drawn is the seed of the cells (`sampling`). `weight`, with its ramp, is a factor of all terms. What transfers is the
network; the parameters of `cross` belong to the hook. At inference nothing of it runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from medssl.methods import gather, receptive, settings
from medssl.methods.augment import Pair
from medssl.methods.gather import JointBatchNorm
from medssl.methods.protocol import UNLABELLED, Loss, Step
from medssl.methods.ramps import weight
from medssl.methods.receptive import Field
from medssl.methods.segment import Drawn, Hook, Pass
from medssl.methods.taps import Taps

LABELLED_ONLY = True


@dataclass(frozen=True, kw_only=True)
class Config(settings.Hook):
    encoder: tuple[str, ...] = ("encoder.stem2", "encoder.block1")  # modules of the network; (): no such term
    decoder: tuple[str, ...] = ("decoder.low", "decoder.conv1")
    cross: tuple[str, ...] = ("encoder.stem2", "encoder.block1")  # two or more: each pair of them
    encoder_samples: tuple[int, ...] = (64, 32)  # N of each module
    decoder_samples: tuple[int, ...] = (32, 8)
    cross_samples: int = 32
    encoder_weight: float = 0.1
    decoder_weight: float = 0.01
    cross_weight: float = 0.01
    ratio: Literal["hierarchical", "receptive-field"] = "hierarchical"
    patches: tuple[int, ...] = (5, 7, 9)  # pixels of the image, sides of the hierarchical windows
    average: Literal["losses", "ratios"] = "losses"  # over the patches; paper, ablation (b): losses are better
    patch_weights: tuple[float, ...] | None = None  # of the patches where ratios are averaged; None: equal
    sampling: Literal["stride", "random", "class-balanced", "boundary"] = "stride"  # which cells (see `positions`)
    temperature: float = 1.0  # τ (3D: 0.5)
    adapted: int = 32  # channels of adapted maps
    cross_stride: int = 16  # pixels per cell of their common grid

    def __post_init__(self) -> None:
        super().__post_init__()
        for term in ("encoder", "decoder"):
            layers, samples = getattr(self, term), getattr(self, f"{term}_samples")
            if len(layers) != len(samples) or not all(n > 1 for n in samples):
                raise ValueError(f"{term}_samples is {samples} for the modules {layers}: expected a number above 1 for each")
        if len(self.cross) == 1 or len(set(self.cross)) < len(self.cross) or self.cross_samples < 2:
            raise ValueError(
                f"cross is {self.cross} with {self.cross_samples} samples: expected none or several modules, and 2"
            )
        if not self.encoder + self.decoder + self.cross:
            raise ValueError("encoder, decoder and cross name no module: expected one at least")
        if min(self.encoder_weight, self.decoder_weight, self.cross_weight) < 0 or self.temperature <= 0:
            raise ValueError("expected encoder_weight, decoder_weight, cross_weight >= 0 and temperature > 0")
        if not self.patches or min(*self.patches, self.adapted, self.cross_stride) < 1:
            raise ValueError(
                f"patches is {self.patches}, adapted {self.adapted}, cross_stride {self.cross_stride}: expected > 0"
            )
        if list(self.patches) != sorted(set(self.patches)):
            raise ValueError(f"patches is {self.patches}: expected different sides, the smallest first")
        if self.patch_weights is not None and (self.average == "losses" or len(self.patch_weights) != len(self.patches)):
            raise ValueError('patch_weights belong to `average` "ratios", one for each of `patches`')
        if self.patch_weights is not None and (min(self.patch_weights) < 0 or not any(self.patch_weights)):
            raise ValueError(f"patch_weights is {self.patch_weights}: expected weights of at least 0, not all 0")


# ---------------------------------------------------------------------------------------------------------------- the loss


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """Total variation between class ratios a (*, k, i) and b (*, k, j), each summing to 1 over k: (*, i, j) in [0, 1]."""
    return (a[..., :, None] - b[..., None, :]).abs().sum(-3) / 2


def pdcr(
    a: Tensor,
    b: Tensor,
    divergence: Tensor,
    temperature: float = 1.0,
    known: tuple[Tensor, Tensor] | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    orientation: Literal["paper", "swapped"] = "paper",
    shift: Literal["constant", "greatest"] = "constant",
) -> Tensor:
    """The contrast of vectors a (n, c, i) with b (n, c, j): (K,) for the divergences (K, n, i, j), in float32 at least.

    known         which vectors take part, (n, i) and (n, j) bool; None: all
    reduction     over images and pairs, of all workers; "sum" is the 2D code's
    orientation   "swapped": attraction weighted by D, repulsion by 1 - D, as in the 2D code
    shift         what s is 0 for: a cosine of 1, or the greatest that occurs, as in the published code
    Returns 0, with gradients of 0, where nothing is known.
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        a, b = (F.normalize(x.to(dtype), dim=1, eps=1e-8) for x in (a, b))
        s = torch.einsum("nci,ncj->nij", a, b) / temperature
    s = s - (s.max() if shift == "greatest" else 1 / temperature)
    tug, push = (1 - divergence, divergence) if orientation == "paper" else (divergence, 1 - divergence)
    if known is None:
        known = tuple(torch.ones(len(x), x.shape[2], dtype=torch.bool, device=x.device) for x in (a, b))  # type: ignore[assignment]
    assert known is not None
    pairs = known[0][:, :, None] & known[1][:, None, :]  # (n, i, j)
    repelled = (s * push).where(known[1][:, None, :], -torch.inf)
    empty = ~known[1].any(1)[:, None, None]  # an image without a partner: kept out of the logarithm, whose gradient is NaN
    repelled = repelled.where(~empty, 0).logsumexp(-1, keepdim=True)
    total = (repelled - s * tug).where(pairs, 0).sum((1, 2, 3))
    return total if reduction == "sum" else gather.mean(total, pairs.sum())


def floor(known: tuple[Tensor, Tensor]) -> Tensor:
    """log N, the loss of vectors that are all alike: mean over the pairs of `pdcr` with the same `known`, ()."""
    rows, partners = known[0].sum(1), known[1].sum(1)
    pairs = (rows * partners).float()
    return gather.mean((pairs * partners.clamp(min=1).float().log()).sum(), pairs.sum())


# -------------------------------------------------------------------------------------------------- windows and their ratios


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Class ids (n, *sides) as (n, k, *sides) float32, 0 in all classes where a pixel is UNLABELLED."""
    known = labels != UNLABELLED
    return F.one_hot(labels.long().where(known, classes), classes + 1).movedim(-1, 1)[:, :classes].float()


def ratios(classes: Tensor, field: Field, low: Sequence[int], sides: Sequence[int], cells: Sequence[int]) -> Tensor:
    """Share of each class in a window about each cell of a map: (n, k, *cells), 0 in all classes where nothing is labelled.

    classes      (n, k, *sides of the crop), as `one_hot` gives them
    low, sides   first pixel of cell 0's window along each axis, and pixels of the window; cell i's is i · stride further
    """
    share = classes
    for axis, (first, side, jump, count) in enumerate(zip(low, sides, field.stride, cells, strict=True)):
        share = _pooled_along(share.movedim(2 + axis, -1), first, side, jump, count).movedim(-1, 2 + axis)
    labelled = share.sum(1, keepdim=True)
    return (share / labelled).where(labelled > 0, 0)


def _pooled_along(x: Tensor, first: int, side: int, jump: int, count: int) -> Tensor:
    """Means of `count` windows of the last axis, which begin at first, first + jump, …; 0 outside."""
    last = first + (count - 1) * jump + side
    padded = F.pad(x, (-first, last - x.shape[-1]))  # negative numbers cut
    return F.avg_pool1d(padded.flatten(0, -2), side, jump).unflatten(0, x.shape[:-1])


def series(classes: Tensor, field: Field, cells: Sequence[int], config: Config) -> Tensor:
    """Ratios in every window of the configured series: (K, n, k, *cells)."""
    pooled = partial(ratios, classes, field, cells=cells)
    if config.ratio == "receptive-field":
        return pooled(field.low, field.size)[None]
    every = torch.stack(
        [pooled([math.floor(c - (side - 1) / 2) for c in field.centre], [side] * len(cells)) for side in config.patches]
    )  # an even patch cannot be centred on a pixel, nor an odd one between two: it then lies half a pixel above
    return every if config.average == "losses" else averaged(every, config.patch_weights)


def averaged(every: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """The weighted mean of a series (K, *) as a series of one (1, *)."""
    alpha = torch.tensor(weights or [1.0] * len(every), dtype=every.dtype, device=every.device)
    return torch.einsum("k,k...->...", alpha / alpha.sum(), every)[None]


# ---------------------------------------------------------------------------------------------------------- which cells


def positions(sampling: str, shares: Tensor, count: int, rng: Generator) -> Tensor:
    """`count` different cells of each image, as flat row-major indices (n, count).

    shares   (n, k, cells) class ratios, of the smallest window or of the average
    "stride"           every (cells // count)-th, the same in all images: the paper's
    "random"           uniform among the cells with a labelled pixel
    "class-balanced"   the same number of each class (that of most of the window), as far as there are so many
    "boundary"         half of them with more than one class in the window, as far as there are so many
    Unlabelled cells come last. Raises ValueError when there are fewer cells than `count`.
    """
    n, _, cells = shares.shape
    if count > cells:
        raise ValueError(f"pdcr: {count} samples of a map of {cells} cells; ask for fewer samples or take larger crops")
    if sampling == "stride":
        return (torch.arange(count, device=shares.device) * (cells // count)).expand(n, count)
    most = shares.amax(1)
    if sampling == "class-balanced":
        group, groups = shares.argmax(1), shares.shape[1]
    elif sampling == "boundary":
        group, groups = (most < 1 - 1e-6).long(), 2
    else:
        group, groups = torch.zeros_like(most, dtype=torch.long), 1
    return _stratified(group.where(most > 0, groups), groups, count, rng)


def _stratified(group: Tensor, groups: int, count: int, rng: Generator) -> Tensor:
    """As many of each of `groups` as there are, drawn without replacement; cells (n, cells) of the group `groups` come last."""
    order = torch.rand(group.shape, generator=rng, device=group.device).argsort(1)
    shuffled = group.gather(1, order)
    member = F.one_hot(shuffled, groups + 1)
    rank = member.cumsum(1).gather(2, shuffled[..., None])[..., 0]  # 1 for the first of its group, 2 for the next, …
    rank = rank + (shuffled == groups) * group.shape[1]
    chosen = rank.argsort(dim=1, stable=True)[:, :count]  # whose turn it is within a round is what was shuffled
    return order.gather(1, chosen)


# -------------------------------------------------------------------------------------------------------------- the hook


@dataclass(frozen=True)
class _Sample:
    """N vectors of a map and what the label says of them."""

    vectors: Tensor  # (n, c, N)
    shares: Tensor  # (K, n, k, N)
    known: Tensor  # (n, N)


class PDCR(nn.Module):
    """Adds the terms "encoder", "decoder" and "cross" of the labelled crops, those that are chosen.

    Insert UAFS into the network first. `remove` takes the hooks off the network again.
    Raises ValueError for modules that the network lacks or whose maps have no stride on the common grid.
    """

    predictor = None
    labelled_only = LABELLED_ONLY

    def __init__(self, network: nn.Module, config: Config):
        super().__init__()
        self.config = config
        names = list(dict.fromkeys(config.encoder + config.decoder + config.cross))
        self.fields = receptive.fields(network, names)
        if config.ratio == "receptive-field" and (wide := [name for name in names if self.fields[name].everywhere]):
            raise ValueError(f'pdcr: {", ".join(wide)} see the whole image; take other modules, or ratio "hierarchical"')
        device = next(network.parameters()).device
        self.adapters = nn.ModuleList(adapter(name, self.fields[name], config).to(device) for name in config.cross)
        self.taps = Taps(network, names)

    def remove(self) -> None:
        self.taps.remove()

    def draw(self, pair: Pair | None, rng: Generator) -> Drawn:
        """The seed of the cells, () int64; nothing for the stride, which is always the same."""
        if self.config.sampling == "stride":
            return {}
        return {"seed": torch.randint(2**62, (), generator=rng, device=rng.device)}

    def terms(self, pass_: Pass, drawn: Drawn, step: Step) -> Loss:
        """The chosen terms, each a sum over its modules or pairs of modules."""
        labels, factor = pass_.views.labels, weight(self.config, step)
        assert labels is not None  # Segment.loss has seen them
        rng = torch.Generator(labels.device).manual_seed(int(drawn.get("seed", 0)))
        terms = self.contrast(pass_.labelled, labels, rng)
        return Loss({name: factor * term for name, term in terms.items()})

    def contrast(self, logits: Tensor, labels: Tensor, rng: Generator) -> dict[str, Tensor]:
        """The terms of the training pass that gave `logits` (n, k, *sides), of crops labelled (n, *sides)."""
        config, features = self.config, self.taps.taken(logits)
        sampled = partial(self._sampled, classes=one_hot(labels, logits.shape[1]), rng=rng)
        terms: dict[str, Tensor] = {}
        own = {"encoder": config.encoder_weight, "decoder": config.decoder_weight}
        for term, share in own.items():
            layers = zip(getattr(config, term), getattr(config, f"{term}_samples"), strict=True)
            samples = [sampled(features[name], self.fields[name], count) for name, count in layers]
            if samples:
                terms[term] = share * self._contrast([(each, each) for each in samples])
        if config.cross:
            maps = [adapt(features[name]) for name, adapt in zip(config.cross, self.adapters, strict=True)]
            grids = [on_grid(self.fields[name], config.cross_stride) for name in config.cross]
            samples = [sampled(x, grid, config.cross_samples) for x, grid in zip(maps, grids, strict=True)]
            terms["cross"] = config.cross_weight * self._contrast(list(combinations(samples, 2)))
        return terms

    def after_step(self, network: nn.Module, step: Step) -> None:
        pass

    @torch.no_grad()
    def _chosen(
        self, cells: Sequence[int], field: Field, count: int, classes: Tensor, rng: Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        every = series(classes, field, cells, self.config).flatten(3)  # (K, n, k, cells)
        place = positions(self.config.sampling, every[0], count, rng)
        shares = every.gather(3, place[None, :, None].expand(*every.shape[:3], count))
        return place, shares, (shares.sum(2) > 0.999).all(0)  # in every window of the series some pixel is labelled

    def _sampled(self, x: Tensor, field: Field, count: int, classes: Tensor, rng: Generator) -> _Sample:
        place, shares, known = self._chosen(x.shape[2:], field, count, classes, rng)
        vectors = x.flatten(2).gather(2, place[:, None].expand(-1, x.shape[1], -1))
        return _Sample(vectors, shares, known)

    def _contrast(self, pairs: Sequence[tuple[_Sample, _Sample]]) -> Tensor:
        """Summed over the pairs of maps and averaged over the series: the loss above that of features all alike."""
        total = []
        for a, b in pairs:
            known = (a.known, b.known)
            loss = pdcr(a.vectors, b.vectors, divergence(a.shares, b.shares), self.config.temperature, known)
            total.append(loss.mean() - floor(known))
        return torch.stack(total).sum()


def adapter(name: str, field: Field, config: Config) -> nn.Sequential:
    """A convolution whose kernel is its stride, from a map to the common grid, with batch norm and rectifier."""
    kernel = _steps(field, config.cross_stride, name)
    convolution = nn.Conv2d if len(kernel) == 2 else nn.Conv3d
    layers = convolution(field.channels, config.adapted, kernel, kernel, bias=False)  # type: ignore[arg-type]
    return nn.Sequential(layers, JointBatchNorm(config.adapted), nn.ReLU())


def on_grid(field: Field, stride: int) -> Field:
    """What the cells of an adapted map see."""
    kernel = _steps(field, stride)
    return field.windowed(kernel, kernel, [0] * len(kernel), [1] * len(kernel))


def _steps(field: Field, stride: int, name: str = "a map") -> tuple[int, ...]:
    if any(stride % jump for jump in field.stride):
        raise ValueError(f"pdcr: {name} has a stride of {field.stride} pixels, which does not divide cross_stride {stride}")
    return tuple(stride // jump for jump in field.stride)


HOOK: type[Hook] = PDCR
