"""A ledger of 100,000 scores, from its files to a ranking, against pandas on the same files.

Fifty arms of 4 pretrainings and 5 fine-tunings each: a thousand Parquet files of a hundred scores, as sweeps leave them. Ours
reads them, checks that they are of one contract, takes means per patient, and ranks the arms with their intervals and tests;
pandas reads and takes the same means, and says nothing of chance. It must also be done in two seconds.
"""

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medssl.platform import ledger
from medssl.platform.bench import Row
from medssl.platform.leaderboard import Leaderboard, rank
from medssl.platform.records import Run, Score

ARMS, PRETRAININGS, FINETUNINGS, PATIENTS, CLASSES = 50, 4, 5, 10, 5
METRICS = ("dice", "nsd")
SCORES = ARMS * PRETRAININGS * FINETUNINGS * PATIENTS * CLASSES * len(METRICS)
ALLOWED = 2.0  # seconds
Owners = dict[str, tuple[str, int, int]]


def fill(runs: Path) -> Owners:
    """Write the ledger; returns the arm, pretraining and fine-tuning of each stage."""
    chance = random.Random(0)
    owners: Owners = {}
    for arm in range(ARMS):
        for pretraining in range(PRETRAININGS):
            for finetuning in range(FINETUNINGS):
                stage = f"segment-{arm:02}{pretraining}{finetuning}"
                owners[stage] = (f"arm {arm}", pretraining, finetuning)
                scores = [
                    Score(f"p{patient}", f"p{patient}", "test", f"organ {number}", metric, chance.random())
                    for patient in range(PATIENTS)
                    for number in range(CLASSES)
                    for metric in METRICS
                ]
                ledger.write(runs, stage, "contract", scores)
    return owners


def ranked(runs: Path, owners: Owners) -> Leaderboard:
    """What `medssl leaderboard` does with it."""
    by_patient = ledger.by_patient(ledger.read(runs, owners), "dice", "test")
    return rank([Run(*owner, by_patient[stage]) for stage, owner in owners.items()], "arm 0", metric="dice")


def by_pandas(runs: Path, owners: Owners) -> dict[str, float]:
    """The mean of each arm, by the same order of means."""
    import pandas

    table: Any = pandas.concat([pandas.read_parquet(runs / "scores" / f"{stage}.parquet") for stage in owners])
    table = table[(table["metric"] == "dice") & (table["part"] == "test")]
    patients = table.groupby(["stage", "patient", "volume"])["value"].mean().groupby(["stage", "patient"]).mean()
    means = patients.groupby("stage").mean().reset_index()
    means["arm"] = [owners[stage][0] for stage in means["stage"]]
    means["pretraining"] = [owners[stage][1] for stage in means["stage"]]
    found: dict[str, float] = means.groupby(["arm", "pretraining"])["value"].mean().groupby("arm").mean().to_dict()
    return found


def run() -> list[Row]:
    """Ledgers per second: against pandas, and against what is allowed."""
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        owners = fill(runs)
        pairs = [(_seconds(lambda: ranked(runs, owners)), _seconds(lambda: by_pandas(runs, owners))) for _ in range(4)][1:]
    ours, theirs = (1 / min(times) for times in zip(*pairs, strict=True))
    what = f"a ledger of {SCORES:,} scores in {len(owners):,} files, read and ranked, {1 / ours:.2f} s"
    return [
        Row(what, "ledgers/s", ours, "pandas: read_parquet and groupby, without tests", theirs, target=1.0),
        Row(what, "ledgers/s", ours, f"one that takes {ALLOWED:g} s", 1 / ALLOWED, target=1.0),
    ]


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
