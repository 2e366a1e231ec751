"""Who lies in the scanner: everything that differs between two phantoms and is not a shape.

Coordinates are millimetres of a standard adult, RAS: x to the patient's right, y to the front, z to the head. The axis
x = y = 0 runs through the middle of the trunk; z = 0 lies at the lower tip of the liver, z = 170 at its dome.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Point = NDArray[np.float64]  # (x, y, z) in mm
Side = Literal["right", "left"]
Phase = Literal["non-contrast", "arterial", "portal", "delayed"]

PHASES: tuple[Phase, ...] = ("non-contrast", "arterial", "portal", "delayed")
PHASE_ODDS = (0.15, 0.2, 0.5, 0.15)
ENHANCEMENT_HU = {  # mean HU in each of PHASES
    "liver": (55, 68, 110, 92),
    "spleen": (48, 115, 120, 95),
    "kidney cortex": (34, 165, 175, 145),
    "kidney medulla": (30, 62, 150, 150),
    "renal pelvis": (8, 10, 15, 340),
    "pancreas": (40, 98, 90, 70),
    "aorta": (42, 280, 155, 112),
    "vena cava": (40, 75, 140, 110),
    "portal vein": (42, 75, 160, 115),
    "adrenal": (24, 58, 62, 48),
    "gut wall": (38, 72, 78, 62),
    "muscle": (52, 57, 62, 60),
}
GUT_CONTENTS_HU = {"water": 12, "chyme": 36, "food": 62, "oral contrast": 200}
GUT_CONTENTS_ODDS = (0.4, 0.3, 0.18, 0.12)

NO_GALLBLADDER = 0.12  # removed by surgery, in about one adult of eight
NO_KIDNEY = 0.02  # each side
SIDES: Mapping[Side, int] = {"right": 1, "left": -1}  # which way is outwards, along x


def mm(x: float, y: float, z: float) -> Point:
    """A place, or the way from one place to another."""
    return np.array([x, y, z], float)


def spread(rng: np.random.Generator, sd: float, mean: float = 0.0) -> float:
    """A normal draw cut at 2.5 deviations: variety without monsters."""
    return mean + sd * float(np.clip(rng.standard_normal(), -2.5, 2.5))


@dataclass(frozen=True, kw_only=True)
class Landmarks:
    """Places that several organs share, so that neighbours move together. Points in mm, see the file's head."""

    liver: Point
    spleen: Point
    kidneys: Mapping[Side, Point]
    gallbladder: Point
    cardia: Point  # where the oesophagus enters the stomach
    pylorus: Point  # where the stomach ends and the duodenum begins
    pancreas: tuple[Point, Point, Point, Point]  # head, neck, body, tail
    dome_mm: float  # height of the diaphragm between its two domes

    @classmethod
    def draw(cls, rng: np.random.Generator, girth: float) -> "Landmarks":
        """`girth` is the room that visceral fat makes: it pushes organs outwards and forwards, away from the spine."""

        def near(x: float, y: float, z: float, sd: float = 5.0) -> Point:
            jitter = sd * rng.standard_normal(3).clip(-2.5, 2.5)
            return mm(x * girth, -55 + (y + 55) * girth, z) + jitter

        head = near(30, 2, 56, 7)
        neck = 0.7 * (head + mm(-22, 16, 11)) + 0.3 * near(8, 18, 67)
        spleen = near(-103, -42, 104, 6)
        tail = 0.5 * (spleen + mm(38, 16, -10)) + 0.5 * near(-66, -24, 94)
        return cls(
            liver=near(74, 0, 96),
            spleen=spleen,
            kidneys={"right": near(64, -45, 48, 6), "left": near(-64, -47, 58, 6)},
            gallbladder=0.5 * (head + mm(36, 32, 6)) + 0.5 * near(64, 34, 60, 9),
            cardia=near(-20, -8, 142),
            pylorus=0.6 * (head + mm(-4, 32, 16)) + 0.4 * near(26, 36, 72, 8),
            pancreas=(head, neck, near(-24, 8, 82, 6), tail),
            dome_mm=spread(rng, 6, 153),
        )


@dataclass(frozen=True, kw_only=True)
class Patient:
    """The latents of one patient and of one examination."""

    # build
    stature: tuple[float, float, float]  # size along x, y, z relative to the standard adult
    fat_mm: float  # thickness of the subcutaneous fat
    girth: float  # room that visceral fat makes, 1 = standard
    turn: float  # roll on the table, radians
    shift_mm: tuple[float, float, float]  # of the body against the field of view, after the build
    landmarks: Landmarks
    # organs
    liver_size: float
    spleen_size: float
    kidney_size: float
    lesions: int  # in the liver
    gallbladder: bool
    kidneys: frozenset[Side]  # those that there are
    stomach_filling: float  # radius relative to a half-filled stomach
    gas: bool  # an air-fluid level in the stomach
    contents_hu: float  # of stomach and duodenum
    calcified: bool  # plaques of the aorta
    # examination
    phase: Phase
    hu: dict[str, float]  # the keys of ENHANCEMENT_HU, and "fat"
    noise_hu: float  # standard deviation at the centre
    blur_voxels: tuple[float, float]  # reconstruction kernel in the plane, slice profile across it
    offset_hu: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Patient":
        """A patient at random."""
        size, habitus = spread(rng, 0.045, 1), float(np.clip(rng.gamma(3, 1 / 3), 0.3, 2.2))
        girth = 0.94 + 0.07 * habitus
        phase = int(rng.choice(len(PHASES), p=PHASE_ODDS))
        return cls(
            stature=(size * spread(rng, 0.02, 1), size * spread(rng, 0.02, 1), size * spread(rng, 0.025, 1)),
            fat_mm=5 + 10 * habitus,
            girth=girth,
            turn=np.deg2rad(spread(rng, 4)),
            shift_mm=(spread(rng, 6), spread(rng, 5), spread(rng, 7)),
            landmarks=Landmarks.draw(rng, girth),
            liver_size=spread(rng, 0.06, 1),
            spleen_size=spread(rng, 0.11, 1),
            kidney_size=spread(rng, 0.07, 1),
            lesions=int(rng.poisson(0.6)),
            gallbladder=bool(rng.random() >= NO_GALLBLADDER),
            kidneys=frozenset(side for side in SIDES if rng.random() >= NO_KIDNEY),
            stomach_filling=float(rng.uniform(0.75, 1.25)),
            gas=bool(rng.random() < 0.6),
            contents_hu=float(rng.choice(list(GUT_CONTENTS_HU.values()), p=GUT_CONTENTS_ODDS)),
            calcified=bool(rng.random() < 0.4),
            phase=PHASES[phase],
            hu=_enhancement(rng, phase),
            noise_hu=float(rng.uniform(6, 16)) * float(np.clip(0.75 + 0.25 * habitus, 0.7, 1.4)),
            blur_voxels=(float(rng.uniform(0.3, 0.65)), float(rng.uniform(0.2, 0.5))),
            offset_hu=spread(rng, 5),
        )


def _enhancement(rng: np.random.Generator, phase: int) -> dict[str, float]:
    """HU of the tissues, between `phase` and the next: no two injections are timed alike. A quarter of livers are fatty."""
    lateness, dose = rng.uniform(0, 0.5), spread(rng, 0.07, 1) if phase else 1.0
    following = min(phase + 1, len(PHASES) - 1)
    hu = {
        tissue: ((1 - lateness) * means[phase] + lateness * means[following]) * dose + spread(rng, 4)
        for tissue, means in ENHANCEMENT_HU.items()
    }
    if rng.random() < 0.25:
        hu["liver"] -= rng.uniform(20, 50)
    return hu | {"fat": spread(rng, 5, -100)}
