"""Facts of BYOL and of its teacher: the loss at its ends, the stopped gradient, and what the teacher is after k steps."""

import math

import pytest
import torch
from torch import nn

from medssl.methods import byol as module
from medssl.methods.byol import BYOL, Config, distance
from medssl.methods.gather import JointBatchNorm
from medssl.methods.networks.unet import Config as UNetConfig
from medssl.methods.networks.unet import UNet
from medssl.methods.optimizers import build
from medssl.methods.protocol import Step, Views
from medssl.methods.settings import Training
from medssl.methods.teacher import Teacher, cosine_momentum

STEP = Step(0, 10)


class Flat(nn.Module):
    """An encoder whose feature is its input: (n, features, 1, 1) to that very map."""

    def __init__(self, features: int):
        super().__init__()
        self.channels = (features,)

    def forward(self, x):
        return [x]


def method(**settings) -> BYOL:
    torch.manual_seed(0)
    encoder = UNet(1, 2, UNetConfig(width=4, levels=3, norm="batch")).encoder
    return BYOL(encoder, Config(**({"side": 16, "d": 8, "hidden": 16} | settings)))


def pair(n: int = 5) -> Views:
    return Views(list(torch.rand(2, n, 1, 16, 16, generator=torch.Generator().manual_seed(1))))


def test_distance_is_0_for_equal_2_for_orthogonal_and_4_for_opposite_directions():
    q = torch.tensor([[1.0, 2.0], [1.0, 0.0], [3.0, 4.0]])
    z = torch.tensor([[2.0, 4.0], [0.0, 5.0], [-3.0, -4.0]])
    torch.testing.assert_close(distance(q, z), torch.tensor([0.0, 2.0, 4.0]))


def test_loss_is_zero_when_the_prediction_is_the_teachers_projection():
    byol = method()
    byol.predictor = nn.Identity()
    x = pair().images[0]
    assert float(byol.loss(Views([x, x]), STEP).total.detach()) == pytest.approx(0, abs=1e-5)


def test_loss_is_the_squared_distance_of_unit_vectors_in_both_directions():
    byol, views = method(), pair()
    q = [byol.predictor(byol.projector(byol.encoder(x)[-1].mean((2, 3)))) for x in views.images]
    z = [byol.teacher_projector(byol.teacher_encoder(x)[-1].mean((2, 3))) for x in views.images]
    unit = [[row / row.norm() for row in rows] for rows in (*q, *z)]
    squares = [(a - b).square().sum() for a, b in [*zip(unit[0], unit[3], strict=True), *zip(unit[1], unit[2], strict=True)]]
    torch.testing.assert_close(byol.loss(views, STEP).total, torch.stack(squares).sum() / 5)


def test_no_gradient_reaches_the_teacher_and_no_optimizer_holds_it():
    byol = method()
    byol.loss(pair(), STEP).total.backward()
    teacher = {*byol.teacher_encoder.parameters(), *byol.teacher_projector.parameters()}
    assert not any(p.requires_grad or p.grad is not None for p in teacher)
    held = {p for group in build(byol, Training()).param_groups for p in group["params"]}
    assert not held & teacher
    assert len(held) + len(teacher) == len(list(byol.parameters()))


def test_the_teachers_projection_is_a_target_only():
    """With a predictor that ignores its input nothing reaches the student."""
    byol = method()
    byol.predictor = nn.Sequential(nn.Linear(8, 8))
    nn.init.zeros_(byol.predictor[0].weight)
    byol.loss(pair(), STEP).total.backward()
    assert byol.predictor[0].bias.grad.any()
    assert not any(p.grad.any() for p in (*byol.encoder.parameters(), *byol.projector.parameters()))


def test_momentum_rises_from_the_base_at_the_first_step_to_one_at_the_end():
    assert cosine_momentum(0.996, Step(0, 100)) == pytest.approx(0.996, abs=1e-12)
    assert cosine_momentum(0.996, Step(50, 100)) == pytest.approx(0.998, abs=1e-12)
    assert cosine_momentum(0.996, Step(100, 100)) == 1
    rising = [cosine_momentum(0.9, Step(k, 20)) for k in range(21)]
    assert rising == sorted(rising)


def test_a_teacher_after_k_updates_is_the_weighted_sum_of_what_it_followed():
    """θ'_k = m^k θ'_0 + (1 - m) Σ_j m^(k-1-j) θ_j, and its buffers are the last ones."""
    torch.manual_seed(0)
    m, student = 0.9, nn.Sequential(nn.Linear(3, 4), JointBatchNorm(4))
    teacher = Teacher(student)
    weights = [student[0].weight.detach().clone()]
    for _ in range(5):
        nn.init.normal_(student[0].weight)
        weights.append(student[0].weight.detach().clone())
        student(torch.randn(6, 3))  # moves running statistics and counter
        teacher.update(student, m)
    expected = m**5 * weights[0] + (1 - m) * sum(m ** (4 - j) * weights[j + 1] for j in range(5))
    torch.testing.assert_close(teacher.network[0].weight, expected)
    for own, buffer in zip(teacher.network.buffers(), student.buffers(), strict=True):
        assert torch.equal(own, buffer)
    assert int(teacher.network[1].num_batches_tracked) == 5


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_momentum_0_copies_the_student_and_1_leaves_the_teacher(momentum):
    student = nn.Linear(3, 2)
    teacher = Teacher(student)
    before = teacher.network.weight.clone()
    nn.init.normal_(student.weight)
    teacher.update(student, momentum)
    assert torch.equal(teacher.network.weight, before if momentum else student.weight)


def test_the_teacher_shares_nothing_with_its_student_and_follows_the_methods_mode():
    byol = method()
    storages = {p.data_ptr() for p in byol.encoder.parameters()}
    assert not storages & {p.data_ptr() for p in byol.teacher_encoder.parameters()}
    assert all(torch.equal(a, b) for a, b in zip(byol.encoder.parameters(), byol.teacher_encoder.parameters(), strict=True))
    norms = [part for part in byol.teacher_encoder.modules() if isinstance(part, JointBatchNorm)]
    assert norms
    assert not any(part.training for part in byol.eval().teacher_encoder.network.modules())
    byol.train()
    assert all(norm.training for norm in norms)


def test_targets_come_without_dropout_from_the_first_step_on():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Dropout(0.5), JointBatchNorm(3))
    teacher, x = Teacher(student), torch.randn(6, 3)
    for each in (teacher, teacher.eval().train()):
        expected = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(each(x), expected)


def test_after_a_step_the_whole_teacher_has_moved_by_the_scheduled_share():
    byol, step = method(momentum=0.5), Step(3, 10)
    old = {key: p.clone() for key, p in byol.named_parameters() if "teacher" in key}
    student = dict(byol.named_parameters())
    with torch.no_grad():
        for p in (*byol.encoder.parameters(), *byol.projector.parameters()):
            p.add_(1)
    byol.after_step(step)
    m = 1 - 0.5 * (math.cos(math.pi * 0.3) + 1) / 2
    for key, before in old.items():
        twin = student[key.removeprefix("teacher_").replace(".network.", ".")]
        torch.testing.assert_close(student[key], m * before + (1 - m) * twin)


def test_heads_have_the_size_of_the_paper():
    byol = BYOL(Flat(2048), Config())
    sizes = [sum(p.numel() for p in head.parameters()) for head in (byol.projector, byol.predictor)]
    assert sizes == [2048 * 4096 + 2 * 4096 + 4096 * 256, 256 * 4096 + 2 * 4096 + 4096 * 256]


def test_training_is_that_of_the_paper_at_its_rate_per_slice():
    training = module.Training()
    assert (training.optimizer, training.lr, training.weight_decay) == ("lars", 0.2 * training.batch / 256, 1.5e-6)


def test_what_transfers_is_the_student():
    byol = method()
    with torch.no_grad():
        for p in byol.encoder.parameters():
            p.add_(1)
    sent = byol.transferable_state()
    assert all(torch.equal(sent[key], value) for key, value in byol.encoder.state_dict().items())


@pytest.mark.parametrize("wrong", [{"d": 0}, {"hidden": 0}, {"momentum": 1.1}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is|hidden {wrong.get('hidden')}"):
        Config(**wrong)
