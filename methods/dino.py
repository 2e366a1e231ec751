"""DINO: a student predicts what its slowly moving teacher says of other views, as probabilities over free prototypes.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, https://arxiv.org/abs/2104.14294.
Section and equation numbers are that paper's; values that it leaves out are those of the authors' code.

    x1, x2     two global views of a slice                                              (n, c, s, s)
    x3 … xv    `local_crops` small views of it, v - 2 of them                           (n, c, l, l)
    y          feature: the class token of a Vision Transformer, else the mean over the coarsest map   (n, features)
    z          bottleneck of the head                                                   (n, b)
    a          logits W z/|z|, W (K, b) with rows of unit length                        (n, K)

    Ps(x) = softmax(a(x) / τs), student                                                 eq. 1
    Pt(x) = softmax((a'(x) - c) / τt), teacher: centred and sharpened                   sec. 3.1
    H(p, q) = - Σ_k p_k log q_k
    L = mean of H(Pt(x), Ps(x')) over x in {x1, x2}, x' in all views, x' ≠ x            eq. 3: 2 v - 2 pairs
    c ← mc c + (1 - mc) mean of a'(x1), a'(x2) over the joint batch of all workers      eq. 4
    θ' ← m θ' + (1 - m) θ, m from `momentum` to 1 along a cosine                        sec. 3.1

The two ways to collapse are all slices on one prototype, where `mean_target_entropy` goes to 0, and the uniform
distribution, where `target_entropy` goes to log K; in both the `divergence` of student and teacher goes to 0 (fig. 7), and
so does what a target tells about its slice, the difference of the two entropies. The index `collapse` is 1 less its share
of the greatest it could be; the spread of z would not do, for the centre takes a direction away that all slices share. It
is NaN, and stops nothing, while the teacher is still mostly the random network that it began as (`cosine_distance` below 1).

Global views go through the networks together, local ones in a second pass, for their sides differ. An encoder that
normalises over the batch sees the statistics of each pass; its running ones move twice a step. The head has no norm.

Differences from the paper: images are slices and their intensities go through the chain of `augment.py`, the same for all
views (the paper: three unequal ones); global boxes are a pair whose IoU lies in `iou` (None: any, as in the paper); boxes
of local views lie anywhere in the slice, and with `crop="fixed"` a global box may be smaller than they are. The schedule
of the teacher's temperature moves with every step, not every epoch. The paper trains 300 epochs at a batch of 1024; lr is
its 0.0005 · batch / 256 at a batch of 128. Gradients are clipped by the norm of all of them together, not of each tensor.
At small batches a slower teacher may help (authors: 0.9995 at 256). A faster one, as a run of hundreds of steps needs it,
seems to need a faster centre: the paper's follows in 10 steps a teacher that takes 250. On the Hippocampus (200 or 120 steps,
256 prototypes, AdamW at 1e-3, one seed) teacher and centre at 0.95 and 0.9 had all targets run after one prototype (loss
0.02) and end uniform (index 0.98 to 1); at 0.98 and 0.5, with a warm-up of a tenth too, the loss fell from 5.5 to 4.3, index
0.88.
The CT study's DINO (https://github.com/dittohed/exploring-ssl-for-ct) is crop="fixed", local_crops=0, prototypes=1024,
teacher_temperature=[0.04, 0.04], momentum=0.9995, training.lr=5e-5; there the teacher kept its drop path, here it has none.
Transfers: the student's encoder, the one that the optimizer trained; the teacher's is a late average of it, and equal to it
at the limit (the paper evaluates the teacher's). Head, centre and teacher are dropped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from medssl.methods import augment, crops, gather, pairs, settings
from medssl.methods.optimizers import decay_groups
from medssl.methods.protocol import Batch, Loss, Method, Step, Views
from medssl.methods.teacher import Teacher, cosine_distance, cosine_momentum


@dataclass(frozen=True, kw_only=True)
class Config(settings.SelfDistillation):
    pass


@dataclass(frozen=True, kw_only=True)
class Training(settings.Training):
    optimizer: settings.Optimizer = "adamw"
    lr: float = 2.5e-4  # the paper's 0.0005 · batch / 256
    warmup: float = 10 / 300
    end_lr: float = 1e-6
    weight_decay: float = 0.04
    end_weight_decay: float | None = 0.4
    clip: float | None = 3.0
    epochs: float = 300
    batch: int = 128  # the paper: 1024


class DINO(nn.Module):
    """Trains `encoder`, whose forward gives maps from the finest to the coarsest and whose `channels` are theirs."""

    def __init__(self, encoder: nn.Module, config: settings.SelfDistillation | None = None):
        super().__init__()
        self.config = config = config or Config()
        self.encoder = encoder
        self.head = Head(cast("tuple[int, ...]", encoder.channels)[-1], config.hidden, config.bottleneck, config.prototypes)
        self.teacher_encoder = Teacher(encoder)
        self.teacher_head = Teacher(self.head)
        self.centre = Centre(config.prototypes, config.centre_momentum)

    def augment(self, batch: Batch, rng: Generator) -> Views:
        """Two global views of every slice that holds such a pair, then `local_crops` small ones of the same slices."""
        held, views = pairs.held_views(batch, self.config, rng, type(self).__name__.lower())
        return with_local_views(held, views, self.config, rng)

    def loss(self, views: Views, step: Step) -> Loss:
        passes = by_side(views.images)
        y = torch.cat([feature(self.encoder, x) for x in passes])
        with torch.no_grad():
            taught = feature(self.teacher_encoder.network, passes[0])
        distillation, watched = self.distil(y, taught, len(views.images), step)
        return Loss({"distillation": distillation}, watched)

    def distil(self, y: Tensor, taught: Tensor, views: int, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """L, (), and monitors, of the student's features of all views, (views · n, f), and the teacher's of the first two."""
        n = len(y) // views
        z = self.head.projector(y)
        students = self.head.prototypes(z).chunk(views)
        targets = self.centre.targets(self.teacher_head(taught), self.teacher_temperature(step)).chunk(2)
        crossed = mean_over_pairs(targets, students, self.config.temperature)
        watched = signs(torch.cat(targets))
        watched["divergence"] = crossed.detach().mean() - watched["target_entropy"]
        if cosine_distance(self.config.momentum, step) < 1:  # a random teacher's targets may be near uniform: no collapse
            watched["collapse"] = watched["collapse"].new_tensor(torch.nan)
        return gather.mean(crossed.sum(), n), pairs.feature_health(y[:n], step) | watched

    def teacher_temperature(self, step: Step) -> float:
        """τt: linear from its first to its last value over the share `teacher_warmup` of the steps."""
        return warmed(self.config.teacher_temperature, self.config.teacher_warmup, step)

    def after_step(self, step: Step) -> None:
        """The teacher follows the student, the centre the teacher."""
        momentum = cosine_momentum(self.config.momentum, step)
        self.teacher_encoder.update(self.encoder, momentum)
        self.teacher_head.update(self.head, momentum)
        self.centre.update()

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The student. Its prototypes rest at first, so that what they mean does not run away from untrained features."""
        prototypes = self.head.prototypes
        return [
            *decay_groups(self, weight_decay, without=prototypes),
            *decay_groups(prototypes, weight_decay, frozen=self.config.freeze_last_layer),
        ]

    def transferable_state(self) -> dict[str, Tensor]:
        return self.encoder.state_dict()


# ------------------------------------------------------------------------------------------------- head, targets, loss


class Prototypes(nn.Module):
    """Cosines of rows (m, b) with K directions, (m, K) in float32: the weight-normalised last layer whose norms stay 1.

    Half precision would round cosines to 1/256, a tenth of the teacher's temperature.
    """

    def __init__(self, inputs: int, k: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(k, inputs) / inputs**0.5)  # of which the direction alone matters

    def forward(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return F.linear(F.normalize(z.float(), dim=1), F.normalize(self.weight, dim=1))


class Head(nn.Module):
    """Features (m, f) to logits (m, K): three layers to a bottleneck, unit length, prototypes. App. C."""

    def __init__(self, features: int, hidden: int, bottleneck: int, k: int):
        super().__init__()
        self.projector = nn.Sequential(
            nn.Linear(features, hidden), nn.GELU(),
            nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )  # fmt: skip
        for layer in self.projector:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = Prototypes(bottleneck, k)

    def forward(self, y: Tensor) -> Tensor:
        logits: Tensor = self.prototypes(self.projector(y))
        return logits


class Centre(nn.Module):
    """c: the running mean of a teacher's logits over the joint batch of all workers and micro-batches; eq. 4.

    Between two steps, when states are saved, `value` is all there is: what a step has seen is no part of the state.
    """

    value: Tensor  # (K,) float32
    seen: Tensor  # (K + 1,) float32: the sum of this step's logits so far, and their number

    def __init__(self, k: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(k))
        self.register_buffer("seen", torch.zeros(k + 1), persistent=False)

    @torch.no_grad()
    def targets(self, logits: Tensor, temperature: float) -> Tensor:
        """Pt of logits (m, K), by the centre as it was before this step; in training they enter the next one."""
        if self.training:
            self.seen[:-1] += logits.sum(0)
            self.seen[-1] += len(logits)
        return ((logits - self.value) / temperature).softmax(1)

    @torch.no_grad()
    def update(self) -> None:
        """The end of a step. Without any logits the centre stays."""
        *_, count = joint = gather.total(self.seen)
        share = (1 - self.momentum) * (count > 0)
        self.value.lerp_(joint[:-1] / count.clamp(min=1), share)
        self.seen.zero_()


def feature(encoder: Any, x: Tensor) -> Tensor:
    """y of images x, (n, features): the class token of an encoder that has `tokens`, else the mean over its coarsest map."""
    if hasattr(encoder, "tokens"):
        token: Tensor = encoder.tokens(x)[0]
        return token
    return pairs.feature(encoder(x))


def cross_entropy(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """H(p, softmax(a / τ)) of every row: p, a (m, K) to (m,). Linear in p, which need not sum to 1."""
    return -(targets * F.log_softmax(logits / temperature, dim=1)).sum(1)


def mean_over_pairs(targets: Sequence[Tensor], students: Sequence[Tensor], temperature: float) -> Tensor:
    """The mean of H over the pairs of different views, for every slice (n,).

    targets    Pt of the two global views, (n, K) each
    students   logits of all v views, the global ones first, (n, K) each
    H is linear in the target, so that views with several targets cost one product with their sum.
    """
    first, second = targets
    each = [second, first, *[first + second] * (len(students) - 2)]
    crossed = [cross_entropy(target, logits, temperature) for target, logits in zip(each, students, strict=True)]
    return torch.stack(crossed).sum(0) / (2 * len(students) - 2)


def signs(targets: Tensor) -> dict[str, Tensor]:
    """Monitors of targets (m, K): their mean entropy, the entropy of their mean, in nats, and the index `collapse`.

    The second less the first is what a prototype tells about the row it was drawn for, in [0, log min(m, K)]; the index is 0
    at the upper end, where every row has prototypes of its own, and 1 at the lower, where all rows say the same.
    """
    each, mean = torch.special.entr(targets).sum(1).mean(), torch.special.entr(targets.mean(0)).sum()
    share = (mean - each) / math.log(max(2, min(targets.shape)))
    return {"target_entropy": each, "mean_target_entropy": mean, "collapse": (1 - share).clamp(0, 1)}


def warmed(ends: tuple[float, float], share: float, step: Step) -> float:
    """From the first to the second of `ends`, linearly over a share of the steps."""
    first, last = ends
    return last if step.progress >= share else first + (last - first) * step.progress / share


# --------------------------------------------------------------------------------------------------------------- views


def with_local_views(batch: Batch, views: Views, config: settings.SelfDistillation, rng: Generator) -> Views:
    """`views` with `local_crops` random-resized crops of the same slices behind them, anywhere in the slice."""
    images, corners, extents = list(views.images), list(views.corners), list(views.extents)
    for _ in range(config.local_crops):
        corner, extent = crops.single(batch["size"], config.local_scale, config.ratio, rng)
        images.append(augment.view(batch["image"], corner, extent, local_side(config), config, rng))
        corners.append(corner)
        extents.append(extent)
    return Views(images, corners, extents, monitors=views.monitors)


def local_side(config: settings.SelfDistillation) -> int:
    """Pixels of a local view: as given, or 3/7 of a global view (the paper: 96 of 224), to a multiple of 8."""
    assert config.side is not None  # or there were no global views
    return config.local_side or max(8, 8 * round(config.side * 3 / 7 / 8))


def by_side(images: Sequence[Tensor]) -> list[Tensor]:
    """The views as they pass through a network: the two global ones as one tensor (2n, …), and the local ones, if any."""
    return [torch.cat(list(part)) for part in (images[:2], images[2:]) if part]


METHOD: type[Method] = DINO
