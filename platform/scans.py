"""Where scans come from, and how one is read and checked: a data set by name or folder, its cases, and the voxels of a case.

A module of datasets/ says which cases a folder holds (`matches`, `info`, `cases`), or puts together what lies in pieces
(`unpack`), or writes scans itself (`generate`); its `splits` are those that papers publish.
`read_case` gives a case as arrays on one grid, its label as class ids; `ingest` prepares what is read here.
"""

import ast
import dataclasses
import functools
import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.platform import atomic, find, formats, geometry
from medssl.platform.errors import Problem, UsageError
from medssl.platform.geometry import UNLABELLED, Preset
from medssl.platform.records import Case, DataInfo, Mask
from medssl.platform.splits import Split
from medssl.platform.store import SCHEMA

GRID_TOLERANCE = 0.1  # a label's corners may be this far from its image's, in voxels: headers are rounded to float32
NOT_REPEATED = {"label_values", "mask_threshold", "obtain"}  # what a store does not say about its source


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
        paths = [*case.images, *case.label_files]
        files = [file for path in paths for file in formats.members(path)]
        stats = [] if self.generator else [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
        stamp: list[Any] = [self.generator, case.patient, case.volume, case.part, case.phase, stats]
        if case.frame is not None:
            stamp.append({"frame": case.frame})
        if isinstance(case.label, tuple):
            stamp.append({"masks": [mask.class_name for mask in case.label]})
        if case.site or case.group:
            stamp.append({"site": case.site, "group": case.group})
        return stamp

    @property
    def _rules(self) -> dict[str, Any]:
        """How label files become class ids, where they do not hold them."""
        rules = {"label_values": sorted(self.info.label_values.items()), "mask_threshold": self.info.mask_threshold}
        return {name: rule for name, rule in rules.items() if rule}

    def signature(self, case: Case, preset: Preset) -> str:
        """Names the prepared form of one case."""
        said = [SCHEMA, self.info.classes, self.info.channels, dataclasses.asdict(preset), self.stamp(case)]
        return digest([*said, self._rules] if self._rules else said)

    @property
    def version(self) -> str:
        """Names the sources as a whole, with all that the manifest repeats from them."""
        info = {name: value for name, value in dataclasses.asdict(self.info).items() if name not in NOT_REPEATED} | self._rules
        return digest([info, sorted(map(self.stamp, self.cases), key=lambda stamp: stamp[2])])

    def suiting(self, preset: str | None) -> "Source":
        """The scans of the modality that a named preset is made for, of CT and MR in one folder. Raises UsageError on none."""
        wanted = geometry.modality(self.info, preset)
        cases = tuple(case for case in self.cases if case.modality in (None, wanted))
        if self.cases and not cases:
            other = "mr" if wanted == "ct" else "ct"
            raise UsageError(
                f"{self.root}: preset {preset or self.info.preset} is for {wanted}, and there is only {other} here"
            )
        return dataclasses.replace(self, cases=cases)

    def with_classes(self, chosen: tuple[str, ...] | None) -> "Source":
        """Labels of the chosen classes alone, numbered from 1 in that order. Raises UsageError on an unknown class."""
        info = self.info
        if chosen is None:
            return self
        for name in chosen:
            if name not in info.classes[1:] or chosen.count(name) > 1:
                raise UsageError(f'preset: classes names "{name}" in vain; {find.nearest(name, info.classes[1:])}, each once')
        if any(isinstance(case.label, tuple) for case in self.cases):
            raise UsageError(f"{self.root}: has a mask for each class; leave preset.classes out and choose among the masks")
        renumbered = {number: chosen.index(name) + 1 if name in chosen else 0 for number, name in enumerate(info.classes)}
        renumbered[UNLABELLED] = UNLABELLED
        values = info.label_values or {number: number for number in renumbered}
        tolerance = info.tolerance_mm and tuple(info.tolerance_mm[info.classes.index(name) - 1] for name in chosen)
        about = dataclasses.replace(
            info,
            classes=("background", *chosen),
            tolerance_mm=tolerance,
            label_values={value: renumbered[number] for value, number in values.items()},
        )
        return dataclasses.replace(self, info=about)


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
        f"{root}: no data set in a known form; expected dataset.json and imagesTr/ (Medical Segmentation Decathlon, nnU-Net), "
        "or a form that `medssl data prepare NAME` shows; medssl data list has the names"
    )


def form(name: str) -> str:
    """What a data set's folder looks like, and where to obtain one: the first indented lines of its file's docstring."""
    text = ast.get_docstring(ast.parse(find.path("dataset", name).read_text())) or ""
    tree = re.search(r"(?:^    .*\n|^\n)+(?=^\S)", text.partition("\n\n")[2] + "\n.", re.MULTILINE)
    obtain = find.constant("dataset", name, "OBTAIN", "")
    return (tree[0].rstrip() if tree else "") + (f"\n\nobtain it from {obtain}" if obtain else "")


def folder_of(source: str) -> Path | None:
    """The folder that a source is read from; None where it is the name of a data set that writes its scans, or no folder."""
    writes = source in find.names("dataset") and hasattr(find.load("dataset", source), "generate")
    return None if writes or not Path(source).is_dir() else Path(source)


def published(root: Path) -> list[Split]:
    """The splits of a folder's data set that papers publish."""
    module = find.load("dataset", recognise(root))
    return list(module.splits(root)) if hasattr(module, "splits") else []


def left_out(root: Path, preset: str | None) -> int:
    """How many scans of a folder a named preset is not made for: `Source.suiting`."""
    module = find.load("dataset", recognise(root))
    if hasattr(module, "unpack"):
        return 0
    every = Source(root, module.info(root), tuple(module.cases(root)))
    return len(every.cases) - len(every.suiting(preset).cases)


def find_source(source: str | Path, out: Path) -> Source:
    """A data set by the name of its file, which then writes its scans into `out`/source, or by its folder.

    Of a folder whose scans lie in pieces, `unpack` of its file puts them together in `out`/source.

    Raises UsageError when there is no such thing, RunError when its files contradict each other.
    """
    root = Path(source)
    if isinstance(source, str) and source in find.names("dataset"):
        module = find.load("dataset", source)
        if hasattr(module, "generate"):
            root, generator = out / "source", program(source)
            write_once(module.generate, root, generator)
            return Source(root, module.info(root), tuple(module.cases(root)), generator)
        if not root.is_dir():
            raise UsageError(f'data set "{source}" is read from a folder; give a folder of this form:\n\n{form(source)}')
    name = recognise(root)
    module = find.load("dataset", name)
    if not hasattr(module, "unpack"):
        return Source(root, module.info(root), tuple(module.cases(root)))
    files = [(str(file.relative_to(root)), file.stat()) for file in sorted(root.rglob("*")) if file.is_file()]
    generator = digest([program(name), [(file, stat.st_size, stat.st_mtime_ns) for file, stat in files]])
    write_once(functools.partial(module.unpack, root), out / "source", generator)
    return Source(root, module.info(root), tuple(module.cases(out / "source")), generator)


def program(name: str) -> str:
    """Hash of the text that generates a data set: its file and the private ones beside it that carry its name."""
    path = find.path("dataset", name)
    return digest([file.read_text() for file in (path, *sorted(path.parent.glob(f"_{path.stem}*.py")))])


def write_once(write: Callable[[Path], None], root: Path, generator: str) -> None:
    """Let a data set write its scans, unless they are there whole; the marker is written last."""
    marker = root / ".complete"
    if not marker.is_file() or marker.read_text() != generator:
        shutil.rmtree(root, ignore_errors=True)
        write(root)
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
        for file in case.label_files:
            if not file.exists():
                what = f"its label {file} is missing; add it, or move the image to imagesTs/ as unlabelled"
                found.append(Problem(case.images[0], what))
        found += [Problem(file, "is missing; download it again") for file in case.images if not file.exists()]
    return found


# ---------------------------------------------------------------------------------------------------------- reading one volume


@functools.lru_cache(maxsize=1)
def cine(path: Path, modified_ns: int) -> formats.Scan:
    """A 4D file, kept until another is read: its frames are volumes, prepared one after the other."""
    array, affine = formats.read(path)
    array.flags.writeable = False
    return array, affine


def of_frame(array: NDArray[Any], frame: int, path: Path) -> NDArray[Any]:
    """One volume (x, y, z) of a 4D array; of a file with a single frame that one. Raises Problem."""
    if array.ndim == 3 and frame == 0:
        return array
    if array.ndim != 4 or not 0 <= frame < array.shape[-1]:
        raise Problem(path, f"frame {frame} is wanted of its shape {array.shape}; expected 4D with that many; mend the list")
    return array[..., frame]


def read_image(case: Case, info: DataInfo) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """All channels of a volume, (c, x, y, z), finite and not constant, with their affine. Raises Problem."""
    together = len(case.images) == 1 and len(info.channels) > 1 and case.frame is None
    wanted = f"4D with {len(info.channels)} channels last" if together else "3D"
    channels: list[NDArray[Any]] = []
    affine = None
    for path in case.images:
        array, its_affine = formats.read(path) if case.frame is None else cine(path, path.stat().st_mtime_ns)
        if case.frame is not None:
            array = of_frame(array, case.frame, path)
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


def read_on_grid(path: Path, case: Case, shape: tuple[int, ...], affine: NDArray[Any]) -> NDArray[Any]:
    """A label file's values (x, y, z), on the grid of the image. Raises Problem."""
    image = case.images[0].name
    values, its_affine = formats.read(path, ids=True)
    if formats.is_stack(path) and not formats.is_stack(case.images[0]) and values.shape == shape:
        values, its_affine = formats.in_order_of(case.images[0], values), affine  # pictures have no place of their own
    if case.frame is not None and values.ndim == 4:  # a frame's label is a file of its own, or lies at the same place
        values = of_frame(values, case.frame, path)
    if values.shape != shape:
        raise Problem(
            path, f"its shape {values.shape} is not {shape}, that of {image}; use the label that belongs to this image"
        )
    if not same_grid(shape, affine, shape, its_affine):
        raise Problem(path, f"its affine is not that of {image}: they lie apart in space; resample or copy the header")
    return values


def whole_numbers(values: NDArray[Any]) -> tuple[NDArray[np.unsignedinteger[Any]], int, list[int]] | None:
    """Values as an offset of at most 16 bits above their smallest, that smallest, and those that occur; None if they are none.

    From 0 to 255 the smallest counts as 0, and what comes back are the values.
    """
    low, high = float(values.min()), float(values.max())
    if not high - low < 1 << 16 or not (values.dtype.kind != "f" or (values == np.rint(values)).all()):  # NaN fails the first
        return None
    if low >= 0 and high <= 255:
        low, offset = 0.0, values.astype(np.uint8, copy=False)
    else:
        offset = np.subtract(values, low, dtype=np.float64).astype(np.uint16)
    return offset, int(low), [int(low) + int(n) for n in np.flatnonzero(occurring(offset))]


def occurring(offset: NDArray[np.unsignedinteger[Any]]) -> NDArray[np.bool_]:
    """Which numbers occur, from 0 up: those that a run of equal ones begins with, as labels are made of long runs."""
    flat, seen = offset.ravel(order="K"), np.zeros(int(offset.max()) + 1, bool)
    for start in range(0, len(flat), 1 << 16):
        some = flat[start : start + (1 << 16)]
        seen[some[0]] = True
        seen[some[1:][some[1:] != some[:-1]]] = True
    return seen


def class_ids(values: NDArray[Any], path: Path, info: DataInfo) -> NDArray[np.uint8]:
    """Class ids or UNLABELLED, for the values of a label file. Raises Problem naming the values that mean nothing."""
    if info.mask_threshold is not None:
        return above(values, path, info.mask_threshold).astype(np.uint8)
    meaning = info.label_values or {number: number for number in (*range(len(info.classes)), UNLABELLED)}
    found = whole_numbers(values)
    unknown = [f"{values.min():g} to {values.max():g}"]
    if found:
        offset, low, present = found
        unknown = [str(value) for value in present if value not in meaning]
        if not info.label_values and present[-1] == UNLABELLED and not any(0 < value < UNLABELLED for value in present):
            raise Problem(
                path, "its only id but 0 is 255, which means not annotated; store the class id, or leave the label out"
            )
        if not unknown:
            if not info.label_values:
                return offset.astype(np.uint8, copy=False)
            table = np.zeros(present[-1] - low + 1, np.uint8)
            table[[value - low for value in present]] = [meaning[value] for value in present]
            return table[offset]
    some = ", ".join(unknown[:9]) + (", …" if len(unknown) > 9 else "")
    known = ", ".join(
        f"{value} {info.classes[number] if number < len(info.classes) else 'not annotated'}"
        for value, number in meaning.items()
        if info.label_values or number != UNLABELLED
    )
    raise Problem(path, f"unknown class id {some}; expected {known}; mend the label or the labels of dataset.json")


def above(values: NDArray[Any], path: Path, threshold: float) -> NDArray[np.bool_]:
    """Where a mask that was stored with loss is above the threshold. Raises Problem where it is not empty and nothing is."""
    marked = values > threshold
    if not marked.any() and values.max() > 0:
        raise Problem(path, f"its values go to {values.max():g}, none above the threshold {threshold:g}; expected 0 to 255")
    return marked


def marked_by(values: NDArray[Any], path: Path, info: DataInfo) -> NDArray[np.bool_]:
    """Where a mask holds its one value beside 0. Raises Problem where it holds several, as it does after lossy storage."""
    if info.mask_threshold is not None:
        return above(values, path, info.mask_threshold)
    found = whole_numbers(values)
    inside = [value for value in found[2] if value] if found else [0, 0]
    if len(inside) > 1:
        some = ", ".join(map(str, inside[:9])) + (", …" if len(inside) > 9 else "") if found else "fractions"
        raise Problem(path, f"a mask holds 0 and one other value, here are {some}; was it stored as JPEG? export it again")
    return values != 0


def joined(masks: tuple[Mask, ...], read: Callable[[Path], NDArray[Any]], info: DataInfo) -> NDArray[np.uint8]:
    """Class ids from masks; those of one class are joined, those of two must not meet. Raises Problem."""
    ids: NDArray[np.uint8] | None = None
    for name, path in masks:
        if name not in info.classes[1:]:
            raise Problem(path, f'marks "{name}", which is no class; expected one of {", ".join(info.classes[1:])}')
        number, marked = info.classes.index(name), marked_by(read(path), path, info)
        ids = np.zeros(marked.shape, np.uint8) if ids is None else ids
        if clash := int((marked & (ids > 0) & (ids != number)).sum()):
            raise Problem(
                path, f"{clash} of its voxels are another class in another mask; a voxel has one class: mend the masks"
            )
        ids[marked] = number
    assert ids is not None
    return ids


def read_label(case: Case, info: DataInfo, shape: tuple[int, ...], affine: NDArray[np.float64]) -> NDArray[np.uint8] | None:
    """Class ids (x, y, z) on the image's grid, UNLABELLED where nobody annotated; None without a label. Raises Problem."""

    def read(path: Path) -> NDArray[Any]:
        return read_on_grid(path, case, shape, affine)

    if not case.label:
        return None
    if isinstance(case.label, Path):
        return class_ids(read(case.label), case.label, info)
    return joined(case.label, read, info)


def read_case(case: Case, info: DataInfo) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[np.uint8] | None]:
    """Image (c, x, y, z), affine, label (x, y, z) or None. Raises Problem with the first thing that is wrong."""
    image, affine = read_image(case, info)
    return image, affine, read_label(case, info, image.shape[1:], affine)
