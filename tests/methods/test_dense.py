"""Pretrainings of encoder and decoder: their losses by brute force where T moves nothing, and what they train."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from medssl.methods import boundary_aware, dense_iic, dense_infonce, imsat
from medssl.methods.networks.unet import Config as UNetConfig
from medssl.methods.networks.unet import UNet
from medssl.methods.protocol import Step, Views
from medssl.platform import checkpoint, find, weights

STEP = Step(0, 10)
STILL = {"zoom_p": 0, "flip_p": 0, "rot90_p": 0, "intensity_scale_p": 0, "intensity_shift_p": 0, "blur_p": 0, "noise_p": 0}
NAMES = ("boundary_aware", "dense_iic", "dense_infonce", "imsat")


def method(module: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    return module.METHOD(UNet(1, 3, UNetConfig(width=4, levels=3)), module.Config(side=16, **settings))


def drawn(subject: Any, n: int = 4) -> Views:
    image = torch.rand(n, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    return subject.augment({"image": image, "size": torch.tensor([[20, 20]] * n)}, torch.Generator().manual_seed(1))


def maps(subject: Any, image: Tensor) -> Tensor:
    return subject.network.decoder(subject.network.encoder(image)).detach().double()


def clusters(subject: Any, image: Tensor) -> Tensor:
    """(S, cells of all crops, K), by the heads' own weights."""
    f = maps(subject, image).movedim(1, -1).flatten(0, 2)
    return torch.stack([(f @ head[0].weight.double().T + head[0].bias.double()).softmax(1) for head in heads(subject)]).detach()


def heads(subject: Any) -> Any:
    hook = subject.hook
    return (hook.head if hasattr(hook, "head") else hook.heads[0]).heads


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours.detach().double(), expected, rtol=1e-4, atol=1e-5)


def test_imsat_is_agreement_less_the_information_of_clusters():
    subject = method(imsat, clusters=5, heads=2, **STILL)
    views = drawn(subject)
    q = clusters(subject, views.images[0])
    sure = -(q * q.log()).sum(2).mean()
    mean = q.mean(1)
    used = -(mean * mean.log()).sum(1).mean()
    loss = subject.loss(views, STEP)
    close(loss.terms["agreement"], sure)  # where T moves nothing, the target is the answer itself
    close(loss.terms["information"], 0.1 * (sure - 4 * used))


def test_dense_iic_without_displacement_is_minus_the_mutual_information_of_cells():
    subject = method(dense_iic, clusters=5, heads=2, reach=0, **STILL)
    views = drawn(subject)
    q = clusters(subject, views.images[0])
    losses = []
    for each in q:
        p = each.T @ each / len(each)
        losses.append(-(p * (p / (p.sum(1, keepdim=True) * p.sum(0))).log()).sum())
    close(subject.loss(views, STEP).total, torch.stack(losses).mean())


def test_dense_infonce_tells_cells_of_the_same_place_from_all_others():
    subject = method(dense_infonce, grid=4, places=3, hidden=8, d=6, **STILL)
    views = drawn(subject, n=3)
    f = maps(subject, views.images[0]).view(3, 4, 4, 4, 4, 4).mean((3, 5)).flatten(2)  # a map of 16 averaged to 4 x 4
    rows = []
    for crop, places in zip(f, views.drawn["hook"]["order"].argsort(1)[:, :3], strict=True):
        assert len(set(places.tolist())) == 3
        rows += [crop[:, place] for place in places]
    with torch.no_grad():
        z = torch.nn.functional.normalize(subject.hook.head(torch.stack(rows).float()).double(), dim=1)
    z = torch.cat([z, z])
    total = 0.0
    for i, anchor in enumerate(z):
        s = [float(anchor @ other) / 0.07 for other in z]
        total += math.log(sum(math.exp(value) for j, value in enumerate(s) if j != i)) - s[(i + 9) % 18]
    close(subject.loss(views, STEP).total, torch.tensor(total / 18, dtype=torch.float64))


def test_boundary_aware_has_the_terms_of_the_hook():
    subject = method(boundary_aware, clusters=5, heads=1)
    both = subject.loss(views := drawn(subject), STEP).terms
    assert both.keys() == {"redundancy", "boundary"}
    assert -1 <= both["boundary"] < 0
    twice = method(boundary_aware, clusters=5, heads=1, redundancy=2.0, boundary=0.0).loss(views, STEP).terms
    assert twice.keys() == {"redundancy"}
    torch.testing.assert_close(twice["redundancy"], 2 * both["redundancy"])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_decoder_moves_and_the_encoder_unless_frozen_and_the_last_convolution_never(name, frozen):
    subject = method(find.load("method", name), freeze_encoder=frozen)
    before = {key: value.clone() for key, value in subject.network.state_dict().items()}
    optimizer = torch.optim.SGD(subject.parameter_groups(0.0), lr=0.1)
    subject.loss(drawn(subject), STEP).total.backward()
    optimizer.step()
    moved = {key.split(".")[0] for key, value in subject.network.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == ({"decoder"} if frozen else {"encoder", "decoder"})


@pytest.mark.parametrize("network", find.names("network"))
def test_every_network_is_trained_whole_and_takes_the_weights_over(network, tmp_path):
    module = find.load("network", network)
    small = {"width": 8, "patch": 8, "d": 16, "depth": 4, "heads": 2, "levels": 3}
    known = {key: value for key, value in small.items() if key in module.Config.__dataclass_fields__}
    torch.manual_seed(0)
    subject = dense_iic.DenseIIC(module.NETWORK(1, 3, module.Config(**known)), dense_iic.Config(side=32, clusters=5, heads=1))
    image, size = torch.rand(2, 1, 36, 36), torch.tensor([[36, 36]] * 2)
    views = subject.augment({"image": image, "size": size}, torch.Generator().manual_seed(0))
    subject.loss(views, STEP).total.backward()
    assert not [key for key, p in subject.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    sent = weights.handed_on(subject.transferable_state(), dense_iic.TRANSFERS)
    checkpoint.save(tmp_path / "encoder.pt", sent | {"card": {"chain": "dense_iic"}})
    fresh = module.NETWORK(1, 3, module.Config(**known))
    weights.begin_network(fresh, tmp_path / "encoder.pt")
    ours, theirs = subject.network.state_dict(), fresh.state_dict()
    unequal = {key.split(".")[0] for key in ours if not torch.equal(ours[key], theirs[key])}
    assert unequal == {"head"}


def test_a_method_without_a_side_says_what_to_set():
    subject = dense_iic.DenseIIC(UNet(1, 2, UNetConfig(width=4, levels=2)))
    with pytest.raises(ValueError, match="dense_iic: the side of a view is not known"):
        subject.augment({"image": torch.rand(1, 1, 8, 8), "size": torch.tensor([[8, 8]])}, torch.Generator())
