"""What a sweep has used so far: hours, hours of machines, money. It lies in the sweep's folder and is kept up as it runs.

    spending.json    {"seconds": 5400.0, "machine_seconds": 10800.0, "machines": 2, "at_once": 4, "price": 2.5, "at": …}

The hours are those in which Ray was up for the sweep, all its starts together; a kill loses the last second of them.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from medssl.platform import atomic

RECOUNT = 10.0  # seconds between two counts of the machines: an autoscaled cluster grows and shrinks


@dataclass(frozen=True)
class Spending:
    seconds: float = 0.0
    machine_seconds: float = 0.0
    machines: int = 1  # as last counted
    at_once: int | None = None  # stages that find place at a time
    price: float | None = None  # of one machine for an hour, in the user's currency
    at: float = 0.0  # when this was written

    @classmethod
    def open(cls, folder: Path) -> "Spending":
        """Of a sweep; nothing yet where none has been written."""
        try:
            return cls(**json.loads((folder / "spending.json").read_text()))
        except FileNotFoundError:
            return cls()

    @property
    def money(self) -> float | None:
        """All machine-hours so far at the price of the last start; None without a price."""
        return None if self.price is None else self.machine_seconds / 3600 * self.price


def idle(now: Spending, machines: int) -> str:
    """What a cluster has cost a sweep that is over, and what it goes on costing until somebody takes it down."""
    spent = f"{now.machine_seconds / 3600:.2f} machine-hours"
    rate = f"{machines} machine{'s are' if machines > 1 else ' is'} still up"
    if now.price is not None:
        spent += f", {now.money:,.2f} in money"
        rate += f" for {machines * now.price:,.2f} an hour"
    return f"cluster  {spent} so far; {rate}: `medssl cluster down` ends that, or --shutdown-when-done from the start"


class Meter:
    """Counts while a sweep runs; `limit` is the most that it may cost, its earlier starts included."""

    def __init__(
        self,
        folder: Path,
        *,
        price: float | None = None,
        limit: float | None = None,
        machines: Callable[[], int] = lambda: 1,
    ):
        before = Spending.open(folder)
        self.folder, self.limit, self.machines = folder, limit, machines
        self.now = dataclasses.replace(before, price=before.price if price is None else price)
        self.last, self.counted = time.monotonic(), -RECOUNT

    @property
    def exhausted(self) -> bool:
        money = self.now.money
        return self.limit is not None and money is not None and money >= self.limit

    def places(self, at_once: int) -> None:
        self.now = dataclasses.replace(self.now, at_once=at_once)

    def tick(self) -> None:
        """Add the time since the last tick."""
        now = time.monotonic()
        passed, self.last = now - self.last, now
        machines = self.now.machines
        if now - self.counted >= RECOUNT:
            self.counted, machines = now, self.machines()
        self.now = dataclasses.replace(
            self.now,
            seconds=round(self.now.seconds + passed, 3),
            machine_seconds=round(self.now.machine_seconds + passed * machines, 3),
            machines=machines,
            at=time.time(),
        )
        atomic.write_json(self.folder / "spending.json", dataclasses.asdict(self.now), durable=False)
