"""The metric contract, in one place: what Dice, HD95, ASD and NSD mean here, and how many numbers become one.

Torch and MONAI are imported inside the functions, so that a leaderboard prints the contract without waiting for them.

    d h w   slices, rows, columns of a prepared volume
    k       classes, the background included
"""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from medssl.platform.errors import RunError, UsageError
from medssl.platform.records import Part, Score, Volume

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

VERSION = 1  # enters the hash of every data contract: raise it whenever a number may change
TOLERANCE_MM = 2.0  # of NSD, for the classes of a data set that names none
LEGACY = "legacy-slice-dice"
CONTRACT = (
    f"Metric contract {VERSION}. Per volume and foreground class, on the prepared volume's grid: Dice of the voxels; "
    "HD95, the larger of the two directed 95th percentiles of the distances between surface voxels, in mm; "
    "ASD, the mean of all these distances, in mm; "
    "NSD, the share of both sides' surface voxels that lie within the data set's tolerance of the other surface. "
    "Voxels that nobody annotated count for neither side. Class absent in both: left out, and counted. "
    "Class missed or hallucinated: Dice 0, NSD 0, HD95 and ASD infinite (left out of their means), and counted. "
    "Mean over classes, then over a patient's volumes, then over patients."
)

Metrics = Literal["dice", "all", "legacy"]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Summary:
    """The scores of one run on one part, by the contract's order of means; NaN where nothing is defined."""

    mean: Mapping[str, float]  # of each metric, over patients
    by_patient: Mapping[str, Mapping[str, float]]  # metric -> patient -> value
    by_class: Mapping[str, Mapping[str, float]]  # metric -> class -> mean over patients
    absent: int  # pairs of volume and class: on neither side,
    missed: int  # in the reference only,
    hallucinated: int  # in the prediction only


def dice(prediction: "Tensor | NDArray[Any]", reference: "Tensor | NDArray[Any]", classes: int) -> "Tensor":
    """Dice of each foreground class, (k-1,); NaN where a class is absent in both.

    prediction, reference   (…) uint8 class ids of one shape; where the reference is UNLABELLED, no voxel counts
    classes                 k
    """
    predicted, actual, both = _counts(prediction, reference)[:, 1:classes]
    return 2 * both / (predicted + actual)


def surface(
    prediction: "Tensor | NDArray[Any]",
    reference: "Tensor | NDArray[Any]",
    spacing_mm: tuple[float, float, float],
    tolerance_mm: Sequence[float],
) -> tuple[list[float], list[float], list[float]]:
    """HD95 in mm, NSD, and ASD in mm of each foreground class; NaN where it is absent in both, infinity and 0 where in one.

    prediction, reference   (d, h, w) uint8 class ids
    spacing_mm              between rows, columns and slices, in this order, as in `records.Volume`
    tolerance_mm            of NSD, one per foreground class

    A voxel is surface when one of its six neighbours is of another class or outside the volume. Where the reference is
    UNLABELLED it is taken to agree with the prediction, and no surface there counts: an annotation that ends
    between two slices is not an organ that ends. HD95 follows MONAI and DeepMind's surface-distance
    (https://github.com/google-deepmind/surface-distance); NSD (Nikolov et al., https://arxiv.org/abs/1809.04430) counts
    surface voxels, as MONAI does by default, not their areas.
    """
    import numpy as np
    from scipy.ndimage import find_objects

    from medssl.methods.protocol import UNLABELLED

    predicted, actual = _array(prediction), _array(reference)
    known = actual != UNLABELLED
    actual = np.where(known, actual, predicted)
    boxes = zip(*(find_objects(ids, max_label=len(tolerance_mm)) for ids in (predicted, actual)), strict=True)
    rows, columns, slices = map(float, spacing_mm)
    hd95, nsd, asd = list[float](), list[float](), list[float]()
    for class_id, (pair, tolerance) in enumerate(zip(boxes, tolerance_mm, strict=True), start=1):
        box = _joint_box(*pair)
        distances = _surface_distances(predicted[box] == class_id, actual[box] == class_id, known[box], (slices, rows, columns))
        everywhere = np.concatenate(distances)
        if not len(everywhere):
            values = (math.nan, math.nan, math.nan)
        elif np.isinf(everywhere).any():  # one side has no surface to be near to
            values = (math.inf, 0.0, math.inf)
        else:
            farthest = float(max(np.quantile(directed, 0.95) for directed in distances))
            values = (farthest, float((everywhere <= tolerance).mean()), float(everywhere.mean()))
        for metric, value in zip((hd95, nsd, asd), values, strict=True):
            metric.append(value)
    return hd95, nsd, asd


def legacy_slice_dice(prediction: "Tensor | NDArray[Any]", reference: "Tensor | NDArray[Any]") -> float:
    """The IoU study's own score: Dice per slice, background included, mean over the classes that the slice holds.

    From Konieczkowicz, MSc thesis, AGH Kraków 2023, and its code; kept only to set its table beside ours. It rewards
    empty slices, and organs painted where there are none cost next to nothing. The study takes one mean over the
    slices of all volumes; this is the mean over the slices of one, NaN when nothing in it is annotated.

    prediction, reference   (d, h, w) uint8 class ids
    """
    import torch

    counts = torch.stack([_counts(*pair) for pair in zip(prediction, reference, strict=True)])  # (d, 3, 255)
    predicted, actual, both = counts.unbind(1)
    per_class = torch.where(actual > 0, 2 * both / (predicted + actual), math.nan)
    return float(per_class.nanmean(1).nanmean())


def score_volume(
    prediction: "Tensor",
    volume: Volume,
    classes: Sequence[str],
    part: Part,
    *,
    tolerance_mm: Sequence[float] | None = None,
    metrics: Metrics = "all",
) -> list[Score]:
    """Every number of one predicted volume.

    prediction     (d, h, w) uint8 class ids, on the grid of the prepared volume
    classes        k names, the background first
    tolerance_mm   of NSD, k-1; None: TOLERANCE_MM each
    metrics        "dice": without the distances, which cost most; "all"; "legacy": the IoU study's score alone

    "all" also has `iou`, the overlap over the union (Jaccard), and `accuracy`, the share of annotated voxels that are right,
    the background being a class like any other: PDCR's mIoU and Acc (mDice is `dice`), of foreground classes alone where its
    code as shipped counts the background, and not rounded. Beside Dice stand `reference_ml` and `predicted_ml`: they tell a
    missed class from a hallucinated one.
    Raises RunError when the volume carries no label.
    """
    if volume.label is None:
        raise RunError(
            f"{volume.volume} of patient {volume.patient} has no label to be scored against; add one or leave it out"
        )
    reference = volume.label.to(prediction.device)

    def rows(metric: str, values: Iterable[float]) -> list[Score]:
        return [
            Score(volume.patient, volume.volume, part, name, metric, float(value))
            for name, value in zip(classes[1:], values, strict=True)
        ]

    if metrics == "legacy":
        value = legacy_slice_dice(prediction, reference)
        return [Score(volume.patient, volume.volume, part, "all with background", LEGACY, value)]
    counts = _counts(prediction, reference)
    predicted, actual, both = counts[:, 1 : len(classes)]
    millilitres = math.prod(volume.spacing_mm) / 1000
    scores = rows("dice", 2 * both / (predicted + actual))
    scores += rows("reference_ml", actual * millilitres) + rows("predicted_ml", predicted * millilitres)
    if metrics == "all":
        hd95, nsd, asd = surface(prediction, reference, volume.spacing_mm, tolerances(classes, tolerance_mm))
        scores += (
            rows("hd95_mm", hd95) + rows("nsd", nsd) + rows("asd_mm", asd) + rows("iou", both / (predicted + actual - both))
        )
        correct = float(counts[2].sum() / counts[1].sum())  # NaN where nothing is annotated
        scores.append(Score(volume.patient, volume.volume, part, "all with background", "accuracy", correct))
    return scores


def tolerances(classes: Sequence[str], tolerance_mm: Sequence[float] | None) -> Sequence[float]:
    """NSD tolerance of each foreground class, in mm. Raises UsageError when a data set names too few or too many."""
    if tolerance_mm is None:
        return [TOLERANCE_MM] * (len(classes) - 1)
    if len(tolerance_mm) != len(classes) - 1:
        raise UsageError(
            f"tolerance_mm has {len(tolerance_mm)} values for {len(classes) - 1} foreground classes "
            f"({', '.join(classes[1:])}); name one per class, in this order"
        )
    return tolerance_mm


def aggregate(scores: Iterable[Score]) -> Summary:
    """Many numbers become one: the contract's means and counts. Raises UsageError when parts are mixed."""
    scores = list(scores)
    if len(parts := {score.part for score in scores}) > 1:
        raise UsageError(f"scores of {' and '.join(sorted(parts))} make no common mean; select one part first")
    volumes = _means(((score.metric, score.patient, score.volume), score.value) for score in scores)
    patients = _means(((metric, patient), value) for (metric, patient, _), value in volumes.items())
    classes = _means(((score.metric, score.class_name, score.patient), score.value) for score in scores)
    by_class = _means(((metric, class_name), value) for (metric, class_name, _), value in classes.items())
    outcomes = _outcomes(scores)
    return Summary(
        mean=_means((metric, value) for (metric, _), value in patients.items()),
        by_patient=_nested(patients),
        by_class=_nested(by_class),
        absent=outcomes[False, False],
        missed=outcomes[True, False],
        hallucinated=outcomes[False, True],
    )


def _counts(prediction: "Tensor | NDArray[Any]", reference: "Tensor | NDArray[Any]") -> "Tensor":
    """Annotated voxels of each class id in the prediction, in the reference, and in both at once: (3, 255) float64."""
    import torch

    from medssl.methods.protocol import UNLABELLED

    actual = torch.as_tensor(reference)
    unknown = actual == UNLABELLED
    predicted = torch.as_tensor(prediction).masked_fill(unknown, UNLABELLED)
    both = torch.where(predicted == actual, actual, UNLABELLED)
    counts = [torch.bincount(ids.flatten(), minlength=UNLABELLED + 1)[:UNLABELLED] for ids in (predicted, actual, both)]
    return torch.stack(counts).double()


def _array(ids: "Tensor | NDArray[Any]") -> "NDArray[Any]":
    import numpy as np
    import torch

    return ids.cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)


def _joint_box(first: tuple[slice, ...] | None, second: tuple[slice, ...] | None) -> tuple[slice, ...]:
    """The smallest box around both, None being empty, and one voxel more, lest a face of the box be a surface."""
    if first is None or second is None:
        found = first or second or (slice(1, 1),) * 3
    else:
        found = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(first, second, strict=True))
    return tuple(slice(max(0, side.start - 1), side.stop + 1) for side in found)


def _surface_distances(
    predicted: "NDArray[Any]", actual: "NDArray[Any]", known: "NDArray[Any]", spacing_mm: tuple[float, float, float]
) -> "tuple[NDArray[Any], NDArray[Any]]":
    """Distances in mm of each mask's surface voxels to the other's surface; infinite where the other has none.

    predicted, actual, known   bool (d, h, w); spacing_mm in the same order
    """
    # monai.metrics would compute the edges and trees once for HD95 and again for NSD, and has no use for `known`
    import numpy as np
    from monai.metrics.utils import get_mask_edges, get_surface_distance

    first, second = (edges & known for edges in get_mask_edges(predicted, actual, crop=False))
    there = get_surface_distance(first, second, spacing=spacing_mm)
    back = get_surface_distance(second, first, spacing=spacing_mm)
    return np.asarray(there), np.asarray(back)


def _means(values: Iterable[tuple[Key, float]]) -> dict[Key, float]:
    """Mean of the finite values of each key; NaN where it has none."""
    groups: defaultdict[Key, list[float]] = defaultdict(list)
    for key, value in values:
        groups[key] += [value] if math.isfinite(value) else []
    return {key: sum(group) / len(group) if group else math.nan for key, group in groups.items()}


def _nested(values: Mapping[tuple[str, str], float]) -> dict[str, dict[str, float]]:
    nested: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for (outer, inner), value in values.items():
        nested[outer][inner] = value
    return dict(nested)


def _outcomes(scores: Iterable[Score]) -> Counter[tuple[bool, bool]]:
    """How many pairs of volume and class are (in the reference, in the prediction)."""
    amounts = {(score.volume, score.class_name, score.metric): score.value for score in scores}
    return Counter(
        (amount > 0, amounts[volume, class_name, "predicted_ml"] > 0)
        for (volume, class_name, metric), amount in amounts.items()
        if metric == "reference_ml"
    )
