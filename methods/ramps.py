"""How the weight of an unsupervised term rises while predictions are not yet worth agreeing with.

    constant   1
    linear     u
    sigmoid    exp(-5 (1 - u)²)        u = progress / ramp_length, at most 1

The last is that of Laine and Aila, "Temporal ensembling for semi-supervised learning", ICLR 2017,
https://arxiv.org/abs/1610.02242, sec. 4, which mean teachers took over. All are functions of the step: there is no state.
"""

import math
from typing import Literal

from medssl.methods import settings
from medssl.methods.protocol import Step

Kind = Literal["constant", "linear", "sigmoid"]


def ramp(kind: Kind, u: float) -> float:
    """The height, in [0, 1], at `u`; what lies beyond 0 and 1 counts as these."""
    u = min(max(u, 0.0), 1.0)
    if kind == "constant":
        return 1.0
    return u if kind == "linear" else math.exp(-5 * (1 - u) ** 2)


def weight(config: settings.Hook, step: Step) -> float:
    """The weight of a hook's term at a step."""
    return config.weight * ramp(config.ramp, step.progress / config.ramp_length)
