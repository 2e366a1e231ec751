"""A miniature of ISIC 2016: two training pictures and one to test."""

from pathlib import Path

from medssl.tests.layouts._picture import ellipse, ids, mask, picture
from medssl.tests.layouts._scan import Drawn


def write(root: Path) -> list[Drawn]:
    drawn = []
    for n, kind, part in ((0, "Training", "train"), (2, "Training", "train"), (3, "Test", "test")):
        name, marked = f"ISIC_{n:07d}", ellipse(n)
        picture(root / f"ISBI2016_ISIC_Part1_{kind}_Data" / f"{name}.jpg", n)
        mask(root / f"ISBI2016_ISIC_Part1_{kind}_GroundTruth" / f"{name}_Segmentation.png", marked)
        drawn.append(Drawn(name, name, ids(marked), part))
    return drawn
