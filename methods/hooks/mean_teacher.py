"""Mean teacher: agree with the average of the networks of all steps, which then predicts.

Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017, https://arxiv.org/abs/1703.01780; for segmentation
with a moving geometry: Perone and Cohen-Adad, DLMIA 2018, https://arxiv.org/abs/1807.04657.

    θ' ← (a_t θ' + (1 - a_t) θ) (1 - λ)       a_t = min(1 - 1/(t + 1), a), t = 0 for the first step: it copies the network
    q  = T softmax g(x)                       (m, K, s, s), g the teacher; hard: the one-hot map of its most probable class
    L  = mean over pixels and classes of (q - p(T x))²

Differences from the paper: a crop is moved by T instead of shifted by two pixels, the teacher has no dropout (`teacher.py`),
and a is constant, where the paper raises it from 0.99 to 0.999 after the ramp. a and the weight 10 are those of Contrast-You
(https://github.com/jizongFox/Contrast-You), which also has λ = 1e-6; the paper has none, which is the default. The sigmoid
ramp over the first 40000 of SVHN's 180000 steps is the paper's. Transfers: the teacher.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from medssl.methods import agreement, settings
from medssl.methods.augment import Pair
from medssl.methods.protocol import Loss, Step
from medssl.methods.ramps import weight
from medssl.methods.segment import Drawn, Hook, Pass
from medssl.methods.teacher import Teacher

PREDICTS = True


@dataclass(frozen=True, kw_only=True)
class Config(settings.TeacherHook):
    ramp_length: float = 40 / 180
    target: Literal["soft", "hard"] = "soft"


class MeanTeacher(nn.Module):
    def __init__(self, network: nn.Module, config: Config):
        super().__init__()
        self.config = config
        self.teacher = Teacher(network)

    @property
    def predictor(self) -> nn.Module:
        return self.teacher.network

    def draw(self, pair: Pair, rng: Generator) -> Drawn:
        return {}

    def terms(self, pass_: Pass, drawn: Drawn, step: Step) -> Loss:
        target = distribution(self.teacher(pass_.pair.image), self.config.target)
        distance = agreement.squared_error(pass_.move(target), pass_.moved.float().softmax(1))
        return Loss({"mse": weight(self.config, step) * agreement.average(distance, pass_.pair.valid)})

    def after_step(self, network: nn.Module, step: Step) -> None:
        follow(self.teacher, network, self.config.momentum, self.config.decay, step)


def distribution(logits: Tensor, target: Literal["soft", "hard"]) -> Tensor:
    """What a teacher teaches, (m, K, *)."""
    p = logits.float().softmax(1)
    return p if target == "soft" else agreement.hardened(p)


@torch.no_grad()
def follow(teacher: Teacher, network: nn.Module, momentum: float, decay: float, step: Step) -> None:
    """The rule of θ', and the network's own buffers."""
    teacher.update(network, min(1 - 1 / (step.index + 1), momentum))
    if decay:
        torch._foreach_mul_(list(teacher.network.parameters()), 1 - decay)


HOOK: type[Hook] = MeanTeacher
