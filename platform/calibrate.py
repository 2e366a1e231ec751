"""The pace of stages that have never run here: each kind for a few seconds, with its real loop, data and network.

One stage runs alone in this process: stages that share a machine may slow each other, and of a stage on several workers
the share of one is measured, without their communication.

How busy a stage keeps its GPU is told by nvidia-smi's `utilization.gpu`, asked five times a second: the share of time in
which a kernel runs (https://docs.nvidia.com/deploy/nvidia-smi/). That is what processes share that take turns on a GPU; how
many of its cores a kernel fills matters to them only under MPS. CUDA events around steps would count the gaps between kernels
as work, profiling every kernel slows down the host that makes the gaps, and torch.cuda.utilization asks the same by a package
more. Other processes on that GPU count, too: measure on a free one. On a CPU it is the processor seconds of this process in a
second, for each core that the stage holds. The part for GPUs has been tested on what nvidia-smi prints, not on a GPU.
"""

import contextlib
import dataclasses
import resource
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from medssl.platform.trials import connected

SECONDS = 5.0  # of training, for each kind of stage: ten for a pretraining and its fine-tuning
ASKED_EVERY = 200  # milliseconds between two questions to a GPU, which counts over 1/6 s to 1 s


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
        torch.cuda.empty_cache()  # what the last stage has left
        torch.cuda.reset_peak_memory_stats()
    part = _shared(experiment.pretrain if stage.kind == "pretrain" else experiment.finetune, resources.workers)
    network = stages.network(experiment, store.channels, len(store.classes))
    method = find.load("method", part.name).METHOD(stages.trained(part, network), part.settings)
    step, checkpoint, busy = _step(job, part, method, device)
    fixed = _scoring(job, method, network, store) if stage.kind == "finetune" else 0.0
    kept = method.transferable_state() if stage.kind == "pretrain" else network.state_dict()
    # of a GPU what its allocator holds, free or not: no other process can have it
    memory = torch.cuda.max_memory_reserved() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Pace(step, "calibrated", fixed, float(_bytes(kept)), float(checkpoint), float(memory), busy)


def _shared(part: Part | None, workers: int) -> Part:
    """The part with one worker's share of the batch; it may not stop early."""
    assert part is not None
    assert part.training is not None
    training = dataclasses.replace(part.training, batch=max(1, part.training.batch // workers), stop_on_collapse=False)
    return dataclasses.replace(part, training=training)


def _step(job: stages.Job, part: Part, method: Any, device: torch.device) -> tuple[float, int, float | None]:
    """Seconds of a step, the bytes of a checkpoint, and how busy the device was: 0 to 1, None where it does not tell.

    The first report, which pays for the start, does not count.
    """
    assert part.training is not None
    labelled = job.stage.kind == "finetune" or None
    patients = plan.labelled_patients(job.chain.experiment, job.work.split) if labelled else job.work.split.train
    batches = stages._batches(job, part, patients, labelled, 0, 1, device)
    begun = time.perf_counter()
    reports, sizes = [(0, begun, time.process_time())], [0]

    def note(step: int, *_: Any) -> None:
        reports.append((step, time.perf_counter(), time.process_time()))
        if reports[-1][1] - begun > SECONDS and len(reports) > 2:
            raise _Enough

    def save(state: Any) -> None:
        sizes.append(_bytes(state))

    with utilisation(device) as asked, contextlib.suppress(_Enough):
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
    (first, at, worked), (last, until, by) = reports[1] if len(reports) > 2 else reports[0], reports[-1]
    cores = job.chain.experiment.resources.cpus
    busy = mean_of(asked, at, until) if device.type == "cuda" else min(1.0, (by - worked) / (until - at) / cores)
    return (until - at) / max(last - first, 1), max(sizes), busy


@contextlib.contextmanager
def utilisation(device: torch.device) -> Iterator[list[tuple[float, str]]]:
    """What nvidia-smi says of a GPU while the body runs: (time.perf_counter() when it was heard, line). Nothing of a CPU."""
    heard: list[tuple[float, str]] = []
    if device.type != "cuda" or not shutil.which("nvidia-smi"):
        yield heard
        return
    command = ["nvidia-smi", f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}", f"--loop-ms={ASKED_EVERY}"]
    command += ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as telling:
        assert telling.stdout is not None
        hearing = threading.Thread(target=_hear, args=(telling.stdout, heard))
        hearing.start()
        try:
            yield heard
        finally:
            telling.terminate()
            hearing.join()


def _hear(lines: Iterable[str], heard: list[tuple[float, str]]) -> None:
    for line in lines:
        heard.append((time.perf_counter(), line))  # noqa: PERF401  as they come


def mean_of(heard: Sequence[tuple[float, str]], since: float, until: float) -> float | None:
    """The mean of the percentages heard in that time, as a share; None where there are none (a part of a GPU says [N/A])."""
    percentages = [float(line) for at, line in heard if since <= at <= until and line.strip().isdigit()]
    return sum(percentages) / len(percentages) / 100 if percentages else None


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
