"""PROMISE12: the prostate in transversal T2-weighted MR of several centres, 50 labelled scans.

    training_data/                 also TrainingData_Part1 … 3 side by side
      Case00.mhd  Case00.raw       … Case49; MetaImage: a header of text beside the voxels
      Case00_segmentation.mhd  Case00_segmentation.raw    1 prostate
    test_data/Case00.mhd           … Case29: other patients with the same names, without labels, for pretraining

Litjens et al., Medical Image Analysis 2014, https://doi.org/10.1016/j.media.2013.12.002. Register at
https://promise12.grand-challenge.org, or https://zenodo.org/records/8026660; research use. The challenge scores the test scans
itself: no official parts.

The preset is `mr` at the scan's own spacing. Contrast-You (Peng et al., https://doi.org/10.48550/arXiv.2103.00211 and its
successors) resizes each slice to 224 pixels and scales to [0, 1] by the maximum; we keep millimetres and clip percentiles.
"""

from collections.abc import Iterator
from pathlib import Path

from medssl.platform.records import Case, DataInfo


def scans(root: Path) -> list[Path]:
    """The images, not their segmentations."""
    return sorted(root.rglob("Case[0-9][0-9].mhd"))


def matches(root: Path) -> bool:
    """Whether `root` holds at least one case with its segmentation."""
    return any(root.glob("Case??_segmentation.mhd")) or any(root.glob("*/Case??_segmentation.mhd"))


def info(root: Path | None) -> DataInfo:
    """The facts of PROMISE12."""
    return DataInfo(
        name="promise12",
        classes=("background", "prostate"),
        channels=("T2",),
        licence="research use, by registration",
        citation="Litjens et al. 2014, https://doi.org/10.1016/j.media.2013.12.002",
        obtain="https://promise12.grand-challenge.org",
        preset="mr",
    )


def cases(root: Path) -> Iterator[Case]:
    """Training cases with their labels; cases of a folder whose name says "test" without."""
    for image in scans(root):
        testing = "test" in image.parent.name.lower()
        volume = f"test_{image.stem}" if testing else image.stem
        yield Case(volume, volume, (image,), None if testing else image.with_name(f"{image.stem}_segmentation.mhd"))
