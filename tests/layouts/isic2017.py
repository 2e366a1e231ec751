"""A miniature of ISIC 2017: one picture of each part, superpixels and a table beside them."""

from pathlib import Path

from medssl.tests.layouts._picture import ellipse, ids, mask, picture
from medssl.tests.layouts._scan import Drawn

SIZE = (512, 384)


def write(root: Path) -> list[Drawn]:
    drawn = []
    for n, (kind, part) in enumerate({"Training": "train", "Validation": "val", "Test_v2": "test"}.items()):
        name, marked = f"ISIC_{n:07d}", ellipse(n, SIZE)
        picture(root / f"ISIC-2017_{kind}_Data" / f"{name}.jpg", n, SIZE)
        picture(root / f"ISIC-2017_{kind}_Data" / f"{name}_superpixels.png", n, SIZE)
        (root / f"ISIC-2017_{kind}_Data" / f"ISIC-2017_{kind}_Data_metadata.csv").write_text("image_id,age_approximate,sex\n")
        mask(root / f"ISIC-2017_{kind}_Part1_GroundTruth" / f"{name}_segmentation.png", marked)
        drawn.append(Drawn(name, name, ids(marked), part))
    return drawn
