"""UAFS: feature maps weighted by how certain a small softmax head is of each position.

Uncertainty-aware feature selection (later: re-weighting) of "Contrastive and Selective Hidden Embeddings for Medical Image
Segmentation", IEEE TMI 2022, https://arxiv.org/abs/2201.08779. After any module that gives a map F (n, c, *sides):

    P  = softmax of a 3x3 convolution, batch norm, rectifier, 1x1 convolution of F to M channels      (n, M, *sides)
    H  = - Σ_m P log P / log M, in [0, 1]; 0 where M is 1: a single outcome is certain                  (n, 1, *sides)
    F' = F (2 - H): the most uncertain positions stay as they are, certain ones double

Nothing supervises the head but the loss of the network, so this is a learnt gate and no calibrated uncertainty; no label is
needed, in training or after. With M = 1 its head learns nothing. Differences from the paper: batch norms are joint over all
workers; where M is 1 the paper's code divides 0 by 0, though it publishes such a row; its heads of pyramid and decoder have
a dropout of 0.1 besides. The default places are the paper's seven in `networks/deeplab.py` with Xception, and elsewhere
those of its 3D code: after each stage of the decoder. In two and three dimensions.

In a run it is a setting of fine-tuning, `-o finetune.uafs={}` or `-o "finetune.uafs.layers=[decoder.blocks.0]"`: it is inserted
after given weights and before hooks, so that these see weighted maps, and comes back wherever the run's network does.

`insert` puts a `Selected` in the place of each named module, so that a network's parameters change their names:
"NAME.…" becomes "NAME.module.…", and "NAME.gate.…" is new. Load weights that were made without it before inserting;
what is inserted inside the encoder transfers with it, and only into an encoder with UAFS at the same places.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medssl.methods import receptive, settings
from medssl.methods.gather import JointBatchNorm

PAPER = ("encoder.stem1", "encoder.stem2", "encoder.exit3", "encoder.exit4", "encoder.exit5", "decoder.low", "decoder.join")


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

    def __init__(self, channels: int, config: settings.UAFS, spatial_dims: int):
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


def insert(network: nn.Module, config: settings.UAFS | None = None) -> nn.Module:
    """Weight the maps of the named modules of `network`, in place; returns it.

    Raises ValueError for a name that the network does not have, or a module that gives no map, changing nothing.
    """
    config = config or settings.UAFS()
    names = places(network) if config.layers is None else config.layers
    try:
        found = receptive.fields(network, names)
    except ValueError as error:
        raise ValueError(f"uafs: {error}; usable modules: {receptive.listed(receptive.maps(network))}") from error
    device = next(network.parameters()).device
    gates = {name: Gate(field.channels, config, len(field.stride)).to(device) for name, field in found.items()}
    for name in _deepest_first(names):  # so that a module inside another keeps the name it was given
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, Selected(network.get_submodule(name), gates[name]))
    return network


def places(network: nn.Module) -> tuple[str, ...]:
    """The paper's: seven in DeepLabV3+ with Xception, else the last map of the decoder at each resolution, as in its 3D code.

    Raises ValueError for a network whose decoder has no map.
    """
    known = dict(network.named_modules())
    if all(name in known for name in PAPER):
        return PAPER
    last = {field.stride: name for name, field in receptive.maps(network).items() if name.startswith("decoder.")}
    if not last:
        raise ValueError(f"uafs: the decoder of {type(network).__name__} gives no map; name modules in `layers`")
    return tuple(last.values())


def _deepest_first(names: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda name: name.count("."), reverse=True)
