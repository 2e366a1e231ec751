"""Uncertainty-aware mean teacher: agree with the teacher only where it is sure, at first hardly anywhere.

Yu, Wang, Li, Fu and Heng, "Uncertainty-aware self-ensembling model for semi-supervised 3D left atrium segmentation", MICCAI
2019, https://arxiv.org/abs/1907.07034.

    q_i = softmax g(x + n_i)         i = 1 … P, g the teacher (see `mean_teacher.py`), n_i Gaussian noise of deviation σ
    q   = mean of the q_i            (m, K, s, s)
    u   = - Σ_k q_k ln q_k           (m, s, s)
    b   = [u < (3/4 + r(t)/4) ln K], 0 beyond the slice         r sigmoid (paper) or linear (Contrast-You), t the progress
    L   = mean(T b · e) / (mean(T b) + 0.01)                    e the mean over classes of (T q - p(T x))²

Differences from the paper: no dropout in the teacher, so the noise alone makes it unsure; the mean of the P passes is the
target, where the paper runs one pass more for it; noise is not clipped at 2σ; 0.01 keeps a handful of sure pixels from deciding
alone (Contrast-You, https://github.com/jizongFox/Contrast-You, which has P = 5, one without noise, σ = 0.05). P = 8, σ = 0.1, a
and the ramp over all steps are the paper's; the weight is that of `mean_teacher.py`. Transfers: the teacher.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from medssl.methods import agreement, gather, settings
from medssl.methods.augment import Pair
from medssl.methods.hooks.mean_teacher import follow
from medssl.methods.protocol import Loss, Step
from medssl.methods.ramps import ramp, weight
from medssl.methods.segment import Drawn, Hook, Pass
from medssl.methods.teacher import Teacher

PREDICTS = True
FEW = 0.01  # added to the share of sure pixels


@dataclass(frozen=True, kw_only=True)
class Config(settings.TeacherHook):
    passes: int = 8  # P
    noise: float = 0.1  # σ, intensities being in [0, 1]
    threshold: Literal["linear", "sigmoid"] = "sigmoid"  # how it rises from 3/4 to all of the largest entropy

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.passes < 1 or self.noise < 0:
            raise ValueError(f"passes is {self.passes} and noise {self.noise}: expected at least 1, and at least 0")


class UncertaintyMeanTeacher(nn.Module):
    def __init__(self, network: nn.Module, config: Config):
        super().__init__()
        self.config = config
        self.teacher = Teacher(network)

    @property
    def predictor(self) -> nn.Module:
        return self.teacher.network

    def draw(self, pair: Pair, rng: Generator) -> Drawn:
        shape = (self.config.passes, *pair.image.shape)
        return {"noise": self.config.noise * torch.randn(shape, generator=rng, device=pair.image.device)}

    def terms(self, pass_: Pass, drawn: Drawn, step: Step) -> Loss:
        target = torch.zeros_like(pass_.moved, dtype=torch.float32)
        for noise in drawn["noise"]:  # one pass after another: all at once would need their memory
            target += self.teacher(pass_.pair.image + noise).float().softmax(1) / self.config.passes
        uncertainty = agreement.entropy(target.clamp_min(agreement.TINY).log())
        sure = uncertainty < bound(target.shape[1], self.config.threshold, step.progress)
        sure = (pass_.move((sure & pass_.pair.inside)[:, None].float())[:, 0] > 0.5) & pass_.pair.valid
        distance = agreement.squared_error(pass_.move(target), pass_.moved.float().softmax(1))
        term = weight(self.config, step) * among_sure(distance, sure, pass_.pair.valid)
        return Loss({"mse": term}, {"sure": agreement.average(sure.float(), pass_.pair.valid)})

    def after_step(self, network: nn.Module, step: Step) -> None:
        follow(self.teacher, network, self.config.momentum, self.config.decay, step)


def bound(classes: int, rise: Literal["linear", "sigmoid"], progress: float) -> float:
    """The entropy in nats below which the teacher is sure."""
    return (0.75 + 0.25 * ramp(rise, progress)) * math.log(classes)


def among_sure(distance: Tensor, sure: Tensor, valid: Tensor) -> Tensor:
    """The mean of (m, *) distances over sure pixels, less where these are few; means being over valid pixels of all workers."""
    count = sure.sum(dtype=distance.dtype) + FEW * valid.sum(dtype=distance.dtype)
    return gather.mean((distance * sure).sum(), count)


HOOK: type[Hook] = UncertaintyMeanTeacher
