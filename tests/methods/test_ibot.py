"""Facts of iBOT: which tokens its loss counts, what it is without masks, and the law of the masks.

This file is also the program of a worker: `test_ibot.py RANK FOLDER`.
"""

import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from medssl.methods import dino
from medssl.methods.ibot import IBOT, Config, draw_masks
from medssl.methods.networks import unetr
from medssl.methods.protocol import Step, Views

STEP = Step(0, 10)
LOCAL = 2
T = 9  # patches of a global view: 24 pixels in patches of 8
SMALL = {"side": 24, "local_crops": LOCAL, "local_side": 8, "hidden": 16, "bottleneck": 6, "prototypes": 12}
SMALL |= {"teacher_temperature": (0.3, 0.5), "teacher_patch_temperature": (0.2, 0.4)}  # so that targets are no single prototype
PARTS = [slice(0, 5), slice(5, 8)]  # unequal on purpose


def encoder() -> unetr.Encoder:
    torch.manual_seed(0)
    return unetr.Encoder(1, unetr.Config(patch=8, d=16, depth=4, heads=2, grid=3))


def moved(subject: Any) -> Any:
    """With heads that tell slices apart, a teacher that is not the student, centres and a mask token that are not 0."""
    names = [name for name, _ in subject.named_parameters() if name == "mask_token" or "teacher" in name or "head" in name]
    state = dict(subject.named_parameters()) | dict(subject.named_buffers())
    centres = [name for name in state if name.endswith("centre.value")]
    with torch.no_grad():
        for name in names + centres:
            rng = torch.Generator().manual_seed(len(name))
            state[name].add_(0.3 * torch.randn(state[name].shape, generator=rng))
    return subject


def method(**settings: Any) -> IBOT:
    return moved(IBOT(encoder(), Config(**(SMALL | settings))))


def drawn(n: int = 4, seed: int = 1, hidden: float = 0.4) -> Views:
    rng = torch.Generator().manual_seed(seed)
    images = [3 * torch.randn(n, 1, side, side, generator=rng) for side in (24, 24, *[8] * LOCAL)]
    masks = [torch.rand(n, T, generator=rng) < hidden for _ in range(2)]
    masks[0][1] = False  # a view that is not masked
    return Views(images, masks=masks)


# ------------------------------------------------------------------------------------------------------------------ loss


def test_the_masked_loss_is_the_mean_over_views_of_the_mean_over_hidden_tokens():
    """Token by token; a view without hidden tokens counts as 0, as in the authors' code."""
    subject, views, step = method(), drawn(), Step(3, 1000)
    tau = 0.2 + 0.2 * (3 / 1000) / (30 / 800)
    views_total, direct = 0.0, 0
    for x, mask in zip(views.images[:2], views.masks, strict=True):
        with torch.no_grad():
            seen = subject.encoder.tokens(x, mask, subject.mask_token)[1]
            taught = subject.teacher_encoder.network.tokens(x)[1]
            for row in range(len(x)):
                tokens = []
                for t in range(T):
                    if mask[row, t]:
                        p = ((subject.teacher_head(taught[row, t][None])[0] - subject.patch_centre.value) / tau).softmax(0)
                        q = (subject.head(seen[row, t][None])[0] / 0.1).softmax(0)
                        tokens.append(float(-(p * q.log()).sum()))
                views_total += sum(tokens) / max(1, len(tokens))
                direct += 1
    assert direct == 8
    assert float(subject.loss(views, step).terms["masked"].detach()) == pytest.approx(views_total / direct, rel=1e-4)


def test_what_the_teacher_says_of_visible_patches_does_not_enter():
    subject, views = method(), drawn()
    mask = torch.cat(views.masks)
    patches, taught = torch.randn(8, T, 16, requires_grad=True), torch.randn(8, T, 16)
    loss = subject.masked(patches, taught, mask, STEP)
    loss.backward()
    assert patches.grad is not None
    assert torch.equal(patches.grad.abs().sum(2) > 0, mask)
    other = torch.where(mask[..., None], taught, torch.randn(8, T, 16))
    torch.testing.assert_close(subject.masked(patches, other, mask, STEP), loss)


def test_without_a_mask_it_is_dino_on_the_class_tokens():
    subject, views = method(), drawn()
    views = Views(views.images, masks=[torch.zeros(4, T, dtype=torch.bool)] * 2)
    twin = dino.DINO(encoder(), Config(**SMALL))
    twin.load_state_dict({key: value for key, value in subject.state_dict().items() if key in twin.state_dict()})
    loss = subject.loss(views, STEP)
    assert loss.terms["masked"] == 0
    torch.testing.assert_close(loss.total, twin.loss(views, STEP).total)


def test_the_student_sees_masked_global_views_and_the_teacher_whole_ones():
    subject, views = method(), drawn(hidden=1.0)
    views.masks[0][:] = True
    taken = subject.loss(views, STEP)
    blind = Views([torch.rand_like(x) for x in views.images[:2]] + views.images[2:], masks=views.masks)
    with torch.no_grad():
        seen = [subject.encoder.tokens(each.images[0], each.masks[0], subject.mask_token)[0] for each in (views, blind)]
    torch.testing.assert_close(*seen)
    assert not torch.isclose(taken.total, subject.loss(blind, STEP).total)


def test_weights_scale_the_terms():
    plain, weighted = (
        method(**weights).loss(drawn(), STEP).terms for weights in ({}, {"class_weight": 2, "patch_weight": 0.5})
    )
    torch.testing.assert_close(weighted["distillation"], 2 * plain["distillation"])
    torch.testing.assert_close(weighted["masked"], plain["masked"] / 2)


def test_a_step_moves_each_centre_towards_the_mean_of_its_own_tokens():
    subject, views = method(), drawn()
    centres = [subject.centre.value.clone(), subject.patch_centre.value.clone()]
    tokens = [subject.teacher_encoder.network.tokens(x) for x in views.images[:2]]
    logits = [torch.cat([subject.teacher_head(part[kind].flatten(0, -2)) for part in tokens]) for kind in (0, 1)]
    assert [len(each) for each in logits] == [8, 8 * T]
    subject.loss(views, STEP)
    subject.after_step(STEP)
    for centre, before, each in zip((subject.centre, subject.patch_centre), centres, logits, strict=True):
        torch.testing.assert_close(centre.value, 0.9 * before + 0.1 * each.mean(0).detach())


# ----------------------------------------------------------------------------------------------------------------- masks


def test_views_carry_a_mask_for_each_global_view_over_its_patches_even_where_the_last_is_part_padding():
    subject = method(side=28, mask_p=1.0)
    image = torch.randint(0, 256, (5, 1, 40, 40), dtype=torch.uint8)
    views = subject.augment({"image": image, "size": torch.full((5, 2), 40)}, torch.Generator().manual_seed(0))
    assert [mask.shape for mask in views.masks] == [(5, 16)] * 2
    assert len(views.images) == 2 + LOCAL
    assert not torch.equal(*views.masks)
    assert torch.isfinite(subject.loss(views, STEP).total)


def block_mask(ratio: float, side: int, rng: random.Random) -> int:
    """How many patches algorithm 1 of BEiT hides with the bounds of iBOT, patch by patch; ends when ten tries did not fit."""
    hidden: set[tuple[int, int]] = set()
    failed = 0
    while len(hidden) < ratio * side**2 and failed < 10:
        room = ratio * side**2 - len(hidden)
        area = rng.uniform((side // 3) ** 2, room)
        aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        failed += 1
        if h < side and w < side:
            top, left = rng.randint(0, side - h), rng.randint(0, side - w)
            block = {(top + i, left + j) for i in range(h) for j in range(w)}
            if 0 < len(block - hidden) <= room:
                hidden |= block
                failed = 0
    return len(hidden)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("side", [6, 14])
def test_the_hidden_share_is_that_of_blocks_laid_one_by_one(side, ratio):
    n, config = 3000, Config(mask_p=1.0, mask_ratio=(ratio, ratio))
    ours = draw_masks(n, [side, side], config, torch.Generator().manual_seed(0)).float().mean(1)
    assert float(ours.max()) <= ratio + 1e-6
    rng = random.Random(0)
    theirs = torch.tensor([block_mask(ratio, side, rng) / side**2 for _ in range(n)])
    assert float(ours.mean()) == pytest.approx(float(theirs.mean()), abs=0.006)


def test_half_of_the_views_are_masked_by_ratios_up_to_their_draw():
    masks = draw_masks(20_000, [14, 14], Config(), torch.Generator().manual_seed(0))
    share = masks.float().mean(1)
    some = share > 0
    assert float(some.float().mean()) == pytest.approx(0.5, abs=0.02)
    assert float(share.max()) <= 0.5
    assert float(share[some].mean()) == pytest.approx(0.3, abs=0.02)
    deciles = torch.histc(share[some], bins=4, min=0.1, max=0.5) / some.sum()
    assert ((deciles > 0.2) & (deciles < 0.28)).all()  # uniform, but for what did not fit


def test_hidden_patches_lie_in_blocks_and_everywhere():
    """Neighbours of a hidden patch are hidden more often than patches in general; no place is spared, no side preferred."""
    masks = draw_masks(4000, [14, 14], Config(mask_p=1.0), torch.Generator().manual_seed(0)).view(-1, 14, 14)
    p = masks.float().mean()
    together = (masks[:, 1:] & masks[:, :-1]).float().mean()
    assert together > 1.5 * p**2
    assert together / p > 0.75
    where = masks.float().mean(0)
    assert (where > 0).all()
    for mirrored in (where.flip(0), where.flip(1), where.T):
        torch.testing.assert_close(where, mirrored, atol=0.04, rtol=0)


def test_blocks_in_three_dimensions():
    masks = draw_masks(500, [6, 5, 4], Config(mask_p=1.0), torch.Generator().manual_seed(0))
    assert masks.shape == (500, 120)
    assert float(masks.float().mean()) == pytest.approx(0.28, abs=0.04)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mask_p": 1.5},
        {"mask_ratio": (0.5, 0.1)},
        {"mask_ratio": (0.0, 0.1)},
        {"teacher_patch_temperature": (0.0, 0.07)},
        {"class_weight": -1.0},
        {"prototypes": 0},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Config(**wrong)


# --------------------------------------------------------------------------------------------------------------- workers


def step(part: slice) -> dict[str, Tensor]:
    """Two steps on a part of a batch: loss and gradients of the second, and the centres after it."""
    subject = method()
    for index in range(2):
        subject.zero_grad()
        views = drawn(8, seed=index)
        loss = subject.loss(Views([x[part] for x in views.images], masks=[mask[part] for mask in views.masks]), STEP).total
        loss.backward()
        subject.after_step(STEP)
    gradients = {f"gradient.{name}": p.grad for name, p in subject.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "centre": subject.centre.value, "patches": subject.patch_centre.value} | gradients


def test_two_workers_with_parts_equal_one_with_the_whole(tmp_path):
    processes = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in (0, 1)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    whole, (first, second) = step(slice(0, 8)), [torch.load(tmp_path / f"{rank}.result") for rank in (0, 1)]
    assert "gradient.mask_token" in whole
    for name, value in whole.items():
        if name.startswith("gradient") or name == "loss":
            torch.testing.assert_close((first[name] + second[name]) / 2, value, msg=lambda said, name=name: f"{name}: {said}")
        else:
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name], value)


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(step(PARTS[rank]), folder / f"{rank}.result")
    dist.destroy_process_group()


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
