"""Laws of the data card: its numbers are those of the scans, it stands alone, and equal stores have equal cards."""

import dataclasses
import json
import re
import shutil

import nibabel
import numpy as np
import pytest

from medssl.platform import card, ingest
from medssl.platform.errors import UsageError


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("card") / "scans"
    rng = np.random.default_rng(0)
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (root / folder).mkdir(parents=True)
    for number in range(5):
        image, label = rng.integers(0, 900, (12, 10, 4 + number)), rng.integers(0, 2, (12, 10, 4 + number))
        label[:, :, 0] = 255 if number == 0 else 0
        folder = "imagesTs" if number == 4 else "imagesTr"
        affine = np.diag([1.5, 1, 2 + number, 1])
        nibabel.Nifti1Image(image.astype(np.int16), affine).to_filename(root / folder / f"v{number}.nii.gz")
        if number < 4:
            nibabel.Nifti1Image(label.astype(np.uint8), affine).to_filename(root / "labelsTr" / f"v{number}.nii.gz")
    labels = {"0": "background", "1": "<script>organ|", "2": "absent"}
    said = {"name": "toy & co", "modality": {"0": "MRI"}, "labels": labels, "licence": "CC0"}
    (root / "dataset.json").write_text(json.dumps(said))
    phases = [{"name": f"v{n}", "patient": f"p{n // 2}", "phase": "ED" if n % 2 else "ES"} for n in range(5)]
    (root / "cases.json").write_text(json.dumps(phases))
    return ingest.prepare(root, root.parent / "store", workers=1)


def test_what_is_counted_is_what_the_arrays_hold(store):
    counted = card.count(store)
    arrays = [store.arrays(record.volume) for record in store.volumes]
    labels = np.concatenate([label.ravel() for _, label in arrays if label is not None])
    pixels = np.concatenate([image.ravel() for image, _ in arrays])
    assert counted.pixels.tolist() == [int((labels == number).sum()) for number in range(3)]
    assert counted.unannotated == int((labels == 255).sum()) == 120
    assert counted.intensities.tolist() == np.histogram(pixels, card.BINS, (0, 255))[0].tolist()
    planes = [plane for _, label in arrays if label is not None for plane in label]
    assert counted.slices.tolist() == [sum((plane == number).any() for plane in planes) for number in range(3)]
    assert counted.volumes.tolist() == [4, 4, 0]
    counts, classes = (table.rows for table in card.tables(store, counted)[:2])
    assert [row[0] for row in counts] == ["ED", "ES", "all"]
    assert counts[-1][1:] == [3, 5, 4, 30]
    assert classes[1][-2] == pytest.approx(100 * (labels == 1).sum() / (labels < 255).sum())


def test_the_page_stands_alone_and_escapes_what_comes_from_outside(store, tmp_path):
    text = card.write(store, "html", tmp_path / "card.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)
    assert text.count("data:image/png;base64,") == 3
    assert "<script>organ" not in text
    assert "&lt;script&gt;organ|" in text
    for said in ("toy &amp; co", "CC0", store.content_hash, "Sample slices", "absent class", "1 of its 4 slices"):
        assert said in text, said


def test_markdown_says_the_same_with_its_pictures_beside_it(store, tmp_path):
    text = card.write(store, "md", tmp_path / "card.md").read_text()
    assert "\\|" in text
    linked = re.findall(r"\]\((.*?)\)", text)
    assert len(linked) == 3
    assert all((tmp_path / file).read_bytes().startswith(b"\x89PNG") for file in linked)
    assert store.content_hash in text
    with pytest.raises(UsageError, match='no format "pdf" of a card'):
        card.write(store, "pdf")


def test_equal_stores_have_equal_cards(store, tmp_path):
    shutil.copytree(store.root, tmp_path / "copy")
    other = dataclasses.replace(
        store, root=tmp_path / "copy", files=tuple(tmp_path / "copy" / "slices" / file.name for file in store.files)
    )
    assert card.write(store).read_bytes() == card.write(other).read_bytes()
