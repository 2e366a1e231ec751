"""MoCo v2: find a view's partner among a long queue of other slices, all seen by a slowly moving encoder.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020, https://arxiv.org/abs/1911.05722
(v1; section and equation numbers are that paper's), with the head and temperature of Chen et al., "Improved Baselines with
Momentum Contrastive Learning", 2020, https://arxiv.org/abs/2003.04297 (v2).

    xq, xk   two views of a slice                                            (n, c, s, s)
    q        query: the student's head of the mean over the coarsest map, unit length    (n, d)
    k        key: the same by the teacher, of the other view                 (n, d)
    queue    the last K keys of earlier steps                                (K, d)

    L = - log( exp(q·k/τ) / (exp(q·k/τ) + Σ_i exp(q·queue_i/τ)) )            eq. 1
    θ' ← m θ' + (1 - m) θ                                                    eq. 2

The queue starts as random unit vectors and receives the keys of all workers after each step, oldest out first. On few
slices a queue longer than the data holds every slice several times, each one's own old keys among its negatives; then
choose one shorter than the data.

Shuffling (sec. 3.3) is left out. It hides that a positive key shares the statistics of its batch norms with the query's
batch, which the queue's keys do not. Instance and group norm (the U-Net's default, and the head, which has no norm) compute
nothing across slices and have nothing to hide. For an encoder with batch norm, `gather.JointBatchNorm` makes the statistics
those of the joint batch, larger and equal on all workers, which weakens the sign but does not remove it.

Differences from the paper: images are slices, the two views are crops whose IoU lies in `iou`, through the chain of
`augment.py`, the encoder is that of a segmentation network, and weight decay spares biases and norms.
Transfers: the student's encoder, the query encoder that the paper transfers. Head, teacher and queue are dropped.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from medssl.methods import gather, settings
from medssl.methods.optimizers import decay_groups
from medssl.methods.pairs import feature, health, pair_views
from medssl.methods.protocol import Batch, Loss, Method, Step, Views
from medssl.methods.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Config(settings.PairCrops, settings.Chain):
    d: int = 128  # size of q and k, v1 sec. 3.3
    hidden: int = 2048  # hidden size of the head, v2 sec. 3
    queue: int = 65536  # K, v1 sec. 4.1
    momentum: float = 0.999  # m, v1 sec. 3.2
    temperature: float = 0.2  # τ, v2 sec. 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.d, self.hidden, self.queue) < 1:
            raise ValueError(f"d is {self.d}, hidden {self.hidden} and queue {self.queue}: expected at least 1")
        if not 0 <= self.momentum <= 1 or self.temperature <= 0:
            raise ValueError(
                f"momentum is {self.momentum} and temperature {self.temperature}: expected 0 to 1, and more than 0"
            )


@dataclass(frozen=True, kw_only=True)
class Training(settings.Training):
    optimizer: settings.Optimizer = "sgd"
    lr: float = 0.03  # at batch 256
    momentum: float = 0.9
    weight_decay: float = 1e-4
    end_lr: float = 0.0  # v2: a cosine
    epochs: float = 200
    batch: int = 256
    stop_on_collapse: bool = False  # the loss itself keeps views apart; young features may still look collapsed


class MoCo(nn.Module):
    """Trains `encoder`, whose forward gives maps from the finest to the coarsest and whose `channels` are theirs."""

    queue: Tensor  # (K, d) float32, rows of unit length; a ring
    oldest: Tensor  # () int64: the row that the next key replaces

    def __init__(self, encoder: nn.Module, config: Config | None = None):
        super().__init__()
        self.config = config = config or Config()
        features = cast("tuple[int, ...]", encoder.channels)[-1]
        self.encoder = encoder
        self.head = nn.Sequential(  # v2, sec. 3
            nn.Linear(features, config.hidden), nn.ReLU(inplace=True),
            nn.Linear(config.hidden, config.d),
        )  # fmt: skip
        self.teacher_encoder = Teacher(encoder)
        self.teacher_head = Teacher(self.head)
        self.register_buffer("queue", F.normalize(torch.randn(config.queue, config.d), dim=1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))
        self._keys: list[Tensor] = []  # of this step's micro-batches, until `after_step`: empty between steps

    def augment(self, batch: Batch, rng: Generator) -> Views:
        """Two crops of every slice, each through its own draw of the chain. Slices that cannot hold a pair are left out."""
        return pair_views(batch, self.config, rng, "moco")

    def loss(self, views: Views, step: Step) -> Loss:
        xq, xk = views.images
        y = feature(self.encoder(xq))
        q = F.normalize(self.head(y).float(), dim=1)
        k = F.normalize(self.teacher_head(feature(self.teacher_encoder(xk))).float(), dim=1)
        if self.training:
            self._keys.append(k)
        logits = compare(q, k, self.queue, self.config.temperature)
        contrast = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device), reduction="sum")
        found = (logits.detach().argmax(1) == 0).float().mean()  # share of queries nearest to their own key
        return Loss({"contrast": gather.mean(contrast, len(q))}, health(y, q, step) | {"found": found})

    def after_step(self, step: Step) -> None:
        """The teacher follows the student, and the keys of all workers enter the queue."""
        self.teacher_encoder.update(self.encoder, self.config.momentum)
        self.teacher_head.update(self.head, self.config.momentum)
        keys, _ = gather.rows(torch.cat([self.queue[:0], *self._keys]))
        self._keys.clear()
        self.enqueue(keys)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest rows of the queue by `keys` (n, d), in order, around its end; of more than K the last K."""
        keys = keys[-len(self.queue) :]
        rows = (self.oldest + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[rows] = keys
        self.oldest.add_(len(keys)).remainder_(len(self.queue))

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The student; the teacher asks for no gradient."""
        return decay_groups(self, weight_decay)

    def transferable_state(self) -> dict[str, Tensor]:
        return self.encoder.state_dict()


def compare(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Logits of eq. 1, (n, 1 + K) in float32: each query's own key, then the queue. q, k (n, d), queue (K, d)."""
    with torch.autocast(q.device.type, enabled=False):  # half precision would round cosines to 1/256
        return torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / temperature


METHOD: type[Method] = MoCo
