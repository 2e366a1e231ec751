"""Collections for pretraining in the form of nnssl: pretrain_data.json lists every scan, wherever it lies.

    pretrain_data.json    {"collection_name": …, "datasets": {"ds000001": {"name": …, "subjects": {"sub-01": {"sessions":
                          {"ses-1": {"images": [{"name": …, "image_path": …, "modality": "T1w", "associated_masks": …}]}}}}}}}
    …                     the scans: an absolute path, one relative to the JSON, or $NAME/… with NAME in the environment

Wald et al., "An OpenMind for 3D medical vision self-supervised learning", ICCV 2025, https://doi.org/10.48550/arXiv.2412.17041;
form: documentation/dataset_format.md of https://github.com/MIC-DKFZ/nnssl. The largest such collection is OpenMind,
https://huggingface.co/datasets/AnonRes/OpenMind. Licences are those of the data sets that were collected.

Nothing is labelled: the associated masks say what was defaced and where the body is. A patient is a subject of one data set.
CT scans are prepared by `--preset ct`, all others by `mr`.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medssl.platform.errors import RunError
from medssl.platform.records import Case, DataInfo

OBTAIN = "https://huggingface.co/datasets/AnonRes/OpenMind"
LICENCE = "that of each data set in the collection"
FILE = "pretrain_data.json"


def matches(root: Path) -> bool:
    """Whether `root` holds the list."""
    return (root / FILE).is_file()


def collection(root: Path) -> dict[str, Any]:
    """The list. Raises RunError on nonsense."""
    path = root / FILE
    try:
        said = json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path}: not JSON ({error}); mend it or write it again") from error
    if not isinstance(said, dict) or not isinstance(said.get("datasets"), dict):
        raise RunError(
            f'{path}: expected {{"datasets": {{name: {{"subjects": …}}}}}}; write it with nnssl\'s Collection.to_dict'
        )
    return said


def entries(root: Path) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Data set, subject, session and entry of every image."""
    try:
        for name, dataset in collection(root)["datasets"].items():
            for subject, about in dataset["subjects"].items():
                for session, images in about["sessions"].items():
                    for image in images["images"]:
                        yield name, subject, session, image
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{root / FILE}: subjects, sessions and images are not nested as expected ({error!r}); mend it"
        ) from error


def located(root: Path, said: str) -> Path:
    """Where an image lies: `$NAME` stands for an environment variable."""
    match = re.match(r"\$(\w+)", said)
    if match and match[1] not in os.environ:
        raise RunError(f"{root / FILE}: {said} lies under ${match[1]}, which is not set; export {match[1]}=FOLDER")
    return root / os.path.expandvars(said)


def is_ct(image: dict[str, Any]) -> bool:
    return str(image.get("modality", "")).upper().startswith("CT")


def info(root: Path) -> DataInfo:
    """The collection's name; CT is windowed where all of it is CT."""
    kinds = {is_ct(image) for *_, image in entries(root)}
    return DataInfo(
        name=str(collection(root).get("collection_name", "nnssl")),
        classes=("background",),
        licence=LICENCE,
        citation="Wald et al. 2025, https://doi.org/10.48550/arXiv.2412.17041",
        obtain=OBTAIN,
        preset="ct" if kinds == {True} else "mr",
    )


def cases(root: Path) -> Iterator[Case]:
    """Every scan, without label; the phase is its modality."""
    for dataset, subject, session, image in entries(root):
        patient, file = f"{dataset}_{subject}", str(image["image_path"])
        name = str(image.get("name") or Path(file).name).removesuffix(".gz").removesuffix(".nii")
        volume, path, phase = f"{patient}_{session}_{name}", located(root, file), image.get("modality")
        yield Case(patient, volume, (path,), phase=phase, modality="ct" if is_ct(image) else "mr")
