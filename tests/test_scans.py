"""Laws of reading a case: what its files say becomes class ids, one frame, one grid; what means nothing is named."""

import dataclasses

import nibabel
import numpy as np
import pytest

from medssl.platform import scans
from medssl.platform.geometry import PRESETS
from medssl.platform.records import UNLABELLED, Case, DataInfo, Mask

AFFINE = np.diag([-1.5, 1.0, 2.0, 1.0])
ORGANS = DataInfo("toy", ("background", "left", "right"), preset="mr")
rng = np.random.default_rng(0)


def nifti(path, array):
    nibabel.Nifti1Image(array, AFFINE).to_filename(path)
    return path


@pytest.fixture
def case(tmp_path):
    """An image, and a label of ids 0, 1, 2 of which none is missing."""
    ids = rng.integers(0, 3, (6, 5, 4)).astype(np.uint8)
    image = nifti(tmp_path / "image.nii.gz", rng.integers(0, 900, (6, 5, 4)).astype(np.int16))
    return Case("p", "v", (image,), nifti(tmp_path / "label.nii.gz", ids))


def ids_of(case, info=ORGANS):
    return scans.read_case(case, info)[2]


def test_values_of_a_label_file_become_the_class_ids_that_the_data_set_says(tmp_path, case):
    """Heart labels such as 205 and 500; a mask of 0 and 255; values that are stored as floats; none of them as ids."""
    ids = ids_of(case)
    for values, meaning, dtype in (
        ([0, 205, 850], {0: 0, 205: 1, 850: 2}, np.int16),
        ([0, 205, 850], {850: 2, 205: 1, 0: 0, 420: 1}, np.float32),
        ([0, 128, 255], {0: 0, 128: 1, 255: 2}, np.uint8),
        ([-1024, 1, 2], {-1024: 0, 1: 1, 2: 2}, np.int32),
    ):
        file = nifti(tmp_path / "raw.nii.gz", np.array(values, dtype)[ids])
        info = dataclasses.replace(ORGANS, label_values=meaning)
        assert np.array_equal(ids_of(dataclasses.replace(case, label=file), info), ids)
    info = dataclasses.replace(ORGANS, label_values={0: 0, 1: 2, 2: UNLABELLED})
    assert np.array_equal(ids_of(case, info), np.array([0, 2, UNLABELLED])[ids])


@pytest.mark.parametrize(
    ("values", "meaning", "said"),
    [
        ([0, 205, 421], {0: 0, 205: 1, 420: 2}, "unknown class id 421; expected 0 background, 205 left, 420 right; mend"),
        ([0, 1, 255], {0: 0, 1: 1}, "unknown class id 255; expected 0 background, 1 left; mend"),
        ([0, 1, 0.5], {0: 0, 1: 1}, "unknown class id 0 to 1; expected"),
        ([0, 1, np.nan], {0: 0, 1: 1}, "unknown class id nan to nan"),
        ([-1, 300, 2], {}, "unknown class id -1, 300; expected 0 background, 1 left, 2 right"),
        ([0, 1, 3e9], {}, r"unknown class id 0 to 3e\+09"),
    ],
)
def test_a_value_that_means_nothing_is_named(tmp_path, case, values, meaning, said):
    raw = np.array(values, np.float32)[ids_of(case)]
    case = dataclasses.replace(case, label=nifti(tmp_path / "raw.nii.gz", raw))
    with pytest.raises(scans.Problem, match=rf"raw\.nii\.gz: {said}"):
        ids_of(case, dataclasses.replace(ORGANS, label_values=meaning))


def test_masks_are_joined_by_class_and_two_classes_never_meet(tmp_path, case):
    parts = rng.integers(0, 4, (6, 5, 4))  # 1 and 2 are two files of the class "left"
    masks = [
        Mask(name, nifti(tmp_path / f"{n}.nii.gz", ((parts == n) * value).astype(np.uint8)))
        for n, name, value in ((1, "left", 255), (2, "left", 1), (3, "right", 17))
    ]
    ids = ids_of(dataclasses.replace(case, label=tuple(masks)))
    assert np.array_equal(ids, np.array([0, 1, 1, 2])[parts])
    assert np.array_equal(ids_of(dataclasses.replace(case, label=tuple(masks[:2]))), (ids == 1).astype(np.uint8))

    def refused(*masks):
        with pytest.raises(scans.Problem) as caught:
            ids_of(dataclasses.replace(case, label=masks))
        return caught.value.what

    assert refused(masks[0], Mask("right", masks[0].file)).startswith(f"{(parts == 1).sum()} of its voxels are another class")
    assert refused(Mask("spleen", masks[0].file)) == 'marks "spleen", which is no class; expected one of left, right'
    dirty = Mask("left", nifti(tmp_path / "dirty.nii.gz", np.where(parts > 0, 250 + parts, parts).astype(np.uint8)))
    assert refused(dirty).startswith("a mask holds 0 and one other value, here are 251, 252, 253; was it stored as JPEG?")


def test_a_mask_stored_with_loss_is_read_above_its_threshold_and_not_above_zero(tmp_path, case):
    truth = rng.random((6, 5, 4)) < 0.4
    dirty = np.clip(truth * 255.0 + rng.normal(0, 20, truth.shape), 0, 255).astype(np.uint8)
    info = DataInfo("toy", ("background", "tumour"), mask_threshold=127)
    case = dataclasses.replace(case, label=nifti(tmp_path / "dirty.nii.gz", dirty))
    assert np.array_equal(ids_of(case, info), truth)
    assert ((dirty > 0) != truth).sum() > 20
    nifti(case.label, truth.astype(np.uint8))
    with pytest.raises(scans.Problem, match="its values go to 1, none above the threshold 127; expected 0 to 255"):
        ids_of(case, info)


def test_a_frame_is_one_volume_of_a_cine_file(tmp_path, case):
    cine = rng.integers(0, 900, (6, 5, 4, 3)).astype(np.int16)
    case = dataclasses.replace(case, images=(nifti(tmp_path / "cine.nii.gz", cine),))
    for frame in range(3):
        image, affine, ids = scans.read_case(dataclasses.replace(case, frame=frame), ORGANS)
        assert np.array_equal(image, cine[None, ..., frame])
        assert np.array_equal(affine, AFFINE)
        assert np.array_equal(ids, ids_of(dataclasses.replace(case, frame=frame)))
    with pytest.raises(scans.Problem, match=r"frame 3 is wanted of its shape \(6, 5, 4, 3\); expected 4D with that many"):
        scans.read_case(dataclasses.replace(case, frame=3), ORGANS)


def test_stamp_and_signature_follow_all_that_changes_what_is_read(case):
    def names(case, info=ORGANS):
        source = scans.Source(case.images[0].parent, info, (case,))
        return source.signature(case, PRESETS["mr"]), source.version

    image, label = case.images[0], case.label
    masks = [(Mask("left", label),), (Mask("right", label),), (Mask("left", label), Mask("left", image))]
    different = [
        names(case),
        names(dataclasses.replace(case, frame=0)),
        names(dataclasses.replace(case, frame=1)),
        *(names(dataclasses.replace(case, label=each)) for each in masks),
        names(case, dataclasses.replace(ORGANS, label_values={0: 0, 1: 1, 2: 2})),
        names(case, dataclasses.replace(ORGANS, label_values={0: 0, 1: 2, 2: 1})),
    ]
    assert len(set(different)) == len({version for _, version in different}) == 8
    assert names(case, dataclasses.replace(ORGANS, obtain="https://example.org")) == names(case)


def test_a_label_table_leads_to_classes_only():
    with pytest.raises(ValueError, match=r"toy: label_values lead to \[3\], which are not class ids"):
        dataclasses.replace(ORGANS, label_values={0: 0, 1: 3})
    with pytest.raises(ValueError, match="mask_threshold tells one class from the background"):
        dataclasses.replace(ORGANS, mask_threshold=127)
