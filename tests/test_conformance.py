"""Laws that hold for every method and every network, found by listing the folders: a new file is under them at once."""

import ast
import dataclasses
import inspect
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medssl.methods import segment, uafs
from medssl.methods.hooks import pdcr
from medssl.methods.optimizers import build, learning_rate, set_lr
from medssl.methods.protocol import UNLABELLED, Step, Views
from medssl.methods.settings import Training
from medssl.platform import find

METHODS, NETWORKS = find.names("method"), find.names("network")
SMALL = {"side": 16, "width": 8, "levels": 3, "d": 16, "hidden": 16, "bottleneck": 8}  # where a Config has such a field
SMALL |= {"patch": 8, "depth": 4, "heads": 2, "prototypes": 32, "blocks": 1, "negatives": 3}
CLASSES = 3
SOURCE = re.compile(r"https?://(arxiv\.org/abs/\d{4}\.\d{4,5}|doi\.org/10\.\d{4,}/\S+|\S+\.\S+/\S+)")


def shrunk(config: type) -> Any:
    return config(**{f.name: SMALL[f.name] for f in dataclasses.fields(config) if f.name in SMALL})


def network(name: str = "unet", seed: int = 0, **settings: Any) -> nn.Module:
    torch.manual_seed(seed)
    module = find.load("network", name)
    return module.NETWORK(1, CLASSES, dataclasses.replace(shrunk(module.Config), **settings))


def wants(name: str) -> str:
    """What a method is built around: "encoder" for pretraining, "network" for segmentation."""
    return next(p for p in list(inspect.signature(find.load("method", name).METHOD).parameters)[:1])


def network_of(name: str) -> str:
    """The network that a method is built with here: the first of those it declares, if it does."""
    return find.constant("method", name, "ENCODERS", ("unet",))[0]


def method(name: str, seed: int = 0, of: str | None = None) -> Any:
    module, net = find.load("method", name), network(of or network_of(name), seed)
    return module.METHOD(net.encoder if wants(name) == "encoder" else net, shrunk(module.Config))


def batch(n: int = 6, side: int = 40) -> dict[str, Tensor]:
    """Slices of two sizes, one of them without a label."""
    rng = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (n, 1, side, side), generator=rng, dtype=torch.uint8)
    label = torch.randint(0, CLASSES, (n, side, side), generator=rng, dtype=torch.uint8)
    size = torch.full((n, 2), side)
    image[0, :, 36:], label[0, 36:], size[0, 0] = 0, UNLABELLED, 36
    label[1] = UNLABELLED
    numbers = {key: torch.arange(n) for key in ("patient", "volume", "index")}
    return {"image": image, "label": label, "size": size, "position": torch.linspace(0, 1, n)} | numbers


def views(subject: Any, seed: int = 0) -> Views:
    return subject.augment(batch(), torch.Generator().manual_seed(seed))


def tensors(drawn: Views) -> list[Tensor]:
    labels = [] if drawn.labels is None else [drawn.labels]
    return [*drawn.images, *drawn.corners, *drawn.extents, *drawn.masks, *drawn.groups.values(), *labels]


@pytest.mark.parametrize("name", METHODS)
def test_loss_is_a_finite_scalar_and_monitors_are_detached_scalars(name):
    loss = (subject := method(name)).loss(views(subject), Step(0, 10))
    assert loss.total.shape == ()
    assert torch.isfinite(loss.total)
    for term in loss.terms.values():
        assert term.shape == ()
    for key, value in loss.monitors.items():
        assert value.shape == (), key
        assert not value.requires_grad, key


@pytest.mark.parametrize("name", METHODS)
def test_gradient_reaches_every_parameter_that_asks_for_one(name):
    subject = method(name)
    subject.loss(views(subject), Step(1, 10)).total.backward()
    unreached = [key for key, p in subject.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not unreached
    assert all(p.grad is None for p in subject.parameters() if not p.requires_grad)


@pytest.mark.parametrize("of", NETWORKS)
def test_reconstructing_hidden_patches_reaches_every_parameter_of_every_encoder(of):
    subject = method("mae", of=of)
    loss = subject.loss(views(subject), Step(1, 10)).total
    loss.backward()
    assert torch.isfinite(loss)
    assert not [key for key, p in subject.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


@pytest.mark.parametrize("name", METHODS)
def test_optimizer_groups_hold_every_trainable_parameter_once(name):
    subject = method(name)
    grouped = [id(p) for group in subject.parameter_groups(0.1) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in subject.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", METHODS)
def test_equal_generators_give_equal_views_and_unequal_ones_differ(name):
    subject = method(name)
    first, again, other = (tensors(views(subject, seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_views_neither_read_nor_move_the_global_generator(name):
    subject = method(name)
    torch.manual_seed(3)
    first, state = tensors(views(subject)), torch.get_rng_state()
    torch.manual_seed(4)
    assert all(torch.equal(a, b) for a, b in zip(first, tensors(views(subject)), strict=True))
    torch.manual_seed(3)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", METHODS)
def test_loss_is_deterministic_given_the_views(name):
    a, b = method(name), method(name)
    drawn = views(a)
    torch.manual_seed(1)
    first = a.loss(drawn, Step(0, 10)).total
    torch.manual_seed(2)
    assert torch.equal(first, b.loss(drawn, Step(0, 10)).total)


@pytest.mark.parametrize("name", METHODS)
def test_what_transfers_loads_strictly_into_the_part_it_is_for(name):
    sent = method(name, seed=0).transferable_state()
    fresh = network(network_of(name), seed=1)
    target = fresh.encoder if wants(name) == "encoder" else fresh
    blocks = find.constant("method", name, "TRANSFERS", "encoder") != "encoder"
    missing = target.load_state_dict(sent, strict=not blocks).missing_keys
    assert all(torch.equal(target.state_dict()[key], value) for key, value in sent.items())
    assert all(key.startswith(("decoder.", "head.")) for key in missing), "an encoder comes whole"


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_says_of_itself_for_plans_is_what_it_does(name):
    module = find.load("method", name)
    for constant, usual in (("TRANSFERS", "encoder"), ("VIEWS", "crops"), ("SLICES_ONLY", False)):
        assert find.constant("method", name, constant, usual) == getattr(module, constant, usual)
    sent = method(name).transferable_state()
    if name != "segment":
        assert any(key.startswith("decoder.") for key in sent) == (getattr(module, "TRANSFERS", "") == "encoder+decoder")


def train(subject: Any, optimizer: torch.optim.Optimizer, steps: range, training: Training) -> list[float]:
    losses = []
    for index in steps:
        step = Step(index, 10)
        set_lr(optimizer, learning_rate(training, index, 10))
        total = subject.loss(views(subject, seed=index), step).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        subject.after_step(step)
        losses.append(float(total.detach()))
    return losses


@pytest.mark.parametrize("name", METHODS)
def test_saving_loading_and_continuing_equals_not_stopping(name):
    training = find.load("method", name).Training()
    subject = method(name, seed=0)
    optimizer = build(subject, training)
    train(subject, optimizer, range(2), training)
    file = io.BytesIO()
    torch.save({"method": subject.state_dict(), "optimizer": optimizer.state_dict()}, file)
    uninterrupted = train(subject, optimizer, range(2, 5), training)

    file.seek(0)
    saved = torch.load(file)
    continued = method(name, seed=1)
    continued.load_state_dict(saved["method"], strict=True)
    optimizer = build(continued, training)
    optimizer.load_state_dict(saved["optimizer"])
    assert train(continued, optimizer, range(2, 5), training) == uninterrupted


# Three dimensions


SOLID_METHODS = [name for name in METHODS if not find.constant("method", name, "SLICES_ONLY", False)]
SOLID = [name for name in NETWORKS if "spatial_dims" in {f.name for f in dataclasses.fields(find.settings("network", name))}]


def solid_method(name: str) -> Any:
    """A method around the 3D U-Net, or the network that it declares."""
    module, net = find.load("method", name), network(network_of(name), spatial_dims=3)
    return module.METHOD(net.encoder if wants(name) == "encoder" else net, shrunk(module.Config))


def volumes(n: int = 6) -> dict[str, Tensor]:
    """Volumes as `platform/volumes.py` delivers them: two depths, one without a label, no position."""
    rng = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (n, 1, 24, 22, 20), generator=rng, dtype=torch.uint8)
    label = torch.randint(0, CLASSES, (n, 24, 22, 20), generator=rng, dtype=torch.uint8)
    size = torch.tensor([24, 22, 20]).repeat(n, 1)
    image[0, ..., 17:], label[0, ..., 17:], size[0, 2] = 0, UNLABELLED, 17
    label[1] = UNLABELLED
    return {"image": image, "label": label, "size": size} | {key: torch.arange(n) for key in ("patient", "volume", "index")}


def solid_views(subject: Any, seed: int = 0) -> Views:
    return subject.augment(volumes(), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SOLID_METHODS)
def test_every_method_learns_from_volumes(name):
    subject = solid_method(name)
    drawn = solid_views(subject)
    assert all(images.dim() == 5 for images in drawn.images)
    loss = subject.loss(drawn, Step(1, 10))
    assert torch.isfinite(loss.total)
    loss.total.backward()
    unreached = [key for key, p in subject.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not unreached


@pytest.mark.parametrize("name", SOLID_METHODS)
def test_equal_generators_give_equal_views_of_volumes(name):
    subject = solid_method(name)
    first, again, other = (tensors(solid_views(subject, seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", SOLID)
@pytest.mark.parametrize("sides", [(32, 32, 32), (21, 18, 24)])
def test_networks_give_logits_of_the_sides_of_a_volume(name, sides):
    net = network(name, spatial_dims=3)
    logits = net(torch.rand(2, 1, *sides))
    assert logits.shape == (2, CLASSES, *sides)
    logits.square().mean().backward()
    assert not [key for key, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    maps = net.encoder(torch.rand(2, 1, *sides))
    assert [m.shape[1] for m in maps] == list(net.encoder.channels)
    assert all(m.dim() == 5 for m in maps)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("sides", [(32, 32), (37, 44)])
def test_networks_give_logits_of_the_sides_of_the_input(name, sides):
    net = network(name)
    logits = net(torch.rand(2, 1, *sides))
    assert logits.shape == (2, CLASSES, *sides)
    logits.square().mean().backward()
    assert not [key for key, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


@pytest.mark.parametrize("name", NETWORKS)
def test_encoders_give_maps_of_their_channels_from_the_finest_to_the_coarsest(name):
    encoder = network(name).encoder
    maps = encoder(torch.rand(2, 1, 32, 32))
    assert [m.shape[1] for m in maps] == list(encoder.channels)
    sides = [m.shape[-1] for m in maps]
    assert sides == sorted(sides, reverse=True)


# What can be put into or beside any network


PLACES = [
    pytest.param(name, dims, marks=[pytest.mark.slow] if (name, dims) == ("swin_unetr", 3) else [])  # cubes of 64 pixels
    for dims in (2, 3)
    for name in (NETWORKS if dims == 2 else SOLID)
]


@pytest.mark.parametrize(("name", "dims"), PLACES)
def test_uafs_and_pdcr_find_their_places_in_every_network_and_learn(name, dims):
    def selective() -> nn.Module:
        return uafs.insert(network(name, spatial_dims=3) if dims == 3 else network(name))

    net = selective()
    hook = pdcr.PDCR(net, pdcr.Config())
    assert len(set(hook.config.encoder + hook.config.decoder)) == (4 if dims == 2 else 2)
    strides = [max(hook.fields[layer].stride) for layer in hook.config.encoder]
    coarsest = 4 if name == "unet" else 8  # the small U-Net has three levels
    assert strides == ([2, 4] if dims == 2 else [4, 8] if coarsest == 8 else [4, 2])
    images, labels = torch.rand(2, 1, *(32, 32, 32)[:dims]), torch.randint(0, CLASSES, (2, *(32, 32, 32)[:dims]))
    drawn = Views([images], labels=labels, drawn={"pdcr": {}})
    loss = segment.Segment(net, segment.Config(side=32), {"pdcr": hook}).loss(drawn, Step(0, 10))
    assert {"pdcr/encoder", "pdcr/cross"} < loss.terms.keys()
    assert torch.isfinite(loss.total)
    loss.total.backward()
    learning = {key: p for key, p in net.named_parameters() if ".gate." in key} | dict(hook.named_parameters())
    assert any(".gate." in key for key in learning)
    assert not [key for key, p in learning.items() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    selective().load_state_dict(net.state_dict(), strict=True)


def declared(settings: type) -> list[tuple[Any, ...]]:
    return [(f.name, f.type, f.default, f.default_factory, f.kw_only) for f in dataclasses.fields(settings)]


@pytest.mark.parametrize(
    ("kind", "name", "settings"),
    [("method", name, settings) for name in METHODS for settings in ("Config", "Training")]
    + [("network", name, "Config") for name in NETWORKS],
)
def test_settings_read_from_source_are_those_of_the_module(kind, name, settings):
    read, own = find.settings(kind, name, settings), getattr(find.load(kind, name), settings)
    assert declared(read) == declared(own)
    for each in (read, own):
        assert dataclasses.is_dataclass(each)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(each(), dataclasses.fields(each)[0].name, 0)


@pytest.mark.parametrize(("kind", "name"), [("method", n) for n in METHODS] + [("network", n) for n in NETWORKS])
def test_every_file_cites_a_source_that_can_be_opened(kind, name):
    text = ast.get_docstring(ast.parse(find.path(kind, name).read_text()))
    assert text
    assert SOURCE.search(text)


@pytest.mark.parametrize("name", METHODS)
def test_encoders_that_a_method_declares_are_those_of_networks(name):
    module = find.load("method", name)
    encoders = find.constant("method", name, "ENCODERS", ())
    assert encoders == getattr(module, "ENCODERS", ())
    assert set(encoders) <= set(NETWORKS)


def test_methods_import_without_ray_and_without_the_platform():
    modules = [".".join(file.relative_to(find.ROOT).with_suffix("").parts) for file in (find.ROOT / "methods").rglob("*.py")]
    program = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module("medssl." + module.removesuffix(".__init__"))
alien = [name for name in sys.modules if name.split(".")[0] == "ray" or name.startswith("medssl.platform")]
sys.exit(f"methods/ imports {{alien}}" if alien else 0)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")
    assert ran.returncode == 0, ran.stderr


def imports(file: Path) -> set[str]:
    """Top names of everything a file imports, at its top or inside functions."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}}


def test_only_the_platform_and_the_command_line_import_ray():
    files = [*find.ROOT.glob("*.py"), *(find.ROOT / "methods").rglob("*.py"), *(find.ROOT / "search_spaces").rglob("*.py")]
    assert len(files) > 5
    assert [str(file) for file in files if file.name != "cli.py" and "ray" in imports(file)] == []
