"""Mixup: a blend of two labelled crops is of both their classes, in the same shares.

Zhang, Cisse, Dauphin and Lopez-Paz, "mixup: beyond empirical risk minimization", ICLR 2018, https://arxiv.org/abs/1710.09412; for
segmentation: Panfilov et al., ICCV workshops 2019, https://arxiv.org/abs/1908.04388.

    λ    ~ Beta(α, α), one for the step
    x'   = λ x + (1 - λ) x_π                    (n, c, s, s), labelled crops; π a rotation of the worker's crops, never by 0
    L    = λ CE(p(x'), y) + (1 - λ) CE(p(x'), y_π)                           each the mean over its own labelled pixels

Differences from the paper: blends are a term beside the plain crops and not in their place, as in Contrast-You
(https://github.com/jizongFox/Contrast-You), which writes the same gradient as KL, takes T x for the second half of the blends,
and weighs it by 0.01. α = 1 is both theirs. Unlabelled slices are not asked for. Transfers: nothing of its own.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from medssl.methods import settings
from medssl.methods.augment import Pair
from medssl.methods.protocol import Loss, Step
from medssl.methods.ramps import weight
from medssl.methods.segment import Drawn, Hook, Pass, cross_entropy

LABELLED_ONLY = True


@dataclass(frozen=True, kw_only=True)
class Config(settings.Hook):
    weight: float = 0.01
    alpha: float = 1.0  # of the Beta distribution

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha <= 0:
            raise ValueError(f"alpha is {self.alpha}: expected more than 0")


class Mixup(nn.Module):
    predictor = None
    labelled_only = LABELLED_ONLY

    def __init__(self, network: nn.Module, config: Config):
        super().__init__()
        self.config = config

    def draw(self, pair: Pair | None, rng: Generator) -> Drawn:
        """λ, and where in [0, 1) the rotation lies: how many labelled crops there are is not said here."""
        return {"share": beta(self.config.alpha, rng), "turn": torch.rand((), generator=rng, device=rng.device)}

    def terms(self, pass_: Pass, drawn: Drawn, step: Step) -> Loss:
        image, labels, share = pass_.views.images[0], pass_.views.labels, drawn["share"]
        assert labels is not None  # Segment.loss has seen them
        partner = rotation(len(image), drawn["turn"])
        logits = pass_.network(torch.lerp(image[partner], image, share))
        term = share * cross_entropy(logits, labels) + (1 - share) * cross_entropy(logits, labels[partner])
        return Loss({"cross_entropy": weight(self.config, step) * term})

    def after_step(self, network: nn.Module, step: Step) -> None:
        pass


def beta(alpha: float, rng: Generator) -> Tensor:
    """One draw of Beta(α, α), () float32."""
    concentration = torch.full((2,), alpha, dtype=torch.float64, device=rng.device)
    return torch._sample_dirichlet(concentration, generator=rng)[0].float()  # float64: small α underflow


def another(count: int, rng: Generator) -> Tensor:
    """For each of `count` crops another one, by a rotation: (count,) int64. One crop alone meets itself."""
    return rotation(count, torch.rand((), generator=rng, device=rng.device))


def rotation(count: int, turn: Tensor) -> Tensor:
    """Each place plus 1 to count - 1, around, as `turn` in [0, 1) says."""
    shift = 1 + (turn * max(count - 1, 1)).floor().long().clamp(max=max(count - 2, 0))
    return (torch.arange(count, device=turn.device) + shift) % count


HOOK: type[Hook] = Mixup
