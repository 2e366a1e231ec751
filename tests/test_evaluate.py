"""Inference over slices, scores and the picture, against networks whose answer is known."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medssl.methods.protocol import UNLABELLED
from medssl.platform import evaluate
from medssl.platform.errors import RunError
from medssl.platform.records import Volume


class Threshold(nn.Module):
    """Class 1 where the first channel is above one half."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([0.5 - x[:, 0], x[:, 0] - 0.5], dim=1)


class Counting(nn.Module):
    """Says nothing; remembers the shapes it was asked for, and its modes while being asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.teacher = nn.Dropout().eval()
        self.shapes: list[tuple[int, ...]] = []
        self.modes: set[tuple[bool, bool, bool]] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        self.modes.add((self.training, self.teacher.training, torch.is_grad_enabled()))
        return torch.zeros(len(x), 3, *x.shape[2:])


def volume(slices: int = 5, channels: int = 1, height: int = 30, width: int = 41) -> Volume:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (slices, channels, height, width), generator=generator, dtype=torch.uint8)
    label = (image[:, 0] > 127).byte()
    return Volume("anna", "anna_left", image, label, (1.0, 1.5, 3.0))


@pytest.mark.parametrize("side", [8, 16, 64])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_sliding_window_equals_whole_slices_for_a_pointwise_network(side, batch):
    torch.manual_seed(0)
    network, scan = nn.Conv2d(2, 4, kernel_size=1), volume(channels=2)
    whole = evaluate.probabilities(network, scan, side=None)
    windows = evaluate.probabilities(network, scan, side=side, batch=batch)
    torch.testing.assert_close(windows, whole)
    assert windows.shape == (5, 4, 30, 41)
    torch.testing.assert_close(windows.sum(1), torch.ones(5, 30, 41))


def test_prediction_is_the_most_probable_class():
    torch.manual_seed(1)
    network, scan = nn.Conv2d(1, 4, kernel_size=3, padding=1), volume()
    prediction = evaluate.infer(network, scan, side=16)
    assert prediction.dtype == torch.uint8
    assert torch.equal(prediction.long(), evaluate.probabilities(network, scan, side=16).argmax(1))


def test_windows_that_meet_are_averaged():
    """A 12-pixel row, windows of 8 that start at 0 and 4: each says its own mean, and the middle hears both."""

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((1, 2, 3), keepdim=True).expand_as(x).clone()

    image = torch.arange(12.0).expand(1, 1, 8, 12)
    logits = evaluate._forward(Mean(), Volume("a", "a", image, None, (1.0, 1.0, 1.0)), lambda x: x, 8, 0.25, 64, None)
    assert logits[0, 0, 0].tolist() == [3.5] * 4 + [(3.5 + 7.5) / 2] * 4 + [7.5] * 4


@pytest.mark.parametrize(("side", "largest"), [(None, 4), (8, 4), (64, 4)])
def test_no_forward_pass_is_larger_than_the_batch(side, largest):
    network = Counting()
    evaluate.infer(network, volume(slices=6), side=side, batch=4)
    assert max(shape[0] for shape in network.shapes) == largest
    assert {shape[2:] for shape in network.shapes} == {(30, 41) if side is None else (side, side)}


def test_every_module_gets_its_own_mode_back():
    network = Counting().train()
    network.teacher.eval()
    evaluate.infer(network, volume(), side=None)
    assert network.modes == {(False, False, False)}
    assert network.training
    assert not network.teacher.training


def test_modes_come_back_after_a_failure():
    network = nn.Conv2d(3, 2, kernel_size=1)  # of three channels, where the volume has one
    with pytest.raises(RuntimeError):
        evaluate.infer(network, volume(), side=None)
    assert network.training


def test_a_perfect_network_scores_one():
    scores = evaluate.score(Threshold(), [volume()], ["background", "organ"], "val", side=16)
    found = {score.metric: score.value for score in scores}
    assert found["dice"] == found["nsd"] == 1
    assert found["hd95_mm"] == 0
    assert found["reference_ml"] == found["predicted_ml"] > 0


def test_scores_are_of_the_part_and_metrics_asked_for():
    quick = evaluate.score(Threshold(), [volume()], ["background", "organ"], "val", side=None, metrics="dice")
    legacy = evaluate.score(Threshold(), [volume()], ["background", "organ"], "test", side=None, metrics=("legacy",))
    assert {(score.metric, score.part) for score in quick} == {(m, "val") for m in ("dice", "reference_ml", "predicted_ml")}
    assert {(score.metric, score.part, score.value) for score in legacy} == {("legacy-slice-dice", "test", 1.0)}


def test_a_volume_without_label_is_refused_by_name():
    unlabelled = Volume("anna", "anna_right", volume().image, None, (1.0, 1.0, 1.0))
    with pytest.raises(RunError, match="anna_right of patient anna has no label"):
        evaluate.score(Threshold(), [unlabelled], ["background", "organ"], "val", side=None)


def test_picture_shows_worst_and_best_slices_with_contours():
    image = torch.zeros(6, 1, 20, 24, dtype=torch.uint8)
    label = torch.zeros(6, 20, 24, dtype=torch.uint8)
    label[:, 5:12, 5:12] = 1
    label[5] = UNLABELLED
    prediction = label.clone() * (label == 1)
    prediction[2] = 0  # missed
    scan = Volume("a", "a", image, label, (1.0, 2.0, 5.0))
    drawn = evaluate.picture(scan, prediction, slices=2)
    assert drawn.dtype == np.uint8
    assert drawn.ndim == 3
    assert drawn.shape[2] == 3
    colourful = (drawn.max(2) - drawn.min(2)) > 60
    left, right = np.array_split(colourful, 2, axis=1)
    assert left.sum() > 0  # worst: the reference alone
    assert right.sum() > left.sum()  # best: both


@pytest.mark.parametrize("class_id", [0, 1])
def test_picture_of_a_uniform_volume_has_no_contours_and_no_warning(class_id):
    label = torch.full((2, 8, 8), class_id, dtype=torch.uint8)
    scan = Volume("a", "a", torch.zeros(2, 1, 8, 8), label, (1.0, 1.0, 1.0))
    assert evaluate.picture(scan, label).max() > 0
