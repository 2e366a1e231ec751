"""Laws of scans of one's own: labels find their images, subjects their scans, later commands the folders; no name is stored."""

import json

import numpy as np
import pytest
from PIL import Image

from medssl.platform import catalogue, ingest
from medssl.platform.datasets import folders
from medssl.platform.errors import RunError, UsageError
from medssl.platform.store import Store
from medssl.tests.layouts._scan import nifti, scan

rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDSSL_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def prepared(name, **said):
    """As `medssl data prepare NAME --images …`."""
    catalogue.remember(
        name, False, **{key: str(value) if key in ("images", "labels", "datalist") else value for key, value in said.items()}
    )
    return catalogue.prepare(name, workers=1, say=lambda line: None)


def test_pairs_are_found_by_path_and_the_set_by_its_name_ever_after(tmp_path, data):
    labels = {}
    for n, path in enumerate(("p1/a", "p1/b", "p2/a", "p3/a", "p4/x", "p5/x")):
        image, label = scan(n, 3)
        nifti(tmp_path / "images" / f"{path}.nii.gz", image)
        if path != "p4/x":
            nifti(tmp_path / "labels" / f"{path}.nii", label)
            labels[path.replace("/", "-")] = label
    where = {"images": tmp_path / "images", "labels": tmp_path / "labels"}
    store = prepared("own", **where, subject_regex="(p[0-9])/", classes=("liver", "spleen"))
    assert store.root == data / "own"
    assert store.classes == ("background", "liver", "spleen")
    assert {record.volume: record.patient for record in store.volumes if record.labelled} == {v: v[:2] for v in labels}
    assert [record.volume for record in store.volumes if not record.labelled] == ["p4-x"]
    for volume, label in labels.items():
        record = next(record for record in store.volumes if record.volume == volume)
        assert np.array_equal(ingest.geometry.restore(store.arrays(volume)[1], record.geometry), label)
    assert catalogue.prepare("own", workers=1, say=lambda line: None) == store
    report = catalogue.check("own", workers=1, say=print)
    assert (report.errors, report.volumes) == ((), 6)  # the scans themselves, found again
    assert catalogue.open_store("own", say=print) == Store.open(data / "own")
    with pytest.raises(UsageError, match="was prepared from other folders or classes; prepare it anew with --overwrite"):
        prepared("own", **where)


def test_colour_pictures_take_their_preset_and_white_is_the_class(tmp_path):
    for n in range(4):
        for folder, image in (("images", rng.integers(0, 256, (12, 9, 3))), ("labels", 255 * rng.integers(0, 2, (12, 9)))):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(image.astype(np.uint8)).save(tmp_path / folder / f"p{n}.png")
    store = prepared("skin", images=tmp_path / "images", labels=tmp_path / "labels", classes=("lesion",))
    pixels, label = store.arrays("p2")
    with Image.open(tmp_path / "images" / "p2.png") as image, Image.open(tmp_path / "labels" / "p2.png") as mask:
        assert np.array_equal(pixels[0, :, ::-1, ::-1].T, np.asarray(image))  # 8 bits are kept as they are
        assert np.array_equal(label[0, ::-1, ::-1].T * 255, np.asarray(mask))


def test_a_resized_mask_neither_grows_nor_shrinks():
    """PDCR's own rule, Lanczos and above 0, lets a lesion grow; the nearest pixel does not."""
    from medssl.platform import geometry
    from medssl.tests.layouts._picture import ellipse, ids

    mask = ellipse(5, (767, 511))
    preset = geometry.resolve(folders.DataInfo("x", ("background", "lesion"), preset="picture"), None, {"resize": (384, 384)})
    image = rng.integers(0, 256, (3, 767, 511, 1)).astype(np.uint8)
    prepared = geometry.prepare(image, np.diag([-1, -1, 1, 1]), ids(mask), preset)
    assert prepared.image.shape == (3, 384, 384, 1)
    assert abs((prepared.label > 0).mean() / mask.mean() - 1) < 0.005
    grown = np.asarray(Image.fromarray(mask * 255).resize((384, 384), Image.Resampling.LANCZOS)) > 0
    assert grown.mean() / mask.mean() > 1.01


def test_deep_greys_are_not_cut_to_eight_bits(tmp_path):
    deep = rng.integers(0, 4096, (12, 9)).astype(np.uint16)
    for n in range(3):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(deep).save(tmp_path / "images" / f"p{n}.png")
    pixels, _ = prepared("films", images=tmp_path / "images").arrays("p0")
    expected = (deep - deep.min()) / float(deep.max() - deep.min()) * 255
    assert np.abs(pixels[0, 0, ::-1, ::-1].T - expected).max() <= 1


def test_a_stack_of_pictures_is_a_volume_where_it_is_said(tmp_path):
    for patient in ("a", "b", "c"):
        (tmp_path / "images" / patient).mkdir(parents=True)
        for n in range(3):
            image = Image.fromarray(rng.integers(0, 256, (8, 9)).astype(np.uint8))
            image.save(tmp_path / "images" / patient / f"{n}.png")
    together = prepared("stacks", images=tmp_path / "images", stacks=True)
    assert [(record.volume, record.slices) for record in together.volumes] == [("a", 3), ("b", 3), ("c", 3)]
    apart = prepared("apart", images=tmp_path / "images")
    assert [record.slices for record in apart.volumes] == [1] * 9


def test_no_name_of_a_patient_enters_the_store(tmp_path, data):
    pytest.importorskip("pydicom")
    from medssl.tests.test_dicom import slices

    for n in range(3):
        said = {"PatientID": f"MRN-4711-{n}", "PatientName": "Doe^Jane", "PatientBirthDate": "19700101", "Modality": "CT"}
        for series in (1, 2):
            uid = {"SeriesInstanceUID": f"1.2.{n}.{series}", "SeriesNumber": series}
            slices(tmp_path / "images" / f"JaneDoe{n}", seed=10 * n + series, **said, **uid)
    store = prepared("clinic", images=tmp_path / "images")
    assert store.preset.window == (-500, 500)  # as CT
    assert len(store.patients) == 3
    assert sorted(record.volume for record in store.volumes) == sorted(f"{p}-{k}" for p in store.patients for k in (1, 2))
    written = b"".join(file.read_bytes() for file in data.rglob("*") if file.is_file() and file.name != folders.FILE)
    for secret in (b"Doe^", b"MRN-4711", b"19700101", b"JaneDoe"):
        assert secret not in written
    named = prepared("named", images=tmp_path / "images", subject_regex=r"Doe(\d)")
    assert named.patients == ("0", "1", "2")


def test_a_datalist_names_images_labels_and_parts(tmp_path):
    for n in range(6):
        image, label = scan(n, 2)
        nifti(tmp_path / "x" / f"i{n}.nii.gz", image)
        nifti(tmp_path / "x" / f"l{n}.nii.gz", label)
    items = [{"image": f"x/i{n}.nii.gz", "label": f"x/l{n}.nii.gz", "fold": n % 2} for n in range(5)]
    said = {"training": items[:3], "validation": items[3:4], "test": [items[4], "x/i5.nii.gz"]}
    (tmp_path / "list.json").write_text(json.dumps(said))
    store = prepared("listed", datalist=tmp_path / "list.json")
    parts = {record.volume: (record.part, record.labelled) for record in store.volumes}
    assert parts == {f"x-i{n}": (p, True) for n, p in enumerate(["train"] * 3 + ["val", "test"])} | {"x-i5": (None, False)}
    (tmp_path / "list.json").write_text('{"training": [{"label": "x"}]}')
    with pytest.raises(RunError, match=r'expected a list of \{"image": file, "label": file\} under "training"'):
        list(folders.cases(store.root / "source"))


def test_what_does_not_fit_together_is_refused(tmp_path):
    for place in ("images/a.nii.gz", "labels/b.nii.gz", "labels/b.nii"):
        nifti(tmp_path / place, scan(0, 2)[1])
    images, labels = tmp_path / "images", tmp_path / "labels"
    with pytest.raises(RunError, match=r"a second label for b, beside b\.nii"):
        prepared("a", images=images, labels=labels)
    (labels / "b.nii").unlink()
    with pytest.raises(RunError, match=r"labels: 1 labels without an image of that name \(b\)"):
        prepared("b", images=images, labels=labels)
    with pytest.raises(RunError, match=r"a\.nii\.gz: --subject-regex p\\d finds no subject in it"):
        prepared("c", images=images, subject_regex=r"p\d")
    for said, message in (
        ({}, "say where the scans are"),
        ({"images": tmp_path / "gone"}, "gone: no such folder"),
        ({"images": images, "subject_regex": "("}, r"--subject-regex \(: "),
        ({"images": images, "classes": ("a", "a")}, "--classes a,a: expected different names"),
    ):
        with pytest.raises(UsageError, match=message):
            prepared("d", **said)
    with pytest.raises(UsageError, match='"isic2016" cannot be the name of a set of your own'):
        prepared("isic2016", images=images)
