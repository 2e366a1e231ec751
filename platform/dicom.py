"""DICOM series to volumes, after the Image Plane Module (DICOM PS3.3, C.7.6.2) and the enhanced objects' functional groups.

A series is named by its folder, or by one of its files where the folder holds several. Its slices are sorted by their place
along the normal of the slice plane, p · (r x c), and stored values become slope · v + intercept. With rows i, columns j:

    world(LPS) = position + j · r · spacing[1] + i · c · spacing[0] + k · n · distance

Refused, because no volume on a straight grid is what was measured: slices that are missing or unevenly spaced (gaps are named),
two at one place, planes or sizes that differ, and a tilted gantry, which shears the slices (dcm2niix straightens them).
Nothing but geometry and pixels is taken over; `patient` gives a hash of the patient's id, which hides it from the eye,
not from who tries all ids.
"""

import hashlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medssl.platform.errors import Problem

if TYPE_CHECKING:
    from pydicom import Dataset

GAP = 1.5  # a distance larger than this times the usual one is a gap
UNEVEN = 0.1  # slices may lie this far from an even grid, in slice distances
SAME_PLACE_MM = 0.01
NAMING = ("SeriesInstanceUID", "SeriesNumber", "PatientID", "PatientName", "PatientBirthDate", "Modality")
TILT = 0.1  # the last slice may be shifted this far against the first, in pixels


@dataclass(frozen=True)
class Plane:
    """Where one slice lies, and how its stored values are meant."""

    file: Path
    frame: int  # in its file
    shape: tuple[int, int]  # rows, columns
    position: NDArray[np.float64]
    axes: NDArray[np.float64]  # (2, 3): along a row, along a column
    spacing: tuple[float, float]  # between rows, between columns
    thickness: float
    slope: float
    intercept: float


def is_marked(path: Path) -> bool:
    """Whether the file carries the mark of DICOM."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def pydicom_or_problem(path: Path) -> Any:
    """The module. Raises Problem where it is not installed."""
    try:
        import pydicom
    except ImportError:
        raise Problem(path, 'pydicom reads this format and is not installed: pip install "medssl[dicom]"') from None
    return pydicom


def header(path: Path) -> "Dataset":
    """All but the pixels. Raises Problem."""
    pydicom = pydicom_or_problem(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that break the standard: we judge those that we use
            said = pydicom.dcmread(path, stop_before_pixels=True)
            for name in NAMING:  # values are parsed when they are asked for
                said.get(name)
        return said
    except Exception as error:  # a parser of bytes that may be anything may raise anything
        raise Problem(path, f"not a whole DICOM file ({reason(error)}); export or copy it again") from error


def reason(error: Exception) -> str:
    return str(error).splitlines()[0].strip() if str(error).strip() else type(error).__name__


def series_in(folder: Path) -> dict[str, dict[Path, "Dataset"]]:
    """Headers of the images in a folder, by SeriesInstanceUID, in the order of series number and UID. Raises Problem."""
    found: dict[str, dict[Path, Dataset]] = {}
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or not file.is_file() or file.name.upper() == "DICOMDIR":
            continue
        if file.suffix.lower() not in (".dcm", ".ima") and not is_marked(file):
            continue
        said = header(file)
        if "Rows" in said:
            found.setdefault(str(said.get("SeriesInstanceUID", "")), {})[file] = said
    return dict(sorted(found.items(), key=lambda each: (number_of(each[1]), each[0])))


def number_of(headers: dict[Path, "Dataset"]) -> int:
    """The series number, 0 where there is none."""
    said = next(iter(headers.values())).get("SeriesNumber")
    return int(said) if str(said or "").lstrip("-").isdecimal() else 0


def patient(said: "Dataset") -> str:
    """A name for the patient that is not his: the hash of PatientID, or of his name and birth date where there is none."""
    identity = str(said.get("PatientID") or f"{said.get('PatientName')} {said.get('PatientBirthDate')}")
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


def place(path: Path) -> tuple[list[Plane], NDArray[np.float64]]:
    """The slices of a series from the first to the last, and the affine. Raises Problem."""
    pydicom_or_problem(path)
    known = series_in(path if path.is_dir() else path.parent)
    if not path.is_dir():
        known = {uid: headers for uid, headers in known.items() if path in headers}
    if not known:
        raise Problem(path, "holds no DICOM image; give the folder of a series")
    if len(known) > 1:
        some = ", ".join(f"{number_of(headers)} ({len(headers)} files)" for headers in known.values())
        raise Problem(path, f"holds {len(known)} series, {some}; expected one; give each a folder of its own")
    try:
        return arrange(path, [plane for file, said in next(iter(known.values())).items() for plane in planes_of(file, said)])
    except Problem:
        raise
    except Exception as error:  # as in `header`: values are parsed when they are asked for
        raise Problem(path, f"not a whole DICOM series ({reason(error)}); export or copy it again") from error


def files_by_place(path: Path) -> list[Path]:
    """The file of each slice of a series, from the first to the last. Raises Problem."""
    return [plane.file for plane in place(path)[0]]


def read_series(path: Path, max_values: int, max_ratio: int) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Voxels (x, y, z) and affine (RAS+). Raises Problem.

    path         the folder of a series, or one file of a series that shares its folder with others
    max_values   bound on rows · columns · slices; `max_ratio` times the file's size bounds what a file may claim
    """
    ordered, affine = place(path)
    rows, columns = ordered[0].shape
    if rows * columns * len(ordered) > max_values or min(rows, columns) < 1:
        raise Problem(path, f"claims {columns} x {rows} x {len(ordered)} voxels; expected 1 to {max_values}; export it again")
    return stacked(ordered, max_ratio), affine


# ---------------------------------------------------------------------------------------------------------------------- places


def planes_of(file: Path, said: "Dataset") -> Iterator[Plane]:
    """The slices of a file: one, or the frames of an enhanced object. Raises Problem where they have no place."""
    frames = int(said.get("NumberOfFrames") or 1)
    groups = said.get("PerFrameFunctionalGroupsSequence")
    if groups is None and frames > 1:
        raise Problem(file, f"{frames} frames without a place for each: a film, not a volume; leave it out")
    if groups is not None and len(groups) != frames:
        raise Problem(file, f"{frames} frames and {len(groups)} places; export it again")
    shared = (said.get("SharedFunctionalGroupsSequence") or [None])[0]

    def of(group: "Dataset | None", sequence: str, name: str) -> Any:
        for place in (group, shared):
            if place is not None and place.get(sequence):
                return place[sequence][0].get(name)
        return said.get(name)

    for frame, group in enumerate(groups if groups is not None else [None]):
        position = of(group, "PlanePositionSequence", "ImagePositionPatient")
        axes = of(group, "PlaneOrientationSequence", "ImageOrientationPatient")
        spacing = of(group, "PixelMeasuresSequence", "PixelSpacing") or said.get("ImagerPixelSpacing")
        flat = groups is None and position is None and axes is None  # a radiograph: a plane without a place in the patient
        if not flat and (position is None or axes is None or spacing is None):
            raise Problem(file, "says no position, orientation or pixel spacing; export the series again with its geometry")
        slope = of(group, "PixelValueTransformationSequence", "RescaleSlope")
        intercept = of(group, "PixelValueTransformationSequence", "RescaleIntercept")
        numbers = [*(position or (0, 0, 0)), *(axes or (1, 0, 0, 0, 1, 0)), *(spacing or (1, 1))]
        values = np.array(numbers, np.float64)
        scale = (1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept))
        if len(values) != 11 or not np.isfinite([*values, *scale]).all() or values[9:].min() <= 0 or scale[0] == 0:
            raise Problem(
                file, f"its geometry or scaling is no finite number: {numbers}, slope and intercept {scale}; export it again"
            )
        thickness = of(group, "PixelMeasuresSequence", "SliceThickness")
        yield Plane(
            file,
            frame,
            (int(said.Rows), int(said.Columns)),
            values[:3],
            values[3:9].reshape(2, 3),
            (values[9], values[10]),
            float(thickness or 1.0),
            *scale,
        )


def arrange(path: Path, planes: list[Plane]) -> tuple[list[Plane], NDArray[np.float64]]:
    """The slices from the first to the last along the normal, and their affine (RAS+). Raises Problem, see above."""
    first = planes[0]
    for plane in planes:
        same = plane.shape == first.shape and np.allclose(plane.spacing, first.spacing, rtol=1e-3)
        if not same or not np.allclose(plane.axes, first.axes, atol=1e-3):
            raise Problem(
                plane.file, f"its size, pixel spacing or plane is not that of {first.file.name}; give them folders of their own"
            )
    normal = np.cross(*first.axes)
    if abs(np.linalg.norm(normal) - 1) > 1e-3 or abs(first.axes[0] @ first.axes[1]) > 1e-3:
        raise Problem(first.file, "its rows and columns are not at right angles; export it again")
    ordered = sorted(planes, key=lambda plane: float(plane.position @ normal))
    places = np.array([plane.position @ normal for plane in ordered])
    step = even_step(path, ordered, places) if len(ordered) > 1 else first.thickness
    check_tilt(path, ordered, places, normal)
    affine = np.eye(4)
    rows_mm, columns_mm = first.spacing
    affine[:3, :3] = np.stack([first.axes[0] * columns_mm, first.axes[1] * rows_mm, normal * step], axis=1)
    affine[:3, 3] = ordered[0].position
    return ordered, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def even_step(path: Path, ordered: list[Plane], places: NDArray[np.float64]) -> float:
    """The distance of the slices. Raises Problem naming a gap, two slices in one place, or the range of uneven distances."""
    steps = np.diff(places)
    usual = float(np.median(steps))

    def between(k: int) -> str:
        one, other = ordered[k], ordered[k + 1]
        return f"{one.file.name} and {other.file.name}" if one.file != other.file else f"frames {one.frame} and {other.frame}"

    if steps.min() < SAME_PLACE_MM:
        pair = between(int(steps.argmin()))
        raise Problem(path, f"{pair} lie at the same place: several times or echoes; give each a folder of its own")
    if steps.max() > GAP * usual:
        k = int(steps.argmax())
        missing = max(round(float(steps[k]) / usual) - 1, 1)
        raise Problem(
            path, f"about {missing} slices are missing between {between(k)} ({steps[k]:.4g} mm); copy the series again"
        )
    if np.abs(places - np.linspace(places[0], places[-1], len(places))).max() > UNEVEN * usual:
        raise Problem(
            path, f"its slices are {steps.min():.4g} to {steps.max():.4g} mm apart; expected even distances; resample it"
        )
    return float(places[-1] - places[0]) / (len(places) - 1)


def check_tilt(path: Path, ordered: list[Plane], places: NDArray[np.float64], normal: NDArray[np.float64]) -> None:
    """Raises Problem where slices are shifted against each other within their plane."""
    way = ordered[-1].position - ordered[0].position
    aside = [
        np.linalg.norm(plane.position - ordered[0].position - (place - places[0]) * normal)
        for plane, place in zip(ordered, places, strict=True)
    ]
    if max(aside) > TILT * min(ordered[0].spacing):
        angle = math.degrees(math.acos(min(1.0, abs(float(way @ normal)) / float(np.linalg.norm(way)))))
        raise Problem(
            path, f"its slices are shifted against each other, as by a gantry tilted by {angle:.3g} degrees; straighten it"
        )


# ---------------------------------------------------------------------------------------------------------------------- pixels


def stacked(ordered: list[Plane], max_ratio: int) -> NDArray[Any]:
    """Values (x, y, z), scaled: int16 or int32 where slopes are 1 and intercepts whole, else float32. Raises Problem."""
    whole = all(plane.slope == 1 and plane.intercept.is_integer() for plane in ordered)
    rows, columns = ordered[0].shape
    volume = np.empty((len(ordered), rows, columns), np.int32 if whole else np.float32)
    decoded: tuple[Path | None, NDArray[Any]] = (None, np.empty(0))
    for k, plane in enumerate(ordered):
        if decoded[0] != plane.file:
            decoded = (plane.file, stored(plane.file, plane.shape, max_ratio))
        scaled = decoded[1][plane.frame].astype(np.float64) * plane.slope + plane.intercept
        volume[k] = np.clip(scaled, *np.array([-(2**31), 2**31 - 1])) if whole else scaled
    if whole and volume.min() >= -(2**15) and volume.max() < 2**15:
        volume = volume.astype(np.int16)
    return volume.transpose(2, 1, 0)


def stored(file: Path, shape: tuple[int, int], max_ratio: int) -> NDArray[Any]:
    """A file's stored values (frames, rows, columns), bright where the body absorbs. Raises Problem."""
    pydicom = pydicom_or_problem(file)
    size = file.stat().st_size
    if math.prod(shape) > max_ratio * size:
        raise Problem(
            file, f"claims {shape[0]} rows of {shape[1]} pixels, which a file of {size} bytes cannot hold; copy it again"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = pydicom.dcmread(file)
            photometric = str(said.get("PhotometricInterpretation"))
            if photometric not in ("MONOCHROME1", "MONOCHROME2") or int(said.get("SamplesPerPixel") or 1) != 1:
                raise Problem(
                    file, f"its pixels are {photometric}; expected MONOCHROME1 or 2; leave it out, or export it as grey"
                )
            values = said.pixel_array
    except Problem:
        raise
    except Exception as error:  # as in `header`
        raise Problem(file, f"its pixels cannot be read ({reason(error)}); export or copy it again") from error
    values = values.reshape(-1, *shape)
    if photometric == "MONOCHROME1":
        top = (1 << int(said.BitsStored)) - 1
        values = -1 - values.astype(np.int64) if int(said.get("PixelRepresentation") or 0) else top - values.astype(np.int64)
    return values
