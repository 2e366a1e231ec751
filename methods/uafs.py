"""UAFS: feature maps weighted by how certain a small softmax head is of each position.

Uncertainty-aware feature selection (later: re-weighting) of "Contrastive and Selective Hidden Embeddings for Medical Image
Segmentation", IEEE TMI 2022, https://arxiv.org/abs/2201.08779. After any module that gives a map F (n, c, *sides):

    P  = softmax of a 3x3 convolution, batch norm, rectifier, 1x1 convolution of F to M channels      (n, M, *sides)
    H  = - Σ_m P log P / log M, in [0, 1]; 0 where M is 1: a single outcome is certain                  (n, 1, *sides)
    F' = F (2 - H): the most uncertain positions stay as they are, certain ones double

Nothing supervises the head but the loss of the network, so this is a learnt gate and no calibrated uncertainty; no label is
needed, in training or after. With M = 1 its head learns nothing. Differences from the paper: batch norms are joint over all
workers; where M is 1 the paper's code divides 0 by 0, though it publishes such a row. The default places are
the paper's seven in `networks/deeplab.py`. In two and three dimensions.

`insert` puts a `Selected` in the place of each named module, so that a network's parameters change their names:
"NAME.…" becomes "NAME.module.…", and "NAME.gate.…" is new. Load weights that were made without it before inserting;
what is inserted inside the encoder transfers with it, and only into an encoder with UAFS at the same places.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medssl.methods import receptive
from medssl.methods.gather import JointBatchNorm


@dataclass(frozen=True, kw_only=True)
class Config:
    layers: tuple[str, ...] = (  # names of modules of the network, after which maps are weighted
        "encoder.stem1",
        "encoder.stem2",
        "encoder.exit3",
        "encoder.exit4",
        "encoder.exit5",
        "decoder.low",
        "decoder.join",
    )
    outcomes: int = 2  # M; it has nothing to do with the number of classes
    hidden: int | None = 16  # channels inside the head; None: a quarter of the map's (the paper's choice in 3D)
    kernel: int = 3  # of its first convolution, odd
    dropout: float = 0.0  # inside the head (paper: 0.1 in pyramid and decoder)

    def __post_init__(self) -> None:
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers is {self.layers}: expected names of modules, each once")
        if min(self.outcomes, self.hidden or 1) < 1 or self.hidden == 0:
            raise ValueError(f"outcomes is {self.outcomes} and hidden {self.hidden}: expected at least 1")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel is {self.kernel}: expected an odd number, so that maps keep their sides")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: expected a probability below 1")


def normalised_entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits (n, M, *)) over log M, in [0, 1], as (n, 1, *); 0 where M is 1. At least float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p = logits.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1, keepdim=True)
    outcomes = logits.shape[1]
    return entropy if outcomes == 1 else entropy / math.log(outcomes)


def selected(x: Tensor, logits: Tensor) -> Tensor:
    """x (n, c, *) times 2 - H of the logits (n, M, *)."""
    return x * (2 - normalised_entropy(logits)).to(x.dtype)


class Gate(nn.Sequential):
    """The head: a map (n, c, *) to the logits (n, M, *) of outcomes without a meaning."""

    def __init__(self, channels: int, config: Config, spatial_dims: int):
        hidden = config.hidden or max(channels // 4, 1)
        convolution = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        super().__init__(
            convolution(channels, hidden, config.kernel, padding=config.kernel // 2, bias=False),
            JointBatchNorm(hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(config.dropout),
            convolution(hidden, config.outcomes, 1),
        )


class Selected(nn.Module):
    """A module and, after it, the weighting of its map."""

    def __init__(self, module: nn.Module, gate: nn.Module):
        super().__init__()
        self.module, self.gate = module, gate

    def forward(self, *args: Tensor) -> Tensor:
        x = self.module(*args)
        return selected(x, self.gate(x))


def insert(network: nn.Module, config: Config | None = None) -> nn.Module:
    """Weight the maps of the named modules of `network`, in place; returns it.

    Raises ValueError for a name that the network does not have, or a module that gives no map, changing nothing.
    """
    config = config or Config()
    found = receptive.fields(network, config.layers)
    device = next(network.parameters()).device
    gates = {name: Gate(field.channels, config, len(field.stride)).to(device) for name, field in found.items()}
    for name in _deepest_first(config.layers):  # so that a module inside another keeps the name it was given
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, Selected(network.get_submodule(name), gates[name]))
    return network


def _deepest_first(names: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda name: name.count("."), reverse=True)
