"""SimCLR: each view finds its partner among the views of all other slices.

Chen, Kornblith, Norouzi and Hinton, "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020,
https://arxiv.org/abs/2002.05709. Section and equation numbers are that paper's.

    x1, x2   two views of a slice                           (n, c, s, s)
    y        feature: mean over the encoder's coarsest map  (2n, features), the paper's h
    z        projection g(y), on the unit sphere            (2n, d)

    l(i, j) = - log exp(z_i · z_j / τ) / Σ_{k≠i} exp(z_i · z_k / τ)     eq. 1, NT-Xent
    L = mean of l(i, j) over both orders of the N pairs                  algorithm 1

Negatives are the other 2N - 2 views of the joint batch, of all workers.

Differences from the paper: images are slices, the two views are crops whose IoU lies in `iou` with the chain of a study on
abdominal CT, the encoder is that of a segmentation network; slices of one volume are negatives of each other. LARS and its
rate are the paper's (0.3 · batch / 256, sec. 2.3), at a batch of 128 instead of 4096; for small batches its appendix B.1
recommends 0.075 · √batch, 0.85 here. `optimizer=adamw` wants a rate of its own, about 3e-4. The hidden layer of the head is
batch-normalised as in the authors' code; its end is not, unlike there, so that the monitor of z can see a collapse.
Transfers: the encoder. The projector is dropped.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from medssl.methods import gather, pairs, settings
from medssl.methods.gather import JointBatchNorm
from medssl.methods.optimizers import decay_groups
from medssl.methods.protocol import Batch, Loss, Method, Step, Views


@dataclass(frozen=True, kw_only=True)
class Config(settings.PairCrops, settings.Chain):
    temperature: float = 0.1  # τ; table 5, the best on ImageNet
    d: int = 128  # size of z, sec. 2.3
    hidden: int | None = None  # hidden size of the head; None: that of the features, as in the authors' code

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}: expected more than 0")
        if self.d < 1 or (self.hidden is not None and self.hidden < 1):
            raise ValueError(f"d is {self.d} and hidden {self.hidden}: expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Training(settings.Training):
    optimizer: settings.Optimizer = "lars"  # sec. 2.2
    lr: float = 0.15  # at batch 128: 0.3 · batch / 256, sec. 2.3
    weight_decay: float = 1e-6  # sec. 2.3
    warmup: float = 0.1  # 10 of 100 epochs, sec. 2.3
    end_lr: float = 0.0
    epochs: float = 100  # sec. 2.3
    batch: int = 128  # paper: 4096
    stop_on_collapse: bool = False  # the loss itself keeps views apart; young features may still look collapsed


class SimCLR(nn.Module):
    """Trains `encoder`, whose forward gives maps from the finest to the coarsest and whose `channels` are theirs."""

    def __init__(self, encoder: nn.Module, config: Config | None = None):
        super().__init__()
        self.config = config = config or Config()
        features = cast("tuple[int, ...]", encoder.channels)[-1]
        hidden = config.hidden or features
        self.encoder = encoder
        self.projector = nn.Sequential(  # sec. 2.1: W2 ReLU(W1 h)
            nn.Linear(features, hidden, bias=False), JointBatchNorm(hidden), nn.ReLU(inplace=True),
            nn.Linear(hidden, config.d, bias=False),
        )  # fmt: skip

    def augment(self, batch: Batch, rng: Generator) -> Views:
        """Two crops of every slice; see `pairs.pair_views`."""
        return pairs.pair_views(batch, self.config, rng, "simclr")

    def loss(self, views: Views, step: Step) -> Loss:
        n = len(views.images[0])
        y = pairs.feature(self.encoder(torch.cat(views.images)))  # both views in one pass: joint statistics
        z = self.projector(y)
        logits, partners = similarities(z[:n], z[n:], self.config.temperature)
        contrast = gather.mean(F.cross_entropy(logits, partners, reduction="sum"), 2 * n)
        found = (logits.detach().argmax(1) == partners).float().sum()
        # Of z, which ends in a linear layer and so shows a collapse. The BatchNorm inside the head hides what happened
        # before it: there feature_spread and effective_rank look.
        watched = pairs.health(y[:n], z[:n], step) | {"accuracy": gather.mean(found, 2 * n)}
        return Loss({"contrast": contrast}, watched)

    def after_step(self, step: Step) -> None:
        """Nothing follows the optimizer: negatives come from the batch, not from a queue."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return [*decay_groups(self.encoder, weight_decay), *decay_groups(self.projector, weight_decay)]

    def transferable_state(self) -> dict[str, Tensor]:
        return self.encoder.state_dict()


def similarities(z1: Tensor, z2: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cosines over τ of this worker's views with everybody's, and which column is the partner of each row.

    z1, z2   (n, d): row i of one and row i of the other are views of one slice
    Returns logits (2n, 2N) float32, -inf where a view meets itself, and partners (2n,) int64. Rows are z1, then z2; columns
    are the z1 of all workers, then their z2. Cross-entropy of the two is eq. 1.
    """
    with torch.autocast(z1.device.type, enabled=False):  # the 8 bits of a bfloat16 are 0.04 in a logit of 1/τ = 10
        z1, z2 = F.normalize(z1.float(), dim=1), F.normalize(z2.float(), dim=1)
        (all1, first), (all2, _) = gather.rows(z1), gather.rows(z2)
        logits = torch.cat([z1, z2]) @ torch.cat([all1, all2]).T / temperature
    own = torch.arange(first, first + len(z1), device=z1.device)
    themselves, partners = torch.cat([own, own + len(all1)]), torch.cat([own + len(all1), own])
    return logits.scatter(1, themselves[:, None], -torch.inf), partners


METHOD: type[Method] = SimCLR
