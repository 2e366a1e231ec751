"""Mixup: a mixture of two images shall be predicted as the same mixture of their labels.

Zhang, Cisse, Dauphin and Lopez-Paz, "mixup: beyond empirical risk minimization", ICLR 2018, https://arxiv.org/abs/1710.09412.
It learns from labelled slices alone; with global and local contrast it is one of the complements of
https://arxiv.org/abs/2006.10511, whose alpha this is.

    λ ~ Beta(α, α), one per step       x̃_i = λ x_i + (1 - λ) x_j           (n, c, s, s)
    L = λ ℓ(f(x̃_i), y_i) + (1 - λ) ℓ(f(x̃_i), y_j)

ℓ is the supervised loss of `segment.py`. Its cross-entropy is that with the mixed label. The partner j lies half a batch away:
batches have a random order, and crops of one slice are neighbours.

Differences from the paper: the term stands beside the supervised loss of the images as they are, which is the case λ = 1, so
that it costs a forward pass more; the overlap of a mixture is the mixture of two overlaps, for a label here has one class.
Transfers: nothing of its own.
"""

from dataclasses import dataclass

import torch
from torch import Generator, nn

from medssl.methods import settings
from medssl.methods.augment import Pair
from medssl.methods.protocol import Loss, Step
from medssl.methods.ramps import weight
from medssl.methods.segment import Drawn, Hook, Pass, supervised

LABELLED_ONLY = True


@dataclass(frozen=True, kw_only=True)
class Config(settings.Hook):
    alpha: float = 0.1  # α: near 0 one of the two images nearly alone, 1 for any share alike

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

    def draw(self, pair: Pair, rng: Generator) -> Drawn:
        """λ, (), as the share that one of two gamma variates has of both."""
        shape = torch.full((2,), self.config.alpha, dtype=torch.float64, device=rng.device)
        one, other = torch._standard_gamma(shape, generator=rng).clamp(min=1e-300)
        return {"share": (one / (one + other)).float()}

    def terms(self, pass_: Pass, drawn: Drawn, step: Step) -> Loss:
        images, labels, share = pass_.views.images[0], pass_.views.labels, drawn["share"]
        assert labels is not None  # Segment.loss has seen to it
        across = len(images) // 2
        logits = pass_.network(share * images + (1 - share) * images.roll(across, 0))
        both = (supervised(logits, y, pass_.config) for y in (labels, labels.roll(across, 0)))
        ours, theirs = (torch.stack(list(terms.values())).sum() for terms in both)
        return Loss({"mixed": weight(self.config, step) * (share * ours + (1 - share) * theirs)}, {"share": share})

    def after_step(self, network: nn.Module, step: Step) -> None:
        pass


HOOK: type[Hook] = Mixup
