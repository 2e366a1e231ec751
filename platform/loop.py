"""The one training loop: pretraining, fine-tuning and semi-supervised training. It does not know what it trains.

Every draw of a step is seeded by (seed, rank, step), so a training that was stopped continues as if it had not been, and
any view can be made again from three integers. About once a second the loop looks up from its work (`_Watch`): only then
does it wait for the device, meet the other workers, report, and save.
"""

import contextlib
import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from medssl.methods import optimizers
from medssl.methods.protocol import Batch, Loss, Method, Step, Views
from medssl.methods.settings import Training
from medssl.platform import checkpoint
from medssl.platform.errors import RunError, UsageError

# A pretraining has collapsed when `monitors["collapse"]` (1 - √d·std of the normalised features: 0 spread, 1 one point)
# exceeds COLLAPSED on average over a window, that is when the features spread a twentieth of what independent ones would
# (Chen and He 2021, sec. 4.1). It is meant to stop only what is beyond doubt: two collapsed models of the CT study stand
# at 0.86 and 0.97; below the bound the monitor is reported and the run goes on. Windows are counted in steps, not seconds,
# so that a run ends at the same step on every machine; heads may start anywhere, so the first half does not count.
COLLAPSED = 0.95
WINDOW = 0.05  # of the steps, but at least ten of them: a single batch says little
GRACE = 0.5  # of the steps: untrained features may lie so close together that the index begins above 0.95 (BYOL: 0.98)

SAVING = 0.02  # most of the time that may go into saving

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

_Series = dict[str, list[float]]
OnStep = Callable[[int, dict[str, float], dict[str, float], float], None]


@dataclass(frozen=True)
class Outcome:
    """How a training stands: mean losses and monitors since the report before, over all workers."""

    status: Literal["training", "finished", "collapsed"] = "training"
    step: int = 0  # optimizer steps done
    losses: dict[str, float] = field(default_factory=dict)
    monitors: dict[str, float] = field(default_factory=dict)
    window: list[float] = field(default_factory=list)  # the collapse monitor so far in the window that is open


def train(
    method: Method,
    batches: Callable[[int], Iterable[Batch]],
    training: Training,
    *,
    steps: int,
    seed: int,
    device: torch.device | str = "cpu",
    resume: Mapping[str, Any] | None = None,
    rank: int = 0,
    world: int = 1,
    on_step: OnStep = lambda step, losses, monitors, lr: None,
    save: Callable[[checkpoint.State], None] = lambda state: None,
    report_seconds: float = 1.0,
    save_seconds: float = 60.0,
    looks: Set[int] = frozenset(),
    look: Callable[[int], None] = lambda step: None,
    keep: Callable[[int], None] | None = None,
) -> Outcome:
    """Train `method` up to optimizer step `steps`; returns how that ended.

    batches   `batches(start)`: this worker's batches from step `start` on, each of training.batch / world slices
    resume    a state that `save` received: the training continues as if it had not stopped
    on_step   told about every `report_seconds`: steps done, mean losses and monitors since the last time, learning rate
    save      given, every `save_seconds` and at the end, the state to continue from. It is live: write it at once
    look      called with the steps done where `looks` holds them (0: before the first) and, if it holds any, at the end; in
              eval mode, and before the state of that step is saved: a look can happen twice, but is never lost
    keep      called with the steps done after each of `training.snapshots`, likewise before the state of that step is saved
    With several workers (a process group of size `world`) rank 0 alone is told, looks and saves.
    Raises RunError when a loss is not finite, naming step and terms, or when the batches end early.
    """
    assert isinstance(method, nn.Module)
    device = torch.device(device)
    method.to(device).train()
    optimizer = optimizers.build(method, training)
    scaler = torch.amp.GradScaler(device.type, enabled=training.precision == "fp16")
    start = checkpoint.restore(resume, method, optimizer, scaler) if resume else 0
    outcome = Outcome(**resume["outcome"]) if resume else Outcome()
    if outcome.status != "training":
        return outcome
    joint = _joint(method, training, world)
    kept = {int(step) for step in training.snapshots} if keep else set()
    watch = _Watch(outcome, steps, training, world, looks | kept, report_seconds)
    saving = _Saving(save, save_seconds)

    def looked(step: int) -> None:
        method.eval()
        look(step)
        method.train()

    if rank == 0 and start == 0 and 0 in looks:
        looked(0)
    for index, batch in zip(range(start, steps), batches(start), strict=False):
        rng, step = _seeded(seed, rank, index, device), Step(index, steps)
        lr = optimizers.learning_rate(training, index, steps)
        optimizers.set_lr(optimizer, lr)
        if training.end_weight_decay is not None:
            optimizers.set_weight_decay(optimizer, optimizers.weight_decay(training, index, steps))
        optimizer.zero_grad()
        for loss in _losses(method, joint, training, batch, rng, step):
            scaler.scale(loss.total / training.accumulate).backward()
            watch.note(index, loss)
        optimizers.hold(optimizer, step)
        if training.clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(method.parameters(), training.clip)
        scaler.step(optimizer)
        scaler.update()
        method.after_step(step)

        if watch.due(index + 1):
            outcome = watch.report(index + 1)
            if rank == 0:
                on_step(outcome.step, outcome.losses, outcome.monitors, lr)
            if rank == 0 and looks and (outcome.step in looks or outcome.status != "training"):
                looked(outcome.step)
            if rank == 0 and keep and outcome.step in kept:
                keep(outcome.step)
            if rank == 0 and (saving.due() or outcome.status != "training"):
                state = checkpoint.capture(method, optimizer, scaler, outcome.step) | {"outcome": asdict(outcome)}
                saving.write(state)
            if outcome.status != "training":
                return outcome
    raise RunError(f"the batches ended after step {outcome.step} of {steps}; an infinite stream was expected")


def evenly(steps: int, count: int) -> set[int]:
    """`count` evenly spaced steps of `steps`, the last one included; none when count is 0."""
    return {round(steps * (k + 1) / count) for k in range(count)}


def _seeded(seed: int, rank: int, index: int, device: torch.device) -> Generator:
    """The generator of one step's augmentation; also seeds torch's own, which dropout and drop path draw from."""
    mixed = hashlib.blake2b(repr((seed, rank, index)).encode(), digest_size=8).digest()
    number = int.from_bytes(mixed, "big")
    torch.default_generator.manual_seed(number)  # torch.manual_seed would do, but takes a hundred times as long
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
    return Generator(device).manual_seed(number)


class _Forward(nn.Module):
    """A method's loss as a forward pass, which is where DistributedDataParallel looks."""

    def __init__(self, method: Method):
        super().__init__()
        assert isinstance(method, nn.Module)
        self.method: Any = method

    def forward(self, views: Views, step: Step) -> Loss:
        loss: Loss = self.method.loss(views, step)
        return loss


def _joint(method: Method, training: Training, world: int) -> Callable[[Views, Step], Loss]:
    """The loss of a worker's share of the joint batch; its gradients are averaged over the workers."""
    parts = world * training.accumulate
    if training.batch % parts:
        raise UsageError(
            f"training.batch = {training.batch} slices cannot be shared by {world} worker(s) with training.accumulate = "
            f"{training.accumulate}; use a multiple of {parts}"
        )
    if world == 1:
        return method.loss
    # Buffers are not sent around: methods keep them equal themselves (`gather.JointBatchNorm`, queues of gathered rows).
    return DistributedDataParallel(_Forward(method), broadcast_buffers=False, gradient_as_bucket_view=True)


def _losses(
    method: Method,
    joint: Callable[[Views, Step], Loss],
    training: Training,
    batch: Batch,
    rng: Generator,
    step: Step,
) -> Iterator[Loss]:
    """The loss of each micro-batch, with the monitors of its views; to be run backward before the next one is asked for."""
    kind, last = AUTOCAST[training.precision], training.accumulate - 1
    parts = {key: value.chunk(training.accumulate) for key, value in batch.items()}
    for number in range(training.accumulate):
        views = method.augment({key: part[number] for key, part in parts.items()}, rng)
        # Workers meet in the last backward pass only: sums of gradients can be averaged once.
        alone = number < last and isinstance(joint, DistributedDataParallel)
        with cast(DistributedDataParallel, joint).no_sync() if alone else contextlib.nullcontext():
            with torch.autocast(batch["image"].device.type, kind, enabled=kind is not None):
                loss = joint(views, step)
            yield Loss(loss.terms, views.monitors | loss.monitors)


@dataclass(frozen=True)
class _Row:
    """The numbers of one micro-batch."""

    index: int  # its step
    terms: tuple[str, ...]
    monitors: tuple[str, ...]
    values: Tensor  # of the terms, then of the monitors


class _Watch:
    """Losses and monitors on their way from the device to a report, and the steps at which to look at them.

    Workers meet at a report, so they must agree on its step: the next one follows from the pace of all of them together.
    """

    def __init__(self, outcome: Outcome, steps: int, training: Training, world: int, looks: Set[int], seconds: float):
        self.steps, self.training, self.world, self.looks = steps, training, world, looks
        self.seconds = seconds
        self.span = max(10, round(WINDOW * steps))
        self.window = list(outcome.window)
        self.rows: list[_Row] = []
        self.last, self.next, self.begun = outcome.step, outcome.step + 1, time.monotonic()

    def note(self, index: int, loss: Loss) -> None:
        """Keep the numbers of one micro-batch where they are: to look at them, the host would have to wait."""
        if not self.rows:
            self.begun = time.monotonic()
        device = next(iter(loss.terms.values())).device
        values = [value.detach().float().to(device) for value in (*loss.terms.values(), *loss.monitors.values())]
        self.rows.append(_Row(index, tuple(loss.terms), tuple(loss.monitors), torch.stack(values)))

    def due(self, done: int) -> bool:
        """Whether to report after `done` steps: after about a second, when a window or the training ends, at a look."""
        return done >= self.next or done == self.steps or done in self.looks or done % self.span == 0

    def report(self, done: int) -> Outcome:
        """The means over steps and workers since the last report. Raises RunError when a loss was not finite."""
        losses, monitors = self._collect(done)
        self.window += monitors.get("collapse", [])
        collapsed = False
        if done % self.span == 0:
            collapsed = self.training.stop_on_collapse and done > GRACE * self.steps and _mean(self.window) > COLLAPSED
            self.window = []
        return Outcome(
            "collapsed" if collapsed else "finished" if done == self.steps else "training",
            done,
            {name: _mean(values) for name, values in losses.items()},
            {name: _mean(values) for name, values in monitors.items()},
            list(self.window),
        )

    def _collect(self, done: int) -> tuple[_Series, _Series]:
        """Terms and monitors of every micro-batch, means over the workers. Also settles when to look next."""
        device = self.rows[0].values.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the clock shall see the work, not its launch
        taken = torch.tensor([time.monotonic() - self.begun], device=device)
        flat = torch.cat([*(row.values for row in self.rows), taken])
        if self.world > 1:
            dist.all_reduce(flat)
        *numbers, seconds = (flat / self.world).tolist()
        pace = (done - self.last) / max(seconds, 1e-9)
        self.last, self.next = done, done + min(max(1, round(self.seconds * pace)), 2 * (done - self.last))
        rows, self.rows = self.rows, []

        losses: _Series = defaultdict(list)
        monitors: _Series = defaultdict(list)
        read = iter(numbers)
        for row in rows:
            terms = dict(zip(row.terms, read, strict=False))  # strict would consume one number too many
            if not all(map(math.isfinite, terms.values())):
                said = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
                raise RunError(
                    f"the loss is not finite at step {row.index} ({said}); lower training.lr (now {self.training.lr:g}), "
                    f"set training.clip, or train in fp32 (now {self.training.precision})"
                )
            for name, value in terms.items():
                losses[name].append(value)
            for name, value in zip(row.monitors, read, strict=False):
                monitors[name].append(value)
        return losses, monitors


def _mean(values: list[float]) -> float:
    """The mean of the values that are defined; NaN when none is."""
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


class _Saving:
    """When to save: every so many seconds, but never for more than SAVING of the time."""

    def __init__(self, save: Callable[[checkpoint.State], None], seconds: float):
        self.save, self.seconds, self.cost, self.ended = save, seconds, 0.0, time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.ended >= max(self.seconds, self.cost / SAVING)

    def write(self, state: checkpoint.State) -> None:
        begun = time.monotonic()
        self.save(state)
        self.ended = time.monotonic()
        self.cost = self.ended - begun
