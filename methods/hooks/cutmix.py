"""CutMix: the network's answer to two crops pasted together is the teacher's answers pasted together.

French, Laine, Aila, Mackiewicz and Finlayson, "Semi-supervised semantic segmentation needs strong, varied perturbations", BMVC
2020, https://arxiv.org/abs/1906.01916, sec. 3.3; after CutMix of Yun et al., ICCV 2019, https://arxiv.org/abs/1905.04899.

    M    (m, 1, s, s) bool: a box of half the pixels, its proportions log-uniform, anywhere inside the crop
    x'   = M x + (1 - M) x_π                                  π a rotation of the worker's crops, never by 0
    q    = M g(x) + (1 - M) g(x)_π                            (m, K, s, s), g the teacher's probabilities (`mean_teacher.py`)
    c    = mean over pixels of [max_k g_k(x) > τ]
    L    = c · mean over pixels and classes of (q - p(x'))²

Differences from the paper: π is a rotation, so that no crop meets itself (slices come in random order anyhow); crops have
the labelled chain's intensities and no scale jitter. In 3D boxes hold half of the voxels. Defaults are the paper's: a = 0.99,
τ = 0.97, weight 1 without a ramp. Transfers: the teacher.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from medssl.methods import agreement, gather, settings
from medssl.methods.augment import Pair
from medssl.methods.hooks.mean_teacher import follow
from medssl.methods.protocol import Loss, Step
from medssl.methods.ramps import weight
from medssl.methods.segment import Drawn, Hook, Pass
from medssl.methods.teacher import Teacher

PREDICTS = True


@dataclass(frozen=True, kw_only=True)
class Config(settings.TeacherHook):
    weight: float = 1.0
    ramp: Literal["constant", "linear", "sigmoid"] = "constant"
    threshold: float = 0.97  # τ; 0: the term is not weighed by confidence

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold is {self.threshold}: a probability below 1")


class CutMix(nn.Module):
    def __init__(self, network: nn.Module, config: Config):
        super().__init__()
        self.config = config
        self.teacher = Teacher(network)

    @property
    def predictor(self) -> nn.Module:
        return self.teacher.network

    def draw(self, pair: Pair, rng: Generator) -> Drawn:
        crops = len(pair.image)
        shift = torch.randint(1, max(crops, 2), (1,), generator=rng, device=rng.device)
        partner = (torch.arange(crops, device=rng.device) + shift) % crops
        return {"partner": partner, "box": half_boxes(pair.inside.shape, rng)}

    def terms(self, pass_: Pass, drawn: Drawn, step: Step) -> Loss:
        pair, box, partner = pass_.pair, drawn["box"], drawn["partner"]

        def mixed(maps: Tensor) -> Tensor:
            return torch.where(box[:, None], maps, maps[partner])

        target = self.teacher(pair.image).float().softmax(1)
        confident = agreement.average((target.amax(1) > self.config.threshold).float(), pair.inside)
        distance = agreement.squared_error(mixed(target), pass_.of(mixed(pair.image)).float().softmax(1))
        term = agreement.average(distance, mixed(pair.inside[:, None])[:, 0])
        return Loss({"mse": weight(self.config, step) * gather.stack(confident).mean() * term}, {"confident": confident})

    def after_step(self, network: nn.Module, step: Step) -> None:
        follow(self.teacher, network, self.config.momentum, self.config.decay, step)


def half_boxes(shape: torch.Size, rng: Generator) -> Tensor:
    """Boxes of half the pixels each, as masks of `shape` (m, *): sides 2^-e_i of the crop's, e uniform where Σ e_i = 1."""
    count, *sides = shape
    device = rng.device
    waits = -torch.rand((count, len(sides)), generator=rng, device=device).clamp_min(1e-12).log()
    fractions = 0.5 ** (waits / waits.sum(1, keepdim=True))
    places = torch.rand((count, len(sides)), generator=rng, device=device)
    inside = torch.ones(shape, dtype=torch.bool, device=device)
    for axis, side in enumerate(sides):
        length = (fractions[:, axis] * side).round()[:, None]
        start = (places[:, axis, None] * (side - length + 1)).floor()
        pixel = torch.arange(side, device=device)
        along = (pixel >= start) & (pixel < start + length)
        inside &= along.view(count, *[side if place == axis else 1 for place in range(len(sides))])
    return inside


HOOK: type[Hook] = CutMix
