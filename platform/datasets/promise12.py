"""PROMISE12: the prostate in transversal T2-weighted MR of several centres, 50 labelled scans.

    training_data/                 also TrainingData_Part1 … 3 side by side
      Case00.mhd  Case00.raw       … Case49; MetaImage: a header of text beside the voxels
      Case00_segmentation.mhd  Case00_segmentation.raw    1 prostate
    test_data/Case00.mhd           … Case29: other patients with the same names, without labels, for pretraining

Litjens et al., Medical Image Analysis 2014, https://doi.org/10.1016/j.media.2013.12.002. Register at
https://promise12.grand-challenge.org, or https://zenodo.org/records/8026660; research use. The challenge scores the test scans
itself: no official parts.

Preset `promise12`: Contrast-You's (Peng et al., https://github.com/jizongFox/contrastyou): slices of the whole range of
intensities, resized to 224 x 224. `--preset mr` keeps the scan's own pixels and clips percentiles.
"""

from collections.abc import Iterator
from pathlib import Path

from medssl.platform.records import Case, DataInfo

OBTAIN = "https://promise12.grand-challenge.org"
LICENCE = "research use, by registration"


def scans(root: Path) -> list[Path]:
    """The images, not their segmentations."""
    return sorted(root.rglob("Case[0-9][0-9].mhd"))


def matches(root: Path) -> bool:
    """Whether `root` holds at least one case with its segmentation."""
    return any(root.glob("Case??_segmentation.mhd")) or any(root.glob("*/Case??_segmentation.mhd"))


def info(root: Path) -> DataInfo:
    """The facts of PROMISE12."""
    return DataInfo(
        name="promise12",
        classes=("background", "prostate"),
        channels=("T2",),
        licence=LICENCE,
        citation="Litjens et al. 2014, https://doi.org/10.1016/j.media.2013.12.002",
        obtain=OBTAIN,
        preset="promise12",
    )


def cases(root: Path) -> Iterator[Case]:
    """Training cases with their labels; cases of a folder whose name says "test" without."""
    for image in scans(root):
        testing = "test" in image.parent.name.lower()
        volume = f"test_{image.stem}" if testing else image.stem
        yield Case(volume, volume, (image,), None if testing else image.with_name(f"{image.stem}_segmentation.mhd"))
