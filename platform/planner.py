"""What a sweep will take before it starts: hours, GPU-hours, money, storage, and which differences it could show.

The pace of a stage is that of finished stages in this run store: of the same configuration, else of the same method, network,
crop sides and batch, or it is measured now (`--calibrate`). What has no pace is left out of every sum, and named. Hours
follow from placing whole chains, in the order of the sweep, on as many places as the machines at hand have. Nothing here
imports torch, and ray only to ask a cluster that was named.
"""

import functools
import heapq
import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from medssl.platform import ledger, places, plan, statistics
from medssl.platform.config import Experiment, Part, Resources, digest
from medssl.platform.plan import Chain, Stage
from medssl.platform.site import Site
from medssl.platform.splits import Split
from medssl.platform.statistics import Components
from medssl.platform.store import Store

# The noise of the IoU study (search_spaces/iou_interval.py): standard deviations of slice-wise Dice, pooled over its five
# pretrained arms of 2 pretrainings x 2 fine-tunings; the variance between pretrainings is estimated below 0.
PUBLISHED = Components(between_raw=0.0, within=0.0126**2, df_between=5, df_within=10)
POWER, ALPHA = 0.8, 0.05  # as in the leaderboard


@dataclass(frozen=True)
class Hands:
    """The machines that a sweep would run on."""

    cpus: float
    gpus: float
    machines: int
    device: str | None  # "cpu", the name of the GPU, or None: GPUs of names unknown
    memory: float | None = None  # bytes of each GPU, where they were asked

    @property
    def resources(self) -> dict[str, float]:
        """As Ray counts them."""
        return {"CPU": self.cpus, "GPU": self.gpus}


def this_machine() -> Hands:
    """The cores and GPUs of this machine, without torch or ray."""
    names: list[str] = []
    if shutil.which("nvidia-smi"):
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=False,
        )
        names = asked.stdout.splitlines() if asked.returncode == 0 else []
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        names = names[: len([number for number in shown.split(",") if number.strip() not in ("", "-1")])]
    if not names:
        return Hands(os.cpu_count() or 1, 0, 1, "cpu")
    name, _, mebibytes = names[0].rpartition(",")
    memory = float(mebibytes) * 2**20 if mebibytes.strip().isdigit() else None  # a part of a GPU may not say
    return Hands(os.cpu_count() or 1, len(names), 1, name.strip(), memory)


def cluster() -> Hands:
    """What the Ray cluster that this process is connected to has now."""
    import ray

    has = ray.cluster_resources()
    machines = sum(node["Alive"] for node in ray.nodes())
    return Hands(has.get("CPU", 0.0), has.get("GPU", 0.0), machines, None if has.get("GPU") else "cpu")


@dataclass(frozen=True)
class Pace:
    """How long a stage takes and what it leaves."""

    step: float  # seconds; measured on finished stages, all that a stage does is shared among its steps
    source: str
    fixed: float = 0.0  # seconds of a stage beside its steps
    stored: float | None = None  # bytes that a finished stage keeps
    running: float | None = None  # bytes of the checkpoint that a stage has while it runs
    memory: float | None = None  # bytes at the most
    busy: float | None = None  # share of the time in which it keeps its GPU, or the cores that it holds, at work

    def seconds(self, steps: int) -> float:
        return steps * self.step + self.fixed


@dataclass(frozen=True)
class _Sample:
    """One stage that has finished, or has begun and left a checkpoint."""

    stage: str
    finished: bool
    exact: str
    like: str
    device: str | None
    seconds: float
    steps: int  # done in those seconds
    step: int  # reached
    stored: float


class Paces:
    """The paces that this run store and a calibration know."""

    def __init__(self, site: Site, calibrated: Mapping[str, Pace] | None = None):
        self.samples = list(_samples(site))
        self.calibrated = dict(calibrated or {})
        self.found: dict[tuple[str, bool, int, str | None], tuple[Experiment, Pace | None]] = {}  # arms share their experiment

    def of(self, stage: Stage, experiment: Experiment, device: str | None) -> Pace | None:
        """None where nothing like it has finished on such a device."""
        asked = (stage.kind, stage.further, id(experiment), device)
        if asked not in self.found:
            self.found[asked] = experiment, self._find(stage.kind, stage.seen(experiment), device)
        return self.found[asked][1]

    def _find(self, kind: str, experiment: Experiment, device: str | None) -> Pace | None:
        exact, like = keys(kind, experiment.tree())
        if found := self.calibrated.get(like):
            return found
        here = [sample for sample in self.samples if _same_device(sample.device, device)]
        for finished, of in ((True, exact), (True, like), (False, exact), (False, like)):
            some = [each for each in here if each.finished == finished and of in (each.exact, each.like) and each.steps]
            if some:
                step = median(sample.seconds / sample.steps for sample in some)
                stored = sum(sample.stored for sample in some) / len(some) if finished else None
                words = f"{len(some)} {'finished' if finished else 'unfinished'} stage{'s' if len(some) > 1 else ''}"
                return Pace(step, f"{words} {'of this configuration' if of == exact else 'like it'}", stored=stored)
        return None

    def begun(self) -> dict[str, int]:
        """Steps that unfinished stages need not do again."""
        return {sample.stage: sample.step for sample in self.samples if not sample.finished}


def keys(kind: str, tree: Mapping[str, Any]) -> tuple[str, str]:
    """What a stage's configuration must share with another's to be the same work, and to be like it.

    Like it: the same method, network, workers and batch, and equal whole numbers and switches (crop sides, widths, numbers of
    crops); rates, temperatures, weights and intervals hardly change the time of a step.
    """
    part, resources = tree[kind], tree["resources"]
    hands = [resources[name] for name in ("workers", "cpus", "gpus")]
    exact = [kind, tree["network"], part, hands, tree["data"]["name"], tree["evaluate"] if kind == "finetune" else None]
    numbers = {name: value for name, value in part.items() if isinstance(value, int)}
    training = {name: part["training"].get(name) for name in ("batch", "accumulate", "precision")}
    return digest(exact), digest([kind, part["name"], tree["network"], numbers, training, hands])


def _same_device(measured: str | None, wanted: str | None) -> bool:
    """A stage that does not say where it ran (an older version) counts everywhere; a GPU without a name is any."""
    if measured is None or measured == wanted:
        return True
    return measured != "cpu" if wanted is None else measured == "gpu" and wanted != "cpu"


def _samples(site: Site) -> Iterable[_Sample]:
    for file in (site.runs / "stages").glob("*/run.json"):
        try:
            run = json.loads(file.read_text())
            same = (*keys(run["kind"], run["config"]), run.get("device"))
            if done := site.done(file.parent.name):
                steps = done["step"] if run["kind"] == "pretrain" else run["steps"]  # a pretraining may have collapsed early
                yield _Sample(run["stage"], True, *same, done["seconds"], steps, steps, _bytes(file.parent))
            elif file.with_name("checkpoint.pt").exists():
                seen = json.loads(file.with_name("progress.json").read_text())
                took, done_now = seen["at"] - seen["begun"], seen["step"] - seen["from"]
                yield _Sample(run["stage"], False, *same, took, done_now, seen["step"], 0.0)
        except (OSError, ValueError, KeyError, TypeError):  # of another version, or half removed: not a witness
            continue


def _bytes(folder: Path) -> float:
    return float(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))


@dataclass(frozen=True)
class Estimate:
    """What is left to do of some chains. Sums are over the stages whose pace is known."""

    stages: int
    unknown: tuple[str, ...]  # what no pace is known of
    peak: float  # bytes of memory that a stage takes at the most, where that was measured
    busy: float | None  # share of the stages' time in which they keep their device at work; None where one was not measured
    seconds: float  # from start to end
    worker_seconds: float  # of all workers together
    stored: float  # bytes that finished stages will keep
    running: float  # bytes of checkpoints at a time
    paces: tuple[str, ...]  # in words, a kind of stage each


def estimate(
    chains: Sequence[Chain],
    finished: Collection[str],
    begun: Mapping[str, int],
    paces: Callable[[Stage, Experiment], Pace | None],
    at_once: int,
) -> Estimate:
    """Place the chains, each whole, on `at_once` places: the next one goes where a place is free first.

    begun   steps already done of unfinished stages
    A stage that two chains share is done by the first.
    """
    slots = [0.0] * at_once
    seen = set(finished)
    unknown: dict[str, None] = {}
    known: dict[str, list[Pace]] = {}
    stages, workers, stored, running = 0, 0.0, 0.0, [0.0]
    took, at_work = 0.0, 0.0
    for chain in sorted(chains, key=lambda chain: chain.index):  # repeats go round all arms
        seconds = 0.0
        for stage in chain.stages:
            if stage.id in seen:
                continue
            seen.add(stage.id)
            stages += 1
            what, pace = _what(stage, chain.experiment), paces(stage, chain.experiment)
            if pace is None:
                unknown[what] = None
                continue
            known.setdefault(what, []).append(pace)
            left = pace.seconds(stage.steps - begun.get(stage.id, 0))
            seconds += left
            took, at_work = took + left, at_work + left * (math.nan if pace.busy is None else pace.busy)
            stored += pace.stored or 0.0
            running.append(pace.running or 0.0)
        workers += seconds * chain.experiment.resources.workers
        heapq.heapreplace(slots, slots[0] + seconds)
    words = tuple(f"{what}: {_rate(some)}" for what, some in known.items())
    peak = max((pace.memory or 0.0 for some in known.values() for pace in some), default=0.0)
    busy = at_work / took if took and math.isfinite(at_work) else None
    return Estimate(stages, tuple(unknown), peak, busy, max(slots), workers, stored, at_once * max(running), words)


def _estimated(chains: Sequence[Chain], site: Site, paces: Paces, device: str | None, at_once: int) -> Estimate:
    def of(stage: Stage, experiment: Experiment) -> Pace | None:
        return paces.of(stage, experiment, device)

    return estimate(chains, site.finished(), paces.begun(), of, at_once)


def _what(stage: Stage, experiment: Experiment) -> str:
    part = _part(stage, experiment)
    side = getattr(part.settings, "side", None)
    assert part.training is not None
    return f"{part.name} of {experiment.network.name}, batch {part.training.batch}{f', {side} px' if side else ''}"


def _part(stage: Stage, experiment: Experiment) -> Part:
    part = stage.seen(experiment).pretrain if stage.kind == "pretrain" else experiment.finetune
    assert part is not None
    return part


def _rate(paces: Sequence[Pace]) -> str:
    rates = sorted(1 / pace.step for pace in paces)
    span = "" if rates[0] == rates[-1] else f"{rates[0]:.3g} to "
    sources = "; ".join(dict.fromkeys(pace.source for pace in paces))
    most = max((pace.memory or 0.0) for pace in paces)
    busy = [pace.busy for pace in paces if pace.busy is not None]
    words = f"{span}{rates[-1]:.3g} steps/s ({sources})" + (f", at most {_size(most)} of memory" if most else "")
    return words + (f", busy {max(busy):.0%} of the time" if busy else "")


def noise(site: Site, store: Store, split: Split, metric: str) -> tuple[Components, int] | None:
    """Variance components of the fine-tunings scored on this data contract, and the number of their pretrainings.

    An arm is a configuration apart from its seed. None where no pretraining or no arm has a second score.
    """
    owners: dict[str, tuple[str, str]] = {}
    for file in (site.runs / "stages").glob("*/run.json"):
        try:
            run = json.loads(file.read_text())
            here = (run["kind"], run["store"], run["split"]) == ("finetune", str(store.root), split.name)
            same = {name: value for name, value in run["config"].items() if name not in ("seed", "resources")}
            if here and ledger.holds(site.runs, run["stage"]):
                owners[run["stage"]] = (digest(same), run["parent"] or str(run["encoder_seed"]))
        except (OSError, ValueError, KeyError):
            continue
    contract = plan.contract(store, split)
    tables = [table for stage in owners if contract in (table := ledger.read(site.runs, [stage]))["contract"].to_pylist()]
    arms: dict[str, dict[str, list[float]]] = {}
    for table in tables:
        for stage, by_patient in ledger.by_patient(table, metric, "test").items():
            defined = [value for value in by_patient.values() if math.isfinite(value)]
            if defined:
                arm, pretraining = owners[stage]
                arms.setdefault(arm, {}).setdefault(pretraining, []).append(sum(defined) / len(defined))
    found = statistics.components([list(groups.values()) for groups in arms.values()])
    return (found, sum(map(len, arms.values()))) if found.df_between else None


def power(found: tuple[Components, int] | None, k: int, m: int, comparisons: int, wanted: float) -> list[str]:
    """Lines: the smallest difference that k pretrainings of m fine-tunings show, and the k that shows the wanted one."""
    components, source = PUBLISHED, "published for the IoU study; no pretrainings scored on these data tell theirs"
    if found:
        components, source = found[0], f"{found[1]} pretrainings scored on these data"
    sd = math.sqrt(components.of_mean(m))
    family = f"{POWER:.0%} power, {ALPHA:.0%} over {comparisons} comparison{'s' if comparisons > 1 else ''}"
    least = statistics.detectable(sd, k, power=POWER, alpha=ALPHA, comparisons=comparisons)
    needed = statistics.needed(sd, wanted, power=POWER, alpha=ALPHA, comparisons=comparisons)
    within = "unknown" if math.isnan(components.within) else f"{math.sqrt(components.within):.4f}"
    shown = f"a difference of {least:.4f} can be seen" if math.isfinite(least) else "no difference can be told from chance"
    return [
        f"power    k={k}, m={m}: {shown} ({family})",
        f"         {wanted:g} wants {needed} pretrainings per arm, each fine-tuned {m} times",
        f"noise    sd {math.sqrt(components.between):.4f} between pretrainings, {within} within ({source})",
    ]


def describe(
    chains: Sequence[Chain],
    site: Site,
    hands: Hands,
    at_once: int,
    paces: Paces,
    price: float | None,
) -> list[str]:
    """The lines of a plan about time, money and storage."""
    gpus = chains[0].experiment.resources.gpus if chains else 0
    on_gpu = bool(gpus) if gpus is not None else hands.gpus >= 1
    device = hands.device if on_gpu else "cpu"
    found = _estimated(chains, site, paces, device, at_once)
    lines = [f"pace     {words}" for words in found.paces]
    lines += [f"pace     {what}: unknown, nothing like it has finished here; --calibrate measures it" for what in found.unknown]
    if found.stages and not found.paces:
        return [*lines, "hours    unknown"]
    beside = f", without {len(found.unknown)} kind{'s' if len(found.unknown) > 1 else ''} of stage" if found.unknown else ""
    hours, resources = found.seconds / 3600, chains[0].experiment.resources
    each = (resources.gpus or 1.0) if on_gpu else resources.cpus
    held = f"{found.worker_seconds / 3600 * each:.3g} {'GPU' if on_gpu else 'core'}-hours"
    machines = f"{hands.machines} machine{'s' if hands.machines > 1 else ''}, {hands.cpus:g} CPUs, {hands.gpus:g} GPUs"
    lines.append(f"hours    {_clock(found.seconds)} with {at_once} at a time ({machines}); {held}{beside}")
    if on_gpu:
        lines += packing(found.peak, found.busy, hands, resources)
    if price is not None:
        lines.append(f"money    {hours * hands.machines * price:,.2f} at {price:g} per machine and hour{beside}")
    lines.append(f"storage  {_size(found.stored)} to keep, {_size(found.running)} more while stages run{beside}")
    return lines


def packing(peak: float, busy: float | None, hands: Hands, resources: Resources) -> list[str]:
    """The line that proposes how many one-worker stages share a GPU, from the memory that one was measured to take.

    busy   share of its time in which a stage alone keeps the GPU at work, as measured; None: left to the user, as the line says
    Nothing where stages do not share, or say already how.
    """
    if not peak or not hands.gpus or hands.memory is None or resources.workers > 1 or resources.gpus is not None:
        return []
    room = functools.partial(places.fraction, peak, hands.memory, cpus=resources.cpus, cores=hands.cpus, gpus=int(hands.gpus))
    share = room(busy=busy or 0.0)
    if share < 1:
        when = "worth it while one stage keeps the GPU less than half busy"
        if busy is not None:
            when = f"alone, one was measured to keep it {busy:.0%} busy"
        return [
            f"packing  -o resources.gpus={share:g}: {int(1 / share + 1e-9)} stages of {_size(peak)} find place on each GPU of "
            f"{_size(hands.memory)}; {when}"
        ]
    if busy is not None and room(busy=0.0) < 1:
        return [f"packing  none: a stage of {_size(peak)} leaves room, but was measured to keep its GPU {busy:.0%} busy"]
    return []


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return f"{round(seconds) // 3600}:{round(seconds) // 60 % 60:02}:{round(seconds) % 60:02}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB"


def to_go(chains: Sequence[Chain], site: Site, at_once: int, machines: int, price: float | None) -> str:
    """What is missing of a sweep that has stopped, in a few words after its count of stages; "" where no pace is known."""
    paces = Paces(site)
    devices = [sample.device for sample in paces.samples if sample.device]
    device = devices[-1] if devices else "cpu"
    found = _estimated(chains, site, paces, device, at_once)
    if not found.paces:
        return ""
    hours = found.seconds / 3600
    clock = _clock(found.seconds)
    money = "" if price is None else f" and {hours * machines * price:,.2f} in money"
    return f", {'more than' if found.unknown else 'about'} {clock} hours{money}"
