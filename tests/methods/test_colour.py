"""Laws of warps and colours: they are those of the formula, pixel by pixel; what is grey or not drawn stays as it is."""

import colorsys
import dataclasses

import numpy as np
import pytest
import torch
from scipy import ndimage

from medssl.methods import colour, settings
from medssl.methods.protocol import UNLABELLED

OFF = settings.Pictures()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_hue_saturation_and_value_are_those_of_colorsys():
    images = torch.rand(4, 3, 6, 5, generator=generator())
    images[0, :, 0] = images[0, :1, 0]  # greys
    images[1, :, 0], images[1, 0, 1], images[1, 1:, 1] = 0, 1, 0  # black, and pure red
    by = torch.rand(4, 3, generator=generator(1)) - 0.5
    by[3] = 0
    converted, changed = colour.hsv(images), colour.recoloured(images, by)
    assert (colour.rgb(converted) - images).abs().max() < 1e-6
    for n, row, column in np.ndindex(4, 6, 5):
        h, s, v = colorsys.rgb_to_hsv(*images[n, :, row, column].tolist())
        assert np.allclose(converted[n, :, row, column], (h, s, v), atol=1e-6)
        dh, ds, dv = by[n].tolist()
        expected = colorsys.hsv_to_rgb((h + dh) % 1, min(max(s + ds, 0), 1), min(max(v + dv, 0), 1))
        assert np.allclose(changed[n, :, row, column], expected, atol=1e-5)


def test_a_warp_is_that_of_scipy_and_labels_stay_under_their_image():
    """out(x) = in(A⁻¹ (x - d)) by scipy's own affine transform, on a grid that is not square."""
    image = torch.rand(3, 1, 21, 30, generator=generator())
    label = (image[:, 0] * 4).long()
    config = dataclasses.replace(OFF, warp_p=1.0)
    matrix, shift = colour.draw_warp(3, config, generator(1))
    moved, ids = colour.warp(image, label, matrix, shift)
    for n in range(3):
        inverse = np.linalg.inv(matrix[n].double().numpy())[::-1, ::-1]  # on (row, column)
        middle, d = np.array([10.0, 14.5]), shift[n].double().numpy()[::-1] * [21, 30]
        how = {"offset": middle - inverse @ (middle + d), "order": 1, "mode": "grid-constant"}
        expected = ndimage.affine_transform(image[n, 0].double().numpy(), inverse, cval=0, **how)
        assert np.abs(moved[n, 0].numpy() - expected).max() < 1e-4
        nearest = ndimage.affine_transform(label[n].numpy(), inverse, cval=UNLABELLED, **(how | {"order": 0}))
        assert (ids[n].numpy() == nearest).mean() > 0.99  # but for ties of the rounding
        assert set(ids[n].unique().tolist()) <= {0, 1, 2, 3, UNLABELLED}


def test_warps_are_drawn_within_their_bounds_and_have_their_shear():
    config = dataclasses.replace(OFF, warp_p=1.0)
    matrix, shift = colour.draw_warp(4000, config, generator())
    first, second = matrix.unbind(2)
    for length in (first.norm(dim=1), second.norm(dim=1)):
        assert 0.8 <= length.min() < 0.81
        assert 1.19 < length.max() <= 1.2 + 1e-6
    lean = torch.rad2deg(torch.atan2(second[:, 1], second[:, 0]) - torch.atan2(first[:, 1], first[:, 0])) - 90
    lean = (lean + 180) % 360 - 180
    assert 19.5 < lean.abs().max() <= 20.01
    assert 0.099 < shift.abs().max() <= 0.1


def test_nothing_drawn_changes_nothing_and_greys_have_no_colour():
    images, labels = torch.rand(6, 3, 8, 9, generator=generator()), torch.zeros(6, 8, 9, dtype=torch.int64)
    assert all(map(torch.equal, colour.varied(images, labels, OFF, generator()), (images, labels)))
    half = dataclasses.replace(OFF, warp_p=0.5, colour_p=0.5)
    many, blank = torch.rand(64, 3, 8, 9, generator=generator()), torch.zeros(64, 8, 9, dtype=torch.int64)
    moved, _ = colour.varied(many, blank, half, generator(3))
    same = [torch.equal(*pair) for pair in zip(moved, many, strict=True)]
    assert 4 < sum(same) < 32  # a quarter expected
    grey = images[:, :1]
    assert torch.equal(colour.varied(grey, labels, dataclasses.replace(OFF, colour_p=1.0), generator())[0], grey)
    painted = colour.varied(
        grey.expand(-1, 3, -1, -1), labels, dataclasses.replace(OFF, colour_p=1.0, saturation=0), generator()
    )[0]
    assert (painted - grey).abs().max() < 1e-6  # no hue to turn
    with pytest.raises(ValueError, match=r"set them to 0 where network\.spatial_dims is 3"):
        colour.varied(images[:, :, None], labels, half, generator())


def test_settings_that_are_off_read_as_before_there_were_any():
    from medssl.platform import config

    plain = config.build({"finetune": {"name": "segment"}}).tree()["finetune"]
    assert not set(plain) & set(settings.Pictures.__dataclass_fields__)
    asked = config.build({"finetune": {"name": "segment", "colour_p": 0.5}})
    assert asked.tree()["finetune"]["hue"] == 50 / 255
    assert config.build(asked.tree()).finetune.settings == asked.finetune.settings
