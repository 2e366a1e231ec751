"""What the writers of miniature data sets share: scans of a few hundred voxels, and a record of what was drawn."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Drawn:
    """One volume as the reader should find it."""

    volume: str
    patient: str
    label: NDArray[np.uint8] | None = None  # class ids (x, y, z) in the voxel order of the file; None: unlabelled
    part: str | None = None
    phase: str | None = None
    group: str | None = None
    modality: str | None = None


def scan(
    seed: int, classes: int, shape: tuple[int, ...] = (9, 11, 4), ct: bool = False
) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """Noise of int16, which no axis order or flip leaves as it is, and class ids that all occur. CT is tissue throughout."""
    rng = np.random.default_rng(seed)
    image = rng.integers(-400, 400, shape) if ct else rng.integers(1, 900, shape)
    label = rng.permutation(np.arange(np.prod(shape[:3])) % classes).reshape(shape[:3])
    return image.astype(np.int16), label.astype(np.uint8)


def nifti(path: Path, voxels: NDArray[Any], spacing_mm: tuple[float, ...] = (1.0, 1.0, 2.5)) -> None:
    """A NIfTI file in LPS, as scanners write it: axes run against those that slices are stored in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(voxels, np.diag([-spacing_mm[0], -spacing_mm[1], spacing_mm[2], 1.0]))
    raw = image.to_bytes()
    path.write_bytes(gzip.compress(raw, 1) if path.suffix == ".gz" else raw)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
