"""Which patients train, which select, which are scored once; and the order in which training patients show their labels.

The patient is the unit: all volumes of one lie in one part, and so do two patients' volumes that hold the same pixels. A split
is data (`splits/<name>.json` in the store's folder), drawn by sorting patients by a hash of seed and name: the same seed gives
the same split on any machine and in any order of files, and a new patient does not reshuffle the others. Its name is its rule:

    seed-N                  test, val and train drawn once, 0.2, 0.1 and 0.7 of the labelled patients
    fold-I-of-K-seed-N      test is the I-th (from 0) of K folds that together are all labelled patients; val is 0.1 of them
    …-by-site, -by-group, -by-phase
                            the same, every stratum shared out in proportion: within one patient in test, val and every
                            labelled subset
    official                what the data set publishes; val is drawn (seed 0) where it publishes none
    FILE.json, FILE.csv     the user's own: {"train": [...], "val": [...], "test": [...]}, or columns patient (or volume), part

`seed-N` keeps published parts too. Folds are drawn from what is published for training, and the published test patients stay
out of all of them. Unlabelled patients train. What a file leaves out is left out.
"""

import csv
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from medssl.platform import atomic
from medssl.platform.errors import RunError, UsageError
from medssl.platform.find import nearest
from medssl.platform.store import Store, VolumeRecord

PARTS = ("train", "val", "test")
RULE = re.compile(r"(?:fold-(\d+)-of-(\d+)-)?seed-(\d+)(?:-by-(site|group|phase))?")
EXAMPLES = ("seed-0", "fold-0-of-5-seed-0", "seed-0-by-group", "fold-0-of-5-seed-0-by-site", "official")


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


def make(
    store: Store,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
    *,
    fold: tuple[int, int] | None = None,
    by: str | None = None,
) -> Split:
    """Draw a split of the labelled patients: `fractions` of them in train, val and test; the others only train.

    fold    (i, k): test is the i-th of k folds instead of a fraction
    by      "site", "group" or "phase": share out every stratum in proportion
    A part that the data set publishes is kept: its official test patients stay the test patients (of folds, stay out), and val
    is then drawn from its training patients. Raises UsageError when there are too few patients for each part to have one.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise UsageError(f"fractions {fractions} of train, val and test should be at least 0 and sum to 1")
    official, labelled, stratum = official_parts(store), with_labels(store), strata(store, by)
    if not labelled:  # a collection for pretraining: there is nothing to select by or to score
        return Split(f"seed-{seed}", store.patients, (), (), ())
    for patient, part in official.items():
        if part in ("val", "test") and patient not in labelled:
            raise UsageError(
                f'patient "{patient}" is in the official {part} part without a label; add it, or drop the part in cases.json'
            )
    if fold:
        test, pool = _fold([p for p in drawn(labelled, seed, "parts") if official.get(p) != "test"], *fold, stratum, store)
        val, pool = _first(pool, max(1, round((len(test) + len(pool)) * fractions[1])), stratum)
    else:
        held_out = {part: [p for p in drawn(official, seed, "parts") if official[p] == part] for part in ("test", "val")}
        pool = [patient for patient in drawn(labelled, seed, "parts") if official.get(patient, "train") == "train"]
        share = 1.0
        for part, fraction in (("test", fractions[2]), ("val", fractions[1])):
            if not held_out[part]:
                taken = max(1, round(len(pool) * fraction / share)) if share > 0 else 0
                held_out[part], pool = _first(pool, taken, stratum)
            share -= fraction
        test, val = held_out["test"], held_out["val"]
    if not pool or not val:
        raise UsageError(
            f"{store.root}: {len(labelled)} labelled patients are too few for train, val and test; add labelled patients"
        )
    name = (f"fold-{fold[0]}-of-{fold[1]}-" if fold else "") + f"seed-{seed}" + (f"-by-{by}" if by else "")
    split = Split(
        name,
        tuple(sorted({*pool, *(set(store.patients) - labelled)})),
        tuple(sorted(val)),
        tuple(sorted(test)),
        tuple(in_proportion(drawn(pool, seed, "labels"), stratum)),
    )
    verify(split, store)
    return split


def strata(store: Store, by: str | None) -> dict[str, str]:
    """The stratum of each labelled patient: what `by` says of its volumes, all of them; the same for all without `by`."""
    said: dict[str, set[str]] = {patient: set() for patient in with_labels(store)}
    for volume in store.volumes:
        if by and volume.patient in said:
            value = getattr(volume, by)
            if value is None:
                raise UsageError(
                    f'volume "{volume.volume}" carries no {by} to stratify by; give each volume its "{by}" in cases.json and '
                    "prepare again, or take another split"
                )
            said[volume.patient].add(value)
    return {patient: "+".join(sorted(values)) for patient, values in said.items()}


def in_proportion(patients: Sequence[str], stratum: Mapping[str, str]) -> list[str]:
    """The patients so ordered that the first n hold each stratum within one patient of its proportion, for every n.

    Inside a stratum the order stays. This is the chairman assignment problem: of the strata that are behind by 1/(2S-2) or
    more, the one that would be late first comes next (Tijdeman, Discrete Mathematics 32, 1980,
    https://doi.org/10.1016/0012-365X(80)90269-1). With one stratum nothing moves.
    """
    waiting: dict[str, list[str]] = {}
    for patient in patients:
        waiting.setdefault(stratum[patient], []).append(patient)
    if len(waiting) < 2:
        return list(patients)
    total, slack = len(patients), Fraction(1, 2 * len(waiting) - 2)
    share = {name: Fraction(len(members), total) for name, members in waiting.items()}
    given = dict.fromkeys(waiting, 0)
    order = []
    for n in range(1, total + 1):
        behind = {name: share[name] * n - given[name] for name in waiting}
        eligible = [name for name in sorted(waiting) if behind[name] >= slack]
        chosen = min(eligible, key=lambda name: (1 - slack - behind[name]) / share[name])
        order.append(waiting[chosen][given[chosen]])
        given[chosen] += 1
    return order


def _first(pool: Sequence[str], count: int, stratum: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """So many patients in proportion, and the others in their order."""
    taken = in_proportion(pool, stratum)[:count]
    return taken, [patient for patient in pool if patient not in set(taken)]


def _fold(
    pool: Sequence[str], number: int, folds: int, stratum: Mapping[str, str], store: Store
) -> tuple[list[str], list[str]]:
    """One fold and the others. Patients are dealt stratum after stratum, so that no fold has two more of one than another."""
    if not 2 <= folds <= len(pool):
        raise UsageError(f"{store.root}: {len(pool)} labelled patients cannot be dealt into {folds} folds; ask for 2 or more")
    if number >= folds:
        raise UsageError(f"fold {number} of {folds}: folds are numbered 0 to {folds - 1}")
    dealt = sorted(pool, key=lambda patient: stratum[patient])  # stable: drawn inside a stratum
    fold = set(dealt[number::folds])
    return [p for p in pool if p in fold], [p for p in pool if p not in fold]


def verify(split: Split, store: Store) -> None:
    """Raises UsageError naming the patient when the split leaks, names a stranger, or leaves a part empty.

    A split leaks when a patient is in two parts, or two patients of two parts hold the same pixels.
    """
    home: dict[str, str] = {}
    for part in PARTS:
        patients = getattr(split, part)
        if not patients and (part == "train" or with_labels(store)):
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
    seen: dict[str, VolumeRecord] = {}
    for volume in store.volumes:
        if volume.content and volume.patient in home:
            twin = seen.setdefault(volume.content, volume)
            if home[twin.patient] != home[volume.patient]:
                one, other = (f'{v.volume} of patient "{v.patient}" in {home[v.patient]}' for v in (twin, volume))
                raise UsageError(
                    f'split "{split.name}": {one} and {other} are the same scan; leave one out, or give both one patient, and '
                    "prepare again"
                )


def named(store: Store, name: str) -> Split:
    """A split by its name, drawn by the rule that the name is, or read from the user's file, on first use; then kept.

    A file's split is kept as `<stem>-<hash>`, so that the file may change without changing what was trained under it.
    Raises UsageError with the nearest name.
    """
    path = store.root / "splits" / f"{name}.json"
    if path.exists():
        return load(store, name)
    if name.endswith((".json", ".csv")):
        split = from_file(Path(name), store)
    elif name == "official":
        if "test" not in official_parts(store).values():
            raise UsageError(f"{store.root}: its data set publishes no test part; take seed-0, a fold, or a file of your own")
        split = dataclasses.replace(make(store), name=name)
    elif rule := RULE.fullmatch(name):
        number, folds, seed, by = rule.groups()
        split = make(store, int(seed), fold=(int(number), int(folds)) if folds else None, by=by)
        split = dataclasses.replace(split, name=name)  # seed-007 is what was asked for
    else:
        known = {*EXAMPLES, *(file.stem for file in path.parent.glob("*.json"))}
        raise UsageError(f'no split "{name}" in {path.parent}, and no rule of that name; {nearest(name, known)}')
    save(split, store)
    return split


def from_file(path: Path, store: Store) -> Split:
    """The user's own split, by patients or volumes. Raises UsageError when it is not one, or cuts a patient in two."""
    try:
        text = path.read_text()
        said = json.loads(text) if path.suffix == ".json" else _columns(text)
        lists = {part: [str(each) for each in _list(said[part])] for part in PARTS}
        order = [str(each) for each in _list(said["labelled"])] if said.get("labelled") is not None else None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give a split's name or a file that is there") from None
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise UsageError(
            f'{path}: not a split ({error!r}); expected {{"train": [...], "val": [...], "test": [...]}} or a table with the '
            "columns patient (or volume) and part"
        ) from None
    owner = {volume.volume: volume.patient for volume in store.volumes}
    owner |= {patient: patient for patient in store.patients}  # a name that is both is a patient's
    parts = {part: sorted({owner.get(name, name) for name in names}) for part, names in lists.items()}
    annotated = with_labels(store)
    labelled = drawn((p for p in parts["train"] if p in annotated), 0, "labels")
    if order is not None:
        labelled = list(dict.fromkeys(owner.get(name, name) for name in order))
    mark = hashlib.sha256(json.dumps([parts, labelled]).encode()).hexdigest()[:8]
    train, val, test = (tuple(parts[part]) for part in PARTS)
    split = Split(f"{path.stem}-{mark}", train, val, test, tuple(labelled))
    verify(split, store)
    return split


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is not a list")
    return value


def _columns(text: str) -> dict[str, list[str]]:
    """The parts of a table with a head."""
    found: dict[str, list[str]] = {part: [] for part in PARTS}
    for row in csv.DictReader(text.splitlines()):
        found[row["part"]].append(row["patient"] if "patient" in row else row["volume"])
    return found


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
