"""PDCR: known values of the published code, what separates and what does not, and where labels are read."""

import copy
import json
import math
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from medssl.methods import receptive
from medssl.methods.hooks import pdcr as pdcr_module
from medssl.methods.hooks.pdcr import PDCR, Config, averaged, divergence, floor, on_grid, one_hot, pdcr, positions, ratios
from medssl.methods.networks.deeplab import Config as DeepLabConfig
from medssl.methods.networks.deeplab import DeepLabV3Plus
from medssl.methods.networks.unet import Config as UNetConfig
from medssl.methods.networks.unet import UNet
from medssl.methods.networks.unetr import UNETR
from medssl.methods.networks.unetr import Config as UNETRConfig
from medssl.methods.protocol import UNLABELLED, Loss, Step, Views
from medssl.methods.receptive import Field
from medssl.methods.segment import Config as SegmentConfig
from medssl.methods.segment import Segment

KNOWN = json.loads((Path(__file__).parents[1] / "known_pdcr.json").read_text())
STEP = Step(3, 10)
EXACT = {"rtol": 1e-6, "atol": 1e-9}


def known(*keys: str) -> torch.Tensor:
    value = KNOWN
    for key in keys:
        value = value[key]
    return torch.tensor(value, dtype=torch.float64)


def two(foreground: torch.Tensor) -> torch.Tensor:
    """Ratios (n, K, N) of the foreground as a series (K, n, 2, N) of both classes."""
    return torch.stack([1 - foreground, foreground], -2).movedim(1, 0)


def given() -> tuple[torch.Tensor, ...]:
    f1, g1, f2, g2 = (known("inputs", name) for name in ("f1", "g1", "f2", "g2"))
    return f1.requires_grad_(), f2.requires_grad_(), two(g1), two(g2)


SWAPPED = {"reduction": "sum", "orientation": "swapped", "shift": "greatest"}

# Known values


def test_three_vectors_give_the_values_worked_by_hand():
    x = torch.tensor([[[1.0, 0, 1], [0, 1, 1]]], dtype=torch.float64)
    w = two(torch.tensor([[[0, 1, 0.5]]], dtype=torch.float64))
    d = divergence(w, w)
    assert pdcr(x, x, d, **SWAPPED).item() == pytest.approx(11.908828320193251, rel=1e-9)
    assert pdcr(x, x, d, reduction="sum").item() == pytest.approx(8.412441616124093, rel=1e-9)
    assert pdcr(x, x, d).item() == pytest.approx(0.9347157351248992, rel=1e-9)


@pytest.mark.parametrize(("term", "weight"), [("encoder", 0.1), ("decoder", 0.01)])
@pytest.mark.parametrize("average", ["losses", "ratios"])
def test_the_published_2d_code_is_the_swapped_sum_with_its_gradient(term, weight, average):
    f1, _, w1, _ = given()
    series = w1 if average == "losses" else averaged(w1)
    loss = weight * pdcr(f1, f1, divergence(series, series), **SWAPPED).mean()
    case = f"{term}_similarityfirst_{average == 'losses'}"
    torch.testing.assert_close(loss, known("swapped", case, "value"), **EXACT)
    torch.testing.assert_close(torch.autograd.grad(loss, f1)[0], known("swapped", case, "grad_f1"), **EXACT)


def test_the_published_2d_code_with_weights_a_temperature_and_two_layers():
    f1, f2, w1, w2 = given()
    weighted = averaged(w1, (1.0, 2.0, 3.0))
    case = 0.1 * pdcr(f1, f1, divergence(weighted, weighted), **SWAPPED).mean()
    torch.testing.assert_close(case, known("swapped", "encoder_similarityfirst_False_weights_1_2_3", "value"), **EXACT)
    d1, d2 = divergence(w1, w1), divergence(w2, w2)
    case = 0.1 * pdcr(f1, f1, d1, 0.5, **SWAPPED).mean()
    torch.testing.assert_close(case, known("swapped", "encoder_similarityfirst_True_tau_0.5", "value"), **EXACT)
    case = 0.1 * (pdcr(f1, f1, d1, **SWAPPED).mean() + pdcr(f2, f2, d2, **SWAPPED).mean())
    torch.testing.assert_close(case, known("swapped", "encoder_two_layers_similarityfirst_True", "value"), **EXACT)
    torch.testing.assert_close(pdcr(f1, f1, d1, **SWAPPED), known("swapped", "per_patch_sum"), **EXACT)


@pytest.mark.parametrize("average", ["losses", "ratios"])
def test_the_published_2d_code_across_layers_divides_by_the_patches_either_way(average):
    f1, f2, w1, w2 = given()
    a, b = (w1, w2) if average == "losses" else (averaged(w1), averaged(w2))
    loss = 0.01 * pdcr(f1, f2, divergence(a, b), **SWAPPED).sum() / 3
    case = f"multi_similarityfirst_{average == 'losses'}"
    torch.testing.assert_close(loss, known("swapped", case, "value"), **EXACT)
    for x, name in ((f1, "grad_f1"), (f2, "grad_f2")):
        gradient = torch.autograd.grad(loss, x, retain_graph=True)[0]
        torch.testing.assert_close(gradient, known("swapped", case, name), **EXACT)


def test_the_papers_assignment_has_its_known_values():
    f1, f2, w1, w2 = given()
    d = divergence(w1, w1)
    torch.testing.assert_close(pdcr(f1, f1, d), known("paper", "correct_orientation_mean_per_patchsize"), **EXACT)
    torch.testing.assert_close(pdcr(f1, f1, d).mean(), known("paper", "correct_orientation_mean_avg_over_patchsizes"), **EXACT)
    summed = pdcr(f1, f1, d, reduction="sum")
    torch.testing.assert_close(summed, known("paper", "correct_orientation_sum_per_patchsize"), **EXACT)
    torch.testing.assert_close(pdcr(f1, f1, d, 0.5).mean(), known("paper", "correct_orientation_mean_avg_tau_0.5"), **EXACT)
    cross = pdcr(f1, f2, divergence(w1, w2), shift="greatest").mean()
    torch.testing.assert_close(cross, known("paper", "correct_orientation_cross_layer_mean_avg"), **EXACT)


def test_the_published_3d_code_is_the_papers_assignment_over_foreground_classes():
    f0, f1, r0, r1, w0, w1 = (known("solid", key) for key in ("sampled_f0", "sampled_f1", "sampled_r0", "sampled_r1", *LEVELS))
    same, cross = [2 * divergence(w, w)[None] for w in (w0, w1)], 2 * divergence(w0, w1)[None]
    levels = torch.cat([pdcr(f, f, d, 0.5, shift="greatest") for f, d in zip((f0, f1), same, strict=True)])
    torch.testing.assert_close(levels, known("solid", "per_level"), **EXACT)
    torch.testing.assert_close(levels.mean(), known("solid", "cl_loss_3d"), **EXACT)
    loss = pdcr(r0, r1, cross, 0.5, shift="greatest")[0] / 2  # halved there, though it is one pair
    torch.testing.assert_close(loss, known("solid", "cl_loss_3d_multilayer"), **EXACT)


LEVELS = ("class_ratio_level0", "class_ratio_level1")


# What it does to features


def cosines(orientation: str) -> tuple[float, float]:
    """Mean cosine within and between two classes of 24 free embeddings after training, four of them being mixed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, 24, generator=generator).requires_grad_()
    d = divergence(*[two(torch.tensor([[[0.0] * 10 + [1.0] * 10 + [0.2, 0.4, 0.6, 0.8]]]))] * 2)
    optimizer = torch.optim.Adam([x], lr=0.2)
    for _ in range(50):
        optimizer.zero_grad()
        pdcr(x, x, d, orientation=orientation).sum().backward()
        optimizer.step()
    unit = nn.functional.normalize(x.detach()[0], dim=0)
    cosine = unit.T @ unit
    return cosine[:10, :10].mean().item(), cosine[:10, 10:20].mean().item()


def test_it_separates_two_classes_and_the_swapped_form_collapses_them():
    within, between = cosines("paper")
    assert within > 0.9
    assert between < -0.9
    within, between = cosines("swapped")
    assert between > 0.9


def test_features_that_are_all_alike_stand_at_log_n_and_classes_apart_below():
    d = divergence(*[two(torch.tensor([[[0.0] * 4 + [1.0] * 4]]))] * 2)
    seen = (torch.ones(1, 8, dtype=torch.bool),) * 2
    alike = pdcr(torch.ones(1, 3, 8), torch.ones(1, 3, 8), d, known=seen)
    assert alike.item() == pytest.approx(math.log(8), abs=1e-6)
    assert floor(seen).item() == pytest.approx(math.log(8), abs=1e-6)
    apart = torch.tensor([1.0] * 4 + [-1.0] * 4).view(1, 1, 8)
    assert pdcr(apart, apart, d, known=seen).item() == pytest.approx(math.log(4 + 4 * math.exp(-2)), abs=1e-6)


def test_doubling_the_batch_changes_neither_the_loss_nor_the_sum_of_gradients():
    f1, _, w1, _ = given()
    d = divergence(w1, w1)
    once, twice = pdcr(f1, f1, d).mean(), pdcr(torch.cat([f1, f1]), torch.cat([f1, f1]), torch.cat([d, d], 1)).mean()
    torch.testing.assert_close(once, twice)
    torch.testing.assert_close(torch.autograd.grad(once, f1)[0], torch.autograd.grad(twice, f1)[0])


def test_vectors_that_are_unknown_take_no_part_and_get_no_gradient():
    f1, _, w1, _ = given()
    seen = torch.tensor([[True, True, False, True], [False] * 4])
    loss = pdcr(f1, f1, divergence(w1, w1), known=(seen, seen)).mean()
    kept = f1[:1, :, [0, 1, 3]], w1[:, :1, :, [0, 1, 3]]
    torch.testing.assert_close(loss, pdcr(kept[0], kept[0], divergence(kept[1], kept[1])).mean())
    gradient = torch.autograd.grad(loss, f1)[0]
    assert gradient.isfinite().all()
    assert not gradient[1].any()
    assert not gradient[0, :, 2].any()
    nothing = pdcr(f1, f1, divergence(w1, w1), known=(seen & False, seen & False)).mean()
    assert nothing.item() == 0
    assert not torch.autograd.grad(nothing, f1)[0].any()


def test_half_precision_features_are_compared_in_full_precision():
    f1, _, w1, _ = given()
    half = f1.detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pdcr(half, half, divergence(w1.float(), w1.float()))
    torch.testing.assert_close(loss, pdcr(half.float(), half.float(), divergence(w1.float(), w1.float())))
    assert loss.dtype == torch.float32


def test_total_variation_of_classes_that_share_nothing_is_one_and_of_equal_ones_zero():
    w = torch.eye(4)[None]  # four cells of one class each
    torch.testing.assert_close(divergence(w, w), 1 - torch.eye(4)[None])
    mixed = torch.rand(2, 5, 6).softmax(1)
    assert divergence(mixed, mixed).max() <= 1


# Where the labels are read

MASK = torch.zeros(1, 64, 64, dtype=torch.long)
MASK[0, 20:30, 34:50] = 1
STRIDE2 = Field(1, (2, 2), (-3, -3), (3, 3), (0.0, 0.0))


@pytest.mark.parametrize(("side", "share"), [(5, 0.6), (7, 0.4897959183673469), (9, 0.43209876543209874)])
def test_patches_are_centred_and_not_transposed(side, share):
    """The known values of a mask that is not symmetric; cells of a map from which nine outer ones were cut."""
    points = torch.tensor([[2, 8], [8, 2], [3, 11], [1, 9], [5, 5]]) + 9
    every = ratios(one_hot(MASK, 2), STRIDE2, [-(side // 2)] * 2, [side] * 2, (32, 32))[0, 1]
    torch.testing.assert_close(every[points[:, 0], points[:, 1]], torch.tensor([share, 0, 1, share, 0]), rtol=0, atol=1e-6)


def test_receptive_fields_are_whole_windows_of_the_mask():
    points = torch.tensor([[12, 18], [10, 17], [14, 24], [5, 5], [31, 31]])
    share = ratios(one_hot(MASK, 2), STRIDE2, STRIDE2.low, STRIDE2.size, (32, 32))[0, 1]
    expected = torch.tensor([0.8571428571428571, 0.32653061224489793, 0.5102040816326531, 0, 0])
    torch.testing.assert_close(share[points[:, 0], points[:, 1]], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sides", [(13, 22), (9, 14, 7)])
def test_ratios_are_those_counted_pixel_by_pixel_without_what_is_unlabelled_or_outside(sides):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2, *sides), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = UNLABELLED
    labels[0, :5, :6] = UNLABELLED
    axes = len(sides)
    low, size, stride = [-2, 1, -1][:axes], [4, 5, 3][:axes], (3, 4, 2)[:axes]
    cells = [-(-side // jump) for side, jump in zip(sides, stride, strict=True)]
    field = Field(1, stride, (0,) * axes, (0,) * axes, (0.0,) * axes)
    found = ratios(one_hot(labels, 3), field, low, size, cells)
    for place in torch.cartesian_prod(*[torch.arange(count) for count in cells]).tolist():
        starts = [first + i * jump for first, i, jump in zip(low, place, stride, strict=True)]
        window = labels[(slice(None), *(slice(max(a, 0), max(a + k, 0)) for a, k in zip(starts, size, strict=True)))]
        for n in range(2):
            counts = torch.tensor([(window[n] == k).sum() for k in range(3)]).float()
            torch.testing.assert_close(found[(n, slice(None), *place)], counts / counts.sum().clamp(min=1))


# Which cells


def known_steps(cells: int, count: int) -> list[int]:
    return positions("stride", torch.ones(1, 1, cells), count, torch.Generator())[0].tolist()


def test_strided_cells_are_the_published_ones():
    assert [divmod(p, 7) for p in known_steps(5 * 7, 4)] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    published = [(0, 0), (9, 58), (19, 38), (29, 18), (38, 76), (48, 56), (58, 36), (68, 16)]
    assert [divmod(p, 78) for p in known_steps(78 * 78, 8)] == published
    assert [divmod(p, 174) for p in known_steps(174 * 174, 64)][:6] == [
        (0, 0),
        (2, 125),
        (5, 76),
        (8, 27),
        (10, 152),
        (13, 103),
    ]
    assert {p % 24 for p in known_steps(24 * 24, 32)} == {0, 6, 12, 18}


@pytest.mark.parametrize("sampling", ["stride", "random", "class-balanced", "boundary"])
def test_cells_are_different_follow_the_generator_and_cannot_be_more_than_there_are(sampling):
    shares = torch.rand(3, 2, 30, generator=torch.Generator().manual_seed(0)).softmax(1)
    first, again, other = (positions(sampling, shares, 12, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (sampling == "stride")
    assert all(len(row.unique()) == 12 for row in first)
    with pytest.raises(ValueError, match="31 samples of a map of 30 cells"):
        positions(sampling, shares, 31, torch.Generator())


def shares_of(*kinds: tuple[float, float]) -> torch.Tensor:
    return torch.tensor(kinds).T[None]


def test_balanced_cells_hold_each_class_alike_as_far_as_there_are_so_many():
    shares = shares_of(*[(1.0, 0.0)] * 90, *[(0.2, 0.8)] * 6, *[(0.0, 0.0)] * 4)
    chosen = positions("class-balanced", shares, 10, torch.Generator().manual_seed(0))[0]
    assert (chosen < 90).sum() == 5
    chosen = positions("class-balanced", shares, 40, torch.Generator().manual_seed(0))[0]
    assert ((chosen >= 90) & (chosen < 96)).sum() == 6
    assert (chosen < 96).all()


def test_half_of_the_boundary_cells_hold_two_classes():
    shares = shares_of(*[(1.0, 0.0)] * 50, *[(0.5, 0.5)] * 8, *[(0.0, 1.0)] * 40)
    chosen = positions("boundary", shares, 16, torch.Generator().manual_seed(0))[0]
    assert ((chosen >= 50) & (chosen < 58)).sum() == 8


def test_random_cells_are_uniform_and_labelled():
    shares = shares_of(*[(1.0, 0.0)] * 8, *[(0.0, 0.0)] * 2).expand(4000, -1, -1)
    counts = positions("random", shares, 2, torch.Generator().manual_seed(0)).flatten().bincount(minlength=10)
    assert counts[8:].sum() == 0
    assert ((counts[:8] - 1000).abs() < 5 * 1000**0.5).all()


# Receptive fields


def seen(network: nn.Module, name: str, channels: int, sides: tuple[int, ...], cell: tuple[int, ...]) -> list[tuple[int, int]]:
    """First and last pixel, along each axis, whose gradient reaches a cell: all weights positive, so nothing cancels."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    network.eval()
    image, kept = torch.ones(1, channels, *sides, requires_grad=True), {}
    handle = network.get_submodule(name).register_forward_hook(lambda module, inputs, output: kept.update(x=output))
    network(image)
    handle.remove()
    (gradient,) = torch.autograd.grad(kept["x"][(0, 0, *cell)], image)
    return [(int(line.min()), int(line.max())) for line in gradient[0, 0].nonzero().T]


def expected(field: Field, cell: tuple[int, ...]) -> list[tuple[int, int]]:
    axes = zip(field.low, field.high, field.stride, cell, strict=True)
    return [(low + jump * i, high + jump * i) for low, high, jump, i in axes]


def test_fields_of_xception_equal_those_measured_by_gradient():
    network, cells = DeepLabV3Plus(1, 2, DeepLabConfig(width=4)), {"stem2": 9, "block1": 9, "block2": 6, "block3": 4}
    fields = receptive.fields(network, [f"encoder.{name}" for name in cells])
    for name, cell in cells.items():
        place = (cell, cell + 1)
        assert seen(network, f"encoder.{name}", 1, (128, 144), place) == expected(fields[f"encoder.{name}"], place), name


@pytest.mark.parametrize("dims", [2, 3])
def test_fields_of_a_unet_equal_those_measured_by_gradient_on_the_way_down_and_up(dims):
    network = UNet(1, 2, UNetConfig(width=2, levels=2, spatial_dims=dims, down="stride", norm="batch"))
    names = ["encoder.blocks.1", "decoder.ups.0", "decoder.blocks.0"]
    fields = receptive.fields(network, names)
    assert fields[names[0]].size == (11,) * dims  # 1 + 2 + 2 + 2 on pixels, 4 on every other one
    sides = (32,) * dims
    down = (6, 7, 8)[:dims]
    assert seen(network, names[0], 1, sides, down) == expected(fields[names[0]], down)
    for name in names[1:]:  # cells of the two phases see different pixels; the field is what both see together
        ends = [seen(network, name, 1, sides, (place,) * dims)[0] for place in (14, 15)]
        field = fields[name]
        assert min(low - place for (low, _), place in zip(ends, (14, 15), strict=True)) == field.low[0]
        assert max(high - place for (_, high), place in zip(ends, (14, 15), strict=True)) == field.high[0]
    assert fields[names[2]].centre == (0.0,) * dims  # where the skip is; two raised cells lie about their one
    assert fields[names[1]].centre == (-0.5,) * dims


def test_fields_of_pooling_and_padding_are_counted():
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.AvgPool2d(2), nn.ZeroPad2d((2, 0, 1, 0)), nn.MaxPool2d(3, 2, 1))
    field = receptive.fields(network, ["1", "2", "3"])
    assert field["1"] == Field(2, (2, 2), (-1, -1), (2, 2), (0.5, 0.5))
    assert field["2"] == Field(2, (2, 2), (-3, -5), (0, -2), (-1.5, -3.5))
    assert field["3"] == Field(2, (4, 4), (-5, -7), (2, 0), (-1.5, -3.5))


def test_looking_at_fields_changes_nothing_of_the_network():
    network = UNet(1, 2, UNetConfig(width=2, levels=2, norm="batch")).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    receptive.fields(network, ["encoder.blocks.1"])
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in network.modules())


def test_modules_that_do_not_exist_or_give_no_map_are_refused():
    network = UNet(1, 2, UNetConfig(width=2, levels=2))
    with pytest.raises(ValueError, match=r'no module "encoder\.blocks\.9"; did you mean encoder\.blocks'):
        receptive.fields(network, ["encoder.blocks.9"])
    with pytest.raises(ValueError, match='the module "encoder" gives no map'):
        receptive.fields(network, ["encoder"])


# The hook

SMALL = {
    "encoder": ("encoder.blocks.0", "encoder.blocks.1"),
    "encoder_samples": (16, 8),
    "decoder": ("decoder.blocks.0",),
    "decoder_samples": (8,),
    "cross": ("encoder.blocks.0", "encoder.blocks.1"),
    "cross_samples": 8,
    "cross_stride": 4,
    "adapted": 4,
}


def hooked(dims: int = 2, classes: int = 3, **settings) -> tuple[Segment, PDCR]:
    torch.manual_seed(0)
    network = UNet(1, classes, UNetConfig(width=4, levels=2, spatial_dims=dims))
    hook = PDCR(network, Config(**(SMALL | settings)))
    return Segment(network, SegmentConfig(side=16), {"pdcr": hook}), hook


def views(sides: tuple[int, ...] = (20, 28), classes: int = 3, seed: int = 0) -> Views:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (2, *sides), generator=generator)
    labels[0, :9] = UNLABELLED
    drawn = {"pdcr": {"seed": torch.tensor(seed)}}
    return Views([torch.rand(2, 1, *sides, generator=generator)], labels=labels, drawn=drawn)


@pytest.mark.parametrize("sampling", ["stride", "random", "class-balanced", "boundary"])
@pytest.mark.parametrize("ratio", ["hierarchical", "receptive-field"])
@pytest.mark.parametrize("sides", [(20, 28), (16, 12, 20)])
def test_terms_are_finite_on_sides_that_differ_and_reach_network_and_adapters(sampling, ratio, sides):
    method, hook = hooked(len(sides), sampling=sampling, ratio=ratio)
    loss = method.loss(views(sides), STEP)
    assert {"pdcr/encoder", "pdcr/decoder", "pdcr/cross"} < loss.terms.keys()
    sum(term for name, term in loss.terms.items() if name.startswith("pdcr")).backward()
    reached = [p.grad for p in [*method.network.encoder.parameters(), *hook.parameters()]]
    assert all(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in reached)


def test_a_loss_is_determined_by_its_views():
    method, _ = hooked(sampling="random")
    torch.manual_seed(1)
    first = method.loss(views(), STEP).terms["pdcr/encoder"]
    torch.manual_seed(2)
    assert torch.equal(first, method.loss(views(), STEP).terms["pdcr/encoder"])
    assert not torch.equal(first, method.loss(views(seed=1), STEP).terms["pdcr/encoder"])


def test_a_batch_without_labels_has_terms_of_zero():
    method, _ = hooked()
    drawn = views()
    drawn.labels.fill_(UNLABELLED)
    loss = method.loss(drawn, STEP)
    assert float(loss.total.detach()) == 0
    loss.total.backward()
    assert not any(p.grad.any() for p in method.network.parameters())


def test_a_cell_with_one_unlabelled_window_of_the_series_is_in_no_pair_of_averaged_ratios():
    _, hook = hooked(patches=(1, 5), average="ratios")
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    labels[0, 0, 0] = UNLABELLED  # the patch of one pixel of the first cell; that of five is labelled
    field = hook.fields["encoder.blocks.0"]
    _, shares, known = hook._chosen((8, 8), field, 64, one_hot(labels, 3), torch.Generator())
    assert known[0].tolist() == [False] + [True] * 63
    torch.testing.assert_close(shares[..., 1:].sum(2), torch.ones(1, 1, 63))


def test_the_encoder_term_is_the_loss_of_features_and_labels_taken_by_hand():
    method, _ = hooked(
        encoder=("encoder.blocks.1",),
        encoder_samples=(4,),
        decoder=(),
        decoder_samples=(),
        cross=(),
        patches=(4,),
        encoder_weight=0.5,
    )
    drawn = views((8, 12))
    term = method.loss(drawn, STEP).terms["pdcr/encoder"]
    x = method.network.encoder(drawn.images[0])[1]  # 4 x 6 cells of two pixels: the patch begins 1 pixel above each
    w = torch.zeros(2, 3, 4)
    places = [(0, 0), (1, 0), (2, 0), (3, 0)]  # 24 // 4 = 6 cells apart
    for i, (row, column) in enumerate(places):
        window = drawn.labels[:, max(2 * row - 1, 0) : 2 * row + 3, max(2 * column - 1, 0) : 2 * column + 3]
        for k in range(3):
            w[:, k, i] = (window == k).sum((1, 2)) / (window != UNLABELLED).sum((1, 2)).clamp(min=1)
    vectors = torch.stack([x[:, :, row, column] for row, column in places], -1)[1:]  # the first image is unlabelled
    d = divergence(w[1:], w[1:])[None]
    torch.testing.assert_close(term, 0.5 * (pdcr(vectors, vectors, d)[0] - math.log(4)))


def test_labels_across_layers_are_those_of_the_common_grid():
    _, hook = hooked()
    fine, coarse = (on_grid(hook.fields[name], 4) for name in SMALL["cross"])
    assert fine.stride == coarse.stride == (4, 4)
    assert fine.centre == coarse.centre == (1.5, 1.5)  # the middle of four pixels
    assert fine.size == (8, 8)  # two 3x3 convolutions see 5, four of them side by side 8


def test_nothing_is_kept_between_steps_or_outside_training():
    method, hook = hooked()
    method.loss(views(), STEP)
    assert len(hook.taps.passes) == 0
    method.network(views().images[0])
    assert len(hook.taps.passes) == 0  # the logits are gone, and so are the features
    with torch.no_grad():
        kept = method.network(views().images[0])
    method.eval()
    kept = kept, method.network(views().images[0])
    assert len(hook.taps.passes) == 0
    method.train()
    method.network.encoder(views().images[0])
    assert hook.taps.current is None
    assert kept is not None


def test_a_second_pass_within_a_step_does_not_disturb_the_first():
    """Another hook may run the network again before this one is asked."""

    class Again:
        def terms(self, pass_, drawn, step):
            return Loss({"again": method.network(torch.zeros_like(pass_.views.images[0])).mean()})

    method, hook = hooked()
    alone = method.loss(views(), STEP).terms["pdcr/encoder"]
    method.active = {"again": Again(), "pdcr": hook}
    drawn = views()
    drawn.drawn["again"] = {}
    assert torch.equal(method.loss(drawn, STEP).terms["pdcr/encoder"], alone)


def test_a_copy_of_the_network_is_not_tapped():
    """As teachers and second networks are made, which may train too."""
    method, hook = hooked()
    alone = method.loss(views(), STEP).terms["pdcr/encoder"]
    other = copy.deepcopy(method.network)
    logits = method.network(views().images[0])
    assert other(views().images[0]).requires_grad
    assert len(hook.taps.passes) == 1
    assert torch.equal(hook.contrast(logits, views().labels, torch.Generator().manual_seed(0))["encoder"], alone)


def test_after_removal_the_network_is_as_it_was():
    method, hook = hooked()
    assert method.transferable_state().keys() == UNet(1, 3, UNetConfig(width=4, levels=2)).state_dict().keys()
    hook.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in method.network.modules())
    with pytest.raises(ValueError, match="are the taps removed"):
        method.loss(views(), STEP)


def test_state_of_the_hook_is_its_adapters_and_saved():
    method, hook = hooked()
    assert sum(p.numel() for p in hook.parameters()) == 4 * 4 * 16 + 8 * 4 * 4 + 4 * 4
    assert any(key.startswith("hook_state.pdcr.adapters.0.0") for key in method.state_dict())
    assert not list(hooked(cross=())[1].parameters())


def test_features_that_see_everything_have_no_window_of_their_own():
    network = DeepLabV3Plus(1, 2, DeepLabConfig(width=4))
    with pytest.raises(ValueError, match=r"decoder\.conv1 see the whole image"):
        PDCR(network, Config(ratio="receptive-field"))


def test_defaults_on_deeplab_are_the_papers():
    torch.manual_seed(0)
    network = DeepLabV3Plus(1, 2, DeepLabConfig(width=4))
    hook = PDCR(network, Config())
    assert hook.config.encoder == hook.config.cross == ("encoder.stem2", "encoder.block1")
    assert hook.config.decoder == ("decoder.low", "decoder.conv1")
    assert hook.fields["decoder.conv1"].centre == (0.0, 0.0)  # it sees the whole image, and has no window of its own
    assert [hook._usual("encoder", torch.empty(1, 1, 24, 24), i) for i in (0, 1, 2)] == [64, 32, 8]
    assert hook._usual("cross", torch.empty(1, 1, 4, 5)) == 20  # as many cells as there are
    wanted = {"temperature": 1.0, "ratio": "hierarchical", "cross_stride": 16, "encoder_weight": 0.1, "decoder_weight": 0.01}
    assert {key: getattr(hook.config, key) for key in wanted} == wanted
    method = Segment(network, SegmentConfig(side=96), {"pdcr": hook})
    loss = method.loss(views((96, 112), 2), STEP)
    assert loss.total.isfinite()
    loss.total.backward()


def test_defaults_on_nnunets_network_in_3d_are_the_papers_two_levels():
    torch.manual_seed(0)
    network = UNet(1, 3, UNetConfig(width=4, levels=5, spatial_dims=3, down="stride"))
    hook = PDCR(network, Config())
    skips = [hook.fields[name] for name in hook.config.encoder]
    assert [field.stride for field in skips] == [(4,) * 3, (8,) * 3]
    assert [field.size for field in skips] == [(23,) * 3, (47,) * 3]  # the published code's constants
    assert (hook.config.temperature, hook.config.ratio, hook.config.decoder) == (0.5, "receptive-field", ())
    loss = Segment(network, SegmentConfig(side=32), {"pdcr": hook}).loss(views((32, 32, 40)), STEP)
    assert {"pdcr/encoder", "pdcr/cross"} < loss.terms.keys()
    loss.total.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in [*network.encoder.parameters(), *hook.parameters()])


class PlainConvUNet(nn.Module):
    """nnU-Net's layout: stages in a sequence that never runs as one, the encoder once more in the decoder, a list of logits."""

    def __init__(self):
        super().__init__()
        unit = UNet(1, 2, UNetConfig(width=4, levels=4, spatial_dims=3, down="stride"))
        self.encoder = nn.Module()
        self.encoder.stages = nn.Sequential(*unit.encoder.blocks)
        self.decoder = nn.Module()
        self.decoder.encoder, self.decoder.seg_layers = self.encoder, nn.ModuleList([nn.Conv3d(32, 3, 1), nn.Conv3d(4, 3, 1)])

    def forward(self, x):
        maps = []
        for stage in self.encoder.stages:
            x = stage(x)
            maps.append(x)
        return [self.decoder.seg_layers[1](maps[0]), self.decoder.seg_layers[0](x)]


def test_a_trainer_of_nnunet_takes_the_terms_over_as_written():
    """The lines of the docstring, around a trainer with nnU-Net's three methods."""

    class nnUNetTrainer:
        def __init__(self):
            torch.manual_seed(0)
            self.network, self.current_epoch = PlainConvUNet(), 3

        def configure_optimizers(self):
            return torch.optim.SGD(self.network.parameters(), 0.1), None

        def _build_loss(self):
            return lambda logits, target: nn.functional.cross_entropy(logits[0], target[0][:, 0].long())

    text = pdcr_module.__doc__.partition("    from medssl.methods.hooks.pdcr import")[2].partition("\nand, as validation")[0]
    scope = {"nnUNetTrainer": nnUNetTrainer, "torch": torch}
    exec(textwrap.dedent("    from medssl.methods.hooks.pdcr import" + text), scope)
    trainer = scope["nnUNetTrainerPDCR"]()
    optimizer, _ = trainer.configure_optimizers()
    assert trainer.pdcr.config.encoder == ("encoder.stages.2", "encoder.stages.3")
    loss, images = trainer._build_loss(), torch.rand(2, 1, 32, 32, 32)
    target = [torch.randint(0, 3, (2, 1, 32, 32, 32)).float()]
    with torch.no_grad():
        plain = loss(trainer.network.eval()(images), target)
    contrasted = loss(trainer.network.train()(images), target)
    assert contrasted.item() != pytest.approx(plain.item(), abs=1e-6)
    contrasted.backward()
    optimizer.step()
    assert all(p.grad.any() for p in trainer.pdcr.parameters())


def test_a_layer_that_cannot_be_tapped_is_refused_with_those_that_can():
    network = UNet(1, 2, UNetConfig(width=2, levels=3))
    with pytest.raises(ValueError, match=r"did you mean encoder\.blocks\.\d\?; usable modules: encoder\.blocks\.0 \(1/1\)"):
        PDCR(network, Config(encoder=("encoder.blocks.9",)))
    vit = UNETR(1, 2, UNETRConfig(d=16, depth=4, heads=2))
    with pytest.raises(ValueError, match=r"decoder\.lifts\.0.* see the whole image; take .*encoder\.patch_embed \(1/16\)"):
        PDCR(vit, Config(ratio="receptive-field"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": ("a", "b"), "encoder_samples": (64,)}, "encoder_samples"),
        ({"cross": ("encoder.block1",)}, "cross is"),
        ({"encoder": (), "encoder_samples": (), "decoder": (), "decoder_samples": (), "cross": ()}, "name no module"),
        ({"temperature": 0.0}, "temperature > 0"),
        ({"patches": ()}, "patches is"),
        ({"patches": (7, 5)}, "the smallest first"),
        ({"patch_weights": (1.0, 1.0, 1.0)}, "patch_weights belong"),
        ({"average": "ratios", "patch_weights": (0.0, 0.0, 0.0)}, "not all 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def test_a_map_off_the_common_grid_is_refused():
    with pytest.raises(ValueError, match="does not divide cross_stride 3"):
        hooked(cross_stride=3)
