"""PH2: 200 dermoscopic colour pictures of one hospital, to test what was trained on ISIC 2016.

    PH2 Dataset images/IMD003/IMD003_Dermoscopic_Image/IMD003.bmp
    PH2 Dataset images/IMD003/IMD003_lesion/IMD003_lesion.bmp      black, or white the lesion
    ISBI2016_ISIC_Part1_Training_Data                              beside it, if the two are put into one folder:
    ISBI2016_ISIC_Part1_Training_GroundTruth                       then ISIC 2016 trains and all of PH2 tests

Mendonça et al., https://doi.org/10.1109/EMBC.2013.6610779; research use; https://www.fc.up.pt/addi/ph2%20database.html. Whose a
picture is is not published: each counts as a patient of its own. Alone, PH2 has no official parts. Other files are not read.

Preset: 512 wide, 384 high, as PDCR's "ISIC2016+PH2" (Li et al. 2022, https://doi.org/10.1109/TMI.2022.3186677).
Deviations: as for ISIC 2016.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from medssl.platform.datasets import _pictures, isic2016
from medssl.platform.errors import RunError
from medssl.platform.records import Case, DataInfo

OBTAIN = "https://www.fc.up.pt/addi/ph2%20database.html"
LICENCE = "research use, on the owners' terms"
FOLDER = "PH2 Dataset images"


def matches(root: Path) -> bool:
    """Whether the folder of PH2's pictures is there."""
    return (root / FOLDER).is_dir()


def info(root: Path | None) -> DataInfo:
    """The facts of PH2."""
    return DataInfo(
        name="ph2",
        classes=("background", "lesion"),
        channels=_pictures.COLOUR,
        licence=LICENCE,
        citation="Mendonça et al. 2013, https://doi.org/10.1109/EMBC.2013.6610779",
        obtain=OBTAIN,
        preset="picture",
        preset_changes={"resize": (512, 384)},
        label_values=_pictures.MASK,
    )


def cases(root: Path) -> Iterator[Case]:
    """All pictures of PH2, and the training pictures of ISIC 2016 where they are. Raises RunError on one that is missing."""
    training = root / isic2016.IMAGES.format("Training")
    for folder in sorted((root / FOLDER).glob("IMD*")):
        name = folder.name
        image, mask = (folder / f"{name}_Dermoscopic_Image" / f"{name}.bmp", folder / f"{name}_lesion" / f"{name}_lesion.bmp")
        for file in (image, mask):
            if not file.is_file():
                raise RunError(f"{file}: is missing; unpack PH2 again")
        yield Case(name, name, (image,), mask, "test" if training.is_dir() else None)
    if training.is_dir():
        masks = root / isic2016.MASKS.format("Training")
        for case in _pictures.labelled(training, masks, "_Segmentation.png", "train"):
            yield dataclasses.replace(case, group="ISIC 2016")
