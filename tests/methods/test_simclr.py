"""Facts of SimCLR: its loss by the definition, at logits known by hand, and at its extremes; what its monitors see."""

import math

import pytest
import torch
from torch import Tensor, nn

from medssl.methods.networks.unet import Config as UNetConfig
from medssl.methods.networks.unet import UNet
from medssl.methods.protocol import Step, Views
from medssl.methods.simclr import Config, SimCLR, Training, similarities

STEP = Step(0, 10)


class Flat(nn.Module):
    """An encoder whose feature is its input: (n, features, 1, 1) to that very map."""

    def __init__(self, features: int):
        super().__init__()
        self.channels = (features,)

    def forward(self, x):
        return [x]


def bare(temperature: float = 0.1, features: int = 6) -> SimCLR:
    """SimCLR of the features themselves: z = y."""
    method = SimCLR(Flat(features), Config(side=1, temperature=temperature))
    method.projector = nn.Identity()
    return method


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> float:
    """Eq. 1 and algorithm 1, one view after the other."""
    z = [[float(v) for v in row] for row in torch.cat([z1, z2]).double()]

    def cosine(a, b):
        return math.fsum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    n, total = len(z1), 0.0
    for i in range(2 * n):
        others = math.fsum(math.exp(cosine(z[i], z[k]) / temperature) for k in range(2 * n) if k != i)
        total -= math.log(math.exp(cosine(z[i], z[(i + n) % (2 * n)]) / temperature) / others)
    return total / (2 * n)


@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.5, 1.0])
def test_loss_is_equation_1(temperature):
    z1, z2 = rows(2, 5, 6)
    loss = bare(temperature).loss(Views([z1[..., None, None], z2[..., None, None]]), STEP)
    assert float(loss.total) == pytest.approx(nt_xent(z1, z2, temperature), rel=1e-5)


def test_logits_of_two_orthogonal_pairs_are_those_of_the_hand():
    """Partners at cosine 1, strangers at 0, τ = 1/2; lengths play no part."""
    z1, z2 = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    logits, partners = similarities(z1, z2, 0.5)
    x = -math.inf
    assert logits.tolist() == [[x, 0, 2, 0], [0, x, 0, 2], [2, 0, x, 0], [0, 2, 0, x]]
    assert partners.tolist() == [2, 3, 0, 1]
    loss = bare(0.5, 2).loss(Views([z1[..., None, None], z2[..., None, None]]), STEP)
    assert float(loss.total) == pytest.approx(math.log((math.e**2 + 2) / math.e**2), rel=1e-6)
    assert float(loss.monitors["accuracy"]) == 1


def test_views_that_are_all_the_same_cost_the_logarithm_of_their_number():
    """A collapse: 2N - 1 equal candidates, at any temperature."""
    same = torch.ones(4, 6, 1, 1)
    loss = bare().loss(Views([same, same]), STEP)
    assert float(loss.total) == pytest.approx(math.log(7), rel=1e-6)
    assert float(loss.monitors["collapse"]) == pytest.approx(1, abs=1e-5)
    assert float(loss.monitors["feature_spread"]) == pytest.approx(0, abs=1e-5)
    assert float(loss.monitors["effective_rank"]) == pytest.approx(1, abs=1e-3)


def test_accuracy_is_zero_when_partners_are_swapped():
    x = torch.eye(6)[:4, :, None, None]
    assert float(bare().loss(Views([x, x.roll(1, 0)]), STEP).monitors["accuracy"]) == 0


def test_a_batch_without_strangers_costs_nothing():
    assert float(bare().loss(Views(list(rows(2, 1, 6, 1, 1))), STEP).total) == pytest.approx(0, abs=1e-6)


def test_similarities_stay_in_float32_under_autocast():
    z1, z2 = rows(2, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = similarities(z1, z2, 0.1)
    assert torch.equal(logits, similarities(z1, z2, 0.1)[0])


def test_gradient_reaches_every_parameter():
    torch.manual_seed(0)
    method = SimCLR(UNet(1, 2, UNetConfig(width=4, levels=3)).encoder, Config(side=16, d=8))
    method.loss(Views(list(rows(2, 5, 1, 16, 16))), STEP).total.backward()
    assert [name for name, p in method.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_defaults_are_those_of_the_paper():
    """On ImageNet: τ = 0.1, 128 outputs, a hidden layer as wide as the features; LARS, 10 of 100 epochs of warm-up."""
    assert (Config().temperature, Config().d) == (0.1, 128)
    method = SimCLR(Flat(20), Config())
    assert [tuple(m.weight.shape) for m in method.projector if isinstance(m, nn.Linear)] == [(20, 20), (128, 20)]
    training = Training()
    assert (training.weight_decay, training.warmup, training.epochs) == (1e-6, 0.1, 100)
    assert (training.optimizer, training.lr) == ("lars", pytest.approx(0.3 * training.batch / 256))


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"d": 0}, {"hidden": 0}])
def test_wrong_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Config(**wrong)


def test_an_unresolved_side_is_refused():
    with pytest.raises(ValueError, match=r"simclr: the side of a view is not known; set pretrain\.side"):
        SimCLR(Flat(4)).augment({"image": torch.rand(2, 1, 8, 8), "size": torch.full((2, 2), 8)}, torch.Generator())
