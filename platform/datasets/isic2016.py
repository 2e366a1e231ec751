"""ISIC 2016, lesion segmentation: 1,279 dermoscopic colour pictures of the skin.

    ISBI2016_ISIC_Part1_Training_Data/ISIC_0000000.jpg                         900
    ISBI2016_ISIC_Part1_Training_GroundTruth/ISIC_0000000_Segmentation.png     0, or 255 the lesion
    ISBI2016_ISIC_Part1_Test_Data/ISIC_0000003.jpg                             379
    ISBI2016_ISIC_Part1_Test_GroundTruth/ISIC_0000003_Segmentation.png

Gutman et al., https://doi.org/10.48550/arXiv.1605.01397; CC0; https://challenge.isic-archive.com/data/#2016. The challenge's
own parts are kept; whose a picture is is not published, so that each counts as a patient of its own.

Preset: 512 x 512, as PDCR (Li et al. 2022, https://doi.org/10.1109/TMI.2022.3186677) has it; 384 x 384 by -o resize=[384,384].
Deviations: PDCR resizes masks by Lanczos and takes all above 0, which lets lesions grow (intersection over union with the mask
0.95 at 384 x 384, and its masks are JPEG); we take the nearest pixel. Pictures are resampled linearly, not bicubically.
"""

from collections.abc import Iterator
from pathlib import Path

from medssl.platform.datasets import _pictures
from medssl.platform.records import Case, DataInfo

OBTAIN = "https://challenge.isic-archive.com/data/#2016"
LICENCE = "CC0"
IMAGES, MASKS = "ISBI2016_ISIC_Part1_{}_Data", "ISBI2016_ISIC_Part1_{}_GroundTruth"


def matches(root: Path) -> bool:
    """Whether the training pictures are there, and no PH2 to test on (ph2.py)."""
    return (root / IMAGES.format("Training")).is_dir() and not (root / "PH2 Dataset images").is_dir()


def info(root: Path | None) -> DataInfo:
    """The facts of ISIC 2016."""
    return DataInfo(
        name="isic2016",
        classes=("background", "lesion"),
        channels=_pictures.COLOUR,
        licence=LICENCE,
        citation="Gutman et al. 2016, https://doi.org/10.48550/arXiv.1605.01397",
        obtain=OBTAIN,
        preset="picture",
        preset_changes={"resize": (512, 512)},
        label_values=_pictures.MASK,
    )


def cases(root: Path) -> Iterator[Case]:
    """The training pictures, and the test pictures where they are."""
    yield from _pictures.labelled(
        root / IMAGES.format("Training"), root / MASKS.format("Training"), "_Segmentation.png", "train"
    )
    if (root / IMAGES.format("Test")).is_dir():
        yield from _pictures.labelled(root / IMAGES.format("Test"), root / MASKS.format("Test"), "_Segmentation.png", "test")
