"""Pairs of crops: exact on the pixel grid, uniform as their law says, and refused where an image cannot hold them.

The references here enumerate every pair of corners, or follow the continuous formula of the law, and share no code with
the sampler.
"""

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from medssl.methods import crops
from medssl.methods.settings import PairCrops

PAPER = [((0.0, 0.0), "[]"), ((0.0, 0.3), "(]"), ((0.3, 0.6), "[]"), ((0.6, 1.0), "[]")]
LAWS = ["conditional", "pair", "iou"]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sizes(*shape: int, n: int) -> torch.Tensor:
    return torch.tensor([shape]).repeat(n, 1)


def exact_iou(p, a, q, b) -> Fraction:
    shared = math.prod(max(0, min(pi + ai, qi + bi) - max(pi, qi)) for pi, ai, qi, bi in zip(p, a, q, b, strict=True))
    return Fraction(shared, math.prod(a) + math.prod(b) - shared)


def inside(value: Fraction, interval, ends: str) -> bool:
    low, high = (Fraction(str(end)) for end in interval)
    above = value > low if ends[0] == "(" else value >= low
    return above and (value < high if ends[1] == ")" else value <= high)


def every_pair(size, a, b, interval, ends: str):
    """Every admissible pair of corners, by trying them all."""
    first, second = (
        itertools.product(*(range(length - side + 1) for length, side in zip(size, box, strict=True))) for box in (a, b)
    )
    for p, q in itertools.product(first, second):
        if inside(exact_iou(p, a, q, b), interval, ends):
            yield p, q


def all_pairs(size, a, b, interval, ends: str) -> list:
    return list(every_pair(size, a, b, interval, ends))


def drawn_pairs(pair: crops.Pair) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    p, q = (corner.tolist() for corner in pair.corners)
    return [(tuple(first), tuple(second)) for first, second in zip(p, q, strict=True)]


def violations(pair: crops.Pair, interval, ends: str) -> int:
    boxes = zip(*(t.tolist() for t in (pair.corners[0], pair.extents[0], pair.corners[1], pair.extents[1])), strict=True)
    seen = Counter((tuple(map(tuple, box))) for box in boxes)
    return sum(number for box, number in seen.items() if not inside(exact_iou(*box), interval, ends))


def assert_uniform(drawn: list, support: list) -> None:
    """Every member of the support is as likely as any other (chi-squared), and nothing else is drawn."""
    seen = Counter(drawn)
    assert set(seen) <= set(support)
    if len(support) > 1:
        assert stats.chisquare([seen[member] for member in support]).pvalue > 1e-4


# -- bounds and feasibility -------------------------------------------------------------------------------------------


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([0, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.6, 0.75, 1]),
    st.sampled_from([0, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.6, 0.75, 1]),
    st.sampled_from(["[]", "(]", "[)", "()"]),
)
def test_bounds_hold_exactly_the_overlaps_whose_iou_lies_in_the_interval(a, b, low, high, ends):
    least, most = crops.bounds((low, high), ends, a, b)
    low, high = (Fraction(end).limit_denominator(100) for end in (low, high))
    for shared in range(min(a, b) + 1):
        value = Fraction(shared, a + b - shared)
        expected = (value > low if ends[0] == "(" else value >= low) and (value < high if ends[1] == ")" else value <= high)
        assert (least <= shared <= most) == expected


def test_bounds_of_numbers_and_tensors_agree():
    a, b = torch.arange(1, 200)[:, None], torch.arange(1, 200)[None]
    least, most = crops.bounds((0.3, 0.6), "(]", a, b)
    for i, j in itertools.product(range(0, 199, 17), range(0, 199, 13)):
        assert (int(least[i, j]), int(most[i, j])) == crops.bounds((0.3, 0.6), "(]", i + 1, j + 1)


@given(
    st.lists(st.integers(3, 9), min_size=2, max_size=3),
    st.integers(1, 3),
    st.sampled_from([0, 0.1, 0.2, 0.3, 0.4, 0.5]),
    st.sampled_from([0, 0.05, 0.2, 0.5]),
    st.sampled_from(["[]", "(]", "[)", "()"]),
)
def test_the_feasibility_rule_equals_brute_force(size, side, low, width, ends):
    interval = (low, round(low + width, 6))
    if not width:
        ends = "[]"
    config = PairCrops(side=side, iou=interval, ends=ends, unreachable="skip")
    box = (side,) * len(size)
    expected = any(
        inside(exact_iou((0,) * len(size), box, q, box), interval, ends)
        for q in itertools.product(*(range(length - side + 1) for length in size))
    )
    batch = torch.tensor([size])
    assert bool(crops.feasible(batch, config)) == expected
    for law in LAWS:
        drawn = crops.pair(batch, PairCrops(side=side, iou=interval, ends=ends, law=law, unreachable="skip"), rng())
        assert bool(drawn.held) == expected
        assert not expected or violations(drawn, interval, ends) == 0


def test_the_reachable_range_equals_brute_force():
    cases = [((7, 6), (3, 4), (5, 2)), ((5, 5), (4, 4), (4, 4)), ((4, 5, 3), (2, 3, 2), (3, 3, 1))]
    for size, a, b in cases:
        everything = [exact_iou(p, a, q, b) for p, q in all_pairs(size, a, b, (0, 1), "[]")]
        low, high = crops.reachable(*(torch.tensor([side]) for side in (size, a, b)))
        assert low.item() == pytest.approx(float(min(everything)))
        assert high.item() == pytest.approx(float(max(everything)))


def test_iou_of_boxes_drawn_as_masks():
    corners, extents = torch.randint(0, 6, (2, 50, 3), generator=rng()), torch.randint(1, 6, (2, 50, 3), generator=rng(1))
    measured = crops.iou(corners[0], extents[0], corners[1], extents[1])
    for row in range(50):
        masks = np.zeros((2, 12, 12, 12), dtype=bool)
        for mask, corner, extent in zip(masks, corners[:, row].tolist(), extents[:, row].tolist(), strict=True):
            mask[tuple(slice(c, c + e) for c, e in zip(corner, extent, strict=True))] = True
        assert measured[row].item() == pytest.approx(np.sum(masks[0] & masks[1]) / np.sum(masks[0] | masks[1]))


# -- law "conditional" ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "side", "interval", "ends"),
    [
        ((7, 6), 3, (0.0, 0.0), "[]"),  # the centre has no disjoint partner on the short axis
        ((7, 7), 3, (0.0, 0.0), "[]"),  # nor on any, in the very middle
        ((7, 6), 3, (0.0, 0.3), "(]"),
        ((8, 5), 3, (0.3, 0.6), "[]"),
        ((6, 6), 4, (0.5, 1.0), "[)"),
        ((4, 5, 3), 2, (0.0, 0.0), "[]"),
        ((3, 4, 4), 2, (0.1, 0.4), "[]"),
        ((4, 3, 3), 2, (0.0, 0.2), "(]"),
    ],
)
def test_conditional_law_first_corner_uniform_over_those_with_a_partner_second_over_its_partners(size, side, interval, ends):
    box = (side,) * len(size)
    admissible = all_pairs(size, box, box, interval, ends)
    partners: dict = {}
    for p, q in admissible:
        partners.setdefault(p, []).append(q)
    drawn = drawn_pairs(crops.pair(sizes(*size, n=20_000), PairCrops(side=side, iou=interval, ends=ends), rng()))
    assert_uniform([p for p, _ in drawn], list(partners))
    seen = Counter(drawn)
    assert set(seen) <= set(admissible)
    expected = np.array([20_000 / len(partners) / len(partners[p]) for p, _ in admissible])
    assert stats.chisquare([seen[pair] for pair in admissible], expected).pvalue > 1e-4


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_counts_equal_brute_force_for_boxes_of_equal_and_unequal_sides(data):
    """The tables behind every draw: how many first corners have a partner, and how many partners each first corner has."""
    axes = data.draw(st.integers(2, 3))
    size = data.draw(st.lists(st.integers(3, 8 if axes == 2 else 5), min_size=axes, max_size=axes))
    a, b = ([data.draw(st.integers(1, length)) for length in size] for _ in range(2))
    low, high = sorted(data.draw(st.tuples(st.sampled_from([0, 0.1, 0.2, 0.3, 0.6]), st.sampled_from([0.1, 0.3, 0.6, 1]))))
    ends = data.draw(st.sampled_from(["[]", "(]", "[)", "()"]))

    partners = Counter(p for p, _ in all_pairs(size, a, b, (low, high), ends))

    spans = [range(length + 1) for length in size[:-1]]
    batch, first, second = (torch.tensor([side]) for side in (size, a, b))
    most = torch.minimum(first, second)
    limits = (bound[:, None] for bound in crops.bounds((low, high), ends, first.prod(1), second.prod(1)))
    seconds = crops._second_rows(crops._grid(spans, torch.device("cpu")), *limits, most[:, -1:])
    firsts = crops._first_rows(seconds, spans, most)
    _, count = crops._draw(crops._Nested(batch - first - second, second, batch - first, most), firsts, rng())
    assert int(count) == len(partners)
    for p in itertools.product(*(range(length - side + 1) for length, side in zip(size, a, strict=True))):
        corner = torch.tensor([p])
        _, count = crops._draw(crops._Nested(corner - second, corner + first, batch - second, most), seconds, rng())
        assert int(count) == partners[p]


def test_joining_rows_changes_no_count():
    assert crops._runs([(4, 4), (0, 1), (2, 2), (6, 9)]) == [(0, 2), (4, 4), (6, 9)]
    side, size = 5, torch.tensor([[9, 8, 7], [12, 6, 5]])
    for (interval, ends), axes in itertools.product(PAPER, (2, 3)):
        low, high = crops.bounds(interval, ends, side**axes, side**axes)
        spans = crops._equal_spans(side, axes, low)
        plain = crops._second_rows(crops._grid(spans, torch.device("cpu")), low, high, side)
        first = crops._first_rows(plain, spans, torch.full((1, axes), side))
        for rows, joined in zip((first, plain), crops._equal_rows(side, axes, low, high, "cpu"), strict=True):
            family = crops._Nested(size[:, :axes] - 7, size[:, :axes] - 2, size[:, :axes] - side, torch.tensor([[side] * axes]))
            assert torch.equal(crops._draw(family, rows, rng())[1], crops._draw(family, joined, rng())[1])
            assert joined.low[0].shape[1] <= rows.low[0].shape[1]


# -- law "pair" -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "side", "interval", "ends"),
    [
        ((6, 5), 3, (0.0, 0.0), "[]"),
        ((6, 5), 3, (0.0, 0.3), "(]"),
        ((6, 5), 3, (0.3, 0.6), "[]"),
        ((6, 5), 3, (0.5, 1.0), "[]"),
        ((4, 3, 3), 2, (0.2, 0.6), "[]"),
        ((3, 4, 4), 2, (0.0, 0.0), "[]"),
    ],
)
def test_pair_law_is_uniform_over_all_admissible_pairs_hence_exchangeable(size, side, interval, ends):
    box = (side,) * len(size)
    admissible = all_pairs(size, box, box, interval, ends)
    config = PairCrops(side=side, iou=interval, ends=ends, law="pair")
    drawn = drawn_pairs(crops.pair(sizes(*size, n=40_000), config, rng()))
    assert_uniform(drawn, admissible)
    swapped = Counter((q, p) for p, q in drawn)
    assert set(swapped) <= set(admissible)


def test_every_number_of_an_ordered_pair_names_a_pair_of_its_own():
    for reach in (0, 1, 2, 7, 30, 415):
        numbers = torch.arange((reach + 1) ** 2)[:, None]
        p, q = crops._Ordered(torch.full_like(numbers, reach), 1).corners(numbers)
        assert len(set(zip(p[:, 0].tolist(), q[:, 0].tolist(), strict=True))) == len(numbers)
        assert int(torch.stack([p, q]).min()) == 0
        assert int(torch.stack([p, q]).max()) == reach
        assert ((p - q).abs().diff(dim=0) <= 0).all()


@pytest.mark.parametrize(
    ("size", "shares"), [((512, 512), (0.836, 0.130, 0.028, 0.007)), ((300, 250), (0.391, 0.443, 0.131, 0.036))]
)
def test_share_of_all_pairs_in_each_of_the_papers_intervals(size, shares):
    """The four numbers of pairs that law "pair" chooses from, over the number of all pairs: closed form, side 96."""
    batch = torch.tensor([size])
    everything = int(((batch - 95) ** 2).prod())
    for (interval, ends), share in zip(PAPER, shares, strict=True):
        rows = crops._fixed_rows(batch, PairCrops(side=96, iou=interval, ends=ends))[1]
        _, count = crops._draw(crops._Ordered(batch - 96, 96), rows, rng())
        assert int(count) / everything == pytest.approx(share, abs=6e-4)


# -- law "iou" --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(512, 512), (300, 300, 300)])
@pytest.mark.parametrize("interval", [(0.05, 0.3), (0.3, 0.6), (0.4, 0.8)])
def test_iou_law_spreads_iou_evenly_over_the_interval(size, interval):
    n = 10_000 if len(size) == 2 else 1_000
    drawn = crops.pair(sizes(*size, n=n), PairCrops(side=96, iou=interval, law="iou"), rng())
    assert stats.kstest(drawn.iou.double().numpy(), stats.uniform(interval[0], interval[1] - interval[0]).cdf).pvalue > 1e-3
    assert violations(drawn, interval, "[]") == 0


def test_iou_law_spreads_offsets_evenly_along_a_level():
    """Among equal squares of one IoU, the shared height v is log-uniform in [ω, 1] (v·w = ω, uniform in the offset)."""
    drawn = crops.pair(sizes(512, 512, n=8000), PairCrops(side=96, iou=(0.2, 0.6), law="iou"), rng())
    offset = (drawn.corners[1] - drawn.corners[0]).double()
    assert stats.binomtest(int((offset[:, 0] > 0).sum()), int((offset[:, 0] != 0).sum())).pvalue > 1e-4
    shared = 96 - offset.abs()
    height = shared[:, 0] + torch.rand(len(shared), generator=rng(1)) - 0.5  # spread each pixel over its own step
    share = torch.log(height / 96) / torch.log(shared.prod(1) / 96**2)
    assert stats.kstest(share.clamp(0, 1).numpy(), "uniform").statistic < 0.02


def test_iou_law_first_corner_is_uniform_given_the_offset():
    drawn = crops.pair(
        sizes(9, 8, n=20_000), PairCrops(side=4, iou=(0.3, 0.3), law="iou", ends="[]", unreachable="skip"), rng()
    )
    assert not drawn.held.any()  # 0.3 asks for 96/13 pixels
    drawn = crops.pair(sizes(9, 8, n=20_000), PairCrops(side=4, iou=(0.6, 0.6), law="iou"), rng())
    pairs = drawn_pairs(drawn)
    support = all_pairs((9, 8), (4, 4), (4, 4), (0.6, 0.6), "[]")
    offsets = Counter(tuple(np.subtract(q, p)) for p, q in support)
    assert_uniform([tuple(np.subtract(q, p)) for p, q in pairs], list(offsets))
    for offset in offsets:
        assert_uniform(
            [pair for pair in pairs if tuple(np.subtract(pair[1], pair[0])) == offset],
            [pair for pair in support if tuple(np.subtract(pair[1], pair[0])) == offset],
        )


def test_iou_law_keeps_to_what_a_small_image_reaches():
    drawn = crops.pair(sizes(120, 120, n=4000), PairCrops(side=96, iou=(0.0, 0.8), law="iou"), rng())
    low = 72**2 / (2 * 96**2 - 72**2)
    assert drawn.iou.min() >= low - 1e-6
    assert stats.kstest(drawn.iou.double().numpy(), stats.uniform(low, 0.8 - low).cdf).statistic < 0.03


# -- the intervals of the paper ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("interval", "ends"), PAPER)
@pytest.mark.parametrize("size", [(300, 250), (250, 250), (200, 200), (96 + 96, 97), (512, 512)])
def test_no_pair_leaves_the_papers_intervals(law, interval, ends, size):
    """Rejection left 36 % of [0, 0] outside at 200 x 200, and some of [0.6, 1] everywhere."""
    drawn = crops.pair(sizes(*size, n=2000), PairCrops(side=96, iou=interval, ends=ends, law=law), rng())
    assert violations(drawn, interval, ends) == 0
    for corner in drawn.corners:
        assert (corner >= 0).all()
        assert (corner + 96 <= torch.tensor(size)).all()


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("size", [(300, 250, 120), (512, 512, 300)])
def test_high_iou_in_volumes_is_never_violated(law, size):
    """Rejection left 1.4 % and 53 % of these outside."""
    drawn = crops.pair(sizes(*size, n=500), PairCrops(side=96, iou=(0.6, 1.0), law=law), rng())
    assert violations(drawn, (0.6, 1.0), "[]") == 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_batch_of_any_sizes_and_any_interval_is_exact(data):
    axes = data.draw(st.integers(2, 3))
    side = data.draw(st.integers(1, 12))
    batch = data.draw(st.lists(st.lists(st.integers(side, 40), min_size=axes, max_size=axes), min_size=1, max_size=6))
    low, high = sorted(data.draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    law = data.draw(st.sampled_from(LAWS))
    config = PairCrops(side=side, iou=(low, high), law=law, unreachable="skip")
    drawn = crops.pair(torch.tensor(batch), config, rng())
    assert torch.equal(drawn.held, crops.feasible(torch.tensor(batch), config))
    inside_image = [(corner >= 0) & (corner + side <= torch.tensor(batch)) for corner in drawn.corners]
    assert torch.stack(inside_image).all()
    assert (drawn.iou[drawn.held] >= low - 1e-6).all()
    assert (drawn.iou[drawn.held] <= high + 1e-6).all()


def test_ends_belong_to_the_interval_or_not():
    """At side 96 an offset of (0, 24) shares 6912 pixels: an IoU of exactly 0.6."""
    for ends, expected in [("[]", True), ("(]", True), ("[)", False), ("()", False)]:
        rows = crops._fixed_rows(torch.tensor([[300, 250]]), PairCrops(side=96, iou=(0.3, 0.6), ends=ends))[1]
        low, high = (torch.stack(bound)[:, 0] for bound in (rows.low, rows.high))
        shared = torch.tensor([[96], [72]])
        assert bool(((low <= shared) & (shared <= high)).all(0).any()) == expected
    only = crops.pair(sizes(300, 250, n=500), PairCrops(side=96, iou=(0.6, 0.6)), rng())
    assert set(only.iou.tolist()) == {torch.tensor(0.6).item()}
    assert (0, 24) in {tuple(sorted(row)) for row in (only.corners[1] - only.corners[0]).abs().tolist()}


# -- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["fixed", "resized"])
@pytest.mark.parametrize("law", LAWS)
def test_equal_generators_give_equal_pairs(law, crop):
    config = PairCrops(side=32, law="conditional" if crop == "resized" else law, crop=crop)
    size = torch.randint(60, 120, (50, 2), generator=rng())
    one, same, other = (crops.pair(size, config, rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.cat([*one.corners, *one.extents]), torch.cat([*same.corners, *same.extents]))
    assert not torch.equal(one.corners[0], other.corners[0])


@pytest.mark.parametrize("law", ["conditional", "pair"])
def test_in_a_batch_of_mixed_sizes_each_image_follows_its_own_law(law):
    shapes, config = [(5, 6), (8, 4), (6, 6)], PairCrops(side=3, iou=(0.1, 0.5), law=law)
    drawn = drawn_pairs(crops.pair(torch.tensor(shapes * 8000), config, rng()))
    for start, shape in enumerate(shapes):
        mine, support = drawn[start::3], all_pairs(shape, (3, 3), (3, 3), (0.1, 0.5), "[]")
        if law == "pair":
            assert_uniform(mine, support)
        else:
            assert set(mine) <= set(support)
            assert_uniform([p for p, _ in mine], sorted({p for p, _ in support}))


def test_a_batch_larger_than_one_table_is_drawn_in_parts(monkeypatch):
    monkeypatch.setattr(crops, "CELLS", 200)
    shape = (7, 6)
    for config in (PairCrops(side=4, iou=(0.2, 0.6)), PairCrops(side=4, iou=(0.2, 0.6), crop="resized")):
        drawn = crops.pair(sizes(*shape, n=501), config, rng())
        assert len(drawn.iou) == 501
        assert violations(drawn, (0.2, 0.6), "[]") == 0


@pytest.mark.parametrize("config", [PairCrops(side=4), PairCrops(side=4, law="iou"), PairCrops(side=4, crop="resized")])
def test_no_images_give_no_pairs(config):
    drawn = crops.pair(torch.zeros(0, 2, dtype=torch.int64), config, rng())
    assert drawn.corners[0].shape == (0, 2)
    assert drawn.held.shape == (0,)


# -- any overlap, and random-resized boxes ----------------------------------------------------------------------------


def test_without_an_interval_both_corners_are_uniform_and_independent():
    drawn = crops.pair(sizes(5, 4, n=30_000), PairCrops(side=3, iou=None), rng())
    assert_uniform(drawn_pairs(drawn), all_pairs((5, 4), (3, 3), (3, 3), (0, 1), "[]"))


def random_resized_crops(rows: int, columns: int, n: int, seed: int) -> np.ndarray:
    """RandomResizedCrop as commonly written: area uniform, log ratio uniform, tried until it fits. (n, 4): corner, sides."""
    random = np.random.default_rng(seed)
    boxes: list = []
    while len(boxes) < n:
        area, ratio = rows * columns * random.uniform(0.08, 1), math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w <= columns and h <= rows:
            boxes.append((random.integers(rows - h + 1), random.integers(columns - w + 1), h, w))
    return np.array(boxes)


def test_resized_pair_is_the_standard_random_resized_crop_pair():
    """Zero overlap in 1.6 % and mean IoU 0.416, and the sides' distribution is that of the usual tries."""
    drawn = crops.pair(sizes(224, 224, n=20_000), PairCrops(side=96, iou=None, crop="resized"), rng())
    assert float((drawn.iou == 0).double().mean()) == pytest.approx(0.016, abs=0.004)
    assert float(drawn.iou.mean()) == pytest.approx(0.416, abs=0.008)
    usual = random_resized_crops(224, 224, 20_000, seed=0)
    for axis in (0, 1):
        for extent in drawn.extents:
            assert stats.ks_2samp(extent[:, axis].numpy(), usual[:, 2 + axis]).statistic < 0.02
    area = drawn.extents[0].double().prod(1).numpy()
    assert stats.ks_2samp(area, usual[:, 2:].prod(1)).statistic < 0.02


@pytest.mark.parametrize(("interval", "ends"), [*PAPER, ((0.3, 0.6), "()")])
@pytest.mark.parametrize("size", [(300, 250), (64, 80), (30, 22, 26)])
def test_resized_pairs_keep_the_interval_the_image_and_the_shape(interval, ends, size):
    drawn = crops.pair(sizes(*size, n=300), PairCrops(side=96, iou=interval, ends=ends, crop="resized"), rng())
    assert drawn.held.all()
    assert violations(drawn, interval, ends) == 0
    for corner, extent in zip(drawn.corners, drawn.extents, strict=True):
        assert (corner >= 0).all()
        assert (corner + extent <= torch.tensor(size)).all()
        over, under = extent + 0.5, extent - 0.5
        assert (over.prod(1) >= 0.08 * math.prod(size)).all()
        assert (over[:, 1:] / under[:, :1] >= 3 / 4 - 1e-6).all()
        assert (under[:, 1:] / over[:, :1] <= 4 / 3 + 1e-6).all()


@pytest.mark.parametrize("interval", [(0.4, 0.7), (0.0, 0.15)])
def test_resized_boxes_first_uniform_over_shapes_with_a_partner_second_over_the_shapes_that_reach(interval):
    size = (8, 7)
    config = PairCrops(side=4, iou=interval, crop="resized", scale=(0.2, 0.7), ratio=(0.5, 2.0))
    n = 30_000
    drawn = crops.pair(sizes(*size, n=n), config, rng())
    shapes = [
        (h, w)
        for h, w in itertools.product(range(1, 9), range(1, 8))
        if (h + 0.5) * (w + 0.5) >= 0.2 * 56 and (h - 0.5) * (w - 0.5) <= 0.7 * 56
        if (w + 0.5) / (h - 0.5) >= 0.5 and (w - 0.5) / (h + 0.5) <= 2
    ]
    partners = {a: [b for b in shapes if any(True for _ in every_pair(size, a, b, interval, "[]"))] for a in shapes}
    first, second = ([tuple(shape) for shape in extent.tolist()] for extent in drawn.extents)
    assert_uniform(first, [a for a in shapes if partners[a]])
    for a in [(4, 4), (6, 5), (3, 6)]:
        assert_uniform([b for mine, b in zip(first, second, strict=True) if mine == a], partners[a])


def test_a_single_allowed_shape_is_drawn_though_no_whole_number_meets_it():
    drawn = crops.pair(
        sizes(300, 250, n=50), PairCrops(side=96, iou=None, crop="resized", scale=(0.25, 0.25), ratio=(1.0, 1.0)), rng()
    )
    assert ((drawn.extents[0].double() - math.sqrt(300 * 250 / 4)).abs() <= 1).all()


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(
    ("size", "interval", "ends", "reach"),
    [((150, 150), (0.0, 0.0), "[]", "0.106 to 1"), ((96, 96), (0.0, 0.3), "(]", "1 to 1")],
)
def test_an_interval_out_of_reach_is_refused_with_the_reachable_range(law, size, interval, ends, reach):
    batch = torch.tensor([(300, 250), size, size])
    config = PairCrops(side=96, iou=interval, ends=ends, law=law)
    with pytest.raises(ValueError, match="cannot hold such a pair") as refusal:
        crops.pair(batch, config, rng())
    low, high = (f"{end:g}" for end in interval)
    for part in (
        f"{ends[0]}{low}, {high}{ends[1]}",
        "96 px",
        f"{size[0]} x {size[1]} px",
        reach,
        "2 of 3",
        "unreachable='skip'",
    ):
        assert part in str(refusal.value)


@pytest.mark.parametrize("law", LAWS)
def test_an_interval_out_of_reach_may_be_skipped_and_the_rest_is_exact(law):
    batch = torch.tensor([(300, 250), (150, 150), (200, 200)] * 200)
    drawn = crops.pair(batch, PairCrops(side=96, iou=(0.0, 0.0), law=law, unreachable="skip"), rng())
    assert drawn.held.tolist() == [True, False, True] * 200
    assert (drawn.iou[drawn.held] == 0).all()
    for corner in drawn.corners:
        assert ((corner >= 0) & (corner + 96 <= batch)).all()


def test_an_interval_between_two_pixels_is_refused():
    with pytest.raises(ValueError, match="by no whole number of pixels in the interval"):
        crops.pair(sizes(300, 250, n=2), PairCrops(side=96, iou=(0.985, 0.99)), rng())


def test_resized_boxes_out_of_reach_are_refused_or_skipped():
    config = {"side": 96, "iou": (0.0, 0.1), "crop": "resized", "scale": (0.8, 1.0)}
    with pytest.raises(ValueError, match=r"iou \[0, 0.1\]: boxes of scale \(0.8, 1.0\).*4 of 4 images"):
        crops.pair(sizes(100, 100, n=4), PairCrops(**config), rng())
    drawn = crops.pair(sizes(100, 100, n=4), PairCrops(**config, unreachable="skip"), rng())
    assert not drawn.held.any()
    with pytest.raises(ValueError, match="none fit"):
        crops.pair(sizes(400, 20, n=4), PairCrops(side=96, iou=None, crop="resized", scale=(0.5, 1.0)), rng())


@pytest.mark.parametrize("shape", [(9, 8), (5, 4, 4)])
def test_a_single_box_is_uniform_over_the_sides_allowed_and_over_where_they_fit(shape):
    """Against all boxes of whole sides, each standing for ± half a pixel, that keep area and ratio."""
    scale, ratio = (0.3, 0.7), (3 / 4, 4 / 3)
    corner, extent = crops.single(sizes(*shape, n=20_000), scale, ratio, rng())
    assert ((corner >= 0) & (extent >= 1) & (corner + extent <= torch.tensor(shape))).all()
    half, total = Fraction(1, 2), math.prod(shape)
    low, high = (Fraction(str(end)) for end in scale)
    allowed = []
    for box in itertools.product(*(range(1, length + 1) for length in shape)):
        small, large = (math.prod(side + sign * half for side in box) for sign in (-1, 1))
        fits = large >= low * total and small <= high * total
        for side in box[1:]:
            fits &= side + half >= Fraction(3, 4) * (box[0] - half) and side - half <= Fraction(4, 3) * (box[0] + half)
        allowed += [box] * fits
    counts = Counter(map(tuple, extent.tolist()))
    assert stats.chisquare([counts[box] for box in allowed]).pvalue > 1e-3
    assert set(counts) <= set(allowed)
    first = allowed[len(allowed) // 2]
    starts = Counter(map(tuple, corner[(extent == torch.tensor(first)).all(1)].tolist()))
    places = math.prod(length - side + 1 for length, side in zip(shape, first, strict=True))
    assert len(starts) == places
    assert places == 1 or stats.chisquare(list(starts.values())).pvalue > 1e-3


def test_a_single_box_that_does_not_fit_is_refused_by_name():
    with pytest.raises(ValueError, match=r"no box of scale \(0.5, 1.0\).*400 x 20 px; use a wider scale"):
        crops.single(torch.tensor([(40, 40), (400, 20)]), (0.5, 1.0), (3 / 4, 4 / 3), rng())


def test_an_image_smaller_than_the_crop_is_refused_by_name():
    with pytest.raises(ValueError, match="crops of 96 px do not fit image 1 of the batch, 90 x 250 px"):
        crops.pair(torch.tensor([(300, 250), (90, 250)]), PairCrops(side=96, unreachable="skip"), rng())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"side": None}, "side"),
        ({"crop": "resized", "law": "pair"}, "law='conditional'"),
        ({"crop": "resized", "law": "iou"}, "law='conditional'"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        crops.pair(sizes(300, 250, n=1), PairCrops(**{"side": 96, **change}), rng())


def test_sizes_of_another_shape_or_type_are_refused():
    for size in (torch.ones(3, 4, dtype=torch.int64), torch.ones(3, 2), torch.ones(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="size: expected int64"):
            crops.pair(size, PairCrops(side=1), rng())
