"""What Ray does of a sweep: it comes up, gives each missing chain to a trial, and shares the slices among them.

Ray Tune runs one function trial per chain (a pretraining with its fine-tunings) in reused actors; a stage of several
workers opens its own worker group from within, so its trial itself holds no CPU, and the number of trials at a time is
what the cluster can serve: nothing can wait for itself.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from medssl.platform import atomic, catalogue, config, places, plan, spending
from medssl.platform.errors import RunError, UsageError
from medssl.platform.site import Site
from medssl.platform.store import Store

if TYPE_CHECKING:
    from medssl.platform import search
    from medssl.platform.sweep import Say, Settings, Sweep

PATIENCE = 60.0  # seconds that a trial waits for the slices which its node shares, before it reads them itself


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
    except Exception as error:  # Ray raises bare ones, too, as when the machine is too busy to start it in time
        raise RunError(f"Ray did not start ({address or 'on this machine'}): {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def machines() -> int:
    """Nodes of the cluster that are up."""
    import ray

    return sum(node["Alive"] for node in ray.nodes())


def fit(
    sweep: "Sweep",
    space: ModuleType,
    controls: "Mapping[str, Settings]",
    grid: "Mapping[str, Settings] | None",
    trials: int,
    seconds: float | None,
    meter: spending.Meter,
    say: "Say",
) -> "search.NestedSearch":
    """Let Ray Tune run every missing chain; returns the searcher, which knows what became of each arm."""
    import ray
    from ray import tune

    from medssl.platform import search, train, watch

    logging.getLogger("ray").setLevel(logging.ERROR)
    shared_by_all = sweep.experiment({})
    resources = shared_by_all.resources
    arms = dict(sweep.arms()) | {label: dict(settings) for label, settings in (grid or controls).items()}
    atomic.write_json(sweep.folder / "arms.json", arms)
    repeats = sweep.repeats()

    def record(arm: search.Arm, index: int) -> None:
        if arms.get(arm.label) != dict(arm.settings):
            arms[arm.label] = dict(arm.settings)
            atomic.write_json(sweep.folder / "arms.json", arms, durable=False)
        phase = "confirm" if index >= search.CONFIRM else "search"
        if sweep.search == "grid" and phase == "search":
            return  # all k of them, known from the start
        asked = repeats.setdefault(arm.label, {}).setdefault(phase, [])
        if index not in asked:
            asked.append(index)
            atomic.write_json(sweep.folder / "repeats.json", repeats, durable=False)
            site.push(sweep.folder)

    site = Site.here()
    store = Store.open(sweep.store)
    split = catalogue.split(store, sweep.split)
    nested = search.NestedSearch(
        search.open_study(sweep.folder, cast(search.Kind, sweep.search), seed=shared_by_all.seed),
        controls,
        grid,
        getattr(space, "suggest", None),
        kind=cast(search.Kind, sweep.search),
        k=sweep.k,
        trials=trials,
        record=record,
        confirm=sweep.confirm,
        refuse=lambda settings: plan.resolve(sweep.experiment(settings), store, split),
    )
    # a grid need not hold the shared settings as they are, nor do they need to suit the data
    pretrain = plan.resolve(shared_by_all, store, split).pretrain if sweep.search != "grid" else None
    probing = pretrain is not None and getattr(pretrain.training, "probes", 0) > 0
    share, at_once = places.share(resources, places.machines())
    meter.places(at_once)
    if resources.elastic:
        train.count_places_here()
    shared = _copy(sweep.store, sweep.split)
    if places.planned():  # trials would take every core that comes up, and wait `PATIENCE` for a copy that needs one
        ray.wait([shared], fetch_local=False)
    trainable = tune.with_resources(
        tune.with_parameters(_trial, sweep=sweep, shared=[shared], remote=Site.here().remote), share
    )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=nested,
            scheduler=search.Lagging(nested, grace=_steps(pretrain) // 4) if probing else None,
            num_samples=-1,
            reuse_actors=True,
            max_concurrent_trials=at_once,
            time_budget_s=seconds,
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
    for arm in nested.arms.values():  # a pretraining that was stopped on its way is not waited for
        if arm.stopped:
            repeats.setdefault(arm.label, {})["search"] = [index for index in sorted(arm.scores) if index < search.CONFIRM]
    atomic.write_json(sweep.folder / "repeats.json", repeats)
    return nested


def _steps(part: config.Part | None) -> int:
    """Steps of a resolved part."""
    assert part is not None
    assert part.training is not None
    assert part.training.steps is not None
    return part.training.steps


def _trial(settings: dict[str, Any], sweep: "Sweep", shared: list[Any], remote: str | None = None) -> None:
    """One chain, in a Tune actor that has run others before and will run more: it leaves nothing behind in the process."""
    import gc

    import torch
    from ray import tune

    from medssl.platform import stages

    if not gc.get_freeze_count():
        gc.freeze()  # what was imported stays: the collection below need not walk over torch after every chain
    store = Store.open(sweep.store)
    split = catalogue.split(store, sweep.split)
    try:
        experiment = plan.resolve(sweep.experiment(settings["settings"]), store, split)
        chain = plan.chain(settings["arm"], settings["index"], sweep.m, experiment, store, split)
        site = Site(sweep.store.parent, sweep.folder.parent.parent, remote)
        work = stages.Work(site, sweep.store, split, _shared(shared[0]), sweep.folder.name)

        def tell(scores: list[float]) -> None:
            report = {"score": sum(scores) / len(scores), "failed": "", "complete": len(scores) == len(chain.finetunings)}
            tune.report(report)

        def probe(step: int, score: float) -> None:  # where the searcher stops the chain, this does not return
            tune.report({"step": step, "probe": score, "score": float("nan"), "failed": "", "complete": False})

        training = experiment.pretrain.training if experiment.pretrain else None
        stages.run_chain(chain, work, tell, **({"probe": probe} if getattr(training, "probes", 0) else {}))
    except (UsageError, RunError, ValueError) as error:  # the same would happen again: no retry
        tune.report({"score": float("nan"), "failed": str(error), "complete": False})
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _copy(store: Path, split: str) -> Any:
    """The shared copy, as a reference. It is made once: to make it again takes a core, and trials may hold them all."""
    import ray

    return ray.remote(num_cpus=1, max_retries=0)(_arrays).remote(store, split)


def _shared(copy: Any) -> Any:
    """The shared copy; None, so that stages read the store themselves, where it died with its node or has not come yet."""
    import ray

    lost = (ray.exceptions.ObjectLostError, ray.exceptions.NodeDiedError, ray.exceptions.WorkerCrashedError)
    try:
        return ray.get(copy, timeout=PATIENCE)
    except (ray.exceptions.GetTimeoutError, *lost):
        return None


def _arrays(store: Path, split: str) -> dict[str, Any] | None:
    """The node's shared copy of the slices, read in a worker; None when the set is too large and must be streamed."""
    from medssl.platform import stream

    opened = Store.open(store)
    parts = catalogue.split(opened, split)
    if not stream.fits(opened):
        return None
    return {part: stream.Slices.read(opened, patients=getattr(parts, part)).arrays() for part in ("train", "val", "test")}
