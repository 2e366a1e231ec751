"""Laws that hold for every hook, found by listing the folder: a new file is under them at once."""

import ast
import dataclasses
import io
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medssl.methods import settings
from medssl.methods.networks.unet import Config as UNetConfig
from medssl.methods.networks.unet import UNet
from medssl.methods.optimizers import build
from medssl.methods.protocol import UNLABELLED, Loss, Step, Views
from medssl.methods.segment import Config, Segment, Training
from medssl.platform import find

HOOKS = find.names("hook")
FED = [name for name in HOOKS if not find.constant("hook", name, "LABELLED_ONLY", False)]
STEP = Step(5, 10)
SMALL: dict[str, dict[str, Any]] = {
    "unimatch": {"threshold": 0.5},
    "mutual_information": {"clusters": 3, "heads": 2},
    "redundancy_reduction": {"clusters": 3, "heads": 2},
    "boundary_aware": {"clusters": 3, "heads": 2, "window": 3},
    "infonce": {"labels": ("partition", "place"), "grid": 4, "hidden": 8, "d": 4},
    "self_paced": {"labels": ("patient", "cycle", "self"), "shares": (1.0, 0.1, 0.1), "hidden": 8, "d": 4},
    "superpixel": {"segments": 4, "sigma": 0.5, "places": 12, "hidden": 8, "d": 4},
    "prototypes": {"per_class": 2},
    "cutmix": {"threshold": 0.5},  # so little trained, nothing is sure to 97 %
    "pdcr": {  # maps of the network below, and as many cells as they have
        "encoder": ("encoder.blocks.0", "encoder.blocks.1"),
        "encoder_samples": (16, 8),
        "decoder": ("decoder.blocks.0",),
        "decoder_samples": (8,),
        "cross": ("encoder.blocks.0", "encoder.blocks.1"),
        "cross_samples": 8,
        "cross_stride": 2,
        "adapted": 4,
    },
}
SOURCE = re.compile(r"https?://(arxiv\.org/abs/\d{4}\.\d{4,5}|doi\.org/10\.\d{4,}/\S+|\S+\.\S+/\S+)")


def network(seed: int = 0, dims: Any = 2, norm: Any = "instance") -> UNet:
    """A network that is sure of something: before training none is, and some hooks wait for that."""
    torch.manual_seed(seed)
    net = UNet(1, 3, UNetConfig(width=4, levels=2, spatial_dims=dims, norm=norm))
    net.head.weight.data.mul_(10)
    return net


def segment(*names: str, seed: int = 0, dims: int = 2, **settings: Any) -> Any:
    net, hooks = network(seed, dims), {}
    for name in names:
        module = find.load("hook", name)
        hooks[name] = module.HOOK(net, module.Config(**{**SMALL.get(name, {}), **settings}))
    return Segment(net, Config(side=8, crops=1), hooks)


def batch(dims: int = 2) -> dict[str, Tensor]:
    """Labelled slices, and unlabelled ones of another size, of which one is smaller than a crop. Volumes have no position."""
    rng = torch.Generator().manual_seed(0)
    sides, others = (12, 10, 9)[:dims], (11, 13, 9)[:dims]
    size = torch.tensor([others, others])
    size[1, 0] = 6
    height = {"unlabelled_position": torch.tensor([0.1, 0.9]), "unlabelled_depth": torch.tensor([9, 12])}
    return (height if dims == 2 else {}) | {
        "image": torch.rand(3, 1, *sides, generator=rng),
        "label": torch.randint(0, 3, (3, *sides), generator=rng, dtype=torch.uint8),
        "size": torch.tensor(sides).repeat(3, 1),
        "unlabelled_image": torch.rand(2, 1, *others, generator=rng),
        "unlabelled_size": size,
        "unlabelled_patient": torch.tensor([3, 4]),
        "unlabelled_volume": torch.tensor([6, 8]),
        "unlabelled_phase": torch.tensor([0, 1]),
    }


def views(subject: Any, seed: int = 0, dims: int = 2) -> Views:
    drawn: Views = subject.augment(batch(dims), torch.Generator().manual_seed(seed))
    return drawn


def tensors(drawn: Views) -> list[Tensor]:
    pair, own = drawn.unlabelled, [value for each in drawn.drawn.values() for value in each.values()]
    if pair is not None:
        own += [pair.image, pair.moved, pair.inside, pair.valid, *vars(pair.geometry).values()]
    return [*drawn.images, *own]


def own_terms(loss: Loss, name: str) -> dict[str, Tensor]:
    return {key: value for key, value in loss.terms.items() if key.startswith(f"{name}/")}


def gradients(module: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", FED)
def test_terms_are_finite_scalars_and_reach_the_network_through_unlabelled_images_alone(name, dims):
    subject = segment(name, dims=dims)
    drawn = views(subject, dims=dims)
    nobody = dataclasses.replace(drawn, labels=torch.full_like(drawn.labels, UNLABELLED))
    loss = subject.loss(nobody, STEP)
    assert own_terms(loss, name)
    assert all(term.shape == () and torch.isfinite(term) for term in loss.terms.values())
    assert all(value.shape == () and not value.requires_grad for value in loss.monitors.values())
    loss.total.backward()
    reached = [key for key, p in subject.network.named_parameters() if p.grad is not None and p.grad.any()]
    below = {"encoder": "encoder", "decoder": ("encoder", "decoder")}.get(deepest(subject.hooks[name]), "")
    assert reached == [key for key, _ in subject.network.named_parameters() if key.startswith(below)]


def deepest(hook: Any) -> str:
    """The module whose features a hook looks at, the last if there are several; "" where it looks at the logits."""
    taps = getattr(hook, "taps", None)
    return next((name for name in ("decoder", "encoder") if taps and name in taps.names), "")


@pytest.mark.parametrize("name", HOOKS)
def test_the_gradient_never_reaches_a_teacher_and_always_what_is_trained(name):
    subject = segment(name)
    for index in range(2):  # a teacher that has moved away from its student
        subject.loss(views(subject, index), Step(index, 10)).total.backward()
        with torch.no_grad():
            for p in subject.network.parameters():
                p += 0.1 * torch.randn_like(p)
        subject.after_step(Step(index, 10))
    assert all(p.grad is not None for p in subject.parameters() if p.requires_grad)
    assert all(p.grad is None for p in subject.parameters() if not p.requires_grad)
    grouped = {id(p) for group in subject.parameter_groups(0.0) for p in group["params"]}
    assert grouped == {id(p) for p in subject.parameters() if p.requires_grad}
    if subject.predictor is not subject.network:
        assert not any(p.requires_grad for p in subject.predictor.parameters())


@pytest.mark.parametrize("name", HOOKS)
def test_half_precision_changes_the_term_little_and_reaches_the_network(name):
    subject = segment(name)
    drawn = views(subject)
    whole = own_terms(subject.loss(drawn, STEP), name)
    with torch.autocast("cpu", torch.bfloat16):
        half = subject.loss(drawn, STEP)
    half.total.backward()
    assert all(torch.isfinite(grad).all() for grad in gradients(subject.network))
    for key, value in own_terms(half, name).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, whole[key], rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("name", HOOKS)
def test_a_weight_of_zero_removes_the_term(name):
    subject, plain = segment(name, weight=0.0), segment()
    drawn = views(plain)
    with_hook, without = subject.loss(views(subject), STEP), plain.loss(drawn, STEP)
    assert with_hook.terms.keys() == without.terms.keys() == {"dice", "cross_entropy"}
    with_hook.total.backward()
    without.total.backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(subject.network), gradients(plain.network), strict=True))
    assert all(p.grad is not None for p in subject.parameters() if p.requires_grad)  # workers would wait for ever


@pytest.mark.parametrize("name", HOOKS)
def test_the_term_is_its_weight_times_the_term_of_weight_one(name):
    shared = {"ramp": "constant"}
    one, three = segment(name, weight=1.0, **shared), segment(name, weight=3.0, **shared)
    drawn = views(one)
    (first, *_), (third, *_) = (own_terms(subject.loss(drawn, STEP), name).values() for subject in (one, three))
    torch.testing.assert_close(third, 3 * first)
    risen = segment(name, weight=3.0, ramp="linear", ramp_length=1.0)
    (half, *_) = own_terms(risen.loss(drawn, STEP), name).values()
    torch.testing.assert_close(half, third / 2)


@pytest.mark.parametrize("name", HOOKS)
def test_labelled_crops_are_the_same_with_and_without_the_hook(name):
    with_hook, without = views(segment(name)), views(segment())
    assert without.unlabelled is None
    assert torch.equal(with_hook.images[0], without.images[0])
    assert torch.equal(with_hook.labels, without.labels)


@pytest.mark.parametrize("name", HOOKS)
def test_equal_generators_give_equal_views_and_unequal_ones_differ(name):
    subject = segment(name)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again, other = (tensors(views(subject, seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def stackable() -> list[str]:
    """All hooks, of those that predict the first only."""
    predict = [name for name in HOOKS if find.constant("hook", name, "PREDICTS", False)]
    return [name for name in HOOKS if name not in predict[1:]]


def test_the_order_of_stacking_changes_no_bit():
    names = stackable()
    assert len(names) > 2
    subjects = [segment(*names), segment(*names[::-1])]
    for index in range(2):
        losses = [subject.loss(views(subject, index), Step(index, 10)) for subject in subjects]
        assert torch.equal(losses[0].total, losses[1].total)
        for subject, loss in zip(subjects, losses, strict=True):
            loss.total.backward()
            subject.after_step(Step(index, 10))
    assert subjects[0].state_dict().keys() == subjects[1].state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(*map(gradients, subjects), strict=True))


def test_the_terms_of_a_stack_are_those_of_its_hooks_alone():
    names = [name for name in stackable() if not views(segment(name)).drawn[name]]  # what draws moves the generator on
    stack = segment(*names)
    joint = stack.loss(views(stack), STEP)
    for name in names:
        alone = segment(name)
        for key, value in own_terms(alone.loss(views(alone), STEP), name).items():
            torch.testing.assert_close(joint.terms[key], value)


@pytest.mark.parametrize(
    ("names", "students", "teachers"),
    [
        ((), 1, 0),
        (("mean_teacher",), 2, 1),
        (("entropy_minimisation", "pseudo_label"), 2, 0),
        (("consistency", "entropy_minimisation", "mean_teacher", "pseudo_label"), 3, 1),
    ],
)
def test_a_stack_costs_no_more_forward_passes_than_it_needs(names, students, teachers):
    """Of the network: the labelled crops, x, and T x, each once if anybody asks; of the teacher x."""
    subject, passes = segment(*names), dict.fromkeys(("network", "teacher"), 0)

    def counting(name: str) -> Any:
        def count(*_: Any) -> None:
            passes[name] += 1

        return count

    subject.network.register_forward_hook(counting("network"))
    if subject.predictor is not subject.network:
        subject.predictor.register_forward_hook(counting("teacher"))
    subject.loss(views(subject), STEP)
    assert passes == {"network": students, "teacher": teachers}


def test_two_hooks_that_predict_are_refused():
    predict = [name for name in HOOKS if find.constant("hook", name, "PREDICTS", False)]
    with pytest.raises(ValueError, match=f"{predict[0]} and {predict[1]} each bring one"):
        segment(*predict[:2])


@pytest.mark.parametrize("name", HOOKS)
def test_files_say_truly_whether_their_hook_predicts(name):
    subject = segment(name)
    assert (subject.predictor is not subject.network) == find.constant("hook", name, "PREDICTS", False)
    assert subject.predictor.state_dict().keys() == subject.network.state_dict().keys()
    assert not any(key.startswith(("predictor", "hooks.")) for key in subject.state_dict())


@pytest.mark.parametrize("name", HOOKS)
def test_files_say_truly_whether_their_hook_learns_from_labelled_slices_only(name):
    subject = segment(name)
    assert (views(subject).unlabelled is None) == (name not in FED)
    if name not in FED:
        labelled = {key: value for key, value in batch().items() if not key.startswith("unlabelled")}
        without = subject.augment(labelled, torch.Generator().manual_seed(0))
        assert torch.equal(subject.loss(without, STEP).total, subject.loss(views(subject), STEP).total)


def train(subject: Any, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for index in steps:
        total = subject.loss(views(subject, index), Step(index, 6)).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        subject.after_step(Step(index, 6))
        losses.append(float(total.detach()))
    return losses


@pytest.mark.parametrize("name", HOOKS)
def test_saving_loading_and_continuing_equals_not_stopping(name):
    subject = segment(name)
    optimizer = build(subject, Training())
    train(subject, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"method": subject.state_dict(), "optimizer": optimizer.state_dict()}, file)
    uninterrupted = train(subject, optimizer, range(3, 6))

    file.seek(0)
    saved = torch.load(file)
    continued = segment(name, seed=1)
    continued.load_state_dict(saved["method"], strict=True)
    optimizer = build(continued, Training())
    optimizer.load_state_dict(saved["optimizer"])
    assert train(continued, optimizer, range(3, 6)) == uninterrupted
    assert all(torch.equal(a, b) for a, b in zip(subject.predictor.parameters(), continued.predictor.parameters(), strict=True))


@pytest.mark.parametrize("name", HOOKS)
def test_untracked_batch_norms_follow_labelled_crops_alone(name):
    def statistics(names: tuple[str, ...], untracked: bool = False) -> list[Tensor]:
        net, module = network(norm="batch"), find.load("hook", name)
        hooks = {each: module.HOOK(net, module.Config(**SMALL.get(each, {}))) for each in names}
        subject = Segment(net, Config(side=8, crops=1), hooks, settings.Unlabelled(track=not untracked))
        subject.loss(views(subject), STEP)
        return [buffer for key, buffer in net.named_buffers() if "running" in key]

    alone, tracked, untracked = statistics(()), statistics((name,)), statistics((name,), untracked=True)
    assert len(alone) > 4
    assert not all(torch.equal(a, b) for a, b in zip(alone, tracked, strict=True)) or name == "pdcr", (
        "it has no pass of its own"
    )
    if name in FED:
        assert all(torch.equal(a, b) for a, b in zip(alone, untracked, strict=True))


@pytest.mark.parametrize("name", [name for name in FED if not hasattr(segment(name).hooks[name], "taps")])
def test_pixels_beyond_the_slice_and_beyond_the_move_have_no_say(name):
    """The logits of these pixels get no gradient, in either view."""
    subject = segment(name)
    drawn = views(subject)
    given: dict[str, Tensor] = {}

    class Lookup(nn.Module):
        encoder = nn.Identity()  # some hooks change what it gives

        def forward(self, x: Tensor) -> Tensor:
            key = str(x.data_ptr())
            rng = torch.Generator().manual_seed(len(x))
            given.setdefault(key, torch.randn(len(x), 3, *x.shape[2:], generator=rng).requires_grad_())
            return given[key] + 0 * x.mean()  # some hooks ask how the answer changes with the image

    subject.network = Lookup()
    pair = drawn.unlabelled
    subject.loss(drawn, STEP).total.backward()
    assert not pair.inside.all()
    assert not pair.valid.all()
    for image, counts in ((pair.image, pair.inside), (pair.moved, pair.valid)):
        logits = given.get(str(image.data_ptr()))
        if logits is not None and logits.grad is not None:
            assert not logits.grad[~counts[:, None].expand_as(logits)].any()
            assert logits.grad.any()


def test_hooks_without_unlabelled_slices_are_refused():
    subject = segment("consistency")
    labelled = {key: value for key, value in batch().items() if not key.startswith("unlabelled")}
    with pytest.raises(ValueError, match="consistency learn from unlabelled slices, and the batch has none"):
        subject.augment(labelled, torch.Generator())


@pytest.mark.parametrize("name", HOOKS)
def test_settings_read_from_source_are_those_of_the_module(name):
    read, own = find.settings("hook", name), find.load("hook", name).Config
    assert dataclasses.asdict(read()) == dataclasses.asdict(own())
    with pytest.raises(ValueError, match="weight is -1"):
        read(weight=-1)


@pytest.mark.parametrize("name", HOOKS)
def test_every_file_cites_a_source_that_can_be_opened(name):
    text = ast.get_docstring(ast.parse(find.path("hook", name).read_text()))
    assert text
    assert SOURCE.search(text)


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_are_built_without_values_too(name):
    """So that what a network lacks is told before anything is trained (`stages.check`)."""
    with torch.device("meta"):
        assert segment(name).active
