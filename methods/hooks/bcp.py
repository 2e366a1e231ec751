"""Bidirectional copy-paste: labelled pixels around unlabelled ones, and the other way round, each with its own labels.

Bai, Chen, Li, Shen and Wang, "Bidirectional copy-paste for semi-supervised medical image segmentation", CVPR 2023,
https://arxiv.org/abs/2305.00673.

    M      (2m, 1, s, s): 0 in a box whose sides are β of the crop's, anywhere inside it, else 1
    x_in   = M x_l + (1 - M) x_u         unlabelled in the middle
    x_out  = M x_u + (1 - M) x_l         labelled in the middle                          m crops of either kind
    q      = argmax_k of the teacher g(x_u) (`mean_teacher.py`); y the label of x_l; pasted alike
    L      = Σ over in, out of  (Dice + CE over the labelled pixels) + α (Dice + CE over the unlabelled pixels)

Dice and CE are the ones of `segment.py`, with its weights. The crops of the labelled batch are repeated or cut to the number of
unlabelled ones.

Differences from the paper: its supervised loss is this term alone, and here it stands beside the plain one; it trains a quarter
of its steps on pasted labelled pairs first, in whose place the weight rises over a quarter of the steps; it keeps the largest
component of q, which is a matter of one organ. β = 2/3, α = 0.5 and a = 0.99 are the paper's. The student predicts, as in the
paper. Transfers: nothing of its own.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from medssl.methods import settings
from medssl.methods.augment import Pair
from medssl.methods.blend import rotation
from medssl.methods.hooks.mean_teacher import follow
from medssl.methods.protocol import UNLABELLED, Loss, Step
from medssl.methods.ramps import weight
from medssl.methods.segment import Drawn, Hook, Pass, supervised
from medssl.methods.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Config(settings.TeacherHook):
    weight: float = 1.0
    ramp: Literal["constant", "linear", "sigmoid"] = "sigmoid"
    ramp_length: float = 0.25
    box: float = 2 / 3  # β: side of the pasted box, as a fraction of the crop's
    share: float = 0.5  # α: of pixels without a label of their own

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.box < 1 or self.share < 0:
            raise ValueError(f"box is {self.box} and share {self.share}: expected a fraction of the side, and at least 0")


class BCP(nn.Module):
    predictor = None

    def __init__(self, network: nn.Module, config: Config):
        super().__init__()
        self.config = config
        self.teacher = Teacher(network)

    def draw(self, pair: Pair, rng: Generator) -> Drawn:
        twice = torch.Size((2 * len(pair.image), *pair.inside.shape[1:]))
        return {"box": boxes(twice, self.config.box, rng), "turn": torch.rand((), generator=rng, device=rng.device)}

    def terms(self, pass_: Pass, drawn: Drawn, step: Step) -> Loss:
        pair, labels = pass_.pair, pass_.views.labels
        assert labels is not None
        count = len(pair.image)
        every = rotation(len(labels), drawn["turn"])
        chosen = every[torch.arange(count, device=every.device) % len(every)]
        taught = self.teacher(pair.image).argmax(1).where(pair.inside, UNLABELLED)
        nobody = torch.full_like(taught, UNLABELLED)
        middle, around = drawn["box"], ~drawn["box"]
        own = torch.cat([around[:count], middle[count:]])  # where a labelled crop shows

        def pasted(ours: Tensor, theirs: Tensor) -> Tensor:
            where = own.view(own.shape[0], *[1] * (ours.dim() - own.dim()), *own.shape[1:])
            return torch.where(where, torch.cat([ours, ours]), torch.cat([theirs, theirs]))

        logits = pass_.of(pasted(pass_.views.images[0][chosen], pair.image))
        terms: dict[str, Tensor] = {}
        known = {"labelled": (labels[chosen], nobody, 1.0), "unlabelled": (torch.full_like(taught, UNLABELLED), taught, None)}
        for kind, (ours, theirs, share) in known.items():
            factor = 2 * weight(self.config, step) * (self.config.share if share is None else share)
            for name, term in supervised(logits, pasted(ours, theirs), pass_.config).items():
                terms[f"{kind}/{name}"] = factor * term
        return Loss(terms)

    def after_step(self, network: nn.Module, step: Step) -> None:
        follow(self.teacher, network, self.config.momentum, self.config.decay, step)


def boxes(shape: torch.Size, fraction: float, rng: Generator) -> Tensor:
    """A box in each of n crops, as a mask of `shape` (n, *): sides of `fraction` of the crop's, uniform over where it fits."""
    count, *sides = shape
    inside = torch.ones(shape, dtype=torch.bool, device=rng.device)
    for axis, side in enumerate(sides):
        length = max(1, min(side - 1, round(fraction * side)))
        start = (torch.rand(count, generator=rng, device=rng.device) * (side - length + 1)).floor()[:, None]
        pixel = torch.arange(side, device=rng.device)
        along = (pixel >= start) & (pixel < start + length)
        inside &= along.view(count, *[side if place == axis else 1 for place in range(len(sides))])
    return inside


HOOK: type[Hook] = BCP
