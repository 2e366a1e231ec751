"""The metric contract against closed forms, hand-drawn masks and MONAI."""

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from medssl.methods.protocol import UNLABELLED
from medssl.platform import metrics
from medssl.platform.errors import RunError, UsageError
from medssl.platform.records import Score, Volume

CLASSES = ("background", "liver", "spleen")


def empty(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def blobs(seed: int, shape: tuple[int, ...] = (9, 16, 14), classes: int = 4) -> torch.Tensor:
    """Smooth regions of random class ids."""
    noise = torch.rand(1, classes, *shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.avg_pool3d(noise, 5, 1, 2).argmax(1)[0].byte()


def volume(label: torch.Tensor | None, spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Volume:
    return Volume("anna", "anna_left", torch.zeros(3, 1, 4, 4), label, spacing_mm)


def rows(values: dict[tuple[str, str, str, str], float]) -> list[Score]:
    """{(patient, volume, class, metric): value} as scores of the test part."""
    return [Score(p, v, "test", c, m, value) for (p, v, c, m), value in values.items()]


def test_dice_of_hand_drawn_squares():
    reference, prediction = empty(1, 4, 4), empty(1, 4, 4)
    reference[0, :2, :2] = 1  # four voxels
    prediction[0, :2, 1:3] = 1  # four, two of them shared
    prediction[0, 3, :] = 2  # hallucinated
    torch.testing.assert_close(
        metrics.dice(prediction, reference, 4), torch.tensor([0.5, 0.0, math.nan]).double(), equal_nan=True
    )


def test_dice_equals_monai():
    from monai.metrics import DiceMetric

    prediction, reference = blobs(0), blobs(1)
    one_hot = [torch.nn.functional.one_hot(ids.long(), 4).movedim(-1, 0)[None] for ids in (prediction, reference)]
    expected = DiceMetric(include_background=False, reduction="none")(*one_hot)[0]
    torch.testing.assert_close(metrics.dice(prediction, reference, 4).float(), expected)
    torch.testing.assert_close(metrics.dice(prediction.numpy(), reference.numpy(), 4).float(), expected)


def test_surface_equals_monai_on_whole_volumes():
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice

    prediction, reference = blobs(2), blobs(3)
    one_hot = [torch.nn.functional.one_hot(ids.long(), 4).movedim(-1, 0)[None] for ids in (prediction, reference)]
    spacing_dhw, tolerance = (2.5, 0.7, 1.3), [1.0, 2.0, 3.0]
    hd95, nsd, asd = metrics.surface(prediction, reference, (0.7, 1.3, 2.5), tolerance)
    np.testing.assert_allclose(hd95, compute_hausdorff_distance(*one_hot, percentile=95, spacing=spacing_dhw)[0], rtol=1e-5)
    np.testing.assert_allclose(nsd, compute_surface_dice(*one_hot, tolerance, spacing=spacing_dhw)[0], rtol=1e-5)
    monai = compute_average_surface_distance(*one_hot, symmetric=True, spacing=spacing_dhw)[0]
    np.testing.assert_allclose(asd, monai, rtol=1e-5)


@pytest.mark.parametrize(("axis", "expected_mm"), [(0, 2.5), (1, 0.7), (2, 1.3)])
def test_hd95_counts_each_axis_in_its_own_millimetres(axis, expected_mm):
    reference, prediction = empty(5, 5, 5), empty(5, 5, 5)
    reference[2, 2, 2] = 1
    prediction.select(axis, 3)[2, 2] = 1
    hd95, nsd, _ = metrics.surface(prediction, reference, (0.7, 1.3, 2.5), [1.3])
    assert hd95 == pytest.approx([expected_mm])
    assert nsd == [1.0 if expected_mm < 1.31 else 0.0]


def test_hd95_of_two_voxels_two_millimetres_apart_is_two():
    reference, prediction = empty(3, 6, 6), empty(3, 6, 6)
    reference[1, 2, 2] = 1
    prediction[1, 2, 4] = 1
    assert metrics.surface(prediction, reference, (1.0, 1.0, 3.0), [2.0]) == ([2.0], [1.0], [2.0])
    assert metrics.surface(prediction, reference, (1.0, 1.0, 3.0), [1.9]) == ([2.0], [0.0], [2.0])


def test_nsd_of_a_plate_moved_by_half_its_tolerance_and_twice_its_tolerance():
    reference, prediction = empty(1, 20, 20), empty(1, 20, 20)
    reference[0, 5] = 1  # a line of 20 voxels
    prediction[0, 6, :10] = 1  # one row off
    prediction[0, 9, 10:] = 1  # four rows off
    _, nsd, _ = metrics.surface(prediction, reference, (1.0, 1.0, 1.0), [2.0])
    near = 10 + 10 + 1  # half of the prediction; that half of the reference and one more column, at the distance √2
    assert nsd == pytest.approx([near / 40])


def test_a_class_is_absent_missed_or_hallucinated():
    reference, prediction = empty(3, 4, 4), empty(3, 4, 4)
    reference[1, 1, 1] = 1
    prediction[1, 1, 1] = 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hd95, nsd, _ = metrics.surface(prediction, reference, (1.0, 1.0, 1.0), [2.0] * 3)
    assert hd95[:2] == [math.inf, math.inf]
    assert math.isnan(hd95[2])
    assert nsd[:2] == [0.0, 0.0]
    assert math.isnan(nsd[2])


def test_voxels_nobody_annotated_count_for_neither_side():
    reference, prediction = blobs(4), blobs(5)
    reference[:, :, 7:] = UNLABELLED
    cut = metrics.dice(prediction[:, :, :7], reference[:, :, :7], 4)
    torch.testing.assert_close(metrics.dice(prediction, reference, 4), cut)
    changed = prediction.clone()
    changed[:, :, 8:] = 3 - prediction[:, :, 8:]  # not beside an annotated voxel, whose surface it would decide
    assert metrics.surface(changed, reference, (1.0, 1.0, 1.0), [1.0] * 3) == metrics.surface(
        prediction, reference, (1.0, 1.0, 1.0), [1.0] * 3
    )


def test_an_annotation_that_ends_is_no_surface():
    """Only the middle slice of a block is annotated, and perfectly predicted but for one side, a voxel off."""
    full = empty(5, 12, 12)
    full[:, 3:9, 3:9] = 1
    prediction = full.clone()
    prediction[:, 3:9, 9] = 1
    reference = torch.full_like(full, UNLABELLED)
    reference[2] = full[2]
    hd95, nsd, _ = metrics.surface(prediction, reference, (1.0, 1.0, 1.0), [0.5])
    shared = 6 + 5 + 5  # left side, top and bottom of two outlines, 6 x 6 and 6 x 7, of 20 and 22 voxels
    assert hd95 == [1.0]
    assert nsd == pytest.approx([2 * shared / (20 + 22)])  # as a lone slice all 36 and 42 voxels would be surface


def test_missed_and_hallucinated_are_counted_apart_from_the_means():
    reference, prediction = empty(3, 4, 4), empty(3, 4, 4)
    reference[1, 1, 1] = 1
    prediction[1, 1, 1:3] = 2
    prediction[2, 2, 2] = 3
    classes = (*CLASSES, "kidney", "aorta")
    scores = metrics.score_volume(prediction, volume(reference, (2.0, 5.0, 10.0)), classes, "test")
    summary = metrics.aggregate(scores)
    assert (summary.absent, summary.missed, summary.hallucinated) == (1, 1, 2)
    assert summary.mean["dice"] == 0
    assert math.isnan(summary.mean["hd95_mm"])
    by_name = {(score.class_name, score.metric): score.value for score in scores}
    assert by_name["liver", "reference_ml"] == pytest.approx(0.1)
    assert by_name["spleen", "predicted_ml"] == pytest.approx(0.2)
    assert by_name["spleen", "hd95_mm"] == math.inf


def test_iou_and_accuracy_are_those_of_a_count_by_hand():
    """The cells of a confusion matrix, counted pair by pair; voxels that nobody annotated do not count."""
    generator = torch.Generator().manual_seed(0)
    reference, prediction = (torch.randint(0, 3, (3, 6, 5), generator=generator).to(torch.uint8) for _ in range(2))
    reference[0] = UNLABELLED
    scores = metrics.score_volume(prediction, volume(reference), (*CLASSES[:3], "none"), "test")
    by_name = {(score.class_name, score.metric): score.value for score in scores}
    pairs = list(zip(prediction[1:].flatten().tolist(), reference[1:].flatten().tolist(), strict=True))
    for class_id, name in enumerate(CLASSES[1:3], 1):
        either = [pair for pair in pairs if class_id in pair]
        assert by_name[name, "iou"] == pytest.approx(sum(p == r for p, r in either) / len(either))
    assert math.isnan(by_name["none", "iou"])
    assert by_name["all with background", "accuracy"] == pytest.approx(sum(p == r for p, r in pairs) / len(pairs))


def test_overlap_of_zero_is_neither_missed_nor_hallucinated():
    reference, prediction = empty(1, 4, 4), empty(1, 4, 4)
    reference[0, 0, 0] = prediction[0, 3, 3] = 1
    summary = metrics.aggregate(metrics.score_volume(prediction, volume(reference), CLASSES[:2], "val", metrics="dice"))
    assert (summary.absent, summary.missed, summary.hallucinated) == (0, 0, 0)
    assert summary.mean["dice"] == 0


def test_a_patient_of_two_volumes_weighs_as_much_as_one_of_one():
    summary = metrics.aggregate(
        rows(
            {
                ("anna", "left", "liver", "dice"): 0.8,
                ("anna", "left", "spleen", "dice"): 0.6,
                ("anna", "right", "liver", "dice"): 0.5,
                ("anna", "right", "spleen", "dice"): math.nan,
                ("bert", "bert", "liver", "dice"): 1.0,
                ("bert", "bert", "spleen", "dice"): 0.0,
            }
        )
    )
    assert summary.by_patient["dice"] == pytest.approx({"anna": (0.7 + 0.5) / 2, "bert": 0.5})
    assert summary.mean["dice"] == pytest.approx((0.6 + 0.5) / 2)
    assert summary.by_class["dice"] == pytest.approx({"liver": (0.65 + 1) / 2, "spleen": (0.6 + 0) / 2})


def test_validation_and_test_make_no_common_mean():
    scores = [Score("a", "a", part, "liver", "dice", 1.0) for part in ("val", "test")]
    with pytest.raises(UsageError, match="test and val make no common mean"):
        metrics.aggregate(scores)


def test_legacy_score_rescues_empty_slices():
    reference, prediction = empty(1, 20, 20), empty(1, 20, 20)
    prediction[0, 0] = 1  # 5 % of a slice without organs
    assert metrics.legacy_slice_dice(prediction, reference) == pytest.approx(2 * 380 / (380 + 400))  # 0.974


def test_legacy_score_forgives_a_hallucinated_organ():
    reference, prediction = empty(1, 100, 100), empty(1, 100, 100)
    reference[0, :10, :20] = prediction[0, :10, :20] = 1  # 2 % of the slice, perfect
    prediction[0, 50:60, :20] = 2  # as large, and not there
    assert metrics.legacy_slice_dice(prediction, reference) == pytest.approx((2 * 9600 / (9600 + 9800) + 1) / 2)  # 0.995
    assert metrics.dice(prediction, reference, 3).tolist() == [1.0, 0.0]


def test_legacy_score_halves_the_cost_of_a_missed_organ():
    reference, prediction = empty(1, 100, 100), empty(1, 100, 100)
    reference[0, :10, :20] = 1  # 2 % of the slice
    assert metrics.legacy_slice_dice(prediction, reference) == pytest.approx(2 * 9800 / (9800 + 10000) / 2)  # 0.495


def test_legacy_score_equals_monai_slice_by_slice():
    from monai.metrics import DiceMetric

    prediction, reference = blobs(6), blobs(7)
    one_hot = [torch.nn.functional.one_hot(ids.long(), 4).movedim(-1, 1) for ids in (prediction, reference)]
    metric = DiceMetric(include_background=True, reduction="mean", ignore_empty=True)
    values = []
    for predicted, actual in zip(*one_hot, strict=True):
        metric.reset()
        metric(predicted[None], actual[None])
        values.append(metric.aggregate().item())
    assert metrics.legacy_slice_dice(prediction, reference) == pytest.approx(np.mean(values), rel=1e-5)


def test_a_volume_without_label_is_refused_by_name():
    with pytest.raises(RunError, match="anna_left of patient anna has no label"):
        metrics.score_volume(empty(3, 4, 4), volume(None), CLASSES, "test")


def test_tolerances_must_fit_the_classes():
    with pytest.raises(UsageError, match=r"1 values for 2 foreground classes \(liver, spleen\)"):
        metrics.tolerances(CLASSES, (2.0,))
    assert metrics.tolerances(CLASSES, None) == [2.0, 2.0]


def test_the_contract_is_printed_without_torch():
    code = "import sys; from medssl.platform import metrics; assert 'torch' not in sys.modules; print(metrics.CONTRACT)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"Metric contract {metrics.VERSION}" in printed
