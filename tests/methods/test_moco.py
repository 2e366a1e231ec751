"""Facts of MoCo: its loss on logits made by hand, and a queue that is the last K keys of all workers, in order.

This file is also the program of a worker: `test_moco.py RANK FOLDER`.
"""

import io
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from medssl.methods.moco import Config, MoCo, compare
from medssl.methods.networks.unet import Config as UNetConfig
from medssl.methods.networks.unet import UNet
from medssl.methods.protocol import Step, Views

STEP = Step(0, 10)
PARTS = [slice(0, 5), slice(5, 8)]  # unequal on purpose


def method(seed: int = 0, **settings) -> MoCo:
    torch.manual_seed(seed)
    encoder = UNet(1, 2, UNetConfig(width=4, levels=2)).encoder
    return MoCo(encoder, Config(**({"side": 8, "d": 4, "hidden": 8, "queue": 12} | settings)))


def pair(n: int = 8, seed: int = 1) -> Views:
    return Views(list(torch.rand(2, n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))))


def unit(method: MoCo, x: Tensor, teacher: bool = False) -> Tensor:
    encoder, head = (method.teacher_encoder, method.teacher_head) if teacher else (method.encoder, method.head)
    rows = head(encoder(x)[-1].mean((2, 3)))
    return rows / rows.norm(dim=1, keepdim=True)


def test_logits_are_the_own_key_first_then_the_queue_over_the_temperature():
    q, k = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.6, 0.8], [0.6, 0.8]])
    queue = torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.8, 0.6]])
    expected = torch.tensor([[0.6, 1.0, 0.0, 0.8], [0.8, 0.0, -1.0, 0.6]]) / 0.2
    torch.testing.assert_close(compare(q, k, queue, 0.2), expected)


def test_loss_equals_equation_1():
    moco, views = method(temperature=0.3), pair()
    q, k = unit(moco, views.images[0]).detach(), unit(moco, views.images[1], teacher=True)
    losses = []
    for own, key in zip(q, k, strict=True):
        positive = math.exp(float(own @ key) / 0.3)
        losses.append(-math.log(positive / (positive + sum(math.exp(float(own @ old) / 0.3) for old in moco.queue))))
    assert float(moco.loss(views, STEP).total.detach()) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_no_gradient_reaches_the_keys_or_the_teacher():
    moco = method()
    moco.loss(pair(), STEP).total.backward()
    teacher = [*moco.teacher_encoder.parameters(), *moco.teacher_head.parameters()]
    assert not any(p.requires_grad or p.grad is not None for p in teacher)
    assert all(p.grad.any() for p in (*moco.encoder.parameters(), *moco.head.parameters()))
    assert not moco.queue.requires_grad


@pytest.mark.parametrize("sizes", [(4,) * 7, (5, 3, 5, 7, 1, 2), (12, 12), (30, 5), (5, 40, 3), (0, 6, 0)])
def test_the_queue_holds_the_last_keys_from_the_oldest_on(sizes):
    """Against a list that is cut at its front; sizes that do not divide the queue, exceed it, or are 0."""
    moco = method()
    reference, keys = list(moco.queue.clone()), torch.randn(sum(sizes), 4)
    for part in keys.split(sizes):
        moco.enqueue(part)
        reference = [*reference, *part][-12:]
        first = int(moco.oldest)
        assert torch.equal(moco.queue.roll(-first, 0), torch.stack(reference))


def test_after_a_step_the_keys_of_all_its_micro_batches_are_in_the_queue_and_not_before():
    moco, views = method(), [pair(4, seed=1), pair(3, seed=2)]
    before = moco.queue.clone()
    keys = torch.cat([unit(moco, each.images[1], teacher=True) for each in views])
    for each in views:
        moco.loss(each, STEP)
        assert torch.equal(moco.queue, before)
    moco.after_step(STEP)
    torch.testing.assert_close(moco.queue[:7], keys)
    assert torch.equal(moco.queue[7:], before[7:])
    moco.after_step(STEP)  # keys enter once
    assert int(moco.oldest) == 7


def test_a_look_in_eval_mode_leaves_no_keys_behind():
    moco = method().eval()
    moco.loss(pair(), STEP)
    before = moco.queue.clone()
    moco.after_step(STEP)
    assert torch.equal(moco.queue, before)


def test_the_teacher_follows_with_constant_momentum():
    moco = method(momentum=0.75)
    before = moco.teacher_head.network[0].weight.clone()
    with torch.no_grad():
        moco.head[0].weight.add_(1)
    moco.after_step(Step(9, 10))
    torch.testing.assert_close(moco.teacher_head.network[0].weight, before + 0.25)


def train(moco: MoCo, steps: range) -> list[float]:
    losses = []
    for index in steps:
        loss = moco.loss(pair(seed=index), Step(index, 6)).total
        loss.backward()
        with torch.no_grad():
            for p in moco.parameters():
                if p.requires_grad:
                    p.sub_(0.1 * p.grad)
        moco.zero_grad()
        moco.after_step(Step(index, 6))
        losses.append(float(loss.detach()))
    return losses


def test_saving_loading_and_continuing_equals_not_stopping():
    moco, continued, file = method(), method(seed=1), io.BytesIO()
    train(moco, range(2))
    torch.save(moco.state_dict(), file)
    file.seek(0)
    continued.load_state_dict(torch.load(file))
    assert train(continued, range(2, 6)) == train(moco, range(2, 6))
    assert all(torch.equal(value, moco.state_dict()[key]) for key, value in continued.state_dict().items())
    assert {"queue", "oldest"} < moco.state_dict().keys()


def test_the_queue_starts_as_unit_vectors_and_defaults_are_those_of_the_papers():
    torch.testing.assert_close(method().queue.norm(dim=1), torch.ones(12))
    config = Config()
    assert (config.d, config.hidden, config.queue, config.momentum, config.temperature) == (128, 2048, 65536, 0.999, 0.2)


@pytest.mark.parametrize("wrong", [{"d": 0}, {"queue": 0}, {"momentum": -0.1}, {"temperature": 0.0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Config(**wrong)


def step(part: slice) -> dict[str, Tensor]:
    moco, views = method(), pair()
    loss = moco.loss(Views([x[part] for x in views.images]), STEP).total
    moco.after_step(STEP)
    return {"loss": loss.detach(), "queue": moco.queue, "oldest": moco.oldest}


def test_two_workers_with_parts_hold_the_queue_of_one_with_the_whole(tmp_path):
    processes = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in (0, 1)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    whole, (first, second) = step(slice(0, 8)), [torch.load(tmp_path / f"{rank}.result") for rank in (0, 1)]
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, whole["loss"])
    assert torch.equal(first["queue"], second["queue"])
    for worker in (first, second):
        torch.testing.assert_close(worker["queue"], whole["queue"])
        assert int(worker["oldest"]) == 8


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(step(PARTS[rank]), folder / f"{rank}.result")
    dist.destroy_process_group()


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
