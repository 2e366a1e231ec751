"""Shapes as signed distances, and the voxel grid that they are painted on.

A shape is evaluated only inside its bounding box, which is what makes a whole abdomen cost a tenth of a second.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medssl.platform.datasets._phantom_patient import Patient, Point

Array = NDArray[np.float32]
Box = tuple[slice, slice, slice]

FAR = 40.0  # mm: the distance that stands for "anywhere else"
MARGIN = 9.0  # mm kept around a shape, so that edges can be softened, grown and blended


def overlap(a: Box, b: Box) -> Box:
    """The voxels that are in both boxes; empty where they do not meet."""
    starts = [max(i.start, j.start) for i, j in zip(a, b, strict=True)]
    x, y, z = (slice(at, max(at, min(i.stop, j.stop))) for at, i, j in zip(starts, a, b, strict=True))
    return x, y, z


def hull(a: Box, b: Box) -> Box:
    """The smallest box that holds both."""
    x, y, z = (slice(min(i.start, j.start), max(i.stop, j.stop)) for i, j in zip(a, b, strict=True))
    return x, y, z


@dataclass(frozen=True)
class Solid:
    """A shape: mm to its surface, negative inside, on a box of the grid; FAR outside the box."""

    box: Box
    distance: Array  # of the box's shape

    def within(self, box: Box) -> Array:
        """The distance on another box."""
        if box == self.box:
            return self.distance
        shared = overlap(box, self.box)
        out = np.full([side.stop - side.start for side in box], FAR, np.float32)
        out[_inside(shared, box)] = self.distance[_inside(shared, self.box)]
        return out

    def __and__(self, other: "Solid") -> "Solid":
        box = overlap(self.box, other.box)
        return Solid(box, np.maximum(self.within(box), other.within(box)))

    def __or__(self, other: "Solid") -> "Solid":
        box = hull(self.box, other.box)
        return Solid(box, np.minimum(self.within(box), other.within(box)))

    def __sub__(self, other: "Solid") -> "Solid":
        return Solid(self.box, np.maximum(self.distance, -other.within(self.box)))

    def grown(self, mm: float | Array) -> "Solid":
        """The shape with its surface moved outwards; inwards when negative."""
        return Solid(self.box, self.distance - mm)

    def layer(self, depth_mm: float, thickness_mm: float) -> "Solid":
        """The sheet of `thickness_mm` whose middle lies `depth_mm` below the surface."""
        return Solid(self.box, np.abs(self.distance + depth_mm) - thickness_mm / 2)


def _inside(part: Box, whole: Box) -> Box:
    """`part`, counted from the start of `whole`."""
    x, y, z = (slice(i.start - j.start, i.stop - j.start) for i, j in zip(part, whole, strict=True))
    return x, y, z


def blend(a: Solid, b: Solid, radius_mm: float) -> Solid:
    """The union of both, with the crease between them filled to about `radius_mm` (polynomial smooth minimum)."""
    box = hull(a.box, b.box)
    da, db = a.within(box), b.within(box)
    share = np.clip(0.5 + 0.5 * (db - da) / radius_mm, 0, 1)
    return Solid(box, db + share * (da - db) - radius_mm * share * (1 - share))


def gaussian_rows(targets: NDArray[np.float64], sources: NDArray[np.float64], sigma: float) -> Array:
    """Weights (targets, sources) that resample a line with a Gaussian of `sigma`, in the unit of the positions."""
    weights = np.exp(-0.5 * ((targets[:, None] - sources) / sigma) ** 2)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def along_axes(image: Array, rows: list[Array]) -> Array:
    """`image` with one matrix of weights applied along each of its axes: separable resampling as three matrix products."""
    for weights in rows:  # each product moves its axis to the end, so that after three they stand as before
        image = np.tensordot(image, weights, (0, 1))
    return image


def blurred(image: Array, sigma_voxels: tuple[float, float, float]) -> Array:
    """Gaussian blur, with edges that repeat the weights that are left."""
    lines = [np.arange(side, dtype=float) for side in image.shape]
    return along_axes(image, [gaussian_rows(line, line, sigma) for line, sigma in zip(lines, sigma_voxels, strict=True)])


class Canvas:
    """An image in HU, its labels, and the coordinates of every voxel in the standard adult (see `_phantom_patient`).

    What is drawn goes from the stiff to the soft: each organ claims only the room that is still free.
    """

    def __init__(
        self, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], patient: Patient, rng: np.random.Generator
    ):
        self.image: Array = np.full(shape, -1000, np.float32)
        self.label = np.zeros(shape, np.uint8)
        self.taken: Array = np.full(shape, FAR, np.float32)  # mm to the nearest claimed organ
        self.voxel_mm = spacing_mm[0] / patient.stature[0]
        self.spacing_mm, self._rng = spacing_mm, rng
        self.broad, self.patchy, self.fine = self.field(30), self.field(16), self.field(9)  # textures: mean 0, deviation 1
        self.table = self._table_frame()
        self.xyz = self._standard_frame(patient)
        self._reach = [
            (axis.min(across), axis.max(across)) for axis, across in zip(self.xyz, [(1, 2), (0, 2), (0, 1)], strict=True)
        ]

    def field(self, sigma_mm: float) -> Array:
        """A smooth random field of correlation length `sigma_mm`, mean about 0, deviation 1, of the image's shape."""
        rows, sides = [], []
        for side, spacing in zip(self.image.shape, self.spacing_mm, strict=True):
            step = max(sigma_mm / spacing, 0.5)
            nodes = np.arange(-step, side + step, step)
            rows.append(gaussian_rows(np.arange(side, dtype=float), nodes, 0.8 * step))
            sides.append(len(nodes))
        field = along_axes(self._rng.standard_normal(sides, dtype=np.float32), rows)
        return np.ascontiguousarray(field / field.std())

    def _table_frame(self) -> list[Array]:
        """Open grid of scanner coordinates, mm from the middle of the field of view."""
        lines = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(self.image.shape, self.spacing_mm, strict=True)]
        return [line.astype(np.float32) for line in np.meshgrid(*lines, indexing="ij", sparse=True)]

    def _standard_frame(self, patient: Patient) -> Array:
        """Where each voxel lies in the standard adult, mm, (3, x, y, z): pose and build undone, then a smooth warp."""
        x, y, z = (axis - shift for axis, shift in zip(self.table, patient.shift_mm, strict=True))
        cos, sin = np.cos(patient.turn), np.sin(patient.turn)
        posed = (cos * x + sin * y, cos * y - sin * x, z)
        xyz = np.empty((3, *self.image.shape), np.float32)
        for axis, (line, scale) in enumerate(zip(posed, patient.stature, strict=True)):
            xyz[axis] = line / scale + 4 * self.field(55)
        xyz[2] += 73  # the middle of the field of view lies between the kidneys' middle and the dome of the liver
        return xyz

    @property
    def whole(self) -> Box:
        x, y, z = (slice(0, side) for side in self.image.shape)
        return x, y, z

    def box(self, low: ArrayLike, high: ArrayLike) -> Box:
        """The voxels that may lie between two corners, in mm."""
        sides = []
        for (least, most), a, b in zip(self._reach, np.asarray(low), np.asarray(high), strict=True):
            inside = np.flatnonzero((most >= a) & (least <= b))
            sides.append(slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, 0))
        return sides[0], sides[1], sides[2]

    def ellipsoid(
        self, centre: ArrayLike, radii: ArrayLike, turn: tuple[float, float, float] = (0, 0, 0), rough_mm: float = 0
    ) -> Solid:
        """An ellipsoid turned about x, then y, then z, by angles in radians; `rough_mm` dents its surface."""
        axes = rotation(*turn)
        middle, half = np.asarray(centre, float), np.asarray(radii, float)
        extent = np.sqrt((axes * half) ** 2 @ np.ones(3)) + MARGIN
        box = self.box(middle - extent, middle + extent)
        offset = self.xyz[:, *box] - middle.astype(np.float32)[:, None, None, None]
        unit = np.tensordot((axes / half).T.astype(np.float32), offset, 1)
        unit *= unit
        level = np.sqrt(unit.sum(0))
        slope = np.sqrt(np.tensordot((half**-2).astype(np.float32), unit, 1))
        # first-order distance: the level set's excess over the length of its gradient
        distance = level * (level - 1) / np.maximum(slope, 1e-6)
        return Solid(box, distance + rough_mm * self.patchy[box] if rough_mm else distance)

    def tube(
        self, points: Sequence[Point | tuple[float, float, float]], radii: ArrayLike, rough_mm: float = 0, flat: float = 1
    ) -> Solid:
        """A tube through `points` (k, 3) whose radius runs through `radii` (k,) or one number; `flat` scales its depth in y."""
        path, width = catmull_rom(
            np.asarray(points, np.float32), np.broadcast_to(np.asarray(radii, np.float32), len(np.asarray(points)))
        )
        reach = width.max() + MARGIN
        box = self.box(path.min(0) - reach, path.max(0) + reach)
        out = Solid(box, np.full([side.stop - side.start for side in box], FAR, np.float32))
        for a, b, at_a, at_b in zip(path[:-1], path[1:], width[:-1], width[1:], strict=True):
            near = overlap(
                box, self.box(np.minimum(a, b) - max(at_a, at_b) - MARGIN, np.maximum(a, b) + max(at_a, at_b) + MARGIN)
            )
            offset = self.xyz[:, *near] - a[:, None, None, None]
            along = np.clip(np.tensordot((b - a) / ((b - a) @ (b - a)), offset, 1), 0, 1)
            offset -= along * (b - a)[:, None, None, None]
            offset[1] /= flat
            offset *= offset
            part = out.distance[_inside(near, box)]
            np.minimum(part, np.sqrt(offset.sum(0)) - (at_a + along * (at_b - at_a)), out=part)
        return Solid(box, out.distance + rough_mm * self.patchy[box]) if rough_mm else out

    def free(self, solid: Solid, gap_mm: float = 0) -> Solid:
        """`solid` without the room that earlier organs have claimed."""
        return Solid(solid.box, np.maximum(solid.distance, gap_mm - self.taken[solid.box]))

    def paint(self, solid: Solid, hu: float | Array, texture_hu: float = 0) -> None:
        """Fill `solid`, edges by the share of the voxel that it covers. `hu` is one number or an array of the solid's box."""
        share = np.clip(0.5 - solid.distance / self.voxel_mm, 0, 1)
        image = self.image[solid.box]
        image += share * (hu + texture_hu * self.fine[solid.box] - image)

    def claim(self, solid: Solid, hu: float | Array, label: int = 0, texture_hu: float = 4) -> Solid:
        """Paint an organ where there is room, mark it with `label`, and keep later ones out. Returns what it got."""
        organ = self.free(solid)
        self.paint(organ, hu, texture_hu)
        self.label[organ.box][organ.distance < 0] = label
        self.close(organ)
        return organ

    def close(self, solid: Solid) -> None:
        """Keep later organs out of `solid`."""
        np.minimum(self.taken[solid.box], solid.distance, out=self.taken[solid.box])


def rotation(about_x: float, about_y: float, about_z: float) -> NDArray[np.float64]:
    """Rotation matrix (3, 3) about x, then y, then z."""
    (cx, cy, cz), (sx, sy, sz) = np.cos([about_x, about_y, about_z]), np.sin([about_x, about_y, about_z])
    first = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    second = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    third = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return third @ second @ first


def catmull_rom(points: Array, radii: Array, legs: int = 3) -> tuple[Array, Array]:
    """A smooth path through `points` (k, 3) and the radii along it: `legs` straight pieces between neighbours."""
    ends = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    t = np.linspace(0, 1, legs, endpoint=False, dtype=np.float32)[:, None]
    pieces = [
        0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
        for a, b, c, d in zip(ends[:-3], ends[1:-2], ends[2:-1], ends[3:], strict=True)
    ]
    at = np.arange((len(points) - 1) * legs + 1) / legs
    widths = np.interp(at, np.arange(len(points)), radii).astype(np.float32)
    return np.concatenate([*pieces, points[-1:]]).astype(np.float32), widths
