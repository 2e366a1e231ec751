"""MM-WHS: the whole heart in CT and MR, 20 labelled scans of each and 40 test scans of each, seven structures.

    MM-WHS 2017 Dataset/                        or one of its folders
      ct_train/ct_train_1001_image.nii.gz   ct_train_1001_label.nii.gz     … 1020
      mr_train/mr_train_1001_image.nii.gz   mr_train_1001_label.nii.gz     … 1020: other patients
      ct_test/ct_test_2001_image.nii.gz     mr_test/mr_test_2001_image.nii.gz     without labels: for pretraining

    205 myocardium of the left ventricle   420 left atrium    500 left ventricle   550 right atrium
    600 right ventricle   820 ascending aorta   850 pulmonary artery   (421, in one MR label, is 420 misspelt)

Zhuang and Shen, Medical Image Analysis 2016, https://doi.org/10.1016/j.media.2016.02.006. Register at
https://zmiclab.github.io/zxh/0/mmwhs; research use. Test labels are sealed: no official parts.

Class ids ascend with the values, as in both papers that use the set. One preset cannot suit CT and MR: a folder with both gives
its MR scans, with `--preset ct` its CT scans. Preset `mmwhs` for MR: that of global and local contrast (Chaitanya 2020,
https://doi.org/10.48550/arXiv.2006.10511): 1.5 mm in the plane, cut or padded to 160 x 160, percentiles 1 and 99. Deviations:
N4 is off (-o n4=1, extra [n4]); slices are axial as RAS axes run, and nothing is trimmed by hand beforehand. Splits
`global-local-…` are the paper's, of the MR scans, with its validation patients taken out of the pretraining pool.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from medssl.platform.records import Case, DataInfo
from medssl.platform.splits import Split, published

OBTAIN = "https://zmiclab.github.io/zxh/0/mmwhs"
LICENCE = "research use, by registration"
NAME = re.compile(r"((ct|mr)_(train|test)_\d{4})_image\.nii(\.gz)?")
LABEL_VALUES = {0: 0, 205: 1, 420: 2, 421: 2, 500: 3, 550: 4, 600: 5, 820: 6, 850: 7}
POOL, TEST = "1001-1010", "1011-1020"
COMBINATIONS = {  # labelled patients, and the two that select
    "tr1-c1": ("1003", "1002,1005"),
    "tr1-c2": ("1006", "1001,1008"),
    "tr1-c3": ("1008", "1007,1002"),
    "tr1-c4": ("1001", "1002,1005"),
    "tr1-c5": ("1009", "1007,1002"),
    "tr2-c1": ("1001,1003", "1002,1005"),
    "tr2-c2": ("1009,1008", "1007,1002"),
    "tr2-c3": ("1006,1002", "1001,1008"),
    "tr2-c4": ("1010,1007", "1004,1008"),
    "tr8-c1": (POOL, "1002,1005"),
    "tr8-c2": (POOL, "1001,1008"),
    "tr8-c3": (POOL, "1007,1002"),
}


def scans(root: Path) -> list[tuple[Path, re.Match[str]]]:
    """Image files with their names taken apart."""
    found = sorted({*root.glob("*_image.nii*"), *root.glob("*/*_image.nii*")})
    return [(file, match) for file in found if (match := NAME.fullmatch(file.name))]


def matches(root: Path) -> bool:
    """Whether `root` holds scans with the challenge's names."""
    return bool(scans(root))


def info(root: Path) -> DataInfo:
    """The facts of MM-WHS; the preset is `ct` where there is no MR scan."""
    mr = any(match[2] == "mr" for _, match in scans(root))
    return DataInfo(
        name="mmwhs",
        classes=(
            "background",
            "myocardium",
            "left atrium",
            "left ventricle",
            "right atrium",
            "right ventricle",
            "ascending aorta",
            "pulmonary artery",
        ),
        channels=("CT or MR",),
        licence=LICENCE,
        citation="Zhuang and Shen 2016, https://doi.org/10.1016/j.media.2016.02.006",
        obtain=OBTAIN,
        preset="mmwhs" if mr else "ct",
        preset_changes={"n4": 0} if mr else {},
        label_values=LABEL_VALUES,
    )


def cases(root: Path) -> Iterator[Case]:
    """Every scan; each is a patient of its own."""
    for image, match in scans(root):
        label = image.with_name(image.name.replace("_image", "_label")) if match[3] == "train" else None
        yield Case(match[1], match[1], (image,), label, modality=match[2])  # type: ignore[arg-type]


def splits(root: Path) -> Iterator[Split]:
    """The contrastive paper's combinations of MR scans."""
    for name, (labelled, val) in COMBINATIONS.items():
        yield published(f"global-local-{name}", "mr_train_{}", POOL, val, TEST, labelled)
