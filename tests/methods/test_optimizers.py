"""The learning rate is its closed form at every step, and each parameter is in the group that it belongs to."""

import math

import pytest
import torch
from torch import nn

from medssl.methods.optimizers import build, decay_groups, learning_rate, set_lr
from medssl.methods.settings import Training


class Toy(nn.Module):
    """A body that follows the schedule and a head that does not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), nn.Linear(2, 2)

    def parameter_groups(self, weight_decay):
        return [*decay_groups(self.body, weight_decay), *decay_groups(self.head, weight_decay, fixed_lr=True)]

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def test_schedule_without_warmup_is_the_cosine():
    training = Training(lr=0.025, end_lr=1e-6)
    assert learning_rate(training, 0, 100) == 0.025
    assert learning_rate(training, 50, 100) == pytest.approx((0.025 + 1e-6) / 2)
    assert learning_rate(training, 25, 100) == pytest.approx(1e-6 + (0.025 - 1e-6) * (1 + math.sqrt(0.5)) / 2)
    assert learning_rate(training, 100, 100) == pytest.approx(1e-6)


def test_warmup_rises_linearly_from_zero_and_the_cosine_starts_at_its_top():
    training = Training(lr=1e-3, end_lr=5e-5, warmup=0.1)
    assert [learning_rate(training, k, 100) for k in range(11)] == pytest.approx([k * 1e-4 for k in range(11)])
    assert learning_rate(training, 55, 100) == pytest.approx((1e-3 + 5e-5) / 2)
    assert learning_rate(training, 100, 100) == pytest.approx(5e-5)


def test_schedule_equals_torchs_own():
    training, total = Training(lr=1e-3, end_lr=5e-5, warmup=0.2), 50
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=training.lr)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: k / 10)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - 10, eta_min=training.end_lr)
    theirs = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[10])
    for k in range(total):
        assert learning_rate(training, k, total) == pytest.approx(theirs.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        theirs.step()


def test_only_weights_of_two_and_more_dimensions_decay():
    toy = Toy()
    toy.body[0].bias.requires_grad_(False)
    decays, others = decay_groups(toy, 0.1)
    assert [p.shape for p in decays["params"]] == [(2, 1, 3, 3), (2, 2)]
    assert [p.shape for p in others["params"]] == [(2,), (2,), (2,)]  # scale, shift, head's bias; the frozen one is out
    assert (decays["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_scheduled_groups_follow_and_fixed_groups_keep_the_base_rate(name):
    optimizer = build(Toy(), Training(optimizer=name, lr=0.5))
    set_lr(optimizer, 0.125)
    assert [(group["lr"], group["fixed_lr"]) for group in optimizer.param_groups] == [
        (0.125, False),
        (0.125, False),
        (0.5, True),
        (0.5, True),
    ]


def test_sgd_steps_by_its_closed_form():
    """v ← μ v + g + λ w;  w ← w - η v."""
    toy, x = Toy(), torch.randn(4, 1, 5, 5)
    optimizer = build(toy, Training(optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.01))
    w, v = toy.head.weight.detach().clone(), torch.zeros(2, 2)
    for _ in range(3):
        optimizer.zero_grad()
        toy(x).square().sum().backward()
        v = 0.9 * v + toy.head.weight.grad + 0.01 * w
        w = w - 0.1 * v
        optimizer.step()
    torch.testing.assert_close(toy.head.weight.detach(), w)


def test_fused_adamw_equals_the_plain_one():
    ours, theirs = Toy(), Toy()
    fused = build(ours, Training(optimizer="adamw", lr=1e-2, weight_decay=0.1))
    plain = torch.optim.AdamW(theirs.parameter_groups(0.1), lr=1e-2, foreach=False, fused=False)
    for _ in range(3):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        fused.step()
        plain.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_unknown_optimizer_is_refused_by_name():
    with pytest.raises(ValueError, match='optimizer "lion": expected sgd or adamw'):
        build(Toy(), Training(optimizer="lion"))
