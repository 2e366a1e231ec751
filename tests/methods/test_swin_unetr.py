"""Facts of the Swin UNETR: MONAI's function and weights, the published size, any sides, and when stochastic depth acts."""

import pytest
import torch
from functorch.einops import rearrange

from medssl.methods import pairs, receptive
from medssl.methods.networks.swin_unetr import Config, SwinUNETR


def net(**settings) -> SwinUNETR:
    torch.manual_seed(0)
    return SwinUNETR(2, 3, Config(**({"width": 12, "heads": 3} | settings)))


@pytest.fixture
def monai_nets(monkeypatch):
    """MONAI's Swin UNETR where einops is not installed: torch ships the one function of it that is needed."""
    from monai.networks.nets import swin_unetr

    monkeypatch.setattr(swin_unetr, "rearrange", rearrange)
    return swin_unetr


def monais(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state under MONAI's names."""
    parts = {"encoder": "swinViT.", "decoder": "", "head": "out."}
    split = ((*key.split(".", 1), value) for key, value in state.items())
    return {parts[part] + rest: value for part, rest, value in split}


@pytest.mark.parametrize(("dims", "side", "window"), [(2, 96, 7), (2, 64, 4), (3, 64, 3)])
def test_equal_weights_give_the_maps_and_logits_of_monai(monai_nets, dims, side, window):
    """Its own forward, at maps that hold whole windows, parts of them, and less than one."""
    ours = net(spatial_dims=dims, window=window).eval()
    theirs = monai_nets.SwinUNETR(2, 3, feature_size=12, spatial_dims=dims, window_size=window).eval()
    theirs.load_state_dict(monais(ours.state_dict()), strict=True)
    x = torch.randn(1, 2, *(side,) * dims)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
        for mine, its in zip(ours.encoder(x), theirs.swinViT(x), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dims", "width", "encoder", "whole"), [(2, 48, 6.307, 25.139), (2, 24, 1.594, 6.303), (3, 48, 8.062, 62.187)]
)
def test_weights_are_as_many_as_in_the_ct_study(dims, width, encoder, whole):
    """Millions in MONAI's network as the study builds it: one channel in, 14 classes out."""
    model = SwinUNETR(1, 14, Config(width=width, spatial_dims=dims))
    assert round(sum(p.numel() for p in model.encoder.parameters()) / 1e6, 3) == encoder
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == whole


@pytest.mark.parametrize("sides", [(1, 5), (37, 44), (96, 70), (100, 33), (20, 33, 40)])
def test_logits_have_the_sides_of_the_input_and_every_parameter_learns(sides):
    model = net(spatial_dims=len(sides), window=4, width=6)
    logits = model(torch.randn(1, 2, *sides))
    assert logits.shape == (1, 3, *sides)
    logits.square().mean().backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_an_image_is_padded_with_zeros_to_a_multiple_of_32_and_cut_back():
    model, x = net().eval(), torch.randn(1, 2, 70, 96)
    padded = torch.zeros(1, 2, 96, 96)
    padded[:, :, :70] = x
    torch.testing.assert_close(model(x), model(padded)[:, :, :70])


def test_maps_halve_and_are_normalised_over_their_channels():
    encoder = net().encoder
    assert [tuple(m.shape[2:]) for m in encoder(torch.randn(1, 2, 40, 10))] == [(20, 5), (10, 3), (5, 2), (3, 1), (2, 1)]
    maps = encoder(torch.randn(2, 2, 96, 80))
    assert encoder.channels == (12, 24, 48, 96, 192)
    assert [tuple(m.shape[1:]) for m in maps] == [(12, 48, 40), (24, 24, 20), (48, 12, 10), (96, 6, 5), (192, 3, 3)]
    for m in maps:
        torch.testing.assert_close(m.mean(1), torch.zeros_like(m[:, 0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_logits_of_a_slice_do_not_depend_on_its_batch_nor_on_the_mode(norm):
    """With the default stochastic depth, too: the whole network trains without it, as the CT study fine-tunes."""
    model, x = net(norm=norm, width=24, drop_path=0.5), torch.randn(3, 2, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.eval()(x), model.train()(x), rtol=0, atol=0)


def test_an_encoder_in_training_on_its_own_leaves_out_branches():
    encoder, x = net(drop_path=0.5).encoder.train(), torch.randn(2, 2, 64, 64)
    torch.manual_seed(1)
    first = pairs.feature(encoder(x))
    assert not torch.equal(first, pairs.feature(encoder(x)))
    torch.manual_seed(1)
    assert torch.equal(first, pairs.feature(encoder(x)))
    encoder.eval()
    assert torch.equal(pairs.feature(encoder(x)), pairs.feature(encoder(x)))


def test_half_precision_stays_near_single_precision():
    model, x = net().eval(), torch.randn(1, 2, 64, 64)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(x)
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("settings", [{"heads": 5}, {"depths": (2, 0, 2, 2)}, {"drop_path": 1.0}, {"window": 0}])
def test_settings_that_cannot_be_built_are_refused(settings):
    with pytest.raises(ValueError, match="expected"):
        Config(**settings)


def test_cells_of_merged_patches_lie_in_the_middle_of_them_and_attention_is_noted():
    """Patches of 2 pixels, merged twice: cells of 8 pixels; which others they attend to depends on the image's sides."""
    field = receptive.fields(net(), ["decoder.encoder4"])["decoder.encoder4"]
    assert (field.stride, field.centre, field.everywhere) == ((8, 8), (3.5, 3.5), True)
