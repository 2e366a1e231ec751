"""Facts of the U-Net: shapes at any sides, what is normalised over what, and the size of the published network."""

import math

import pytest
import torch
import torch.nn.functional as F

from medssl.methods.networks.unet import Config, UNet, normalisation


def net(**settings) -> UNet:
    torch.manual_seed(0)
    return UNet(2, 3, Config(**({"width": 8, "levels": 3} | settings)))


@pytest.mark.parametrize("sides", [(16, 16), (33, 18), (5, 7), (1, 3), (9, 10, 5)])
def test_logits_have_the_sides_of_the_input(sides):
    assert net(spatial_dims=len(sides), norm="group")(torch.randn(2, 2, *sides)).shape == (2, 3, *sides)


@pytest.mark.parametrize("down", ["pool", "stride"])
def test_a_slice_too_small_for_instance_norm_is_refused_with_a_remedy(down):
    with pytest.raises(ValueError, match=r"level 3 of the U-Net sees one pixel.*fewer levels"):
        net(norm="instance", levels=3, down=down)(torch.randn(2, 2, 4, 4))


def test_strided_and_pooled_networks_have_the_same_state_and_draw_the_same_weights():
    pooled, strided = net().state_dict(), net(down="stride").state_dict()
    assert pooled.keys() == strided.keys()
    assert all(torch.equal(pooled[key], strided[key]) for key in pooled)


@pytest.mark.parametrize("down", ["pool", "stride"])
def test_encoder_maps_halve_and_round_up_from_the_finest_to_the_coarsest(down):
    encoder = net(down=down).encoder
    maps = encoder(torch.randn(1, 2, 33, 18))
    assert encoder.channels == (8, 16, 32)
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 33, 18), (16, 17, 9), (32, 9, 5)]


def test_weights_of_the_published_network_are_those_of_its_figure():
    """Figure 1 of the paper, one channel in, two classes out: 31.0 million with a bias per convolution.

    The biases of its 18 normalised convolutions are scale and shift here, one number more per channel.
    """

    def convolution(inputs: int, outputs: int, side: int) -> int:
        return inputs * outputs * side**2 + outputs

    down = [(1, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512), (512, 1024), (1024, 1024)]
    up = [(1024, 512), (512, 512), (512, 256), (256, 256), (256, 128), (128, 128), (128, 64), (64, 64)]
    ups = [(1024, 512), (512, 256), (256, 128), (128, 64)]
    paper = sum(convolution(*c, 3) for c in down + up) + sum(convolution(*c, 2) for c in ups) + convolution(64, 2, 1)
    assert paper == 31_030_658
    assert sum(p.numel() for p in UNet(1, 2, Config(width=64)).parameters()) == paper + sum(c for _, c in down + up)


@pytest.mark.parametrize("norm", ["group", "instance"])
def test_logits_of_a_slice_do_not_depend_on_its_batch_nor_on_the_mode(norm):
    model, x = net(norm=norm), torch.randn(4, 2, 16, 16)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]))
    torch.testing.assert_close(model.eval()(x), model.train()(x), rtol=0, atol=0)


def test_batch_norm_has_the_state_of_torch():
    ours, torchs = normalisation("batch", 4, 2).state_dict(), torch.nn.BatchNorm2d(4).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in torchs.items()}


def test_instance_norm_makes_the_mean_of_a_map_one_constant_and_group_norm_does_not():
    x = torch.randn(16, 32, 6, 6) + torch.randn(16, 32, 1, 1)
    deviation = {kind: normalisation(kind, 32, 2)(x).mean((2, 3)).std(0).mean() for kind in ("instance", "group")}
    assert deviation["instance"] < 1e-6
    assert deviation["group"] > 0.5


def test_channels_last_survives_the_network():
    model = net(norm="batch").to(memory_format=torch.channels_last)
    x = torch.randn(2, 2, 16, 16).to(memory_format=torch.channels_last)
    for m in (*model.encoder(x), model(x)):
        assert m.is_contiguous(memory_format=torch.channels_last)


def test_a_small_network_learns_to_outline_a_square():
    model = net()
    image = torch.rand(8, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    label = torch.zeros(8, 16, 16, dtype=torch.int64)
    for i in range(8):
        image[i, :, i : i + 6, 4:11] += 0.5
        label[i, i : i + 6, 4:11] = 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = loss = math.inf
    for step in range(40):
        objective = F.cross_entropy(model(image), label)
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        loss = float(objective.detach())
        first = loss if step == 0 else first
    assert loss < 0.1 * first
