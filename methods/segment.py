"""Segmentation as a method: supervised, semi-supervised and fine-tuning run through the same loop as pretraining.

The loss is the weighted sum (`dice`, `cross_entropy`; by default 1 : 1) of soft Dice and cross-entropy, "DiceCE": Milletari,
Navab and Ahmadi, "V-Net", 3DV 2016, https://arxiv.org/abs/1606.04797, in the form of MONAI's DiceCELoss (softmax, background
included, per-slice Dice):

    y        one-hot label, p softmax of the logits            (n, k, s, s)
    dice     mean over n and k of  1 - (2 Σ p y + ε) / (Σ p + Σ y + ε)
    ce       mean over pixels of   - Σ_k y log p

`overlap=jaccard` takes the Jaccard index in place of Dice, over the batch: Iglovikov, Seferbekov, Buslaev and Shvets,
"TernausNetV2", CVPR workshops 2018, https://arxiv.org/abs/1806.00844, as in segmentation-models-pytorch ("multiclass"):

    jaccard  mean over all k, background too, of  1 - Σ p y / (Σ p + Σ y - Σ p y);  0 for a class without a pixel in the batch

Pixels that nobody annotated take part in no term. Semi-supervised methods add their terms as hooks (methods/hooks/):

    L = dice + ce + Σ_h w_h(step) L_h        each L_h from predictions on unlabelled crops x and on T x, T a geometry

Labelled crops, x and T x are forward passes of their own, run when a hook asks for them and once for all hooks. So batch norms
see the statistics of one kind of crop at a time, and their running statistics follow all of them, or with
`unlabelled.track=false` the labelled ones alone; instance and group norms cannot tell. Hooks are run in order of their names,
however they were stacked: sums, draws and states are then equal bit by bit.
Defaults are the fine-tuning of the CT study (https://github.com/dittohed/exploring-ssl-for-ct): two crops per slice, half
of them centred on foreground, a milder chain without zoom. `crop=resized` takes random-resized boxes instead (the law of
`crops.py`), a label being that of the nearest pixel; `affine_p` and `elastic_p` deform crops after that (`deform.py`).
Transfers: the whole network, or what a hook has predict in its place.

While `freeze_encoder` lasts, the encoder's parameters do not change by a bit. Nothing else about it is switched off: dropout
and drop path stay as in training, and batch norms inside it go on normalising by the batch while their running statistics
follow the data, so that training and evaluation see one function; instance and group norms have none.
"""

import contextlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from medssl.methods import augment, colour, crops, deform, gather, settings
from medssl.methods.augment import Pair
from medssl.methods.optimizers import decay_groups
from medssl.methods.protocol import UNLABELLED, Batch, Loss, Method, Step, Views

GROUPS = ("position", "depth", "patient", "volume", "phase")  # what is told of unlabelled crops
SMOOTH = 1e-5  # ε: a class absent from prediction and label has Dice 1


@dataclass(frozen=True, kw_only=True)
class Config(settings.Chain, settings.Deformation, settings.Pictures):
    side: int | None = None  # pixels of a crop; None: 96, or less where the slices are smaller
    crops: int = 2  # per slice and step
    balanced: bool = True  # centre a crop on foreground or background, each half of the time; else anywhere
    crop: Literal["fixed", "resized"] = "fixed"  # boxes of `side` pixels, or random-resized boxes anywhere
    scale: tuple[float, float] = (0.08, 1.0)  # area of a resized box, as a fraction of the slice
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height of a resized box
    overlap: Literal["dice", "jaccard"] = "dice"  # the term beside cross-entropy
    dice: float = 1.0  # weight of that term
    cross_entropy: float = 1.0  # and of the other
    dice_over: Literal["slice", "batch"] = (
        "slice"  # what Dice is taken over; "batch" (nnU-Net's choice in 2D) lets rare classes learn
    )
    freeze_encoder: float = 0.0  # fraction of the steps, from the first, in which the encoder's weights stay as pretrained
    encoder_lr: float = 1.0  # learning rate of the encoder, as a multiple of everything else's
    zoom_p: float = 0.0
    flip_p: float | tuple[float, ...] = 0.25
    rot90_p: float = 0.25
    intensity_scale_p: float = 0.15
    intensity_shift_p: float = 0.15
    blur_p: float = 0.15
    noise_p: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crops < 1 or (self.side is not None and self.side < 1):
            raise ValueError(f"crops is {self.crops} and side {self.side}: expected at least 1")
        if not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"scale {self.scale} must lie in (0, 1] and ratio {self.ratio} above 0, each low first")
        if self.crop == "resized" and self.balanced:
            raise ValueError(
                "crop is resized and balanced is true: resized boxes have no centre to choose; set balanced to false"
            )
        if self.overlap == "jaccard" and self.dice_over != "batch":
            raise ValueError(
                f"overlap is jaccard and dice_over {self.dice_over}: it is taken over the batch; set dice_over to batch"
            )
        if min(self.dice, self.cross_entropy) < 0 or self.dice + self.cross_entropy == 0:
            raise ValueError(
                f"dice is {self.dice} and cross_entropy {self.cross_entropy}: expected weights of at least 0, not both 0"
            )
        if not 0 <= self.freeze_encoder <= 1 or self.encoder_lr <= 0:
            raise ValueError(
                f"freeze_encoder is {self.freeze_encoder}, encoder_lr {self.encoder_lr}: expected 0 to 1, and more than 0"
            )


@dataclass(frozen=True, kw_only=True)
class Training(settings.Training):
    optimizer: settings.Optimizer = "adamw"
    lr: float = 1e-3
    end_lr: float = 5e-5
    warmup: float = 10 / 225
    epochs: float = 225
    batch: int = 32  # slices; each gives `crops` views
    weight_decay: float = 1e-5


@dataclass(frozen=True)
class Pass:
    """What the network says in one step, as hooks see it: maps are (m, k, s, s), of logits, with their gradient."""

    network: nn.Module
    config: Config
    views: Views  # labelled crops and their labels
    unlabelled: Pair | None  # None where every hook learns from labelled slices only
    track: bool = True  # batch norms' running statistics follow unlabelled crops, too

    @property
    def pair(self) -> Pair:
        """Unlabelled crops: `image` is x, `moved` is T x."""
        assert self.unlabelled is not None  # Segment.augment has seen to it
        return self.unlabelled

    @cached_property
    def labelled(self) -> Tensor:
        """f of the labelled crops, (n, k, s, s)."""
        logits: Tensor = self.network(self.views.images[0])
        return logits

    @cached_property
    def image(self) -> Tensor:
        """f(x)."""
        return self.of(self.pair.image)

    @cached_property
    def moved(self) -> Tensor:
        """f(T x)."""
        return self.of(self.pair.moved)

    def of(self, unlabelled: Tensor) -> Tensor:
        """f of other crops that nobody labelled: a forward pass of its own."""
        with contextlib.nullcontext() if self.track else untracked(self.network):
            logits: Tensor = self.network(unlabelled)
        return logits

    def move(self, maps: Tensor) -> Tensor:
        """T of maps over x, to be compared with maps over T x where `pair.valid`; 0 where T shows nothing."""
        return augment.apply_geometry(maps, self.pair.geometry)


@contextlib.contextmanager
def untracked(network: nn.Module) -> Iterator[None]:
    """Batch norms of `network` go on normalising by the batch, and their running statistics stay."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@contextlib.contextmanager
def initial(name: str) -> Iterator[None]:
    """What a hook initialises follows from the global generator's seed and the hook's name, however hooks were stacked.

    The global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() + zlib.crc32(name.encode()))
        yield


Drawn = Mapping[str, Tensor]


class Hook(Protocol):
    """A semi-supervised idea: an nn.Module of methods/hooks/, built as `HOOK(network, config)` around the initial network.

    What it remembers (a teacher, a queue, a second network) are its submodules and buffers: they are saved with the method, and
    trained where they require gradients. It must not keep `network` itself, which is not its own.

    One that learns from labelled slices only says so to the platform (`LABELLED_ONLY = True` in its file) and to Segment
    (`labelled_only = True` of its class). Where all are such, no unlabelled slices come, and `draw` is given None.
    """

    @property
    def config(self) -> settings.Hook: ...

    @property
    def predictor(self) -> nn.Module | None:
        """What predicts in place of the network; a file with such a hook says `PREDICTS = True`."""

    def draw(self, pair: Pair, rng: Generator) -> Drawn:
        """All randomness of the hook in one step."""

    def terms(self, pass_: Pass, drawn: Drawn, step: Step) -> Loss:
        """Weighted terms and monitors, deterministic given the views. Not called where `config.weight` is 0."""

    def after_step(self, network: nn.Module, step: Step) -> None:
        """What follows the optimizer."""


class Segment(nn.Module):
    """Trains `network`, which maps images (n, c, h, w) to logits (n, k, h, w).

    hooks        by name
    unlabelled   how the hooks' second views are drawn
    Raises ValueError when two hooks want to predict.
    """

    def __init__(
        self,
        network: nn.Module,
        config: Config | None = None,
        hooks: Mapping[str, Hook] | None = None,
        unlabelled: settings.Unlabelled | None = None,
    ):
        super().__init__()
        self.config = config or Config()
        self.network = network
        self.unlabelled = unlabelled or settings.Unlabelled()
        self.hooks = dict(sorted((hooks or {}).items()))
        self.hook_state = nn.ModuleDict({name: hook for name, hook in self.hooks.items() if isinstance(hook, nn.Module)})
        self.active = {name: hook for name, hook in self.hooks.items() if hook.config.weight}
        self.fed = [name for name, hook in self.active.items() if not getattr(hook, "labelled_only", False)]
        for name in self.hooks.keys() - self.active.keys():
            self.hook_state[name].requires_grad_(False)  # workers wait for the gradient of everything that asks for one
        if len(predict := [name for name, hook in self.hooks.items() if hook.predictor is not None]) > 1:
            raise ValueError(f"segment: one network can predict, and {' and '.join(predict)} each bring one; choose one hook")

    @property
    def predictor(self) -> nn.Module:
        """The network that predicts: a hook's teacher if there is one. It is what validation selects and the test scores."""
        return next((hook.predictor for hook in self.hooks.values() if hook.predictor is not None), self.network)

    def augment(self, batch: Batch, rng: Generator) -> Views:
        """`crops` labelled crops of every slice, each with its own draw of the chain; for hooks, of every unlabelled one."""
        side = self.config.side
        if side is None:
            raise ValueError("segment: the side of a crop is not known; set finetune.side to a number of pixels")
        image, label, size = (batch[key].repeat_interleave(self.config.crops, 0) for key in ("image", "label", "size"))
        corner, extent = self._boxes(label, size, side, rng)
        images, labels = augment.labelled_view(image, label, corner, side, self.config, rng, extent)
        if self.config.affine_p or self.config.elastic_p:
            images, labels = deform.deformed(images, labels, self.config, rng)
        if self.config.warp_p or self.config.colour_p:
            images, labels = colour.varied(images, labels, self.config, rng)
        views = Views([images], [corner], [torch.full_like(corner, side) if extent is None else extent], labels)
        pair: Any = self._pair(batch, side, rng) if self.fed else None
        drawn = {name: dict(hook.draw(pair, rng)) for name, hook in self.active.items()}
        return replace(views, unlabelled=pair, drawn=drawn)  # drawn after them: labelled crops are the same without hooks

    def _boxes(self, label: Tensor, size: Tensor, side: int, rng: Generator) -> tuple[Tensor, Tensor | None]:
        """Corners and extents (n, D) of the crops; None: `side` pixels on every axis."""
        if self.config.crop == "resized":
            return crops.single(size, self.config.scale, self.config.ratio, rng)
        if self.config.balanced:
            return augment.balanced_corners(label, size, side, rng), None
        return anywhere(size, side, rng), None

    def _pair(self, batch: Batch, side: int, rng: Generator) -> Pair:
        """The unlabelled crops that hooks learn from."""
        if "unlabelled_image" not in batch:
            raise ValueError(f"segment: {', '.join(self.fed)} learn from unlabelled slices, and the batch has none")
        image, size = (batch[f"unlabelled_{key}"].repeat_interleave(self.config.crops, 0) for key in ("image", "size"))
        corner = anywhere(size, side, rng)
        pair = augment.unlabelled_pair(image, size, corner, side, self.config, self.unlabelled, rng)
        known = {key: f"unlabelled_{key}" for key in GROUPS if f"unlabelled_{key}" in batch}
        groups = {key: batch[name].repeat_interleave(self.config.crops, 0) for key, name in known.items()}
        if size.shape[1] == 3:  # a crop of a volume lies where its middle does
            groups |= {"position": (corner[:, 2] + side / 2) / size[:, 2], "depth": size[:, 2]}
        return replace(pair, groups=groups)

    def loss(self, views: Views, step: Step) -> Loss:
        """Without a labelled pixel the supervised terms are 0, with gradients of 0: a shard or a batch may hold none."""
        if views.labels is None:
            raise ValueError("segment: these views carry no labels; make them with Segment.augment")
        loss = self._with_hooks(views, views.labels, step)
        return Loss(loss.terms, {"labelled": (views.labels != UNLABELLED).float().mean(), **loss.monitors})

    def _with_hooks(self, views: Views, labels: Tensor, step: Step) -> Loss:
        """Supervised terms, and those of the hooks as `hook/term`."""
        pass_ = Pass(self.network, self.config, views, views.unlabelled, self.unlabelled.track)
        terms, monitors = supervised(pass_.labelled, labels, self.config), dict[str, Tensor]()
        for name, hook in self.active.items():
            added = hook.terms(pass_, views.drawn[name], step)
            terms |= {f"{name}/{term}": value for term, value in added.terms.items()}
            monitors |= {f"{name}/{monitor}": value for monitor, value in added.monitors.items()}
        return Loss(terms, monitors)

    def after_step(self, step: Step) -> None:
        for hook in self.hooks.values():
            hook.after_step(self.network, step)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The encoder with its own rate and its time of rest, and everything else: decoder, head, what hooks train."""
        encoder: nn.Module | None = getattr(self.network, "encoder", None)
        scale, frozen = self.config.encoder_lr, self.config.freeze_encoder
        if encoder is None:
            if (scale, frozen) != (1, 0):
                raise ValueError("segment: encoder_lr and freeze_encoder need a network with an `encoder`; this one has none")
            return decay_groups(self, weight_decay)
        own = decay_groups(encoder, weight_decay, lr_scale=scale, frozen=frozen)
        return [*own, *decay_groups(self, weight_decay, without=encoder)]

    def transferable_state(self) -> dict[str, Tensor]:
        return self.predictor.state_dict()


def supervised(logits: Tensor, labels: Tensor, config: Config) -> dict[str, Tensor]:
    """The weighted terms of what is labelled; shapes as in `dice_loss`."""
    jaccard = config.overlap == "jaccard"
    overlap = jaccard_loss(logits, labels) if jaccard else dice_loss(logits, labels, config.dice_over)
    return {config.overlap: config.dice * overlap, "cross_entropy": config.cross_entropy * cross_entropy(logits, labels)}


def anywhere(size: Tensor, side: int, rng: Generator) -> Tensor:
    """Corners (n, D) of crops of `side` pixels, uniform over all that lie in slices of `size` (n, D) pixels."""
    choices = (size - side + 1).clamp(min=1)
    u = torch.rand(size.shape, generator=rng, device=size.device, dtype=torch.float64)  # in float32, u·m may round to m
    return (u * choices).long()


def dice_loss(logits: Tensor, labels: Tensor, over: Literal["slice", "batch"] = "slice") -> Tensor:
    """Soft Dice loss, mean over classes; 0 when nothing has a label.

    logits   (n, k, *)
    labels   (n, *) int64 class ids, UNLABELLED where unknown: such pixels count nowhere and get no gradient
    over     "slice": mean over the slices that have a label, where a class absent from one has Dice 1 if nothing is predicted;
             "batch": of the pixels of all slices of all workers together, over the classes that have any
    """
    overlap, predicted, present = _sums(logits, labels)
    size = predicted + present
    if over == "batch":
        overlap, size, present = (gather.total(each.sum(0)) for each in (overlap, size, present))
        loss = 1 - (2 * overlap + SMOOTH) / (size + SMOOTH)
        return (loss * (present > 0)).sum() / (present > 0).sum().clamp(min=1)
    loss = (1 - (2 * overlap + SMOOTH) / (size + SMOOTH)).mean(1)
    labelled = (labels != UNLABELLED).flatten(1).any(1)
    return gather.mean((loss * labelled).sum(), labelled.sum())


def jaccard_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Soft Jaccard loss over the pixels of all slices of all workers together, mean over all classes.

    A class that none of these pixels has counts 0, as if it were perfect. Shapes as in `dice_loss`.
    """
    overlap, predicted, present = (gather.total(each.sum(0)) for each in _sums(logits, labels))
    union = (predicted + present - overlap).clamp(min=SMOOTH)  # a class that is present has more; others do not count
    return ((1 - overlap / union) * (present > 0)).mean()


def _sums(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each slice and class, over the labelled pixels: Σ p y, Σ p and Σ y, (n, k) each."""
    p = logits.float().softmax(1)
    known = (labels != UNLABELLED)[:, None]
    y = torch.zeros_like(p).scatter_(1, labels[:, None].where(known, 0), known.to(p.dtype))
    axes = tuple(range(2, p.dim()))
    return (p * y).sum(axes), (p * known).sum(axes), y.sum(axes)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, mean over labelled pixels; 0 when there is none. Shapes as in `dice_loss`."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=UNLABELLED, reduction="sum")
    return gather.mean(total, (labels != UNLABELLED).sum())


METHOD: type[Method] = Segment
