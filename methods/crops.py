"""Pairs of crops of one image whose IoU lies in an interval: drawn exactly, without rejection, for a whole batch at once.

Two boxes of sides a and b pixels lie with their first pixels at p and q in an image of L pixels. On axis i they share
o_i pixels; together they share I = Π o_i, and IoU = I / (A + B − I) with A = Π a_i, B = Π b_i. IoU grows with I, so that
an interval of IoU is an interval of whole numbers I_lo ≤ I ≤ I_hi (`bounds`). Two facts make the draw closed-form:

1.  On one axis, the corners q that share at least u pixels with the first box are an interval, and a larger u gives a
    smaller interval inside it. The corners that share between u and v pixels are therefore one interval less another:
    their number, and the k-th of them, take a handful of operations (`_Nested`).
2.  Fix the overlaps on all axes but the last, and let h be their product. Then the last axis must share between
    ⌈I_lo/h⌉ and ⌊I_hi/h⌋ pixels. Every such *row* is a product of sets as in 1; together the rows are all that is
    admissible. So: count each row, accumulate, draw one rank below the total, and read row and corners off the rank.

Three laws say what is uniform (`PairCrops.law`):

conditional  the first corner is uniform over those that have an admissible partner, the second over those partners.
             First corners are counted in the same way: which overlaps p can reach is settled by the least overlap on
             each axis, and the p whose least overlap is at least u are again nested intervals.
pair         (p, q) is uniform over all admissible pairs, hence exchangeable. On an axis of M = L − c, the ordered
             pairs at distance e or more number (M + 1 − e)(M + 2 − e) for e ≥ 1: nested sets once more (`_Ordered`).
iou          IoU is uniform over the part of the interval that the image reaches, and the offset q − p uniform among
             those of that IoU, up to the grid: all whose I is within half a row of pixels, c^(D−1)/2, of the IoU drawn,
             or as near as the grid comes. Then p is uniform.

The CT study that introduced IoU intervals (https://github.com/dittohed/exploring-ssl-for-ct, thesis chapter 3) draws
by rejection, and keeps a pair outside the interval after 120 failures: half of all 3D pairs in [0.6, 1]. Law
"conditional" is what its loop aims at. Here nothing outside the interval is ever returned.

Letters: n images, D axes (2 or 3), R rows. All integers are int64; areas are pixels, or voxels when D = 3.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol, TypeVar, assert_never

import torch
from torch import Generator, Tensor

from medssl.methods import settings

Count = TypeVar("Count", int, Tensor)

FAR = 2**40  # pixels; further than any image reaches
CELLS = 2**20  # table entries held at once: 8 MiB per temporary, however large a 3D batch
REDRAWS = 64  # of the sides of resized boxes, for the few images whose first two boxes cannot make a pair


@dataclass(frozen=True)
class Pair:
    """Two boxes in each of n images, in source pixels."""

    corners: tuple[Tensor, Tensor]  # two (n, D) int64: first pixel of each box
    extents: tuple[Tensor, Tensor]  # two (n, D) int64: sides of each box
    iou: Tensor  # (n,) float32: realised IoU of the two boxes
    held: Tensor  # (n,) bool: False where the image holds no such pair; the boxes there lie in the image and mean nothing


def pair(size: Tensor, config: settings.PairCrops, rng: Generator) -> Pair:
    """A pair of boxes in each image, with the IoU, the law and the kind of crop of `config`.

    size    (n, D) int64: rows, columns (and slices) of each image
    config  `side` must be set. `iou=None` means two independent, uniformly placed boxes, whatever the law.
    rng     on the device of `size`; equal generators give equal pairs

    Fixed boxes have `side` pixels on each axis. Resized boxes follow the law of RandomResizedCrop (see `_resized`); the
    second box's sides are conditioned on reaching the interval together with the first's, and the law is "conditional".

    Raises ValueError where the settings contradict themselves, an image is smaller than a fixed box, or an image cannot
    hold such a pair and `unreachable` is "error".
    """
    _check(size, config)
    draw = {"fixed": _fixed, "resized": _resized}[config.crop]
    spans = _spans(size, config)
    chunk = max(1, CELLS // max(1, math.prod(map(len, spans))))
    drawn = [draw(part, config, spans, rng) for part in size.split(chunk)]
    p, q, a, b, held = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    _refuse(size, config, a, b, held)
    p, q = (torch.where(held[:, None], corner, 0) for corner in (p, q))
    a, b = (torch.where(held[:, None], extent, torch.minimum(extent, size)) for extent in (a, b))
    return Pair((p, q), (a, b), iou(p, a, q, b), held)


def single(size: Tensor, scale: tuple[float, float], ratio: tuple[float, float], rng: Generator) -> tuple[Tensor, Tensor]:
    """One random-resized box in each image: corners and extents, (n, D) int64 each; uniform over where they fit.

    size           (n, D) int64, as for `pair`
    scale, ratio   of the box's sides, whose law is that of `pair`'s resized boxes, see `_resized`
    Raises ValueError when an image holds no such box.
    """
    config = settings.PairCrops(iou=None, crop="resized", scale=scale, ratio=ratio)
    spans = _spans(size, config)
    levels = _grid(spans, size.device)
    chunk = max(1, CELLS // max(1, math.prod(map(len, spans))))
    extent, held = (
        torch.cat(parts) for parts in zip(*(_sides(s, config, levels, rng) for s in size.split(chunk)), strict=True)
    )
    if not held.all():
        first = _pixels(size[int((~held).nonzero()[0])])
        raise ValueError(f"no box of scale {scale} and ratio {ratio} fits an image of {first} px; use a wider scale or ratio")
    return _anywhere(size - extent, rng), extent


def iou(corner_a: Tensor, extent_a: Tensor, corner_b: Tensor, extent_b: Tensor) -> Tensor:
    """Intersection over union of boxes given by (n, D) first pixels and sides; (n,) float32. Touching boxes have 0."""
    end = torch.minimum(corner_a + extent_a, corner_b + extent_b)
    shared = (end - torch.maximum(corner_a, corner_b)).clamp(min=0).prod(1)
    return shared / (extent_a.prod(1) + extent_b.prod(1) - shared)


def reachable(size: Tensor, extent_a: Tensor, extent_b: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest IoU, each (n,) float32, of two boxes of given sides in an image; all three (n, D) int64."""
    area = extent_a.prod(1) + extent_b.prod(1)
    least = (extent_a + extent_b - size).clamp(min=0).prod(1)
    most = torch.minimum(extent_a, extent_b).prod(1)
    return least / (area - least), most / (area - most)


def feasible(size: Tensor, config: settings.PairCrops) -> Tensor:
    """Which images hold a pair of fixed crops with an IoU in the interval: (n,) bool, exact on the pixel grid.

    A first box in the image's corner reaches every overlap that a first box elsewhere reaches, so that one is asked.
    """
    _check(size, config)
    fits = (size >= _side(config)).all(1)
    if config.iou is None:
        return fits
    _, seconds = _fixed_rows(size, config)
    least = (2 * _side(config) - size).clamp(min=0)
    reaches = (high >= least[:, axis, None] for axis, high in enumerate(seconds.high))
    return fits & functools.reduce(torch.logical_and, reaches, seconds.low[0] <= seconds.high[0]).any(1)


def bounds(interval: tuple[float, float], ends: str, area_a: Count, area_b: Count) -> tuple[Count, Count]:
    """Fewest and most pixels that boxes of `area_a` and `area_b` pixels share when their IoU lies in the interval.

    The IoU is t when I = t (A + B) / (1 + t) pixels are shared. Whole-number arithmetic on the ends as simple fractions
    (0.6 means 3/5), so that an IoU of exactly 0.6 is inside with a closed end and outside with an open one. Right for
    boxes whose union is below 10⁹ pixels: fractions of such denominators differ by more than the simplification moves.
    """
    low, high = _fractions(interval)
    below, above = low.numerator * (area_a + area_b), high.numerator * (area_a + area_b)
    low_parts, high_parts = low.numerator + low.denominator, high.numerator + high.denominator
    least = below // low_parts + 1 if ends[0] == "(" else _ceil(below, low_parts)
    most = _ceil(above, high_parts) - 1 if ends[1] == ")" else above // high_parts
    return least, most


# ---------------------------------------------------------------------------------------------------------------------
# Fixed boxes
# ---------------------------------------------------------------------------------------------------------------------

Spans = Sequence[range]  # the overlaps to consider on each row axis, that is on each axis but the last
Levels = list[Tensor]  # all their combinations: D − 1 tensors of shape (1, R)
Box = tuple[tuple[int, int], ...]  # a row as plain numbers: fewest and most pixels shared on each axis
Drawn = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # p, q, a, b, held


@dataclass(frozen=True)
class _Rows:
    """R disjoint sets of overlaps, each a product over the axes: axis i shares from low[i] to high[i] pixels."""

    low: list[Tensor]  # D tensors, each (n or 1, R)
    high: list[Tensor]


def _fixed(size: Tensor, config: settings.PairCrops, spans: Spans, rng: Generator) -> Drawn:
    """Pairs of boxes of `side` pixels."""
    side = _side(config)
    extent = torch.full_like(size, side)
    if config.iou is None:
        p, q = _anywhere(size - side, rng), _anywhere(size - side, rng)
        held = torch.ones_like(p[:, 0], dtype=torch.bool)
    elif config.law == "conditional":
        p, q, held = _conditional(size, extent[:1], extent[:1], *_fixed_rows(size, config), rng)
    elif config.law == "pair":
        pairs = _Ordered(size - side, side)
        number, count = _draw(pairs, _fixed_rows(size, config)[1], rng)
        p, q, held = *pairs.corners(number), count > 0
    elif config.law == "iou":
        p, q, held = _level(size, side, config.iou, config.ends, spans, rng)
    else:
        assert_never(config.law)
    return p, q, extent, extent, held


def _conditional(
    size: Tensor, a: Tensor, b: Tensor, firsts: _Rows, seconds: _Rows, rng: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Law "conditional": p uniform over corners with a partner, q uniform over the partners of p; p, q, held.

    size, a, b   (n or 1, D): image and box sides
    firsts       least overlaps of a p that has a partner, see `_first_rows`
    seconds      admissible overlaps, see `_second_rows`
    """
    most = torch.minimum(a, b)
    p, count = _draw(_Nested(size - a - b, b, size - a, most), firsts, rng)
    q, _ = _draw(_Nested(p - b, p + a, size - b, most), seconds, rng)
    return p, q, count > 0


def _level(
    size: Tensor, side: int, interval: tuple[float, float], ends: str, spans: Spans, rng: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Law "iou": IoU uniform, offset uniform on that level, p uniform; p, q, held.

    Each image gets an interval of its own, a narrow one about the IoU drawn for it, and offsets are drawn as corners
    are: an offset of −M..M is a second corner in an image of 2M + side pixels whose first box lies in the middle.
    """
    axes, reach, extent = size.shape[1], size - side, torch.full_like(size, side)
    area = side**axes
    low, high = bounds(interval, ends, area, area)
    levels = _grid(spans, size.device)

    start = reachable(size, extent, extent)[0].clamp(min=interval[0])
    t = start + (interval[1] - start) * torch.rand(start.shape, generator=rng, device=size.device)
    target = (2 * area * t / (1 + t)).round().long()[:, None]
    distance = _nearest(target, levels, _second_rows(levels, low, high, side), (side - reach).clamp(min=0))
    radius = distance.clamp(min=side ** (axes - 1) // 2)
    narrow = _second_rows(levels, (target - radius).clamp(min=low), (target + radius).clamp(max=high), side)

    offsets = _Nested(reach - side, reach + side, 2 * reach, extent[:1])
    offset = _draw(offsets, narrow, rng)[0] - reach
    p = _anywhere(reach - offset.abs(), rng) + (-offset).clamp(min=0)
    return p, p + offset, distance[:, 0] < FAR


def _nearest(target: Tensor, levels: Levels, seconds: _Rows, least: Tensor) -> Tensor:
    """How far the nearest admissible overlap I lies from `target`, both (n, 1) pixels; FAR where there is none.

    least   (n, D): what each axis shares at least, whatever the offset
    """
    height = torch.stack(levels).prod(0)
    fewest, most = torch.maximum(seconds.low[-1], least[:, -1:]), seconds.high[-1]
    rounded = (2 * target + height) // (2 * height).clamp(min=1)
    distance = (torch.minimum(torch.maximum(rounded, fewest), most) * height - target).abs()
    distance = torch.where(fewest <= most, distance, FAR)
    for axis, level in enumerate(levels):
        distance = torch.where(level >= least[:, axis, None], distance, FAR)
    return distance.amin(1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# Rows: which overlaps are admissible
# ---------------------------------------------------------------------------------------------------------------------


def _second_rows(levels: Levels, low: int | Tensor, high: int | Tensor, most: int | Tensor) -> _Rows:
    """The overlaps with low <= I <= high, one row for each combination of levels; some rows are empty (low > high).

    low, high   bounds on the pixels shared in all: (n, 1), or a number
    most        what the last axis can share: (n, 1), or a number
    A combination without overlap has I = 0 whatever the last axis does.
    """
    height = torch.stack(levels).prod(0)
    at_least, at_most, whole = (  # filled there: a copy from the host would wait for the device
        value if isinstance(value, Tensor) else torch.full((), value, device=height.device) for value in (low, high, most)
    )
    divisor = height.clamp(min=1)
    fewest = torch.where(height > 0, _ceil(at_least, divisor), torch.where(at_least > 0, FAR, 0))
    greatest = torch.where(height > 0, torch.minimum(at_most // divisor, whole), torch.where(at_most < 0, -1, whole))
    return _Rows([*levels, fewest], [*levels, greatest])


def _first_rows(seconds: _Rows, spans: Spans, most: Tensor) -> _Rows:
    """The least overlaps u, axis by axis, of a first corner that has an admissible partner.

    Moving q by a pixel changes an overlap by at most one, so that p reaches exactly the overlaps from u_i to most_i on
    each axis. It has a partner when an admissible row lies at or above u on the row axes, and lets the last axis share
    u_D or more: that is, when u_D is at most the maximum of seconds.high[-1] over those rows.

    spans   the levels of each row axis; the first stands for all the levels below it
    most    (n or 1, D): what each axis can share
    """
    levels, within = seconds.low[:-1], torch.where(seconds.low[-1] <= seconds.high[-1], seconds.high[-1], -1)
    for axis, level in enumerate(levels):
        within = torch.where(level <= most[:, axis, None], within, -1)
    table = within.reshape(-1, *map(len, spans))
    for axis in range(1, table.dim()):
        table = table.flip(axis).cummax(axis).values.flip(axis)
    within = table.reshape(within.shape)
    down = [torch.where(level == level[:, :1], 0, level) for level in levels]
    return _Rows([*down, torch.zeros_like(within)], [*levels, within])


def _fixed_rows(size: Tensor, config: settings.PairCrops) -> tuple[_Rows, _Rows]:
    """First and second rows of the configuration's equal boxes, on the device of `size`."""
    assert config.iou is not None
    side, axes = _side(config), size.shape[1]
    return _equal_rows(side, axes, *bounds(config.iou, config.ends, side**axes, side**axes), str(size.device))


@functools.lru_cache(maxsize=32)
def _equal_rows(side: int, axes: int, low: int, high: int, device: str) -> tuple[_Rows, _Rows]:
    """First and second rows of two boxes of `side` pixels on each of `axes` axes that share `low` to `high` pixels.

    The same for all images, so that neighbours can be joined: two rows are left of 97 for [0, 0], three of 9409 in 3D.
    """
    spans = _equal_spans(side, axes, low)
    seconds = _second_rows(_grid(spans, torch.device("cpu")), low, high, side)
    firsts = _first_rows(seconds, spans, torch.full((1, axes), side, device="cpu"))
    return _joined(firsts, device), _joined(seconds, device)


def _spans(size: Tensor, config: settings.PairCrops) -> Spans:
    """The overlaps that the boxes of `config` can have on the row axes."""
    if config.crop == "resized":
        longest = size[:, :-1].amax(0).tolist() if len(size) else [1] * (size.shape[1] - 1)
        return [range(side + 1) for side in longest]
    area = _side(config) ** size.shape[1]
    return _equal_spans(_side(config), size.shape[1], bounds(config.iou or (0, 1), config.ends, area, area)[0])


def _equal_spans(side: int, axes: int, low: int) -> Spans:
    """The overlaps of equal boxes on the row axes, but for those so small that the other axes could not make up."""
    return [range(_ceil(low, side ** (axes - 1)), side + 1)] * (axes - 1)


def _grid(spans: Spans, device: torch.device) -> Levels:
    """All combinations of one level per row axis, the last axis fastest."""
    levels = [torch.arange(span.start, span.stop, device=device) for span in spans]
    return [level.reshape(1, -1) for level in torch.meshgrid(*levels, indexing="ij")]


def _joined(rows: _Rows, device: str) -> _Rows:
    """The same overlaps in fewer rows: along each axis, neighbours that agree on the other axes become one."""
    axes = [zip(low[0].tolist(), high[0].tolist(), strict=True) for low, high in zip(rows.low, rows.high, strict=True)]
    boxes: list[Box] = [box for box in zip(*axes, strict=True) if all(low <= high for low, high in box)]
    for axis in range(len(axes)):
        agreeing: dict[Box, list[tuple[int, int]]] = {}
        for box in boxes:
            agreeing.setdefault(box[:axis] + box[axis + 1 :], []).append(box[axis])
        boxes = [(*rest[:axis], run, *rest[axis:]) for rest, spans in agreeing.items() for run in _runs(spans)]
    table = torch.tensor(boxes or [((1, 0),) * len(axes)], device=device)  # (R, D, 2); at least one row, if an empty one
    low, high = table.permute(2, 1, 0)[:, :, None].contiguous()
    return _Rows(list(low), list(high))


def _runs(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint spans of whole numbers, those that touch made one."""
    runs: list[tuple[int, int]] = []
    for low, high in sorted(spans):
        if runs and runs[-1][1] + 1 == low:
            runs[-1] = (runs[-1][0], high)
        else:
            runs.append((low, high))
    return runs


# ---------------------------------------------------------------------------------------------------------------------
# A uniform draw from a union of rows
# ---------------------------------------------------------------------------------------------------------------------


class _Family(Protocol):
    """On each axis, finitely many members, each with a level: the pixels that it makes two boxes share."""

    def count(self, axis: int, level: Tensor) -> Tensor:
        """How many members have at least this level: (n or 1, R) gives (n, R)."""

    def member(self, axis: int, low: Tensor, high: Tensor, rank: Tensor) -> Tensor:
        """The `rank`-th of the members whose level is in [low, high]; all (n, 1)."""


@dataclass(frozen=True)
class _Nested:
    """Members are 0..last; those of level u > 0 or more are start + u .. stop − u among them; none is above `most`.

    All are (n or 1, D).
    """

    start: Tensor
    stop: Tensor
    last: Tensor
    most: Tensor

    def _interval(self, axis: int, level: Tensor) -> tuple[Tensor, Tensor]:
        """First member, and number of members, of at least this level."""
        start, stop, last, most = (bound[:, axis, None] for bound in (self.start, self.stop, self.last, self.most))
        level = torch.where(level > most, FAR, torch.where(level > 0, level, -FAR))
        first = (start + level).clamp_(min=0)
        end = torch.minimum((stop + 1) - level, last + 1)
        return first, end.sub_(first).clamp_(min=0)  # in place: on a processor, memory traffic is what this costs

    def count(self, axis: int, level: Tensor) -> Tensor:
        return self._interval(axis, level)[1]

    def member(self, axis: int, low: Tensor, high: Tensor, rank: Tensor) -> Tensor:
        first, _ = self._interval(axis, low)
        hole, length = self._interval(axis, high + 1)  # lies inside the first interval, or is empty
        position = first + rank
        return torch.where(position >= hole, position + length, position)


@dataclass(frozen=True)
class _Ordered:
    """Members are the ordered pairs (p, q) of 0..M, numbered from the most distant to the coinciding ones.

    reach   (n, D): M of each axis
    side    of both boxes: pairs at distance e have level side − e, or 0
    """

    reach: Tensor
    side: int

    def count(self, axis: int, level: Tensor) -> Tensor:
        corners = self.reach[:, axis, None] + 1
        too_far = torch.where(level > 0, self.side + 1 - level, FAR)  # the least distance of a lower level
        left = (corners - too_far).clamp_(min=0)
        return (left + 1).mul_(left).neg_().add_(corners * corners).clamp_(min=0)  # negative at distance 0 or less

    def member(self, axis: int, low: Tensor, high: Tensor, rank: Tensor) -> Tensor:
        return (self.reach[:, axis, None] + 1) ** 2 - self.count(axis, low) + rank

    def corners(self, number: Tensor) -> tuple[Tensor, Tensor]:
        """The pairs of these numbers (n, D): p and q, each (n, D).

        The first M (M + 1) numbers are the pairs p ≠ q, both orders in turn. Of distance M − j there are j + 1 without
        the order, so that the first of them has the j-th triangular number. The M + 1 pairs p = q come last.
        """
        distinct = self.reach * (self.reach + 1)
        half = number // 2
        j = (((8 * half + 1).float().sqrt() - 1) / 2).long()  # off by one at most, in single precision
        j = j - (j * (j + 1) // 2 > half).long() + ((j + 1) * (j + 2) // 2 <= half).long()
        equal = number >= distinct
        lower = torch.where(equal, number - distinct, half - j * (j + 1) // 2)
        upper = torch.where(equal, lower, lower + self.reach - j)
        swapped = number % 2 == 1
        return torch.where(swapped, upper, lower), torch.where(swapped, lower, upper)


def _draw(family: _Family, rows: _Rows, rng: Generator) -> tuple[Tensor, Tensor]:
    """One member per axis, uniform over all combinations that a row allows.

    Returns the members (n, D), and how many combinations there were to choose from (n,); where there are none, the
    members mean nothing.
    """
    counts = [
        family.count(axis, low).sub_(family.count(axis, high + 1)).clamp_(min=0)
        for axis, (low, high) in enumerate(zip(rows.low, rows.high, strict=True))
    ]
    weight = math.prod(counts[1:], start=counts[0])
    row, rank, total = _choose(weight, rng)
    members = []
    for axis, count in enumerate(counts):
        choices, low, high = (table.expand_as(weight).gather(1, row) for table in (count, rows.low[axis], rows.high[axis]))
        choices = choices.clamp(min=1)
        members.append(family.member(axis, low, high, rank % choices))
        rank = rank // choices
    return torch.cat(members, 1), total


def _choose(weight: Tensor, rng: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A row with probability proportional to its whole-number weight (n, R), and a rank below that weight, uniform.

    Returns row (n, 1), rank (n, 1), total weight (n,). Where the total is 0, row is the last and rank 0.
    """
    cumulative = weight.cumsum(1)
    total = cumulative[:, -1]
    rank = _below(total, rng)[:, None]
    row = torch.searchsorted(cumulative, rank, right=True).clamp(max=weight.shape[1] - 1)
    return row, rank - (cumulative.gather(1, row) - weight.gather(1, row)), total


def _below(limit: Tensor, rng: Generator) -> Tensor:
    """A uniform whole number in [0, limit) per entry; 0 where the limit is below 1.

    The remainder of 63 random bits: no value is likelier than another by more than limit / 2⁶³ of its probability,
    that is 10⁻⁸ for the pairs of a 512² slice.
    """
    bits = torch.randint(2**63 - 1, limit.shape, generator=rng, device=limit.device)
    return bits % limit.clamp(min=1)


def _anywhere(reach: Tensor, rng: Generator) -> Tensor:
    """A uniform corner in 0..reach on every axis."""
    return _below(reach + 1, rng)


# ---------------------------------------------------------------------------------------------------------------------
# Random-resized boxes
# ---------------------------------------------------------------------------------------------------------------------


def _resized(size: Tensor, config: settings.PairCrops, spans: Spans, rng: Generator) -> Drawn:
    """Pairs of boxes with the sides of RandomResizedCrop (Szegedy et al. 2015, https://arxiv.org/abs/1409.4842).

    Its law, area uniform and logarithm of the ratio uniform, has constant density in (height, width): d area · d ln r =
    2 dh dw. So sides are drawn uniformly from the whole numbers that keep area and ratio and fit the image, which
    needs neither tries nor a fallback. The second box's are drawn from those that can reach the interval together with
    the first's. What this leaves out, a first box without any partner (one of almost the whole image, when boxes are to
    be disjoint), or an interval so narrow that it falls between two pixels, is drawn again.
    """
    drawn = _resized_once(size, config, spans, rng)
    for _ in range(REDRAWS):
        again = (~drawn[-1]).nonzero()[:, 0]
        if not len(again):
            break
        for old, new in zip(drawn, _resized_once(size[again], config, spans, rng), strict=True):
            old[again] = new
    return drawn


def _resized_once(size: Tensor, config: settings.PairCrops, spans: Spans, rng: Generator) -> Drawn:
    levels = _grid(spans, size.device)
    a, some = _sides(size, config, levels, rng)
    if config.iou is None:
        b, _ = _sides(size, config, levels, rng)
        return _anywhere(size - a, rng), _anywhere(size - b, rng), a, b, some
    b, partner = _sides(size, config, levels, rng, a)
    low, high = bounds(config.iou, config.ends, a.prod(1, keepdim=True), b.prod(1, keepdim=True))
    most = torch.minimum(a, b)
    seconds = _second_rows(levels, low, high, most[:, -1:])
    p, q, held = _conditional(size, a, b, _first_rows(seconds, spans, most), seconds, rng)
    return p, q, a, b, held & some & partner


def _sides(
    size: Tensor, config: settings.PairCrops, levels: Levels, rng: Generator, first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sides (n, D) of a box, uniform over those that `config` allows, and whether there are any (n,).

    Rows are the sides on all axes but the last; the last one then ranges over an interval. A side of b pixels stands
    for b ± ½, as if it had been rounded. `ratio` is that of each further axis to the first.

    first   (n, D), the sides of the first box; those of the second must then be able to reach the interval with it
    """
    (small, large), (narrow, wide) = _fractions(config.scale), _fractions(config.ratio)
    area = size.prod(1, keepdim=True) * 2 ** size.shape[1]  # counted in half pixels, like `over` and `under`
    over, under = (torch.stack([2 * level + half for level in levels]) for half in (1, -1))
    least_area = _ceil(small.numerator * area, small.denominator)
    most_area = large.numerator * area // large.denominator
    low = torch.maximum(
        _ceil(least_area, over.prod(0)),
        _ceil(narrow.numerator * under[0], narrow.denominator),
    )
    high = torch.minimum(
        most_area // under.prod(0).clamp(min=1),
        wide.numerator * over[0] // wide.denominator,
    )
    low, high = (low // 2).clamp(min=1), torch.minimum((high + 1) // 2, size[:, -1:])
    allowed = low <= high
    for axis, level in enumerate(levels):
        allowed &= (level >= 1) & (level <= size[:, axis, None])
        allowed &= (narrow.numerator * under[0] <= narrow.denominator * over[axis]) & (
            wide.denominator * under[axis] <= wide.numerator * over[0]
        )
    if first is not None:
        reach_low, reach_high = _partners(size, config, levels, first)
        low, high = torch.maximum(low, reach_low), torch.minimum(high, reach_high)
    row, rank, total = _choose(torch.where(allowed, high - low + 1, 0).clamp_(min=0), rng)
    sides = [side.expand_as(low).gather(1, row) for side in levels]
    return torch.cat([*sides, low.gather(1, row) + rank], 1), total > 0


def _partners(size: Tensor, config: settings.PairCrops, levels: Levels, a: Tensor) -> tuple[Tensor, Tensor]:
    """The last sides w (n, R), from..to, with which a box of these row sides can reach the interval with a first box.

    Let h be the row sides' product, m and u the greatest and least overlap that they allow with the first box, A its
    area, w' its last side. The greatest IoU, m min(w, w') shared, reaches the low end t = x/y when
        w (m (x + y) − h x) >= x A                  for w <= w' (rises with w),
        w h x <= m w' (x + y) − x A                 for w >= w' (falls with w).
    The least IoU, u max(0, w + w' − L) shared, stays under the high end t = x/y when
        w (u (x + y) − h x) <= x A + u (L − w') (x + y),
    or whatever w is when that bracket is not positive. An open end asks for one more.
    """
    assert config.iou is not None
    low_end, high_end = _fractions(config.iou)
    row = torch.stack(levels).clamp(min=1)
    shares = a[:, :-1].T[..., None]
    height = row.prod(0)
    most = torch.minimum(row, shares).prod(0)
    least = (row + shares - size[:, :-1].T[..., None]).clamp(min=0).prod(0)
    area, last = a.prod(1, keepdim=True), a[:, -1:]

    x, parts, strict = low_end.numerator, low_end.numerator + low_end.denominator, int(config.ends[0] == "(")
    rise = most * parts - height * x
    needed = x * area + strict
    start = torch.where(rise > 0, _ceil(needed, rise.clamp(min=1)), FAR)
    stop = (most * last * parts - needed) // (height * x) if x else torch.full_like(height, FAR)

    x, parts, strict = high_end.numerator, high_end.numerator + high_end.denominator, int(config.ends[1] == ")")
    rise = least * parts - height * x
    room = x * area + least * (size[:, -1:] - last) * parts - strict
    return start, torch.minimum(stop, torch.where(rise > 0, room // rise.clamp(min=1), FAR))


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be meant, and what an image cannot hold
# ---------------------------------------------------------------------------------------------------------------------


def _fractions(interval: tuple[float, float]) -> tuple[Fraction, Fraction]:
    """The two ends as the simple fractions that they stand for: 0.3 is 3/10, and 0.3333333333 is 1/3."""
    low, high = (Fraction(end).limit_denominator(10**9) for end in interval)
    return low, high


def _ceil(dividend: Count, divisor: Count | int) -> Count:
    """The quotient of whole numbers, rounded up."""
    return -(-dividend // divisor)


def _side(config: settings.PairCrops) -> int:
    assert config.side is not None
    return config.side


def _named(config: settings.PairCrops) -> str:
    """The interval as one writes it, open and closed ends included."""
    low, high = config.iou or (0.0, 1.0)
    return f"{config.ends[0]}{low:g}, {high:g}{config.ends[1]}"


def _check(size: Tensor, config: settings.PairCrops) -> None:
    """Raises ValueError for what cannot be meant and `PairCrops` has not refused already."""
    if size.dim() != 2 or size.shape[1] not in (2, 3) or size.dtype != torch.int64:
        raise ValueError(f"size: expected int64 of shape (n, 2) or (n, 3), got {size.dtype} of {tuple(size.shape)}")
    if config.side is None:
        raise ValueError("side: pair crops need their side in pixels; None is for the planner to resolve from the data")
    if config.crop == "resized" and config.iou is not None and config.law != "conditional":
        raise ValueError(f"law '{config.law}' places fixed crops only; use law='conditional' with crop='resized'")


def _refuse(size: Tensor, config: settings.PairCrops, a: Tensor, b: Tensor, held: Tensor) -> None:
    """Raises ValueError when an image is smaller than a fixed box, or holds no pair and that is to be an error."""
    fits = (size >= _side(config)).all(1) if config.crop == "fixed" else torch.ones_like(held)
    well = fits & held if config.unreachable == "error" else fits
    if bool(well.all()):  # for fixed crops, the one wait for the device
        return
    if not fits.all():
        first = int((~fits).nonzero()[0])
        raise ValueError(
            f"crops of {config.side} px do not fit image {first} of the batch, {_pixels(size[first])} px; "
            f"prepare the data padded to at least {config.side} px, or use a smaller `side`"
        )
    first = int((~held).nonzero()[0])
    image = f"an image of {_pixels(size[first])} px"
    many = f"{int((~held).sum())} of {len(held)} images cannot hold such a pair"
    skip = "or unreachable='skip' to leave such images out"
    if config.crop == "fixed":
        smallest, largest = (float(end[first]) for end in reachable(size, a, b))
        raise ValueError(
            f"iou {_named(config)}: two crops of {config.side} px in {image} overlap by IoU {smallest:.3g} to "
            f"{largest:.3g}{_between(config, smallest)}; {many}; use another `iou`, a smaller `side`, {skip}"
        )
    boxes = f"boxes of scale {config.scale} and ratio ({config.ratio[0]:.3g}, {config.ratio[1]:.3g}) in {image}"
    raise ValueError(
        f"iou {_named(config)}: {boxes}: none fit, or no two of them overlap so in {REDRAWS} draws; {many}; "
        f"use another `iou`, a wider `scale` or `ratio`, {skip}"
    )


def _between(config: settings.PairCrops, smallest: float) -> str:
    """What to add when the interval is within reach but narrower than a pixel."""
    inside = config.iou is not None and config.iou[1] > smallest
    return ", but by no whole number of pixels in the interval" if inside else ""


def _pixels(size: Tensor) -> str:
    return " x ".join(str(side) for side in size.tolist())
