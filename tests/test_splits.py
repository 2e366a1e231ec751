"""Laws of splitting: the patient is the unit, the same seed gives the same split, labelled subsets nest."""

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.platform import splits
from medssl.platform.errors import RunError, UsageError
from medssl.platform.geometry import PRESETS
from medssl.platform.splits import Split
from medssl.platform.store import Store, VolumeRecord


def record(volume, patient, labelled=True, part=None, phase=None, group=None, content=""):
    said = {"phase": phase, "geometry": {}, "digest": "", "group": group, "content": content}
    return VolumeRecord(volume, patient, part, labelled, 4, 8, 8, 1, (1.0, 1.0, 1.0), **said)


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


# ---------------------------------------------------------------------------------------------------- rules by name


@st.composite
def grouped(draw):
    """Patients of a few groups with one to three volumes each, some without labels; and a seed."""
    groups = draw(st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) >= 6))
    records = []
    for group, size in enumerate(groups):
        for number in range(size):
            patient = f"{group}-{number}"
            records += [record(f"{patient}-{v}", patient, group=str(group)) for v in range(draw(st.integers(1, 3)))]
    records += [record(f"u{n}", f"u{n}", labelled=False) for n in range(draw(st.integers(0, 3)))]
    return store_of(records), draw(st.integers(0, 9))


def nearly_proportional(taken, pool, within=1):
    """Brute force: every group's count is within one of its share, for a list of patients named group-number."""
    there, here = Counter(p.split("-")[0] for p in pool), Counter(p.split("-")[0] for p in taken)
    return all(abs(here[group] - len(taken) * n / len(pool)) <= within for group, n in there.items())


@settings(max_examples=60, deadline=None)
@given(grouped(), st.booleans(), st.integers(2, 6))
def test_folds_partition_the_labelled_patients_and_strata_are_shared_out(drawn, stratified, folds):
    store, seed = drawn
    by = "group" if stratified else None
    labelled = [p for p in store.patients if not p.startswith("u")]
    made = [splits.make(store, seed, fold=(number, folds), by=by) for number in range(folds)]
    assert sorted(p for split in made for p in split.test) == labelled
    assert max(len(s.test) for s in made) - min(len(s.test) for s in made) <= 1
    for split in made:
        assert sorted([*split.train, *split.val, *split.test]) == list(store.patients)
        assert set(split.labelled) == {p for p in split.train if not p.startswith("u")}
        if stratified:
            rest = [p for p in labelled if p not in split.test]
            there, here = Counter(p.split("-")[0] for p in labelled), Counter(p.split("-")[0] for p in split.test)
            assert all(abs(here[group] - n / folds) < 1 for group, n in there.items()), "as evenly as whole patients allow"
            assert nearly_proportional(split.val, rest)
            assert all(nearly_proportional(split.labelled[:n], split.labelled) for n in range(1, len(split.labelled) + 1))


@settings(max_examples=40, deadline=None)
@given(grouped(), st.randoms(use_true_random=False))
def test_a_stratified_draw_is_in_proportion_deterministic_and_blind_to_the_order_of_files(drawn, shuffler):
    store, seed = drawn
    split = splits.make(store, seed, by="group")
    labelled = [p for p in store.patients if not p.startswith("u")]
    rest = [p for p in labelled if p not in split.test]
    assert nearly_proportional(split.test, labelled)
    assert nearly_proportional(split.val, rest)
    records = list(store.volumes)
    shuffler.shuffle(records)
    assert splits.make(store_of(records), seed, by="group") == split


def test_one_stratum_changes_nothing():
    records = [dataclasses.replace(each, group="all") for each in two_sides(20)]
    split, plain = splits.make(store_of(records), 3, by="group"), splits.make(store_of(records), 3)
    assert dataclasses.replace(split, name=plain.name) == plain


def test_patients_of_several_phases_are_a_stratum_of_their_own():
    records = [record(f"{p}-{phase}", f"p{p}", phase=phase) for p in range(6) for phase in ("ED", "ES")[: 1 + p % 2]]
    assert set(splits.strata(store_of(records), "phase").values()) == {"ED", "ED+ES"}
    with pytest.raises(UsageError, match=r'volume "0-A" carries no group to stratify by; give each volume its "group"'):
        splits.make(store_of(two_sides(6)), by="group")


def test_official_test_patients_are_in_no_fold():
    records = [record(f"{part}{p}", f"{part}{p}", part=part) for part in ("train", "val", "test") for p in range(4)]
    made = [splits.make(store_of(records), fold=(number, 4)) for number in range(4)]
    assert sorted(p for s in made for p in s.test) == [f"{part}{p}" for part in ("train", "val") for p in range(4)]
    assert not any(p.startswith("test") for s in made for p in (*s.train, *s.val))


def test_a_split_is_named_by_its_rule(tmp_path):
    store = store_of([*two_sides(10), record("t", "t", part="test")], tmp_path)
    for name in ("seed-3", "fold-1-of-3-seed-2", "official"):
        split = splits.named(store, name)
        assert (split.name, splits.named(store, name)) == (name, split)
        assert splits.load(store, name) == split
    assert splits.named(store, "seed-3") == splits.make(store, 3)
    assert splits.named(store, "official").test == ("t",)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fold-3-of-3-seed-0", r"fold 3 of 3: folds are numbered 0 to 2"),
        ("fold-0-of-11-seed-0", r"10 labelled patients cannot be dealt into 11 folds"),
        ("fold-0-of-1-seed-0", r"cannot be dealt into 1 folds; ask for 2 or more"),
        ("fold-0-of-5", r"no split .* and no rule of that name; did you mean fold-0-of-5-seed-0\?"),
        ("sed-0", r"did you mean seed-0\?"),
        ("seed-0-by-centre", r"no rule of that name; did you mean seed-0-by-group\?"),
        ("official", r"publishes no test part; take seed-0, a fold"),
        ("mine.json", r"mine\.json: cannot be read \(No such file or directory\)"),
    ],
)
def test_a_name_that_is_no_split_is_refused(tmp_path, name, message):
    with pytest.raises(UsageError, match=message):
        splits.named(store_of(two_sides(10), tmp_path), name)
    assert not (tmp_path / "splits").exists()


def test_a_file_of_the_users_is_a_split_by_patients_or_by_volumes(tmp_path):
    store = store_of([*two_sides(5), record("u", "u", labelled=False)], tmp_path)
    parts = {"train": ["p000", "u"], "val": ["p001"], "test": ["p002", "p003"]}
    (tmp_path / "mine.json").write_text(json.dumps(parts))
    split = splits.named(store, str(tmp_path / "mine.json"))
    assert {part: list(getattr(split, part)) for part in parts} == parts
    assert split.labelled == ("p000",)
    assert splits.named(store, split.name) == split
    rows = ["volume,part", "0-A,train", "0-B,train", "u,train", "1-A,val", "2-A,test", "3-A,test"]
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    assert splits.named(store, str(tmp_path / "mine.csv")) == split
    (tmp_path / "mine.json").write_text(json.dumps(parts | {"train": ["p004", "p000"], "labelled": ["p004", "p000"]}))
    other = splits.named(store, str(tmp_path / "mine.json"))
    assert other.labelled == ("p004", "p000")
    assert other.name != split.name
    (tmp_path / "mine.csv").write_text("\n".join([*rows, "0-B,test"]))
    with pytest.raises(UsageError, match=r'patient "p000" is in train and in test'):
        splits.named(store, str(tmp_path / "mine.csv"))
    wrong = {"[]": "not a split", '{"train": "p000"}': "is not a list", '{"train": []}': "KeyError", "{": "JSON"}
    for text, why in wrong.items():
        (tmp_path / "mine.json").write_text(text)
        with pytest.raises(UsageError, match=why):
            splits.named(store, str(tmp_path / "mine.json"))


def test_the_same_scan_under_two_names_is_not_trained_on_and_tested():
    twins = [record("a", "a", content="x"), record("b", "b", content="x"), record("c", "c"), record("d", "d")]
    split = Split("s", train=("a", "d"), val=("c",), test=("b",), labelled=("a", "d"))
    with pytest.raises(UsageError, match=r'a of patient "a" in train and b of patient "b" in test are the same scan'):
        splits.verify(split, store_of(twins))
    splits.verify(dataclasses.replace(split, train=("a", "b"), test=("d",), labelled=("a", "b")), store_of(twins))


def test_reading_a_split_imports_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys, medssl.platform.splits; print(sorted({'torch', 'ray', 'pyarrow', 'scipy', 'nibabel'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
