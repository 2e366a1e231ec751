"""A miniature of MM-WHS: two training scans and a test scan of each modality, one MR label with the misspelt value."""

from pathlib import Path

import numpy as np

from medssl.tests.layouts._scan import Drawn, nifti, scan

VALUES = np.array([0, 205, 420, 500, 550, 600, 820, 850], np.int16)


def write(root: Path) -> list[Drawn]:
    drawn = []
    for modality, spacing_mm in (("ct", (1.0, 1.0, 2.5)), ("mr", (1.5, 1.5, 1.0))):
        for n in (1001, 1002, 1011):
            name = f"{modality}_train_{n}"
            image, label = scan(n, 8, ct=modality == "ct")
            values = VALUES[label]
            if name == "mr_train_1011":
                values[tuple(np.argwhere(values == 420)[0])] = 421
            nifti(root / f"{modality}_train" / f"{name}_image.nii.gz", image, spacing_mm)
            nifti(root / f"{modality}_train" / f"{name}_label.nii.gz", values, spacing_mm)
            drawn.append(Drawn(name, name, label, modality=modality))
        name = f"{modality}_test_2001"
        nifti(root / f"{modality}_test" / f"{name}_image.nii.gz", scan(2001, 8, ct=modality == "ct")[0], spacing_mm)
        drawn.append(Drawn(name, name, modality=modality))
    return drawn
