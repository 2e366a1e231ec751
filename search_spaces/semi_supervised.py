"""Do unlabelled slices help where few patients are labelled, and which idea uses them best?

Hooks of methods/hooks/ alone and stacked, at 2 and 8 labelled patients, each with the weight of its file, against supervised
fine-tuning at the same budget. Oliver et al., "Realistic evaluation of deep semi-supervised learning algorithms", NeurIPS 2018,
https://arxiv.org/abs/1804.09170: beside a well-tuned supervised control at an equal budget, reported gains shrink.
Nothing is pretrained unless asked for (`-o pretrain.name=…`): then all arms begin with that encoder.

Those weights are the papers' or their codes', or plain choices where neither has the term beside labels (boundary, redundancy,
superpixel). None was tuned here, on any data.

Arms of one budget have equal steps and labelled crops; hooks add forward passes over unlabelled crops (`unlabelled.batch`).
`suggest` asks which stack, and how much of it (the weights of its hooks, times one factor), at 2 labelled patients: a search
over budgets would end at the largest. At 8 it is a file of one's own: `from medssl.search_spaces.semi_supervised import *`, a
QUESTION, `CONTROL = "supervised, 8"` and `DEFAULTS = DEFAULTS | {"data.labelled": 8}`. `semi_supervised_short.py` is the same
question in minutes.
"""

from collections.abc import Iterable, Mapping
from typing import Any

QUESTION = "Which semi-supervised terms beat supervised training on the same few labelled patients?"
CONTROL = "supervised, 2"
DEFAULTS: dict[str, Any] = {"pretrain": None, "data.labelled": 2}
BUDGETS = (2, 8)  # labelled patients
Stack = Mapping[str, float]  # the weight of each hook
STACKS: dict[str, Stack] = {
    "supervised": {},
    "consistency": {"consistency": 0.1},
    "entropy": {"entropy_minimisation": 0.001},
    "pseudo-label": {"pseudo_label": 3.0},
    "CPS": {"cross_pseudo_supervision": 1.5},
    "MT": {"mean_teacher": 10.0},
    "UA-MT": {"uncertainty_mean_teacher": 10.0},
    "ICT": {"ict": 1.0},
    "CutMix": {"cutmix": 1.0},
    "BCP": {"bcp": 1.0},
    "UniMatch": {"unimatch": 1.0},
    "VAT": {"adversarial": 1.0},
    "IMSAT": {"information_maximisation": 0.001},
    "MI": {"mutual_information": 0.1},
    "MI + consistency": {"mutual_information": 0.1, "consistency": 0.1},
    "redundancy": {"redundancy_reduction": 0.1},
    "InfoNCE": {"infonce": 1.0},
    "self-paced": {"self_paced": 1.0},
    "superpixel": {"superpixel": 0.1},
    "prototypes": {"prototypes": 1.0},
    "boundary": {"boundary_aware": 0.1},
    "MT + entropy": {"mean_teacher": 10.0, "entropy_minimisation": 0.001},
    "MT + self-paced": {"mean_teacher": 10.0, "self_paced": 1.0},
}


def stacked(stack: str, factor: float = 1.0, stacks: Mapping[str, Stack] = STACKS) -> dict[str, Any]:
    """These hooks and no others, whatever was typed for all arms."""
    every = sorted({name for weights in stacks.values() for name in weights})
    off = {f"hooks.{name}": None for name in every if name not in stacks[stack]}
    return off | {f"hooks.{name}.weight": factor * weight for name, weight in stacks[stack].items()}


def table(stacks: Mapping[str, Stack], budgets: Iterable[int] = BUDGETS) -> dict[str, dict[str, Any]]:
    """An arm for every stack at every budget."""
    cells = [(stack, budget) for budget in budgets for stack in stacks]
    return {f"{stack}, {budget}": {**stacked(stack, stacks=stacks), "data.labelled": budget} for stack, budget in cells}


def compared(stacks: Iterable[str], budgets: Iterable[int] = BUDGETS) -> dict[str, str]:
    """Each arm of `table` with supervised training at its budget."""
    return {f"{stack}, {budget}": f"supervised, {budget}" for budget in budgets for stack in stacks}


def arms() -> dict[str, dict[str, Any]]:
    return table(STACKS)


COMPARE = compared(STACKS)


def suggest(trial: Any) -> dict[str, Any]:
    stack = trial.suggest_categorical("stack", [name for name in STACKS if STACKS[name]])
    return stacked(stack, trial.suggest_float("factor", 0.03, 30.0, log=True))
