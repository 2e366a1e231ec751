"""A miniature of ACDC: three training patients and a test patient, cines of four frames."""

from pathlib import Path

import numpy as np

from medssl.tests.layouts._scan import Drawn, nifti, scan

SPACING_MM = (1.36719, 1.36719, 10.0)


def write(root: Path) -> list[Drawn]:
    drawn = []
    for n, group in ((1, "DCM"), (2, "DCM"), (21, "HCM"), (101, "NOR")):
        name, part = f"patient{n:03d}", "test" if n > 100 else "train"
        folder = root / "database" / ("testing" if n > 100 else "training") / name
        cine = np.stack([scan(10 * n + t, 4)[0] for t in range(4)], axis=-1)
        nifti(folder / f"{name}_4d.nii.gz", cine, SPACING_MM)
        (folder / "Info.cfg").write_text(f"ED: 1\nES: 3\nGroup: {group}\nHeight: 184.0\nNbFrame: 4\nWeight: 95.0\n")
        for frame in (1, 2, 3, 4):
            volume, phase = f"{name}_frame{frame:02d}", {1: "ED", 3: "ES"}.get(frame)
            label = scan(10 * n + frame, 4)[1] if phase else None
            if label is not None:
                nifti(folder / f"{volume}.nii.gz", cine[..., frame - 1], SPACING_MM)
                nifti(folder / f"{volume}_gt.nii.gz", label, SPACING_MM)
            drawn.append(Drawn(volume, name, label, part, phase, group))
    return drawn
