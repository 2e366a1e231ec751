"""Does pretraining help at all?

The plain question of every self-supervised paper: SimSiam on all training slices, labels unused, against the same network from
scratch, fine-tuned alike on the labels that `-o data.labelled=N` allows. `-o pretrain.name=…` would ask it of another method.
"""

from typing import Any

QUESTION = "Does pretraining on the unlabelled slices beat training from scratch, at equal fine-tuning?"
CONTROL = "from scratch"


def arms() -> dict[str, dict[str, Any]]:
    return {"from scratch": {"start.weights": None, "pretrain": None}, "pretrained": {}}
