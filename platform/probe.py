"""What a frozen encoder can already tell: seconds of looking while it is being pretrained, labels only to look.

    f        features of a pixel: the encoder's maps of all levels, each read at the pixel by linear interpolation
    P        pixels that the classifier learns from, as many of each class where there are enough
    D        2, or 3: then read cubes for slices and voxels for pixels
    k        classes, the background included

**Dice.** A linear classifier on f, one ridge regression onto the classes (Y one-hot) in closed form:

    X = (f - mean) / deviation                                        (P, f), weighted moments
    W = (Xᵀ D X + λ I)⁻¹ Xᵀ D (Y - ȳ),    class of a pixel = argmax (X W + ȳ)

D weighs the pixels so that all together weigh 1 and class c weighs as the square root of its share of all pixels: with equal
classes rare ones are seen everywhere, with true shares nowhere (untrained U-Net, Hippocampus: Dice 0.40 with exponent 0, 0.52
with 1/2, 0.39 with 1). It learns from the first labelled training patients of the split, whatever `data.labelled` says, and is
scored by the metric contract on validation patients (`plan.probed_patients`). All levels take part, since a fine-tuning's
decoder is given all of them; the finest alone already sees grey values, so compare with the entry of step 0, the encoder
before its first step, not with 0.

**kNN.** A slice's feature (mean over the coarsest map) asks its NEIGHBOURS nearest slices, by cosine, of the labelled patients
which classes they show; the majority answers. Balanced accuracy, mean over the foreground classes that some validation slices
show and some do not: 0.5 is chance. After the nearest-neighbour evaluation of Wu et al. 2018,
https://arxiv.org/abs/1805.01978 (k = 200 images with one class each, where slices here have several).

**rank, spread.** Effective rank and spread (`methods/monitors.py`) of the validation slices' features.

Costs: from each volume SLICES evenly spaced slices, at most PIXELS pixels for the classifier; nothing is drawn at random. A
look at Hippocampus (5 volumes to learn from, 27 to ask about, 512 slices) took 1.7 s on one busy core with a U-Net of width 32.
In 3D evenly spaced cubes of the side of a pretraining view, none of which overlap: as many as VOXELS hold, two at least. On 32
volumes of Hippocampus' shape (384 cubes of 16) a look took 1.3 times as long as in 2D; at 20 volumes it never sees more than
5 million voxels, or 40 cubes where these are larger than 50. Cubes that are large beside the volume all show the same classes,
which leaves kNN nothing to tell: NaN.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.methods import monitors, pairs
from medssl.methods.protocol import UNLABELLED, intensities
from medssl.platform import metrics
from medssl.platform.records import Score, Volume

SLICES = 16  # of each volume
PIXELS = 8192
RIDGE = 0.1  # λ, beside variances of 1
NEIGHBOURS = 5
BATCH = 16  # slices per forward pass
VOXELS = 2**18  # in 3D, of the cubes of a volume, and of a forward pass


@dataclass(frozen=True)
class Reading:
    """What one look saw."""

    dice: float  # of the linear classifier, by the metric contract
    knn: float  # balanced accuracy of what a slice shows
    rank: float  # effective rank of the slices' features
    spread: float  # of the slices' features, 0 to 1


def thinned(volumes: Iterable[Volume], side: int | None = None) -> list[Volume]:
    """The volumes that have a label, by at most SLICES evenly spaced slices each; or, given a `side`, by cubes of it.

    The slices make a smaller volume: its Dice is over them. Cubes take the place of slices: image (n, c, side, side, side) and
    label (n, side, side, side), slices last, as a 3D encoder reads them.
    """
    kept = []
    for volume in volumes:
        if volume.label is not None:
            rows = _even(len(volume.image), SLICES)
            image, label = (volume.image[rows], volume.label[rows]) if side is None else _cubes(volume, side)
            kept.append(Volume(volume.patient, volume.volume, image, label, volume.spacing_mm))
    return kept


def look(encoder: nn.Module, reference: Sequence[Volume], validation: Sequence[Volume], classes: Sequence[str]) -> Reading:
    """Probe `encoder` as it is, in eval mode, on volumes that `thinned` gave.

    reference    labelled volumes that classifier and neighbours come from
    validation   volumes of other patients that both are asked about
    classes      k names, the background first
    """
    assert not encoder.training
    k, device = len(classes), next(encoder.parameters()).device
    with torch.inference_mode():
        chosen, shares = _points(reference, k)
        pixels, ids, theirs = [], [], []
        for volume, places in zip(reference, chosen, strict=True):
            for start, maps in _maps(encoder, volume, device):
                theirs.append(pairs.feature(maps))
                here = places[(places[:, 0] >= start) & (places[:, 0] < start + len(theirs[-1]))]
                assert volume.label is not None
                ids.append(volume.label[tuple(here.T)].long().to(device))
                here[:, 0] -= start
                pixels.append(at(maps, here.to(device), volume.image.shape[2:]))
        weight, bias = ridge(torch.cat(pixels), torch.cat(ids), shares.to(device))
        mine: list[Tensor] = []
        scores: list[Score] = []
        for volume in validation:
            predicted = []
            for _, maps in _maps(encoder, volume, device):
                mine.append(pairs.feature(maps))
                predicted.append(logits(maps, weight, bias, volume.image.shape[2:]).argmax(1).byte())
            scores += metrics.score_volume(torch.cat(predicted), volume, classes, "val", metrics="dice")
        features = torch.cat(mine)
        said = neighbours(features, torch.cat(theirs), _shown(reference, k).to(device))
        return Reading(
            dice=metrics.aggregate(scores).mean["dice"],
            knn=balanced_accuracy(said, _shown(validation, k).to(device)),
            rank=float(monitors.effective_rank(features[_even(len(features), monitors.ROWS).to(device)])),
            spread=float(monitors.spread(features)),
        )


def ridge(x: Tensor, ids: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (f, k) and biases (k,) of the classifier, for features as they are.

    x        (P, f) features, ids (P,) int64 their classes
    shares   (k,) of all pixels, of which these are some
    """
    y = F.one_hot(ids, len(shares)).to(x.dtype)
    counts = y.sum(0)
    of_class = shares.to(x.dtype).sqrt() * (counts > 0)
    d = (of_class / of_class.sum() / counts.clamp(min=1))[ids][:, None]  # of each pixel; together 1
    mean = (d * x).sum(0)
    deviation = (d * (x - mean).square()).sum(0).sqrt()
    scale = torch.where(deviation > 1e-6, 1 / deviation.clamp(min=1e-6), 0.0)  # a feature that is constant says nothing
    z, target = (x - mean) * scale, (d * y).sum(0)
    gram = (z.T @ (d * z)).double()
    gram.diagonal().add_(RIDGE)
    w = torch.linalg.solve(gram, (z.T @ (d * (y - target))).double()).to(x.dtype) * scale[:, None]
    return w, target - mean @ w


def neighbours(x: Tensor, reference: Tensor, known: Tensor) -> Tensor:
    """What the majority of the nearest `reference` rows (m, d) show, known (m, c) bool, for each x (n, d): (n, c) bool."""
    cosine = F.normalize(x.float(), dim=1) @ F.normalize(reference.float(), dim=1).T
    nearest = cosine.topk(min(NEIGHBOURS, len(reference)), dim=1).indices
    return known[nearest].float().mean(1) > 0.5


def balanced_accuracy(said: Tensor, true: Tensor) -> float:
    """Mean of sensitivity and specificity, over the columns of (n, c) bool that hold both answers; NaN where none does."""
    sensitivity, specificity = (said & true).sum(0) / true.sum(0), (~said & ~true).sum(0) / (~true).sum(0)
    return float(((sensitivity + specificity) / 2).nanmean())


def at(maps: Sequence[Tensor], places: Tensor, sides: Sequence[int]) -> Tensor:
    """Features of single pixels, (P, f): what F.interpolate (linear, corners not aligned) of each map would hold there.

    maps     each (n, c, *) at a resolution of its own, of images with `sides` pixels
    places   (P, 1 + D) int64: image, then pixel
    """
    image, pixel = places[:, 0], places[:, 1:]
    found = []
    for values in maps:
        own = torch.tensor(values.shape[2:], device=places.device)
        place = ((pixel + 0.5) * own / torch.tensor(sides, device=places.device) - 0.5).clamp(min=0).minimum(own - 1.0)
        low = place.floor()
        share, total = place - low, values.new_zeros(len(places), values.shape[1])
        for corner in itertools.product((0, 1), repeat=len(sides)):
            step = torch.tensor(corner, device=places.device)
            index = (low.long() + step).minimum(own - 1)
            part = torch.where(step == 1, share, 1 - share).prod(1)[:, None]
            total += part * values[(image, slice(None), *index.T)]
        found.append(total)
    return torch.cat(found, 1)


def logits(maps: Sequence[Tensor], weight: Tensor, bias: Tensor, sides: Sequence[int]) -> Tensor:
    """The classifier on every pixel, (n, k, *sides). Each map is classified at its own resolution: both steps are linear."""
    mode = {2: "bilinear", 3: "trilinear"}[len(sides)]
    total = bias.view(1, -1, *[1] * len(sides))
    for values, own in zip(maps, weight.split([values.shape[1] for values in maps]), strict=True):
        small = torch.einsum("nf...,fk->nk...", values, own)
        total = total + F.interpolate(small, size=tuple(sides), mode=mode)
    return total


def _points(volumes: Sequence[Volume], k: int) -> tuple[list[Tensor], Tensor]:
    """Which pixels to learn from, (P_v, 1 + D) int64 of each volume (slice, row, column), and the classes' shares, (k,).

    Evenly spaced along the pixels of a class, and as many of each class as PIXELS allows and the class has.
    """
    labels = [volume.label.flatten() for volume in volumes if volume.label is not None]
    joint = torch.cat(labels)
    of_class = [torch.nonzero(joint == number).flatten() for number in range(k)]
    taken = torch.cat([here[_even(len(here), PIXELS // k)] for here in of_class]).sort().values
    places, first = [], 0
    for volume, label in zip(volumes, labels, strict=True):
        inside = taken[(taken >= first) & (taken < first + len(label))] - first
        places.append(torch.stack(torch.unravel_index(inside, (len(volume.image), *volume.image.shape[2:])), 1))
        first += len(label)
    counts = torch.tensor([float(len(here)) for here in of_class])
    return places, counts / counts.sum()


def _shown(volumes: Sequence[Volume], k: int) -> Tensor:
    """Which foreground classes each slice shows, (n, k-1) bool."""
    labels = [row for volume in volumes if volume.label is not None for row in volume.label]
    return torch.stack([torch.bincount(row.flatten(), minlength=256)[1:k] > 0 for row in labels])


def _even(count: int, wanted: int) -> Tensor:
    """At most `wanted` evenly spaced numbers of 0 … count - 1, int64."""
    wanted = min(count, wanted)
    return (torch.arange(wanted) * count + count // 2) // max(wanted, 1)


def _cubes(volume: Volume, side: int) -> tuple[Tensor, Tensor]:
    """Evenly spaced cubes of a labelled volume, (n, c, side, side, side), and their labels. None overlap.

    A volume that is thinner than a cube is padded below, to the right and above, as in training.
    """
    assert volume.label is not None
    image, label = volume.image.movedim(0, -1), volume.label.movedim(0, -1)
    short = [pad for length in reversed(label.shape) for pad in (0, max(side - length, 0))]
    image, label = F.pad(image, short), F.pad(label, short, value=UNLABELLED)
    counts = [(length, length // side) for length in label.shape]
    firsts = [[((2 * place + 1) * length - n * side) // (2 * n) for place in range(n)] for length, n in counts]
    corners = list(itertools.product(*firsts))
    boxes = [
        tuple(slice(first, first + side) for first in corners[number])
        for number in _even(len(corners), max(2, VOXELS // side**3)).tolist()
    ]
    return torch.stack([image[(slice(None), *box)] for box in boxes]), torch.stack([label[box] for box in boxes])


def _maps(encoder: nn.Module, volume: Volume, device: torch.device) -> Iterator[tuple[int, list[Tensor]]]:
    """The encoder's maps, some slices or cubes of the volume at a time, and the number of the first of them."""
    sides = volume.image.shape[2:]
    at_once = BATCH if len(sides) == 2 else max(1, VOXELS // math.prod(sides))
    for start in range(0, len(volume.image), at_once):
        yield start, list(encoder(intensities(volume.image[start : start + at_once].to(device))))
