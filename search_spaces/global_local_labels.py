"""Does pretraining a decoder help beyond its encoder, at one, two and eight labelled patients?

The table of Chaitanya et al., "Contrastive learning of global and local features for medical image segmentation with limited
annotations", NeurIPS 2020, https://arxiv.org/abs/2006.10511, in three rows: random weights, the encoder by global contrast, and
on top of it the first blocks of the decoder by local contrast. The encoder's pretraining is one for both rows and all budgets,
the decoder's one for all budgets: stages are looked up by what decides them. An arm is compared with random weights at its
budget.

`-p global-local` has the paper's network, sizes and steps; without it methods train as their files say, on the usual network.
Where volumes have few slices, fewer partitions can be chosen (`-o pretrain.partitions=3`).
"""

from typing import Any

from medssl.search_spaces.label_fraction import compared, curve

QUESTION = "At 1, 2 and 8 labelled patients, does global contrast help, and local contrast of the decoder beyond it?"
CONTROL = "from scratch, 1"
BUDGETS = (1, 2, 8)  # labelled patients
DEFAULTS = {"pretrain.name": "global_contrast", "further.name": "local_contrast"}
SCRATCH: dict[str, Any] = {"start.weights": None, "pretrain": None, "further": None}
SERIES: dict[str, dict[str, Any]] = {
    "from scratch": SCRATCH,
    "encoder": {"further": None},
    "encoder + decoder": {},
}


def arms() -> dict[str, dict[str, Any]]:
    return curve(SERIES, BUDGETS)


COMPARE = compared(SERIES, BUDGETS)
