"""Laws of reading a Decathlon or nnU-Net folder: what is a volume, whose it is, and what is refused."""

import json
from pathlib import Path

import pytest

from medssl.platform import scans
from medssl.platform.datasets import decathlon
from medssl.platform.errors import RunError, UsageError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def folder(root: Path, names: dict[str, list[str]], said: dict | None = None, subjects: list | None = None) -> Path:
    """Empty files under their folders, with a dataset.json; listing volumes needs no voxels."""
    for place, files in names.items():
        (root / place).mkdir(parents=True)
        for file in files:
            (root / place / file).touch()
    default = {"name": "toy", "modality": {"0": "MRI"}, "labels": {"0": "background", "1": "organ"}}
    (root / "dataset.json").write_text(json.dumps(default | (said or {})))
    if subjects is not None:
        (root / "cases.json").write_text(json.dumps(subjects))
    return root


def test_the_decathlon_form(tmp_path):
    said = {"labels": {"1": "Anterior", "0": "background", "2": "Posterior"}, "licence": "CC0", "reference": "Somebody 2020"}
    listing = {"training": [{"image": "./imagesTr/b.nii.gz", "label": "./labelsTr/b.nii.gz"}], "test": ["./imagesTs/c.nii.gz"]}
    names = {"imagesTr": ["b.nii.gz", "a.nii", "._a.nii"], "labelsTr": ["a.nii", "b.nii.gz"], "imagesTs": ["c.nii.gz"]}
    root = folder(tmp_path, names, said | listing)
    info = decathlon.info(root)
    assert (info.name, info.classes, info.preset) == ("toy", ("background", "Anterior", "Posterior"), "mr")
    assert (info.licence, info.citation, info.tolerance_mm) == ("CC0", "Somebody 2020", None)
    found = {case.volume: case for case in decathlon.cases(root)}
    assert list(found) == ["a", "b", "c"]
    assert found["a"].label == root / "labelsTr" / "a.nii"
    assert found["c"].label is None
    assert {case.part for case in found.values()} == {None}
    assert [case.patient for case in found.values()] == ["a", "b", "c"]


def test_the_nnunet_form_with_a_file_per_channel(tmp_path):
    said = {
        "channel_names": {"1": "T2", "0": "FLAIR"},
        "labels": {"background": 0, "tumour": 2, "oedema": 1},
        "file_ending": ".nii.gz",
    }
    names = ["p_0001_0001.nii.gz", "p_0001_0000.nii.gz", "q_0000.nii.gz", "q_0001.nii.gz"]
    root = folder(tmp_path, {"imagesTr": names, "labelsTr": ["p_0001.nii.gz", "q.nii.gz"]}, said)
    assert decathlon.info(root).classes == ("background", "oedema", "tumour")
    assert decathlon.info(root).channels == ("FLAIR", "T2")
    first, second = decathlon.cases(root)
    assert (first.volume, second.volume) == ("p_0001", "q")
    assert [file.name for file in first.images] == ["p_0001_0000.nii.gz", "p_0001_0001.nii.gz"]
    assert first.label == root / "labelsTr" / "p_0001.nii.gz"


def test_a_number_that_is_no_channel_belongs_to_the_name(tmp_path):
    root = folder(tmp_path, {"imagesTr": ["scan_2023.nii.gz", "scan_0000.nii.gz"]})
    assert [case.volume for case in decathlon.cases(root)] == ["scan_0000", "scan_2023"]


@pytest.mark.parametrize(("modality", "preset"), [("CT", "ct"), ("ct", "ct"), ("MRI", "mr"), ("MR", "mr"), ("FLAIR", "mr")])
def test_the_modality_chooses_the_preset(tmp_path, modality, preset):
    root = folder(tmp_path, {"imagesTr": ["a.nii.gz"]}, {"modality": {"0": modality}})
    assert decathlon.info(root).preset == preset


def test_a_labelled_test_folder_is_the_official_test_part(tmp_path):
    names = {"imagesTr": ["a.nii.gz"], "labelsTr": ["a.nii.gz"], "imagesTs": ["b.nii.gz"], "labelsTs": ["b.nii.gz"]}
    assert [(case.volume, case.part) for case in decathlon.cases(folder(tmp_path, names))] == [("a", "train"), ("b", "test")]


def test_cases_json_says_whose_a_volume_is(tmp_path):
    names = {"imagesTr": ["a.nii.gz", "b.nii.gz"], "labelsTr": ["a.nii.gz", "b.nii.gz"], "imagesTs": ["c.nii.gz"]}
    subjects = [{"name": "a.nii.gz", "subject": 7, "phase": "ED"}, {"name": "b", "patient": "7", "split": "val"}]
    a, b, c = decathlon.cases(folder(tmp_path, names, subjects=subjects))
    assert (a.patient, a.phase, a.part) == ("7", "ED", None)
    assert (b.patient, b.phase, b.part) == ("7", None, "val")
    assert c.patient == "c"  # without a label it can only train


def test_a_folder_is_recognised_by_its_form(tmp_path):
    assert scans.recognise(folder(tmp_path / "good", {"imagesTr": ["a.nii.gz"]})) == "decathlon"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"empty: no data set in a known form; expected dataset.json and imagesTr/"):
        scans.recognise(tmp_path / "empty")
    with pytest.raises(UsageError, match=r'no folder "decatlon", and no data set of that name; did you mean decathlon\?'):
        scans.recognise(Path("decatlon"))


LABELLED = {"imagesTr": ["a.nii.gz"], "labelsTr": ["a.nii.gz"]}


@pytest.mark.parametrize(
    ("names", "said", "subjects", "message"),
    [
        ({"imagesTr": ["a.png"]}, {}, None, r"a\.png: medssl reads NIfTI; expected \.nii\.gz or \.nii"),
        ({"imagesTr": [], "labelsTr": ["a.nii.gz"]}, {}, None, r"labelsTr/a\.nii\.gz: a label without an image in imagesTr"),
        (LABELLED, {"training": [{"image": "./imagesTr/gone.nii.gz"}]}, None, r"lists 1 volumes that are not there \(gone\)"),
        (LABELLED, {}, [{"name": "z", "patient": 1}], r"cases\.json: does not say whose volume a is"),
        (LABELLED, {}, [{"name": "a"}], r"cases\.json: expected a list of"),
        (LABELLED, {}, [{"name": "a", "patient": 1, "split": "dev"}], r'split "dev" of a should be train, val or test'),
        (LABELLED, {"labels": {"0": "background", "2": "organ"}}, None, r"label ids \[0, 2\] should be 0, 1, 2 … without gaps"),
        (LABELLED, {"labels": {"background": 0, "whole": [1, 2], "core": 2}}, None, "labels hold regions or an ignore label"),
        (LABELLED, {"labels": {"background": 0, "organ": 1, "ignore": 2}}, None, "labels hold regions or an ignore label"),
        (LABELLED, {"labels": {}}, None, "names no labels"),
        (LABELLED, {"modality": {}}, None, "names no channels"),
        (LABELLED, {"modality": {"0": "CT", "1": "PET"}}, None, "mix CT with others"),
        (
            {"imagesTr": ["a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz"]},
            {"modality": {"0": "T1", "1": "T2"}},
            None,
            r"imagesTr/b: 2 channels in dataset\.json, found b_0000\.nii\.gz",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path, names, said, subjects, message):
    root = folder(tmp_path, names, said, subjects)
    with pytest.raises(RunError, match=message):
        (decathlon.info(root), list(decathlon.cases(root)))


def test_a_dataset_json_that_is_not_json_is_refused(tmp_path):
    root = folder(tmp_path, LABELLED)
    (root / "dataset.json").write_text("{")
    with pytest.raises(RunError, match=r"dataset\.json: not JSON"):
        decathlon.info(root)


@pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data beside the repository")
@pytest.mark.parametrize(
    ("name", "volumes", "patients", "labelled", "classes"),
    [("Task04_Hippocampus", 261, 171, 260, 3), ("SunnybrookLV", 90, 45, 90, 2), ("TotalSegSamples", 2, 2, 2, 14)],
)
def test_real_folders_hold_what_their_readme_says(name, volumes, patients, labelled, classes):
    """Hippocampus: 170 labelled subjects and the one of the unlabelled volume."""
    found = list(decathlon.cases(DATA / name))
    assert len(found) == volumes
    assert len({case.patient for case in found}) == patients
    assert sum(case.label is not None for case in found) == labelled
    assert len(decathlon.info(DATA / name).classes) == classes
