"""The card of a prepared data set: what it holds, how it was made, what is strange about it. Equal stores, equal cards.

One page that stands alone (HTML, its pictures inside), or Markdown with its pictures in a folder beside it. Nothing is fetched.
Intensities and classes are counted over all slices, file after file.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.platform import atomic, figures, montage, page, quality, splits, words
from medssl.platform.errors import RunError, UsageError
from medssl.platform.figures import Distribution
from medssl.platform.find import nearest
from medssl.platform.geometry import UNLABELLED
from medssl.platform.store import Store, VolumeRecord

BINS = 32
LISTED = 20  # findings of quality that are written out
STRATA = ("part", "phase", "site", "group")


@dataclass(frozen=True)
class Counted:
    """What all slices hold together."""

    intensities: NDArray[np.int64]  # pixels of all channels in BINS equal bins of the stored range …
    edges: NDArray[np.float64]  # … between these
    pixels: NDArray[np.int64]  # of each class
    slices: NDArray[np.int64]  # that hold each class
    volumes: NDArray[np.int64]
    unannotated: int  # pixels of labelled slices


@dataclass(frozen=True)
class Table:
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | int | float]]


@dataclass(frozen=True)
class Picture:
    name: str  # of its file
    title: str
    caption: str
    content: bytes


def count(store: Store) -> Counted:
    """One pass over the slice files."""
    import pyarrow.parquet

    dtype = np.dtype(store.preset.dtype)
    low, high = (0.0, float(np.iinfo(dtype).max)) if dtype.kind in "iu" else _float_range(store)
    edges = np.linspace(low, high, BINS + 1)
    intensities, pixels, held = np.zeros(BINS, np.int64), np.zeros(256, np.int64), np.zeros(256, np.int64)
    volumes: dict[str, NDArray[np.bool_]] = {}
    for file in store.files:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(64, columns=["volume", "image", "label"]):
            for volume, image, label in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                values = np.frombuffer(image, dtype)
                intensities += np.histogram(np.clip(values.astype(np.float32), low, high), BINS, (low, high))[0]
                if label is not None:
                    counts = np.bincount(np.frombuffer(label, np.uint8), minlength=256)
                    pixels += counts
                    held += counts > 0
                    volumes[volume] = volumes.get(volume, np.zeros(256, bool)) | (counts > 0)
    classes = len(store.classes)
    by_volume = sum((seen.astype(np.int64) for seen in volumes.values()), np.zeros(256, np.int64))
    return Counted(intensities, edges, pixels[:classes], held[:classes], by_volume[:classes], int(pixels[UNLABELLED]))


def _float_range(store: Store) -> tuple[float, float]:
    """What the first volume's window is."""
    image, _ = store.arrays(store.volumes[0].volume)
    return montage.window(image.reshape(len(image), -1))


# ------------------------------------------------------------------------------------------------------------ its content


def tables(store: Store, counted: Counted) -> list[Table]:
    """Counts by part, phase, site and group; classes; splits; quality."""
    there = [name for name in STRATA if any(getattr(volume, name) for volume in store.volumes)]
    keys = sorted({tuple(getattr(volume, name) or "–" for name in there) for volume in store.volumes})
    rows = []
    for key in keys:
        mine = [v for v in store.volumes if tuple(getattr(v, name) or "–" for name in there) == key]
        rows.append([*(key or ("all",)), *_counts(mine)])
    if len(keys) > 1:
        rows.append(["all", *[""] * (len(there) - 1), *_counts(store.volumes)])
    what = ["patients", "volumes", "with a label", "slices"]
    found = [Table("Counts", [*(there or [""]), *what], rows)]

    annotated = max(int(counted.pixels.sum()), 1)
    tolerance = ["–", *(store.tolerance_mm or [2.0] * (len(store.classes) - 1))]
    counts = zip(counted.volumes.tolist(), counted.slices.tolist(), counted.pixels.tolist(), strict=True)
    classes = [
        [number, store.classes[number], volumes, slices, 100 * pixels / annotated, tolerance[number]]
        for number, (volumes, slices, pixels) in enumerate(counts)
    ]
    head = ["id", "class", "volumes with it", "slices with it", "% of the annotated pixels", "NSD tolerance, mm"]
    found.append(Table("Classes", head, classes))

    drawn = [_split_row(store, file.stem) for file in sorted((store.root / "splits").glob("*.json"))]
    if drawn:
        found.append(Table("Splits", ["split", "train", "of these labelled", "val", "test"], drawn))
    return found


def _counts(volumes: Sequence[VolumeRecord]) -> list[int]:
    patients = len({volume.patient for volume in volumes})
    return [patients, len(volumes), sum(volume.labelled for volume in volumes), sum(volume.slices for volume in volumes)]


def _split_row(store: Store, name: str) -> list[str | int | float]:
    try:
        split = splits.load(store, name)
    except (RunError, UsageError):
        return [name, "cannot be used: see quality", "–", "–", "–"]
    return [name, len(split.train), len(split.labelled), len(split.val), len(split.test)]


def facts(store: Store) -> list[tuple[str, str]]:
    """Where it is from and how it was made."""
    preset = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(store.preset).items())
    said = [("name", store.name), ("licence", store.licence), ("citation", store.citation or "none given"), ("preset", preset)]
    if store.quantisation:
        error = ", ".join(f"{name} {value:.2g}" for name, value in store.quantisation.items())
        said.append(("quantisation error, of the stored range", error))
    lost: dict[str, float] = {}
    for volume in store.volumes:
        for name, value in ((n, v) for n, v in volume.lost.items() if not n.startswith("rounding")):
            lost[name] = max(lost.get(name, 0.0), value)
    if lost:
        said.append(
            (
                "lost by cropping at most, of any volume",
                ", ".join(f"{name} {value:.3g}" for name, value in sorted(lost.items())),
            )
        )
    said.append(("settings that suit it", ", ".join(f"{key}={value}" for key, value in store.defaults.items()) or "the usual"))
    return [*said, ("content hash", store.content_hash), ("signature of its source files", store.source)]


def distributions(store: Store, counted: Counted) -> list[Distribution]:
    """Spacings, shapes and intensities."""
    spacing = [
        _distribution(f"spacing between {what}", "mm, volumes", [volume.spacing_mm[axis] for volume in store.volumes])
        for axis, what in enumerate(("rows", "columns", "slices"))
    ]
    shape = [
        _distribution(what, f"{unit}, volumes", [getattr(volume, what) for volume in store.volumes])
        for what, unit in (("height", "pixels"), ("width", "pixels"), ("slices", "slices"))
    ]
    stored = Distribution("stored intensities", "pixels", tuple(counted.edges), tuple(map(int, counted.intensities)))
    return [*spacing, *shape, stored]


def _distribution(title: str, unit: str, values: Iterable[float]) -> Distribution:
    """Of volumes, in at most 20 equal bins."""
    counts, edges = np.histogram(np.asarray(list(values), np.float64), bins=20)
    return Distribution(title, unit, tuple(edges), tuple(map(int, counts)))


def pictures(store: Store, counted: Counted) -> list[Picture]:
    annotated = max(int(counted.pixels.sum()), 1)
    shares = {name: float(counted.pixels[number] / annotated) for number, name in enumerate(store.classes)}
    panels = figures.distributions(distributions(store, counted))
    found = [
        Picture("distributions", "Spacing, shape, intensity", "Volumes, and pixels of all slices.", figures.png(panels, 120))
    ]
    if counted.pixels.any():
        bars = figures.png(figures.frequencies(shares, "fraction of the annotated pixels"), 120)
        found.append(Picture("classes", "How much of each class", "Of all annotated pixels.", bars))
    shown = "As stored, the patient's right on the left; contours are labels, hatched is what nobody annotated."
    return [*found, Picture("slices", "Sample slices", shown, montage.picture(store))]


def _quality(store: Store) -> tuple[str, list[str]]:
    """A sentence and the findings; the store's folder is left out, for the card is not to depend on it."""
    report = quality.check(store.root, workers=1)
    counts = f"{words.count(len(report.errors), 'error')}, {words.count(len(report.warnings), 'warning')}"
    said = [f"{each.severity}, {each.kind}: {each.volume + ': ' if each.volume else ''}{each.what}" for each in report.findings]
    more = [f"… and {len(said) - LISTED} more: medssl data check --json"] if len(said) > LISTED else []
    return f"Every slice was read: {counts}.", [*said[:LISTED], *more]


# --------------------------------------------------------------------------------------------------------------- its form


def write(store: Store, output: str = "html", out: Path | None = None) -> Path:
    """Write the card of a store as "html" or "md" (pictures then lie in a folder of its name). Returns its path."""
    if output not in ("html", "md"):
        raise UsageError(f'no format "{output}" of a card; {nearest(output, ["html", "md"])}')
    path = out or store.root / f"card.{output}"
    counted = count(store)
    shown, checked = pictures(store, counted), _quality(store)
    if output == "html":
        text = html(store, tables(store, counted), shown, checked)
    else:
        text = markdown(store, tables(store, counted), {each: f"{path.stem}/{each.name}.png" for each in shown}, checked)
        for each in shown:
            atomic.write(path.with_suffix("") / f"{each.name}.png", lambda file, each=each: file.write(each.content))  # type: ignore[misc]
    atomic.write_text(path, text)
    return path


def html(store: Store, tables: Sequence[Table], pictures: Sequence[Picture], checked: tuple[str, list[str]]) -> str:
    said = f'<p class="kicker">data card</p><h1>{page.escape(store.name)}</h1>{page.facts(facts(store))}'
    for table in tables:
        lines = [page.Line([page.Cell(*_shown(cell)) for cell in row]) for row in table.rows]
        said += f"<h2>{page.escape(table.title)}</h2>{page.table(table.head, lines)}"
    for each in pictures:
        said += f"<h2>{page.escape(each.title)}</h2>{page.picture(each.content, 'png', each.caption)}"
    sentence, findings = checked
    listed = "".join(f"<li>{page.escape(each)}</li>" for each in findings)
    said += f"<h2>Quality</h2><p>{page.escape(sentence)}</p>" + (f"<ul>{listed}</ul>" if listed else "")
    return page.page(f"{store.name}: data card", said)


def _shown(cell: str | int | float) -> tuple[str, float | None]:
    """A cell's text, and what it is sorted by."""
    if isinstance(cell, str):
        return cell, None
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:g}", float(cell)


def markdown(store: Store, tables: Sequence[Table], pictures: Mapping[Picture, str], checked: tuple[str, list[str]]) -> str:
    def piped(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(_plain(_shown(cell)[0]) for cell in cells) + " |"

    lines = [f"# {_plain(store.name)}", "", *(f"- {name}: {_plain(value)}" for name, value in facts(store))]
    for table in tables:
        lines += ["", f"## {table.title}", "", piped(table.head), "|" + " --- |" * len(table.head), *map(piped, table.rows)]
    for each, file in pictures.items():
        lines += ["", f"## {each.title}", "", f"![{each.caption}]({file})"]
    sentence, findings = checked
    return "\n".join([*lines, "", "## Quality", "", sentence, *(["", *(f"- {_plain(each)}" for each in findings)]), ""])


def _plain(text: str) -> str:
    """On one line, and no markup."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")
