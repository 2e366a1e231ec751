"""A miniature of CHAOS's MR part: two people with labels, one without, three sequences; names count against the places."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

from medssl.tests.layouts._scan import Drawn, scan

GREYS = np.array([0, 63, 126, 189, 252], np.uint8)


def slice_file(path: Path, plane: NDArray[Any], z_mm: float, series: str) -> None:
    """One axial slice, rows to the back and columns to the left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    said = Dataset()
    said.file_meta = FileMetaDataset()
    said.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    said.SOPClassUID, said.SOPInstanceUID, said.SeriesInstanceUID = MRImageStorage, f"{series}.{int(path.stem[-4:])}", series
    said.Modality, said.ImagePositionPatient, said.ImageOrientationPatient = "MR", [-10, -20, z_mm], [1, 0, 0, 0, 1, 0]
    said.PixelSpacing, said.SliceThickness = [1.5, 1.25], 5
    said.SamplesPerPixel, said.PhotometricInterpretation = 1, "MONOCHROME2"
    said.BitsAllocated = said.BitsStored = 16
    said.HighBit, said.PixelRepresentation = 15, 1
    said.Rows, said.Columns = plane.shape
    said.PixelData = plane.astype("<i2").tobytes()
    said.save_as(path, enforce_file_format=True)


def write(root: Path) -> list[Drawn]:
    drawn = []
    sequences = (("T1DUAL", "InPhase", "T1 in phase"), ("T1DUAL", "OutPhase", "T1 out of phase"), ("T2SPIR", "", "T2"))
    for person in (1, 2, 13):
        for number, (folder, echo, phase) in enumerate(sequences):
            label = scan(10 * person + (folder == "T2SPIR"), 5)[1]
            image = scan(10 * person + 5 + number, 5)[0]
            above = root / str(person) / folder
            for k in range(image.shape[2]):  # names count from the head down
                z = image.shape[2] - 1 - k
                name = f"IMG-{person:04d}-{2 * k + (number == 1) + 1:05d}"
                slice_file(above / "DICOM_anon" / echo / f"{name}.dcm", image[..., z].T, 5.0 * z, f"1.2.3.{person}.{number}")
                if person < 13:
                    ground = above / "Ground" / f"IMG-{person:04d}-{2 * k + 1:05d}.png"
                    ground.parent.mkdir(exist_ok=True)
                    Image.fromarray(GREYS[label[..., z].T]).save(ground)
            volume = f"mr_{person:02d}_{phase.replace(' ', '-')}"
            drawn.append(Drawn(volume, f"mr_{person:02d}", label if person < 13 else None, phase=phase))
    return drawn


def write_ct(root: Path) -> list[Drawn]:
    """Two people of the CT part, whose labels are bilevel pictures named otherwise than the slices."""
    drawn = []
    for person in (2, 10):
        image, label = scan(person, 2, ct=True)
        above = root / str(person)
        (above / "Ground").mkdir(parents=True)
        for k in range(image.shape[2]):
            z = image.shape[2] - 1 - k
            slice_file(above / "DICOM_anon" / f"i{k:04d}.dcm", image[..., z].T, 3.0 * z, f"1.2.4.{person}")
            Image.fromarray(label[..., z].T.astype(bool)).save(above / "Ground" / f"liver_GT_{k:03d}.png")
        drawn.append(Drawn(f"ct_{person:02d}", f"ct_{person:02d}", label))
    return drawn
