"""InfoNCE: unlabelled crops whose slices share a meta-label have like features; or cells at one place, across T.

Peng, Wang, Pedersoli and Desrosiers, "Self-paced contrastive learning for semi-supervised medical image segmentation with
meta-labels", NeurIPS 2021, https://arxiv.org/abs/2107.13741, without its pace, for which see `self_paced.py`; the loss l_ij is
that of `methods/infonce.py`.

    partition, patient, cycle, self    z of a layer's pooled map, of x and of T x            (2m, d)
    place                              z of `places` cells of each crop, of T features(x) and of features(T x), the map
                                       averaged to `grid` cells per axis, or as fine as it is where it has
                                       fewer; each cell is its own class                                      (2 m places, d)
    L = Σ over meta-labels of their share · mean over i of 1/|P(i)| Σ_{j in P(i)} l_ij

The head belongs to the hook: two layers, of 1x1 convolutions for places. Cells that T x does not show take no part.
Defaults: the encoder and partitions, as the paper's first term; the decoder's term of the published code
(https://github.com/jizongFox/Contrast-You) is `layer=decoder labels=[place]`, there weighed by 0.1 beside the encoder's.
Transfers: nothing of its own.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from medssl.methods import gather, infonce, settings
from medssl.methods.augment import Pair
from medssl.methods.clusters import cells, pooled, within
from medssl.methods.protocol import Loss, Step
from medssl.methods.ramps import weight
from medssl.methods.segment import Drawn, Hook, Pass, initial
from medssl.methods.taps import Taps, channels


@dataclass(frozen=True, kw_only=True)
class Config(settings.ContrastHook):
    pass


class InfoNCE(nn.Module):
    predictor = None
    pace: Literal["soft", "hard", "none"] = "none"
    gamma: tuple[float, float] = (1.0, 1.0)
    power: float = 1.0
    corrected: bool = False

    def __init__(self, network: nn.Module, config: settings.ContrastHook):
        super().__init__()
        self.config = config
        self.taps = Taps(network, [config.layer])
        with initial("infonce"):
            self.head = infonce.head(channels(network, config.layer), config.hidden, config.d)

    def draw(self, pair: Pair, rng: Generator) -> Drawn:
        """Of "place" the order of each crop's cells as keys (m, cells): the map's sides are not known yet."""
        if "place" not in self.config.labels:
            return {}
        count = self.config.grid ** (pair.image.dim() - 2)
        return {"order": torch.rand((len(pair.image), count), generator=rng, device=rng.device)}

    def terms(self, pass_: Pass, drawn: Drawn, step: Step) -> Loss:
        config, factor = self.config, weight(self.config, step)
        maps = [self.taps.taken(logits)[config.layer] for logits in (pass_.image, pass_.moved)]
        terms, monitors = dict[str, Tensor](), dict[str, Tensor]()
        for kind, share in zip(config.labels, config.shares or [1.0] * len(config.labels), strict=True):
            z, label, known = self._places(maps, drawn["order"], pass_) if kind == "place" else self._slices(maps, kind, pass_)
            joint = [gather.rows(each)[0] for each in z]
            seen = None if known is None else gather.rows(known.float())[0] > 0
            each, positives = infonce.contrast(joint, gather.rows(label)[0], config.temperature, config.rivals, seen)
            weights = infonce.paced(each, self.pace, infonce.gamma(self.gamma, self.power, step.progress))
            terms[kind] = factor * share * infonce.averaged(each, positives, weights, self.corrected)
            if weights is not None:
                monitors[f"{kind}/weight"] = infonce.mean_weight(weights, positives)
            if kind == "cycle":
                monitors["cycle/known"] = (label >= 0).float().mean()
        return Loss(terms, monitors)

    def after_step(self, network: nn.Module, step: Step) -> None:
        pass

    def _slices(self, maps: list[Tensor], kind: str, pass_: Pass) -> tuple[list[Tensor], Tensor, None]:
        """z of both views, (m, d) each, and the meta-label of each crop."""
        with torch.autocast(maps[0].device.type, enabled=False):
            z = [self.head(pooled(each)) for each in maps]
        label = infonce.meta_label(kind, pass_.pair.groups, len(z[0]), self.config.partitions, self.config.partition)
        return z, label.to(z[0].device), None

    def _places(self, maps: list[Tensor], order: Tensor, pass_: Pass) -> tuple[list[Tensor], Tensor, Tensor]:
        """z of both views' cells, (m places, d) each, their classes, and which of them T x shows."""
        x, y = pass_.move(maps[0].float()), maps[1].float()
        valid = within(pass_.pair.valid, y.shape[2:])
        sides = [min(self.config.grid, side) for side in y.shape[2:]]
        places = order[:, : math.prod(sides)].argsort(1)[:, : self.config.places]
        with torch.autocast(y.device.type, enabled=False):
            z = [self.head(cells(averaged_to(each, sides), places)) for each in (x, y)]
        shown = cells(averaged_to(valid[:, None].float(), sides), places)[:, 0] == 1
        own = torch.arange(len(z[0]), device=y.device)
        return z, own + gather.rows(own.float()[:, None])[1], shown


def averaged_to(maps: Tensor, sides: list[int]) -> Tensor:
    """Maps (m, c, *) averaged to (m, c, *sides)."""
    pool: Any = F.adaptive_avg_pool2d if len(sides) == 2 else F.adaptive_avg_pool3d
    averaged: Tensor = pool(maps, tuple(sides))
    return averaged


HOOK: type[Hook] = InfoNCE
