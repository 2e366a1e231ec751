"""From a folder of scans to a store of slices: each volume is read, checked and prepared alone, then all slices are shuffled.

    out/.work/<signature>.arrow    one prepared volume, written whole as it is done: a killed ingest goes on from here
    out/slices/part-00000.parquet  about PART_BYTES of slices each, shuffled over the whole data set with a fixed seed
    out/manifest.json              last; then .work goes
    out/.n4/<signature>.npy        one bias-corrected scan: stays, so that another preparation of it need not wait again
    out/source/                    what a generated data set wrote

The same sources and preset again do nothing. The content hash is made of the volumes' own hashes, so neither the order in which
they were done nor the files they were dealt into change it.

Memory is bounded by `workers` times the largest volume (`expected_bytes`), and while slices are shuffled by `workers` times
four PART_BYTES, however many volumes there are: where that does not fit, fewer workers are started, and a volume that does not
fit alone is refused by name before anything is read.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from medssl.platform import atomic, geometry
from medssl.platform.errors import RunError, UsageError
from medssl.platform.geometry import UNLABELLED, Preset
from medssl.platform.records import Case, DataInfo
from medssl.platform.scans import Problem, Source, digest, find_source, listing_problems, read_case
from medssl.platform.store import SCHEMA, Store, VolumeRecord

if TYPE_CHECKING:
    import pyarrow as pa

PART_BYTES = 64 << 20  # pixels of a slice file before compression
WORKER_BYTES = 200 << 20  # a worker with its imports and nothing to do
MEMORY = 0.8  # of what is free, for all workers together

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int, int, str], None]  # done, of how many, of what
MapUnordered = Callable[[Callable[[Item], Result], Sequence[Item], int], Iterator[Result]]


# -------------------------------------------------------------------------------------------------------- preparing one volume


@dataclass(frozen=True)
class VolumeTask:
    """One volume to prepare, for another process."""

    case: Case
    info: DataInfo
    preset: Preset
    path: Path  # where its slices go
    cache: Path | None = None  # where its bias-corrected form is kept
    limit: int | None = None  # bytes that preparing it may take


def ingest_volume(task: VolumeTask) -> None:
    """Read, check, prepare and write one volume. Raises Problem, or RunError when the disk is full."""
    image, affine, label = read_case(task.case, task.info)
    filtered = geometry.may_filter(label is not None, task.case.part)
    try:
        needed = geometry.peak_bytes(image.itemsize, affine, image.shape[1:], len(image), task.preset)
        if task.limit is not None and needed > task.limit:
            raise too_large(task.case, needed, task.limit)
        prepared = geometry.prepare(image, affine, label, task.preset, filtered=filtered, cache=task.cache)
    except ValueError as error:
        raise Problem(task.case.images[0], str(error)) from error
    write_table(task.path, slice_table(task.case, prepared), final=False)


def too_large(case: Case, needed: int, limit: int) -> Problem:
    what = f"preparing it takes about {needed / 2**30:.1f} GB of memory, and {limit / 2**30:.1f} GB are free for it"
    return Problem(
        case.images[0], f"{what}; is its spacing right? else free memory, use fewer --workers, or a coarser spacing_mm"
    )


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
        lost=prepared.lost,
    )
    at = np.asarray(prepared.geometry.get("kept", range(slices)), np.float32)
    record = dataclasses.replace(record, digest=volume_digest(record, map(slice_digest, pixels, masks)))
    columns = {
        "patient": [case.patient] * slices,
        "volume": [case.volume] * slices,
        "slice_index": range(slices),
        "position": (at - at[0]) / max(at[-1] - at[0], 1),
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
    apart = ("geometry", "digest", "site", "group", "content", "lost")
    fields = {key: value for key, value in dataclasses.asdict(record).items() if key not in apart}
    return digest([fields, list(slices)])


def write_table(path: Path, table: "pa.Table", final: bool) -> None:
    """A compressed Parquet file to keep, or an Arrow file that can be mapped into memory until then; whole or absent."""
    import pyarrow as pa
    import pyarrow.parquet

    def fill(file: BinaryIO) -> None:
        if final:  # level 1: pixels hardly shrink further, and no dictionary of pixels
            pyarrow.parquet.write_table(
                table, file, compression="zstd", compression_level=1, use_dictionary=["patient", "volume"]
            )
        else:
            with pa.ipc.new_file(file, table.schema) as arrow:
                arrow.write_table(table)

    atomic.write(path, fill, durable=final)


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

    slices: dict[int, pa.Table] = {}
    for path, rows, places in task.rows:
        with pa.memory_map(str(path)) as file:
            mine = pa.ipc.open_file(file).read_all().take(rows).replace_schema_metadata(None)
        slices |= {int(place): mine.slice(k, 1) for k, place in enumerate(places)}  # not copied again
    write_table(task.path, pa.concat_tables([slices[place] for place in sorted(slices)]), final=True)
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
    """Results as they finish, from fresh processes (forking one that has threads may hang); one worker is this process.

    They are forked from a server that has imported what they need, and neither torch nor ray.
    """
    if min(workers, len(items)) <= 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("forkserver")
    needed = ["medssl.platform.ingest", "nibabel", "isal.isal_zlib", "pyarrow.parquet"]
    context.set_forkserver_preload([*needed, "pandas"])  # which pyarrow imports wherever it is installed
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
        wanted = geometry.resolve(found.info, preset, changes)
        found = found.suiting(preset).with_classes(wanted.classes)
        for problem in listing_problems(found):
            raise problem
        for half in out.glob(".manifest.json.*"):  # of a process that was killed while it wrote
            half.unlink()
        if (out / "manifest.json").exists():
            if not overwrite:
                store = same(Store.open(out), found, wanted)
                shutil.rmtree(out / ".work", ignore_errors=True)  # of a process that was killed in its last act
                return store
            (out / "manifest.json").unlink()
        workers = workers or cores()
        return assemble(found, out, wanted, workers, progress, map_unordered or default_map(workers))


def same(store: Store, source: Source, preset: Preset) -> Store:
    """The store, if it is what would be prepared now. Raises UsageError saying how it differs."""
    if store.source != source.version:
        raise UsageError(
            f"{store.root} was prepared from other files than {source.root} holds now, or from these with other times of "
            "modification; prepare it anew with --overwrite, and equal scans keep their content hash, so that runs stay valid"
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
    caches = corrected_scans(source, cases, out / ".n4", preset)
    missing = [k for k, path in enumerate(paths) if not read_record(path)]
    fewer, limit = within_memory([cases[k] for k in missing], preset, workers)
    tasks = [VolumeTask(cases[k], source.info, preset, paths[k], caches[k], limit) for k in missing]
    what = (
        "volumes" if fewer == min(workers, max(len(tasks), 1)) else f"volumes, {fewer} at a time: more exceed the free memory"
    )
    progress(len(cases) - len(tasks), len(cases), what)
    for done, _ in enumerate(map_unordered(ingest_volume, tasks, fewer), len(cases) - len(tasks) + 1):
        progress(done, len(cases), what)

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


def corrected_scans(source: Source, cases: Sequence[Case], folder: Path, preset: Preset) -> list[Path | None]:
    """Where the bias-corrected form of each scan is kept, which depends on its files alone; others are removed."""
    if not preset.n4:
        return [None] * len(cases)
    settings = [preset.n4, preset.channels, source.info.channels]
    named = [folder / f"{digest([*settings, source.stamp(case)])}.npy" for case in cases]
    for file in set(folder.glob("*")) | set(folder.glob(".*")):
        if file not in named:
            file.unlink()
    return list(named)


# ---------------------------------------------------------------------------------------------------------------------- memory


def expected_bytes(case: Case, preset: Preset) -> int:
    """About the memory that reading and preparing a volume takes, told by a NIfTI file's header, else by its size on disk."""
    import nibabel

    first = case.images[0]
    with contextlib.suppress(Exception):  # whatever is wrong with a header, reading the file says it better
        with gzip.open(first) if first.name.endswith(".gz") else open(first, "rb") as file:
            begin = file.read(540)
        kinds = (nibabel.Nifti1Header, nibabel.Nifti2Header)
        header = next((kind for kind in kinds if kind.may_contain_header(begin)), None)
        if header is not None:
            said = header(begin[: header.sizeof_hdr], check=False)
            shape, voxel = said.get_data_shape(), said.get_data_dtype().itemsize
            if len(shape) < 3 or min(shape) < 1:
                raise ValueError(f"no volume: {shape}")
            stored = max(len(case.images), math.prod(shape[3:]))
            channels = stored if case.frame is None else 1
            read = stored * math.prod(shape[:3]) * voxel  # once as bytes, once as the array that `peak_bytes` counts
            return read + geometry.peak_bytes(voxel, said.get_best_affine(), shape[:3], channels, preset)
    files = [each for image in case.images for each in ([image] if image.is_file() else image.rglob("*"))]
    return 10 * sum(file.stat().st_size for file in files if file.is_file())  # 2 bytes a voxel become twice 4, twice over


def free_bytes() -> int:
    """Memory that may be taken without swapping, of this machine or of its container."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) << 10
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return free


def within_memory(cases: Sequence[Case], preset: Preset, workers: int) -> tuple[int, int]:
    """How many workers have room for the largest volume each, at most `workers`; and the bytes that each may take.

    Raises Problem for a volume that one worker alone has no room for.
    """
    room, workers = int(MEMORY * free_bytes()), max(1, min(workers, len(cases)))
    largest, needed = None, 0
    for case in cases:
        if (expected := expected_bytes(case, preset)) > needed:
            largest, needed = case, expected
    if largest is not None and needed > room - WORKER_BYTES:
        raise too_large(largest, needed, max(room - WORKER_BYTES, 0))
    workers = max(1, min(workers, room // (needed + WORKER_BYTES)))
    return workers, room // workers - WORKER_BYTES
