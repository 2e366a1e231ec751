"""BTCV, "Beyond the Cranial Vault": portal venous CT of the abdomen with thirteen organs, 30 labelled and 20 unlabelled scans.

    RawData/                                also `Abdomen/RawData` and the folder above it
      Training/img/img0001.nii.gz           … 0010, 0021 … 0040
      Training/label/label0001.nii.gz       1 spleen, 2 right kidney … as in CLASSES
      Testing/img/img0061.nii.gz            … 0080, without labels: for pretraining

Landman et al., MICCAI Multi-Atlas Labeling Beyond the Cranial Vault, 2015, https://doi.org/10.7303/syn3193805. Register at that
page; the terms of Synapse hold. The challenge scores the testing scans itself: no official parts.

The preset is `ct`. Papers that use BTCV window to -175 … 250 HU (Swin UNETR: -o window=[-175,250] -o spacing_mm=[1.5,1.5,2]).
"""

from collections.abc import Iterator
from pathlib import Path

from medssl.platform.records import Case, DataInfo

OBTAIN = "https://www.synapse.org/Synapse:syn3193805"
LICENCE = "terms of use of Synapse syn3193805"
CLASSES = (
    "background",
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "oesophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "portal and splenic veins",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
)


def scans(root: Path, part: str) -> list[Path]:
    """The images of Training or Testing, wherever RawData lies."""
    return sorted({file for above in ("", "*/", "*/*/") for file in root.glob(f"{above}{part}/img/img????.nii.gz")})


def matches(root: Path) -> bool:
    """Whether `root` holds the training scans."""
    return bool(scans(root, "Training"))


def info(root: Path) -> DataInfo:
    """The facts of BTCV."""
    return DataInfo(
        name="btcv",
        classes=CLASSES,
        channels=("CT",),
        licence=LICENCE,
        citation="Landman et al. 2015, https://doi.org/10.7303/syn3193805",
        obtain=OBTAIN,
        preset="ct",
    )


def cases(root: Path) -> Iterator[Case]:
    """Training scans with their labels, then testing scans."""
    for image in scans(root, "Training"):
        number = image.name.removeprefix("img")
        yield Case(f"img{number[:4]}", f"img{number[:4]}", (image,), image.parent.parent / "label" / f"label{number}")
    for image in scans(root, "Testing"):
        yield Case(image.name[:7], image.name[:7], (image,))
