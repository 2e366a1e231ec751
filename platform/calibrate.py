"""The pace of stages that have never run here: each kind for a few seconds, with its real loop, data and network.

One stage runs alone in this process: stages that share a machine may slow each other, and of a stage on several workers
the share of one is measured, without their communication.
"""

import contextlib
import dataclasses
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medssl.platform import find, loop, plan, stages, stream
from medssl.platform.config import Part
from medssl.platform.plan import Chain
from medssl.platform.planner import Pace, keys
from medssl.platform.site import Site
from medssl.platform.splits import Split
from medssl.platform.store import Store
from medssl.platform.sweep import connected

SECONDS = 5.0  # of training, for each kind of stage: ten for a pretraining and its fine-tuning


class _Enough(Exception):
    """Ends a training that has been watched for long enough."""


def measure(chains: Sequence[Chain], store: Store, split: Split, say: Callable[[str], None]) -> dict[str, Pace]:
    """The pace of every kind of stage among the chains, by the second of `planner.keys`."""
    found: dict[str, Pace] = {}
    choice = chains[0].experiment.data.stream
    streamed = choice == "ray" or (choice == "auto" and not stream.fits(store))
    with tempfile.TemporaryDirectory() as folder, connected(None) if streamed else contextlib.nullcontext():
        work = stages.Work(Site(data=store.root.parent, runs=Path(folder)), store.root, split)
        for chain in chains:
            for stage in (*chain.pretrainings, *chain.finetunings[:1]):
                key = keys(stage.kind, stage.seen(chain.experiment).tree())[1]
                if key not in found:
                    say(f"measuring {stage.kind} for {SECONDS:.0f} s")
                    found[key] = _pace(stages.Job(chain, stage, work), store)
    return found


def _pace(job: stages.Job, store: Store) -> Pace:
    experiment, stage = job.stage.seen(job.chain.experiment), job.stage
    resources = experiment.resources
    gpu = bool(resources.gpus) if resources.gpus is not None else torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    torch.set_num_threads(resources.cpus)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    part = _shared(experiment.pretrain if stage.kind == "pretrain" else experiment.finetune, resources.workers)
    network = stages.network(experiment, store.channels, len(store.classes))
    method = find.load("method", part.name).METHOD(stages.trained(part, network), part.settings)
    step, checkpoint = _step(job, part, method, device)
    fixed = _scoring(job, method, network, store) if stage.kind == "finetune" else 0.0
    kept = method.transferable_state() if stage.kind == "pretrain" else network.state_dict()
    memory = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Pace(step, "calibrated", fixed, float(_bytes(kept)), float(checkpoint), float(memory))


def _shared(part: Part | None, workers: int) -> Part:
    """The part with one worker's share of the batch; it may not stop early."""
    assert part is not None
    assert part.training is not None
    training = dataclasses.replace(part.training, batch=max(1, part.training.batch // workers), stop_on_collapse=False)
    return dataclasses.replace(part, training=training)


def _step(job: stages.Job, part: Part, method: Any, device: torch.device) -> tuple[float, int]:
    """Seconds of a step, and the bytes of a checkpoint. The first report, which pays for the start, does not count."""
    assert part.training is not None
    labelled = job.stage.kind == "finetune" or None
    patients = plan.labelled_patients(job.chain.experiment, job.work.split) if labelled else job.work.split.train
    batches = stages._batches(job, part, patients, labelled, 0, 1, device)
    begun = time.perf_counter()
    reports, sizes = [(0, begun)], [0]

    def note(step: int, *_: Any) -> None:
        reports.append((step, time.perf_counter()))
        if reports[-1][1] - begun > SECONDS and len(reports) > 2:
            raise _Enough

    def save(state: Any) -> None:
        sizes.append(_bytes(state))

    with contextlib.suppress(_Enough):
        loop.train(
            method,
            batches,
            part.training,
            steps=job.stage.steps,
            seed=job.stage.seed,
            device=device,
            on_step=note,
            save=save,
            report_seconds=0.5,
            save_seconds=0.0,
        )
    (first, at), (last, until) = reports[1] if len(reports) > 2 else reports[0], reports[-1]
    return (until - at) / max(last - first, 1), max(sizes)


def _scoring(job: stages.Job, method: Any, network: Any, store: Store) -> float:
    """Seconds that a fine-tuning spends on its looks at the validation patients and on its final scores.

    One validation volume is scored and stands for all, by numbers of slices; test patients are left alone.
    """
    experiment, split = job.chain.experiment, job.work.split
    one = next(iter(job.work.slices("val").volumes()))
    slices = {part: sum(v.slices for v in store.volumes if v.patient in getattr(split, part)) for part in ("val", "test")}
    method.eval()
    seconds = {}
    for surface in (False, True):
        begun = time.perf_counter()
        stages._scores(network, [one], store, experiment, "val", surface=surface)
        seconds[surface] = (time.perf_counter() - begun) / len(one.image)
    training = experiment.finetune.training
    assert training is not None
    return seconds[False] * slices["val"] * (training.evaluations + 1) + seconds[True] * slices["test"]


def _bytes(state: Any) -> int:
    """Of all tensors in a nested state."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(_bytes, state.values()))
    return sum(map(_bytes, state)) if isinstance(state, list | tuple) else 0
