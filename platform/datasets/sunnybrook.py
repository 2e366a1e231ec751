"""Sunnybrook Cardiac Data: short-axis cine MR of 45 patients, the cavity of the left ventricle at end diastole and end systole.

    SCD_IMAGES_01/SCD0000101/CINESAX_300/IM-0003-0001.dcm      … every frame of every slice; SCD0000101/ may lie higher up
    SCD_ManualContours/SC-HF-I-01/contours-manual/IRCCI-expert/
      IM-0001-0048-icontour-manual.txt                         x y of the inner contour on image 48 of the series, in pixels
      IM-0001-0048-ocontour-manual.txt                         the outer one, mostly at end diastole only: not read
    scd_patientdata.csv                                        PatientID SCD0000101 is OriginalID SC-HF-I-1

Radau et al., The MIDAS Journal 2009, https://doi.org/10.54294/g80ruo (http://hdl.handle.net/10380/3070); CC0 1.0;
https://www.cardiacatlas.org/sunnybrook-cardiac-data. Extra [dicom]. The group is the pathology in the name: heart failure with
(SC-HF-I) and without (SC-HF-NI) infarction, hypertrophy (SC-HYP), normal (SC-N). The fifteen patients of the challenge's online
part are the official test part.

The frames of a series lie slice by slice among each other, so a phase is first unpacked into a volume, NIfTI in the form of the
Decathlon, beside the prepared set. Frames are counted at each place of the series; of the two frames with the most contours,
end diastole is the one with the larger cavity. A contour fills the pixels whose centres it encloses; slices of the phase that
nobody contoured are not annotated. Preset `mr`. A folder exported by others in the form of the Decathlon is read as such.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medssl.platform import atomic, dicom
from medssl.platform.datasets import decathlon
from medssl.platform.dicom import Plane
from medssl.platform.errors import RunError
from medssl.platform.formats import MAX_RATIO
from medssl.platform.records import UNLABELLED, Case, DataInfo

OBTAIN = "https://www.cardiacatlas.org/sunnybrook-cardiac-data"
LICENCE = "CC0 1.0"
TEST = re.compile(r"SC-(HF-I-(09|1[0-2])|HF-NI-1[2-5]|HYP-(09|1[0-2])|N-(09|1[01]))")  # the challenge's online part
CONTOUR = re.compile(r"IM-\d+-(\d+)-icontour-manual\.txt")


def contours(root: Path) -> dict[str, dict[int, Path]]:
    """The inner contours of each patient, by the number of their image."""
    found: dict[str, dict[int, Path]] = {}
    for file in sorted(root.glob("**/SC-*/contours-manual/IRCCI-expert/*-icontour-manual.txt")):
        if match := CONTOUR.fullmatch(file.name):
            found.setdefault(file.parents[2].name, {})[int(match[1])] = file
    return found


def matches(root: Path) -> bool:
    """Whether `root` has the list of patients and contours."""
    return (root / "scd_patientdata.csv").is_file() and any(root.glob("**/SC-*/contours-manual/IRCCI-expert"))


def info(root: Path) -> DataInfo:
    """The facts of the Sunnybrook Cardiac Data."""
    return DataInfo(
        name="sunnybrook",
        classes=("background", "left ventricle"),
        channels=("cine MR",),
        licence=LICENCE,
        citation="Radau et al. 2009, https://doi.org/10.54294/g80ruo",
        obtain=OBTAIN,
        preset="mr",
    )


def cases(root: Path) -> Iterator[Case]:
    """The volumes that `unpack` wrote."""
    yield from decathlon.cases(root)


def unpack(root: Path, to: Path) -> None:
    """Write both phases of every patient who has contours and images to `to`. Raises RunError where nobody has."""
    with (root / "scd_patientdata.csv").open(newline="", encoding="utf-8-sig") as file:
        ids = {padded(row["OriginalID"]): row["PatientID"] for row in csv.DictReader(file)}
    listed = []
    for name, drawn in contours(root).items():
        planes = frames(root, ids[name]) if name in ids else {}
        for phase, chosen in phases(planes, drawn).items():
            part = "Ts" if TEST.fullmatch(name) else "Tr"
            write(to, part, f"{name}_{phase}", chosen, {number: drawn[number] for number in drawn if number in chosen})
            group = name.rpartition("-")[0]
            listed.append({"name": f"{name}_{phase}", "patient": name, "phase": phase, "group": group})
    if not listed:
        raise RunError(f"{root}: no patient has contours and CINESAX images; unpack the images beside SCD_ManualContours")
    atomic.write_json(to / "cases.json", listed)
    said = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "left ventricle"}}
    atomic.write_json(to / "dataset.json", {"name": "sunnybrook", **said})


def padded(name: str) -> str:
    """`SC-HF-I-1` -> `SC-HF-I-01`."""
    above, _, number = name.rpartition("-")
    return f"{above}-{int(number):02d}"


def frames(root: Path, patient: str) -> dict[int, tuple[Plane, int]]:
    """Every image of a patient's short-axis series by its number: its plane, and which frame it is at its place."""
    found: dict[int, Plane] = {}
    for file in sorted({*root.glob(f"{patient}/CINESAX*/*.dcm"), *root.glob(f"*/{patient}/CINESAX*/*.dcm")}):
        found.setdefault(int(file.stem.rpartition("-")[2]), next(dicom.planes_of(file, dicom.header(file))))
    seen: Counter[tuple[float, ...]] = Counter()
    numbered = {}
    for number in sorted(found):
        place = tuple(np.round(found[number].position, 2))
        numbered[number] = (found[number], seen[place])
        seen[place] += 1
    return numbered


def phases(planes: dict[int, tuple[Plane, int]], drawn: dict[int, Path]) -> dict[str, dict[int, Plane]]:
    """Planes of end diastole and end systole by image number; fewer where fewer frames have contours."""
    counted = Counter(planes[number][1] for number in drawn if number in planes)
    cavity = dict.fromkeys((frame for frame, _ in counted.most_common(2)), 0.0)
    for number in drawn:
        if number in planes and planes[number][1] in cavity:
            x, y = np.loadtxt(drawn[number]).T
            cavity[planes[number][1]] += abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2
    largest_first = sorted(cavity, key=lambda frame: -cavity[frame])
    return {
        phase: {number: plane for number, (plane, at) in planes.items() if at == frame}
        for phase, frame in zip(("ED", "ES"), largest_first, strict=False)
    }


def filled(file: Path, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels (columns, rows) whose centres a contour encloses."""
    from matplotlib.path import Path as Outline

    columns, rows = np.meshgrid(np.arange(shape[1]), np.arange(shape[0]), indexing="ij")
    inside = Outline(np.loadtxt(file)).contains_points(np.stack([columns.ravel(), rows.ravel()], axis=1))
    return inside.reshape(columns.shape)


def write(to: Path, part: str, volume: str, planes: dict[int, Plane], drawn: dict[int, Path]) -> None:
    """The volume of one phase, and its label."""
    import nibabel

    ordered, affine = dicom.arrange(next(iter(planes.values())).file.parent, list(planes.values()))
    label = np.full((ordered[0].shape[1], ordered[0].shape[0], len(ordered)), UNLABELLED, np.uint8)
    outline = {planes[number].file: file for number, file in drawn.items()}
    for k, plane in enumerate(ordered):
        if plane.file in outline:
            label[..., k] = filled(outline[plane.file], plane.shape)
    for folder, voxels in (("images", dicom.stacked(ordered, MAX_RATIO)), ("labels", label)):
        path = to / f"{folder}{part}" / f"{volume}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.Nifti1Image(voxels, affine).to_filename(path)
