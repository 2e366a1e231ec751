"""How a sweep stands, for whoever looks: read from the stage folders alone, from any process, on any machine that sees them."""

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from medssl.platform.errors import UsageError
from medssl.platform.plan import Chain, Stage
from medssl.platform.site import Site
from medssl.platform.sweep import Sweep

SILENT = 300.0  # seconds without a sign of life after which a stage no longer counts as running


@dataclass
class Seen:
    """What an earlier look found and does not change: the chains of what was asked, and what finished stages left."""

    asked: Any = None
    chains: list[Chain] = field(default_factory=list)
    done: dict[str, dict[str, Any]] = field(default_factory=dict)


def state(site: Site, folder: Path, seen: Seen | None = None) -> dict[str, Any]:
    """Finished, running and waiting stages of a sweep, and the seconds left; `seen` keeps what one look tells the next."""
    sweep, seen = Sweep.open(folder), seen or Seen()
    asked = (sweep.arms(), sweep.repeats(), sweep.k, sweep.m)
    if asked != seen.asked:
        seen.asked, seen.chains = asked, sweep.chains()
    for identity in site.finished() - seen.done.keys():
        if done := site.done(identity):
            seen.done[identity] = done
    stages: dict[str, tuple[str, Stage]] = {}
    for chain in seen.chains:
        for stage in chain.stages:
            stages.setdefault(stage.id, (f"{chain.arm} #{chain.index + 1}", stage))
    finished, running, pace = {}, [], {"pretrain": [0.0, 0], "finetune": [0.0, 0]}
    left = {"pretrain": 0, "finetune": 0}
    for identity, (arm, stage) in stages.items():
        if done := seen.done.get(identity):
            finished[identity] = {"arm": arm, "kind": stage.kind, **done}
            pace[stage.kind][0] += done["seconds"]
            pace[stage.kind][1] += stage.steps
            continue
        alive = _progress(site.stage(identity))
        if alive:
            running.append({"stage": identity, "arm": arm, "kind": stage.kind, **alive})
            if alive["step"] > 0:
                pace[stage.kind][0] += alive["at"] - alive["begun"]
                pace[stage.kind][1] += alive["step"] - alive["from"]
        left[stage.kind] += stage.steps - (alive["step"] if alive else 0)
    known = [kind for kind, (_, steps) in pace.items() if steps]
    eta = None
    if running and all(kind in known for kind, steps in left.items() if steps):
        eta = sum(steps * pace[kind][0] / pace[kind][1] for kind, steps in left.items() if steps) / len(running)
    return {
        "sweep": folder.name,
        "question": sweep.question,
        "stages": len(stages),
        "finished": finished,
        "running": running,
        "steps_left": sum(left.values()),
        "seconds_left": eta,
    }


def _progress(folder: Path) -> dict[str, Any] | None:
    try:
        alive = json.loads((folder / "progress.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    return alive if time.time() - alive["at"] < SILENT else None


def describe(now: dict[str, Any]) -> str:
    """A line for the sweep, and one for every running stage."""
    lines = [f"{now['sweep']}: {len(now['finished'])} of {now['stages']} stages done, {_eta(now)}"]
    for stage in now["running"]:
        where = f"step {stage['step']}/{stage['total']}"
        lines += [f"  {stage['arm']:<16} {stage['kind']:<8} {where}  {stage['text']}"[:140]]
    return "\n".join(lines)


def _eta(now: dict[str, Any]) -> str:
    if len(now["finished"]) == now["stages"]:
        return "nothing left"
    if now["seconds_left"] is None:
        return f"{now['steps_left']:,} steps left"
    minutes, seconds = divmod(round(now["seconds_left"]), 60)
    hours, minutes = divmod(minutes, 60)
    return f"about {hours}:{minutes:02}:{seconds:02} left"


def stop(folder: Path) -> str:
    """Ask the process that runs the sweep to stop; it looks for this every second."""
    if not (folder / "sweep.json").exists():
        raise UsageError(f"{folder} is not a sweep")
    (folder / "stop").touch()
    return f"{folder.name} will stop within seconds if it is running; type the sweep again to continue it"


class Watcher:
    """Beside a running sweep: a line for every stage that finishes, and, in a terminal, what is running now.

    Not a terminal: lines of finished stages only. The sweep's log.txt has both.
    """

    def __init__(self, site: Site, folder: Path, say: Callable[[str], None]):
        self.site, self.folder, self.say = site, folder, say
        self.over = threading.Event()
        self.seen = Seen()
        self.told: set[str] = set(state(site, folder, self.seen)["finished"])
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        if self.told:
            self.say(f"{len(self.told)} stages were done before")
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()
        self._look(last=True)

    def _watch(self) -> None:
        import _thread

        while not self.over.wait(1.0):
            self._look(last=False)
            if (self.folder / "stop").exists():
                _thread.interrupt_main()  # as Ctrl-C: Ray Tune ends its trials, checkpoints are on disk
                return

    def _look(self, last: bool) -> None:
        now = state(self.site, self.folder, self.seen)
        for identity, done in now["finished"].items():
            if identity not in self.told:
                self.told.add(identity)
                score = f"validation {done['validation']:.3f}" if "validation" in done else f"{done['status']}"
                self._line(
                    f"{len(self.told)}/{now['stages']}  {done['arm']:<16} {done['kind']:<8} {score}  {done['seconds']:.0f} s"
                )
        if sys.stderr.isatty() and not last:
            sys.stderr.write("\r\x1b[K" + describe(now).replace("\n", " |")[:110])
            sys.stderr.flush()
        with (self.folder / "log.txt").open("a") as log:
            log.write(time.strftime("%H:%M:%S ") + describe(now).replace("\n", " |") + "\n")

    def _line(self, text: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")
        self.say(time.strftime("%H:%M:%S  ") + text)


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
