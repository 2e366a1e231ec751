"""Facts of Barlow Twins: its loss by the definition and at its extremes, in both ways of computing it."""

import pytest
import torch
from torch import Tensor, nn

from medssl.methods import pairs
from medssl.methods.barlow_twins import BarlowTwins, Config, Training, objective
from medssl.methods.networks.unet import Config as UNetConfig
from medssl.methods.networks.unet import UNet
from medssl.methods.optimizers import build, set_lr
from medssl.methods.protocol import Step, Views

STEP = Step(0, 10)
HADAMARD = torch.tensor([[1, 1, 1], [-1, 1, -1], [1, -1, -1], [-1, -1, 1]]).float()  # 3 centred, orthogonal columns


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "d"), [(12, 4), (4, 12), (6, 6)])
def test_terms_are_equations_1_and_2(n, d):
    """Sum by sum in float64, with more rows than columns and with fewer."""
    z1, z2 = rows(2, n, d) * 3 + 1
    a, b = ((z - z.mean(0)).tolist() for z in (z1.double(), z2.double()))
    invariance = redundancy = 0.0
    for i in range(d):
        for j in range(d):
            over = sum(a[k][i] * b[k][j] for k in range(n))
            under = sum(a[k][i] ** 2 for k in range(n)) ** 0.5 * sum(b[k][j] ** 2 for k in range(n)) ** 0.5
            if i == j:
                invariance += (1 - over / under) ** 2
            else:
                redundancy += (over / under) ** 2
    assert [float(term) for term in objective(z1, z2)] == pytest.approx([invariance, redundancy], rel=1e-4)


def test_identical_decorrelated_views_cost_nothing():
    assert [float(term) for term in objective(HADAMARD, 5 * HADAMARD + 2)] == pytest.approx([0, 0], abs=1e-8)


def test_opposite_views_cost_four_per_dimension():
    assert [float(term) for term in objective(HADAMARD, -HADAMARD)] == pytest.approx([12, 0], abs=1e-3)


def test_one_signal_in_all_columns_costs_every_pair_of_them():
    same = rows(9, 1).repeat(1, 5)
    assert [float(term) for term in objective(same, same)] == pytest.approx([0, 20], abs=1e-3)


def test_constant_columns_have_no_correlation_and_a_finite_gradient():
    z = torch.ones(6, 4, requires_grad=True)
    invariance, redundancy = objective(z, z)
    (invariance + redundancy).backward()
    assert (float(invariance.detach()), float(redundancy.detach())) == (4, 0)
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize(("n", "d"), [(20, 7), (7, 20)])
def test_off_diagonal_squares_and_their_gradient_are_those_of_the_whole_matrix(n, d):
    a, b = (x.requires_grad_() for x in rows(2, n, d))
    plain = (a.T @ b)[~torch.eye(d, dtype=torch.bool)].square().sum()
    clever = pairs.off_diagonal_squares(a, b)
    torch.testing.assert_close(clever, plain)
    torch.testing.assert_close(torch.autograd.grad(clever, [a, b]), torch.autograd.grad(plain, [a, b]), rtol=1e-4, atol=1e-3)


def test_terms_stay_in_float32_under_autocast():
    z1, z2 = rows(2, 6, 9)
    with torch.autocast("cpu", torch.bfloat16):
        inside = objective(z1, z2)
    assert inside == objective(z1, z2)


def test_gradient_reaches_every_parameter_and_the_terms_are_weighted():
    torch.manual_seed(0)
    method = BarlowTwins(UNet(1, 2, UNetConfig(width=4, levels=3)).encoder, Config(side=16, d=8, hidden=12))
    views = Views(list(rows(2, 5, 1, 16, 16)))
    loss = method.loss(views, STEP)
    z1, z2 = (method.projector(method.encoder(x)[-1].mean((2, 3))) for x in views.images)
    invariance, redundancy = objective(z1, z2)
    torch.testing.assert_close(loss.total, invariance + 5e-3 * redundancy)
    loss.total.backward()
    assert [name for name, p in method.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_collapse_is_seen_in_the_embedding_though_the_loss_normalises_it():
    torch.manual_seed(0)
    method = BarlowTwins(UNet(1, 2, UNetConfig(width=4, levels=3)).encoder, Config(side=16, d=8, hidden=12))
    method.projector = nn.Linear(method.projector[0].in_features, 8)
    nn.init.normal_(method.projector.weight, std=1e-4)
    assert method.loss(Views(list(rows(2, 5, 1, 16, 16))), STEP).monitors["collapse"] > 0.95


def test_defaults_are_those_of_the_paper():
    assert (Config().redundancy, Config().d, Config().hidden) == (5e-3, 8192, 8192)
    assert Training().weight_decay == 1.5e-6


def test_biases_and_norms_can_have_the_papers_smaller_rate():
    """0.2 · batch / 256 for weights and 0.0048 · batch / 256 for the others, at every step of the schedule."""
    training = Training(optimizer="lars", batch=256, lr=0.2)
    method = BarlowTwins(UNet(1, 2, UNetConfig(width=4, levels=3)).encoder, Config(side=16, d=8, hidden=12, bias_lr=0.024))
    optimizer = build(method, training)
    for share in (1.0, 0.5):
        set_lr(optimizer, share * training.lr)
        rates = {p.dim() > 1: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rates == {True: pytest.approx(share * 0.2), False: pytest.approx(share * 0.0048)}


@pytest.mark.parametrize("wrong", [{"redundancy": -1.0}, {"d": 0}, {"hidden": 0}, {"bias_lr": 0.0}])
def test_wrong_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Config(**wrong)
