"""The chain of the CT study against MONAI, torch and arithmetic: `methods/augment.py`."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from medssl.methods import augment
from medssl.methods.augment import Geometry, apply_geometry, balanced_corners, crop, labelled_view, view
from medssl.methods.protocol import UNLABELLED, intensities
from medssl.methods.settings import Chain

NOTHING = Chain(zoom_p=0, flip_p=0, rot90_p=0, intensity_scale_p=0, intensity_shift_p=0, blur_p=0, noise_p=0)
GEOMETRY = replace(Chain(), intensity_scale_p=0, intensity_shift_p=0, blur_p=0, noise_p=0)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def generator(seed: int = 0, device: str = "cpu") -> Generator:
    return Generator(device).manual_seed(seed)


def bytes_(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(seed))


def geometry(zoom: list[float], flips: list[list[int]], turns: list[int]) -> Geometry:
    return Geometry(torch.tensor(zoom), torch.tensor(flips, dtype=torch.bool), torch.tensor(turns))


def monai_zoom(patch: Tensor, factor: float) -> Tensor:
    """(c, *spatial), as RandZoomd of the study applies it."""
    from monai.transforms import Zoom

    mode = "bilinear" if patch.dim() == 3 else "trilinear"
    return torch.as_tensor(Zoom(factor, mode=mode, padding_mode="constant", keep_size=True)(patch))


# ---------------------------------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float16, torch.float32])
@pytest.mark.parametrize("spatial", [(40, 31), (14, 17, 12)])
def test_a_chain_that_does_nothing_gives_the_exact_box_in_intensities(dtype: torch.dtype, spatial: tuple[int, ...]) -> None:
    image = bytes_(3, 2, *spatial).to(dtype)
    side, rng = 9, generator()
    corner = torch.stack([torch.randint(0, length - side + 1, (3,), generator=rng) for length in spatial], 1)
    corner[0], corner[1] = 0, torch.tensor(spatial) - side  # both ends are legal
    expected = torch.stack([x[(..., *(slice(p, p + side) for p in c.tolist()))] for x, c in zip(image, corner, strict=True)])
    for extent in (None, torch.full_like(corner, side)):
        assert torch.equal(crop(image, corner, extent, side), intensities(expected))
        out = view(image, corner, extent, side, NOTHING, rng)
        assert out.dtype == torch.float32
        assert out.is_contiguous()
        assert torch.equal(out, intensities(expected))


def test_a_resized_box_is_torch_interpolation_with_antialias_where_it_shrinks() -> None:
    image = bytes_(4, 2, 60, 50)
    corner = torch.tensor([[3, 5], [0, 0], [10, 7], [41, 2]])
    extent = torch.tensor([[9, 20], [60, 50], [16, 16], [19, 47]])  # growing, whole slice, exact, mixed
    out = crop(image, corner, extent, 16)
    for i, ((y, x), (h, w)) in enumerate(zip(corner.tolist(), extent.tolist(), strict=True)):
        box = image[i : i + 1, :, y : y + h, x : x + w].float() / 255
        expected = F.interpolate(box, size=(16, 16), mode="bilinear", antialias=True)
        # Weights come from float32 positions up to 60, ulp 4e-6; an intensity changes by 1 per pixel at most.
        torch.testing.assert_close(out[i : i + 1], expected, atol=2e-5, rtol=0)


def test_a_resized_box_in_a_volume_is_trilinear() -> None:
    image, corner, extent = (
        bytes_(2, 1, 20, 14, 16),
        torch.tensor([[3, 2, 1], [8, 6, 5]]),
        torch.tensor([[9, 8, 6], [12, 5, 7]]),
    )
    out = crop(image, corner, extent, 12)
    for i, (c, e) in enumerate(zip(corner.tolist(), extent.tolist(), strict=True)):
        box = image[(slice(i, i + 1), slice(None), *(slice(p, p + a) for p, a in zip(c, e, strict=True)))].float() / 255
        torch.testing.assert_close(out[i : i + 1], F.interpolate(box, size=(12,) * 3, mode="trilinear"), atol=2e-5, rtol=0)


def test_box_and_zoom_are_one_resample() -> None:
    """A ramp survives linear interpolation, so each pixel of a view tells where in the slice it was read."""
    image = torch.arange(80.0).view(1, 1, 80, 1).expand(1, 1, 80, 70)
    moves = geometry([1.25], [[True, False]], [0])  # 16 px become 20, of which 2..17 remain; upside down
    rows = augment._resize(image, torch.tensor([[20, 10]]), torch.tensor([[8, 8]]), 16, moves)[0, 0, :, 5]
    zoomed = torch.arange(2, 18) + 0.5
    torch.testing.assert_close(rows.flip(0), 20 + zoomed * (16 / 20) * (8 / 16) - 0.5)


def test_a_slice_shorter_than_the_crop_reads_zero_and_unlabelled_beyond_its_end() -> None:
    image, label = bytes_(2, 1, 10, 30) // 2 + 1, bytes_(2, 10, 30, seed=1) % 3
    out, ids = labelled_view(image, label, torch.tensor([[0, 3], [0, 14]]), 16, NOTHING, generator())
    assert torch.equal(out[0, :, :10], image[0, :, :, 3:19] / 255)
    assert torch.equal(ids[1, :10], label[1, :, 14:30].long())
    assert (out[:, :, 10:] == 0).all()
    assert (ids[:, 10:] == UNLABELLED).all()


def test_a_box_that_starts_outside_the_slice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a crop of 16 px starts outside its slice: corners span \[3, 5\] to \[3, 5\]"):
        crop(bytes_(1, 1, 20, 20), torch.tensor([[3, 5]]), None, 16)


# ------------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_flips_and_quarter_turns_are_exact(spatial_dims: int, device: str) -> None:
    cases = [(flips, k) for flips in range(2**spatial_dims) for k in range(4)]
    flips = [[flip >> axis & 1 for axis in range(spatial_dims)] for flip, _ in cases]
    patches = torch.rand(len(cases), 2, *[7] * spatial_dims, generator=generator())
    moves = geometry([1.0] * len(cases), flips, [k for _, k in cases])
    moves = Geometry(moves.zoom.to(device), moves.flips.to(device), moves.turns.to(device))
    out = apply_geometry(patches.to(device), moves).cpu()
    for i, (_, k) in enumerate(cases):
        expected = patches[i].flip([axis + 1 for axis, flip in enumerate(flips[i]) if flip]).rot90(k, (1, 2))
        assert torch.equal(out[i], expected), (flips[i], k)


@pytest.mark.parametrize(("spatial_dims", "side"), [(2, 96), (2, 33), (3, 12)])
def test_zoom_is_the_zoom_of_monai(spatial_dims: int, side: int) -> None:
    """Not only in kind: floor of the zoomed side, half-pixel centres, which of two middles, and zero padding agree."""
    zoom = torch.linspace(0.801, 1.203, 23)  # side x zoom is never whole: float32 and MONAI's float64 would floor it apart
    patches = torch.rand(len(zoom), 1, *[side] * spatial_dims, generator=generator())
    none = torch.zeros(len(zoom), spatial_dims, dtype=torch.bool)
    out = apply_geometry(patches, Geometry(zoom, none, torch.zeros(len(zoom), dtype=torch.int64)))
    for i, factor in enumerate(zoom.tolist()):
        # Positions reach 96, where float32 has an ulp of 8e-6, and both sides round them.
        torch.testing.assert_close(out[i], monai_zoom(patches[i], factor), atol=5e-5, rtol=0)


def test_operations_follow_the_order_of_the_study() -> None:
    """Zoom, flips, quarter turn: each applied on its own, in order, gives what the one resample gives."""
    patches = torch.rand(40, 1, 32, 32, generator=generator())
    moves = augment.draw_geometry(40, 2, GEOMETRY, generator(1))
    out = apply_geometry(patches, moves)
    for i in range(40):
        expected = monai_zoom(patches[i], float(moves.zoom[i]))
        expected = expected.flip([axis + 1 for axis in range(2) if moves.flips[i, axis]]).rot90(int(moves.turns[i]), (1, 2))
        torch.testing.assert_close(out[i], expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_a_batch_is_its_patches_one_by_one(mode: str) -> None:
    patches, moves = torch.rand(12, 2, 16, 16, generator=generator()), augment.draw_geometry(12, 2, Chain(), generator(1))
    together = apply_geometry(patches, moves, mode=mode, fill=7)
    sigma = torch.rand(12, 2, generator=generator()) * 1.5
    blurred = augment.blur(patches, sigma, largest=1.5)
    for i in range(12):
        one = slice(i, i + 1)
        alone = Geometry(moves.zoom[one], moves.flips[one], moves.turns[one])
        # Vectorised and scalar arithmetic differ in the last bit of a position or a weight.
        torch.testing.assert_close(together[one], apply_geometry(patches[one], alone, mode=mode, fill=7), atol=1e-5, rtol=0)
        torch.testing.assert_close(blurred[one], augment.blur(patches[one], sigma[one], largest=1.5), atol=1e-6, rtol=0)


def test_draws_have_the_probabilities_and_ranges_of_the_chain() -> None:
    n = 40_000
    moves = augment.draw_geometry(n, 3, Chain(), generator())
    share = lambda x: float(x.float().mean())  # noqa: E731
    near = pytest.approx  # standard error of a share is at most 0.0025
    assert share(moves.zoom != 1) == near(0.75, abs=0.01)
    drawn = moves.zoom[moves.zoom != 1]
    assert drawn.min() >= 0.8
    assert drawn.max() <= 1.2
    assert share(drawn) == near(1.0, abs=0.002)
    assert moves.flips.float().mean(0).tolist() == near([0.5] * 3, abs=0.01)
    assert (torch.bincount(moves.turns) / n).tolist() == near([1 / 2, 1 / 6, 1 / 6, 1 / 6], abs=0.01)


def test_a_patch_with_unequal_sides_is_refused() -> None:
    with pytest.raises(ValueError, match=r"patches of \[8, 9\] px: a quarter turn needs equal sides"):
        apply_geometry(torch.zeros(1, 1, 8, 9), geometry([1.0], [[0, 0]], [0]))


# ---------------------------------------------------------------------------------------------------------- intensities


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_blur_is_the_gaussian_smooth_of_monai(spatial_dims: int) -> None:
    from monai.transforms import GaussianSmooth

    patches = torch.rand(9, 2, *[14] * spatial_dims, generator=generator())
    sigma = torch.rand(9, spatial_dims, generator=generator(1)) * 1.25 + 0.25
    sigma[0], sigma[1] = 0.25, 1.5  # one tap either side; 13 taps on 14 pixels
    out = augment.blur(patches, sigma, largest=1.5)
    for i in range(9):
        expected = torch.as_tensor(GaussianSmooth(sigma[i].tolist())(patches[i]))
        torch.testing.assert_close(out[i], expected, atol=2e-6, rtol=0)  # sums of 13 or 169 float32 terms below 1


def test_scale_comes_before_shift_and_neither_clips() -> None:
    patches = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1).expand(5000, 1, 2, 2).contiguous()
    chain = replace(NOTHING, intensity_scale_p=0.75, intensity_shift_p=0.75)
    out = augment.intensity(patches, chain, generator())
    offset = out[:, 0, 0, 0]  # of the pixels that were 0: the shift alone, so it was not scaled
    gain = out[:, 0, 1, 0] - offset
    for draw, centre in ((gain, 1.0), (offset, 0.0)):
        assert (draw - centre).abs().max() == pytest.approx(0.1, abs=1e-3)
        assert float(((draw - centre).abs() > 1e-6).float().mean()) == pytest.approx(0.75, abs=0.03)
        assert float(draw.mean()) == pytest.approx(centre, abs=0.004)
    assert out.max() > 1.1  # 1 scaled up, then shifted up
    assert patches.max() == 1  # the argument is left alone


def test_noise_has_a_uniform_deviation() -> None:
    out = augment.intensity(torch.zeros(2000, 1, 24, 24), replace(NOTHING, noise_p=0.25, noise_std=0.01), generator())
    deviation = out.flatten(1).std(1)
    noisy = deviation[deviation > 0]
    assert len(noisy) / 2000 == pytest.approx(0.25, abs=0.04)
    deciles = torch.quantile(noisy, torch.linspace(0.1, 0.9, 9))
    torch.testing.assert_close(deciles, torch.linspace(0.001, 0.009, 9), atol=1e-3, rtol=0)
    standard = (out.flatten(1) / deviation[:, None])[deviation > 0].flatten()
    assert float(standard.mean()) == pytest.approx(0, abs=0.01)
    assert float((standard.abs() < 1).float().mean()) == pytest.approx(0.6827, abs=0.005)


def test_blur_and_noise_leave_the_patches_alone_that_did_not_draw_them() -> None:
    patches = torch.rand(400, 1, 8, 8, generator=generator())
    for chain in (replace(NOTHING, blur_p=0.25), replace(NOTHING, noise_p=0.25)):
        out = augment.intensity(patches, chain, generator())
        assert (out == patches).flatten(1).all(1).float().mean() == pytest.approx(0.75, abs=0.07)
    assert torch.equal(augment.intensity(patches, NOTHING, generator()), patches)


def test_working_on_the_drawn_patches_only_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The accelerator's path, where blur and noise run over the whole batch at strength 0 where not drawn."""
    patches, chain = torch.rand(50, 1, 8, 8, generator=generator()), replace(Chain(), noise_p=0)
    subset = augment.intensity(patches, chain, generator())
    monkeypatch.setattr(augment, "_concerned", lambda drawn: torch.arange(len(drawn)))
    assert torch.equal(augment.intensity(patches, chain, generator()), subset)


# -------------------------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spatial", [(40, 50), (20, 18, 16)])
def test_equal_generators_give_equal_views(spatial: tuple[int, ...], device: str) -> None:
    image, corner = bytes_(6, 1, *spatial).to(device), torch.full((6, len(spatial)), 2, device=device)
    for extent in (None, torch.full_like(corner, 9)):
        first, again, other = (view(image, corner, extent, 14, Chain(), generator(seed, device)) for seed in (5, 5, 6))
        assert first.shape == (6, 1, *[14] * len(spatial))
        assert first.device.type == device
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_autocast_does_not_lower_the_precision_of_views() -> None:
    image, corner = bytes_(20, 1, 40, 40), torch.zeros(20, 2, dtype=torch.int64)
    full = view(image, corner, None, 24, Chain(), generator())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(view(image, corner, None, 24, Chain(), generator()), full)


@pytest.mark.parametrize("spatial", [(64, 60), (24, 22, 20)])
def test_labels_move_with_their_image(spatial: tuple[int, ...]) -> None:
    """An image painted with its own labels: wherever a label's neighbours agree with it, so does the interpolated image."""
    n, side = 60, 16 if len(spatial) == 3 else 40
    label = (bytes_(n, *[(length + 7) // 8 for length in spatial]) % 4).float()[:, None]
    label = F.interpolate(label, scale_factor=8)[(..., *(slice(length) for length in spatial))]
    corner = torch.stack([torch.randint(0, length - side + 1, (n,), generator=generator()) for length in spatial], 1)
    image, ids = labelled_view(label, label[:, 0].to(torch.uint8), corner, side, GEOMETRY, generator(1))
    assert ids.dtype == torch.int64
    pool = F.max_pool2d if len(spatial) == 2 else F.max_pool3d
    known = torch.where(ids == UNLABELLED, -1.0, ids.float())[:, None]
    # Without padding: at the frame, a pixel may mix in one that the zoom has cut off.
    alike = (pool(known, 3, 1) == -pool(-known, 3, 1)) & (known >= 0)[(..., *[slice(1, -1)] * len(spatial))]
    inner = F.pad(alike, [1] * 2 * len(spatial))
    assert inner.float().mean() > 0.2
    torch.testing.assert_close(image[inner], known[inner], atol=1e-4, rtol=0)
    assert set(ids.unique().tolist()) == {0, 1, 2, 3, UNLABELLED}


def test_labels_are_unlabelled_exactly_where_a_zoom_shows_nothing() -> None:
    n = 64
    image, ids = labelled_view(
        torch.ones(n, 1, 32, 32), torch.ones(n, 32, 32, dtype=torch.uint8), torch.zeros(n, 2).long(), 32, GEOMETRY, generator()
    )
    nothing = ids == UNLABELLED
    assert nothing.any()
    assert torch.equal(image[:, 0] == 0, nothing)
    assert (ids[~nothing] == 1).all()


# ---------------------------------------------------------------------------------------------------- balanced corners


@pytest.mark.parametrize("spatial", [(9, 7), (5, 6, 4)])
def test_half_of_the_centres_are_foreground_and_each_pixel_of_a_kind_is_as_likely(spatial: tuple[int, ...]) -> None:
    n, axes = 60_000, range(1, len(spatial) + 1)
    label = bytes_(*spatial) % 3
    label[-1] = UNLABELLED
    size = torch.tensor(spatial).expand(n, -1)
    centre = balanced_corners(label.expand(n, *spatial), size, 1, generator())  # side 1: the corner is the centre
    counts = torch.zeros(spatial).index_put_(tuple(centre.unbind(1)), torch.ones(n), accumulate=True)
    assert len(axes) == centre.shape[1]
    assert counts[label == UNLABELLED].sum() == 0
    for kind in (label == 0, (label != 0) & (label != UNLABELLED)):
        assert float(counts[kind].sum()) / n == pytest.approx(0.5, abs=0.01)
        expected = n / 2 / kind.sum()
        chi2 = float(((counts[kind] - expected) ** 2 / expected).sum() / (kind.sum() - 1))
        assert chi2 < 1.8  # per degree of freedom; above 20 degrees this is past the 0.99 quantile


def test_crops_stay_inside_their_slice() -> None:
    n = 500
    size = torch.stack([torch.randint(20, 51, (n,), generator=generator(s)) for s in (0, 1)], 1)
    label = bytes_(n, 50, 50) % 2
    for axis in (1, 2):  # padding below and to the right
        at = torch.arange(50).view(-1, 1) if axis == 1 else torch.arange(50)
        label[(at >= size[:, axis - 1, None, None]).expand_as(label)] = UNLABELLED
    corner = balanced_corners(label, size, 20, generator())
    assert (corner >= 0).all()
    assert (corner + 20 <= size).all()
    assert (balanced_corners(label, size, 64, generator()) == 0).all()  # shorter than the side: starts at 0, hangs over


@pytest.mark.parametrize(("value", "where"), [(0, "background"), (3, "foreground"), (UNLABELLED, "anywhere")])
def test_a_slice_with_one_kind_of_pixel_gives_that_kind(value: int, where: str) -> None:
    label = torch.full((4000, 6, 8), UNLABELLED, dtype=torch.uint8)
    label[:, 1:5, 2:6] = value
    size = torch.tensor([5, 6]).expand(4000, 2)
    centre = balanced_corners(label, size, 1, generator())
    first = [0, 0] if where == "anywhere" else [1, 2]
    assert centre.amin(0).tolist() == first
    assert centre.amax(0).tolist() == [4, 5]
