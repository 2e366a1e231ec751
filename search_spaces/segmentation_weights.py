"""How much Dice, how much cross-entropy?

The two are commonly summed as they are: in nnU-Net (Isensee et al. 2021, https://doi.org/10.1038/s41592-020-01008-z), and by
default in `methods/segment.py`, which is the control. The grid has either alone and either three times the other. All arms
begin with the same pretrainings, which run once; `-o pretrain=null` asks it of training from scratch.
"""

from typing import Any

QUESTION = "Which weights of Dice and cross-entropy make the best segmentation, and does any beat equal ones?"
CONTROL = "1 : 1"


def weighed(dice: float, cross_entropy: float) -> dict[str, Any]:
    return {"finetune.dice": dice, "finetune.cross_entropy": cross_entropy}


def arms() -> dict[str, dict[str, Any]]:
    grid = ((1, 1), (1, 0), (3, 1), (1, 3), (0, 1))
    return {f"{dice} : {cross_entropy}": weighed(float(dice), float(cross_entropy)) for dice, cross_entropy in grid}


def suggest(trial: Any) -> dict[str, Any]:
    """Dice per cross-entropy, two decades on a logarithmic scale; the scale of the sum hardly matters to AdamW."""
    return weighed(trial.suggest_float("dice", 0.1, 10.0, log=True), 1.0)
