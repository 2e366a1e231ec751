"""FLARE22: abdominal CT with thirteen organs, 50 labelled and 2,000 unlabelled scans.

    FLARE22Train/                          as unpacked from Zenodo; also the folder above it, with the unlabelled ones
      images/FLARE22_Tr_0001_0000.nii.gz   … 0050
      labels/FLARE22_Tr_0001.nii.gz        1 liver, 2 right kidney, 3 spleen … as in CLASSES
    FLARE_UnlabeledCase1-1000/             and 1001-2000: any folder whose name says "unlabel"
      Case_00001_0000.nii.gz               … 02000

Ma et al., "Unleashing the strengths of unlabelled data in pan-cancer abdominal organ quantification: the FLARE22 challenge",
2023, https://doi.org/10.48550/arXiv.2308.05862. Labelled scans: https://zenodo.org/records/7860267, the others by registering
at https://flare22.grand-challenge.org. The labelled images are those of the Decathlon's pancreas task (CC BY-SA 4.0), their
annotations are for research only. The challenge's own validation and test labels are not public: no official parts.

The preset is `ct`, the CT study's own (Konieczkowicz 2023, https://github.com/dittohed/exploring-ssl-for-ct). Its split, 15
cases to train on and the other 35 to score, is here as `ct-study`; it has no test part, so we select on the first ten of the
35 and score the rest.
"""

from collections.abc import Iterator
from pathlib import Path

from medssl.platform.records import Case, DataInfo
from medssl.platform.splits import Split

OBTAIN = "https://zenodo.org/records/7860267 and https://flare22.grand-challenge.org"
LICENCE = "images CC BY-SA 4.0; annotations for research only"
CLASSES = (
    "background",
    "liver",
    "right kidney",
    "spleen",
    "pancreas",
    "aorta",
    "inferior vena cava",
    "right adrenal gland",
    "left adrenal gland",
    "gallbladder",
    "oesophagus",
    "stomach",
    "duodenum",
    "left kidney",
)
TOLERANCE_MM = (5, 3, 3, 5, 2, 2, 2, 2, 2, 3, 5, 7, 3)  # the challenge's own, for the surface Dice
CT_STUDY_TRAINS_ON = (31, 28, 16, 45, 19, 36, 42, 27, 3, 6, 11, 23, 39, 46, 12)


def labelled(root: Path) -> list[Path]:
    """The labelled scans, wherever `images` lies in what was unpacked."""
    return sorted({file for above in ("", "*/", "*/*/") for file in root.glob(f"{above}images/FLARE22_Tr_????_0000.nii.gz")})


def matches(root: Path) -> bool:
    """Whether `root` holds the labelled scans."""
    return bool(labelled(root))


def info(root: Path) -> DataInfo:
    """The facts of FLARE22."""
    return DataInfo(
        name="flare22",
        classes=CLASSES,
        channels=("CT",),
        licence=LICENCE,
        citation="Ma et al. 2023, https://doi.org/10.48550/arXiv.2308.05862",
        obtain=OBTAIN,
        preset="ct",
        tolerance_mm=tuple(map(float, TOLERANCE_MM)),
    )


def cases(root: Path) -> Iterator[Case]:
    """Labelled scans, then unlabelled ones; each is a patient of its own."""
    for image in labelled(root):
        volume = image.name.removesuffix("_0000.nii.gz")
        yield Case(volume, volume, (image,), image.parent.parent / "labels" / f"{volume}.nii.gz")
    for folder in sorted(folder for folder in root.rglob("*") if folder.is_dir() and "unlabel" in folder.name.lower()):
        for image in sorted(folder.rglob("Case_*_0000.nii.gz")):
            volume = image.name.removesuffix("_0000.nii.gz")
            yield Case(volume, volume, (image,))


def splits(root: Path) -> Iterator[Split]:
    """The CT study's split of the 50 labelled cases."""
    number = {n: f"FLARE22_Tr_{n:04d}" for n in range(1, 51)}
    trains = [number[n] for n in CT_STUDY_TRAINS_ON]
    scores = [name for n, name in number.items() if n not in CT_STUDY_TRAINS_ON]
    yield Split("ct-study", tuple(trains), tuple(scores[:10]), tuple(scores[10:]), tuple(trains))
