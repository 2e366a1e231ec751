"""A miniature of LA2018: three training scans, and a test scan without label."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.tests.layouts._scan import Drawn, scan


def nrrd(path: Path, voxels: NDArray[Any], spacing_mm: float = 0.625) -> None:
    """An NRRD file of bytes, gzipped, x fastest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    side = f"({spacing_mm},0,0) (0,{spacing_mm},0) (0,0,{spacing_mm})"
    header = (
        "NRRD0004\n# Complete NRRD file format specification at:\n# http://teem.sourceforge.net/nrrd/format.html\n"
        f"type: unsigned char\ndimension: 3\nspace: left-posterior-superior\nsizes: {' '.join(map(str, voxels.shape))}\n"
        f"space directions: {side}\nkinds: domain domain domain\nencoding: gzip\nspace origin: (0,0,0)\n\n"
    )
    path.write_bytes(header.encode() + gzip.compress(voxels.astype(np.uint8).tobytes(order="F"), 1))


def write(root: Path) -> list[Drawn]:
    drawn = []
    for n, name in enumerate(("0RZDK210BSMWAA6467LU", "1D7CUD1955YZPGK8XHJX", "2XJMSWLNGIQPTKSHPZ2A")):
        image, label = scan(n, 2)
        nrrd(root / "Training Set" / name / "lgemri.nrrd", image // 4)
        nrrd(root / "Training Set" / name / "laendo.nrrd", label * 255)
        drawn.append(Drawn(name, name, label, "train"))
    nrrd(root / "Testing Set" / "CASE_0002" / "lgemri.nrrd", scan(9, 2)[0] // 4)
    return [*drawn, Drawn("CASE_0002", "CASE_0002")]
