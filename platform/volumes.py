"""Whole volumes for training in three dimensions: the slices that lie in memory, stacked when a batch is made.

    image    (n, c, h, w, z)   storage dtype; z runs from the lowest slice to the highest
    label    (n, h, w, z)      uint8 class ids
    size     (n, 3)            int64: rows, columns and slices that are image, or padding up to the crop's side

Nothing is stored twice: a set of volumes is a table of rows into `Slices`, which may be the copy that a node's trials share.
Order, shards and continuing are those of `stream.node_batches`, with volumes for slices.

A volume with fewer than `least` rows, columns or slices (a cardiac stack of ten slices, and cubes of 16) is padded with 0
below, to the right and above until a crop fits, and its `size` says so: crops are placed as if it were that large, which on
the thin axis leaves them one place. Voxels of padding are UNLABELLED. Sets that do not fit in memory are not streamed in 3D.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from medssl.methods.protocol import UNLABELLED, Batch
from medssl.platform.stream import Slices


@dataclass(frozen=True)
class Volumes:
    """The N volumes that a set of slices makes up, by name; letters as above."""

    slices: Slices
    rows: Tensor  # (N, Z) int64: where each volume's slices lie, from the lowest up; -1 beyond its highest
    size: Tensor  # (N, 3) int64
    plane: tuple[int, int]  # rows and columns of a batch

    @staticmethod
    def of(slices: Slices, least: int = 1) -> "Volumes":
        """The volumes of `slices`, each padded to at least `least` voxels per axis, on the device of the slices."""
        numbers, counts = slices.volume.unique(return_counts=True)  # sorted, as names are
        device, depth = numbers.device, max(least, int(counts.max()))
        lowest_first = (slices.volume * (slices.slice_index.max() + 1) + slices.slice_index).argsort()
        rows = torch.full((len(numbers), depth), -1, device=device)
        rows[torch.arange(depth, device=device) < counts[:, None]] = lowest_first
        size = torch.cat([slices.size[rows[:, 0]], counts[:, None]], 1).clamp(min=least)
        height, width = (max(least, length) for length in slices.image.shape[-2:])
        return Volumes(slices, rows, size, (height, width))

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: ArrayLike | Tensor) -> Batch:
        """The batch of the volumes at these places in the list of names, on the set's device."""
        places = torch.as_tensor(index, device=self.rows.device)
        rows = self.rows[places]
        image, label = self._stacked(self.slices.image, rows, 0), None
        if self.slices.label is not None:
            label = self._stacked(self.slices.label, rows, UNLABELLED)
        else:
            label = torch.full((len(image), *image.shape[2:]), UNLABELLED, dtype=torch.uint8, device=image.device)
        owner = {key: getattr(self.slices, key) for key in ("patient", "volume", "phase")}
        owner = {key: value[rows[:, 0]] for key, value in owner.items() if value is not None}
        return {"image": image, "label": label, "size": self.size[places], "index": places, **owner}

    def _stacked(self, planes: Tensor, rows: Tensor, fill: int) -> Tensor:
        """Planes (N slices, *, h, w) of some volumes, as (n, *, h, w, z)."""
        stack = planes.index_select(0, rows.clamp(min=0).flatten())
        stack[rows.flatten() < 0] = fill
        below, right = (wanted - length for wanted, length in zip(self.plane, stack.shape[-2:], strict=True))
        stack = F.pad(stack, (0, right, 0, below), value=fill)
        return stack.unflatten(0, rows.shape).movedim(1, -1).contiguous()  # once: crops are gathered from it several times
