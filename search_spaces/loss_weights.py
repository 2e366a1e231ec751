"""How much of each term of VICReg's loss?

Bardes, Ponce and LeCun, "VICReg", ICLR 2022, https://arxiv.org/abs/2105.04906: λ invariance + μ variance + ν covariance, with
25, 25, 1 in the paper (sec. 4.2). The grid has these, equal weights, one without the covariance term as in their ablations, and
each weight moved from theirs by itself. An arm without the variance term is left out: it collapses, as the paper shows.

`suggest` leaves λ at 25: LARS goes by the direction of a gradient, so the ratios of the weights matter and their scale hardly.

The weights of Dice against cross-entropy in fine-tuning are asked for by `segmentation_weights.py`, those of PDCR's terms and
of any stack of hooks by `pdcr.py`.
"""

from typing import Any

QUESTION = "Which weights of invariance, variance and covariance (VICReg) help most, and do any beat training from scratch?"
CONTROL = "from scratch"
DEFAULTS = {"pretrain.name": "vicreg"}
WEIGHTS = ((25, 25, 1), (1, 1, 1), (25, 25, 0), (25, 25, 10), (25, 5, 1), (5, 25, 1))


def weighed(invariance: float, variance: float, covariance: float) -> dict[str, Any]:
    weights = {"invariance": invariance, "variance": variance, "covariance": covariance}
    return {f"pretrain.{term}": float(weight) for term, weight in weights.items()}


def arms() -> dict[str, dict[str, Any]]:
    return {"from scratch": {"start.weights": None, "pretrain": None}} | {
        " : ".join(map(str, weights)): weighed(*weights) for weights in WEIGHTS
    }


def suggest(trial: Any) -> dict[str, Any]:
    """Variance and covariance, two and three decades on a logarithmic scale, around the paper's."""
    variance = trial.suggest_float("variance", 2.5, 250.0, log=True)
    return weighed(25.0, variance, trial.suggest_float("covariance", 0.03, 30.0, log=True))
