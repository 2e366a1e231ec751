"""How a sweep stands, for whoever looks: read from its folders alone, from any process, on any machine that sees them."""

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from medssl.platform.errors import UsageError
from medssl.platform.plan import Chain, Stage
from medssl.platform.site import Site
from medssl.platform.spending import Meter, Spending
from medssl.platform.sweep import Sweep

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

SILENT = 300.0  # seconds without a sign of life after which a stage no longer counts as running
ASKED = ("sweep.json", "arms.json", "repeats.json")  # files of a sweep that say which stages it has


def state(site: Site, folder: Path) -> dict[str, Any]:
    """Finished, running and waiting stages of a sweep, what it has spent, and the seconds that are left."""
    return Lookout(site, folder).look()


class Lookout:
    """Looks at a sweep again and again. A finished stage is read once; the plan again only when its files have changed."""

    def __init__(self, site: Site, folder: Path):
        self.site, self.folder = site, folder
        self.finished: dict[str, dict[str, Any]] = {}
        self.asked: tuple[int, ...] = ()

    def look(self) -> dict[str, Any]:
        """The state, as plain values."""
        self._plan()
        pace, left, running = {"pretrain": [0.0, 0], "finetune": [0.0, 0]}, {"pretrain": 0, "finetune": 0}, []
        begun = {path.name for path in (self.site.runs / "stages").glob("*")}
        if self.site.remote:
            begun |= self.site.finished()  # on other machines
        for identity, (arm, stage) in self.stages.items():
            if identity not in self.finished and identity in begun and (done := self.site.done(identity)):
                self.finished[identity] = {"arm": arm, "kind": stage.kind, **done}
            if identity in self.finished:
                done = self.finished[identity]
                pace[stage.kind][0] += done["seconds"]
                pace[stage.kind][1] += done["step"] if stage.kind == "pretrain" else stage.steps  # may have collapsed early
                continue
            alive = _progress(self.site.stage(identity)) if identity in begun else None
            if alive:
                running.append({"stage": identity, "arm": arm, "kind": stage.kind, **alive})
                if alive["step"] > alive["from"]:
                    pace[stage.kind][0] += alive["at"] - alive["begun"]
                    pace[stage.kind][1] += alive["step"] - alive["from"]
            left[stage.kind] += stage.steps - (alive["step"] if alive else 0)
        spent = Spending.open(self.folder)
        eta = _seconds_left(pace, left, len(running))
        machine_hours = None if eta is None else eta / 3600 * spent.machines
        return {
            "sweep": self.folder.name,
            "question": self.sweep.question,
            "stages": len(self.stages),
            "finished": {identity: self.finished[identity] for identity in self.stages if identity in self.finished},
            "running": running,
            "arms": [_standing(arm, chains, self.finished) for arm, chains in self.arms.items()],
            "steps_left": sum(left.values()),
            "seconds_left": eta,
            "ends": None if eta is None else time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(time.time() + eta)),
            "spending": {
                "hours": spent.seconds / 3600,
                "machine_hours": spent.machine_seconds / 3600,
                "stage_hours": sum(seconds for seconds, _ in pace.values()) / 3600,
                "machines": spent.machines,
                "at_once": spent.at_once,
                "price": spent.price,
                "money": spent.money,
                "money_left": None if machine_hours is None or spent.price is None else machine_hours * spent.price,
            },
        }

    def _plan(self) -> None:
        """The stages of the sweep, from its folder where that has changed."""
        files = [self.folder / name for name in ASKED]
        asked = tuple(file.stat().st_mtime_ns for file in files if file.exists())
        if asked == self.asked:
            return
        self.asked, self.sweep = asked, Sweep.open(self.folder)
        self.stages: dict[str, tuple[str, Stage]] = {}
        self.arms: dict[str, list[Chain]] = {}
        for chain in self.sweep.chains():
            self.arms.setdefault(chain.arm, []).append(chain)
            for stage in chain.stages:
                self.stages.setdefault(stage.id, (f"{chain.arm} #{chain.index + 1}", stage))


def _seconds_left(pace: Mapping[str, Sequence[float]], left: Mapping[str, int], running: int) -> float | None:
    """What is left at the pace so far, shared among the stages that run now; None while a kind has no pace."""
    known = [kind for kind, (_, steps) in pace.items() if steps]
    if not running or not all(kind in known for kind, steps in left.items() if steps):
        return None
    return sum(steps * pace[kind][0] / pace[kind][1] for kind, steps in left.items() if steps) / running


def _standing(arm: str, chains: Sequence[Chain], finished: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How far an arm is: validation is the mean over its pretrainings of the means over their fine-tunings so far."""
    means = []
    for chain in chains:
        scores = [finished[stage.id]["validation"] for stage in chain.finetunings if stage.id in finished]
        if scores:
            means.append(sum(scores) / len(scores))
    pretrainings = [stage.id in finished for chain in chains for stage in chain.pretrainings]
    finetunings = [stage.id in finished for chain in chains for stage in chain.finetunings]
    return {
        "arm": arm,
        "pretrainings": [sum(pretrainings), len(pretrainings)],
        "finetunings": [sum(finetunings), len(finetunings)],
        "validation": sum(means) / len(means) if means else None,
    }


def _progress(folder: Path) -> dict[str, Any] | None:
    try:
        alive = json.loads((folder / "progress.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    return alive if time.time() - alive["at"] < SILENT else None


def describe(now: dict[str, Any]) -> str:
    """A line for the sweep, and one for every running stage."""
    lines = [f"{now['sweep']}: {len(now['finished'])} of {now['stages']} stages done, {_eta(now)}; {_spent(now)}"]
    for stage in now["running"]:
        where = f"step {stage['step']}/{stage['total']}"
        lines += [f"  {stage['arm']:<16} {stage['kind']:<8} {where}  {stage['text']}"[:140]]
    return "\n".join(lines)


def _eta(now: dict[str, Any]) -> str:
    if len(now["finished"]) == now["stages"]:
        return "nothing left"
    if now["seconds_left"] is None:
        return f"{now['steps_left']:,} steps left"
    return f"about {_clock(now['seconds_left'])} left"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _spent(now: dict[str, Any]) -> str:
    """Time and money used, and money to come, in a few words."""
    used = now["spending"]
    words = f"spent {_clock(used['hours'] * 3600)}"
    if used["money"] is not None:
        words += f" = {used['money']:,.2f}"
    if used["money_left"] is not None:
        words += f", {used['money_left']:,.2f} to come"
    return words


def view(now: dict[str, Any], rows: int = 40) -> "RenderableType":
    """The state for a terminal of so many rows: the sweep, its arms, its running stages."""
    from rich import box
    from rich.console import Group
    from rich.table import Table

    used = now["spending"]
    places = f" of {used['at_once']}" if used["at_once"] else ""
    title = f"{now['sweep']}: {len(now['finished'])} of {now['stages']} stages, {_eta(now)}; {_spent(now)}"
    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1), "expand": True}
    arms, stages = Table(**style), Table(**style)
    arms.add_column("arm", ratio=1, no_wrap=True)  # takes what the others leave
    for name in ("pretrainings", "fine-tunings", "validation"):
        arms.add_column(name, justify="right", no_wrap=True)
    room = max(3, rows - len(now["running"]) - 11)  # frames, a title of two lines, the cursor
    for arm in now["arms"][:room]:
        counts = ["/".join(map(str, arm[kind])) if arm[kind][1] else "none" for kind in ("pretrainings", "finetunings")]
        arms.add_row(arm["arm"], *counts, "" if arm["validation"] is None else f"{arm['validation']:.3f}")
    if len(now["arms"]) > room:
        arms.add_row(f"and {len(now['arms']) - room} more arms")
    stages.add_column(f"running: {len(now['running'])}{places}", no_wrap=True)
    for name in ("stage", "step", "left"):
        stages.add_column(name, no_wrap=True, justify="left" if name == "stage" else "right")
    stages.add_column("losses and monitors", ratio=1, no_wrap=True)
    for stage in now["running"]:
        step = f"{stage['step']}/{stage['total']}"
        stages.add_row(stage["arm"], stage["kind"], step, _stage_left(stage), stage["text"])
    return Group(title, arms, stages)


def _stage_left(alive: Mapping[str, Any]) -> str:
    done = alive["step"] - alive["from"]
    if done <= 0:
        return ""
    return _clock((alive["total"] - alive["step"]) * (alive["at"] - alive["begun"]) / done)


def attach(site: Site, folder: Path) -> None:
    """Show a sweep in this terminal until it is finished or the user leaves; the sweep itself is not touched.

    Raises UsageError where there is no terminal.
    """
    from rich.live import Live

    console = _console()
    if not console.is_terminal:
        raise UsageError("--watch draws in a terminal, and this is none; use `medssl status --json`")
    lookout = Lookout(site, folder)
    now = lookout.look()
    with Live(view(now, console.height), console=console, auto_refresh=False) as live:
        while len(now["finished"]) < now["stages"]:
            try:
                time.sleep(1.0)
            except KeyboardInterrupt:
                return
            now = lookout.look()
            live.update(view(now, console.height), refresh=True)


def _console() -> "Console":
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False)


def stop(folder: Path) -> str:
    """Ask the process that runs the sweep to stop; it looks for this every second."""
    if not (folder / "sweep.json").exists():
        raise UsageError(f"{folder} is not a sweep")
    (folder / "stop").touch()
    return f"{folder.name} will stop within seconds if it is running; type the sweep again to continue it"


class Watcher:
    """Beside a running sweep: a line for every stage that finishes, and, in a terminal, the live view.

    Not a terminal: lines of finished stages only. The sweep's log.txt has both. It also ends the sweep when a user asks
    for that (`stop`), or when the meter has reached its limit.
    """

    def __init__(self, site: Site, folder: Path, say: Callable[[str], None], meter: Meter):
        self.folder, self.say, self.meter = folder, say, meter
        self.lookout = Lookout(site, folder)
        self.told: set[str] = set(self.lookout.look()["finished"])
        self.live: Any = None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        if self.told:
            self.say(f"{len(self.told)} stages were done before")
        self.meter.tick()
        if sys.stderr.isatty():
            from rich.live import Live

            self.live = Live(console=_console(), auto_refresh=False, redirect_stdout=False)  # standard output is the answer's
            self.live.start()
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()
        self._look()
        if self.live:
            self.live.stop()

    def _watch(self) -> None:
        import _thread

        while not self.over.wait(1.0):
            self._look()
            if (self.folder / "stop").exists() or self.meter.exhausted:
                _thread.interrupt_main()  # as Ctrl-C: Ray Tune ends its trials, checkpoints are on disk
                return

    def _look(self) -> None:
        self.meter.tick()
        now = self.lookout.look()
        for identity, done in now["finished"].items():
            if identity not in self.told:
                self.told.add(identity)
                self._line(f"{len(self.told)}/{now['stages']}  {_told(done)}")
        if self.live:
            self.live.update(view(now, self.live.console.height), refresh=True)
        with (self.folder / "log.txt").open("a") as log:
            log.write(time.strftime("%H:%M:%S ") + describe(now).replace("\n", " |") + "\n")

    def _line(self, text: str) -> None:
        text = time.strftime("%H:%M:%S  ") + text
        if self.live:
            self.live.console.print(text)
        else:
            self.say(text)


def _told(done: Mapping[str, Any]) -> str:
    """A finished stage in a line."""
    score = f"validation {done['validation']:.3f}" if "validation" in done else f"{done['status']}"
    lost = "".join(f"; not told to {name} ({why})" for name, why in done.get("untracked", {}).items())
    return f"{done['arm']:<16} {done['kind']:<8} {score}  {done['seconds']:.0f} s{lost}"


class Following:
    """Beside one stage that runs in this process: now and then a line of where it stands and when it will be done."""

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self.folder, self.say = folder, say
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()

    def _follow(self) -> None:
        while not self.over.wait(2.0 if sys.stderr.isatty() else 15.0):
            if alive := _progress(self.folder):
                pace = (alive["at"] - alive["begun"]) / max(alive["step"] - alive["from"], 1)
                left = round((alive["total"] - alive["step"]) * pace)
                self.say(f"step {alive['step']}/{alive['total']}, about {left} s left  {alive['text']}"[:140])
