"""Laws of reading files: every format gives the same voxels in one place; bombs, and what has no one meaning, are refused."""

import gzip
import struct
import zlib

import nibabel
import numpy as np
import pytest
from PIL import Image

from medssl.platform import formats
from medssl.platform.errors import Problem

rng = np.random.default_rng(0)
AFFINE = np.array([[0, -0.7, 0, 5], [0.9, 0, 0, -3], [0, 0, 2.5, 11], [0, 0, 0, 1.0]])


def refused(path, **how):
    with pytest.raises(Problem) as caught:
        formats.read(path, **how)
    assert "\n" not in str(caught.value)
    return caught.value.what


@pytest.mark.parametrize("ending", [".mha", ".mhd", ".nrrd", ".nii.gz"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_volume_format_gives_the_voxels_and_the_place_that_nibabel_gives(tmp_path, ending, packed):
    sitk = pytest.importorskip("SimpleITK")
    source = tmp_path / "source.nii"
    nibabel.Nifti1Image(rng.integers(-900, 900, (6, 5, 4)).astype(np.int16), AFFINE).to_filename(source)
    path = tmp_path / f"case{ending}"
    sitk.WriteImage(sitk.ReadImage(str(source)), str(path), useCompression=packed)
    array, affine = formats.read(path)
    expected = nibabel.load(source)
    assert np.array_equal(array, np.asanyarray(expected.dataobj))
    assert np.allclose(affine, expected.affine, atol=1e-5)
    assert (formats.stem(path), formats.is_scan(path)) == ("case", True)
    path.write_bytes(path.read_bytes()[:-40])
    if ending != ".mhd" and packed:
        refused(path)


def test_a_picture_is_one_upright_slice_with_its_channels_last(tmp_path):
    colour = rng.integers(0, 256, (5, 7, 3)).astype(np.uint8)
    for ending in (".png", ".bmp", ".tif"):
        Image.fromarray(colour).save(tmp_path / f"a{ending}")
        array, affine = formats.read(tmp_path / f"a{ending}")
        assert array.shape == (7, 5, 1, 3)
        assert np.array_equal(array[:, :, 0].swapaxes(0, 1), colour)
        assert np.array_equal(affine, np.diag([-1, -1, 1, 1]))
    from medssl.platform import geometry, montage

    preset = geometry.Preset(None, (-1.0, 255.0), None, foreground_box=False, pad=0, dtype="float16")
    prepared = geometry.prepare(np.moveaxis(array, -1, 0), affine, None, preset)
    shown = montage.radiological(prepared.image[0, :, :, 0].astype(np.float32) * 256 - 1)
    assert np.abs(shown - colour[..., 0]).max() < 0.2  # as it was taken


def test_grey_levels_survive_whatever_the_mode(tmp_path):
    mask = rng.random((5, 7)) < 0.5

    def read(image, ids=False, **how):
        image.save(tmp_path / "a.png", **how)
        return formats.read(tmp_path / "a.png", ids=ids)[0][:, :, 0].T

    deep = rng.integers(0, 1 << 16, (5, 7)).astype(np.uint16)
    assert np.array_equal(read(Image.fromarray(deep)), deep)
    assert np.array_equal(read(Image.fromarray(mask)), mask * 255)  # one bit
    grey = Image.new("P", (7, 5))
    grey.putdata([int(value) for value in mask.ravel()])
    grey.putpalette([0, 0, 0, 255, 255, 255])
    assert np.array_equal(read(grey), mask * 255)
    grey.putpalette([0, 0, 0, 255, 0, 0])
    assert np.array_equal(read(grey, ids=True), mask)
    assert refused(tmp_path / "a.png") == "its pixels are numbers of a palette of colours; save it as RGB"
    opaque = Image.fromarray(np.dstack([np.stack([mask * 9] * 3, -1), np.full((5, 7), 255)]).astype(np.uint8))
    assert np.array_equal(read(opaque), np.stack([mask * 9] * 3))  # .T of (columns, rows, 3)
    opaque.putalpha(9)
    opaque.save(tmp_path / "b.png")
    assert refused(tmp_path / "b.png").startswith("some of its pixels are transparent")
    Image.fromarray(np.zeros((5, 7, 4), np.uint8), "CMYK").save(tmp_path / "c.jpg")
    assert refused(tmp_path / "c.jpg") == "its pixels are CMYK; expected grey or RGB; save it as one of them"


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("L", (6, 4))
    image.putdata(list(range(24)))
    tags = image.getexif()
    tags[274] = 6  # to be shown turned by 90 degrees, clockwise
    image.save(tmp_path / "a.png", exif=tags)
    array, _ = formats.read(tmp_path / "a.png")
    assert np.array_equal(array[:, :, 0].T, np.rot90(np.arange(24).reshape(4, 6), -1))


def test_pages_and_deep_colours_are_refused(tmp_path):
    page = Image.new("L", (4, 4))
    page.save(tmp_path / "a.tif", save_all=True, append_images=[page])
    assert refused(tmp_path / "a.tif").startswith("a TIFF of several pages")

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows = b"".join(b"\0" + bytes(6 * 4) for _ in range(4))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    assert refused(tmp_path / "b.png").startswith("16 bits per colour, which would be cut to 8")
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0))
    (tmp_path / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    assert "decompression bomb" in refused(tmp_path / "c.png")


def test_a_stack_of_pictures_is_in_the_order_of_its_numbers(tmp_path):
    (tmp_path / "stack").mkdir()
    for number in (1, 2, 10):
        Image.new("L", (3, 4), number).save(tmp_path / "stack" / f"slice{number}.png")
    array, _ = formats.read(tmp_path / "stack")
    assert (array.shape, array[0, 0].tolist()) == ((3, 4, 3), [1, 2, 10])
    Image.new("L", (4, 4)).save(tmp_path / "stack" / "slice3.png")
    assert "unlike slice1.png" in refused(tmp_path / "stack")


def bomb(shape, body=b"", dtype=4):
    """A NIfTI file of a few bytes whose header claims the shape."""
    header = nibabel.Nifti1Header()
    header["dim"][: len(shape) + 1] = [len(shape), *shape]
    header["datatype"], header["bitpix"], header["vox_offset"], header["magic"] = dtype, 16, 352, b"n+1"
    return header.binaryblock + bytes(4) + body


def test_what_no_file_can_hold_is_refused_before_it_is_allocated(tmp_path):
    path = tmp_path / "a.nii.gz"
    for shape, said in (
        ((32767, 32767, 32767), "its header claims the shape"),
        ((512, 512, 1000), "which a file of"),
        ((512, 0, 3), "expected 1 to"),
        ((512, -4, 3), "expected 1 to"),
    ):
        for content in (gzip.compress(bomb(shape)), bomb(shape)):
            path = tmp_path / ("a.nii.gz" if content[:2] == b"\x1f\x8b" else "a.nii")
            path.write_bytes(content)
            assert said in refused(path)
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(bomb((4, 4, 4), bytes(64 << 20))))
    assert "which its header does not account for" in refused(path)


def test_damage_at_any_byte_is_read_or_refused_and_never_raises_anything_else(tmp_path):
    """Fuzzing in small; every reader ends in arrays or in one sentence."""
    image = Image.fromarray(rng.integers(0, 256, (9, 8, 3)).astype(np.uint8))
    nibabel.Nifti1Image(rng.integers(0, 9, (6, 5, 4)).astype(np.int16), AFFINE).to_filename(tmp_path / "a.nii")
    wholes = {".nii": (tmp_path / "a.nii").read_bytes()}
    wholes[".nii.gz"] = gzip.compress(wholes[".nii"])
    for ending in (".png", ".jpg", ".bmp", ".tif"):
        image.save(tmp_path / f"a{ending}")
        wholes[ending] = (tmp_path / f"a{ending}").read_bytes()
    outcomes, sentences = {True: 0, False: 0}, []
    for ending, whole in wholes.items():
        for _ in range(60):
            content = bytearray(whole)
            for place in rng.integers(0, min(len(whole), 400), 4):
                content[place] = rng.integers(0, 256)
            path = tmp_path / f"b{ending}"
            path.write_bytes(content[: rng.integers(1, len(whole) + 1)] if rng.random() < 0.3 else content)
            try:
                array, affine = formats.read(path)
            except Problem as problem:
                sentences.append(str(problem))
                outcomes[False] += 1
            else:
                assert affine.shape == (4, 4)
                assert array.size <= formats.MAX_VALUES
                outcomes[True] += 1
    assert min(outcomes.values()) > 30
    assert not any("\n" in sentence for sentence in sentences)
