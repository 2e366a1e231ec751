"""N4 bias field correction: the slow drift of brightness that a coil leaves in a magnetic resonance image, divided out.

Tustison et al., IEEE Transactions on Medical Imaging 2010, https://doi.org/10.1109/TMI.2010.2046908; the filter is SimpleITK's
(extra [n4]). The settings are those of the global-local study (Chaitanya 2020, https://arxiv.org/abs/2006.10511,
scripts/N4_bias_correction.py): 4 levels of 50 iterations, convergence at 0.001, no mask, everything else as the library has it.
That study fits the field on the whole grid (shrink 1); a coarser grid is as many times quicker as it has fewer voxels.

It is by far the slowest step of a preparation, and depends on nothing but the scan: its result is kept in a file beside the
store, so that another preparation of the same scans reads it.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.platform import atomic
from medssl.platform.errors import RunError

LEVELS, ITERATIONS, CONVERGENCE = 4, 50, 0.001


def corrected(image: NDArray[Any], spacing_mm: tuple[float, ...], shrink: int) -> NDArray[np.float32]:
    """Every channel of `image`, (c, x, y, z), divided by its own field; float32. Raises RunError without SimpleITK.

    spacing_mm  of the array's axes
    shrink      the field is fitted on every `shrink`-th voxel of each axis that has enough of them
    """
    try:
        import SimpleITK as sitk
    except ImportError:
        raise RunError("preset.n4 needs SimpleITK, which is not installed; pip install 'medssl[n4]', or leave n4 out") from None

    # One thread: volumes run beside one another, and the sum over threads would make the result depend on their number.
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    out = np.empty(image.shape, np.float32)
    for number, channel in enumerate(image):
        whole = sitk.GetImageFromArray(np.ascontiguousarray(channel.T, np.float32))  # SimpleITK's arrays are (z, y, x)
        whole.SetSpacing([float(side) for side in spacing_mm])
        factors = [max(1, min(shrink, length // 4)) for length in channel.shape]
        coarse = sitk.Shrink(whole, factors) if max(factors) > 1 else whole
        filter_ = sitk.N4BiasFieldCorrectionImageFilter()
        filter_.SetMaximumNumberOfIterations([ITERATIONS] * LEVELS)
        filter_.SetConvergenceThreshold(CONVERGENCE)
        try:
            filter_.Execute(coarse)
        except RuntimeError as error:
            raise ValueError(f"N4 fails on it ({str(error).strip().splitlines()[-1]}); leave preset.n4 out") from error
        field = sitk.GetArrayFromImage(filter_.GetLogBiasFieldAsImage(whole)).T
        np.divide(channel, np.exp(field), out=out[number], casting="unsafe")
    return out


def cached(image: NDArray[Any], spacing_mm: tuple[float, ...], shrink: int, cache: Path | None) -> NDArray[np.float32]:
    """`corrected`, from the file `cache` where it is there and whole; written there where it is not. None: no file."""
    if cache is not None:
        try:
            kept = np.load(cache)
        except (FileNotFoundError, ValueError, EOFError):  # absent, or emptied by a loss of power
            kept = None
        if kept is not None and kept.shape == image.shape:
            return kept
    done = corrected(image, spacing_mm, shrink)
    if cache is not None:
        atomic.write(cache, lambda file: np.save(file, done), durable=False)
    return done
