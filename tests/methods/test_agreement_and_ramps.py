"""Distances and ramps have the values of the Contrast-You oracle (float64) and of closed forms."""

import math

import pytest
import torch

from medssl.methods import agreement, settings
from medssl.methods.protocol import Step
from medssl.methods.ramps import ramp, weight

A = torch.tensor(
    [[[[0.0067, 0.4752], [0.6592, 0.1097]], [[0.061, 0.4764], [0.2942, 0.0607]], [[0.9323, 0.0484], [0.0466, 0.8296]]]],
    dtype=torch.float64,
)  # probabilities (1, 3, 2, 2)
B = torch.tensor(
    [[[[0.5287, 0.19], [0.1012, 0.0731]], [[0.345, 0.576], [0.6, 0.2701]], [[0.1263, 0.234], [0.2988, 0.6568]]]],
    dtype=torch.float64,
)
ALL = torch.ones(1, 2, 2, dtype=torch.bool)


def test_distances_are_those_of_the_oracle():
    measured = {
        "squared error": agreement.average(agreement.squared_error(A, B), ALL),
        "KL(b || a)": agreement.average(agreement.divergence(B, A.log()), ALL),
        "entropy": agreement.average(agreement.entropy(A.log()), ALL),
        "to itself hardened": agreement.average(agreement.squared_error(A, agreement.hardened(A)), ALL),
        "of a hardened teacher": agreement.average(agreement.squared_error(B, agreement.hardened(A)), ALL),
    }
    expected = [0.1393344, 0.9930174022577671, 0.616976611432756, 0.06335736, 0.24047826]
    assert [float(value) for value in measured.values()] == pytest.approx(expected, abs=1e-9)


def test_means_are_over_valid_pixels_alone_and_zero_without_any():
    values = torch.tensor([[1.0, 2.0], [3.0, float("nan")]], requires_grad=True)
    assert float(agreement.average(values, torch.tensor([[True, False], [True, False]])).detach()) == 2
    none = agreement.average(values, torch.zeros(2, 2, dtype=torch.bool))
    none.backward()
    assert float(none.detach()) == 0
    assert not values.grad.any()


def test_certainty_has_no_entropy_and_a_gradient():
    logits = torch.tensor([[[200.0]], [[-200.0]]]).movedim(0, 1).requires_grad_()
    entropy = agreement.entropy(logits.log_softmax(1)).sum()
    entropy.backward()
    assert float(entropy.detach()) == 0
    assert torch.isfinite(logits.grad).all()
    target = torch.tensor([[[1.0], [0.0]]])
    assert float(agreement.divergence(target, torch.tensor([[[0.5], [0.5]]]).log())) == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("kind", "heights"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [0, 0.25, 1, 1]),
        ("sigmoid", [math.exp(-5), math.exp(-5 * 0.75**2), 1, 1]),
    ],
)
def test_ramps_have_their_heights(kind, heights):
    assert [ramp(kind, u) for u in (-1.0, 0.25, 1.0, 2.0)] == pytest.approx(heights, abs=1e-12)


def test_a_weight_is_whole_after_its_ramp():
    hook = settings.Hook(weight=4.0, ramp="linear", ramp_length=0.5)
    assert [weight(hook, Step(index, 8)) for index in range(8)] == [0, 1, 2, 3, 4, 4, 4, 4]
    with pytest.raises(ValueError, match="ramp_length is 0"):
        settings.Hook(ramp_length=0)
