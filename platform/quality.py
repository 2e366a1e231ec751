"""What is wrong with a data set, or strange about it: every scan is looked at, and everything found is listed.

An error is what preparing refuses, or what would make a result wrong without anyone noticing. A warning may be right.

    error    listing           the folders and their lists contradict each other, or a name comes twice
             missing           a file that should be there is not
             image             a scan cannot be read or used: damaged, of another shape, NaN or infinite, empty or constant
             label             a label cannot be read or used: another grid than its scan's, values that mean nothing
             preparation       the preset cannot be applied: no foreground, percentiles that coincide, a singular affine
             twin              two patients hold the same scan, voxel by voxel
             leak              a patient, or one scan, is in two parts of the published split, or of one that was drawn
             store             a prepared set is not what was written
    warning  duplicate         one patient holds the same scan twice
             unlabelled        volumes without a label; slices of a labelled volume that nobody annotated
             empty label       a label that marks nothing
             absent class      a class that no label marks
             intensity         the 1st percentile, median or 99th percentile of a channel is far from the other volumes'
             spacing           a side of the voxels is far from the other volumes'

Far: the robust z = 0.6745 (x - median) / MAD over all volumes is beyond 6 (Iglewicz and Hoaglin, How to Detect and Handle
Outliers, 1993, flag 3.5; scans have heavier tails), with at least 8 volumes, and the median absolute deviation (MAD) taken as
2 % of the median spacing, or of the median range of intensities, where it is smaller. Percentiles are those of about 10^6
voxels, evenly taken. The same scan: equal values in an equal shape, whatever header, data type, compression or name they carry.

`as_json` gives the form for programs. Its version, `schema`, changes when a field changes its meaning or goes; fields and kinds
may be added.

    {"schema": 1, "source": …, "form": "scans" or "store", "volumes": 261, "patients": 171,
     "errors":   [{"kind": …, "file": …, "volume": … or null, "patient": … or null, "what": one sentence}],
     "warnings": [the same]}
"""

import dataclasses
import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medssl.platform import formats, geometry, ingest, scans, splits, words
from medssl.platform.errors import Problem, RunError, UsageError
from medssl.platform.geometry import UNLABELLED, Preset
from medssl.platform.ingest import MapUnordered, Progress
from medssl.platform.records import Case, DataInfo
from medssl.platform.store import Store

JSON_SCHEMA = 1
SAMPLED = 1_000_000  # voxels that a volume's percentiles are taken of
FAR, FEWEST, FLOOR = 6.0, 8, 0.02  # robust z, volumes, and the least MAD as a part of the median spacing or range
PERCENTILES = (1, 50, 99)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or strange; `kind` is one of the list above."""

    severity: Literal["error", "warning"]
    kind: str
    file: Path
    what: str  # and the remedy
    volume: str | None = None
    patient: str | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclass(frozen=True)
class Report:
    """All that was found, sorted by file."""

    source: str
    form: Literal["scans", "store"]
    volumes: int
    patients: int
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(each for each in self.findings if each.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return tuple(each for each in self.findings if each.severity == "warning")

    def as_json(self) -> dict[str, Any]:
        def listed(findings: Iterable[Finding]) -> list[dict[str, Any]]:
            return [{k: str(v) if k == "file" else v for k, v in vars(each).items() if k != "severity"} for each in findings]

        said = {"schema": JSON_SCHEMA} | {key: getattr(self, key) for key in ("source", "form", "volumes", "patients")}
        return said | {"errors": listed(self.errors), "warnings": listed(self.warnings)}

    def describe(self) -> str:
        """For people: errors, then warnings, then how many."""
        lines = [f"error: {each}" for each in self.errors] + [f"warning: {each}" for each in self.warnings]
        if not lines:
            return "no problem found"
        counts = f"{words.count(len(self.errors), 'error')}, {words.count(len(self.warnings), 'warning')}"
        return "\n".join([*lines, f"{counts} in {words.count(self.volumes, 'volume')}"])


@dataclass(frozen=True)
class Measured:
    """What is kept of a volume that was looked at; small, for it crosses processes."""

    volume: str
    patient: str
    file: Path
    labelled: bool
    content: str | None  # hash of the voxels
    percentiles: tuple[tuple[float, ...], ...]  # of each channel
    spacing_mm: tuple[float, ...] | None  # along R, A, S
    counts: tuple[int, ...] | None  # voxels of each class; None: no label that can be read
    unannotated: tuple[int, int]  # slices that nobody annotated, of how many
    problems: tuple[tuple[str, Problem], ...]  # with their kinds


@dataclass(frozen=True)
class Task:
    """One volume to look at, for another process."""

    case: Case
    info: DataInfo
    preset: Preset
    limit: int  # bytes that it may take


def check(
    source: str | Path,
    *,
    workers: int | None = None,
    progress: Progress = lambda done, total, what: None,
    map_unordered: MapUnordered | None = None,
) -> Report:
    """Look at all of a data set, given by name or folder, or of a prepared store. Writes nothing.

    Volumes are read in parallel, each worker holding one, by as many workers as there is memory for. Raises UsageError when
    there is no such data set.
    """
    workers = workers or ingest.cores()
    work = map_unordered or ingest.default_map(workers)
    if (Path(source) / "manifest.json").is_file():
        return _check_store(Store.open(Path(source)), workers, work, progress)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            found = scans.find_source(source, Path(scratch))
            preset = dataclasses.replace(geometry.resolve(found.info), n4=0)  # it takes minutes, and finds nothing
            found = found.suiting(None).with_classes(preset.classes)
            missing = scans.listing_problems(found)
        except RunError as error:  # the listing itself: no volume can be looked at
            file, _, what = str(error).partition(": ")
            return Report(str(source), "scans", 0, 0, (Finding("error", "listing", Path(file), what),))
        findings = [
            Finding("error", "missing" if "missing" in each.what else "listing", each.file, each.what) for each in missing
        ]
        there = [case for case in found.cases if all(file.exists() for file in case.images)]
        workers, limit = _within_memory(there, preset, workers)
        tasks = [Task(case, found.info, preset, limit) for case in there]
        measured = list(_told(work(look, tasks, workers), len(tasks), progress))
    for each in measured:
        findings += [Finding("error", kind, p.file, p.what, each.volume, each.patient) for kind, p in each.problems]
    parts = {case.volume: case.part for case in found.cases}
    findings += leaks(found.cases) + twins(measured, parts) + labelling(measured, found.info.classes, found.root)
    findings += outliers(measured, found.info.channels)
    return _report(source, "scans", len(found.cases), len({case.patient for case in found.cases}), findings)


def _within_memory(cases: Sequence[Case], preset: Preset, workers: int) -> tuple[int, int]:
    """Workers, and bytes for each; one worker where a file claims more than there is, which `look` then reports."""
    try:
        return ingest.within_memory(cases, preset, workers)
    except Problem:
        return 1, int(ingest.MEMORY * ingest.free_bytes()) - ingest.WORKER_BYTES


def _told(results: Iterator[Any], total: int, progress: Progress) -> Iterator[Any]:
    """The results, with how far they have come."""
    progress(0, total, "volumes")
    for done, result in enumerate(results, 1):
        progress(done, total, "volumes")
        yield result


def _report(source: str | Path, form: Any, volumes: int, patients: int, findings: Iterable[Finding]) -> Report:
    ordered = sorted(findings, key=lambda each: (each.severity, str(each.file), each.kind, each.what))
    return Report(str(source), form, volumes, patients, tuple(ordered))


# ------------------------------------------------------------------------------------------------------------- one volume


def look(task: Task) -> Measured:
    """Read a volume and its label, each even where the other cannot be used, and measure what the set is compared by."""
    case, info, problems = task.case, task.info, list[tuple[str, Problem]]()
    image = affine = spacing = None
    try:
        if (needed := ingest.expected_bytes(case, task.preset)) > task.limit:
            raise ingest.too_large(case, needed, task.limit)
        image, affine = scans.read_image(case, info)
    except Problem as problem:
        problems.append(("image", problem))
    label = _label(case, info, image, affine, problems)
    if image is not None and affine is not None:
        try:
            geometry.prepare(
                image, affine, label if label is not None and label.shape == image.shape[1:] else None, task.preset
            )
            spacing, axes = geometry.spacing_and_axes(affine)
        except Problem as problem:
            problems.append(("preparation", problem))
        except ValueError as error:
            problems.append(("preparation", Problem(case.images[0], str(error))))
    counts, unannotated = None, (0, 0)
    if label is not None:
        counts = tuple(int(n) for n in np.bincount(label.ravel(order="K"), minlength=256)[: len(info.classes)])
        if spacing:
            planes = (geometry.to_ras(label, axes) == UNLABELLED).all(axis=(0, 1))
            unannotated = int(planes.sum()), len(planes)
    return Measured(
        volume=case.volume,
        patient=case.patient,
        file=case.images[0],
        labelled=case.label is not None,
        content=None if image is None else voxel_digest(image),
        percentiles=() if image is None else tuple(map(_percentiles, image)),
        spacing_mm=spacing,
        counts=counts,
        unannotated=unannotated,
        problems=tuple(problems),
    )


def _label(
    case: Case, info: DataInfo, image: NDArray[Any] | None, affine: NDArray[Any] | None, problems: list[tuple[str, Problem]]
) -> NDArray[np.uint8] | None:
    """The class ids, if the label's values mean something; what is wrong with grid and values goes to `problems`."""
    if not all(file.is_file() for file in case.label_files):
        return None
    if image is not None and affine is not None:
        try:
            return scans.read_label(case, info, image.shape[1:], affine)
        except Problem as problem:
            problems.append(("label", problem))
    if not isinstance(case.label, Path):
        return None
    try:  # on its own grid: whether its values mean something
        values, _ = formats.read(case.label, ids=True)
        values = values if case.frame is None else scans.of_frame(values, case.frame, case.label)
        return scans.class_ids(values, case.label, info)
    except Problem as problem:
        if problem.what not in [known.what for _, known in problems]:
            problems.append(("label", problem))
    return None


def _percentiles(channel: NDArray[Any]) -> tuple[float, ...]:
    step = max(1, round((channel.size / SAMPLED) ** (1 / channel.ndim)))
    return tuple(float(each) for each in np.percentile(channel[(slice(None, None, step),) * channel.ndim], PERCENTILES))


def voxel_digest(image: NDArray[Any]) -> str:
    """Hash of shape and values (c, x, y, z), the same for every data type that holds them. Floats count to 24 bits."""
    largest = max(abs(float(image.min())), abs(float(image.max())))
    whole = largest < 1 << 62 and (image.dtype.kind != "f" or bool((image == np.rint(image)).all()))
    dtype = ("<i2" if largest < 1 << 15 else "<i8") if whole else "<f4"
    made = hashlib.sha256(f"{image.shape}{dtype}".encode())
    for channel in image:
        stored = channel.astype(dtype, copy=False)
        made.update((stored + 0 if dtype == "<f4" else stored).ravel(order="F").data)  # + 0: no negative zeros
    return made.hexdigest()


# --------------------------------------------------------------------------------------------------------- the whole set


def leaks(cases: Sequence[Case]) -> list[Finding]:
    """Patients whom the published split cuts in two: both sides, or two time points."""
    found, parts = [], dict[str, Case]()
    for case in cases:
        if case.part:
            first = parts.setdefault(case.patient, case)
            if first.part != case.part:
                what = f'patient "{case.patient}" is in {case.part} here and in {first.part} with {first.volume}'
                what += "; give all volumes of a patient one part"
                found.append(Finding("error", "leak", case.images[0], what, case.volume, case.patient))
    return found


def twins(measured: Sequence[Measured], parts: dict[str, Any]) -> list[Finding]:
    """Scans that are there more than once, by their voxels."""
    found, first = [], dict[str, Measured]()
    for each in sorted(measured, key=lambda each: each.volume):
        if each.content is None or (twin := first.setdefault(each.content, each)) is each:
            continue
        about: tuple[Any, ...] = (each.volume, each.patient)
        same = f"holds the same voxels as {twin.volume}"
        if twin.patient == each.patient:
            found.append(Finding("warning", "duplicate", each.file, f"{same}; leave one out, or it counts twice", *about))
        else:
            what = f'{same} of patient "{twin.patient}", and is said to be of "{each.patient}"; leave one out, or give both one'
            found.append(Finding("error", "twin", each.file, f"{what} patient", *about))
        one, other = parts.get(twin.volume), parts.get(each.volume)
        if one and other and one != other:
            what = f"{same}, and the published split has one in {one} and one in {other}; leave one out"
            found.append(Finding("error", "leak", each.file, what, *about))
    return found


def labelling(measured: Sequence[Measured], classes: Sequence[str], root: Path) -> list[Finding]:
    """What is not annotated: volumes, slices, classes."""
    found = []
    labelled = [each for each in measured if each.counts is not None]
    if bare := sum(not each.labelled for each in measured):
        what = (
            f"{bare} of {words.count(len(measured), 'volume')} have no label; they serve pretraining and semi-supervised terms"
        )
        found.append(Finding("warning", "unlabelled", root, what))
    for each in labelled:
        about: tuple[Any, ...] = (each.volume, each.patient)
        none, slices = each.unannotated
        if none:
            what = f"{none} of its {slices} slices are not annotated (255 throughout); they count as unlabelled"
            found.append(Finding("warning", "unlabelled", each.file, what, *about))
        if not sum(each.counts[1:]):  # type: ignore[index]
            what = "its label marks no class; is it the right file?"
            found.append(Finding("warning", "empty label", each.file, what, *about))
    for number, name in enumerate(classes):
        if number and labelled and not any(each.counts[number] for each in labelled):  # type: ignore[index]
            what = f'no label marks class {number} "{name}"; its scores will be undefined; mend the labels or the class list'
            found.append(Finding("warning", "absent class", root, what))
    return found


def robust_z(values: NDArray[np.float64], floor: float) -> NDArray[np.float64]:
    """0.6745 (x - median) / MAD, the MAD at least `floor`; 0 where there is nothing to compare."""
    apart = values - np.median(values)
    spread = max(float(np.median(np.abs(apart))), floor)
    return 0.6745 * apart / spread if spread else np.zeros_like(values)


def outliers(measured: Sequence[Measured], channels: Sequence[str]) -> list[Finding]:
    """Volumes whose intensities or spacings are far from the others'."""
    found = []

    def compare(kind: str, those: Sequence[Measured], values: NDArray[np.float64], floor: float, said: str) -> None:
        middle = float(np.median(values))
        for each, value, z in zip(those, values, robust_z(values, floor), strict=True):
            if abs(z) > FAR:
                what = f"{said} is {value:.4g}, where the volumes' median is {middle:.4g} (robust z {z:+.0f}); look at it"
                found.append(Finding("warning", kind, each.file, what, each.volume, each.patient))

    spaced = [each for each in measured if each.spacing_mm]
    if len(spaced) >= FEWEST:
        for axis, name in enumerate(("left-right", "back-front", "feet-head")):
            sides = np.array([each.spacing_mm[axis] for each in spaced])  # type: ignore[index]
            compare("spacing", spaced, sides, FLOOR * float(np.median(sides)), f"its {name} voxel side in mm")
    read = [each for each in measured if len(each.percentiles) == len(channels)]
    if len(read) >= FEWEST:
        for number, channel in enumerate(channels):
            levels = np.array([each.percentiles[number] for each in read])
            floor = FLOOR * float(np.median(levels[:, -1] - levels[:, 0]))
            for column, percent in enumerate(PERCENTILES):
                said = f"percentile {percent} of its {channel} intensities"
                compare("intensity", read, levels[:, column], floor, said)
    return found


# ------------------------------------------------------------------------------------------------------- a prepared store


@dataclass(frozen=True)
class Slice:
    """What is kept of a stored slice."""

    volume: str
    number: int
    digest: str
    counts: tuple[int, ...] | None  # pixels of each class id up to the highest in the slice, and …
    unannotated: bool  # … whether it has a label, of 255 throughout


def slices(file: Path) -> list[Slice] | Problem:
    """Every slice of a file of a store."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file, columns=["volume", "slice_index", "image", "label"])
    except (OSError, pa.ArrowException) as error:
        return Problem(file, f"cannot be read ({str(error).splitlines()[0]}); prepare the data set anew with --overwrite")
    found = []
    for volume, number, image, label in zip(*(column.to_pylist() for column in table.columns), strict=True):
        made = ingest.slice_digest(hashlib.sha256(image).digest(), label)
        counts = None if label is None else np.bincount(np.frombuffer(label, np.uint8), minlength=256)
        whole = counts is not None and int(counts[UNLABELLED]) == len(label)
        found.append(Slice(volume, number, made, None if counts is None else tuple(counts[:UNLABELLED].tolist()), whole))
    return found


def _check_store(store: Store, workers: int, work: MapUnordered, progress: Progress) -> Report:
    """Whether every volume of the manifest is in the slice files once, with the content it was written with; and the rest."""
    findings, there, total = list[Finding](), dict[str, dict[int, Slice]](), 0
    for done, found in enumerate(work(slices, store.files, workers), 1):
        progress(done, len(store.files), "slice files")
        if isinstance(found, Problem):
            findings.append(Finding("error", "store", found.file, found.what))
            continue
        total += len(found)
        for each in found:
            there.setdefault(each.volume, {})[each.number] = each
    measured = []
    for record in store.volumes:
        mine = there.get(record.volume, {})
        what = None
        if sorted(mine) != list(range(record.slices)):
            what = f"volume {record.volume} has {len(mine)} of its {record.slices} slices"
        elif ingest.volume_digest(record, [mine[k].digest for k in range(record.slices)]) != record.digest:
            what = f"volume {record.volume} is not what was written"
        if what:
            what += "; prepare the data set anew with --overwrite"
            findings.append(Finding("error", "store", store.root, what, record.volume, record.patient))
        counts = np.zeros(UNLABELLED, np.int64)
        for each in mine.values():
            counts += 0 if each.counts is None else np.asarray(each.counts)
        measured.append(
            Measured(
                volume=record.volume,
                patient=record.patient,
                file=store.root,
                labelled=record.labelled,
                content=record.content or None,
                percentiles=(),
                spacing_mm=record.spacing_mm,
                counts=tuple(int(n) for n in counts[: len(store.classes)]) if record.labelled else None,
                unannotated=(sum(each.unannotated for each in mine.values()), record.slices),
                problems=(),
            )
        )
    if total > sum(len(mine) for mine in there.values()):
        what = "holds a slice twice; prepare the data set anew with --overwrite"
        findings.append(Finding("error", "store", store.root, what))
    parts = {record.volume: record.part for record in store.volumes}
    findings += twins(measured, parts) + labelling(measured, store.classes, store.root) + _split_leaks(store)
    return _report(store.root, "store", len(store.volumes), len(store.patients), findings)


def _split_leaks(store: Store) -> list[Finding]:
    """Splits of the store's folder that cannot be used."""
    found = []
    for file in sorted((store.root / "splits").glob("*.json")):
        try:
            splits.load(store, file.stem)
        except (UsageError, RunError) as error:
            found.append(Finding("error", "leak", file, f"{error}; mend the file, or delete it to draw it anew"))
    return found
