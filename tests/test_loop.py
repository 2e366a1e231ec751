"""The loop's laws: stopping is not noticed, a broken loss is named, a collapse ends, and what it costs is counted."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Generator, Tensor, nn

from medssl.methods import optimizers, segment, simsiam
from medssl.methods.networks import unet
from medssl.methods.protocol import Batch, Loss, Step, Views
from medssl.methods.settings import Training
from medssl.platform import checkpoint, loop
from medssl.platform.errors import RunError, UsageError

SIDE, N = 16, 8


def batches(start: int = 0, n: int = N) -> Iterator[Batch]:
    """Batch t is drawn from t alone."""
    for t in itertools.count(start):
        rng = torch.Generator().manual_seed(t)
        yield {
            "image": torch.randint(0, 256, (n, 1, 24, 24), generator=rng, dtype=torch.uint8),
            "label": torch.randint(0, 3, (n, 24, 24), generator=rng, dtype=torch.uint8),
            "size": torch.full((n, 2), 24),
        }


def network() -> unet.UNet:
    torch.manual_seed(0)
    return unet.UNet(1, 3, unet.Config(width=4, levels=3))


def build(name: str) -> tuple[Any, Training]:
    if name == "simsiam":
        config = simsiam.Config(side=SIDE, d=16, bottleneck=8, iou=None)
        return simsiam.SimSiam(network().encoder, config), simsiam.Training(batch=N)
    return segment.Segment(network(), segment.Config(side=SIDE, crops=1)), segment.Training(batch=N)


class Line(nn.Module):
    """A method of one parameter w whose loss is what a function of (w, step index, mean of the batch) says."""

    def __init__(self, said: Callable[[Tensor, int, Tensor], Loss]):
        super().__init__()
        self.w, self.said, self.modes = nn.Parameter(torch.tensor(1.0)), said, list[bool]()

    def augment(self, batch: Batch, rng: Generator) -> Views:
        return Views([batch["image"].float()])

    def loss(self, views: Views, step: Step) -> Loss:
        self.modes.append(self.training)
        return self.said(self.w, step.index, views.images[0].mean())

    def after_step(self, step: Step) -> None: ...

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return [{"params": [self.w]}]

    def transferable_state(self) -> dict[str, Tensor]:
        return {}


def line(said: Callable[[Tensor, int, Tensor], Any] = lambda w, i, x: Loss({"l": w**2})) -> Any:
    return Line(said)


PLAIN = Training(batch=N, optimizer="sgd", momentum=0, weight_decay=0, lr=0.1, end_lr=0.1)


@pytest.mark.parametrize("name", ["simsiam", "segment"])
@pytest.mark.parametrize("stop", [1, 4, 7])
def test_stopping_and_continuing_equals_not_stopping_bit_for_bit(tmp_path: Path, name: str, stop: int) -> None:
    """Through the file, into a method and an optimizer that are new; parameters, buffers, momenta, losses, monitors."""
    losses: dict[str, dict[int, Any]] = {"whole": {}, "parts": {}}

    def run(kind: str, resume: Any = None, save: Callable[[Any], None] = lambda state: None, stop: int = 9) -> Any:
        method, training = build(name)
        if resume:
            for parameter in method.parameters():
                nn.init.constant_(parameter, 7)  # nothing may be left of the start

        def on_step(step: int, terms: dict[str, float], monitors: dict[str, float], lr: float) -> None:
            losses[kind][step] = (terms, monitors, lr)
            if step == stop and stop < 9:
                raise KeyboardInterrupt

        return loop.train(
            method, batches, training, steps=9, seed=3, resume=resume, save=save, on_step=on_step, report_seconds=0,
            save_seconds=0,
        )  # fmt: skip

    states: list[Any] = []
    run("whole", save=lambda state: states.append(checkpoint.digest(state)))
    path = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        run("parts", save=lambda state: checkpoint.save(path, state), stop=stop + 1)  # step `stop` is the last one saved
    torch.manual_seed(99)
    ends: list[Any] = []
    run("parts", checkpoint.load(path), save=lambda state: ends.append(checkpoint.digest(state)))
    assert ends[-1] == states[-1]
    assert repr(losses["parts"]) == repr(losses["whole"])  # NaN equals NaN


def test_a_finished_training_is_not_trained_again() -> None:
    states: list[Any] = []
    outcome = loop.train(line(), batches, PLAIN, steps=3, seed=0, save=states.append)
    method = line()
    again = loop.train(method, batches, PLAIN, steps=3, seed=0, resume=states[-1])
    assert again == outcome
    assert outcome.status == "finished"
    assert not method.modes


def test_the_loop_is_gradient_descent_on_the_schedule() -> None:
    """w ← w - lr·2w, closed form, with the cosine of the settings."""
    method, training = line(), dataclasses.replace(PLAIN, end_lr=0.01, warmup=0.25)
    loop.train(method, batches, training, steps=8, seed=0)
    expected = math.prod(1 - 2 * optimizers.learning_rate(training, k, 8) for k in range(8))
    assert method.w.item() == pytest.approx(expected, rel=1e-5)


def test_micro_batches_add_up_to_the_batch() -> None:
    """A loss that is a mean over slices: the gradient of the whole is the mean of the parts'."""

    def said(w: Tensor, index: int, x: Tensor) -> Loss:
        return Loss({"l": w * x / 100}, {"x": x})

    once, parts = line(said), line(said)
    one = loop.train(once, batches, PLAIN, steps=3, seed=0)
    four = loop.train(parts, batches, dataclasses.replace(PLAIN, accumulate=4), steps=3, seed=0)
    assert len(parts.modes) == 4 * len(once.modes)
    assert parts.w.item() == pytest.approx(once.w.item(), rel=1e-5)
    assert four.monitors["x"] == pytest.approx(one.monitors["x"])
    with pytest.raises(UsageError, match=r"training\.batch = 8 slices cannot be shared by 3 worker.*multiple of 3"):
        loop.train(line(), batches, PLAIN, steps=3, seed=0, world=3)


def test_clipping_bounds_the_step() -> None:
    method = line(lambda w, index, x: Loss({"l": 1000 * w}))
    loop.train(method, batches, dataclasses.replace(PLAIN, clip=0.5), steps=2, seed=0)
    assert method.w.item() == pytest.approx(1 - 2 * 0.1 * 0.5, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_reaches_the_forward_pass_and_trains(precision: Any) -> None:
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def said(w: Tensor, index: int, x: Tensor) -> Loss:
        product = w.view(1, 1) @ torch.ones(1, 1)
        assert product.dtype == wanted
        return Loss({"l": product.float().sum() ** 2})

    method = line(said)
    loop.train(method, batches, dataclasses.replace(PLAIN, precision=precision), steps=3, seed=0)
    taken = math.log(method.w.item()) / math.log(1 - 0.2)  # of three steps; fp16 skips those whose gradients overflow
    assert taken == pytest.approx({"bf16": 3, "fp16": 1}[precision], abs=0.05)


def test_a_loss_that_is_not_finite_stops_with_step_terms_and_remedy() -> None:
    """At the step where it began, whenever the loop looks; nothing is saved from then on."""

    def said(w: Tensor, index: int, x: Tensor) -> Loss:
        return Loss({"good": w**2, "bad": w * (float("inf") if index == 5 else 1)})

    saved: list[int] = []
    with pytest.raises(RunError, match=r"not finite at step 5 \(good .*, bad -inf\); lower training\.lr"):
        loop.train(line(said), batches, PLAIN, steps=50, seed=0, save=lambda state: saved.append(state["step"]), save_seconds=0)
    assert all(step <= 5 for step in saved)


def collapsing(at: int) -> Any:
    return line(lambda w, i, x: Loss({"l": w**2}, {"collapse": torch.tensor(0.99 if i >= at else 0.1)}))


def test_a_collapsed_pretraining_ends_at_the_window_that_shows_it() -> None:
    """400 steps: windows of 20, the first 200 do not count."""
    assert loop.train(collapsing(260), batches, PLAIN, steps=400, seed=0).step == 280
    assert loop.train(collapsing(261), batches, PLAIN, steps=400, seed=0).step == 300  # one healthy step in the window
    early = loop.train(collapsing(0), batches, PLAIN, steps=400, seed=0)
    assert (early.status, early.step) == ("collapsed", 220)
    lenient = dataclasses.replace(PLAIN, stop_on_collapse=False)
    assert loop.train(collapsing(0), batches, lenient, steps=400, seed=0).status == "finished"


def test_the_stop_rule_continues_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of a window, a run collapses at the step at which it would have; and then stays collapsed."""
    monkeypatch.setattr(loop, "SAVING", math.inf)  # save after every step, whatever it costs
    states: list[Any] = []

    def stop(step: int, *_: Any) -> None:
        if step == 270:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(
            collapsing(261), batches, PLAIN, steps=400, seed=0, on_step=stop, save=states.append, report_seconds=0,
            save_seconds=0,
        )  # fmt: skip
    assert states[-1]["step"] == 269
    outcome = loop.train(collapsing(261), batches, PLAIN, steps=400, seed=0, resume=states[-1], save=states.append)
    assert (outcome.status, outcome.step) == ("collapsed", 300)
    assert loop.train(collapsing(261), batches, PLAIN, steps=400, seed=0, resume=states[-1]) == outcome


def test_reports_are_means_since_the_last_and_miss_no_step() -> None:
    told: list[tuple[int, float, float]] = []
    method = line(lambda w, i, x: Loss({"l": w * 0 + i}, {"m": torch.tensor(float(i)), "n": torch.tensor(math.nan)}))
    loop.train(method, batches, PLAIN, steps=30, seed=0, on_step=lambda s, losses, m, lr: told.append((s, losses["l"], m["m"])))
    assert told[-1][0] == 30
    for (before, *_), (step, loss, monitor) in itertools.pairwise([(0, 0.0, 0.0), *told]):
        assert loss == monitor == pytest.approx((before + step - 1) / 2)  # mean of before … step - 1


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_a_frozen_encoder_stays_bit_for_bit_until_its_time_and_its_gradients_are_not_clipped_with(norm: Any) -> None:
    """Of the encoder only the running statistics of batch norms go on."""
    torch.manual_seed(0)
    net = unet.UNet(1, 3, unet.Config(width=4, levels=3, norm=norm))
    method = segment.Segment(net, segment.Config(side=SIDE, crops=1, freeze_encoder=0.5))
    kept = [p.detach().clone() for p in net.encoder.parameters()]
    statistics = [b.clone() for b in net.encoder.buffers()]
    same: list[bool] = []

    def on_step(*_: Any) -> None:
        same.append(all(torch.equal(p, old) for p, old in zip(net.encoder.parameters(), kept, strict=True)))
        if len(same) <= 4:
            assert all(p.grad is None for p in net.encoder.parameters())
            rest = [p.grad for p in method.parameters() if p.grad is not None]
            assert torch.nn.utils.get_total_norm(rest).item() == pytest.approx(1e-3, rel=1e-3)

    training = segment.Training(batch=N, lr=0.01, warmup=0, weight_decay=0.1, clip=1e-3)
    loop.train(method, batches, training, steps=8, seed=0, on_step=on_step, report_seconds=0)
    assert same == [True] * 4 + [False] * 4
    assert not any(torch.equal(b, old) for b, old in zip(net.encoder.buffers(), statistics, strict=True))


def test_weight_decay_follows_its_schedule() -> None:
    """Without a gradient but its own: w ← w (1 - lr λ_k)."""
    method = line(lambda w, index, x: Loss({"l": w * 0}))
    training = dataclasses.replace(PLAIN, weight_decay=0.5, end_weight_decay=0.1)
    loop.train(method, batches, training, steps=8, seed=0)
    expected = math.prod(1 - 0.1 * optimizers.weight_decay(training, k, 8) for k in range(8))
    assert method.w.item() == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx((1 - 0.1 * 0.5) ** 8, rel=1e-2)


def test_looks_come_before_the_save_of_their_step_and_in_eval_mode() -> None:
    events: list[tuple[str, int, bool]] = []
    method = line()
    loop.train(
        method, batches, PLAIN, steps=10, seed=0, save_seconds=0, looks=loop.evenly(10, 3),
        look=lambda step: events.append(("look", step, method.training)),
        save=lambda state: events.append(("save", state["step"], method.training)),
    )  # fmt: skip
    looks = [event for event in events if event[0] == "look"]
    assert looks == [("look", 3, False), ("look", 7, False), ("look", 10, False)]
    for look in looks:
        assert events[events.index(look) + 1] == ("save", look[1], True)
    assert all(method.modes)


def test_a_look_before_the_first_step_and_one_at_the_end_of_a_collapse_are_not_forgotten() -> None:
    def looked(method: Any, steps: int, looks: set[int], resume: Any = None, save: Any = lambda state: None) -> list[int]:
        seen: list[int] = []
        loop.train(method, batches, PLAIN, steps=steps, seed=0, looks=looks, look=seen.append, resume=resume, save=save)
        return seen

    assert looked(line(), 4, {0, 2, 4}) == [0, 2, 4]
    assert looked(line(), 4, set()) == []
    assert looked(collapsing(260), 400, {0, 100, 400}) == [0, 100, 280]
    states: list[Any] = []
    looked(line(), 4, {0}, save=lambda state: states.append(copy.deepcopy(state)))
    begun = states[-1] | {"step": 2, "outcome": states[-1]["outcome"] | {"step": 2, "status": "training"}}
    assert looked(line(), 4, {0, 4}, resume=begun) == [4]


def test_batches_that_end_early_are_an_error() -> None:
    with pytest.raises(RunError, match="the batches ended"):
        loop.train(line(), lambda start: itertools.islice(batches(), 4), PLAIN, steps=5, seed=0)


def test_draws_follow_seed_rank_and_step_alone() -> None:
    def draws(seed: int, rank: int, start: int = 0) -> list[float]:
        seen: list[float] = []

        class Drawing(Line):
            def augment(self, batch: Batch, rng: Generator) -> Views:
                seen.append(torch.rand((), generator=rng).item() + torch.rand(()).item())
                return super().augment(batch, rng)

        method = cast(Any, Drawing(lambda w, i, x: Loss({"l": w**2})))
        loop.train(method, batches, PLAIN, steps=4, seed=seed, rank=rank)
        return seen

    first = draws(0, 0)
    torch.rand(5)
    assert draws(0, 0) == first
    assert len({*first, *draws(1, 0), *draws(0, 1)}) == 12


@pytest.mark.parametrize("stop", [2, 3, 4, 8])
def test_snapshots_survive_kills_and_hold_what_an_undisturbed_training_held(tmp_path: Path, stop: int) -> None:
    """Killed at step `stop`, before its state is saved: whatever had been kept is kept again alike, and nothing is missing."""

    def run(folder: Path, resume: Any = None, stop: int | None = None) -> dict[str, str]:
        method, training = build("simsiam")
        training = dataclasses.replace(training, snapshots=(3, 4, 7, 9))

        def keep(step: int) -> None:
            checkpoint.save(folder / f"encoder@{step}.pt", method.transferable_state())
            if step == stop:
                raise KeyboardInterrupt

        def on_step(step: int, terms: dict[str, float], monitors: dict[str, float], lr: float) -> None:
            if step == stop and step not in training.snapshots:
                raise KeyboardInterrupt

        loop.train(
            method, batches, training, steps=9, seed=3, resume=resume, on_step=on_step, keep=keep, report_seconds=0,
            save=lambda state: checkpoint.save(folder / "c.pt", state), save_seconds=0,
        )  # fmt: skip
        return {file.name: checkpoint.digest(checkpoint.load(file)) for file in sorted(folder.glob("encoder@*.pt"))}

    whole = run(tmp_path / "whole")
    assert list(whole) == ["encoder@3.pt", "encoder@4.pt", "encoder@7.pt", "encoder@9.pt"]
    assert len(set(whole.values())) == 4
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop=stop)
    assert run(tmp_path / "parts", checkpoint.load(tmp_path / "parts" / "c.pt")) == whole


def test_snapshots_change_nothing_of_the_training(tmp_path: Path) -> None:
    ends = []
    for snapshots in ((), (2, 5)):
        method, training = build("simsiam")
        training = dataclasses.replace(training, snapshots=snapshots)
        loop.train(method, batches, training, steps=6, seed=3, keep=lambda step: None)
        ends.append(checkpoint.digest(method.state_dict()))
    assert ends[0] == ends[1]


class Linear(nn.Module):
    """A loss that costs one matrix product forward and one backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4, bias=False)

    def loss(self, views: Views, step: Step) -> Loss:
        return Loss({"sum": self.layer(views.images[0]).sum()})


def test_the_operations_of_a_step_that_the_bench_tells_are_those_of_the_hand() -> None:
    """8 rows of 6 numbers to 4: 2 · 8 · 6 · 4 forward, as many for the weights' gradient, and none for that of the views."""
    from medssl.platform.benches import encoders as bench

    assert bench.operations(Linear(), Training(), [torch.rand(8, 6)]) == 2 * 2 * 8 * 6 * 4
    assert bench.product_rate(torch.device("cpu"), side=16, times=2) > 0
