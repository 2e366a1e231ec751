"""Entropy minimisation: be sure of unlabelled pixels, whatever they are.

Grandvalet and Bengio, "Semi-supervised learning by entropy minimization", NeurIPS 2004,
https://papers.nips.cc/paper/2004/hash/96f2b50b5d3613adf9c27049b2a888c7-Abstract.html; for segmentation: Vu, Jain, Bucher, Cord
and Pérez, "ADVENT", CVPR 2019, https://arxiv.org/abs/1811.12833.

    L = mean over pixels of - Σ_k p_k(x) ln p_k(x)        p (m, K, s, s)

Differences: ADVENT divides by ln K and weighs by 0.001, its images being full ones of another domain; the default here is
ADVENT's weight on nats. Contrast-You (https://github.com/jizongFox/Contrast-You) takes the entropy after T, which moves it
and changes none. Transfers: nothing of its own.
"""

from dataclasses import dataclass

from torch import Generator, nn

from medssl.methods import agreement, settings
from medssl.methods.augment import Pair
from medssl.methods.protocol import Loss, Step
from medssl.methods.ramps import weight
from medssl.methods.segment import Drawn, Hook, Pass


@dataclass(frozen=True, kw_only=True)
class Config(settings.Hook):
    weight: float = 1e-3


class EntropyMinimisation(nn.Module):
    predictor = None

    def __init__(self, network: nn.Module, config: Config):
        super().__init__()
        self.config = config

    def draw(self, pair: Pair, rng: Generator) -> Drawn:
        return {}

    def terms(self, pass_: Pass, drawn: Drawn, step: Step) -> Loss:
        entropy = agreement.average(agreement.entropy(pass_.image.float().log_softmax(1)), pass_.pair.inside)
        return Loss({"entropy": weight(self.config, step) * entropy})

    def after_step(self, network: nn.Module, step: Step) -> None:
        pass


HOOK: type[Hook] = EntropyMinimisation
