"""Which voxels are the patient: the largest thing in the scan, without the table, the lungs and the gut's air filled in.

    threshold    the preset's lower bound where a window gives one (air, foam and cloth lie below -500 HU), else Otsu's
    opening      in the plane of a slice, by OPEN_MM: a table, a blanket's edge or a tube that touches the skin comes off
    component    the largest, of voxels that share a face, in three dimensions
    holes        filled slice by slice: what the skin surrounds is inside

Otsu, IEEE Transactions on Systems, Man, and Cybernetics 1979, https://doi.org/10.1109/TSMC.1979.4310076: the threshold that
leaves the largest variance between the two classes it makes, over a histogram of BINS bins.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

OPEN_MM = 3.0  # half of the thickest table shell or strap that is taken off; fingers and ears may go with it
BINS = 256


def otsu(values: NDArray[Any]) -> float:
    """The threshold between the two classes of `values`, at the edge of a bin. Raises ValueError when all are one value."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        raise ValueError(f"every voxel is {low:g}: there is no body to find")
    counts, edges = np.histogram(values, BINS, (low, high))
    centres, below = (edges[1:] + edges[:-1]) / 2, np.cumsum(counts)
    above, sums = below[-1] - below, np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[1 + int(np.argmax(np.nan_to_num(between)))])


def body(image: NDArray[Any], threshold: float | None, spacing_mm: tuple[float, ...]) -> NDArray[np.bool_]:
    """The mask of the patient in one channel (h, w, d), slices along the last axis; threshold None: Otsu's.

    Raises ValueError when nothing is left.
    """
    from scipy import ndimage

    mask = image > (otsu(image) if threshold is None else threshold)
    across, along = (max(1, round(OPEN_MM / side)) for side in spacing_mm[:2])
    for axis, radius in ((0, across), (1, along)):  # two lines, one after the other: a rectangle, at the cost of lines
        line = np.ones([2 * radius + 1 if each == axis else 1 for each in range(3)], bool)
        mask = ndimage.binary_erosion(mask, line, border_value=1)  # the scan's edge is no skin
    for axis, radius in ((0, across), (1, along)):
        mask = ndimage.binary_dilation(mask, np.ones([2 * radius + 1 if each == axis else 1 for each in range(3)], bool))
    parts, count = ndimage.label(mask)
    if not count:
        raise ValueError("no body is found in it; is the preset the right one for this modality? leave preset.body_mask off")
    mask = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    for k in range(mask.shape[2]):
        mask[..., k] = ndimage.binary_fill_holes(mask[..., k])
    return mask
