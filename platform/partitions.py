"""Batches of volumes x partitions: from each of m volumes one slice of each of S partitions, no label needed.

Where in its volume a slice lies says which partition it belongs to (`methods/global_contrast.py`). The order is arithmetic,
as in `stream.py`: seed and step decide a batch, so that a stopped training continues where it was, and the joint batch does
not depend on the number of workers.

    epoch e      a permutation of the V volumes, in ⌈V / m⌉ batches; the last is filled from the permutation's beginning
    cell (v, s)  the slices of volume v in partition s, in an order that the seed decides; epoch e takes its (e mod length)-th

So a volume comes in every epoch, and a slice in every so many epochs as its cell has slices. A volume too short to have a slice
in each partition leaves cells empty. The place is then taken by a slice of the same partition from a volume that follows
in the permutation, or, when all volumes of the partition are in the batch already, by a further slice of theirs; so it is
with all places where there are fewer volumes than m. No slice comes twice in a batch, and every batch has m S slices, m of
each partition.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from medssl.methods.global_contrast import partition
from medssl.platform.errors import UsageError
from medssl.platform.stream import order, share

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Cells:
    """The slices of a set by volume and partition."""

    rows: Rows  # (N,) the set's rows, cell after cell, inside a cell in the order in which epochs take them
    start: Rows  # (V, S) where each cell begins in `rows`
    count: Rows  # (V, S) how many slices it has

    @staticmethod
    def of(volume: Rows, position: NDArray[np.float32], partitions: int, seed: int) -> "Cells":
        """volume, position   (N,) of each slice: any numbers that tell volumes apart, and 0 to 1 from the lowest slice up"""
        names, number = np.unique(volume, return_inverse=True)
        cell = number * partitions + partition(torch.tensor(position), partitions).numpy()
        shuffled = order(len(volume), seed, epoch=0, part=1)  # part 0 orders the volumes
        count = np.bincount(cell, minlength=len(names) * partitions)
        shape = (len(names), partitions)
        return Cells(
            shuffled[np.argsort(cell[shuffled], kind="stable")], (count.cumsum() - count).reshape(shape), count.reshape(shape)
        )

    def batch(self, visit: Rows, volumes: int, epoch: int) -> Rows:
        """Rows (m, S) of the first m volumes of `visit`, which lists all of them; empty cells filled as the module says."""
        batch = np.empty((volumes, self.count.shape[1]), np.int64)
        for s, column in enumerate(batch.T):
            start, count = self.start[visit, s], self.count[visit, s]
            again = np.arange(count.max())[:, None]  # how many slices of its cell a volume has given already
            turn, place = (again < count).nonzero()  # by turns: all volumes' first, then their second
            turn, place = turn[:volumes], place[:volumes]
            taken = self.rows[start[place] + (epoch + turn) % count[place]]
            own = (turn == 0) & (place < volumes)
            column[place[own]] = taken[own]
            column[np.setdiff1d(np.arange(volumes), place[own])] = taken[~own]
        return batch


def indices(
    volume: Rows,
    position: NDArray[np.float32],
    *,
    volumes: int,
    partitions: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Rows]:
    """Rows that worker `rank` of `world` takes at step `start` and at each step after it, for ever: volume after volume.

    volume, position      (N,) of each slice of the set
    volumes, partitions   m and S; a joint batch has m S slices, of which a worker takes whole volumes
    Raises UsageError when there are fewer slices than m in a partition, or m is no multiple of `world`.
    """
    own = share(volumes, rank, world)
    cells = Cells.of(volume, position, partitions, seed)
    there = len(cells.count)
    held = cells.count.sum(0)
    if held.min() < volumes:
        scarce = int(held.argmin())
        raise UsageError(
            f"partition {scarce + 1} of {partitions} holds {held[scarce]} slices of all volumes together, and a batch takes "
            f"{volumes} of each; use fewer partitions or a smaller training.batch"
        )
    batches = -(-there // volumes)
    known, visit = -1, np.empty(0, np.int64)
    for step in itertools.count(start):
        epoch, place = divmod(step, batches)
        if epoch != known:
            known, visit = epoch, order(there, seed, epoch)
        yield cells.batch(np.roll(visit, -place * volumes), volumes, epoch)[rank * own : (rank + 1) * own].reshape(-1)
