"""Do contrasted hidden features (PDCR), features weighted by certainty (UAFS), or both, help where few patients are labelled?

The table of "Contrastive and Selective Hidden Embeddings for Medical Image Segmentation", https://arxiv.org/abs/2201.08779:
its cross-entropy alone (CE), with each and with both, at a quarter and at all of the labelled patients, on any network, in 2D
and 3D. The paper shows 25 % in pictures only. Every arm is compared with CE at its own budget. Nothing is pretrained, so that a
repeat is a seed, with the same weights at the start of all arms: `--pretrainings 3 --finetunings 1` gives k = 3 of them. Steps
follow from epochs and so from the budget; `-o finetune.training.steps=N` trains all alike. `-o finetune.dice=1` puts Dice
beside cross-entropy everywhere.

`suggest` searches, at a quarter of the labels, the weights of the three terms, the temperature, N, which cells, the patches,
and whether UAFS stands at the paper's places or nowhere; `-o finetune.uafs.layers=[…]` has other places stand for the paper's.
Its weights are of means: the paper's are of sums and do not transfer.
The weights of any other stack of hooks are a space file of one's own, `medssl sweep ./mine.py --search tpe`:

    from medssl.search_spaces.pdcr import CONTROL, DEFAULTS, QUESTION, arms, hook_weights
    suggest = lambda trial: hook_weights(trial, ("mean_teacher", "entropy_minimisation"))
"""

from collections.abc import Iterable
from typing import Any

QUESTION = "Does PDCR, UAFS or both beat cross-entropy on the same labelled patients?"
CONTROL = "CE, 25 %"
DEFAULTS: dict[str, Any] = {"pretrain": None, "finetune.dice": 0.0, "data.labelled": 0.25}
BUDGETS: dict[str, float | None] = {"25 %": 0.25, "100 %": None}  # of the labelled training patients
ADDED: dict[str, dict[str, Any]] = {
    "CE": {"hooks.pdcr": None, "finetune.uafs": None},
    "PDCR": {"hooks.pdcr": {}, "finetune.uafs": None},
    "UAFS": {"hooks.pdcr": None, "finetune.uafs": {}},
    "PDCR + UAFS": {"hooks.pdcr": {}, "finetune.uafs": {}},
}
PATCHES = {"5": (5,), "9": (9,), "5 7 9": (5, 7, 9), "9 17 33": (9, 17, 33)}  # pixels


def arms() -> dict[str, dict[str, Any]]:
    cells = [(name, budget) for budget in BUDGETS for name in ADDED]
    return {f"{name}, {budget}": {**ADDED[name], "data.labelled": BUDGETS[budget]} for name, budget in cells}


COMPARE = {f"{name}, {budget}": f"CE, {budget}" for name in ADDED for budget in BUDGETS}


def suggest(trial: Any) -> dict[str, Any]:
    """PDCR's terms, and whether UAFS stands beside them."""
    weights = {f"hooks.pdcr.{term}_weight": weight(trial, term) for term in ("encoder", "decoder", "cross")}
    fine, coarse = (trial.suggest_int(f"N of the {which} map", 8, 64, log=True) for which in ("finer", "coarser"))
    return weights | {
        "hooks.pdcr.temperature": trial.suggest_float("temperature", 0.05, 1.0, log=True),
        "hooks.pdcr.encoder_samples": [fine, coarse],
        "hooks.pdcr.sampling": trial.suggest_categorical("sampling", ["stride", "random", "class-balanced", "boundary"]),
        "hooks.pdcr.patches": list(PATCHES[trial.suggest_categorical("patches", list(PATCHES))]),
        "finetune.uafs": {"the paper's": {}, "none": None}[trial.suggest_categorical("UAFS", ["the paper's", "none"])],
    }


def hook_weights(trial: Any, hooks: Iterable[str]) -> dict[str, Any]:
    """A weight for each of these hooks, whatever they are."""
    return {f"hooks.{name}.weight": weight(trial, name) for name in hooks}


def weight(trial: Any, name: str) -> float:
    found: float = trial.suggest_float(f"weight of {name}", 1e-3, 10.0, log=True)
    return found
