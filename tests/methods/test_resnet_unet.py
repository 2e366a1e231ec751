"""Facts of the ResNet U-Net: torchvision's names and size, MONAI's function, SMP's size, any sides."""

import pytest
import torch

from medssl.methods.networks.resnet_unet import Config, ResNetUNet

BACKBONES = {18: 11_176_512, 34: 21_284_672, 50: 23_508_032}  # torchvision's without fc, three channels in
UNETS = {18: 14_328_209, 34: 24_436_369, 50: 32_521_105}  # smp.Unet("resnet18"), …: three channels in, one class


def net(**settings) -> ResNetUNet:
    torch.manual_seed(0)
    return ResNetUNet(2, 3, Config(**({"width": 8, "layers": 18} | settings)))


@pytest.mark.parametrize("layers", [18, 34, 50])
def test_weights_are_those_of_the_published_networks(layers):
    with torch.device("meta"):
        model = ResNetUNet(3, 1, Config(layers=layers))
    assert sum(p.numel() for p in model.encoder.parameters()) == BACKBONES[layers]
    assert sum(p.numel() for p in model.parameters()) == UNETS[layers]


def test_names_and_shapes_are_torchvisions():
    with torch.device("meta"):
        keys = {name: tuple(value.shape) for name, value in ResNetUNet(3, 1, Config()).encoder.state_dict().items()}
    some = {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_var": (64,),
        "bn1.num_batches_tracked": (),
        "layer1.0.conv1.weight": (64, 64, 1, 1),
        "layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "layer1.0.downsample.1.weight": (256,),
        "layer2.0.conv2.weight": (128, 128, 3, 3),
        "layer3.5.bn3.running_mean": (1024,),
        "layer4.2.conv3.weight": (2048, 512, 1, 1),
    }
    assert {name: keys[name] for name in some} == some
    assert len(keys) == 318  # 53 convolutions, and 53 batch norms of five tensors each


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(("layers", "dims"), [(18, 2), (34, 2), (50, 2), (18, 3), (50, 3)])
def test_equal_weights_give_the_maps_of_monai(layers, dims, mode):
    from monai.networks.nets import resnet

    ours = net(layers=layers, spatial_dims=dims).encoder
    theirs = resnet.ResNet(
        "bottleneck" if layers == 50 else "basic",
        [2, 2, 2, 2] if layers == 18 else [3, 4, 6, 3],
        [8, 16, 32, 64],
        spatial_dims=dims,
        n_input_channels=2,
        conv1_t_stride=2,
        feed_forward=False,
        bias_downsample=False,
    )
    with torch.no_grad():
        for name, value in ours.state_dict().items():
            if name.endswith(("running_mean", "running_var")) or ("bn" in name and name.endswith(("weight", "bias"))):
                value.copy_(torch.rand_like(value) + 0.5)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    getattr(ours, mode)()
    getattr(theirs, mode)()
    x = torch.randn(2, 2, *(64,) * dims)
    found = []
    for stage in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
        stage.register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.no_grad():
        theirs(x)
        maps = ours(x)
    for mine, its in zip(maps[1:], found, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [18, 50])
@pytest.mark.parametrize("sides", [(1, 5), (32, 32), (33, 70), (96, 64), (21, 18, 40)])
def test_logits_have_the_sides_of_the_input_and_every_parameter_learns(sides, layers):
    model = net(spatial_dims=len(sides), layers=layers)
    logits = model(torch.randn(1, 2, *sides))
    assert logits.shape == (1, 3, *sides)
    logits.square().mean().backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_maps_halve_and_round_up_from_the_finest_to_the_coarsest():
    encoder = net(layers=50).encoder
    maps = encoder(torch.randn(2, 2, 96, 70))
    assert encoder.channels == (8, 32, 64, 128, 256)
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 48, 35), (32, 24, 18), (64, 12, 9), (128, 6, 5), (256, 3, 3)]


def test_the_first_map_reaches_the_decoder_as_it_left_the_encoder():
    """Rectifiers work in place: none may touch a map that is used twice."""
    model = net()
    maps = model.encoder(torch.randn(2, 2, 64, 64))
    before = [m.clone() for m in maps]
    model.decoder(maps, (64, 64))
    assert all(torch.equal(m, b) for m, b in zip(maps, before, strict=True))


def test_an_encoder_that_would_normalise_one_value_says_so():
    with pytest.raises(ValueError, match="no variance to learn from"):
        net().encoder(torch.randn(1, 2, 32, 32))


@pytest.mark.parametrize("settings", [{"width": 6}, {"layers": 101}])
def test_settings_that_cannot_be_built_are_refused(settings):
    with pytest.raises(ValueError, match="expected"):
        Config(**settings)
