"""Which temperature suits a contrastive loss?

Low temperatures weigh the hardest negatives most, high ones all alike (Wang and Liu 2021, "Understanding the Behaviour of
Contrastive Loss", https://arxiv.org/abs/2012.09740). SimCLR's table 5 (https://arxiv.org/abs/2002.05709) finds 0.1 best on
ImageNet among 0.05, 0.1, 0.5 and 1, MoCo v2 takes 0.2; slices of one organ are far more alike than photographs. For any
method that has a temperature: `-o pretrain.name=moco`.
"""

from typing import Any

QUESTION = "Which temperature suits these slices, and does any beat training from scratch?"
CONTROL = "from scratch"
DEFAULTS = {"pretrain.name": "simclr"}
TEMPERATURES = (0.05, 0.1, 0.2, 0.5, 1.0)


def arms() -> dict[str, dict[str, Any]]:
    grid = {f"{temperature:g}": {"pretrain.temperature": temperature} for temperature in TEMPERATURES}
    return {"from scratch": {"start.weights": None, "pretrain": None}, **grid}


def suggest(trial: Any) -> dict[str, Any]:
    return {"pretrain.temperature": trial.suggest_float("temperature", 0.05, 1.0, log=True)}
