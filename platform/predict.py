"""Segment scans; each answer lies in its input's own voxel grid: NIfTI under the scan's header, pictures as pictures."""

import gzip
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medssl.platform import atomic, formats, geometry, scans
from medssl.platform.errors import RunError, UsageError
from medssl.platform.evaluate import infer
from medssl.platform.records import Case, DataInfo, Volume


def predict(
    network: nn.Module,
    classes: Sequence[str],
    preset: geometry.Preset,
    files: Sequence[Path],
    out: Path,
    *,
    side: int | None,
    overlap: float = 0.25,
    spatial_dims: int = 2,
    channels: int = 1,
    progress: Callable[[str], None],
) -> list[Path]:
    """Write uint8 class ids as `out`/<name>.nii.gz, of a picture as <name>.png, for every volume in `files`; returns the files.

    classes    k names, the background first
    preset     how the training data were prepared
    files      one per volume, in any format of `formats.py`; or one per channel, named <name>_0000.nii.gz, <name>_0001.…, …
    side       of the sliding window, in pixels; None: whole slices
    overlap    of neighbouring windows, a fraction of `side`
    spatial_dims  of the network: it reads slices (2) or volumes (3)
    channels   that the network takes
    progress   receives a line per volume: what became of it, and the millilitres of each class

    A volume that fails does not stop the others. Raises UsageError, before anything is written, when the files do not
    make whole volumes or an answer would replace an input; RunError at the end, naming what failed and why.
    """
    volumes = group(files, channels)
    pictures = {name: formats.ending(parts[0]) in formats.PICTURES for name, parts in volumes.items()}
    answers = {name: out / f"{name}{'.png' if pictures[name] else '.nii.gz'}" for name in volumes}
    for answer in answers.values():
        if any(answer.exists() and file.exists() and answer.samefile(file) for file in files):
            raise UsageError(f"{answer} is an input and would be overwritten; choose another folder with --out")
    info = DataInfo("prediction", tuple(classes), channels=("image",) * channels)
    failures = []
    for name, parts in volumes.items():
        try:
            labels, affine = _segment(network, Case(name, name, tuple(parts)), info, preset, side, overlap, spatial_dims)
            if pictures[name]:
                _write_picture(answers[name], labels)
                progress(f"{name}: " + _shares(labels, classes))
                continue
            voxel_ml = _write(answers[name], labels, parts[0], affine)
        except RunError as error:
            failures.append(str(error))
            progress(f"{name}: failed: {error}")
            continue
        amounts = np.bincount(labels.ravel(), minlength=len(classes)) * voxel_ml
        progress(f"{name}: " + ", ".join(f"{label} {ml:.1f} ml" for label, ml in zip(classes[1:], amounts[1:], strict=True)))
    if failures:
        raise RunError(f"{len(failures)} of {len(volumes)} volumes failed: {'; '.join(failures)}")
    return list(answers.values())


def group(files: Sequence[Path], channels: int) -> dict[str, list[Path]]:
    """The files of each volume, by its name, in the order of channels.

    A file is one of several channels when its name ends in _0000, _0001, … below `channels` (as nnU-Net names them).
    Raises UsageError when a file is no scan by its name, a channel is missing, or two volumes have one name.
    """
    volumes: defaultdict[str, dict[int | None, Path]] = defaultdict(dict)
    for file in files:
        named = re.fullmatch(r"(.+?)(?:_(\d{4}))?", formats.stem(file))
        if not named or not (formats.ending(file) or file.is_dir()):
            raise UsageError(f"{file} is no scan by its name; expected a folder of DICOM, or {', '.join(formats.ENDINGS)}")
        name, number = named[1], named[2]
        channel = int(number) if number and int(number) < channels else None
        if number and channel is None:  # a number, but not of a channel: part of the name
            name = f"{name}_{number}"
        if channel in volumes[name]:
            raise UsageError(f"{volumes[name][channel]} and {file} would both become {name}.nii.gz; predict them apart")
        volumes[name][channel] = file
    for name, parts in volumes.items():
        if set(parts) not in ({None}, set(range(channels))):
            given = ", ".join(path.name for path in parts.values())
            raise UsageError(
                f"{name}: the network takes {channels} channel(s) and was given {given}; "
                f"expected {name}_0000 to {name}_{channels - 1:04}, or one file that holds them all"
            )
    return {name: [parts[key] for key in sorted(parts, key=lambda key: key or 0)] for name, parts in volumes.items()}


def _segment(
    network: nn.Module,
    case: Case,
    info: DataInfo,
    preset: geometry.Preset,
    side: int | None,
    overlap: float,
    spatial_dims: int,
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Class ids (x, y, z) on the grid of the scan, which is read and checked as the training data were, and its affine."""
    image, affine = scans.read_image(case, info)
    try:
        prepared = geometry.prepare(image, affine, None, preset)
    except ValueError as error:
        raise RunError(f"{case.images[0]}: {error}") from error
    slices = torch.from_numpy(np.ascontiguousarray(np.moveaxis(prepared.image, -1, 0)))
    volume = Volume(case.patient, case.volume, slices, None, prepared.spacing_mm)
    predicted = infer(network, volume, side=side, overlap=overlap, spatial_dims=spatial_dims)
    labels = geometry.restore(predicted.cpu().numpy(), prepared.geometry)
    assert labels.shape == image.shape[1:]
    return labels, affine


def _write(path: Path, labels: NDArray[np.uint8], like: Path, affine: NDArray[np.float64]) -> float:
    """Labels under the scan's header: its affine, orientation codes and units; of other formats under a header of our own.

    Returns the millilitres of a voxel.
    """
    import nibabel

    scan = nibabel.load(like) if formats.ending(like) in formats.NIFTI else nibabel.Nifti1Image(labels, affine)
    assert isinstance(scan, nibabel.Nifti1Image), "read_image has read it"
    header = scan.header.copy()
    header.set_data_dtype(np.uint8)
    header["cal_min"] = header["cal_max"] = 0  # the scan's display window would show labels as black
    packed = gzip.compress(type(scan)(labels, scan.affine, header).to_bytes(), compresslevel=6, mtime=0)
    atomic.write(path, lambda file: file.write(packed))
    return math.prod(header.get_zooms()[:3]) / 1000


def _write_picture(path: Path, labels: NDArray[np.uint8]) -> None:
    """Class ids as the greys of a PNG, upright as its input is shown."""
    from PIL import Image

    atomic.write(path, lambda file: Image.fromarray(np.ascontiguousarray(labels[:, :, 0].T)).save(file, format="PNG"))


def _shares(labels: NDArray[np.uint8], classes: Sequence[str]) -> str:
    """How much of a picture each class covers: it has no millimetres."""
    part = np.bincount(labels.ravel(), minlength=len(classes)) / labels.size
    return ", ".join(f"{name} {share:.1%}" for name, share in zip(classes[1:], part[1:], strict=True))
