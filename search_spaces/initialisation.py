"""What should an encoder begin from: nothing, given weights, pretraining on your own slices, or one after the other?

Hierarchical pretraining: Kalapos and Gyires-Tóth, "Self-Supervised Pretraining for 2D Medical Image Segmentation",
ECCV workshops 2022, https://arxiv.org/abs/2209.00314: BYOL on ACDC, on top of supervised or BYOL weights of ImageNet, converged
fastest, and few epochs of it were enough; supervised weights alone were best where labels were fewest. It had no arm from
scratch; here that is the control.

    medssl sweep initialisation -o start.weights=resnet50.pth -o network.name=… -o pretrain.name=byol
"""

from typing import Any

QUESTION = "Do given weights, self-supervised pretraining, or both in a row beat training from scratch?"
CONTROL = "from scratch"
NEEDS = ("start.weights",)


def arms() -> dict[str, dict[str, Any]]:
    return {
        "from scratch": {"start.weights": None, "pretrain": None},
        "given weights": {"pretrain": None},
        "self-supervised": {"start.weights": None},
        "hierarchical": {},
    }
