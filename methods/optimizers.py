"""From settings to an optimizer, and the learning rate of every step.

The schedule is the usual linear warm-up and cosine (Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983):

    lr_k = base · k / W                                           k < W, the warm-up
    lr_k = end + (base - end) · (1 + cos(π (k - W) / (K - W))) / 2     W ≤ k ≤ K

It is a pure function of the step, so a stopped training needs no schedule state to continue.
"""

import math
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from medssl.methods.protocol import Method
from medssl.methods.settings import Training


def decay_groups(module: nn.Module, weight_decay: float, fixed_lr: bool = False) -> list[dict[str, Any]]:
    """The trainable parameters of `module` as optimizer groups: weights that decay, then what does not.

    Decay is for tensors of two and more dimensions that are not biases: pulling a normalisation's scale or a bias to zero
    changes the function, not its complexity.

    fixed_lr   these parameters keep the base learning rate throughout
    """
    trainable = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    decays = [parameter for name, parameter in trainable if parameter.dim() > 1 and not name.endswith("bias")]
    others = [parameter for name, parameter in trainable if parameter.dim() <= 1 or name.endswith("bias")]
    groups = [(decays, weight_decay), (others, 0.0)]
    return [{"params": params, "weight_decay": decay, "fixed_lr": fixed_lr} for params, decay in groups if params]


def build(method: Method, training: Training) -> Optimizer:
    """The optimizer of a training, over `method.parameter_groups`.

    The update is one fused kernel where torch has one; on a CPU too, where it is 5 (AdamW) and 2 to 4 (SGD) times as fast
    as the loop over tensors.
    Raises ValueError for an optimizer other than "sgd" and "adamw".
    """
    groups = method.parameter_groups(training.weight_decay)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    fused = devices <= {"cpu", "cuda"}
    if training.optimizer == "sgd":
        return SGD(groups, lr=training.lr, momentum=training.momentum, fused=fused)
    if training.optimizer == "adamw":
        return AdamW(groups, lr=training.lr, betas=training.betas, fused=fused)
    raise ValueError(f'optimizer "{training.optimizer}": expected sgd or adamw')


def learning_rate(training: Training, step: int, total: int) -> float:
    """The scheduled learning rate of optimizer step `step`, counted from 0, of `total`."""
    warmup = round(training.warmup * total)
    if step < warmup:
        return training.lr * step / warmup
    progress = (step - warmup) / (total - warmup)
    return training.end_lr + (training.lr - training.end_lr) * (1 + math.cos(math.pi * progress)) / 2


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Give every group the learning rate `lr`, except those whose rate is fixed."""
    for group in optimizer.param_groups:
        if not group.get("fixed_lr", False):
            group["lr"] = lr
