"""Laws of ingest: what is stored is what was prepared; killed and run again it is the same; a bad scan is named."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medssl.platform import geometry, ingest, montage, quality, splits
from medssl.platform import scans as reading
from medssl.platform.errors import RunError, UsageError
from medssl.platform.geometry import PRESETS, UNLABELLED
from medssl.platform.scans import Problem
from medssl.platform.store import Store

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
AFFINE = np.diag([-1.5, 1.0, 2.0, 1.0])


def write(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(array, affine).to_filename(path)


def scans(root, volumes=4, shape=(20, 18, 6), seed=0, **said):
    """A Decathlon folder of MR-like noise: two volumes per patient, slices of several heights, the last volume unlabelled."""
    rng = np.random.default_rng(seed)
    for number in range(volumes):
        size = (shape[0], shape[1] - number % 3, shape[2] + number % 2)
        last = number == volumes - 1
        write(root / ("imagesTs" if last else "imagesTr") / f"v{number}.nii.gz", rng.integers(0, 900, size).astype(np.int16))
        if not last:
            write(root / "labelsTr" / f"v{number}.nii.gz", rng.integers(0, 3, size).astype(np.uint8))
    labels = {"0": "background", "1": "left", "2": "right"}
    (root / "dataset.json").write_text(json.dumps({"name": "toy", "modality": {"0": "MRI"}, "labels": labels} | said))
    (root / "cases.json").write_text(json.dumps([{"name": f"v{n}", "patient": f"p{n // 2}"} for n in range(volumes)]))
    return root


def test_slices_reassemble_to_the_prepared_volume(tmp_path):
    root = scans(tmp_path / "scans")
    store = ingest.prepare(root, tmp_path / "store", workers=1)
    assert store == Store.open(tmp_path / "store")
    for record in store.volumes:
        path = next(root.glob(f"images*/{record.volume}.nii.gz"))
        scan = nibabel.load(path)
        image, label = store.arrays(record.volume)
        expected = geometry.prepare(np.asanyarray(scan.dataobj)[None], scan.affine, None, PRESETS["mr"])
        assert np.array_equal(image, np.moveaxis(expected.image, -1, 0))
        assert record.spacing_mm == (1.5, 1.0, 2.0)
        if not record.labelled:
            assert label is None
            continue
        original = np.asanyarray(nibabel.load(root / "labelsTr" / path.name).dataobj)
        assert np.array_equal(geometry.restore(label, record.geometry), original)


def test_the_table_is_as_store_py_describes_it(tmp_path):
    store = ingest.prepare(scans(tmp_path / "scans"), tmp_path / "store", workers=1)
    table = store.table()
    assert table.schema.equals(ingest.schema())
    rows = table.to_pylist()
    assert len(rows) == sum(record.slices for record in store.volumes) == 26
    assert len({(row["volume"], row["slice_index"]) for row in rows}) == 26
    records = {record.volume: record for record in store.volumes}
    for row in rows:
        record = records[row["volume"]]
        assert row["patient"] == record.patient == f"p{int(row['volume'][1:]) // 2}"
        assert row["position"] == pytest.approx(row["slice_index"] / (record.slices - 1))
        assert len(row["image"]) == row["height"] * row["width"] * row["channels"]
        if record.labelled:
            label = np.frombuffer(row["label"], np.uint8)
            assert row["foreground"] == pytest.approx((label > 0).mean())
        else:
            assert (row["label"], row["foreground"]) == (None, None)


def test_rows_are_shuffled_over_the_whole_set(tmp_path):
    store = ingest.prepare(scans(tmp_path / "scans", volumes=8), tmp_path / "store", workers=1)
    order = list(
        zip(
            *(store.table(columns=["volume", "slice_index"])[name].to_pylist() for name in ("volume", "slice_index")),
            strict=True,
        )
    )
    assert order != sorted(order)
    neighbours = sum(a[0] == b[0] for a, b in itertools.pairwise(order))
    assert neighbours < len(order) / 3  # 1 in 8 expected


def test_a_table_can_be_cut_to_patients_and_labels(tmp_path):
    store = ingest.prepare(scans(tmp_path / "scans"), tmp_path / "store", workers=1)
    assert set(store.table(patients=["p1"])["volume"].to_pylist()) == {"v2", "v3"}
    assert set(store.table(patients=["p1"], labelled=True)["volume"].to_pylist()) == {"v2"}
    assert set(store.table(labelled=False)["volume"].to_pylist()) == {"v3"}
    assert store.table(columns=["position"]).column_names == ["position"]
    with pytest.raises(UsageError, match='no patient "p9" in'):
        store.table(patients=["p9"])


def test_the_content_hash_depends_on_content_alone(tmp_path, monkeypatch):
    """Not on the order in which volumes were done, nor on the files that slices were dealt into; but on every voxel."""
    root = scans(tmp_path / "scans")
    store = ingest.prepare(root, tmp_path / "a", workers=1)
    monkeypatch.setattr(ingest, "PART_BYTES", 2000)

    def backwards(function, items, workers):
        yield from map(function, reversed(items))

    other = ingest.prepare(root, tmp_path / "b", map_unordered=backwards)
    assert len(other.files) > len(store.files) == 1
    assert other.content_hash == store.content_hash
    assert [record.digest for record in other.volumes] == [record.digest for record in store.volumes]
    assert quality.check(tmp_path / "b", workers=1).errors == ()

    label = np.array(nibabel.load(root / "labelsTr" / "v0.nii.gz").dataobj)
    label[3, 3, 3] = (label[3, 3, 3] + 1) % 3
    write(root / "labelsTr" / "v0.nii.gz", label)
    assert ingest.prepare(root, tmp_path / "c", workers=1).content_hash != store.content_hash


def test_files_are_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "PART_BYTES", 3000)
    store = ingest.prepare(scans(tmp_path / "scans", volumes=8), tmp_path / "store", workers=1)
    import pyarrow.parquet

    for file in store.files:
        table = pyarrow.parquet.read_table(file)
        assert (
            sum(len(a) + len(b or b"") for a, b in zip(*(table[k].to_pylist() for k in ("image", "label")), strict=True))
            < 3000 + 720
        )


def test_preparing_again_does_nothing_and_another_preparation_is_refused(tmp_path):
    root, out = scans(tmp_path / "scans"), tmp_path / "store"
    store = ingest.prepare(root, out, workers=1)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.name != ".lock"}
    assert ingest.prepare(root, out, workers=1) == store
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.name != ".lock"} == before

    with pytest.raises(
        UsageError, match=r"was prepared with spacing_mm None instead of \(2\.0, 2\.0, 2\.0\); prepare it anew with --overwrite"
    ):
        ingest.prepare(root, out, workers=1, changes={"spacing_mm": [2, 2, 2]})
    anew = ingest.prepare(root, out, workers=1, changes={"spacing_mm": [2, 2, 2]}, overwrite=True)
    assert anew.preset.spacing_mm == (2, 2, 2)
    assert anew.content_hash != store.content_hash

    write(root / "labelsTr" / "v0.nii.gz", np.zeros((20, 18, 6), np.uint8))
    with pytest.raises(UsageError, match=r"was prepared from other files than .* holds now"):
        ingest.prepare(root, out, workers=1, changes={"spacing_mm": [2, 2, 2]})


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds worker processes in /proc")
def test_a_killed_ingest_goes_on_where_it_was_and_ends_the_same(tmp_path):
    root, out = scans(tmp_path / "scans", volumes=20, shape=(128, 120, 16)), tmp_path / "store"
    undisturbed = ingest.prepare(root, tmp_path / "undisturbed", workers=2)
    program = "import sys; from medssl.platform import ingest; ingest.prepare(sys.argv[1], sys.argv[2], workers=2)"
    process = subprocess.Popen([sys.executable, "-c", program, str(root), str(out)])
    while len(list(out.glob(".work/*.arrow"))) < 4:
        assert process.poll() is None, "it was done before it could be killed"
        time.sleep(0.005)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list(out.glob(".work/*.arrow")))
    assert 4 <= done < 20
    assert len(workers) >= 2
    with pytest.raises(UsageError, match=r"is not prepared; run medssl data prepare"):
        Store.open(out)
    deadline = time.monotonic() + 20
    while any(map(alive, workers)):
        assert time.monotonic() < deadline, "workers outlive a killed parent"
        time.sleep(0.05)

    seen = []
    store = ingest.prepare(root, out, workers=1, progress=lambda done, total, what: seen.append((done, total, what)))
    assert seen[0][0] >= done
    assert seen[0][1:] == (20, "volumes")
    assert store.content_hash == undisturbed.content_hash
    assert not (out / ".work").exists()
    assert [file.read_bytes() for file in store.files] == [file.read_bytes() for file in undisturbed.files]


def test_stopping_between_the_volumes_and_the_manifest_loses_nothing(tmp_path):
    root, out = scans(tmp_path / "scans"), tmp_path / "store"

    def stop(done, total, what):
        if what == "slice files":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest.prepare(root, out, workers=1, progress=stop)
    assert not (out / "manifest.json").exists()
    next(out.glob(".work/*.arrow")).write_bytes(b"")  # what a loss of power may leave of a file
    seen = []
    store = ingest.prepare(root, out, workers=1, progress=lambda *each: seen.append(each))
    assert seen[0] == (3, 4, "volumes")
    assert store.content_hash == ingest.prepare(root, tmp_path / "undisturbed", workers=1).content_hash


def test_one_process_at_a_time_prepares_a_store(tmp_path):
    from medssl.platform import atomic

    with atomic.owned(tmp_path / "store"), pytest.raises(RunError, match="another process is preparing it; wait"):
        ingest.prepare(scans(tmp_path / "scans"), tmp_path / "store", workers=1)


@pytest.mark.usefixtures("ray_local")
def test_ray_tasks_prepare_the_same_store_and_bring_back_the_same_error(tmp_path):
    root = scans(tmp_path / "scans")
    expected = ingest.prepare(root, tmp_path / "a", workers=1)
    assert ingest.default_map(2) is ingest.on_ray
    assert ingest.prepare(root, tmp_path / "b", workers=2).content_hash == expected.content_hash
    (root / "imagesTr" / "v1.nii.gz").write_bytes(b"no scan")
    with pytest.raises(Problem, match=r"v1\.nii\.gz: its gzip stream is cut short or damaged"):
        ingest.prepare(root, tmp_path / "c", workers=2)


# ---------------------------------------------------------------------------------------------------- several channels


def test_a_file_per_channel_and_one_file_of_channels_give_the_same_store(tmp_path):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, (9, 8, 5)).astype(np.uint8)
    image = rng.integers(0, 500, (9, 8, 5, 2)).astype(np.int16)
    said = {"name": "two", "labels": {"background": 0, "organ": 1}, "channel_names": {"0": "T1", "1": "T2"}}
    for form in ("apart", "together"):
        write(tmp_path / form / "labelsTr" / "a.nii.gz", label)
        (tmp_path / form / "dataset.json").write_text(json.dumps(said))
    write(tmp_path / "together" / "imagesTr" / "a.nii.gz", image)
    for channel in range(2):
        write(tmp_path / "apart" / "imagesTr" / f"a_000{channel}.nii.gz", image[..., channel])
    apart, together = (ingest.prepare(tmp_path / form, tmp_path / f"{form}-store", workers=1) for form in ("apart", "together"))
    assert apart.content_hash == together.content_hash
    assert apart.channels == 2
    stored, _ = apart.arrays("a")
    assert stored.shape == (5, 2, 9, 8)
    for channel in range(2):
        alone = geometry.prepare(image[None, ..., channel], AFFINE, None, PRESETS["mr"])
        assert np.array_equal(stored[:, channel], np.moveaxis(alone.image[0], -1, 0))


# ---------------------------------------------------------------------------------------------------- bad scans


def spoil_missing_label(root):
    (root / "labelsTr" / "v0.nii.gz").unlink()


def spoil_label_shape(root):
    write(root / "labelsTr" / "v0.nii.gz", np.zeros((20, 18, 7), np.uint8))


def spoil_label_affine(root):
    write(root / "labelsTr" / "v0.nii.gz", np.zeros((20, 18, 6), np.uint8), AFFINE @ np.diag([-1, 1, 1, 1]))


def spoil_class_id(root):
    write(root / "labelsTr" / "v0.nii.gz", np.full((20, 18, 6), 7, np.uint8))


def spoil_negative_class_id(root):
    write(root / "labelsTr" / "v0.nii.gz", np.full((20, 18, 6), -1, np.int16))


def spoil_fractional_class_id(root):
    write(root / "labelsTr" / "v0.nii.gz", np.full((20, 18, 6), 0.5, np.float32))


def spoil_mask_of_255(root):
    write(root / "labelsTr" / "v0.nii.gz", np.full((20, 18, 6), [0, 0, 0, 255, 255, 255], np.uint8))


def spoil_nan(root):
    image = np.random.default_rng(0).random((20, 18, 6)).astype(np.float32)
    image[4, 4, 4] = np.nan
    write(root / "imagesTr" / "v0.nii.gz", image)


def spoil_infinity(root):
    image = np.random.default_rng(0).random((20, 18, 6)).astype(np.float32)
    image[4, 4, 4:] = np.inf
    write(root / "imagesTr" / "v0.nii.gz", image)


def spoil_4d(root):
    write(root / "imagesTr" / "v0.nii.gz", np.random.default_rng(0).integers(0, 9, (20, 18, 6, 3)).astype(np.int16))


def spoil_2d(root):
    write(root / "imagesTr" / "v0.nii.gz", np.random.default_rng(0).integers(0, 9, (20, 18)).astype(np.int16))


def spoil_constant(root):
    write(root / "imagesTr" / "v0.nii.gz", np.full((20, 18, 6), 3, np.int16))


def spoil_flat(root):
    image = np.zeros((20, 18, 6), np.int16)
    image[0, 0, 0] = 1
    write(root / "imagesTr" / "v0.nii.gz", image)


def spoil_complex(root):
    write(root / "imagesTr" / "v0.nii.gz", np.ones((20, 18, 6), np.complex64))


def spoil_truncated_gzip(root):
    path = root / "imagesTr" / "v0.nii.gz"
    path.write_bytes(path.read_bytes()[:-100])


def spoil_truncated_nifti(root):
    import gzip

    path = root / "imagesTr" / "v0.nii.gz"
    (root / "imagesTr" / "v0.nii").write_bytes(gzip.decompress(path.read_bytes())[:-100])
    path.unlink()


def spoil_no_nifti(root):
    import gzip

    (root / "imagesTr" / "v0.nii.gz").write_bytes(gzip.compress(b"a letter to the radiologist" * 40))


def spoil_duplicate(root):
    shutil.copy(root / "imagesTr" / "v0.nii.gz", root / "imagesTs" / "v0.nii.gz")


def spoil_broken_link(root):
    (root / "imagesTr" / "v0.nii.gz").unlink()
    (root / "imagesTr" / "v0.nii.gz").symlink_to(root / "gone.nii.gz")


def spoil_everything(root):
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        shutil.rmtree(root / folder)
    (root / "imagesTr").mkdir()


BAD = {
    spoil_missing_label: r"imagesTr/v0\.nii\.gz: its label .*labelsTr/v0\.nii\.gz is missing; add it, or move",
    spoil_label_shape: r"labelsTr/v0\.nii\.gz: its shape \(20, 18, 7\) is not \(20, 18, 6\), that of v0\.nii\.gz; use",
    spoil_label_affine: r"labelsTr/v0\.nii\.gz: its affine is not that of v0\.nii\.gz: they lie apart in space; resample",
    spoil_class_id: r"labelsTr/v0\.nii\.gz: unknown class id 7; expected 0 background, 1 left, 2 right; mend the label",
    spoil_negative_class_id: r"labelsTr/v0\.nii\.gz: unknown class id -1; expected 0 background",
    spoil_fractional_class_id: r"labelsTr/v0\.nii\.gz: unknown class id 0\.5 to 0\.5; expected 0 background",
    spoil_mask_of_255: r"labelsTr/v0\.nii\.gz: its only id but 0 is 255, which means not annotated; store the class id",
    spoil_nan: r"imagesTr/v0\.nii\.gz: 1 voxels are NaN or infinite; replace them, or leave",
    spoil_infinity: r"imagesTr/v0\.nii\.gz: 2 voxels are NaN or infinite",
    spoil_4d: r"imagesTr/v0\.nii\.gz: 4D where 3D is meant, shape \(20, 18, 6, 3\); split it, or mend",
    spoil_2d: r"imagesTr/v0\.nii\.gz: 2D where 3D is meant, shape \(20, 18\)",
    spoil_constant: r"imagesTr/v0\.nii\.gz: every voxel is 3: an empty scan; export it again, or leave it out",
    spoil_flat: r"imagesTr/v0\.nii\.gz: percentiles \(1\.0, 99\.0\) of its voxels are one value",
    spoil_complex: r"imagesTr/v0\.nii\.gz: its voxels are complex64, expected real numbers",
    spoil_truncated_gzip: r"imagesTr/v0\.nii\.gz: its gzip stream is cut short or damaged .*; copy the file again",
    spoil_truncated_nifti: r"imagesTr/v0\.nii: not a whole NIfTI file .*; expected \.nii or \.nii\.gz; export or copy it again",
    spoil_no_nifti: r"imagesTr/v0\.nii\.gz: not a whole NIfTI file \(no NIfTI header\)",
    spoil_duplicate: r"2 volumes are called v0; names must be unique, so rename or remove one",
    spoil_broken_link: r"imagesTr/v0\.nii\.gz: is missing; download it again",
    spoil_everything: r"holds no volume; put NIfTI files into imagesTr/",
}


@pytest.mark.parametrize("spoil", BAD, ids=[spoil.__name__.removeprefix("spoil_") for spoil in BAD])
def test_a_bad_scan_is_refused_naming_the_file_and_the_remedy(tmp_path, spoil):
    root = scans(tmp_path / "scans")
    spoil(root)
    with pytest.raises(RunError, match=BAD[spoil]) as caught:
        ingest.prepare(root, tmp_path / "store", workers=1)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="is not prepared"):
        Store.open(tmp_path / "store")
    assert str(caught.value) in map(str, quality.check(root, workers=1).errors)


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "scans").mkdir()
    with pytest.raises(UsageError, match=r"expected dataset\.json and imagesTr/"):
        ingest.prepare(tmp_path / "scans", tmp_path / "store")


def test_a_data_set_that_needs_its_folder_says_so(tmp_path):
    with pytest.raises(UsageError, match='data set "decathlon" is read from a folder; give a folder of this form'):
        ingest.prepare("decathlon", tmp_path / "store")


def test_voxels_that_nobody_annotated_are_kept_as_such(tmp_path):
    root = scans(tmp_path / "scans")
    label = np.zeros((20, 18, 6), np.uint8)
    label[:, :, 1:], label[:10, :, 1] = UNLABELLED, 1
    write(root / "labelsTr" / "v0.nii.gz", label)
    store = ingest.prepare(root, tmp_path / "store", workers=1)
    rows = store.table(volumes=["v0"]).sort_by("slice_index").to_pylist()
    assert [row["foreground"] for row in rows] == [0.0, 1.0, None, None, None, None]
    assert (store.arrays("v0")[1][2:] == UNLABELLED).all()


def test_a_full_disk_is_an_error_that_says_so(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs more rights")
    try:
        root = scans(tmp_path / "scans", volumes=6, shape=(128, 128, 8))
        for workers in (1, 2):
            with pytest.raises(RunError, match="no space left on the disk; free some or choose another folder, then run again"):
                ingest.prepare(root, small / "store", workers=workers, map_unordered=ingest.in_processes)
        assert not (small / "store" / "manifest.json").exists()
        assert not list((small / "store").rglob(".*.arrow.*"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_manifest_that_cannot_be_used_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is not prepared; run medssl data prepare"):
        Store.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(RunError, match=r"manifest\.json: not readable as JSON"):
        Store.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema": 0}')
    with pytest.raises(UsageError, match=r"schema 0, expected 1; prepare it anew with --overwrite"):
        Store.open(tmp_path)


def test_workers_import_no_torch_and_opening_a_store_no_pyarrow(tmp_path):
    root = scans(tmp_path / "scans")
    program = """
import sys
from medssl.platform import ingest
from medssl.platform.store import Store
ingest.prepare(sys.argv[1], sys.argv[2], workers=1)
print(sorted({"torch", "ray", "monai", "matplotlib"} & set(sys.modules)))
"""
    opening = "import sys; from medssl.platform.store import Store; Store.open(sys.argv[2]); print('pyarrow' in sys.modules)"
    for text, answer in ((program, "[]"), (opening, "False")):
        done = subprocess.run(
            [sys.executable, "-c", text, str(root), str(tmp_path / "s")], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == answer


# ---------------------------------------------------------------------------------------------------- pictures


def test_a_slice_is_shown_as_radiologists_see_it():
    plane = np.arange(6).reshape(2, 3)  # [R, A]: row 1 is the right side, column 2 is anterior
    shown = montage.radiological(plane)
    assert shown[0, 0] == plane[1, 2]  # right and anterior: upper left of the picture
    assert shown[-1, -1] == plane[0, 0]  # left and posterior: lower right


@pytest.mark.parametrize(
    ("orientation", "corner", "shape"),
    [("LPS", "RA", (3, 2)), ("SRA", "SR", (2, 3)), ("ASR", "SA", (3, 2)), ("IAL", "SA", (2, 3)), ("ARI", "RA", (2, 3))],
)
def test_a_slice_of_any_orientation_is_shown_upright(orientation, corner, shape):
    """`corner`: which ends of its axes meet in the upper left of the picture."""
    plane = np.arange(6).reshape(2, 3)
    shown = montage.radiological(plane, orientation)
    assert shown.shape == shape
    assert shown[0, 0] == plane[tuple(-1 if letter in corner else 0 for letter in orientation[:2])]


def test_a_montage_is_drawn_of_coronal_slices_of_z_scores(tmp_path):
    from matplotlib.image import imread

    changes = {"dtype": "float16", "percentiles": None, "zscore": "all", "orientation": "SRA"}
    store = ingest.prepare(scans(tmp_path / "scans", volumes=2), tmp_path / "store", workers=1, changes=changes)
    montage.show(store, tmp_path / "picture.png")
    assert np.ptp(np.percentile(imread(tmp_path / "picture.png")[..., 0], (5, 99))) > 0.5


def test_a_montage_shows_every_class_that_is_there(tmp_path):
    from matplotlib.colors import hsv_to_rgb
    from matplotlib.image import imread

    root = scans(tmp_path / "scans", shape=(40, 40, 6))
    label = np.zeros((40, 40, 6), np.uint8)
    label[5:20, 5:20], label[22:35, 22:35] = 1, 2
    write(root / "labelsTr" / "v0.nii.gz", label)
    store = ingest.prepare(root, tmp_path / "store", workers=1)
    montage.show(store, tmp_path / "picture.png", ["v0", "v3"])
    picture = imread(tmp_path / "picture.png")[..., :3]
    for hue in (0.0, 0.5):
        colour = hsv_to_rgb((hue, 0.75, 1.0))
        assert (np.abs(picture - colour).max(axis=-1) < 0.02).sum() > 50
    montage.show(store, tmp_path / "some.png", 2)
    with pytest.raises(UsageError, match='no volume "v9"'):
        montage.show(store, tmp_path / "picture.png", ["v9"])


# ---------------------------------------------------------------------------------------------------- real scans


def part_of(name, root, volumes):
    """The first volumes of a real data set, linked into a folder of their own."""
    chosen = {}
    for folder in ("imagesTr", "imagesTs"):
        for file in sorted((DATA / name / folder).glob("*.nii.gz"))[:volumes]:
            chosen[file.name] = folder
    for file, folder in chosen.items():
        for place in (folder, folder.replace("images", "labels")):
            if (DATA / name / place / file).exists():
                (root / place).mkdir(parents=True, exist_ok=True)
                (root / place / file).symlink_to(DATA / name / place / file)
    said = json.loads((DATA / name / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(said | {"training": [], "test": []}))
    shutil.copy(DATA / name / "cases.json", root)
    return root


@pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data beside the repository")
@pytest.mark.parametrize("name", ["Task04_Hippocampus", "SunnybrookLV"])
def test_real_scans_are_prepared_and_split_by_subject(tmp_path, name):
    store = ingest.prepare(part_of(name, tmp_path / "scans", 24), tmp_path / "store", workers=1)
    split = splits.make(store)
    parts = {patient: part for part in ("train", "val", "test") for patient in getattr(split, part)}
    assert len(parts) == len(store.patients) < len(store.volumes)
    subjects = {entry["name"].removesuffix(".nii.gz"): entry for entry in json.loads((DATA / name / "cases.json").read_text())}
    for record in store.volumes:
        subject = subjects.get(record.volume)
        if subject:
            assert record.patient == str(subject.get("patient", subject.get("subject")))
            assert subject.get("split") in (None, "train" if parts[record.patient] == "val" else parts[record.patient])
    image, label = store.arrays(store.volumes[0].volume)
    assert label is not None
    assert image.std() > 20
    montage.show(store, tmp_path / "picture.png", 2)


def test_a_generated_data_set_is_written_once_and_takes_the_same_path(tmp_path, monkeypatch):
    """A module of datasets/ with `generate`: its text is the version of what it writes, its files' dates are not."""
    from types import SimpleNamespace

    from medssl.platform import find
    from medssl.platform.datasets import decathlon

    calls = []
    module = SimpleNamespace(info=decathlon.info, cases=decathlon.cases, generate=lambda root: calls.append(scans(root)))
    monkeypatch.setattr(find, "names", lambda kind: ["made", "decathlon"])
    monkeypatch.setattr(find, "load", lambda kind, name: module if name == "made" else decathlon)
    monkeypatch.setattr(reading, "program", lambda name: "version 1")
    store = ingest.prepare("made", tmp_path / "store", workers=1)
    assert ingest.prepare("made", tmp_path / "store", workers=1) == store
    assert len(calls) == 1
    os.utime(tmp_path / "store" / "source" / "imagesTr" / "v0.nii.gz", (0, 0))
    assert ingest.prepare("made", tmp_path / "store", workers=1) == store
    shutil.rmtree(tmp_path / "store" / "source")
    assert ingest.prepare("made", tmp_path / "store", workers=1) == store
    assert len(calls) == 2
    assert dataclasses.replace(store, root=tmp_path, files=()) == dataclasses.replace(
        ingest.prepare("made", tmp_path / "other", workers=1), root=tmp_path, files=()
    )
