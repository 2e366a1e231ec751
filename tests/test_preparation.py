"""Laws of every preset option: labels come back, slices are the scan within the stated rounding, each option has an oracle."""

import dataclasses
import itertools
import json
import sys
import tracemalloc

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.platform import bias, body, catalogue, geometry, ingest, quality
from medssl.platform.errors import RunError, UsageError
from medssl.platform.geometry import PRESETS, Preset
from medssl.platform.records import DataInfo

ORIENTATIONS = [
    "".join(letters) for order in itertools.permutations(("RL", "AP", "SI")) for letters in itertools.product(*order)
]
PLAIN = Preset(None, (-500.0, 500.0), None, foreground_box=False, pad=0, dtype="float32")
FREE = dataclasses.replace(PLAIN, window=None, zscore="all")
AFFINE = np.diag([1.3, 0.9, 2.1, 1.0])


def changed(preset, **values):
    return dataclasses.replace(preset, **values)


def scan(shape=(13, 11, 9), seed=0, dtype=np.int16):
    """Air around a body of noise, with labels in it, and 255 where nobody annotated."""
    rng = np.random.default_rng(seed)
    image = np.full(shape, -1000, dtype)
    inner = tuple(slice(2, n - 1) for n in shape)
    image[inner] = rng.integers(-600, 700, image[inner].shape)
    label = rng.integers(0, 4, shape).astype(np.uint8)
    label[label == 3] = 255
    return image, label


def turned(array, affine, codes):
    """The same scan, stored with its axes along `codes`."""
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(codes))
    moved = nibabel.orientations.apply_orientation(array, turn)
    return np.asfortranarray(moved), affine @ nibabel.orientations.inv_ornt_aff(turn, array.shape)


def slices_first(volume):
    return np.ascontiguousarray(np.moveaxis(volume, -1, 0))


def monai(image, affine, *steps):
    import torch
    from monai import transforms as mt
    from monai.data import MetaTensor

    volume = MetaTensor(torch.as_tensor(np.ascontiguousarray(image, np.float32)), affine=torch.as_tensor(affine))
    return np.asarray(mt.Compose(steps)(volume))


# ------------------------------------------------------------------------------------------------------ there and back


@st.composite
def presets(draw):
    """Anything but resampling."""
    box = draw(st.booleans())
    dtype = draw(st.sampled_from(["uint8", "int16", "float16", "float32"]))
    bounded = dtype in ("uint8", "int16") or draw(st.booleans())
    size = draw(st.none() | st.tuples(*[st.none() | st.integers(3, 20)] * 3))
    return Preset(
        None,
        (-500.0, 500.0),
        None,
        foreground_box=box,
        pad=0 if size else draw(st.integers(0, 17)),
        dtype=dtype,
        orientation=draw(st.sampled_from(ORIENTATIONS)),
        clip=bounded,
        margin=draw(st.integers(0, 3)) if box else 0,
        size=size,
        neighbours=draw(st.integers(0, 2)),
        slice_content=draw(st.sampled_from([0.0, 0.02])),
        slice_foreground=draw(st.sampled_from([0.0, 0.02])),
    )


@settings(max_examples=150, deadline=None)
@given(presets(), st.sampled_from(ORIENTATIONS), st.integers(0, 5), st.booleans())
def test_every_option_that_does_not_resample_gives_back_each_voxel_it_kept(preset, codes, seed, filtered):
    """Labels to the last voxel, intensities within the stated rounding; where nothing is left out, that is all of them."""
    image, label = scan(seed=seed)
    stored, affine = turned(image, AFFINE, codes)
    stored_label = turned(label, AFFINE, codes)[0]
    done = geometry.prepare(stored[None], affine, stored_label, preset, filtered=filtered)
    back = json.loads(json.dumps(done.geometry))
    labels = slices_first(done.label)
    kept = geometry.restore(np.ones_like(labels), back).astype(bool)
    assert np.array_equal(geometry.restore(labels, back), np.where(kept, stored_label, 0))
    if not preset.foreground_box and preset.size is None and "kept" not in back:
        assert kept.all()
    own = slices_first(done.image)[:, 0]
    largest = 1 if preset.dtype.startswith("float") else np.iinfo(preset.dtype).max
    intensities = geometry.restore(own, back).astype(np.float64) / largest
    expected = (stored + 500.0) / 1000
    expected = np.clip(expected, 0, 1) if preset.clip else expected
    assert np.abs(intensities - expected)[kept].max() <= done.lost["rounding_max"] + 1e-6
    cut = done.lost.get("label_voxels", 0)
    if "kept" not in back:
        assert cut == ((stored_label > 0) & (stored_label < 255) & ~kept).sum()


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float16", "float32"])
def test_the_stated_rounding_is_the_distance_to_float32(dtype):
    image, _ = scan((20, 18, 9))
    exact = geometry.prepare(image[None], AFFINE, None, changed(PRESETS["ct"], dtype="float32"))
    done = geometry.prepare(image[None], AFFINE, None, changed(PRESETS["ct"], dtype=dtype))
    largest = 1 if dtype.startswith("float") else np.iinfo(dtype).max
    inner = tuple(slice(before, before + n) for before, n in zip(done.geometry["pad"], done.geometry["size"], strict=True))
    apart = (exact.image - done.image.astype(np.float64) / largest)[(0, *inner)]
    assert done.lost["rounding_max"] == pytest.approx(np.abs(apart).max(), rel=1e-3, abs=1e-9)
    assert done.lost["rounding_rms"] == pytest.approx(np.sqrt((apart**2).mean()), rel=1e-3, abs=1e-9)
    assert exact.lost == {"rounding_max": 0, "rounding_rms": 0}


# ------------------------------------------------------------------------------------------------------ each option


@pytest.mark.parametrize("codes", ["RAS", "LPS", "ASR", "ILP", "PSL"])
def test_orientation_and_spacing_along_it_agree_with_monai(codes):
    from monai import transforms as mt

    image, _ = scan(seed=3)
    stored, affine = turned(image, AFFINE, "PLI")
    spacing = (1.1, 2.0, 0.8)
    done = geometry.prepare(stored[None], affine, None, changed(PLAIN, orientation=codes, spacing_mm=spacing))
    steps = (mt.Orientation(axcodes=codes, labels=None), mt.Spacing(spacing, mode="bilinear"))
    expected = monai(stored[None], affine, *steps, mt.ScaleIntensityRange(-500, 500, 0, 1, clip=True))
    assert done.image.shape == expected.shape
    assert np.abs(done.image - expected).max() < 1e-4
    assert done.spacing_mm == spacing


def test_an_axis_whose_spacing_is_null_is_not_resampled():
    image, _ = scan()
    done = geometry.prepare(image[None], AFFINE, None, changed(PLAIN, spacing_mm=(1.0, 1.0, None)))
    assert done.image.shape[3] == image.shape[2]
    assert done.spacing_mm == (1.0, 1.0, 2.1)


@pytest.mark.parametrize("voxels", ["all", "nonzero"])
@pytest.mark.parametrize("window", [None, (-300.0, 400.0)])
def test_z_scores_agree_with_monai(voxels, window):
    from monai import transforms as mt

    image = np.stack([scan(seed=1)[0], 3 * scan(seed=2)[0]]).astype(np.float32)
    image[:, :3] = 0
    done = geometry.prepare(image, AFFINE, None, changed(FREE, zscore=voxels, window=window))
    clip = [mt.Lambda(lambda x: x.clamp(*window))] if window else []
    expected = monai(image, AFFINE, *clip, mt.NormalizeIntensity(nonzero=voxels == "nonzero", channel_wise=True))
    assert np.abs(done.image - expected).max() < 1e-4


@pytest.mark.parametrize("margin", [0, 2, 5])
def test_the_box_with_its_margin_agrees_with_monai(margin):
    from monai import transforms as mt

    image, _ = scan((15, 14, 12))
    image[4:11, 5:9, 3:10] = 100
    image[:4], image[:, :5], image[..., :3] = -1000, -1000, -1000
    preset = changed(PLAIN, foreground_box=True, margin=margin, spacing_mm=(1.0, 1.0, 1.5))
    done = geometry.prepare(image[None], AFFINE, None, preset)
    scale = mt.ScaleIntensityRange(-500, 500, 0, 1, clip=True)
    crop = mt.CropForeground(margin=margin, allow_smaller=True)
    expected = monai(image[None], AFFINE, mt.Spacing((1.0, 1.0, 1.5)), scale, crop)
    assert done.image.shape == expected.shape
    assert np.abs(done.image - expected).max() < 1e-4


@pytest.mark.parametrize("size", [(10, 16, None), (9, 8, 4), (14, 3, 12)])
def test_crops_and_padding_are_those_of_the_global_local_study(size):
    """Start at floor((x - n) / 2), or that much before it: each axis by itself (its dataloaders.py)."""
    image, label = scan()
    done = geometry.prepare(image[None], AFFINE, label, changed(PLAIN, size=size))
    expected = np.clip((image + 500.0) / 1000, 0, 1)
    for axis, n in enumerate(size):
        x = expected.shape[axis]
        if n is not None and x > n:
            expected = expected.take(range((x - n) // 2, (x - n) // 2 + n), axis)
        elif n is not None:
            expected = np.pad(expected, [((n - x) // 2, n - x - (n - x) // 2) if each == axis else (0, 0) for each in range(3)])
    assert np.allclose(done.image[0], expected, atol=1e-6)


def test_a_preset_of_the_global_local_study_does_what_its_paper_says(monkeypatch):
    """Percentiles of the whole scan without clipping, the plane resampled (by MONAI here), then crop and pad."""
    from monai import transforms as mt

    monkeypatch.setattr(bias, "corrected", lambda image, *_: image.astype(np.float32))
    image = np.random.default_rng(0).gamma(2, 100, (150, 140, 6)).astype(np.float32)
    done = geometry.prepare(image[None], np.diag([1.8, 1.7, 10, 1]), None, PRESETS["acdc"])
    low, high = np.percentile(image, (1, 99))
    normalised = (image[None] - low) / (high - low)
    resampled = monai(normalised, np.diag([1.8, 1.7, 10, 1.0]), mt.Spacing((1.36719, 1.36719, 10)))[0]
    assert resampled.shape == (197, 174, 6)
    expected = np.pad(resampled[2:194], [(0, 0), (9, 9), (0, 0)])
    assert np.abs(done.image[0] - expected).max() < 2e-3
    assert done.image.max() > 1.1
    assert done.spacing_mm == (1.36719, 1.36719, 10.0)


def test_resized_slices_agree_with_scipy():
    from scipy.ndimage import map_coordinates

    image, label = scan((13, 11, 4))
    done = geometry.prepare(image[None], AFFINE, label, changed(PLAIN, resize=(20, 7)))
    at = np.meshgrid(np.arange(20) * 13 / 20, np.minimum(np.arange(7) * 11 / 7, 10), np.arange(4), indexing="ij")
    expected = np.clip((map_coordinates(image.astype(np.float64), at, order=1, mode="nearest") + 500) / 1000, 0, 1)
    assert np.abs(done.image[0] - expected).max() < 1e-4
    assert geometry.restore(slices_first(done.label), done.geometry).shape == label.shape
    assert done.spacing_mm == pytest.approx((1.3 * 13 / 20, 0.9 * 11 / 7, 2.1))


def patient_on_a_table(shape=(60, 60, 8)):
    x, y, _ = np.ogrid[: shape[0], : shape[1], : shape[2]]
    skin = ((x - 30) / 22) ** 2 + ((y - 34) / 16) ** 2 < 1
    skin = np.broadcast_to(skin, shape).copy()
    image = np.where(skin, 40, -1000).astype(np.int16)
    image[20:27, 28:40, 2:6] = -850  # a lung
    image[4:56, 12:14] = 200  # the table
    image[28:31, 12:19] = 200  # a strap from it to the skin
    return image, skin


def test_the_body_mask_is_the_patient_without_table_and_with_lungs():
    image, skin = patient_on_a_table()
    done = geometry.prepare(image[None], np.eye(4), None, changed(PLAIN, body_mask=True))
    mask = body.body(image, -500.0, (1.0, 1.0, 1.0))
    assert 2 * (mask & skin).sum() / (mask.sum() + skin.sum()) > 0.98
    assert mask[23, 34, 4]  # the lung
    assert not mask[:, :14].any()
    assert not done.image[0][~mask].any()
    boxed = geometry.prepare(image[None], np.eye(4), None, changed(PLAIN, body_mask=True, foreground_box=True))
    assert boxed.geometry["start"][1] > 14
    scores = geometry.prepare(image[None], np.eye(4), None, changed(FREE, body_mask=True)).image[0][mask]
    assert (scores.mean(), scores.std()) == pytest.approx((0, 1), abs=1e-4)
    with pytest.raises(ValueError, match="no body is found"):
        body.body(np.full((9, 9, 9), -1000), -500.0, (1.0, 1.0, 1.0))


def test_otsus_threshold_is_simpleitks():
    sitk = pytest.importorskip("SimpleITK")
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(20, 8, 4000), rng.normal(180, 30, 3000)]).reshape(70, 100).astype(np.float32)
    their = sitk.OtsuThresholdImageFilter()
    their.SetNumberOfHistogramBins(body.BINS)
    their.Execute(sitk.GetImageFromArray(values))
    assert body.otsu(values) == pytest.approx(their.GetThreshold(), abs=2 * float(np.ptp(values)) / body.BINS)


def coil(shape=(28, 26, 10)):
    """Two tissues under a smooth field that is brighter on one side."""
    rng = np.random.default_rng(0)
    x, y, _ = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    tissue = np.where(x**2 + y**2 < 0.4, 200.0, 100.0)
    return tissue + rng.normal(0, 1, shape), np.exp(0.5 * x + 0.2 * y), tissue


def test_n4_takes_a_coils_field_away():
    """As the filter itself does, whose image is compared with ours; each tissue varies less than before."""
    sitk = pytest.importorskip("SimpleITK")
    clean, field, tissue = coil()
    seen = clean * field
    whole = sitk.GetImageFromArray(np.ascontiguousarray(seen.T, np.float32))
    whole.SetSpacing((1.0, 1.0, 3.0))
    their = sitk.N4BiasFieldCorrectionImageFilter()
    their.SetMaximumNumberOfIterations([50] * 4)
    their.SetConvergenceThreshold(0.001)
    expected = sitk.GetArrayFromImage(their.Execute(whole)).T
    done = bias.corrected(seen[None], (1.0, 1.0, 3.0), 1)[0]
    assert np.allclose(done, expected, rtol=1e-3)
    for kind in (100.0, 200.0):
        before, after = (each[tissue == kind].std() / each[tissue == kind].mean() for each in (seen, done))
        assert after < before


def test_without_simpleitk_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(RunError, match=r"preset\.n4 needs SimpleITK, which is not installed; pip install 'medssl\[n4\]'"):
        geometry.prepare(scan()[0][None], AFFINE, None, changed(PLAIN, n4=1))


def test_neighbouring_slices_are_channels_and_the_last_is_repeated():
    image = np.stack([scan(seed=4)[0], scan(seed=5)[0]])
    one = geometry.prepare(image, AFFINE, None, PLAIN).image
    done = geometry.prepare(image, AFFINE, None, changed(PLAIN, neighbours=2))
    assert done.image.shape == (10, *one.shape[1:])
    for k in range(one.shape[3]):
        for number, by in enumerate((0, -2, -1, 1, 2)):  # its own first: what a picture shows
            at = min(max(k + by, 0), one.shape[3] - 1)
            assert np.array_equal(done.image[2 * number : 2 * number + 2, ..., k], one[..., at])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zscore": "all"}, "zscore leaves the range 0 to 1 that uint8 holds; set dtype to float16 or float32"),
        ({"clip": False}, "clip=false leaves the range 0 to 1"),
        ({"orientation": "RAX"}, "should name each axis once"),
        ({"orientation": "RRA"}, "should name each axis once"),
        ({"size": (0, 2, None)}, "rows, columns and slices"),
        ({"size": (64, 128)}, "pad 96 asks for more than size"),
        ({"resize": (64, 64)}, "takes the place of their spacing_mm"),
        ({"margin": 2, "foreground_box": False}, "set foreground_box to true"),
        ({"slice_content": 2.0}, "slice_content and slice_foreground in 0 to 1"),
        ({"neighbours": -1}, "0 or more"),
        ({"pad": "wide"}, "pad is 'wide', expected int"),
        ({"dtype": "uint64"}, "dtype is 'uint64', expected Literal"),
        ({"spacing_mm": 1}, r"spacing_mm is 1, expected tuple\[float \| None"),
        ({"spacing_mm": [1, 0, 1]}, "three positive lengths"),
        ({"bodymask": True}, 'no key "bodymask"; did you mean body_mask'),
    ],
)
def test_an_option_that_cannot_be_meant_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        geometry.resolve(DataInfo("d", ("background", "organ")), None, changes)


def test_intensities_that_half_precision_cannot_hold_are_refused():
    image = np.zeros((6, 6, 4), np.float32)
    image[::2] = np.random.default_rng(0).random((3, 6, 4))
    image[0, 0, 0] = 1e7
    wide = changed(PLAIN, window=None, percentiles=(1.0, 99.0), clip=False)
    with pytest.raises(ValueError, match=r"more than float16 holds; set preset\.dtype to float32"):
        geometry.prepare(image[None], AFFINE, None, changed(wide, dtype="float16"))
    assert np.isfinite(geometry.prepare(image[None], AFFINE, None, wide).image).all()


@pytest.mark.parametrize(
    "preset",
    [
        PRESETS["ct"],
        PRESETS["mr"],
        changed(PRESETS["acdc"], n4=0),
        changed(PRESETS["ct"], spacing_mm=(0.5, 0.5, 1.0)),
        FREE,
        changed(FREE, neighbours=2, body_mask=True),
    ],
)
def test_the_memory_that_is_reckoned_with_is_enough_and_not_much_too_much(preset):
    image = np.random.default_rng(0).integers(-400, 400, (96, 90, 70)).astype(np.int16, order="F")
    affine = np.diag([1.5, 1.5, 2.0, 1.0])
    geometry.prepare(image[None], affine, None, preset)  # imports
    tracemalloc.start()
    geometry.prepare(image[None], affine, None, preset)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    expected = geometry.peak_bytes(2, affine, image.shape, 1, preset) - image.nbytes
    assert 0.2 * expected < peak <= expected, peak / expected


# ------------------------------------------------------------------------------------------------------ through the store


def write_scans(root, volumes=4, modality="MRI", official=False, shape=(24, 20, 8)):
    """A Decathlon folder; with `official`, its last volume is the test part."""
    rng = np.random.default_rng(0)
    for number in range(volumes):
        last = official and number == volumes - 1
        images, labels = ("imagesTs", "labelsTs") if last else ("imagesTr", "labelsTr")
        image = np.full((shape[0], shape[1] + number % 2, shape[2]), -1000, np.int16)
        image[3:20, 2:18, 1:7] = rng.integers(-450, 400, (17, 16, 6))
        label = (image > 200).astype(np.uint8)
        label[..., 4:] = 0
        for folder, array in ((images, image), (labels, label)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            nibabel.Nifti1Image(array, np.diag([-1.5, 1.0, 2.0, 1.0])).to_filename(root / folder / f"v{number}.nii.gz")
    said = {"name": "toy", "modality": {"0": modality}, "labels": {"0": "background", "1": "organ"}}
    (root / "dataset.json").write_text(json.dumps(said))
    return root


@pytest.mark.parametrize(
    ("modality", "content"),
    [
        ("CT", "00696a2f2cf7ea46c8cf82716d306ebc231c247174e252d2b9902f7122672b24"),
        ("MRI", "be9520f334cec1923fdc6b7f5b8fd8c10a3d79fe8e5aadbe0e92fe1fa3f5b7cd"),
    ],
)
def test_what_the_first_presets_made_of_scans_they_still_make(tmp_path, modality, content):
    """The content hashes that version 0.1.0 gave these scans, before there were any other options."""
    root = tmp_path / "scans"
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(2):
        image = np.full((24, 20 + number, 8), -1000, np.int16)
        image[3:20, 2:18, 1:7] = rng.integers(-450, 400, (17, 16, 6))
        for folder, array in (("imagesTr", image), ("labelsTr", (image > 200).astype(np.uint8))):
            nibabel.Nifti1Image(array, np.diag([-1.5, 1.0, 2.0, 1.0])).to_filename(root / folder / f"v{number}.nii.gz")
    said = {"name": "toy", "modality": {"0": modality}, "labels": {"0": "background", "1": "organ"}}
    (root / "dataset.json").write_text(json.dumps(said))
    assert ingest.prepare(root, tmp_path / "store", workers=1).content_hash == content


def test_slices_are_left_out_of_training_alone_and_the_summary_says_how_many(tmp_path):
    root = write_scans(tmp_path / "scans", official=True)
    changes = {"slice_foreground": 0.01}
    store = ingest.prepare(root, tmp_path / "store", workers=1, changes=changes)
    slices = {record.volume: (record.part, record.slices) for record in store.volumes}
    assert slices == {f"v{n}": ("train", 3) for n in range(3)} | {"v3": ("test", 8)}
    assert "15 slices left out; 1 volumes that a split may put into its test part keep all of theirs" in catalogue.losses(store)
    rows = store.table(volumes=["v0"]).sort_by("slice_index").to_pylist()
    assert [row["slice_index"] for row in rows] == [0, 1, 2]
    assert [row["position"] for row in rows] == [0, 0.5, 1]
    assert min(row["foreground"] for row in rows) >= 0.01
    back = geometry.restore(store.arrays("v0")[1], store.volumes[0].geometry)
    assert np.array_equal(back, nibabel.load(root / "labelsTr" / "v0.nii.gz").get_fdata())
    assert quality.check(store.root, workers=1).errors == ()
    whole = ingest.prepare(write_scans(tmp_path / "unsplit"), tmp_path / "whole", workers=1, changes=changes)
    assert {record.slices for record in whole.volumes} == {8}, "any of them may come to be tested"
    with pytest.raises(RunError, match=r"no slice of it passes preset\.slice_content"):
        ingest.prepare(root, tmp_path / "none", workers=1, changes={"slice_content": 1.0})


def test_the_manifest_and_the_last_line_state_the_rounding_and_the_labels_cut_off(tmp_path):
    root = write_scans(tmp_path / "scans", modality="CT")
    store = ingest.prepare(root, tmp_path / "store", workers=1)
    said = json.loads((store.root / "manifest.json").read_text())["quantisation"]
    assert said == store.quantisation
    assert 0.99 / 255 < said["max"] <= 1 / 255
    assert said["rms"] < said["max"]
    assert catalogue.summary(store).splitlines()[-1].startswith("stored as uint8 within 0.0039 (rms ")
    assert "3.9 HU" in catalogue.summary(store)
    changes = {"pad": 0, "size": [8, 8], "dtype": "float16"}
    cropped = ingest.prepare(root, tmp_path / "cropped", workers=1, changes=changes)
    assert cropped.quantisation["max"] <= 2**-12
    assert catalogue.losses(cropped)[0].startswith("labels cut off by the box or the crop in 4 volumes, most in v")


def test_a_scan_is_bias_corrected_once_whatever_else_changes(tmp_path, monkeypatch):
    calls = []

    def once(image, spacing_mm, shrink):
        calls.append(spacing_mm)
        return image.astype(np.float32) * 2

    monkeypatch.setattr(bias, "corrected", once)
    root, out = write_scans(tmp_path / "scans"), tmp_path / "store"
    first = ingest.prepare(root, out, workers=1, changes={"n4": 1, "percentiles": None, "zscore": "all", "dtype": "float32"})
    assert calls == [(1.5, 1.0, 2.0)] * 4
    again = ingest.prepare(root, out, workers=1, changes={"n4": 1, "dtype": "float16"}, overwrite=True)
    assert len(calls) == 4
    assert again.content_hash != first.content_hash
    next((out / ".n4").glob("*")).write_bytes(b"")  # what a loss of power may leave
    ingest.prepare(root, out, workers=1, changes={"n4": 1, "spacing_mm": [2, 2, 2]}, overwrite=True)
    assert len(calls) == 5
    write_scans(root, volumes=5)
    ingest.prepare(root, out, workers=1, changes={"n4": 1}, overwrite=True)
    assert len(list((out / ".n4").iterdir())) == 5, "of files that have changed nothing is kept"


def test_slices_with_their_neighbours_train_and_predict(tmp_path, monkeypatch):
    """2.5D from the scan to a label in its own grid; the network takes three channels, the scan has one."""
    from pathlib import Path

    from medssl.platform import single
    from medssl.platform.store import Store

    monkeypatch.setenv("MEDSSL_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("MEDSSL_RUNS", str(tmp_path / "runs"))
    root = write_scans(tmp_path / "scans")
    catalogue.prepare(str(root), changes={"neighbours": 1, "size": (16, 24, None)}, workers=1, say=print)
    assert Store.open(tmp_path / "data" / "scans").channels == 3
    words = ["network.width=4", "network.levels=2", "finetune.side=16", "finetune.training.steps=2"]
    words += ["finetune.training.batch=2", "finetune.training.evaluations=1"]
    run = single.finetune(None, str(root), 0, [], words, say=print).partition(":")[0]
    (answer,) = single.predict(run, [root / "imagesTr" / "v1.nii.gz"], tmp_path / "out", say=print)
    assert nibabel.load(answer).shape == (24, 21, 8)
    assert Path(answer).name == "v1.nii.gz"


def test_fewer_workers_are_started_where_memory_is_short_and_what_fits_nowhere_is_refused(tmp_path, monkeypatch):
    root = write_scans(tmp_path / "scans")
    case = ingest.find_source(root, tmp_path).cases[0]
    needed = ingest.expected_bytes(case, PRESETS["mr"])
    image, affine, _ = ingest.read_case(case, ingest.find_source(root, tmp_path).info)
    assert needed == image.nbytes + geometry.peak_bytes(2, affine, image.shape[1:], 1, PRESETS["mr"])
    monkeypatch.setattr(ingest, "WORKER_BYTES", 0)
    monkeypatch.setattr(ingest, "free_bytes", lambda: int(2.5 * needed / ingest.MEMORY))
    seen = []
    ingest.prepare(root, tmp_path / "store", workers=4, progress=lambda *each: seen.append(each))
    assert seen[0] == (0, 4, "volumes, 2 at a time: more exceed the free memory")
    with pytest.raises(
        RunError, match=r"v\d\.nii\.gz: preparing it takes about .* GB of memory, and .* are free for it; is its"
    ):
        ingest.prepare(root, tmp_path / "none", workers=1, changes={"spacing_mm": [0.01, 0.01, 0.01]})
    with pytest.raises(RunError, match="preparing it takes about"):
        ingest.ingest_volume(ingest.VolumeTask(case, DataInfo("d", ("a", "b"), preset="mr"), PRESETS["mr"], None, limit=1000))


@pytest.mark.parametrize(
    ("nodes", "workers", "cases", "expected", "each"),
    [
        ([(4, 100), (4, 100)], 99, 50, 8, 25),  # a worker per core
        ([(4, 24), (8, 100)], 99, 50, 2 + 8, 12),  # the small node has room for two of 11
        ([(4, 10), (2, 100)], 99, 50, 2, 50),  # the head has no room for one: none is sent there
        ([(4, 100), (4, 100)], 3, 50, 3, 25),
        ([(4, 100), (4, 100)], 99, 5, 5, 25),
    ],
)
def test_every_node_is_given_as_many_volumes_at_a_time_as_its_cores_and_memory_allow(
    nodes, workers, cases, expected, each, monkeypatch
):
    unit = ingest.WORKER_BYTES  # the largest volume takes 10 of them, and its worker 1
    monkeypatch.setattr(ingest, "largest", lambda some, preset: ("the case", 10 * unit))
    there = [(cores, memory * unit) for cores, memory in nodes]
    count, limit = ingest.within_nodes(range(cases), PRESETS["mr"], workers, there)
    assert (count, limit) == (expected, each * unit - unit)
    for cores, memory in there:  # what Ray is asked for never exceeds what a node has
        assert min(cores, memory // (limit + unit)) * (limit + unit) <= memory


def test_the_time_left_is_reckoned_from_what_this_run_has_done(monkeypatch):
    now, lines = [100.0], []
    monkeypatch.setattr(catalogue.time, "monotonic", lambda: now[0])
    tell = catalogue._telling("preparing x", lines.append)
    for at, *said in (
        (100, 50, 100, "volumes"),
        (130, 60, 100, "volumes"),
        (250, 100, 100, "volumes"),
        (251, 1, 9, "slice files"),
    ):
        now[0] = at
        tell(*said)
    assert lines == [
        "preparing x: 50 of 100 volumes",
        "preparing x: 60 of 100 volumes, about 120 s left",
        "preparing x: 100 of 100 volumes",
        "preparing x: 1 of 9 slice files",
    ]


@pytest.mark.parametrize("name", ["Task04_Hippocampus", "SunnybrookLV", "TotalSegSamples"])
def test_real_scans_come_back_within_the_stated_rounding_and_their_labels_exactly(data_root, tmp_path, name):
    root = tmp_path / "scans"
    for image in sorted((data_root / name / "imagesTr").glob("*.nii.gz"))[:3]:
        for folder in ("imagesTr", "labelsTr"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            (root / folder / image.name).symlink_to(data_root / name / folder / image.name)
    said = json.loads((data_root / name / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(said | {"training": [], "test": []}))
    store = ingest.prepare(root, tmp_path / "store", workers=1, changes={"spacing_mm": None, "foreground_box": False})
    for record in store.volumes:
        scan, label = (nibabel.load(root / f / f"{record.volume}.nii.gz").get_fdata() for f in ("imagesTr", "labelsTr"))
        image, stored = store.arrays(record.volume)
        assert np.array_equal(geometry.restore(stored, record.geometry), label)
        low, high = store.preset.window or np.percentile(scan, store.preset.percentiles)
        apart = np.clip((scan - low) / (high - low), 0, 1) - geometry.restore(image[:, 0], record.geometry) / 255
        assert np.abs(apart).max() <= store.quantisation["max"] + 1e-5
