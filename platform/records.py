"""The records that flow between the parts of medssl, and the schema of a prepared slice."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Part = Literal["train", "val", "test"]
UNLABELLED = 255  # as in methods/protocol.py, which imports torch: tests/test_geometry.py keeps them equal


class Mask(NamedTuple):
    """A file that marks one class, or a part of it: 0 outside, one other value inside."""

    class_name: str
    file: Path


@dataclass(frozen=True)
class Case:
    """One volume of a data set as it lies on disk."""

    patient: str  # whose scan it is: the unit that is never split
    volume: str  # unique in the data set
    images: tuple[Path, ...]  # one file per channel, or one file that holds all channels
    label: Path | tuple[Mask, ...] | None = None  # one file of class ids, or masks: those of one class are joined
    part: Part | None = None  # set where the data set publishes an official split
    phase: str | None = None  # end diastole, portal venous, a time point …
    site: str | None = None  # where it was scanned
    group: str | None = None  # diagnosis, vendor, or whatever the data set groups its patients by
    frame: int | None = None  # which volume of a 4D file, from 0: a time point of a cine scan, or one channel of several
    modality: Literal["ct", "mr"] | None = None  # where a folder holds both: a preset takes the scans that it suits

    @property
    def label_files(self) -> tuple[Path, ...]:
        """Every file that its label is made of."""
        if isinstance(self.label, Path):
            return (self.label,)
        return tuple(mask.file for mask in self.label or ())


@dataclass(frozen=True)
class DataInfo:
    """What a data set says about itself."""

    name: str
    classes: tuple[str, ...]  # position is the class id; 0 is the background
    channels: tuple[str, ...] = ("image",)  # what each channel shows; a 4D file holds as many, channels last
    licence: str = "unknown"
    citation: str = ""
    preset: str = "ct"  # how to prepare it: a name in `geometry.PRESETS`
    preset_changes: Mapping[str, Any] = field(default_factory=dict)
    tolerance_mm: tuple[float, ...] | None = None  # surface Dice tolerance per foreground class; None: 2 mm each
    defaults: Mapping[str, Any] = field(default_factory=dict)  # dotted settings that suit this data set
    label_values: Mapping[int, int] = field(default_factory=dict)  # value in a label file -> class id; empty: they are ids
    mask_threshold: float | None = None  # labels kept as JPEG, of one class: what lies above it is the class
    obtain: str = ""  # the page to download it from or to register at

    def __post_init__(self) -> None:
        ids = {*range(len(self.classes)), UNLABELLED}
        if strange := sorted(set(self.label_values.values()) - ids):
            raise ValueError(f"{self.name}: label_values lead to {strange}, which are not class ids; classes: {self.classes}")
        if self.mask_threshold is not None and (len(self.classes) != 2 or self.label_values):
            raise ValueError(f"{self.name}: mask_threshold tells one class from the background, not {self.classes}")


@dataclass(frozen=True)
class Volume:
    """A prepared volume in memory: its slices, stacked from the lowest to the highest."""

    patient: str
    volume: str
    image: "Tensor"  # (d, c, h, w), storage dtype
    label: "Tensor | None"  # (d, h, w) uint8, UNLABELLED where nobody annotated; None: no label at all
    spacing_mm: tuple[float, float, float]  # between rows, columns, slices


@dataclass(frozen=True)
class Score:
    """One number of the evaluation: NaN where the class is absent in both, infinite for the distance of a missed class."""

    patient: str
    volume: str
    part: Part
    class_name: str
    metric: str  # "dice", "hd95_mm", "nsd", …
    value: float


@dataclass(frozen=True)
class Run:
    """One fine-tuning of a sweep, as the leaderboard sees it."""

    arm: str
    pretraining: int  # which of the arm's k pretrainings it started from
    finetuning: int  # which of the m fine-tunings of that pretraining it is
    by_patient: Mapping[str, float]  # the metric, mean over classes, of each test patient; NaN where undefined

    @property
    def score(self) -> float:
        """Mean over patients, NaN left out."""
        defined = [value for value in self.by_patient.values() if not math.isnan(value)]
        return sum(defined) / len(defined) if defined else math.nan
