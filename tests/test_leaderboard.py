"""The leaderboard: the IoU study read anew, designs that cannot answer, and formats that read back."""

import csv
import io
import itertools
import json
import math
import random

import numpy as np
import pytest

from medssl.platform import statistics
from medssl.platform.errors import RunError, UsageError
from medssl.platform.leaderboard import Leaderboard, ordered, rank
from medssl.platform.records import Run
from medssl.platform.render import render

# The 24 published scores of the IoU study: 2 pretrainings x 2 fine-tunings, its printed mean and population deviation
STUDY = {
    "from scratch": ((0.842, 0.848, 0.846, 0.836), 0.843, 0.004),
    "[0, 0]": ((0.836, 0.831, 0.834, 0.850), 0.838, 0.007),
    "(0, 0.3]": ((0.847, 0.831, 0.855, 0.824), 0.839, 0.012),
    "[0.3, 0.6]": ((0.854, 0.851, 0.851, 0.857), 0.853, 0.002),
    "[0.6, 1]": ((0.850, 0.855, 0.848, 0.822), 0.843, 0.013),
    "random crop": ((0.815, 0.841, 0.828, 0.812), 0.824, 0.011),
}
PRINTED = 0.0005 + 1e-9  # half of the last digit that the study prints


def runs_of(arm, scores, patients=1):
    """Runs from scores nested as pretraining, fine-tuning, each patient scoring the same."""
    return [
        Run(arm, pretraining, finetuning, {f"p{index}": score for index in range(patients)})
        for pretraining, group in enumerate(scores)
        for finetuning, score in enumerate(group)
    ]


def study():
    return [run for arm, (scores, *_) in STUDY.items() for run in runs_of(arm, np.reshape(scores, (2, 2)).tolist())]


def simulated(arms, k, m, n=10, gain=0.0, sd=0.01, seed=0):
    """Runs of arms a0, a1, …; each is `gain` better than the one before."""
    rng = np.random.default_rng(seed)
    patients, difficulty = [f"p{index}" for index in range(n)], rng.normal(0.0, 0.05, n)
    runs = []
    for arm, pretraining in itertools.product(range(arms), range(k)):
        level = 0.7 + gain * arm + rng.normal(0.0, sd)
        for finetuning in range(m):
            scores = level + rng.normal(0.0, sd) + difficulty + rng.normal(0.0, sd, n)
            runs.append(Run(f"a{arm}", pretraining, finetuning, dict(zip(patients, scores.tolist(), strict=True))))
    return runs


def row_of(board, arm):
    return next(row for row in board.rows if row.arm == arm)


# --- the IoU study ---


def test_study_means_and_deviations_are_the_printed_ones():
    board = rank(study(), "from scratch", metric="legacy-slice-dice")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in render(board, "paper").splitlines()[2:8]]
    assert {cells[0][0], cells[-1][0]} == {"[0.3, 0.6]", "random crop"}
    for arm, pretrainings, summary, *scores in cells:
        published, mean, deviation = STUDY[arm]
        assert pretrainings == "2"
        assert tuple(map(float, scores)) == published
        shown = [float(part) for part in summary.split(" ± ")]
        # the study rounded after, we before: a mean or deviation of rounded scores is off by half a digit at most
        assert np.mean(published) == pytest.approx(mean, abs=2 * PRINTED)
        assert np.std(published) == pytest.approx(deviation, abs=2 * PRINTED)
        assert shown == [pytest.approx(np.mean(published), abs=PRINTED), pytest.approx(np.std(published), abs=PRINTED)]


@pytest.mark.parametrize(
    ("arm", "difference", "t", "df", "p", "exact"),
    [
        ("from scratch", 0.0103, 3.40, 4.6, 0.022, 0.029),
        ("[0, 0]", 0.0155, 3.48, 3.7, 0.029, 0.029),
        ("(0, 0.3]", 0.0140, 1.93, 3.2, 0.14, 0.14),
        ("[0.6, 1]", 0.0095, 1.26, 3.2, 0.29, 0.23),
        ("random crop", 0.0293, 4.30, 3.3, 0.019, 0.029),
    ],
)
def test_study_reanalysed_by_run_gives_the_known_tests(arm, difference, t, df, p, exact):
    best, other = np.array(STUDY["[0.3, 0.6]"][0]), np.array(STUDY[arm][0])
    found = statistics.welch(best, other)
    assert found.interval.estimate == pytest.approx(difference, abs=5.1e-5)
    assert (found.t, found.df) == (pytest.approx(t, abs=0.006), pytest.approx(df, abs=0.06))
    assert found.p == pytest.approx(p, abs=0.006)
    assert statistics.permutation_test(best, other).p == pytest.approx(exact, abs=0.006)


def test_study_noise_is_that_of_fine_tuning():
    pretrained = [np.reshape(scores, (2, 2)) for arm, (scores, *_) in STUDY.items() if arm != "from scratch"]
    found = statistics.components(pretrained)
    assert math.sqrt(found.within) == pytest.approx(0.0126, abs=5e-5)
    assert found.between_raw < 0
    sd = math.sqrt(found.within)
    assert round(statistics.normal_sample_size(sd, 0.01)) == 25
    assert round(statistics.normal_sample_size(sd, 0.01, alpha=0.05 / 5)) == 37


def test_study_cannot_tell_any_arm_from_scratch():
    board = rank(study(), "from scratch", metric="legacy-slice-dice")
    assert all(row.p_holm == 1.0 for row in board.rows if row.arm != "from scratch")
    assert {row.letters for row in board.rows} == {"a"}
    assert board.verdict.startswith(
        "No arm can be told apart from `from scratch` with k=2, m=2: the smallest possible p is 0.33. About 18 pretrainings"
    )
    assert row_of(board, "[0.3, 0.6]").needed == 18  # x 2 fine-tunings: the 37 runs per arm of an unnested reading


def test_a_design_too_small_for_its_family_is_told_so():
    board = rank(simulated(30, k=5, m=1), "a0", metric="dice")
    assert "with k=5, m=1: the smallest possible p is 0.0079, too large for Holm over 29 comparisons." in board.verdict


def test_study_from_scratch_has_four_independent_units_when_told_so():
    runs = [run for run in study() if run.arm != "from scratch"]
    board = rank(runs + runs_of("from scratch", [[score] for score in STUDY["from scratch"][0]]), "from scratch", metric="dice")
    assert board.smallest_p == pytest.approx(1 / 15)
    assert row_of(board, "from scratch").k == 4
    assert board.verdict.startswith("No arm can be told apart")
    assert any(note.startswith("Unequal repeats (k=2 to 4, m=1 to 2)") for note in board.notes)


# --- what a row says ---


def test_rows_are_in_order_of_the_mean_and_hold_the_known_statistics():
    board = rank(simulated(4, k=5, m=3, gain=0.02), "a1", metric="dice")
    assert [row.arm for row in board.rows] == ["a3", "a2", "a1", "a0"]
    best, control = row_of(board, "a3"), row_of(board, "a1")
    units, others = np.mean(best.scores, axis=1), np.mean(control.scores, axis=1)
    assert (best.k, best.m, best.runs) == (5, 3, 15)
    assert best.mean == pytest.approx(units.mean())
    interval = statistics.mean_interval(units)
    assert (best.low, best.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert best.p == pytest.approx(statistics.permutation_test(units, others).p)
    assert best.difference == pytest.approx(units.mean() - others.mean())
    assert best.difference_low < best.difference < best.difference_high
    assert best.new_low < best.low
    assert control.difference is None
    assert control.p is None
    assert sum(row.best_probability for row in board.rows) == pytest.approx(1.0)


def test_clear_differences_are_said_with_their_direction():
    board = rank(simulated(3, k=6, m=2, gain=0.05), "a1", metric="dice")
    assert board.verdict.startswith("Better than `a1`: `a2`; worse than `a1`: `a0` (p ≤ 0.05 after Holm over 2 comparisons).")
    assert [row.letters for row in board.rows] == ["a", "b", "c"]


def test_distances_are_better_when_smaller():
    board = rank(simulated(3, k=6, m=2, gain=0.05), "a1", metric="hd95_mm", wanted=0.5)
    assert [row.arm for row in board.rows] == ["a0", "a1", "a2"]
    assert board.verdict.startswith("Better than `a1`: `a0`; worse than `a1`: `a2`")
    assert board.rows[0].best_probability > 0.9


@pytest.mark.parametrize("seed", range(8))
def test_arms_share_no_letter_with_the_control_when_told_apart_from_it(seed):
    board = rank(simulated(5, k=5, m=1, gain=0.008, seed=seed), "a0", metric="dice")
    control = set(row_of(board, "a0").letters)
    for row in board.rows:
        if row.p_holm is not None:
            assert bool(control & set(row.letters)) == (row.p_holm > 0.05)


def test_the_order_of_runs_changes_nothing():
    runs = simulated(4, k=3, m=2)
    shuffled = random.Random(0).sample(runs, len(runs))
    assert rank(runs, "a0", metric="dice") == rank(shuffled, "a0", metric="dice")


def test_many_relabelings_are_sampled_and_the_notes_say_so():
    runs = simulated(2, k=10, m=1, gain=0.1)
    board = rank(runs, "a0", metric="dice")
    assert board.smallest_p == pytest.approx(1 / 50_001)
    assert any("50,000 random relabelings, seed 0" in note for note in board.notes)
    assert rank(runs, "a0", metric="dice") == board


def test_enough_repeats_are_called_enough():
    board = rank(simulated(2, k=8, m=1, sd=0.001), "a0", metric="dice", wanted=0.05)
    assert "These repeats are enough to see a difference of 0.050" in board.verdict


def test_needed_pretrainings_count_the_fine_tunings_of_both_arms():
    many, few = (rank(simulated(2, k=30, m=m, seed=3), "a0", metric="dice", wanted=0.005).rows[0].needed for m in (4, 1))
    # variances of a pretraining's mean: between 1 + within 1/m, in units of sd², patients' noise aside
    assert many / few == pytest.approx((1 + 1 / 4) / 2, rel=0.25)


@pytest.mark.parametrize(("n", "k", "m"), [(7, 2, 2), (10, 3, 1), (4, 1, 1)])
def test_p_of_patients_is_scipys_paired_permutation_test(n, k, m):
    from scipy.stats import permutation_test

    runs = simulated(3, k=k, m=m, n=n, gain=0.004, sd=0.004, seed=n)
    board = rank(runs, "a0", metric="dice")
    names = [f"p{index}" for index in range(n)]
    table = {
        arm: np.array([[run.by_patient[name] for name in names] for run in runs if run.arm == arm])
        for arm in ("a0", "a1", "a2")
    }
    for arm in ("a1", "a2"):
        pair = (table[arm].mean(axis=0), table["a0"].mean(axis=0))
        theirs = permutation_test(pair, lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf)
        assert row_of(board, arm).p_patients == pytest.approx(theirs.pvalue)
    assert row_of(board, "a0").p_patients is None


def test_p_of_patients_decides_no_group_and_says_what_it_asks():
    """One pretraining each: patients all agree, and still nothing is known about another pretraining."""
    board = rank(simulated(2, k=1, m=1, n=12, gain=0.2, sd=0.001), "a0", metric="dice")
    row = row_of(board, "a1")
    assert row.p_patients == pytest.approx(2 / 2**12)
    assert (row.p, row.letters, row_of(board, "a0").letters) == (1.0, "a", "a")
    assert board.verdict.startswith("No arm can be told apart")
    assert any("not whether the method would win again" in note and "decides no group" in note for note in board.notes)
    for format in ("md", "html"):
        assert "p patients" in render(board, format)
    assert json.loads(render(board, "json"))["rows"][0]["p_patients"] == row.p_patients
    assert next(csv.DictReader(io.StringIO(render(board, "csv"))))["p_patients"] == repr(row.p_patients)


def test_p_of_patients_leaves_out_who_is_undefined_in_a_run():
    scores = {"c": (0.5, 0.6, 0.7, 0.8), "x": (0.6, 0.75, 0.72, math.nan)}
    runs = [Run(arm, 0, 0, {f"p{n}": score for n, score in enumerate(each)}) for arm, each in scores.items()]
    assert row_of(rank(runs, "c", metric="dice"), "x").p_patients == pytest.approx(2 / 2**3)


# --- designs that cannot answer ---


def test_one_pretraining_has_no_interval_and_says_so():
    board = rank(runs_of("x", [[0.8, 0.82]]) + runs_of("c", [[0.7, 0.72]]), "c", metric="dice")
    row = row_of(board, "x")
    assert (row.low, row.high, row.sd_between, row.difference_low, row.best_probability, row.needed) == (None,) * 6
    assert (row.p, row.p_holm) == (1.0, 1.0)
    assert "One pretraining only, hence no interval: `x`, `c`." in board.notes
    assert "cannot be said" in board.verdict
    for format in ("table", "paper", "md", "csv", "json"):
        assert "nan" not in render(board, format)


def test_failed_runs_are_left_out_and_counted():
    runs = runs_of("x", [[0.8, math.nan], [0.82, 0.81]]) + runs_of("c", [[0.7], [0.71]])
    board = rank([*runs, Run("x", 2, 0, {}), Run("gone", 0, 0, {})], "c", metric="dice")
    row = row_of(board, "x")
    assert (row.k, row.m, row.runs) == (2, 2, 3)
    assert row.mean == pytest.approx((0.8 + 0.815) / 2)
    assert board.notes[:2] == (
        "Left out: 2 of 5 runs of `x`, without a finite score; the arm may look too good.",
        "Left out: 1 of 1 run of `gone`, without a finite score.",
    )
    assert board.rows[-1].arm == "gone"
    assert board.rows[-1].mean is None
    assert "2×≤2" in render(board)


def test_infinite_scores_count_as_failed():
    board = rank(runs_of("x", [[3.0], [math.inf]]) + runs_of("c", [[4.0], [5.0]]), "c", metric="hd95_mm")
    assert row_of(board, "x").k == 1
    assert board.notes[0].startswith("Left out: 1 of 2 runs of `x`")


def test_patients_without_a_score_are_named():
    runs = [Run(arm, k, 0, {"p": 0.5 + k / 10, "q": math.nan if k else 0.7}) for arm in "xc" for k in range(2)]
    board = rank(runs, "c", metric="dice")
    assert row_of(board, "x").scores == ((0.6,), (0.6,))
    assert any(note.startswith("1 of 2 patients have no defined score in some runs") and "`q`" in note for note in board.notes)


def test_identical_pretrainings_are_not_taken_for_certainty():
    board = rank(runs_of("x", [[0.8], [0.8]]) + runs_of("c", [[0.7], [0.71]]), "c", metric="dice")
    assert row_of(board, "x").low is None
    assert "Pretrainings scored exactly alike, hence no interval: `x`. Check that their seeds differ." in board.notes


def test_a_single_arm_is_shown_without_comparison():
    board = rank(runs_of("c", [[0.7], [0.72], [0.71]]), "c", metric="dice")
    assert board.rows[0].low is not None
    assert board.smallest_p is None
    assert board.verdict == "Only the control `c` has runs with a score: there is nothing to compare it with."


def test_a_control_that_failed_leaves_the_others_ranked():
    board = rank([*runs_of("x", [[0.8], [0.81]]), Run("c", 0, 0, {})], "c", metric="dice")
    assert board.rows[0].mean == pytest.approx(0.805)
    assert board.rows[0].difference is None
    assert board.verdict == "The control `c` has no run with a score: nothing can be compared with it."


@pytest.mark.parametrize(
    ("runs", "control", "wanted", "error", "message"),
    [
        ([], "c", 0.01, UsageError, "no runs"),
        (runs_of("scratch", [[0.7]]), "scrach", 0.01, UsageError, "did you mean scratch"),
        (runs_of("c", [[0.7]]), "c", 0.0, UsageError, "wanted difference is 0.0"),
        (runs_of("c", [[0.7]]) * 2, "c", 0.01, RunError, "arm `c`, pretraining 0, fine-tuning 0 was scored 2 times"),
        ([Run("c", 0, 0, {"p": 0.7}), Run("x", 1, 0, {"q": 0.7})], "c", 0.01, RunError, r"same patients \(`p`, `q`"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(runs, control, wanted, error, message):
    with pytest.raises(error, match=message):
        rank(runs, control, metric="dice", wanted=wanted)


# --- formats ---


@pytest.fixture(scope="module")
def board() -> Leaderboard:
    return rank(simulated(4, k=5, m=2, gain=0.03) + runs_of("a|9, [b]", [[0.6], [0.61]], patients=10), "a0", metric="dice")


def test_json_reads_back(board):
    read = json.loads(render(board, "json"))
    assert [row["arm"] for row in read["rows"]] == [row.arm for row in board.rows]
    assert read["verdict"] == board.verdict
    for ours, theirs in zip(board.rows, read["rows"], strict=True):
        assert theirs["scores"] == [list(group) for group in ours.scores]
        assert {name: value for name, value in theirs.items() if name != "scores"} == {
            name: getattr(ours, name) for name in theirs if name != "scores"
        }


def test_csv_reads_back(board):
    rows = list(csv.DictReader(io.StringIO(render(board, "csv"))))
    assert [row["arm"] for row in rows] == [row.arm for row in board.rows]
    for ours, theirs in zip(board.rows, rows, strict=True):
        for name in ("mean", "low", "sd_between", "difference", "p_holm", "needed"):
            assert (float(theirs[name]) if theirs[name] else None) == getattr(ours, name)
        assert tuple(tuple(map(float, group.split())) for group in theirs["scores"].split("; ")) == ours.scores


@pytest.mark.parametrize("format", ["md", "paper"])
def test_markdown_has_as_many_cells_in_every_line(board, format):
    lines = [line.replace("\\|", "") for line in render(board, format).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(board.rows)
    assert len({line.count("|") for line in lines}) == 1


def test_table_fits_100_columns_without_colour_when_not_a_terminal():
    names = {f"a{index}": "an arm whose name says all of its settings, and more " * 2 + str(index) for index in range(4)}
    runs = [Run(names[run.arm], run.pretraining, run.finetuning, run.by_patient) for run in simulated(4, k=2, m=2, sd=0.5)]
    text = render(rank(runs, names["a0"], metric="dice"))
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_table_is_coloured_on_a_terminal_only(board, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    assert "\x1b[" in render(board)


def test_table_shows_names_that_look_like_markup(board):
    assert "a|9, [b]" in render(board)


def test_contract_and_verdict_are_printed(board):
    for format in ("table", "md"):
        text = " ".join(render(board, format).split())
        assert "Score: dice." in text
        assert board.verdict in text


def test_unknown_format_is_refused(board):
    with pytest.raises(UsageError, match="did you mean json"):
        render(board, "jsn")


def test_html_is_a_page_that_sorts_and_escapes(board):
    runs = [*simulated(2, k=2, m=1), Run("<b>&", 0, 0, {f"p{n}": 0.5 for n in range(10)})]
    text = render(rank(runs, "a0", metric="dice"), "html")
    assert "<b>&" not in text
    assert "&lt;b&gt;&amp;" in text
    assert 'class="sortable"' in text
    text = render(board, "html")
    for row in board.rows:
        assert f'data-value="{row.mean!r}"' in text, "columns sort by the number and not by what is shown"


def test_rows_come_in_the_order_asked_for(board):
    by_name = [row.arm for row in ordered(board, "arm").rows]
    assert by_name == sorted(by_name)
    far = [row.difference for row in ordered(board, "difference").rows]
    assert far[-1] is None
    assert [abs(gap) for gap in far[:-1]] == sorted((abs(gap) for gap in far[:-1]), reverse=True)
    assert ordered(board, "mean") == board
    with pytest.raises(UsageError, match="did you mean mean"):
        ordered(board, "meen")


def test_200_arms_are_ranked_and_rendered():
    board = rank(simulated(200, k=5, m=4, n=25), "a0", metric="dice")
    assert len(board.rows) == 200
    assert all(f"a{n}" in render(board) for n in (1, 199))


def test_each_arm_is_compared_with_its_own_control_in_one_family():
    """Against a table made by hand: differences and p of each pair alone, Holm over both pairs."""
    k, rng = 5, np.random.default_rng(0)
    levels = {"scratch 1": 0.3, "pretrained 1": 0.5, "scratch all": 0.8, "pretrained all": 0.801}
    runs = [run for arm, level in levels.items() for run in runs_of(arm, rng.normal(level, 0.01, (k, 1)).tolist(), patients=3)]
    compare = {arm: f"scratch {arm.split()[1]}" for arm in levels}
    board = rank(runs, "scratch 1", metric="dice", compare=compare)
    pairs = {}
    for budget in ("1", "all"):
        alone = [run for run in runs if run.arm.endswith(budget)]
        pairs[f"pretrained {budget}"] = row_of(rank(alone, f"scratch {budget}", metric="dice"), f"pretrained {budget}")
    holm = statistics.holm(np.array([row.p for row in pairs.values()]))
    for (arm, row), p_holm in zip(pairs.items(), holm, strict=True):
        found = row_of(board, arm)
        assert (found.difference, found.p, found.control) == (row.difference, row.p, row.control)
        assert found.p_holm == pytest.approx(p_holm)
    for arm in ("scratch 1", "scratch all"):
        assert row_of(board, arm).p is None
        assert row_of(board, arm).control == arm
    assert "Better than its control: `pretrained 1`; cannot be told apart from it: `pretrained all`" in board.verdict
    assert not set(row_of(board, "scratch 1").letters) & set(row_of(board, "pretrained 1").letters)
    assert set(row_of(board, "scratch all").letters) & set(row_of(board, "pretrained all").letters)
    assert "difference to its control" in render(board, "md")


def test_controls_that_are_all_the_same_change_nothing():
    runs = simulated(4, 4, 2, gain=0.01)
    one, other = (rank(runs, "a0", metric="dice", compare=compare) for compare in (None, {f"a{i}": "a0" for i in range(4)}))
    assert render(one, "json") == render(other, "json")
