"""Predictions land on the right voxels of the input's own grid, whatever its axes, and broken files do not stop the others."""

import gzip
import itertools
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medssl.platform import predict
from medssl.platform.errors import RunError, UsageError
from medssl.platform.geometry import Preset

CT = Preset((1.0, 1.0, 2.5), (-500.0, 500.0), None, foreground_box=True, pad=16, dtype="int16")
AS_IT_IS = Preset(None, (-500.0, 500.0), None, foreground_box=True, pad=16, dtype="int16")
CLASSES = ("background", "tissue")


class Threshold(nn.Module):
    """Class 1 where the last channel is above 100 HU, as the presets above store it."""

    def forward(self, x: Tensor) -> Tensor:
        above = x[:, -1] - 0.6
        return torch.stack([-above, above], dim=1)


def scan(shape: tuple[int, int, int]) -> np.ndarray:
    """Air, a block of fat, and in it an L of tissue, by which every flip and transposition can be told."""
    image = np.full(shape, -1000, np.int16)
    image[2:-2, 3:-2, 1:-1] = -100
    x, y, z = shape
    image[4 : x // 2, 5:-4, 2 : z // 2] = 300
    image[4:-4, 5 : y // 3, 2:-3] = 300
    return image


def save(path: Path, image: np.ndarray, affine: np.ndarray) -> Path:
    nifti = nibabel.Nifti1Image(image, affine)
    nifti.set_qform(affine, code=1)
    nifti.set_sform(affine, code=4)
    nifti.header.set_xyzt_units("mm", "sec")
    nibabel.save(nifti, path)
    return path


def run(files: list[Path], out: Path, preset: Preset = AS_IT_IS, **changes) -> tuple[list[Path], list[str]]:
    lines: list[str] = []
    written = predict.predict(Threshold(), CLASSES, preset, files, out, side=None, progress=lines.append, **changes)
    return written, lines


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1), (-1, -1, 1)])
def test_every_voxel_keeps_its_place_under_flips_and_permutations(tmp_path, axes, signs):
    image = scan((20, 23, 14))
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, axes] * np.multiply(signs, (0.8, 1.1, 2.0))
    affine[:3, 3] = (10, -20, 30)
    (answer,), _ = run([save(tmp_path / "anna.nii.gz", image, affine)], tmp_path / "out")
    assert np.array_equal(np.asarray(nibabel.load(answer).dataobj), image > 100)


def test_resampling_there_and_back_moves_nothing_but_the_border(tmp_path):
    image = scan((44, 50, 31))
    affine = np.diag([-0.7, 0.8, 1.6, 1.0])
    (answer,), _ = run([save(tmp_path / "anna.nii.gz", image, affine)], tmp_path / "out", CT)
    labels, truth = np.asarray(nibabel.load(answer).dataobj) == 1, image > 100
    assert labels.shape == truth.shape
    assert 2 * (labels & truth).sum() / (labels.sum() + truth.sum()) > 0.9
    assert 2 * (labels[::-1] & truth).sum() / (labels.sum() + truth.sum()) < 0.8  # the L tells a flip


def test_the_answer_has_the_header_of_its_input(tmp_path):
    oblique = nibabel.affines.from_matvec(nibabel.eulerangles.euler2mat(0.2, 0.1, -0.1) * (0.9, 0.9, 3.0), (1.5, -7, 12))
    given = nibabel.load(save(tmp_path / "anna.nii.gz", scan((20, 23, 14)), oblique))
    (answer,), lines = run([tmp_path / "anna.nii.gz"], tmp_path / "out")
    found = nibabel.load(answer)
    assert found.get_data_dtype() == np.uint8
    assert found.shape == given.shape
    for form in ("sform", "qform"):
        assert int(found.header[f"{form}_code"]) == int(given.header[f"{form}_code"]) > 0
        np.testing.assert_array_equal(getattr(found, f"get_{form}")(), getattr(given, f"get_{form}")())
    assert found.header.get_xyzt_units() == ("mm", "sec")
    millilitres = (scan((20, 23, 14)) > 100).sum() * 0.9 * 0.9 * 3.0 / 1000
    assert lines == [f"anna: tissue {millilitres:.1f} ml"]


def test_scaled_and_four_dimensional_volumes_are_read_as_they_mean(tmp_path):
    image = scan((20, 23, 14))
    scaled = nibabel.Nifti1Image(image.astype(np.float32)[..., None], np.eye(4))  # a fourth dimension of one
    scaled.header.set_data_dtype(np.int16)
    scaled.header.set_slope_inter(2.0, 100.0)
    nibabel.save(scaled, tmp_path / "anna.nii")
    (answer,), _ = run([tmp_path / "anna.nii"], tmp_path / "out")
    assert answer.name == "anna.nii.gz"
    assert np.array_equal(np.asarray(nibabel.load(answer).dataobj), image > 100)


def test_channels_are_gathered_in_their_order(tmp_path):
    last = scan((20, 23, 14))
    first = np.arange(last.size, dtype=np.int16).reshape(last.shape) % 900
    files = [save(tmp_path / f"anna_000{channel}.nii.gz", image, np.eye(4)) for channel, image in ((1, last), (0, first))]
    (answer,), _ = run(files, tmp_path / "out", channels=2)
    assert answer.name == "anna.nii.gz"
    assert np.array_equal(np.asarray(nibabel.load(answer).dataobj), last > 100)
    together = save(tmp_path / "bert.nii.gz", np.stack([first, last], -1), np.eye(4))
    (answer,), _ = run([together], tmp_path / "out", channels=2)
    assert nibabel.load(answer).shape == last.shape


def test_a_picture_is_answered_by_a_picture_and_any_other_volume_by_nifti_in_its_place(tmp_path):
    from PIL import Image

    colour = np.random.default_rng(0).integers(0, 256, (11, 17, 3)).astype(np.uint8)
    Image.fromarray(colour).save(tmp_path / "skin.png")
    preset = Preset(None, (0.0, 255.0), None, foreground_box=False, pad=0, dtype="uint8")
    (answer,), (line,) = run([tmp_path / "skin.png"], tmp_path / "out", preset, channels=3)
    assert answer == tmp_path / "out" / "skin.png"
    with Image.open(answer) as labels:
        assert np.array_equal(np.asarray(labels), colour[..., 2] > 153)
    assert line == f"skin: tissue {(colour[..., 2] > 153).mean():.1%}"

    sitk = pytest.importorskip("SimpleITK")
    image, affine = scan((20, 23, 14)), np.diag([-0.8, 1.1, 2.0, 1.0])
    sitk.WriteImage(sitk.ReadImage(str(save(tmp_path / "bert.nii", image, affine))), str(tmp_path / "bert.mha"))
    (answer,), _ = run([tmp_path / "bert.mha"], tmp_path / "out")
    assert np.array_equal(np.asarray(nibabel.load(answer).dataobj), image > 100)
    assert np.allclose(nibabel.load(answer).affine, affine, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "channels", "groups"),
    [
        (["a_0000", "b_0000"], 1, {"a": ["a_0000"], "b": ["b_0000"]}),
        (["FLARE_0007", "FLARE_0008"], 1, {"FLARE_0007": ["FLARE_0007"], "FLARE_0008": ["FLARE_0008"]}),
        (["F_0007_0001", "F_0007_0000"], 2, {"F_0007": ["F_0007_0000", "F_0007_0001"]}),
        (["a", "b"], 2, {"a": ["a"], "b": ["b"]}),
    ],
)
def test_a_number_is_a_channel_only_where_the_network_has_that_channel(names, channels, groups):
    found = predict.group([Path(f"{name}.nii.gz") for name in names], channels)
    assert found == {name: [Path(f"{part}.nii.gz") for part in parts] for name, parts in groups.items()}


@pytest.mark.parametrize(
    ("names", "channels", "message"),
    [
        (["a_0001.nii.gz"], 2, "a: the network takes 2 channel.s. and was given a_0001.nii.gz; expected a_0000 to a_0001"),
        (["one/a.nii.gz", "two/a.nii"], 1, "would both become a.nii.gz"),
        (["a.doc"], 1, "a.doc is no scan by its name; expected a folder of DICOM, or .nii.gz, .nii"),
    ],
)
def test_files_that_make_no_volumes_are_refused_before_anything_runs(names, channels, message):
    with pytest.raises(UsageError, match=message):
        predict.group([Path(name) for name in names], channels)


@pytest.mark.parametrize("link", [False, True])
def test_an_input_is_never_overwritten(tmp_path, link):
    file = save(tmp_path / "anna.nii.gz", scan((20, 23, 14)), np.eye(4))
    out, before = tmp_path, file.read_bytes()
    if link:
        out = tmp_path / "elsewhere"
        out.symlink_to(tmp_path)
    with pytest.raises(UsageError, match="is an input and would be overwritten"):
        run([file], out)
    assert file.read_bytes() == before


def test_broken_files_are_named_and_the_others_still_run(tmp_path):
    image = scan((20, 23, 14))
    good = save(tmp_path / "good.nii.gz", image, np.eye(4))
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(good.read_bytes()[:-200])
    text = tmp_path / "text.nii"
    text.write_text("not a scan")
    nan = save(tmp_path / "nan.nii", np.where(image > 100, np.nan, image).astype(np.float32), np.eye(4))
    air = save(tmp_path / "air.nii", np.minimum(image, -500), np.eye(4))
    two = save(tmp_path / "two.nii", np.stack([image, image], -1), np.eye(4))
    flat = save(tmp_path / "flat.nii", image[..., 0], np.eye(4))
    lines: list[str] = []
    files = [cut, text, nan, air, two, flat, tmp_path / "missing.nii", good]
    with pytest.raises(RunError, match="7 of 8 volumes failed") as caught:
        predict.predict(Threshold(), CLASSES, AS_IT_IS, files, tmp_path / "out", side=None, progress=lines.append)
    for file, reason in {
        cut: "its gzip stream is cut short",
        text: "not a whole NIfTI file",
        nan: "voxels are NaN or infinite",
        air: "no voxel lies above",
        two: "4D where 3D is meant",
        flat: "2D where 3D is meant",
        tmp_path / "missing.nii": "No such file",
    }.items():
        assert re.search(f"{re.escape(str(file))}: [^;]*{reason}", str(caught.value))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.nii.gz"]
    assert len(lines) == 8
    assert gzip.decompress((tmp_path / "out" / "good.nii.gz").read_bytes())


def test_channels_on_different_grids_are_refused(tmp_path):
    image = scan((20, 23, 14))
    files = [save(tmp_path / f"anna_000{channel}.nii", image, np.diag([1.0 + channel, 1, 1, 1])) for channel in (0, 1)]
    with pytest.raises(RunError, match=r"anna_0001.nii: its grid is not that of anna_0000.nii"):
        run(files, tmp_path / "out", channels=2)
