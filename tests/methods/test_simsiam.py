"""Facts of SimSiam: its loss at p = z, the stopped gradient, the size of its heads, and what its monitors can see."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medssl.methods import monitors
from medssl.methods.networks.unet import Config as UNetConfig
from medssl.methods.networks.unet import UNet
from medssl.methods.optimizers import build, set_lr
from medssl.methods.protocol import Step, Views
from medssl.methods.simsiam import Config, SimSiam, Training, negative_cosine

STEP = Step(0, 10)


class Flat(nn.Module):
    """An encoder whose feature is its input: (n, features, 1, 1) to that very map."""

    def __init__(self, features: int):
        super().__init__()
        self.channels = (features,)

    def forward(self, x):
        return [x]


def method(**settings) -> SimSiam:
    torch.manual_seed(0)
    encoder = UNet(1, 2, UNetConfig(width=4, levels=3)).encoder
    return SimSiam(encoder, Config(**({"side": 16, "d": 32, "bottleneck": 8} | settings)))


def batch(n: int = 6, side: int = 40) -> dict[str, torch.Tensor]:
    image = torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(1))
    return {"image": image, "size": torch.full((n, 2), side)}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_loss_is_minus_one_when_the_prediction_is_the_projection():
    simsiam = method()
    simsiam.predictor = nn.Identity()
    x = torch.rand(5, 1, 16, 16)
    assert float(simsiam.loss(Views([x, x]), STEP).total.detach()) == pytest.approx(-1, abs=1e-6)


def test_loss_equals_equation_4():
    simsiam, views = method(), Views(list(torch.rand(2, 5, 1, 16, 16)))
    z = [simsiam.projector(simsiam.encoder(x)[-1].mean((2, 3))) for x in views.images]
    p = [simsiam.predictor(each) for each in z]
    cosines = [
        (a / a.norm(dim=1, keepdim=True) * b / b.norm(dim=1, keepdim=True)).sum(1) for a, b in zip(p, z[::-1], strict=True)
    ]
    torch.testing.assert_close(simsiam.loss(views, STEP).total, -(cosines[0].mean() + cosines[1].mean()) / 2)


def test_negative_cosine_of_a_zero_row_is_zero_and_not_nan():
    assert negative_cosine(torch.zeros(1, 4), torch.ones(1, 4)).tolist() == [0.0]


def test_no_gradient_flows_through_the_projection_of_the_other_view():
    """With a predictor that ignores its input, the projections are targets only: nothing reaches the encoder."""
    simsiam = method()
    simsiam.predictor = nn.Sequential(nn.Linear(32, 32))
    nn.init.zeros_(simsiam.predictor[0].weight)
    simsiam.loss(Views(list(torch.rand(2, 5, 1, 16, 16))), STEP).total.backward()
    assert simsiam.predictor[0].bias.grad.any()
    assert not any(p.grad.any() for p in (*simsiam.encoder.parameters(), *simsiam.projector.parameters()))


def test_heads_have_the_size_of_the_study():
    """10 M and 2.1 M parameters for the 768 features of a Swin encoder."""
    simsiam = SimSiam(Flat(768), Config())
    sizes = [sum(p.numel() for p in head.parameters()) for head in (simsiam.projector, simsiam.predictor)]
    assert sizes == [768 * 2048 + 2 * 2048**2 + 2 * 2 * 2048, 2048 * 512 + 2 * 512 + 512 * 2048 + 2048]
    assert [round(size / 1e6, 2) for size in sizes] == [9.97, 2.1]


def test_only_the_predictor_keeps_the_base_rate():
    simsiam = method()
    optimizer = build(simsiam, Training())
    set_lr(optimizer, 0.001)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in simsiam.predictor.parameters()} == {0.025}
    assert {rates[id(p)] for p in (*simsiam.encoder.parameters(), *simsiam.projector.parameters())} == {0.001}
    assert len(rates) == len(list(simsiam.parameters()))


def test_views_are_pairs_inside_the_interval_with_their_boxes():
    views = method(iou=(0.3, 0.6)).augment(batch(), rng())
    assert [x.shape for x in views.images] == [(6, 1, 16, 16)] * 2
    assert [e.tolist() for e in views.extents] == [[[16, 16]] * 6] * 2
    share = (16 - (views.corners[0] - views.corners[1]).abs()).clamp(min=0).prod(1) / 16**2
    iou = share / (2 - share)
    assert ((iou >= 0.3) & (iou <= 0.6)).all()
    assert float(views.monitors["iou"]) == pytest.approx(float(iou.mean()), abs=1e-6)
    assert float(views.monitors["skipped"]) == 0


def test_slices_that_cannot_hold_a_pair_are_left_out_of_both_views_and_counted():
    held, small = torch.tensor([40, 40]), torch.tensor([18, 18])  # two crops of 16 in 18 overlap by IoU 0.62 at least
    mixed = batch() | {"size": torch.stack([held, small, held, small, small, held])}
    views = method(iou=(0.0, 0.2), unreachable="skip").augment(mixed, rng())
    assert [x.shape for x in views.images] == [(3, 1, 16, 16)] * 2
    assert [len(c) for c in views.corners + views.extents] == [3] * 4
    assert float(views.monitors["skipped"]) == 3
    assert math.isfinite(float(views.monitors["iou"]))


def test_resized_boxes_give_views_of_the_asked_side():
    views = method(crop="resized", iou=None, scale=(0.2, 0.6)).augment(batch(), rng())
    assert [x.shape for x in views.images] == [(6, 1, 16, 16)] * 2
    assert any((e != 16).any() for e in views.extents)


def test_an_unresolved_side_is_refused():
    with pytest.raises(ValueError, match=r"side of a view is not known; set pretrain\.side"):
        method(side=None).augment(batch(), rng())


def test_defaults_are_those_of_the_paper_and_the_study():
    assert (Config().d, Config().bottleneck) == (2048, 512)
    chosen = dataclasses.asdict(Training())
    expected = {
        "optimizer": "sgd",
        "lr": 0.025,
        "momentum": 0.9,
        "weight_decay": 1e-5,
        "end_lr": 1e-6,
        "epochs": 100,
        "batch": 128,
    }
    assert {key: chosen[key] for key in expected} == expected


def test_collapse_is_seen_in_the_prediction_and_invisible_in_the_projection():
    """Features that differ by noise only: the projector's last BatchNorm blows the noise up to unit variance."""
    torch.manual_seed(0)
    simsiam = SimSiam(Flat(32), Config(d=64, bottleneck=8))
    collapsed = torch.ones(128, 32, 1, 1) + 1e-3 * torch.randn(128, 32, 1, 1)
    z = simsiam.projector(collapsed.flatten(1))
    simsiam.predictor = nn.Sequential(nn.Linear(64, 64))
    nn.init.normal_(simsiam.predictor[0].weight, std=1e-4)
    seen = simsiam.loss(Views([collapsed, collapsed]), STEP).monitors
    assert monitors.collapse(z) < 0.1
    assert seen["collapse"] > 0.9
    assert seen["feature_spread"] < 0.02
    assert seen["effective_rank"] < 1.1


def test_monitors_of_isotropic_rows_read_healthy():
    x = torch.randn(2000, 16, generator=rng())
    assert float(monitors.spread(x)) == pytest.approx(1, abs=0.02)
    assert float(monitors.collapse(x)) == pytest.approx(0, abs=0.02)
    assert float(monitors.effective_rank(x)) > 15


@pytest.mark.parametrize("shape", [(20, 8), (8, 20)])
def test_effective_rank_is_the_entropy_of_the_singular_values(shape):
    x = torch.randn(shape, generator=rng())
    share = torch.linalg.svdvals(x)
    share = share / share.sum()
    torch.testing.assert_close(monitors.effective_rank(x), (-(share * share.log()).sum()).exp())


def test_effective_rank_of_k_equal_orthogonal_directions_is_k():
    assert float(monitors.effective_rank(torch.eye(5).repeat(4, 1))) == pytest.approx(5, rel=1e-5)
    assert float(monitors.effective_rank(torch.ones(6, 3))) == pytest.approx(1, rel=1e-5)


def test_monitors_are_detached_and_undefined_for_a_single_row():
    x = torch.randn(4, 3, requires_grad=True)
    for monitor in (monitors.spread, monitors.collapse, monitors.effective_rank):
        assert not monitor(F.relu(x)).requires_grad
        assert math.isnan(monitor(x[:1]))
