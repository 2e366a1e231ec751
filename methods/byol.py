"""BYOL: predict what a slowly moving teacher makes of the other view, without negatives.

Grill et al., "Bootstrap your own latent", NeurIPS 2020, https://arxiv.org/abs/2006.07733. Section and equation numbers are
those of the arXiv version, whose sec. 3.3 is appendix A of the proceedings.

    x, x'    two views of a slice                                     (n, c, s, s)
    y        feature: mean over the encoder's coarsest map            (n, features)
    z        projection g(y)                                          (n, d)
    q        prediction of the teacher's projection of the other view (n, d)

    L(q, z') = |q/|q| - z'/|z'||² = 2 - 2 cos(q, z')                  eq. 2
    L = L(q(x), z'(x')) + L(q(x'), z'(x))                             sec. 3.1; in [0, 8]
    θ' ← m θ' + (1 - m) θ, m = 1 - (1 - m0) (cos(π k / K) + 1) / 2    eq. 1, sec. 3.3

Differences from the paper: images are slices, the two views are crops whose IoU lies in `iou`, both through the chain of
`augment.py` instead of the paper's two unequal ones, and the encoder is that of a segmentation network. A linear layer
before a batch norm has no bias, for the norm removes it, nor have the heads' last layers. LARS and its rate are the paper's
(0.2 · batch / 256, sec. 3.3) at a batch of hundreds, where the paper's is 4096. `optimizer=adamw` wants a rate of its own,
about 3e-4.
Transfers: the student's encoder, the one that the paper keeps (sec. 3.1) and the optimizer trained. The teacher's is a
late average of it, and equal to it at the limit. Projector, predictor and teacher are dropped.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch.nn.functional as F
from torch import Generator, Tensor, nn

from medssl.methods import gather, settings
from medssl.methods.gather import JointBatchNorm
from medssl.methods.optimizers import decay_groups
from medssl.methods.pairs import feature, health, pair_views
from medssl.methods.protocol import Batch, Loss, Method, Step, Views
from medssl.methods.teacher import Teacher, cosine_momentum


@dataclass(frozen=True, kw_only=True)
class Config(settings.PairCrops, settings.Chain):
    d: int = 256  # size of z and q, sec. 3.3
    hidden: int = 4096  # hidden size of projector and predictor, sec. 3.3
    predictor_hidden: int | None = None  # of the predictor alone; None: `hidden` (ACDC study: 8192)
    momentum: float = 0.996  # of the teacher at the first step, from where it rises to 1, sec. 3.3 (SSL-MedSeg on ACDC: 0.99)

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.d, self.hidden) < 1 or (self.predictor_hidden is not None and self.predictor_hidden < 1):
            raise ValueError(
                f"d is {self.d}, hidden {self.hidden} and predictor_hidden {self.predictor_hidden}: expected at least 1"
            )
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum is {self.momentum}: expected 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Training(settings.Training):
    optimizer: settings.Optimizer = "lars"  # sec. 3.3
    lr: float = 0.1  # at batch 128: 0.2 · batch / 256
    weight_decay: float = 1.5e-6  # not on biases and norms, sec. 3.3
    warmup: float = 0.01  # 10 of 1000 epochs
    end_lr: float = 0.0
    epochs: float = 1000
    batch: int = 128  # the paper: 4096


class BYOL(nn.Module):
    """Trains `encoder`, whose forward gives maps from the finest to the coarsest and whose `channels` are theirs."""

    def __init__(self, encoder: nn.Module, config: Config | None = None):
        super().__init__()
        self.config = config = config or Config()
        features = cast("tuple[int, ...]", encoder.channels)[-1]
        self.encoder = encoder
        self.projector = head(features, config.hidden, config.d)
        self.predictor = head(config.d, config.predictor_hidden or config.hidden, config.d)
        self.teacher_encoder = Teacher(encoder)
        self.teacher_projector = Teacher(self.projector)

    def augment(self, batch: Batch, rng: Generator) -> Views:
        """Two crops of every slice, each through its own draw of the chain. Slices that cannot hold a pair are left out."""
        return pair_views(batch, self.config, rng, "byol")

    def loss(self, views: Views, step: Step) -> Loss:
        y1, y2 = (feature(self.encoder(x)) for x in views.images)
        q1, q2 = (self.predictor(self.projector(y)) for y in (y1, y2))
        t1, t2 = (self.teacher_projector(feature(self.teacher_encoder(x))) for x in views.images)
        regression = distance(q1, t2) + distance(q2, t1)
        return Loss({"regression": gather.mean(regression.sum(), len(regression))}, health(y1, q1, step))

    def after_step(self, step: Step) -> None:
        """The teacher follows the student."""
        momentum = cosine_momentum(self.config.momentum, step)
        self.teacher_encoder.update(self.encoder, momentum)
        self.teacher_projector.update(self.projector, momentum)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The student and its predictor; the teacher asks for no gradient."""
        return decay_groups(self, weight_decay)

    def transferable_state(self) -> dict[str, Tensor]:
        return self.encoder.state_dict()


def head(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """The shape of projector and predictor; sec. 3.3."""
    return nn.Sequential(
        nn.Linear(inputs, hidden, bias=False), JointBatchNorm(hidden), nn.ReLU(inplace=True),
        nn.Linear(hidden, outputs, bias=False),
    )  # fmt: skip


def distance(q: Tensor, z: Tensor) -> Tensor:
    """2 - 2 cos of every row: q, z (n, d) to (n,) in [0, 4], in float32. Rows shorter than 1e-8 count as that long."""
    return 2 - 2 * F.cosine_similarity(q.float(), z.float(), dim=1, eps=1e-8)


METHOD: type[Method] = BYOL
