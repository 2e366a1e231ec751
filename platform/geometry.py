"""From the scan's own voxel grid to slices that a network sees, and back.

One volume goes through the steps of the CT study (Konieczkowicz 2023, https://github.com/dittohed/exploring-ssl-for-ct,
preprocessing scripts), in its order: axes to RAS, resampling to the preset's spacing, window or percentiles to [0, 1], box of
the foreground, zero padding in the plane, storage type. A slice is the array [R, A]: rows run towards the patient's right,
columns towards anterior; slices are stacked towards superior.

What makes it quick, without changing the result:

- axes are permuted and flipped as views, nothing is copied;
- the grid is parallel to the scan's axes, so trilinear interpolation is three linear interpolations, one axis after another;
- an interpolated voxel can exceed a threshold only between two voxels of which one does: what lies farther than one source
  voxel from the foreground is never resampled.

Oblique scans are taken along their closest axes, as MONAI's Orientationd and Spacingd take them: the rotation is kept out of
the resampling, and the spacing is the length of the affine's columns.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medssl.platform.errors import UsageError
from medssl.platform.find import nearest
from medssl.platform.records import UNLABELLED as UNLABELLED
from medssl.platform.records import DataInfo

SAME_SPACING_MM = 1e-3  # spacings nearer than this are not resampled; MONAI's AFFINE_TOL

Image = NDArray[Any]
Geometry = dict[str, Any]  # JSON-able: what `restore` needs


@dataclass(frozen=True)
class Preset:
    """How a volume is prepared. Exactly one of `window` and `percentiles` maps intensities to [0, 1]; both clip."""

    spacing_mm: tuple[float, float, float] | None  # along R, A, S; None: the volume's own
    window: tuple[float, float] | None  # HU
    percentiles: tuple[float, float] | None  # of each channel of each volume, after resampling
    foreground_box: bool  # keep the box of voxels above 0, margin 0
    pad: int  # least rows and columns of a slice, reached by symmetric zero padding; 0: none
    dtype: Literal["uint8", "int16", "float16"]  # integers hold floor(largest · x)

    @staticmethod
    def from_json(said: Mapping[str, Any]) -> "Preset":
        """The preset of a manifest: JSON has lists where we have tuples."""
        return Preset(**{key: tuple(value) if isinstance(value, list) else value for key, value in said.items()})  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        if (self.window is None) == (self.percentiles is None):
            raise UsageError("preset: set one of window and percentiles, and the other to null")
        lo, hi = self.window or self.percentiles or (0, 0)
        if not lo < hi or (self.percentiles and not 0 <= lo < hi <= 100):
            raise UsageError(f"preset: ({lo}, {hi}) is not a low and a high bound; percentiles lie in 0..100")
        if self.spacing_mm is not None and (len(self.spacing_mm) != 3 or min(self.spacing_mm) <= 0):
            raise UsageError(f"preset: spacing_mm {self.spacing_mm} should be three positive lengths, along R, A, S, or null")
        if self.dtype not in ("uint8", "int16", "float16") or self.pad < 0:
            raise UsageError(f"preset: dtype {self.dtype}, pad {self.pad}; expected uint8, int16 or float16, and pad >= 0")


PRESETS: Mapping[str, Preset] = {
    # The CT study: appendix A of the thesis and its preprocessing scripts. 3.92 HU per level.
    "ct": Preset((1.0, 1.0, 2.5), (-500.0, 500.0), None, foreground_box=True, pad=96, dtype="uint8"),
    # uint8 here too: after clipping to the percentiles a level is 1/255 of the volume's range, and its rounding error (standard
    # deviation 0.1 % of the range) is a tenth of the noise of a magnetic resonance image with a signal-to-noise ratio of 100.
    # It halves disk, memory and transfer against float16.
    "mr": Preset(None, None, (1.0, 99.0), foreground_box=False, pad=0, dtype="uint8"),
}


def resolve(info: DataInfo, name: str | None = None, changes: Mapping[str, Any] | None = None) -> Preset:
    """The preset a data set asks for, or the named one, with the user's changes. Raises UsageError with the nearest name."""
    # what a data set changes in its own preset means nothing in another
    merged = {**(info.preset_changes if name in (None, info.preset) else {}), **(changes or {})}
    known = [field.name for field in dataclasses.fields(Preset)]
    for key in merged:
        if key not in known:
            raise UsageError(f'preset: no key "{key}"; {nearest(key, known)}')
    if (name or info.preset) not in PRESETS:
        raise UsageError(f'no preset "{name or info.preset}"; {nearest(name or info.preset, PRESETS)}')
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in merged.items()}
    return dataclasses.replace(PRESETS[name or info.preset], **values)


@dataclass(frozen=True)
class Prepared:
    """A volume as the store holds it."""

    image: Image  # (c, h, w, d), the preset's dtype
    label: NDArray[np.uint8] | None  # (h, w, d)
    spacing_mm: tuple[float, float, float]  # between rows, columns, slices
    geometry: Geometry


def spacing_and_axes(affine: NDArray[Any]) -> tuple[tuple[float, ...], list[tuple[int, bool]]]:
    """Sides of a voxel (mm) along R, A, S; and for each of these, which array axis runs along it and whether backwards.

    Raises ValueError when the affine does not span three dimensions.
    """
    import nibabel

    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    orientation = nibabel.io_orientation(affine) if np.isfinite(affine).all() else np.full((3, 2), np.nan)
    if not np.isfinite(orientation).all() or lengths.min() <= 0:
        raise ValueError(f"its affine {np.asarray(affine)[:3].tolist()} does not span three dimensions; mend the header")
    source = [int(np.flatnonzero(orientation[:, 0] == axis)[0]) for axis in range(3)]
    axes = [(axis, bool(orientation[axis, 1] < 0)) for axis in source]
    return tuple(float(lengths[axis]) for axis in source), axes


def to_ras(array: Image, axes: list[tuple[int, bool]]) -> Image:
    """View of `array` (..., x, y, z) with its last three axes along R, A, S."""
    lead = array.ndim - 3
    flips: tuple[Any, ...] = (..., *(slice(None, None, -1 if backwards else 1) for _, backwards in axes))
    return array.transpose(*range(lead), *(lead + axis for axis, _ in axes))[flips]


def from_ras(array: Image, axes: list[tuple[int, bool]]) -> Image:
    """View of `array` (R, A, S) in the voxel order of the scan: the inverse of `to_ras`."""
    flipped = array[tuple(slice(None, None, -1 if backwards else 1) for _, backwards in axes)]
    return flipped.transpose(*np.argsort([axis for axis, _ in axes]))


@dataclass(frozen=True)
class Line:
    """One axis of the resampling: output voxel k lies at source voxel k · step, both counted from the same first centre.

    This is MONAI's Spacingd with its defaults (scale_extent=False, padding_mode="border"): the first voxel's centre stays where
    it is, and what lies beyond the last one repeats it.
    """

    source: int  # voxels before
    step: float  # source voxels per output voxel; 1: not resampled
    start: int  # first output voxel that is computed …
    stop: int  # … and the end, exclusive

    @staticmethod
    def whole(source: int, from_mm: float, to_mm: float) -> "Line":
        step = 1.0 if abs(from_mm - to_mm) <= SAME_SPACING_MM else to_mm / from_mm
        return Line(source, step, 0, round((source - 1) / step + 1))

    def around(self, first: int, last: int) -> "Line":
        """Only the outputs that source voxels first..last reach by linear interpolation."""
        start = min(max(int(np.floor((first - 1) / self.step)), 0), self.stop - 1)
        stop = self.stop if last == self.source - 1 else int(np.ceil((last + 1) / self.step)) + 1
        return dataclasses.replace(self, start=start, stop=max(start + 1, min(self.stop, stop)))

    @property
    def positions(self) -> NDArray[np.float64]:
        """Where the outputs lie, in source voxels."""
        return np.minimum(np.arange(self.start, self.stop) * self.step, self.source - 1)

    def linear(self, array: Image, axis: int) -> Image:
        """`array` interpolated along `axis`, in float32 (a plain cut where nothing moves)."""
        cut = (slice(None),) * axis
        if self.step == 1.0:
            return array[(*cut, slice(self.start, self.stop))]
        below = np.floor(self.positions).astype(np.intp)
        weight = (self.positions - below).astype(np.float32).reshape(-1, *(1,) * (array.ndim - axis - 1))
        first, last = int(below[0]), min(int(below[-1]) + 1, self.source - 1)
        array = array[(*cut, slice(first, last + 1))].astype(np.float32, copy=False)
        value = array.take(below - first, axis)
        above = array.take(np.minimum(below + 1, last) - first, axis)
        above -= value
        above *= weight
        above += value
        return above

    def nearest(self, array: Image, axis: int) -> Image:
        """`array` at the nearest source voxel along `axis`; ties go to the even one, as in grid_sample."""
        index = np.rint(self.positions).astype(np.intp)
        return array[(*(slice(None),) * axis, slice(index[0], index[-1] + 1))].take(index - index[0], axis)


def bounds(mask: NDArray[Any]) -> list[tuple[int, int]]:
    """First and last index of the true voxels along each axis. Raises ValueError when there is none."""
    found = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if not len(hit):
            raise ValueError(
                "no voxel lies above the lower bound of its intensities; is the preset the right one for this modality?"
            )
        found.append((int(hit[0]), int(hit[-1])))
    return found


def intensity_range(image: Image, preset: Preset) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What becomes 0 and what becomes 1 in each channel, shape (c, 1, 1, 1). Raises ValueError where they are the same."""
    if preset.percentiles is not None:
        pairs = [np.percentile(channel, preset.percentiles) for channel in image]
    else:
        pairs = [np.asarray(preset.window)] * len(image)
    lo, hi = np.asarray(pairs, np.float32).T.reshape(2, -1, 1, 1, 1)
    if not (lo < hi).all():
        raise ValueError(f"percentiles {preset.percentiles} of its voxels are one value; widen preset.percentiles")
    return lo, hi


def quantise(image: Image, lo: NDArray[np.float32], hi: NDArray[np.float32], dtype: str) -> Image:
    """x = clip((image - lo) / (hi - lo), 0, 1) as stored; integers are floor(largest · x), as in the CT study's PNGs."""
    scaled = np.subtract(image, lo, dtype=np.float32)
    scaled /= hi - lo
    np.clip(scaled, 0, 1, out=scaled)
    if dtype != "float16":
        scaled *= np.iinfo(dtype).max
    return scaled.astype(dtype)


def prepare(image: Image, affine: NDArray[Any], label: Image | None, preset: Preset) -> Prepared:
    """One scan, prepared.

    image    (c, x, y, z), any real dtype, finite
    affine   (4, 4), voxels to millimetres in RAS+ world space, as nibabel gives it
    label    (x, y, z) class ids that fit uint8, on the same grid, or None
    Raises ValueError with the reason when the affine is singular, nothing is foreground, or the intensities are all one.
    """
    from_mm, axes = spacing_and_axes(affine)
    image, label = to_ras(image, axes), None if label is None else to_ras(label, axes)
    to_mm = preset.spacing_mm or from_mm
    lines = [Line.whole(*each) for each in zip(image.shape[1:], from_mm, to_mm, strict=True)]
    grid = [line.stop for line in lines]
    if preset.foreground_box and preset.window:
        box = bounds(np.any(image > preset.window[0], axis=0))
        lines = [line.around(*ends) for line, ends in zip(lines, box, strict=True)]

    # The axis that shrinks most goes first, so that the others have less to do. NIfTI files count x fastest: seen from their
    # end, the axes are in the order of the memory, and interpolating along one copies whole runs of the others.
    image, label = image.transpose(0, 3, 2, 1), None if label is None else label.T
    for axis in sorted(range(3), key=lambda axis: (lines[axis].stop - lines[axis].start) / lines[axis].source):
        image = lines[axis].linear(image, 3 - axis)
        label = None if label is None else lines[axis].nearest(label, 2 - axis)
    image, label = image.transpose(0, 3, 2, 1), None if label is None else label.T
    lo, hi = intensity_range(image, preset)
    start = [line.start for line in lines]
    if preset.foreground_box:
        box = bounds(np.any(image > lo, axis=0))
        cut: tuple[Any, ...] = (..., *(slice(first, last + 1) for first, last in box))
        image, label = image[cut], None if label is None else label[cut]
        start = [first_computed + first for first_computed, (first, _) in zip(start, box, strict=True)]

    size = image.shape[1:]
    pad = [((n := max(preset.pad - side, 0)) // 2, n - n // 2) for side in size[:2]] + [(0, 0)]
    stored = np.moveaxis(quantise(image, lo, hi, preset.dtype), -1, 0)  # (d, c, h, w): one slice after another
    return Prepared(
        image=np.moveaxis(np.pad(stored, [(0, 0), (0, 0), *pad[:2]]), 0, -1),
        label=None if label is None else np.pad(label.astype(np.uint8), pad),
        spacing_mm=tuple(mm if line.step == 1.0 else to for mm, to, line in zip(from_mm, to_mm, lines, strict=True)),  # type: ignore
        geometry={
            "axes": [[axis, backwards] for axis, backwards in axes],
            "source": [line.source for line in lines],
            "step": [line.step for line in lines],
            "grid": grid,
            "start": start,
            "size": list(size),
            "pad": [before for before, _ in pad],
        },
    )


def restore(labels: NDArray[np.uint8], geometry: Geometry) -> NDArray[np.uint8]:
    """Labels (d, h, w) on the prepared grid, put back into the scan's own voxels (x, y, z) by nearest neighbour.

    What the foreground box left out is background.
    """
    volume = labels.transpose(1, 2, 0)
    for axis in range(3):
        step, size, start = geometry["step"][axis], geometry["size"][axis], geometry["start"][axis]
        outputs = (
            np.minimum(np.rint(np.arange(geometry["source"][axis]) / step), geometry["grid"][axis] - 1).astype(np.intp) - start
        )
        inside = (outputs >= 0) & (outputs < size)
        volume = volume.take(np.where(inside, outputs + geometry["pad"][axis], 0), axis)
        volume[(slice(None),) * axis + (~inside,)] = 0
    return np.ascontiguousarray(from_ras(volume, [(axis, backwards) for axis, backwards in geometry["axes"]]))
