"""Volumes per second from NIfTI files to stored slices, against the CT study's own preprocessing in MONAI.

Generated CT-like volumes, gzip-compressed, oriented LPS so that both sides have to turn them: 192x192x40 voxels of a CT's size,
which stand for 512x512x100 at the 18th part of the work. DISTINCT of them are drawn, the others are the same files by another
name. Ours: all of `ingest.prepare` in two processes, checks, hashes and shuffling included, and the start of its processes.

The rival: the study's transforms in its order, and a PNG for every slice and its label, one volume after another in one process
with as many threads as there are cores, as its scripts run; and for comparison, volumes dealt to two processes of one thread
each. Its start and imports are not counted, so fewer volumes tell its rate. Beside the time by the clock stands that of the
processors, which other programs on the machine disturb less.
"""

import contextlib
import functools
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from medssl.platform import atomic, ingest
from medssl.platform.bench import Row
from medssl.platform.geometry import PRESETS

WORKERS = 2
DISTINCT = 10
SHAPE = (192, 192, 40)
SPACING_MM = (0.78, 0.78, 3.0)


def write_scans(root: Path, volumes: int = DISTINCT) -> list[Path]:
    """A folder in the Decathlon form: elliptic bodies with two organs, noise, and air around."""
    import nibabel

    affine = np.diag([-SPACING_MM[0], -SPACING_MM[1], SPACING_MM[2], 1.0])
    axes = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in SHAPE)]
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    for number in range(volumes):
        names = [root / folder / f"case_{number}.nii.gz" for folder in ("imagesTr", "labelsTr")]
        if number >= DISTINCT:
            for name in names:
                os.link(name.with_name(f"case_{number % DISTINCT}.nii.gz"), name)
            continue
        rng = np.random.default_rng(number)
        body = (axes[0] / 0.8) ** 2 + (axes[1] / 0.6) ** 2 + 0 * axes[2] < 1
        organs = [(axes[0] - x) ** 2 + axes[1] ** 2 + axes[2] ** 2 < r**2 for x, r in ((-0.3, 0.35), (0.4, 0.2))]
        hu = np.where(body, 20.0, -1000.0) + 60 * organs[0] + 100 * organs[1] + rng.normal(0, 15, SHAPE)
        for name, array in zip(names, (hu.astype(np.int16), (organs[0] + 2 * organs[1]).astype(np.uint8)), strict=True):
            nibabel.Nifti1Image(array, affine).to_filename(name)
    labels = {"0": "background", "1": "large", "2": "small"}
    atomic.write_json(root / "dataset.json", {"name": "bench", "modality": {"0": "CT"}, "labels": labels})
    return sorted((root / "imagesTr").iterdir())


def ready(threads: int) -> int:
    """Import and make what the rival needs; slow enough that every process of the pool gets one."""
    import torch

    torch.set_num_threads(threads)
    chain()
    time.sleep(1)
    return os.getpid()


@functools.cache
def chain() -> Callable[[dict[str, Path]], Any]:
    """The CT study's transforms, made once in a process."""
    from monai import transforms as mt

    both, preset = ["image", "label"], PRESETS["ct"]
    assert preset.window is not None
    return mt.Compose(
        [
            mt.LoadImaged(both, reader="NibabelReader"),  # the default tries others first, and warns
            mt.EnsureChannelFirstd(both),
            mt.Orientationd(both, axcodes="RAS", labels=None),
            mt.Spacingd(both, pixdim=(1.0, 1.0, 2.5), mode=("bilinear", "nearest")),
            mt.ScaleIntensityRanged("image", *preset.window, 0.0, 1.0, clip=True),
            mt.CropForegroundd(both, source_key="image", allow_smaller=False),
            mt.SpatialPadd(both, (preset.pad, preset.pad, -1)),
        ]
    )


def with_monai(image: Path, out: Path) -> None:
    """The CT study's preprocessing script on one volume."""
    from PIL import Image

    volume = chain()({"image": image, "label": image.parent.parent / "labelsTr" / image.name})
    pixels, label = (np.asarray(volume[key])[0] for key in ("image", "label"))
    for k in range(pixels.shape[-1]):
        Image.fromarray(np.floor(255 * pixels[..., k]).astype(np.uint8)).save(out / f"{image.name}_{k}.png")
        Image.fromarray(label[..., k].astype(np.uint8)).save(out / f"{image.name}_{k}_label.png")


def children() -> list[int]:
    """Processes that this one has started, theirs included."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended
            continue
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {os.getpid()})


def processor_seconds() -> float:
    """What this process and all that it has started have taken of the processors."""
    ticks = 0
    for pid in children():
        with contextlib.suppress(OSError):  # it ended, and its parent has its ticks
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
    return sum(os.times()[:4]) + ticks / os.sysconf("SC_CLK_TCK")


@dataclass
class Cost:
    """Of preparing some volumes."""

    volumes: int
    seconds: float = 0.0
    processors: float = 0.0  # their seconds
    megabytes: float = 0.0  # at most, of the processes that were started


@contextlib.contextmanager
def measured(volumes: int) -> Iterator[Cost]:
    cost = Cost(volumes)
    before, start = processor_seconds(), time.perf_counter()
    with peak_memory() as most:
        yield cost
        cost.seconds, cost.processors = time.perf_counter() - start, processor_seconds() - before
    cost.megabytes = max(most) / 1024


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Appends the kilobytes that the processes started meanwhile hold: each counts with the most it ever had."""
    stop, found = threading.Event(), [0]

    def watch() -> None:
        while not stop.wait(0.1):
            together = 0
            for pid in children():
                with contextlib.suppress(OSError):
                    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
                    together += int(status.get("VmHWM", "0 kB").split()[0])
            found.append(together)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        stop.set()
        watcher.join()


def rival(images: list[Path], out: Path, processes: int) -> Cost:
    """The study's script over these volumes, in processes that share the machine's threads."""
    out.mkdir()
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        threads = max(ingest.cores() // processes, 1)
        assert len(set(pool.map(ready, [threads] * processes))) == processes
        with measured(len(images)) as cost:
            list(pool.map(with_monai, images, [out] * len(images)))
    return cost


def run(volumes: int = 240, rivals: int = 30) -> list[Row]:
    """volumes    that ours prepares
    rivals     of them, that the rival prepares"""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        images = write_scans(root / "scans", volumes)[:rivals]
        with measured(volumes) as ours:
            ingest.prepare(root / "scans", root / "store", workers=WORKERS, map_unordered=ingest.in_processes)
        one, several = (rival(images, root / f"monai-{n}", n) for n in (1, WORKERS))
    what = f"CT volumes of {'x'.join(map(str, SHAPE))} prepared in {WORKERS} processes"
    ours_in, one_in, several_in = (f"{cost.volumes} in at most {cost.megabytes:.0f} MB" for cost in (ours, one, several))
    rate, theirs = ours.volumes / ours.seconds, "the CT study's MONAI chain in"
    rows = [
        Row(f"{what}: {ours_in}", "volumes/s", rate, f"{theirs} one process: {one_in}", one.volumes / one.seconds, 4.0),
        Row(f"{what}", "volumes/s", rate, f"{theirs} {WORKERS}: {several_in}", several.volumes / several.seconds),
    ]
    a, b = (cost.volumes / cost.processors for cost in (ours, one))
    return [*rows, Row(f"{what}, by the processors' time", "volumes per processor second", a, f"{theirs} one process", b)]
