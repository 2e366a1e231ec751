"""What scheduling costs a sweep of up to 1,000 arms on 64 nodes: its makespan against one without gaps and without costs.

Simulated: no stage runs, and no Ray. The searcher, its Optuna study on disk and the rule that says how many trials run at a
time are those of a sweep, and decide in virtual time: each of their calls is charged to the one driver with the seconds it
really took here. Each trial is charged 0.3 s of the driver more, which `bench sweep` holds Ray Tune to on two cores. What
remains are places that stand empty: while the driver is busy, while a search waits for scores, and at the end.

A chain takes a lognormal time about 40 minutes for its pretraining and 8 for each of two fine-tunings (deviation a quarter),
a node one at a time. The ideal is the work shared evenly among all places, or the longest chain if that takes longer.

A search of 100 arms on 8 nodes is 1.1 % over the ideal: once no arm is left to be asked for, places that would wait for a
score take repeats ahead. It was 5.8 % while they waited. Repeats ahead of an arm that then turned out to be losing are work
that waiting would have saved, and stand in the ideal, too: up to seven chains of some 200 to 350, while the makespan fell by 3
to 9 % (three seeds each of arms that are alike and of arms 0.01 apart). A race is not simulated: its decisions wait for whole
rounds, of no more than three chains once every arm has two, so that it keeps three places busy and no more. Nodes that die are
repeated work, not scheduling: tests/test_cluster.py has them.
"""

import heapq
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medssl.platform.bench import Row
from medssl.platform.benches.sweep import ALLOWED_IDLE
from medssl.platform.config import Resources

PRETRAINING, FINETUNING, SPREAD, M = 2400.0, 480.0, 0.25, 2  # seconds, of the logarithm, fine-tunings
NODE = {"CPU": 8.0, "GPU": 1.0}
ALLOWED = 0.03  # of the ideal makespan
SIZES: dict[str, tuple[Literal["grid", "tpe"], int, int, int]] = {  # kind, arms, pretrainings of each, nodes
    "grid of 100 arms": ("grid", 100, 5, 8),
    "TPE search of 100 arms": ("tpe", 100, 5, 8),
    "grid of 1,000 arms": ("grid", 1000, 3, 64),
}


@dataclass(frozen=True)
class Outcome:
    """Of a simulated sweep, in seconds of its virtual time."""

    makespan: float
    ideal: float
    driver: float  # that the driver was busy
    chains: int


def run() -> Iterator[Row]:
    """A row for each size: chains per hour, and of the ideal."""
    for name, (kind, arms, k, nodes) in SIZES.items():
        found = simulate(kind, arms, k, nodes)
        over = found.makespan / found.ideal - 1
        what = f"{name}, k={k}, {nodes} nodes: {over:.2%} over the ideal {found.ideal / 3600:.1f} h, "
        what += f"driver busy {found.driver / found.makespan:.2%}"
        rates = (3600 * found.chains / found.makespan, "no gaps, no costs", 3600 * found.chains / found.ideal)
        yield Row(what, "chains/h", *rates, target=1 / (1 + ALLOWED))


def simulate(kind: Literal["grid", "tpe"], arms: int, k: int, nodes: int) -> Outcome:
    """A sweep from its first suggestion to its last chain."""
    from medssl.platform import places, search

    _, at_once = places.share(Resources(), [NODE] * nodes)
    rng = np.random.default_rng(0)
    grid = {f"arm {number}": {"pretrain.training.lr": 0.001 * (number + 1)} for number in range(arms)}
    with tempfile.TemporaryDirectory() as folder:
        nested = search.NestedSearch(
            search.open_study(Path(folder), kind, seed=0),
            {"arm 0": grid["arm 0"]},
            grid if kind == "grid" else None,
            None if kind == "grid" else lambda trial: {"pretrain.training.lr": trial.suggest_float("lr", 1e-4, 1.0, log=True)},
            kind=kind,
            k=k,
            trials=arms - 1,
            record=lambda arm, index: None,
        )
        return _played(nested, at_once, rng)


def _played(nested: Any, at_once: int, rng: np.random.Generator) -> Outcome:
    """Events in virtual time: the driver answers them one by one."""
    from ray.tune.search import Searcher

    running: list[tuple[float, str]] = []
    now = busy = 0.0  # busy: until when the driver is
    durations: list[float] = []
    driver = 0.0

    def charged(call: Callable[[], Any], more: float = 0.0) -> Any:
        nonlocal busy, driver
        begun = time.perf_counter()
        answer = call()
        took = time.perf_counter() - begun + more
        busy, driver = max(busy, now) + took, driver + took
        return answer

    while True:
        while len(running) < at_once:
            name = f"{len(durations)}"
            asked = charged(lambda name=name: nested.suggest(name))  # type: ignore[misc]
            if asked is None or asked == Searcher.FINISHED:
                break
            charged(lambda: None, ALLOWED_IDLE)
            seconds = PRETRAINING * rng.lognormal(0, SPREAD) + sum(FINETUNING * rng.lognormal(0, SPREAD) for _ in range(M))
            durations.append(seconds)
            heapq.heappush(running, (busy + seconds, name))
        if not running:
            break
        now, ended = heapq.heappop(running)
        score = {"score": 0.8 + 0.01 * rng.standard_normal(), "complete": True}
        charged(lambda ended=ended, score=score: nested.on_trial_complete(ended, score))  # type: ignore[misc]
    ideal = max(sum(durations) / at_once, max(durations))
    return Outcome(max(now, busy), ideal, driver, len(durations))
