"""A picture of a prepared data set: slices of some volumes, with the contours of their classes.

Slices are shown as a radiologist sees them: the patient's right on the left of the picture, anterior on top (`radiological`
says how slices of other orientations are). The window is the stored range, so what is black or white here is black or white for
the network; numbers without bounds (z-scores) are shown from the 1st to the 99th percentile of the volume. What nobody
annotated is hatched.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.platform import atomic
from medssl.platform.geometry import UNLABELLED
from medssl.platform.store import Store, VolumeRecord

COLUMNS = 6  # slices per volume


def radiological(plane: NDArray[Any], orientation: str = "RAS") -> NDArray[Any]:
    """A stored slice as it is read: the patient's head on top, else the front; the right side on the left, else the front.

    orientation    where the slice's rows, its columns (and the slices) run to
    """
    plane = plane[tuple(slice(None, None, -1 if letter in "RAS" else 1) for letter in orientation[:2])]
    return plane.T if upright(orientation) else plane


def upright(orientation: str) -> bool:
    """Whether a stored slice's columns run along the picture's height: the higher of the axes SI, AP, RL."""
    rows, columns = ("RLAPSI".index(letter) // 2 for letter in orientation[:2])
    return columns > rows


def chosen(store: Store, volumes: int | Sequence[str]) -> list[VolumeRecord]:
    """The named volumes; or so many, evenly spaced in the list of the labelled ones (of all, where nothing is labelled)."""
    if not isinstance(volumes, int):
        by_name = {record.volume: record for record in store.volumes}
        store.table(volumes=volumes, columns=["volume"])  # an unknown name is refused there
        return [by_name[name] for name in volumes]
    pool = [record for record in store.volumes if record.labelled] or list(store.volumes)
    return [pool[k] for k in np.unique(np.linspace(0, len(pool) - 1, min(max(volumes, 1), len(pool))).astype(int))]


def heights(label: NDArray[np.uint8] | None, slices: int) -> list[int]:
    """Up to COLUMNS slices, evenly spaced from the lowest to the highest that holds a class, or over the whole volume."""
    held = np.arange(slices) if label is None else np.flatnonzero(((label > 0) & (label != UNLABELLED)).any(axis=(1, 2)))
    lowest, highest = (int(held[0]), int(held[-1])) if len(held) else (0, slices - 1)
    return [int(k) for k in np.unique(np.linspace(lowest, highest, COLUMNS).round().astype(int))]


def show(store: Store, path: Path, volumes: int | Sequence[str] = 4) -> None:
    """Write `picture` to a file."""
    content = picture(store, volumes)
    atomic.write(path, lambda file: file.write(content))


def picture(store: Store, volumes: int | Sequence[str] = 4) -> bytes:
    """A PNG: a row per volume, from its lower to its higher slices; its first channel. Equal stores give equal bytes.

    volumes    their names, or how many
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = chosen(store, volumes)
    colours = ListedColormap([(0.0, 0.0, 0.0), *_colours(len(store.classes) - 1)])
    figure = Figure(figsize=(1.9 * COLUMNS, 2.05 * len(rows) + 0.7), facecolor="black", layout="compressed")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), COLUMNS, squeeze=False)
    for line, record in zip(axes, rows, strict=True):
        image, label = store.arrays(record.volume)
        across, along, _ = record.spacing_mm
        aspect = along / across if upright(store.preset.orientation) else across / along
        low, top = window(image[:, 0])
        for axis in line:
            axis.set_axis_off()
        for axis, k in zip(line, heights(label, record.slices), strict=False):
            shown = radiological(image[k, 0], store.preset.orientation).astype(np.float32)
            axis.imshow(shown, cmap="gray", vmin=low, vmax=top, aspect=aspect, interpolation="nearest")
            axis.set_title(f"{record.volume[:22]}  {k + 1}/{record.slices}", color="0.8", fontsize=6, pad=2)
            plane = np.zeros(shown.shape, np.uint8) if label is None else radiological(label[k], store.preset.orientation)
            if (plane == UNLABELLED).any():
                axis.contourf(plane == UNLABELLED, [0.5, 1.5], colors="none", hatches=["////"])
            for number in np.intersect1d(plane, np.arange(1, len(store.classes))):
                axis.contour(plane == number, [0.5], colors=[colours(int(number))], linewidths=0.8)
    keys = [Patch(color=colours(number), label=name) for number, name in enumerate(store.classes) if number]
    if any(record.labelled for record in rows):
        figure.legend(
            handles=keys, loc="outside lower center", ncols=min(len(keys), 7), fontsize=7, labelcolor="white", frameon=False
        )
    made = io.BytesIO()
    figure.savefig(made, dpi=130, format="png", bbox_inches="tight", pad_inches=0.1, metadata={"Software": None})
    return made.getvalue()


def window(channel: NDArray[Any]) -> tuple[float, float]:
    """What is black and what is white: the range of the storage type; of floats 0 and 1, or percentiles where they leave it."""
    if channel.dtype.kind in "iu":
        return 0.0, float(np.iinfo(channel.dtype).max)
    if channel.min() >= 0 and channel.max() <= 1:
        return 0.0, 1.0
    low, high = np.percentile(channel[:: max(1, len(channel) // 20)].astype(np.float32), (1, 99))
    return float(low), float(max(high, low + 1e-6))


def _colours(count: int) -> list[tuple[float, ...]]:
    """As many hues, evenly spaced, bright on black."""
    from matplotlib.colors import hsv_to_rgb

    return [tuple(hsv_to_rgb((number / count, 0.75, 1.0))) for number in range(count)]
