"""Superpixel contrast: cells of one superpixel have like features, in the crop and in the moved crop; others do not.

Ouyang, Biffi, Chen, Kart, Qiu and Rueckert, "Self-supervision with superpixels", ECCV 2020, https://arxiv.org/abs/2007.09886,
has the superpixels as pseudo-labels; contrasted, they are a term of Contrast-You (https://github.com/jizongFox/Contrast-You).
Superpixels are those of Achanta et al., "SLIC superpixels", TPAMI 2012, https://doi.org/10.1109/TPAMI.2012.120.

    a        superpixel of each pixel of x, of about `segments` per crop                                    (m, s, s)
    z        head of the map under the logits, of `places` cells per crop, of T features(x) and features(T x)   (2 m places, d)
    L        the loss l_ij of `methods/infonce.py`; P(i): cells of i's crop and superpixel, in either view

The superpixels are made on the device, all crops at once: the image blurred by `sigma`, centres on a grid, `rounds` times every
pixel to the centre nearest in (intensity / compactness, place / grid step) and every centre to the mean of its pixels. Unlike
the paper a pixel may choose any centre, distance keeping it near; pieces are not joined to make superpixels connected.
Intensities are brought to [0, 1] per crop before. Defaults are Contrast-You's 40 segments, sigma 5 and 64 cells, and
scikit-image's compactness as 0.1 of that range. Beyond the slice a pixel belongs to none. Rivals are the cells of all
workers' crops. Transfers: nothing of its own.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from medssl.methods import augment, gather, infonce, settings
from medssl.methods.augment import Pair
from medssl.methods.clusters import cells, within
from medssl.methods.protocol import Loss, Step
from medssl.methods.ramps import weight
from medssl.methods.segment import Drawn, Hook, Pass, initial
from medssl.methods.taps import Taps, channels

APART = 2**20  # more superpixels than a crop has


@dataclass(frozen=True, kw_only=True)
class Config(settings.Hook):
    weight: float = 0.1
    layer: str = "decoder"  # a module of the network
    segments: int = 40  # superpixels per crop, about
    sigma: float = 5.0  # pixels, of the blur before; 0: none
    compactness: float = 0.1  # how far apart in intensity neighbouring centres count as the same; more: squarer
    rounds: int = 10
    places: int = 64  # cells drawn in each crop
    temperature: float = 0.07  # τ
    hidden: int = 256
    d: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("segments", "compactness", "rounds", "temperature", "hidden", "d"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected more than 0")
        if self.places < 2 or self.sigma < 0:
            raise ValueError(f"places is {self.places} and sigma {self.sigma}: expected at least 2, and at least 0")


class Superpixel(nn.Module):
    predictor = None

    def __init__(self, network: nn.Module, config: Config):
        super().__init__()
        self.config = config
        self.taps = Taps(network, [config.layer])
        with initial("superpixel"):
            self.head = infonce.head(channels(network, config.layer), config.hidden, config.d)

    def draw(self, pair: Pair, rng: Generator) -> Drawn:
        """Where in [0, 1) of a map's cells each of `places` lies, (m, places): the map's sides are not known yet."""
        return {"places": torch.rand((len(pair.image), self.config.places), generator=rng, device=rng.device)}

    def terms(self, pass_: Pass, drawn: Drawn, step: Step) -> Loss:
        config, pair = self.config, pass_.pair
        x, y = (self.taps.taken(logits)[config.layer].float() for logits in (pass_.image, pass_.moved))
        ids = superpixels(pair.image, config.segments, config.sigma, config.compactness, config.rounds)
        ids = augment.apply_geometry(ids[:, None].float(), pair.geometry, mode="nearest")  # exact below 2 ** 24
        count = math.prod(y.shape[2:])
        place = (drawn["places"] * count).long().clamp(max=count - 1)
        label = F.interpolate(ids, y.shape[2:], mode="nearest-exact").flatten(1).gather(1, place).long()
        crop = torch.arange(len(label), device=label.device)[:, None]
        crop = crop + gather.rows(crop)[1]  # no superpixel is of two crops, and no crop of two workers
        label = (crop * APART + label).flatten()
        known = within(pair.valid, y.shape[2:]).flatten(1).gather(1, place).flatten()
        with torch.autocast(y.device.type, enabled=False):
            z = [self.head(cells(each, place)) for each in (pass_.move(x), y)]
        joint = [gather.rows(each)[0] for each in z]
        seen = gather.rows(known.float())[0] > 0
        each, positives = infonce.contrast(joint, gather.rows(label)[0], config.temperature, "all", seen)
        loss = infonce.averaged(each, positives)
        return Loss({"contrast": weight(config, step) * loss})

    def after_step(self, network: nn.Module, step: Step) -> None:
        pass


@torch.no_grad()
def superpixels(image: Tensor, segments: int, sigma: float, compactness: float, rounds: int) -> Tensor:
    """The superpixel of every pixel: images (m, c, *) of equal sides to (m, *) int64 below about `segments`."""
    count, axes, sides = len(image), image.dim() - 2, image.shape[2:]
    x = image.float()
    if sigma:
        x = augment.blur(x, torch.full((count, axes), sigma, device=x.device), largest=sigma)
    low, high = (extreme(x.flatten(1), 1).view(-1, *[1] * (axes + 1)) for extreme in (torch.amin, torch.amax))
    x = (x - low) / (high - low).clamp_min(1e-6)
    per_axis = max(1, round(segments ** (1 / axes)))
    grid = [(torch.arange(side, device=x.device) + 0.5) / side * per_axis for side in sides]  # in steps of the grid
    place = torch.stack(torch.meshgrid(*grid, indexing="ij")).expand(count, axes, *sides)
    points = torch.cat([x / compactness, place], 1).flatten(2).mT  # (m, pixels, c + axes)
    ids = _cell(grid, per_axis).flatten().expand(count, -1)
    for _ in range(rounds):
        centres = _means(points, ids, per_axis**axes)
        ids = torch.cdist(points, centres).argmin(2)
    return ids.view(count, *sides)


def _cell(grid: list[Tensor], per_axis: int) -> Tensor:
    """Which cell of the grid each pixel lies in, (*sides) int64."""
    cell = torch.zeros((), dtype=torch.int64, device=grid[0].device)
    for axis, along in enumerate(grid):
        cell = cell * per_axis + along.floor().long().view(-1, *[1] * (len(grid) - 1 - axis))
    return cell


def _means(points: Tensor, ids: Tensor, count: int) -> Tensor:
    """The mean (m, count, f) of the points (m, pixels, f) of each id (m, pixels); far away where an id has none."""
    index = ids[..., None].expand_as(points)
    total = points.new_zeros(len(points), count, points.shape[2]).scatter_add_(1, index, points)
    number = points.new_zeros(len(points), count).scatter_add_(1, ids, torch.ones_like(ids, dtype=points.dtype))[..., None]
    return torch.where(number > 0, total / number.clamp(min=1), 1e6)


HOOK: type[Hook] = Superpixel
