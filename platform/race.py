"""Which arms get another pretraining: a race whose repeats go to the arms that may still be the best. Pure functions of scores.

Repeats are the fidelity. Every arm begins with two pretrainings; then, round after round, one more goes to each of the three
arms that are most likely to be the best, as far as these have at least a hundredth of the leader's chance. The chance comes
from the nested model of `statistics.py`, the spread of pretraining means pooled over the arms (Hoeffding races, Maron and
Moore, NIPS 1993, drop arms for good, https://proceedings.neurips.cc/paper/1993/hash/02a32ad2669e6fe298e607fe7cc0e1a0-Abstract.html;
top-two sampling, Russo, Oper. Res. 68, 2020, https://arxiv.org/abs/1602.08448, keeps giving to leader and challenger). An arm
that was unlucky rests and is not lost: when the leaders fall back it is among them again. The race ends when one arm is the
best with 99.8 %, or when it has spent half of the grid that it stands for, confirmation included.

Winners are chosen by posterior mean, never by the best single run, and the leading arms are confirmed together with the
controls on fresh pretrainings, because the scores that chose them flatter them.

`platform/benches/racing.py` holds this against the full grid on the noise of the IoU study. Optuna's WilcoxonPruner was not
taken: it compares with one best arm by ranks, and below four pretrainings no signed-rank test reaches its 0.1.

A decision depends on complete rounds of scores alone, not on the order in which they came: after a kill the same rounds follow.
Higher scores are better. Neither ray nor torch is imported.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medssl.platform import statistics

Scores = Mapping[str, Sequence[float]]  # of each arm: its pretrainings, each the mean of its fine-tunings

FIRST = 2  # pretrainings of every arm before the first decision: fewer show no spread
LEADERS = 3  # arms that get another pretraining in a round
LEAST = 0.01  # an arm with less than this share of the leader's chance gets no further repeat
CERTAIN = 0.998  # a leader with this chance has won
FINALISTS = 2  # arms confirmed beside the controls
DRAWS = 4000  # from the posterior: chances are known to about 0.005


@dataclass(frozen=True)
class Standing:
    """An arm as it stands."""

    arm: str
    mean: float  # over its pretrainings
    posterior: float  # the mean, shrunk towards that of all arms
    k: int


@dataclass(frozen=True)
class Race:
    """The race that stands for a grid of `k` pretrainings per arm, with `confirm` fresh ones for finalists and controls."""

    controls: tuple[str, ...]
    k: int
    confirm: int

    def allowance(self, arms: int) -> int:
        """Pretrainings that the race itself may spend: half of the grid, less what the confirmation will take."""
        return max(FIRST * arms, arms * self.k // 2 - self.confirm * (FINALISTS + len(self.controls)))

    def round(self, scores: Scores) -> list[str]:
        """The arms that get one more pretraining, likeliest first; empty when the race is over."""
        if early := [arm for arm, seen in scores.items() if len(seen) < FIRST]:
            return early
        left = self.allowance(len(scores)) - sum(map(len, scores.values()))
        chance = chances(scores)
        if not chance:  # no spread was seen, so none is known to lose
            return list(scores)[: max(left, 0)]
        order = sorted(chance, key=lambda arm: -chance[arm])
        best = chance[order[0]]
        leaders = [arm for arm in order[:LEADERS] if chance[arm] >= LEAST * best]
        return [] if best >= CERTAIN or len(leaders) < 2 else leaders[: max(left, 0)]


def losing(scores: Scores, arm: str) -> bool:
    """Whether the arm has less than `LEAST` of the leader's chance to be the best. An unknown spread loses no arm."""
    chance = chances(scores)
    return bool(chance) and chance[arm] < LEAST * max(chance.values())


def chances(scores: Scores) -> dict[str, float]:
    """The chance of every arm with a score to be the best; empty while no spread between pretrainings was seen."""
    scored = {arm: seen for arm, seen in scores.items() if len(seen)}
    variance, df = _pooled(scored.values())
    if not (variance > 0 and len(scored) > 1):
        return {}
    means = [float(np.mean(seen)) for seen in scored.values()]
    errors = [math.sqrt(variance / len(seen)) for seen in scored.values()]
    found = statistics.best_probability(means, errors, df, draws=DRAWS)
    return dict(zip(scored, found.tolist(), strict=True))


def standings(scores: Scores) -> list[Standing]:
    """All arms with a score, from the best posterior mean to the worst."""
    scored = {arm: seen for arm, seen in scores.items() if len(seen)}
    means = [float(np.mean(seen)) for seen in scored.values()]
    variance, _ = _pooled(scored.values())
    shrunk = means
    if variance > 0 and len(scored) > 2:  # two arms say nothing about how far arms lie apart
        shrunk = statistics.posterior_means(means, [math.sqrt(variance / len(seen)) for seen in scored.values()]).tolist()
    found = [Standing(arm, mean, value, len(scored[arm])) for arm, mean, value in zip(scored, means, shrunk, strict=True)]
    return sorted(found, key=lambda standing: -standing.posterior)


def finalists(scores: Scores, controls: Iterable[str]) -> list[str]:
    """The arms to be confirmed: the controls, and the leading others by posterior mean."""
    controls = [arm for arm in controls if arm in scores]
    leading = [standing.arm for standing in standings(scores) if standing.arm not in controls]
    return [*leading[:FINALISTS], *controls]


def _pooled(seen: Iterable[Sequence[float]]) -> tuple[float, int]:
    """Variance of a pretraining's mean, pooled over arms, and its degrees of freedom; NaN where no arm has two."""
    found = statistics.components([[[score] for score in scores] for scores in seen])
    return found.between_raw, found.df_between
