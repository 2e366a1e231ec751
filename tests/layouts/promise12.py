"""A miniature of PROMISE12: three training cases in two folders, and a test case that shares a name."""

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from medssl.tests.layouts._scan import Drawn, scan

TYPES = {"int16": "MET_SHORT", "uint8": "MET_UCHAR"}


def metaimage(path: Path, voxels: NDArray[Any], spacing_mm: tuple[float, ...] = (0.625, 0.625, 3.6)) -> None:
    """A MetaImage header and its raw file, x fastest; the axes of MetaImage point to the left, to the back and up."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".raw").write_bytes(voxels.tobytes(order="F"))
    lines = {
        "ObjectType": "Image",
        "NDims": 3,
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "-20 -30 5",
        "CenterOfRotation": "0 0 0",
        "AnatomicalOrientation": "RAI",
        "ElementSpacing": " ".join(map(str, spacing_mm)),
        "DimSize": " ".join(map(str, voxels.shape)),
        "ElementType": TYPES[voxels.dtype.name],
        "ElementDataFile": path.with_suffix(".raw").name,
    }
    path.write_text("".join(f"{key} = {value}\n" for key, value in lines.items()))


def write(root: Path) -> list[Drawn]:
    drawn = []
    for n, folder in ((0, "TrainingData_Part1"), (1, "TrainingData_Part1"), (49, "TrainingData_Part3")):
        image, label = scan(n, 2)
        metaimage(root / folder / f"Case{n:02d}.mhd", image)
        metaimage(root / folder / f"Case{n:02d}_segmentation.mhd", label)
        drawn.append(Drawn(f"Case{n:02d}", f"Case{n:02d}", label))
    metaimage(root / "test_data" / "Case00.mhd", scan(100, 2)[0])
    return [*drawn, Drawn("test_Case00", "test_Case00")]
