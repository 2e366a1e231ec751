"""A miniature of BTCV: three training scans and one testing scan."""

from pathlib import Path

from medssl.tests.layouts._scan import Drawn, nifti, scan


def write(root: Path) -> list[Drawn]:
    drawn = []
    for n in (1, 2, 40):
        image, label = scan(n, 14, ct=True)
        nifti(root / "RawData" / "Training" / "img" / f"img{n:04d}.nii.gz", image)
        nifti(root / "RawData" / "Training" / "label" / f"label{n:04d}.nii.gz", label)
        drawn.append(Drawn(f"img{n:04d}", f"img{n:04d}", label))
    nifti(root / "RawData" / "Testing" / "img" / "img0061.nii.gz", scan(3, 14, ct=True)[0])
    return [*drawn, Drawn("img0061", "img0061")]
