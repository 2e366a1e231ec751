"""The contract every training method meets: five verbs, three records, no base class.

Shape letters used across the package: n slices in a batch, v views, c channels, h w pixels of a slice, s side of a crop in
pixels, d embedding size, k classes, D spatial dimensions (2 or 3).

A batch, as `platform/stream.py` delivers it on the training device, is a dict of tensors:

    image     (n, c, h, w)  storage dtype; slices smaller than h x w are padded with 0 below and to the right
    size      (n, D)        int64: rows and columns of each slice that are image, not padding
    label     (n, h, w)     uint8 class ids; UNLABELLED where there is no annotation, padding included
    position  (n,)          float32: 0 at the volume's lowest slice, 1 at its highest
    patient, volume, index  (n,) int64: whose slice it is, and its row in the store
    depth     (n,)          int64: slices of its volume
    phase     (n,)          int64: of the volume's phases (end diastole, arterial …) which one, by name; -1: none is known

A step of semi-supervised training has m slices more, whose labels, if there are any, do not travel:

    unlabelled_image  (m, c, h', w')        unlabelled_size  (m, D)
    unlabelled_position, _patient, _volume, _depth, _phase  (m,): what contrast by meta-labels asks (`infonce.py`)

Where the network's `spatial_dims` is 3, an element is a volume, and what is said of slices here and in the methods holds for
volumes: as `platform/volumes.py` delivers it, z axis last and running upwards,

    image     (n, c, h, w, z)        label  (n, h, w, z)        size  (n, 3), at least the side of a crop
    patient, volume, phase, index  (n,)     and no position: it is an axis now

Views are then cubes (n, c, s, s, s), their labels (n, s, s, s). A quarter turn stays in the plane of a slice.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Generator, Tensor

if TYPE_CHECKING:
    from medssl.methods.augment import Pair

UNLABELLED = 255  # the class id of "nobody said": ignored by every loss and metric

Batch = Mapping[str, Tensor]


def intensities(image: Tensor) -> Tensor:
    """Stored pixels as float32 intensities: uint8 holds [0, 1] in 1/255, int16 in 1/32767, floats are kept as they are."""
    if image.dtype == torch.uint8:
        return image.float().div_(255)
    if image.dtype == torch.int16:
        return image.float().div_(32767)
    return image.float()


@dataclass(frozen=True)
class Step:
    """Where training stands. `index` counts optimizer steps from 0; `total` is their number."""

    index: int
    total: int

    @property
    def progress(self) -> float:
        """Fraction of training done, in [0, 1)."""
        return self.index / self.total


@dataclass(frozen=True)
class Views:
    """The augmented inputs of one step, with what the losses need to know about them."""

    images: list[Tensor]  # v tensors, each (n, c, s, s), float32
    corners: list[Tensor] = field(default_factory=list)  # v tensors, each (n, D), int64: first pixel of the source box
    extents: list[Tensor] = field(default_factory=list)  # v tensors, each (n, D), int64: sides of the source box, pixels
    labels: Tensor | None = None  # (n, s, s) int64, UNLABELLED where the slice carries no label
    masks: list[Tensor] = field(default_factory=list)  # v tensors, each (n, t), bool: patches hidden from the network
    groups: dict[str, Tensor] = field(default_factory=dict)  # (n,) int64 each: what slices share, such as volume, partition
    monitors: dict[str, Tensor] = field(default_factory=dict)  # what the draws looked like: realised IoU, skipped slices
    unlabelled: "Pair | None" = None  # of the unlabelled slices, where hooks learn from them
    drawn: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # what each hook drew besides


@dataclass(frozen=True)
class Loss:
    """Weighted scalar terms to minimise, and detached monitors to watch."""

    terms: dict[str, Tensor]
    monitors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        """Sum of the terms, shape ()."""
        return torch.stack(list(self.terms.values())).sum()


class Method(Protocol):
    """A method is an nn.Module with these five verbs; its file ends in `METHOD = TheClass`.

    It is built around an encoder, whose forward gives maps from the finest to the coarsest and whose `channels` are theirs.
    A method that asks more of it, such as patch tokens, says at the top of its file which networks have such encoders:
    `ENCODERS = ("unetr",)`, a literal, read without importing the file. Others are then refused before anything starts.
    Three more such literals, each with what holds without it: `TRANSFERS = "encoder+decoder"` ("encoder") for a method that is
    built around the whole network, and hands on the blocks of its decoder too; `VIEWS = "whole slices"` ("crops"), by which the
    platform chooses the side of a view; `SLICES_ONLY = True` (False) for one that knows no volumes.
    """

    def augment(self, batch: Batch, rng: Generator) -> Views:
        """All randomness of a step, batched, on the batch's device; equal generators give equal views."""

    def loss(self, views: Views, step: Step) -> Loss:
        """Deterministic given the views."""

    def after_step(self, step: Step) -> None:
        """What follows the optimizer: teachers, centres, queues."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups: `params`, their `weight_decay`, and the keys that `optimizers.py` lists where they differ."""

    def transferable_state(self) -> dict[str, Tensor]:
        """What fine-tuning receives: keys and shapes of the network's encoder (an explicit choice of the method).

        With TRANSFERS "encoder+decoder" keys of the network: all of `encoder.…`, and those of the decoder that were trained.
        """
