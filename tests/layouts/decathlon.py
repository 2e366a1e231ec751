"""Miniatures of the Decathlon: any task by its folder's name, a 4D file where it has several channels."""

from pathlib import Path

from medssl.platform.datasets.decathlon import TASKS
from medssl.tests.layouts._scan import Drawn, nifti, scan, write_json

NAMES = {"Task01_BrainTumour": "BRATS", "Task05_Prostate": "prostate"}


def write(root: Path, task: str = "Task04_Hippocampus") -> list[Drawn]:
    """Three labelled volumes and an unlabelled one; a prostate has the T2 channel alone in its label's place."""
    channels, organs = TASKS[task]
    stem, ct = NAMES.get(task, task[7:].lower()), channels == ("CT",)
    spacing_mm = (0.625, 0.625, 3.6) if task == "Task05_Prostate" else (1.0, 1.0, 2.5)
    said = {
        "name": stem,
        "tensorImageSize": "3D" if len(channels) == 1 else "4D",
        "numTraining": 3,
        "numTest": 1,
        "licence": "CC-BY-SA 4.0",
    }
    said |= {"modality": {str(k): name for k, name in enumerate(channels)}}
    said |= {"labels": {"0": "background"} | {str(k): name for k, name in enumerate(organs, 1)}}
    drawn = []
    for n in (0, 1, 2, 3):
        shape = (9, 11, 4) if len(channels) == 1 else (9, 11, 4, len(channels))
        image, label = scan(n, len(organs) + 1, shape, ct)
        name = f"{stem}_{n:02d}"
        nifti(root / ("imagesTr" if n < 3 else "imagesTs") / f"{name}.nii.gz", image, spacing_mm)
        if n < 3:
            nifti(root / "labelsTr" / f"{name}.nii.gz", label, spacing_mm)
        drawn.append(Drawn(name, name, label if n < 3 else None))
    training = [{"image": f"./imagesTr/{d.volume}.nii.gz", "label": f"./labelsTr/{d.volume}.nii.gz"} for d in drawn[:3]]
    write_json(root / "dataset.json", said | {"training": training, "test": [f"./imagesTs/{drawn[3].volume}.nii.gz"]})
    (root / "imagesTr" / f"._{stem}_00.nii.gz").write_bytes(b"what macOS leaves in the published archives")
    return drawn
