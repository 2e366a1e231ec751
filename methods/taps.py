"""What modules inside a network gave in a pass: features for terms that look past the logits.

`Taps` listens to named modules and keeps what they give for as long as the pass's logits live. Every network of
methods/networks/ has an `encoder`, which gives maps from the finest to the coarsest, and a `decoder`, which gives the map under
the head; other names are those of `named_modules()`. Where a module gives several maps, the last one counts.
"""

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from medssl.methods import receptive


def channels(network: nn.Module, name: str) -> int:
    """Channels of the map that the module `name` gives. Raises ValueError where there is no such module."""
    module = receptive.named(network, [name])[name]
    if name == "encoder":
        return cast("tuple[int, ...]", module.channels)[-1]
    if name == "decoder":
        return _convolutions(network)[0].in_channels
    return receptive.fields(network, [name])[name].channels


def classes(network: nn.Module) -> int:
    """How many classes the network tells apart."""
    return _convolutions(network)[-1].out_channels


def dimensions(network: nn.Module) -> int:
    """2 for a network of slices, 3 for one of volumes."""
    return _convolutions(network)[0].weight.dim() - 2


def _convolutions(network: nn.Module) -> list[nn.Conv2d | nn.Conv3d]:
    """Those of the head."""
    head = receptive.named(network, ["head"])["head"]
    return [module for module in head.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)]


class Taps:
    """The outputs of named modules in each training pass of a network, for as long as the network's own output lives.

    Passes without gradients or in evaluation mode, and calls of parts of the network, leave nothing behind.
    A module whose output a later one rewrites in place is seen as rewritten.
    """

    def __init__(self, network: nn.Module, names: Sequence[str]):
        self.names = tuple(names)
        modules = receptive.named(network, names)
        self.network = weakref.ref(network)
        self.passes = WeakTensorKeyDictionary()
        self.current: dict[str, Tensor] | None = None
        self.handles = [module.register_forward_hook(partial(self._keep, name)) for name, module in modules.items()]
        self.handles += [network.register_forward_pre_hook(self._begin), network.register_forward_hook(self._end)]

    def _begin(self, network: nn.Module, inputs: Any) -> None:
        if network is self.network():
            self.current = {} if network.training and torch.is_grad_enabled() else None

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Tensor | Sequence[Tensor]) -> None:
        if self.current is None:
            return
        if name in self.current:
            raise ValueError(f'taps: the module "{name}" runs twice in one pass, so that its features are not one map')
        self.current[name] = output if isinstance(output, Tensor) else output[-1]

    def _end(self, network: nn.Module, inputs: Any, output: Tensor | Sequence[Tensor]) -> None:
        if network is self.network() and self.current is not None:
            logits = output if isinstance(output, Tensor) else output[0]  # deep supervision: the finest come first
            self.passes[logits], self.current = self.current, None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Taps":
        """Itself: copies of the network, such as teachers, are not tapped."""
        return self

    def taken(self, logits: Tensor) -> dict[str, Tensor]:
        """The features of the pass that gave `logits`, which are then forgotten. Raises ValueError when it was not seen."""
        found: dict[str, Tensor] | None = self.passes.pop(logits, None)
        if found is None:
            raise ValueError("taps: these logits come from no training pass of the tapped network; are the taps removed?")
        return found

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.passes.clear()
        self.current = None
