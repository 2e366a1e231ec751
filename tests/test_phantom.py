"""Laws of the embedded data set: what is painted is anatomy, and what is written is a data set."""

import gzip
import json
import multiprocessing
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medssl.platform import atomic, find
from medssl.platform.datasets import phantom
from medssl.platform.datasets._phantom_anatomy import LABEL, ORGANS
from medssl.platform.datasets._phantom_canvas import FAR, Canvas, Solid, catmull_rom, rotation
from medssl.platform.datasets._phantom_patient import NO_GALLBLADDER, NO_KIDNEY, SIDES, Patient
from medssl.platform.errors import UsageError

SEEDS = range(48)
ALWAYS = [organ for organ in ORGANS if organ != "gallbladder" and "kidney" not in organ]

# mL of most adults on CT, widened for a field of view that cuts vessels and gullet; HU from unenhanced to the brightest phase
MEDIAN_ML = {
    "liver": (1050, 1600),
    "right kidney": (110, 200),
    "spleen": (130, 300),
    "pancreas": (50, 100),
    "aorta": (45, 110),
    "inferior vena cava": (45, 110),
    "right adrenal gland": (2.5, 7),
    "left adrenal gland": (2.5, 7),
    "gallbladder": (20, 60),
    "esophagus": (5, 25),
    "stomach": (150, 450),
    "duodenum": (50, 120),
    "left kidney": (110, 200),
}
MEDIAN_HU = {
    "liver": (40, 110),
    "right kidney": (60, 170),
    "spleen": (50, 120),
    "pancreas": (30, 90),
    "aorta": (80, 180),
    "inferior vena cava": (50, 130),
    "right adrenal gland": (0, 60),
    "left adrenal gland": (0, 60),
    "gallbladder": (0, 40),
    "esophagus": (-20, 60),
    "stomach": (-300, 120),
    "duodenum": (-20, 90),
    "left kidney": (60, 170),
}


@pytest.fixture(scope="module")
def volumes():
    return [phantom.volume(seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom")
    phantom.generate(root, patients=4, seed=3, processes=1)
    return root


def files(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("[!.]*") if file.is_file()}


def centres(label, spacing_mm) -> dict[str, np.ndarray]:
    """Middle of each organ that is present, mm along right, front, head."""
    return {organ: np.argwhere(label == k).mean(0) * spacing_mm for organ, k in LABEL.items() if (label == k).any()}


# what is painted


def test_every_organ_has_plausible_volume(volumes):
    for organ, (low, high) in MEDIAN_ML.items():
        ml = [(label == LABEL[organ]).sum() * np.prod(spacing) / 1000 for _, label, spacing in volumes]
        present = [value for value in ml if value > 0]
        assert low < np.median(present) < high, organ
        assert max(present) < 3 * np.median(present), organ
        if organ in ALWAYS:
            assert min(ml) > 0.2 * np.median(ml), organ


def test_every_organ_has_plausible_hu(volumes):
    for organ, (low, high) in MEDIAN_HU.items():
        hu = [image[label == LABEL[organ]].mean() for image, label, _ in volumes if (label == LABEL[organ]).any()]
        assert low < np.median(hu) < high, organ


def test_contrast_phase_moves_vessels_apart_from_muscle(volumes):
    aorta = np.array([image[label == LABEL["aorta"]].mean() for image, label, _ in volumes])
    assert aorta.min() < 60
    assert aorta.max() > 200


def test_organs_are_absent_as_often_as_stated():
    draws = [Patient.draw(np.random.default_rng(seed)) for seed in range(1500)]
    gallbladders = np.mean([not patient.gallbladder for patient in draws])
    kidneys = np.mean([2 - len(patient.kidneys) for patient in draws]) / 2
    for rate, stated, n in ((gallbladders, NO_GALLBLADDER, 1500), (kidneys, NO_KIDNEY, 3000)):
        assert abs(rate - stated) < 3 * np.sqrt(stated * (1 - stated) / n)


def test_what_a_patient_lacks_is_not_labelled(volumes):
    for seed, (_, label, _) in zip(SEEDS, volumes, strict=True):
        patient = Patient.draw(np.random.default_rng(seed))
        has = {f"{side} kidney": side in patient.kidneys for side in SIDES} | {"gallbladder": patient.gallbladder}
        assert {organ: bool((label == LABEL[organ]).any()) for organ in has} == has, seed
        assert set(np.unique(label)) - {LABEL[organ] for organ in has} == {0} | {LABEL[organ] for organ in ALWAYS}, seed


def test_labels_lie_inside_the_body(volumes):
    from scipy import ndimage

    for image, label, spacing in volumes[:12]:
        body = ndimage.binary_opening(image > -300, np.ones((3, 3, 1)))  # opening drops the table
        for z in range(image.shape[2]):
            body[:, :, z] = ndimage.binary_fill_holes(body[:, :, z])
        depth_mm = ndimage.distance_transform_edt(body, sampling=spacing)
        assert depth_mm[label > 0].min() > 8


def test_organs_stand_in_anatomical_order(volumes):
    for seed, (_, label, spacing) in zip(SEEDS, volumes, strict=True):
        at = centres(label, spacing)
        x, y, z = ({organ: place[axis] for organ, place in at.items()} for axis in range(3))
        assert x["liver"] > x["aorta"] > x["spleen"], seed
        assert x["inferior vena cava"] > x["aorta"], seed
        assert x["right adrenal gland"] > x["left adrenal gland"], seed
        assert x["duodenum"] > x["stomach"], seed
        assert y["stomach"] > y["spleen"] > np.argwhere(label > 0)[:, 1].min() * spacing[1], seed
        assert y["pancreas"] > y["aorta"], seed
        assert z["liver"] > z["duodenum"], seed
        assert z["esophagus"] > max(z["duodenum"], z["pancreas"], z["stomach"]), seed
        for side in ("right", "left"):
            if f"{side} kidney" in at:
                assert z[f"{side} adrenal gland"] > z[f"{side} kidney"] + 20, seed
        if "gallbladder" in at:
            assert x["gallbladder"] > x["pancreas"], seed


def test_kidneys_cannot_be_told_apart_by_brightness(volumes):
    differences = [
        image[label == LABEL["right kidney"]].mean() - image[label == LABEL["left kidney"]].mean()
        for image, label, _ in volumes
        if (label == LABEL["right kidney"]).any() and (label == LABEL["left kidney"]).any()
    ]
    assert abs(np.mean(differences)) < 3 * np.std(differences) / np.sqrt(len(differences)) + 3


def test_two_disjoint_crops_of_32_fit_every_patient(volumes):
    for image, _, spacing in volumes:
        body = np.argwhere(image > -500)
        across_mm, deep_mm, _ = (np.ptp(body, axis=0) + 1) * spacing
        pixel_mm = phantom.PRESET_CHANGES["spacing_mm"]
        assert across_mm / pixel_mm[0] >= 64
        assert deep_mm / pixel_mm[1] >= 40


def test_fewer_voxels_are_coarser_voxels():
    """The field of view belongs to the patient, not to the grid."""
    _, fine, fine_mm = phantom.volume(1, (96, 72, 26))
    _, coarse, coarse_mm = phantom.volume(1, (48, 36, 13))
    np.testing.assert_allclose(np.multiply(fine_mm, fine.shape), np.multiply(coarse_mm, coarse.shape))
    for organ in ("liver", "spleen", "stomach"):
        ml = [(label == LABEL[organ]).sum() * np.prod(mm) for label, mm in ((fine, fine_mm), (coarse, coarse_mm))]
        assert 0.3 < ml[1] / ml[0] < 3, organ


def test_equal_seeds_give_equal_voxels_in_another_process():
    here = phantom.volume([0, 5])
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        there = pool.submit(phantom.volume, [0, 5]).result()
    np.testing.assert_array_equal(here[0], there[0])
    np.testing.assert_array_equal(here[1], there[1])
    assert here[2] == there[2]
    assert (here[0].dtype, here[1].dtype) == (np.int16, np.uint8)
    assert not np.array_equal(here[0], phantom.volume([0, 6])[0])


# shapes, against closed forms


@pytest.fixture(scope="module")
def canvas():
    """A canvas whose coordinates are replaced by an unturned, unwarped grid of 2 mm around (10, -5, 80)."""
    rng = np.random.default_rng(0)
    plain = Canvas((40, 44, 48), (2.0, 2.0, 2.0), Patient.draw(rng), rng)
    lines = [np.arange(side) * 2.0 - side + middle for side, middle in zip((40, 44, 48), (10, -5, 80), strict=True)]
    plain.xyz[:] = np.stack(np.meshgrid(*lines, indexing="ij"))
    plain._reach = [(line, line) for line in lines]
    return plain


def everywhere(canvas: Canvas, solid: Solid) -> np.ndarray:
    return solid.within(canvas.whole)


def test_a_ball_is_its_distance(canvas):
    ball = canvas.ellipsoid((12, -3, 84), (14, 14, 14), (0.3, 0.2, 0.1))
    exact = np.linalg.norm(canvas.xyz - np.array([12, -3, 84])[:, None, None, None], axis=0) - 14
    near = (np.abs(exact) < 6) & (exact > -13)
    np.testing.assert_allclose(everywhere(canvas, ball)[near], exact[near], atol=1e-3)


def test_an_ellipsoid_has_its_volume_however_it_is_turned(canvas):
    for turn in ((0, 0, 0), (0.7, -0.4, 1.1)):
        inside = everywhere(canvas, canvas.ellipsoid((10.3, -4.6, 80.7), (10, 16, 22), turn)) < 0
        assert inside.sum() * 8 == pytest.approx(4 / 3 * np.pi * 10 * 16 * 22, rel=0.02)


def test_a_straight_tube_is_a_capsule(canvas):
    tube = canvas.tube([(10, -5, 65), (10, -5, 80), (10, -5, 95)], 8)
    x, y, z = canvas.xyz - np.array([10, -5, 80])[:, None, None, None]
    exact = np.sqrt(x**2 + y**2 + np.maximum(np.abs(z) - 15, 0) ** 2) - 8
    near = np.abs(exact) < 6
    np.testing.assert_allclose(everywhere(canvas, tube)[near], exact[near], atol=1e-3)


def test_solids_combine_like_sets(canvas):
    a, b = canvas.ellipsoid((6.3, -5.2, 80.4), (9, 9, 9)), canvas.ellipsoid((16.1, -5.4, 82.6), (8, 8, 8))
    lone = canvas.ellipsoid((-16, -30, 50), (3, 3, 3))
    in_a, in_b, in_lone = (everywhere(canvas, solid) < 0 for solid in (a, b, lone))
    np.testing.assert_array_equal(everywhere(canvas, a & b) < 0, in_a & in_b)
    np.testing.assert_array_equal(everywhere(canvas, a | b) < 0, in_a | in_b)
    np.testing.assert_array_equal(everywhere(canvas, a - b) < 0, in_a & ~in_b)
    np.testing.assert_array_equal(everywhere(canvas, a | lone) < 0, in_a | in_lone)
    assert (everywhere(canvas, a & lone) == FAR).all()


def test_a_later_organ_takes_only_free_room(canvas):
    first = canvas.claim(canvas.ellipsoid((10, -5, 80), (9, 9, 9)), 50.0, label=1)
    canvas.claim(canvas.ellipsoid((14, -5, 80), (9, 9, 9)), 90.0, label=2)
    np.testing.assert_array_equal(canvas.label == 1, everywhere(canvas, first) < 0)
    assert (canvas.label == 2).any()


def test_paths_pass_through_their_points_and_rotations_keep_lengths():
    points = np.array([[0, 0, 0], [10, 5, 0], [20, -5, 8], [30, 0, 0]], np.float32)
    path, widths = catmull_rom(points, np.array([4, 6, 2, 8], np.float32), legs=4)
    np.testing.assert_allclose(path[::4], points, atol=1e-5)
    np.testing.assert_allclose(widths[::4], [4, 6, 2, 8])
    turn = rotation(0.3, -0.8, 2.0)
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)


# what is written


def test_the_name_opens_this_file_and_not_its_parts():
    assert "phantom" in find.names("dataset")
    assert not [name for name in find.names("dataset") if name.startswith("_")]


def test_files_hold_the_volume_in_patient_space(folder):
    """Stored in LPS; nibabel's canonical view is the RAS array that `volume` returns, with its spacing."""
    hu, label, spacing_mm = phantom.volume([3, 1])
    for name, voxels in (("imagesTr", hu), ("labelsTr", label)):
        stored = nibabel.Nifti1Image.from_filename(folder / name / "phantom_001.nii.gz")
        assert nibabel.aff2axcodes(stored.affine) == ("L", "P", "S")
        assert stored.get_data_dtype() == voxels.dtype
        canonical = nibabel.as_closest_canonical(stored)
        np.testing.assert_array_equal(np.asarray(canonical.dataobj), voxels)
        np.testing.assert_allclose(canonical.header.get_zooms(), spacing_mm, rtol=1e-6)
        np.testing.assert_allclose(stored.get_qform(), stored.get_sform(), atol=1e-3)


def test_the_liver_lies_on_the_right_of_the_world(folder):
    stored = nibabel.Nifti1Image.from_filename(folder / "labelsTr" / "phantom_000.nii.gz")
    label = np.asarray(stored.dataobj)
    middle = {
        organ: nibabel.affines.apply_affine(stored.affine, np.argwhere(label == LABEL[organ]).mean(0)) for organ in ALWAYS
    }
    assert middle["liver"][0] > 20 > -20 > middle["spleen"][0]
    assert middle["stomach"][1] > middle["aorta"][1]
    assert middle["esophagus"][2] > middle["duodenum"][2]


def test_cases_come_back_as_written(folder):
    found = {case.volume: case for case in phantom.cases(folder)}
    assert sorted(found) == [f"phantom_{index:03d}" for index in range(4)]
    assert [found[name].label is not None for name in sorted(found)] == [True, True, True, False]
    assert len({case.patient for case in found.values()}) == 4
    assert all(file.exists() for case in found.values() for file in case.images)


def test_dataset_json_agrees_with_info(folder):
    said, info = json.loads((folder / "dataset.json").read_text()), phantom.info(folder)
    assert tuple(said["labels"].values()) == info.classes
    assert (said["numTraining"], said["numTest"]) == (3, 1)
    assert info.tolerance_mm is not None
    assert len(info.tolerance_mm) == len(info.classes) - 1 == 13


def test_a_killed_generation_is_resumed_to_the_same_files(tmp_path, folder):
    """SIGKILL once the first file is there; whole files stay untouched, the rest is written, nothing differs."""
    root = tmp_path / "killed"
    process = multiprocessing.get_context("spawn").Process(target=phantom.generate, args=(root, 4, 3, 1))
    process.start()
    while process.is_alive() and not list(root.glob("imagesTr/[!.]*")):
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (root / "dataset.json").exists()
    survivors = {file: file.stat().st_mtime_ns for file in root.glob("imagesTr/phantom_000.nii.gz")}
    assert survivors
    for file in root.rglob("[!.]*.nii.gz"):
        gzip.decompress(file.read_bytes())  # whole: a truncated stream raises

    phantom.generate(root, patients=4, seed=3, processes=2)
    assert files(root) == files(folder)
    assert {file: file.stat().st_mtime_ns for file in survivors} == survivors


def test_a_finished_folder_is_left_as_it_is(folder):
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    phantom.generate(folder, patients=4, seed=3, processes=2)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


@pytest.mark.parametrize("change", [{"patients": 5}, {"seed": 4}])
def test_another_recipe_in_the_same_folder_is_refused(folder, change):
    with pytest.raises(UsageError, match="choose another folder"):
        phantom.generate(folder, **{"patients": 4, "seed": 3, "processes": 1} | change)


def test_files_of_an_unfinished_other_recipe_are_refused(tmp_path):
    phantom.generate(tmp_path, patients=2, seed=0, processes=1)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(UsageError, match=r"phantom_001\.nii\.gz.*remove"):
        phantom.generate(tmp_path, patients=1, seed=0, processes=1)
    with pytest.raises(UsageError, match=r"phantom_000\.nii\.gz.*remove"):
        phantom.generate(tmp_path, patients=2, seed=1, processes=1)


def test_foreign_data_are_never_overwritten(tmp_path):
    atomic.write_json(tmp_path / "dataset.json", {"name": "mine"})
    with pytest.raises(UsageError, match="another data set"):
        phantom.generate(tmp_path, patients=1, processes=1)
    assert json.loads((tmp_path / "dataset.json").read_text()) == {"name": "mine"}


@pytest.mark.parametrize("nonsense", [{"patients": 0}, {"processes": 0}, {"seed": -1}])
def test_nonsense_is_refused(tmp_path, nonsense):
    with pytest.raises(UsageError, match="at least 1"):
        phantom.generate(tmp_path, **nonsense)
