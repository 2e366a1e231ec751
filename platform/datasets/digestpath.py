"""DigestPath 2019, colonoscopy tissue: colour pictures of stained sections, 250 with lesions outlined, 410 without any.

    tissue-train-pos-v1/18-00530A_2019-05-07 22_56_22-lv1-34626-6557-4790-5027.jpg
    tissue-train-pos-v1/18-00530A_2019-05-07 22_56_22-lv1-34626-6557-4790-5027_mask.jpg    bright: the lesion
    tissue-train-neg/18-09926B_2019-05-08 00_06_27-lv1-28283-10960-5529-4362.jpg           no lesion, no mask

Da et al., https://doi.org/10.1016/j.media.2022.102485; CC BY-NC-SA 4.0; https://digestpath2019.grand-challenge.org.
Test pictures are not public: no official parts. A patient is the number before the date: 18-00530A and 18-00530B
are one.

Masks are JPEG, whose grey fringe is no lesion: what lies above 127 is. Pictures without lesion have no mask file and are
unlabelled here, to be pretrained on.

Preset: 512 x 512; PDCR (Li et al. 2022, https://doi.org/10.1109/TMI.2022.3186677) squashes the whole picture too, to a
size that is not on record. Deviations: as for ISIC 2016.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from medssl.platform.datasets import _pictures
from medssl.platform.errors import RunError
from medssl.platform.records import Case, DataInfo

OBTAIN = "https://digestpath2019.grand-challenge.org"
LICENCE = "CC BY-NC-SA 4.0"
POSITIVE, NEGATIVE = "tissue-train-pos-v1", "tissue-train-neg"
PATIENT = re.compile(r"\d+[-_]\d+")


def matches(root: Path) -> bool:
    """Whether the pictures with lesions are there."""
    return (root / POSITIVE).is_dir()


def info(root: Path | None) -> DataInfo:
    """The facts of DigestPath's tissue task."""
    return DataInfo(
        name="digestpath",
        classes=("background", "lesion"),
        channels=_pictures.COLOUR,
        licence=LICENCE,
        citation="Da et al. 2022, https://doi.org/10.1016/j.media.2022.102485",
        obtain=OBTAIN,
        preset="picture",
        preset_changes={"resize": (512, 512)},
        mask_threshold=127,
    )


def cases(root: Path) -> Iterator[Case]:
    """Pictures with lesions, and those without where they are. Raises RunError where a mask is missing."""
    for folder, group in ((root / POSITIVE, "lesion"), (root / NEGATIVE, "no lesion")):
        for image in sorted(folder.glob("*.jpg")):
            if image.stem.endswith("_mask"):
                continue
            mask = image.with_name(image.stem + "_mask.jpg") if group == "lesion" else None
            if mask and not mask.is_file():
                raise RunError(f"{mask}: is missing; download it again")
            found = PATIENT.match(image.stem)
            yield Case(found[0] if found else image.stem, image.stem.replace(" ", "_"), (image,), mask, group=group)
