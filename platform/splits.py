"""Which patients train, which select, which are scored once; and the order in which training patients show their labels.

The patient is the unit: all volumes of one lie in one part. A split is data (`splits/<name>.json` in the store's folder), drawn
by sorting patients by a hash of seed and name: the same seed gives the same split on any machine and in any order of files,
and a new patient does not reshuffle the others.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from medssl.platform import atomic
from medssl.platform.errors import RunError, UsageError
from medssl.platform.store import Store


@dataclass(frozen=True)
class Split:
    """Patients of each part. The first n of `labelled` are the labelled subset of size n, so that 1 ⊂ 2 ⊂ 4 …"""

    name: str
    train: tuple[str, ...]  # with and without labels
    val: tuple[str, ...]
    test: tuple[str, ...]
    labelled: tuple[str, ...]  # every training patient that has a label, in the order of the nested subsets


def drawn(patients: Iterable[str], seed: int, purpose: str) -> list[str]:
    """The patients in an order fixed by seed and purpose alone."""
    return sorted(patients, key=lambda patient: hashlib.sha256(f"{seed}/{purpose}/{patient}".encode()).digest())


def official_parts(store: Store) -> dict[str, str]:
    """The part of each patient whom the data set's own split names. Raises UsageError when it cuts a patient in two."""
    parts: dict[str, str] = {}
    for volume in store.volumes:
        if volume.part and parts.setdefault(volume.patient, volume.part) != volume.part:
            raise UsageError(
                f'patient "{volume.patient}" is in two parts of the official split, {parts[volume.patient]} and {volume.part}; '
                "give all volumes of a patient one split in cases.json and prepare again"
            )
    return parts


def with_labels(store: Store) -> set[str]:
    """Patients of whom at least one volume is labelled."""
    return {volume.patient for volume in store.volumes if volume.labelled}


def make(store: Store, seed: int = 0, fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)) -> Split:
    """Draw a split of the labelled patients: `fractions` of them in train, val and test; the others only train.

    A part that the data set publishes is kept: its official test patients stay the test patients, and val is then drawn from
    its training patients. Raises UsageError when there are too few patients for each part to have one.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise UsageError(f"fractions {fractions} of train, val and test should be at least 0 and sum to 1")
    official, labelled = official_parts(store), with_labels(store)
    for patient, part in official.items():
        if part in ("val", "test") and patient not in labelled:
            raise UsageError(
                f'patient "{patient}" is in the official {part} part without a label; add it, or drop the part in cases.json'
            )
    held_out = {part: [p for p in drawn(official, seed, "parts") if official[p] == part] for part in ("test", "val")}
    pool = [patient for patient in drawn(labelled, seed, "parts") if official.get(patient, "train") == "train"]
    share = 1.0
    for part, fraction in (("test", fractions[2]), ("val", fractions[1])):
        if not held_out[part]:
            taken = max(1, round(len(pool) * fraction / share)) if share > 0 else 0
            held_out[part], pool = pool[:taken], pool[taken:]
        share -= fraction
    if not pool or not held_out["val"]:
        raise UsageError(
            f"{store.root}: {len(labelled)} labelled patients are too few for train, val and test; add labelled patients"
        )
    train = sorted({*pool, *(set(store.patients) - labelled)})
    split = Split(
        f"seed-{seed}",
        tuple(train),
        tuple(sorted(held_out["val"])),
        tuple(sorted(held_out["test"])),
        tuple(drawn(pool, seed, "labels")),
    )
    verify(split, store)
    return split


def verify(split: Split, store: Store) -> None:
    """Raises UsageError naming the patient when the split leaks, names a stranger, or leaves a part empty."""
    home: dict[str, str] = {}
    for part in ("train", "val", "test"):
        patients = getattr(split, part)
        if not patients:
            raise UsageError(f'split "{split.name}": no patient in {part}; each part needs one')
        for patient in patients:
            if patient in home:
                raise UsageError(
                    f'split "{split.name}": patient "{patient}" is in {home[patient]} and in {part}; leave it in one part'
                )
            home[patient] = part
    for patient in sorted(home.keys() - set(store.patients)):
        raise UsageError(f'split "{split.name}": patient "{patient}" is not in {store.root}; it belongs to another data set')
    annotated = with_labels(store)
    for patient in (*split.val, *split.test, *split.labelled):
        if patient not in annotated:
            raise UsageError(f'split "{split.name}": patient "{patient}" has no label and can only be in train, unlabelled')
    for patient in split.labelled:
        if home.get(patient) != "train" or split.labelled.count(patient) > 1:
            raise UsageError(f'split "{split.name}": labelled patient "{patient}" should be in train, and listed once')


def save(split: Split, store: Store) -> None:
    """Write `splits/<name>.json` into the store's folder."""
    verify(split, store)
    atomic.write_json(store.root / "splits" / f"{split.name}.json", dataclasses.asdict(split))


def load(store: Store, name: str) -> Split:
    """Read a split back and verify it. Raises UsageError when there is none of that name."""
    path = store.root / "splits" / f"{name}.json"
    try:
        said = json.loads(path.read_text())
        split = Split(said["name"], *(tuple(map(str, said[key])) for key in ("train", "val", "test", "labelled")))
    except FileNotFoundError:
        found = ", ".join(sorted(file.stem for file in path.parent.glob("*.json"))) or "none"
        raise UsageError(f'no split "{name}" in {path.parent}; found: {found}') from None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path}: not a split ({error!r}); expected name, train, val, test, labelled; delete it to draw it anew"
        ) from error
    verify(split, store)
    return split


def numbers(listed: str) -> list[int]:
    """The numbers of "1-3,7": [1, 2, 3, 7]."""
    ends = [(each.partition("-")[0], each.rpartition("-")[2]) for each in listed.split(",")]
    return [number for first, last in ends for number in range(int(first), int(last) + 1)]


def published(name: str, patient: str, train: str, val: str, test: str, labelled: str) -> Split:
    """A paper's split, from its lists of numbers ("1-3,7") and how its patients are called ("patient{:03d}").

    Who selects or is tested does not train, in whatever lists of the paper they are; who is labelled trains.
    """
    lists = [[patient.format(number) for number in numbers(listed)] for listed in (f"{train},{labelled}", val, test, labelled)]
    trains, selects, tests, shows = map(list, map(dict.fromkeys, lists))
    held_out = {*selects, *tests}
    return Split(
        name,
        tuple(sorted(set(trains) - held_out)),
        tuple(sorted(selects)),
        tuple(sorted(tests)),
        tuple(each for each in shows if each not in held_out),
    )
