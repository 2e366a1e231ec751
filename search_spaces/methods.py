"""Which self-supervised method?

Every pretraining method of methods/ with its file's defaults, on one network, against no pretraining: at one index all arms
begin with the same encoder, so "from scratch" is a pretraining of zero steps. Defaults are the papers', epochs, batches and
heads of 8192 units included: days on a few cores. For an even comparison set what all of them have for all of them,
`-o pretrain.training.steps=300 -o pretrain.training.batch=32`. What the pretrainings themselves look like is a table of its
own: add `-o pretrain.training.probes=1` and ask `medssl leaderboard --pretrainings`.

Methods that train no encoder but a Vision Transformer's are in `methods_vit.py`: beside a control with the U-Net, method and
network would be confounded. `-o network.name=…` changes the network of all arms, the control's too.
"""

from typing import Any

QUESTION = "Which pretraining method makes the best segmentation, and does any beat training from scratch?"
CONTROL = "from scratch"
METHODS = (
    "barlow_twins",
    "byol",
    "dino",
    "global_contrast",
    "iic",
    "infonce",
    "mae",
    "moco",
    "simclr",
    "simsiam",
    "vicreg",
)  # a test holds them against methods/


def arms() -> dict[str, dict[str, Any]]:
    return {"from scratch": {"start.weights": None, "pretrain": None}} | {name: {"pretrain.name": name} for name in METHODS}


def suggest(trial: Any) -> dict[str, Any]:
    return {"pretrain.name": trial.suggest_categorical("method", METHODS)}
