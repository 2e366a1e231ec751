"""A sweep: one question, its arms, k pretrainings of each, m fine-tunings of those, and the answer.

Ray Tune runs one function trial per chain (a pretraining with its fine-tunings) in reused actors; a stage of several
workers opens its own worker group from within, so its trial itself holds no CPU, and the number of trials at a time is
what the cluster can serve: nothing can wait for itself. What is finished lies in the stage folders. A sweep's own folder
holds only the question, so that typing it again after any kill finds everything and does what is missing.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from medssl.platform import atomic, catalogue, config, find, ledger, plan, spending, trackers
from medssl.platform.config import Experiment
from medssl.platform.errors import RunError, UsageError
from medssl.platform.plan import Chain
from medssl.platform.site import Site, provenance
from medssl.platform.store import Store

Say = Callable[[str], None]
Settings = Mapping[str, Any]  # dotted


@dataclass(frozen=True)
class Request:
    """What was typed."""

    space: str
    data: str
    k: int
    m: int
    search: str = "grid"
    trials: int = 20
    files: tuple[Path, ...] = ()
    overrides: tuple[str, ...] = ()


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

    def chains(self) -> list[Chain]:
        """Every chain of every arm asked for so far."""
        store = Store.open(self.store)
        split = catalogue.split(store, self.split)
        found = []
        for label, settings in self.arms().items():
            experiment = plan.resolve(self.experiment(settings), store, split)
            found += [plan.chain(label, index, self.m, experiment, store, split) for index in range(self.k)]
        return found


def load_space(name: str) -> ModuleType:
    """A file of search_spaces/, or any Python file by its path."""
    if not name.endswith(".py"):
        return find.load("space", name)
    path = Path(name)
    spec = spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UsageError(f"{name}: no such space file; a name without .py is looked up in search_spaces/")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    for needed in ("QUESTION", "CONTROL", "arms"):
        if not hasattr(module, needed):
            raise UsageError(f"{name}: a space file needs {needed} (search_spaces/__init__.py says how one is written)")
    return module


def layers(data: str, files: tuple[Path, ...], overrides: tuple[str, ...]) -> dict[str, Any]:
    """The settings' tree of a command line: files, then overrides."""
    given = dict(map(config.override, overrides))
    return config.stack([*map(config.read, files), config.nested(given), {"data": {"name": data}}])


def _check(request: Request) -> tuple[ModuleType, dict[str, Settings], dict[str, Settings] | None]:
    """The space, the controls and the grid of a request; every arm is built once, without data, to refuse early."""
    space = load_space(request.space)
    if request.search not in ("grid", "tpe", "gp", "random"):
        raise UsageError(f"--search {request.search}: {find.nearest(request.search, ['grid', 'tpe', 'gp', 'random'])}")
    base = layers(request.data, request.files, request.overrides)
    arms = space.arms()
    if space.CONTROL not in arms:
        raise UsageError(f'{request.space}: its control "{space.CONTROL}" is not among its arms')
    varied = {key for settings in arms.values() for key in settings}
    for name in (config.override(text)[0] for text in request.overrides):
        if name in varied:
            raise UsageError(f"-o {name}: that is what {request.space} varies; leave it out, or write your own space file")
    for label, settings in arms.items():
        try:
            config.build(config.stack([base, config.nested(settings)]))
        except UsageError as error:
            raise UsageError(f'arm "{label}": {error}') from error
    if request.search == "grid":
        return space, {}, arms
    if not hasattr(space, "suggest"):
        raise UsageError(f"{request.space} has no suggest(trial): it can only be searched as a grid")
    controls = getattr(space, "CONTROLS", (space.CONTROL,))
    return space, {label: arms[label] for label in controls}, None


def _refuse_early(request: Request, store: Store, arms: Mapping[str, Settings]) -> Sweep:
    """The sweep on its data. Raises UsageError for an arm that these data cannot give, before anything starts."""
    sweep = _bind(request, load_space(request.space), store)
    for settings in arms.values():
        plan.resolve(sweep.experiment(settings), store, catalogue.split(store, sweep.split))
    return sweep


def _bind(request: Request, space: ModuleType, store: Store) -> Sweep:
    """The sweep of a request in its folder; k and m grow an earlier one with the same name."""
    base = layers(request.data, request.files, request.overrides)
    split = catalogue.split(store, config.build(config.suited(store.defaults, base)).data.split)
    name = Path(request.space).stem.replace("_", "-")
    what = [_decisive(base), store.defaults, store.content_hash, dataclasses.asdict(split), request.search]
    what.append(space.arms() if request.search == "grid" else Path(str(space.__file__)).read_text())
    folder = Site.here().runs / "sweeps" / f"{name}-{store.name}-{config.digest(what)[:6]}"
    k, m = request.k, request.m
    if (folder / "sweep.json").exists():
        earlier = Sweep.open(folder)
        k, m = max(k, earlier.k), max(m, earlier.m)
    return Sweep(
        name, space.QUESTION, space.CONTROL, request.search, base, store.defaults, k, m, store.root, split.name, folder
    )


def _decisive(base: Mapping[str, Any]) -> dict[str, Any]:
    """The tree without the resources that only move work around: with others of those, it is the same sweep."""
    workers = (base.get("resources") or {}).get("workers", 1)
    kept = {section: value for section, value in base.items() if section != "resources"}
    return kept if workers == 1 else kept | {"resources": {"workers": workers}}


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
    space, controls, grid = _check(request)
    store = catalogue.open_store(request.data, say=say)
    sweep = _bind(request, space, store)
    split = catalogue.split(store, sweep.split)
    arms = {label: plan.resolve(sweep.experiment(settings), store, split) for label, settings in (grid or controls).items()}
    text = plan.describe(arms, sweep.k, sweep.m, store, split, Site.here().finished())
    chains = [plan.chain(label, n, sweep.m, one, store, split) for label, one in arms.items() for n in range(sweep.k)]
    if grid is None:
        text += f"\nsearch   {request.search}: up to {request.trials} more arms, losing ones stopped after a pretraining"
        searched = plan.resolve(sweep.experiment({}), store, split)  # as many chains, of indices that no arm has
        more = range(sweep.k, sweep.k * (1 + request.trials))
        chains += [plan.chain("searched", index, sweep.m, searched, store, split) for index in more]
    text += _outlook(sweep, chains, len(arms) - 1, say, address=address, price=price, wanted=wanted, calibrate=calibrate)
    return f"{space.QUESTION}\n{text}\nsmallest p that {sweep.k} pretrainings per arm can give: {smallest_p(sweep.k):.3g}"


def _outlook(
    sweep: Sweep,
    chains: list[Chain],
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
        with connected(address):
            hands = planner.cluster()
    else:
        hands = planner.this_machine()
    at_once = _share(base.resources, hands.resources)[1]
    found = planner.noise(site, store, split, base.evaluate.metric)
    lines = planner.describe(chains, site, hands, at_once, planner.Paces(site, measured), price)
    lines += planner.power(found, sweep.k, sweep.m, max(comparisons, 1), wanted)
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
    price: float | None = None,
    max_cost: float | None = None,
    say: Say,
) -> str:
    """Do what is missing of a sweep and answer with its leaderboard."""
    if max_cost is not None and price is None:
        raise UsageError("--max-cost needs --price, what one machine costs per hour in the same currency")
    space, controls, grid = _check(request)
    trackers.check(config.build(layers(request.data, request.files, request.overrides)).resources.trackers, Site.here().runs)
    seconds = _seconds(time_budget)
    with ThreadPoolExecutor(1) as beside:
        preparing = beside.submit(catalogue.open_store, request.data, say)
        if catalogue.is_prepared(request.data):
            _refuse_early(request, preparing.result(), grid or controls)
        with connected(address):  # which takes seconds to come up, in which data are prepared
            store = preparing.result()
            sweep = _refuse_early(request, store, grid or controls)
            with atomic.owned(sweep.folder) as mine:
                if not mine:
                    raise RunError(f"{sweep.folder.name} is being run by another process; `medssl status` shows it")
                sweep.save()
                (sweep.folder / "stop").unlink(missing_ok=True)
                meter = spending.Meter(sweep.folder, price=price, limit=max_cost, machines=_machines)
                failed: dict[str, str] = {}
                if not meter.exhausted:
                    failed = _fit(sweep, controls, grid, getattr(space, "suggest", None), request.trials, seconds, meter, say)
    if failed:
        with contextlib.suppress(RunError):  # nothing to rank: the reasons say enough
            say(leaderboard(sweep.folder.name, "table", sweep.experiment({}).evaluate.metric, wanted))
        raise RunError("; ".join(f'arm "{label}" failed: {why}' for label, why in failed.items()))
    stages = {stage.id for chain in sweep.chains() for stage in chain.stages}
    left = stages - Site.here().finished()
    if left and (sweep.search == "grid" or meter.exhausted):  # a search leaves repeats of losing arms out on purpose
        say(f"stopped with {len(left)} of {len(stages)} stages to go{_missing(sweep, meter)}")
        if not any(ledger.holds(Site.here().runs, stage) for stage in stages):
            return "no fine-tuning has finished yet"
    return leaderboard(sweep.folder.name, "table", sweep.experiment({}).evaluate.metric, wanted)


def _missing(sweep: Sweep, meter: spending.Meter) -> str:
    """What a sweep that stopped still needs, and how to go on."""
    from medssl.platform import planner

    now = meter.now
    left = planner.to_go(sweep.chains(), Site.here(), now.at_once or 1, now.machines, now.price)
    if meter.exhausted:
        return f"{left}; it has cost {now.money:,.2f} of --max-cost {meter.limit:g}: type it again with more to continue it"
    return f"{left}; type the sweep again to continue it"


def _machines() -> int:
    import ray

    return sum(node["Alive"] for node in ray.nodes())


def _fit(
    sweep: Sweep,
    controls: Mapping[str, Settings],
    grid: Mapping[str, Settings] | None,
    suggest: Any,
    trials: int,
    seconds: float | None,
    meter: spending.Meter,
    say: Say,
) -> dict[str, str]:
    """Let Ray Tune run every missing chain; returns the arms that failed, with their reasons."""
    import ray
    from ray import tune

    from medssl.platform import search, watch

    logging.getLogger("ray").setLevel(logging.ERROR)
    resources = sweep.experiment({}).resources
    arms = dict(sweep.arms()) | {label: dict(settings) for label, settings in (grid or controls).items()}

    def record(arm: search.Arm) -> None:
        arms[arm.label] = dict(arm.settings)
        atomic.write_json(sweep.folder / "arms.json", arms)

    atomic.write_json(sweep.folder / "arms.json", arms)
    study = search.open_study(sweep.folder, cast(search.Kind, sweep.search), seed=sweep.experiment({}).seed)
    nested = search.NestedSearch(study, controls, grid, suggest, k=sweep.k, trials=trials, record=record)
    share, at_once = _share(resources, ray.cluster_resources())
    meter.places(at_once)
    shared = ray.remote(num_cpus=1)(_arrays).remote(sweep.store, sweep.split)
    trainable = tune.with_resources(tune.with_parameters(_trial, sweep=sweep, shared=[shared]), share)
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=nested, num_samples=-1, reuse_actors=True, max_concurrent_trials=at_once, time_budget_s=seconds
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(sweep.folder),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=resources.retries),
        ),
    )
    with watch.Watcher(Site.here(), sweep.folder, say, meter):
        tuner.fit()
    return {arm.label: arm.failed for arm in nested.arms.values() if arm.failed}


def _trial(settings: dict[str, Any], sweep: Sweep, shared: list[Any]) -> None:
    """One chain, in a Tune actor that has run others before and will run more: it leaves nothing behind in the process."""
    import gc

    import ray
    import torch
    from ray import tune

    from medssl.platform import stages

    store = Store.open(sweep.store)
    split = catalogue.split(store, sweep.split)
    try:
        experiment = plan.resolve(sweep.experiment(settings["settings"]), store, split)
        chain = plan.chain(settings["arm"], settings["index"], sweep.m, experiment, store, split)
        site = Site(data=sweep.store.parent, runs=sweep.folder.parent.parent)
        work = stages.Work(site, sweep.store, split, ray.get(shared[0]), sweep.folder.name)
        stages.run_chain(chain, work, lambda scores: tune.report({"score": sum(scores) / len(scores), "failed": ""}))
    except (UsageError, RunError, ValueError) as error:  # the same would happen again: no retry
        tune.report({"score": float("nan"), "failed": str(error)})
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _arrays(store: Path, split: str) -> dict[str, Any] | None:
    """The node's shared copy of the slices, read in a worker; None when the set is too large and must be streamed."""
    from medssl.platform import stream

    opened = Store.open(store)
    parts = catalogue.split(opened, split)
    if not stream.fits(opened):
        return None
    return {part: stream.Slices.read(opened, patients=getattr(parts, part)).arrays() for part in ("train", "val", "test")}


def _share(resources: config.Resources, cluster: Mapping[str, float]) -> tuple[dict[str, float], int]:
    """What one trial holds, and how many may run at a time so that the worker groups of all of them find their place."""
    gpus = resources.gpus if resources.gpus is not None else float(cluster.get("GPU", 0) >= 1)
    need = {"CPU": float(resources.cpus * resources.workers), "GPU": gpus * resources.workers}
    at_once = min(int(cluster.get(kind, 0) // amount) for kind, amount in need.items() if amount)
    if at_once < 1:
        wanted = " and ".join(f"{amount:g} {kind}" for kind, amount in need.items() if amount)
        raise UsageError(
            f"a stage needs {wanted}, the cluster has {cluster.get('CPU', 0):g} CPU and {cluster.get('GPU', 0):g} GPU"
        )
    # Tune refuses a trial that asks for nothing; a mebibyte of memory is next to nothing, and no core of the workers'
    return (need if resources.workers == 1 else {"CPU": 0.0, "memory": float(2**20)}), at_once


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Ray, up while the body runs; one that was up before stays.

    To be entered by the main thread: the kernel ends Ray's processes when the thread that started them ends.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RunError(f"Ray did not start ({address or 'on this machine'}): {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not found:
        raise UsageError(f"--time-budget {text}: expected a number and a unit, as in 90s, 30m, 8h or 2d")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def leaderboard(name: str | None, output: str, metric: str, wanted: float = 0.01) -> str:
    """The answer of a sweep as it stands, in one of the formats; also written into its folder."""
    from medssl.platform import leaderboard as board
    from medssl.platform.records import Run

    site = Site.here()
    sweep = Sweep.open(site.find_sweep(name))
    owners = {
        stage.id: (chain.arm, chain.index, number) for chain in sweep.chains() for number, stage in enumerate(chain.finetunings)
    }
    scored = [stage for stage in owners if ledger.holds(site.runs, stage)]
    if not scored:
        raise RunError(f"{sweep.folder.name}: no fine-tuning has finished yet")
    table = ledger.read(site.runs, scored)
    by_patient = ledger.by_patient(table, metric, "test")
    if not by_patient:
        raise UsageError(f'no metric "{metric}"; {find.nearest(metric, table["metric"].unique().to_pylist())}')
    runs = [Run(*owner, by_patient.get(stage, {})) for stage, owner in owners.items()]  # empty: not finished, and counted
    ranked = board.rank(runs, sweep.control, metric=metric, wanted=wanted)
    for kind in ("md", "csv", "json"):
        atomic.write_text(sweep.folder / f"leaderboard.{kind}", board.render(ranked, kind))
    return board.render(ranked, output)
