"""A sweep: one question, its arms, k pretrainings of each, m fine-tunings of those, and the answer.

What is finished lies in the stage folders. A sweep's own folder holds only the question, so that typing it again after any kill
finds everything and does what is missing. How Ray does it is in `trials.py`.
"""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from medssl.platform import atomic, catalogue, config, find, ledger, mirror, places, plan, spending, trackers, trials
from medssl.platform.config import Experiment
from medssl.platform.errors import RunError, UsageError
from medssl.platform.plan import Chain
from medssl.platform.site import Site, provenance
from medssl.platform.spaces import load_space
from medssl.platform.store import Store

if TYPE_CHECKING:
    from medssl.platform import search

Say = Callable[[str], None]
Settings = Mapping[str, Any]  # dotted

SEARCHES = ("grid", "race", "tpe", "gp", "random")
CONFIRM = 5  # fresh pretrainings against as many: the smallest p is 1/126, enough for Holm over a handful of comparisons
FRESH = 10_000  # pretrainings of a plan that no arm has yet are counted from here
AGAINST = ("gpu-hours", "labels")
LEAST_RACE = 4  # pretrainings per arm of the grid that a race stands for: it begins with half of them everywhere


@dataclass(frozen=True)
class Request:
    """What was typed."""

    space: str
    data: str
    k: int
    m: int
    search: str | None = None  # None: what the space says, else grid
    trials: int = 20
    files: tuple[Path, ...] = ()
    overrides: tuple[str, ...] = ()
    confirm: int | None = None  # fresh pretrainings of the leading arms and the controls; None: CONFIRM after a search


@dataclass(frozen=True)
class Sweep:
    """A question bound to its data: everything that its folder records."""

    space: str
    question: str
    control: str
    search: str
    base: Mapping[str, Any]  # the tree that all arms share, as typed
    defaults: Settings  # the data set's, under it
    k: int
    m: int
    store: Path
    split: str
    folder: Path
    compare: Mapping[str, str] = dataclasses.field(default_factory=dict)  # arms whose control is not `control`
    confirm: int = 0  # fresh pretrainings of the leading arms, after the search

    @property
    def file(self) -> Path:
        return self.folder / "sweep.json"

    def save(self) -> None:
        plain = {key: value for key, value in dataclasses.asdict(self).items() if key not in ("folder", "store")}
        atomic.write_json(self.file, plain | {"store": str(self.store), "provenance": provenance()})

    @classmethod
    def open(cls, folder: Path) -> "Sweep":
        plain = json.loads((folder / "sweep.json").read_text())
        del plain["provenance"]
        return cls(**plain | {"store": Path(plain["store"]), "folder": folder})

    def arms(self) -> dict[str, Settings]:
        """The arms asked for so far, in their order."""
        with contextlib.suppress(FileNotFoundError):
            return json.loads((self.folder / "arms.json").read_text())
        return {}

    def experiment(self, settings: Settings) -> Experiment:
        return config.build(config.suited(self.defaults, config.stack([self.base, config.nested(settings)])))

    def repeats(self) -> dict[str, dict[str, list[int]]]:
        """Of each arm, the pretrainings asked for so far: those of the search, and those that only confirm."""
        with contextlib.suppress(FileNotFoundError):
            return json.loads((self.folder / "repeats.json").read_text())
        return {}

    def chains(self, phase: str | None = None) -> list[Chain]:
        """Every chain of every arm asked for so far; of one phase, `search` or `confirm`, or of both."""
        store = Store.open(self.store)
        split = catalogue.split(store, self.split)
        every = {"search": list(range(self.k))} if self.search == "grid" else {}
        repeats, found = self.repeats(), []
        for label, settings in self.arms().items():
            known = every | repeats.get(label, {})
            indices = [index for name, some in known.items() if phase in (None, name) for index in some]
            if indices:
                experiment = plan.resolve(self.experiment(settings), store, split)
                found += [plan.chain(label, index, self.m, experiment, store, split) for index in indices]
        return found

    def shown(self, phase: str | None, runs: Path) -> tuple[str, list[Chain]]:
        """What a leaderboard ranks: the phase asked for; without one the confirmation, once each of its arms has a score."""
        if phase not in (None, "search", "confirm"):
            raise UsageError(f"--phase {phase}: {find.nearest(phase, ['search', 'confirm'])}")
        confirmed = self.chains("confirm") if phase != "search" else []
        scored = {chain.arm for chain in confirmed if any(ledger.holds(runs, stage.id) for stage in chain.finetunings)}
        if phase == "confirm" and not scored:
            raise UsageError(f"{self.folder.name} has confirmed nothing yet; `medssl sweep --confirm K` asks for it")
        if phase == "confirm" or (scored and scored == {chain.arm for chain in confirmed}):
            return "confirm", confirmed
        return "search", self.chains("search")


def layers(data: str, files: tuple[Path, ...], overrides: tuple[str, ...], last: Settings | None = None) -> dict[str, Any]:
    """The settings' tree of a command line: files, then overrides, then what its own words say (`last`).

    Given weights become an absolute path, and bring their network where medssl pretrained them.
    """
    typed = config.overridden(config.stack(map(config.read, files)), overrides)
    tree = config.stack([typed, last or {}, {"data": {"name": data}}])
    start = tree.get("start")
    if not isinstance(start, Mapping) or not isinstance(start.get("weights"), str):
        return tree
    place = Site.here().find_weights(start["weights"])
    tree = config.stack([tree, {"start": {"weights": str(place)}}])
    if place.is_file():
        return tree
    theirs = json.loads((place / "run.json").read_text())["config"]["network"]
    typed = tree.get("network") or {}
    asked, trained = typed.get("spatial_dims"), theirs.get("spatial_dims", 2)
    if asked not in (None, trained):
        raise UsageError(f"start.weights: the encoder of {place.name} reads {trained}D, not {asked}D; pretrain one in {asked}D")
    return tree if typed.get("name", theirs["name"]) != theirs["name"] else config.stack([{"network": theirs}, tree])


def _base(request: Request, space: ModuleType) -> dict[str, Any]:
    """The tree that all arms of a request share: the space's defaults, and what was typed over them."""
    typed = layers(request.data, request.files, request.overrides)
    return config.stack([config.nested(getattr(space, "DEFAULTS", {})), typed])


def _arms(space: ModuleType) -> dict[str, Settings]:
    """The arms of a space; weights that one names become an absolute path, for workers start elsewhere."""
    arms: dict[str, Settings] = {}
    for label, settings in space.arms().items():
        weights = settings.get("start.weights")
        place = {"start.weights": str(Site.here().find_weights(weights))} if isinstance(weights, str) else {}
        arms[label] = {**settings, **place}
    return arms


def _settled(request: Request) -> Request:
    """The request with the kind of search and the confirmation that it leaves to the space and to us."""
    usual: str = getattr(load_space(request.space), "SEARCH", "grid")
    search = request.search or usual
    if search not in SEARCHES:
        raise UsageError(f"--search {search}: {find.nearest(search, SEARCHES)}")
    confirm = request.confirm if request.confirm is not None else 0 if search == "grid" else CONFIRM
    if search == "race" and (request.k < LEAST_RACE or not confirm):
        raise UsageError(
            f"--search race stands for a grid of at least --pretrainings {LEAST_RACE}, of which it runs half, and needs "
            "--confirm: losing arms have too few repeats to be compared with the control"
        )
    return dataclasses.replace(request, search=search, confirm=confirm)


def _check(request: Request) -> tuple[ModuleType, dict[str, Settings], dict[str, Settings] | None]:
    """The space, the controls and the grid of a request; every arm is built once, without data, to refuse early."""
    space = load_space(request.space)
    base, arms = _base(request, space), _arms(space)
    for label in (space.CONTROL, *(label for pair in getattr(space, "COMPARE", {}).items() for label in pair)):
        if label not in arms:
            raise UsageError(f'{request.space}: its control "{label}" is not among its arms')
    for name in getattr(space, "NEEDS", ()):
        section, _, key = name.partition(".")
        if (base.get(section) or {}).get(key) is None:
            raise UsageError(f"{request.space} compares what only you can give: add -o {name}=…")
    # null switches off, in one arm, what a command line may set for the others
    varied = {key for settings in arms.values() for key, value in settings.items() if value is not None}
    for name in map(config.override_name, request.overrides):
        if name in varied:
            raise UsageError(f"-o {name}: that is what {request.space} varies; leave it out, or write your own space file")
    for label, settings in arms.items():
        try:
            config.build(config.stack([base, config.nested(settings)]))
        except UsageError as error:
            raise UsageError(f'arm "{label}": {error}') from error
    controls = {label: arms[label] for label in getattr(space, "CONTROLS", (space.CONTROL,))}
    if request.search in ("grid", "race"):
        if len(arms) <= len(controls):
            raise UsageError(f"{request.space} has no arms beside its control: choose --search tpe, gp or random")
        return space, controls, arms
    if not hasattr(space, "suggest"):
        raise UsageError(f"{request.space} has no suggest(trial): it can only be searched as a grid or a race")
    return space, controls, None


def fitted(
    request: Request, space: ModuleType, store: Store, arms: Mapping[str, Settings], say: Say
) -> tuple[Sweep, dict[str, Settings]]:
    """The sweep on its data, and the arms that these allow.

    Left out, and said: an arm that asks for more labels than there are, and one that is another arm over again (of 4 labelled
    patients, "4" and "all"). Raises UsageError for whatever else the data cannot give, before anything starts.
    """
    sweep = _bind(request, space, store)
    split = catalogue.split(store, sweep.split)
    kept: dict[str, Settings] = {}
    seen: dict[str, str] = {}
    for label, settings in arms.items():
        try:
            experiment = plan.resolve(sweep.experiment(settings), store, split)
        except plan.TooFewLabels as error:
            if label == sweep.control or not {"data.labelled", "data.labelled_slices"} & settings.keys():
                raise
            say(f'arm "{label}" is left out: {error}')
            continue
        identity = plan.chain(label, 0, 1, experiment, store, split).finetunings[0].id
        if (twin := seen.setdefault(identity, label)) != label:
            say(f'arm "{label}" is left out: on these data it is the same as "{twin}"')
            continue
        kept[label] = settings
    return sweep, kept


def _bind(request: Request, space: ModuleType, store: Store) -> Sweep:
    """The sweep of a request in its folder; k and m grow an earlier one with the same name."""
    base = _base(request, space)
    split = catalogue.split(store, config.build(config.suited(store.defaults, base)).data.split)
    name = Path(request.space).stem.replace("_", "-")
    what = [_decisive(base), store.defaults, store.content_hash, dataclasses.asdict(split), request.search]
    what.append(_arms(space) if request.search in ("grid", "race") else Path(str(space.__file__)).read_text())
    folder = Site.here().runs / "sweeps" / f"{name}-{store.name}-{config.digest(what)[:6]}"
    assert request.search is not None
    k, m, confirm = request.k, request.m, request.confirm or 0
    if (folder / "sweep.json").exists():
        earlier = Sweep.open(folder)
        k, m, confirm = max(k, earlier.k), max(m, earlier.m), max(confirm, earlier.confirm)
    return Sweep(
        name,
        space.QUESTION,
        space.CONTROL,
        request.search,
        base,
        store.defaults,
        k,
        m,
        store.root,
        split.name,
        folder,
        getattr(space, "COMPARE", {}),
        confirm,
    )


def _decisive(base: Mapping[str, Any]) -> dict[str, Any]:
    """The tree without the resources that only move work around: with others of those, it is the same sweep."""
    resources = base.get("resources") or {}
    kept = {section: value for section, value in base.items() if section != "resources"}
    if resources.get("workers", 1) == 1:
        return kept
    return kept | {"resources": {key: resources[key] for key in ("workers", "min_workers") if key in resources}}


def _refuse_places(sweep: Sweep, arms: Mapping[str, Settings], store: Store) -> None:
    """Raises UsageError for an arm whose UAFS or hooks name what its network lacks, which would fail after its pretraining."""
    from medssl.platform import stages

    split = catalogue.split(store, sweep.split)
    for label, settings in arms.items():
        try:
            stages.check(plan.resolve(sweep.experiment(settings), store, split), store)
        except UsageError as error:
            raise UsageError(f'arm "{label}": {error}') from error


def dry_run(
    request: Request,
    say: Say,
    *,
    address: str | None = None,
    price: float | None = None,
    wanted: float = 0.01,
    calibrate: bool = False,
) -> str:
    """The plan of a request, as text. Imports neither torch (unless to calibrate) nor ray (unless to ask a cluster)."""
    from medssl.platform import race

    request = _settled(request)
    space, controls, grid = _check(request)
    store = catalogue.open_store(request.data, say=say)
    sweep, kept = fitted(request, space, store, controls if grid is None else grid, say)
    split = catalogue.split(store, sweep.split)
    arms = {label: plan.resolve(sweep.experiment(settings), store, split) for label, settings in kept.items()}
    text = plan.describe(arms, sweep.k, sweep.m, store, split, Site.here().finished())
    if grid is None:
        text += f"\nsearch   {request.search}: up to {request.trials} more arms, losing ones stopped after a pretraining"
    most = None
    if request.search == "race":
        most = race.Race(tuple(controls), sweep.k, sweep.confirm).allowance(len(arms))
        text += f"\nrace     at most {most} of the {len(arms) * sweep.k} pretrainings above, those of losing arms left out"
    if sweep.confirm:
        text += f"\nconfirm  {sweep.confirm} fresh pretrainings of the two leading arms and of each control"
    chains = [plan.chain(label, n, sweep.m, one, store, split) for n in range(sweep.k) for label, one in arms.items()][:most]
    # arms that a search will ask for, leading arms, controls again: as many chains, of indices that no arm has
    if more := (0 if grid is not None else sweep.k * request.trials) + 2 * sweep.confirm:
        usual = plan.resolve(sweep.experiment({}), store, split)
        chains += [plan.chain("searched", FRESH + n, sweep.m, usual, store, split) for n in range(more)]
    again = [(label, FRESH + n) for label in controls for n in range(sweep.confirm)]
    chains += [plan.chain(label, n, sweep.m, arms[label], store, split) for label, n in again]
    # what the leaderboard will test: the confirmed arms where some are confirmed, else all
    k = sweep.confirm or sweep.k
    given = arms if grid is not None and not sweep.confirm else controls
    others = race.FINALISTS if sweep.confirm else request.trials if grid is None else 0
    rivals = others + sum(sweep.compare.get(label, sweep.control) != label for label in given)
    text += _outlook(sweep, chains, k, rivals, say, address=address, price=price, wanted=wanted, calibrate=calibrate)
    what = "fresh pretrainings per confirmed arm" if sweep.confirm else "pretrainings per arm"
    return f"{space.QUESTION}\n{text}\nsmallest p that {k} {what} can give: {smallest_p(k):.3g}"


def _outlook(
    sweep: Sweep,
    chains: list[Chain],
    k: int,
    comparisons: int,
    say: Say,
    *,
    address: str | None,
    price: float | None,
    wanted: float,
    calibrate: bool,
) -> str:
    """The lines of a plan about time, money, storage and power."""
    from medssl.platform import planner

    site, store = Site.here(), Store.open(sweep.store)
    split = catalogue.split(store, sweep.split)
    base = sweep.experiment({})
    measured = {}
    if calibrate:
        from medssl.platform import calibrate as calibration

        measured = calibration.measure(chains, store, split, say)
    if address:
        with trials.connected(address):
            hands, machines = planner.cluster(), places.machines()
    else:
        hands = planner.this_machine()
        machines = [hands.resources]
    at_once = places.share(base.resources, machines)[1]
    found = planner.noise(site, store, split, base.evaluate.metric)
    lines = planner.describe(chains, site, hands, at_once, planner.Paces(site, measured), price)
    lines += planner.power(found, k, sweep.m, max(comparisons, 1), wanted)
    return "".join(f"\n{line}" for line in lines)


def smallest_p(k: int) -> float:
    """The least p of an exact two-sided permutation test between two arms of k pretrainings each."""
    import math

    return min(1.0, 2 / math.comb(2 * k, k))


def run(
    request: Request,
    *,
    time_budget: str | None,
    address: str | None,
    wanted: float = 0.01,
    against: str | None = None,
    price: float | None = None,
    max_cost: float | None = None,
    shutdown: bool = False,
    say: Say,
) -> str:
    """Do what is missing of a sweep and answer with its leaderboard.

    shutdown   then take down the cluster, however the sweep ended, by the command in MEDSSL_SHUTDOWN on this machine
    """
    if not shutdown:
        return _run(request, time_budget, address, wanted, against, price, max_cost, say)
    ending = os.environ.get("MEDSSL_SHUTDOWN")
    if not ending:
        raise UsageError(
            "--shutdown-when-done: this machine does not say how (MEDSSL_SHUTDOWN, a shell command, is not set); it is meant "
            "for a cluster's head, see `medssl cluster render`"
        )
    try:
        return _run(request, time_budget, address, wanted, against, price, max_cost, say)
    finally:
        say(f"shutting down: {ending}")
        subprocess.Popen(["sh", "-c", f"sleep 5; {ending}"], start_new_session=True)  # the answer is printed before


def _run(
    request: Request,
    time_budget: str | None,
    address: str | None,
    wanted: float,
    against: str | None,
    price: float | None,
    max_cost: float | None,
    say: Say,
) -> str:
    request = _settled(request)
    if against not in (None, *AGAINST):
        raise UsageError(f"--against {against}: {find.nearest(against, AGAINST)}")
    if max_cost is not None and price is None:
        raise UsageError("--max-cost needs --price, what one machine costs per hour in the same currency")
    space, controls, grid = _check(request)
    trackers.check(config.build(_base(request, space)).resources.trackers, Site.here().runs)
    seconds = _seconds(time_budget)
    with ThreadPoolExecutor(1) as beside:
        preparing = beside.submit(catalogue.open_store, request.data, say)
        if catalogue.is_prepared(request.data):
            fitted(request, space, preparing.result(), grid or controls, lambda text: None)
        with trials.connected(address):  # which takes seconds to come up, in which data are prepared
            store = preparing.result()
            sweep, kept = fitted(request, space, store, controls if grid is None else grid, say)
            _refuse_places(sweep, kept, store)
            controls, grid = {label: kept[label] for label in controls}, None if grid is None else kept
            with Site.here().owned(sweep.folder) as mine:
                if not mine:
                    raise RunError(_taken(sweep.folder.name))
                sweep.save()
                (sweep.folder / "stop").unlink(missing_ok=True)
                Site.here().push(sweep.folder)
                meter = spending.Meter(sweep.folder, price=price, limit=max_cost, machines=trials.machines)
                nested = (
                    None if meter.exhausted else trials.fit(sweep, space, controls, grid, request.trials, seconds, meter, say)
                )
            if address:
                say(spending.idle(meter.now, trials.machines()))
    site = Site.here()
    site.push(sweep.folder)
    site.refresh()  # what other machines have scored
    failed = {arm.label: arm.failed for arm in nested.arms.values() if arm.failed} if nested else {}
    if nested and (failed or nested.impossible):
        with contextlib.suppress(RunError):  # nothing to rank: the reasons say enough
            say(leaderboard(sweep.folder.name, "table", sweep.experiment({}).evaluate.metric, wanted))
        reasons = [f'arm "{label}" failed: {why}' for label, why in failed.items()]
        raise RunError("; ".join([*reasons, *([nested.impossible] if nested.impossible else [])]))
    stages = {stage.id for chain in sweep.chains() for stage in chain.stages}
    left = stages - Site.here().finished()
    if left or (nested and not nested.over):
        to_go = f"{len(left)} of {len(stages)} stages" if sweep.search == "grid" else "the search"
        say(f"stopped with {to_go} to go{_missing(sweep, meter)}")
        if not any(ledger.holds(Site.here().runs, stage) for stage in stages):
            return "no fine-tuning has finished yet"
    answer = leaderboard(sweep.folder.name, "table", sweep.experiment({}).evaluate.metric, wanted)
    chosen = _chosen(sweep, nested) if nested and (sweep.search != "grid" or sweep.confirm) else ""
    front = f"\n{pareto(sweep, against)}" if against else ""
    site.push(sweep.folder)
    return answer + chosen + front


def _taken(name: str) -> str:
    if not Site.here().remote:
        return f"{name} is being run by another process; `medssl status` shows it"
    return (
        f"{name} is being run by another process, on this machine or another; `medssl status` shows it. A machine that died "
        f"lets go after {mirror.EXPIRES:.0f} seconds"
    )


def _chosen(sweep: Sweep, nested: "search.NestedSearch") -> str:
    """What the search chose, by validation scores alone; also left in standings.json."""
    from medssl.platform import race

    found = race.standings(nested.scores(confirmed=True))
    atomic.write_json(sweep.folder / "standings.json", [dataclasses.asdict(standing) for standing in found])
    if not found:
        return ""
    best = found[0]
    stopped = sum(arm.stopped is not None for arm in nested.arms.values())
    fell = bool(nested.confirming) and best.arm not in (nested.confirming or ())
    beside = "; not confirmed itself: the confirmed arms fell behind it on their fresh pretrainings" if fell else ""
    return (
        f"\nchosen   {best.arm}: validation {best.posterior:.3f} by posterior mean ({best.mean:.3f} over its {best.k} "
        f"pretrainings); {len(found)} arms, {stopped} given up early{beside}\n"
    )


def pareto(sweep: Sweep, against: str) -> str:
    """The arms that no other beats in both validation score and cost, as text; all arms are left in pareto.json.

    gpu-hours   measured hours of a pretraining with its fine-tunings, times the workers; hours of cores where no GPU is
    labels      labelled training patients of the fine-tuning
    """
    from medssl.platform import race, statistics

    site, store = Site.here(), Store.open(sweep.store)
    split = catalogue.split(store, sweep.split)
    scores: dict[str, list[float]] = {}
    costs: dict[str, list[float]] = {}
    for chain in sweep.chains():
        done = [site.done(stage.id) for stage in chain.stages]
        ended = [one for one in done if one]
        if len(ended) < len(done):
            continue
        validation = [one["validation"] for one in ended if "validation" in one]
        hours = sum(one["seconds"] for one in ended) / 3600 * chain.experiment.resources.workers
        cost = hours if against == "gpu-hours" else float(len(plan.labelled_patients(chain.experiment, split)))
        scores.setdefault(chain.arm, []).append(sum(validation) / len(validation))
        costs.setdefault(chain.arm, []).append(cost)
    found = [(arm.arm, arm.posterior, sum(costs[arm.arm]) / len(costs[arm.arm])) for arm in race.standings(scores)]
    on = statistics.pareto([score for _, score, _ in found], [cost for *_, cost in found]) if found else []
    points = [
        {"arm": arm, "validation": score, against: cost, "front": front}
        for (arm, score, cost), front in zip(found, on, strict=True)
    ]
    atomic.write_json(sweep.folder / "pareto.json", points)
    lines = [
        f"  {point['arm']:<24} {point['validation']:.3f}  {point[against]:.4g} {against}" for point in points if point["front"]
    ]
    return "\n".join(
        [f"front    validation score (posterior mean) against {against}, arms that no other beats in both", *lines]
    )


def _missing(sweep: Sweep, meter: spending.Meter) -> str:
    """What a sweep that stopped still needs, and how to go on."""
    from medssl.platform import planner

    now = meter.now
    left = planner.to_go(sweep.chains(), Site.here(), now.at_once or 1, now.machines, now.price)
    if meter.exhausted:
        return f"{left}; it has cost {now.money:,.2f} of --max-cost {meter.limit:g}: type it again with more to continue it"
    return f"{left}; type the sweep again to continue it"


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not found:
        raise UsageError(f"--time-budget {text}: expected a number and a unit, as in 90s, 30m, 8h or 2d")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def leaderboard(name: str | None, output: str, metric: str, wanted: float = 0.01, phase: str | None = None) -> str:
    """The answer of a sweep as it stands, in one of the formats; also written into its folder."""
    from medssl.platform import answers

    return answers.answer([name] if name else [], output, metric, wanted, phase=phase)
