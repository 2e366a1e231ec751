"""What the pretrainings of a sweep look like, before any fine-tuning: a row each.

    loss       sum of the terms, mean over the first and over the last tenth of the steps; of one method only comparable with
               itself. One report would mislead: MoCo's first steps compare with a queue of random vectors, a game far easier
               than the one that follows
    training   monitors at the last report: collapse index (0 spread, 1 a point), spread and effective rank of the features of
               views; a method reports those that mean something for it
    probe      of the frozen encoder on validation slices or cubes (`pretrain.training.probes`), before the first step and at
               the end: Dice of a linear classifier, balanced accuracy of nearest neighbours, effective rank
    steps/s    between the first and the last report, looks and what a kill made a process repeat included

A pretraining that several arms share has one row, of the first of them. Whether pretraining helps is another question: the
leaderboard's, on test patients after fine-tuning.
"""

import csv
import dataclasses
import io
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medssl.platform import find, history
from medssl.platform.errors import RunError, UsageError
from medssl.platform.plan import Chain, Stage
from medssl.platform.site import Site
from medssl.platform.sweep import Sweep

TENTH = 0.1  # of the steps: what counts as the beginning and as the end of a training


@dataclass(frozen=True)
class Row:
    """One pretraining; None where nobody said."""

    arm: str
    index: int  # which of the arm's k pretrainings
    method: str
    stage: str
    status: str  # finished, collapsed, or not finished
    steps: int | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    collapse: float | None = None
    spread: float | None = None
    rank: float | None = None
    probe_dice_before: float | None = None
    probe_dice: float | None = None
    probe_knn_before: float | None = None
    probe_knn: float | None = None
    probe_rank_before: float | None = None
    probe_rank: float | None = None
    steps_per_second: float | None = None


def table(name: str | None, output: str) -> str:
    """The pretrainings of a sweep, the newest when none is named, as table, md, csv or json.

    Raises UsageError for another format, RunError when the sweep pretrains nothing.
    """
    if output not in FORMATS:
        raise UsageError(f'no format "{output}" for pretrainings; {find.nearest(output, FORMATS)}')
    site = Site.here()
    folder = site.find_sweep(name)
    found = rows(site, Sweep.open(folder).chains())
    if not found:
        raise RunError(f"{folder.name}: no arm of it pretrains anything")
    return FORMATS[output](found)


def rows(site: Site, chains: Sequence[Chain]) -> list[Row]:
    """A row for every pretraining among the chains, in their order."""
    first: dict[str, tuple[Chain, Stage]] = {}
    for chain in chains:
        for stage in chain.pretrainings:
            first.setdefault(stage.id, (chain, stage))
    return [_row(site, chain, stage) for chain, stage in first.values()]


def _row(site: Site, chain: Chain, about: Stage) -> Row:
    part, stage = about.seen(chain.experiment).pretrain, about.id
    assert part is not None
    row = Row(chain.arm, chain.index, part.name, stage, "not finished")
    done = site.done(stage)
    if done is None:
        return row
    reports = [report for report in history.read(site.stage(stage)) if any(key.startswith("loss/") for key in report)]
    monitors = done["monitors"]
    row = dataclasses.replace(
        row,
        status=done["status"],
        steps=done["step"],
        first_loss=_mean_loss(reports, 0.0, TENTH),
        last_loss=_mean_loss(reports, 1 - TENTH, 1.0),
        collapse=_known(monitors.get("collapse")),
        spread=_known(monitors.get("feature_spread")),
        rank=_known(monitors.get("effective_rank")),
        steps_per_second=_rate(reports),
    )
    if not done.get("probe"):
        return row
    before, after = done["probe"][0], done["probe"][-1]
    seen = {f"probe_{name}": _known(after[name]) for name in ("dice", "knn", "rank")}
    seen |= {f"probe_{name}_before": _known(before[name]) for name in ("dice", "knn", "rank")}
    return dataclasses.replace(row, **seen)  # type: ignore[arg-type]


def _mean_loss(reports: Sequence[Mapping[str, float]], begin: float, end: float) -> float | None:
    """The mean loss of the steps between two fractions of all that were reported. A report speaks of all steps since the one
    before; None where nothing was reported, or no number."""
    steps = [0.0, *(report["step"] for report in reports)]
    low, high = begin * steps[-1], end * steps[-1]
    shares = [max(0.0, min(last, high) - max(first, low)) for first, last in itertools.pairwise(steps)]
    losses = [sum(value for key, value in report.items() if key.startswith("loss/")) for report in reports]
    spoken = [(share, loss) for share, loss in zip(shares, losses, strict=True) if share > 0]
    return _known(sum(share * loss for share, loss in spoken) / sum(share for share, _ in spoken)) if spoken else None


def _rate(reports: Sequence[Mapping[str, float]]) -> float | None:
    seconds = reports[-1]["seconds"] - reports[0]["seconds"] if reports else 0.0
    return (reports[-1]["step"] - reports[0]["step"]) / seconds if seconds > 0 else None


def _known(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def verdict(found: Sequence[Row]) -> list[str]:
    """What every pretraining should show, and which did not."""
    from medssl.platform.loop import COLLAPSED

    done = [row for row in found if row.status != "not finished"]
    lines = []
    if waiting := len(found) - len(done):
        lines.append(f"{waiting} of {len(found)} pretrainings have not finished.")
    fell = [(row, row.first_loss, row.last_loss) for row in done if row.first_loss is not None and row.last_loss is not None]
    lines += _count("The loss fell", [(row, last < first) for row, first, last in fell])
    indices = [(row, row.collapse if row.collapse is not None or row.spread is None else 1 - row.spread) for row in done]
    alive = [(row, row.status != "collapsed" and (index or 0.0) <= COLLAPSED) for row, index in indices]
    lines += _count(f"Features did not collapse (index, or 1 - spread, up to {COLLAPSED}) in training", alive)
    better = [(row, row.probe_dice_before, row.probe_dice) for row in done]
    probed = [(row, after > before) for row, before, after in better if before is not None and after is not None]
    lines += _count("The probe's Dice is above that of the same encoder before its first step", probed)
    if not probed:
        lines.append("No frozen encoder was probed; -o pretrain.training.probes=1 looks at its start and end.")
    return lines


def _count(what: str, held: Sequence[tuple[Row, bool]]) -> list[str]:
    if not held:
        return []
    not_in = [f"{row.arm} {row.index}" for row, holds in held if not holds]
    return [f"{what} in {len(held) - len(not_in)} of {len(held)}{': not in ' + ', '.join(not_in) if not_in else ''}."]


SEEN = ("probe Dice", "→", "probe kNN", "→", "probe rank", "→")
HEAD = ("arm", "#", "steps", "loss", "→", "collapse", "spread", "rank", *SEEN, "steps/s")


def _cells(row: Row) -> list[str]:
    def shown(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    steps = "–" if row.steps is None else str(row.steps)
    cells = [row.arm, str(row.index), steps, shown(row.first_loss, 3), shown(row.last_loss, 3)]
    cells += [shown(row.collapse, 2), shown(row.spread, 2), shown(row.rank, 1)]
    cells += [
        shown(row.probe_dice_before, 3),
        shown(row.probe_dice, 3),
        shown(row.probe_knn_before, 2),
        shown(row.probe_knn, 2),
    ]
    return [*cells, shown(row.probe_rank_before, 1), shown(row.probe_rank, 1), shown(row.steps_per_second, 1)]


def _lines(found: Sequence[Row]) -> list[list[str]]:
    """Head and rows, without the columns that nobody fills."""
    columns = zip(HEAD, *map(_cells, found), strict=True)
    return [list(line) for line in zip(*(column for column in columns if set(column[1:]) != {"–"}), strict=True)]


def _table(found: Sequence[Row]) -> str:
    lines = _lines(found)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for line in lines:
        name, *numbers = line
        padded = (text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True))
        texts.append("  ".join([name.ljust(widths[0]), *padded]))
    return "\n".join([*texts, "", *verdict(found)])


def _markdown(found: Sequence[Row]) -> str:
    head, *lines = _lines(found)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in [head, rule, *lines]), "", *verdict(found)])


def _csv(found: Sequence[Row]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in found)
    return out.getvalue().rstrip("\n")


def _json(found: Sequence[Row]) -> str:
    plain: list[dict[str, Any]] = [dataclasses.asdict(row) for row in found]
    return json.dumps(plain, indent=1, allow_nan=False, ensure_ascii=False)


FORMATS: Mapping[str, Callable[[Sequence[Row]], str]] = {"table": _table, "md": _markdown, "csv": _csv, "json": _json}
