"""From a network and prepared volumes to labels, scores and a picture.

A 2D network reads a volume slice by slice, a 3D one in cubes; labels, scores and pictures are the same for both.

d       slices of a volume
c h w   channels, rows, columns
k       classes, the background included
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.methods.protocol import UNLABELLED, intensities
from medssl.platform.metrics import Metrics, score_volume
from medssl.platform.records import Part, Score, Volume

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

Device = torch.device | str | None
VOXELS = 64 * 96**2  # most of a forward pass over cubes: as many as 64 of the CT study's windows have


def infer(
    network: nn.Module,
    volume: Volume,
    *,
    side: int | None,
    overlap: float = 0.25,
    batch: int = 64,
    device: Device = None,
    spatial_dims: int = 2,
) -> Tensor:
    """The predicted class ids of a volume, (d, h, w) uint8, where the volume's image lies.

    network   (n, c, h, w) to logits (n, k, h, w); run in evaluation mode, and left in the modes it was found in
    side      of the square windows that slide over a slice, in pixels; None: whole slices
    overlap   of neighbouring windows, a fraction of `side`; logits are averaged where they meet, as in the IoU study
    batch     windows, or whole slices, per forward pass; fewer in 3D where a pass would exceed VOXELS
    device    to compute on; None: where the network is
    spatial_dims  3: the network maps (n, c, h, w, d) to (n, k, h, w, d), and windows are cubes that slide over the volume

    Slices smaller than a window are padded with 0 around; volumes below, to the right and above, as in training. For mixed
    precision, call this inside torch.autocast.
    """
    return _forward(network, volume, lambda logits: logits.argmax(1).byte(), side, overlap, batch, device, spatial_dims)


def probabilities(
    network: nn.Module,
    volume: Volume,
    *,
    side: int | None,
    overlap: float = 0.25,
    batch: int = 64,
    device: Device = None,
    spatial_dims: int = 2,
) -> Tensor:
    """What `infer` decides by: the softmax over the classes, (d, k, h, w) float32."""
    return _forward(network, volume, lambda logits: logits.float().softmax(1), side, overlap, batch, device, spatial_dims)


def score(
    network: nn.Module,
    volumes: Iterable[Volume],
    classes: Sequence[str],
    part: Part,
    *,
    side: int | None,
    overlap: float = 0.25,
    tolerance_mm: Sequence[float] | None = None,
    metrics: Sequence[Metrics] = ("all",),
    batch: int = 64,
    device: Device = None,
    spatial_dims: int = 2,
) -> list[Score]:
    """Predict each volume and score it by the contract of `metrics.py`; a generator of volumes keeps memory low.

    metrics   any of: "dice" while training, where it only selects; "all" for the report; "legacy" for the IoU study's own score
    Raises RunError when a volume has no label, UsageError when `tolerance_mm` does not fit the classes.
    """
    scores: list[Score] = []
    for volume in volumes:
        prediction = infer(network, volume, side=side, overlap=overlap, batch=batch, device=device, spatial_dims=spatial_dims)
        for kind in metrics:
            scores += score_volume(prediction, volume, classes, part, tolerance_mm=tolerance_mm, metrics=kind)
    return scores


def picture(volume: Volume, prediction: Tensor, *, slices: int = 4) -> "NDArray[Any]":
    """What `outlined` draws, as RGB uint8 (h, w, 3)."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(outlined(volume, prediction, slices=slices))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def outlined(volume: Volume, prediction: Tensor, *, slices: int = 4) -> "Figure":
    """A labelled volume from its worst slice to its best, reference and prediction outlined.

    prediction   (d, h, w) class ids
    slices       how many to show, evenly spaced in the order of their foreground Dice

    Rows of the store run towards the patient's right and columns towards anterior; drawn as a radiologist sees them,
    anterior up and the patient's right on the left. Only the first channel is shown.
    """
    # without pyplot, which would keep every figure
    import numpy as np
    from matplotlib.figure import Figure

    assert volume.label is not None, "nothing to compare with"
    reference, prediction = volume.label.cpu(), prediction.cpu()
    dice = _slice_dice(prediction, reference)
    ranked = [index for index in dice.argsort().tolist() if not dice[index].isnan()] or list(range(len(dice)))
    chosen = [ranked[round(at)] for at in np.linspace(0, len(ranked) - 1, min(slices, len(ranked)))]
    figure = Figure(figsize=(3 * len(chosen), 3.4), dpi=100, layout="constrained")
    figure.suptitle(f"{volume.volume}: reference solid, prediction dashed", fontsize=9)
    for axes, index in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
        axes.imshow(volume.image[index, 0].float().cpu().T, cmap="gray", origin="lower", aspect=_aspect(volume))
        axes.invert_xaxis()
        axes.set_axis_off()
        axes.set_title(f"slice {index}, Dice {dice[index]:.2f}", fontsize=9)
        _contours(axes, reference[index], "solid")
        _contours(axes, prediction[index], "dashed")
    return figure


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its own mode back (a frozen teacher inside stays frozen)."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _forward(
    network: nn.Module,
    volume: Volume,
    reduce: Callable[[Tensor], Tensor],
    side: int | None,
    overlap: float,
    batch: int,
    device: Device,
    spatial_dims: int = 2,
) -> Tensor:
    """`reduce` of the logits, some slices at a time: those of many classes on large slices would not fit at once."""
    device = device or next((parameter.device for parameter in network.parameters()), volume.image.device)
    forward: Callable[[Tensor], Tensor] = network
    windows = 1
    if side is not None:
        from monai.inferers.utils import sliding_window_inference

        def forward(image: Tensor) -> Tensor:
            at_once = batch if spatial_dims == 2 else max(1, min(batch, VOXELS // side**3))
            logits = sliding_window_inference(image, [side] * spatial_dims, at_once, network, overlap, mode="constant")
            assert isinstance(logits, Tensor)
            return logits

        stride = max(1, int(side * (1 - overlap)))
        windows = math.prod(1 + math.ceil(max(0, length - side) / stride) for length in volume.image.shape[-2:])
    with _evaluating(network):
        if spatial_dims == 3:
            image = intensities(volume.image.to(device)).movedim(0, -1)[None]  # (1, c, h, w, d)
            h, w, d = image.shape[2:]
            short = [max((side or 1) - length, 0) for length in (h, w, d)]
            logits = forward(F.pad(image, [pad for end in reversed(short) for pad in (0, end)]))
            return reduce(logits[..., :h, :w, :d])[0].movedim(-1, 0).contiguous().to(volume.image.device)
        parts = volume.image.split(max(1, batch // windows))
        reduced = [reduce(forward(intensities(part.to(device)))).to(volume.image.device) for part in parts]
    return torch.cat(reduced)


def _slice_dice(prediction: Tensor, reference: Tensor) -> Tensor:
    """Dice of all foreground classes together, per slice, (d,); NaN where neither side has foreground."""
    known = reference != UNLABELLED
    predicted, actual = (prediction > 0) & known, (reference > 0) & known
    both = (prediction == reference) & actual
    return 2 * both.sum((1, 2)) / (predicted.sum((1, 2)) + actual.sum((1, 2)))


def _aspect(volume: Volume) -> float:
    """Height over width of a pixel as drawn, where the store's columns run upwards."""
    return volume.spacing_mm[1] / volume.spacing_mm[0]


def _contours(axes: "Axes", ids: Tensor, style: str) -> None:
    """The outline of each foreground class of a slice (h, w), in the class's own colour."""
    from matplotlib import colormaps

    colours = colormaps["tab20"]
    for class_id in ids.unique().tolist():
        mask = (ids == class_id).T
        if class_id in (0, UNLABELLED) or mask.all():  # a contour of everything is none
            continue
        axes.contour(mask, levels=[0.5], colors=[colours(2 * (class_id - 1) % 19)], linestyles=style, linewidths=1.5)
