"""Consistency: what the network says of a moved crop is what it says of the crop, moved.

Bortsova, Dubost, Hogeweg, Katramados and de Bruijne, "Semi-supervised medical image segmentation via learning consistency under
transformations", MICCAI 2019, https://arxiv.org/abs/1911.01218.

    q = T p(x)            (m, K, s, s), without gradient
    mse   mean over pixels and classes of (q - p(T x))²
    kl    mean over pixels of Σ_k q_k (ln q_k - ln p_k(T x))

Differences from the paper: it lets the gradient flow through both sides and trains from elastic deformations; here the target
is held, as in Contrast-You (https://github.com/jizongFox/Contrast-You), whose weight and MSE are the defaults, and T is a zoom,
flips and quarter turns. T moves probabilities, and what it does not show counts nowhere. Transfers: nothing of its own.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Generator, nn

from medssl.methods import agreement, settings
from medssl.methods.augment import Pair
from medssl.methods.protocol import Loss, Step
from medssl.methods.ramps import weight
from medssl.methods.segment import Drawn, Hook, Pass


@dataclass(frozen=True, kw_only=True)
class Config(settings.Hook):
    weight: float = 0.1
    distance: Literal["mse", "kl"] = "mse"


class Consistency(nn.Module):
    predictor = None

    def __init__(self, network: nn.Module, config: Config):
        super().__init__()
        self.config = config

    def draw(self, pair: Pair, rng: Generator) -> Drawn:
        return {}

    def terms(self, pass_: Pass, drawn: Drawn, step: Step) -> Loss:
        log_p = pass_.moved.float().log_softmax(1)
        target = pass_.move(pass_.image.detach().float().softmax(1))
        kl = self.config.distance == "kl"
        distance = agreement.divergence(target, log_p) if kl else agreement.squared_error(target, log_p.exp())
        return Loss({self.config.distance: weight(self.config, step) * agreement.average(distance, pass_.pair.valid)})

    def after_step(self, network: nn.Module, step: Step) -> None:
        pass


HOOK: type[Hook] = Consistency
