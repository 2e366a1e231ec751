"""Deformation of labelled slices, against scipy on the same points; draws within bounds; what is not drawn does not move."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor

from medssl.methods import deform
from medssl.methods.networks.unet import Config as UNetConfig
from medssl.methods.networks.unet import UNet
from medssl.methods.protocol import UNLABELLED
from medssl.methods.segment import Config, Segment
from medssl.methods.settings import Deformation

EVERY = Deformation(affine_p=1.0, elastic_p=1.0, elastic_sigma=3.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slices(n: int = 12, sides: tuple[int, int] = (24, 31)) -> tuple[Tensor, Tensor]:
    images = torch.rand(n, 2, *sides, generator=generator())
    return images, torch.randint(0, 3, (n, *sides), generator=generator())


def test_images_and_labels_are_read_where_scipy_reads_them():
    images, labels = slices()
    linear, _ = deform.affine(12, EVERY, generator(1))
    field = deform.elastic(12, (24, 31), EVERY, generator(2))
    at = deform.points(linear, field)
    ours, ids = deform.sampled(images, at), deform.nearest(labels, at)
    middle = np.array([23 / 2, 30 / 2])
    for n in range(12):
        rows, columns = np.meshgrid(np.arange(24.0), np.arange(31.0), indexing="ij")
        bent = np.stack([rows, columns]) - field[n].numpy()
        bent = np.stack([bent[0].clip(0, 23), bent[1].clip(0, 30)]).reshape(2, -1)
        where = (linear[n].numpy() @ (bent - middle[:, None]) + middle[:, None]).reshape(2, 24, 31)
        for channel in range(2):
            theirs = map_coordinates(images[n, channel].numpy(), where, order=1, mode="grid-constant", cval=0.0)
            np.testing.assert_allclose(ours[n, channel].numpy(), theirs, atol=2e-4)
        known = map_coordinates(labels[n].numpy(), where, order=0, mode="grid-constant", cval=UNLABELLED)
        halves = np.abs(where - np.floor(where) - 0.5).min(0) < 1e-3  # a tie may be broken either way
        assert ((ids[n].numpy() == known) | halves).all()


def test_an_elastic_field_is_smooth_stays_within_its_nodes_and_has_their_deviation():
    config = Deformation(elastic_p=1.0, elastic_sigma=5.0)
    field = deform.elastic(2000, (32, 32), config, generator())
    nodes = torch.randn(2000, 2, 3, 3, generator=generator()) * 5
    assert (field.amax((2, 3)) <= nodes.amax((2, 3)) + 1e-5).all()
    assert (field.amin((2, 3)) >= nodes.amin((2, 3)) - 1e-5).all()
    assert float(field.diff(dim=3).abs().max()) < float(nodes.abs().max()) / 4
    assert float(field.std()) == pytest.approx(3.9, abs=0.15), "what was measured of the source"
    assert torch.allclose(field[:, :, ::31, ::31], nodes[:, :, ::2, ::2], atol=1e-4), "corners are nodes"


def test_each_affine_deformation_is_one_of_the_four():
    linear, moved = deform.affine(4000, Deformation(affine_p=0.8), generator())
    determinant = torch.linalg.det(linear)
    scale = determinant.abs().sqrt()
    zoomed = (scale - 1).abs() > 1e-6
    assert float(scale.min()) >= 1 / 1.05 - 1e-6
    assert float(scale.max()) <= 1 / 0.95 + 1e-6
    mirrored = determinant < 0
    angle = torch.rad2deg(torch.atan2(linear[:, 1, 0], linear[:, 0, 0]))
    turned = ~zoomed & ~mirrored & (angle.abs() > 1e-4)
    eighth = turned & ((angle / 45 - (angle / 45).round()).abs() < 1e-4)
    assert (angle[turned & ~eighth].abs() <= 15).all()
    assert torch.equal(linear[mirrored], torch.diag(torch.tensor([1.0, -1.0])).expand(int(mirrored.sum()), 2, 2))
    shares = {
        "zoom": (zoomed, 0.2),
        "mirror": (mirrored, 0.1),
        "eighths": (eighth, 0.2 * 7 / 8),
        "angle": (turned & ~eighth, 0.2),
    }
    for name, (which, expected) in shares.items():
        assert float(which.float().mean()) == pytest.approx(expected, abs=4 * math.sqrt(expected / 4000)), name
    assert torch.equal(moved, zoomed | mirrored | turned)


def test_what_was_not_drawn_stays_to_the_bit_and_volumes_are_refused():
    images, labels = slices(64)
    config = Deformation(affine_p=0.3, elastic_p=0.2)
    moved_images, moved_labels = deform.deformed(images, labels, config, generator())
    same = torch.tensor([torch.equal(a, b) for a, b in zip(images, moved_images, strict=True)])
    assert 10 < int(same.sum()) < 60
    assert torch.equal(moved_labels[same], labels[same])
    again = deform.deformed(images, labels, config, generator())
    assert torch.equal(again[0], moved_images)
    assert torch.equal(again[1], moved_labels)
    with pytest.raises(ValueError, match=r"set them to 0 where network\.spatial_dims is 3"):
        deform.deformed(images[..., None], labels[..., None], config, generator())


def test_a_quarter_turn_of_a_square_is_an_exact_one():
    images, labels = slices(3, (20, 20))
    quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]]).expand(3, 2, 2)
    at = deform.points(quarter, torch.zeros(3, 2, 20, 20))
    assert torch.allclose(deform.sampled(images, at), images.rot90(-1, (2, 3)), atol=1e-4)
    assert torch.equal(deform.nearest(labels, at), labels.rot90(-1, (1, 2)))


def test_fine_tuning_deforms_only_when_asked_and_otherwise_draws_what_it_drew():
    batch = {
        "image": torch.rand(6, 1, 24, 24, generator=generator()),
        "label": torch.randint(0, 3, (6, 24, 24), generator=generator(), dtype=torch.uint8),
        "size": torch.full((6, 2), 24),
    }

    def views(**settings):
        subject = Segment(UNet(1, 3, UNetConfig(width=4, levels=2)), Config(side=16, **settings))
        return subject.augment(batch, generator())

    usual, off, on = views(), views(elastic_sigma=9.0, rotation=3.0), views(elastic_p=1.0)
    assert torch.equal(usual.images[0], off.images[0])
    assert torch.equal(usual.labels, off.labels)
    assert not torch.equal(usual.images[0], on.images[0])
    assert set(on.labels.unique().tolist()) <= {0, 1, 2}, "elastic deformation alone shows nothing beyond the frame"


@pytest.mark.parametrize("wrong", [{"affine_p": 1.5}, {"rescale": (0.0, 1.0)}, {"elastic_nodes": 1}])
def test_wrong_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Config(**wrong)
