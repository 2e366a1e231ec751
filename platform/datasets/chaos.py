"""CHAOS: abdomens of healthy people, 40 in CT (liver) and 40 others in MR (four organs), in DICOM with PNG labels.

    Train_Sets/CT/                     give CT or MR, which are labelled differently
      1/DICOM_anon/i0000,0000b.dcm     one file per slice
      1/Ground/liver_GT_000.png        one per slice: 0, or 1 or 255 the liver
    Train_Sets/MR/
      1/T1DUAL/DICOM_anon/InPhase/IMG-0004-00002.dcm    OutPhase beside it, on the same grid
      1/T1DUAL/Ground/IMG-0004-00002.png
      1/T2SPIR/DICOM_anon/IMG-0002-00001.dcm
      1/T2SPIR/Ground/IMG-0002-00001.png
    Test_Sets/CT, Test_Sets/MR         the same without Ground: for pretraining

    grey values of the MR labels: 63 (55-70) liver, 126 (110-135) right kidney, 189 (175-200) left kidney, 252 (240-255) spleen

Kavur et al., Medical Image Analysis 2021, https://doi.org/10.1016/j.media.2020.101950; CC BY-SA 4.0;
https://doi.org/10.5281/zenodo.3431873. Test labels are not public: no official parts. Extra [dicom].

In-phase, out-phase and T2-weighted scans of a person are volumes of one channel each; the phase says which. Both T1 volumes
have the T1 label. Presets `ct` and `mr`, no paper's.
"""

from collections.abc import Iterator
from pathlib import Path

from medssl.platform.errors import RunError
from medssl.platform.records import Case, DataInfo

OBTAIN = "https://doi.org/10.5281/zenodo.3431873"
LICENCE = "CC BY-SA 4.0"
SEQUENCES = {  # phase: images, labels
    "T1 in phase": ("T1DUAL/DICOM_anon/InPhase", "T1DUAL/Ground"),
    "T1 out of phase": ("T1DUAL/DICOM_anon/OutPhase", "T1DUAL/Ground"),
    "T2": ("T2SPIR/DICOM_anon", "T2SPIR/Ground"),
}
MR_VALUES = {0: 0} | {
    grey: organ
    for organ, greys in enumerate((range(55, 71), range(110, 136), range(175, 201), range(240, 256)), 1)
    for grey in greys
}


def people(root: Path, images: str) -> list[Path]:
    """The numbered folders that hold `images`, by number."""
    found = (folder for folder in root.iterdir() if folder.name.isdecimal() and (folder / images).is_dir())
    return sorted(found, key=lambda folder: int(folder.name))


def modality(root: Path) -> str | None:
    """`ct` or `mr`, as the folder holds numbered folders of the one or the other form."""
    if people(root, "DICOM_anon"):
        return "ct"
    return "mr" if any(people(root, images) for images, _ in SEQUENCES.values()) else None


def matches(root: Path) -> bool:
    """Whether `root` holds people of one modality, or is the folder above CT and MR."""
    return modality(root) is not None or any((root / kind).is_dir() and modality(root / kind) for kind in ("CT", "MR"))


def one_modality(root: Path) -> str:
    """The folder's modality. Raises RunError on the folder above CT and MR."""
    found = modality(root)
    if found is None:
        raise RunError(f"{root}: its CT and MR scans are labelled differently; give {root / 'CT'} or {root / 'MR'} instead")
    return found


def info(root: Path) -> DataInfo:
    """The facts of CHAOS: of its CT part or of its MR part."""
    ct = one_modality(root) == "ct"
    organs = ("liver",) if ct else ("liver", "right kidney", "left kidney", "spleen")
    return DataInfo(
        name="chaos-ct" if ct else "chaos-mr",
        classes=("background", *organs),
        channels=("CT" if ct else "MR",),
        licence=LICENCE,
        citation="Kavur et al. 2021, https://doi.org/10.1016/j.media.2020.101950",
        obtain=OBTAIN,
        preset="ct" if ct else "mr",
        label_values={0: 0, 1: 1, 255: 1} if ct else MR_VALUES,
    )


def cases(root: Path) -> Iterator[Case]:
    """Every series with its folder of labels, if there is one."""
    ct = one_modality(root) == "ct"
    for phase, (images, labels) in ({"CT": ("DICOM_anon", "Ground")} if ct else SEQUENCES).items():
        for folder in people(root, images):
            patient = f"{'ct' if ct else 'mr'}_{int(folder.name):02d}"
            volume = patient if ct else f"{patient}_{phase.replace(' ', '-')}"
            label = folder / labels if (folder / labels).is_dir() else None
            yield Case(patient, volume, (folder / images,), label, phase=None if ct else phase)
