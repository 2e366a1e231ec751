"""A miniature of DigestPath: two sections of one patient with JPEG masks, and a section without lesion."""

from pathlib import Path

from medssl.tests.layouts._picture import ellipse, ids, mask, picture
from medssl.tests.layouts._scan import Drawn


def write(root: Path) -> list[Drawn]:
    drawn = []
    for n, block in enumerate("AB"):
        name, marked = f"18-00530{block}_2019-05-07 22_56_22-lv1-34626-6557-4790-502{n}", ellipse(n)
        picture(root / "tissue-train-pos-v1" / f"{name}.jpg", n)
        mask(root / "tissue-train-pos-v1" / f"{name}_mask.jpg", marked)
        drawn.append(Drawn(name.replace(" ", "_"), "18-00530", ids(marked), group="lesion"))
    name = "2018_64982_1-1_2019-02-25 21_46_45-lv1-35606-17004-5038-4939"
    picture(root / "tissue-train-neg" / f"{name}.jpg", 9)
    return [*drawn, Drawn(name.replace(" ", "_"), "2018_64982", group="no lesion")]
