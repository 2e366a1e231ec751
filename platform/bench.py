"""Speed as ratios. Each file of benches/ is one comparison: `run()` yields rows, ours and a named rival in one run."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medssl.platform import find
from medssl.platform.errors import UsageError


@dataclass(frozen=True)
class Row:
    """One comparison. Figures are rates: more is better."""

    what: str  # "augmented pairs of 96 px from 300x250 slices, one core"
    unit: str  # "pairs/s"
    ours: float
    rival_name: str  # "MONAI chain of the CT study"
    rival: float
    target: float | None = None  # the least ratio that we hold ourselves to

    @property
    def ratio(self) -> float:
        return self.ours / self.rival

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "ratio": self.ratio}


def run(names: Sequence[str], say: Callable[[str], None], changes: Mapping[str, Any] | None = None) -> list[Row]:
    """Run the named benches one after another; all of them when none is named.

    changes    arguments of one named bench's `run`, such as how many volumes
    """
    changes = changes or {}
    if changes and len(names) != 1:
        raise UsageError(f"-o {' -o '.join(changes)}: is said of one bench; name it, as in medssl bench ingest -o volumes=500")
    rows = []
    for name in names or find.names("bench"):
        module = find.load("bench", name)
        for key in changes:
            if key not in (known := inspect.signature(module.run).parameters):
                raise UsageError(f'bench {name} has no setting "{key}"; {find.nearest(key, known)}')
        say(f"bench {name}: {find.summary('bench', name)}")
        rows += module.run(**changes)
    return rows


def describe(rows: Sequence[Row]) -> str:
    """A line per comparison: the ratio first, then what it is a ratio of."""
    lines = []
    for row in rows:
        target = "" if row.target is None else f" (at least {row.target:g}: {'met' if row.ratio >= row.target else 'MISSED'})"
        lines.append(f"{row.ratio:8.2f}x{target}  {row.what}")
        lines.append(f"           {row.ours:,.1f} {row.unit} against {row.rival:,.1f} of {row.rival_name}")
    return "\n".join(lines)
