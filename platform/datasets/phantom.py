"""The embedded data set: a procedural abdominal CT with the thirteen organs of FLARE22. No download, no patient, no licence.

A patient is drawn as latents (`_phantom_patient`: build, organ sizes and places that go together, contrast phase, what is
missing), painted as shapes on a grid (`_phantom_anatomy` on `_phantom_canvas`), and seen through a scanner (`acquire`).
Voxels are coarse, 3-4.5 mm in the plane and 6.5-8.5 mm between slices, so that a sweep runs on two cores; the body fills
its field of view as in a real scan, hence crops of 32 pixels relate to a slice as 96 pixels do in the CT study.

On disk it is a Decathlon folder of real NIfTI files, and is read back through the path of real data.
"""

import gzip
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from medssl.platform import atomic
from medssl.platform.datasets import _phantom_anatomy as anatomy
from medssl.platform.datasets import decathlon
from medssl.platform.datasets._phantom_canvas import Array, Canvas, blurred
from medssl.platform.datasets._phantom_patient import Patient, spread
from medssl.platform.errors import RunError, UsageError
from medssl.platform.records import Case, DataInfo

VERSION = 1  # of the recipe: raised by every change that moves a voxel
LICENCE = "generated, no rights reserved (CC0)"
PRESET_CHANGES = {"spacing_mm": (4.0, 4.0, 7.5), "pad": 32}

# Settings with which the six arms of the IoU question, 2 x 2 repeats each, take minutes on two cores. The chain's flips and
# turns are left out of fine-tuning: left and right kidney differ by their side alone.
DEFAULTS = {
    "data.labelled": 4,
    "network.width": 16,
    "network.levels": 4,
    "pretrain.side": 32,
    "pretrain.d": 256,
    "pretrain.bottleneck": 64,  # and below, what other methods than SimSiam have
    "pretrain.hidden": 256,
    "pretrain.queue": 512,
    "pretrain.prototypes": 1024,
    "pretrain.training.steps": 120,
    "pretrain.training.batch": 32,
    "finetune.side": 48,
    "finetune.crops": 1,
    "finetune.dice_over": "batch",
    "finetune.flip_p": 0.0,
    "finetune.rot90_p": 0.0,
    "finetune.training.steps": 250,
    "finetune.training.batch": 8,
    "finetune.training.lr": 0.006,
    "finetune.training.evaluations": 2,
}

# FLARE22's surface tolerances, but at least one pixel of the preset: below it a boundary can only be exact or wrong
TOLERANCE_MM = tuple(float(max(flare, 4)) for flare in (5, 3, 3, 5, 2, 2, 2, 2, 2, 3, 5, 7, 3))


def info(root: Path | None) -> DataInfo:
    """The facts of the phantom, the same for every folder that holds one."""
    return DataInfo(
        name="phantom",
        classes=("background", *anatomy.ORGANS),
        licence=LICENCE,
        citation="procedural abdominal CT of medssl; classes of FLARE22",
        preset="ct",
        preset_changes=PRESET_CHANGES,
        tolerance_mm=TOLERANCE_MM,
        defaults=DEFAULTS,
    )


def cases(root: Path) -> Iterator[Case]:
    """The volumes that `generate` wrote."""
    yield from decathlon.cases(root)


def volume(
    seed: int | Sequence[int], shape: tuple[int, int, int] = (96, 72, 26)
) -> tuple[NDArray[np.int16], NDArray[np.uint8], tuple[float, float, float]]:
    """One patient: image in HU, label in 0..13, both of `shape` (x, y, z), and the spacing in mm. Equal seeds, equal voxels.

    Axes are RAS: x to the patient's right, y to the front, z to the head. The field of view follows the patient's body, and the
    spacing follows from it and from `shape`: fewer voxels are coarser ones.
    """
    rng = np.random.default_rng(seed)
    patient = Patient.draw(rng)
    canvas = Canvas(shape, spacing_of(patient, rng, shape), patient, rng)
    anatomy.draw(canvas, patient, rng)
    return acquire(canvas, patient, rng), canvas.label, canvas.spacing_mm


def spacing_of(patient: Patient, rng: np.random.Generator, shape: tuple[int, int, int]) -> tuple[float, float, float]:
    """The spacing with which `shape` covers the trunk and some air around it, from the kidneys' lower poles to the lungs."""
    width, front, back = anatomy.half_sizes_mm(patient)
    wide = 2 * width * patient.stature[0] + rng.uniform(24, 44)
    deep = (front + back) * patient.stature[1] + rng.uniform(40, 56)
    pixel = max(wide / shape[0], deep / shape[1])
    return pixel, pixel, spread(rng, 4, 194) * patient.stature[2] / shape[2]


def acquire(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> NDArray[np.int16]:
    """The painted patient as a scanner shows it: blur, noise of CT's grain that is strongest in the middle, an offset."""
    kernel, profile = patient.blur_voxels
    image = blurred(canvas.image, (kernel, kernel, profile))
    noise: Array = rng.standard_normal(image.shape, dtype=np.float32)
    noise -= 0.55 * blurred(noise, (1.6, 1.6, 0.1))  # filtered back-projection leaves little noise at low frequencies
    x, y, _ = canvas.table
    depth = 0.45 + 0.75 * np.exp(-((x / 150) ** 2) - (y / 100) ** 2)
    image += patient.noise_hu / noise.std() * noise * depth + patient.offset_hu
    return np.clip(np.rint(image), -1024, 1500).astype(np.int16)


def generate(root: Path, patients: int = 40, seed: int = 0, processes: int = 2) -> None:
    """Write `patients` patients to `root` as a Decathlon folder; the last three of ten have no label (imagesTs).

    Files appear whole or not at all, and dataset.json comes last: after a kill, the same call writes what is missing and ends
    with the same files. A finished folder is left as it is. Raises UsageError where `root` holds another phantom or other data.
    """
    if patients < 1 or processes < 1 or seed < 0:
        raise UsageError(f"phantom: {patients} patients, {processes} processes, seed {seed}; at least 1, 1 and 0 are needed")
    recipe = {"version": VERSION, "seed": seed, "patients": patients}
    if _finished(root, recipe):
        return
    labelled = patients - patients * 3 // 10
    plan = [_Writing(root, seed, index, index < labelled) for index in range(patients)]
    _refuse_strangers(root, plan)
    missing = [writing for writing in plan if not all(file.exists() for file in writing.files)]
    if processes == 1:
        for writing in missing:
            writing.run()
    elif missing:
        # spawn: a fork would copy the locks of whatever threads the caller runs
        with ProcessPoolExecutor(min(processes, len(missing)), get_context("spawn")) as pool:
            try:
                list(pool.map(_Writing.run, missing, chunksize=2))
            except BrokenProcessPool as error:
                raise RunError(
                    f"{root}: a process that drew phantoms was killed; run again, finished files are kept"
                ) from error
    atomic.write_json(root / "dataset.json", _contents(recipe, labelled))


def _finished(root: Path, recipe: dict[str, int]) -> bool:
    """Whether `root` already holds the phantom of this recipe. Raises UsageError when it holds something else."""
    file = root / "dataset.json"
    if not file.exists():
        return False
    try:
        found = json.loads(file.read_text()).get("phantom")
    except (ValueError, AttributeError):
        found = None
    if found != recipe:
        what = f"the phantom {found}" if found else "another data set"
        raise UsageError(f"{file} belongs to {what}, not to the phantom {recipe}; choose another folder or remove this one")
    return True


@dataclass(frozen=True)
class _Writing:
    """The files of one patient, and how they come about."""

    root: Path
    seed: int
    index: int
    labelled: bool

    @property
    def files(self) -> list[Path]:
        """The image, and the label where there is one."""
        name = f"phantom_{self.index:03d}.nii.gz"
        return [self.root / kind / name for kind in (("imagesTr", "labelsTr") if self.labelled else ("imagesTs",))]

    @property
    def mark(self) -> str:
        """What the headers say, so that files of another recipe are known."""
        return f"medssl phantom {VERSION}, seed {self.seed}, patient {self.index}"

    def run(self) -> None:
        """Draw the patient and write those of its files that are missing."""
        where = np.random.default_rng([self.seed, self.index, 1])
        lowest_mm = round(float(where.uniform(-900, 300)), 1)  # scanners count z from wherever the table stood
        hu, label, spacing_mm = volume([self.seed, self.index])
        contents: tuple[NDArray[Any], ...] = (hu, label)
        for file, voxels in zip(self.files, contents, strict=False):  # an unlabelled patient has one file
            if not file.exists():
                content = _nifti(voxels, spacing_mm, lowest_mm, self.mark)
                atomic.write(file, partial(_put, content))


def _put(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def _refuse_strangers(root: Path, plan: list[_Writing]) -> None:
    """Raise UsageError when a scan lies in `root` that this plan would not write: readers would take it for one of ours."""
    marks = {file: writing.mark for writing in plan for file in writing.files}
    for kind in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        for file in sorted((root / kind).glob("[!.]*")):
            if file not in marks or _description(file) != marks[file]:
                raise UsageError(f"{file} is not part of the phantom that was asked for; remove it or choose another folder")


def _description(file: Path) -> str | None:
    """The free text of a NIfTI header; None when the file is no such thing."""
    import nibabel

    try:
        return bytes(nibabel.Nifti1Image.from_filename(file).header["descrip"].item()).decode("latin-1")
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError):
        return None


def _contents(recipe: dict[str, int], labelled: int) -> dict[str, Any]:
    """dataset.json of the Medical Segmentation Decathlon, and the recipe."""
    names = [f"phantom_{index:03d}.nii.gz" for index in range(recipe["patients"])]
    return {
        "name": "phantom",
        "description": "procedural abdominal CT with the 13 organs of FLARE22",
        "licence": LICENCE,
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {str(number): organ for number, organ in enumerate(("background", *anatomy.ORGANS))},
        "numTraining": labelled,
        "numTest": len(names) - labelled,
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names[:labelled]],
        "test": [f"./imagesTs/{name}" for name in names[labelled:]],
        "phantom": recipe,
    }


def _nifti(voxels: NDArray[Any], spacing_mm: tuple[float, float, float], lowest_mm: float, mark: str) -> bytes:
    """A gzipped NIfTI file of RAS `voxels`, stored as scanners do, in LPS, with the isocentre in the middle of the slice."""
    import nibabel

    stored = voxels[::-1, ::-1]
    affine = np.diag([-spacing_mm[0], -spacing_mm[1], spacing_mm[2], 1.0])
    affine[:3, 3] = [(side - 1) / 2 * mm for side, mm in zip(stored.shape[:2], spacing_mm, strict=False)] + [lowest_mm]
    image = nibabel.Nifti1Image(stored, affine)
    image.set_qform(affine, code="scanner")
    image.set_sform(affine, code="scanner")
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = mark
    # level 1: noise hardly compresses; no time stamp: equal recipes are equal bytes
    return gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)
