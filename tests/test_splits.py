"""Laws of splitting: the patient is the unit, the same seed gives the same split, labelled subsets nest."""

import dataclasses
import random
from pathlib import Path

import pytest

from medssl.platform import splits
from medssl.platform.errors import RunError, UsageError
from medssl.platform.geometry import PRESETS
from medssl.platform.splits import Split
from medssl.platform.store import Store, VolumeRecord


def record(volume, patient, labelled=True, part=None):
    return VolumeRecord(volume, patient, part, labelled, 4, 8, 8, 1, (1.0, 1.0, 1.0), None, {}, "")


def store_of(records, root=Path("/nowhere")):
    return Store(root, "toy", ("background", "organ"), None, "CC0", "", {}, PRESETS["mr"], "hash", "source", (), tuple(records))


def two_sides(patients, unlabelled=0):
    """Each labelled patient with two volumes, then some without labels."""
    known = [record(f"{p}-{side}", f"p{p:03d}") for p in range(patients) for side in "AB"]
    return known + [record(f"u{p}", f"u{p:03d}", labelled=False) for p in range(unlabelled)]


@pytest.mark.parametrize("seed", range(20))
def test_no_patient_is_in_two_parts_under_any_seed(seed):
    store = store_of(two_sides(23, unlabelled=5))
    split = splits.make(store, seed)
    everyone = [*split.train, *split.val, *split.test]
    assert sorted(everyone) == list(store.patients)
    assert (len(split.test), len(split.val), len(split.train)) == (5, 2, 16 + 5)
    assert {f"u{p:03d}" for p in range(5)} <= set(split.train)
    assert set(split.labelled) == {patient for patient in split.train if patient.startswith("p")}


def test_the_same_seed_gives_the_same_split_in_any_order_of_files():
    records = two_sides(30, unlabelled=3)
    expected = splits.make(store_of(records), seed=4)
    random.Random(0).shuffle(records)
    assert splits.make(store_of(records), seed=4) == expected
    assert splits.make(store_of(records), seed=5).test != expected.test


def test_every_patient_can_be_drawn_for_test():
    store = store_of(two_sides(10))
    assert {patient for seed in range(60) for patient in splits.make(store, seed).test} == set(store.patients)


def test_the_labelled_order_is_drawn_apart_from_the_parts():
    """Else the first labelled patients would be those that narrowly missed the test part."""
    split = splits.make(store_of(two_sides(40)), 0)
    assert list(split.labelled) != splits.drawn(split.labelled, 0, "parts")


@pytest.mark.parametrize("patients", [3, 4, 5, 7])
def test_small_sets_still_have_a_patient_in_each_part(patients):
    split = splits.make(store_of(two_sides(patients)))
    assert min(len(split.train), len(split.val), len(split.test)) >= 1


def test_two_patients_are_too_few():
    with pytest.raises(UsageError, match=r"2 labelled patients are too few for train, val and test"):
        splits.make(store_of(two_sides(2)))


def test_official_parts_are_kept_and_val_is_drawn_from_the_training_patients():
    records = [record(f"t{p}", f"t{p}", part="test") for p in range(4)] + [
        record(f"r{p}", f"r{p}", part="train") for p in range(16)
    ]
    split = splits.make(store_of(records), seed=1)
    assert split.test == ("t0", "t1", "t2", "t3")
    assert len(split.val) == 2  # 0.1 of the 0.8 that are not test
    assert set(split.val) <= {f"r{p}" for p in range(16)}


def test_an_official_val_part_is_kept():
    records = [record(f"{part}{p}", f"{part}{p}", part=part) for part in ("train", "val", "test") for p in range(3)]
    split = splits.make(store_of(records))
    assert split.val == ("val0", "val1", "val2")
    assert split.train == ("train0", "train1", "train2")


def test_an_official_split_that_cuts_a_patient_is_refused():
    records = [*two_sides(5), record("x1", "x", part="train"), record("x2", "x", part="test")]
    with pytest.raises(UsageError, match=r'patient "x" is in two parts of the official split, train and test'):
        splits.make(store_of(records))


def test_an_official_test_patient_without_a_label_is_refused():
    with pytest.raises(UsageError, match=r'patient "x" is in the official test part without a label'):
        splits.make(store_of([*two_sides(5), record("x", "x", labelled=False, part="test")]))


def test_fractions_must_be_fractions():
    with pytest.raises(UsageError, match="should be at least 0 and sum to 1"):
        splits.make(store_of(two_sides(9)), fractions=(0.7, 0.2, 0.2))


GOOD = Split("s", train=("a", "u"), val=("b",), test=("c",), labelled=("a",))
STORE = store_of([record("1", "a"), record("2", "b"), record("3", "c"), record("4", "u", labelled=False)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": ("c", "b")}, r'patient "b" is in val and in test; leave it in one part'),
        ({"train": ("a", "u", "c")}, r'patient "c" is in train and in test'),
        ({"val": ("b", "z")}, r'patient "z" is not in /nowhere'),
        ({"val": ()}, r"no patient in val; each part needs one"),
        ({"val": ("u",), "train": ("a",)}, r'patient "u" has no label'),
        ({"labelled": ("a", "b")}, r'labelled patient "b" should be in train'),
        ({"labelled": ("a", "a")}, r'labelled patient "a" should be in train, and listed once'),
    ],
)
def test_a_leaking_split_is_refused_naming_the_patient(changes, message):
    splits.verify(GOOD, STORE)
    with pytest.raises(UsageError, match=message):
        splits.verify(dataclasses.replace(GOOD, **changes), STORE)


def test_a_split_is_read_back_as_it_was_written_and_verified(tmp_path):
    store = dataclasses.replace(STORE, root=tmp_path)
    splits.save(GOOD, store)
    assert splits.load(store, "s") == GOOD
    with pytest.raises(UsageError, match=r'no split "t" in .*; found: s'):
        splits.load(store, "t")
    file = tmp_path / "splits" / "s.json"
    file.write_text(file.read_text().replace('"c"', '"b"'))
    with pytest.raises(UsageError, match=r'patient "b" is in val and in test'):
        splits.load(store, "s")
    file.write_text("[]")
    with pytest.raises(RunError, match="not a split"):
        splits.load(store, "s")


def test_reading_a_split_imports_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys, medssl.platform.splits; print(sorted({'torch', 'ray', 'pyarrow', 'scipy', 'nibabel'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
