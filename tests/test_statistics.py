"""The statistics against closed forms, brute force, SciPy, statsmodels and simulation."""

import itertools
import math
import warnings

import numpy as np
import pytest
from scipy import special, stats

from medssl.platform import statistics

EXPERIMENTS = 2000


def nested(rng, k, m, between, within=1.0, experiments=EXPERIMENTS):
    """Scores of `experiments` arms whose true mean is 0, (experiments, k, m); arguments are standard deviations."""
    shape = (experiments, k, m)
    return between * rng.standard_normal((experiments, k, 1)) + within * rng.standard_normal(shape)


def coverage(interval, truth=0.0):
    return float(((interval.low <= truth) & (truth <= interval.high)).mean())


def mixed_model(arms):
    """(between, within) of statsmodels' REML fit: arms fixed, pretrainings random."""
    from statsmodels.regression.mixed_linear_model import MixedLM

    rows = [
        (score, arm, f"{arm}/{pretraining}")
        for arm, groups in enumerate(arms)
        for pretraining, scores in enumerate(groups)
        for score in scores
    ]
    score, arm, pretraining = (np.array(column) for column in zip(*rows, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # statsmodels talks about its optimizer
        fit = MixedLM(score, np.eye(len(arms))[arm], groups=pretraining).fit(reml=True)
    return float(fit.cov_re[0, 0]), float(fit.scale)


def test_variance_components_are_those_of_reml_when_balanced():
    pytest.importorskip("statsmodels")
    rng = np.random.default_rng(0)
    arms = [0.8 + 0.01 * arm + nested(rng, 5, 3, 0.02, 0.01, experiments=1)[0] for arm in range(4)]
    found = statistics.components(arms)
    between, within = mixed_model(arms)
    assert found.between == pytest.approx(between, rel=1e-3)
    assert found.within == pytest.approx(within, rel=1e-3)
    assert (found.df_between, found.df_within) == (16, 40)


def test_variance_components_agree_with_reml_when_unbalanced():
    pytest.importorskip("statsmodels")
    rng = np.random.default_rng(1)
    arms = [[0.1 * arm + rng.normal() + rng.normal(size=rng.integers(1, 5)) for _ in range(150)] for arm in range(2)]
    found = statistics.components(arms)
    assert (found.between, found.within) == pytest.approx(mixed_model(arms), rel=0.05)


def test_variance_components_of_a_hand_example():
    # grand mean 3, between squares 2(2-3)² + (5-3)² = 6 on 1 df, within squares 2 on 1 df, n0 = 3 - 5/3
    found = statistics.components([[[1.0, 3.0], [5.0]]])
    assert (found.between_raw, found.within) == (pytest.approx(3.0), pytest.approx(2.0))
    assert found.of_mean(2) == pytest.approx(4.0)


def test_negative_variance_is_reported_and_truncated():
    found = statistics.components([[[0.0, 2.0], [0.1, 2.1]]])
    assert found.between_raw < 0
    assert found.between == 0
    assert found.of_mean(2) == pytest.approx(found.within / 2)


@pytest.mark.parametrize("arms", [[[[1.0, 2.0]]], []])
def test_one_pretraining_says_nothing_about_the_next(arms):
    found = statistics.components(arms)
    assert math.isnan(found.between)
    assert math.isnan(found.of_mean(1))


def test_without_replicates_the_spread_of_runs_is_all_there_is():
    found = statistics.components([[[1.0], [2.0], [4.0]]])
    assert math.isnan(found.within)
    assert found.between_raw == pytest.approx(np.var([1, 2, 4], ddof=1))
    assert found.of_mean(1) == found.between


@pytest.mark.parametrize("k", [2, 3, 4, 5])
@pytest.mark.parametrize(("m", "between"), [(1, 1.0), (2, 0.0), (2, 1.0), (4, 0.5), (4, 3.0)])
def test_interval_covers_the_truth_in_93_to_97_of_100_experiments(k, m, between):
    scores = nested(np.random.default_rng(k * 10 + m), k, m, between)
    assert 0.93 <= coverage(statistics.mean_interval(scores.mean(axis=-1))) <= 0.97


@pytest.mark.parametrize("sizes", [(1, 4), (2, 2, 1), (4, 4, 1, 1, 1)])
@pytest.mark.parametrize("between", [0.0, 1.0])
def test_interval_covers_when_pretrainings_have_unequal_fine_tunings(sizes, between):
    rng = np.random.default_rng(len(sizes))
    means = [between * rng.standard_normal(EXPERIMENTS) + rng.standard_normal(EXPERIMENTS) / np.sqrt(m) for m in sizes]
    assert 0.93 <= coverage(statistics.mean_interval(np.stack(means, axis=-1))) <= 0.97


def test_interval_is_students():
    means = np.array([0.81, 0.83, 0.80, 0.84])
    expected = stats.ttest_1samp(means, 0.0).confidence_interval()
    found = statistics.mean_interval(means)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("means", [[0.8], [0.8, 0.8], [0.1 + 0.2, 0.3]])
def test_no_interval_without_measured_spread(means):
    found = statistics.mean_interval(means)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize(
    ("pretraining", "patient", "both"), [(1.0, 1.0, 1.0), (0.3, 3.0, 1.0), (1.0, 0.1, 1.0), (0.0, 1.0, 1.0)]
)
def test_interval_for_new_patients_covers_at_least_93_of_100(k, pretraining, patient, both):
    rng = np.random.default_rng(k)
    n = 15
    scores = pretraining * rng.standard_normal((EXPERIMENTS, k, 1)) + patient * rng.standard_normal((EXPERIMENTS, 1, n))
    assert coverage(statistics.new_patients_interval(scores + both * rng.standard_normal((EXPERIMENTS, k, n)))) >= 0.93


def test_new_patients_widen_the_interval():
    scores = np.random.default_rng(0).normal(size=(3, 12)) + np.linspace(0, 5, 12)
    fixed, new = statistics.mean_interval(scores.mean(axis=1)), statistics.new_patients_interval(scores)
    assert new.low < fixed.low < fixed.high < new.high


def test_bootstrap_has_the_variance_of_its_two_levels():
    scores = np.random.default_rng(0).normal(size=(3, 4, 1))
    means, _ = statistics.hierarchical_bootstrap(scores, draws=200_000, patients=False)
    runs = scores[..., 0]
    expected = (runs.mean(axis=1).var() + (runs.var(axis=1) / 4).mean()) / 3
    assert means.mean() == pytest.approx(runs.mean(), abs=4 * math.sqrt(expected / 200_000))
    assert means.var() == pytest.approx(expected, rel=0.02)


def test_bootstrap_draws_the_same_patients_for_all_runs():
    patients = np.array([0.0, 1.0, 5.0])
    means, _ = statistics.hierarchical_bootstrap([np.tile(patients, (2, 1)), np.tile(patients, (1, 1))], draws=200_000)
    assert means.var() == pytest.approx(patients.var() / 3, rel=0.02)  # runs agree, so only patients are left


def test_bootstrap_percentiles_cover_too_little_to_be_shown_as_an_interval():
    scores = nested(np.random.default_rng(3), k=2, m=2, between=1.0, experiments=300)
    ends = [statistics.hierarchical_bootstrap(arm[..., None], draws=400, patients=False)[1] for arm in scores]
    assert np.mean([low <= 0 <= high for low, high in ends]) < 0.8


def test_welch_is_scipys():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(7, 3)), rng.normal(0.5, 3.0, size=(7, 5))
    found, expected = statistics.welch(first, second), stats.ttest_ind(first, second, axis=-1, equal_var=False)
    limits = expected.confidence_interval()
    for ours, theirs in [(found.t, expected.statistic), (found.p, expected.pvalue), (found.df, expected.df)]:
        np.testing.assert_allclose(ours, theirs)
    np.testing.assert_allclose([found.interval.low, found.interval.high], [limits.low, limits.high])


@pytest.mark.parametrize("k", [2, 3, 5])
def test_interval_of_a_difference_covers(k):
    rng = np.random.default_rng(k)
    found = statistics.welch(rng.standard_normal((EXPERIMENTS, k)), 2 * rng.standard_normal((EXPERIMENTS, k)))
    assert 0.93 <= coverage(found.interval) <= 0.985


def brute_force_p(first, second):
    pooled = [*first, *second]
    gaps = []
    for chosen in itertools.combinations(range(len(pooled)), len(first)):
        others = [value for index, value in enumerate(pooled) if index not in chosen]
        gaps.append(abs(np.mean([pooled[index] for index in chosen]) - np.mean(others)))
    return np.mean(np.array(gaps) >= abs(np.mean(first) - np.mean(second)) - 1e-12)


@pytest.mark.parametrize(("k1", "k2"), [(1, 1), (1, 4), (2, 2), (2, 3), (5, 3), (5, 5)])
def test_permutation_test_is_brute_force_and_scipy(k1, k2):
    rng = np.random.default_rng(k1 * 7 + k2)
    first, second = rng.integers(0, 6, size=(4, k1)) / 10, rng.integers(0, 6, size=(4, k2)) / 10  # with ties
    found = statistics.permutation_test(first, second)
    assert found.exact
    assert found.relabelings == math.comb(k1 + k2, k1)
    np.testing.assert_allclose(found.p, [brute_force_p(*pair) for pair in zip(first, second, strict=True)])
    if k1 == k2 == 5:
        smooth = rng.normal(size=(2, 5))
        theirs = stats.permutation_test(smooth, lambda a, b: np.mean(a) - np.mean(b), n_resamples=np.inf)
        assert statistics.permutation_test(*smooth).p == pytest.approx(theirs.pvalue)


@pytest.mark.parametrize(
    ("k1", "k2", "smallest"), [(2, 2, 1 / 3), (3, 3, 0.1), (4, 4, 2 / 70), (5, 5, 2 / 252), (2, 4, 1 / 15)]
)
def test_smallest_p_is_that_of_arms_that_do_not_overlap(k1, k2, smallest):
    found = statistics.permutation_test(np.arange(k1), 100 + np.arange(k2))
    assert found.p == pytest.approx(smallest)
    assert found.smallest == pytest.approx(smallest)


def test_sampled_relabelings_come_near_the_exact_p():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(5, 8)), rng.normal(0.7, size=(5, 8))
    exact, sampled = statistics.permutation_test(first, second), statistics.permutation_test(first, second, limit=10_000)
    assert exact.exact
    assert not sampled.exact
    np.testing.assert_allclose(sampled.p, exact.p, atol=0.02)
    assert (statistics.permutation_test(first, first + 100, limit=100).p == 1 / 101).all()


def test_family_of_comparisons_with_the_control_errs_in_at_most_5_of_100_experiments():
    rng = np.random.default_rng(0)
    units = nested(rng, 6 * 5, 2, between=1.0).mean(axis=-1).reshape(EXPERIMENTS, 6, 5)  # six arms, k = 5, all alike
    control = np.broadcast_to(units[:, :1], (EXPERIMENTS, 5, 5))
    p = statistics.permutation_test(units[:, 1:], control).p
    adjusted = np.array([statistics.holm(family) for family in p])
    assert (adjusted <= 0.05).any(axis=1).mean() <= 0.05
    assert (p <= 0.05).any(axis=1).mean() > 0.1  # which is what Holm is for


def test_family_of_all_pairs_errs_in_at_most_5_of_100_experiments():
    units = np.random.default_rng(1).standard_normal((EXPERIMENTS, 3, 5))
    p = [statistics.permutation_test(units[:, i], units[:, j]).p for i, j in [(0, 1), (0, 2), (1, 2)]]
    adjusted = np.array([statistics.holm(family) for family in np.stack(p, axis=-1)])
    assert 0 < (adjusted <= 0.05).any(axis=1).mean() <= 0.05


def test_patient_test_flips_every_sign():
    differences = np.random.default_rng(0).normal(0.5, size=8).round(1)
    flips = np.array([np.abs(np.dot(signs, differences)) for signs in itertools.product([-1, 1], repeat=8)])
    found = statistics.patient_permutation_test(differences)
    assert found.p == pytest.approx((flips >= abs(differences.sum()) - 1e-12).mean())
    assert found.exact
    many = statistics.patient_permutation_test(np.tile(differences, 3))
    assert not many.exact
    assert many.p < found.p


def test_holm_is_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(0).uniform(0, 0.2, size=12)
    np.testing.assert_allclose(statistics.holm(p), multitest.multipletests(p, method="holm")[1])


def test_holm_leaves_out_what_was_not_tested():
    np.testing.assert_allclose(statistics.holm([0.04, np.nan, 0.01]), [0.04, np.nan, 0.02])
    assert statistics.holm([]).shape == (0,)


def test_effect_size_is_hedges():
    first, second = np.array([1.0, 2.0, 4.0]), np.array([0.0, 1.0, 1.5, 2.0])
    df = 5
    pooled = math.sqrt((2 * first.var(ddof=1) + 3 * second.var(ddof=1)) / df)
    exact = special.gamma(df / 2) / (math.sqrt(df / 2) * special.gamma((df - 1) / 2))
    assert statistics.hedges_g(first, second) == pytest.approx(exact * (first.mean() - second.mean()) / pooled)
    assert math.isnan(statistics.hedges_g([1.0], [2.0, 3.0]))
    assert math.isnan(statistics.hedges_g([1.0, 1.0], [2.0, 2.0]))


def cliques(differ):
    """The largest sets of vertices without an edge, by trying all subsets."""
    n = len(differ)
    alike = [
        set(members)
        for size in range(1, n + 1)
        for members in itertools.combinations(range(n), size)
        if not any(differ[i, j] for i, j in itertools.combinations(members, 2))
    ]
    return sorted(sorted(members) for members in alike if not any(members < other for other in alike))


@pytest.mark.parametrize(
    ("arms", "pairs", "expected"),
    [
        (3, [], [[0, 1, 2]]),
        (3, [(0, 2)], [[0, 1], [1, 2]]),  # a, ab, b
        (3, [(0, 1), (0, 2), (1, 2)], [[0], [1], [2]]),
        (4, [(0, 1), (2, 3)], [[0, 2], [0, 3], [1, 2], [1, 3]]),  # not in order of the means
        (1, [], [[0]]),
        (0, [], []),
    ],
)
def test_groups_of_hand_cases(arms, pairs, expected):
    differ = np.zeros((arms, arms), bool)
    for i, j in pairs:
        differ[i, j] = differ[j, i] = True
    assert statistics.groups(differ) == expected


def test_groups_are_the_largest_sets_that_cannot_be_told_apart():
    rng = np.random.default_rng(0)
    for n in range(2, 9):
        for density in (0.2, 0.5, 0.8):
            differ = np.triu(rng.random((n, n)) < density, 1)
            differ |= differ.T
            assert statistics.groups(differ) == cliques(differ)


def test_chance_of_two_arms_to_be_the_best_is_students():
    means, errors, df = [0.85, 0.84], [0.004, 0.003], 6
    found = statistics.best_probability(means, errors, df, draws=200_000)
    assert found[0] == pytest.approx(stats.t.cdf(0.01 / 0.005, df), abs=0.005)
    assert found.sum() == pytest.approx(1.0)


def test_equal_arms_are_equally_likely_the_best():
    np.testing.assert_allclose(statistics.best_probability([0.8] * 4, [0.01] * 4, 4, draws=100_000), 0.25, atol=0.01)


@pytest.mark.parametrize(
    ("wanted", "runs", "of_five"), [(0.005, 100, 148), (0.010, 25, 37), (0.015, 11, 17), (0.020, 6, 9), (0.030, 3, 4)]
)
def test_runs_for_a_wanted_difference_at_the_noise_of_the_iou_study(wanted, runs, of_five):
    assert statistics.normal_sample_size(0.0126, wanted) == pytest.approx(runs, abs=0.5)
    assert statistics.normal_sample_size(0.0126, wanted, alpha=0.05 / 5) == pytest.approx(of_five, abs=0.52)


@pytest.mark.parametrize("effect", [0.5, 0.8, 1.0, 1.3])
def test_needed_pretrainings_reach_the_power_of_the_t_test(effect):
    power = pytest.importorskip("statsmodels.stats.power").TTestIndPower()
    needed = statistics.needed(1.0, effect)
    assert power.power(effect, needed, 0.05) >= 0.795
    assert power.power(effect, needed - 1, 0.05) < 0.8


def test_needed_pretrainings_let_the_permutation_test_reach_its_level():
    assert statistics.needed(1e-6, 1.0) == 4  # 2/70
    assert statistics.needed(0.0, 1.0, comparisons=5) == 5  # 2/252
    with pytest.raises(ValueError, match="wanted"):
        statistics.needed(1.0, 0.0)


@pytest.mark.parametrize(("k", "comparisons"), [(4, 1), (6, 1), (6, 5), (30, 5)])
def test_the_detectable_difference_is_the_one_that_needs_so_many_pretrainings(k, comparisons):
    least = statistics.detectable(0.02, k, comparisons=comparisons)
    assert statistics.needed(0.02, least * 1.0001, comparisons=comparisons) == k
    assert statistics.needed(0.02, least * 0.97, comparisons=comparisons) > k
    power = pytest.importorskip("statsmodels.stats.power").TTestIndPower()
    assert power.power(least / 0.02, k, 0.05 / comparisons) == pytest.approx(0.8, abs=0.05)


def test_too_few_pretrainings_detect_nothing():
    assert statistics.detectable(0.001, 3) == math.inf
