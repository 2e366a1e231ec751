"""Prepared slices on their way to training: each once per epoch, in an order that seed and epoch alone decide.

An epoch is a permutation of the set, and training consumes one epoch after another without a seam: a batch may end one
and begin the next, none is smaller than the others, and no slice is dropped. So where a training stands is its step
number, and continuing is arithmetic. There are two paths:

`node_batches`  the set lies in memory (`Slices`, once per node: Ray's object store shares it between trials). Step t of
                a joint batch of b takes positions tb … tb + b of the stream; of w workers, worker r takes the r-th part
                of these. The joint batch does not depend on w.
`ray_batches`   for sets that do not fit: Ray Data reads ahead, file by file. The files are permuted per epoch, and the
                rows inside each file; of l lanes, lane i takes the i-th part of the epoch, so that a file is read in one
                lane, or two. A step takes b / l slices of every lane, and each worker serves l / w of these. Slices of one
                file stay neighbours: fair, as `store.py` shuffles rows over the files once and for all, but less mixed
                than the other path. The joint batch depends on l, not on w: a group of workers that may grow and shrink
                has as many lanes as all its sizes divide, any other one lane per worker.

Nothing else here is random, and nothing is augmented: a change of crops or views touches no data.
"""

import functools
import heapq
import itertools
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from medssl.methods.protocol import UNLABELLED, Batch
from medssl.platform.errors import RunError, UsageError
from medssl.platform.records import Volume
from medssl.platform.store import Store, VolumeRecord

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ["volume", "slice_index", "position", "image", "label"]
PLACES = ("size", "position", "patient", "volume", "depth", "phase")  # of a slice: what a batch tells beside pixels
UNLABELLED_KEYS = ("image", *PLACES)  # what hooks see of unlabelled slices
PLAN = 256  # tasks of one Ray Data execution; starting one costs 0.1 s, and 0.8 ms per task of its plan
AHEAD = 3  # tasks that a worker reads ahead
LEAST = 32 << 20  # bytes of pixels that a task reads, or MOST pieces: Ray Data looks after its tasks every 0.1 s
MOST = 16
PATIENCE = 5.0  # seconds for a thread to end

Arrays = dict[str, Any]


@dataclass(frozen=True)
class Slices:
    """A set of N slices in memory, padded to the largest with 0 below and to the right; letters as in the protocol."""

    image: Tensor  # (N, c, H, W), storage dtype
    label: Tensor | None  # (N, H, W) uint8, UNLABELLED where nobody annotated; None: nobody annotated anything
    labelled: Tensor  # (N,) bool: whether the slice's volume carries a label
    size: Tensor  # (N, 2) int64: rows and columns that are not padding
    position: Tensor  # (N,) float32: 0 at the volume's lowest slice, 1 at its highest
    patient: Tensor  # (N,) int64, into patient_names
    volume: Tensor  # (N,) int64, into volume_names
    slice_index: Tensor  # (N,) int64, from the volume's lowest slice up
    spacing_mm: Tensor  # (N, 3) float32: between rows, columns, slices
    patient_names: tuple[str, ...]
    volume_names: tuple[str, ...]
    depth: Tensor | None = None  # (N,) int64: slices of the slice's volume
    phase: Tensor | None = None  # (N,) int64: its volume's phase, numbered by name; -1: none is known

    @staticmethod
    def read(store: Store, patients: Iterable[str] | None = None, labelled: bool | None = None) -> "Slices":
        """All slices of some patients (None: of all), of volumes with a label, without one, or both (None).

        Rows keep the order of the files. Files are read one at a time: memory peaks at the set and one file.
        Raises UsageError on an unknown patient, RunError when nothing is left or a file is broken.
        """
        chosen = _Chosen.of(store, patients, labelled)
        arrays, start = chosen.empty(chosen.count), 0
        for file in store.files:
            rows = chosen.rows(file)
            chosen.decode(rows, {key: array[start : start + len(rows)] for key, array in arrays.items()})
            start += len(rows)
        if start != chosen.count:
            raise RunError(f"{store.root}: {start} slices where the manifest says {chosen.count}; prepare it anew")
        return Slices.from_arrays(arrays | {"patient_names": chosen.patient_names, "volume_names": chosen.volume_names})

    def arrays(self) -> Arrays:
        """The set as NumPy arrays, without a copy: what `ray.put` shares between the processes of a node."""
        return {
            field.name: value.numpy() if isinstance(value, Tensor) else value
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        }

    @staticmethod
    def from_arrays(arrays: Mapping[str, Any]) -> "Slices":
        """The set around arrays that may be read-only, as those that Ray shares are; without a copy."""
        names: dict[str, Any] = {key: tuple(arrays[key]) for key in ("patient_names", "volume_names")}
        # By DLPack: torch.from_numpy warns of read-only arrays. Nothing here writes into them.
        tensors: dict[str, Any] = {key: torch.from_dlpack(array) for key, array in arrays.items() if key not in names}
        return Slices(**{"label": None, **tensors, **names})

    def __len__(self) -> int:
        return len(self.image)

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor))

    def to(self, device: torch.device | str) -> "Slices":
        """The set on a device; batches are then made there."""
        return self._each(lambda tensor: tensor.to(device))

    def select(self, patients: Iterable[str] | None = None, labelled: bool | None = None) -> "Slices":
        """The slices of some patients, as `read` takes them; the set itself when that is all of it. Padding stays."""
        wanted = set(self.patient_names if patients is None else patients)
        kept = torch.tensor([name in wanted for name in self.patient_names], device=self.image.device)[self.patient]
        if labelled is not None:
            kept &= self.labelled == labelled
        return self if kept.all() else self._each(lambda tensor: tensor[kept])

    def only(self, chosen: Iterable[tuple[str, int]]) -> "Slices":
        """The slices that are named by volume and slice_index; padding stays."""
        numbers = {name: number for number, name in enumerate(self.volume_names)}
        wanted = {(numbers[volume], index) for volume, index in chosen}
        places = zip(self.volume.tolist(), self.slice_index.tolist(), strict=True)
        kept = torch.tensor([place in wanted for place in places], device=self.image.device)
        if int(kept.sum()) != len(wanted):
            raise RunError(f"{len(wanted)} slices are wanted, {int(kept.sum())} of them are there; prepare the data anew")
        return self._each(lambda tensor: tensor[kept])

    def take(self, index: ArrayLike | Tensor) -> Batch:
        """The batch of the slices at these rows, copied, on the set's device."""
        rows = torch.as_tensor(index, device=self.image.device)
        image = self.image.index_select(0, rows)
        if self.label is None:
            label = torch.full((len(rows), *image.shape[-2:]), UNLABELLED, dtype=torch.uint8, device=image.device)
        else:
            label = self.label.index_select(0, rows)
        known = {key: getattr(self, key) for key in PLACES}
        others = {key: value[rows] for key, value in known.items() if value is not None}
        return {"image": image, "label": label, "index": rows, **others}

    def volumes(self) -> Iterator[Volume]:
        """The volumes that the slices make up, by name: stacked from the lowest slice to the highest, without padding."""
        for number in self.volume.unique().tolist():  # sorted, as names are
            rows = torch.nonzero(self.volume == number).flatten()
            rows = rows[self.slice_index[rows].argsort()]
            first = int(rows[0])
            h, w = self.size[first].tolist()
            yield Volume(
                patient=self.patient_names[int(self.patient[first])],
                volume=self.volume_names[number],
                image=self.image[rows, :, :h, :w],
                label=self.label[rows, :h, :w] if self.label is not None and self.labelled[first] else None,
                spacing_mm=tuple(self.spacing_mm[first].tolist()),
            )

    def _each(self, change: Any) -> "Slices":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Slices(**{key: change(value) if isinstance(value, Tensor) else value for key, value in values.items()})


def fits(
    store: Store,
    patients: Iterable[str] | None = None,
    labelled: bool | None = None,
    memory_fraction: float = 0.25,
) -> bool:
    """Whether `Slices.read` of the same arguments stays within a fraction of this machine's (or container's) memory.

    The default leaves room in Ray's object store, which by itself takes 0.3 of the memory.
    """
    chosen = _Chosen.of(store, patients, labelled)
    needed = chosen.count * sum(array.nbytes for array in chosen.empty(1).values())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # "max" where there is no limit
    if limit.exists() and (said := limit.read_text().strip()).isdigit():
        memory = min(memory, int(said))
    return needed <= memory_fraction * memory


# Order


def order(count: int, seed: int, epoch: int, part: int = 0) -> NDArray[np.int64]:
    """A permutation of `count` things that (seed, epoch, part) decides: on any machine, with any version of NumPy.

    The raw output of a counter-based generator, sorted: NumPy promises to keep that stream, not `Generator.permutation`.
    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox).
    """
    key, counter = (np.array(words, np.uint64) for words in ([seed, epoch], [0, 0, 0, part]))
    return np.argsort(np.random.Philox(key=key, counter=counter).random_raw(count), kind="stable")


def share(batch: int, rank: int, world: int) -> int:
    """Slices that each worker takes of a joint batch. Raises UsageError when they cannot be equally many."""
    if batch % world:
        raise UsageError(f"a batch of {batch} slices cannot be shared by {world} workers; use a multiple of {world}")
    assert 0 <= rank < world
    return batch // world


def indices(count: int, batch: int, *, seed: int, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[NDArray[np.int64]]:
    """Rows, out of `count`, that worker `rank` of `world` takes at step `start` and at each step after it, for ever."""
    own = share(batch, rank, world)
    epochs = functools.lru_cache(maxsize=2)(lambda epoch: order(count, seed, epoch))
    for step in itertools.count(start):
        positions = np.arange(own) + step * batch + rank * own
        epoch, place = np.divmod(positions, count)
        yield np.concatenate([epochs(number)[place[epoch == number]] for number in np.unique(epoch).tolist()])


class Held(Protocol):
    """A set in memory: `Slices`, or the `Volumes` that they make up."""

    def __len__(self) -> int: ...

    def take(self, index: ArrayLike | Tensor) -> Batch: ...


def node_batches(held: Held, batch: int, *, seed: int, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """This worker's share of the joint batch of step `start` and of each step after it, for ever, on the set's device."""
    return map(held.take, indices(len(held), batch, seed=seed, start=start, rank=rank, world=world))


def beside(labelled: Iterable[Batch], unlabelled: Iterable[Batch]) -> Iterator[Batch]:
    """Two streams as one, for semi-supervised training: each at its own pace, and of the second all but its labels.

    Both know where they stand from the step, and so does what they make.
    """
    for ours, theirs in zip(labelled, unlabelled, strict=False):
        yield {**ours, **{f"unlabelled_{key}": theirs[key] for key in UNLABELLED_KEYS if key in theirs}}


# The set that does not fit


@dataclass(frozen=True)
class _Piece:
    """Rows `start` to `stop` of a file in that epoch's order of its rows, read at once."""

    epoch: int
    file: int
    start: int
    stop: int
    lane: int
    at: int  # rows of the lane before it


def pieces(counts: list[int], *, seed: int, start: int = 0, lane: int = 0, lanes: int = 1) -> Iterator[_Piece]:
    """The stream of a lane of a set whose files hold `counts` rows, from its row `start` on, for ever.

    Of the first e epochs of n rows together, lane i of l takes ⌊(en + i) / l⌋ rows: their sum over i is en (Hermite's
    identity), so the lanes' parts of an epoch are the epoch, and none is ever more than one row ahead of another.
    """
    rows, at = sum(counts), start
    for epoch in itertools.count(((start + 1) * lanes - lane - 1) // rows):
        until = [[(e * rows + i) // lanes for i in range(lanes)] for e in (epoch, epoch + 1)]
        sizes = [after - before for before, after in zip(*until, strict=True)]
        begin, end = sum(sizes[:lane]), sum(sizes[: lane + 1])
        begin += max(0, start - until[0][lane])
        for file in order(len(counts), seed, epoch).tolist():
            if (first := max(0, begin)) < (last := min(counts[file], end)):
                yield _Piece(epoch, file, first, last, lane, at)
                at += last - first
            begin, end = begin - counts[file], end - counts[file]


def ray_batches(
    store: Store,
    patients: Iterable[str] | None,
    labelled: bool | None,
    batch: int,
    *,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    lanes: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """This worker's share of the joint batch of step `start`, and of each step after it, for ever, read by Ray Data.

    Padded to the largest slice of the set, as in memory; `index` is the row that `Slices.read` would give the slice.
    lanes   a multiple of `world` that divides `batch`; None: `world`. Equal lanes, equal joint batches, whatever the group
    Needs `ray.init`, and the store at the same path on every node.
    """
    import pyarrow

    chosen = _Chosen.of(store, patients, labelled)
    counts = [len(chosen.rows(file, columns=())) for file in store.files]
    lanes = lanes or world
    own, served = share(batch, 0, lanes), share(lanes, rank, world)
    mine = range(rank * served, (rank + 1) * served)
    streams = [pieces(counts, seed=seed, start=start * own, lane=lane, lanes=lanes) for lane in mine]
    todo = heapq.merge(*streams, key=lambda piece: piece.at)  # as they are needed: all lanes are equally far
    held: dict[int, pa.Table] = {}
    for lane, rows in _read(_together(todo, chosen.row_bytes), chosen, store.files, counts, seed):
        held[lane] = pyarrow.concat_tables([held[lane], rows]) if lane in held else rows
        while all(lane in held and len(held[lane]) >= own for lane in mine):
            yield chosen.batch(pyarrow.concat_tables([held[lane].slice(0, own) for lane in mine]), device)
            held = {lane: rows.slice(own) for lane, rows in held.items()}


def _together(todo: Iterator[_Piece], row_bytes: float) -> Iterator[list[_Piece]]:
    """Neighbouring pieces by the task that reads them: of LEAST bytes together, or MOST of them."""
    while True:
        task, size = [next(todo)], 0.0
        while (size := size + (task[-1].stop - task[-1].start) * row_bytes) < LEAST and len(task) < MOST:
            task.append(next(todo))
        yield task


def _read(
    tasks: Iterator[list[_Piece]], chosen: "_Chosen", files: tuple[Path, ...], counts: list[int], seed: int
) -> "Iterator[tuple[int, pa.Table]]":
    """The lane and the rows of every piece, in order, by Ray Data.

    Reading tasks ask for no CPU: training workers may hold them all, and would wait for ever for what they starve. At most
    AHEAD of them run at a time, and as many results wait: a few files in the object store, however large the set.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it announces each execution on the terminal
    while True:
        plan = list(itertools.islice(tasks, PLAN))
        items = [{"pieces": [vars(piece) for piece in task]} for task in plan]
        data: Any = ray.data.from_items(items, override_num_blocks=len(plan)).map_batches(
            cast(Any, _read_pieces),
            fn_kwargs={"chosen": chosen, "files": files, "counts": counts, "seed": seed},
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=0,
            compute=ray.data.TaskPoolStrategy(size=min(AHEAD, len(plan))),
        )
        data.context.execution_options.preserve_order = True
        data.context.enable_progress_bars = False
        for rows in _delivered(data):
            lanes = rows["lane"].to_numpy()
            bounds = [0, *(np.flatnonzero(np.diff(lanes)) + 1).tolist(), len(rows)]
            for begin, end in itertools.pairwise(bounds):
                yield int(lanes[begin]), rows.slice(begin, end - begin)


def _delivered(data: Any) -> "Iterator[pa.Table]":
    """The results of a Ray Data execution as they come; its threads have ended when this has, or is closed.

    One that asks Ray for a block while Ray goes down ends the process.
    """
    before, threads = set(threading.enumerate()), set[threading.Thread]()
    results = iter(data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=AHEAD))
    try:
        for rows in results:
            threads = threads or {new for new in threading.enumerate() if new.name == "iter_threaded"} - before
            yield rows
    finally:
        results.close()
        for thread in threads:
            thread.join(PATIENCE)


def _read_pieces(plan: "pa.Table", *, chosen: "_Chosen", files: tuple[Path, ...], counts: list[int], seed: int) -> "pa.Table":
    """The rows of a task's pieces, each in its order, with their `index` in the set and their lane."""
    import pyarrow

    read = functools.lru_cache(maxsize=1)(chosen.rows)  # of a small set, a task reads one file for several epochs
    tables = []
    for piece in (_Piece(**values) for values in plan["pieces"][0].as_py()):
        rows = read(files[piece.file])
        if len(rows) != counts[piece.file]:
            raise RunError(f"{files[piece.file]}: the file changed while it was read; prepare the store anew")
        kept = order(len(rows), seed, piece.epoch, part=1 + piece.file)[piece.start : piece.stop]
        index, lane = pyarrow.array(kept + sum(counts[: piece.file])), pyarrow.array(np.full(len(kept), piece.lane))
        tables.append(rows.take(kept).append_column("index", index).append_column("lane", lane))
    return pyarrow.concat_tables(tables)


# From Parquet to padded arrays


@dataclass(frozen=True)
class _Chosen:
    """The volumes of a store that a set is made of: what the manifest knows of them is not read with every slice."""

    root: Path
    dtype: str
    every: bool  # all of the store's volumes: nothing to filter
    volumes: tuple[VolumeRecord, ...]  # sorted by name
    phase_names: tuple[str, ...] = ()  # of the whole store, sorted

    @staticmethod
    def of(store: Store, patients: Iterable[str] | None, labelled: bool | None) -> "_Chosen":
        wanted = set(store.patients if patients is None else patients)
        if unknown := sorted(wanted - set(store.patients)):
            raise UsageError(f'no patient "{unknown[0]}" in {store.root}; medssl data list shows what is there')
        volumes = tuple(v for v in store.volumes if v.patient in wanted and labelled in (None, v.labelled))
        if not volumes:
            kind = {None: "", True: "labelled ", False: "unlabelled "}[labelled]
            raise RunError(f"{store.root}: no {kind}volume of the {len(wanted)} wanted patients; choose others")
        phases = tuple(sorted({volume.phase for volume in store.volumes if volume.phase}))
        return _Chosen(store.root, store.preset.dtype, len(volumes) == len(store.volumes), volumes, phases)

    @property
    def count(self) -> int:
        return sum(volume.slices for volume in self.volumes)

    @property
    def row_bytes(self) -> float:
        """Bytes of a slice's pixels and labels, on average."""
        item = np.dtype(self.dtype).itemsize
        return sum(v.slices * v.height * v.width * (v.channels * item + v.labelled) for v in self.volumes) / self.count

    @functools.cached_property
    def volume_names(self) -> tuple[str, ...]:
        return tuple(volume.volume for volume in self.volumes)

    @functools.cached_property
    def patient_names(self) -> tuple[str, ...]:
        return tuple(sorted({volume.patient for volume in self.volumes}))

    @functools.cached_property
    def facts(self) -> Arrays:
        """What all slices of a volume share, by volume: named as the fields of `Slices`."""
        patients = {name: number for number, name in enumerate(self.patient_names)}
        phases = {name: number for number, name in enumerate(self.phase_names)}
        return {
            "depth": np.array([v.slices for v in self.volumes]),
            "phase": np.array([phases.get(v.phase or "", -1) for v in self.volumes]),
            "labelled": np.array([v.labelled for v in self.volumes]),
            "size": np.array([(v.height, v.width) for v in self.volumes]),
            "patient": np.array([patients[v.patient] for v in self.volumes]),
            "spacing_mm": np.array([v.spacing_mm for v in self.volumes], np.float32),
        }

    def rows(self, file: Path, columns: Sequence[str] = COLUMNS) -> "pa.Table":
        """The rows of these volumes in a file of the store. Raises RunError when it is missing or broken."""
        import pyarrow.dataset

        kept = None if self.every else pyarrow.dataset.field("volume").isin(self.volume_names)
        try:
            return pyarrow.dataset.dataset(str(file), format="parquet").to_table(list(columns), kept)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise RunError(f"{file}: missing or broken ({error}); prepare the store anew with --overwrite") from error

    def empty(self, count: int) -> Arrays:
        """Arrays for `count` slices, all padding: named as the fields of `Slices`, whose shapes they have."""
        first, plane = self.volumes[0], [max(getattr(v, side) for v in self.volumes) for side in ("height", "width")]
        arrays = {
            "image": np.zeros((count, first.channels, *plane), self.dtype),
            "labelled": np.zeros(count, bool),
            "size": np.zeros((count, 2), np.int64),
            "position": np.zeros(count, np.float32),
            "patient": np.zeros(count, np.int64),
            "volume": np.zeros(count, np.int64),
            "slice_index": np.zeros(count, np.int64),
            "depth": np.zeros(count, np.int64),
            "phase": np.zeros(count, np.int64),
            "spacing_mm": np.zeros((count, 3), np.float32),
        }
        if any(volume.labelled for volume in self.volumes):
            arrays["label"] = np.full((count, *plane), UNLABELLED, np.uint8)
        return arrays

    def decode(self, rows: "pa.Table", into: Arrays) -> None:
        """Fill arrays as `empty` gives them with what the rows of a table hold."""
        import pyarrow
        import pyarrow.compute

        number = pyarrow.compute.index_in(rows["volume"], pyarrow.array(self.volume_names)).to_numpy()
        for name, values in self.facts.items():
            into[name][:] = values[number]
        into["volume"][:] = number
        into["position"][:] = rows["position"]
        into["slice_index"][:] = rows["slice_index"]
        _paste(rows["image"], into["size"], into["image"])
        if "label" in into:
            _paste(rows["label"], into["size"], into["label"][:, None])

    def batch(self, rows: "pa.Table", device: torch.device | str) -> Batch:
        """The padded batch of these rows, which carry their `index`, on a device; as `Slices.take` makes it."""
        arrays = self.empty(len(rows))
        self.decode(rows, arrays)
        if "label" not in arrays:
            arrays["label"] = np.full((len(rows), *arrays["image"].shape[-2:]), UNLABELLED, np.uint8)
        arrays["index"] = rows["index"].to_numpy().copy()
        return {key: torch.from_numpy(arrays[key]).to(device) for key in ("image", "label", "index", *PLACES)}


def _paste(column: "pa.ChunkedArray", size: NDArray[np.int64], out: NDArray[Any]) -> None:
    """Copy the pixels of each row, (c, h, w) in bytes, to the first rows and columns of its place in `out`, (n, c, H, W).

    Null rows stay as they are. Python touches no row: those of one size are gathered by Arrow and copied as one array.
    """
    import pyarrow

    start = 0
    for chunk in column.chunks:
        here = slice(start, start + len(chunk))
        start += len(chunk)
        valid = chunk.is_valid().to_numpy(zero_copy_only=False)
        for h, w in np.unique(size[here], axis=0).tolist():
            members = np.flatnonzero(valid & (size[here] == (h, w)).all(1))
            if not len(members):
                continue
            pixels = chunk if len(members) == len(chunk) else chunk.take(pyarrow.array(members))
            shape = (len(members), out.shape[1], h, w)
            out[here][members, :, :h, :w] = _values(pixels, out.dtype, shape)


def _values(pixels: "pa.BinaryArray", dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The bytes of all rows as one array of this shape, without a copy. Raises RunError when a row has more or fewer."""
    _, offsets, data = pixels.buffers()
    width = np.int32 if pixels.type == "binary" else np.int64
    bounds = np.frombuffer(offsets, width)[pixels.offset : pixels.offset + len(pixels) + 1]
    expected = dtype.itemsize * int(np.prod(shape[1:]))
    if (np.diff(bounds) != expected).any():
        raise RunError(f"a stored slice of {shape[1:]} {dtype} does not hold {expected} bytes; prepare the store anew")
    return np.frombuffer(data, dtype, int(np.prod(shape)), int(bounds[0])).reshape(shape)
