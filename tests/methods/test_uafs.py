"""UAFS: known values, an entropy that is defined for every number of outcomes, and networks that keep their function's type."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from medssl.methods.networks.deeplab import Config as DeepLabConfig
from medssl.methods.networks.deeplab import DeepLabV3Plus
from medssl.methods.networks.unet import Config as UNetConfig
from medssl.methods.networks.unet import UNet
from medssl.methods.settings import UAFS as Config
from medssl.methods.uafs import Gate, Selected, insert, normalised_entropy, places, selected

KNOWN = json.loads((Path(__file__).parent / "known_pdcr.json").read_text())["uafs"]


def known(case: str, key: str) -> torch.Tensor:
    return torch.tensor(KNOWN[case][key], dtype=torch.float64)


@pytest.mark.parametrize("outcomes", [2, 5])
def test_the_published_block_has_its_known_values(outcomes):
    x, weight = known("M2", "feature"), known(f"M{outcomes}", f"conv1x1_weight_{outcomes}x3")
    bias = known("M2", "conv_bias") if outcomes == 2 else torch.zeros(5, dtype=torch.float64)
    logits = torch.einsum("mc,nchw->nmhw", weight, x) + bias.view(1, -1, 1, 1)
    torch.testing.assert_close(selected(x, logits), known(f"M{outcomes}", "output"), rtol=1e-6, atol=1e-9)
    if outcomes == 2:
        entropy = normalised_entropy(logits)[:, 0]
        torch.testing.assert_close(entropy, known("M2", "normalised_entropy"), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(1 - entropy, known("M2", "attention"), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("outcomes", [1, 2, 3, 100])
def test_entropy_is_one_where_all_is_alike_and_zero_where_it_is_certain(outcomes):
    alike = normalised_entropy(torch.zeros(1, outcomes, 2, 2))
    torch.testing.assert_close(alike, torch.full((1, 1, 2, 2), 0.0 if outcomes == 1 else 1.0))
    certain = torch.zeros(1, outcomes, 2, 2)
    certain[:, 0] = 1e4
    certain.requires_grad_()
    entropy = normalised_entropy(certain)
    assert not entropy.any()
    assert torch.autograd.grad(entropy.sum(), certain)[0].isfinite().all()
    any_ = normalised_entropy(torch.randn(2, outcomes, 3, 3, dtype=torch.bfloat16))
    assert any_.dtype == torch.float32
    assert (any_ >= 0).all()
    assert (any_ <= 1 + 1e-6).all()


def test_maps_are_left_alone_where_uncertain_and_doubled_where_certain():
    x = torch.randn(1, 3, 1, 2)
    logits = torch.tensor([[0.0, 50.0], [0.0, -50.0]]).view(1, 2, 1, 2)
    torch.testing.assert_close(selected(x, logits), x * torch.tensor([1.0, 2.0]))


def unet(dims: int = 2, seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    return UNet(1, 3, UNetConfig(width=4, levels=2, spatial_dims=dims))


PLACES = ("encoder.blocks.0", "encoder.blocks.1.2", "decoder.blocks.0")


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("hidden", [16, None])
def test_inserted_anywhere_gradient_flows_and_logits_keep_their_sides(dims, hidden):
    network = insert(unet(dims), Config(layers=PLACES, hidden=hidden))
    logits = network(torch.rand(2, 1, *(12, 9, 10)[:dims]))
    assert logits.shape == (2, 3, *(12, 9, 10)[:dims])
    logits.square().mean().backward()
    assert not [key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert network.eval()(torch.rand(1, 1, *(8,) * dims)).shape == (1, 3, *(8,) * dims)


def test_with_heads_that_are_uncertain_everywhere_the_network_is_what_it_was():
    plain, x = unet(), torch.rand(2, 1, 12, 9)
    network = insert(copy.deepcopy(plain), Config(layers=PLACES))
    for module in network.modules():
        if isinstance(module, Gate):
            nn.init.zeros_(module[-1].weight)
            nn.init.zeros_(module[-1].bias)
    torch.testing.assert_close(network(x), plain(x))


def test_keys_are_those_of_the_network_with_the_wrapped_ones_moved():
    plain = unet()
    before = set(plain.state_dict())
    after = set(insert(plain, Config(layers=("encoder.blocks.0",))).state_dict())
    moved = {key.replace("encoder.blocks.0.", "encoder.blocks.0.module.") for key in before}
    assert moved < after
    assert all(key.startswith("encoder.blocks.0.gate.") for key in after - moved)


def test_a_wrapped_network_is_copied_whole_and_its_state_loads():
    network = insert(unet(), Config(layers=PLACES))
    other = insert(unet(seed=1), Config(layers=PLACES))
    other.load_state_dict(network.state_dict(), strict=True)
    x = torch.rand(2, 1, 12, 9)
    assert torch.equal(other(x), network(x))
    assert torch.equal(copy.deepcopy(network)(x), network(x))


def test_a_single_outcome_doubles_the_map_and_teaches_its_head_nothing():
    module = Selected(nn.Identity(), Gate(3, Config(outcomes=1), 2))
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    out = module(x)
    torch.testing.assert_close(out, 2 * x)
    out.sum().backward()
    assert not any(p.grad.any() for p in module.gate.parameters())


def test_modules_within_modules_are_both_wrapped():
    network = insert(unet(), Config(layers=("encoder.blocks.0", "encoder.blocks.0.2")))
    assert isinstance(network.get_submodule("encoder.blocks.0"), Selected)
    assert isinstance(network.get_submodule("encoder.blocks.0.module.2"), Selected)


def test_the_papers_places_in_deeplab_add_as_many_parameters_as_published():
    with torch.device("meta"):
        network = DeepLabV3Plus(3, 2, DeepLabConfig())
        before = sum(p.numel() for p in network.parameters())
        insert(network)
    assert sum(p.numel() for p in network.parameters()) - before == 802_254


def test_deeplab_with_the_papers_places_learns():
    torch.manual_seed(0)
    network = insert(DeepLabV3Plus(3, 2, DeepLabConfig(width=4)))
    network(torch.rand(2, 3, 48, 64)).square().mean().backward()
    assert not [key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()]


def test_a_place_that_does_not_exist_is_refused_and_nothing_is_changed():
    network = unet()
    keys = list(network.state_dict())
    with pytest.raises(ValueError, match=r'no module "encoder\.blocks\.7"; did you mean enc.*\?; usable modules: enc'):
        insert(network, Config(layers=("encoder.blocks.0", "encoder.blocks.7")))
    assert list(network.state_dict()) == keys


def test_usual_places_are_those_of_the_papers_3d_code_where_its_2d_layers_are_not():
    assert places(UNet(1, 2, UNetConfig(width=4, levels=3, spatial_dims=3))) == ("decoder.blocks.0", "decoder.blocks.1")
    assert places(DeepLabV3Plus(1, 2, DeepLabConfig(width=4, backbone="resnet50"))) == ("decoder.conv2",)


@pytest.mark.parametrize(
    "settings", [{"layers": ()}, {"outcomes": 0}, {"hidden": 0}, {"kernel": 2}, {"dropout": 1.0}, {"layers": ("a", "a")}]
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match="expected"):
        Config(**settings)


def test_the_base_of_the_logarithm_does_not_matter():
    logits = torch.randn(1, 4, 2, 2)
    p = logits.softmax(1)
    torch.testing.assert_close(normalised_entropy(logits), -(p * p.log2()).sum(1, keepdim=True) / math.log2(4))
