"""How often a race names the truly best arm, against the full grid of the same k, on the noise of the IoU study. No training.

Scores are simulated: the noise is that of the study's 24 published values (between and within pretrainings, two fine-tunings
of each), the means are known, and `platform/race.py` decides as it does in a sweep, confirmation included. k is 27: what
`statistics.needed` asks for to see the study's difference of 0.010 among five comparisons with 95 % power. Grid and race
see the same pretrainings, so that their difference is less noisy than either share. A smaller grid leaves a race less to save
on: at k=18 (80 % power) it names the best of the published means in 99.6 % and the grid in 100 %, at k=10 in about 97 and 99.

Two rows per set of means: the share of 500 repetitions that name the best arm, and the runs saved. Where the best arms lie
0.002 apart, a quarter of the noise of a pretraining, half of the runs name the best one a little less often than the grid,
which often misses it too; what that costs in true Dice stands in the row. Those rows have no floor.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from medssl.platform import race, statistics
from medssl.platform.bench import Row
from medssl.platform.statistics import Array

STUDY = {  # validation DSC: 2 pretrainings x 2 fine-tunings (Konieczkowicz, AGH 2023)
    "from scratch": (0.842, 0.848, 0.846, 0.836),
    "[0, 0]": (0.836, 0.831, 0.834, 0.850),
    "(0, 0.3]": (0.847, 0.831, 0.855, 0.824),
    "[0.3, 0.6]": (0.854, 0.851, 0.851, 0.857),
    "[0.6, 1]": (0.850, 0.855, 0.848, 0.822),
    "random crop": (0.815, 0.841, 0.828, 0.812),
}
PUBLISHED = tuple(float(np.mean(scores)) for scores in STUDY.values())
MEANS: dict[str, tuple[float, ...]] = {  # the first of each is the control
    "published means": PUBLISHED,
    "one clear winner": (0.843, 0.843, 0.843, 0.843, 0.843, 0.863),
    "two leaders 0.002 apart": (0.843, 0.838, 0.839, 0.853, 0.851, 0.824),
    "11 arms, 0.0037 apart": (0.843, *np.linspace(0.82, 0.853, 10).tolist()),
    "near ties, 0.002 apart": (0.843, 0.845, 0.847, 0.849, 0.851, 0.853),
}
NEAR = ("two leaders 0.002 apart", "near ties, 0.002 apart")
REPETITIONS = 500
K, M, CONFIRM = 27, 2, 5


@dataclass(frozen=True)
class Outcome:
    """Over the repetitions: share that names the best arm, true score lost by the named one, pretrainings used."""

    named: float
    lost: float
    used: float


def run() -> Iterator[Row]:
    """Two rows for each set of true means."""
    for what, means in MEANS.items():
        grid, raced = compare(means, REPETITIONS)
        floor = None if what in NEAR else 1.0
        name = f"{what}: best arm named; true Dice lost {raced.lost:.4f}, by the grid {grid.lost:.4f}"
        yield Row(name, "% of repetitions", 100 * raced.named, f"the full grid, k={K}", 100 * grid.named, target=floor)
        spent = (
            f"{what}: grid per race in pretrainings ({raced.used:.0f} of {grid.used:.0f} used, {raced.used / grid.used:.0%})"
        )
        yield Row(spent, "races per 1000 pretrainings", 1000 / raced.used, "full grids", 1000 / grid.used, target=2.0)


def compare(means: tuple[float, ...], repetitions: int, k: int = K, confirm: int = CONFIRM) -> tuple[Outcome, Outcome]:
    """The full grid and the race, on the same simulated pretrainings."""
    rng = np.random.default_rng(0)
    best, named, used = int(np.argmax(means)), [], []
    for _ in range(repetitions):
        drawn = np.asarray(means)[:, None] + noise() * rng.standard_normal((len(means), len(means) * k // 2))
        winner, spent = raced(drawn, k, confirm)
        named.append((int(drawn[:, :k].mean(axis=1).argmax()), winner))
        used.append(spent)
    lost = means[best] - np.asarray(means)[np.array(named)].mean(axis=0)
    hits = (np.array(named) == best).mean(axis=0)
    grid = Outcome(float(hits[0]), float(lost[0]), float(len(means) * k))
    return grid, Outcome(float(hits[1]), float(lost[1]), float(np.mean(used)))


def noise() -> float:
    """Deviation of a pretraining's mean over its fine-tunings, from the study's own components."""
    return float(np.sqrt(statistics.components([[scores[:2], scores[2:]] for scores in STUDY.values()]).of_mean(M)))


def raced(drawn: Array, k: int, confirm: int) -> tuple[int, int]:
    """The arm that a race names, and the pretrainings that it used; `drawn` holds the scores that each arm would get."""
    arms = [str(arm) for arm in range(len(drawn))]
    seen = dict.fromkeys(arms, 0)

    def scores() -> Mapping[str, list[float]]:
        return {arm: drawn[int(arm), : seen[arm]].tolist() for arm in arms}

    rules = race.Race(controls=(arms[0],), k=k, confirm=confirm)
    while asked := rules.round(scores()):
        for arm in asked:
            seen[arm] += 1
    for arm in race.finalists(scores(), rules.controls):
        seen[arm] += confirm
    return int(race.standings(scores())[0].arm), sum(seen.values())
