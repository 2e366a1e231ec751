"""Settings that several methods share, as plain frozen dataclasses.

This file imports nothing but the standard library: `platform/find.py` reads the `Config` and `Training` classes of a
method from its source, so that a plan can be checked without importing torch. They may use the names defined here,
`dataclass`, `field`, `Literal`, and literals.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long and how fast a stage trains. A method's own file overrides these with its paper's values."""

    steps: int | None = None  # optimizer steps; None: `epochs` times the slices, over the batch
    epochs: float = 100  # passes over the slices, used when `steps` is None
    batch: int = 128  # slices per step, over all workers together
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float = 1e-3  # peak learning rate; never scaled by the batch behind the user's back
    end_lr: float = 1e-6  # where the cosine ends
    warmup: float = 0.0  # fraction of the steps in which lr rises linearly from 0
    weight_decay: float = 1e-5  # on weights of two and more dimensions only
    momentum: float = 0.9  # of sgd
    clip: float | None = None  # largest gradient norm
    accumulate: int = 1  # micro-batches per optimizer step
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    evaluations: int = 10  # evenly spaced looks at the validation patients; the best one is kept (fine-tuning only)
    stop_on_collapse: bool = True  # end a pretraining whose features have collapsed (see `platform/loop.py`)


@dataclass(frozen=True, kw_only=True)
class PairCrops:
    """Which two crops of one slice make a positive pair (see `crops.py`)."""

    side: int | None = None  # pixels of a view; None: 96, or less where the slices are too small for two disjoint crops
    iou: tuple[float, float] | None = (0.3, 0.6)  # overlap of the two source boxes; None: any
    ends: Literal["[]", "(]", "[)", "()"] = "[]"  # which ends of the interval belong to it
    law: Literal["conditional", "pair", "iou"] = "conditional"  # what is uniform inside the interval
    crop: Literal["fixed", "resized"] = "fixed"  # boxes of `side` pixels, or random-resized boxes
    scale: tuple[float, float] = (0.08, 1.0)  # area of a resized box, as a fraction of the slice
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height of a resized box
    unreachable: Literal["error", "skip"] = "error"  # a slice that cannot hold such a pair: refuse, or leave out and count


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The intensity and geometry chain of the CT study (see `augment.py`); operations in this order."""

    zoom: tuple[float, float] = (0.8, 1.2)
    zoom_p: float = 0.75
    flip_p: float = 0.5  # per axis
    rot90_p: float = 0.5
    intensity_scale: float = 0.1  # x (1 + f), f uniform in ±
    intensity_scale_p: float = 0.75
    intensity_shift: float = 0.1  # x + o, o uniform in ±, intensities being in [0, 1]
    intensity_shift_p: float = 0.75
    blur_sigma: tuple[float, float] = (0.25, 1.5)  # pixels, each axis its own
    blur_p: float = 0.25
    noise_std: float = 0.01  # the deviation is itself uniform in [0, this]
    noise_p: float = 0.25
