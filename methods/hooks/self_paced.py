"""Self-paced contrast: meta-labels group slices that need not look alike, so the pairs that agree already go first.

Peng, Wang, Pedersoli and Desrosiers, "Self-paced contrastive learning for semi-supervised medical image segmentation with
meta-labels", NeurIPS 2021, https://arxiv.org/abs/2107.13741, eq. 2 to 4.

    l_ij   as in `infonce.py`, for each meta-label
    w_ij   soft: max(1 - l_ij / γ, 0)        hard: 1 where l_ij ≤ γ, else 0        without gradient
    γ      b + (e - b) t^p, t the progress of the training in [0, 1)
    L      Σ over meta-labels of λ · mean over i of 1/|P(i)| Σ_{j in P(i)} w_ij l_ij

Only positive pairs are weighed, denominators are not. `corrected` divides by the mean weight. γ follows the steps, there the
epochs, and is a function of the progress: there is no state to lose. Defaults are those of the published experiments
(https://github.com/jizongFox/Self-paced-Contrastive-Learning): partition and patient at 1 : 0.1, soft, from 5 to 60 with p = ½,
corrected; `cycle` at 0.1 besides where the data name phases. There each meta-label has its own γ; a stack that wants that
pretrains with `methods/infonce.py` or uses one label. Transfers: nothing of its own.
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from medssl.methods import settings
from medssl.methods.hooks.infonce import InfoNCE
from medssl.methods.segment import Hook


@dataclass(frozen=True, kw_only=True)
class Config(settings.ContrastHook):
    labels: tuple[Literal["partition", "patient", "cycle", "self", "place"], ...] = ("partition", "patient")
    shares: tuple[float, ...] | None = (1.0, 0.1)  # λ of each
    pace: Literal["soft", "hard"] = "soft"
    gamma: tuple[float, float] = (5.0, 60.0)  # b and e
    power: float = 0.5  # p
    corrected: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.gamma) <= 0 or self.power <= 0:
            raise ValueError(f"gamma is {self.gamma} and power {self.power}: expected more than 0")


class SelfPaced(InfoNCE):
    def __init__(self, network: nn.Module, config: Config):
        super().__init__(network, config)
        self.pace, self.gamma, self.power, self.corrected = config.pace, config.gamma, config.power, config.corrected


HOOK: type[Hook] = SelfPaced
