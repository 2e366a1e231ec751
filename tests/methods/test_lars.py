"""LARS steps by its formula, tensor by tensor, and forgets nothing when it is stopped."""

import io
import math

import pytest
import torch
from torch import Tensor, nn

from medssl.methods.lars import LARS

LR, MOMENTUM, DECAY = 0.3, 0.9, 0.01


def weights() -> list[nn.Parameter]:
    rng = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=rng)) for shape in [(3, 4), (2, 3, 3, 3), (5, 1)]]


def gradients(step: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(step)
    return [torch.randn(w.shape, generator=rng) * 10 ** (i - 1) for i, w in enumerate(weights())]


def stepped(optimizer: LARS, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for w, g in zip(parameters, gradients(step), strict=True):
            w.grad = g
        optimizer.step()


def groups(parameters: list[nn.Parameter]) -> list[dict]:
    *adapted, exempt = parameters
    return [{"params": adapted, "weight_decay": DECAY}, {"params": [exempt], "exempt": True}]


def by_hand(w: list[float], grads: list[list[float]], decay: float, eta: float | None, clip: bool) -> list[float]:
    """Algorithm 1 on plain numbers, in double precision; eta None: exempt."""
    v = [0.0] * len(w)
    for g in grads:
        u = [gi + decay * wi for gi, wi in zip(g, w, strict=True)]
        r = 1.0 if eta is None else eta * math.hypot(*w) / math.hypot(*u)
        if clip and eta is not None:
            r = min(r / LR, 1)
        v = [MOMENTUM * vi + r * ui for vi, ui in zip(v, u, strict=True)]
        w = [wi - LR * vi for wi, vi in zip(w, v, strict=True)]
    return w


@pytest.mark.parametrize("clip", [False, True])
def test_each_tensor_steps_by_the_formula(clip):
    """With η = 0.02 the first tensor's rate is clipped and the second's is not."""
    parameters, steps = weights(), range(5)
    stepped(LARS(groups(parameters), LR, MOMENTUM, eta=0.02, clip_lr=clip), parameters, steps)
    for i, (start, w) in enumerate(zip(weights(), parameters, strict=True)):
        exempt = i == 2
        grads = [gradients(step)[i].flatten().tolist() for step in steps]
        wanted = by_hand(start.flatten().tolist(), grads, 0 if exempt else DECAY, None if exempt else 0.02, clip)
        assert w.flatten().tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_the_first_step_is_the_rate_times_eta_of_a_tensors_length_whatever_the_gradients():
    parameters = weights()
    before = [w.detach().clone() for w in parameters]
    stepped(LARS(parameters, LR, MOMENTUM, eta=0.01), parameters, range(1))
    for w, old in zip(parameters, before, strict=True):
        assert float((w.detach() - old).norm() / old.norm()) == pytest.approx(LR * 0.01, rel=1e-4)


def test_a_clipped_rate_is_never_more_than_plain_sgd():
    parameters = weights()
    before = [w.detach().clone() for w in parameters]
    stepped(LARS(parameters, LR, 0, eta=1e9, clip_lr=True), parameters, range(1))
    for w, old, g in zip(parameters, before, gradients(0), strict=True):
        torch.testing.assert_close(w.detach(), old - LR * g)


def test_a_tensor_of_zeros_takes_a_plain_step_and_a_gradient_of_zeros_none():
    zero, still = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([zero, still], LR)
    zero.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
    optimizer.step()
    assert torch.equal(zero.detach(), torch.full((2, 2), -LR))
    assert torch.equal(still.detach(), torch.ones(2, 2))


def test_what_has_no_gradient_keeps_weight_and_momentum():
    parameters = weights()
    optimizer = LARS(groups(parameters), LR, MOMENTUM)
    stepped(optimizer, parameters, range(2))
    first = parameters[0]
    before, momentum = first.detach().clone(), optimizer.state[first]["momentum"].clone()
    first.grad = None
    optimizer.step()
    assert torch.equal(first, before)
    assert torch.equal(optimizer.state[first]["momentum"], momentum)


def test_saving_loading_and_continuing_equals_not_stopping():
    whole, parts = weights(), weights()
    stepped(LARS(groups(whole), LR, MOMENTUM, eta=0.02), whole, range(6))
    optimizer = LARS(groups(parts), LR, MOMENTUM, eta=0.02)
    stepped(optimizer, parts, range(3))
    file = io.BytesIO()
    torch.save({"weights": parts, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    continued = [nn.Parameter(w.detach().clone()) for w in saved["weights"]]
    optimizer = LARS(groups(continued), lr=7.0)
    optimizer.load_state_dict(saved["optimizer"])
    stepped(optimizer, continued, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, continued, strict=True))
