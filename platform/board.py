"""TensorBoard, history and log file of a stage: scalars, the first views, predictions."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from medssl.methods import crops
from medssl.methods.protocol import UNLABELLED, Batch, Method, Views
from medssl.platform import atomic
from medssl.platform.history import History
from medssl.platform.records import Volume
from medssl.platform.trackers import Runs

WATCHED = 8  # batches whose views are drawn twice
ROWS = 8  # slices in a picture of views
BINS = 50  # of the histogram of IoU, over [0, 1]
PALETTE = np.array(
    [[0, 0, 0], [230, 60, 60], [60, 160, 230], [90, 200, 90], [240, 170, 40], [190, 90, 220], [60, 210, 200], [240, 120, 180]]
)  # fmt: skip


class Board:
    """Writes under `folder`; with None (every worker but the first) it writes nothing. `runs` hear the scalars too."""

    def __init__(self, folder: Path | None, runs: Runs | None = None):
        self.folder, self.runs = folder, runs

    def __enter__(self) -> Self:
        if self.folder:
            from tensorboardX import SummaryWriter

            self.writer = SummaryWriter(str(self.folder / "tensorboard"))
            self.log = (self.folder / "log.txt").open("a")
            self.history = History(self.folder)
        return self

    def __exit__(self, *error: object) -> None:
        if self.folder:
            self.writer.close()
            self.log.close()
            self.history.close()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if self.folder:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
            self.history.add(step, values)
            if self.runs:
                self.runs.log(step, values)
            rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
            self.log.write(json.dumps({"at": time.strftime("%H:%M:%S"), "step": step, **rounded}) + "\n")
            self.log.flush()

    def watching(self, batches: Callable[[int], Iterable[Batch]], method: Method) -> Callable[[int], Iterator[Batch]]:
        """The same batches. Of the first ones, views are drawn once more: to be looked at, and for their realised IoU.

        The histogram goes to TensorBoard and, as counts in `iou.json`, to whoever reports on the run.
        """

        def watched(start: int) -> Iterator[Batch]:
            found: list[Tensor] = []
            for number, batch in enumerate(batches(start)):
                if self.folder and start == 0 and number < WATCHED:
                    rng = torch.Generator(batch["image"].device).manual_seed(number)
                    views = method.augment(batch, rng)
                    if number == 0:
                        self.writer.add_image("views", side_by_side(views), 0, dataformats="HWC")
                    if len(views.corners) > 1:
                        found.append(crops.iou(views.corners[0], views.extents[0], views.corners[1], views.extents[1]))
                    if found and number == WATCHED - 1:
                        self._histogram(torch.cat(found).cpu())
                yield batch

        return watched

    def _histogram(self, iou: Tensor) -> None:
        assert self.folder is not None
        self.writer.add_histogram("iou", iou.numpy(), 0, bins="auto")
        counts = torch.histc(iou, bins=BINS, min=0, max=1).int().tolist()
        atomic.write_json(self.folder / "iou.json", {"bins": BINS, "counts": counts, "exactly_0": int((iou == 0).sum())})

    def prediction(self, volume: Volume, predicted: Tensor) -> None:
        """The slice with most foreground: image, reference and prediction."""
        if self.folder:
            reference = volume.label if volume.label is not None else torch.full_like(predicted, UNLABELLED)
            index = int(((reference != 0) & (reference != UNLABELLED)).flatten(1).sum(1).argmax())
            image = _grey(volume.image[index, 0].float())
            panels = [image, _painted(image, reference[index]), _painted(image, predicted[index])]
            picture = _enlarged(np.concatenate(panels, 1), len(image))
            self.writer.add_image(f"prediction/{volume.volume}", picture, 0, dataformats="HWC")


def side_by_side(views: Views) -> np.ndarray:
    """A row per slice, ROWS at most: its views, and its labels where there are any; 3D views show their middle.

    Views smaller than the largest stand at the top of their row, on black.

    Returns (rows, columns, 3) uint8.
    """
    columns = [images[:, 0].float().cpu() for images in views.images]
    height = max(column.shape[1] for column in columns)
    rows = []
    for row in range(min(ROWS, len(columns[0]))):
        panels = [_grey(_flat(column[row])) for column in columns]
        if views.labels is not None:
            panels.append(_painted(panels[0], _flat(views.labels[row].cpu())))
        panels = [np.pad(panel, ((0, height - len(panel)), (0, 0), (0, 0))) for panel in panels]
        rows.append(np.concatenate(panels, 1))
    return _enlarged(np.concatenate(rows, 0), len(columns[0][0]))


def _enlarged(picture: np.ndarray, side: int) -> np.ndarray:
    """Every pixel as many times as make panels of `side` pixels about 128 wide."""
    times = max(1, 128 // side)
    return picture.repeat(times, 0).repeat(times, 1)


def _flat(image: Tensor) -> Tensor:
    return image if image.dim() == 2 else image[..., image.shape[-1] // 2]


def _grey(image: Tensor) -> np.ndarray:
    low, high = image.min(), image.max()
    grey = ((image - low) / (high - low).clamp(min=1e-6) * 255).byte().cpu().numpy()
    return np.repeat(grey[..., None], 3, -1)


def _painted(image: np.ndarray, label: Tensor) -> np.ndarray:
    """`image` with every class half covered by its colour."""
    ids = label.cpu().numpy().astype(int)
    shown = (ids != 0) & (ids != UNLABELLED)
    colours = PALETTE[1:][(ids - 1) % (len(PALETTE) - 1)]
    return np.where(shown[..., None], (image.astype(int) + colours) // 2, image).astype(np.uint8)
