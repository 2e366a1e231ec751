"""Positive pairs per second on one core: sampled, cropped and augmented; against the MONAI chain of the CT study.

Both sides do the work of one pretraining sample, from a slice in memory to two augmented views. Ours takes the slices as
the store holds them (uint8, a batch of 128, the study's); the rival is given each as the MetaTensor of floats that its loader
would have made, and spends nothing on that. Rounds alternate, so that a busy machine slows both, and the median round counts.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from medssl.platform.bench import Row

INTERVALS = ((0.0, 0.0), (0.3, 0.6), (0.6, 1.0))
SIDE, HEIGHT, WIDTH = 96, 300, 250  # pixels; a usual slice of the study's preset
BATCH = 128
ROUNDS = 7
AT_LEAST = 20.0


def run() -> list[Row]:
    """Rates per interval: whole pairs, then the sampler alone."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for interval in INTERVALS for row in _compare(interval)]
    finally:
        torch.set_num_threads(threads)


def _compare(interval: tuple[float, float]) -> list[Row]:
    import torch
    from monai.data import MetaTensor

    from medssl.methods import augment, crops, settings

    rng = torch.Generator().manual_seed(0)
    store = torch.randint(0, 256, (3 * BATCH, 1, HEIGHT, WIDTH), dtype=torch.uint8, generator=rng)
    size = torch.tensor([[HEIGHT, WIDTH]]).expand(BATCH, 2)
    chain, pairs = settings.Chain(), settings.PairCrops(side=SIDE, iou=interval)
    # A loader's batches: a new tensor each, so that the memory of the last one is there to be used again.
    batches = (store[torch.randperm(len(store), generator=rng)[:BATCH]] for _ in itertools.count())

    def our_pairs(image: torch.Tensor) -> None:
        pair = crops.pair(size, pairs, rng)
        for corner in pair.corners:
            augment.view(image, corner, None, SIDE, chain, rng)

    sampler, transform = RejectionSampler(SIDE, interval, np.random.default_rng(0)), rival(interval)
    slices = [MetaTensor(store[i].float() / 255) for i in range(8)]
    ours, rivals = [], []
    for _ in range(ROUNDS):
        ours.append(_rate(our_pairs, [next(batches) for _ in range(4)], BATCH))
        rivals.append(_rate(transform, slices * 8, 1))
    draws = [_rate(lambda _: crops.pair(size, pairs, rng), range(8), BATCH) for _ in range(ROUNDS)]
    rejections = [_rate(lambda _: sampler((HEIGHT, WIDTH)), range(400), 1) for _ in range(ROUNDS)]

    low, high = interval
    where = f"{SIDE} px in {HEIGHT}x{WIDTH} slices, IoU [{low:g}, {high:g}], one core"
    median = statistics.median
    return [
        Row(f"augmented pairs of {where}", "pairs/s", median(ours), "MONAI chain of the CT study", median(rivals), AT_LEAST),
        Row(f"box pairs of {where}", "pairs/s", median(draws), "rejection sampler of the CT study", median(rejections)),
    ]


def _rate(work: Callable[[Any], object], items: Any, each: int) -> float:
    """Units per second of processor time, `each` per item, after one item of warming up."""
    items = list(items)
    work(items[0])
    start = time.process_time()
    for item in items:
        work(item)
    return len(items) * each / (time.process_time() - start)


class RejectionSampler:
    """Corners of two crops as the study's `IoUCropd` draws them (thesis, algorithm 1).

    Up to 30 tries of the second corner near the first (anywhere if the interval holds 0), up to 4 first corners; then the
    last pair goes out although it misses the interval.
    """

    def __init__(self, side: int, interval: tuple[float, float], rng: np.random.Generator) -> None:
        self.side, self.interval, self.rng = side, interval, rng

    def __call__(self, size: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        side, (low, high) = self.side, self.interval
        reach = np.array(size) - side
        for _ in range(4):
            p = self.rng.integers(0, reach + 1)
            near = (np.maximum(0, p - side), np.minimum(reach, p + side)) if low > 0 else (np.zeros_like(reach), reach)
            for _ in range(30):
                q = self.rng.integers(near[0], near[1] + 1)
                shared = np.maximum(0, side - np.abs(p - q)).prod()
                if low <= shared / (2 * side**reach.size - shared) <= high:
                    return p, q
        return p, q


def rival(interval: tuple[float, float], side: int = SIDE) -> Callable[[Any], object]:
    """Slice to two views of `side` pixels with MONAI as the study does: dictionary transforms on MetaTensors, one by one."""
    from monai import transforms as mt

    sampler = RejectionSampler(side, interval, np.random.default_rng(0))

    def pair(data: dict[str, Any]) -> dict[str, Any]:
        image = data["image"]
        corners = sampler(image.shape[1:])
        return {f"view{v}": image[:, y : y + side, x : x + side] for v, (y, x) in enumerate(corners)}

    def chain(key: str) -> list[Any]:
        return [
            mt.RandZoomd(key, prob=0.75, min_zoom=0.8, max_zoom=1.2, mode="bilinear", padding_mode="constant"),
            mt.RandFlipd(key, prob=0.5, spatial_axis=0),
            mt.RandFlipd(key, prob=0.5, spatial_axis=1),
            mt.RandRotate90d(key, prob=0.5),
            mt.RandScaleIntensityd(key, factors=0.1, prob=0.75),
            mt.RandShiftIntensityd(key, offsets=0.1, prob=0.75),
            mt.RandGaussianSmoothd(key, prob=0.25),
            mt.RandGaussianNoised(key, prob=0.25, std=0.01),
        ]

    whole = mt.Compose([pair, *chain("view0"), *chain("view1")])
    return lambda image: whole({"image": image})
