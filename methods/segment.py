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

Pixels that nobody annotated take part in no term. Semi-supervised methods add their terms as hooks.
Defaults are the fine-tuning of the CT study (https://github.com/dittohed/exploring-ssl-for-ct): two crops per slice, half
of them centred on foreground, a milder chain without zoom. `crop=resized` takes random-resized boxes instead (the law of
`crops.py`), a label being that of the nearest pixel. Transfers: the whole network.

While `freeze_encoder` lasts, the encoder's parameters do not change by a bit. Nothing else about it is switched off: dropout
and drop path stay as in training, and batch norms inside it go on normalising by the batch while their running statistics
follow the data, so that training and evaluation see one function; instance and group norms have none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from medssl.methods import augment, crops, gather, settings
from medssl.methods.optimizers import decay_groups
from medssl.methods.protocol import UNLABELLED, Batch, Loss, Method, Step, Views

SMOOTH = 1e-5  # ε: a class absent from prediction and label has Dice 1


@dataclass(frozen=True, kw_only=True)
class Config(settings.Chain):
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
    """One forward pass of the network, as hooks see it."""

    views: Views
    logits: Tensor  # (n, k, s, s), with their gradient


class Hook(Protocol):
    """A semi-supervised term. A hook with state (a teacher, a queue, a projector) is an nn.Module, so that it is saved."""

    def terms(self, pass_: Pass, step: Step) -> dict[str, Tensor]:
        """Weighted terms to add to the loss; none where they do not apply."""

    def after_step(self, step: Step) -> None:
        """What follows the optimizer."""


class Segment(nn.Module):
    """Trains `network`, which maps images (n, c, h, w) to logits (n, k, h, w)."""

    def __init__(self, network: nn.Module, config: Config | None = None, hooks: Sequence[Hook] = ()):
        super().__init__()
        self.config = config or Config()
        self.network = network
        self.hooks = tuple(hooks)
        self.hook_state = nn.ModuleList(hook for hook in self.hooks if isinstance(hook, nn.Module))

    def augment(self, batch: Batch, rng: Generator) -> Views:
        """`crops` labelled crops of every slice, each with its own draw of the chain."""
        side = self.config.side
        if side is None:
            raise ValueError("segment: the side of a crop is not known; set finetune.side to a number of pixels")
        image, label, size = (batch[key].repeat_interleave(self.config.crops, 0) for key in ("image", "label", "size"))
        corner, extent = self._boxes(label, size, side, rng)
        images, labels = augment.labelled_view(image, label, corner, side, self.config, rng, extent)
        return Views([images], [corner], [torch.full_like(corner, side) if extent is None else extent], labels)

    def _boxes(self, label: Tensor, size: Tensor, side: int, rng: Generator) -> tuple[Tensor, Tensor | None]:
        """Corners and extents (n, D) of the crops; None: `side` pixels on every axis."""
        if self.config.crop == "resized":
            return crops.single(size, self.config.scale, self.config.ratio, rng)
        if self.config.balanced:
            return augment.balanced_corners(label, size, side, rng), None
        return anywhere(size, side, rng), None

    def loss(self, views: Views, step: Step) -> Loss:
        """Without a labelled pixel the supervised terms are 0, with gradients of 0: a shard or a batch may hold none."""
        (images,), labels = views.images, views.labels
        if labels is None:
            raise ValueError("segment: these views carry no labels; make them with Segment.augment")
        logits = self.network(images)
        config = self.config
        jaccard = config.overlap == "jaccard"
        terms = {
            config.overlap: config.dice
            * (jaccard_loss(logits, labels) if jaccard else dice_loss(logits, labels, config.dice_over)),
            "cross_entropy": config.cross_entropy * cross_entropy(logits, labels),
        }
        for hook in self.hooks:
            added = hook.terms(Pass(views, logits), step)
            if shared := terms.keys() & added.keys():
                raise ValueError(f"segment: two terms are named {', '.join(sorted(shared))}; give the hook's its own name")
            terms |= added
        labelled = (labels != UNLABELLED).float().mean()
        return Loss(terms, {"labelled": labelled})

    def after_step(self, step: Step) -> None:
        for hook in self.hooks:
            hook.after_step(step)

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
        return self.network.state_dict()


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
        overlap, size, present = (_joint(each) for each in (overlap, size, present))
        loss = 1 - (2 * overlap + SMOOTH) / (size + SMOOTH)
        return (loss * (present > 0)).sum() / (present > 0).sum().clamp(min=1)
    loss = (1 - (2 * overlap + SMOOTH) / (size + SMOOTH)).mean(1)
    labelled = (labels != UNLABELLED).flatten(1).any(1)
    return gather.mean((loss * labelled).sum(), labelled.sum())


def jaccard_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Soft Jaccard loss over the pixels of all slices of all workers together, mean over all classes.

    A class that none of these pixels has counts 0, as if it were perfect. Shapes as in `dice_loss`.
    """
    overlap, predicted, present = (_joint(each) for each in _sums(logits, labels))
    union = (predicted + present - overlap).clamp(min=SMOOTH)  # a class that is present has more; others do not count
    return ((1 - overlap / union) * (present > 0)).mean()


def _sums(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each slice and class, over the labelled pixels: Σ p y, Σ p and Σ y, (n, k) each."""
    p = logits.float().softmax(1)
    known = (labels != UNLABELLED)[:, None]
    y = torch.zeros_like(p).scatter_(1, labels[:, None].where(known, 0), known.to(p.dtype))
    axes = tuple(range(2, p.dim()))
    return (p * y).sum(axes), (p * known).sum(axes), y.sum(axes)


def _joint(sums: Tensor) -> Tensor:
    """(n, k) of this worker as (k,) over the slices of all workers."""
    return gather.stack(sums.sum(0)).sum(0)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, mean over labelled pixels; 0 when there is none. Shapes as in `dice_loss`."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=UNLABELLED, reduction="sum")
    return gather.mean(total, (labels != UNLABELLED).sum())


METHOD: type[Method] = Segment
