"""Laws of every data set of platform/datasets/, held against a miniature in its published layout (tests/layouts/<name>.py)."""

import importlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from medssl.platform import catalogue, find, geometry, ingest, scans, splits
from medssl.platform.datasets import decathlon
from medssl.platform.errors import RunError, UsageError
from medssl.platform.records import UNLABELLED
from medssl.platform.store import Store, VolumeRecord
from medssl.tests.layouts._scan import Drawn

MODULES = {name: find.load("dataset", name) for name in find.names("dataset")}
READ = [name for name, module in MODULES.items() if not hasattr(module, "generate")]  # the others write themselves


def writer(name: str) -> Callable[..., list[Drawn]]:
    """A data set without a miniature fails here."""
    found = importlib.import_module(f"medssl.tests.layouts.{name}").write
    assert callable(found)
    return found


@pytest.fixture(scope="module")
def miniatures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Drawn]]]:
    """Every miniature, written once, and what it holds by volume."""
    above = tmp_path_factory.mktemp("layouts")
    return {name: (above / name, {d.volume: d for d in writer(name)(above / name)}) for name in READ}


@pytest.mark.parametrize("name", READ)
def test_a_folder_is_recognised_by_its_own_reader_alone(miniatures, name):
    root = miniatures[name][0]
    assert [each for each, module in MODULES.items() if hasattr(module, "matches") and module.matches(root)] == [name]
    assert scans.recognise(root) == name


@pytest.mark.parametrize("name", READ)
def test_cases_are_those_that_were_drawn(miniatures, name, tmp_path):
    root, drawn = miniatures[name]
    found = scans.find_source(root, tmp_path)
    cases = found.cases
    assert sorted(case.volume for case in cases) == sorted(drawn)
    for case in cases:
        one = drawn[case.volume]
        assert (case.patient, case.part, case.phase, case.group) == (one.patient, one.part, one.phase, one.group)
        assert case.modality == one.modality
        assert bool(case.label) == (one.label is not None)
    assert scans.listing_problems(found) == []


@pytest.mark.parametrize("name", READ)
def test_labels_are_read_as_class_ids_voxel_by_voxel(miniatures, name, tmp_path):
    root, drawn = miniatures[name]
    found, seen = scans.find_source(root, tmp_path), set()
    for case in found.cases:
        if case.label:
            _, _, label = scans.read_case(case, found.info)
            np.testing.assert_array_equal(label, drawn[case.volume].label, err_msg=case.volume)
            seen |= set(np.unique(label)) - {UNLABELLED}
    assert seen == (set(range(len(found.info.classes))) if seen else set())  # every class occurs, or nothing is labelled


@pytest.mark.parametrize("name", READ)
def test_it_is_prepared_by_its_own_preset_and_labels_come_back(miniatures, name, tmp_path):
    """Miniatures have the preset's spacing, so that nothing is resampled; one preparation for each modality."""
    root, drawn = miniatures[name]
    info = MODULES[name].info(root)
    own = geometry.modality(info)
    for modality in {one.modality for one in drawn.values()}:
        preset = None if modality in (None, own) else modality
        store = ingest.prepare(root, tmp_path / f"{modality}", preset=preset, workers=1)
        expected = {volume for volume, one in drawn.items() if one.modality == modality}
        assert {record.volume for record in store.volumes} == expected
        for record in store.volumes:
            assert record.group == drawn[record.volume].group
            label = store.arrays(record.volume)[1]
            if drawn[record.volume].label is None:
                assert label is None
                continue
            assert label is not None
            np.testing.assert_array_equal(geometry.restore(label, record.geometry), drawn[record.volume].label)


@pytest.mark.parametrize("name", READ)
def test_licence_source_and_form_are_said(miniatures, name):
    info = MODULES[name].info(miniatures[name][0])
    assert info.licence != "unknown"
    assert "doi.org" in (find.path("dataset", name).read_text().partition('"""\n\n')[0])
    assert find.constant("dataset", name, "LICENCE")
    obtain = find.constant("dataset", name, "OBTAIN")
    assert obtain.startswith("http")
    form = scans.form(name)
    assert form.endswith(obtain)
    assert form.count("\n") >= 3  # a tree
    with pytest.raises(UsageError, match="give a folder of this form"):
        ingest.prepare(name, miniatures[name][0] / "nowhere")


@pytest.mark.parametrize("name", [name for name in READ if hasattr(MODULES[name], "splits")])
def test_published_splits_hold_each_patient_once(name):
    """Whatever the papers' lists say: the sources of some train on who selects."""
    for split in MODULES[name].splits(Path("Task05_Prostate")):
        parts = (split.train, split.val, split.test)
        assert all(parts)
        assert len({*split.train, *split.val, *split.test}) == sum(map(len, parts))
        assert split.labelled
        assert set(split.labelled) <= set(split.train)
        assert len(set(split.labelled)) == len(split.labelled)


def test_published_splits_are_the_papers():
    """Counts and members as the study's configuration has them: specs/global-local.md 1.5."""
    acdc = {split.name: split for split in MODULES["acdc"].splits(Path())}
    assert acdc["global-local-tr2-c1"].labelled == ("patient042", "patient062")
    assert acdc["global-local-tr2-c1"].val == ("patient031", "patient072")
    assert {len(split.test) for name, split in acdc.items() if name != "byol"} == {20}
    assert len(acdc["global-local-tr1-c1"].train) == 52
    assert "patient072" not in acdc["global-local-tr2-c1"].train  # validates, and is in the paper's pretraining list
    assert (len(acdc["global-local-trall"].train), len(acdc["byol"].train)) == (78 - 2 + 1, 80)
    heart = {split.name: split for split in MODULES["mmwhs"].splits(Path())}
    assert heart["global-local-tr2-c4"].labelled == ("mr_train_1010", "mr_train_1007")
    assert {len(split.labelled) for name, split in heart.items() if "tr8" in name} == {8}
    prostate = {split.name: split for split in decathlon.splits(Path("Task05_Prostate"))}
    assert len(prostate["global-local-tr1-c1"].train) == 17 - 2
    assert len(prostate["global-local-trall"].labelled) == 15
    assert list(decathlon.splits(Path("Task09_Spleen"))) == []


@pytest.mark.parametrize("task", decathlon.TASKS)
def test_each_task_of_the_decathlon_is_known(tmp_path, task):
    root = tmp_path / task
    drawn = writer("decathlon")(root, task)
    channels, organs = decathlon.TASKS[task]
    info = decathlon.info(root)
    assert (info.channels, info.classes[1:]) == (channels, organs)
    assert (info.citation, info.obtain) == (decathlon.CITATION, decathlon.OBTAIN)
    assert geometry.modality(info) == ("ct" if channels == ("CT",) else "mr")
    store = ingest.prepare(root, tmp_path / "store", workers=1)
    assert store.channels == (1 if task == "Task05_Prostate" else len(channels))
    for one in drawn[:3]:
        label = store.arrays(one.volume)[1]
        record = next(record for record in store.volumes if record.volume == one.volume)
        np.testing.assert_array_equal(geometry.restore(label, record.geometry), one.label)


def test_chaos_is_read_by_modality(tmp_path):
    drawn = importlib.import_module("medssl.tests.layouts.chaos").write_ct(tmp_path / "CT")
    found = scans.find_source(tmp_path / "CT", tmp_path)
    assert (found.info.preset, found.info.classes) == ("ct", ("background", "liver"))
    for case, one in zip(found.cases, drawn, strict=True):
        assert case.volume == one.volume
        np.testing.assert_array_equal(scans.read_case(case, found.info)[2], one.label)
    with pytest.raises(RunError, match=r"labelled differently; give .*CT or .*MR instead"):
        scans.find_source(tmp_path, tmp_path)


def test_channels_and_classes_can_be_chosen(tmp_path):
    root = tmp_path / "Task05_Prostate"
    drawn = writer("decathlon")(root, "Task05_Prostate")
    both = ingest.prepare(root, tmp_path / "both", changes={"channels": None}, workers=1)
    second = ingest.prepare(root, tmp_path / "adc", changes={"channels": (1,), "classes": ("TZ",)}, workers=1)
    assert (both.channels, second.channels, second.classes) == (2, 1, ("background", "TZ"))
    for one in drawn:
        np.testing.assert_array_equal(both.arrays(one.volume)[0][:, 1:], second.arrays(one.volume)[0])
        if one.label is not None:
            np.testing.assert_array_equal(both.arrays(one.volume)[1] == 2, second.arrays(one.volume)[1])
    with pytest.raises(UsageError, match=r'classes names "CZ" in vain; did you mean TZ\?'):
        ingest.prepare(root, tmp_path / "none", changes={"classes": ("CZ",)}, workers=1)


def test_a_folder_may_be_called_as_its_data_set_is(miniatures, tmp_path, monkeypatch):
    monkeypatch.chdir(miniatures["btcv"][0].parent)
    assert ingest.prepare("btcv", tmp_path, workers=1).name == "btcv"


def test_a_preset_for_the_other_modality_is_refused_where_only_one_is_there(miniatures, tmp_path):
    with pytest.raises(UsageError, match="preset ct is for ct, and there is only mr here"):
        ingest.prepare(miniatures["mmwhs"][0] / "mr_train", tmp_path, preset="ct", workers=1)


def test_scans_of_the_other_modality_are_left_out_aloud(miniatures, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDSSL_DATA", str(tmp_path))
    told = []
    catalogue.prepare(str(miniatures["mmwhs"][0]), workers=1, say=told.append)
    assert any(line.startswith("4 scans left out") for line in told)


def test_published_splits_that_fit_are_in_the_prepared_set(tmp_path, monkeypatch):
    """Of a folder with fewer patients than the paper had, those splits are kept whose patients are all there."""
    monkeypatch.setenv("MEDSSL_DATA", str(tmp_path / "data"))
    root, told = tmp_path / "Task05_Prostate", []
    writer("decathlon")(root, "Task05_Prostate")
    store = catalogue.prepare(str(root), name="prostate-t2", workers=1, say=told.append)
    assert store.root == tmp_path / "data" / "prostate-t2"
    assert any("14 published splits left out" in line for line in told)


def test_a_collection_without_labels_pretrains_on_everybody(miniatures, tmp_path):
    store = ingest.prepare(miniatures["nnssl"][0], tmp_path, workers=1)
    split = splits.make(store)
    assert (split.train, split.val, split.test, split.labelled) == (store.patients, (), (), ())
    splits.save(split, store)
    assert splits.load(store, "seed-0") == split


def test_data_list_says_what_each_set_is_and_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDSSL_DATA", str(tmp_path))
    text = catalogue.describe(catalogue.entries())
    for name in READ:
        assert find.constant("dataset", name, "OBTAIN") in text
        assert find.constant("dataset", name, "LICENCE") in text


def planes(store: Store) -> Iterator[tuple[VolumeRecord, NDArray[Any], NDArray[np.uint8] | None]]:
    """Every volume with its pixels (d, h, w) and labels, reading the slices once: one channel, bytes."""
    table = store.table(columns=["volume", "slice_index", "image", "label"])
    rows = table.sort_by([("volume", "ascending"), ("slice_index", "ascending")]).to_pylist()
    for name, group in itertools.groupby(rows, key=lambda row: row["volume"]):
        mine, record = list(group), next(record for record in store.volumes if record.volume == name)
        shape = (record.slices, record.height, record.width)
        pixels, labels = (b"".join(row[key] or b"" for row in mine) for key in ("image", "label"))
        label = np.frombuffer(labels, np.uint8).reshape(shape) if record.labelled else None
        yield record, np.frombuffer(pixels, store.preset.dtype).reshape(shape), label


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Task04_Hippocampus", "SunnybrookLV", "TotalSegSamples"])
def test_real_sets_are_prepared_by_one_command_and_reassemble(data_root, tmp_path, monkeypatch, name):
    """Labels exactly; intensities within one level of the storage type: floor(255 x) of x in [0, 1]."""
    monkeypatch.setenv("MEDSSL_DATA", str(tmp_path))
    root = data_root / name
    changes = {"spacing_mm": None} if name == "TotalSegSamples" else {}  # what is not resampled can be compared voxel by voxel
    store = catalogue.prepare(str(root), changes=changes, workers=1, say=lambda line: None)
    info, cases = decathlon.info(root), {case.volume: case for case in decathlon.cases(root)}
    assert {record.volume for record in store.volumes} == set(cases)
    for record, pixels, labels in planes(store):
        image, _, label = scans.read_case(cases[record.volume], info)
        assert (label is None) == (labels is None)
        if labels is not None:
            np.testing.assert_array_equal(geometry.restore(labels, record.geometry), label)
        low, high = store.preset.window or np.percentile(image, store.preset.percentiles)
        exact = np.clip((image[0] - low) / (high - low), 0, 1)
        stored = geometry.restore(pixels, record.geometry).astype(float) / 255
        inside = geometry.restore(np.ones_like(pixels), record.geometry) == 1  # the foreground box: outside, nothing
        assert np.all(exact[inside] - stored[inside] < 1 / 255 + 1e-6)
        assert np.all(exact[inside] - stored[inside] > -1e-4)
        assert np.all(exact[~inside] == 0)
