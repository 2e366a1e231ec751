"""Interpolation consistency: the network's answer to a blend of two crops is the blend of the teacher's answers.

Verma, Kawaguchi, Lamb, Kannala, Solin, Bengio and Lopez-Paz, "Interpolation consistency training for semi-supervised learning",
IJCAI 2019, https://arxiv.org/abs/1903.03825.

    λ    ~ Beta(α, α), one for the step
    x'   = λ x + (1 - λ) x_π                              (m, c, s, s), π a rotation of the worker's crops, never by 0
    q    = λ g(x) + (1 - λ) g(x)_π                        (m, K, s, s), g the teacher's probabilities (`mean_teacher.py`)
    L    = mean over pixels and classes of (q - p(x'))²   where both crops show their slice

Differences from the paper: α is chosen there per data set (1 for CIFAR-10, 0.1 for SVHN), as is the weight (up to 100, of few
classes and many steps); α = 0.2 and the weight 1 are those of Contrast-You (https://github.com/jizongFox/Contrast-You), whose
blends are of x and T x together. a = 0.999 and the sigmoid ramp over the first quarter are the paper's.
Transfers: the teacher.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from medssl.methods import agreement, settings
from medssl.methods.augment import Pair
from medssl.methods.blend import another, beta
from medssl.methods.hooks.mean_teacher import follow
from medssl.methods.protocol import Loss, Step
from medssl.methods.ramps import weight
from medssl.methods.segment import Drawn, Hook, Pass
from medssl.methods.teacher import Teacher

PREDICTS = True


@dataclass(frozen=True, kw_only=True)
class Config(settings.TeacherHook):
    weight: float = 1.0
    ramp_length: float = 0.25
    momentum: float = 0.999
    alpha: float = 0.2  # of the Beta distribution

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha <= 0:
            raise ValueError(f"alpha is {self.alpha}: expected more than 0")


class ICT(nn.Module):
    def __init__(self, network: nn.Module, config: Config):
        super().__init__()
        self.config = config
        self.teacher = Teacher(network)

    @property
    def predictor(self) -> nn.Module:
        return self.teacher.network

    def draw(self, pair: Pair, rng: Generator) -> Drawn:
        return {"share": beta(self.config.alpha, rng), "partner": another(len(pair.image), rng)}

    def terms(self, pass_: Pass, drawn: Drawn, step: Step) -> Loss:
        pair, share, partner = pass_.pair, drawn["share"], drawn["partner"]

        def blended(maps: Tensor) -> Tensor:
            return torch.lerp(maps[partner], maps, share)

        target = blended(self.teacher(pair.image).float().softmax(1))
        distance = agreement.squared_error(target, pass_.of(blended(pair.image)).float().softmax(1))
        term = agreement.average(distance, pair.inside & pair.inside[partner])
        return Loss({"mse": weight(self.config, step) * term})

    def after_step(self, network: nn.Module, step: Step) -> None:
        follow(self.teacher, network, self.config.momentum, self.config.decay, step)


HOOK: type[Hook] = ICT
