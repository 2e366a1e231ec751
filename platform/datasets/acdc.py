"""ACDC: cine MR of the heart, 150 patients, both ventricles and the myocardium at end diastole and end systole.

    database/                                   or the folders below it, or those of the patients alone
      training/patient001/Info.cfg              ED: 1, ES: 12, Group: DCM, Height, NbFrame: 30, Weight
      training/patient001/patient001_4d.nii.gz  every frame of the cycle, (x, y, z, t)
      training/patient001/patient001_frame01.nii.gz   patient001_frame01_gt.nii.gz   … and the other labelled frame
      testing/patient101/                       … 150: the official test part where its _gt files are there

Bernard et al., IEEE TMI 2018, https://doi.org/10.1109/TMI.2018.2837502; CC BY-NC-SA 4.0; from
https://humanheart-project.creatis.insa-lyon.fr/database. Labels: 1 right ventricle, 2 myocardium, 3 left ventricle. Training
patients lie in blocks of twenty by pathology (DCM, HCM, MINF, NOR, RV), which is each case's group.

A labelled frame is the 3D file with its label; the other frames are taken from the 4D file, without label, and none is listed
twice. A set without the 4D files has labelled frames only.

Preset `acdc`: that of global and local contrast (Chaitanya 2020, https://doi.org/10.48550/arXiv.2006.10511): 1.36719 mm in the
plane, slices as they are, cut or padded to 192 x 192, percentiles 1 and 99 of the volume. Deviations: N4 is off (-o n4=1, extra
[n4]); both frames are used, not end diastole alone, and the other frames pretrain.

Splits: `global-local-…` (the paper's test patients and labelled combinations; patient-level; its validation patients are taken
out of the pretraining pool) and `byol` (hierarchical BYOL: test and validation are every tenth patient from 1 and from 2).
"""

from collections.abc import Iterator
from pathlib import Path

from medssl.platform.errors import RunError
from medssl.platform.records import Case, DataInfo, Part
from medssl.platform.splits import Split, numbers, published

OBTAIN = "https://humanheart-project.creatis.insa-lyon.fr/database"
LICENCE = "CC BY-NC-SA 4.0"
POOL = "1-6,12,17-26,37-46,57-66,72,77-86,97-100"  # the paper's pretraining patients, which it calls tr52
TEST = "7-10,27-30,47-50,67-70,87-90"
COMBINATIONS = {  # labelled patients, and the two that select
    "tr1-c1": ("2", "11,71"),
    "tr1-c2": ("42", "31,72"),
    "tr1-c3": ("95", "11,71"),
    "tr1-c4": ("22", "11,71"),
    "tr1-c5": ("62", "11,71"),
    "tr2-c1": ("42,62", "31,72"),
    "tr2-c2": ("2,42", "11,71"),
    "tr2-c3": ("42,95", "31,72"),
    "tr2-c4": ("2,22", "11,71"),
    "tr2-c5": ("2,95", "11,71"),
    "tr8-c1": ("2,22,42,62,95,3,23,43", "11,71"),
    "tr8-c2": ("2,22,42,62,95,63,94,43", "31,72"),
    "tr8-c3": ("2,22,42,62,95,3,94,23", "11,71"),
    "trall": ("1-6,12-26,32-46,51-66,72-86,91-100", "11,71"),  # 11, which the source also trains on, selects alone
}


def patients(root: Path) -> list[Path]:
    """The patients' folders, sorted by number."""
    found = {folder for above in ("", "*/", "*/*/") for folder in root.glob(f"{above}patient[0-9][0-9][0-9]")}
    return sorted((folder for folder in found if (folder / "Info.cfg").is_file()), key=lambda folder: folder.name)


def matches(root: Path) -> bool:
    """Whether there are patients with an Info.cfg."""
    return bool(patients(root))


def info(root: Path) -> DataInfo:
    """The facts of ACDC."""
    return DataInfo(
        name="acdc",
        classes=("background", "right ventricle", "myocardium", "left ventricle"),
        channels=("cine MR",),
        licence=LICENCE,
        citation="Bernard et al. 2018, https://doi.org/10.1109/TMI.2018.2837502",
        obtain=OBTAIN,
        preset="acdc",
        preset_changes={"n4": 0},
    )


def configuration(folder: Path) -> dict[str, str]:
    """Info.cfg: one `key: value` a line."""
    path = folder / "Info.cfg"
    said = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    said = {key.strip(): value.strip() for key, value in said.items()}
    for key in ("ED", "ES", "NbFrame"):
        if not said.get(key, "").isdecimal():
            raise RunError(f"{path}: {key} is {said.get(key, 'missing')}, expected a frame number; download it again")
    return said


def cases(root: Path) -> Iterator[Case]:
    """Of each patient the two labelled frames, then the others of the cine."""
    for folder in patients(root):
        name, said = folder.name, configuration(folder)
        phases = {int(said["ED"]): "ED", int(said["ES"]): "ES"}
        files = {frame: folder / f"{name}_frame{frame:02d}.nii.gz" for frame in phases}
        labels = {frame: file.with_name(file.name.replace(".nii.gz", "_gt.nii.gz")) for frame, file in files.items()}
        testing = folder.parent.name == "testing"
        part: Part | None = "train" if not testing else "test" if any(map(Path.is_file, labels.values())) else None
        facts = {"part": part, "group": said.get("Group")}
        for frame, phase in phases.items():
            label = labels[frame] if labels[frame].is_file() or not testing else None
            yield Case(name, f"{name}_frame{frame:02d}", (files[frame],), label, phase=phase, **facts)  # type: ignore[arg-type]
        cine = folder / f"{name}_4d.nii.gz"
        for frame in range(1, int(said["NbFrame"]) + 1 if cine.is_file() else 1):
            if frame not in phases:
                yield Case(name, f"{name}_frame{frame:02d}", (cine,), frame=frame - 1, **facts)  # type: ignore[arg-type]


def splits(root: Path) -> Iterator[Split]:
    """Of the 100 training patients: the contrastive paper's combinations, and hierarchical BYOL's."""
    for name, (labelled, val) in COMBINATIONS.items():
        train = labelled if name == "trall" else f"{POOL},{labelled}"
        yield published(f"global-local-{name}", "patient{:03d}", train, val, TEST, labelled)
    every_tenth = {first: ",".join(str(n) for n in numbers("1-100") if n % 10 == first) for first in (1, 2)}
    yield published("byol", "patient{:03d}", "1-100", every_tenth[2], every_tenth[1], "1-100")
