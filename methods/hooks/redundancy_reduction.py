"""Redundancy reduction: mutual information whose target lies between what the clusters say and a diagonal.

Peng, Wang, Chen, Pedersoli and Desrosiers, "Boundary-aware information maximization for self-supervised medical image
segmentation", Medical Image Analysis 2024, https://arxiv.org/abs/2202.02371; its regularised information, which ends where
Zbontar et al., "Barlow Twins", ICML 2021, https://arxiv.org/abs/2103.03230, stands.

    P     joint probability of clusters of T features(x) and of features(T x), of every cell     (S, K, K), see `clusters.py`
    Q     α I / K + (1 - α) P
    L     mean over heads of  - Σ Q ln(P + e) + λ Σ P (ln(P_i + e) + ln(P_j + e)),   e = 1e-5

α = 0 is minus the mutual information (IIC), α = 1 asks for P = I / K alone. The gradient runs through Q, as in the published
code (https://github.com/jizongFox/Contrast-You), where α = 0 has the gradient of mutual information; `attached=false` holds Q
like a target. K = 40, three linear heads, α = 0.5 and λ = 1 on the map under the logits are those of the experiments.
As a hook on unlabelled crops it stands beside the supervised loss; the paper pretrains with it. Transfers: nothing of its own.
"""

from dataclasses import dataclass

from torch import Generator, nn

from medssl.methods import clusters, settings
from medssl.methods.augment import Pair
from medssl.methods.hooks.mutual_information import moved
from medssl.methods.protocol import Loss, Step
from medssl.methods.ramps import weight
from medssl.methods.segment import Drawn, Hook, Pass, initial
from medssl.methods.taps import Taps, channels


@dataclass(frozen=True, kw_only=True)
class Config(settings.Hook):
    weight: float = 0.1
    layer: str = "decoder"  # a module of the network
    clusters: int = 40  # K
    heads: int = 3  # S
    hidden: int | None = None  # hidden size of a head; None: it is linear
    alpha: float = 0.5  # α
    balance: float = 1.0  # λ
    attached: bool = True  # the gradient runs through Q

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1 or self.clusters < 2 or self.heads < 1 or self.balance <= 0:
            raise ValueError("expected alpha from 0 to 1, clusters of at least 2, heads of at least 1 and balance above 0")


class RedundancyReduction(nn.Module):
    predictor = None

    def __init__(self, network: nn.Module, config: Config):
        super().__init__()
        self.config = config
        self.taps = Taps(network, [config.layer])
        with initial("redundancy_reduction"):
            c = channels(network, config.layer)
            self.head = clusters.Clusters(c, config.clusters, config.heads, config.hidden)

    def draw(self, pair: Pair, rng: Generator) -> Drawn:
        return {}

    def terms(self, pass_: Pass, drawn: Drawn, step: Step) -> Loss:
        config = self.config
        x, y = (self.head(self.taps.taken(logits)[config.layer]) for logits in (pass_.image, pass_.moved))
        p = clusters.joint(moved(x, pass_), y, clusters.within(pass_.pair.valid, y.shape[3:]))
        loss = clusters.reduced(p, config.alpha, config.balance, config.attached).mean()
        return Loss({"information": weight(config, step) * loss})

    def after_step(self, network: nn.Module, step: Step) -> None:
        pass


HOOK: type[Hook] = RedundancyReduction
