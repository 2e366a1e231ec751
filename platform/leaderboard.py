"""The answer of a sweep: its arms in order, and how much of that order is more than chance.

The unit of evidence is the pretraining (see `statistics.py`). Every arm is compared with the control by an exact
permutation of pretrainings, with Holm's correction over the arms; arms are compared with each other as a second family.
What the design cannot say is None in a row, and a sentence in the notes says why.
"""

import dataclasses
import itertools
import math
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medssl.platform import statistics, words
from medssl.platform.errors import RunError, UsageError
from medssl.platform.find import nearest
from medssl.platform.metrics import CONTRACT, LEGACY
from medssl.platform.records import Run
from medssl.platform.statistics import Array

ALPHA = 0.05  # chance of one false claim in a family of comparisons
POWER = 0.8


@dataclass(frozen=True)
class Row:
    """One arm. None: not estimable from this sweep."""

    arm: str
    k: int  # pretrainings with a finite score
    m: int  # fine-tunings of a pretraining; the most of them where numbers are unequal
    runs: int
    letters: str  # arms that share none were told apart
    scores: tuple[tuple[float, ...], ...]  # of the fine-tunings of each pretraining
    mean: float | None = None  # over pretrainings, each the mean of its fine-tunings
    sd_between: float | None = None  # between pretrainings, fine-tuning noise taken out; with m = 1, left in
    sd_within: float | None = None  # between fine-tunings of one pretraining
    low: float | None = None  # 95 % interval of the mean: fresh pretrainings, these patients
    high: float | None = None
    new_low: float | None = None  # the same for fresh pretrainings and new patients
    new_high: float | None = None
    difference: float | None = None  # to the control
    difference_low: float | None = None  # its 95 % interval (Welch), these patients, not adjusted for the family
    difference_high: float | None = None
    effect: float | None = None  # Hedges' g of the difference, in standard deviations of pretraining means
    p: float | None = None  # permutation of pretrainings
    p_holm: float | None = None  # over all comparisons with the control
    best_probability: float | None = None
    needed: int | None = None  # pretrainings of this arm and of the control to see the wanted difference, 80 % power
    p_patients: float | None = None  # paired by patient: of these trained networks on new patients; decides no group
    control: str = ""  # the arm that it is compared with; itself: it is a control

    @property
    def told(self) -> bool:
        """Whether the arm was told apart from the control."""
        return self.p_holm is not None and self.p_holm <= ALPHA


@dataclass(frozen=True)
class Leaderboard:
    """Rows from the best mean to the worst, arms without any score last."""

    metric: str
    control: str  # of the arms that have none of their own
    wanted: float
    patients: int
    smallest_p: float | None  # the smallest that any comparison with the control could have given
    verdict: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def called(self) -> str:
        """The control in words."""
        return f"`{self.control}`" if all(row.control == self.control for row in self.rows) else "its control"


@dataclass(frozen=True)
class _Arm:
    name: str
    scores: list[Array]  # of each pretraining: (m,)
    by_patient: list[Array]  # of each pretraining: (m, n), NaN where undefined
    failed: int  # runs without a finite score

    @property
    def means(self) -> Array:
        """(k,): the independent pieces of evidence."""
        return np.array([scores.mean() for scores in self.scores])

    @property
    def m(self) -> int:
        return max(map(len, self.scores), default=0)

    @property
    def replicates(self) -> float:
        """Harmonic mean of the numbers of fine-tunings: what counts for the variance of the pretraining means."""
        return len(self.scores) / sum(1 / len(scores) for scores in self.scores)


def rank(
    runs: Sequence[Run], control: str, *, metric: str, wanted: float = 0.01, compare: Mapping[str, str] | None = None
) -> Leaderboard:
    """Put the arms of one data contract in order and say which differences are more than chance.

    runs        every fine-tuning, scored on the same patients; one without a finite score counts as failed
    control     the arm that the others are compared with
    metric      name of the score; distances, which end in "_mm", are better when smaller
    wanted      the smallest difference worth having, in the metric's unit
    compare     arms with a control of their own (itself: an arm that is a control); one family holds all comparisons
    Raises UsageError when there are no runs, no such control or no positive `wanted`; RunError when runs were scored on
    different patients, or one of them twice.
    """
    _check(runs, control, wanted)
    sign = -1.0 if metric.endswith("_mm") else 1.0
    arms = sorted(_arms(runs), key=lambda arm: -sign * arm.means.mean() if arm.scores else math.inf)
    scored = [arm for arm in arms if arm.scores]
    against = {arm.name: (compare or {}).get(arm.name, control) for arm in arms}
    by_name = {arm.name: arm for arm in scored}
    rivals = [arm for arm in scored if against[arm.name] != arm.name and against[arm.name] in by_name]
    p, smallest = _permutations([(arm.means, by_name[against[arm.name]].means) for arm in rivals])
    tests = {arm.name: both for arm, *both in zip(rivals, p.tolist(), statistics.holm(p).tolist(), strict=True)}
    letters = _letters(scored, against, {name: p_holm for name, (_, p_holm) in tests.items()})
    pooled = statistics.components([arm.scores for arm in scored])
    best = _best(scored, pooled, sign)
    rows = []
    for arm in arms:
        row = dataclasses.replace(_summary(arm, letters.get(arm.name, ""), best.get(arm.name)), control=against[arm.name])
        if arm.name in tests:
            reference = by_name[row.control]
            row = _compared(row, arm, reference, *tests[arm.name])
            row = dataclasses.replace(row, needed=_needed(arm, reference, pooled, wanted, len(rivals)))
        rows.append(row)
    patients = {patient for run in runs for patient in run.by_patient}
    board = Leaderboard(metric, control, wanted, len(patients), smallest, verdict="", rows=tuple(rows), notes=())
    notes = tuple(_notes(board, arms, _undefined(runs)))
    return dataclasses.replace(board, verdict=_verdict(board, sign), notes=notes)


ORDERS = ("mean", "arm", "difference")


def ordered(board: Leaderboard, by: str) -> Leaderboard:
    """The same rows in another order: `mean`, the best first; `arm`, by name; `difference` to the control, the largest first
    in either direction, the control and what cannot be compared with it last.

    Raises UsageError for another order.
    """
    if by not in ORDERS:
        raise UsageError(f"--sort {by}: {nearest(by, ORDERS)}")
    if by == "mean":
        return board
    if by == "arm":
        return dataclasses.replace(board, rows=tuple(sorted(board.rows, key=lambda row: row.arm)))
    far = sorted(board.rows, key=lambda row: math.inf if row.difference is None else -abs(row.difference))
    return dataclasses.replace(board, rows=tuple(far))


def _check(runs: Sequence[Run], control: str, wanted: float) -> None:
    if not runs:
        raise UsageError("there are no runs to rank; `medssl sweep` makes them, `medssl status` says how far it is")
    names = {run.arm for run in runs}
    if control not in names:
        raise UsageError(f'no run of the control "{control}"; {nearest(control, names)}')
    if not (wanted > 0 and math.isfinite(wanted)):
        raise UsageError(f"the wanted difference is {wanted}; it must be a positive number in the metric's unit")
    run, times = Counter(map(_name, runs)).most_common(1)[0]
    if times > 1:
        raise RunError(f"{run} was scored {times} times; a run counts once: remove the older scores")
    first = next((run for run in runs if run.by_patient), None)
    for other in runs:
        if first and other.by_patient and other.by_patient.keys() != first.by_patient.keys():
            odd = sorted(other.by_patient.keys() ^ first.by_patient.keys())
            raise RunError(
                f"{_name(first)} and {_name(other)} were not scored on the same patients "
                f"({words.some(odd)} in one of them only); evaluate all runs on one split"
            )


def _name(run: Run) -> str:
    return f"arm `{run.arm}`, pretraining {run.pretraining}, fine-tuning {run.finetuning}"


def _arms(runs: Sequence[Run]) -> list[_Arm]:
    """The runs by arm and pretraining, failed ones set apart; arms in order of name."""
    patients = sorted({patient for run in runs for patient in run.by_patient})
    by_arm: dict[str, dict[int, list[tuple[float, list[float]]]]] = defaultdict(lambda: defaultdict(list))
    failed: Counter[str] = Counter()
    for run in sorted(runs, key=lambda run: (run.arm, run.pretraining, run.finetuning)):
        pretrainings, score = by_arm[run.arm], run.score
        if math.isfinite(score):
            pretrainings[run.pretraining].append((score, [run.by_patient[patient] for patient in patients]))
        else:
            failed[run.arm] += 1
    arms = []
    for name, pretrainings in by_arm.items():
        scores = [np.array([score for score, _ in group]) for group in pretrainings.values()]
        tables = [np.array([table for _, table in group]) for group in pretrainings.values()]
        arms.append(_Arm(name, scores, tables, failed[name]))
    return arms


def _summary(arm: _Arm, letters: str, best: float | None) -> Row:
    """What an arm says about itself."""
    if not arm.scores:
        return Row(arm.name, k=0, m=0, runs=0, letters="", scores=())
    own = statistics.components([arm.scores])
    here = statistics.mean_interval(arm.means)
    table = np.stack([group.mean(axis=0) for group in arm.by_patient])
    everywhere = statistics.new_patients_interval(table[:, ~np.isnan(table).any(axis=0)])
    return Row(
        arm.name,
        k=len(arm.scores),
        m=arm.m,
        runs=sum(map(len, arm.scores)),
        letters=letters,
        scores=tuple(tuple(group.tolist()) for group in arm.scores),
        mean=float(here.estimate),
        sd_between=_known(math.sqrt(own.between)),
        sd_within=_known(math.sqrt(own.within)),
        low=_known(here.low),
        high=_known(here.high),
        new_low=_known(everywhere.low),
        new_high=_known(everywhere.high),
        best_probability=best,
    )


def _compared(row: Row, arm: _Arm, control: _Arm, p: float, p_holm: float) -> Row:
    """The row with what the comparison with the control adds."""
    gap = statistics.welch(arm.means, control.means).interval
    return dataclasses.replace(
        row,
        difference=float(gap.estimate),
        difference_low=_known(gap.low),
        difference_high=_known(gap.high),
        effect=_known(statistics.hedges_g(arm.means, control.means)),
        p=p,
        p_holm=p_holm,
        p_patients=_by_patient(arm, control),
    )


def _by_patient(arm: _Arm, control: _Arm) -> float | None:
    """p of the patients' differences, each arm's the mean of its pretrainings; who is undefined in a run is left out."""
    means = [np.stack([group.mean(axis=0) for group in each.by_patient]).mean(axis=0) for each in (arm, control)]
    differences = means[0] - means[1]
    differences = differences[np.isfinite(differences)]
    return float(statistics.patient_permutation_test(differences).p) if len(differences) else None


def _permutations(pairs: Sequence[tuple[Array, Array]]) -> tuple[Array, float | None]:
    """p of each pair of sets of pretraining means, equal sizes in one go; and the smallest that was possible."""
    p = np.empty(len(pairs))
    by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, (first, second) in enumerate(pairs):
        by_size[len(first), len(second)].append(index)
    for members in by_size.values():
        first, second = (np.stack([pairs[index][side] for index in members]) for side in (0, 1))
        p[members] = statistics.permutation_test(first, second).p
    return p, min((statistics.smallest_p(*sizes) for sizes in by_size), default=None)


def _letters(arms: Sequence[_Arm], against: Mapping[str, str], p_holm: Mapping[str, float]) -> dict[str, str]:
    """One letter for each largest set of arms of which no two were told apart.

    A pair of an arm and its control follows `p_holm`; the other pairs are a family of their own.
    """
    differ = np.zeros((len(arms), len(arms)), bool)
    places = {arm.name: index for index, arm in enumerate(arms)}
    tested = {name: places.get(against[name]) for name in p_holm}
    couples = {frozenset((places[name], place)) for name, place in tested.items() if place is not None}
    pairs = [pair for pair in itertools.combinations(range(len(arms)), 2) if frozenset(pair) not in couples]
    reach = min((statistics.smallest_p(len(arms[i].scores), len(arms[j].scores)) for i, j in pairs), default=1.0)
    if reach * len(pairs) <= ALPHA:  # otherwise no pair can be told apart, whatever the scores
        p, _ = _permutations([(arms[i].means, arms[j].means) for i, j in pairs])
        for (i, j), adjusted in zip(pairs, statistics.holm(p), strict=True):
            differ[i, j] = differ[j, i] = adjusted <= ALPHA
    for name, place in tested.items():
        if place is not None:
            differ[places[name], place] = differ[place, places[name]] = p_holm[name] <= ALPHA
    letters: dict[str, str] = {}
    for number, members in enumerate(statistics.groups(differ)):
        letter = string.ascii_letters[number] if number < len(string.ascii_letters) else f"({number + 1})"
        for index in members:
            letters[arms[index].name] = letters.get(arms[index].name, "") + letter
    return letters


def _best(arms: Sequence[_Arm], pooled: statistics.Components, sign: float) -> dict[str, float]:
    """The chance of each arm to be the best; empty where no arm has a second pretraining to show the spread."""
    variances = [pooled.of_mean(arm.replicates) / len(arm.scores) for arm in arms]
    if not pooled.df_between or not all(variance > 0 for variance in variances):
        return {}
    means = [sign * arm.means.mean() for arm in arms]
    chances = statistics.best_probability(means, np.sqrt(variances), pooled.df_between)
    return dict(zip([arm.name for arm in arms], chances.tolist(), strict=True))


def _needed(arm: _Arm, control: _Arm, pooled: statistics.Components, wanted: float, comparisons: int) -> int | None:
    """Pretrainings per arm; the spread is pooled over all arms, because that of one arm is known too badly."""
    variance = (pooled.of_mean(arm.replicates) + pooled.of_mean(control.replicates)) / 2
    if math.isnan(variance):
        return None
    return statistics.needed(math.sqrt(variance), wanted, power=POWER, alpha=ALPHA, comparisons=comparisons)


def _verdict(board: Leaderboard, sign: float) -> str:
    """The answer in plain words."""
    control = board.called
    compared = [row for row in board.rows if row.p_holm is not None]
    if not compared and not any(row.runs for row in board.rows if row.arm == board.control):
        return f"The control {control} has no run with a score: nothing can be compared with it."
    if not compared or board.smallest_p is None:
        return f"Only the control {control} has runs with a score: there is nothing to compare it with."
    family = f"Holm over {words.count(len(compared), 'comparison')}"
    told = [row for row in compared if row.told]
    if told:
        better = [row.arm for row in told if sign * (row.difference or 0.0) > 0]
        worse = [row.arm for row in told if row.arm not in better]
        same = [row.arm for row in compared if row not in told]
        found = {f"better than {control}": better, f"worse than {control}": worse, "cannot be told apart from it": same}
        answer = "; ".join(f"{what}: {words.some(names)}" for what, names in found.items() if names)
        answer = f"{answer[0].upper()}{answer[1:]} (p ≤ {ALPHA} after {family})."
    else:
        answer = f"No arm can be told apart from {control} with {_design(board.rows)}: "
        if board.smallest_p * len(compared) > ALPHA:
            least = f"the smallest possible p is {board.smallest_p:.2g}"
            answer += f"{least}." if board.smallest_p > ALPHA else f"{least}, too large for {family}."
        else:
            answer += f"the smallest p after {family} is {words.p_value(min(row.p_holm or 0.0 for row in compared))}."
    return f"{answer} {_outlook(board, compared)}"


def _outlook(board: Leaderboard, compared: Sequence[Row]) -> str:
    """What it would take to see the wanted difference."""
    wanted = f"a difference of {words.number(board.wanted)}"
    counts = [row.needed for row in compared if row.needed is not None]
    if not counts:
        return f"How many pretrainings would show {wanted} cannot be said: no arm shows how far pretrainings scatter."
    chance = f"{words.chance(POWER)} power, {words.chance(ALPHA)} over the family"
    if min(row.k for row in board.rows if row.k) >= max(counts):
        return f"These repeats are enough to see {wanted} ({chance})."
    return f"About {max(counts):,} pretrainings per arm, fine-tuned as often as now, are needed to see {wanted} ({chance})."


def _notes(board: Leaderboard, arms: Sequence[_Arm], undefined: Sequence[str]) -> Iterable[str]:
    """What a reader must know to read the numbers rightly, the particular before the general."""
    scored = [arm for arm in arms if arm.scores]
    for arm in arms:
        if arm.failed:
            runs = words.count(arm.failed + sum(map(len, arm.scores)), "run")
            caution = "; the arm may look too good" if arm.scores else ""
            yield f"Left out: {arm.failed} of {runs} of `{arm.name}`, without a finite score{caution}."
    if undefined:
        yield (
            f"{len(undefined)} of {words.count(board.patients, 'patient')} have no defined score in some runs "
            f"and are left out there: {words.some(undefined)}."
        )
    sizes = {len(group) for arm in scored for group in arm.scores}
    if len({len(arm.scores) for arm in scored}) > 1 or len(sizes) > 1:
        yield f"Unequal repeats ({_design(board.rows)}): a pretraining counts once, however many its fine-tunings."
    if single := [arm.name for arm in scored if len(arm.scores) == 1]:
        yield f"One pretraining only, hence no interval: {words.some(single)}."
    if alike := [row.arm for row in board.rows if row.k > 1 and row.low is None]:
        yield f"Pretrainings scored exactly alike, hence no interval: {words.some(alike)}. Check that their seeds differ."
    if close := [arm.name for arm in scored if statistics.components([arm.scores]).between_raw < 0]:
        yield (
            "Pretrainings closer together than the noise of their fine-tunings allows, which is chance (sd between shown "
            f"as 0, interval probably too narrow): {words.some(close)}."
        )
    if sizes == {1}:
        yield "With m=1 the sd between pretrainings includes the noise of fine-tuning."
    yield from _legend(board)


def _legend(board: Leaderboard) -> Iterable[str]:
    """How the columns are made."""
    yield (
        "Intervals: 95 %, Student's t on the means of the pretrainings (difference: Welch, not adjusted for the family), "
        f"for {'this patient' if board.patients == 1 else f'these {board.patients} patients'}; "
        "csv and json add the interval for new patients."
    )
    compared = [row for row in board.rows if row.p is not None]
    if board.smallest_p is not None:
        k = {row.arm: row.k for row in board.rows}
        sampled = any(math.comb(row.k + k[row.control], row.k) > statistics.RELABELINGS for row in compared)
        how = f"{statistics.RELABELINGS:,} random relabelings, seed 0" if sampled else "exact"
        yield (
            f"p: two-sided permutation of pretrainings between arm and control ({how}), the smallest possible being "
            f"{board.smallest_p:.2g}; Holm over {words.count(len(compared), 'comparison')}."
        )
        yield (
            "p patients: arm and control paired by patient, each the mean of its pretrainings, signs flipped; it asks whether "
            "these very networks would differ on new patients, not whether the method would win again after a new pretraining, "
            "and hence decides no group and is not adjusted for the family."
        )
        yield (
            "Group: arms that share a letter cannot be told apart; with the control as Holm says, between other arms by "
            "the same test with Holm over all their pairs."
        )
    if any(row.best_probability is not None for row in board.rows):
        yield "Best: chance to have the best true mean, if pretrainings scatter normally and alike in all arms."
    if board.metric == LEGACY:
        yield "Score: the slice-wise Dice of the IoU study, background included; not comparable with Dice per volume."
    else:
        yield f"Score: {board.metric}. {CONTRACT}"


def _undefined(runs: Sequence[Run]) -> list[str]:
    """Patients whose score is NaN in some run that has a score."""
    scored = [run for run in runs if math.isfinite(run.score)]
    return sorted({patient for run in scored for patient, score in run.by_patient.items() if math.isnan(score)})


def _known(value: float | Array) -> float | None:
    return None if math.isnan(value) else float(value)


def _design(rows: Iterable[Row]) -> str:
    """`k=2, m=2`, or the ranges of unequal repeats."""
    scored = [row for row in rows if row.runs]
    pretrainings = [row.k for row in scored]
    finetunings = [len(group) for row in scored for group in row.scores]
    return f"k={words.between(pretrainings)}, m={words.between(finetunings)}"
