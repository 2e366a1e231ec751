"""Mutual information: clusters of a crop's features tell which clusters the moved crop's features belong to.

Peng, Pedersoli and Desrosiers, "Boosting semi-supervised image segmentation with global and local mutual information
regularization", MELBA 2021, https://arxiv.org/abs/2103.04813; on the output alone: "Mutual information deep regularization for
semi-supervised segmentation", MIDL 2020, https://proceedings.mlr.press/v121/peng20a.html.

    layer "encoder"    clusters (S, m, K) of its pooled coarsest map, of x and of T x        global
    other layers       clusters (S, m, K, *) of every cell, T applied to those of x          local, displacements up to `reach`
    layer "output"     p itself, S = 1 and K the classes; T p(x) without gradient            local
    L                  Σ over layers of their share · mean over the S heads of - MI          (`clusters.py`)

The heads belong to the hook and are trained with it. Cells that T x does not show count nowhere. Counts are not shifted by
their least (`shift=true`: the published code, whose values are then not mutual information). Clusters hold their identity only
beside a consistency term: the paper's method is `--hook mutual-information --hook consistency -o hook.consistency.weight=5`.

Defaults are the paper's: K = 20, S = 5, weight 0.1, the encoder and two layers of the decoder at 1 : ½ : ½ and displacements
up to 1 and 3. The decoder's layers are named for the U-Net of `networks/unet.py`, whose last map is the module "decoder"; its
last but one depends on the number of levels, so the default is the last alone, with a reach of 1, since the cost grows with
the square of 2 reach + 1. MIDL 2020: `layers=[output] shares=[1] reach=[1]`. Transfers: nothing of its own.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from medssl.methods import clusters, settings
from medssl.methods.augment import Pair
from medssl.methods.protocol import Loss, Step
from medssl.methods.ramps import weight
from medssl.methods.segment import Drawn, Hook, Pass, initial
from medssl.methods.taps import Taps, channels


@dataclass(frozen=True, kw_only=True)
class Config(settings.Hook):
    weight: float = 0.1
    layers: tuple[str, ...] = ("encoder", "decoder")  # modules of the network, or "output"
    shares: tuple[float, ...] = (1.0, 0.5)  # of each layer; brought to a sum of 1
    reach: tuple[int, ...] = (0, 1)  # largest displacement, cells; of the encoder's pooled map there is none
    clusters: int = 20  # K
    heads: int = 5  # S
    balance: float = 1.0  # λ of `clusters.py`
    shift: bool = False
    patch: int | None = None  # side of windows with joint probabilities of their own, cells; None: the whole map

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers or not len(self.layers) == len(self.shares) == len(self.reach):
            raise ValueError(f"layers are {self.layers}: expected one at least, and as many shares and reach")
        if len(set(self.layers)) < len(self.layers) or min(self.shares) <= 0 or min(self.reach) < 0:
            raise ValueError("expected no layer twice, shares above 0 and reach of at least 0")
        if self.clusters < 2 or self.heads < 1 or self.balance <= 0 or (self.patch is not None and self.patch < 2):
            raise ValueError("expected clusters and patch of at least 2, heads of at least 1 and balance above 0")


class MutualInformation(nn.Module):
    predictor = None

    def __init__(self, network: nn.Module, config: Config):
        super().__init__()
        self.config = config
        self.tapped = [name for name in config.layers if name != "output"]
        self.taps = Taps(network, self.tapped)
        with initial("mutual_information"):
            self.heads = nn.ModuleList(
                clusters.Clusters(channels(network, name), config.clusters, config.heads) for name in self.tapped
            )

    def draw(self, pair: Pair, rng: Generator) -> Drawn:
        return {}

    def terms(self, pass_: Pass, drawn: Drawn, step: Step) -> Loss:
        config, factor = self.config, weight(self.config, step)
        features = [self.taps.taken(logits) for logits in (pass_.image, pass_.moved)]
        heads = dict(zip(self.tapped, self.heads, strict=True))
        terms = {}
        for name, share, reach in zip(config.layers, config.shares, config.reach, strict=True):
            if name == "output":
                target = pass_.image.detach().float().softmax(1)[None]
                loss = self._local(target, pass_.moved.float().softmax(1)[None], reach, pass_)
            elif name == "encoder":
                x, y = (heads[name](clusters.pooled(each[name])) for each in features)
                loss = clusters.negative_information(clusters.joint(x, y), config.balance)
            else:
                x, y = (heads[name](each[name]) for each in features)
                loss = self._local(x, y, reach, pass_)
            terms[name] = factor * share / sum(config.shares) * loss.mean()
        return Loss(terms)

    def after_step(self, network: nn.Module, step: Step) -> None:
        pass

    def _local(self, x: Tensor, y: Tensor, reach: int, pass_: Pass) -> Tensor:
        x, valid = moved(x, pass_), clusters.within(pass_.pair.valid, y.shape[3:])[:, None]
        with torch.autocast(x.device.type, enabled=False):
            config = self.config
            return clusters.local_information(x * valid, y * valid, reach, config.balance, config.shift, config.patch)


def moved(maps: Tensor, pass_: Pass) -> Tensor:
    """T of the clusters' maps (S, m, K, *)."""
    heads = len(maps)
    return pass_.move(maps.movedim(0, 1).flatten(1, 2)).unflatten(1, (heads, -1)).movedim(1, 0)


HOOK: type[Hook] = MutualInformation
