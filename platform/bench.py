"""What a bench reports. Each file of benches/ is one comparison: `run()` yields rows, ours and a named rival in one run."""

from dataclasses import dataclass


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
