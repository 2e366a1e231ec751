"""What a sweep can and cannot tell: statistics whose unit is the pretraining.

The model of one arm, with i = 1..k pretrainings and j = 1..m fine-tunings of each:

    y_ij = mu + b_i + e_ij,    b_i ~ (0, between),   e_ij ~ (0, within)

Fine-tunings of one pretraining share b_i, so k·m runs are not k·m independent pieces of evidence: every interval and
test below works on the k means over fine-tunings. What is random matters as much: unless a function says otherwise,
the test patients are taken as fixed ("would fresh pretrainings do as well on these patients?"), and only
`new_patients_interval` and `hierarchical_bootstrap` also ask about patients nobody has scored yet.

Shape letters: a arms, k pretrainings of an arm, m fine-tunings of a pretraining, n patients; `…` are independent
experiments computed at once. Pure functions of arrays; chance comes in as a seed.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]

RELABELINGS = 50_000  # a permutation test tries all of them up to here, and this many random ones beyond


@dataclass(frozen=True)
class Components:
    """Variances between pretrainings, and between fine-tunings of one; NaN where the design cannot estimate them."""

    between_raw: float  # as estimated: negative when pretrainings agree better than their fine-tunings would by chance
    within: float
    df_between: int
    df_within: int

    @property
    def between(self) -> float:
        """`between_raw`, or 0 where that is negative."""
        return math.nan if math.isnan(self.between_raw) else max(self.between_raw, 0.0)

    def of_mean(self, m: float) -> float:
        """Variance of a pretraining's mean over `m` fine-tunings; without replicates, `between_raw` is all of it."""
        return self.between + (0.0 if math.isnan(self.within) else self.within / m)


def components(arms: Sequence[Sequence[ArrayLike]]) -> Components:
    """Variance components of the nested model, pooled over arms whose means are free.

    arms    for each arm, for each of its pretrainings, the scores of its fine-tunings, any number of each

    Analysis of variance (Henderson's method I for unequal numbers: Searle, Casella and McCulloch, Variance
    Components, 1992, ch. 3): unbiased without assuming normality, and equal to REML on balanced data when not
    negative. Assumes that the arms given scatter alike. Where no pretraining has a second fine-tuning, `within` is
    NaN and `between_raw` is the whole variance of single runs.
    """
    square_between = square_within = weight = 0.0
    df_between = df_within = 0
    for arm in arms:
        groups = [np.asarray(scores, float) for scores in arm]
        sizes = np.array([len(scores) for scores in groups])
        if (sizes == 0).any():
            raise ValueError("a pretraining without any score has no variance; leave it out")
        if not len(sizes):
            continue
        means = np.array([scores.mean() for scores in groups])
        square_between += float((sizes * (means - sizes @ means / sizes.sum()) ** 2).sum())
        square_within += float(sum(((scores - mean) ** 2).sum() for scores, mean in zip(groups, means, strict=True)))
        weight += float(sizes.sum() - (sizes**2).sum() / sizes.sum())
        df_between += len(sizes) - 1
        df_within += int((sizes - 1).sum())
    within = square_within / df_within if df_within else math.nan
    if not df_between:
        return Components(math.nan, within, 0, df_within)
    noise = within if df_within else 0.0
    return Components((square_between - df_between * noise) / weight, within, df_between, df_within)


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval; the ends are NaN where the design cannot give them."""

    estimate: Array
    low: Array
    high: Array

    @classmethod
    def around(cls, estimate: Array, half: Array) -> "Interval":
        return cls(estimate, estimate - half, estimate + half)


def mean_interval(means: ArrayLike, level: float = 0.95) -> Interval:
    """Student's interval for an arm's expected score on these patients, from the means of its k pretrainings, (…, k).

    Its coverage is exact for normal pretraining means at every k, whatever the variance components (balanced m;
    simulated 95 to 96 % for unequal m). At k = 2 it is wide (half-width 9 sd) because two pretrainings say little
    about their own spread. With k = 1 there is none, and none when all pretrainings scored the same: no spread was
    measured.
    """
    means = np.asarray(means, float)
    k = means.shape[-1]
    return Interval.around(means.mean(axis=-1), np.sqrt(_variance(means) / k) * _t(level, k - 1))


def new_patients_interval(scores: ArrayLike, level: float = 0.95) -> Interval:
    """Interval for an arm's expected score on new patients of the population: pretrainings and patients both random.

    scores  (…, k, n): each patient's score, mean over the fine-tunings of each pretraining

    The two crossed factors of a multi-reader multi-case study, their squared half-widths added (Howe, J. Am. Stat.
    Assoc. 69, 1974), because Satterthwaite's single t covers as little as 89 % at k = 2. Simulated coverage with 8 to 40
    patients: 95 to 99 % at k = 2, 95 to 98 % at 3, 95 to 97 % at 5. NaN where `mean_interval` is, and with one patient.
    """
    scores = np.asarray(scores, float)
    k, n = scores.shape[-2:]
    mean, by_pretraining, by_patient = scores.mean(axis=(-2, -1)), scores.mean(axis=-1), scores.mean(axis=-2)
    residual = scores - by_pretraining[..., :, None] - by_patient[..., None, :] + mean[..., None, None]
    both = (residual**2).sum(axis=(-2, -1)) / max((k - 1) * (n - 1), 1)  # already counted with the pretrainings
    patients = np.maximum(_variance(by_patient) / n - both / (k * n), 0.0)
    pretrainings = _variance(by_pretraining) / k
    return Interval.around(mean, np.sqrt(_t(level, k - 1) ** 2 * pretrainings + _t(level, n - 1) ** 2 * patients))


def _variance(units: Array) -> Array:
    """Sample variance over the last axis; NaN where not measured: a single unit, or units equal up to rounding."""
    if units.shape[-1] < 2:
        return np.full(units.shape[:-1], np.nan)
    equal = np.ptp(units, axis=-1) <= 1e-12 * np.abs(units).max(axis=-1)
    return np.where(equal, np.nan, units.var(axis=-1, ddof=1))


def _t(level: float, df: float | Array) -> Array:
    """Two-sided quantile of Student's t; NaN without degrees of freedom."""
    return np.asarray(stats.t.isf((1 - level) / 2, df), float)


def hierarchical_bootstrap(
    scores: Sequence[ArrayLike], *, draws: int = 10_000, seed: int = 0, patients: bool = True, level: float = 0.95
) -> tuple[Array, tuple[float, float]]:
    """Resampled means of one arm, (draws,), and their percentile interval.

    scores      for each pretraining an (m, n) table of its fine-tunings on the same n patients; m may differ
    patients    whether patients are drawn again too, the same ones for all runs of a draw

    Pretrainings are drawn with replacement, then fine-tunings within each (Davison and Hinkley, Bootstrap Methods,
    1997, sec. 3.8). The draws show the shape of the uncertainty, but their percentiles are NOT a 95 % interval of a
    sweep's size: with fixed patients and as much variance between as within, simulated coverage at m = 2 is 69 % at k = 2,
    82 % at 3 and 88 % at 5, as few clusters cannot show how far others would fall. The leaderboard uses
    `mean_interval`.
    """
    tables = [np.asarray(table, float) for table in scores]
    sizes = np.array([len(table) for table in tables])
    firsts = np.cumsum(sizes) - sizes
    rows = np.concatenate(tables)
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(tables), size=(draws, len(tables)))
    again = np.floor(rng.random((draws, len(tables), sizes.max())) * sizes[picks][..., None]).astype(int)
    used = np.arange(sizes.max()) < sizes[picks][..., None]
    weights = np.zeros((draws, len(rows)))  # of each run in each draw
    at = np.broadcast_to(np.arange(draws)[:, None, None], again.shape)
    share = np.broadcast_to(1 / sizes[picks][..., None] / len(tables), again.shape)
    np.add.at(weights, (at[used], (firsts[picks][..., None] + again)[used]), share[used])
    n = rows.shape[1]
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=draws) / n if patients else np.full((draws, n), 1 / n)
    means = ((weights @ rows) * drawn).sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return means, (float(low), float(high))


@dataclass(frozen=True)
class Welch:
    """Two arms compared without assuming equal spread."""

    interval: Interval  # of mean(first) - mean(second)
    t: Array
    df: Array
    p: Array  # two-sided


def welch(first: ArrayLike, second: ArrayLike, level: float = 0.95) -> Welch:
    """Welch's t on two sets of independent units, (…, k1) and (…, k2). NaN where a set has one unit or no spread.

    Welch, Biometrika 34, 1947. Assumes normal units. Simulated coverage of the interval: 94 to 98 % at k1 = k2 = 2,
    94.5 to 96.5 % at 3 to 5; too narrow, 90 %, when 2 units of a noisy arm meet 4 of a quiet one: give both arms
    equally many.
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    k1, k2 = first.shape[-1], second.shape[-1]
    share1, share2 = _variance(first) / k1, _variance(second) / k2
    df = (share1 + share2) ** 2 / (share1**2 / max(k1 - 1, 1) + share2**2 / max(k2 - 1, 1))
    error = np.sqrt(share1 + share2)
    difference = first.mean(axis=-1) - second.mean(axis=-1)
    t = np.asarray(difference / error, float)
    p = np.asarray(2 * stats.t.sf(np.abs(t), df), float)
    return Welch(Interval.around(difference, error * _t(level, df)), t, np.asarray(df, float), p)


@dataclass(frozen=True)
class Permutation:
    """A permutation test. `smallest` is the smallest p that this design could have given, whatever the scores."""

    p: Array
    smallest: float
    relabelings: int
    exact: bool  # all relabelings were tried; otherwise a seeded sample of them


def smallest_p(k1: int, k2: int, limit: int = RELABELINGS) -> float:
    """The smallest two-sided p of `permutation_test` with k1 and k2 units (no ties)."""
    count = math.comb(k1 + k2, k1)
    return (2 if k1 == k2 else 1) / count if count <= limit else 1 / (1 + limit)


def permutation_test(first: ArrayLike, second: ArrayLike, *, limit: int = RELABELINGS, seed: int = 0) -> Permutation:
    """Two-sided permutation test of the difference in means of two sets of units, (…, k1) and (…, k2).

    Exact over all relabelings while there are at most `limit`; beyond, that many seeded random ones, counted with the
    observed one (Phipson and Smyth, Stat. Appl. Genet. Mol. Biol. 9, 2010), so that p is never 0 nor too small.
    Assumes that, under the hypothesis, units are exchangeable between the arms: same distribution, not only same
    mean; no normality.
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    k1, k2 = first.shape[-1], second.shape[-1]
    pooled = np.concatenate([first, second], axis=-1)
    shape, n = pooled.shape[:-1], k1 + k2
    # |difference of means| = n / (k1 k2) · |sum of the first arm's deviations from the joint mean|
    deviations = (pooled - pooled.mean(axis=-1, keepdims=True)).reshape(-1, n)
    exact = math.comb(n, k1) <= limit
    if exact:
        chosen = np.array(list(itertools.combinations(range(n), k1)))
    else:
        chosen = np.random.default_rng(seed).random((limit, n)).argsort(axis=1)[:, :k1]
    in_first = np.zeros((len(chosen), n))
    np.put_along_axis(in_first, chosen, 1.0, axis=1)
    observed = np.abs(deviations[:, :k1].sum(axis=1))
    ties = 1e-9 * np.abs(deviations).max(axis=1, initial=0.0)  # equal sums differ by rounding
    extreme = np.empty(len(deviations))
    rows = max(1, 10_000_000 // len(chosen))  # bounds the memory of the table below to 80 MB
    for start in range(0, len(deviations), rows):
        part = slice(start, start + rows)
        extreme[part] = (np.abs(deviations[part] @ in_first.T) >= (observed - ties)[part, None]).sum(axis=1)
    p = extreme / len(chosen) if exact else (1 + extreme) / (1 + limit)
    return Permutation(p.reshape(shape), smallest_p(k1, k2, limit), len(chosen), exact)


def patient_permutation_test(differences: ArrayLike, *, limit: int = RELABELINGS, seed: int = 0) -> Permutation:
    """Paired two-sided test over patients, by flipping the signs of the n differences between two arms, (n,).

    differences     of each shared patient: mean over one arm's runs minus mean over the other's

    Exact over all 2^n signs while they are at most `limit` (n <= 15), a seeded sample beyond. It pairs by patient and
    so sees small differences, but its unit is the patient: it speaks of these trained networks on new patients, not
    of what a fresh pretraining would do. It never replaces `permutation_test` where recipes are compared.
    """
    differences = np.asarray(differences, float)
    n = len(differences)
    exact = 2**n <= limit
    signs = _signs(n, limit, seed)
    ties = 1e-9 * np.abs(differences).sum()
    extreme = float((np.abs(signs @ differences) >= abs(differences.sum()) - ties).sum())
    p = extreme / len(signs) if exact else (1 + extreme) / (1 + limit)
    return Permutation(np.asarray(p), 2.0 ** (1 - n) if exact else 1 / (1 + limit), len(signs), exact)


@functools.lru_cache(maxsize=1)  # the arms of a leaderboard share their patients
def _signs(n: int, limit: int, seed: int) -> Array:
    """All signs of n numbers, (2^n, n), or `limit` drawn ones."""
    if 2**n <= limit:
        bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return np.where(bits == 1, -1.0, 1.0)
    return np.random.default_rng(seed).choice([-1.0, 1.0], size=(limit, n))


def holm(p: ArrayLike) -> Array:
    """p values adjusted for their family, (a,): reject those <= 0.05, and the chance of any false one is <= 5 %.

    Holm, Scand. J. Stat. 6, 1979. Holds for any dependence between the tests. NaN stays NaN and does not count.
    """
    p = np.asarray(p, float)
    adjusted = np.full(p.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    steps = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1))
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted


def hedges_g(first: ArrayLike, second: ArrayLike) -> float:
    """Difference in pooled standard deviations of the units, corrected for small samples. NaN without any spread.

    Hedges, J. Educ. Stat. 6, 1981; the exact correction with gamma functions. Assumes equal spread. A rule of thumb of
    "0.8 is large" does not carry over: pretraining means scatter far less than people.
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    df = len(first) + len(second) - 2
    squares = ((first - first.mean()) ** 2).sum() + ((second - second.mean()) ** 2).sum()
    if df < 2 or squares <= 0:  # with one degree of freedom the correction is zero: no effect size can be had
        return math.nan
    correction = math.exp(math.lgamma(df / 2) - math.lgamma((df - 1) / 2)) / math.sqrt(df / 2)
    return float(correction * (first.mean() - second.mean()) / math.sqrt(squares / df))


def groups(differ: ArrayLike) -> list[list[int]]:
    """The largest sets of arms of which no two are known to differ, each ascending, in order of their members.

    differ  (a, a) bool, symmetric: whether two arms were told apart

    A compact letter display gives each of these sets one letter: two arms share a letter if and only if they were not
    told apart. Insert and absorb: Piepho, J. Comput. Graph. Stat. 13, 2004. Sets are bits of integers.
    """
    differ = np.asarray(differ, bool)
    sets = [(1 << len(differ)) - 1] if len(differ) else []
    for i, j in np.argwhere(np.triu(differ, 1)).tolist():
        torn = [members for members in sets if members >> i & 1 and members >> j & 1]
        kept = [members for members in sets if not (members >> i & 1 and members >> j & 1)]
        for half in [members & ~(1 << out) for members in torn for out in (i, j)]:
            if not any(half & other == half for other in kept):
                kept = [other for other in kept if other & half != other] + [half]
        sets = kept
    return sorted([arm for arm in range(len(differ)) if members >> arm & 1] for members in sets)


def best_probability(means: ArrayLike, errors: ArrayLike, df: int, *, draws: int = 20_000, seed: int = 0) -> Array:
    """Chance that each arm's expected score is the highest of all, (a,), given what was seen.

    means, errors   (a,) of each arm and its standard error, the spread behind it pooled over the arms
    df              degrees of freedom of that spread

    Posterior draws under flat priors on the means and on the log of the common variance (Gelman et al., Bayesian Data
    Analysis, 3rd ed., sec. 3.2): a multivariate t. Assumes normal pretraining means that scatter alike in all arms; an arm with
    one pretraining borrows its spread from the others. No test: among equal arms, the luckiest looks better than 1 in a.
    """
    means, errors = np.asarray(means, float), np.asarray(errors, float)
    rng = np.random.default_rng(seed)
    scale = np.sqrt(df / rng.chisquare(df, size=(draws, 1)))
    winners = np.argmax(means + scale * errors * rng.standard_normal((draws, len(means))), axis=1)
    return np.bincount(winners, minlength=len(means)) / draws


def posterior_means(means: ArrayLike, errors: ArrayLike) -> Array:
    """Each arm's expected score given those of all arms, (a,): its mean, shrunk towards the common one.

    means, errors   (a,) of each of at least three arms and its standard error, all positive

    Arms are taken as draws from a normal distribution of unknown mean mu and deviation tau:

        E[theta_i | y, tau] = mu + tau² w_i (y_i - mu),    w_i = 1 / (tau² + error_i²),    mu = sum_i w_i y_i / sum_i w_i

    averaged over tau's posterior under a flat prior (Gelman et al., Bayesian Data Analysis, 3rd ed., sec. 5.4), so that arms
    whose estimated tau would be 0 still keep their order. What was repeated less is shrunk more: the highest mean need not win.
    """
    means, errors = np.asarray(means, float), np.asarray(errors, float)
    scale = np.ptp(means) + errors.max()
    tau = np.linspace(0.0, 3.0, 301)[1:, None] * scale  # the likelihood falls as tau^(1 - a) beyond
    variance = tau**2 + errors**2
    weight = 1 / variance
    mu = (weight * means).sum(axis=1, keepdims=True) / weight.sum(axis=1, keepdims=True)
    log = -0.5 * (np.log(variance) + (means - mu) ** 2 / variance).sum(axis=1) - 0.5 * np.log(weight.sum(axis=1))
    posterior = np.exp(log - log.max())
    shrunk = mu + tau**2 / variance * (means - mu)
    return np.asarray(posterior @ shrunk / posterior.sum(), float)


def pareto(scores: ArrayLike, costs: ArrayLike) -> list[bool]:
    """Of each point whether none beats it, (a,): has at least its score at most its cost, and is better in one of them."""
    scores, costs = np.asarray(scores, float), np.asarray(costs, float)
    no_worse = (scores[:, None] >= scores) & (costs[:, None] <= costs)
    better = (scores[:, None] > scores) | (costs[:, None] < costs)
    beaten = np.asarray(no_worse & better).any(axis=0)
    return [not one for one in np.atleast_1d(beaten)]


def normal_sample_size(sd: float, wanted: float, *, power: float = 0.8, alpha: float = 0.05) -> float:
    """Units per arm, unrounded, to see the difference `wanted` between two arms, were the `sd` of their units known.

    The textbook's 2 (z(alpha/2) + z(1 - power))² (sd / wanted)², two-sided; too few by one or two units when sd is
    estimated.
    """
    z = stats.norm.isf(alpha / 2) + stats.norm.isf(1 - power)
    return float(2 * (z * sd / wanted) ** 2)


def needed(sd: float, wanted: float, *, power: float = 0.8, alpha: float = 0.05, comparisons: int = 1) -> int:
    """Pretrainings per arm to see a difference `wanted` with the chance `power`; `sd` is that of a pretraining's mean.

    `alpha` is shared among the comparisons (Bonferroni). The normal sample size with the correction for an estimated sd
    (Guenther, Am. Stat. 35, 1981), and never fewer than the permutation test needs to reach alpha at all.
    Raises ValueError when sd is negative or wanted not positive.
    """
    if not (sd >= 0 and wanted > 0):
        raise ValueError(f"sd {sd} must be at least 0 and the wanted difference {wanted} above 0")
    each = alpha / comparisons
    enough = normal_sample_size(sd, wanted, power=power, alpha=each) + stats.norm.isf(each / 2) ** 2 / 4
    reach = next(k for k in itertools.count(2) if 2 / math.comb(2 * k, k) <= each)
    return max(math.ceil(enough), reach)


def detectable(sd: float, k: int, *, power: float = 0.8, alpha: float = 0.05, comparisons: int = 1) -> float:
    """The smallest difference that `k` pretrainings per arm show with the chance `power`: what `needed` turns round.

    Infinite where k pretrainings cannot reach alpha at all, whatever the difference.
    """
    each = alpha / comparisons
    units = k - stats.norm.isf(each / 2) ** 2 / 4
    if units <= 0 or 2 / math.comb(2 * k, k) > each:
        return math.inf
    return float(sd * math.sqrt(normal_sample_size(1.0, 1.0, power=power, alpha=each) / units))
