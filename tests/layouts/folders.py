"""Scans of one's own: NIfTI in two subfolders with labels of two of them, and the file that `data prepare --images` leaves."""

from pathlib import Path

from medssl.platform.datasets import folders
from medssl.tests.layouts._scan import Drawn, nifti, scan


def write(root: Path) -> list[Drawn]:
    drawn = []
    for n, path in enumerate(("p1/a", "p1/b", "p2/a")):
        image, label = scan(n, 3)
        nifti(root / "scans" / f"{path}.nii.gz", image)
        if n:
            nifti(root / "masks" / f"{path}.nii", label)
        drawn.append(Drawn(path.replace("/", "-"), path[:2], label if n else None))
    where = {"images": str(root / "scans"), "labels": str(root / "masks")}
    folders.remember(root, folders.Where("own", subject_regex="^(p[0-9]+)/", classes=("liver", "spleen"), **where))
    return drawn
