"""The records that flow between the parts of medssl, and the schema of a prepared slice."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Part = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Case:
    """One volume of a data set as it lies on disk."""

    patient: str  # whose scan it is: the unit that is never split
    volume: str  # unique in the data set
    images: tuple[Path, ...]  # one file per channel, or one file that holds all channels
    label: Path | None = None
    part: Part | None = None  # set where the data set publishes an official split
    phase: str | None = None  # end diastole, portal venous, a time point …


@dataclass(frozen=True)
class DataInfo:
    """What a data set says about itself."""

    name: str
    classes: tuple[str, ...]  # position is the class id; 0 is the background
    licence: str = "unknown"
    citation: str = ""
    preset: str = "ct"  # how to prepare it: a name in `geometry.PRESETS`
    preset_changes: Mapping[str, Any] = field(default_factory=dict)
    tolerance_mm: tuple[float, ...] | None = None  # surface Dice tolerance per foreground class; None: 2 mm each
    defaults: Mapping[str, Any] = field(default_factory=dict)  # dotted settings that suit this data set
