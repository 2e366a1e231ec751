"""Facts of global contrast: its loss by the source's own values and by the definition; its pairs, windows and head.

`global_local.json` holds what the source's loss graph gave for listed embeddings, and the pairs of small cases written out.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from medssl.methods import global_contrast
from medssl.methods.global_contrast import Config, GlobalContrast, Head, negative_mask, partition, positive_pairs, terms
from medssl.methods.networks.unet import Config as UNetConfig
from medssl.methods.networks.unet import UNet
from medssl.methods.protocol import Step, Views

CASES = json.loads(Path(__file__).with_name("global_local.json").read_text())["cases"]
ORACLE = {case["id"]: case for case in CASES if case["kind"] == "global"}
COLLAPSE = next(case["expected"] for case in CASES if case["id"] == "collapse_values")
STEP = Step(0, 10)


def layout(case: str) -> tuple[str, int, int, int, str]:
    """Strategy, views, volumes, partitions and the order of the oracle's rows in a case."""
    rows = len(ORACLE[case]["embeddings"])
    if "gR" in case:
        return "random", 2, rows // 2, 1, "slice, view"
    parts = 2 if "tiny" in case or "3vol" in case else 4
    if "Dm" in case:
        return "partition-negatives", 3, rows // 3 // parts, parts, "view, slice"
    return "partition-positives", 2, rows // 2 // parts, parts, "volume, view, partition"


def prepared(case: str) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings in the order of the method, positive pairs and negatives as the method makes them."""
    strategy, views, volumes, parts, rows = layout(case)
    z = torch.tensor(ORACLE[case]["embeddings"], dtype=torch.float64)
    z = z[order(views, volumes, parts, rows)]
    where, whose = torch.arange(parts).repeat(volumes), torch.arange(volumes).repeat_interleave(parts)
    pairing = "all" if "all_pairs" in case else "ring"
    return z, positive_pairs(strategy, views, where, whose, pairing), negative_mask(strategy, views, where)


def order(views: int, volumes: int, parts: int, rows: str) -> Tensor:
    """The oracle's row of each of ours, which are view by view, volume by volume, partition by partition."""
    if rows == "slice, view":
        return torch.arange(volumes * parts * views).view(volumes * parts, views).T.flatten()
    if rows == "volume, view, partition":
        return torch.arange(volumes * parts * views).view(volumes, views, parts).transpose(0, 1).flatten()
    return torch.arange(views * volumes * parts)


def test_every_global_case_of_the_oracle_is_here():
    assert len(ORACLE) == 17


@pytest.mark.parametrize("case", ORACLE)
def test_loss_is_that_of_the_source(case):
    z, pairs, negatives = prepared(case)
    each, expected = terms(z, pairs, negatives, ORACLE[case]["tau"]), ORACLE[case]["expected"]
    assert len(each) == expected["n_terms"]
    assert float(each.sum()) == pytest.approx(expected["loss_sum"], rel=1e-6)
    assert float(each.mean()) == pytest.approx(expected["loss_mean_over_terms"], rel=1e-6)
    assert float(each.sum() / len(z)) == pytest.approx(expected["loss_repo_norm"], rel=1e-6)
    if "repo_graph_value" in expected:
        assert float(each.sum() / len(z)) == pytest.approx(expected["repo_graph_value"], rel=1e-6)


@pytest.mark.parametrize("case", [name for name, case in ORACLE.items() if "positive_pairs_anchor_first" in case])
def test_pairs_and_terms_are_those_written_out(case):
    z, pairs, negatives = prepared(case)
    ours = order(*layout(case)[1:])[pairs]  # by the oracle's rows
    written = [tuple(pair) for pair in ORACLE[case]["positive_pairs_anchor_first"]]
    assert sorted(map(tuple, ours.tolist())) == sorted(written)
    if "terms" in ORACLE[case]:
        each = terms(z, pairs, negatives, ORACLE[case]["tau"]).tolist()
        found = dict(zip(map(tuple, ours.tolist()), each, strict=True))
        assert [found[pair] for pair in written] == pytest.approx(ORACLE[case]["terms"], rel=1e-6)


@pytest.mark.parametrize("case", [name for name, case in ORACLE.items() if "grad_of_loss_repo_norm" in case["expected"]])
def test_gradient_is_that_of_the_oracle(case):
    z, pairs, negatives = prepared(case)
    z.requires_grad_()
    (terms(z, pairs, negatives, ORACLE[case]["tau"]).sum() / len(z)).backward()
    expected = torch.tensor(ORACLE[case]["expected"]["grad_of_loss_repo_norm"], dtype=torch.float64)
    assert z.grad is not None
    torch.testing.assert_close(z.grad, expected[order(*layout(case)[1:])], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", ["tiny_gR_tau0.5", "tiny_gDminus_tau0.1", "gD_3vol_2part_ring"])
def test_lengths_of_embeddings_play_no_part(case):
    z, pairs, negatives = prepared(case)
    longer = z * torch.linspace(0.5, 7, len(z), dtype=z.dtype)[:, None]
    torch.testing.assert_close(terms(longer, pairs, negatives, 0.1), terms(z, pairs, negatives, 0.1))


@pytest.mark.parametrize("case", ["tiny_gR_tau0.5", "tiny_gDminus_tau0.5", "gD_3vol_2part_all_pairs"])
def test_gradient_is_that_of_finite_differences(case):
    z, pairs, negatives = prepared(case)
    assert torch.autograd.gradcheck(lambda x: terms(x, pairs, negatives, 0.5), z.requires_grad_())


def by_definition(strategy: str, z: list[list[float]], views: int, where: list[int], whose: list[int], tau: float) -> float:
    """The mean over ordered positive pairs, one after the other, from the module's table of strategies alone."""
    n, found = len(where), []

    def similar(a: int, b: int) -> float:
        return math.fsum(x * y for x, y in zip(z[a], z[b], strict=True)) / math.hypot(*z[a]) / math.hypot(*z[b]) / tau

    for a in range(views * n):
        negatives = [k for k in range(views * n) if (k % n != a % n if strategy == "random" else where[k % n] != where[a % n])]
        for b in range(views * n):
            across = where[a % n] == where[b % n] and whose[a % n] != whose[b % n] and a // n == b // n
            if a != b and (a % n == b % n or (strategy == "partition-positives" and across)):
                others = math.fsum(math.exp(similar(a, k)) for k in negatives)
                found.append(-math.log(math.exp(similar(a, b)) / (math.exp(similar(a, b)) + others)))
    return math.fsum(found) / len(found)


@pytest.mark.parametrize("strategy", ["random", "partition-negatives", "partition-positives"])
@pytest.mark.parametrize("seed", range(4))
def test_loss_of_any_batch_is_that_of_a_double_loop(strategy, seed):
    """Batches that nobody planned: volumes of which partitions are missing, or hold several slices."""
    rng = torch.Generator().manual_seed(seed)
    n, views = 7, 3 if strategy == "partition-negatives" else 2
    where, whose = torch.randint(0, 3, (n,), generator=rng), torch.randint(0, 3, (n,), generator=rng)
    z = torch.randn(views * n, 4, generator=rng, dtype=torch.float64)
    pairs, negatives = positive_pairs(strategy, views, where, whose), negative_mask(strategy, views, where)
    ours = terms(z, pairs, negatives, 0.3).mean()
    assert float(ours) == pytest.approx(
        by_definition(strategy, z.tolist(), views, where.tolist(), whose.tolist(), 0.3), rel=1e-9
    )


def test_ring_and_all_pairs_agree_on_the_mean_of_two_volumes():
    z, pairs, negatives = prepared("tiny_gD_tau0.1")
    every = positive_pairs("partition-positives", 2, torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(terms(z, pairs, negatives, 0.1).mean(), terms(z, every, negatives, 0.1).mean())


@pytest.mark.parametrize(
    ("strategy", "views", "volumes", "expected"),
    [
        ("random", 2, 3, COLLAPSE["gR_bt12"]),
        ("partition-negatives", 3, 3, COLLAPSE["gDminus_bt12_S4"]),
        ("partition-positives", 2, 6, COLLAPSE["gD_48rows_S4"]),
    ],
)
def test_equal_embeddings_cost_what_a_collapse_costs(strategy, views, volumes, expected):
    """12 slices, of G^D 24: 3 or 6 volumes of 4 partitions; by the source's scale."""
    method = bare(strategy=strategy, scale="rows", pairing="ring", temperature=0.07)
    groups = {"partition": torch.arange(4).repeat(volumes), "volume": torch.arange(volumes).repeat_interleave(4)}
    loss = method.loss(Views([torch.ones(4 * volumes, 5, 1, 1)] * views, groups=groups), STEP)
    assert float(loss.total) == pytest.approx(expected, rel=1e-6)
    assert float(loss.monitors["negatives"]) == views * (11 if strategy == "random" else 3 * volumes)
    assert float(loss.monitors["collapse"]) == pytest.approx(1, abs=1e-5)


class Flat(nn.Module):
    """An encoder whose feature is its input: (n, features, 1, 1) to that very map."""

    def __init__(self, features: int):
        super().__init__()
        self.channels = (features,)
        self.unused = nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return [x]


def bare(features: int = 5, **settings) -> GlobalContrast:
    """Global contrast of the features themselves: z = y."""
    method = GlobalContrast(Flat(features), Config(side=1, grid=1, **settings))
    method.head = nn.Flatten()
    return method


@pytest.mark.parametrize("strategy", ["partition-negatives", "partition-positives"])
def test_a_batch_of_one_partition_costs_nothing_and_moves_nothing(strategy):
    images = [torch.randn(3, 5, 1, 1, requires_grad=True) for _ in range(3 if strategy == "partition-negatives" else 2)]
    loss = bare(strategy=strategy).loss(
        Views(images, groups={"partition": torch.ones(3).long(), "volume": torch.arange(3)}), STEP
    )
    loss.total.backward()
    assert float(loss.total.detach()) == 0
    assert float(loss.monitors["negatives"]) == 0
    for image in images:
        assert image.grad is not None
        assert torch.equal(image.grad, torch.zeros_like(image))


def test_one_volume_alone_still_pairs_the_views_of_its_slices():
    where, whose = torch.arange(4), torch.zeros(4).long()
    for pairing in ("all", "ring"):
        pairs = positive_pairs("partition-positives", 2, where, whose, pairing)
        assert set(map(tuple, pairs.tolist())) == {(i, i + 4) for i in range(4)} | {(i + 4, i) for i in range(4)}


def test_a_temperature_where_plain_exponentials_overflow_stays_finite():
    z = torch.randn(8, 4, requires_grad=True)
    where, whose = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1])
    pairs, negatives = positive_pairs("partition-positives", 2, where, whose), negative_mask("partition-positives", 2, where)
    terms(z, pairs, negatives, 0.001).mean().backward()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()


def test_terms_stay_in_float32_under_autocast():
    z, (pairs, negatives) = torch.randn(8, 4), prepared("tiny_gD_tau0.1")[1:]
    with torch.autocast("cpu", torch.bfloat16):
        low = terms(z, pairs, negatives, 0.1)
    assert torch.equal(low, terms(z, pairs, negatives, 0.1))


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("length", [1, 2, 3, 8, 10, 11, 64])
def test_partitions_are_equal_parts_of_the_volume(count, length):
    """By whole numbers: slice i of n lies in part ⌊S i / (n - 1)⌋, the highest in the last; none is empty of n >= S slices."""
    position = torch.arange(length, dtype=torch.float32) / max(length - 1, 1)
    expected = [min(count * i // max(length - 1, 1), count - 1) for i in range(length)]
    assert partition(position, count).tolist() == expected
    assert length < count or set(expected) == set(range(count))


def slices(n: int = 6, side: int = 192) -> dict[str, Tensor]:
    image = torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(0))
    numbers = {key: torch.arange(n) for key in ("patient", "volume", "index")}
    return {"image": image, "size": torch.full((n, 2), side), "position": torch.linspace(0, 1, n)} | numbers


def small(side: int, **settings) -> GlobalContrast:
    return GlobalContrast(UNet(1, 2, UNetConfig(width=2, levels=2)).encoder, Config(side=side, hidden=4, d=4, **settings))


def test_the_first_view_is_the_slice_itself_and_windows_are_those_of_the_paper():
    """100 of 192 pixels, from 10 to 69 on each axis, each axis and slice its own."""
    batch = slices(64)
    drawn = small(192).augment(batch, torch.Generator().manual_seed(0))
    assert torch.equal(drawn.images[0], batch["image"])
    assert len(drawn.images) == 2
    assert torch.equal(drawn.extents[1], torch.full((64, 2), 100))
    assert (int(drawn.corners[1].min()), int(drawn.corners[1].max())) == (10, 69)
    assert not torch.equal(drawn.corners[1][:, 0], drawn.corners[1][:, 1])


@pytest.mark.parametrize(("strategy", "views"), [("random", 2), ("partition-negatives", 3), ("partition-positives", 2)])
def test_views_are_those_of_the_strategy(strategy, views):
    batch = slices(side=24)
    drawn = small(24, strategy=strategy).augment(batch, torch.Generator().manual_seed(0))
    assert len(drawn.images) == views
    assert torch.equal(drawn.images[0], batch["image"]) == (strategy != "random")
    assert drawn.groups["partition"].tolist() == [0, 0, 1, 2, 3, 3]
    assert torch.equal(drawn.groups["volume"], batch["volume"])


def test_a_slice_that_is_not_square_keeps_its_proportions():
    batch = slices(2, 24)
    batch["image"], batch["size"] = batch["image"][:, :, :, :16].contiguous(), torch.tensor([[24, 16], [20, 16]])
    drawn = small(24).augment(batch, torch.Generator().manual_seed(0))
    assert torch.equal(drawn.images[0][..., :16], batch["image"])
    assert not drawn.images[0][..., 16:].any()
    assert (drawn.corners[1] + drawn.extents[1] <= batch["size"]).all()


def test_windows_stay_inside_the_slice_wherever_they_are_to_begin():
    """Of a slice that is narrower than a window is wide, and where the latest start leaves too little room."""
    size, frame = torch.tensor([[24, 10], [24, 24]]).repeat(50, 1), torch.full((100, 2), 24)
    config = Config(window=0.6, starts=(0.0, 0.9))
    corner, extent = global_contrast.windows(size, frame, config, torch.Generator().manual_seed(0))
    assert (corner >= 0).all()
    assert (corner + extent <= size).all()
    assert extent[:2].tolist() == [[14, 10], [14, 14]]
    assert corner[1::2].unique().tolist() == list(range(11))


def test_brightness_and_contrast_are_of_each_image_and_within_their_bounds():
    images = 0.4 + 0.1 * torch.rand(200, 2, 5, 5)
    drawn = global_contrast.brightened(images, 0.3, 0.3, torch.Generator().manual_seed(0))
    offset = (drawn.mean((2, 3)) - images.mean((2, 3)))[:, 0]
    factor = (drawn.std((2, 3)) / images.std((2, 3)))[:, 0]
    assert offset.abs().max() == pytest.approx(0.3, abs=0.02)
    assert (float(factor.min()), float(factor.max())) == (pytest.approx(0.7, abs=0.02), pytest.approx(1.3, abs=0.02))
    assert abs(float(torch.corrcoef(torch.stack([offset, factor]))[0, 1])) < 0.2  # drawn apart, unlike the source
    expected = (images - images.mean((2, 3), keepdim=True)) * factor[:, None, None, None]
    expected = expected + (images.mean((2, 3)) + offset[:, None])[..., None, None]
    torch.testing.assert_close(drawn, expected.clamp(0, 1.5), rtol=1e-4, atol=1e-5)
    assert float(global_contrast.brightened(2 * torch.ones(1, 1, 2, 2), 0.3, 0.3, torch.Generator()).max()) == 1.5


@pytest.mark.parametrize(("grid", "weights"), [(6, 4_849_664), (5, 3_407_872)])
def test_the_head_has_the_weights_of_the_paper(grid, weights):
    """At 192 and at 160 pixels, where the coarsest of 6 maps has 6 and 5 pixels a side and is flattened as it is."""
    head = Head(128, grid, 2, 1024, 128)
    assert sum(p.numel() for p in head.parameters()) == weights
    x = torch.randn(2, 128, grid, grid)
    torch.testing.assert_close(head(x), head.layers(x.flatten(1)))


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.0}, {"partitions": 1}, {"window": 1.2}, {"starts": (0.5, 0.2)}, {"d": 0}, {"contrast": -1.0}]
)
def test_wrong_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Config(**wrong)


def test_an_unresolved_side_is_refused():
    with pytest.raises(ValueError, match=r"global_contrast: the side of a view is not known; set pretrain\.side"):
        GlobalContrast(Flat(4)).augment(slices(2, 8), torch.Generator())


@pytest.mark.parametrize("case", ["gD_bt8", "gD_bt12", "gD_bt12_tau05", "tiny_gD_tau0.5"])
def test_the_parity_preset_gives_the_value_of_the_source_from_views_to_loss(case):
    """Embeddings in place of images, through a method whose encoder and head hand them on."""
    given = parity()["pretrain"]
    _, views, volumes, parts, rows = layout(case)
    subject = GlobalContrast(
        UNet(1, 2, UNetConfig(width=4, levels=2)).encoder,
        Config(temperature=ORACLE[case]["tau"], partitions=parts, side=8, **{key: given[key] for key in ("pairing", "scale")}),
    )
    subject.encoder, subject.head = OneMap(), nn.Flatten()
    z = torch.tensor(ORACLE[case]["embeddings"], dtype=torch.float64)[order(views, volumes, parts, rows)]
    groups = {"partition": torch.arange(parts).repeat(volumes), "volume": torch.arange(volumes).repeat_interleave(parts)}
    loss = subject.loss(Views(list(z[:, :, None, None].chunk(views)), groups=groups), STEP)
    assert float(loss.total) == pytest.approx(ORACLE[case]["expected"]["loss_repo_norm"], rel=1e-6)


class OneMap(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]


def parity() -> dict:
    import yaml

    return yaml.safe_load(Path(global_contrast.__file__).with_name("presets").joinpath("global-local-parity.yaml").read_text())
