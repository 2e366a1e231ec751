"""A miniature of PH2 beside the training pictures of ISIC 2016; lesions are BMP of one bit."""

from pathlib import Path

from medssl.tests.layouts._picture import ellipse, ids, mask, picture
from medssl.tests.layouts._scan import Drawn

SIZE = (512, 384)


def write(root: Path) -> list[Drawn]:
    drawn = []
    for n in (3, 9):
        name, marked = f"IMD{n:03d}", ellipse(n, SIZE)
        folder = root / "PH2 Dataset images" / name
        picture(folder / f"{name}_Dermoscopic_Image" / f"{name}.bmp", n, SIZE)
        mask(folder / f"{name}_lesion" / f"{name}_lesion.bmp", marked, bilevel=True)
        mask(folder / f"{name}_roi" / f"{name}_R1_Label4.bmp", marked, bilevel=True)
        drawn.append(Drawn(name, name, ids(marked), "test"))
    marked = ellipse(1, SIZE)
    picture(root / "ISBI2016_ISIC_Part1_Training_Data" / "ISIC_0000001.jpg", 1, SIZE)
    mask(root / "ISBI2016_ISIC_Part1_Training_GroundTruth" / "ISIC_0000001_Segmentation.png", marked)
    return [*drawn, Drawn("ISIC_0000001", "ISIC_0000001", ids(marked), "train", group="ISIC 2016")]
