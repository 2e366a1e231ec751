"""Does every pretraining method train? All of them in a few hundred steps on a core, on slices of a few dozen pixels.

A check of health and no ranking: papers' heads, queues, teachers and rates are made for 100 epochs and more, and here all are
cut to size, by hand and not tuned. One optimizer and one rate (AdamW, 1e-3, a cosine to 0) stand for those of all papers;
heads have 256 units, prototypes are 256, and the queue holds one batch, so that its keys come from one encoder and not from
its history. A teacher that is to arrive within the run moves by a twentieth or a fiftieth a step at first, not by a 250th or a
1000th, and the centre of a faster teacher must be faster in proportion (see `dino.py`). The network normalises over the batch:
under instance norm the coarsest map's mean, which is what methods compare, has few directions to offer (see
`networks/unet.py`).

What to look at is `medssl leaderboard --pretrainings`: whether the loss falls, features keep their rank, and a linear probe
of the frozen encoder beats that of the same encoder before its first step. The fine-tuning behind it is as short.
MoCo's loss is to be held against chance, log(1 + 64) = 4.17. With a longer queue it need not fall at all: as the rate comes
down its keys become those of one encoder, and harder.
Settings in DEFAULTS can be overridden, those of SIZES cannot: `methods.py` asks the same question of the papers' settings.
The side of a view is left to the command line; the Hippocampus, 31 pixels at its smallest, takes `-o pretrain.side=24`.
"""

from typing import Any

from medssl.search_spaces import methods

QUESTION = "Does every pretraining method train within a few hundred steps, and is any better than training from scratch?"
CONTROL = methods.CONTROL
DEFAULTS = {
    "network.width": 16,
    "network.levels": 4,
    "network.norm": "batch",
    "pretrain.training.steps": 200,
    "pretrain.training.batch": 64,
    "pretrain.training.optimizer": "adamw",
    "pretrain.training.lr": 1e-3,
    "pretrain.training.end_lr": 0.0,
    "pretrain.training.probes": 1,
    "finetune.training.steps": 50,
    "finetune.training.evaluations": 1,
}
FAST: dict[str, Any] = {"momentum": 0.98, "centre_momentum": 0.5, "teacher_temperature": (0.04, 0.04), "training.warmup": 0.1}
SIZES: dict[str, dict[str, Any]] = {  # of each method, beside its file's settings
    "barlow_twins": {"d": 256, "hidden": 256},
    "byol": {"d": 128, "hidden": 256, "momentum": 0.98},
    "dino": {"hidden": 256, "bottleneck": 64, "prototypes": 256, "local_crops": 2} | FAST,
    "global_contrast": {"hidden": 256},
    "iic": {},
    "infonce": {"hidden": 256, "d": 128},
    "mae": {"patch": 4, "width": 16},
    "moco": {"hidden": 256, "queue": 64, "momentum": 0.95},
    "simclr": {},
    "simsiam": {"d": 256, "bottleneck": 64},
    "vicreg": {"d": 256, "hidden": 256},
}


def arms() -> dict[str, dict[str, Any]]:
    return {name: settings | sized(SIZES.get(name, {})) for name, settings in methods.arms().items()}


def sized(settings: dict[str, Any]) -> dict[str, Any]:
    """A method's settings under their dotted names."""
    return {f"pretrain.{name}": value for name, value in settings.items()}
