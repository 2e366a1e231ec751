"""VICReg: views alike, every dimension alive, no two dimensions alike.

Bardes, Ponce and LeCun, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", ICLR 2022,
https://arxiv.org/abs/2105.04906. Section and equation numbers are that paper's.

    x1, x2   two views of a slice                           (n, c, s, s)
    y        feature: mean over the encoder's coarsest map  (n, features)
    z        embedding                                      (n, d)

    v(Z) = mean_j max(0, γ - √(Var(Z_·j) + ε))              eq. 1, 2: variance
    c(Z) = Σ_{i≠j} Cov(Z)_ij² / d                           eq. 3, 4: covariance, with 1 / (n - 1)
    s(Z1, Z2) = mean (Z1 - Z2)²                             eq. 5: invariance
    L = λ s + μ (v(Z1) + v(Z2)) + ν (c(Z1) + c(Z2))         eq. 6

s is the mean over slices and dimensions, as in the paper's algorithm 1, with which its weights go; eq. 5 as printed sums
over dimensions. The two variances are summed as in eq. 6; the authors' code halves them. Var and Cov are those of the joint
batch of all workers.

Differences from the paper: images are slices, the two views are crops whose IoU lies in `iou` with the chain of a study on
abdominal CT, the encoder is that of a segmentation network. LARS and its rate are the paper's (0.2 · batch / 256, sec. 4.2), at
a batch of 128 instead of 2048 and for 100 epochs instead of 1000. `optimizer=adamw` wants a rate of its own, about 3e-4: on the
phantom (batch 64, width 8, d 512, 500 steps, one seed) it took the loss from 39.01 to 38.37, LARS to 38.41.
Transfers: the encoder. The expander is dropped.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from medssl.methods import gather, pairs, settings
from medssl.methods.gather import JointBatchNorm
from medssl.methods.optimizers import decay_groups
from medssl.methods.protocol import Batch, Loss, Method, Step, Views


@dataclass(frozen=True, kw_only=True)
class Config(settings.PairCrops, settings.Chain):
    invariance: float = 25.0  # λ of eq. 6, sec. 4.2
    variance: float = 25.0  # μ
    covariance: float = 1.0  # ν
    gamma: float = 1.0  # deviation every dimension should reach, sec. 4.1
    epsilon: float = 1e-4  # ε of eq. 2, sec. 4.2
    d: int = 8192  # size of z, sec. 4.2
    hidden: int = 8192  # size of the expander's two hidden layers, sec. 4.2

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = (self.invariance, self.variance, self.covariance)
        if min(weights) < 0:
            raise ValueError(f"invariance, variance and covariance are {weights}: expected at least 0")
        if self.gamma <= 0 or self.epsilon <= 0:
            raise ValueError(f"gamma is {self.gamma} and epsilon {self.epsilon}: expected more than 0")
        if min(self.d, self.hidden) < 1:
            raise ValueError(f"d is {self.d} and hidden {self.hidden}: expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Training(settings.Training):
    optimizer: settings.Optimizer = "lars"  # sec. 4.2
    lr: float = 0.1  # at batch 128: 0.2 · batch / 256, sec. 4.2
    weight_decay: float = 1e-6  # sec. 4.2
    warmup: float = 0.1  # 10 epochs, sec. 4.2
    end_lr: float = 1e-4  # a thousandth of the peak, as in the authors' code; sec. 4.2: 0.002 at batch 2048
    epochs: float = 100  # paper: 1000
    batch: int = 128  # paper: 2048
    stop_on_collapse: bool = False  # the loss itself keeps views apart; young features may still look collapsed


class VICReg(nn.Module):
    """Trains `encoder`, whose forward gives maps from the finest to the coarsest and whose `channels` are theirs."""

    def __init__(self, encoder: nn.Module, config: Config | None = None):
        super().__init__()
        self.config = config = config or Config()
        features = cast("tuple[int, ...]", encoder.channels)[-1]
        d, hidden = config.d, config.hidden
        self.encoder = encoder
        self.expander = nn.Sequential(  # sec. 4.2; no term would see a bias at the end
            nn.Linear(features, hidden, bias=False), JointBatchNorm(hidden), nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden, bias=False), JointBatchNorm(hidden), nn.ReLU(inplace=True),
            nn.Linear(hidden, d, bias=False),
        )  # fmt: skip

    def augment(self, batch: Batch, rng: Generator) -> Views:
        """Two crops of every slice; see `pairs.pair_views`."""
        return pairs.pair_views(batch, self.config, rng, "vicreg")

    def loss(self, views: Views, step: Step) -> Loss:
        config = self.config
        y1, y2 = (pairs.feature(self.encoder(x)) for x in views.images)
        z1, z2 = (self.expander(y).float() for y in (y1, y2))
        all1, all2 = gather.rows(z1)[0], gather.rows(z2)[0]  # every worker computes the joint moments
        alive = variance(all1, config.gamma, config.epsilon) + variance(all2, config.gamma, config.epsilon)
        terms = {
            "invariance": config.invariance * gather.mean((z1 - z2).square().sum(), z1.numel()),
            "variance": config.variance * alive,
            "covariance": config.covariance * (covariance(all1) + covariance(all2)),
        }
        # Of z, which ends in a linear layer and so shows a collapse; feature_spread and effective_rank look before the head.
        return Loss(terms, pairs.health(y1, z1, step))

    def after_step(self, step: Step) -> None:
        """Nothing follows the optimizer: both views go through the same weights."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return [*decay_groups(self.encoder, weight_decay), *decay_groups(self.expander, weight_decay)]

    def transferable_state(self) -> dict[str, Tensor]:
        return self.encoder.state_dict()


def variance(z: Tensor, gamma: float, epsilon: float) -> Tensor:
    """v(Z) of eq. 1 for z (N, d): how far the columns' deviations fall short of gamma, on average."""
    return (gamma - (z.var(0) + epsilon).sqrt()).clamp(min=0).mean()


def covariance(z: Tensor) -> Tensor:
    """c(Z) of eq. 4 for z (N, d), in the precision of z. Cov(Z) itself, (d, d), is not formed where N < d."""
    with torch.autocast(z.device.type, enabled=False):
        centred = (z - z.mean(0)) / (len(z) - 1) ** 0.5
        return pairs.off_diagonal_squares(centred, centred) / z.shape[1]


METHOD: type[Method] = VICReg
