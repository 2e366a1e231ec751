"""Slices per second from disk to batches, and how long an epoch's first batch takes: our two paths against torch's DataLoader.

Prepared CT-like volumes of `bench ingest`, batches of 32 as uint8 on the CPU, nothing augmented. Node-local: the set in memory,
read once. Streamed: Ray Data over the Parquet files, as for a set that does not fit, in a Ray that is up already; here one
small file an epoch, with `-o volumes=120` two of the size that `ingest` makes. The rivals read the same pixels with two worker
processes: PNG files opened with Pillow, image and label, as the papers do, and a NumPy memory map.

Whole epochs for SECONDS, after a warm-up in which the disk's caches and Ray's shared memory fill; what Ray's processes take to
start, once, is told and not counted. Starting workers at each epoch is part of the rivals' epochs, as it is in training. The
last rows hold the longest wait for the first batch of an epoch against 0.2 s.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from medssl.platform import ingest, stream
from medssl.platform.bench import Row
from medssl.platform.benches.ingest import write_scans
from medssl.platform.store import Store

BATCH, WORKERS = 32, 2
SECONDS, WARM_UP, RAYS_WARM_UP = 4.0, 1.0, 8.0
ALLOWED_WAIT = 0.2  # seconds for the first batch of an epoch after the first
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Pace:
    """Of many epochs."""

    rate: float  # slices per second
    wait: float  # seconds until the first batch of an epoch, at the longest


class Pngs(Dataset[Pair]):
    """Images and labels as PNG files, a pair per slice."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Pair:
        from PIL import Image

        image, label = (np.array(Image.open(self.folder / f"{index}{kind}.png")) for kind in ("", "_label"))
        return torch.from_numpy(image)[None], torch.from_numpy(label)


class Mapped(Dataset[Pair]):
    """Images and labels as two memory maps."""

    def __init__(self, folder: Path):
        self.image, self.label = (np.load(folder / f"{kind}.npy", mmap_mode="r") for kind in ("image", "label"))

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> Pair:
        return torch.from_numpy(self.image[index].copy()), torch.from_numpy(self.label[index].copy())


def run(volumes: int = 10) -> list[Row]:
    from medssl.platform.trials import connected

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_scans(root / "scans", volumes)
        store = ingest.prepare(root / "scans", root / "store", workers=WORKERS)
        count = _rivals(store, root)
        png = _loader(Pngs(root / "png", count))
        mapped = _loader(Mapped(root))
        slices = stream.Slices.read(store)
        node = _ours(stream.node_batches(slices, BATCH, seed=0), count)
        with connected(None):
            begun, batches = time.perf_counter(), stream.ray_batches(store, None, None, BATCH, seed=0)
            next(batches)
            start = time.perf_counter() - begun
            streamed = _ours(batches, count, RAYS_WARM_UP)
    what = f"{count} slices of {'x'.join(map(str, slices.image.shape[-2:]))}"
    ray = f"{what}, streamed by Ray Data (up in {start:.1f} s)"
    rows = [
        Row(f"{what}, node-local", "slices/s", node.rate, "DataLoader over PNG", png.rate, target=10.0),
        Row(ray, "slices/s", streamed.rate, "DataLoader over PNG", png.rate, target=3.0),
        Row(ray, "slices/s", streamed.rate, "DataLoader over a memory map", mapped.rate, target=0.5),
    ]
    for name, pace, target in (("node-local", node, 1.0), ("streamed by Ray Data", streamed, 1.0)):
        first = f"first batch of a later epoch, {name}: {pace.wait:.3f} s"
        rows.append(Row(first, "1/s", 1 / max(pace.wait, 1e-6), f"{ALLOWED_WAIT} s", 1 / ALLOWED_WAIT, target=target))
    rival = f"DataLoader over PNG, which waits {png.wait:.3f} s"
    rows.append(Row("first batch of a later epoch, node-local", "1/s", 1 / max(node.wait, 1e-6), rival, 1 / png.wait))
    return rows


def _rivals(store: Store, root: Path) -> int:
    """Write the set as PNG files and as memory maps; returns its number of slices."""
    from PIL import Image

    slices = stream.Slices.read(store)
    assert slices.label is not None
    (root / "png").mkdir()
    for index, (image, label) in enumerate(zip(slices.image, slices.label, strict=True)):
        Image.fromarray(image[0].numpy()).save(root / "png" / f"{index}.png")
        Image.fromarray(label.numpy()).save(root / "png" / f"{index}_label.png")
    np.save(root / "image.npy", slices.image.numpy())
    np.save(root / "label.npy", slices.label.numpy())
    return len(slices)


def _loader(data: Dataset[Pair]) -> Pace:
    """A shuffling DataLoader with its defaults and two workers."""
    loader = DataLoader(data, BATCH, shuffle=True, num_workers=WORKERS)
    return _paced(lambda: iter(loader))


def _ours(batches: Iterator[Any], count: int, warm_up: float = WARM_UP) -> Pace:
    """One of our endless streams, cut into epochs of whole batches."""
    return _paced(lambda: itertools.islice(batches, -(-count // BATCH)), warm_up)


def _paced(epoch: Callable[[], Iterable[Any]], warm_up: float = WARM_UP) -> Pace:
    _epochs(epoch, warm_up)
    return _epochs(epoch, SECONDS)


def _epochs(epoch: Callable[[], Iterable[Any]], seconds: float) -> Pace:
    """The pace of whole epochs, as many as take so long."""
    waits: list[float] = []
    begun, seen = time.perf_counter(), 0
    while (since := time.perf_counter()) - begun < seconds:
        batches = iter(epoch())
        first = next(batches)
        waits.append(time.perf_counter() - since)
        seen += _size(first) + sum(map(_size, batches))
    return Pace(seen / (since - begun), max(waits))


def _size(batch: Any) -> int:
    """Slices of a batch, each of its numbers read once, as training would."""
    image = batch["image"] if isinstance(batch, dict) else batch[0]
    image.numpy().sum()  # by one thread: others would spin for what workers need
    return len(image)
