"""Where scans come from, and how one is read and checked: a data set by name or folder, its cases, and the voxels of a case.

A module of datasets/ says which cases a folder holds (`matches`, `info`, `cases`) or writes them itself (`generate`).
`read_case` gives a case as arrays on one grid, its label as class ids; `ingest` prepares what is read here.
"""

import dataclasses
import gzip
import hashlib
import json
import shutil
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.platform import atomic, find
from medssl.platform.errors import RunError, UsageError
from medssl.platform.geometry import UNLABELLED, Preset
from medssl.platform.records import Case, DataInfo
from medssl.platform.store import SCHEMA

GRID_TOLERANCE = 0.1  # a label's corners may be this far from its image's, in voxels: headers are rounded to float32


class Problem(RunError):
    """What is wrong with one file: `prepare` raises the first, `check` lists all."""

    def __init__(self, file: Path, what: str) -> None:
        super().__init__(file, what)
        self.file = file
        self.what = what

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


# ------------------------------------------------------------------------------------------------------ where scans come from


@dataclass(frozen=True)
class Source:
    """A data set on disk, before it is prepared."""

    root: Path
    info: DataInfo
    cases: tuple[Case, ...]
    generator: str | None = None  # hash of the program that wrote it, where one did

    def stamp(self, case: Case) -> list[Any]:
        """What changes when the case's files do. Modification times, as reading 200 GB to find nothing new would not do."""
        files = [*case.images, *([case.label] if case.label else [])]
        stats = [] if self.generator else [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
        strata = [case.site, case.group] if case.site or case.group else []
        return [self.generator, case.patient, case.volume, case.part, case.phase, stats, *strata]

    def signature(self, case: Case, preset: Preset) -> str:
        """Names the prepared form of one case."""
        return digest([SCHEMA, self.info.classes, self.info.channels, dataclasses.asdict(preset), self.stamp(case)])

    @property
    def version(self) -> str:
        """Names the sources as a whole, with all that the manifest repeats from them."""
        return digest([dataclasses.asdict(self.info), sorted(map(self.stamp, self.cases), key=lambda stamp: stamp[2])])


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=list).encode()).hexdigest()


def recognise(root: Path) -> str:
    """The data-set file whose form the folder has. Raises UsageError when there is none."""
    if not root.is_dir():
        raise UsageError(f'no folder "{root}", and no data set of that name; {find.nearest(str(root), find.names("dataset"))}')
    for name in find.names("dataset"):
        module = find.load("dataset", name)
        if hasattr(module, "matches") and module.matches(root):
            return name
    raise UsageError(
        f"{root}: no data set in a known form; expected dataset.json and imagesTr/ (Medical Segmentation Decathlon, nnU-Net)"
    )


def find_source(source: str | Path, out: Path) -> Source:
    """A data set by the name of its file, which then writes its scans into `out`/source, or by its folder.

    Raises UsageError when there is no such thing, RunError when its files contradict each other.
    """
    generator = None
    if isinstance(source, str) and source in find.names("dataset"):
        module = find.load("dataset", source)
        if not hasattr(module, "generate"):
            raise UsageError(f'data set "{source}" reads a folder of scans; give the folder instead of the name')
        root, generator = out / "source", program(source)
        generate(module, root, generator)
    else:
        root = Path(source)
        module = find.load("dataset", recognise(root))
    return Source(root, module.info(root), tuple(module.cases(root)), generator)


def program(name: str) -> str:
    """Hash of the text that generates a data set: its file and the private ones beside it that carry its name."""
    path = find.path("dataset", name)
    return digest([file.read_text() for file in (path, *sorted(path.parent.glob(f"_{path.stem}*.py")))])


def generate(module: ModuleType, root: Path, generator: str) -> None:
    """Let a data set write its scans, unless they are there whole; the marker is written last."""
    marker = root / ".complete"
    if not marker.is_file() or marker.read_text() != generator:
        shutil.rmtree(root, ignore_errors=True)
        module.generate(root)
        atomic.write_text(marker, generator)


def listing_problems(source: Source) -> list[Problem]:
    """What can be told without reading a voxel: nothing there, names twice, files that are missing."""
    if not source.cases:
        return [Problem(source.root, "holds no volume; put NIfTI files into imagesTr/")]
    found = []
    for volume, times in Counter(case.volume for case in source.cases).items():
        if times > 1:
            found.append(
                Problem(source.root, f"{times} volumes are called {volume}; names must be unique, so rename or remove one")
            )
    for case in source.cases:
        if case.label and not case.label.is_file():
            found.append(
                Problem(
                    case.images[0], f"its label {case.label} is missing; add it, or move the image to imagesTs/ as unlabelled"
                )
            )
        found += [Problem(file, "is missing; download it again") for file in case.images if not file.is_file()]
    return found


# ---------------------------------------------------------------------------------------------------------- reading one volume


def read_nifti(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Voxels (x, y, z[, channel]) as stored (float32 where the header scales them), and the affine. Raises Problem."""
    import nibabel

    try:
        raw = path.read_bytes()
        if path.name.endswith(".gz"):
            raw = gzip.decompress(raw)
        kind = next(
            kind for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image) if kind.header_class.may_contain_header(raw[:540])
        )
        image = kind.from_bytes(raw)
        array = np.asanyarray(image.dataobj)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Problem(path, f"its gzip stream is cut short or damaged ({error}); copy the file again") from error
    except (
        StopIteration,
        ValueError,
        OSError,
        nibabel.filebasedimages.ImageFileError,
        nibabel.spatialimages.HeaderDataError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else "no NIfTI header"
        raise Problem(path, f"not a whole NIfTI file ({reason}); expected .nii or .nii.gz; export or copy it again") from error
    if array.dtype.kind not in "iufb":
        raise Problem(path, f"its voxels are {array.dtype}, expected real numbers; export one number per voxel")
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return array.astype(np.float32) if array.dtype == np.float64 else array, image.affine


def read_image(case: Case, info: DataInfo) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """All channels of a volume, (c, x, y, z), finite and not constant, with their affine. Raises Problem."""
    together = len(case.images) == 1 and len(info.channels) > 1
    wanted = f"4D with {len(info.channels)} channels last" if together else "3D"
    channels: list[NDArray[Any]] = []
    affine = None
    for path in case.images:
        array, its_affine = read_nifti(path)
        if array.ndim != 3 + together or (together and array.shape[-1] != len(info.channels)):
            raise Problem(
                path,
                f"{array.ndim}D where {wanted} is meant, shape {array.shape}; split it, or mend the channels of dataset.json",
            )
        if affine is None:
            affine = its_affine
        elif not same_grid(channels[0].shape, affine, array.shape, its_affine):
            raise Problem(
                path, f"its grid is not that of {case.images[0].name}; resample the channels of a volume onto one grid"
            )
        channels += list(np.moveaxis(array, -1, 0)) if together else [array]
    for number, channel in enumerate(channels):
        path = case.images[min(number, len(case.images) - 1)]
        low, high = float(channel.min()), float(channel.max())  # NaN and infinity both show here
        if not np.isfinite((low, high)).all():
            raise Problem(
                path, f"{int((~np.isfinite(channel)).sum())} voxels are NaN or infinite; replace them, or leave the scan out"
            )
        if low == high:
            raise Problem(path, f"every voxel is {low:g}: an empty scan; export it again, or leave it out")
    assert affine is not None
    return channels[0][None] if len(channels) == 1 else np.stack(channels), affine


def same_grid(shape: tuple[int, ...], affine: NDArray[Any], other_shape: tuple[int, ...], other_affine: NDArray[Any]) -> bool:
    """Whether two images have one shape and their corners lie within GRID_TOLERANCE of the smallest voxel side."""
    if shape != other_shape:
        return False
    corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)]) * [*(n - 1 for n in shape), 1]
    apart = np.linalg.norm(corners @ (affine - other_affine).T, axis=1).max()
    return bool(apart <= GRID_TOLERANCE * np.linalg.norm(affine[:3, :3], axis=0).min())


def read_label(
    path: Path, image: Path, shape: tuple[int, ...], affine: NDArray[Any], classes: Sequence[str]
) -> NDArray[np.uint8]:
    """Class ids (x, y, z) on the image's grid, all of them known or UNLABELLED. Raises Problem."""
    label, its_affine = read_nifti(path)
    if label.shape != shape:
        raise Problem(
            path, f"its shape {label.shape} is not {shape}, that of {image.name}; use the label that belongs to this image"
        )
    if not same_grid(shape, affine, shape, its_affine):
        raise Problem(path, f"its affine is not that of {image.name}: they lie apart in space; resample or copy the header")
    low, high = float(label.min()), float(label.max())
    unknown = [f"{low:g} to {high:g}"]
    if low >= 0 and high <= 255 and (label.dtype.kind != "f" or (label == np.rint(label)).all()):  # NaN fails low >= 0
        label = label.astype(np.uint8)
        ids = np.flatnonzero(np.bincount(label.ravel(order="K"), minlength=256))
        unknown = [str(number) for number in ids if number >= len(classes) and number != UNLABELLED]
        if ids[-1] == UNLABELLED and not (ids[:-1] > 0).any():
            raise Problem(
                path, "its only id but 0 is 255, which means not annotated; store the class id, or leave the label out"
            )
    if unknown:
        known = ", ".join(f"{number} {name}" for number, name in enumerate(classes))
        raise Problem(
            path, f"unknown class id {', '.join(unknown)}; expected {known}; mend the label or the labels of dataset.json"
        )
    return label


def read_case(case: Case, info: DataInfo) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[np.uint8] | None]:
    """Image (c, x, y, z), affine, label (x, y, z) or None. Raises Problem with the first thing that is wrong."""
    image, affine = read_image(case, info)
    label = read_label(case.label, case.images[0], image.shape[1:], affine, info.classes) if case.label else None
    return image, affine, label
