"""A teacher: a copy of a student that follows it slowly and is never trained.

    θ' ← m θ' + (1 - m) θ        after every optimizer step

The target network of BYOL (Grill et al. 2020, https://arxiv.org/abs/2006.07733, sec. 3.1) and the momentum encoder of
MoCo (He et al. 2020, https://arxiv.org/abs/1911.05722, eq. 2). A teacher is a submodule of its method, so its weights are
part of the method's state, and every worker, doing the same arithmetic on the same weights, holds the same teacher.
"""

import copy
import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from medssl.methods.protocol import Step


class Teacher(nn.Module):
    """A copy of `student` as it is now, whose outputs carry no gradient.

    Mode: normalisations are in the mode of the method. While that trains, the teacher's batch norms use the statistics of
    its own batch, as in both papers; in eval mode they use the student's running ones, which `update` copies. Everything
    else is in eval mode always: targets come without dropout and drop path, as in DINO (https://arxiv.org/abs/2104.14294).
    """

    def __init__(self, student: nn.Module):
        super().__init__()
        self.network = copy.deepcopy(student).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.network.modules():
            module.training = mode and isinstance(module, nn.modules.batchnorm._NormBase)
        return self

    @torch.no_grad()
    def forward(self, x: Any) -> Any:
        return self.network(x)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """Move the parameters towards those of `student`, leaving a share `momentum` of their own; copy its buffers.

        Buffers are statistics and counters, which an average of their history would only make older.
        """
        mine: list[Tensor] = list(self.network.parameters())
        theirs: list[Tensor] = list(student.parameters())
        torch._foreach_lerp_(mine, theirs, 1 - momentum)  # one kernel for all: there are hundreds of small tensors
        for own, buffer in zip(self.network.buffers(), student.buffers(), strict=True):
            own.copy_(buffer)


def cosine_momentum(base: float, step: Step) -> float:
    """1 - (1 - base) (cos(π k / K) + 1) / 2: `base` at the first step, 1 at k = K. Grill et al. 2020, sec. 3.3."""
    return 1 - (1 - base) * (math.cos(math.pi * step.progress) + 1) / 2


def cosine_distance(base: float, step: Step) -> float:
    """Σ (1 - m) over the steps before this one, as an integral: how many times over a teacher could have arrived so far.

    A teacher that has gone less than 1 is still mostly what it began as.
    """
    return (1 - base) * step.total * (step.progress + math.sin(math.pi * step.progress) / math.pi) / 2
