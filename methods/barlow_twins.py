"""Barlow Twins: the cross-correlation of two views' embeddings should be the identity.

Zbontar, Jing, Misra, LeCun and Deny, "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML 2021,
https://arxiv.org/abs/2103.03230. Section and equation numbers are that paper's.

    x1, x2   two views of a slice                           (n, c, s, s)
    y        feature: mean over the encoder's coarsest map  (n, features)
    z        embedding, columns centred over the batch      (n, d)

    C_ij = Σ_b z1_bi z2_bj / (|z1_·i| |z2_·j|)              eq. 2
    L = Σ_i (1 - C_ii)² + λ Σ_{i≠j} C_ij²                   eq. 1: invariance, redundancy

Centring, norms and sums run over the joint batch of all workers.

Differences from the paper: images are slices, the two views are crops whose IoU lies in `iou` with the chain of a study on
abdominal CT, the encoder is that of a segmentation network. AdamW replaces LARS (sec. 2.2), so the learning rate is not the
paper's, nor are the batch of 2048 and the 1000 epochs. The paper's own is `optimizer=lars`, `lr` 0.2 · batch / 256 and
`bias_lr` 0.024. On the phantom (batch 64, width 8, d 512, one seed) the loss fell from 541 to 307 in 1200 steps of LARS and to
300 of AdamW, but the features' effective rank ended at 1.5 and 3.1; and of three shorter LARS runs one, of 500 steps, ended at
a loss of 537, which nobody has explained. Hence the default.
Transfers: the encoder. The projector is dropped.
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
    redundancy: float = 5e-3  # λ of eq. 1, sec. 2.2
    d: int = 8192  # size of z, sec. 2.2
    hidden: int = 8192  # size of the projector's two hidden layers, sec. 2.2
    bias_lr: float = 1.0  # rate of biases and norms, as a multiple of the weights' (sec. 2.2, for LARS: 0.0048 / 0.2 = 0.024)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.redundancy < 0:
            raise ValueError(f"redundancy is {self.redundancy}: expected at least 0")
        if min(self.d, self.hidden) < 1:
            raise ValueError(f"d is {self.d} and hidden {self.hidden}: expected at least 1")
        if self.bias_lr <= 0:
            raise ValueError(f"bias_lr is {self.bias_lr}: expected more than 0")


@dataclass(frozen=True, kw_only=True)
class Training(settings.Training):
    optimizer: settings.Optimizer = "adamw"  # paper: LARS
    lr: float = 3e-4  # for AdamW at batch 128; not tuned
    weight_decay: float = 1.5e-6  # sec. 2.2
    warmup: float = 0.1  # 10 epochs, sec. 2.2
    end_lr: float = 3e-7  # a thousandth of the peak, sec. 2.2
    epochs: float = 100  # paper: 1000
    batch: int = 128  # paper: 2048
    stop_on_collapse: bool = False  # the loss itself keeps views apart; young features may still look collapsed


class BarlowTwins(nn.Module):
    """Trains `encoder`, whose forward gives maps from the finest to the coarsest and whose `channels` are theirs."""

    def __init__(self, encoder: nn.Module, config: Config | None = None):
        super().__init__()
        self.config = config = config or Config()
        features = cast("tuple[int, ...]", encoder.channels)[-1]
        d, hidden = config.d, config.hidden
        self.encoder = encoder
        self.projector = nn.Sequential(  # sec. 2.2; a bias at the end would be centred away
            nn.Linear(features, hidden, bias=False), JointBatchNorm(hidden), nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden, bias=False), JointBatchNorm(hidden), nn.ReLU(inplace=True),
            nn.Linear(hidden, d, bias=False),
        )  # fmt: skip

    def augment(self, batch: Batch, rng: Generator) -> Views:
        """Two crops of every slice; see `pairs.pair_views`."""
        return pairs.pair_views(batch, self.config, rng, "barlow_twins")

    def loss(self, views: Views, step: Step) -> Loss:
        y1, y2 = (pairs.feature(self.encoder(x)) for x in views.images)
        z1, z2 = self.projector(y1), self.projector(y2)
        # Every worker computes the joint loss from all rows, (N, d): far less to send than matrices of d x d.
        invariance, redundancy = objective(gather.rows(z1)[0], gather.rows(z2)[0])
        # Of z before the loss normalises its columns, which would hide a collapse.
        watched = pairs.health(y1, z1, step)
        return Loss({"invariance": invariance, "redundancy": self.config.redundancy * redundancy}, watched)

    def after_step(self, step: Step) -> None:
        """Nothing follows the optimizer: both views go through the same weights."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Biases and norms, to which LARS gives no trust ratio, have a smaller rate; sec. 2.2."""
        groups = decay_groups(self, weight_decay)
        return [{**group, "lr_scale": self.config.bias_lr if group["exempt"] else 1.0} for group in groups]

    def transferable_state(self) -> dict[str, Tensor]:
        return self.encoder.state_dict()


def objective(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_i (1 - C_ii)² and Σ_{i≠j} C_ij² of eq. 1, from z1, z2 (N, d); in float32. C itself, (d, d), is not formed if N < d."""
    with torch.autocast(z1.device.type, enabled=False):
        a, b = standardised(z1.float()), standardised(z2.float())
        return (1 - (a * b).sum(0)).square().sum(), pairs.off_diagonal_squares(a, b)


def standardised(z: Tensor) -> Tensor:
    """Columns of z (N, d) with mean 0 and length 1, so that aᵀb is their correlation.

    A BatchNorm's 1e-5 joins the variance: a column that does not vary becomes 0 instead of NaN.
    """
    z = z - z.mean(0)
    return z * torch.rsqrt(z.square().mean(0) + 1e-5) / len(z) ** 0.5


METHOD: type[Method] = BarlowTwins
