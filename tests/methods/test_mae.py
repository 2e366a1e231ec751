"""Facts of MAE: how many patches are hidden and which, what the loss looks at, and what the encoder gets to see."""

import math

import pytest
import torch
from torch import Tensor, nn

from medssl.methods import mae
from medssl.methods.mae import MAE, Config, MapDecoder, TokenDecoder
from medssl.methods.networks import unet, unetr
from medssl.methods.protocol import Batch, Step, Views

STEP = Step(0, 10)
TINY = {"side": 32, "d": 12, "depth": 1, "heads": 2, "width": 4, "patch": 8}


def vit(dims: int = 2, channels: int = 1) -> unetr.Encoder:
    torch.manual_seed(0)
    return unetr.Encoder(channels, unetr.Config(patch=8, d=16, depth=4, heads=2, grid=4, spatial_dims=dims))


def convolutional(dims: int = 2, channels: int = 1) -> unet.Encoder:
    torch.manual_seed(0)
    return unet.Encoder(channels, unet.Config(width=4, levels=2, spatial_dims=dims))


ENCODERS = pytest.mark.parametrize("encoder", [vit, convolutional])


def slices(n: int = 5, dims: int = 2, channels: int = 1) -> Batch:
    sides = (44, 40, 36)[:dims]
    image = torch.rand(n, channels, *sides, generator=torch.Generator().manual_seed(0))
    return {"image": image, "size": torch.tensor([sides] * n)}


def drawn(method: MAE, seed: int = 0, **shape: int) -> Views:
    return method.augment(slices(**shape), torch.Generator().manual_seed(seed))


class Saying(nn.Module):
    """A decoder that says the same whatever it is shown."""

    def __init__(self, words: Tensor):
        super().__init__()
        self.words = words

    def forward(self, encoder, images, mask):
        return self.words, torch.eye(len(images))


# ---------------------------------------------------------------------------------------------------------------- masks


@ENCODERS
@pytest.mark.parametrize(("share", "hidden"), [(0.75, 12), (0.5, 8), (0.9, 14)])
def test_every_slice_has_exactly_the_asked_share_of_its_patches_hidden(encoder, share, hidden):
    views = drawn(MAE(encoder(), Config(**(TINY | {"mask": share}))), n=20)
    (mask,) = views.masks
    assert mask.dtype == torch.bool
    assert mask.shape == (20, 16)
    assert mask.sum(1).tolist() == [hidden] * 20


def test_every_set_of_hidden_patches_is_equally_likely():
    """All 20 choices of 3 of 6: χ² of 19 degrees of freedom, 43.8 at p = 0.001."""
    mask = mae.draw_mask(20_000, 6, 3, torch.Generator().manual_seed(0))
    assert mask.sum(1).eq(3).all()
    counts = (mask * 2 ** torch.arange(6)).sum(1).bincount()
    counts = counts[counts > 0]
    assert len(counts) == math.comb(6, 3)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 43.8


@pytest.mark.parametrize("settings", [{"side": 8}, {"side": 16, "mask": 0.1}, {"side": 16, "mask": 0.9}])
def test_a_view_with_nothing_to_hide_or_nothing_to_show_is_refused(settings):
    with pytest.raises(ValueError, match=r"none hidden or none visible.*larger pretrain\.side"):
        drawn(MAE(vit(), Config(**(TINY | settings))))


# ----------------------------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize(("side", "pixels"), [(32, 32), (24, 24), (20, 24)])
def test_a_view_has_its_side_rounded_up_to_whole_patches(side, pixels):
    views = drawn(MAE(vit(), Config(**(TINY | {"side": side}))))
    assert views.images[0].shape == (5, 1, pixels, pixels)
    assert views.masks[0].shape == (5, (pixels // 8) ** 2)


def test_a_view_keeps_intensities_and_comes_from_a_box_of_a_fifth_of_the_slice_or_more():
    batch = slices(n=200)
    batch["image"][:] = torch.linspace(0, 1, 200)[:, None, None, None]
    views = MAE(vit(), Config(**TINY)).augment(batch, torch.Generator().manual_seed(0))
    torch.testing.assert_close(views.images[0], batch["image"][..., :32, :32])
    share = views.extents[0].prod(1) / (44 * 40)
    assert 0.19 < float(share.min()) < 0.3
    assert float(share.max()) > 0.7
    assert (views.corners[0] + views.extents[0] <= batch["size"]).all()


# ----------------------------------------------------------------------------------------------------------------- target


@pytest.mark.parametrize("sides", [(16, 24), (8, 16, 24)])
def test_patches_are_the_blocks_of_the_image_in_row_major_order(sides):
    x = torch.rand(2, 3, *sides)
    found = mae.patches(x, 8)
    for t, place in enumerate(torch.cartesian_prod(*(torch.arange(side // 8) for side in sides)).tolist()):
        block = x[(..., *(slice(8 * at, 8 * at + 8) for at in place))]
        torch.testing.assert_close(found[:, t], block.movedim(1, -1).flatten(1))
    assert found.shape[1] == t + 1


def test_the_target_is_the_patch_less_its_mean_over_its_deviation():
    """0 and 2 in equal numbers have mean 1 and deviation 1; a patch of one value has nothing to say."""
    pixels = torch.tensor([[[0.0, 2.0, 0.0, 2.0], [5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 4.0]]])
    root = 3**0.5
    expected = torch.tensor([[[-1, 1, -1, 1], [0, 0, 0, 0], [-1 / root, -1 / root, -1 / root, root]]])
    torch.testing.assert_close(mae.normalised(pixels), expected, atol=2e-6, rtol=0)


def test_saying_nothing_costs_1_and_the_answer_0():
    method = MAE(vit(), Config(**TINY))
    views = drawn(method)
    method.decoder = Saying(torch.zeros(5, 16, 64))
    assert float(method.loss(views, STEP).total) == pytest.approx(1, abs=1e-3)
    method.decoder = Saying(mae.normalised(mae.patches(views.images[0], 8)))
    assert float(method.loss(views, STEP).total) == 0


def test_the_loss_is_the_mean_square_over_hidden_patches_alone():
    method = MAE(vit(), Config(**TINY))
    (x,), (mask,) = (views := drawn(method)).images, views.masks
    prediction = torch.randn(5, 16, 64)
    method.decoder = Saying(prediction)
    first = method.loss(views, STEP).total
    target = mae.normalised(mae.patches(x, 8))
    squares = [(prediction[i, t] - target[i, t]).square().mean() for i, t in mask.nonzero().tolist()]
    torch.testing.assert_close(first, torch.stack(squares).mean())

    noise = torch.rand_like(x)
    visible = mae.shown(torch.ones_like(x), mask, 8)
    assert torch.equal(method.loss(Views([x + noise * visible], masks=[mask]), STEP).total, first)
    assert not torch.equal(method.loss(Views([x + noise * (1 - visible)], masks=[mask]), STEP).total, first)


# --------------------------------------------------------------------------------------------------- what the encoder sees


@ENCODERS
@pytest.mark.parametrize("dims", [2, 3])
def test_nothing_of_a_hidden_patch_reaches_the_reconstruction(encoder, dims):
    method = MAE(encoder(dims, channels=2), Config(**(TINY | {"side": 16})))
    (x,), (mask,) = (views := drawn(method, dims=dims, channels=2)).images, views.masks
    assert x.shape == (5, 2, *[16] * dims)
    prediction, feature = method.decoder(method.encoder, x, mask)
    assert prediction.shape == (5, 2**dims, 2 * 8**dims)
    visible = mae.shown(torch.ones_like(x), mask, 8)
    assert int(visible.sum()) == int((~mask).sum()) * 2 * 8**dims
    other = x * visible + torch.rand_like(x) * (1 - visible)
    for own, same in zip((prediction, feature), method.decoder(method.encoder, other, mask), strict=True):
        torch.testing.assert_close(own, same)
    assert not torch.allclose(method.decoder(method.encoder, x + 0.1 * torch.rand_like(x) * visible, mask)[0], prediction)


def test_a_vit_runs_on_the_visible_patches_alone_in_their_own_order():
    method = MAE(vit(), Config(**TINY))
    (x,), (mask,) = (views := drawn(method)).images, views.masks
    seen = []
    method.encoder.blocks[0].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    method.decoder(method.encoder, x, mask)
    embedded = method.encoder.embed(x)
    assert seen[0].shape == (5, 1 + 4, 16)
    for i in range(5):
        torch.testing.assert_close(seen[0][i, 1:], embedded[i, ~mask[i]])


def test_the_decoder_puts_every_visible_token_back_in_its_place():
    method = MAE(vit(), Config(**TINY))
    (x,), (mask,) = (views := drawn(method)).images, views.masks
    met = []
    method.decoder.blocks[0].register_forward_hook(lambda module, args, out: met.append(args[0]))
    method.decoder(method.encoder, x, mask)
    tokens = met[0][:, 1:] - mae.sines((4, 4), 12, x.device)
    for i in range(5):
        _, encoded = method.encoder.encode(method.encoder.embed(x[i : i + 1])[:, ~mask[i]])
        torch.testing.assert_close(tokens[i, ~mask[i]], method.decoder.embed(encoded[0]))
        torch.testing.assert_close(tokens[i, mask[i]], method.decoder.mask_token.expand(12, -1))


def test_fixed_positions_are_sines_and_cosines_of_each_axis():
    found = mae.sines((2, 3), 9, torch.device("cpu"))  # 2 wavelengths per axis, one column left over
    row, column = 1, 2
    waves = [f(at / 10000 ** (k / 2)) for at in (row, column) for f in (math.sin, math.cos) for k in (0, 1)]
    torch.testing.assert_close(found[row * 3 + column], torch.tensor([*waves, 0]))


# ------------------------------------------------------------------------------------------------------------------- whole


def test_the_paper_has_a_decoder_of_26_million_weights_for_a_vit_b():
    """Linear d_e d + d, mask token, 8 blocks of 12 d² + 13 d, norm, linear to 16 x 16 x 3 pixels, for d = 512."""
    with torch.device("meta"):
        decoder = MAE(unetr.Encoder(3, unetr.Config(grid=14))).decoder
    d = 512
    closed = 768 * d + d + d + 8 * (12 * d**2 + 13 * d) + 2 * d + d * 768 + 768
    assert sum(p.numel() for p in decoder.parameters()) == closed


def test_the_decoder_follows_from_the_encoder():
    assert isinstance(MAE(vit(), Config(**TINY)).decoder, TokenDecoder)
    assert isinstance(MAE(convolutional(), Config(**TINY)).decoder, MapDecoder)
    assert MAE(vit()).patch == 8
    assert MAE(convolutional()).patch == 16


@ENCODERS
def test_a_trained_method_infers_hidden_patches_from_visible_ones(encoder):
    """Stripes along one axis or the other have orthogonal targets: the best answer without looking costs 1/2."""
    method = MAE(encoder(), Config(**(TINY | {"flip_p": 0, "mask": 0.5, "scale": (1, 1), "ratio": (1, 1), "width": 8})))
    stripes = torch.arange(32).mul(math.pi / 4).cos().expand(8, 1, 32, 32)
    batch = {"image": torch.cat([stripes, stripes.transpose(2, 3)]), "size": torch.tensor([[32, 32]] * 16)}
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    losses = []
    for index in range(80):
        loss = method.loss(method.augment(batch, torch.Generator().manual_seed(index)), STEP).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 0.9
    assert sum(losses[-10:]) / 10 < 0.25


def test_monitors_hold_no_collapse_index_which_would_stop_a_training_that_is_well():
    method = MAE(vit(), Config(**TINY))
    assert method.loss(drawn(method), STEP).monitors.keys() == {"feature_spread", "effective_rank"}


def test_a_patch_that_is_not_the_vits_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"patch is 16: the encoder has patches of 8 pixels; leave it out"):
        MAE(vit(), Config(**(TINY | {"patch": 16})))


@pytest.mark.parametrize(
    "wrong", [{"mask": 0.0}, {"mask": 1.0}, {"d": 4, "heads": 2}, {"d": 9, "heads": 2}, {"patch": 0}, {"side": 0}, {"width": 0}]
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}( is)? {next(iter(wrong.values()))}"):
        Config(**wrong)
