"""Volumes per second from NIfTI files to stored slices, against the CT study's own preprocessing in MONAI.

Generated CT-like volumes, gzip-compressed, oriented LPS so that both sides have to turn them. Ours: all of `ingest.prepare`,
checks, hashes and shuffling included, with two processes, their start counted. The rival: one process, the study's transforms
in its order, every slice written as .npy, which is cheaper than its PNGs.
"""

import tempfile
import time
from pathlib import Path

import numpy as np

from medssl.platform import atomic, ingest
from medssl.platform.bench import Row
from medssl.platform.geometry import PRESETS

VOLUMES = 6
SHAPE = (256, 256, 60)
SPACING_MM = (1.4, 1.4, 3.0)


def write_scans(root: Path) -> list[Path]:
    """A folder in the Decathlon form: elliptic bodies with two organs, noise, and air around."""
    import nibabel

    affine = np.diag([-SPACING_MM[0], -SPACING_MM[1], SPACING_MM[2], 1.0])
    axes = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in SHAPE)]
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    images = []
    for number in range(VOLUMES):
        rng = np.random.default_rng(number)
        body = (axes[0] / 0.8) ** 2 + (axes[1] / 0.6) ** 2 + 0 * axes[2] < 1
        organs = [(axes[0] - x) ** 2 + axes[1] ** 2 + axes[2] ** 2 < r**2 for x, r in ((-0.3, 0.35), (0.4, 0.2))]
        hu = np.where(body, 20.0, -1000.0) + 60 * organs[0] + 100 * organs[1] + rng.normal(0, 15, SHAPE)
        label = (organs[0] + 2 * organs[1]).astype(np.uint8)
        images.append(root / "imagesTr" / f"case_{number}.nii.gz")
        nibabel.Nifti1Image(hu.astype(np.int16), affine).to_filename(images[-1])
        nibabel.Nifti1Image(label, affine).to_filename(root / "labelsTr" / f"case_{number}.nii.gz")
    labels = {"0": "background", "1": "large", "2": "small"}
    atomic.write_json(root / "dataset.json", {"name": "bench", "modality": {"0": "CT"}, "labels": labels})
    return images


def with_monai(images: list[Path], out: Path) -> None:
    """The CT study's preprocessing scripts, one volume after another."""
    from monai import transforms as mt

    both, preset = ["image", "label"], PRESETS["ct"]
    assert preset.window is not None
    chain = mt.Compose(
        [
            mt.LoadImaged(both),
            mt.EnsureChannelFirstd(both),
            mt.Orientationd(both, axcodes="RAS", labels=None),
            mt.Spacingd(both, pixdim=(1.0, 1.0, 2.5), mode=("bilinear", "nearest")),
            mt.ScaleIntensityRanged("image", *preset.window, 0.0, 1.0, clip=True),
            mt.CropForegroundd(both, source_key="image", allow_smaller=False),
            mt.SpatialPadd(both, (preset.pad, preset.pad, -1)),
        ]
    )
    out.mkdir()
    for image in images:
        volume = chain({"image": image, "label": image.parent.parent / "labelsTr" / image.name})
        pixels, label = (np.asarray(volume[key])[0] for key in both)
        for k in range(pixels.shape[-1]):
            np.save(out / f"{image.name}_{k}.npy", np.floor(255 * pixels[..., k]).astype(np.uint8))
            np.save(out / f"{image.name}_{k}_label.npy", label[..., k].astype(np.uint8))


def run() -> list[Row]:
    import monai.transforms  # noqa: F401  its import is not part of the rival's time

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        images = write_scans(root / "scans")
        start = time.perf_counter()
        ingest.prepare(root / "scans", root / "store", workers=2)
        ours = time.perf_counter() - start
        start = time.perf_counter()
        with_monai(images, root / "monai")
        rival = time.perf_counter() - start
    what = f"CT volumes of {'x'.join(map(str, SHAPE))} prepared, two processes"
    return [Row(what, "volumes/s", VOLUMES / ours, "the CT study's MONAI chain, one process", VOLUMES / rival, target=2.0)]
