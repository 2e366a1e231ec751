"""Which choices of global and local contrast matter: pairs, temperature, partitions, regions, blocks of the decoder?

Chaitanya et al., "Contrastive learning of global and local features for medical image segmentation with limited annotations",
NeurIPS 2020, https://arxiv.org/abs/2006.10511. The grid moves one choice at a time away from the paper's (partitions as
positives, tau 0.1, 4 partitions; 13 regions of 3 x 3; but two blocks for three), at 1, 2 and 8 labelled patients, each against
random weights at its budget. Batches have equal numbers of slices; a step of partition-negatives has three views of them,
others two. Arms share what they have in common: all that vary the decoder have one encoder, and budgets differ in fine-tuning
alone.

`suggest` draws all of them together, at two labelled patients, and with them how fine-tuning weighs Dice against cross-entropy;
the stages before it have one term each, which is why they are stages. Batches of 24 can be composed of 2, 3, 4, 6 or 8
partitions, where the data have as many slices in each. `global_local_labels.py` asks about the three stages alone.
"""

from typing import Any

from medssl.search_spaces.global_local_labels import BUDGETS, SCRATCH
from medssl.search_spaces.label_fraction import compared, curve

QUESTION = "Which choices of global and local contrast beat random weights at 1, 2 and 8 labelled patients?"
CONTROL = "from scratch, 2"
DEFAULTS: dict[str, Any] = {
    "network.levels": 4,
    "pretrain.name": "global_contrast",
    "pretrain.training.batch": 24,
    "further.name": "local_contrast",
    "further.training.batch": 24,
}
PAPER: dict[str, Any] = {
    "pretrain.strategy": "partition-positives",
    "pretrain.temperature": 0.1,
    "pretrain.partitions": 4,
    "further.strategy": "random",
    "further.temperature": 0.1,
    "further.region": 3,
    "further.regions": 13,
    "further.blocks": 2,
}
ENCODER_ALONE = {key: value for key, value in PAPER.items() if key.startswith("pretrain.")} | {"further": None}
ENCODER = {
    "pretrain.strategy": ("random", "partition-negatives"),
    "pretrain.temperature": (0.5,),
    "pretrain.partitions": (3, 6),
}
DECODER: dict[str, tuple[Any, ...]] = {
    "further.strategy": ("correspondence",),
    "further.temperature": (0.5,),
    "further.region": (1,),
    "further.regions": (9, 25),
    "further.blocks": (1, 3),
}


def moved() -> dict[str, dict[str, Any]]:
    """One choice at a time; those of the encoder without a decoder's pretraining upon it."""
    choices = [(ENCODER_ALONE, key, value) for key, values in ENCODER.items() for value in values]
    choices += [(PAPER, key, value) for key, values in DECODER.items() for value in values]
    return {f"{_words(key)} {value}": {**base, key: value} for base, key, value in choices}


def _words(key: str) -> str:
    section, _, name = key.partition(".")
    return f"{'global' if section == 'pretrain' else 'local'} {name}"


SERIES: dict[str, dict[str, Any]] = {"from scratch": SCRATCH, "encoder": ENCODER_ALONE, "encoder + decoder": PAPER, **moved()}


def arms() -> dict[str, dict[str, Any]]:
    return curve(SERIES, BUDGETS)


COMPARE = compared(SERIES, BUDGETS)


def suggest(trial: Any) -> dict[str, Any]:
    drawn = {
        "pretrain.strategy": trial.suggest_categorical("pairs", ["random", "partition-negatives", "partition-positives"]),
        "pretrain.temperature": trial.suggest_float("global temperature", 0.03, 1.0, log=True),
        "pretrain.partitions": trial.suggest_categorical("partitions", [2, 3, 4, 6, 8]),
        "further.strategy": trial.suggest_categorical("local pairs", ["random", "correspondence"]),
        "further.temperature": trial.suggest_float("local temperature", 0.03, 1.0, log=True),
        "further.region": trial.suggest_categorical("region", [1, 3]),
        "further.regions": trial.suggest_int("regions", 9, 25),
        "further.blocks": trial.suggest_int("blocks", 1, 3),
    }
    drawn["further.partitions"] = drawn["pretrain.partitions"]
    share = trial.suggest_float("Dice of Dice and cross-entropy", 0.1, 0.9)
    return drawn | {"finetune.dice": 2 * share, "finetune.cross_entropy": 2 * (1 - share), "data.labelled": 2}
