"""Figures draw the numbers they were given, take any label, and come out the same every time."""

import itertools
import xml.etree.ElementTree

import numpy as np
import pytest

from medssl.platform import figures, history
from medssl.platform.figures import Curve, Histogram, Spent
from medssl.platform.leaderboard import Leaderboard, rank
from medssl.platform.records import Run

HOSTILE = "<script>alert(1)</script> $\\frac{ \"&'"
MEANS = {"from scratch": 0.80, "random crop": 0.79, "(0, 0.3]": 0.81, "[0.3, 0.6]": 0.86, HOSTILE: 0.83}
INTERVALS = {"(0, 0.3]": (0.0, 0.3), "[0.3, 0.6]": (0.3, 0.6), HOSTILE: (0.6, 1.0)}


def ranked(means: dict[str, float], k: int = 4, m: int = 2) -> Leaderboard:
    rng = np.random.default_rng(0)
    runs = []
    for (arm, mean), pretraining in itertools.product(means.items(), range(k)):
        level = mean + rng.normal(0, 0.005)
        scores = level + rng.normal(0, 0.005, (m, 6))
        runs += [Run(arm, pretraining, number, {f"p{n}": row[n] for n in range(6)}) for number, row in enumerate(scores)]
    return rank(runs, "from scratch", metric="dice")


@pytest.fixture(scope="module")
def board() -> Leaderboard:
    return ranked(MEANS)


@pytest.fixture(scope="module")
def searched() -> tuple[Leaderboard, dict[str, dict[str, float]]]:
    """Twelve arms with two numbers each, and the control."""
    rng = np.random.default_rng(1)
    low = {f"arm {n}": float(rng.uniform(0, 0.6)) for n in range(12)}
    rate = {arm: float(10 ** rng.uniform(-4, -1)) for arm in low}
    means = {"from scratch": 0.75} | {arm: 0.8 - (low[arm] - 0.3) ** 2 for arm in low}
    return ranked(means, k=2, m=1), {"low": low, "lr": rate}


def drawn(figure, gid):
    """Every line that was marked so, as (x, y)."""
    lines = [line for axes in figure.axes for line in axes.lines if line.get_gid() == gid]
    return [(np.atleast_1d(line.get_xdata()).tolist(), np.atleast_1d(line.get_ydata()).tolist()) for line in lines]


def every(board, searched) -> dict[str, "figures.Figure"]:
    """One of each."""
    sweep, parameters = searched
    arms = [row.arm for row in board.rows]
    rows = [{"step": step, "seconds": step, "loss/total": 1 / step, "collapse": 0.1} for step in range(1, 40)]
    per_patient = {f"p{n}": n / 10 for n in range(7)}
    points = {arm: (parameters["low"][arm], parameters["lr"][arm]) for arm in parameters["low"]}
    words = {arm: "simsiam" if value > 0.3 else "byol" for arm, value in parameters["low"].items()}
    return {
        "forest": figures.forest(board),
        "over_interval": figures.over_interval(board, INTERVALS),
        "slices": figures.slices(sweep, parameters),
        "plane": figures.plane(sweep, ("low", "lr"), points),
        "parallel": figures.parallel(sweep, {**parameters, "method": words}),
        "importance": figures.importance({"low": 0.7, "lr": 0.3}, 40),
        "classes": figures.classes({"liver": dict.fromkeys(arms, per_patient)}, arms, "from scratch", "dice"),
        "labelled": figures.labelled({HOSTILE: [(1, board.rows[0]), (4, board.rows[1])]}, None, "dice"),
        "curves": figures.curves([Curve(arm, "pretrain", rows) for arm in arms], ["loss/total"], arms, "from scratch"),
        "realised": figures.realised([Histogram(HOSTILE, [0, 3, 1, 0], 1, (0.25, 0.75))]),
        "spent": figures.spent([Spent("pretraining", 4, 2, 1.5, 1.5), Spent("fine-tuning", 8, 8, 2.0, 0.0)]),
    }


def test_the_forest_draws_the_leaderboards_numbers(board):
    figure = figures.forest(board)
    assert [x[0] for x, _ in drawn(figure, "mean")] == [row.mean for row in board.rows]
    low, high = figure.axes[0].get_xlim()
    expected = [[max(row.low, low), min(row.high, high)] for row in board.rows]
    assert [x for x, _ in drawn(figure, "interval")] == expected
    assert [x for x, _ in drawn(figure, "dots")] == [[float(np.mean(group)) for group in row.scores] for row in board.rows]
    control = next(row for row in board.rows if row.arm == "from scratch")
    assert drawn(figure, "control")[0][0] == [control.mean] * 2
    texts = [text.get_text() for text in figure.axes[1].texts if text.get_gid() == "letters"]
    assert texts == [row.letters for row in board.rows]
    heights = [y[0] for _, y in drawn(figure, "mean")]
    assert heights == sorted(heights), "from the best to the worst"


def test_the_forest_shows_pretrainings_where_an_interval_would_hide_them():
    board = ranked(MEANS, k=2, m=1)  # intervals of nine standard deviations to each side
    low, high = figures.forest(board).axes[0].get_xlim()
    units = [np.mean(group) for row in board.rows for group in row.scores]
    assert low < min(units) < max(units) < high
    assert high - low < 5 * (max(units) - min(units))


def test_an_arm_without_an_interval_and_one_without_a_score_do_no_harm():
    runs = [Run("from scratch", 0, 0, {"p": 0.8}), Run("x", 0, 0, {"p": 0.9}), Run("gone", 0, 0, {})]
    figure = figures.forest(rank(runs, "from scratch", metric="dice"))
    assert [x[0] for x, _ in drawn(figure, "mean")] == [0.9, 0.8]
    assert not drawn(figure, "interval")


def test_bars_span_the_intervals_at_the_height_of_the_means(board):
    figure = figures.over_interval(board, INTERVALS)
    means = {row.arm: row.mean for row in board.rows}
    expected = sorted((list(ends), [means[arm]] * 2) for arm, ends in INTERVALS.items())
    assert sorted(drawn(figure, "bar")) == expected


def test_slices_draw_every_arm_over_what_it_sets(searched):
    board, parameters = searched
    figure = figures.slices(board, parameters)
    means = {row.arm: row.mean for row in board.rows}
    for axes, values in zip(figure.axes, parameters.values(), strict=False):
        points = {line.get_xdata()[0]: line.get_ydata()[0] for line in axes.lines if line.get_gid() == "arm"}
        assert points == {x: means[arm] for arm, x in values.items()}
    assert [axes.get_xscale() for axes in figure.axes[:2]] == ["linear", "log"]


def test_the_plane_marks_the_best(searched):
    board, parameters = searched
    points = {arm: (parameters["low"][arm], parameters["lr"][arm]) for arm in parameters["low"]}
    ((x, y),) = drawn(figures.plane(board, ("low", "lr"), points), "best")
    assert (x[0], y[0]) == points[board.rows[0].arm]


def test_points_in_one_line_have_no_contours_and_are_drawn_all_the_same(searched):
    board, parameters = searched
    points = {arm: (value, 2 * value) for arm, value in parameters["low"].items()}
    figure = figures.plane(board, ("low", "twice"), points)
    assert len(figure.axes[0].collections[-1].get_offsets()) == len(points)


def test_parallel_lines_run_from_the_least_to_the_most(searched):
    board, parameters = searched
    lines = drawn(figures.parallel(board, parameters), "arm")
    assert len(lines) == 12
    heights = np.array([y for _, y in lines])
    assert heights.min(axis=0) == pytest.approx([0, 0, 0])
    assert heights.max(axis=0) == pytest.approx([1, 1, 1])
    assert heights[-1, -1] == pytest.approx(1), "the best is drawn last"


def test_boxes_show_the_medians_over_patients(board):
    rng = np.random.default_rng(0)
    arms = [row.arm for row in board.rows]
    scores = {organ: {arm: {f"p{n}": float(rng.random()) for n in range(9)} for arm in arms} for organ in ("liver", "spleen")}
    figure = figures.classes(scores, arms, "from scratch", "dice")
    for organ, (y, arm) in itertools.product(scores, enumerate(arms)):
        ((x, _),) = drawn(figure, f"median {organ} {y}")
        assert x[0] == pytest.approx(np.median(list(scores[organ][arm].values())))


def test_of_very_many_arms_the_control_is_always_shown():
    means = {f"arm {n}": 0.9 - n / 1000 for n in range(60)} | {"from scratch": 0.5}
    board = ranked(means, k=2, m=1)
    labels = [text.get_text() for text in figures.forest(board).axes[0].get_yticklabels()]
    assert len(labels) == figures.MOST + 1
    assert labels[-1].startswith("from scratch")
    arms = [row.arm for row in board.rows]
    per = {"liver": {arm: {"p": 0.5, "q": 0.6} for arm in arms}}
    shown = [text.get_text() for text in figures.classes(per, arms, "from scratch", "dice").axes[0].get_yticklabels()]
    assert (len(shown), shown[-1]) == (figures.BOXES, "from scratch")


def test_curves_are_the_rows_of_the_history():
    rows: list[history.Row] = [{"step": step, "loss/a": step**0.5} for step in range(1, 101)]
    figure = figures.curves([Curve("x", "pretrain", rows)], ["loss/a"], ["x", "from scratch"], "from scratch")
    ((steps, values),) = drawn(figure, "x")
    assert steps == list(range(1, 101))
    assert values == [step**0.5 for step in steps]


def test_long_curves_are_thinned_and_not_cut():
    rows: list[history.Row] = [{"step": step, "loss/a": 1.0} for step in range(10_000)]
    figure = figures.curves([Curve("x", "pretrain", rows)], ["loss/a"], ["x", "from scratch"], "from scratch")
    ((steps, _),) = drawn(figure, "x")
    assert len(steps) <= figures.POINTS
    assert steps[-1] >= 9900


def test_histograms_are_shares_and_shade_what_was_asked_for():
    figure = figures.realised([Histogram("x", [0, 30, 10, 0], 0, (0.25, 0.75))])
    axes = figure.axes[0]
    steps = next(patch for patch in axes.patches if hasattr(patch, "get_data"))
    assert steps.get_data().values.tolist() == [0, 75, 25, 0]
    shade = next(patch for patch in axes.patches if patch.get_gid() == "asked")
    assert shade.get_x() == pytest.approx(0.25, abs=0.005)
    assert shade.get_x() + shade.get_width() == pytest.approx(0.75, abs=0.005)


def test_label_fractions_are_on_a_logarithmic_axis_with_the_amounts_as_ticks():
    board = ranked({"from scratch": 0.5, "a 4": 0.6, "a 16": 0.7})
    rows = {row.arm: row for row in board.rows}
    points = [(16.0, rows["a 16"]), (4.0, rows["a 4"]), (1.0, rows["from scratch"])]
    axes = figures.labelled({"a": points}, None, "dice").axes[0]
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "4", "16"]
    assert axes.lines[0].get_ydata().tolist() == [rows[arm].mean for arm in ("from scratch", "a 4", "a 16")]
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(min(row.low for row in rows.values()))


def test_what_was_spent_stands_beside_what_is_to_come():
    left, right = figures.spent([Spent("pretraining", 10, 4, 2.0, 3.0)]).axes
    assert [bar.get_width() for bar in left.patches] == [4, 6]
    assert [bar.get_width() for bar in right.patches] == [2.0, 3.0]


def test_every_figure_is_the_same_bytes_every_time_and_a_valid_svg(board, searched):
    first, second = every(board, searched), every(board, searched)
    for name, figure in first.items():
        vector = figures.svg(figure)
        assert vector == figures.svg(second[name]), name
        if name in ("forest", "curves"):
            assert figures.png(figure) == figures.png(second[name]), name
        root = xml.etree.ElementTree.fromstring(vector)
        assert not [node for node in root.iter() if node.tag.endswith("script")], name
        assert b"<dc:date>" not in vector


def test_a_figure_is_saved_twice_over(board, tmp_path):
    png, svg = figures.save(figures.forest(board), tmp_path / "new", "forest")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert svg.read_bytes().startswith(b"<?xml")


def test_colours_are_okabe_and_itos_and_the_control_is_grey():
    arms = [f"a{n}" for n in range(9)]
    found = figures.colours([*arms[:4], "c", *arms[4:]], "c")
    assert found["c"] == figures.CONTROL
    assert [found[arm] for arm in arms] == [*figures.PALETTE, figures.OTHERS, figures.OTHERS, figures.OTHERS]
