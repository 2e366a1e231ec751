"""From the scan's own voxel grid to slices that a network sees, and back.

One volume goes through the steps of the CT study (Konieczkowicz 2023, https://github.com/dittohed/exploring-ssl-for-ct,
preprocessing scripts), in its order: axes to RAS, resampling to the preset's spacing, window or percentiles to [0, 1], box of
the foreground, zero padding in the plane, storage type. A slice is the array [R, A]: rows run towards the patient's right,
columns towards anterior; slices are stacked towards superior. What a preset may ask for besides has its place in that order:

    N4 · axes · resampling · body mask · intensities · box with margin · crop and pad to a size · least rows and columns ·
    storage type · neighbouring slices as channels (2.5D) · slices left out

Labels go the same way and come back by `restore`, whatever was asked for. A store of slices serves 2D and 3D training alike:
`platform/volumes.py` stacks them.

What makes it quick, without changing the result:

- axes are permuted and flipped as views, nothing is copied;
- the grid is parallel to the scan's axes, so trilinear interpolation is three linear interpolations, one axis after another;
- an interpolated voxel can exceed a threshold only between two voxels of which one does: what lies farther than one source
  voxel from the foreground is never resampled.

Oblique scans are taken along their closest axes, as MONAI's Orientationd and Spacingd take them: the rotation is kept out of
the resampling, and the spacing is the length of the affine's columns.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import numpy as np
from numpy.typing import NDArray

from medssl.platform import bias, body
from medssl.platform.errors import UsageError
from medssl.platform.find import nearest
from medssl.platform.records import UNLABELLED as UNLABELLED
from medssl.platform.records import DataInfo, Part

CACHED = 1 << 17  # values that are worked on at a time: half a megabyte of float32
SAME_SPACING_MM = 1e-3  # spacings nearer than this are not resampled; MONAI's AFFINE_TOL

Image = NDArray[Any]
Geometry = dict[str, Any]  # JSON-able: what `restore` needs
Side = int | None


@dataclass(frozen=True)
class Preset:
    """How a volume is prepared: every field can be set by `medssl data prepare -o FIELD=VALUE`.

    At most one of `window` and `percentiles` maps intensities to [0, 1]; `zscore` may follow, or stand alone.
    """

    spacing_mm: tuple[float | None, float | None, float | None] | None  # along the stored axes; null: the volume's own
    window: tuple[float, float] | None  # HU
    percentiles: tuple[float, float] | None  # of each channel of each volume
    foreground_box: bool  # keep the box of the foreground: the body mask; else voxels above the lower bound; else not 0
    pad: int  # least rows and columns of a slice, reached by symmetric zero padding; 0: none
    dtype: Literal["uint8", "int16", "float16", "float32"]  # integers hold floor(largest · x)
    orientation: str = "RAS"  # where rows, columns and slices run to
    n4: int = 0  # N4 bias correction, its field fitted on every n-th voxel of each axis; 0: none
    clip: bool = True  # to the window or the percentiles
    zscore: Literal["all", "nonzero"] | None = (
        None  # mean 0, variance 1 per channel and volume; nonzero: zeros stay 0, uncounted
    )
    statistics: Literal["resampled", "scan"] = "resampled"  # whose voxels percentiles and z-scores are taken of
    body_mask: bool = False  # 0 outside the patient; percentiles and z-scores are then of the patient alone
    margin: int = 0  # voxels around the foreground box
    resize: tuple[int, int] | None = None  # rows and columns that every slice is resampled to, whatever its spacing
    size: tuple[Side, Side, Side] | None = None  # rows, columns, slices, by centred crops and zero padding; null: as it is
    neighbours: int = 0  # slices below and as many above as channels after a slice's own (2.5D); the end ones are repeated
    channels: tuple[int, ...] | None = None  # which of the scan's channels, counted from 0; null: all
    classes: tuple[str, ...] | None = None  # which classes, by name, in this order; the others are background; null: all
    slice_content: float = 0.0  # leave out slices of which less than this fraction is above 0 …
    slice_foreground: float = 0.0  # … or less than this fraction is labelled foreground; `may_filter` says of which volumes

    @staticmethod
    def from_json(said: Mapping[str, Any]) -> "Preset":
        """The preset of a manifest: JSON has lists where we have tuples."""
        return Preset(**{key: tuple(value) if isinstance(value, list) else value for key, value in said.items()})  # type: ignore[arg-type]

    @property
    def bounded(self) -> bool:
        """Whether intensities lie in [0, 1]."""
        return self.zscore is None and self.clip

    @property
    def depth(self) -> int:
        """Slices that make up one stored slice."""
        return 2 * self.neighbours + 1

    def __post_init__(self) -> None:
        if (self.window is not None and self.percentiles is not None) or (
            self.window is None and self.percentiles is None and self.zscore is None
        ):
            raise UsageError("preset: set one of window and percentiles, and the other to null; or zscore, and both to null")
        lo, hi = self.window or self.percentiles or (0, 1)
        if not lo < hi or (self.percentiles and not 0 <= lo < hi <= 100):
            raise UsageError(f"preset: ({lo}, {hi}) is not a low and a high bound; percentiles lie in 0..100")
        if self.spacing_mm is not None and (
            len(self.spacing_mm) != 3 or min(1 if mm is None else mm for mm in self.spacing_mm) <= 0
        ):
            raise UsageError(
                f"preset: spacing_mm {self.spacing_mm} should be three positive lengths, along {', '.join(self.orientation)}, "
                "null in place of one that stays as it is, or null alone"
            )
        if self.dtype not in ("uint8", "int16", "float16", "float32") or self.pad < 0:
            raise UsageError(
                f"preset: dtype {self.dtype}, pad {self.pad}; expected uint8, int16, float16 or float32, and pad >= 0"
            )
        if not self.bounded and np.dtype(self.dtype).kind != "f":
            how = "zscore" if self.zscore else "clip=false"
            raise UsageError(f"preset: {how} leaves the range 0 to 1 that {self.dtype} holds; set dtype to float16 or float32")
        if sorted(map("RLAPSI".find, self.orientation)) not in [[r, a, s] for r in (0, 1) for a in (2, 3) for s in (4, 5)]:
            raise UsageError(f'preset: orientation "{self.orientation}" should name each axis once, as RAS, LPS or SAR do')
        if self.size is not None and (
            len(self.size) not in (2, 3) or min(1 if side is None else side for side in self.size) < 1
        ):
            raise UsageError(f"preset: size {self.size} should be rows, columns and slices, null where they stay as they are")
        if self.size is not None and self.pad > min(side or self.pad for side in self.size[:2]):
            raise UsageError(f"preset: pad {self.pad} asks for more than size {self.size} leaves; set pad to 0")
        if self.resize is not None and (len(self.resize) != 2 or min(self.resize) < 1 or any((self.spacing_mm or ())[:2])):
            raise UsageError(f"preset: resize {self.resize} is rows and columns, and takes the place of their spacing_mm")
        if min(self.n4, self.margin, self.neighbours) < 0 or not 0 <= max(self.slice_content, self.slice_foreground) <= 1:
            raise UsageError("preset: n4, margin and neighbours are 0 or more, slice_content and slice_foreground in 0 to 1")
        if self.channels == () or self.classes == ():
            raise UsageError("preset: channels and classes name at least one each, or are null for all")
        if self.margin and not self.foreground_box:
            raise UsageError(
                f"preset: a margin of {self.margin} voxels is around the foreground box; set foreground_box to true"
            )


# The global-local study (Chaitanya 2020, https://arxiv.org/abs/2006.10511), experiment_init/init_*.py: N4 on the whole grid,
# percentiles of the scan without clipping, resampled in the plane, cropped or padded. Ours starts its grid at the first voxel's
# centre, where theirs (scikit-image) aligns the edges: at most half a voxel apart, image and label alike.
GLOBAL_LOCAL = Preset(
    (1.36719, 1.36719, None),
    None,
    (1.0, 99.0),
    foreground_box=False,
    pad=0,
    dtype="float16",
    n4=1,
    clip=False,
    statistics="scan",
    size=(192, 192, None),
)
# contrastyou (Peng, https://github.com/jizongFox/contrastyou): 8-bit slices of the volume's whole range, on its own pixels.
# Its ACDC is cropped to 224 while training; its PROMISE12 is resized to 224, by PIL, which averages where we interpolate.
CONTRASTYOU = Preset(None, None, (0.0, 100.0), foreground_box=False, pad=224, dtype="uint8", statistics="scan")

PRESETS: Mapping[str, Preset] = {
    # The CT study: appendix A of the thesis and its preprocessing scripts. 3.92 HU per level.
    "ct": Preset((1.0, 1.0, 2.5), (-500.0, 500.0), None, foreground_box=True, pad=96, dtype="uint8"),
    # uint8 here too: after clipping to the percentiles a level is 1/255 of the volume's range, and its rounding error (standard
    # deviation 0.1 % of the range) is a tenth of the noise of a magnetic resonance image with a signal-to-noise ratio of 100.
    # It halves disk, memory and transfer against float16.
    "mr": Preset(None, None, (1.0, 99.0), foreground_box=False, pad=0, dtype="uint8"),
    "picture": Preset(None, (0.0, 255.0), None, foreground_box=False, pad=0, dtype="uint8"),  # 8 bits per colour, as they are
    "acdc": GLOBAL_LOCAL,
    "prostate": dataclasses.replace(GLOBAL_LOCAL, spacing_mm=(0.625, 0.625, None)),
    "mmwhs": dataclasses.replace(GLOBAL_LOCAL, spacing_mm=(1.5, 1.5, None), size=(160, 160, None)),
    "acdc-224": CONTRASTYOU,
    "promise12": dataclasses.replace(CONTRASTYOU, pad=0, resize=(224, 224)),
}


def resolve(info: DataInfo, name: str | None = None, changes: Mapping[str, Any] | None = None) -> Preset:
    """The preset a data set asks for, or the named one, with the user's changes. Raises UsageError with the nearest name."""
    import pydantic

    # what a data set changes in its own preset means nothing in another
    merged = {**(info.preset_changes if name in (None, info.preset) else {}), **(changes or {})}
    if (name or info.preset) not in PRESETS:
        raise UsageError(f'no preset "{name or info.preset}"; {nearest(name or info.preset, PRESETS)}')
    known, values = get_type_hints(Preset), {}
    for key, value in merged.items():
        if key not in known:
            raise UsageError(f'preset: no key "{key}"; {nearest(key, known)}')
        if key == "size" and isinstance(value, list | tuple) and len(value) == 2:
            value = (*value, None)
        try:
            values[key] = pydantic.TypeAdapter(known[key]).validate_python(value)
        except pydantic.ValidationError:
            wanted = Preset.__annotations__[key]
            wanted = str(known[key] if not isinstance(wanted, type) else wanted.__name__).replace("typing.", "")
            raise UsageError(f"preset: {key} is {value!r}, expected {wanted}") from None
    return dataclasses.replace(PRESETS[name or info.preset], **values)


def modality(info: DataInfo, name: str | None = None) -> Literal["ct", "mr"]:
    """What the preset of that name (None: the data set's own) is made for: a window in HU suits CT alone."""
    return "ct" if PRESETS[name or info.preset].window else "mr"


def may_filter(labelled: bool, part: Part | None) -> bool:
    """Whether slices may be left out of a volume: the rule that keeps the test part whole.

    Of an official training part, and of volumes that have neither label nor part and so only pretrain. Any other volume may
    come to be tested by some split, and is stored with every slice.
    """
    return part == "train" or (part is None and not labelled)


@dataclass(frozen=True)
class Prepared:
    """A volume as the store holds it."""

    image: Image  # (c, h, w, d), the preset's dtype
    label: NDArray[np.uint8] | None  # (h, w, d)
    spacing_mm: tuple[float, float, float]  # between rows, columns, slices
    geometry: Geometry
    lost: Mapping[str, float] = field(default_factory=dict)  # what rounding and cropping took: `quantise`, `labels_left_out`


def spacing_and_axes(affine: NDArray[Any], towards: str = "RAS") -> tuple[tuple[float, ...], list[tuple[int, bool]]]:
    """Sides of a voxel (mm) along the axes `towards`; and for each, which array axis runs along it and whether backwards.

    Raises ValueError when the affine does not span three dimensions.
    """
    import nibabel

    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    orientation = nibabel.io_orientation(affine) if np.isfinite(affine).all() else np.full((3, 2), np.nan)
    if not np.isfinite(orientation).all() or lengths.min() <= 0:
        raise ValueError(f"its affine {np.asarray(affine)[:3].tolist()} does not span three dimensions; mend the header")
    source = [int(np.flatnonzero(orientation[:, 0] == "RLAPSI".index(letter) // 2)[0]) for letter in towards]
    axes = [(axis, (orientation[axis, 1] < 0) != (letter in "LPI")) for axis, letter in zip(source, towards, strict=True)]
    return tuple(float(lengths[axis]) for axis in source), [(axis, bool(backwards)) for axis, backwards in axes]


def to_ras(array: Image, axes: list[tuple[int, bool]]) -> Image:
    """View of `array` (..., x, y, z) with its last three axes along those that `axes` was made for: R, A, S."""
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

    @staticmethod
    def fit(source: int, target: int) -> "Line":
        """As many outputs as asked for, over the whole axis."""
        return Line(source, source / target, 0, target)

    def around(self, first: int, last: int, margin: int = 0) -> "Line":
        """Only the outputs that source voxels first..last reach by linear interpolation, and `margin` more on either side."""
        start = min(max(int(np.floor((first - 1) / self.step)) - margin, 0), self.stop - 1)
        stop = self.stop if last == self.source - 1 else int(np.ceil((last + 1) / self.step)) + 1 + margin
        return dataclasses.replace(self, start=start, stop=max(start + 1, min(self.stop, stop)))

    @property
    def positions(self) -> NDArray[np.float64]:
        """Where the outputs lie, in source voxels."""
        return np.minimum(np.arange(self.start, self.stop) * self.step, self.source - 1)

    @property
    def reach(self) -> slice:
        """The source voxels that the outputs are made of."""
        if self.step == 1.0:
            return slice(self.start, self.stop)
        first, last = np.floor(self.positions[[0, -1]]).astype(int).tolist()
        return slice(first, min(last + 2, self.source))

    def linear(self, array: Image, axis: int) -> Image:
        """`array` (c, z, y, x), cut to the `reach`, interpolated along `axis`, in float32; itself where nothing moves."""
        if self.step == 1.0:
            return array
        floor = np.floor(self.positions)
        below = floor.astype(np.intp) - self.reach.start
        above = np.minimum(below + 1, array.shape[axis] - 1)
        weight = (self.positions - floor).astype(np.float32)
        out = np.empty((*array.shape[:axis], len(below), *array.shape[axis + 1 :]), np.float32)
        if axis == 1:
            for plane, b, a, w in zip(np.moveaxis(out, 1, 0), below, above, weight, strict=True):
                np.subtract(array[:, a], array[:, b], out=plane, dtype=np.float32)
                plane *= w
                plane += array[:, b]
            return out
        weight = weight.reshape(-1, *(1,) * (array.ndim - axis - 1))
        for some in runs(len(array[0]), array[:, 0].size):
            part = array[:, some]
            value = part.take(below, axis).astype(np.float32, copy=False)
            step = part.take(above, axis).astype(np.float32, copy=False)
            step -= value
            step *= weight
            np.add(step, value, out=out[:, some])
        return out

    def nearest(self, array: Image, axis: int) -> Image:
        """`array`, cut to the `reach`, at the nearest voxel along `axis`; ties go to the even one, as in grid_sample."""
        if self.step == 1.0:
            return array
        return array.take(np.rint(self.positions).astype(np.intp) - self.reach.start, axis)


def runs(slices: int, values: int) -> Iterator[slice]:
    """All slices of so many values each, a few at a time: what is done to them stays in the processor's cache."""
    some = max(CACHED // max(values, 1), 1)
    return (slice(first, min(first + some, slices)) for first in range(0, slices, some))


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


def extent(image: Image, lo: NDArray[np.float32]) -> list[tuple[int, int]]:
    """The `bounds` of the voxels of (c, …) above `lo`, one for each, in any channel; NaN stands for those that are not 0."""
    slowest = int(np.argmax(np.abs(image.strides[1:])))  # plane by plane as they lie in memory
    whole = image.dtype.kind in "iu"  # compared as integers, which is quicker
    least = [None if np.isnan(each) else math.floor(each) if whole else each for each in lo.ravel()]
    along, across = [], np.zeros(np.delete(image.shape[1:], slowest), bool)
    for planes in np.moveaxis(image, 1 + slowest, 0):
        hits = [plane != 0 if bound is None else plane > bound for plane, bound in zip(planes, least, strict=True)]
        hit = functools.reduce(np.logical_or, hits)
        across |= hit
        along.append(hit.any())
    ends = bounds(across)
    ends.insert(slowest, *bounds(np.array(along)))
    return ends


@dataclass(frozen=True)
class Scale:
    """What makes intensities of stored voxels: x = (voxel - lo) / (hi - lo), clipped, and its z-score; (c, 1, 1, 1) each."""

    lo: NDArray[np.float32]
    hi: NDArray[np.float32]
    mean: NDArray[np.float32] | None = None  # of x
    sd: NDArray[np.float32] | None = None

    @staticmethod
    def of(image: Image, preset: Preset, inside: NDArray[np.bool_] | None) -> "Scale":
        """Learnt from an image (c, h, w, d), of its voxels `inside` (h, w, d) alone where there is a body mask.

        Raises ValueError where all are one value.
        """
        pairs = [np.asarray(preset.window or (0, 1))] * len(image)
        if preset.percentiles is not None:
            pairs = [np.percentile(channel if inside is None else channel[inside], preset.percentiles) for channel in image]
        lo, hi = np.asarray(pairs, np.float32).T.reshape(2, -1, 1, 1, 1)
        if not (lo < hi).all():
            raise ValueError(f"percentiles {preset.percentiles} of its voxels are one value; widen preset.percentiles")
        scale = Scale(lo, hi)
        if preset.zscore is None:
            return scale
        found = []
        for channel, x in zip(image, scale.unit(image, preset), strict=True):
            chosen = inside if inside is not None else channel != 0 if preset.zscore == "nonzero" else np.ones(x.shape, bool)
            found.append(moments(x, chosen))
        mean, sd = np.asarray(found, np.float32).T.reshape(2, -1, 1, 1, 1)
        if not (sd > 0).all():
            raise ValueError(
                "the voxels that its z-score is taken of are one value; leave preset.zscore out, or widen the window"
            )
        return Scale(lo, hi, mean, sd)

    def unit(self, image: Image, preset: Preset) -> NDArray[np.float32]:
        """Before the z-score; without bounds the voxels themselves."""
        if preset.window is None and preset.percentiles is None:
            return image.astype(np.float32)
        scaled = np.subtract(image, self.lo, dtype=np.float32)
        scaled /= self.hi - self.lo
        if preset.clip:
            np.clip(scaled, 0, 1, out=scaled)
        return scaled

    def apply(self, image: Image, preset: Preset, inside: NDArray[np.bool_] | None) -> NDArray[np.float32]:
        """What the network is to see, before it is stored; 0 outside the body and, if asked for, where the scan is 0."""
        scaled = self.unit(image, preset)
        if self.mean is not None and self.sd is not None:
            scaled -= self.mean
            scaled /= self.sd
            if preset.zscore == "nonzero":
                scaled[image == 0] = 0
        if inside is not None:
            scaled *= inside
        return scaled


def moments(x: NDArray[np.float32], chosen: NDArray[np.bool_]) -> tuple[float, float]:
    """Mean and standard deviation of the chosen voxels, in double precision, slice by slice for the memory's sake."""
    planes = [x[..., k][chosen[..., k]] for k in range(x.shape[-1])]
    count = max(sum(map(len, planes)), 1)
    mean = sum(float(plane.sum(dtype=np.float64)) for plane in planes) / count
    squares = sum(float(np.square(plane.astype(np.float64) - mean).sum()) for plane in planes)
    return mean, float(np.sqrt(squares / count))


def quantise(scaled: NDArray[np.float32], dtype: str) -> tuple[Image, float, float]:
    """Intensities as stored; how far they are from that at most, and the sum of the squares. Overwrites `scaled`.

    Integers are floor(largest · x), as in the CT study's PNGs; the distances are then in levels.
    """
    if dtype.startswith("float"):
        stored = scaled.astype(dtype)
        scaled -= stored
    else:
        scaled *= np.float32(np.iinfo(dtype).max)
        whole = np.floor(scaled)
        stored = whole.astype(dtype)
        scaled -= whole
    flat = scaled.ravel(order="K")
    return stored, float(max(flat.max(), -flat.min())), float(np.vdot(flat, flat))


def store(
    image: Image, scale: Scale, preset: Preset, inside: NDArray[np.bool_] | None, pad: list[tuple[int, int]]
) -> tuple[Image, dict[str, float]]:
    """Slices (d, c, h, w) of an image (c, h, w, d), scaled, rounded and padded; and what the rounding took.

    The distances are in the unit of the scaled intensities: the greatest, and the square root of the mean square.
    """
    c, h, w, d = image.shape
    (up, down), (left, right), (under, over) = pad
    stored = np.zeros((under + d + over, c, up + h + down, left + w + right), preset.dtype)
    held = stored[under : under + d, :, up : up + h, left : left + w]
    most, squares = 0.0, 0.0
    for some in runs(d, c * h * w):
        scaled = scale.apply(image[..., some], preset, None if inside is None else inside[..., some])
        reach = float(max(scaled.max(), -scaled.min())) if preset.dtype == "float16" else 0.0
        if reach > float(np.finfo(np.float16).max):
            raise ValueError(f"its intensities reach {reach:g}, more than float16 holds; set preset.dtype to float32")
        block, farthest, square = quantise(scaled, preset.dtype)
        held[some] = np.moveaxis(block, -1, 0)
        most, squares = max(most, farthest), squares + square
    largest = 1 if preset.dtype.startswith("float") else np.iinfo(preset.dtype).max
    return stored, {"rounding_max": most / largest, "rounding_rms": float(np.sqrt(squares / image.size)) / largest}


def grid(shape: tuple[int, ...], from_mm: tuple[float, ...], preset: Preset) -> list[Line]:
    """How each stored axis is resampled from a scan of this shape and spacing, both along the stored axes."""
    to_mm = [wanted or own for wanted, own in zip(preset.spacing_mm or (None,) * 3, from_mm, strict=True)]
    lines = [Line.whole(*each) for each in zip(shape, from_mm, to_mm, strict=True)]
    return [*map(Line.fit, shape[:2], preset.resize), lines[2]] if preset.resize else lines


def stored_spacing(lines: list[Line], from_mm: tuple[float, ...], preset: Preset) -> tuple[float, ...]:
    """Sides of a stored voxel: what was asked for to the last digit, the scan's own where nothing was resampled."""
    to_mm = preset.spacing_mm or (None,) * 3
    return tuple(
        mm if line.step == 1.0 else wanted or mm * line.step for mm, line, wanted in zip(from_mm, lines, to_mm, strict=True)
    )


def peak_bytes(voxels: int, affine: NDArray[Any], shape: tuple[int, ...], channels: int, preset: Preset) -> int:
    """About the most memory that preparing a scan takes, itself included; `voxels` are the bytes of one as it was read.

    Measured (tests/test_preparation.py): the scan; of its resampling, each axis in turn, the array before and after; what is
    stored, twice where slices are put beside each other; more for a body mask, a z-score, and statistics of the scan itself.
    """
    from_mm, axes = spacing_and_axes(affine, preset.orientation)
    lines = grid(tuple(shape[axis] for axis, _ in axes), from_mm, preset)
    source, steps = float(np.prod(shape)), [line.stop / line.source for line in lines]
    most, size = 0.0, source
    for step in sorted(step for step, line in zip(steps, lines, strict=True) if line.step != 1.0):
        most, size = max(most, size + size * step), size * step
    scan = 4 * source if preset.n4 or preset.statistics == "scan" else 0
    percentiles = voxels * source if preset.percentiles else 0  # numpy sorts a copy
    beside = 12 * preset.body_mask + 12 * (preset.zscore is not None)
    held = (preset.depth + (preset.depth > 1)) * np.dtype(preset.dtype).itemsize
    return (1 << 22) + int(channels * (source * voxels + scan + percentiles + 4 * most + (beside + held) * size))


def prepare(
    image: Image,
    affine: NDArray[Any],
    label: Image | None,
    preset: Preset,
    *,
    filtered: bool = False,
    cache: Path | None = None,
) -> Prepared:
    """One scan, prepared.

    image    (c, x, y, z), any real dtype, finite
    affine   (4, 4), voxels to millimetres in RAS+ world space, as nibabel gives it
    label    (x, y, z) class ids that fit uint8, on the same grid, or None
    filtered whether the preset's slice filters apply: `may_filter` has the rule
    cache    a file that keeps the bias-corrected scan
    Raises ValueError with the reason when the affine is singular, nothing is foreground, or the intensities are all one.
    """
    if preset.channels is not None:
        if not 0 <= min(preset.channels) <= max(preset.channels) < len(image):
            raise ValueError(f"has {len(image)} channels, numbered from 0; preset.channels asks for {preset.channels}")
        image = image[list(preset.channels)]
    if preset.n4:
        image = bias.cached(image, tuple(np.linalg.norm(affine[:3, :3], axis=0)), preset.n4, cache)
    from_mm, axes = spacing_and_axes(affine, preset.orientation)
    scan, scan_label = to_ras(image, axes), None if label is None else to_ras(label, axes)
    lines = grid(scan.shape[1:], from_mm, preset)
    whole = [line.stop for line in lines]
    if preset.foreground_box and preset.window:
        box = extent(scan, np.full(len(scan), preset.window[0], np.float32))
        lines = [line.around(*ends, preset.margin) for line, ends in zip(lines, box, strict=True)]
    image, label = resample(scan, scan_label, lines)
    spacing_mm = stored_spacing(lines, from_mm, preset)
    inside = patient(image, spacing_mm, preset)
    if preset.statistics == "scan":
        scale = Scale.of(scan, preset, patient(scan, from_mm, preset))
    else:
        scale = Scale.of(image, preset, inside)

    first, size, wanted = place(image, scale, preset, inside)
    cut: tuple[Any, ...] = (..., *(slice(at, at + n) for at, n in zip(first, size, strict=True)))
    image, label = image[cut], None if label is None else label[cut]
    pad = [((n := side - have) // 2, n - n // 2) for side, have in zip(wanted, size, strict=True)]
    stored, lost = store(image, scale, preset, None if inside is None else inside[cut], pad)
    if label is not None:
        (up, _), (left, _), (under, _) = pad
        whole_label = np.zeros((len(stored), *stored.shape[2:]), np.uint8)
        whole_label[under : under + size[2], up : up + size[0], left : left + size[1]] = np.moveaxis(label, -1, 0)
        label = np.moveaxis(whole_label, 0, -1)
    geometry = {
        "axes": [[axis, backwards] for axis, backwards in axes],
        "source": [line.source for line in lines],
        "step": [line.step for line in lines],
        "grid": whole,
        "start": [line.start + at for line, at in zip(lines, first, strict=True)],
        "size": size,
        "pad": [before for before, _ in pad],
    }
    if scan_label is not None:
        lost |= labels_left_out(scan_label, geometry)
    kept = filter_slices(stored, label, preset) if filtered else None
    if preset.neighbours:
        reach = sorted(range(-preset.neighbours, preset.neighbours + 1), key=lambda by: (by != 0, by))
        stored = np.concatenate([stored[np.clip(np.arange(len(stored)) + by, 0, len(stored) - 1)] for by in reach], axis=1)
    if kept is not None:
        geometry |= {"kept": kept.tolist(), "slices": len(stored)}
        stored, label = stored[kept], None if label is None else label[..., kept]
    return Prepared(np.moveaxis(stored, 0, -1), label, spacing_mm, geometry, lost)  # type: ignore[arg-type]


def resample(image: Image, label: Image | None, lines: list[Line]) -> tuple[Image, Image | None]:
    """Image (c, x, y, z) and label (x, y, z) along all three lines.

    What no output is made of is cut off; then the axis that shrinks most goes first, so that the others have less to do. NIfTI
    files count x fastest: seen from their end, the axes are in the order of the memory, and interpolating along one copies
    whole runs of the others.
    """
    reach = tuple(line.reach for line in reversed(lines))
    image, label = image.transpose(0, 3, 2, 1)[:, *reach], None if label is None else label.T[reach]
    for axis in sorted(range(3), key=lambda axis: (lines[axis].stop - lines[axis].start) / lines[axis].source):
        image = lines[axis].linear(image, 3 - axis)
        label = None if label is None else lines[axis].nearest(label, 2 - axis)
    return image.transpose(0, 3, 2, 1), None if label is None else label.T


def patient(image: Image, spacing_mm: tuple[float, ...], preset: Preset) -> NDArray[np.bool_] | None:
    """The body mask (h, w, d), found in the first channel, where the preset asks for one."""
    return body.body(image[0], preset.window[0] if preset.window else None, spacing_mm) if preset.body_mask else None


def place(
    image: Image, scale: Scale, preset: Preset, inside: NDArray[np.bool_] | None
) -> tuple[list[int], list[int], list[int]]:
    """What is kept of a resampled volume: the first voxel and the length along each axis, and the length after padding."""
    first, size = [0, 0, 0], list(image.shape[1:])
    if preset.foreground_box:
        lo = scale.lo if preset.window or preset.percentiles else np.full_like(scale.lo, np.nan)
        ends = bounds(inside) if inside is not None else extent(image, lo)
        first = [max(begin - preset.margin, 0) for begin, _ in ends]
        size = [min(end + preset.margin + 1, n) - at for at, (_, end), n in zip(first, ends, size, strict=True)]
    wanted = [side or n for side, n in zip(preset.size or (None,) * 3, size, strict=True)]
    first = [at + max(n - side, 0) // 2 for at, n, side in zip(first, size, wanted, strict=True)]
    size = [min(n, side) for n, side in zip(size, wanted, strict=True)]
    return first, size, [max(side, least) for side, least in zip(wanted, (preset.pad, preset.pad, 0), strict=True)]


def filter_slices(stored: Image, label: NDArray[np.uint8] | None, preset: Preset) -> NDArray[np.int64] | None:
    """Which slices of (d, c, h, w) hold enough; None: all of them. Raises ValueError when none does."""
    enough = np.ones(len(stored), bool)
    if preset.slice_content:
        enough &= (stored > 0).any(axis=1).mean(axis=(1, 2)) >= preset.slice_content
    if preset.slice_foreground and label is not None:
        enough &= ((label > 0) & (label != UNLABELLED)).mean(axis=(0, 1)) >= preset.slice_foreground
    if not enough.any():
        raise ValueError("no slice of it passes preset.slice_content and preset.slice_foreground; ask for less")
    return None if enough.all() else np.flatnonzero(enough)


def covered(geometry: Geometry, axis: int) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """For each of the scan's voxels along a stored axis: its nearest output, counted from the first kept; and if it is kept."""
    step, size, start = geometry["step"][axis], geometry["size"][axis], geometry["start"][axis]
    nearest_output = np.minimum(np.rint(np.arange(geometry["source"][axis]) / step), geometry["grid"][axis] - 1)
    outputs = nearest_output.astype(np.intp) - start
    return outputs, (outputs >= 0) & (outputs < size)


def labels_left_out(label: Image, geometry: Geometry) -> dict[str, float]:
    """Voxels of the scan's foreground that the box and the crop cut off, and how many there are, where any are cut off."""
    held = [np.flatnonzero(covered(geometry, axis)[1]) for axis in range(3)]
    if all(len(each) == n for each, n in zip(held, label.shape, strict=True)):
        return {}
    part = label[tuple(slice(each[0], each[-1] + 1) if len(each) else slice(0) for each in held)]
    total, left = (int(np.count_nonzero(a)) - int(np.count_nonzero(a == UNLABELLED)) for a in (label, part))
    return {"label_voxels": total - left, "label_voxels_of": total} if left < total else {}


def restore(labels: NDArray[np.uint8], geometry: Geometry) -> NDArray[np.uint8]:
    """Labels (d, h, w) on the prepared grid, put back into the scan's own voxels (x, y, z) by nearest neighbour.

    What the foreground box, a crop or a slice filter left out is background.
    """
    if "kept" in geometry:
        some, labels = labels, np.zeros((geometry["slices"], *labels.shape[1:]), labels.dtype)
        labels[geometry["kept"]] = some
    volume = labels.transpose(1, 2, 0)
    for axis in range(3):
        outputs, inside = covered(geometry, axis)
        volume = volume.take(np.where(inside, outputs + geometry["pad"][axis], 0), axis)
        volume[(slice(None),) * axis + (~inside,)] = 0
    return np.ascontiguousarray(from_ras(volume, [(axis, backwards) for axis, backwards in geometry["axes"]]))
