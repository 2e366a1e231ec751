"""How many labelled patients does pretraining save?

The data-efficiency curve: from scratch and pretrained, each fine-tuned on 1, 2, 4, 8 and all labelled patients. The budgets
nest (1 ⊂ 2 ⊂ 4 …: the split's order), and an arm is compared with the one from scratch at its own budget. Kalapos and
Gyires-Tóth 2022 (https://arxiv.org/abs/2209.00314) drew such a curve over slices, without an arm from scratch;
`slice_fraction.py` does that. A budget larger than the data is left out. Steps follow from epochs and so from the budget;
`-o finetune.training.steps=N` trains every budget alike.
"""

from typing import Any

QUESTION = "With how few labelled patients does pretraining match training from scratch on more of them?"
CONTROL = "from scratch, 1"
BUDGETS = (1, 2, 4, 8, None)  # labelled patients; None: all
SERIES: dict[str, dict[str, Any]] = {"from scratch": {"start.weights": None, "pretrain": None}, "pretrained": {}}


def label(series: str, budget: int | None) -> str:
    return f"{series}, {budget or 'all'}"


def arms() -> dict[str, dict[str, Any]]:
    cells = [(series, budget) for budget in BUDGETS for series in SERIES]
    return {label(series, budget): {**SERIES[series], "data.labelled": budget} for series, budget in cells}


COMPARE = {label(series, budget): label("from scratch", budget) for series in SERIES for budget in BUDGETS}
