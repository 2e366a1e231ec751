"""Folders in the form of BIDS, the Brain Imaging Data Structure, with labels under derivatives/.

    dataset_description.json                    {"Name": …, "License": …, "ReferencesAndLinks": […]}
    participants.tsv                            optional; its column group or diagnosis stratifies
    sub-01/anat/sub-01_T1w.nii.gz               any folder but derivatives/, with or without ses-…/; one volume per file
    derivatives/…/sub-01/anat/sub-01_T1w_dseg.nii.gz     class ids; also sub-01_dseg.nii.gz, sub-01_…_mask.nii.gz
    derivatives/…/dseg.tsv                      index, name: the classes; without it _dseg is refused and _mask is "foreground"

Gorgolewski et al., Scientific Data 2016, https://doi.org/10.1038/sdata.2016.44; https://bids-specification.readthedocs.io
(Imaging data, Derivatives). Licence, name and citation are those that dataset_description.json gives.

A label belongs to the image whose name it begins with, or to every image of the same subject and session where it names none:
such images must then share its grid. Images that end in _ct are CT; one preset takes either CT or the others.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

from medssl.platform.errors import RunError
from medssl.platform.records import Case, DataInfo

OBTAIN = "https://openneuro.org, or your own scans"
LICENCE = "as dataset_description.json says"
ENDING = re.compile(r"\.nii(\.gz)?$")
LABEL = re.compile(r"_(dseg|mask)\.nii(\.gz)?$")


def matches(root: Path) -> bool:
    """Whether `root` holds BIDS's description and subjects."""
    return (root / "dataset_description.json").is_file() and any(root.glob("sub-*/"))


def table(path: Path) -> list[dict[str, str]]:
    """Rows of a tab-separated file, by column."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        return [{str(key).lower(): str(value) for key, value in row.items()} for row in csv.DictReader(file, delimiter="\t")]


def images(root: Path) -> list[Path]:
    """Scans of all subjects, labels left out."""
    return [file for file in sorted(root.glob("sub-*/**/*.nii*")) if ENDING.search(file.name) and not LABEL.search(file.name)]


def labels(root: Path) -> list[Path]:
    """Class ids and masks under derivatives/."""
    return [file for file in sorted((root / "derivatives").rglob("sub-*.nii*")) if LABEL.search(file.name)]


def label_of(image: Path, candidates: list[Path]) -> Path | None:
    """The label whose name, less _dseg or _mask, is the image's, or its entities without the modality. RunError on two."""
    stem = ENDING.sub("", image.name)
    entities = stem.rpartition("_")[0]
    for wanted in (stem, entities):
        found = [file for file in candidates if LABEL.sub("", file.name) == wanted]
        if len(found) > 1:
            raise RunError(f"{image}: has two labels, {found[0]} and {found[1]}; leave one in derivatives/")
        if found:
            return found[0]
    return None


def classes(root: Path) -> tuple[str, ...]:
    """From dseg.tsv; "foreground" where every label is a mask."""
    tables = sorted((root / "derivatives").rglob("*dseg.tsv"))
    if not tables:
        if stray := [file for file in labels(root) if "_dseg." in file.name]:
            raise RunError(f"{stray[0]}: no dseg.tsv under derivatives/ says what its ids mean; add one with index and name")
        return ("background", "foreground") if labels(root) else ("background",)
    try:
        names = {int(row["index"]): row["name"] for row in table(tables[0])}
    except (KeyError, ValueError) as error:
        raise RunError(
            f"{tables[0]}: expected the columns index and name, index a whole number ({error!r}); mend it"
        ) from error
    names = {0: "background"} | names
    if sorted(names) != list(range(len(names))):
        raise RunError(f"{tables[0]}: ids {sorted(names)} should be 0, 1, 2 … without gaps; renumber the labels")
    return tuple(names[number] for number in range(len(names)))


def info(root: Path) -> DataInfo:
    """What the description and dseg.tsv say."""
    try:
        said = json.loads((root / "dataset_description.json").read_text())
    except ValueError as error:
        raise RunError(f"{root}: dataset_description.json is not JSON ({error}); mend it") from error
    links = said.get("ReferencesAndLinks") or []
    only_ct = all(is_ct(image) for image in images(root))
    return DataInfo(
        name=str(said.get("Name") or "bids"),
        classes=classes(root),
        licence=str(said.get("License") or LICENCE),
        citation=str(said.get("DatasetDOI") or ", ".join(map(str, links)) or "https://doi.org/10.1038/sdata.2016.44"),
        obtain=OBTAIN,
        preset="ct" if only_ct else "mr",
    )


def is_ct(image: Path) -> bool:
    return ENDING.sub("", image.name).endswith("_ct")


def cases(root: Path) -> Iterator[Case]:
    """Every image file; the phase is its suffix, such as T1w."""
    rows = table(root / "participants.tsv") if (root / "participants.tsv").is_file() else []
    groups = {row.get("participant_id"): row.get("group") or row.get("diagnosis") for row in rows}
    candidates = labels(root)
    for image in images(root):
        patient, volume = image.relative_to(root).parts[0], ENDING.sub("", image.name)
        yield Case(
            patient,
            volume,
            (image,),
            label_of(image, candidates),
            phase=volume.rpartition("_")[2],
            group=groups.get(patient),
            modality="ct" if is_ct(image) else "mr",
        )
