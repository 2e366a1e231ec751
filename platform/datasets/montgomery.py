"""Montgomery County chest radiographs: 138 pictures with masks of both lungs, 58 with signs of tuberculosis.

    CXR_png/MCUCXR_0001_0.png                 grey; the last number: 1 with tuberculosis
    ManualMask/leftMask/MCUCXR_0001_0.png     0, or the left lung
    ManualMask/rightMask/MCUCXR_0001_0.png    0, or the right lung

Jaeger et al., https://doi.org/10.3978/j.issn.2223-4292.2014.11.20; open, by the National Library of Medicine, which asks to be
named; the set is also known as MC. No official parts. Both lungs are one class, as in PDCR. The group of a picture is
its finding; ClinicalReadings, which say age and sex, are not read.

Preset: 512 x 512, as PDCR (Li et al. 2022, https://doi.org/10.1109/TMI.2022.3186677) has it, from the picture's own lowest
grey to its highest, as the films were digitised with 12 bits. Deviations: one channel, not three copies of it; else as
for ISIC 2016.
"""

from collections.abc import Iterator
from pathlib import Path

from medssl.platform.errors import RunError
from medssl.platform.records import Case, DataInfo, Mask

OBTAIN = "https://data.lhncbc.nlm.nih.gov/public/Tuberculosis-Chest-X-ray-Datasets/Montgomery-County-CXR-Set/MontgomerySet"
LICENCE = "open; the National Library of Medicine and Montgomery County are to be named"
FINDINGS = {"0": "normal", "1": "tuberculosis"}


def matches(root: Path) -> bool:
    """Whether radiographs and masks are there."""
    return (root / "CXR_png").is_dir() and (root / "ManualMask" / "leftMask").is_dir()


def info(root: Path | None) -> DataInfo:
    """The facts of the Montgomery set."""
    return DataInfo(
        name="montgomery",
        classes=("background", "lung"),
        channels=("radiograph",),
        licence=LICENCE,
        citation="Jaeger et al. 2014, https://doi.org/10.3978/j.issn.2223-4292.2014.11.20",
        obtain=OBTAIN,
        preset="picture",
        preset_changes={"window": None, "percentiles": (0.0, 100.0), "resize": (512, 512)},
    )


def cases(root: Path) -> Iterator[Case]:
    """Every radiograph. Raises RunError where a mask is missing."""
    for image in sorted((root / "CXR_png").glob("MCUCXR_*.png")):
        masks = tuple(Mask("lung", root / "ManualMask" / f"{side}Mask" / image.name) for side in ("left", "right"))
        for mask in masks:
            if not mask.file.is_file():
                raise RunError(f"{mask.file}: is missing; download it again")
        patient, _, finding = image.stem.rpartition("_")
        yield Case(patient, image.stem, (image,), masks, group=FINDINGS.get(finding))
