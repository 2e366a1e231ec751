"""LARS: momentum SGD in which every weight tensor moves by a share of its own length.

You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks", 2017, https://arxiv.org/abs/1708.03888,
algorithm 1, as SimCLR, BYOL, Barlow Twins and VICReg use it. For each tensor w with gradient g, apart from the others:

    u = g + λ w                         λ weight decay
    r = η |w| / |u|                     eq. 6, the trust ratio; 1 where |w| or |u| is 0
    v ← μ v + r u                       μ momentum
    w ← w - lr v

Biases and the parameters of normalisations take the same step with r = 1 and, in `optimizers.decay_groups`, λ = 0.

Differences from the paper: the denominator is |g + λ w| instead of |g| + λ |w|, and the learning rate stands outside the
momentum, as in the code of Barlow Twins and VICReg; both agree with the paper where λ is small and the rate constant.
`clip_lr` is the variant of the ACDC study (SSL-MedSeg, by solo-learn): r ← min(r / lr, 1), so that a tensor moves by r u but
never by more than plain SGD would; the rate is then a bound instead of a factor. That study takes η = 0.02.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class LARS(Optimizer):
    """Steps by the equations above; a tensor without a gradient is passed over, its momentum with it.

    groups    tensors, or groups of them: dicts with `params`; `exempt=True` where r is to be 1
    eta       η, the trust coefficient
    clip_lr   bound the rate of a tensor by lr instead of multiplying with it
    """

    def __init__(
        self,
        groups: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 1e-3,
        clip_lr: bool = False,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta, "clip_lr": clip_lr}
        super().__init__(groups, defaults | {"exempt": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every tensor that has a gradient. `closure` is torch's interface and not used."""
        assert closure is None
        for group in self.param_groups:
            weights: list[Tensor] = [w for w in group["params"] if w.grad is not None]
            gradients: list[Tensor] = [w.grad for w in weights]  # type: ignore[misc]  # none is None
            if not weights:
                continue
            updates = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
            if not group["exempt"]:
                torch._foreach_mul_(updates, _trust(weights, updates, group).unbind())
            for w in weights:
                if "momentum" not in self.state[w]:
                    self.state[w]["momentum"] = torch.zeros_like(w)
            momenta = [self.state[w]["momentum"] for w in weights]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, updates)
            torch._foreach_add_(weights, momenta, alpha=-group["lr"])


def _trust(weights: list[Tensor], updates: list[Tensor], group: dict[str, Any]) -> Tensor:
    """r of each tensor, (number of tensors,), without asking the device for a number."""
    lengths, steps = (torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, updates))
    ratio = group["eta"] * lengths / steps
    if group["clip_lr"]:
        ratio = (ratio / group["lr"]).clamp(max=1)
    return ratio.where((lengths > 0) & (steps > 0), 1.0)
