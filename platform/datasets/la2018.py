"""LA2018, the Atrial Segmentation Challenge: the left atrium in late gadolinium MR, 100 labelled scans and 54 test scans.

    Training Set/                 "Testing Set" beside it or not
      0RZDK210BSMWAA6467LU/       one patient, or one time point of one
        lgemri.nrrd               576 or 640 pixels square, 88 slices, 0.625 mm
        laendo.nrrd               255 the cavity within the endocardium, else 0
        lawall.nrrd               the wall, not read

Xiong et al., Medical Image Analysis 2021, https://doi.org/10.1016/j.media.2020.101832. Register at
https://www.cardiacatlas.org/atriaseg2018-challenge/atria-seg-data; research use. The folders do not say which patients they
share: each counts as its own. Testing scans with a laendo.nrrd are the official test part.

The preset is `mr`. Semi-supervised papers (UA-MT, https://doi.org/10.1007/978-3-030-32245-8_67) cut a box around the atrium,
found by its label, out of 80 training scans and score the other 20; a box that needs the label is left out here. Their export
to HDF5 (mri_norm2.h5) is not read.
"""

from collections.abc import Iterator
from pathlib import Path

from medssl.platform.records import Case, DataInfo

OBTAIN = "https://www.cardiacatlas.org/atriaseg2018-challenge/atria-seg-data"
LICENCE = "research use, by registration"


def scans(root: Path) -> list[Path]:
    """The images of both sets, or of the one that `root` is."""
    return sorted({*root.glob("*/lgemri.nrrd"), *root.glob("*/*/lgemri.nrrd")})


def matches(root: Path) -> bool:
    """Whether `root` holds scans with the challenge's names."""
    return bool(scans(root))


def info(root: Path) -> DataInfo:
    """The facts of LA2018."""
    return DataInfo(
        name="la2018",
        classes=("background", "left atrium"),
        channels=("late gadolinium MR",),
        licence=LICENCE,
        citation="Xiong et al. 2021, https://doi.org/10.1016/j.media.2020.101832",
        obtain=OBTAIN,
        preset="mr",
        label_values={0: 0, 255: 1},
    )


def cases(root: Path) -> Iterator[Case]:
    """Every folder with an image; the label where there is one."""
    for image in scans(root):
        volume, label = image.parent.name, image.with_name("laendo.nrrd")
        testing = "test" in image.parent.parent.name.lower()
        part = ("test" if testing else "train") if label.is_file() else None
        yield Case(volume, volume, (image,), label if label.is_file() or not testing else None, part)  # type: ignore[arg-type]
