"""A stage from start to end: a pretraining, or a fine-tuning with its scores. A finished stage is a look-up.

Every process that needs a stage calls `fulfil`: it finds the stage done, or waits for the process that is at it, or does
it, continuing from the last checkpoint. Whatever dies, the next call goes on.
"""

import copy
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from medssl.methods import uafs
from medssl.methods.protocol import Batch, Method
from medssl.platform import (
    atomic,
    checkpoint,
    evaluate,
    find,
    ledger,
    logs,
    loop,
    metrics,
    partitions,
    plan,
    probe,
    stream,
    trackers,
    train,
    weights,
)
from medssl.platform import mirror as mirroring
from medssl.platform.board import Board
from medssl.platform.config import Experiment, Part
from medssl.platform.errors import RunError, UsageError
from medssl.platform.plan import Chain, Stage, contract, labelled_patients, probed_patients
from medssl.platform.records import Part as DataPart
from medssl.platform.records import Score, Volume
from medssl.platform.site import Progress, Site, provenance, spent
from medssl.platform.splits import Split
from medssl.platform.store import Store
from medssl.platform.volumes import Volumes

Arrays = Mapping[str, Mapping[str, np.ndarray]]  # of each part of the split: what `Slices.arrays` gives
Hear = Callable[[int, float], None]  # told a step and the Dice of a probe there
Look = Callable[[int], Mapping[str, float]]  # looks at what is trained after a step; gives numbers to show


@dataclass(frozen=True)
class Work:
    """Where a chain finds its data and leaves its results; plain, so that it travels to any process."""

    site: Site
    store: Path
    split: Split
    arrays: Arrays | None = None  # the node's shared copy; None: read from the store
    sweep: str = ""  # that asked for the chain first; trackers group by it

    def slices(self, part: DataPart, patients: Iterable[str] | None = None) -> stream.Slices:
        """All slices of a part of the split, or of some of its patients, in memory."""
        wanted = getattr(self.split, part) if patients is None else patients
        if self.arrays is not None:
            return stream.Slices.from_arrays(self.arrays[part]).select(wanted)
        return stream.Slices.read(Store.open(self.store), patients=wanted)


@dataclass(frozen=True)
class Job:
    """One stage, as each of its worker processes is told it."""

    chain: Chain
    stage: Stage
    work: Work
    runs: trackers.Runs = dataclasses.field(default_factory=trackers.Runs)  # where rank 0 also tells its scalars

    @property
    def folder(self) -> Path:
        return self.work.site.stage(self.stage.id)

    @property
    def experiment(self) -> Experiment:
        """The settings as they would be typed for this stage alone: a further pretraining is one that was given weights."""
        seen = self.stage.seen(self.chain.experiment)
        if not self.stage.further or self.stage.parent is None:
            return seen
        weights = str(self.work.site.stage(self.stage.parent))
        return dataclasses.replace(seen, start=dataclasses.replace(seen.start, weights=weights, partial=False))


def run_chain(
    chain: Chain,
    work: Work,
    tell: Callable[[list[float]], None] = lambda scores: None,
    probe: Hear = lambda step, dice: None,
) -> list[float]:
    """Fulfil a chain's pretrainings and fine-tunings; `tell` hears the validation scores after each. Returns all of them.

    probe   hears (step, Dice) of every probe of the first pretraining, once each and in order: while it runs, if it runs in
            this process, else when it is done. What it raises ends the chain; a pretraining goes on from its last checkpoint
    """
    if chain.pretraining:
        told: set[int] = set()

        def hear(step: int, dice: float) -> None:
            if step not in told:
                told.add(step)
                probe(step, dice)

        for reading in fulfil(Job(chain, chain.pretraining, work), hear).get("probe", []):
            hear(reading["step"], reading["dice"])
    if chain.further:
        fulfil(Job(chain, chain.further, work))
    scores: list[float] = []
    for stage in chain.finetunings:
        scores.append(fulfil(Job(chain, stage, work))["validation"])
        tell(scores)
    return scores


def fulfil(job: Job, hear: Hear = lambda step, dice: None) -> dict[str, Any]:
    """What the finished stage left in done.json, doing the stage first if need be.

    hear   told (step, Dice) of each probe, if this very process does a pretraining
    """
    while True:
        with atomic.owned(job.folder) as mine:
            if done := job.work.site.done(job.stage.id):
                if mine:
                    job.work.site.bring(job.stage.id)
                if (job.folder / "done.json").exists():  # else another process is bringing it
                    return done
            if mine:
                job.work.site.bring(job.stage.id)
                with logs.written(job.folder):
                    return _do(job, hear)
        time.sleep(0.5)  # another process is at it


def _do(job: Job, hear: Hear) -> dict[str, Any]:
    experiment, stage = job.experiment, job.stage
    begun = time.time() - spent(job.folder)  # a stage that was killed has cost what it has cost
    record = {"kind": stage.kind, "stage": stage.id, "seed": stage.seed, "steps": stage.steps, "parent": stage.parent}
    record |= {"arm": job.chain.arm, "pretraining": job.chain.index, "encoder_seed": job.chain.encoder_seed}
    record |= {"store": str(job.work.store), "split": job.work.split.name, "config": experiment.tree()}
    if stage.kind == "finetune" and experiment.data.labelled_slices:
        record["labelled_slices"] = plan.labelled_slices(experiment, Store.open(job.work.store), job.work.split)
    resources = experiment.resources
    gpu = bool(resources.gpus) if resources.gpus is not None else torch.cuda.is_available()
    here = torch.cuda.is_available()  # not where workers of their own will have it
    record |= {"device": (torch.cuda.get_device_name() if here else "gpu") if gpu else "cpu"}
    atomic.write_json(job.folder / "run.json", record | {"provenance": provenance()})
    begins = "continues" if (job.folder / "checkpoint.pt").exists() else "begins"
    logs.LOGGER.info("%s %s: %d steps, seed %d, on %s", stage.id, begins, stage.steps, stage.seed, record["device"])
    alone = resources.workers == 1  # several workers read the store themselves: cheaper than sending them copies
    result = train.launch(
        functools.partial(_tracked, hear=hear) if alone else _tracked,
        job if alone else dataclasses.replace(job, work=dataclasses.replace(job.work, arrays=None)),
        workers=resources.workers,
        gpu=gpu,
        folder=job.folder,
        name="workers",
        cpus_per_worker=resources.cpus,
    )
    done = {**result, "seconds": round(time.time() - begun, 2)}
    logs.LOGGER.info("%s ended: %s after %.0f seconds", stage.id, done.get("status"), done["seconds"])
    atomic.write_json(job.folder / "done.json", done)
    (job.folder / "checkpoint.pt").unlink(missing_ok=True)  # nothing is left to continue; the weights lie beside it
    if mirror := job.work.site.mirror:
        mirror.finish(job.stage.id)
    return done


def _tracked(job: Job, rank: int, world: int, device: torch.device, hear: Hear = lambda step, dice: None) -> dict[str, Any]:
    """One worker of a stage; its scalars and its end also go to the trackers asked for."""
    names = job.chain.experiment.resources.trackers if rank == 0 else ()
    if world > 1:
        job.work.site.bring(job.stage.id)  # workers on other machines than the last ones; also what fine-tuning starts from
        if job.stage.parent:
            job.work.site.bring(job.stage.parent)
    with trackers.opened(names, job.folder, job.work.sweep, job.work.site.runs) as runs:
        told = dataclasses.replace(job, runs=runs)
        pretrains = job.stage.kind == "pretrain"
        done = _pretrain(told, rank, world, device, hear) if pretrains else _finetune(told, rank, world, device)
        runs.end(done)
    if world > 1 and rank == 0 and (mirror := job.work.site.mirror):
        mirror.keep(job.stage.id)  # the process that finishes the stage may be on another machine
    return done | ({"untracked": runs.lost} if runs.lost else {})


def network(experiment: Experiment, channels: int, classes: int) -> Any:
    """The segmentation network of an experiment, freshly initialised from torch's global generator."""
    part = experiment.network
    return find.load("network", part.name).NETWORK(channels, classes, part.settings)


def selective(model: Any, experiment: Experiment) -> Any:
    """The network as fine-tuning trains it and leaves it: `model`, with UAFS where its settings say so, freshly initialised."""
    wanted = experiment.finetune.uafs
    return uafs.insert(model, wanted) if wanted else model


def check(experiment: Experiment, store: Store) -> None:
    """Raises UsageError where UAFS or hooks name what the network does not have; tried on tensors without values."""
    if not experiment.hooks and not experiment.finetune.uafs:
        return
    try:
        with torch.device("meta"):
            model = selective(network(experiment, store.channels, len(store.classes)), experiment)
            for hook in experiment.hooks:
                find.load("hook", hook.name).HOOK(model, hook.settings)
    except ValueError as error:
        raise UsageError(str(error)) from error


def hands_on(part: Part) -> str:
    """What of a network a pretraining trains and hands on, as its file's TRANSFERS says: "encoder" or "encoder+decoder"."""
    said: str = find.constant("method", part.name, "TRANSFERS", "encoder")
    return said


def trained(part: Part, whole: Any) -> Any:
    """What a method is built around: the network, or its encoder alone."""
    if part.name == "segment" or hands_on(part) != "encoder":
        return whole
    return whole.encoder


def _pretrain(job: Job, rank: int, world: int, device: torch.device, hear: Hear = lambda step, dice: None) -> dict[str, Any]:
    """One worker of a pretraining. Rank 0 leaves the encoder, trained blocks of a decoder, their card, and what probes saw."""
    experiment, store = job.experiment, Store.open(job.work.store)
    part = experiment.pretrain
    assert part is not None
    torch.set_num_threads(experiment.resources.cpus)
    torch.manual_seed(job.chain.encoder_seed)
    whole = network(experiment, store.channels, len(store.classes))
    found = plan.origin(experiment.start)
    before = [weights.begin_network(whole, found.file, partial=experiment.start.partial)[0].chain] if found else []
    probed = copy.deepcopy(whole.encoder)
    method = find.load("method", part.name).METHOD(trained(part, whole), part.settings)
    batches = _batches(job, part, job.work.split.train, None, rank, world, device)
    assert part.training is not None
    readings: list[dict[str, float]] = []
    look: Look | None = None  # rank 0's
    looks = loop.evenly(job.stage.steps, part.training.probes)  # of all workers, who meet there
    if looks:
        looks.add(0)
        if rank == 0:
            readings, look = _probing(job, method, probed.to(device).eval(), hear)

    def card(step: int) -> dict[str, Any]:
        about = {"method": part.name, "network": experiment.network.name, "channels": store.channels, "data": store.name}
        chain = " -> ".join([*before, f"{part.name}:{store.name}@{step}"])
        return about | {"steps": step, "config": experiment.tree(), "start": found.identity if found else None, "chain": chain}

    def keep(step: int) -> None:  # once more, and bit for bit the same, where a kill came before the step was saved
        file = job.folder / f"encoder@{step}.pt"
        checkpoint.save(file, weights.handed_on(method.transferable_state(), hands_on(part)) | {"card": card(step)})

    outcome = _train(job, method, part, batches, rank, world, device, looks, look, keep)
    end = card(outcome.step)
    if rank == 0:
        given = weights.handed_on(method.transferable_state(), hands_on(part))
        checkpoint.save(job.folder / "encoder.pt", given | {"card": end})
    done = {"status": outcome.status, "step": outcome.step, "losses": outcome.losses, "monitors": outcome.monitors}
    return done | {"chain": end["chain"]} | ({"probe": readings} if readings else {})


def _probing(job: Job, method: Method, encoder: Any, hear: Hear) -> tuple[list[dict[str, float]], Look]:
    """The probes of a pretraining so far, and the function that looks and adds one.

    What is probed is what fine-tuning would receive, in an `encoder` of its own: the method is only read.
    """
    work, file, part = job.work, job.folder / "probe.json", job.experiment.pretrain
    assert part is not None
    classes = Store.open(work.store).classes
    learnt_from, asked = probed_patients(work.split)
    side = part.settings.side if job.experiment.spatial_dims == 3 else None
    reference = probe.thinned(work.slices("train", learnt_from).volumes(), side)
    validation = probe.thinned(work.slices("val", asked).volumes(), side)
    readings: list[dict[str, float]] = json.loads(file.read_text()) if file.exists() else []
    for reading in readings:  # of the process that this one continues
        hear(int(reading["step"]), reading["dice"])

    def look(step: int) -> dict[str, float]:
        encoder.load_state_dict(weights.handed_on(method.transferable_state(), hands_on(part))["encoder"])
        seen = dataclasses.asdict(probe.look(encoder, reference, validation, classes))
        readings[:] = [reading for reading in readings if reading["step"] < step] + [{"step": step, **seen}]
        atomic.write_json(file, readings)
        hear(step, seen["dice"])
        return {f"probe/{name}": value for name, value in seen.items()}

    return readings, look


def _finetune(job: Job, rank: int, world: int, device: torch.device) -> dict[str, Any]:
    """One worker of a fine-tuning. Rank 0 looks at the validation patients, keeps the best, and scores it on the test once."""
    experiment, store, split = job.chain.experiment, Store.open(job.work.store), job.work.split
    part = experiment.finetune
    torch.set_num_threads(experiment.resources.cpus)
    model, before = _start(job, store)
    model = selective(model, experiment)
    method, batches = _segmenting(job, model, rank, world, device)
    model = method.predictor  # the network itself, or a hook's teacher
    best = job.folder / "best.pt"
    validation = list(job.work.slices("val").volumes()) if rank == 0 else []

    def look(step: int) -> dict[str, float]:
        score = _mean(_scores(model, validation, store, experiment, "val", surface=False), experiment)
        if not best.exists() or score > checkpoint.load(best)["validation"]:
            checkpoint.save(best, {"network": model.state_dict(), "validation": score, "step": step, "chain": chain})
        return {"validation": score}

    chain = " -> ".join([*before, f"{part.name}:{store.name}"])
    assert part.training is not None
    looks = loop.evenly(job.stage.steps, part.training.evaluations)
    outcome = _train(job, method, part, batches, rank, world, device, looks, look)
    if rank:
        return {}
    kept = checkpoint.load(best, device)
    model.load_state_dict(kept["network"])
    test = list(job.work.slices("test").volumes())
    if ledger.holds(job.work.site.runs, job.stage.id):  # killed after the test was scored: it is scored once
        scores = ledger.scores(job.work.site.runs, job.stage.id)
    else:
        scores = _scores(model, test, store, experiment, "test", surface=True)
        scores += _scores(model, validation, store, experiment, "val", surface=False)
        ledger.write(job.work.site.runs, job.stage.id, contract(store, split), scores)
    with Board(job.folder) as board:
        board.prediction(test[0], evaluate.infer(model, test[0], **inference(experiment), device=device))  # as it was scored
    return {
        "status": outcome.status,
        "step": kept["step"],
        "validation": kept["validation"],
        "test": _mean([score for score in scores if score.part == "test"], experiment),
        "losses": outcome.losses,
        "chain": kept["chain"],
    }


def _segmenting(
    job: Job, model: nn.Module, rank: int, world: int, device: torch.device
) -> tuple[Any, Callable[[int], Iterable[Batch]]]:
    """What a fine-tuning trains, hooks included, and its batches: labelled slices, and for hooks that ask unlabelled ones."""
    experiment, split = job.chain.experiment, job.work.split
    part, unlabelled = experiment.finetune, experiment.unlabelled
    batches = _batches(job, part, labelled_patients(experiment, split), True, rank, world, device)
    if not experiment.hooks:
        return find.load("method", part.name).METHOD(model, part.settings), batches
    hooks = {hook.name: find.load("hook", hook.name).HOOK(model, hook.settings) for hook in experiment.hooks}
    method = find.load("method", part.name).METHOD(model, part.settings, hooks, unlabelled)
    if unlabelled is None:
        return method, batches
    assert part.training is not None
    assert unlabelled.batch is not None
    feed = dataclasses.replace(part, training=dataclasses.replace(part.training, batch=unlabelled.batch, accumulate=1))
    others = _batches(job, feed, plan.unlabelled_patients(experiment, split), None, rank, world, device)
    return method, lambda start: stream.beside(batches(start), others(start))


def _start(job: Job, store: Store) -> tuple[Any, list[str]]:
    """The network that a fine-tuning starts from, and how its encoder came to be.

    The encoder is that of the last pretraining, at its end or a snapshot, or the given one, or as it was before the first step;
    with it come the blocks of the decoder that were pretrained, if any were.

    So the arm from scratch is a pretraining of zero steps: at one index all arms begin with equal encoders, and what is
    fresh in the decoder depends on the fine-tuning's seed alone.
    """
    torch.manual_seed(job.chain.encoder_seed)
    initial = network(job.chain.experiment, store.channels, len(store.classes)).encoder.state_dict()
    torch.manual_seed(job.stage.seed)
    model = network(job.chain.experiment, store.channels, len(store.classes))
    checkpoint.transfer(initial, model.encoder)
    start, own = job.chain.experiment.start, job.chain.further or job.chain.pretraining
    found = plan.origin(start)
    file = job.work.site.stage(own.id) / "encoder.pt" if own else found.file if found else None
    if file is None:
        return model, []
    if start.step is not None:
        file = file.with_name(f"encoder@{start.step}.pt")
        if not file.exists():
            raise RunError(f"{file}: the pretraining ended before this snapshot; choose an earlier start.step")
    given, _ = weights.begin_network(model, file, partial=start.partial and own is None)
    return model, [given.chain]


def _batches(
    job: Job, part: Part, patients: Iterable[str], labelled: bool | None, rank: int, world: int, device: torch.device
) -> Callable[[int], Iterable[Batch]]:
    """This worker's batches from a step on: out of the node's memory, or streamed by Ray Data where the set does not fit."""
    assert part.training is not None
    size, seed, wanted = part.training.batch, job.stage.seed, tuple(patients)
    store, choice = Store.open(job.work.store), job.chain.experiment.data.stream
    few = plan.labelled_slices(job.chain.experiment, store, job.work.split) if labelled else None
    if few is not None:
        there = job.work.slices("train") if job.work.arrays is not None else stream.Slices.read(store, wanted, True)
        here = there.only(few).to(device)
        return lambda start: stream.node_batches(here, size, seed=seed, start=start, rank=rank, world=world)
    solid = job.chain.experiment.spatial_dims == 3
    fits = choice != "auto" or stream.fits(store, wanted, labelled)
    if solid and not fits:
        raise RunError(
            f"{store.root}: these volumes would take more than a quarter of the memory, and are not streamed from disk in 3D; "
            "use fewer patients, prepare the data at a coarser spacing, or set data.stream=node to hold them all the same"
        )
    if not fits and plan.composed(part):
        raise RunError(
            f"{store.root}: these slices would take more than a quarter of the memory, and batches of volumes x partitions are "
            "not streamed from disk; use fewer patients, set strategy=random, or data.stream=node to hold them all the same"
        )
    if choice == "ray" or not fits:
        return lambda start: stream.ray_batches(
            store, wanted, labelled, size, seed=seed, start=start, rank=rank, world=world, device=device
        )
    slices = job.work.slices("train").select(wanted, labelled)
    afar = device.type == "cuda" and slices.nbytes > torch.cuda.mem_get_info(device)[0] / 2  # leave the other half to training
    near = slices if afar else slices.to(device)
    held: stream.Held = Volumes.of(near, least=getattr(part.settings, "side", None) or 1) if solid else near
    if parts := 0 if solid or labelled else plan.composed(part):
        volume, position = slices.volume.numpy(), slices.position.numpy()
        return lambda start: (
            {name: values.to(device, non_blocking=True) for name, values in batch.items()}  # no copy where it is already
            for batch in map(
                held.take,
                partitions.indices(
                    volume, position, volumes=size // parts, partitions=parts, seed=seed, start=start, rank=rank, world=world
                ),
            )
        )
    if afar:
        return lambda start: (
            {name: values.to(device, non_blocking=True) for name, values in batch.items()}
            for batch in stream.node_batches(held, size, seed=seed, start=start, rank=rank, world=world)
        )
    return lambda start: stream.node_batches(held, size, seed=seed, start=start, rank=rank, world=world)


def _train(
    job: Job,
    method: Method,
    part: Part,
    batches: Callable[[int], Iterable[Batch]],
    rank: int,
    world: int,
    device: torch.device,
    looks: Set[int],
    look: Look | None,
    keep: Callable[[int], None] | None = None,
) -> loop.Outcome:
    """The loop, with this stage's checkpoint, progress file, log and board; they show what `look` gives, too."""
    assert part.training is not None
    saved = job.folder / "checkpoint.pt"
    progress, shown = Progress(job.folder, job.stage.steps), dict[str, float]()
    resume = checkpoint.load(saved, device) if saved.exists() else None
    with Board(job.folder if rank == 0 else None, job.runs) as board:

        def show(step: int, values: Mapping[str, float]) -> None:
            shown.update(values)
            progress.show(step, " ".join(f"{name} {value:.3f}" for name, value in shown.items()))

        def on_step(step: int, losses: dict[str, float], monitors: dict[str, float], lr: float) -> None:
            show(step, {**losses, **monitors})
            board.scalars(step, {**{f"loss/{name}": value for name, value in losses.items()}, **monitors, "lr": lr})

        def looked(step: int) -> None:
            assert look is not None
            seen = dict(look(step))
            board.scalars(step, seen)
            show(step, dict([*seen.items()][:1]))  # the one that ranks; a line has no room for all

        progress.show(resume["step"] if resume else 0, "starting")
        return loop.train(
            method,
            board.watching(batches, method),
            part.training,
            steps=job.stage.steps,
            seed=job.stage.seed,
            device=device,
            resume=resume,
            rank=rank,
            world=world,
            on_step=on_step,
            save=_saving(job, saved, world),
            save_seconds=job.chain.experiment.resources.checkpoint_seconds,
            looks=looks,
            look=looked,
            keep=keep,
        )


def _saving(job: Job, saved: Path, world: int) -> Callable[[checkpoint.State], None]:
    """Saves the state; in a remote store too, now and then, or each time where workers on other machines may continue."""
    mirror, last = job.work.site.mirror, time.monotonic()

    def save(state: checkpoint.State) -> None:
        nonlocal last
        checkpoint.save(saved, state)
        if mirror and (world > 1 or time.monotonic() - last >= mirroring.EVERY):
            mirror.keep(job.stage.id)
            last = time.monotonic()

    return save


def inference(experiment: Experiment) -> dict[str, Any]:
    """How a volume is predicted, as arguments of `evaluate.infer` and its callers.

    Windows have the side of the crops that the network was trained on; None: whole slices, or whole volumes in 3D.
    """
    side = experiment.finetune.settings.side if experiment.evaluate.inference == "window" else None
    return {"side": side, "overlap": experiment.evaluate.overlap, "spatial_dims": experiment.spatial_dims}


def _scores(
    model: nn.Module, volumes: Iterable[Volume], store: Store, experiment: Experiment, part: DataPart, *, surface: bool
) -> list[Score]:
    """The part's scores: Dice to select by, all metrics to report, and the legacy one where it was asked for."""
    kinds: list[metrics.Metrics] = ["all" if surface else "dice"]
    if experiment.evaluate.metric == metrics.LEGACY:
        kinds.append("legacy")
    return evaluate.score(
        model,
        volumes,
        store.classes,
        part,
        **inference(experiment),
        tolerance_mm=store.tolerance_mm,
        metrics=kinds,
    )


def _mean(scores: Iterable[Score], experiment: Experiment) -> float:
    """The metric that selects and ranks, by the contract's order of means."""
    return metrics.aggregate(scores).mean[experiment.evaluate.metric]
