"""Volumes per second from NIfTI files to stored slices, against the CT study's own preprocessing in MONAI, two processes each.

Generated CT-like volumes, gzip-compressed, oriented LPS so that both sides have to turn them: 192x192x40 voxels of a CT's size,
which stand for 512x512x100 at the 18th part of the work. DISTINCT of them are drawn, the others are the same files by another
name. Ours: all of `ingest.prepare`, checks, hashes and shuffling included, and the start of its processes. The rival: the
study's transforms in its order, and a PNG for every slice and its label, as its scripts write them, volumes dealt to two
processes whose start and imports are not counted. Both on one thread per process.
"""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from medssl.platform import atomic, ingest
from medssl.platform.bench import Row
from medssl.platform.geometry import PRESETS

WORKERS = 2
DISTINCT = 10
SHAPE = (192, 192, 40)
SPACING_MM = (0.78, 0.78, 3.0)


def write_scans(root: Path, volumes: int) -> list[Path]:
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


def ready(_: int) -> int:
    """Import what the rival needs, on one thread; slow enough that every process of the pool gets one."""
    import monai.transforms  # noqa: F401
    import torch

    torch.set_num_threads(1)
    time.sleep(1)
    return os.getpid()


def with_monai(image: Path, out: Path) -> None:
    """The CT study's preprocessing script on one volume."""
    from monai import transforms as mt
    from PIL import Image

    both, preset = ["image", "label"], PRESETS["ct"]
    assert preset.window is not None
    chain = mt.Compose(
        [
            mt.LoadImaged(both),
            mt.EnsureChannelFirstd(both),
            mt.Orientationd(both, axcodes="RAS", labels=None),
            mt.Spacingd(both, pixdim=(1.0, 1.0, 2.5), mode=("bilinear", "nearest")),
            mt.ScaleIntensityRanged("image", *preset.window, 0.0, 1.0, clip=True),
            mt.CropForegroundd(both, source_key="image", allow_smaller=False),
            mt.SpatialPadd(both, (preset.pad, preset.pad, -1)),
        ]
    )
    volume = chain({"image": image, "label": image.parent.parent / "labelsTr" / image.name})
    pixels, label = (np.asarray(volume[key])[0] for key in both)
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


@contextmanager
def peak_memory(found: list[float]) -> Iterator[None]:
    """Appends the most megabytes that the processes started meanwhile held at once: each counts with the most it ever had."""
    stop, most = threading.Event(), 0

    def watch() -> None:
        nonlocal most
        while not stop.wait(0.1):
            together = 0
            for pid in children():
                try:
                    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
                    together += int(status.get("VmHWM", "0 kB").split()[0])
                except OSError:
                    continue
            most = max(most, together)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
        found.append(most / 1024)


def run(volumes: int = 60) -> list[Row]:
    memory: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        images = write_scans(root / "scans", volumes)
        with peak_memory(memory):
            start = time.perf_counter()
            ingest.prepare(root / "scans", root / "store", workers=WORKERS, map_unordered=ingest.in_processes)
            ours = time.perf_counter() - start
        (root / "monai").mkdir()
        with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool, peak_memory(memory):
            assert len(set(pool.map(ready, range(WORKERS)))) == WORKERS
            start = time.perf_counter()
            list(pool.map(with_monai, images, [root / "monai"] * volumes))
            rival = time.perf_counter() - start
    what = f"{volumes} CT volumes of {'x'.join(map(str, SHAPE))} prepared, two processes: at most {memory[0]:.0f} MB of memory"
    name = f"the CT study's MONAI chain, two processes: at most {memory[1]:.0f} MB"
    return [Row(what, "volumes/s", volumes / ours, name, volumes / rival, target=4.0)]
