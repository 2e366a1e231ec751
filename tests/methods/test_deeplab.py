"""Facts of DeepLabV3+: published sizes, torchvision's names, strides, any sides."""

import pytest
import torch

from medssl.methods import receptive
from medssl.methods.gather import JointBatchNorm
from medssl.methods.networks import resnet_unet
from medssl.methods.networks.deeplab import Config, DeepLabV3Plus

# By hand from the published widths. Separable (a -> b): 9a + 2a + ab + 2b; with a 1x1 shortcut of a block: ab + 2b.
PYRAMID = 2 * (2048 * 256 + 512) + 3 * (9 * 2048 * 256 + 512) + (1280 * 256 + 512)
DECODER = (128 * 48 + 96) + (9 * 304 * 256 + 512) + (9 * 256 * 256 + 512)


def separable(a: int, b: int) -> int:
    return 9 * a + 2 * a + a * b + 2 * b


def block(a: int, b: int, c: int) -> int:
    """Three separable convolutions a -> b -> c -> c, and a shortcut where channels change."""
    return separable(a, b) + separable(b, c) + separable(c, c) + (a * c + 2 * c if a != c else 0)


XCEPTION = (
    (27 * 32 + 64) + (9 * 32 * 64 + 128)
    + block(64, 128, 128) + block(128, 256, 256) + block(256, 728, 728) + 16 * block(728, 728, 728) + block(728, 728, 1024)
    + separable(1024, 1536) + separable(1536, 1536) + separable(1536, 2048)
)  # fmt: skip
GATES = sum(9 * 16 * c + 66 for c in (32, 64, 1536, 1536, 2048)), sum(9 * 16 * c + 66 for c in (48, 304))
ADAPTERS = 32 * (64 * 32 + 64 * 64 + 16 * 128 + 4 * 256 + 728) + 5 * 64


def net(**settings) -> DeepLabV3Plus:
    torch.manual_seed(0)
    return DeepLabV3Plus(1, 3, Config(**({"width": 4} | settings)))


def count(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def full(**settings) -> DeepLabV3Plus:
    with torch.device("meta"):
        return DeepLabV3Plus(3, 2, Config(**settings))


def test_parameters_are_as_many_as_published():
    model = full()
    assert count(model.encoder) == XCEPTION
    assert count(model.pyramid) == PYRAMID
    assert count(model.decoder, model.head) == DECODER + 514
    # The published run of PDCR: 38.94, 15.54 and 1.35 million, with UAFS in encoder and decoder and adapters of five maps.
    published = (XCEPTION + GATES[0] + ADAPTERS) / 1e6, PYRAMID / 1e6, (DECODER + 514 + GATES[1]) / 1e6
    assert tuple(round(millions, 2) for millions in published) == (38.94, 15.54, 1.35)


def test_the_residual_encoder_has_torchvisions_names_and_size():
    encoder = full(backbone="resnet50").encoder
    with torch.device("meta"):
        plain = resnet_unet.ResNetUNet(3, 1, resnet_unet.Config(layers=50)).encoder
    shapes = {name: value.shape for name, value in encoder.state_dict().items()}
    assert shapes == {name: value.shape for name, value in plain.state_dict().items()}
    assert count(encoder) == 23_508_032


def test_dilation_takes_the_place_of_the_last_stride_and_changes_no_cell_that_both_have():
    """A stage of stride 2, and the same with stride 1 and dilated: at every other cell they are one function."""
    torch.manual_seed(0)
    config = resnet_unet.Config(layers=50, width=4)
    plain, dilated = resnet_unet.Encoder(1, config).eval(), resnet_unet.Encoder(1, config, dilated=True).eval()
    dilated.load_state_dict(plain.state_dict())
    x = torch.randn(1, 1, 128, 160)
    with torch.no_grad():
        strided, dense = plain(x), dilated(x)
    assert [m.shape[-1] for m in dense] == [80, 40, 20, 10, 10]
    torch.testing.assert_close(dense[-1][..., ::2, ::2], strided[-1])


@pytest.mark.parametrize(("backbone", "strides"), [("xception", (2, 4, 8, 16)), ("resnet50", (2, 4, 8, 16, 16))])
def test_maps_have_their_strides_and_channels(backbone, strides):
    model = net(backbone=backbone)
    maps = model.encoder(torch.rand(2, 1, 64, 96))
    assert [64 // m.shape[2] for m in maps] == [96 // m.shape[3] for m in maps] == list(strides)
    assert tuple(m.shape[1] for m in maps) == model.encoder.channels


def test_fields_of_the_entry_and_middle_flow_are_the_published_ones():
    names = [
        f"encoder.{name}" for name in ("stem1", "stem2", "block1", "block2", "block3", "block4", "block5", "block6", "block7")
    ]
    fields = receptive.fields(full(), names).values()
    assert [field.size[0] for field in fields] == [3, 7, 19, 43, 91, 187, 283, 379, 475]
    assert [field.stride[0] for field in fields] == [2, 2, 4, 8, 16, 16, 16, 16, 16]
    assert [field.channels for field in fields] == [32, 64, 128, 256, 728, 728, 728, 728, 728]


@pytest.mark.parametrize("backbone", ["xception", "resnet50"])
@pytest.mark.parametrize("sides", [(1, 5), (33, 70)])
def test_logits_have_the_sides_of_the_input_and_every_parameter_learns(sides, backbone):
    model = net(backbone=backbone)
    logits = model(torch.rand(3, 1, *sides))
    assert logits.shape == (3, 3, *sides)
    logits.square().mean().backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_a_slice_alone_is_predicted_but_not_trained():
    model = net()
    with pytest.raises(ValueError, match="has no variance to learn from"):
        model(torch.rand(1, 1, 64, 64))
    assert model.eval()(torch.rand(1, 1, 40, 64)).shape == (1, 3, 40, 64)


def test_every_norm_is_joint_over_the_workers():
    norms = [m for m in net().modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(m, JointBatchNorm) for m in norms)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"backbone": "vgg"}, "backbone is vgg"), ({"width": 6}, "multiple of 4"), ({"dropout": (0.5, 0.5, 1.0)}, "dropout is")],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)
