"""SimSiam: similarity of two views, with a stopped gradient and no negatives.

Chen and He, "Exploring Simple Siamese Representation Learning", CVPR 2021, https://arxiv.org/abs/2011.10566.
Section and equation numbers are that paper's.

    x1, x2   two views of a slice                           (n, c, s, s)
    y        feature: mean over the encoder's coarsest map  (n, features)
    z        projection f(x)                                (n, d)
    p        prediction h(z)                                (n, d)

    D(p, z) = - p/|p| · z/|z|                               eq. 1
    L = D(p1, stop(z2)) / 2 + D(p2, stop(z1)) / 2           eq. 4

Differences from the paper: images are slices, the two views are crops whose IoU lies in `iou`, the encoder is that of a
segmentation network. Interval, augmentation chain and training values are those of a study on abdominal CT,
https://github.com/dittohed/exploring-ssl-for-ct.
Transfers: the encoder. Projector and predictor are dropped.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch.nn.functional as F
from torch import Generator, Tensor, nn

from medssl.methods import gather, pairs, settings
from medssl.methods.gather import JointBatchNorm
from medssl.methods.optimizers import decay_groups
from medssl.methods.protocol import Batch, Loss, Method, Step, Views


@dataclass(frozen=True, kw_only=True)
class Config(settings.PairCrops, settings.Chain):
    d: int = 2048  # size of z and p, sec. 3
    bottleneck: int = 512  # hidden size of the predictor, a quarter of d, sec. 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.d, self.bottleneck) < 1:
            raise ValueError(f"d is {self.d} and bottleneck {self.bottleneck}: expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Training(settings.Training):
    optimizer: settings.Optimizer = "sgd"
    lr: float = 0.025  # at batch 128: the paper's 0.05 · batch / 256
    momentum: float = 0.9
    weight_decay: float = 1e-5  # of the CT study (paper: 1e-4)
    end_lr: float = 1e-6
    epochs: float = 100
    batch: int = 128


class SimSiam(nn.Module):
    """Trains `encoder`, whose forward gives maps from the finest to the coarsest and whose `channels` are theirs."""

    def __init__(self, encoder: nn.Module, config: Config | None = None):
        super().__init__()
        self.config = config = config or Config()
        features = cast("tuple[int, ...]", encoder.channels)[-1]
        d, bottleneck = config.d, config.bottleneck
        self.encoder = encoder
        self.projector = nn.Sequential(  # sec. 3, "Projection MLP"
            nn.Linear(features, d, bias=False), JointBatchNorm(d), nn.ReLU(inplace=True),
            nn.Linear(d, d, bias=False), JointBatchNorm(d), nn.ReLU(inplace=True),
            nn.Linear(d, d, bias=False), JointBatchNorm(d, affine=False),
        )  # fmt: skip
        self.predictor = nn.Sequential(  # sec. 3, "Prediction MLP": no normalisation at its end, table 3
            nn.Linear(d, bottleneck, bias=False), JointBatchNorm(bottleneck), nn.ReLU(inplace=True),
            nn.Linear(bottleneck, d),
        )  # fmt: skip

    def augment(self, batch: Batch, rng: Generator) -> Views:
        """Two crops of every slice, each through its own draw of the chain. Slices that cannot hold a pair are left out."""
        return pairs.pair_views(batch, self.config, rng, "simsiam")

    def loss(self, views: Views, step: Step) -> Loss:
        y1, y2 = (pairs.feature(self.encoder(x)) for x in views.images)
        z1, z2 = self.projector(y1), self.projector(y2)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        similarity = (negative_cosine(p1, z2.detach()) + negative_cosine(p2, z1.detach())) / 2
        # Of p, not z: the projector ends in a BatchNorm without scale, which gives z unit variance over the batch, collapsed or
        # not. Only what comes after (p) or before (y) can show a collapse.
        watched = pairs.health(y1, p1, step)
        return Loss({"similarity": gather.mean(similarity.sum(), len(similarity))}, watched)

    def after_step(self, step: Step) -> None:
        """Nothing follows the optimizer: SimSiam has no teacher."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The predictor keeps the base learning rate, so that it stays ahead of the encoder; sec. 4.2."""
        return [
            *decay_groups(self.encoder, weight_decay),
            *decay_groups(self.projector, weight_decay),
            *decay_groups(self.predictor, weight_decay, fixed_lr=True),
        ]

    def transferable_state(self) -> dict[str, Tensor]:
        return self.encoder.state_dict()


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """D(p, z) of every row: p, z (n, d) to (n,) in [-1, 1], in float32. Rows shorter than 1e-8 count as that long."""
    return -F.cosine_similarity(p.float(), z.float(), dim=1, eps=1e-8)


METHOD: type[Method] = SimSiam
