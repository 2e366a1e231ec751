"""A miniature of the Montgomery set: two radiographs, each lung a mask of its own, one of them of one bit."""

from pathlib import Path

import numpy as np

from medssl.tests.layouts._picture import ellipse, ids, mask, picture
from medssl.tests.layouts._scan import Drawn


def write(root: Path) -> list[Drawn]:
    drawn = []
    for n, finding, group in ((1, 0, "normal"), (104, 1, "tuberculosis")):
        name, left = f"MCUCXR_{n:04d}_{finding}", ellipse(n)
        right = np.roll(left, 200, axis=1)
        picture(root / "CXR_png" / f"{name}.png", n, colour=False)
        mask(root / "ManualMask" / "leftMask" / f"{name}.png", left)
        mask(root / "ManualMask" / "rightMask" / f"{name}.png", right, bilevel=True)
        (root / "ClinicalReadings").mkdir(exist_ok=True)
        (root / "ClinicalReadings" / f"{name}.txt").write_text("Patient's Sex: F")
        drawn.append(Drawn(name, f"MCUCXR_{n:04d}", ids(left | right), group=group))
    return drawn
