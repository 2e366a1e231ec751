"""How long must a pretraining last?

Kalapos and Gyires-Tóth 2022 (https://arxiv.org/abs/2209.00314) fine-tuned from the checkpoints of one BYOL pretraining at
epochs 0 to 10, 12, 14 … 24, 25, 50, 100, 200, 300 and 400, and found fewer than five epochs to suffice. Here each pretraining
keeps its encoder at a geometric series of its steps, whatever their number is, and the arms share it: an early arm costs no
pretraining of its own.

The learning rate of an early snapshot has not come down yet, as in the study: an arm tells what a pretraining that is stopped
there is worth, not what one planned to be that short would be.
"""

from typing import Any

QUESTION = "How much of a pretraining is enough, and does any of it beat training from scratch?"
CONTROL = "from scratch"
FRACTIONS = tuple(1 / 2**halvings for halvings in range(8, 0, -1))  # of the steps; 1/256 of 400 epochs is 1.6 of them
DEFAULTS = {"pretrain.training.snapshots": FRACTIONS}


def arms() -> dict[str, dict[str, Any]]:
    early = {f"1/{round(1 / fraction)}": {"start.step": fraction} for fraction in FRACTIONS}
    return {"from scratch": {"start.weights": None, "pretrain": None}, **early, "all": {}}
