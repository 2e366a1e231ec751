"""Laws of reading a DICOM series: slices in their places, values as measured, and no volume out of what was not one."""

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")
from medssl.platform import formats  # noqa: E402
from medssl.platform.errors import Problem  # noqa: E402

rng = np.random.default_rng(0)
AXES = np.array([[0.8, 0.6, 0.0], [-0.6, 0.8, 0.0]])  # turned about the body's axis
NORMAL, ORIGIN = np.cross(*AXES), np.array([10.0, -20.0, 30.0])
SPACING = (0.5, 0.75, 3.0)  # between rows, columns, slices


def slices(folder, count=5, seed=0, **said):
    """A CT series whose file names do not follow its places; returns stored values (slices, rows, columns) by place."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    folder.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 4096, (count, 6, 4)).astype(np.uint16)
    for k in range(count):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = CTImageStorage
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        data.PatientName, data.PatientID, data.SeriesInstanceUID, data.SeriesNumber = "Doe^Jane", "MRN-4711", "1.2.3", 7
        data.Rows, data.Columns = 6, 4
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation, data.SamplesPerPixel = 16, 12, 11, 0, 1
        data.PhotometricInterpretation = "MONOCHROME2"
        data.ImageOrientationPatient = AXES.ravel().tolist()
        data.ImagePositionPatient = (ORIGIN + k * SPACING[2] * NORMAL).tolist()
        data.PixelSpacing, data.SliceThickness = list(SPACING[:2]), 2.0
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        data.PixelData = values[k].tobytes()
        for name, value in said.items():
            setattr(data, name, value(k) if callable(value) else value)
        data.save_as(folder / f"{(k * 7) % 11:02d}{seed}.dcm", enforce_file_format=True)
    return values


def refused(path):
    with pytest.raises(Problem) as caught:
        formats.read(path)
    return caught.value.what


def test_slices_lie_where_the_standard_says(tmp_path):
    """The equation of PS3.3 C.7.6.2.1.1, voxel by voxel, and SimpleITK's reader."""
    values = slices(tmp_path)
    array, affine = formats.read(tmp_path)
    assert array.dtype == np.int16
    assert np.array_equal(array, values.transpose(2, 1, 0).astype(int) - 1024)
    for column, row, k in np.ndindex(4, 6, 5):
        world = ORIGIN + AXES[0] * SPACING[1] * column + AXES[1] * SPACING[0] * row + k * SPACING[2] * NORMAL
        assert np.allclose(affine @ [column, row, k, 1], [*(world * [-1, -1, 1]), 1])
    sitk = pytest.importorskip("SimpleITK")
    sitk.ProcessObject.GlobalWarningDisplayOff()
    expected = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path)))
    assert np.array_equal(sitk.GetArrayFromImage(expected).T, array)
    assert np.allclose(expected.GetSpacing(), np.linalg.norm(affine[:3, :3], axis=0))


def test_values_are_rescaled_slice_by_slice_and_negatives_turned(tmp_path):
    values = slices(tmp_path / "pet", RescaleSlope=lambda k: 0.5 + k, RescaleIntercept=3)
    expected = values * (0.5 + np.arange(5)[:, None, None]) + 3
    assert np.allclose(formats.read(tmp_path / "pet")[0], expected.transpose(2, 1, 0))
    values = slices(tmp_path / "negative", PhotometricInterpretation="MONOCHROME1", RescaleIntercept=0)
    assert np.array_equal(formats.read(tmp_path / "negative")[0], 4095 - values.astype(int).transpose(2, 1, 0))


def test_the_series_of_a_folder_are_told_apart(tmp_path):
    first = slices(tmp_path, seed=1, SeriesInstanceUID="1.2.1", SeriesNumber=1)
    second = slices(tmp_path, seed=2, SeriesInstanceUID="1.2.2", SeriesNumber=2)
    (tmp_path / "notes.txt").write_text("no image")
    assert refused(tmp_path).startswith("holds 2 series, 1 (5 files), 2 (5 files); expected one")
    for values, seed in ((first, 1), (second, 2)):
        assert np.array_equal(formats.read(tmp_path / f"00{seed}.dcm")[0], values.transpose(2, 1, 0).astype(int) - 1024)


def test_a_multi_frame_object_is_a_volume(tmp_path):
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    slices(tmp_path / "one", count=1)
    file = next((tmp_path / "one").iterdir())
    data = pydicom.dcmread(file)
    values = rng.integers(0, 4096, (3, 6, 4)).astype(np.uint16)
    groups = []
    for k in (2, 0, 1):
        group, position = Dataset(), Dataset()
        position.ImagePositionPatient = (ORIGIN + k * SPACING[2] * NORMAL).tolist()
        group.PlanePositionSequence = Sequence([position])
        groups.append(group)
    shared, axes, measures = Dataset(), Dataset(), Dataset()
    axes.ImageOrientationPatient, measures.PixelSpacing = AXES.ravel().tolist(), [0.5, 0.75]
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Sequence([axes]), Sequence([measures])
    data.PerFrameFunctionalGroupsSequence, data.SharedFunctionalGroupsSequence = Sequence(groups), Sequence([shared])
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(data, name)
    data.NumberOfFrames, data.PixelData = 3, values[[2, 0, 1]].tobytes()
    data.save_as(file)
    array, affine = formats.read(tmp_path / "one")
    assert np.array_equal(array, values.transpose(2, 1, 0).astype(int) - 1024)
    assert np.allclose(np.linalg.norm(affine[:3, :3], axis=0), [0.75, 0.5, 3.0])
    del data.PerFrameFunctionalGroupsSequence
    data.save_as(file)
    assert "3 frames without a place for each: a film" in refused(tmp_path / "one")


def at(place):
    return lambda k: (ORIGIN + place(k)).tolist()


BAD = {
    "gap": (
        {"ImagePositionPatient": at(lambda k: (k + 2 * (k > 2)) * 3.0 * NORMAL)},
        r"about 2 slices are missing between 03\w+\.dcm",
    ),
    "twice": ({"ImagePositionPatient": at(lambda k: min(k, 3) * 3.0 * NORMAL)}, "lie at the same place"),
    "uneven": ({"ImagePositionPatient": at(lambda k: (k + 0.3 * (k == 2)) * 3.0 * NORMAL)}, r"2\.1 to 3\.9 mm apart"),
    "tilt": ({"ImagePositionPatient": at(lambda k: k * (3.0 * NORMAL + AXES[1]))}, r"a gantry tilted by 18\.4 degrees"),
    "turned": ({"ImageOrientationPatient": lambda k: [1, 0, 0, 0, 1, 0] if k else [0, 1, 0, 0, 0, 1]}, "is not that of"),
    "size": ({"PixelSpacing": lambda k: [0.5, 0.75 + k]}, "its size, pixel spacing or plane is not that of"),
    "colour": ({"PhotometricInterpretation": "RGB"}, "its pixels are RGB; expected MONOCHROME1 or 2"),
    "place": ({"ImagePositionPatient": None}, "says no position, orientation or pixel spacing"),
    "slope": ({"RescaleSlope": 0}, "its geometry or scaling is no finite number"),
    "huge": ({"Rows": 65535, "Columns": 65535}, "claims 65535 x 65535 x 5 voxels"),
    "short": ({"Rows": 60}, "its pixels cannot be read"),
    "bomb": ({"Rows": 9000, "Columns": 9000}, "which a file of"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_volume_is_refused(tmp_path, name):
    import re

    said, what = BAD[name]
    slices(tmp_path, **said)
    assert re.search(what, refused(tmp_path))


def test_a_folder_of_pictures_labels_a_series_in_the_order_of_its_file_names(tmp_path):
    """As CHAOS keeps them: one PNG per DICOM file, and nothing but the names says which is which."""
    from PIL import Image

    from medssl.platform import scans
    from medssl.platform.records import Case, DataInfo

    slices(tmp_path / "images")
    truth = rng.integers(0, 2, (5, 6, 4)).astype(np.uint8)  # by place
    files = sorted(file.name for file in (tmp_path / "images").iterdir())
    (tmp_path / "labels").mkdir()
    for k in range(5):
        number = files.index(f"{(k * 7) % 11:02d}0.dcm")
        Image.fromarray(truth[k] * 255).save(tmp_path / "labels" / f"label_{number}.png")
    info = DataInfo("toy", ("background", "liver"), label_values={0: 0, 255: 1})
    _, _, ids = scans.read_case(Case("p", "v", (tmp_path / "images",), tmp_path / "labels"), info)
    assert np.array_equal(ids, truth.transpose(2, 1, 0))


def test_a_mutated_series_is_read_or_refused(tmp_path):
    slices(tmp_path, count=3)
    wholes = {file: file.read_bytes() for file in tmp_path.iterdir()}
    outcomes, sentences = {True: 0, False: 0}, []
    for _ in range(60):
        for file, whole in wholes.items():
            content = bytearray(whole)
            for place in rng.integers(0, len(whole), 2):
                content[place] = rng.integers(0, 256)
            file.write_bytes(content[: rng.integers(1, len(whole))] if rng.random() < 0.05 else content)
        try:
            formats.read(tmp_path)
        except Problem as problem:
            sentences.append(str(problem))
            outcomes[False] += 1
        else:
            outcomes[True] += 1
    assert min(outcomes.values()) > 3
    assert not any("\n" in sentence for sentence in sentences)
