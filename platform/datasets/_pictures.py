"""What the data sets of pictures share: images and masks in two folders, a mask named after its image."""

from collections.abc import Iterator
from pathlib import Path

from medssl.platform import formats
from medssl.platform.errors import RunError
from medssl.platform.records import Case, Part

COLOUR = ("red", "green", "blue")
MASK = {0: 0, 255: 1}  # 8 or 1 bits per pixel: white is the class


def labelled(images: Path, masks: Path, suffix: str, part: Part | None, skip: str = "\n") -> Iterator[Case]:
    """Each image `x.jpg` with its mask `x<suffix>`, or without one where there is no folder of masks. Each is its own patient.

    skip    files whose stem ends with it are no images
    Raises RunError on a mask without an image, and on an image without a mask.
    """
    found = {formats.stem(file): file for file in sorted(images.iterdir()) if formats.ending(file) in formats.PICTURES}
    found = {stem: file for stem, file in found.items() if not stem.endswith(skip) and not stem.startswith(".")}
    there = {file.name for file in masks.glob(f"*{suffix}")} if masks.is_dir() else None
    strangers = sorted((there or set()) - {stem + suffix for stem in found})
    if strangers:
        raise RunError(f"{masks / strangers[0]}: a mask without an image in {images.name}; download the images again")
    for stem, file in found.items():
        if there is not None and stem + suffix not in there:
            raise RunError(f"{file}: its mask {masks.name}/{stem + suffix} is missing; download the masks again")
        yield Case(
            stem, stem, (file,), masks / (stem + suffix) if there is not None else None, part if there is not None else None
        )
