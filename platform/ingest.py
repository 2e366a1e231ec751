"""From a folder of scans to a store of slices: each volume is read, checked and prepared alone, then all slices are shuffled.

    out/.work/<signature>.arrow    one prepared volume, written whole as it is done: a killed ingest goes on from here
    out/slices/part-00000.parquet  about PART_BYTES of slices each, shuffled over the whole data set with a fixed seed
    out/manifest.json              last; then .work goes
    out/source/                    what a generated data set wrote

The same sources and preset again do nothing. The content hash is made of the volumes' own hashes, so neither the order in which
they were done nor the files they were dealt into change it.
"""

import dataclasses
import gzip
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from medssl.platform import atomic, find, geometry
from medssl.platform.errors import RunError, UsageError
from medssl.platform.geometry import UNLABELLED, Preset
from medssl.platform.records import Case, DataInfo
from medssl.platform.store import SCHEMA, Store, VolumeRecord

if TYPE_CHECKING:
    import pyarrow as pa

PART_BYTES = 64 << 20  # pixels of a slice file before compression
GRID_TOLERANCE = 0.1  # a label's corners may be this far from its image's, in voxels: headers are rounded to float32

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int, int, str], None]  # done, of how many, of what
MapUnordered = Callable[[Callable[[Item], Result], Sequence[Item], int], Iterator[Result]]


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


# -------------------------------------------------------------------------------------------------------- preparing one volume


@dataclass(frozen=True)
class VolumeTask:
    """One volume to prepare, for another process."""

    case: Case
    info: DataInfo
    preset: Preset
    path: Path | None  # where its slices go; None: only look whether it can be prepared


def ingest_volume(task: VolumeTask) -> None:
    """Read, check, prepare and write one volume. Raises Problem, or RunError when the disk is full."""
    image, affine, label = read_case(task.case, task.info)
    try:
        prepared = geometry.prepare(image, affine, label, task.preset)
    except ValueError as error:
        raise Problem(task.case.images[0], str(error)) from error
    if task.path is not None:
        table = slice_table(task.case, prepared)
        write_table(task.path, table, final=False)


def find_problem(task: VolumeTask) -> Problem | None:
    try:
        ingest_volume(task)
    except Problem as problem:
        return problem
    return None


def schema() -> "pa.Schema":
    """Columns of a slice, as store.py describes them."""
    import pyarrow as pa

    columns: dict[str, Any] = {
        "patient": pa.string(),
        "volume": pa.string(),
        "slice_index": pa.int32(),
        "position": pa.float32(),
    }
    columns |= {"image": pa.binary(), "label": pa.binary(), "height": pa.int32(), "width": pa.int32(), "channels": pa.int32()}
    columns |= {"spacing_mm": pa.list_(pa.float32(), 3), "foreground": pa.float32()}
    return pa.schema(list(columns.items()))


def slice_table(case: Case, prepared: geometry.Prepared) -> "pa.Table":
    """The rows of a volume from its lowest slice up; its VolumeRecord is the schema's metadata."""
    import pyarrow as pa

    channels, height, width, slices = prepared.image.shape
    images = [prepared.image[..., k].tobytes() for k in range(slices)]
    labels = None if prepared.label is None else np.ascontiguousarray(prepared.label.transpose(2, 0, 1))
    masks = [None] * slices if labels is None else [plane.tobytes() for plane in labels]
    pixels = [hashlib.sha256(image).digest() for image in images]
    record = VolumeRecord(
        volume=case.volume,
        patient=case.patient,
        part=case.part,
        labelled=labels is not None,
        slices=slices,
        height=height,
        width=width,
        channels=channels,
        spacing_mm=prepared.spacing_mm,
        phase=case.phase,
        geometry=prepared.geometry,
        digest="",
        site=case.site,
        group=case.group,
        content=digest([height, width, channels, [each.hex() for each in pixels]]),
    )
    record = dataclasses.replace(record, digest=volume_digest(record, map(slice_digest, pixels, masks)))
    columns = {
        "patient": [case.patient] * slices,
        "volume": [case.volume] * slices,
        "slice_index": range(slices),
        "position": np.arange(slices, dtype=np.float32) / max(slices - 1, 1),
        "image": images,
        "label": masks,
        "height": [height] * slices,
        "width": [width] * slices,
        "channels": [channels] * slices,
        "spacing_mm": [prepared.spacing_mm] * slices,
        "foreground": [None] * slices if labels is None else [foreground(plane) for plane in labels],
    }
    return pa.table(columns, schema().with_metadata({"volume": json.dumps(dataclasses.asdict(record))}))


def foreground(label: NDArray[np.uint8]) -> float | None:
    """Fraction of the annotated pixels of a slice that are not background; None when nothing is annotated."""
    annotated = int((label != UNLABELLED).sum())
    return None if not annotated else (int((label != 0).sum()) - label.size + annotated) / annotated


def slice_digest(pixels: bytes, label: bytes | None) -> str:
    """pixels    the SHA-256 of the image"""
    return hashlib.sha256(pixels + (b"" if label is None else hashlib.sha256(label).digest())).hexdigest()


def volume_digest(record: VolumeRecord, slices: Iterable[str]) -> str:
    """Hash of what a volume holds and whose it is; its slices in order."""
    apart = ("geometry", "digest", "site", "group", "content")
    fields = {key: value for key, value in dataclasses.asdict(record).items() if key not in apart}
    return digest([fields, list(slices)])


def write_table(path: Path, table: "pa.Table", final: bool) -> None:
    """A compressed Parquet file to keep, or an Arrow file that can be mapped into memory until then; whole or absent."""
    import pyarrow as pa
    import pyarrow.parquet

    buffer = pa.BufferOutputStream()
    if final:  # level 1: pixels hardly shrink further, and no dictionary of pixels
        pyarrow.parquet.write_table(
            table, buffer, compression="zstd", compression_level=1, use_dictionary=["patient", "volume"]
        )
    else:
        with pa.ipc.new_file(buffer, table.schema) as file:
            file.write_table(table)
    atomic.write(path, lambda file: file.write(buffer.getvalue()), durable=final)


# ------------------------------------------------------------------------------------------------------- shuffling all slices


@dataclass(frozen=True)
class PartTask:
    """One slice file to write: rows of prepared volumes, and the place of each in it."""

    path: Path
    rows: tuple[tuple[Path, NDArray[np.intp], NDArray[np.intp]], ...]  # volume's file, its rows, their places


def deal(records: Sequence[VolumeRecord], paths: Sequence[Path], bytes_per_value: int, folder: Path) -> list[PartTask]:
    """A seeded order of all slices, cut into files of about PART_BYTES."""
    volume = np.repeat(np.arange(len(records)), [record.slices for record in records])
    row = np.concatenate([np.arange(record.slices) for record in records])
    pixels = np.array(
        [record.height * record.width * (record.channels * bytes_per_value + record.labelled) for record in records]
    )
    order = np.random.default_rng(0).permutation(len(volume))
    filled = np.cumsum(pixels[volume[order]])
    part = (filled - 1) // PART_BYTES
    tasks = []
    for number, wanted in enumerate(np.unique(part)):
        mine = order[part == wanted]
        rows = tuple(
            (paths[v], row[mine[here]], here) for v in np.unique(volume[mine]) if len(here := np.flatnonzero(volume[mine] == v))
        )
        tasks.append(PartTask(folder / f"part-{number:05d}.parquet", rows))
    return tasks


def write_part(task: PartTask) -> str:
    """Gather the rows of one slice file from the volumes, mapped into memory, and write it. Returns its name."""
    import pyarrow as pa

    pieces = []
    for path, rows, _ in task.rows:
        with pa.memory_map(str(path)) as file:
            pieces.append(pa.ipc.open_file(file).read_all().take(rows).replace_schema_metadata(None))
    places = np.concatenate([places for *_, places in task.rows])
    write_table(task.path, pa.concat_tables(pieces).take(np.argsort(places)), final=True)
    return task.path.name


def read_record(path: Path) -> VolumeRecord | None:
    """The VolumeRecord that a prepared volume carries; None where there is none, or a file that a loss of power emptied."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file:
            said = json.loads(pa.ipc.open_file(file).schema.metadata[b"volume"])
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    return VolumeRecord(**{**said, "spacing_mm": tuple(said["spacing_mm"])})


# ---------------------------------------------------------------------------------------------------------------- in parallel


def end_with_parent() -> None:
    """A worker outlives a killed parent unless it watches it."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def in_processes(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """Results as they finish, from fresh processes (forking one that has threads may hang); one worker is this process."""
    if min(workers, len(items)) <= 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(items)), context, end_with_parent) as pool:
        try:
            for future in as_completed([pool.submit(function, item) for item in items]):
                yield future.result()
        except BrokenProcessPool as error:
            raise RunError(
                "a worker process was killed, probably for want of memory; prepare again with fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def on_ray(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """Results as they finish, from at most `workers` Ray tasks at a time. The nodes share the file system of `out`."""
    import ray

    task, left = ray.remote(function), iter(items)
    running = [task.remote(item) for item in islice(left, workers)]
    try:
        while running:
            (done, *_), running = ray.wait(running)
            running += [task.remote(item) for item in islice(left, 1)]
            yield ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    finally:
        for each in running:
            ray.cancel(each)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_map(workers: int) -> MapUnordered:
    """Ray tasks where Ray is up and there is something to share; else processes, which start in half a second."""
    ray = sys.modules.get("ray")
    return on_ray if workers > 1 and ray is not None and ray.is_initialized() else in_processes


# -------------------------------------------------------------------------------------------------------------- the whole way


def prepare(
    source: str | Path,
    out: Path,
    *,
    preset: str | None = None,
    changes: Mapping[str, Any] | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress = lambda done, total, what: None,
    map_unordered: MapUnordered | None = None,
) -> Store:
    """Prepare a data set, given by name or folder, into the store `out`; what is there already is kept.

    preset           a name in geometry.PRESETS; None: what the data set asks for
    changes          fields of the preset to set otherwise
    workers          processes or tasks at a time; None: one per core
    overwrite        prepare anew where `out` holds another preparation; without it that is a UsageError
    map_unordered    how to work in parallel; None: `default_map`
    Raises Problem at the first scan that cannot be used, RunError when the disk is full.
    """
    out = Path(out)
    with atomic.owned(out) as mine:
        if not mine:
            raise RunError(f"{out}: another process is preparing it; wait until it is done")
        found = find_source(source, out)
        for problem in listing_problems(found):
            raise problem
        wanted = geometry.resolve(found.info, preset, changes)
        if (out / "manifest.json").exists():
            if not overwrite:
                return same(Store.open(out), found, wanted)
            (out / "manifest.json").unlink()
        workers = workers or cores()
        return assemble(found, out, wanted, workers, progress, map_unordered or default_map(workers))


def same(store: Store, source: Source, preset: Preset) -> Store:
    """The store, if it is what would be prepared now. Raises UsageError saying how it differs."""
    if store.source != source.version:
        raise UsageError(
            f"{store.root} was prepared from other files than {source.root} holds now; prepare it anew with --overwrite"
        )
    before, now = dataclasses.asdict(store.preset), dataclasses.asdict(preset)
    changed = ", ".join(f"{key} {before[key]} instead of {now[key]}" for key in now if before[key] != now[key])
    if changed:
        raise UsageError(f"{store.root} was prepared with {changed}; prepare it anew with --overwrite, or into another folder")
    return store


def assemble(source: Source, out: Path, preset: Preset, workers: int, progress: Progress, map_unordered: MapUnordered) -> Store:
    """Prepare the volumes that are not yet there, deal their slices into files, write the manifest."""
    cases = sorted(source.cases, key=lambda case: case.volume)
    paths = [out / ".work" / f"{source.signature(case, preset)}.arrow" for case in cases]
    tasks = [
        VolumeTask(case, source.info, preset, path) for case, path in zip(cases, paths, strict=True) if not read_record(path)
    ]
    progress(len(cases) - len(tasks), len(cases), "volumes")
    for done, _ in enumerate(map_unordered(ingest_volume, tasks, workers), len(cases) - len(tasks) + 1):
        progress(done, len(cases), "volumes")

    records = [record for path in paths if (record := read_record(path))]
    assert len(records) == len(cases)
    shutil.rmtree(out / "slices", ignore_errors=True)
    parts = deal(records, paths, np.dtype(preset.dtype).itemsize, out / "slices")
    for done, _ in enumerate(map_unordered(write_part, parts, workers), 1):
        progress(done, len(parts), "slice files")
    info = source.info
    store = Store(
        root=out,
        name=info.name,
        classes=info.classes,
        tolerance_mm=info.tolerance_mm,
        licence=info.licence,
        citation=info.citation,
        defaults=info.defaults,
        preset=preset,
        content_hash=digest([SCHEMA, info.classes, [record.digest for record in records]]),
        source=source.version,
        files=tuple(part.path for part in parts),
        volumes=tuple(records),
    )
    atomic.write_json(out / "manifest.json", store.manifest())
    shutil.rmtree(out / ".work")
    return store


# -------------------------------------------------------------------------------------------------------------- looking at all


def check(source: str | Path, *, workers: int | None = None, map_unordered: MapUnordered | None = None) -> list[Problem]:
    """Everything that is wrong with a data set, or with a prepared store, sorted by file; reads all of it, writes nothing."""
    workers = workers or cores()
    work = map_unordered or default_map(workers)
    if (Path(source) / "manifest.json").is_file():
        return check_store(Store.open(Path(source)), workers, work)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            found = find_source(source, Path(scratch))
            problems = listing_problems(found)
            preset = geometry.resolve(found.info)
        except RunError as error:  # the listing itself: no volume can be looked at
            file, _, what = str(error).partition(": ")
            return [Problem(Path(file), what)]
        missing = {problem.file for problem in problems}
        whole = [case for case in found.cases if not missing & set(case.images)]
        tasks = [VolumeTask(case, found.info, preset, None) for case in whole]
        problems += [problem for problem in work(find_problem, tasks, workers) if problem]
    return sorted(problems, key=lambda problem: (str(problem.file), problem.what))


def digests(file: Path) -> list[tuple[str, int, str]] | Problem:
    """Volume, number and digest of every slice in a file."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file, columns=["volume", "slice_index", "image", "label"])
    except (OSError, pa.ArrowException) as error:
        return Problem(file, f"cannot be read ({str(error).splitlines()[0]}); prepare the data set anew with --overwrite")
    volume, number, image, label = (column.to_pylist() for column in table.columns)
    pixels = (hashlib.sha256(each).digest() for each in image)
    return list(zip(volume, number, map(slice_digest, pixels, label), strict=True))


def check_store(store: Store, workers: int, work: MapUnordered) -> list[Problem]:
    """Whether every volume of the manifest is in the slice files once, with the content it was written with."""
    problems, slices = [], dict[str, dict[int, str]]()
    total = 0
    for found in work(digests, store.files, workers):
        if isinstance(found, Problem):
            problems.append(found)
            continue
        total += len(found)
        for volume, number, content in found:
            slices.setdefault(volume, {})[number] = content
    for record in store.volumes:
        mine = slices.get(record.volume, {})
        if sorted(mine) != list(range(record.slices)):
            what = f"volume {record.volume} has {len(mine)} of its {record.slices} slices"
        elif volume_digest(record, [mine[k] for k in range(record.slices)]) != record.digest:
            what = f"volume {record.volume} is not what was written"
        else:
            continue
        problems.append(Problem(store.root, f"{what}; prepare the data set anew with --overwrite"))
    if total > sum(len(mine) for mine in slices.values()):
        problems.append(Problem(store.root, "holds a slice twice; prepare the data set anew with --overwrite"))
    return problems
