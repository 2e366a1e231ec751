"""A miniature of the Sunnybrook Cardiac Data: three patients and one of the test part; four slices of five frames, squares."""

from pathlib import Path

import numpy as np

from medssl.platform.records import UNLABELLED
from medssl.tests.layouts._scan import Drawn, scan
from medssl.tests.layouts.chaos import slice_file

FRAMES, SLICES = 5, 4


def write(root: Path) -> list[Drawn]:
    drawn, rows = [], ["PatientID,OriginalID,Gender,Age,Pathology"]
    for n, (name, original) in enumerate(
        (("SC-HF-I-01", "SC-HF-I-1"), ("SC-HYP-03", "SC-HYP-3"), ("SC-N-02", "SC-N-2"), ("SC-N-09", "SC-N-9"))
    ):
        rows.append(f"SCD000{n}01,{original},Male,60,{name[3:-3]}")
        images = root / f"SCD_IMAGES_{n % 2 + 1:02d}" / f"SCD000{n}01" / "CINESAX_300"
        outlines = root / "SCD_ManualContours" / name / "contours-manual" / "IRCCI-expert"
        outlines.mkdir(parents=True)
        labels = {}
        for k in range(SLICES):  # images are numbered slice by slice, from the base down
            z = SLICES - 1 - k
            for frame in range(FRAMES):
                number = k * FRAMES + frame + 1
                plane = scan(100 * n + number, 2, (9, 11, 1))[0][..., 0]
                slice_file(images / f"IM-0003-{number:04d}.dcm", plane.T, 8.0 * z, f"1.2.9.{n}")
                side = {1: 3, 3: 5}.get(frame)  # the heart is smallest at frame 1, largest at 3
                if side and k != 2:  # nobody contoured the third slice
                    text = f"1.5 2.5\n{1.5 + side} 2.5\n{1.5 + side} {2.5 + side}\n1.5 {2.5 + side}\n"
                    (outlines / f"IM-0001-{number:04d}-icontour-manual.txt").write_text(text)
                    label = labels.setdefault(side, np.full((9, 11, SLICES), UNLABELLED, np.uint8))
                    label[..., z] = 0
                    label[2 : 2 + side, 3 : 3 + side, z] = 1
        part = "test" if name == "SC-N-09" else "train"
        for phase, side in (("ED", 5), ("ES", 3)):
            drawn.append(Drawn(f"{name}_{phase}", name, labels[side], part, phase, name[:-3]))
    (root / "scd_patientdata.csv").write_text("\n".join(rows) + "\n")
    return drawn
