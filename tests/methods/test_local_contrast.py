"""Facts of local contrast: its loss by the source's own values and by the definition; its regions, pairs and what it trains.

`global_local.json` holds what the source's loss graph gave for maps of a formula, and its tables of regions.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from medssl.methods.global_contrast import GlobalContrast
from medssl.methods.local_contrast import Config, Head, LocalContrast, cut_out, layout, map_pairs, terms
from medssl.methods.networks.unet import Config as UNetConfig
from medssl.methods.networks.unet import UNet
from medssl.methods.optimizers import build
from medssl.methods.protocol import Step, Views
from medssl.methods.settings import Training

KNOWN = json.loads(Path(__file__).with_name("global_local.json").read_text())
ORACLE = {case["id"]: case for case in KNOWN["cases"] if case["kind"] == "local"}
TABLES = KNOWN["region_tables"]
STEP = Step(0, 10)


def maps_of(case: dict) -> Tensor:
    """The case's maps, channels last, by slices: (maps, h, w, C), views of one slice half the maps apart."""
    if "feature_maps" in case:
        f = torch.tensor(case["feature_maps"], dtype=torch.float64)
    else:
        sides = [torch.arange(side, dtype=torch.float64) for side in case["feature_shape"]]
        n, h, w, c = torch.meshgrid(*sides, indexing="ij")
        f = torch.sin(0.7 * n + 1.3 * h + 2.1 * w + 0.9 * c) + 0.5 * torch.cos(0.37 * n * (c + 1) + 0.11 * h * w)
    if "2k,2k+1" in case["layout"]:
        f = torch.cat([f[0::2], f[1::2]])
    return f


def windows_of(case: dict) -> tuple[Tensor, Tensor]:
    """Windows u, (maps, W, e), and the negatives, (A, m), of a case, from its own table."""
    table = TABLES[case["region_table"]] if "region_table" in case else None
    regions = table["top_left_positions"] if table else case["positions"]
    negatives = table["negatives_top_left"] if table else case["negatives"]
    places = {tuple(corner): None for corner in [*regions, *(each for row in negatives for each in row)]}
    corners, numbers = torch.tensor(list(places)), {corner: number for number, corner in enumerate(places)}
    u = cut_out(maps_of(case).movedim(-1, 1), corners, table["window"] if table else case["K"])
    if case.get("W_formula"):
        k, d = (torch.arange(count, dtype=torch.float64) for count in (18, 4))
        u = u @ torch.cos(0.5 * k[:, None] + 1.7 * d)
    used = case.get("negatives_used_per_map", 1)
    return u, torch.tensor([[numbers[tuple(each)] for each in row[:used]] for row in negatives])


def pairs_of(case: dict, name: str) -> Tensor:
    slices = len(maps_of(case)) // 2
    parts = 1 if "tiny" in name or "lR" in name else 4
    place = torch.arange(slices)
    return map_pairs("correspondence" if "lD" in name else "random", place % parts, place // parts)


def test_every_local_case_of_the_oracle_is_here():
    assert len(ORACLE) == 14


@pytest.mark.parametrize("name", ORACLE)
def test_loss_is_that_of_the_source(name):
    case = ORACLE[name]
    u, negatives = windows_of(case)
    each, expected = terms(u, pairs_of(case, name), negatives, case["tau"]), case["expected"]
    assert each.numel() == expected["n_terms"]
    assert float(each.mean()) == pytest.approx(expected["loss_mean_over_terms"], rel=1e-6)
    ours = float(each.sum() / (each.shape[1] * len(u)))
    assert ours == pytest.approx(expected["loss_repo_norm"], rel=1e-6)
    assert ours == pytest.approx(expected.get("repo_graph_value", ours), rel=1e-6)


@pytest.mark.parametrize("name", [name for name in ORACLE if "feature_samples" in ORACLE[name]])
def test_maps_of_the_formula_are_those_of_the_oracle(name):
    case = ORACLE[name]
    f = maps_of(case | {"layout": ""})
    for place, value in case["feature_samples"].items():
        found = f.sum() if place == "sum" else f[tuple(json.loads(place))]
        assert float(found) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("name", ["tiny_lR_tau0.5", "tiny_lD_tau0.5"])
def test_gradient_is_that_of_finite_differences(name):
    case = ORACLE[name]
    u, negatives = windows_of(case)
    pairs = pairs_of(case, name)
    assert torch.autograd.gradcheck(lambda x: terms(x, pairs, negatives, 0.5), u.requires_grad_())


@pytest.mark.parametrize("name", [name for name in TABLES if name.endswith("A13")])
def test_the_paper_s_regions_and_negatives_are_those_of_its_table(name):
    table = TABLES[name]
    sides = (table["feature_map"], table["feature_map"])
    ours = layout("paper", table["window"], 5, sides)
    assert ours.corners[: len(ours.negatives)].tolist() == table["top_left_positions"]
    assert ours.corners[ours.negatives].tolist() == table["negatives_top_left"]
    assert torch.equal(layout("paper", table["window"], 4, sides).negatives, ours.negatives[:, :4])


@pytest.mark.parametrize("count", [2, 5, 9, 13, 30])
@pytest.mark.parametrize("region", [1, 3])
@pytest.mark.parametrize("sides", [(24, 24), (31, 17)])
def test_generated_regions_fill_the_map_and_negatives_are_the_nearest_apart(count, region, sides):
    m = min(4, count - 1)
    ours = layout(count, region, m, sides)
    corners = [tuple(corner) for corner in ours.corners.tolist()]
    assert len(set(corners)) == count
    assert all(0 <= first <= side - region for corner in corners for first, side in zip(corner, sides, strict=True))
    assert max(left for _, left in corners) == sides[1] - region
    for corner, chosen in zip(corners, ours.negatives.tolist(), strict=True):
        apart = [each for each in corners if max(abs(each[0] - corner[0]), abs(each[1] - corner[1])) >= region]
        nearest = sorted(math.dist(each, corner) for each in apart)[:m]
        assert len(set(chosen)) == m
        assert all(corners[each] in apart for each in chosen)
        assert [math.dist(corners[each], corner) for each in chosen] == pytest.approx(nearest)


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ((40, 3, 2, (6, 6)), "40 regions of 3 x 3 do not fit a map of 6 x 6"),
        ((2, 3, 1, (2, 9)), "2 regions of 3 x 3 do not fit a map of 2 x 9"),
        ((4, 3, 3, (5, 5)), "has 0 others apart from it on a map of 5 x 5, and 3 negatives"),
        (("paper", 3, 5, (7, 7)), "need a larger map than 7 x 7"),
    ],
)
def test_regions_that_do_not_fit_are_refused(choice, sentence):
    with pytest.raises(ValueError, match=sentence):
        layout(*choice)


def by_definition(u: list, pairs: list, negatives: list, tau: float) -> list[list[float]]:
    """One region after the other."""

    def similar(a: list[float], b: list[float]) -> float:
        return math.fsum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b) / tau

    rows = []
    for i, j in pairs:
        rows.append([])
        for region, others in enumerate(negatives):
            anchor = u[i][region]
            rivals = math.fsum(math.exp(similar(anchor, u[of][other])) for of in (i, j) for other in others)
            found = math.exp(similar(anchor, u[j][region]))
            rows[-1].append(-math.log(found / (found + rivals)))
    return rows


@pytest.mark.parametrize("strategy", ["random", "correspondence"])
@pytest.mark.parametrize("seed", range(3))
def test_loss_of_any_batch_is_that_of_a_double_loop(strategy, seed):
    rng = torch.Generator().manual_seed(seed)
    where, whose = torch.randint(0, 2, (5,), generator=rng), torch.randint(0, 3, (5,), generator=rng)
    u = torch.randn(10, 6, 3, generator=rng, dtype=torch.float64)
    negatives = torch.stack([torch.randperm(6, generator=rng)[:2] for _ in range(4)])
    maps = [(i, i + 5) for i in range(5)]
    if strategy == "random":
        maps += [(i + 5, i) for i in range(5)]
    else:
        maps += [(i, j) for i in range(5) for j in range(5) if where[i] == where[j] and whose[i] != whose[j]]
    pairs = map_pairs(strategy, where, whose)
    assert sorted(map(tuple, pairs.tolist())) == sorted(maps)
    expected = by_definition(u.tolist(), pairs.tolist(), negatives.tolist(), 0.4)
    torch.testing.assert_close(terms(u, pairs, negatives, 0.4), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "strategy", "negatives"),
    [("lR_13regions_5neg", "random", 5), ("lD_13regions_4neg", "correspondence", 4)],
)
def test_equal_regions_cost_what_a_collapse_costs(name, strategy, negatives):
    """12 slices, 3 volumes of 4 partitions; by the source's scale."""
    expected = next(case["expected"] for case in KNOWN["cases"] if case["id"] == "collapse_values")
    regions, place = layout("paper", 3, negatives, (12, 12)), torch.arange(12)
    u = torch.ones(24, len(regions.corners), 2, dtype=torch.float64)
    each = terms(u, map_pairs(strategy, place % 4, place // 4), regions.negatives, 0.07)
    assert float(each.sum() / (13 * 24)) == pytest.approx(expected[name], rel=1e-6)


def test_regions_are_flattened_by_row_then_column_then_channel():
    f = torch.arange(2 * 4 * 5).float().view(1, 2, 4, 5)
    u = cut_out(f, torch.tensor([[1, 2]]), 3)
    expected = [f[0, c, 1 + row, 2 + column].item() for row in range(3) for column in range(3) for c in range(2)]
    assert u.tolist() == [[expected]]


def test_terms_stay_in_float32_under_autocast():
    u, pairs, negatives = torch.randn(4, 3, 5), torch.tensor([[0, 2], [1, 3]]), torch.tensor([[1], [2], [0]])
    with torch.autocast("cpu", torch.bfloat16):
        low = terms(u, pairs, negatives, 0.1)
    assert torch.equal(low, terms(u, pairs, negatives, 0.1))


# The method


def unet(**settings) -> UNet:
    torch.manual_seed(0)
    return UNet(1, 2, UNetConfig(width=4, levels=4, **settings))


def batch(n: int = 6, side: int = 32) -> dict[str, Tensor]:
    image = torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(0))
    place = torch.arange(n)
    return {"image": image, "size": torch.full((n, 2), side), "position": (place % 2).float(), "volume": place // 2}


def method(**settings) -> LocalContrast:
    return LocalContrast(unet(), Config(**{"side": 32, "blocks": 2, "d": 8, "negatives": 3} | settings))


def views(subject: LocalContrast, seed: int = 0) -> Views:
    return subject.augment(batch(), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("choice", [{}, {"strategy": "correspondence"}, {"region": 1}, {"regions": "paper"}, {"scale": "rows"}])
def test_gradient_reaches_the_trained_blocks_and_the_head_alone(choice):
    subject = method(**choice)
    loss = subject.loss(views(subject), STEP)
    loss.total.backward()
    reached = {name for name, p in subject.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {name for name, p in subject.named_parameters() if p.requires_grad}
    kinds = {".".join(name.split(".")[:4]) for name in reached if name.startswith("network")}
    assert kinds == {f"network.decoder.{kind}.{block}" for kind in ("ups", "blocks") for block in range(2)}
    assert sorted(id(p) for group in subject.parameter_groups(0.1) for p in group["params"]) == sorted(
        id(p) for p in subject.parameters() if p.requires_grad
    )
    assert all(value.shape == () and not value.requires_grad for value in loss.monitors.values())


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_a_step_leaves_the_encoder_s_weights_as_they_were_to_the_bit(norm):
    subject = LocalContrast(unet(norm=norm), Config(side=32, blocks=2, negatives=3))
    before = {name: p.clone() for name, p in subject.network.named_parameters()}
    optimizer = build(subject, Training(weight_decay=0.1))
    subject.loss(views(subject), STEP).total.backward()
    optimizer.step()
    moved = {name for name, p in subject.network.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(name.startswith(("decoder.ups.0", "decoder.ups.1", "decoder.blocks.0", "decoder.blocks.1")) for name in moved)


def test_what_transfers_is_the_encoder_and_the_trained_blocks():
    subject, fresh = method(), unet()
    sent = subject.transferable_state()
    missing, unexpected = fresh.load_state_dict(sent, strict=False)
    assert not unexpected
    assert {name.rsplit(".", 1)[0].split(".")[0] for name in missing} == {"decoder", "head"}
    assert all(name.startswith(("decoder.ups.2", "decoder.blocks.2", "head.")) for name in missing)


def test_views_are_the_slice_itself_in_two_lights():
    subject = method()
    first, again, other = (views(subject, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.images, again.images, strict=True))
    assert not torch.equal(first.images[0], other.images[0])
    assert first.groups["partition"].tolist() == [0, 3, 0, 3, 0, 3]
    image = batch()["image"].flatten(1)
    for drawn in first.images:  # an affine function of the slice, where the light was not cut
        inside = (drawn > 0) & (drawn < 1.5)
        for x, y, kept in zip(image, drawn.flatten(1), inside.flatten(1), strict=True):
            assert float(torch.corrcoef(torch.stack([x[kept], y[kept]]))[0, 1]) == pytest.approx(1, abs=1e-4)


def test_the_first_blocks_of_the_decoder_are_those_of_the_whole():
    """The map after all blocks but the last, through the last, is the decoder's."""
    network = unet()
    maps = network.encoder(torch.randn(2, 1, 29, 32))
    part = network.decoder(maps, 2)
    assert part.shape == (2, 8, 15, 16)
    whole = network.decoder.blocks[2](torch.cat([maps[0], network.decoder.ups[2](part)[:, :, :29]], 1))
    assert torch.equal(whole, network.decoder(maps))


@pytest.mark.parametrize(("channels", "weights"), [(128, 33_024), (64, 8_320), (32, 2_112), (16, 544)])
def test_the_head_has_the_weights_of_the_paper(channels, weights):
    assert sum(p.numel() for p in Head(channels, 1, 128).parameters()) == weights
    assert sum(p.numel() for p in Head(channels, 3, 128).parameters()) == weights + 9 * channels * 128


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": 0.0}, {"blocks": 0}, {"region": 2}, {"regions": 1}, {"negatives": 6, "regions": "paper"}, {"d": 0}],
)
def test_wrong_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Config(**wrong)


def test_networks_that_it_cannot_train_are_refused():
    with pytest.raises(ValueError, match="blocks is 4, and the decoder of 4 levels has 3"):
        method(blocks=4)
    for other in (unet().encoder, unet(spatial_dims=3), GlobalContrast(unet().encoder)):
        with pytest.raises(ValueError, match="trains the decoder of a 2D U-Net"):
            LocalContrast(other)


@pytest.mark.parametrize("name", ["lR_3x3_b1", "lR_3x3_b3", "lR_1x1_b3_tau05", "lD_1x1_b1", "lD_3x3_b3"])
def test_the_parity_preset_gives_the_value_of_the_source_from_views_to_loss(name):
    """Maps in place of images, through a method whose network and head hand them on."""
    import yaml

    from medssl.platform import find

    given = yaml.safe_load(find.path("preset", "global-local-parity").read_text())["further"]
    case, f = ORACLE[name], maps_of(ORACLE[name]).movedim(-1, 1)
    settings = {key: given[key] for key in ("regions", "scale")} | {"negatives": case["negatives_used_per_map"], "d": None}
    kind, region = ("correspondence" if "lD" in name else "random"), 3 if "3x3" in name else 1
    subject = method(strategy=kind, region=region, temperature=case["tau"], **settings)
    subject.network.encoder, subject.network.decoder = torch.nn.Identity(), AsItIs()
    subject.head.maps, subject.head.regions = torch.nn.Identity(), torch.nn.Identity()
    place = torch.arange(len(f) // 2)
    groups = {"partition": place % 4, "volume": place // 4}
    loss = subject.loss(Views(list(f.chunk(2)), groups=groups), STEP)
    assert float(loss.total) == pytest.approx(case["expected"]["repo_graph_value"], rel=1e-6)


class AsItIs(torch.nn.Module):
    def forward(self, maps: Tensor, blocks: int) -> Tensor:
        return maps
