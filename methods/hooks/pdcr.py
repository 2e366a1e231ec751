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

Modules are named as in `network.named_modules()`. What is None is the paper's, on any network:

                2D                                              3D
    encoder     the encoder's last maps at 1/2 and 1/4          at 1/4 and 1/8
                (where it has none at a resolution, the network's first there, else the nearest: `chosen`)
    samples     64, 32, 8, …                                    64 each; as many as there are cells, where these are fewer
    decoder     two maps, at 1/4 or then 1/2; 32, 8, … samples  none
    cross       the encoder's; 32 samples; a grid of 1/16       64 samples; a grid as coarse as the coarser map
    ratio       hierarchical                                    receptive-field; hierarchical where maps see the whole image
    τ, adapted  1, 32 channels                                  0.5, 128 channels
    weights     0.1, 0.01, 0.01                                 0.005 each: 0.01 times the mean over two levels there

In `networks/deeplab.py` these are stem2 and block1, low and conv1. The paper takes what `cross` compares before UAFS, here
it is what the module gives after it; "encoder.stem2.module" names what was there before.

What differs from the paper's 2D code, which cannot be run: there attraction was weighted by D and repulsion by 1 - D, which
collapses the features (the 3D code and the abstract have it as here); windows were transposed and off-centre, NaN in images
that are not square, and those of `cross` in the corner; losses were sums over images and pairs, so its weights do not
transfer: the defaults keep their numbers on the mean, to be searched anew. The nine outer cells of maps are not left out.
In its 3D code D is Σ over the foreground classes, s has the greatest cosine for 1, and `cross` compares cells of two grids.
`pdcr` gives those forms too, for known values; training has the one above.

In nnU-Net v2 (with nnUNet_compile=f) the terms are three overrides of its trainer; PlainConvUNet has the two levels above:

    from medssl.methods.hooks.pdcr import PDCR, Config          # and medssl.methods.uafs.insert, medssl.methods.settings.UAFS
    class nnUNetTrainerPDCR(nnUNetTrainer):
        def configure_optimizers(self):
            self.pdcr = PDCR(self.network, Config())             # before it, if wanted: insert(self.network, UAFS(layers=…))
            optimizer, schedule = super().configure_optimizers()
            optimizer.add_param_group({"params": list(self.pdcr.parameters())})
            return optimizer, schedule
        def _build_loss(self):
            own = super()._build_loss()
            def loss(logits, target):                            # lists, the finest first, with deep supervision
                finest, labels = (x[0] if isinstance(x, (list, tuple)) else x for x in (logits, target))
                rng = torch.Generator(finest.device).manual_seed(self.current_epoch)
                terms = self.pdcr.contrast(finest, labels[:, 0], rng) if finest.requires_grad else {}
                return own(logits, target) + sum(terms.values())
            return loss

and, as validation and inference need no label, nothing else. Its "ignore" label must be 255 (`protocol.UNLABELLED`).

What is drawn is the seed of the cells (`sampling`). `weight`, with its ramp, is a factor of all terms. What transfers is the
network; the parameters of `cross` belong to the hook. At inference nothing of it runs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any, Literal

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
from medssl.methods.uafs import Selected

LABELLED_ONLY = True


@dataclass(frozen=True, kw_only=True)
class Config(settings.Hook):
    encoder: tuple[str, ...] | None = None  # modules of the network; (): no such term; None, here and below: see above
    decoder: tuple[str, ...] | None = None
    cross: tuple[str, ...] | None = None  # two or more: each pair of them
    encoder_samples: tuple[int, ...] | None = None  # N of each module
    decoder_samples: tuple[int, ...] | None = None
    cross_samples: int | None = None
    encoder_weight: float | None = None
    decoder_weight: float | None = None
    cross_weight: float | None = None
    ratio: Literal["hierarchical", "receptive-field"] | None = None
    patches: tuple[int, ...] = (5, 7, 9)  # pixels of the image, sides of the hierarchical windows
    average: Literal["losses", "ratios"] = "losses"  # over the patches; paper, ablation (b): losses are better
    patch_weights: tuple[float, ...] | None = None  # of the patches where ratios are averaged; None: equal
    sampling: Literal["stride", "random", "class-balanced", "boundary"] = "stride"  # which cells (see `positions`)
    temperature: float | None = None  # τ
    adapted: int | None = None  # channels of adapted maps
    cross_stride: int | None = None  # pixels per cell of their common grid

    def __post_init__(self) -> None:
        super().__post_init__()
        for term in ("encoder", "decoder"):
            layers, samples = getattr(self, term), getattr(self, f"{term}_samples")
            if samples is not None and (len(samples) != len(layers or samples) or not all(n > 1 for n in samples)):
                raise ValueError(f"{term}_samples is {samples} for the modules {layers}: expected a number above 1 for each")
        cross = self.cross or ()
        if len(cross) == 1 or len(set(cross)) < len(cross) or (self.cross_samples or 2) < 2 or self.cross_samples == 0:
            raise ValueError(
                f"cross is {self.cross} with {self.cross_samples} samples: expected none or several modules, and 2"
            )
        if (self.encoder, self.decoder, self.cross) == ((), (), ()):
            raise ValueError("encoder, decoder and cross name no module: expected one at least")
        weights = (self.encoder_weight, self.decoder_weight, self.cross_weight)
        if any(each is not None and each < 0 for each in weights) or (self.temperature is not None and self.temperature <= 0):
            raise ValueError("expected encoder_weight, decoder_weight, cross_weight >= 0 and temperature > 0")
        sides = [*self.patches, *(each for each in (self.adapted, self.cross_stride) if each is not None)]
        if not self.patches or min(sides) < 1:
            raise ValueError(
                f"patches is {self.patches}, adapted {self.adapted}, cross_stride {self.cross_stride}: expected > 0"
            )
        if list(self.patches) != sorted(set(self.patches)):
            raise ValueError(f"patches is {self.patches}: expected different sides, the smallest first")
        if self.patch_weights is not None and (self.average == "losses" or len(self.patch_weights) != len(self.patches)):
            raise ValueError('patch_weights belong to `average` "ratios", one for each of `patches`')
        if self.patch_weights is not None and (min(self.patch_weights) < 0 or not any(self.patch_weights)):
            raise ValueError(f"patch_weights is {self.patch_weights}: expected weights of at least 0, not all 0")


# ----------------------------------------------------------------------------------------------------- what None stands for

PAPER: dict[int, dict[str, Any]] = {  # by dimensions
    2: {"encoder_weight": 0.1, "decoder_weight": 0.01, "cross_weight": 0.01, "temperature": 1.0, "adapted": 32},
    3: {"encoder_weight": 0.005, "decoder_weight": 0.005, "cross_weight": 0.005, "temperature": 0.5, "adapted": 128},
}
STRIDES = {2: (2, 4), 3: (4, 8)}  # of the encoder's maps, in pixels
SAMPLES: dict[int, dict[str, tuple[int, ...]]] = {  # of each module; those after the last have as many as it
    2: {"encoder": (64, 32, 8), "decoder": (32, 8), "cross": (32,)},
    3: {"encoder": (64,), "decoder": (64,), "cross": (64,)},
}


def chosen(config: Config, network: nn.Module) -> Config:
    """`config` with a value for every None but those of samples. Raises ValueError where the network has too few maps."""
    maps = receptive.maps(network)
    dims = receptive.dimensions(network)
    free = replace(config, **{key: value for key, value in PAPER[dims].items() if getattr(config, key) is None})
    if free.encoder is None:
        free = replace(free, encoder=_encoder(maps, STRIDES[dims], len(config.encoder_samples or STRIDES[dims]), network))
    encoder = _given(free.encoder)
    if free.decoder is None:
        wanted = len(config.decoder_samples or (2, 2)) if dims == 2 or config.decoder_samples else 0
        free = replace(free, decoder=_decoder(maps, encoder, wanted, network))
    if free.cross is None:
        free = replace(free, cross=encoder if len(encoder) > 1 else ())
    return free


def _encoder(maps: Mapping[str, Field], strides: Sequence[int], count: int, network: nn.Module) -> tuple[str, ...]:
    """At each stride the encoder's last map, or the network's first where the encoder has none; else the nearest stride's."""
    found: list[str] = []
    for wanted in strides[:count]:
        left = {name: field for name, field in maps.items() if name not in found}
        nearest = min((abs(math.log2(max(field.stride) / wanted)) for field in left.values()), default=math.inf)
        at = [name for name, field in left.items() if abs(math.log2(max(field.stride) / wanted)) == nearest]
        own = [name for name in at if name.startswith("encoder.")]
        found += own[-1:] or at[:1]
    if len(found) < count:
        raise ValueError(
            f"pdcr: {count} modules are wanted and {type(network).__name__} has maps at {receptive.listed(maps) or 'none'}; "
            "name them in hooks.pdcr.encoder"
        )
    return tuple(found)


def _decoder(maps: Mapping[str, Field], encoder: Sequence[str], count: int, network: nn.Module) -> tuple[str, ...]:
    """The first maps of the decoder at a quarter of the resolution that are made by weights, then at a half, then others."""
    others = [name for name in maps if name.startswith("decoder.") and name not in encoder]
    own = [name for name in others if _weighted(network.get_submodule(name))]
    order = sorted(own, key=lambda name: abs(math.log2(max(maps[name].stride) / 4) + 0.1))
    return tuple(order[:count])


def _weighted(module: nn.Module) -> bool:
    """Whether the module itself has weights, apart from the head of UAFS that may follow it."""
    own = module.module if isinstance(module, Selected) else module
    return any(True for _ in own.parameters())


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
        config = chosen(config, network)
        names = list(dict.fromkeys(_given(config.encoder) + _given(config.decoder) + _given(config.cross)))
        try:
            self.fields = receptive.fields(network, names)
        except ValueError as error:
            raise ValueError(f"pdcr: {error}; usable modules: {receptive.listed(receptive.maps(network))}") from error
        wide = [name for name in names if self.fields[name].everywhere]
        if config.ratio == "receptive-field" and wide:
            narrow = {name: field for name, field in receptive.maps(network).items() if not field.everywhere}
            raise ValueError(
                f"pdcr: {', '.join(wide)} see the whole image; take modules that do not ({receptive.listed(narrow)}), "
                'or ratio "hierarchical"'
            )
        self.config = config = self._with_windows(config, bool(wide))
        device = next(network.parameters()).device
        self.adapters = nn.ModuleList(adapter(name, self.fields[name], config).to(device) for name in _given(config.cross))
        self.taps = Taps(network, names)

    def _with_windows(self, config: Config, wide: bool) -> Config:
        """What depends on the fields of the chosen maps: the kind of window, and the grid across layers."""
        strides = [field.stride for field in self.fields.values()]
        solid = len(strides[0]) == 3
        common = math.lcm(*(jump for name in _given(config.cross) for jump in self.fields[name].stride)) if config.cross else 1
        grid = config.cross_stride or (common if solid else -(-16 // common) * common)
        usual: Any = "receptive-field" if solid and not wide else "hierarchical"
        return replace(config, ratio=config.ratio or usual, cross_stride=grid)

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
            layers = _given(getattr(config, term))
            usual = [self._usual(term, features[name], place) for place, name in enumerate(layers)]
            counts = getattr(config, f"{term}_samples") or usual
            each = zip(layers, counts, strict=True)
            samples = [sampled(features[name], self.fields[name], count) for name, count in each]
            if samples:
                assert share is not None
                terms[term] = share * self._contrast([(each, each) for each in samples])
        if config.cross:
            assert config.cross_stride is not None
            assert config.cross_weight is not None
            maps = [adapt(features[name]) for name, adapt in zip(config.cross, self.adapters, strict=True)]
            grids = [on_grid(self.fields[name], config.cross_stride) for name in config.cross]
            counts = [config.cross_samples or self._usual("cross", x) for x in maps]
            samples = [sampled(x, grid, n) for x, grid, n in zip(maps, grids, counts, strict=True)]
            terms["cross"] = config.cross_weight * self._contrast(list(combinations(samples, 2)))
        return terms

    def after_step(self, network: nn.Module, step: Step) -> None:
        pass

    def _usual(self, term: str, x: Tensor, place: int = 0) -> int:
        """The paper's N of the term's module number `place`, or as many cells as the map x has."""
        every = SAMPLES[x.dim() - 2][term]
        usual = every[min(place, len(every) - 1)]
        return min(usual, math.prod(x.shape[2:]))

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
        total, temperature = [], self.config.temperature
        assert temperature is not None
        for a, b in pairs:
            known = (a.known, b.known)
            loss = pdcr(a.vectors, b.vectors, divergence(a.shares, b.shares), temperature, known)
            total.append(loss.mean() - floor(known))
        return torch.stack(total).sum()


def adapter(name: str, field: Field, config: Config) -> nn.Sequential:
    """A convolution whose kernel is its stride, from a map to the common grid, with batch norm and rectifier."""
    assert config.cross_stride is not None
    assert config.adapted is not None
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


def _given(names: tuple[str, ...] | None) -> tuple[str, ...]:
    assert names is not None, "`chosen` has chosen them"
    return names


HOOK: type[Hook] = PDCR
