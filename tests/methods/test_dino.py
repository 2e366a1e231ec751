"""Facts of DINO: its loss by hand and by brute force over pairs, its centre by its recurrence, its views inside the slice.

This file is also the program of a worker: `test_dino.py RANK FOLDER`.
"""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.methods import dino
from medssl.methods.dino import (
    DINO,
    Centre,
    Config,
    Head,
    Prototypes,
    cross_entropy,
    local_side,
    mean_over_pairs,
    signs,
    warmed,
)
from medssl.methods.networks import unet, unetr
from medssl.methods.optimizers import build, hold
from medssl.methods.protocol import Step, Views
from medssl.methods.settings import Training
from medssl.methods.teacher import cosine_distance, cosine_momentum

STEP = Step(0, 10)
LOCAL = 3
SMALL = {"side": 16, "local_crops": LOCAL, "local_side": 8, "hidden": 16, "bottleneck": 6, "prototypes": 12}
SMALL |= {"teacher_temperature": (0.2, 0.4)}  # so that targets are no single prototype
CHANCES = ("zoom_p", "flip_p", "rot90_p", "intensity_scale_p", "intensity_shift_p", "blur_p", "noise_p")
STILL = dict.fromkeys(CHANCES, 0.0)  # a chain that leaves crops as they are
PARTS = [slice(0, 5), slice(5, 8)]  # unequal on purpose


def method(norm: str = "group", seed: int = 0, **settings: Any) -> DINO:
    torch.manual_seed(seed)
    encoder = unet.UNet(1, 2, unet.Config(width=16, levels=2, norm=norm)).encoder
    return DINO(encoder, Config(**(SMALL | settings)))


def moved(dino: DINO) -> DINO:
    """With heads that tell slices apart, a teacher that is not the student, and a centre that is not 0."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in (
            *dino.head.parameters(),
            *dino.teacher_head.parameters(),
            *dino.teacher_encoder.parameters(),
            dino.centre.value,
        ):
            p.add_(0.3 * torch.randn_like(p))
    return dino


def drawn(n: int = 4, local: int = LOCAL, seed: int = 1) -> Views:
    rng = torch.Generator().manual_seed(seed)
    coarse = [3 * torch.randn(n, 1, 3, 3, generator=rng) for _ in range(2 + local)]  # noise of one pixel looks alike everywhere
    return Views([F.interpolate(x, (side, side)) for x, side in zip(coarse, [16, 16, *[8] * local], strict=True)])


def batch(n: int = 6) -> dict[str, Tensor]:
    """Slices of unequal sizes, 0 beyond them and 200 inside."""
    size = torch.tensor([[40, 40], [30, 40], [40, 33]]).repeat(n // 3, 1)
    image = torch.zeros(n, 1, 40, 40, dtype=torch.uint8)
    for row, (height, width) in enumerate(size.tolist()):
        image[row, :, :height, :width] = 200
    return {"image": image, "size": size}


def student_and_teacher(dino: DINO, views: Views) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of every view, view by view, without any of the method's own batching."""
    own = [dino.head(dino.encoder(x)[-1].mean((2, 3))) for x in views.images]
    taught = [dino.teacher_head(dino.teacher_encoder(x)[-1].mean((2, 3))) for x in views.images[:2]]
    return own, taught


# ------------------------------------------------------------------------------------------------------------------ loss


def test_cross_entropy_of_two_prototypes_is_that_of_a_coin():
    """Logits ±a/2 over τ are log-odds a/τ, so that H = p log(1 + e^{-a/τ}) + (1 - p) log(1 + e^{a/τ})."""
    a, p, tau = 0.3, 0.8, 0.1
    expected = p * math.log(1 + math.exp(-a / tau)) + (1 - p) * math.log(1 + math.exp(a / tau))
    targets, logits = torch.tensor([[p, 1 - p]]), torch.tensor([[a / 2, -a / 2]])
    assert float(cross_entropy(targets, logits, tau)) == pytest.approx(expected, rel=1e-6)


def test_uniform_outputs_of_the_student_give_log_k():
    k, n = 7, 5
    targets = list(torch.randn(2, n, k).softmax(2))
    students = [torch.full((n, k), 0.4)] * 5
    torch.testing.assert_close(mean_over_pairs(targets, students, 0.1), torch.full((n,), math.log(k)))


@pytest.mark.parametrize("local", [0, 1, LOCAL])
def test_loss_is_the_mean_over_all_pairs_of_different_views(local):
    subject, views, step = moved(method(local_crops=local)), drawn(local=local), Step(2, 40)
    own, taught = student_and_teacher(subject, views)
    tau = 0.2 + 0.2 * (2 / 40) / 0.1
    pairs = []
    for i, t in enumerate(taught):
        for j, s in enumerate(own):
            if i != j:
                p = torch.exp((t - subject.centre.value) / tau)
                p = p / p.sum(1, keepdim=True)
                q = torch.exp(s / 0.1)
                pairs.append(-(p * torch.log(q / q.sum(1, keepdim=True))).sum(1).mean())
    assert len(pairs) == 2 * (2 + local) - 2
    torch.testing.assert_close(subject.loss(views, step).total, torch.stack(pairs).mean())


def test_swapping_the_global_views_leaves_the_loss():
    subject, views = moved(method()), drawn()
    first, second, *rest = views.images
    swapped = subject.loss(Views([second, first, *rest]), STEP).total
    torch.testing.assert_close(swapped, subject.loss(views, STEP).total)


def test_no_gradient_reaches_the_teacher_and_no_optimizer_holds_it():
    subject = method()
    subject.loss(drawn(), STEP).total.backward()
    teacher = {*subject.teacher_encoder.parameters(), *subject.teacher_head.parameters()}
    assert not any(p.requires_grad or p.grad is not None for p in teacher)
    held = {p for group in build(subject, Training()).param_groups for p in group["params"]}
    assert not held & teacher
    assert all(p.grad.any() for p in held)


def test_signs_of_collapse_are_those_of_the_two_ways_to_collapse():
    """A constant encoder: all slices on one point. Sharp targets on one prototype, or, centred by themselves, log K."""
    subject, views = method(), drawn()
    with torch.no_grad():
        for p in subject.teacher_encoder.parameters():
            p.zero_()
        nn.init.normal_(subject.teacher_head.network.projector[4].bias)
    alike = subject.loss(views, STEP).monitors
    torch.testing.assert_close(alike["mean_target_entropy"], alike["target_entropy"])
    taught = student_and_teacher(subject, views)[1][0]
    subject.centre.value.copy_(taught[0])
    uniform = subject.loss(views, STEP)
    assert float(uniform.monitors["target_entropy"]) == pytest.approx(math.log(12), abs=1e-4)
    torch.testing.assert_close(uniform.monitors["divergence"], uniform.total.detach() - math.log(12), atol=1e-4, rtol=0)
    subject.centre.value[3] -= 5
    assert float(subject.loss(views, STEP).monitors["mean_target_entropy"]) == pytest.approx(0, abs=1e-4)


def test_the_index_is_0_for_targets_apart_1_for_uniform_or_equal_ones_and_between_by_what_they_tell():
    apart, equal, uniform = torch.eye(8), torch.eye(8)[:1].expand(8, 8), torch.full((8, 8), 1 / 8)
    halves = torch.eye(8)[[0, 0, 0, 0, 5, 5, 5, 5]]  # one bit of three
    values = [float(signs(targets)["collapse"]) for targets in (apart, equal, uniform, halves)]
    assert values == pytest.approx([0, 1, 1, 2 / 3], abs=1e-6)
    subject = moved(method())
    one = Views([x[:1].expand(4, -1, -1, -1) for x in [drawn().images[0]] * 2])
    late = Step(300, 100_000)  # for the teacher, not for its temperature
    assert float(subject.loss(one, late).monitors["collapse"]) == pytest.approx(1, abs=1e-5)
    assert float(subject.loss(drawn(), late).monitors["collapse"]) < 0.97


def test_nothing_is_called_a_collapse_before_the_teacher_could_have_arrived_once():
    """50 steps at 0.996 move it by a tenth of the way: its targets are those of a random network."""
    subject = moved(method(momentum=0.996))
    travelled = [
        sum(1 - cosine_momentum(0.996, Step(k, total)) for k in range(index)) for index, total in ((49, 50), (600, 2000))
    ]
    assert travelled == pytest.approx([cosine_distance(0.996, Step(49, 50)), cosine_distance(0.996, Step(600, 2000))], rel=0.03)
    assert travelled[0] < 1 < travelled[1]
    assert math.isnan(float(subject.loss(drawn(), Step(49, 50)).monitors["collapse"]))
    assert math.isfinite(float(subject.loss(drawn(), Step(600, 2000)).monitors["collapse"]))


# ------------------------------------------------------------------------------------------------------ teacher and centre


def test_the_temperature_of_the_teacher_rises_to_its_end_and_stays():
    ends = (0.04, 0.07)
    temperatures = [warmed(ends, 0.1, Step(k, 100)) for k in range(100)]
    assert temperatures[0] == 0.04
    assert temperatures[5] == pytest.approx(0.055)
    assert temperatures[10:] == [0.07] * 90
    assert temperatures == sorted(temperatures)
    assert warmed(ends, 0.0, Step(0, 100)) == 0.07


def test_the_centre_after_k_steps_is_its_recurrence_over_all_micro_batches():
    torch.manual_seed(0)
    m, centre = 0.9, Centre(4, 0.9)
    expected = torch.zeros(4)
    for _ in range(5):
        parts = [torch.randn(n, 4) for n in (3, 5)]
        for part in parts:
            targets = centre.targets(part, 0.07)
            torch.testing.assert_close(targets, ((part - expected) / 0.07).softmax(1))
        centre.update()
        expected = m * expected + (1 - m) * torch.cat(parts).mean(0)
        torch.testing.assert_close(centre.value, expected)
    before = centre.value.clone()
    centre.update()  # nothing seen
    centre.eval().targets(torch.randn(3, 4), 0.07)
    centre.update()  # a look leaves no trace
    assert torch.equal(centre.value, before)
    assert set(centre.state_dict()) == {"value"}


def test_a_step_moves_centre_and_teacher_by_their_shares():
    subject, views = moved(method(momentum=0.5)), drawn()
    taught = torch.cat(student_and_teacher(subject, views)[1])
    centre, step = subject.centre.value.clone(), Step(3, 10)
    weights = [module.prototypes.weight.detach().clone() for module in (subject.teacher_head.network, subject.head)]
    subject.loss(views, step)
    assert torch.equal(subject.centre.value, centre)
    subject.after_step(step)
    torch.testing.assert_close(subject.centre.value, 0.9 * centre + 0.1 * taught.mean(0))
    m = 1 - 0.5 * (math.cos(math.pi * 0.3) + 1) / 2
    expected = m * weights[0] + (1 - m) * weights[1]
    torch.testing.assert_close(subject.teacher_head.network.prototypes.weight, expected)


def test_prototypes_rest_for_their_share_of_the_steps():
    subject = method(freeze_last_layer=0.2)
    optimizer = build(subject, Training(lr=0.1, weight_decay=0.1))
    start = subject.head.prototypes.weight.detach().clone()
    for index in range(3):
        optimizer.zero_grad()
        subject.loss(drawn(), Step(index, 10)).total.backward()
        hold(optimizer, Step(index, 10))
        optimizer.step()
        assert torch.equal(subject.head.prototypes.weight, start) == (index < 2)


def test_prototypes_are_compared_by_direction_alone_and_in_single_precision():
    torch.manual_seed(0)
    layer, z = Prototypes(5, 3), torch.randn(4, 5)
    expected = F.cosine_similarity(z[:, None], layer.weight[None], dim=2)
    torch.testing.assert_close(layer(z), expected)
    with torch.no_grad():
        layer.weight.mul_(7)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(3 * z), expected)


def test_the_head_has_the_size_of_the_papers():
    """Vit-S: 384 to 2048, 2048, 256, then 65536 directions."""
    size = sum(p.numel() for p in Head(384, 2048, 256, 65536).parameters())
    assert size == 385 * 2048 + 2049 * 2048 + 2049 * 256 + 65536 * 256


def test_with_a_transformer_the_feature_is_the_class_token_and_the_teacher_drops_no_path():
    torch.manual_seed(0)
    encoder = unetr.Encoder(1, unetr.Config(patch=8, d=16, depth=4, heads=2, grid=2, drop_path=0.9))
    subject, x = DINO(encoder, Config(**SMALL)), drawn().images[0]
    taught = [dino.feature(subject.teacher_encoder.network, x) for _ in range(2)]
    assert torch.equal(*taught)
    assert not torch.equal(dino.feature(encoder, x), dino.feature(encoder, x))
    torch.testing.assert_close(taught[0], encoder.eval().tokens(x)[0])


# ----------------------------------------------------------------------------------------------------------------- views


def test_views_are_two_global_and_the_local_ones_whose_boxes_lie_in_the_slice_with_their_areas():
    subject, slices = method(local_scale=(0.1, 0.3)), batch()
    views = subject.augment(slices, torch.Generator().manual_seed(0))
    assert [x.shape for x in views.images] == [(6, 1, 16, 16)] * 2 + [(6, 1, 8, 8)] * LOCAL
    assert len(views.corners) == len(views.extents) == 2 + LOCAL
    for corner, extent in zip(views.corners, views.extents, strict=True):
        assert (corner >= 0).all()
        assert (corner + extent <= slices["size"]).all()
    for extent in views.extents[2:]:
        share = (extent / slices["size"]).prod(1)
        assert ((share > 0.1 - 0.03) & (share < 0.3 + 0.03)).all()  # sides are rounded to pixels
    assert not torch.equal(views.corners[2], views.corners[3])


def test_local_views_show_their_boxes():
    """Without any chance but the boxes, a slice of 200 inside and 0 beyond gives 200 everywhere."""
    views = method(**STILL).augment(batch(), torch.Generator().manual_seed(0))
    for x in views.images:
        torch.testing.assert_close(x, torch.full_like(x, 200 / 255))


def test_local_views_are_of_the_slices_that_hold_a_pair():
    """Side 30 with no overlap at all: no slice of 40 holds it, one of 60 does."""
    size = torch.tensor([[40, 40], [60, 60], [40, 40]])
    image = torch.arange(3, dtype=torch.float32)[:, None, None, None].expand(3, 1, 60, 60).contiguous()
    subject = method(side=30, crop="fixed", iou=(0.0, 0.0), unreachable="skip", **STILL)
    views = subject.augment({"image": image, "size": size}, torch.Generator().manual_seed(0))
    assert [len(x) for x in views.images] == [1] * (2 + LOCAL)
    for x in views.images:
        torch.testing.assert_close(x, torch.ones_like(x))
    assert views.monitors["skipped"] == 2


def test_without_local_crops_there_are_two_views_and_one_pass():
    subject = method(local_crops=0)
    views = subject.augment(batch(), torch.Generator().manual_seed(0))
    assert len(views.images) == 2
    assert [len(x) for x in dino.by_side(views.images)] == [12]
    subject.loss(views, STEP).total.backward()
    assert subject.head.prototypes.weight.grad.any()


@pytest.mark.parametrize(("side", "local"), [(224, 96), (96, 40), (64, 24), (32, 16), (16, 8), (8, 8)])
def test_a_local_view_has_three_sevenths_of_a_global_ones_side_in_eights(side, local):
    assert local_side(Config(side=side)) == local
    assert local_side(Config(side=side, local_side=13)) == 13


@pytest.mark.parametrize(
    "wrong",
    [
        {"local_crops": -1},
        {"local_side": 0},
        {"local_scale": (0.0, 0.4)},
        {"prototypes": 0},
        {"temperature": 0.0},
        {"teacher_temperature": (0.04, 0.0)},
        {"teacher_warmup": 1.5},
        {"freeze_last_layer": -0.1},
        {"centre_momentum": 2.0},
        {"flip_p": 2.0},
        {"iou": (0.6, 0.3)},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Config(**wrong)


# --------------------------------------------------------------------------------------------------------------- workers


def step(part: slice) -> dict[str, Tensor]:
    """Two steps on a part of a batch: loss and gradients of the second, and the centre after it."""
    subject = moved(method(norm="batch"))
    for index in range(2):
        subject.zero_grad()
        loss = subject.loss(Views([x[part] for x in drawn(8, seed=index).images]), Step(index, 10)).total
        loss.backward()
        subject.after_step(Step(index, 10))
    gradients = {f"gradient.{name}": p.grad for name, p in subject.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "centre": subject.centre.value} | gradients


def test_two_workers_with_parts_equal_one_with_the_whole(tmp_path):
    processes = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in (0, 1)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    whole, (first, second) = step(slice(0, 8)), [torch.load(tmp_path / f"{rank}.result") for rank in (0, 1)]
    assert torch.equal(first["centre"], second["centre"])
    assert len(whole) > 10
    for name in whole.keys() - {"centre"}:
        torch.testing.assert_close((first[name] + second[name]) / 2, whole[name], msg=lambda said, name=name: f"{name}: {said}")
    torch.testing.assert_close(first["centre"], whole["centre"])


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(step(PARTS[rank]), folder / f"{rank}.result")
    dist.destroy_process_group()


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
