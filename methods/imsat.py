"""IMSAT: every pixel is surely of one cluster, all clusters are used, and the moved image says the same.

Hu, Miyato, Tokui, Matsumoto and Sugiyama, "Learning discrete representations via information maximizing self-augmented
training", ICML 2017, https://arxiv.org/abs/1702.08720; of the decoder's cells it is an alternative in Contrast-You
(https://github.com/jizongFox/Contrast-You) to the redundancy reduction of `boundary_aware.py`.

    x, T x   a crop and the crop moved (`dense.py`)                                                  (n, c, s, s)
    q        clusters of every cell of the decoder's map, of x and of T x, S heads                   (S, n, K, *)
    L        mean over heads of  - Σ_k T q_k(x) ln q_k(T x)  + λ [H(q) - μ H(mean of q)]             T q(x) without gradient

The first is the mean over the cells that T x shows; the entropies, in nats, are means over both views, H(q) over cells. λ = 0.1
and μ = 4 are the paper's. Differences from it: q is of cells, not of images; T is a draw of the chain of `simsiam.py` and no
adversarial perturbation; q of x, and not an earlier network's, is the target; no constraint holds the shares of clusters near
a prior. K = 40 and three linear heads, and the schedule, are those of `boundary_aware.py`.
Transfers: the encoder and the decoder. The heads are dropped.
"""

from dataclasses import dataclass

import torch
from torch import Generator, nn

from medssl.methods import agreement, clusters, settings
from medssl.methods.augment import Pair
from medssl.methods.dense import Dense
from medssl.methods.hooks.information_maximisation import entropies
from medssl.methods.hooks.mutual_information import moved
from medssl.methods.protocol import Loss, Method, Step
from medssl.methods.segment import Drawn, Pass, initial
from medssl.methods.taps import Taps, channels

TRANSFERS = "encoder+decoder"


@dataclass(frozen=True, kw_only=True)
class Config(settings.Dense):
    clusters: int = 40  # K
    heads: int = 3  # S
    information: float = 0.1  # λ
    balance: float = 4.0  # μ

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters < 2 or self.heads < 1 or min(self.information, self.balance) <= 0:
            raise ValueError("expected clusters of at least 2, heads of at least 1, information and balance above 0")


@dataclass(frozen=True, kw_only=True)
class Training(settings.Training):
    steps: int | None = 15_000  # 50 epochs of 300
    optimizer: settings.Optimizer = "adam"
    lr: float = 2e-4
    end_lr: float = 1e-7
    warmup: float = 10 / 50
    weight_decay: float = 0.0
    batch: int = 18
    stop_on_collapse: bool = False  # clusters are kept apart by the loss, features need not be


class Term(nn.Module):
    """The loss, in the form of a hook on the decoder."""

    predictor = None

    def __init__(self, network: nn.Module, config: Config):
        super().__init__()
        self.config = config
        self.taps = Taps(network, ["decoder"])
        with initial("imsat"):
            self.head = clusters.Clusters(channels(network, "decoder"), config.clusters, config.heads)

    def draw(self, pair: Pair, rng: Generator) -> Drawn:
        return {}

    def terms(self, pass_: Pass, drawn: Drawn, step: Step) -> Loss:
        x, y = (self.head(self.taps.taken(logits)["decoder"]) for logits in (pass_.image, pass_.moved))
        sides = y.shape[3:]
        inside, valid = (clusters.within(mask, sides) for mask in (pass_.pair.inside, pass_.pair.valid))
        log_x, log_y = (q.clamp_min(agreement.TINY).log() for q in (x, y))
        apart = -(moved(x.detach(), pass_) * log_y).sum(2)
        same = torch.stack([agreement.average(head, valid) for head in apart]).mean()
        each = [entropies(q, shown) for log_q, shown in ((log_x, inside), (log_y, valid)) for q in log_q]
        sure, used = (torch.stack(of).mean() for of in zip(*each, strict=True))
        information = self.config.information * (sure - self.config.balance * used)
        return Loss({"agreement": same, "information": information}, {"sure": sure.detach(), "used": used.detach()})

    def after_step(self, network: nn.Module, step: Step) -> None:
        pass


class IMSAT(Dense):
    def __init__(self, network: nn.Module, config: Config | None = None):
        config = config or Config()
        super().__init__(network, Term(network, config), config)  # type: ignore[arg-type]  # a hook but for its weight


METHOD: type[Method] = IMSAT
