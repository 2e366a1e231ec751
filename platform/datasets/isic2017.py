"""ISIC 2017, lesion segmentation: 2,750 dermoscopic colour pictures of the skin.

    ISIC-2017_Training_Data/ISIC_0000000.jpg                           2,000; ISIC_0000000_superpixels.png beside it is not read
    ISIC-2017_Training_Part1_GroundTruth/ISIC_0000000_segmentation.png 0, or 255 the lesion
    ISIC-2017_Validation_Data, ISIC-2017_Validation_Part1_GroundTruth  150
    ISIC-2017_Test_v2_Data, ISIC-2017_Test_v2_Part1_GroundTruth        600

Codella et al., https://doi.org/10.1109/ISBI.2018.8363547; CC0; https://challenge.isic-archive.com/data/#2017. The challenge's
own parts are kept; whose a picture is is not published, so that each counts as a patient of its own.

Preset: 512 wide, 384 high, as PDCR (Li et al. 2022, https://doi.org/10.1109/TMI.2022.3186677) has it: stored slices run along
the picture's width first. Deviations: as for ISIC 2016; which part PDCR calls "val" is not on record.
"""

from collections.abc import Iterator
from pathlib import Path

from medssl.platform.datasets import _pictures
from medssl.platform.records import Case, DataInfo, Part

OBTAIN = "https://challenge.isic-archive.com/data/#2017"
LICENCE = "CC0"
PARTS: dict[str, Part] = {"Training": "train", "Validation": "val", "Test_v2": "test"}


def matches(root: Path) -> bool:
    """Whether the training pictures are there."""
    return (root / "ISIC-2017_Training_Data").is_dir()


def info(root: Path | None) -> DataInfo:
    """The facts of ISIC 2017."""
    return DataInfo(
        name="isic2017",
        classes=("background", "lesion"),
        channels=_pictures.COLOUR,
        licence=LICENCE,
        citation="Codella et al. 2018, https://doi.org/10.1109/ISBI.2018.8363547",
        obtain=OBTAIN,
        preset="picture",
        preset_changes={"resize": (512, 384)},
        label_values=_pictures.MASK,
    )


def cases(root: Path) -> Iterator[Case]:
    """The pictures of each part that is there."""
    for name, part in PARTS.items():
        images, masks = root / f"ISIC-2017_{name}_Data", root / f"ISIC-2017_{name}_Part1_GroundTruth"
        if images.is_dir():
            yield from _pictures.labelled(images, masks, "_segmentation.png", part, skip="_superpixels")
