"""Does every pretraining method train? All of them in a few hundred steps on a core, on slices of a few dozen pixels.

A check of health and no ranking: papers' heads, queues, teachers and rates are made for 100 epochs and more, and here all are
cut to size, by hand and not tuned. One optimizer and one rate (AdamW, 1e-3, a cosine to 0) stand for those of all papers;
heads have 256 units, prototypes are 256, and the queue holds one batch, so that its keys come from one encoder and not from
its history. A teacher that is to arrive within the run moves by a twentieth or a fiftieth a step at first, not by a 250th or a
1000th, and the centre of a faster teacher must be faster in proportion (see `dino.py`). The network normalises over the batch:
under instance norm the coarsest map's mean, which is what methods compare, has few directions to offer (see
`networks/unet.py`).

iBOT trains no encoder but a Vision Transformer's: it has a small UNETR, patches of 8 pixels, and is held against that one from
scratch. The other methods on such a network are in `methods_short_vit.py`.

What to look at is `medssl leaderboard --pretrainings`: whether the loss falls, features keep their rank, and a linear probe
of the frozen encoder beats that of the same encoder before its first step. The fine-tuning behind it is as short.
MoCo's loss is to be held against chance, log(1 + 64) = 4.17. With a longer queue it need not fall at all: as the rate comes
down its keys become those of one encoder, and harder.
IIC alone has 600 steps. Settings in DEFAULTS can be overridden; steps, networks and what SIZES names cannot: `methods.py` asks
the same question of the papers' settings.
The side of a view is left to the command line; the Hippocampus, 31 pixels at its smallest, takes `-o pretrain.side=24`.
"""

from typing import Any

from medssl.search_spaces import methods

QUESTION = "Does every pretraining method train within a few hundred steps, and is any better than training from scratch?"
CONTROL = methods.CONTROL
DEFAULTS = {
    "pretrain.training.steps": 200,
    "pretrain.training.batch": 64,
    "pretrain.training.optimizer": "adamw",
    "pretrain.training.lr": 1e-3,
    "pretrain.training.end_lr": 0.0,
    "pretrain.training.probes": 1,
    "finetune.training.steps": 50,
    "finetune.training.evaluations": 1,
}
UNET: dict[str, Any] = {"network.name": "unet", "network.width": 16, "network.levels": 4, "network.norm": "batch"}
UNETR: dict[str, Any] = {
    "network.name": "unetr",
    "network.patch": 8,
    "network.d": 96,
    "network.depth": 4,
    "network.heads": 4,
    "network.width": 8,
    "network.grid": 3,
}
FAST: dict[str, Any] = {"momentum": 0.98, "centre_momentum": 0.5, "teacher_temperature": (0.04, 0.04), "training.warmup": 0.1}
SIZES: dict[str, dict[str, Any]] = {  # of each method, beside its file's settings
    "barlow_twins": {"d": 256, "hidden": 256},
    "byol": {"d": 128, "hidden": 256, "momentum": 0.98},
    "dino": {"hidden": 256, "bottleneck": 64, "prototypes": 256, "local_crops": 2} | FAST,
    "global_contrast": {"hidden": 256},
    "iic": {"training.steps": 600},  # of its first 200 little can be told, see `iic.py`
    "infonce": {"hidden": 256, "d": 128},
    "mae": {"patch": 4, "width": 16},
    "moco": {"hidden": 256, "queue": 64, "momentum": 0.95},
    "simclr": {},
    "simsiam": {"d": 256, "bottleneck": 64},
    "vicreg": {"d": 256, "hidden": 256},
}
# Young class tokens lie close together: at a temperature of 0.04, or with a centre that lags, targets became uniform within 10
# steps and stayed so. Local views would be a few patches.
SHARP: dict[str, Any] = SIZES["dino"] | {"teacher_temperature": (0.02, 0.02), "centre_momentum": 0.0, "local_crops": 0}
IBOT = SHARP | {"teacher_patch_temperature": (0.02, 0.02)}
SCRATCH_VIT = "from scratch, ViT"
COMPARE = {"ibot": SCRATCH_VIT, SCRATCH_VIT: SCRATCH_VIT}


def arms() -> dict[str, dict[str, Any]]:
    unet = {name: settings | UNET | sized(SIZES.get(name, {})) for name, settings in methods.arms().items()}
    vit = {SCRATCH_VIT: methods.arms()[CONTROL], "ibot": {"pretrain.name": "ibot"} | sized(IBOT)}
    return unet | {name: settings | UNETR for name, settings in vit.items()}


def sized(settings: dict[str, Any]) -> dict[str, Any]:
    """A method's settings under their dotted names."""
    return {f"pretrain.{name}": value for name, value in settings.items()}
