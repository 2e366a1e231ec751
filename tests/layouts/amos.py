"""A miniature of AMOS22: CT and MR scans in every part."""

from pathlib import Path

from medssl.tests.layouts._scan import Drawn, nifti, scan, write_json


def write(root: Path) -> list[Drawn]:
    write_json(root / "dataset.json", {"name": "AMOS", "modality": {"0": "CT"}, "labels": {"0": "background", "8": "arota"}})
    drawn = []
    for folder, part, numbers in (("Tr", "train", (1, 4, 507, 508)), ("Va", "test", (8, 580)), ("Ts", None, (2, 591))):
        for n in numbers:
            name, modality = f"amos_{n:04d}", "ct" if n < 500 else "mr"
            image, label = scan(n, 16, ct=n < 500)
            nifti(root / f"images{folder}" / f"{name}.nii.gz", image)
            if part:
                nifti(root / f"labels{folder}" / f"{name}.nii.gz", label)
            drawn.append(Drawn(name, name, label if part else None, part, modality=modality))
    return drawn
