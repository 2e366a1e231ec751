"""Facts of VICReg: its three terms by NumPy and at their extremes."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medssl.methods.networks.unet import Config as UNetConfig
from medssl.methods.networks.unet import UNet
from medssl.methods.protocol import Step, Views
from medssl.methods.vicreg import Config, Training, VICReg, covariance, variance

STEP = Step(0, 10)


class Flat(nn.Module):
    """An encoder whose feature is its input: (n, features, 1, 1) to that very map."""

    def __init__(self, features: int):
        super().__init__()
        self.channels = (features,)

    def forward(self, x):
        return [x]


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def terms(z1: Tensor, z2: Tensor, **settings: float) -> dict[str, float]:
    """The loss of the features themselves: z = y."""
    method = VICReg(Flat(z1.shape[1]), Config(side=1, d=1, hidden=1, **settings))
    method.expander = nn.Identity()
    views = Views([z1[..., None, None], z2[..., None, None]])
    return {key: float(value) for key, value in method.loss(views, STEP).terms.items()}


@pytest.mark.parametrize(("n", "d"), [(12, 4), (4, 12), (6, 6)])
def test_terms_are_those_of_numpy(n, d):
    z1, z2 = rows(2, n, d) * torch.linspace(0.3, 1.5, d) + 2  # some columns below gamma, some above
    expected = {"invariance": 25 * np.mean((z1.double().numpy() - z2.double().numpy()) ** 2), "variance": 0, "covariance": 0}
    for z in (z1.double().numpy(), z2.double().numpy()):
        expected["variance"] += 25 * np.maximum(0, 1 - np.sqrt(z.var(axis=0, ddof=1) + 1e-4)).mean()
        cov = np.cov(z, rowvar=False)
        expected["covariance"] += sum(cov[i, j] ** 2 for i in range(d) for j in range(d) if i != j) / d
    assert terms(z1, z2) == pytest.approx(expected, rel=1e-4)


def test_settings_weigh_their_own_term():
    z1, z2 = 0.5 * rows(2, 5, 4)
    base = terms(z1, z2, invariance=1, variance=1, covariance=1)
    for key in base:
        assert terms(z1, z2, **({"invariance": 1, "variance": 1, "covariance": 1} | {key: 3})) == pytest.approx(
            base | {key: 3 * base[key]}
        )


def test_identical_decorrelated_columns_of_deviation_gamma_cost_nothing():
    hadamard = torch.tensor([[1, 1, 1], [-1, 1, -1], [1, -1, -1], [-1, -1, 1]]).float()
    assert terms(hadamard, hadamard) == pytest.approx({"invariance": 0, "variance": 0, "covariance": 0}, abs=1e-8)


def test_a_collapse_costs_gamma_less_the_root_of_epsilon_and_still_has_a_gradient():
    """ε under the root is what keeps the slope of the deviation finite at 0."""
    z = torch.full((6, 4), 3.0, requires_grad=True)
    loss = variance(z, 1.0, 1e-4)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.99)
    assert torch.isfinite(z.grad).all()
    assert terms(z.detach(), z.detach()) == pytest.approx({"invariance": 0, "variance": 2 * 25 * 0.99, "covariance": 0})


def test_one_signal_in_all_columns_costs_d_minus_one_times_its_variance_squared():
    signal = rows(9, 1)
    assert float(covariance(signal.repeat(1, 5))) == pytest.approx(4 * float(signal.var()) ** 2, rel=1e-5)


def test_no_term_sees_a_common_offset():
    z1, z2 = rows(2, 6, 4)
    assert terms(z1 + 5, z2 + 5) == pytest.approx(terms(z1, z2), rel=1e-3)


def test_covariance_stays_in_float32_under_autocast():
    z = rows(6, 9)
    with torch.autocast("cpu", torch.bfloat16):
        inside = covariance(z)
    assert inside == covariance(z)


def test_gradient_reaches_every_parameter():
    torch.manual_seed(0)
    method = VICReg(UNet(1, 2, UNetConfig(width=4, levels=3)).encoder, Config(side=16, d=8, hidden=12))
    method.loss(Views(list(rows(2, 5, 1, 16, 16))), STEP).total.backward()
    assert [name for name, p in method.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_collapse_is_seen_in_the_embedding():
    method = VICReg(Flat(4), Config(side=1, d=1, hidden=1))
    method.expander = nn.Identity()
    collapsed = 1 + 1e-3 * rows(8, 4, 1, 1)
    assert method.loss(Views([collapsed, collapsed]), STEP).monitors["collapse"] > 0.95


def test_defaults_are_those_of_the_paper():
    config = Config()
    assert (config.invariance, config.variance, config.covariance) == (25, 25, 1)
    assert (config.gamma, config.epsilon, config.d, config.hidden) == (1, 1e-4, 8192, 8192)
    training = Training()
    assert (training.optimizer, training.lr, training.weight_decay) == ("lars", 0.2 * training.batch / 256, 1e-6)


@pytest.mark.parametrize("wrong", [{"covariance": -1.0}, {"gamma": 0.0}, {"epsilon": 0.0}, {"d": 0}, {"hidden": 0}])
def test_wrong_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Config(**wrong)
