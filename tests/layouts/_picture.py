"""What the writers of miniature sets of pictures share: noise of the preset's size, so that none is resampled, and ellipses."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def picture(path: Path, seed: int, size: tuple[int, int] = (512, 512), colour: bool = True) -> None:
    """Blocks of noise, (width, height), which JPEG packs small."""
    rng = np.random.default_rng(seed)
    width, height = size
    blocks = rng.integers(0, 256, (height // 32, width // 32, 3) if colour else (height // 32, width // 32)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(path)


def ellipse(seed: int, size: tuple[int, int] = (512, 512)) -> NDArray[np.uint8]:
    """Where a lesion is, 0 or 1, (rows, columns): neither symmetric nor central."""
    rng = np.random.default_rng(seed)
    (width, height), (x, y), (a, b) = size, rng.uniform(0.3, 0.6, 2), rng.uniform(0.1, 0.25, 2)
    rows, columns = np.mgrid[:height, :width]
    return (((columns / width - x) / a) ** 2 + ((rows / height - y) / b) ** 2 < 1).astype(np.uint8)


def mask(path: Path, marked: NDArray[np.uint8], bilevel: bool = False) -> None:
    """White where it is marked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(marked * np.uint8(255))
    (image.convert("1") if bilevel else image).save(path, quality=100)


def ids(marked: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """As they are read: (columns, rows, 1)."""
    return marked.T[:, :, None]
