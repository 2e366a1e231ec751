"""A miniature of FLARE22: three labelled scans and one unlabelled."""

from pathlib import Path

from medssl.tests.layouts._scan import Drawn, nifti, scan


def write(root: Path) -> list[Drawn]:
    drawn = []
    for n in (1, 2, 50):
        image, label = scan(n, 14, ct=True)
        name = f"FLARE22_Tr_{n:04d}"
        nifti(root / "FLARE22Train" / "images" / f"{name}_0000.nii.gz", image)
        nifti(root / "FLARE22Train" / "labels" / f"{name}.nii.gz", label)
        drawn.append(Drawn(name, name, label))
    nifti(root / "FLARE_UnlabeledCase1-1000" / "Case_00001_0000.nii.gz", scan(3, 14, ct=True)[0])
    return [*drawn, Drawn("Case_00001", "Case_00001")]
