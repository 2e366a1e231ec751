"""A stage from start to end: a pretraining, or a fine-tuning with its scores. A finished stage is a look-up.

Every process that needs a stage calls `fulfil`: it finds the stage done, or waits for the process that is at it, or does
it, continuing from the last checkpoint. Whatever dies, the next call goes on.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from medssl.methods.protocol import Batch, Method
from medssl.platform import atomic, checkpoint, evaluate, find, ledger, loop, metrics, stream, trackers, train
from medssl.platform.board import Board
from medssl.platform.config import Experiment, Part
from medssl.platform.errors import RunError
from medssl.platform.plan import Chain, Stage, contract, labelled_patients
from medssl.platform.records import Part as DataPart
from medssl.platform.records import Score, Volume
from medssl.platform.site import Progress, Site, provenance, spent
from medssl.platform.splits import Split
from medssl.platform.store import Store
from medssl.platform.volumes import Volumes

Arrays = Mapping[str, Mapping[str, np.ndarray]]  # of each part of the split: what `Slices.arrays` gives


@dataclass(frozen=True)
class Work:
    """Where a chain finds its data and leaves its results; plain, so that it travels to any process."""

    site: Site
    store: Path
    split: Split
    arrays: Arrays | None = None  # the node's shared copy; None: read from the store
    sweep: str = ""  # that asked for the chain first; trackers group by it

    def slices(self, part: DataPart) -> stream.Slices:
        """All slices of a part of the split, in memory."""
        if self.arrays is not None:
            return stream.Slices.from_arrays(self.arrays[part])
        return stream.Slices.read(Store.open(self.store), patients=getattr(self.split, part))


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


def run_chain(chain: Chain, work: Work, tell: Callable[[list[float]], None] = lambda scores: None) -> list[float]:
    """Fulfil a pretraining and its fine-tunings; `tell` hears the validation scores after each. Returns all of them."""
    if chain.pretraining:
        fulfil(Job(chain, chain.pretraining, work))
    scores: list[float] = []
    for stage in chain.finetunings:
        scores.append(fulfil(Job(chain, stage, work))["validation"])
        tell(scores)
    return scores


def fulfil(job: Job) -> dict[str, Any]:
    """What the finished stage left in done.json, doing the stage first if need be."""
    while True:
        with atomic.owned(job.folder) as mine:
            if done := job.work.site.done(job.stage.id):
                return done
            if mine:
                return _do(job)
        time.sleep(0.5)  # another process is at it


def _do(job: Job) -> dict[str, Any]:
    experiment, stage = job.chain.experiment, job.stage
    begun = time.time() - spent(job.folder)  # a stage that was killed has cost what it has cost
    record = {"kind": stage.kind, "stage": stage.id, "seed": stage.seed, "steps": stage.steps, "parent": stage.parent}
    record |= {"arm": job.chain.arm, "pretraining": job.chain.index, "encoder_seed": job.chain.encoder_seed}
    record |= {"store": str(job.work.store), "split": job.work.split.name, "config": experiment.tree()}
    resources = experiment.resources
    gpu = bool(resources.gpus) if resources.gpus is not None else torch.cuda.is_available()
    here = torch.cuda.is_available()  # not where workers of their own will have it
    record |= {"device": (torch.cuda.get_device_name() if here else "gpu") if gpu else "cpu"}
    atomic.write_json(job.folder / "run.json", record | {"provenance": provenance()})
    alone = resources.workers == 1  # several workers read the store themselves: cheaper than sending them copies
    result = train.launch(
        _tracked,
        job if alone else dataclasses.replace(job, work=dataclasses.replace(job.work, arrays=None)),
        workers=resources.workers,
        gpu=gpu,
        folder=job.folder,
        name="workers",
        cpus_per_worker=resources.cpus,
    )
    done = {**result, "seconds": round(time.time() - begun, 2)}
    atomic.write_json(job.folder / "done.json", done)
    (job.folder / "checkpoint.pt").unlink(missing_ok=True)  # nothing is left to continue; the weights lie beside it
    return done


def _tracked(job: Job, rank: int, world: int, device: torch.device) -> dict[str, Any]:
    """One worker of a stage; its scalars and its end also go to the trackers asked for."""
    function = _pretrain if job.stage.kind == "pretrain" else _finetune
    names = job.chain.experiment.resources.trackers if rank == 0 else ()
    with trackers.opened(names, job.folder, job.work.sweep, job.work.site.runs) as runs:
        done = function(dataclasses.replace(job, runs=runs), rank, world, device)
        runs.end(done)
    return done | ({"untracked": runs.lost} if runs.lost else {})


def network(experiment: Experiment, channels: int, classes: int) -> Any:
    """The segmentation network of an experiment, freshly initialised from torch's global generator."""
    part = experiment.network
    return find.load("network", part.name).NETWORK(channels, classes, part.settings)


def _pretrain(job: Job, rank: int, world: int, device: torch.device) -> dict[str, Any]:
    """One worker of a pretraining. Rank 0 leaves the encoder and its card."""
    experiment, store = job.chain.experiment, Store.open(job.work.store)
    part = experiment.pretrain
    assert part is not None
    torch.set_num_threads(experiment.resources.cpus)
    torch.manual_seed(job.chain.encoder_seed)
    encoder = network(experiment, store.channels, len(store.classes)).encoder
    method = find.load("method", part.name).METHOD(encoder, part.settings)
    batches = _batches(job, part, job.work.split.train, None, rank, world, device)
    outcome = _train(job, method, part, batches, rank, world, device)
    if rank == 0:
        card = {"method": part.name, "network": experiment.network.name, "channels": store.channels, "data": store.name}
        card |= {
            "steps": outcome.step,
            "config": experiment.tree(),
            "chain": f"{part.name}:{store.name}@{outcome.step}",
        }
        checkpoint.save(job.folder / "encoder.pt", {"encoder": method.transferable_state(), "card": card})
    return {"status": outcome.status, "step": outcome.step, "losses": outcome.losses, "monitors": outcome.monitors}


def _finetune(job: Job, rank: int, world: int, device: torch.device) -> dict[str, Any]:
    """One worker of a fine-tuning. Rank 0 looks at the validation patients, keeps the best, and scores it on the test once."""
    experiment, store, split = job.chain.experiment, Store.open(job.work.store), job.work.split
    part = experiment.finetune
    torch.set_num_threads(experiment.resources.cpus)
    model = _start(job, store)
    method = find.load("method", part.name).METHOD(model, part.settings)
    batches = _batches(job, part, labelled_patients(experiment, split), True, rank, world, device)
    best = job.folder / "best.pt"
    validation = list(job.work.slices("val").volumes()) if rank == 0 else []

    def look(step: int) -> None:
        score = _mean(_scores(model, validation, store, experiment, "val", surface=False), experiment)
        if not best.exists() or score > checkpoint.load(best)["validation"]:
            checkpoint.save(best, {"network": model.state_dict(), "validation": score, "step": step})

    outcome = _train(job, method, part, batches, rank, world, device, look)
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
    }


def _start(job: Job, store: Store) -> Any:
    """The network that a fine-tuning starts from: the encoder of its pretraining, or as that one was before its first step.

    So the arm from scratch is a pretraining of zero steps: at one index all arms begin with equal encoders, and what is
    fresh in the decoder depends on the fine-tuning's seed alone.
    """
    torch.manual_seed(job.chain.encoder_seed)
    start = network(job.chain.experiment, store.channels, len(store.classes)).encoder.state_dict()
    torch.manual_seed(job.stage.seed)
    model = network(job.chain.experiment, store.channels, len(store.classes))
    if job.stage.parent:
        start = checkpoint.load(job.work.site.stage(job.stage.parent) / "encoder.pt")["encoder"]
    checkpoint.transfer(start, model.encoder)
    return model


def _batches(
    job: Job, part: Part, patients: Iterable[str], labelled: bool | None, rank: int, world: int, device: torch.device
) -> Callable[[int], Iterable[Batch]]:
    """This worker's batches from a step on: out of the node's memory, or streamed by Ray Data where the set does not fit."""
    assert part.training is not None
    size, seed, wanted = part.training.batch, job.stage.seed, tuple(patients)
    store, choice = Store.open(job.work.store), job.chain.experiment.data.stream
    solid = job.chain.experiment.spatial_dims == 3
    fits = choice != "auto" or stream.fits(store, wanted, labelled)
    if solid and not fits:
        raise RunError(
            f"{store.root}: these volumes would take more than a quarter of the memory, and are not streamed from disk in 3D; "
            "use fewer patients, prepare the data at a coarser spacing, or set data.stream=node to hold them all the same"
        )
    if choice == "ray" or not fits:
        return lambda start: stream.ray_batches(
            store, wanted, labelled, size, seed=seed, start=start, rank=rank, world=world, device=device
        )
    slices = job.work.slices("train").select(wanted, labelled)
    afar = device.type == "cuda" and slices.nbytes > torch.cuda.mem_get_info(device)[0] / 2  # leave the other half to training
    near = slices if afar else slices.to(device)
    held: stream.Held = Volumes.of(near, least=getattr(part.settings, "side", None) or 1) if solid else near
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
    look: Callable[[int], None] | None = None,
) -> loop.Outcome:
    """The loop, with this stage's checkpoint, progress file, log and board."""
    assert part.training is not None
    saved = job.folder / "checkpoint.pt"
    progress = Progress(job.folder, job.stage.steps)
    resume = checkpoint.load(saved, device) if saved.exists() else None
    with Board(job.folder if rank == 0 else None, job.runs) as board:

        def on_step(step: int, losses: dict[str, float], monitors: dict[str, float], lr: float) -> None:
            text = " ".join(f"{name} {value:.3f}" for name, value in {**losses, **monitors}.items())
            progress.show(step, text)
            board.scalars(step, {**{f"loss/{name}": value for name, value in losses.items()}, **monitors, "lr": lr})

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
            save=lambda state: checkpoint.save(saved, state),
            save_seconds=job.chain.experiment.resources.checkpoint_seconds,
            look=look,
        )


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
