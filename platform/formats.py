"""One file or folder of a scan, whatever its format: voxels (x, y, z[, channel]) and the affine to millimetres, RAS+.

    .nii .nii.gz                        NIfTI 1 and 2
    .png .jpg .jpeg .bmp .tif .tiff     a picture: one slice, of one or three channels
    .mhd .mha .nrrd .nhdr               MetaImage and NRRD, by SimpleITK (extra [itk])
    .dcm .ima, or "DICM" at byte 128    DICOM: the whole series of the file, in its folder (extra [dicom]; dicom.py)
    a folder                            one DICOM series, or pictures: a stack in the order of their names

A picture says nothing of millimetres: a pixel counts as 1 mm, its columns run to the patient's left and its rows to the back,
which `data show` turns back upright. Rotation by EXIF is applied. Bilevel pictures hold 0 and 255; palettes of greys are greys,
palettes of colours are class ids in labels and refused as images, as are partly transparent pixels and 16 bits per colour.

Nothing is allocated on the word of a header: what it asks for is bounded by MAX_VALUES and by MAX_RATIO times the file's size.
"""

import io
import math
import re
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medssl.platform import dicom
from medssl.platform.errors import Problem

if TYPE_CHECKING:
    from PIL.Image import Image

Scan = tuple[NDArray[Any], NDArray[np.float64]]

NIFTI = (".nii.gz", ".nii")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
ITK = (".mhd", ".mha", ".nrrd", ".nhdr")
DICOM = (".dcm", ".ima")
ENDINGS = (*NIFTI, *PICTURES, *ITK, *DICOM)
MAX_VALUES = 1 << 30  # of one file: four times a CT of 512 x 512 x 1024
MAX_RATIO = 1032  # no DEFLATE stream holds more than this times its size; what claims more is no scan
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def ending(path: Path) -> str:
    """The file's ending in small letters, `.nii.gz` whole; empty where it is none that is read."""
    return next((ending for ending in ENDINGS if path.name.lower().endswith(ending)), "")


def stem(path: Path) -> str:
    """`case_1.nii.gz` -> `case_1`; of a folder its name."""
    return path.name[: len(path.name) - len(ending(path))]


def is_scan(path: Path) -> bool:
    """Whether `read` knows the file's ending or finds the mark of DICOM in it; hidden files are none (macOS leaves `._x`)."""
    return not path.name.startswith(".") and path.is_file() and (bool(ending(path)) or dicom.is_marked(path))


def members(path: Path) -> list[Path]:
    """The files that `read` may open for `path`."""
    kind = ending(path)
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    if kind in ITK:
        return [path, *(file for file in [path.with_suffix(".raw"), path.with_suffix(".zraw")] if file.is_file())]
    return sorted(path.parent.iterdir()) if kind in DICOM else [path]


def read(path: Path, *, ids: bool = False) -> Scan:
    """Voxels as stored (float32 where a header scales them) and affine. Raises Problem with the reason.

    ids    the file is a label: the colours of a palette stand for the numbers in it
    """
    kind = ending(path)
    if is_stack(path):
        array, affine = read_stack(path, ids=ids)
    elif path.is_dir() or kind in DICOM or (not kind and dicom.is_marked(path)):
        array, affine = dicom.read_series(path, MAX_VALUES, MAX_RATIO)
    elif kind in PICTURES:
        array, affine = read_picture(path, ids=ids)
    else:
        array, affine = read_itk(path) if kind in ITK else read_nifti(path)
    if array.dtype.kind not in "iufb":
        raise Problem(path, f"its voxels are {array.dtype}, expected real numbers; export one number per voxel")
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if not np.isfinite(affine).all():
        raise Problem(path, "its affine holds NaN or infinity; export it again")
    return array.astype(np.float32) if array.dtype == np.float64 else array, affine


def is_stack(path: Path) -> bool:
    """Whether it is a folder of pictures."""
    inside = [file for file in path.iterdir() if not file.name.startswith(".")] if path.is_dir() else []
    return bool(inside) and all(ending(file) in PICTURES for file in inside)


def in_order_of(series: Path, stack: NDArray[Any]) -> NDArray[Any]:
    """Slices (x, y, z) that are in the order of a DICOM series' file names, put into the order of its places."""
    files = dicom.files_by_place(series)
    rank = {file: place for place, file in enumerate(sorted(files, key=natural))}
    return stack[:, :, [rank[file] for file in files]]


def plausible(path: Path, shape: tuple[int, ...], value_bytes: int, file_bytes: int) -> int:
    """Bytes of the values. Raises Problem where no file of that size holds them, or the bound does not."""
    values = math.prod(map(int, shape))
    if min(shape, default=0) < 1 or values > MAX_VALUES:
        raise Problem(
            path, f"its header claims the shape {shape}; expected 1 to {MAX_VALUES} values; export it again, or split it"
        )
    if values * value_bytes > MAX_RATIO * file_bytes:
        raise Problem(
            path, f"its header claims the shape {shape}, which a file of {file_bytes} bytes cannot hold; copy it again"
        )
    return values * value_bytes


# ---------------------------------------------------------------------------------------------------------------------- NIfTI


def gunzip(raw: bytes, most: int) -> bytes:
    """What a gzip file holds, checksums tested. Raises isal_zlib.error or EOFError; ValueError where it is more than `most`."""
    from isal import isal_zlib  # half the time of zlib

    pieces, left = [], most
    while raw:
        member = isal_zlib.decompressobj(31)
        pieces.append(member.decompress(raw, left + 1))
        left -= len(pieces[-1])
        if left < 0:
            raise ValueError(f"it unpacks to more than {most} bytes, which its header does not account for")
        if not member.eof:
            raise EOFError("ended before the end-of-stream marker was reached")
        raw = member.unused_data.lstrip(b"\0")
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def read_nifti(path: Path) -> Scan:
    """NIfTI, packed or not."""
    import nibabel
    from isal import isal_zlib

    try:
        raw = path.read_bytes()
        packed = raw[:2] == b"\x1f\x8b" or path.name.lower().endswith(".gz")
        head = zlib.decompressobj(31).decompress(raw[: 1 << 17], 540) if packed else raw[:540]
        kind = next(
            (kind for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image) if kind.header_class.may_contain_header(head)), None
        )
        if kind is None:
            raise ValueError("no NIfTI header")
        header = kind.header_class.from_fileobj(io.BytesIO(head), check=False)
        size = plausible(path, header.get_data_shape(), header.get_data_dtype().itemsize, len(raw))
        if packed:
            raw = gunzip(raw, max(header.get_data_offset(), 0) + size + (1 << 20))
        image = kind.from_bytes(raw)
        voxels: Any = image.dataobj
        if (voxels.slope, voxels.inter) != (1, 0):
            return np.asanyarray(voxels), image.affine
        plain = np.frombuffer(raw, voxels.dtype, math.prod(voxels.shape), voxels.offset)  # where it is, without a copy
        return plain.reshape(voxels.shape, order="F"), image.affine
    except Problem:
        raise
    except (EOFError, zlib.error, isal_zlib.error) as error:  # type: ignore[misc]  # its stub has an instance
        raise Problem(path, f"its gzip stream is cut short or damaged ({error}); copy the file again") from error
    except Exception as error:  # a parser of bytes that may be anything may raise anything
        raise Problem(
            path, f"not a whole NIfTI file ({_reason(error)}); expected .nii or .nii.gz; export or copy it again"
        ) from error


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0].strip() if str(error).strip() else type(error).__name__


# ------------------------------------------------------------------------------------------------------------------- pictures


def read_picture(path: Path, *, ids: bool = False) -> Scan:
    """A picture as one slice: (columns, rows, 1) or (columns, rows, 1, 3), and the affine of an upright picture."""
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # over Pillow's bound, 89 million pixels
        try:
            with Image.open(path, formats=("PNG", "JPEG", "BMP", "TIFF")) as image:
                if path.suffix.lower().startswith(".tif") and getattr(image, "n_frames", 1) > 1:
                    raise Problem(path, "a TIFF of several pages; expected one picture; save each page as a file of its own")
                if image.mode in ("RGB", "RGBA", "LA") and any(";16" in str(tile.args) for tile in image.tile):
                    raise Problem(path, "16 bits per colour, which would be cut to 8; save it with 8 bits per colour")
                array = pixels(path, image if image.getexif().get(274, 1) == 1 else ImageOps.exif_transpose(image), ids)
        except Problem:
            raise
        except Exception as error:  # as for NIfTI
            raise Problem(
                path, f"not a whole picture ({_reason(error)}); expected PNG, JPEG, BMP or TIFF; copy it again"
            ) from error
    return np.swapaxes(array, 0, 1)[:, :, None], LPS.copy()


def pixels(path: Path, image: "Image", ids: bool) -> NDArray[Any]:
    """(rows, columns) or (rows, columns, 3). Raises Problem where the picture's mode has no one meaning."""
    if "transparency" in image.info and not ids:
        raise Problem(path, "some of its colours are transparent; save it without transparency")
    if image.mode in ("LA", "RGBA"):
        array = np.asarray(image)
        if (array[..., -1] < 255).any():
            raise Problem(path, "some of its pixels are transparent; save it without an alpha channel")
        return array[..., 0] if image.mode == "LA" else array[..., :3]
    if image.mode == "P":
        palette = np.reshape(image.getpalette("RGB") or [], (-1, 3)).astype(np.uint8)
        index = np.asarray(image)
        used = palette[: int(index.max()) + 1]
        if len(used) > index.max() and (used == used[:, :1]).all():
            return used[:, 0][index]
        if not ids:
            raise Problem(path, "its pixels are numbers of a palette of colours; save it as RGB")
        return index
    if image.mode == "1":
        return np.asarray(image.convert("L"))
    if image.mode not in ("L", "RGB", "I", "F") and not image.mode.startswith("I;16"):
        raise Problem(path, f"its pixels are {image.mode}; expected grey or RGB; save it as one of them")
    return np.asarray(image)


def natural(path: Path) -> list[Any]:
    """A key that sorts `slice10` behind `slice9`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", path.name)]


def read_stack(path: Path, *, ids: bool = False) -> Scan:
    """The pictures of a folder, one above the other in the order of their names (2 before 10): (columns, rows, slices[, 3])."""
    files = sorted((file for file in path.iterdir() if ending(file) in PICTURES and not file.name.startswith(".")), key=natural)
    slices: list[NDArray[Any]] = []
    for file in files:
        array, _ = read_picture(file, ids=ids)
        if slices and (array.shape != slices[0].shape or array.dtype != slices[0].dtype):
            raise Problem(
                file,
                f"{array.shape} {array.dtype}, unlike {files[0].name}, {slices[0].shape} {slices[0].dtype}; mend the stack",
            )
        slices.append(array)
        if len(files) * array.size > MAX_VALUES:
            raise Problem(
                path, f"a stack of {len(files)} pictures of {array.size} values; expected at most {MAX_VALUES}; split it"
            )
    return np.concatenate(slices, axis=2), LPS.copy()


# --------------------------------------------------------------------------------------------------------- MetaImage and NRRD


def read_itk(path: Path) -> Scan:
    """MetaImage or NRRD, by SimpleITK; its axes are LPS."""
    try:
        import SimpleITK
    except ImportError:
        raise Problem(path, 'SimpleITK reads this format and is not installed: pip install "medssl[itk]"') from None
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    SimpleITK.ProcessObject.GlobalWarningDisplayOff()
    try:
        reader.ReadImageInformation()
        shape = (*reader.GetSize(), reader.GetNumberOfComponents())
        plausible(path, shape, 1, sum(file.stat().st_size for file in members(path)))
        image = reader.Execute()
    except Problem:
        raise
    except Exception as error:  # as for NIfTI
        what = str(error).strip().splitlines()[-1] if str(error).strip() else "no reason given"
        raise Problem(path, f"not a whole MetaImage or NRRD file ({what.strip()}); export or copy it again") from error
    if image.GetDimension() not in (2, 3, 4):
        raise Problem(path, f"{image.GetDimension()}D; expected 2, 3 or 4 dimensions; export it again")
    array = SimpleITK.GetArrayFromImage(image)
    channels = image.GetNumberOfComponentsPerPixel() > 1
    array = np.moveaxis(array.T, 0, -1) if channels else array.T  # x runs fastest in ITK's memory
    n = image.GetDimension()
    if n == 2:
        array = np.expand_dims(array, 2)
    affine, k = np.eye(4), min(n, 3)
    affine[:k, :k] = np.reshape(image.GetDirection(), (n, n))[:k, :k] * image.GetSpacing()[:k]
    affine[:k, 3] = image.GetOrigin()[:k]
    return array, LPS @ affine
