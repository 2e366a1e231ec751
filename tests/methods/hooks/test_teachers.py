"""Mean teachers follow their rule, teach what they say, and are asked only where they are sure: values of the oracle."""

import math

import pytest
import torch
from torch import nn

from medssl.methods import augment, settings
from medssl.methods.hooks.cutmix import Config as CutMixConfig
from medssl.methods.hooks.cutmix import CutMix, half_boxes
from medssl.methods.hooks.mean_teacher import Config, MeanTeacher, distribution, follow
from medssl.methods.hooks.uncertainty_mean_teacher import Config as UncertainConfig
from medssl.methods.hooks.uncertainty_mean_teacher import UncertaintyMeanTeacher, among_sure, bound
from medssl.methods.protocol import Step, Views
from medssl.methods.segment import Config as SegmentConfig
from medssl.methods.segment import Pass
from medssl.methods.teacher import Teacher


def test_the_teacher_follows_the_rule_of_the_oracle():
    student = nn.Linear(1, 1, bias=False).double()
    student.weight.data.fill_(1.0)
    teacher = Teacher(student)
    trace = []
    for index, value in enumerate([2.0, 3.0, 4.0, 5.0]):
        student.weight.data.fill_(value)
        follow(teacher, student, 0.99, 1e-6, Step(index, 10))
        trace.append(float(teacher.network.weight))
    assert trace == pytest.approx([1.999998, 2.4999965000009996, 2.999994666669666, 3.4999925000062495], abs=1e-9)


def test_the_share_that_a_teacher_keeps_ends_at_the_momentum():
    student = nn.Linear(1, 1, bias=False).double()
    student.weight.data.zero_()
    teacher = Teacher(student)
    teacher.network.weight.data.fill_(1.0)
    follow(teacher, student, 0.99, 0.0, Step(1000, 2000))
    assert float(teacher.network.weight) == pytest.approx(0.99)


@pytest.mark.parametrize(("progress", "threshold", "loss"), [
    (1 / 75, 1.0443417520436509, 0.1470588235294118),
    (40 / 75, 1.2245600189892367, 0.1973684210526316),
    (1.0, 1.3862943611198906, 0.24752475247524752),
])  # fmt: skip
def test_sure_pixels_and_their_mean_are_those_of_the_oracle(progress, threshold, loss):
    entropy = torch.tensor([[[0.2, 0.9], [1.05, 1.3]]], dtype=torch.float64)
    distance = torch.tensor([[[0.1, 0.2], [0.3, 0.4]]], dtype=torch.float64)
    assert bound(4, "linear", progress) == pytest.approx(threshold, abs=1e-9)
    sure = entropy < bound(4, "linear", progress)
    measured = among_sure(distance, sure, torch.ones_like(sure))
    assert float(measured) == pytest.approx(loss, abs=1e-9)


def test_the_papers_bound_rises_along_a_sigmoid():
    assert bound(2, "sigmoid", 0.0) == pytest.approx((0.75 + 0.25 * math.exp(-5)) * math.log(2))


def passed(network: nn.Module) -> Pass:
    """Three crops, turned and flipped, without a zoom."""
    rng = torch.Generator().manual_seed(0)
    image = torch.rand(3, 1, 6, 6, generator=rng)
    size = torch.full((3, 2), 6)
    first, second = settings.Chain(), settings.Chain(zoom_p=0.0)
    pair = augment.unlabelled_pair(image, size, torch.zeros_like(size), 6, first, second, rng)
    return Pass(network, SegmentConfig(), Views([image]), pair)


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(1, 3, 3, padding=1)


def turned(maps: torch.Tensor, pass_: Pass) -> torch.Tensor:
    """T by torch.flip and torch.rot90, sample by sample."""
    moved = []
    for single, flips, turns in zip(maps, pass_.pair.geometry.flips, pass_.pair.geometry.turns, strict=True):
        axes = [axis + 1 for axis, flip in enumerate(flips.tolist()) if flip]
        moved.append(torch.rot90(single.flip(axes), int(turns), (1, 2)))
    return torch.stack(moved)


@pytest.mark.parametrize("target", ["soft", "hard"])
def test_a_teacher_teaches_its_moved_probabilities(target):
    student, other = networks()
    hook, pass_ = MeanTeacher(other, Config(weight=1.0, ramp="constant", target=target)), passed(student)
    (term,) = hook.terms(pass_, {}, Step(0, 10)).terms.values()
    p = other(pass_.pair.image).softmax(1)
    p = p if target == "soft" else nn.functional.one_hot(p.argmax(1), 3).movedim(-1, 1).float()
    expected = (turned(p, pass_) - student(pass_.pair.moved).softmax(1)).square().mean()
    torch.testing.assert_close(term, expected)
    assert torch.equal(distribution(other(pass_.pair.image), target), p)


def test_an_unsure_teacher_is_asked_where_its_noisy_passes_agree():
    student, other = networks()
    other.weight.data.mul_(8)
    config = UncertainConfig(weight=1.0, ramp="constant", passes=3, threshold="linear")
    hook, pass_ = UncertaintyMeanTeacher(other, config), passed(student)
    drawn = hook.draw(pass_.pair, torch.Generator().manual_seed(1))
    assert drawn["noise"].shape == (3, 3, 1, 6, 6)
    loss = hook.terms(pass_, drawn, Step(0, 10))
    q = torch.stack([other(pass_.pair.image + noise).softmax(1) for noise in drawn["noise"]]).mean(0)
    sure = turned((torch.distributions.Categorical(q.movedim(1, -1)).entropy() < 0.75 * math.log(3))[:, None], pass_)[:, 0]
    distance = (turned(q, pass_) - student(pass_.pair.moved).softmax(1)).square().mean(1)
    expected = (distance * sure).mean() / (sure.float().mean() + 0.01)
    torch.testing.assert_close(loss.terms["mse"], expected)
    assert 0 < float(loss.monitors["sure"]) < 1
    torch.testing.assert_close(loss.monitors["sure"], sure.float().mean())


@pytest.mark.parametrize("sides", [(20, 20), (16, 16, 16)])
def test_boxes_hold_half_of_a_crop_and_reach_everywhere(sides):
    boxes = half_boxes(torch.Size((2000, *sides)), torch.Generator().manual_seed(0))
    share = boxes.flatten(1).float().mean(1)
    assert abs(float(share.mean()) - 0.5) < 0.01
    assert ((share - 0.5).abs() < 0.08).all()  # sides are whole pixels
    for axis in range(1, len(sides) + 1):
        other = [place for place in range(1, len(sides) + 1) if place != axis]
        assert boxes.any(dim=tuple(other)).any(0).all()
    long = boxes.any(dim=tuple(range(2, len(sides) + 1))).sum(1) / sides[0]
    assert float(long.min()) < 0.6
    assert float(long.max()) > 0.9


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_pasted_crops_are_taught_the_pasted_predictions(threshold):
    student, other = networks()
    other.weight.data.mul_(4)
    hook, pass_ = CutMix(other, CutMixConfig(threshold=threshold)), passed(student)
    drawn = hook.draw(pass_.pair, torch.Generator().manual_seed(1))
    loss = hook.terms(pass_, drawn, Step(0, 10))
    x, q = pass_.pair.image, other(pass_.pair.image).softmax(1)
    pasted, target = x[drawn["partner"]].clone(), q[drawn["partner"]].clone()
    for row, box in enumerate(drawn["box"]):
        pasted[row, :, box], target[row, :, box] = x[row, :, box], q[row, :, box]
    sure = (q.amax(1) > threshold).float().mean()
    torch.testing.assert_close(loss.terms["mse"], sure * (target - student(pasted).softmax(1)).square().mean())
    assert threshold == 0 or 0 < float(sure) < 1
    assert sorted(drawn["partner"].tolist()) == [0, 1, 2]
