"""Laws of `data check`: everything wrong is listed, what is strange apart from it, and by rules that are stated."""

import dataclasses
import json

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.platform import ingest, quality, splits
from medssl.platform.errors import UsageError

AFFINE = np.diag([-1.5, 1.0, 2.0, 1.0])
IMAGE, LABEL = "imagesTr", "labelsTr"


def write(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(array, affine).to_filename(path)


def file(root, folder, number):
    return root / folder / f"v{number:02d}.nii.gz"


def read(path):
    return np.array(nibabel.load(path).dataobj)


def data_set(root, volumes=9, **cases):
    """Noise of two classes, a volume per patient; `cases` are fields of cases.json by volume's number."""
    rng = np.random.default_rng(0)
    for number in range(volumes):
        write(file(root, IMAGE, number), rng.integers(0, 900, (12, 10, 6)).astype(np.int16))
        write(file(root, LABEL, number), rng.integers(0, 3, (12, 10, 6)).astype(np.uint8))
    said = {"name": "toy", "modality": {"0": "MRI"}, "labels": {"0": "background", "1": "left", "2": "right"}}
    (root / "dataset.json").write_text(json.dumps(said))
    if cases:
        entries = [{"name": f"v{n:02d}", "patient": f"p{n}"} | cases.get(f"v{n}", {}) for n in range(volumes)]
        (root / "cases.json").write_text(json.dumps(entries))
    return root


def check(root):
    return quality.check(root, workers=1)


def kinds(findings):
    return sorted({(each.kind, each.file.name) for each in findings})


def test_a_good_data_set_is_clean(tmp_path):
    report = check(data_set(tmp_path / "scans"))
    assert (report.findings, report.volumes, report.patients, report.form) == ((), 9, 9, "scans")
    assert report.describe() == "no problem found"


def test_everything_wrong_is_listed_and_not_just_the_first(tmp_path):
    root = data_set(tmp_path / "scans")
    image = read(file(root, IMAGE, 0)).astype(np.float32)
    image[4, 4, 4] = np.nan
    write(file(root, IMAGE, 0), image)
    write(file(root, LABEL, 0), np.full((12, 10, 6), 7, np.uint8))  # its scan is bad too
    file(root, LABEL, 1).unlink()
    file(root, IMAGE, 2).write_bytes(b"")
    write(file(root, LABEL, 3), np.full((12, 10, 7), 9, np.uint8))  # another grid, and an unknown class
    write(file(root, IMAGE, 4), np.full((12, 10, 6), 3, np.int16))
    flat = np.zeros((12, 10, 6), np.int16)
    flat[0, 0, 0] = 1
    write(file(root, IMAGE, 5), flat)
    write(file(root, LABEL, 6), read(file(root, LABEL, 6)), AFFINE @ np.diag([-1, 1, 1, 1]))
    report = check(root)
    assert kinds(report.errors) == sorted(
        [("image", f"v0{n}.nii.gz") for n in (0, 2, 4)]
        + [("label", f"v0{n}.nii.gz") for n in (0, 3, 6)]
        + [("missing", "v01.nii.gz"), ("preparation", "v05.nii.gz")]
    )
    of_3 = [each.what.split(" ", 2)[:2] for each in report.errors if each.file == file(root, LABEL, 3)]
    assert of_3 == [["its", "shape"], ["unknown", "class"]]
    assert {each.volume for each in report.errors if each.kind == "image"} == {"v00", "v02", "v04"}
    assert quality.check(root, workers=2).as_json() == report.as_json()
    (root / "dataset.json").write_text("[")
    (only,) = check(root).errors
    assert (only.kind, only.file) == ("listing", root / "dataset.json")


def test_the_json_form_is_stable(tmp_path):
    root = data_set(tmp_path / "scans")
    file(root, IMAGE, 2).write_bytes(b"")
    write(file(root, LABEL, 3), np.zeros((12, 10, 6), np.uint8))
    said = json.loads(json.dumps(check(root).as_json()))
    assert list(said) == ["schema", "source", "form", "volumes", "patients", "errors", "warnings"]
    assert (said["schema"], said["form"], said["volumes"]) == (1, "scans", 9)
    (error,), (warning,) = said["errors"], said["warnings"]
    assert set(error) == set(warning) == {"kind", "file", "volume", "patient", "what"}
    assert (error["kind"], error["file"], error["volume"], error["patient"]) == (
        "image", str(file(root, IMAGE, 2)), "v02", "v02"
    )  # fmt: skip
    assert warning["kind"] == "empty label"


def test_the_same_scan_is_found_whatever_its_header_type_and_compression(tmp_path):
    root = data_set(tmp_path / "scans", v4={"patient": "p3"})
    voxels = read(file(root, IMAGE, 0))
    write(file(root, IMAGE, 1), voxels.astype(np.float32), np.diag([3.0, 3, 3, 1]))
    write(file(root, LABEL, 1), read(file(root, LABEL, 1)), np.diag([3.0, 3, 3, 1]))
    file(root, IMAGE, 2).unlink()
    write(root / IMAGE / "v02.nii", voxels.astype(np.int32))
    file(root, LABEL, 2).rename(root / LABEL / "v02.nii.gz")
    write(file(root, IMAGE, 4), read(file(root, IMAGE, 3)))
    write(file(root, IMAGE, 5), voxels[::-1].copy())  # a flip is another scan
    report = check(root)
    assert sorted(each.volume for each in report.errors if each.kind == "twin") == ["v01", "v02"]
    assert [each.volume for each in report.warnings if each.kind == "duplicate"] == ["v04"]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 9), st.sampled_from(["u1", "i1", "i2", "u2", "i4", "i8", "f4", "f8"]), st.booleans(), st.booleans())
def test_the_voxel_digest_is_of_values_and_shape_alone(seed, dtype, fortran, changed):
    values = np.random.default_rng(seed).integers(0, 120, (1, 3, 4, 5))
    other = np.asarray(values, dtype, order="F" if fortran else "C").copy(order="K")
    assert quality.voxel_digest(other) == quality.voxel_digest(values.astype(np.int16))
    assert quality.voxel_digest(other.transpose(0, 1, 3, 2)) != quality.voxel_digest(values)
    other[0, 1, 1, 1] += 1
    assert quality.voxel_digest(other) != quality.voxel_digest(values)


def test_voxel_digests_tell_fractions_large_numbers_and_signs_apart():
    arrays = [np.array([[[[a, b]]]]) for a, b in ((0.5, 1), (0.25, 1), (1, 1 << 20), (1, 1 << 21), (-1, 1), (1, -1))]
    assert len({quality.voxel_digest(array) for array in arrays}) == len(arrays)
    assert quality.voxel_digest(np.array([[[[-0.0, 0.5]]]])) == quality.voxel_digest(np.array([[[[0.0, 0.5]]]], np.float32))


def test_a_scan_or_a_patient_in_two_parts_is_a_leak(tmp_path):
    sides = {f"v{n}": {"split": "test" if n > 5 else "train"} for n in range(9)}
    root = data_set(tmp_path / "scans", **sides | {"v7": {"split": "train", "patient": "p6"}})
    write(file(root, IMAGE, 8), read(file(root, IMAGE, 0)))
    found = check(root).errors
    assert kinds(found) == [("leak", "v07.nii.gz"), ("leak", "v08.nii.gz"), ("twin", "v08.nii.gz")]
    assert 'patient "p6" is in train here and in test with v06' in next(each.what for each in found if each.volume == "v07")


def test_a_split_with_the_same_scan_in_two_parts_cannot_be_drawn_and_is_found_where_it_lies(tmp_path):
    root = data_set(tmp_path / "scans", volumes=4)
    store = ingest.prepare(root, tmp_path / "store", workers=1)
    split = splits.make(store)
    mine, other = split.train[0], split.test[0]
    write(root / IMAGE / f"{other}.nii.gz", read(root / IMAGE / f"{mine}.nii.gz"))
    store = ingest.prepare(root, tmp_path / "store", workers=1, overwrite=True)
    with pytest.raises(UsageError, match="are the same scan; leave one out, or give both one patient"):
        splits.make(store)
    (store.root / "splits").mkdir()
    (store.root / "splits" / "mine.json").write_text(json.dumps(dataclasses.asdict(split)))
    assert sorted(each.kind for each in check(store.root).errors) == ["leak", "twin"]


def test_what_is_not_annotated_is_a_warning(tmp_path):
    root = data_set(tmp_path / "scans")
    for number in range(9):
        label = read(file(root, LABEL, number))
        label[label == 2] = 1
        write(file(root, LABEL, number), label)
    label[:, :, 4:] = 255
    write(file(root, LABEL, 8), label)
    write(root / "imagesTs" / "x.nii.gz", np.random.default_rng(1).integers(0, 900, (12, 10, 6)).astype(np.int16))
    report = check(root)
    assert report.errors == ()
    said = [each.what.split(";")[0] for each in report.warnings]
    assert said == [
        'no label marks class 2 "right"', "1 of 10 volumes have no label",
        "2 of its 6 slices are not annotated (255 throughout)",
    ]  # fmt: skip
    store = ingest.prepare(root, tmp_path / "store", workers=1)
    assert [each.what.split(";")[0] for each in check(store.root).warnings] == said


def test_outliers_are_those_beyond_six_robust_deviations(tmp_path):
    root = data_set(tmp_path / "scans", volumes=9)
    assert check(root).warnings == ()
    write(file(root, IMAGE, 3), (read(file(root, IMAGE, 3)) * 3).astype(np.int16))
    for folder in (IMAGE, LABEL):
        write(file(root, folder, 5), read(file(root, folder, 5)), np.diag([1.5, 1.0, 4.0, 1.0]))
    report = check(root)
    assert report.errors == ()
    assert {(each.kind, each.volume) for each in report.warnings} == {("intensity", "v03"), ("spacing", "v05")}
    (spacing,) = (each.what for each in report.warnings if each.kind == "spacing")
    z = 0.6745 * (4 - 2) / (0.02 * 2)  # all others are equal: the MAD is its floor
    assert spacing == f"its feet-head voxel side in mm is 4, where the volumes' median is 2 (robust z {z:+.0f}); look at it"
    for number in (6, 7, 8):  # fewer than eight volumes are no population
        for folder in (IMAGE, LABEL):
            file(root, folder, number).unlink()
    assert check(root).warnings == ()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), st.floats(0.1, 10))
def test_the_robust_z_is_its_formula(values, floor):
    ordered = sorted(values)
    median = lambda v: (v[(len(v) - 1) // 2] + v[len(v) // 2]) / 2  # noqa: E731
    middle = median(ordered)
    spread = max(median(sorted(abs(x - middle) for x in values)), floor)
    assert np.allclose(quality.robust_z(np.array(values), floor), [0.6745 * (x - middle) / spread for x in values])


def test_check_finds_what_happened_to_a_store(tmp_path, monkeypatch):
    import pyarrow.parquet

    monkeypatch.setattr(ingest, "PART_BYTES", 1500)
    store = ingest.prepare(data_set(tmp_path / "scans", volumes=4), tmp_path / "store", workers=1)
    assert check(store.root).findings == ()
    table = pyarrow.parquet.read_table(store.files[0])
    first = table["volume"][0].as_py()

    def whats():
        return [each.what.split(";")[0] for each in check(store.root).errors]

    pyarrow.parquet.write_table(table.slice(1), store.files[0])
    assert whats() == [f"volume {first} has 5 of its 6 slices"]
    pixels = [bytes(len(table["image"][0].as_py())), *table["image"].to_pylist()[1:]]
    pyarrow.parquet.write_table(table.set_column(table.column_names.index("image"), "image", [pixels]), store.files[0])
    assert whats() == [f"volume {first} is not what was written"]
    pyarrow.parquet.write_table(pyarrow.concat_tables([table, table.slice(0, 1)]), store.files[0])
    assert whats() == ["holds a slice twice"]
    store.files[0].write_bytes(b"PAR1")
    assert store.files[0] in [each.file for each in check(store.root).errors]


def test_progress_is_told_from_nothing_to_all(tmp_path):
    seen = []
    quality.check(data_set(tmp_path / "scans", volumes=3), workers=1, progress=lambda *each: seen.append(each))
    assert seen == [(done, 3, "volumes") for done in range(4)]
