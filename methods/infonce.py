"""InfoNCE with meta-labels, self-paced: slices that share a partition, a patient or a phase attract, the easy pairs first.

Peng, Wang, Pedersoli and Desrosiers, "Self-paced contrastive learning for semi-supervised medical image segmentation with
meta-labels", NeurIPS 2021, https://arxiv.org/abs/2107.13741; the loss is that of Khosla et al., "Supervised contrastive
learning", NeurIPS 2020, https://arxiv.org/abs/2004.11362, and with every slice its own label that of SimCLR.

    z      head of the pooled coarsest map, of both views of n slices of all workers, length 1                (2n, d)
    s_ij   z_i · z_j / τ
    P(i)   rows of i's meta-label, i itself left out
    l_ij   - s_ij + ln Σ_{a ≠ i} exp s_ia
           rivals "negatives": j, and the rows of other labels, whose sum is brought to that of all rows but i
    w_ij   hard: 1 where l_ij ≤ γ, else 0               soft: max(1 - l_ij / γ, 0)                         without gradient
    γ      b + (e - b) t^p, t the progress in [0, 1)
    L      Σ over meta-labels of λ · mean over i of 1/|P(i)| Σ_{j in P(i)} w_ij l_ij

Meta-labels: the partition of the volume that a slice lies in, the patient, the phase of the cycle (end diastole and end
systole; slices of volumes that name no phase, such as ACDC's other frames, take no part in that term), and `self`.
`pace="none"` has w = 1. `corrected` divides a term by the mean of its w over the positive pairs, so that its scale does not
grow with γ. γ steps with every step, there with every epoch.

Defaults are the pretraining of the published code (https://github.com/jizongFox/Self-paced-Contrastive-Learning), its
partition and patient terms at 1 and 0.1, with soft pace from 5 to 60 and the views of `simsiam.py`.
In 3D an element is a volume, its position that of the middle of its first view. Transfers: the encoder; the head is dropped.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from medssl.methods import gather, pairs, settings
from medssl.methods.global_contrast import ROUNDING
from medssl.methods.global_contrast import partition as equal_parts
from medssl.methods.optimizers import decay_groups
from medssl.methods.protocol import Batch, Loss, Method, Step, Views

FAR = -1e9  # a similarity that counts for nothing
FEW = 1e-4  # added to the share of negatives, as published


@dataclass(frozen=True, kw_only=True)
class Config(settings.PairCrops, settings.Chain):
    iou: tuple[float, float] | None = None  # two crops anywhere
    crop: Literal["fixed", "resized"] = "resized"
    scale: tuple[float, float] = (0.4, 1.0)  # most of the slice, whose height the meta-label tells
    labels: tuple[Literal["partition", "patient", "cycle", "self"], ...] = ("partition", "patient")
    shares: tuple[float, ...] = (1.0, 0.1)  # λ of each
    temperature: float = 0.07  # τ
    rivals: Literal["all", "negatives"] = "all"
    partitions: int = 3
    partition: Literal["equal", "thirds", "blocks"] = "equal"  # see `by_height`
    hidden: int = 256
    d: int = 256
    pace: Literal["soft", "hard", "none"] = "soft"
    gamma: tuple[float, float] = (5.0, 60.0)  # b and e
    power: float = 0.5  # p
    corrected: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.labels or len(self.shares) != len(self.labels) or min(self.shares) < 0:
            raise ValueError(
                f"labels are {self.labels} with the shares {self.shares}: expected a weight of at least 0 for each"
            )
        if min(self.temperature, self.partitions, self.hidden, self.d, self.power, *self.gamma) <= 0:
            raise ValueError("expected temperature, partitions, hidden, d, power and gamma above 0")
        if self.partition == "thirds" and self.partitions != 3:
            raise ValueError(f"partition is thirds and partitions {self.partitions}: expected 3")


@dataclass(frozen=True, kw_only=True)
class Training(settings.Training):
    steps: int | None = 16_000  # 80 epochs of 200
    optimizer: settings.Optimizer = "adam"  # there RAdam, with a warm-up of 10 epochs
    lr: float = 2e-4
    end_lr: float = 1e-7
    warmup: float = 10 / 80
    weight_decay: float = 0.0
    batch: int = 30  # there 10 volumes x 3 partitions


class InfoNCE(nn.Module):
    """Trains `encoder`, whose forward gives maps from the finest to the coarsest and whose `channels` are theirs."""

    def __init__(self, encoder: nn.Module, config: Config | None = None):
        super().__init__()
        self.config = config = config or Config()
        self.encoder = encoder
        self.head = head(cast("tuple[int, ...]", encoder.channels)[-1], config.hidden, config.d)

    def augment(self, batch: Batch, rng: Generator) -> Views:
        """Two crops of every slice, and what its slice shares with others."""
        held, views = pairs.held_views(batch, self.config, rng, "infonce")
        groups = {key: held[key] for key in ("position", "depth", "patient", "phase") if key in held}
        if held["size"].shape[1] == 3:
            middle = views.corners[0][:, 2] + views.extents[0][:, 2] / 2
            groups |= {"position": middle / held["size"][:, 2], "depth": held["size"][:, 2]}
        return replace(views, groups=groups)

    def loss(self, views: Views, step: Step) -> Loss:
        config = self.config
        maps = [self.encoder(image) for image in views.images]
        z = [self.head(pairs.feature(each)) for each in maps]
        joint = [gather.rows(each)[0] for each in z]
        terms, monitors = dict[str, Tensor](), dict[str, Tensor]()
        for kind, share in zip(config.labels, config.shares, strict=True):
            label = meta_label(kind, views.groups, len(z[0]), config.partitions, config.partition)
            each, positives = contrast(joint, gather.rows(label)[0], config.temperature, config.rivals)
            weights = paced(each, config.pace, gamma(config.gamma, config.power, step.progress))
            terms[kind] = share * averaged(each, positives, weights, config.corrected)
            monitors[f"{kind}/weight"] = mean_weight(weights, positives)
            if kind == "cycle":
                monitors["cycle/known"] = (label >= 0).float().mean()
        return Loss(terms, monitors | pairs.health(pairs.feature(maps[0]), z[0], step))

    def after_step(self, step: Step) -> None:
        """Nothing follows the optimizer."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return decay_groups(self, weight_decay)

    def transferable_state(self) -> dict[str, Tensor]:
        return self.encoder.state_dict()


def head(channels: int, hidden: int, d: int) -> nn.Sequential:
    """Features (*, channels) to z (*, d)."""
    return nn.Sequential(nn.Linear(channels, hidden), nn.LeakyReLU(0.01), nn.Linear(hidden, d))


# ------------------------------------------------------------------------------------------------------------ meta-labels


def by_height(position: Tensor, depth: Tensor | None, partitions: int, rule: Literal["equal", "thirds", "blocks"]) -> Tensor:
    """Which part of its volume each slice lies in, (n,) int64 from 0.

    position   (n,) 0 at the lowest slice of the volume, 1 at the highest
    depth      (n,) slices of the volume; "equal" does without
    rule       "equal": parts of equal height; the published code has "thirds" for hearts and hippocampi (with a third of n
               slices c, rounded down: c, c + 1, and the rest) and else "blocks" of ⌊n / P⌋ + 1 slices, maybe fewer than P
    Raises ValueError where the rule counts slices and `depth` is not known.
    """
    if rule == "equal":
        return equal_parts(position, partitions)
    if depth is None:
        raise ValueError(f'partition "{rule}" counts the slices of a volume, which these batches do not tell; use "equal"')
    index = (position * (depth - 1) + ROUNDING).round().long()
    if rule == "blocks":
        return index // (depth // partitions + 1)
    third = depth // 3
    return (index >= third).long() + (index > 2 * third).long()


def meta_label(
    kind: str,
    groups: Mapping[str, Tensor],
    count: int,
    partitions: int = 3,
    rule: Literal["equal", "thirds", "blocks"] = "equal",
) -> Tensor:
    """The meta-label of each of `count` crops, (count,) int64; -1: a phase that is not known.

    Raises ValueError when the batch does not tell it.
    """
    if kind == "self":
        device = next(iter(groups.values())).device if groups else torch.device("cpu")
        own = torch.arange(count, device=device)
        return own + gather.rows(own.float()[:, None])[1]
    source = {"partition": "position", "patient": "patient", "cycle": "phase"}[kind]
    if source not in groups:
        raise ValueError(
            f'the meta-label "{kind}" needs each slice\'s {source}, which these batches do not carry; choose another'
        )
    if kind == "partition":
        return by_height(groups["position"], groups.get("depth"), partitions, rule)
    return groups[source]


# ------------------------------------------------------------------------------------------------------------------- loss


def contrast(
    z: list[Tensor], label: Tensor, temperature: float, rivals: Literal["all", "negatives"] = "all", known: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """l_ij and which pairs are positive, (v n, v n) each, in float32 at least.

    z       v views (n, d) of the same rows, of any length
    label   (n,) int64; a row below 0 takes no part
    known   (n,) bool rows that take part besides; None: all
    """
    with torch.autocast(label.device.type, enabled=False):
        rows = torch.cat([F.normalize(each if each.dtype == torch.float64 else each.float(), dim=1) for each in z])
        s = rows @ rows.T / temperature
        takes_part = (label >= 0 if known is None else known & (label >= 0)).repeat(len(z))
        label = label.repeat(len(z))
        same = label[:, None] == label
        other = ~torch.eye(len(s), dtype=torch.bool, device=s.device) & takes_part & takes_part[:, None]
        positives = same & other
        if rivals == "all":
            return s.masked_fill(~other, FAR).logsumexp(1, keepdim=True) - s, positives
        negatives = other & ~same
        share = negatives.sum(1, keepdim=True) / other.sum(1, keepdim=True).clamp(min=1) + FEW
        total = s.masked_fill(~negatives, FAR).logsumexp(1, keepdim=True) - share.log()
        return F.softplus(total - s), positives


def gamma(ends: tuple[float, float], power: float, progress: float) -> float:
    """γ at a fraction of the training."""
    return ends[0] + (ends[1] - ends[0]) * progress**power


def paced(each: Tensor, pace: Literal["soft", "hard", "none"], gamma: float) -> Tensor | None:
    """w of l, without gradient; None: 1."""
    if pace == "none":
        return None
    loss = each.detach()
    return (loss <= gamma).to(loss.dtype) if pace == "hard" else (1 - loss / gamma).clamp(min=0)


def mean_weight(weights: Tensor | None, positives: Tensor) -> Tensor:
    """The mean of w over positive pairs, ()."""
    if weights is None:
        return torch.ones((), device=positives.device)
    return (weights * positives).sum() / positives.sum().clamp(min=1)


def averaged(each: Tensor, positives: Tensor, weights: Tensor | None = None, corrected: bool = False) -> Tensor:
    """L of one meta-label, (); rows without a positive are left out.

    corrected   divided by the mean weight where that is not 0
    """
    weighted = each if weights is None else weights * each
    count = positives.sum(1)
    per_row = torch.where(positives, weighted, 0).sum(1) / count.clamp(min=1)
    loss = per_row.sum() / (count > 0).sum().clamp(min=1)
    if corrected:
        share = mean_weight(weights, positives)
        loss = loss / torch.where(share > 0, share, 1)
    return loss


METHOD: type[Method] = InfoNCE
