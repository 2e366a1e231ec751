"""Rate and decay are their closed forms at every step, and each parameter is in the group that it belongs to."""

import math

import pytest
import torch
from torch import nn

from medssl.methods.lars import LARS
from medssl.methods.optimizers import build, decay_groups, hold, learning_rate, set_lr, set_weight_decay, weight_decay
from medssl.methods.protocol import Step
from medssl.methods.settings import Training

OPTIMIZERS = ["sgd", "lars", "adam", "adamw"]


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


@pytest.mark.parametrize("name", OPTIMIZERS)
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
    with pytest.raises(ValueError, match='optimizer "lion": expected sgd, lars, adam or adamw'):
        build(Toy(), Training(optimizer="lion"))


def test_weight_decay_stays_or_goes_to_its_end_along_a_cosine():
    assert [weight_decay(Training(weight_decay=0.3), k, 10) for k in range(10)] == [0.3] * 10
    rising = Training(weight_decay=0.04, end_weight_decay=0.4, warmup=0.2)
    wanted = [0.4 - 0.18 * (1 + math.cos(math.pi * k / 10)) for k in range(11)]  # without a warm-up of its own
    assert [weight_decay(rising, k, 10) for k in range(11)] == pytest.approx(wanted)
    with pytest.raises(ValueError, match="end_weight_decay is -1"):
        Training(end_weight_decay=-1)


def test_scheduled_decay_reaches_what_decays_and_no_bias_or_scale():
    optimizer = build(Toy(), Training(weight_decay=0.1))
    set_weight_decay(optimizer, 0.25)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0, 0.25, 0]


def test_a_groups_rate_is_its_multiple_of_the_scheduled_one_or_of_the_base():
    toy = Toy()
    toy.parameter_groups = lambda decay: [
        *decay_groups(toy.body, decay, lr_scale=0.5),
        *decay_groups(toy.head, decay, fixed_lr=True, lr_scale=2),
    ]
    optimizer = build(toy, Training(lr=0.8))
    set_lr(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05, 1.6, 1.6]


def test_without_leaves_a_part_to_groups_of_its_own():
    toy = Toy()
    rest = {p for group in decay_groups(toy, 0.1, without=toy.body) for p in group["params"]}
    assert rest == set(toy.head.parameters())


def test_adam_adds_its_decay_to_the_gradient():
    """First step of Adam on g + λ w: m = u, v = u², w ← w - η u / (|u| + ε); AdamW's would be w (1 - η λ) - η sign(g)."""
    toy = Toy()
    optimizer = build(toy, Training(optimizer="adam", lr=0.1, weight_decay=0.5))
    w = toy.head.weight.detach().clone()
    toy.head.weight.grad = torch.full_like(w, 0.01)
    optimizer.step()
    u = 0.01 + 0.5 * w
    torch.testing.assert_close(toy.head.weight.detach(), w - 0.1 * u / (u.abs() + 1e-8))


def test_lars_adapts_and_decays_weights_and_leaves_biases_and_scales_alone():
    optimizer = build(Toy(), Training(optimizer="lars", weight_decay=0.1, eta=0.02, clip_lr=True))
    assert isinstance(optimizer, LARS)
    assert [(group["exempt"], group["weight_decay"]) for group in optimizer.param_groups] == [(False, 0.1), (True, 0)] * 2
    assert all((group["eta"], group["clip_lr"]) == (0.02, True) for group in optimizer.param_groups)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_frozen_does_not_move_by_a_bit_and_then_starts_afresh(name):
    """From its release on it moves as under an optimizer that has just been built, in company of one that has a past."""
    training, total = Training(optimizer=name, lr=0.1, end_lr=0.1, weight_decay=0.1), 10

    def toy_and_optimizer(frozen):
        toy = Toy()
        toy.parameter_groups = lambda decay: [*decay_groups(toy.body, decay, frozen=frozen), *decay_groups(toy.head, decay)]
        return toy, build(toy, training)

    def step(toy, optimizer, index):
        rng = torch.Generator().manual_seed(index)
        for p in toy.parameters():
            p.grad = torch.randn(p.shape, generator=rng)
        hold(optimizer, Step(index, total))
        optimizer.step()

    held, optimizer = toy_and_optimizer(0.4)
    before = [p.detach().clone() for p in held.body.parameters()]
    head = held.head.weight.detach().clone()
    for index in range(4):
        step(held, optimizer, index)
    assert all(torch.equal(p, old) for p, old in zip(held.body.parameters(), before, strict=True))
    assert not torch.equal(held.head.weight, head)

    fresh, other = toy_and_optimizer(0.0)
    for index in range(4, 8):
        step(held, optimizer, index)
        step(fresh, other, index)
    for p, q, old in zip(held.body.parameters(), fresh.body.parameters(), before, strict=True):
        assert torch.equal(p, q)
        assert not torch.equal(p, old)
