"""Any folder in the form of the Medical Segmentation Decathlon or of nnU-Net's raw data.

    dataset.json      labels {"0": "background", …} (Decathlon) or {"background": 0, …} (nnU-Net);
                      modality or channel_names {"0": "CT"}
    imagesTr/         one file per volume: 3D, or 4D with the channels last where dataset.json names several;
                      or one file per channel: <volume>_0000.nii.gz, <volume>_0001.nii.gz, …
    labelsTr/         <volume>.nii.gz, one for each volume of imagesTr; no such folder: nothing is labelled
    imagesTs/         with labelsTs: the official test part; without: unlabelled volumes for pretraining
    cases.json        optional: [{"name": volume, "patient" or "subject": whose, "phase": …, "site": …, "group": …,
                      "split": train|val|test}]

Formats: Antonelli et al., Nature Communications 2022, https://doi.org/10.1038/s41467-022-30695-9 (http://medicaldecathlon.com);
nnU-Net, documentation/dataset_format.md of https://github.com/MIC-DKFZ/nnUNet.

The ten tasks of the Decathlon are known by their folders' names (TASKS): what their dataset.json does not say is taken from
there; CC BY-SA 4.0, from http://medicaldecathlon.com/dataaws. Of several channels `-o channels=[0]` takes the first.
Task05_Prostate has the preset and splits of global and local contrast (Chaitanya 2020,
https://doi.org/10.48550/arXiv.2006.10511): T2 alone, 0.625 mm in the plane, cut or padded to 192 x 192. Deviations: N4 is off
(-o n4=1, extra [n4]); the paper's validation patients are taken out of the pretraining pool.

The folders say which volumes there are; what dataset.json lists must be among them. Without cases.json each volume is its
own patient. Whether the files can be read is for `ingest` to find out.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medssl.platform.errors import RunError
from medssl.platform.records import Case, DataInfo, Part
from medssl.platform.splits import Split, published

OBTAIN = "http://medicaldecathlon.com/dataaws"
LICENCE = "CC BY-SA 4.0"
CITATION = "Antonelli et al. 2022, https://doi.org/10.1038/s41467-022-30695-9"
# What the published dataset.json of each task calls its channels and its classes from 1 on
TASKS = {
    "Task01_BrainTumour": (("FLAIR", "T1w", "t1gd", "T2w"), ("edema", "non-enhancing tumor", "enhancing tumour")),
    "Task02_Heart": (("MRI",), ("left atrium",)),
    "Task03_Liver": (("CT",), ("liver", "cancer")),
    "Task04_Hippocampus": (("MRI",), ("Anterior", "Posterior")),
    "Task05_Prostate": (("T2", "ADC"), ("PZ", "TZ")),
    "Task06_Lung": (("CT",), ("cancer",)),
    "Task07_Pancreas": (("CT",), ("pancreas", "cancer")),
    "Task08_HepaticVessel": (("CT",), ("Vessel", "Tumour")),
    "Task09_Spleen": (("CT",), ("spleen",)),
    "Task10_Colon": (("CT",), ("colon cancer primaries",)),
}
PAPER_PRESETS: dict[str, tuple[str, dict[str, Any]]] = {"Task05_Prostate": ("prostate", {"channels": (0,), "n4": 0})}
POOL, TEST = "0-2,4,6,7,10,13,14,16-18,20,21,24,25,28", "29,31,32,34,35,37-44,46,47"  # prostate_00 …
COMBINATIONS = {  # labelled patients, and the two that select
    "tr1-c1": ("1", "13,14"),
    "tr1-c2": ("2", "17,20"),
    "tr1-c3": ("6", "25,28"),
    "tr1-c4": ("0", "13,14"),
    "tr1-c5": ("4", "25,28"),
    "tr2-c1": ("0,1", "13,14"),
    "tr2-c2": ("21,24", "17,20"),
    "tr2-c3": ("1,2", "25,28"),
    "tr2-c4": ("4,10", "13,14"),
    "tr2-c5": ("0,7", "25,28"),
    "tr8-c1": ("0,1,2,4,6,7,10,16", "13,14"),
    "tr8-c2": ("2,4,6,7,10,16,21,18", "17,20"),
    "tr8-c3": ("0,1,6,7,10,17,18,24", "25,28"),
    "trall": (POOL, "13,14"),
}
ENDINGS = (".nii.gz", ".nii")
CHANNEL = re.compile(r"(.+)_(\d{4})")


def matches(root: Path) -> bool:
    """Whether `root` looks like such a folder, and not like AMOS's, which has scans of two modalities."""
    amos = any(root.glob("imagesTr/amos_????.nii.gz"))
    return (root / "dataset.json").is_file() and (root / "imagesTr").is_dir() and not amos


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"{path}: not there; the Decathlon and nnU-Net forms need it to name labels and channels") from None
    except ValueError as error:
        raise RunError(f"{path}: not JSON ({error}); mend or download it again") from error


def channel_names(root: Path) -> list[str]:
    """What dataset.json calls the channels, in order."""
    said = read_json(root / "dataset.json")
    channels = said.get("channel_names") or said.get("modality")
    if not isinstance(channels, dict) or not channels:
        raise RunError(
            f'{root / "dataset.json"}: names no channels; expected "modality" or "channel_names" such as {{"0": "CT"}}'
        )
    return [str(channels[key]) for key in sorted(channels, key=int)]


def class_names(root: Path) -> tuple[str, ...]:
    """What dataset.json calls the class ids 0, 1, 2 …"""
    path = root / "dataset.json"
    labels = read_json(path).get("labels")
    if not isinstance(labels, dict) or not labels:
        raise RunError(f'{path}: names no labels; expected {{"0": "background", "1": …}} or {{"background": 0, …}}')
    by_id = (
        labels
        if all(key.isdigit() for key in labels)
        else {value: key for key, value in labels.items() if not isinstance(value, list)}
    )
    if len(by_id) != len(labels) or "ignore" in by_id.values():
        raise RunError(
            f"{path}: labels hold regions or an ignore label; expected one id per class, and ignored voxels stored as 255"
        )
    ids = {int(key): str(name) for key, name in by_id.items()}
    if sorted(ids) != list(range(len(ids))) or not 2 <= len(ids) <= 255:
        raise RunError(f"{path}: label ids {sorted(ids)} should be 0, 1, 2 … without gaps, 2 to 255 of them")
    return tuple(ids[key] for key in range(len(ids)))


def info(root: Path) -> DataInfo:
    """What dataset.json says: CT is windowed, any other modality is normalised per volume. Raises RunError on nonsense."""
    task = root.resolve().name if root.resolve().name in TASKS else None
    said, channels = read_json(root / "dataset.json"), channel_names(root)
    computed = [name.upper() == "CT" for name in channels]
    if any(computed) and not all(computed):
        raise RunError(
            f"{root / 'dataset.json'}: channels {channels} mix CT with others, which no one preset suits; split the data set"
        )
    preset, changes = PAPER_PRESETS.get(task or "", ("ct" if all(computed) else "mr", {}))
    return DataInfo(
        name=str(said.get("name") or root.resolve().name),
        classes=class_names(root),
        channels=tuple(channels),
        licence=str(said.get("licence") or said.get("license") or (LICENCE if task else "unknown")),
        citation=CITATION if task else str(said.get("reference") or ""),
        preset=preset,
        preset_changes=changes,
        obtain=OBTAIN if task else "",
    )


def stem(name: str) -> str:
    """`./imagesTr/case_1.nii.gz` -> `case_1`."""
    name = Path(name).name
    return next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)


def files(folder: Path) -> list[Path]:
    """NIfTI files of a folder, sorted; hidden ones (macOS leaves `._` files) left out. Raises RunError on other images."""
    found = sorted(file for file in folder.glob("*") if not file.name.startswith("."))
    for file in found:
        if not file.name.endswith(ENDINGS):
            raise RunError(f"{file}: medssl reads NIfTI; expected .nii.gz or .nii here; convert it, or move it elsewhere")
    return found


def volumes(folder: Path, channels: int) -> list[tuple[str, tuple[Path, ...]]]:
    """Each volume of an image folder with its file, or with one file per channel in order."""
    found = files(folder)
    suffixed = [CHANNEL.fullmatch(stem(file.name)) for file in found]
    # `case_2023` of a one-channel set is a volume's name: a suffix counts only where every file has one that is a channel
    if not all(match and int(match[2]) < channels for match in suffixed):
        return [(stem(file.name), (file,)) for file in found]
    by_volume: dict[str, list[Path]] = {}
    for match, file in zip(suffixed, found, strict=True):
        by_volume.setdefault(match[1], []).append(file)  # type: ignore[index]
    for volume, parts in by_volume.items():
        if len(parts) != channels:
            have = ", ".join(file.name for file in parts)
            raise RunError(
                f"{folder / volume}: {channels} channels in dataset.json, found {have}; add the missing ones, one file each"
            )
    return [(volume, tuple(parts)) for volume, parts in by_volume.items()]


def subjects(root: Path) -> dict[str, dict[str, Any]] | None:
    """cases.json by volume; None where there is none."""
    path = root / "cases.json"
    if not path.is_file():
        return None
    entries = read_json(path)
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and "name" in e and ("patient" in e or "subject" in e) for e in entries
    ):
        raise RunError(f'{path}: expected a list of {{"name": volume, "patient": whose, …}}; mend it or take it away')
    for entry in entries:
        if entry.get("split") not in (None, "train", "val", "test"):
            raise RunError(f'{path}: split "{entry["split"]}" of {entry["name"]} should be train, val or test')
    return {stem(str(entry["name"])): entry for entry in entries}


def cases(root: Path) -> Iterator[Case]:
    """Every volume, labelled or not. Raises RunError when the folders, dataset.json and cases.json disagree."""
    said, channels, known = read_json(root / "dataset.json"), len(channel_names(root)), subjects(root)
    official = (root / "labelsTs").is_dir()
    for images, labels, listing, part in (
        ("imagesTr", "labelsTr", "training", "train" if official else None),
        ("imagesTs", "labelsTs", "test", "test" if official else None),
    ):
        found = volumes(root / images, channels)
        annotated = {stem(file.name): file for file in files(root / labels)}
        check_listing(root / images, said.get(listing) or [], found)
        for volume in sorted(annotated.keys() - {name for name, _ in found}):
            raise RunError(f"{annotated[volume]}: a label without an image in {images}; add the image or take the label away")
        for volume, paths in found:
            label = None
            if (root / labels).is_dir():
                label = annotated.get(volume, root / labels / (volume + paths[0].name[len(stem(paths[0].name)) :]))
            yield case(root, volume, paths, label, part, known)  # type: ignore[arg-type]


def check_listing(folder: Path, listing: list[Any], found: list[tuple[str, tuple[Path, ...]]]) -> None:
    """What dataset.json lists is there. nnU-Net's first form lists volumes without their channel suffix."""
    there = {name for name, _ in found} | {stem(path.name) for _, paths in found for path in paths}
    listed = [stem(str(entry["image"] if isinstance(entry, dict) else entry)) for entry in listing]
    missing = [name for name in listed if name not in there]
    if missing:
        some = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise RunError(
            f"{folder}: dataset.json lists {len(missing)} volumes that are not there ({some}); download them, or unlist them"
        )


def case(
    root: Path,
    volume: str,
    paths: tuple[Path, ...],
    label: Path | None,
    part: Part | None,
    known: dict[str, dict[str, Any]] | None,
) -> Case:
    """The volume with what cases.json adds. It must name every labelled volume, or a subject could be split in two."""
    entry = (known or {}).get(volume)
    if entry is None:
        if known is not None and label is not None:
            raise RunError(f"{root / 'cases.json'}: does not say whose volume {volume} is; add it, with its patient")
        return Case(volume, volume, paths, label, part)
    patient = entry.get("patient", entry.get("subject"))
    phase, site, group = (None if entry.get(key) is None else str(entry[key]) for key in ("phase", "site", "group"))
    return Case(str(patient), volume, paths, label, entry.get("split") or part, phase, site, group)


def splits(root: Path) -> Iterator[Split]:
    """Global and local contrast's combinations of the prostate task."""
    for name, (labelled, val) in COMBINATIONS.items() if root.resolve().name == "Task05_Prostate" else ():
        yield published(f"global-local-{name}", "prostate_{:02d}", POOL, val, TEST, labelled)
