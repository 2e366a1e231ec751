"""The table of semi-supervised methods in some twenty minutes of two cores: one protocol, a small network, few steps.

Supervised, MT, UA-MT, CPS, MI, self-paced InfoNCE, BCP and UniMatch at 2 and 8 labelled patients. With `data.draws=2` the
repeats of an arm learn from other labelled patients in turn, all arms from the same: with k = 2 pretrainings (here label
draws, which are then the unit of evidence) and m = 2 fine-tunings (seeds),

    medssl sweep semi-supervised-short --data ../shared/data/SunnybrookLV --pretrainings 2 --finetunings 2

Every arm has 240 steps of 4 labelled crops of 64 pixels; hooks see 4 unlabelled ones besides. That is not what the papers
spend, whose weights are made for runs of 10,000 steps and more. The weights here are NOT tuned. They follow from one small
study on the phantom (2 labelled patients, 300 steps, seed 0, Dice on the validation patients): supervised 0.134; mean teacher
with the weight of its file, 10, which is whole after 2/9 of the steps, 0.095; with a weight of 1, 0.133; with 10 and a ramp
over all steps, 0.133; pseudo-label 0.064. The reading: a weight that is whole while the network still says mostly background
makes the network agree with itself. Either cure removed the harm, none gave a gain, and it is one seed. So ramps rise over all
of the steps here, and weights are 1 or less. Self-paced InfoNCE was given its ramp later, after its scores on Sunnybrook were
seen (EXPERIMENTS.md); the other weights are as they were before any was.
`semi_supervised.py` has the weights of the hooks' files.
UA-MT makes 4 noisy passes instead of 8, MI has 10 clusters and 2 heads.
"""

from typing import Any

from medssl.search_spaces import semi_supervised

QUESTION = "In a few hundred steps, which semi-supervised method beats supervised training on the same few labelled patients?"
CONTROL = "supervised, 2"
DEFAULTS: dict[str, Any] = {
    "pretrain": None,
    "data.draws": 2,
    "network.width": 8,
    "network.levels": 4,
    "finetune.side": 64,
    "finetune.crops": 1,
    "finetune.training.steps": 240,
    "finetune.training.batch": 4,
    "finetune.training.evaluations": 3,
}
RISING: dict[str, Any] = {"ramp": "sigmoid", "ramp_length": 1.0}
STACKS: dict[str, dict[str, dict[str, Any]]] = {  # the hooks of an arm with their settings
    "supervised": {},
    "MT": {"mean_teacher": {"weight": 1.0, "momentum": 0.95} | RISING},
    "UA-MT": {"uncertainty_mean_teacher": {"weight": 1.0, "momentum": 0.95, "passes": 4} | RISING},
    "CPS": {"cross_pseudo_supervision": {"weight": 0.5} | RISING},
    "MI": {
        "mutual_information": {"weight": 0.1, "clusters": 10, "heads": 2} | RISING,
        "consistency": {"weight": 1.0} | RISING,
    },
    "self-paced": {"self_paced": {"weight": 0.1} | RISING},
    "BCP": {"bcp": {"weight": 0.5, "momentum": 0.95} | RISING},
    "UniMatch": {"unimatch": {"weight": 0.5} | RISING},
}


def arms() -> dict[str, dict[str, Any]]:
    every = sorted({name for hooks in STACKS.values() for name in hooks})
    found = {}
    for budget in semi_supervised.BUDGETS:
        for stack, hooks in STACKS.items():
            settings: dict[str, Any] = {f"hooks.{name}": None for name in every if name not in hooks}
            settings |= {f"hooks.{name}.{key}": value for name, values in hooks.items() for key, value in values.items()}
            found[f"{stack}, {budget}"] = settings | {"data.labelled": budget}
    return found


COMPARE = semi_supervised.compared(STACKS)


def suggest(trial: Any) -> dict[str, Any]:
    """One of the stacks, all of its weights times one factor."""
    stack = trial.suggest_categorical("stack", [name for name in STACKS if STACKS[name]])
    factor, settings = trial.suggest_float("factor", 0.03, 30.0, log=True), arms()[f"{stack}, {semi_supervised.BUDGETS[0]}"]
    return {key: factor * value if key.endswith(".weight") else value for key, value in settings.items()}
