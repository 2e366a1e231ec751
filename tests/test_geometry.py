"""Laws of preparing one volume: MONAI's grid to a stated tolerance, whatever way the file's axes run, and back again."""

import dataclasses
import itertools

import nibabel
import numpy as np
import pytest

from medssl.platform import geometry
from medssl.platform.errors import UsageError
from medssl.platform.geometry import PRESETS, Line, Preset
from medssl.platform.records import DataInfo

ORIENTATIONS = [
    "".join(letters) for order in itertools.permutations(("RL", "AP", "SI")) for letters in itertools.product(*order)
]
PLAIN = Preset(None, (-1000.0, 1000.0), None, foreground_box=False, pad=0, dtype="uint8")


def scan(shape=(13, 11, 9), spacing_mm=(1.3, 0.9, 2.1), seed=0):
    """A RAS volume: air around a body of noise, with two boxes of labels in it."""
    rng = np.random.default_rng(seed)
    image = np.full(shape, -1000, np.int16)
    inner = tuple(slice(2, n - 2) for n in shape)
    image[inner] = rng.integers(-400, 400, image[inner].shape)
    label = np.zeros(shape, np.uint8)
    label[3:7, 3:8, 2:6], label[8:11, 2:5, 4:7] = 1, 2
    return image, label, np.diag([*spacing_mm, 1.0])


def turned(array, affine, codes):
    """The same scan, stored with its axes along `codes`."""
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(codes))
    moved = nibabel.orientations.apply_orientation(array, turn)
    return np.asfortranarray(moved), affine @ nibabel.orientations.inv_ornt_aff(turn, array.shape)


def slices_first(label):
    return np.ascontiguousarray(label.transpose(2, 0, 1))


def dice(a, b, number):
    return 2 * ((a == number) & (b == number)).sum() / ((a == number).sum() + (b == number).sum())


def test_the_mark_of_no_annotation_is_the_same_in_methods_and_platform():
    from medssl.methods.protocol import UNLABELLED

    assert geometry.UNLABELLED == UNLABELLED


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_the_prepared_volume_does_not_depend_on_how_the_files_axes_run(codes):
    assert len(set(ORIENTATIONS)) == 48
    image, label, affine = scan()
    preset = dataclasses.replace(PRESETS["ct"], spacing_mm=(1.0, 1.2, 1.5), pad=12)
    expected = geometry.prepare(image[None], affine, label, preset)
    stored, stored_affine = turned(image, affine, codes)
    got = geometry.prepare(stored[None], stored_affine, turned(label, affine, codes)[0], preset)
    assert np.array_equal(got.image, expected.image)
    assert np.array_equal(got.label, expected.label)
    assert got.spacing_mm == pytest.approx((1.0, 1.2, 1.5))


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_labels_come_back_to_every_orientation_unchanged_where_nothing_was_resampled(codes):
    image, label, affine = scan()
    preset = dataclasses.replace(PRESETS["ct"], spacing_mm=None, pad=17)
    stored, stored_affine = turned(image, affine, codes)
    stored_label = turned(label, affine, codes)[0]
    prepared = geometry.prepare(stored[None], stored_affine, stored_label, preset)
    assert np.array_equal(geometry.restore(slices_first(prepared.label), prepared.geometry), stored_label)


@pytest.mark.parametrize("codes", ["RAS", "LPI", "SAR", "PIL"])
@pytest.mark.parametrize("finer", [0.31, 0.5, 1.0])
def test_labels_come_back_from_a_finer_grid_unchanged(codes, finer):
    """A grid at least twice as fine has, for each voxel, a nearest point that took its value from that voxel."""
    image, label, affine = scan()
    preset = dataclasses.replace(PRESETS["ct"], spacing_mm=tuple(finer * np.array([1.3, 0.9, 2.1])))
    stored, stored_affine = turned(image, affine, codes)
    stored_label = turned(label, affine, codes)[0]
    prepared = geometry.prepare(stored[None], stored_affine, stored_label, preset)
    assert np.array_equal(geometry.restore(slices_first(prepared.label), prepared.geometry), stored_label)


def test_labels_come_back_from_a_coarser_grid_nearly():
    shape, spacing_mm = (64, 60, 40), (0.8, 0.7, 2.0)
    x, y, z = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in shape)]
    label = (x**2 + y**2 + z**2 < 0.5).astype(np.uint8) + ((x - 0.1) ** 2 + y**2 + z**2 < 0.1)
    image = np.where(label, 50, -1000).astype(np.int16)
    prepared = geometry.prepare(image[None], np.diag([*spacing_mm, 1]), label, PRESETS["ct"])
    back = geometry.restore(slices_first(prepared.label), prepared.geometry)
    assert back.shape == shape
    assert min(dice(back, label, 1), dice(back, label, 2)) > 0.93


def monai_chain(image, label, affine, preset):
    """The CT study's transforms (or the percentile ones), in their order."""
    import torch
    from monai import transforms as mt
    from monai.data import MetaTensor

    both = ["image", "label"]
    volume = {
        key: MetaTensor(torch.as_tensor(a[None].copy()), affine=torch.as_tensor(affine))
        for key, a in zip(both, (image, label), strict=True)
    }
    scale = mt.ScaleIntensityRangePercentilesd("image", *(preset.percentiles or (1, 99)), 0, 1, clip=True)
    if preset.window:
        scale = mt.ScaleIntensityRanged("image", *preset.window, 0, 1, clip=True)
    steps = [
        mt.Orientationd(both, axcodes="RAS", labels=None),
        mt.Spacingd(both, preset.spacing_mm, mode=("bilinear", "nearest")),
        scale,
    ]
    if preset.foreground_box:
        steps.append(mt.CropForegroundd(both, source_key="image", allow_smaller=False))
    if preset.pad:
        steps.append(mt.SpatialPadd(both, (preset.pad, preset.pad, -1)))
    done = mt.Compose(steps)(volume)
    return np.asarray(done["image"]), np.asarray(done["label"])[0]


OBLIQUE = np.array([[0.9, -0.25, 0.1, -40.0], [0.3, 0.8, -0.2, 12.0], [-0.05, 0.3, 2.3, 7.0], [0, 0, 0, 1]])
OBLIQUE[:3, :3] = np.linalg.qr(OBLIQUE[:3, :3])[0] * [-1, 1, -1] @ np.diag([0.83, 0.91, 2.3])


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SRA", "AIL"])
@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 2.5), (0.57, 1.9, 1.1), (2.3, 0.71, 5.3)])
@pytest.mark.parametrize("affine", [np.diag([1.37, 0.93, 2.11, 1.0]), OBLIQUE], ids=["straight", "oblique"])
def test_the_whole_ct_chain_agrees_with_monai(codes, spacing_mm, affine):
    """Same shape; intensities within one of 255 levels (rounding before the floor); labels but for ties of nearest voxels."""
    image, label, _ = scan(shape=(30, 26, 17), seed=1)
    preset = dataclasses.replace(PRESETS["ct"], spacing_mm=spacing_mm, pad=40)
    stored, stored_affine = turned(image, affine, codes)
    stored_label = turned(label, affine, codes)[0]
    ours = geometry.prepare(stored[None], stored_affine, stored_label, preset)
    pixels, classes = monai_chain(stored, stored_label, stored_affine, preset)
    assert ours.image.shape == pixels.shape
    levels = np.floor(255 * pixels) - ours.image
    assert np.abs(levels).max() <= 1
    assert (levels != 0).mean() < 1e-3
    assert (classes != ours.label).mean() < 2e-3
    assert classes.max() == 2


def test_percentiles_agree_with_monai():
    image, label, affine = scan(shape=(30, 26, 17), seed=2)
    image = (image + 1000).astype(np.float32) ** 1.5
    preset = dataclasses.replace(PRESETS["mr"], spacing_mm=(1.1, 1.1, 2.0), dtype="float16")
    ours = geometry.prepare(image[None], affine, label, preset)
    assert ours.image.dtype == np.float16
    pixels, _ = monai_chain(image, label, affine, preset)
    assert np.abs(pixels - ours.image).max() < 1e-3  # half precision keeps 11 bits


def test_channels_are_normalised_each_by_itself():
    image, _, affine = scan()
    prepared = geometry.prepare(np.stack([image, 7 * image.astype(np.int32) + 3]), affine, None, PRESETS["mr"])
    assert prepared.label is None
    assert np.abs(prepared.image[0].astype(int) - prepared.image[1]).max() <= 1


def test_levels_are_the_floor_of_255_x():
    image = np.array([-900, -500, -499, 0, 100, 499, 500, 3000], np.int16).reshape(1, 2, 2, 2)
    prepared = geometry.prepare(image, np.eye(4), None, dataclasses.replace(PLAIN, window=(-500.0, 500.0)))
    expected = [0, 0, 0, 127, 153, 254, 255, 255]
    assert prepared.image.ravel().tolist() == expected


def test_int16_reaches_its_largest_value():
    image = np.arange(-1000, 1000, dtype=np.int16).reshape(1, 10, 10, 20)
    prepared = geometry.prepare(image, np.eye(4), None, dataclasses.replace(PLAIN, window=(-1000.0, 999.0), dtype="int16"))
    assert prepared.image.max() == 32767
    assert prepared.image.min() == 0


@pytest.mark.parametrize("seed", range(6))
def test_resampling_only_near_the_foreground_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(12, 30, 3))
    image = np.full(shape, -1000, np.int16)
    lo = [int(rng.integers(0, n - 6)) for n in shape]
    body = tuple(slice(a, int(rng.integers(a + 6, n + 1))) for a, n in zip(lo, shape, strict=True))
    image[body] = rng.integers(-600, 700, image[body].shape)
    preset = dataclasses.replace(PRESETS["ct"], spacing_mm=tuple(rng.uniform(0.4, 3, 3)), pad=0)
    affine = np.diag([*rng.uniform(0.5, 2.5, 3), 1])
    boxed = geometry.prepare(image[None], affine, None, preset)
    # the float16 image tells 0 from the first level above it
    everything = geometry.prepare(image[None], affine, None, dataclasses.replace(preset, foreground_box=False))
    kept = geometry.prepare(image[None], affine, None, dataclasses.replace(preset, foreground_box=False, dtype="float16"))
    hits = np.argwhere(kept.image[0] > 0)
    box = tuple(slice(a, b + 1) for a, b in zip(hits.min(axis=0), hits.max(axis=0), strict=True))
    assert np.array_equal(boxed.image[0], everything.image[0][box])
    assert boxed.geometry["start"] == [cut.start for cut in box]


@pytest.mark.parametrize("seed", range(40))
def test_every_output_that_a_voxel_reaches_is_computed(seed):
    rng = np.random.default_rng(seed)
    whole = Line.whole(int(rng.integers(1, 40)), rng.uniform(0.3, 3), rng.uniform(0.3, 3))
    first, last = sorted(rng.integers(0, whole.source, 2).tolist())
    near = whole.around(first, last)
    reached = [k for k, at in enumerate(whole.positions) if first - 1 < at < last + 1]
    assert set(reached) <= set(range(near.start, near.stop))
    assert 0 <= near.start < near.stop <= whole.stop


def test_padding_is_symmetric_and_leaves_slices_alone():
    image, label, affine = scan(shape=(13, 11, 9))
    prepared = geometry.prepare(image[None], affine, label, dataclasses.replace(PLAIN, window=(-2000.0, 1000.0), pad=16))
    assert prepared.image.shape == (1, 16, 16, 9)
    rows, columns = (np.flatnonzero(prepared.image[0].any(axis=axes)) for axes in ((1, 2), (0, 2)))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (1, 13, 2, 12)


def test_a_prediction_is_background_where_the_box_left_air_out():
    image, label, affine = scan()
    prepared = geometry.prepare(image[None], affine, label, PRESETS["ct"])
    everywhere = np.ones(slices_first(prepared.label).shape, np.uint8)
    back = geometry.restore(everywhere, prepared.geometry)
    assert back.shape == image.shape
    assert back[image > -500].all()
    assert not back[0].any()


def test_the_geometry_is_json_and_keeps_its_meaning():
    import json

    image, label, affine = scan()
    prepared = geometry.prepare(image[None], affine, label, PRESETS["ct"])
    again = json.loads(json.dumps(prepared.geometry))
    labels = slices_first(prepared.label)
    assert np.array_equal(geometry.restore(labels, again), geometry.restore(labels, prepared.geometry))


def test_a_volume_that_cannot_be_prepared_says_why():
    image, label, affine = scan()
    with pytest.raises(ValueError, match="does not span three dimensions; mend the header"):
        geometry.prepare(image[None], np.diag([1.0, 0.0, 1.0, 1.0]), label, PRESETS["ct"])
    with pytest.raises(ValueError, match="does not span three dimensions"):
        geometry.prepare(image[None], affine * np.nan, label, PRESETS["ct"])
    with pytest.raises(ValueError, match="no voxel lies above the lower bound"):
        geometry.prepare(np.full_like(image, -1000)[None], affine, label, PRESETS["ct"])
    with pytest.raises(ValueError, match=r"percentiles .* are one value"):
        geometry.prepare(np.zeros_like(image)[None], affine, label, PRESETS["mr"])


def test_presets_are_chosen_by_name_and_changed_by_key():
    info = DataInfo("d", ("background", "organ"), preset="mr", preset_changes={"pad": 64})
    assert geometry.resolve(info) == dataclasses.replace(PRESETS["mr"], pad=64)
    assert geometry.resolve(info, None, {"spacing_mm": [1, 1, 2]}).spacing_mm == (1, 1, 2)
    assert geometry.resolve(info, "ct") == PRESETS["ct"]
    with pytest.raises(UsageError, match='no key "spacing"; did you mean spacing_mm'):
        geometry.resolve(info, None, {"spacing": 1})
    with pytest.raises(UsageError, match=r'no preset "us"; .*found: ct, mr'):
        geometry.resolve(info, "us")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": None}, "set one of window and percentiles"),
        ({"percentiles": (1.0, 99.0)}, "set one of window and percentiles"),
        ({"window": (500.0, -500.0)}, "not a low and a high bound"),
        ({"spacing_mm": (1.0, 0.0, 1.0)}, "three positive lengths"),
        ({"spacing_mm": (1.0, 1.0)}, "three positive lengths"),
        ({"dtype": "float32"}, "more|expected uint8"),
        ({"pad": -1}, "pad >= 0"),
    ],
)
def test_a_preset_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(PRESETS["ct"], **changes)
