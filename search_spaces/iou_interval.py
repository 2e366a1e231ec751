"""Which overlap of two crops makes a good positive pair?

Konieczkowicz, "Exploring self-supervised learning for CT" (MSc thesis, AGH Kraków, 2023): SimSiam pairs from four IoU
intervals and from unconstrained crops, against no pretraining, 2 pretrainings x 2 fine-tunings each. It reported [0.3, 0.6]
best on FLARE22 (slice-wise DSC 0.853, from scratch 0.843, random crops 0.824); with two pretrainings per arm none of these
differences can be told from chance (`medssl leaderboard --help`).
"""

from typing import Any

QUESTION = "Which IoU interval makes a good positive pair, and does any beat training from scratch?"
CONTROL = "from scratch"


def arms() -> dict[str, dict[str, Any]]:
    """The paper's arms. Ends are as the paper means them: its 0.0001 stands for "more than none"."""
    return {
        "from scratch": {"start.weights": None, "pretrain": None},
        "random crop": {"pretrain.iou": None},
        "[0, 0]": {"pretrain.iou": (0.0, 0.0), "pretrain.ends": "[]"},
        "(0, 0.3]": {"pretrain.iou": (0.0, 0.3), "pretrain.ends": "(]"},
        "[0.3, 0.6]": {"pretrain.iou": (0.3, 0.6), "pretrain.ends": "[]"},
        "[0.6, 1]": {"pretrain.iou": (0.6, 1.0), "pretrain.ends": "[]"},
    }


def suggest(trial: Any) -> dict[str, Any]:
    """A continuous interval: its low end, and how much of what is left above it belongs to it (at least 0.05 in all)."""
    low = trial.suggest_float("low", 0.0, 0.9)
    share = trial.suggest_float("share", 0.0, 1.0)
    high = low + 0.05 + share * (0.95 - low)
    return {"pretrain.iou": (round(low, 4), round(high, 4)), "pretrain.ends": "[]"}
