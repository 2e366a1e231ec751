"""From sweeps' folders to leaderboards: what has been scored, by whom, and what may stand in one ranking.

Scores of different contracts (data, split, metric rule) are never ranked together. Sweeps of one contract are: an arm that
several of them hold, stage by stage the same, counts once; other arms of one label get their sweep's name in front.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medssl.platform import atomic, find, leaderboard, ledger, render
from medssl.platform.errors import RunError, UsageError
from medssl.platform.leaderboard import Leaderboard
from medssl.platform.plan import Chain
from medssl.platform.records import Run
from medssl.platform.site import Site
from medssl.platform.sweep import Sweep

Owner = tuple[str, int, int]  # arm, pretraining, fine-tuning

CONFIRMED = "Confirmation: fresh pretrainings of the arms that led the search (`leaderboard --phase search` shows that)."


@dataclass(frozen=True)
class Scored:
    """What a sweep's fine-tunings have scored so far; those without a score count as failed."""

    sweep: Sweep
    contract: str
    phase: str  # search or confirm: which of its pretrainings these are
    owners: Mapping[str, Owner]  # of each fine-tuning, by stage
    by_patient: Mapping[str, Mapping[str, float]]  # of each stage

    @property
    def name(self) -> str:
        return self.sweep.folder.name

    @property
    def runs(self) -> list[Run]:
        return [Run(*owner, self.by_patient.get(stage, {})) for stage, owner in self.owners.items()]

    def stages(self, arm: str) -> set[str]:
        return {stage for stage, (name, *_) in self.owners.items() if name == arm}


def owners(chains: Sequence[Chain]) -> dict[str, Owner]:
    """Whose each fine-tuning is, by stage."""
    return {stage.id: (chain.arm, chain.index, number) for chain in chains for number, stage in enumerate(chain.finetunings)}


def scored(site: Site, folder: Path, metric: str, phase: str | None = None) -> Scored:
    """The scores of a phase of a sweep; without one, of its confirmation if that has begun for every arm, else of its search.

    Raises RunError when nothing has been scored yet, UsageError when there is no such metric, and when the ledger holds
    scores of several contracts.
    """
    sweep = Sweep.open(folder)
    phase, chains = sweep.shown(phase, site.runs)
    whose = owners(chains)
    present = [stage for stage in whose if ledger.holds(site.runs, stage)]
    if not present:
        raise RunError(f"{folder.name}: no fine-tuning has finished yet")
    table = ledger.read(site.runs, present)
    by_patient = ledger.by_patient(table, metric, "test")
    if not by_patient:
        raise UsageError(f'no metric "{metric}"; {find.nearest(metric, table["metric"].unique().to_pylist())}')
    return Scored(sweep, table["contract"][0].as_py(), phase, whose, by_patient)


def by_class(site: Site, found: Scored, metric: str) -> dict[str, dict[str, dict[str, float]]]:
    """For each class, arm and test patient the mean over runs and volumes; what no run defines is left out."""
    import pyarrow.compute as pc

    stages = list(found.by_patient)
    table = ledger.read(site.runs, stages)
    wanted = (pc.field("metric") == metric) & (pc.field("part") == "test") & pc.is_finite(pc.field("value"))
    table = table.filter(wanted).select(["stage", "patient", "class_name", "value"])
    means = table.group_by(["class_name", "stage", "patient"], use_threads=False).aggregate([("value", "mean")]).to_pylist()
    values: dict[str, dict[str, dict[str, list[float]]]] = {}
    for row in means:
        arm = found.owners[row["stage"]][0]
        patients = values.setdefault(row["class_name"], {}).setdefault(arm, {})
        patients.setdefault(row["patient"], []).append(row["value_mean"])
    return {
        name: {arm: {who: sum(runs) / len(runs) for who, runs in patients.items()} for arm, patients in arms.items()}
        for name, arms in values.items()
    }


def merged(sweeps: Sequence[Scored]) -> tuple[list[Run], str, dict[str, str], list[str]]:
    """The runs of sweeps of one contract as those of one: runs, the control, arms with another, what a reader must be told."""
    labels: dict[tuple[str, str], str] = {}  # of a sweep's arm in the joint ranking
    known: dict[str, list[Scored]] = {}
    for found in sweeps:
        for arm in dict.fromkeys(arm for arm, *_ in found.owners.values()):
            known.setdefault(arm, []).append(found)
    notes = []
    for arm, holders in known.items():
        largest = max((found.stages(arm) for found in holders), key=len)
        shared = all(found.stages(arm) <= largest for found in holders)
        labels |= {(found.name, arm): arm if shared or len(holders) == 1 else f"{found.name}: {arm}" for found in holders}
        if shared and len(holders) > 1:
            notes.append(f"`{arm}` is the same in {len(holders)} sweeps and counts once.")
    runs: dict[str, Run] = {}
    for found in sweeps:
        for stage, run in zip(found.owners, found.runs, strict=True):
            runs.setdefault(stage + labels[found.name, run.arm], dataclasses.replace(run, arm=labels[found.name, run.arm]))
    compare = {
        labels[found.name, arm]: labels[found.name, control]
        for found in sweeps
        for arm, control in found.sweep.compare.items()
        if (found.name, arm) in labels and (found.name, control) in labels
    }
    controls = list(dict.fromkeys(labels[found.name, found.sweep.control] for found in sweeps))
    if len(controls) > 1:
        others = ", ".join(f"`{name}`" for name in controls[1:])
        notes.append(f"The sweeps have controls of their own; here the first one's is the control, and not {others}.")
    return list(runs.values()), controls[0], compare, notes


def boards(names: Sequence[str], metric: str, wanted: float, phase: str | None = None) -> dict[str, Leaderboard]:
    """Leaderboards by title, one for each contract among the sweeps; the newest sweep when none is named."""
    site = Site.here()
    folders = dict.fromkeys([site.find_sweep(name) for name in names] or [site.find_sweep(None)])
    by_contract: dict[str, list[Scored]] = {}
    for folder in folders:
        found = scored(site, folder, metric, phase)
        by_contract.setdefault(found.contract, []).append(found)
    ranked = {}
    for contract, sweeps in by_contract.items():
        runs, control, compare, notes = merged(sweeps)
        board = leaderboard.rank(runs, control, metric=metric, wanted=wanted, compare=compare)
        if any(found.phase == "confirm" for found in sweeps):
            notes.insert(0, CONFIRMED)
        title = f"{', '.join(found.name for found in sweeps)} (contract {contract})"
        ranked[title] = dataclasses.replace(board, notes=(*notes, *board.notes))
    return ranked


def answer(
    names: Sequence[str],
    output: str,
    metric: str,
    wanted: float = 0.01,
    sort: str = "mean",
    phase: str | None = None,
) -> str:
    """The answer of sweeps as they stand, in one of the formats; that of a single one is also written into its folder."""
    if output not in render.FORMATS:
        raise UsageError(f'no leaderboard format "{output}"; {find.nearest(output, render.FORMATS)}')
    ranked = boards(names, metric, wanted, phase)
    if len(set(names)) < 2:
        folder = Site.here().find_sweep(names[0] if names else None)
        (board,) = ranked.values()
        for kind in ("md", "csv", "json"):
            atomic.write_text(folder / f"leaderboard.{kind}", render.render(board, kind))
    shown = {title: leaderboard.ordered(board, sort) for title, board in ranked.items()}
    if len(shown) == 1:
        return render.render(next(iter(shown.values())), output)
    why = (
        f"These are {len(shown)} rankings and not one: the sweeps were scored on different data, splits or metric rules, "
        "and such scores cannot be compared."
    )
    return render.several(shown, output, why)
