"""IIC: the cluster that one view of a slice belongs to tells the cluster of the other, and clusters are equally large.

Ji, Henriques and Vedaldi, "Invariant information clustering", ICCV 2019, https://arxiv.org/abs/1807.06653; as a pretraining of
segmentation in Peng et al., "Boundary-aware information maximization", Medical Image Analysis 2024,
https://arxiv.org/abs/2202.02371, whose target between P and a diagonal (`hooks/redundancy_reduction.py`) is `alpha` above 0.

    x, y   clusters of the pooled coarsest map of two views, S heads                 (S, n, K)
    P      their joint probability over the slices of all workers, symmetric         (S, K, K)
    L      mean over heads of - Σ P [ln P - λ ln P_i - λ ln P_j]                     λ = 1: minus the mutual information

The least it can be is -ln K, the most 0. Few slices say little of K² numbers: take batches well above K. In Contrast-You's raw
runs on ACDC this pretraining is worse than none (a Dice of 0.69 against 0.76), while the same term beside labels helps
(`hooks/mutual_information.py`): it is here as a control.

It begins near a saddle, where all clusters are as likely as each other, and leaves it along the one direction in which features
differ most; only later do clusters part further. On the phantom (U-Net of width 16 with batch norm, batch 64, AdamW 1e-3, one
seed) the linear probe of the frozen encoder fell from a Dice of 0.317 to 0.222 in 50 steps, the effective rank from 2.2 to 1.5;
a run of 200 steps ended at 0.242 and 0.35 of 3.0 nats, one of 600 at 0.334 and 1.1 nats. Fewer steps tell nothing of it.

Differences from the papers: the views are those of `simsiam.py`; no second set of heads for over-clustering. K = 20, S = 5 and
linear heads are Contrast-You's (https://github.com/jizongFox/Contrast-You). Transfers: the encoder. The heads are dropped.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from medssl.methods import clusters, pairs, settings
from medssl.methods.optimizers import decay_groups
from medssl.methods.protocol import Batch, Loss, Method, Step, Views


@dataclass(frozen=True, kw_only=True)
class Config(settings.PairCrops, settings.Chain):
    clusters: int = 20  # K
    heads: int = 5  # S
    hidden: int | None = None  # hidden size of a head; None: it is linear
    balance: float = 1.0  # λ
    alpha: float = 0.0  # share of the diagonal in the target

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters < 2 or self.heads < 1 or self.balance <= 0 or not 0 <= self.alpha <= 1:
            raise ValueError("expected clusters of at least 2, heads of at least 1, balance above 0 and alpha in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class Training(settings.Training):
    steps: int | None = 15_000  # 50 epochs of 300
    optimizer: settings.Optimizer = "adam"
    lr: float = 2e-4
    end_lr: float = 1e-7
    warmup: float = 10 / 50
    weight_decay: float = 0.0
    batch: int = 128
    stop_on_collapse: bool = False  # clusters are kept apart by the loss, features need not be


class IIC(nn.Module):
    """Trains `encoder`, whose forward gives maps from the finest to the coarsest and whose `channels` are theirs."""

    def __init__(self, encoder: nn.Module, config: Config | None = None):
        super().__init__()
        self.config = config = config or Config()
        self.encoder = encoder
        features = cast("tuple[int, ...]", encoder.channels)[-1]
        self.head = clusters.Clusters(features, config.clusters, config.heads, config.hidden)

    def augment(self, batch: Batch, rng: Generator) -> Views:
        """Two crops of every slice, each through its own draw of the chain. Slices that cannot hold a pair are left out."""
        return pairs.pair_views(batch, self.config, rng, "iic")

    def loss(self, views: Views, step: Step) -> Loss:
        features = [pairs.feature(self.encoder(image)) for image in views.images]
        x, y = (self.head(each) for each in features)
        p = clusters.joint(x, y)
        if self.config.alpha:
            each = clusters.reduced(p, self.config.alpha, self.config.balance)
        else:
            each = clusters.negative_information(p, self.config.balance)
        shares = p.sum(-1).detach()
        used = torch.exp(-(shares * (shares + 1e-10).log()).sum(-1)).mean()  # how many clusters, as a perplexity
        return Loss({"information": each.mean()}, {"clusters": used} | pairs.feature_health(features[0], step))

    def after_step(self, step: Step) -> None:
        """Nothing follows the optimizer."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return decay_groups(self, weight_decay)

    def transferable_state(self) -> dict[str, Tensor]:
        return self.encoder.state_dict()


METHOD: type[Method] = IIC
