"""What the methods that compare two views of a slice have in common: their views, a check of health, and one norm."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from medssl.methods import augment, crops, monitors
from medssl.methods.protocol import Batch, Step, Views
from medssl.methods.settings import Chain, PairCrops


def pair_views(batch: Batch, config: PairCrops, rng: Generator, name: str) -> Views:
    """Two crops of every slice, each through its own draw of the chain. Slices that cannot hold a pair are left out.

    config   a method's settings: PairCrops and Chain in one
    name     of the method, for errors
    Raises ValueError where the side is not known, or no slice can hold a pair.
    """
    return held_views(batch, config, rng, name)[1]


def held_views(batch: Batch, config: PairCrops, rng: Generator, name: str) -> tuple[Batch, Views]:
    """`pair_views`, and the batch of the slices that they show, for methods that take more from the same slices."""
    assert isinstance(config, Chain)  # the type of "both" has no name
    side = config.side
    if side is None:
        raise ValueError(f"{name}: the side of a view is not known; set pretrain.side to a number of pixels")
    pair = crops.pair(batch["size"], config, rng)
    image, corners, extents, iou = batch["image"], list(pair.corners), list(pair.extents), pair.iou
    if config.unreachable == "skip":
        held = pair.held
        if not held.any():
            raise ValueError(f"{name}: no slice of this batch can hold such a pair; lower pretrain.side or change pretrain.iou")
        batch = {key: value[held] for key, value in batch.items()}
        image, iou = batch["image"], iou[held]
        corners, extents = [c[held] for c in corners], [e[held] for e in extents]
    resized = config.crop == "resized"  # else boxes are known to have `side` pixels, without asking the device
    views = [
        augment.view(image, corner, extent if resized else None, side, config, rng)
        for corner, extent in zip(corners, extents, strict=True)
    ]
    drawn = {"iou": iou.float().mean(), "skipped": (~pair.held).sum().float()}
    return batch, Views(views, corners, extents, monitors=drawn)


def feature(maps: Sequence[Tensor]) -> Tensor:
    """y: the mean over the encoder's coarsest map (n, features, ...), as (n, features)."""
    return maps[-1].flatten(2).mean(2)


def health(features: Tensor, z: Tensor, step: Step) -> dict[str, Tensor]:
    """Monitors of features (n, f) before the head and of what it ends in, z (m, d), which no BatchNorm may have made."""
    return {"collapse": monitors.collapse(z), **feature_health(features, step)}


def feature_health(features: Tensor, step: Step) -> dict[str, Tensor]:
    """Monitors of features (n, f) alone, for a method whose loss compares no slices: their spread and effective rank."""
    watched = {"feature_spread": monitors.spread(features)}
    if features.device.type == "cpu" or (step.total - step.index) % 10 == 1:  # it waits for the device; also at the end
        watched["effective_rank"] = monitors.effective_rank(features)
    return watched


def off_diagonal_squares(a: Tensor, b: Tensor) -> Tensor:
    """Σ_{i≠j} (aᵀb)_ij² of a, b (n, d), as a scalar.

    With fewer rows than columns, as with heads of 8192, it is |aᵀb|² = tr(aaᵀ bbᵀ) less the diagonal: n²d products and a
    matrix of n x n instead of nd² and d x d; what cancels there is float32's 1e-7 of |aᵀb|². With more rows, where columns
    can decorrelate fully, it is the plain sum.
    """
    diagonal = (a * b).sum(0)
    if len(a) < a.shape[1]:
        return ((a @ a.T) * (b @ b.T)).sum() - diagonal.square().sum()
    return (a.T @ b - torch.diag(diagonal)).square().sum()
