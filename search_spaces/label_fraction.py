"""How many labelled patients does pretraining save?

The data-efficiency curve: from scratch, SimSiam and BYOL, each fine-tuned on 1, 2, 4, 8 and all labelled patients. The budgets
nest (1 ⊂ 2 ⊂ 4 …: the split's order), and an arm is compared with the one from scratch at its own budget. Kalapos and
Gyires-Tóth 2022 (https://arxiv.org/abs/2209.00314) drew such a curve over slices, without an arm from scratch;
`slice_fraction.py` does that. A budget larger than the data is left out. Steps follow from epochs and so from the budget;
`-o finetune.training.steps=N` trains every budget alike.

Other methods, or one method with several settings, are a space file of one's own, `medssl sweep ./mine.py`:

    from medssl.search_spaces.label_fraction import CONTROL, QUESTION, SERIES, compared, curve
    MINE = {"from scratch": SERIES["from scratch"], "mae": {"pretrain.name": "mae"}, "moco": {"pretrain.name": "moco"}}
    arms, COMPARE = lambda: curve(MINE), compared(MINE)
"""

from collections.abc import Mapping, Sequence
from typing import Any

QUESTION = "With how few labelled patients does pretraining match training from scratch on more of them?"
CONTROL = "from scratch, 1"
BUDGETS = (1, 2, 4, 8, None)  # labelled patients; None: all
SERIES: dict[str, dict[str, Any]] = {
    "from scratch": {"start.weights": None, "pretrain": None},
    "simsiam": {"pretrain.name": "simsiam"},
    "byol": {"pretrain.name": "byol"},
}


def label(series: str, budget: int | None) -> str:
    return f"{series}, {budget or 'all'}"


def curve(
    series: Mapping[str, Mapping[str, Any]], budgets: Sequence[int | None] = BUDGETS, setting: str = "data.labelled"
) -> dict[str, dict[str, Any]]:
    """Arms of every series at every budget."""
    return {label(name, budget): {**series[name], setting: budget} for budget in budgets for name in series}


def compared(series: Mapping[str, Any], budgets: Sequence[int | None] = BUDGETS) -> dict[str, str]:
    """Each arm of `curve` with the one from scratch at its budget."""
    return {label(name, budget): label("from scratch", budget) for name in series for budget in budgets}


def arms() -> dict[str, dict[str, Any]]:
    return curve(SERIES)


COMPARE = compared(SERIES)
