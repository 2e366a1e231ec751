"""Global and local contrast in minutes: random weights, encoder, encoder and decoder, at 1, 2 and 8 labelled patients.

The question and arms of `global_local_labels.py` (Chaitanya et al., https://arxiv.org/abs/2006.10511), cut to two cores and
slices of a few dozen pixels: a narrow U-Net of four levels, 4 partitions, two blocks of the decoder, 200 steps for each of the
two pretrainings. Fine-tuning has the settings with which the hippocampus was learnt from few labels before, and predicts by
windows: instance norm sees whole slices, larger than its crops, as something else (Dice about 0.2 for every arm). All
settings can be overridden; what the paper's budget gives, `-p global-local` asks with `global_local_labels.py`.
"""

from typing import Any

from medssl.search_spaces import global_local_labels

QUESTION = (
    "In minutes: at 1, 2 and 8 labelled patients, does global contrast help, and local contrast of the decoder beyond it?"
)
CONTROL = global_local_labels.CONTROL
DEFAULTS: dict[str, Any] = {
    "network.width": 8,
    "network.levels": 4,
    "pretrain.name": "global_contrast",
    "pretrain.partitions": 4,
    "pretrain.side": 48,
    "pretrain.hidden": 256,
    "pretrain.training.steps": 200,
    "pretrain.training.batch": 24,
    "further.name": "local_contrast",
    "further.side": 48,
    "further.blocks": 2,
    "further.training.steps": 200,
    "further.training.batch": 12,
    "finetune.side": 48,
    "finetune.crops": 1,
    "finetune.flip_p": 0,
    "finetune.rot90_p": 0,
    "finetune.zoom_p": 0.5,
    "finetune.dice_over": "batch",
    "finetune.training.steps": 120,
    "finetune.training.batch": 16,
    "finetune.training.lr": 4e-3,
    "finetune.training.evaluations": 1,
}
arms, COMPARE = global_local_labels.arms, global_local_labels.COMPARE
