"""Do unlabelled slices help where few patients are labelled, and which idea uses them best?

Hooks of methods/hooks/ alone and stacked, at 2 and 8 labelled patients, each with the weight of its file, against supervised
fine-tuning at the same budget. Oliver et al., "Realistic evaluation of deep semi-supervised learning algorithms", NeurIPS 2018,
https://arxiv.org/abs/1804.09170: beside a well-tuned supervised control at an equal budget, reported gains shrink.
Nothing is pretrained unless asked for (`-o pretrain.name=…`): then all arms begin with that encoder.

Arms of one budget have equal steps and labelled crops; hooks add forward passes over unlabelled crops (`unlabelled.batch`).
`suggest` asks which stack, and how much of it: the weights of its hooks, times one factor.
"""

from typing import Any

QUESTION = "Which semi-supervised terms beat supervised training on the same few labelled patients?"
CONTROL = "supervised, 2"
DEFAULTS: dict[str, Any] = {"pretrain": None, "data.labelled": 2}
BUDGETS = (2, 8)  # labelled patients
STACKS: dict[str, dict[str, float]] = {
    "supervised": {},
    "consistency": {"consistency": 0.1},
    "entropy": {"entropy_minimisation": 0.001},
    "pseudo-label": {"pseudo_label": 3.0},
    "CPS": {"cross_pseudo_supervision": 1.5},
    "MT": {"mean_teacher": 10.0},
    "UA-MT": {"uncertainty_mean_teacher": 10.0},
    "CutMix": {"cutmix": 1.0},
    "MT + entropy": {"mean_teacher": 10.0, "entropy_minimisation": 0.001},
}


def stacked(stack: str, factor: float = 1.0) -> dict[str, Any]:
    """These hooks and no others, whatever was typed for all arms."""
    every = sorted({name for weights in STACKS.values() for name in weights})
    off = {f"hooks.{name}": None for name in every if name not in STACKS[stack]}
    return off | {f"hooks.{name}.weight": factor * weight for name, weight in STACKS[stack].items()}


def arms() -> dict[str, dict[str, Any]]:
    cells = [(stack, budget) for budget in BUDGETS for stack in STACKS]
    return {f"{stack}, {budget}": {**stacked(stack), "data.labelled": budget} for stack, budget in cells}


COMPARE = {f"{stack}, {budget}": f"supervised, {budget}" for stack in STACKS for budget in BUDGETS}


def suggest(trial: Any) -> dict[str, Any]:
    stack = trial.suggest_categorical("stack", [name for name in STACKS if STACKS[name]])
    return stacked(stack, trial.suggest_float("factor", 0.03, 30.0, log=True))
