"""How many labelled slices does pretraining save?

The curve of `label_fraction.py`, with its series, over slices: budgets nest (a fixed order of all labelled training slices),
and an arm is compared with the one from scratch at its own budget. Kalapos and Gyires-Tóth 2022
(https://arxiv.org/abs/2209.00314) took 1, 3, 7, 15, 30, 75, 150, 300, 749 and 1,498 slices of ACDC, drawn anew for each seed.
Slices of one patient resemble each other: a hundred slices of fifty patients say more than a hundred of two, so this curve may
rise faster than the one over patients, and flatters an annotator who would have to open fifty scans.
"""

from typing import Any

from medssl.search_spaces.label_fraction import SERIES, compared, curve

QUESTION = "With how few labelled slices does pretraining match training from scratch on more of them?"
CONTROL = "from scratch, 1"
BUDGETS = (1, 3, 10, 30, 100, 300, None)  # labelled slices; None: all


def arms() -> dict[str, dict[str, Any]]:
    return curve(SERIES, BUDGETS, "data.labelled_slices")


COMPARE = compared(SERIES, BUDGETS)
