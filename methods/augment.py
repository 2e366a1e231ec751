"""The geometry and intensity chain of the CT study: one fused, batched pipeline on the device of the slices.

Konieczkowicz, "Exploring self-supervised learning for CT", MSc thesis, AGH Kraków, 2023, section 4; its code gives the order
and the probabilities (`settings.Chain`): zoom, flips, quarter turns, intensity scale, shift, blur, noise.

Whatever the chain does along one axis is linear and local: an output row is a weighted sum of a few input rows. Zoom takes
2 (bilinear) or 1 (nearest), a flip reverses which ones, the resize of a random-resized box as many as it shrinks, the blur 13.
So one primitive carries everything: `_mix` applies such taps to the rows of a whole batch, the axes come to the front in
turn, and only zoomed or resized samples are interpolated, once: for the others each output pixel has one tap of weight 1
and a view is an exact permutation of pixels. A quarter turn is flips and a transposition of the first two axes.

    image    (n, c, *spatial)     2D or 3D, any storage dtype      view     (n, c, s, s[, s])   float32 intensities
    corner   (n, D) int64         first pixel of the source box    extent   (n, D) int64        its sides, pixels

Pixel centres. Zoom is MONAI's `RandZoom(mode="bilinear", padding_mode="constant", keep_size=True)` to the last pixel: a patch
of s pixels becomes m = floor(s z), pixel e of it is read at (e + 1/2) s/m - 1/2, and the result is cut or zero-padded back
to s. Where s - m is odd MONAI rounds the middle, and the patch moves by half a zoomed pixel; this is kept, so that views
equal the study's. Labels take the pixel that holds the same point ("nearest-exact"), so that they stay under their image.
A box is resized as by `interpolate(mode="bilinear", antialias=True)`, which is what RandomResizedCrop means in torchvision
and PIL: bilinear when it grows, a tent as wide as the step when it shrinks. A zoom on top composes into the same resample.

Fine-tuning applies the intensities before the geometry. Its chain has no zoom, and without one the order cannot be told:
scale and shift are pointwise, and blur and noise are drawn alike for every axis and pixel.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from medssl.methods.protocol import UNLABELLED, intensities
from medssl.methods.settings import Chain

TAIL = 4.0  # the blur's kernel ends at this many sigma, as MONAI's
PART = 32  # patches resampled together on a CPU


@dataclass(frozen=True)
class Geometry:
    """What happens to each of n patches, in this order."""

    zoom: Tensor  # (n,) float32: above 1 enlarges; 1 where none was drawn
    flips: Tensor  # (n, D) bool: axes to reverse
    turns: Tensor  # (n,) int64 in 0..3: quarter turns in the plane of the first two axes, as `torch.rot90`


@dataclass(frozen=True)
class Pair:
    """Two views of m unlabelled crops that differ in intensities and by a geometry T."""

    image: Tensor  # (m, c, s, s[, s]) float32: x
    moved: Tensor  # (m, c, s, s[, s]) float32: T x, with intensities of its own
    geometry: Geometry  # T
    inside: Tensor  # (m, s, s[, s]) bool: pixels of x that are slice, not what lies beyond its end
    valid: Tensor  # (m, s, s[, s]) bool: pixels of T x that show such a pixel
    groups: Mapping[str, Tensor] = field(default_factory=dict)  # (m,) each, of the crops' slices: see the protocol


@dataclass(frozen=True)
class _Taps:
    """Along one axis, which t inputs make each of s outputs, and how much of each."""

    index: Tensor  # (n, s, t) int64
    weight: Tensor  # (n, s, t) float32


# --------------------------------------------------------------------------------------------------------- whole views


def view(image: Tensor, corner: Tensor, extent: Tensor | None, side: int, chain: Chain, rng: Generator) -> Tensor:
    """One pretraining view of every slice, (n, c, s, s[, s]) float32: box, geometry, intensities.

    corner, extent   source boxes as for `crop`
    rng              on the device of `image`; equal generators give equal views
    """
    geometry = draw_geometry(len(image), image.dim() - 2, chain, rng)
    if extent is None or _all_have(side, extent):
        patches = apply_geometry(_window(image, corner, side), geometry)
    else:
        patches = _resize(image, corner, extent, side, geometry)
    return _intensity_(patches, chain, rng)


def labelled_view(
    image: Tensor,
    label: Tensor,
    corner: Tensor,
    side: int,
    chain: Chain,
    rng: Generator,
    extent: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One training crop of every slice with its labels, which move with the image.

    image, label   (n, c, *spatial) and (n, *spatial) class ids
    corner         (n, D), e.g. from `balanced_corners`
    extent         (n, D) of boxes to be resized, where a view's pixel has the label of the nearest source pixel; None: `side`
    Returns views (n, c, s, s[, s]) float32, and class ids (n, s, s[, s]) int64: UNLABELLED where a zoom shows what lies beyond
    the crop, or a crop what lies beyond the slice.
    """
    geometry = draw_geometry(len(image), image.dim() - 2, chain, rng)
    if extent is None:
        patches = apply_geometry(_window(image, corner, side), geometry)
        ids = _window(label[:, None], corner, side, fill=UNLABELLED).float()  # class ids are exact in float32
        ids = apply_geometry(ids, geometry, mode="nearest", fill=UNLABELLED)
    else:
        patches = _resize(image, corner, extent, side, geometry)
        ids = _resize(label[:, None].float(), corner, extent, side, geometry, mode="nearest", fill=UNLABELLED)
    return _intensity_(patches, chain, rng), ids[:, 0].long()


def unlabelled_pair(
    image: Tensor, size: Tensor, corner: Tensor, side: int, first: Chain, second: Chain, rng: Generator
) -> Pair:
    """One crop of every slice, and the same crop moved.

    image, size     (m, c, *spatial), and (m, D) pixels of each slice that are not padding
    corner          (m, D)
    first, second   chains of the two views; of `first` the intensities count alone, `second` draws T
    """
    patches = crop(image, corner, None, side)
    geometry = draw_geometry(len(image), image.dim() - 2, second, rng)
    inside = torch.ones(len(image), *patches.shape[2:], dtype=torch.bool, device=image.device)
    for axis, left in enumerate((size - corner).unbind(1)):
        along = torch.arange(side, device=image.device).view(-1, *[1] * (patches.dim() - 3 - axis))
        inside &= along < _trailing(left, inside)
    moved = apply_geometry(patches, geometry)
    valid = apply_geometry(inside[:, None].float(), geometry, mode="nearest")[:, 0] > 0.5
    return Pair(_intensity_(patches, first, rng), _intensity_(moved, second, rng), geometry, inside, valid)


# ------------------------------------------------------------------------------------------------------------- boxes


def crop(image: Tensor, corner: Tensor, extent: Tensor | None, side: int) -> Tensor:
    """The source boxes of n slices, (n, c, s, s[, s]) float32, in intensity units.

    image    (n, c, *spatial) in its storage dtype
    corner   (n, D) int64, in 0 .. max(length - side, 0); a slice shorter than `side` reads 0 beyond its end
    extent   (n, D) int64; None says `side` on every axis without asking the device
    Boxes of `side` pixels are gathered exactly, others resized (see the module). Raises ValueError for a box that starts
    outside the slice; this is checked on the CPU only, since elsewhere the host would wait for the device.
    """
    if extent is None or _all_have(side, extent):
        return intensities(_window(image, corner, side))
    return _resize(image, corner, extent, side, _identity(len(image), image.dim() - 2, image.device))


def balanced_corners(label: Tensor, size: Tensor, side: int, rng: Generator) -> Tensor:
    """Corners (n, D) int64 of crops whose centre is a foreground pixel with probability 1/2, else a background pixel.

    label   (n, *spatial) class ids; foreground is neither 0 nor UNLABELLED, background is 0
    size    (n, D) pixels of each slice that are not padding
    A slice without one of the two kinds gives the other; without any label, any of its pixels. The crop is moved inside
    its slice; in a slice shorter than `side` it starts at 0 and hangs over the end.
    The fine-tuning crops of the CT study (MONAI's `RandCropByPosNegLabel(pos=1, neg=1)`).
    """
    background = label == 0
    foreground = ~background & (label != UNLABELLED)
    counts = _count(foreground), _count(background)  # per row (2D) or plane (3D)
    has_foreground, has_background = (count.any(1) for count in counts)
    wants_foreground = torch.rand(len(label), generator=rng, device=label.device) < 0.5
    pick_foreground = (has_foreground & (wants_foreground | ~has_background))[:, None]

    # Ranks instead of a random number per pixel: draw the rank of the centre, then find it along one axis after the other.
    sample = torch.arange(len(label), device=label.device)
    rank = torch.randint(2**62, sample.shape, generator=rng, device=label.device)
    rank = rank % torch.where(pick_foreground, *counts).sum(1).clamp_min(1)
    centre = []
    for _ in label.shape[1:]:
        count = torch.where(pick_foreground, *counts)
        before = count.cumsum(1)
        at = torch.searchsorted(before, rank[:, None], right=True).clamp_max(count.shape[1] - 1)
        rank = rank - (before - count).gather(1, at)[:, 0]
        centre.append(at[:, 0])
        foreground, background = foreground[sample, at[:, 0]], background[sample, at[:, 0]]
        counts = _count(foreground), _count(background)

    anywhere = torch.randint(2**62, size.shape, generator=rng, device=label.device) % size
    centres = torch.where((has_foreground | has_background)[:, None], torch.stack(centre, 1), anywhere)
    return (centres - side // 2).clamp_min(0).minimum((size - side).clamp_min(0))


def _count(mask: Tensor) -> Tensor:
    """True pixels of each mask[i, j], (n, length) int32. Summing booleans as bytes is three times as fast on a CPU."""
    return mask.view(torch.uint8).flatten(2).sum(2, dtype=torch.int32) if mask.dim() > 2 else mask.int()


def _all_have(side: int, extent: Tensor) -> bool:
    return bool((extent == side).all())


def _window(image: Tensor, corner: Tensor, side: int, fill: int = 0) -> Tensor:
    """Boxes of `side` pixels in the storage dtype, (n, c, s, s[, s]): runs of pixels, gathered by where they start."""
    short = [max(side - length, 0) for length in image.shape[2:]]
    if any(short):
        image = F.pad(image, [pad for end in reversed(short) for pad in (0, end)], value=fill)
    samples, channels, *spatial = image.shape
    if corner.device.type == "cpu":
        last = torch.tensor(spatial) - side
        if bool(((corner < 0) | (corner > last)).any()):
            raise ValueError(
                f"a crop of {side} px starts outside its slice: corners span {corner.amin(0).tolist()} to "
                f"{corner.amax(0).tolist()}, slices of {spatial} px take 0 to {last.tolist()}; "
                "draw the corners for this side and these sizes"
            )
    start = torch.arange(samples * channels, device=image.device).view(samples, channels)
    offsets = torch.arange(side, device=image.device)
    for axis, length in enumerate(spatial[:-1]):
        start = start[..., None] * length + _trailing(corner[:, axis], start[..., None]) + offsets
    start = start * spatial[-1] + _trailing(corner[:, -1], start)
    runs = image.reshape(-1).unfold(0, side, 1)  # every run of `side` pixels, overlapping: a view, no copy
    return runs.index_select(0, start.flatten()).view(samples, channels, *[side] * len(spatial))


def _resize(
    image: Tensor,
    corner: Tensor,
    extent: Tensor,
    side: int,
    geometry: Geometry,
    mode: Literal["bilinear", "nearest"] = "bilinear",
    fill: float = 0,
) -> Tensor:
    """Boxes of any extent brought to `side` pixels, with the geometry, in one resample; `mode`, `fill` of `apply_geometry`."""
    zoomed, visible = _sources(geometry.zoom, side)
    taps = []
    for axis, (length, flip) in enumerate(zip(image.shape[2:], _flips(geometry).unbind(1), strict=True)):
        first, box = corner[:, axis, None], extent[:, axis, None]
        at = first + (zoomed + 0.5) * (box / side) - 0.5
        last, width = first + box - 1, math.ceil(2 * max(1, length / side))  # taps under the widest tent that fits the slice
        if mode == "nearest":
            along = _nearest(at, visible, first, last)
        else:
            along = _tent(at, visible, first, last, step=(box / side).clamp_min(1), width=width)
        taps.append(_reversed(along, flip))
    out = torch.empty(*image.shape[:2], *[side] * len(taps), device=image.device)
    for part in _parts(image):
        x = intensities(image[part])
        boxes = _along_axes(x - fill if fill else x, [_Taps(axis.index[part], axis.weight[part]) for axis in taps])
        out[part] = _turn(boxes + fill if fill else boxes, geometry.turns[part])
    return out


# ------------------------------------------------------------------------------------------------------------- geometry


def draw_geometry(n: int, spatial_dims: int, chain: Chain, rng: Generator) -> Geometry:
    """Zoom, flips and quarter turns for n patches, each operation with its own probability per patch.

    Raises ValueError where `chain.flip_p` names another number of axes than `spatial_dims`.
    """
    device = rng.device
    if isinstance(chain.flip_p, tuple) and len(chain.flip_p) != spatial_dims:
        raise ValueError(f"flip_p is {chain.flip_p}: expected one probability, or one for each of {spatial_dims} axes")
    zoom = _uniform((n,), chain.zoom, rng)
    turns = torch.randint(1, 4, (n,), generator=rng, device=device)
    return Geometry(
        zoom=torch.where(_drawn((n,), chain.zoom_p, rng), zoom, 1.0),
        flips=_drawn((n, spatial_dims), chain.flip_p, rng),
        turns=torch.where(_drawn((n,), chain.rot90_p, rng), turns, 0),
    )


def apply_geometry(
    patches: Tensor, geometry: Geometry, mode: Literal["bilinear", "nearest"] = "bilinear", fill: float = 0
) -> Tensor:
    """Zoomed, flipped and turned patches, same shape, in one resample; `fill` where a zoom below 1 leaves nothing.

    patches   (n, c, s, s[, s]), all sides equal, in a storage dtype or float32; comes out as float32 intensities
    Patches whose zoom leaves the side unchanged come out as exact permutations of their pixels. In 3D "bilinear" is trilinear.
    Raises ValueError when sides differ, since a quarter turn would change the shape.
    """
    side = patches.shape[-1]
    if any(length != side for length in patches.shape[2:]):
        raise ValueError(f"patches of {list(patches.shape[2:])} px: a quarter turn needs equal sides; crop squares or cubes")
    at, visible = _sources(geometry.zoom, side)
    taps = _nearest(at, visible, 0, side - 1) if mode == "nearest" else _tent(at, visible, 0, side - 1, step=1, width=2)
    flips, odd = _flips(geometry), (geometry.turns % 2 == 1)[:, None]
    flips = torch.where(odd, flips[:, [1, 0, *range(2, flips.shape[1])]], flips)  # the transposition comes first here
    each = [_reversed(taps, flip) for flip in flips.unbind(1)]
    out = torch.empty(patches.shape, device=patches.device)
    for part in _parts(patches):
        x = intensities(_turn(patches[part], geometry.turns[part]))  # turned in the storage dtype: a quarter of the bytes
        x = _along_axes(x - fill if fill else x, [_Taps(taps.index[part], taps.weight[part]) for taps in each])
        out[part] = x + fill if fill else x  # taps that see nothing sum to 0: 0 meant `fill`
    return out


def _identity(n: int, spatial_dims: int, device: torch.device) -> Geometry:
    return Geometry(
        zoom=torch.ones(n, device=device),
        flips=torch.zeros(n, spatial_dims, dtype=torch.bool, device=device),
        turns=torch.zeros(n, dtype=torch.int64, device=device),
    )


def _parts(patches: Tensor) -> list[slice]:
    """The batch in parts whose temporaries stay in a CPU's cache, and in memory that the process already has; else whole."""
    n = len(patches)
    step = PART if patches.device.type == "cpu" else n
    return [slice(start, start + step) for start in range(0, n, step)]


def _flips(geometry: Geometry) -> Tensor:
    """Axes (n, D) to reverse before a transposition completes the quarter turns: a turn by 1 is flip 1, transpose; by 2 both
    flips; by 3 flip 0, transpose."""
    flips, turns = geometry.flips.clone(), geometry.turns
    flips[:, 0] ^= turns >= 2
    flips[:, 1] ^= (turns == 1) | (turns == 2)
    return flips


def _turn(x: Tensor, turns: Tensor) -> Tensor:
    """What flips leave of a quarter turn: (n, c, s, s[, s]) with the first two spatial axes exchanged where `turns` is odd.

    Laid out in memory with the last axis first, as `_along_axes` begins.
    """
    both = torch.stack([y.movedim(-1, 1).contiguous() for y in (x, x.transpose(2, 3))], dim=1).flatten(0, 1)
    chosen = 2 * torch.arange(len(x), device=x.device) + turns % 2
    return both.index_select(0, chosen).movedim(1, -1)  # whole patches are copied: faster than `where` on bytes


def _sources(zoom: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Where in the patch each zoomed pixel looks, (n, s) float32, and whether anything is there, (n, s) bool."""
    zoomed = (side * zoom).floor().long()[:, None]  # m of the module docstring, pixels
    start = torch.where(zoomed < side, -((side - zoomed) // 2), zoomed // 2 - side // 2)
    pixel = torch.arange(side, device=zoom.device) + start
    return (pixel + 0.5) * (side / zoomed) - 0.5, (pixel >= 0) & (pixel < zoomed)


# ------------------------------------------------------------------------------------------------------ taps along an axis


def _tent(at: Tensor, visible: Tensor, first: Tensor | int, last: Tensor | int, step: Tensor | int, width: int) -> _Taps:
    """Linear interpolation at positions `at` (n, s) among the pixels first..last, by a tent that falls to 0 within `step`.

    first, last, step   (n, 1), or a number for all
    width               taps per output, at least 2 step
    """
    at = at.clamp(first, last)  # type: ignore[arg-type]
    left = (at - step).floor().long() + 1
    taps = []
    for tap in range(width):
        index = left + tap
        inside = index.clamp(first, last)  # type: ignore[arg-type]
        taps.append((inside, (1 - (index - at).abs() / step).clamp_min(0) * (index == inside)))
    index, weight = (torch.stack(part, -1) for part in zip(*taps, strict=True))
    return _Taps(index, weight * (visible / weight.sum(-1))[..., None])


def _nearest(at: Tensor, visible: Tensor, first: Tensor | int, last: Tensor | int) -> _Taps:
    index = (at + 0.5).floor().long().clamp(first, last)  # type: ignore[arg-type]
    return _Taps(index[..., None], visible[..., None].float())


def _reversed(taps: _Taps, flip: Tensor) -> _Taps:
    """The taps of an axis that is reversed where `flip` (n,) says so."""
    flip = flip[:, None, None]
    return _Taps(*(torch.where(flip, part.flip(1), part) for part in (taps.index, taps.weight)))


def _along_axes(x: Tensor, taps: list[_Taps]) -> Tensor:
    """Applies one set of taps to each spatial axis of (n, c, *spatial), the last axis first. Axes and channels rotate through
    the place of the rows, so that in the end everything is back in its own."""
    for axis_taps in reversed(taps):
        x = _mix(x.movedim(-1, 1), axis_taps)
    return x.movedim(-1, 1).contiguous()


def _mix(x: Tensor, taps: _Taps) -> Tensor:
    """out[i, j] = Σ_t weight[i, j, t] x[i, index[i, j, t]]: (n, length, *rest) to (n, s, *rest).

    `embedding_bag` is this sum over rows of a table, vectorised, in full float32 under autocast and TF32 alike; the same by
    dense s x s matrices takes ten times as long on a CPU.
    """
    n, length, *rest = x.shape
    index = taps.index + length * torch.arange(n, device=x.device)[:, None, None]
    rows = F.embedding_bag(
        index.flatten(0, 1),
        x.reshape(n * length, math.prod(rest)),
        per_sample_weights=taps.weight.flatten(0, 1),
        mode="sum",
    )
    return rows.view(n, taps.index.shape[1], *rest)


# ----------------------------------------------------------------------------------------------------------- intensities


def intensity(patches: Tensor, chain: Chain, rng: Generator) -> Tensor:
    """Scale, shift, blur, noise, in this order, each with its own probability per patch; (n, c, *spatial), not clipped.

    x (1 + f), x + o, a Gaussian blur with its own sigma per axis, and noise whose standard deviation is itself uniform in
    [0, noise_std]. The same draw for all channels of a patch, but for the noise.
    """
    return _intensity_(patches.clone(), chain, rng)


def _intensity_(out: Tensor, chain: Chain, rng: Generator) -> Tensor:
    """`intensity` in place."""
    n, spatial_dims = len(out), out.dim() - 2
    gain = _drawn((n,), chain.intensity_scale_p, rng) * _uniform((n,), (-1, 1), rng) * chain.intensity_scale + 1
    offset = _drawn((n,), chain.intensity_shift_p, rng) * _uniform((n,), (-1, 1), rng) * chain.intensity_shift
    sigma = _drawn((n, 1), chain.blur_p, rng) * _uniform((n, spatial_dims), chain.blur_sigma, rng)
    std = _drawn((n,), chain.noise_p, rng) * _uniform((n,), (0, chain.noise_std), rng)

    out.mul_(_trailing(gain, out)).add_(_trailing(offset, out))
    blurred = _concerned(sigma[:, 0] > 0)
    out.index_copy_(0, blurred, blur(out.index_select(0, blurred), sigma[blurred], largest=chain.blur_sigma[1]))
    noisy = _concerned(std > 0)
    noise = torch.randn((len(noisy), *out.shape[1:]), generator=rng, device=out.device)
    return out.index_add_(0, noisy, noise.mul_(_trailing(std[noisy], out)))


def blur(patches: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Gaussian blur of (n, c, *spatial), which is taken as 0 beyond its border.

    sigma   (n, D) pixels per axis, at most `largest`; an axis with 0 stays as it is
    MONAI's `GaussianSmooth(approx="erf")`: a tap weighs the Gaussian's integral over its pixel, the kernel ends at
    floor(4 sigma + 1/2) pixels and is not renormalised.
    """
    reach = math.floor(TAIL * largest + 0.5)
    offsets = torch.arange(-reach, reach + 1, device=patches.device)
    taps = []
    for axis, length in enumerate(patches.shape[2:]):
        spread = sigma[:, axis, None]
        edges = torch.arange(-reach - 0.5, reach + 1, device=patches.device) / (spread.clamp_min(1e-6) * math.sqrt(2))
        kernel = torch.erf(edges).diff(dim=1) / 2 * (offsets.abs() <= (TAIL * spread + 0.5).floor())
        index = torch.arange(length, device=patches.device)[:, None] + offsets
        inside = index.clamp(0, length - 1)
        taps.append(_Taps(inside.expand(len(patches), -1, -1), kernel[:, None] * (index == inside)))
    return _along_axes(patches, taps)


def _concerned(drawn: Tensor) -> Tensor:
    """Indices of the patches to work on: those drawn; on an accelerator all of them, at strength 0 where not drawn, since
    counting them would make the host wait for the device, which costs more than the work."""
    if drawn.device.type == "cpu":
        return drawn.nonzero()[:, 0]
    return torch.arange(len(drawn), device=drawn.device)


# ---------------------------------------------------------------------------------------------------------------- draws


def _drawn(shape: tuple[int, ...], p: float | tuple[float, ...], rng: Generator) -> Tensor:
    chance = torch.tensor(p, device=rng.device) if isinstance(p, tuple) else p
    return torch.rand(shape, generator=rng, device=rng.device) < chance


def _uniform(shape: tuple[int, ...], bounds: tuple[float, float], rng: Generator) -> Tensor:
    low, high = bounds
    return torch.rand(shape, generator=rng, device=rng.device) * (high - low) + low


def _trailing(x: Tensor, like: Tensor) -> Tensor:
    """(n,) with as many trailing axes as `like` has, to broadcast over them."""
    return x.view(-1, *[1] * (like.dim() - 1))
