"""Your own scans: a folder of images and one of labels, or a MONAI datalist; NIfTI, DICOM, MetaImage, NRRD or pictures.

    medssl data prepare NAME --images DIR [--labels DIR] [--subject-regex '(p[0-9]+)'] [--classes liver,spleen]
    medssl data prepare NAME --datalist list.json [--images DIR]

    DIR/p1_a.nii.gz           a label has its image's path in the other folder, whatever the ending; an image without one
    DIR/sub/p2_a.png          only trains without labels
    DIR/p3/scan/*.dcm         a folder of DICOM: its label is named after it, p3/scan.nii.gz; each series is a volume
    list.json                 {"training": [{"image": "a.nii.gz", "label": "b.nii.gz"}], "validation": [...], "test": [...]}

The command leaves a `folders.json` in the prepared set's folder, by which later commands find the scans again.

Whose a scan is: the first group of --subject-regex, searched in its path; without one each volume is a patient of its own, and
a DICOM series is its PatientID's, whose hash stands for it: neither id nor name is stored, nor the path. Label files hold
class ids in the order of --classes (default: one class, "foreground"); of one class, pictures may hold 0 and 255. The form of
datalists is that of MONAI, `monai.data.load_decathlon_datalist`, https://doi.org/10.48550/arXiv.2211.02701; its folds are not
read: `data split` draws ours. `test` images without a label train without one.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medssl.platform import atomic, dicom, formats
from medssl.platform.errors import RunError, UsageError
from medssl.platform.records import Case, DataInfo, Part

OBTAIN = "https://docs.monai.io describes datalists; the scans are your own"
LICENCE = "your own"
FILE = "folders.json"
PARTS: dict[str, Part] = {"training": "train", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Where:
    """What the user said; paths are absolute."""

    name: str
    images: str | None = None
    labels: str | None = None
    datalist: str | None = None
    subject_regex: str | None = None
    classes: tuple[str, ...] = ("foreground",)
    stacks: bool = False  # folders of pictures are volumes, one picture a slice

    def __post_init__(self) -> None:
        if not self.images and not self.datalist:
            raise UsageError("say where the scans are: --images DIR, or --datalist FILE")
        if self.labels and self.datalist:
            raise UsageError("a datalist names its own labels; leave --labels out")
        for folder in (self.images, self.labels):
            if folder and not Path(folder).is_dir():
                raise UsageError(f"{folder}: no such folder")
        if self.datalist and not Path(self.datalist).is_file():
            raise UsageError(f"{self.datalist}: no such file")
        if not self.classes or "" in self.classes or len({*self.classes, "background"}) <= len(self.classes):
            raise UsageError(f'--classes {",".join(self.classes)}: expected different names, without "background", which is 0')
        try:
            re.compile(self.subject_regex or "")
        except re.error as error:
            raise UsageError(f"--subject-regex {self.subject_regex}: {error}") from error


def remember(root: Path, where: Where) -> None:
    """Write down where the scans of a set are."""
    atomic.write_json(root / FILE, dataclasses.asdict(where))


def matches(root: Path) -> bool:
    """Whether it was written down there."""
    return (root / FILE).is_file()


def where(root: Path) -> Where:
    """What was written down. Raises RunError where it cannot be read, UsageError where it is no longer so."""
    try:
        said = json.loads((root / FILE).read_text())
        return Where(**{**said, "classes": tuple(said["classes"])})
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{root / FILE}: not what data prepare writes ({error}); prepare the set again with --images") from error


@dataclass(frozen=True)
class Found:
    """A volume of the image folder."""

    key: str  # its path in the folder, without ending: what a label must be called
    path: Path
    patient: str | None = None  # where the file says whose it is
    modality: str = ""


def found_in(folder: Path, stacks: bool) -> list[Found]:
    """Every volume below a folder, sorted by key. DICOM files are read up to their pixels."""
    volumes = []
    for place in sorted([folder, *(path for path in folder.rglob("*") if path.is_dir() and not path.name.startswith("."))]):
        key = place.relative_to(folder).as_posix() if place != folder else place.name
        if stacks and formats.is_stack(place):
            volumes.append(Found(key, place))
            continue
        files = sorted(file for file in place.iterdir() if formats.is_scan(file))
        single = [file for file in files if formats.ending(file) not in ("", *formats.DICOM)]
        volumes += [
            Found((file.parent.relative_to(folder) / formats.stem(file)).as_posix(), file)
            for file in single
            if file.suffix != ".raw"
        ]
        if len(single) < len(files):
            series = dicom.series_in(place)
            for number, headers in enumerate(series.values(), 1):
                said = next(iter(headers.values()))
                path = place if len(series) == 1 and not single else next(iter(headers))
                name = key if len(series) == 1 else f"{key}-{number}"
                volumes.append(Found(name, path, dicom.patient(said), str(said.get("Modality", ""))))
    return volumes


def volume_name(found: Found, patient: str, seen: "Counter[str]") -> str:
    """Unique in the set: the path, with `-` between its parts; of DICOM a number behind the patient, as paths hold names."""
    if found.patient is None:
        return found.key.replace("/", "-")
    seen[patient] += 1
    return f"{patient}-{seen[patient]}"


def subject(regex: str | None, path: str) -> str | None:
    """Whose scan it is by its path. Raises RunError where the expression does not find it."""
    if regex is None:
        return None
    match = re.search(regex, path)
    if not match or not match[match.re.groups and 1]:
        raise RunError(
            f"{path}: --subject-regex {regex} finds no subject in it; widen the expression, or move the file elsewhere"
        )
    return match[match.re.groups and 1]


def some(names: list[str]) -> str:
    """The first of them, for a sentence."""
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def of_folders(said: Where) -> Iterator[Case]:
    """Images with the labels of the same path. Raises RunError on labels without an image, or two for one."""
    images = found_in(Path(said.images or ""), said.stacks)
    labels: dict[str, Path] = {}
    for label in found_in(Path(said.labels), said.stacks) if said.labels else []:
        if labels.setdefault(label.key, label.path) != label.path:
            raise RunError(f"{label.path}: a second label for {label.key}, beside {labels[label.key].name}; remove one")
    strangers = sorted(labels.keys() - {image.key for image in images})
    if strangers:
        raise RunError(
            f"{said.labels}: {len(strangers)} labels without an image of that name ({some(strangers)}); mend the names"
        )
    seen: Counter[str] = Counter()
    for image in images:
        named = subject(said.subject_regex, image.path.relative_to(Path(said.images or "")).as_posix())
        patient = named or image.patient or image.key.replace("/", "-")
        yield Case(patient, volume_name(image, patient, seen), (image.path,), labels.get(image.key))


def entries(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Part and entry of every item of a datalist. Raises RunError where it is none."""
    try:
        said = json.loads(path.read_text())
        items = [(part, item) for part in PARTS for item in said.get(part, [])]
    except (ValueError, AttributeError) as error:
        raise RunError(f"{path}: not a datalist ({error}); expected JSON with training, validation and test") from error
    items = [(part, {"image": item} if isinstance(item, str) else item) for part, item in items]
    wrong = [item for _, item in items if not isinstance(item, dict) or not item.get("image")]
    if wrong or not items:
        raise RunError(
            f'{path}: expected a list of {{"image": file, "label": file}} under "training", found {wrong[:1] or "none"}'
        )
    return items


def of_datalist(said: Where) -> Iterator[Case]:
    """The items of a datalist; where test or validation images are labelled, the parts are the published split."""
    path = Path(said.datalist or "")
    base, items = Path(said.images) if said.images else path.parent, entries(path)
    published = any(item.get("label") for part, item in items if part != "training")
    for part, item in items:
        images = [item["image"]] if isinstance(item["image"], str) else list(item["image"])
        label = base / item["label"] if item.get("label") else None
        key = (Path(images[0]).parent / formats.stem(Path(images[0]))).as_posix().removeprefix("./").strip("/")
        name = key.replace("/", "-")
        patient = subject(said.subject_regex, str(images[0])) or name
        yield Case(patient, name, tuple(base / image for image in images), label, PARTS[part] if published and label else None)


def cases(root: Path) -> Iterator[Case]:
    """Every volume. Raises RunError where names do not fit together."""
    said = where(root)
    yield from of_datalist(said) if said.datalist else of_folders(said)


def info(root: Path | None) -> DataInfo:
    """One channel, three of a colour picture; the preset of pictures, of CT (where DICOM says so), or by percentiles."""
    if root is None:
        return DataInfo("folders", ("background", "foreground"), licence=LICENCE, preset="mr")
    said = where(root)
    found = [] if said.datalist else found_in(Path(said.images or ""), said.stacks)
    images = next(of_datalist(said)).images if said.datalist else tuple(each.path for each in found[:1])
    if not images:
        raise RunError(f"{said.images}: holds no scan; expected {', '.join(formats.ENDINGS)} or DICOM")
    changes: dict[str, Any] = {}
    preset, channels = "mr", ("image",) if len(images) == 1 else tuple(f"channel {n}" for n in range(len(images)))
    if formats.ending(images[0]) in formats.PICTURES or formats.is_stack(images[0]):
        preset = "picture"
        array, _ = formats.read(images[0])
        channels = ("red", "green", "blue") if array.ndim == 4 else ("grey",)
        if array.dtype != np.uint8:  # 12 or 16 bits: from each picture's own lowest grey to its highest
            changes = {"window": None, "percentiles": (0.0, 100.0)}
    elif found and all(each.modality == "CT" for each in found):
        preset, channels = "ct", ("CT",)
    pictures = preset == "picture" and len(said.classes) == 1
    return DataInfo(
        name=said.name,
        classes=("background", *said.classes),
        channels=channels,
        licence=LICENCE,
        preset=preset,
        preset_changes=changes,
        label_values={0: 0, 1: 1, 255: 1} if pictures else {},
    )
