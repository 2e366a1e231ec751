"""The upper abdomen, organ by organ, as shapes in millimetres of the standard adult (axes: see `_phantom_patient`).

Right is +x, front is +y, head is +z. `draw` is the table of contents, and its order is the order in which organs claim
room: from the stiff to the soft, so that the liver wraps around the kidney and not the kidney around the liver.
Only the thirteen organs of FLARE22 carry labels. Colon, small bowel, heart, muscles and mesenteric vessels carry none,
though bowel looks like stomach and duodenum: what tells them apart is where they lie and what they join.
"""

from collections.abc import Sequence

import numpy as np

from medssl.platform.datasets._phantom_canvas import Canvas, Solid, blend
from medssl.platform.datasets._phantom_patient import GUT_CONTENTS_HU, SIDES, Patient, Point, Side, mm, spread

ORGANS = (
    "liver",
    "right kidney",
    "spleen",
    "pancreas",
    "aorta",
    "inferior vena cava",
    "right adrenal gland",
    "left adrenal gland",
    "gallbladder",
    "esophagus",
    "stomach",
    "duodenum",
    "left kidney",
)
LABEL = {organ: number for number, organ in enumerate(ORGANS, start=1)}

AIR_HU, LUNG_HU, BONE_HU, BILE_HU, CYST_HU = -950, -850, 320, 9, 8
WALL_MM = 13  # muscles and ribs around the abdominal cavity
ENDLESS = 1e4  # mm: the height of what runs through the whole field of view


def draw(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """Paint one patient."""
    chest = trunk(canvas, patient, rng)
    muscles_and_spine(canvas, patient, rng)
    great_vessels(canvas, patient, rng, chest)
    esophagus(canvas, patient, rng)
    lungs_and_heart(canvas, patient, chest)
    for side in SIDES:
        kidney(canvas, patient, rng, side)
    for side in SIDES:
        adrenal(canvas, patient, rng, side)
    gallbladder(canvas, patient, rng)
    portal_vessels(canvas, patient)
    pancreas(canvas, patient, rng)
    duodenum(canvas, patient, rng)
    spleen(canvas, patient, rng)
    liver(canvas, patient, rng)
    stomach(canvas, patient, rng)
    bowel(canvas, patient, rng)
    mesentery(canvas, patient, rng)


# --- the trunk


def half_sizes_mm(patient: Patient) -> tuple[float, float, float]:
    """Half the width of the trunk, and its depth from the axis to the front and to the back, in the standard adult."""
    rim = WALL_MM + patient.fat_mm
    return 124 * patient.girth + rim, -55 + 150 * patient.girth + 0.8 * rim, 86 + 0.8 * rim


def trunk(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> Solid:
    """Skin, fat, a muscle wall with ribs, and the cavity inside, to which all organs keep; returns the chest's part of it."""
    body = contour(canvas, patient)
    couch(canvas, patient)
    canvas.paint(body, patient.hu["fat"], 6)
    canvas.paint(body.layer(1, 2), 10)
    wall = body.grown(-patient.fat_mm * (1 + 0.12 * canvas.broad))
    canvas.paint(wall, patient.hu["muscle"] - 6, 9)
    x, y, z = canvas.xyz
    linea_alba = 0.55 * np.exp(-((x / 9) ** 2)) * (y > 0)  # between the straight muscles the wall is thin
    cavity = wall.grown(-WALL_MM * (1 - 0.2 * (y > 40) - linea_alba))
    canvas.paint(cavity, patient.hu["fat"] + 8 * canvas.patchy, 5)
    canvas.close(Solid(canvas.whole, 1.5 - cavity.distance))

    # ribs run down to the front and rise to the breastbone: a tilted wave on a sheet in the wall, none below the costal arch
    wave = np.cos(2 * np.pi * (z + 0.55 * y - 0.4 * np.abs(x) + spread(rng, 9)) / 27)
    ribs = np.maximum(wall.layer(6.5, 8).distance, np.maximum((0.45 - wave) * 6, (62 + 0.95 * (y + 10) - z) * 0.5))
    canvas.paint(Solid(canvas.whole, ribs), BONE_HU - 150 * np.clip((y - 25) / 40, 0, 1), 50)  # cartilage in front

    # the diaphragm is two domes, the right one higher
    domes = [
        patient.landmarks.dome_mm + rise + spread(rng, 5) - ((x - middle) ** 2 + 0.9 * (y - 12) ** 2) / 115
        for middle, rise in ((66, 24), (-66, 15))
    ]
    return Solid(canvas.whole, np.maximum(cavity.distance + 2, np.maximum(*domes) - z))


def contour(canvas: Canvas, patient: Patient) -> Solid:
    """The skin: an ellipse in front, squarer and furrowed at the back, wide at the chest, and in the obese also below."""
    width, front, back = half_sizes_mm(patient)
    x, y, z = canvas.xyz
    wide = width * (1 + 0.025 * np.tanh((z - 100) / 50) - 0.02 * (patient.girth - 0.95) * np.tanh((z - 60) / 50))
    forward = y > 0
    half_depth = np.where(forward, np.float32(front), np.float32(back))
    roundness = np.where(forward, np.float32(0.85), np.float32(0.65))  # 1 is an ellipse, 0 a superellipse of power 4
    u, v = (x / wide) ** 2, (y / half_depth) ** 2
    level = (u * u + v * v + 2 * roundness * u * v) ** np.float32(0.25) + np.float32(1e-6)
    slope = np.sqrt(u * ((u + roundness * v) / wide) ** 2 + v * ((v + roundness * u) / half_depth) ** 2) / level**3
    furrow = 7 * np.exp(-((x / 13) ** 2)) * ~forward
    return Solid(canvas.whole, (level - 1) / np.maximum(slope, np.float32(1e-6)) + furrow + 1.2 * canvas.broad)


def couch(canvas: Canvas, patient: Patient) -> None:
    """The thin curved top of the table, in the scanner's frame."""
    x, y, _ = canvas.table
    top = patient.shift_mm[1] - (half_sizes_mm(patient)[2] + 9) * patient.stature[1]
    sheet = np.abs(y - (top + (x / 60) ** 2)) - 2 + 50 * (np.abs(x) > 170)
    canvas.paint(Solid(canvas.whole, np.broadcast_to(sheet, canvas.image.shape)), -250)


def muscles_and_spine(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """Psoas, the muscles of the back, the crura of the diaphragm; vertebrae with discs, arches and processes."""
    muscle = patient.hu["muscle"]
    for out in SIDES.values():
        canvas.paint(canvas.ellipsoid((out * 33, -92, 80), (29, 17, ENDLESS), rough_mm=1), muscle - 8, 12)
        canvas.paint(canvas.ellipsoid((out * 64, -78, 0), (22, 9, 60), (0, 0, out * 0.4)), muscle - 4, 8)
        psoas = [(out * 27, -58, 85), (out * 34, -57, 50), (out * 44, -54, 0), (out * 52, -50, -60)]
        canvas.claim(canvas.tube(psoas, [4, 11, 16, 19]), muscle)
        crus = [(out * 9, -32, 20), (out * 13, -31, 70), (out * 17, -28, 120), (out * 24, -24, 160)]
        canvas.paint(canvas.tube(crus, [4, 5.5, 5, 4]), muscle, 5)

    level = (canvas.xyz[2] + spread(rng, 12)) / (34 * spread(rng, 0.04, 1)) % 1  # through one vertebra; discs below 0.2
    spool = canvas.ellipsoid((0, -56, 80), (23, 18, ENDLESS))
    spool = spool.grown(1.6 * np.cos(2 * np.pi * level[spool.box])) - canvas.ellipsoid((0, -76, 80), (13, 8, ENDLESS))
    disc = level[spool.box] < 0.2
    canvas.paint(spool, np.where(disc, 90, spread(rng, 30, 185) + 30 * canvas.fine[spool.box]))
    canvas.paint(spool.layer(1.5, 3.5), np.where(disc, 100, 430))
    canvas.close(spool)
    arch = canvas.ellipsoid((0, -79, 80), (17, 13, ENDLESS)).layer(3, 6)
    spinous = canvas.ellipsoid((0, -98, 80), (4, 13, ENDLESS))
    canvas.paint(arch | spinous, BONE_HU)
    transverse = canvas.ellipsoid((0, -80, 80), (42, 4.5, ENDLESS))
    mid_height = 8 * np.abs(level[transverse.box] - 0.6) - 1.2
    canvas.paint(Solid(transverse.box, np.maximum(transverse.distance, mid_height)), BONE_HU)
    canvas.paint(canvas.ellipsoid((0, -79, 80), (10, 8, ENDLESS)), 25)


def lungs_and_heart(canvas: Canvas, patient: Patient, chest: Solid) -> None:
    """What is seen above the diaphragm: the bases of both lungs around a mediastinum, the apex of the heart."""
    mediastinum = canvas.ellipsoid((2, -14, 160), (30, 34, ENDLESS)) | canvas.ellipsoid((0, -66, 160), (34, 34, ENDLESS))
    lungs = canvas.free(chest.grown(-2)) - mediastinum
    canvas.paint(lungs, LUNG_HU + 60 * canvas.patchy + 160 * np.clip(canvas.fine - 1.5, 0, 1))
    heart = canvas.free(canvas.ellipsoid((-16, 34, 190), (58, 44, 34), (0, 0.2, 0.3)) & chest.grown(-3))
    canvas.paint(heart, 0.7 * patient.hu["vena cava"] + 12, 8)
    canvas.paint(heart.layer(0, 3), patient.hu["fat"] + 60)
    canvas.close(chest.grown(2.5))


# --- vessels


def great_vessels(canvas: Canvas, patient: Patient, rng: np.random.Generator, chest: Solid) -> None:
    """Aorta with its plaques, inferior vena cava, and the veins of the kidneys."""
    bend = spread(rng, 4)
    path = [(-13, -36, 215), (-11 + bend, -33, 150), (-7 + bend, -29, 90), (-4, -28, 30), (-2, -29, -50)]
    tube = canvas.tube(path, np.array([12.5, 12, 11, 10, 9]) * spread(rng, 0.09, 1))
    aorta = canvas.claim(tube, patient.hu["aorta"], LABEL["aorta"])
    if patient.calcified:
        plaques = 3 - 2.5 * canvas.fine[aorta.box]
        canvas.paint(Solid(aorta.box, np.maximum(aorta.layer(1.5, 2.6).distance, plaques)), 500)

    path = [(24, 4, 185), (24, -6, 150), (23 + spread(rng, 2), -16, 100), (22 + spread(rng, 3), -24, 40), (19, -28, -50)]
    tube = canvas.tube(path, np.array([14, 14, 13, 12, 11]) * spread(rng, 0.1, 1), flat=spread(rng, 0.07, 0.8))
    mixing = 10 if patient.phase == "arterial" else 4  # enhanced blood of the kidneys meets plain blood of the legs
    canvas.claim(tube - chest, patient.hu["vena cava"], LABEL["inferior vena cava"], mixing)

    for side, out in SIDES.items():
        centre = patient.landmarks.kidneys[side]
        renal = canvas.tube([(out * 8, -22, centre[2] + 8), centre + mm(-out * 22, 6, 0)], 3.6)
        canvas.paint(canvas.free(renal), patient.hu["vena cava"])


def portal_vessels(canvas: Canvas, patient: Patient) -> None:
    """Coeliac and superior mesenteric artery; the mesenteric and splenic veins, which join behind the pancreas's neck."""
    _, neck, body, tail = patient.landmarks.pancreas
    confluence, hilum = neck + mm(0, -10, 0), patient.landmarks.liver + mm(-26, 6, -8)
    canvas.claim(canvas.tube([(-7, -22, 88), (-5, -8, 80), (-3, 2, 40), (0, 8, -20)], 3.8), patient.hu["aorta"])
    canvas.claim(canvas.tube([(-8, -22, 98), (-6, -10, 102), (18, -2, 100)], 3.2), patient.hu["aorta"])
    splenic = [confluence, body + mm(0, -9, 0), tail + mm(0, -9, 2), patient.landmarks.spleen + mm(20, 8, 0)]
    canvas.claim(canvas.tube([(6, 10, -20), (9, 3, 40), confluence], 5), patient.hu["portal vein"])
    canvas.claim(canvas.tube([confluence, (neck + hilum) / 2, hilum], 6.5), patient.hu["portal vein"])
    canvas.claim(canvas.tube(splenic, 4.2), patient.hu["portal vein"])


def mesentery(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """Small vessels in the fat between the organs, from the root of the mesentery outwards."""
    for _ in range(12):
        root = mm(0, 4, rng.uniform(0, 60))
        tip = root + mm(rng.uniform(-70, 70), rng.uniform(10, 60), rng.uniform(-30, 20))
        twig = canvas.tube([root, (root + tip) / 2 + rng.normal(0, 6, 3), tip], [2.6, 2, 1.4])
        canvas.paint(canvas.free(twig), patient.hu["portal vein"])


# --- solid organs


def kidney(canvas: Canvas, patient: Patient, rng: np.random.Generator, side: Side) -> None:
    """Cortex, medulla, and the sinus with its pelvis; at times a cyst. The two are mirror images but for their place."""
    if side not in patient.kidneys:
        return
    centre, out = patient.landmarks.kidneys[side], SIDES[side]
    radii = mm(27, 26, 52) * patient.kidney_size * spread(rng, 0.05, 1)
    turn = (spread(rng, 0.07, 0.2), -out * spread(rng, 0.07, 0.22), out * spread(rng, 0.15, 0.5))
    hilum = centre + mm(-out * 15, 8, 0)
    sinus = canvas.ellipsoid(hilum, (17, spread(rng, 1.5, 10), 26), turn, rough_mm=1.5)
    bean = canvas.ellipsoid(centre, radii, turn, rough_mm=1)
    cysts = []
    if rng.random() < 0.25:
        edge = centre + mm(out * 0.9, rng.uniform(-0.5, 0.5), rng.uniform(-0.8, 0.8)) * radii
        cysts = [canvas.ellipsoid(edge, 3 * [rng.uniform(6, 15)])]
    whole = bean | cysts[0] if cysts else bean
    organ = canvas.claim(whole - sinus, patient.hu["kidney cortex"], LABEL[f"{side} kidney"])
    pyramids = canvas.ellipsoid(centre, 0.72 * radii, turn, rough_mm=3) & organ.grown(-1)
    canvas.paint(pyramids, patient.hu["kidney medulla"], 8)
    for cyst in cysts:
        canvas.paint(cyst & organ, CYST_HU)
    canvas.claim(sinus & bean, patient.hu["fat"] + 45, texture_hu=20)
    canvas.paint(canvas.ellipsoid(hilum, (6, 4, 13), turn), patient.hu["renal pelvis"])


def adrenal(canvas: Canvas, patient: Patient, rng: np.random.Generator, side: Side) -> None:
    """Two thin limbs that meet in front, above the kidney. Slightly plump: real limbs of 5 mm fall between voxels."""
    apex = (mm(35, -26, 112) if side == "right" else mm(-36, -24, 106)) + rng.normal(0, 2.5, 3)
    out, radius = SIDES[side], 4.7 * spread(rng, 0.1, 1)
    inner = canvas.tube([apex + mm(0, 2, 10), apex, apex + mm(out * 2, -18, -8)], radius)
    outer = canvas.tube([apex + mm(0, 2, 6), apex + mm(out * 9, -10, -5), apex + mm(out * 16, -18, -14)], radius)
    canvas.claim(inner | outer, patient.hu["adrenal"], LABEL[f"{side} adrenal gland"])


def gallbladder(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """A pear of bile in a fold of the liver; at times thickened, at times with a stone."""
    if not patient.gallbladder:
        return
    centre = patient.landmarks.gallbladder
    path = [centre + mm(-10, -14, 22), centre + mm(-2, 0, 6), centre + mm(2, 6, -12)]
    sac = canvas.tube(path, np.array([7, 17, 17]) * spread(rng, 0.14, 1), rough_mm=0.8)
    sac = canvas.claim(sac, BILE_HU + (35 if rng.random() < 0.1 else 0), LABEL["gallbladder"])
    canvas.paint(sac.layer(0, 1.5), patient.hu["gut wall"])
    if rng.random() < 0.15:
        canvas.paint(canvas.ellipsoid(centre + mm(2, -4, -12), (7, 6, 7)) & sac, 240)


def pancreas(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """From the loop of the duodenum to the spleen, lobulated, with fat between the lobules in the obese."""
    head, neck, body, tail = patient.landmarks.pancreas
    path = [head + mm(-4, -6, -18), head, neck, body, tail]
    gland = canvas.tube(path, np.array([10, 17, 11.5, 12.5, 11]) * spread(rng, 0.1, 1))
    lobules = rng.uniform(1, 2.2) * canvas.fine[gland.box]
    gland = canvas.claim(gland.grown(-lobules), patient.hu["pancreas"], LABEL["pancreas"], 6)
    septa = np.maximum(gland.distance, (1.2 - canvas.fine[gland.box]) * 4)
    canvas.paint(Solid(gland.box, septa), patient.hu["pancreas"] - 25 - 1.5 * patient.fat_mm)


def spleen(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """A crescent against the left wall, hollowed by kidney and stomach. Mottled in the arterial phase."""
    centre, size = patient.landmarks.spleen, patient.spleen_size
    turn = (spread(rng, 0.15), spread(rng, 0.1), spread(rng, 0.15, -0.5))
    pulp = canvas.ellipsoid(centre, mm(42, 62, 60) * size, turn, rough_mm=2)
    hollow = canvas.ellipsoid(centre + mm(42, 24, 4) * size, mm(28, 38, 46) * size)
    canvas.claim(pulp - hollow, patient.hu["spleen"], LABEL["spleen"], 18 if patient.phase == "arterial" else 4)


def liver(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """Both lobes, carved from below, with veins, which fat or a poor phase may hide, and at times lesions."""
    centre, size = patient.landmarks.liver, patient.liver_size
    turn = (spread(rng, 0.07), spread(rng, 0.08, 0.15), spread(rng, 0.08))
    right = canvas.ellipsoid(centre, mm(70, 88, 88) * size, turn, rough_mm=2)
    reach = mm(66 * size * spread(rng, 0.15, 1), 36, 32 * spread(rng, 0.1, 1))  # how far the left lobe crosses the midline
    left = canvas.ellipsoid(centre + mm(-62, 36, 20) + rng.normal(0, 4, 3), reach, (0, spread(rng, 0.1, 0.22), 0.1))
    hollow = canvas.ellipsoid(centre + mm(-52, 0, -82), (72, 66, 74), rough_mm=2)  # bowel and stomach press from below
    spine = canvas.ellipsoid((0, -52, 90), (36, 34, ENDLESS))
    organ = canvas.claim(blend(right, left, 16) - hollow - spine, patient.hu["liver"], LABEL["liver"], 5)

    inside = organ.grown(-4)
    hilum = centre + mm(-26, 6, -8)
    for _ in range(6):
        tip = centre + rng.normal(0, mm(36, 40, 34))
        path = [hilum + rng.normal(0, 5, 3), (hilum + tip) / 2 + rng.normal(0, 8, 3), tip]
        canvas.paint(canvas.tube(path, [5.5, 4, 2.2]) & inside, patient.hu["portal vein"])
    hepatic_hu = patient.hu["liver"] - 8 if patient.phase == "arterial" else patient.hu["vena cava"]
    for tip in (mm(50, 10, 20), mm(10, 50, 25), mm(-30, 40, 25)):  # they fan out from the vena cava under the dome
        path = [mm(26, 0, 152), centre + 0.55 * tip + mm(0, 0, 22), centre + tip]
        canvas.paint(canvas.tube(path, [5.5, 4.5, 2.5]) & inside, hepatic_hu)
    for _ in range(patient.lesions):
        lesion = canvas.ellipsoid(centre + rng.normal(0, 26, 3), 3 * [rng.uniform(5, 16)], rough_mm=1.5)
        canvas.paint(lesion & inside, rng.choice([CYST_HU, patient.hu["liver"] - 45, patient.hu["liver"] + 40]))


# --- the gut


def esophagus(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """From behind the heart through the diaphragm to the stomach; at times with a bubble."""
    cardia = patient.landmarks.cardia
    path = [mm(-2 + spread(rng, 3), -12, 225), mm(-4 + spread(rng, 3), -11, 185), cardia + mm(10, 1, 18), cardia]
    gullet = canvas.claim(canvas.tube(path, [9.5, 9.5, 9, 9]), patient.hu["gut wall"] - 4, LABEL["esophagus"])
    if rng.random() < 0.4:
        canvas.paint(gullet.grown(-6), -600)


def stomach(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """From the fundus under the left dome, down and forwards, across to the pylorus."""
    cardia, pylorus = patient.landmarks.cardia, patient.landmarks.pylorus
    body, antrum = mm(-64, 40, 112) + rng.normal(0, 6, 3), mm(-34, 60, 84) + rng.normal(0, 7, 3)
    fundus = [cardia + mm(-36, -16, 12), cardia + mm(-42, 8, -6)]
    path = [*fundus, body, antrum, pylorus + mm(-22, 10, 0), pylorus]
    bag = canvas.tube(path, np.array([27, 33, 29, 23, 17, 10]) * patient.stomach_filling, rough_mm=2.5)
    entry = canvas.tube([cardia, fundus[1]], [9, 14])
    bag = canvas.claim(blend(bag, entry, 6), patient.hu["gut wall"], LABEL["stomach"], 5)
    level_mm = spread(rng, 14, 30) if patient.gas else np.inf
    fill(canvas, bag.grown(-4.5), patient.contents_hu, rng.uniform(7, 35), level_mm)


def duodenum(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """The C around the head of the pancreas, left between aorta and mesenteric artery, and up to the jejunum."""
    pylorus, head = patient.landmarks.pylorus, patient.landmarks.pancreas[0]
    low = head[2] - 44 + spread(rng, 4)
    descent = [pylorus, pylorus + mm(18, -8, 4), head + mm(25, 2, 0), head + mm(24, -8, -32)]
    path = [*descent, mm(14, -8, low), mm(-22, -6, low + 8), mm(-34, 2, head[2] - 12)]
    loop = canvas.tube(path, np.array([9, 13, 13, 13, 12, 11, 11]) * spread(rng, 0.09, 1), rough_mm=1.6)
    loop = canvas.claim(loop, patient.hu["gut wall"], LABEL["duodenum"])
    contents = patient.contents_hu if rng.random() < 0.6 else rng.choice(list(GUT_CONTENTS_HU.values()))
    bubbles = (canvas.patchy[loop.box] > 1.3) & patient.gas
    canvas.paint(loop.grown(-4.5), np.where(bubbles, -500, contents), 8)


def bowel(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """Colon and small bowel: no label, and the stomach's and duodenum's wall and contents."""
    g = patient.girth
    right, left = mm(92 * g, 14, 34) + rng.normal(0, 6, 3), mm(-94 * g, 4, 84) + rng.normal(0, 8, 3)  # the flexures
    middle = mm(0, 66 * g, 36) + rng.normal(0, 10, 3)
    ascending = [mm(94 * g, 2, -60), mm(96 * g, -2, -10), right]
    transverse = [right, (right + middle) / 2 + mm(0, 22, 0), middle, (left + middle) / 2 + mm(0, 22, -10), left]
    descending = [left, mm(-104 * g, -22, 30), mm(-100 * g, -24, -60)]
    for path, radius in ((ascending, 24), (transverse, 19), (descending, 16)):
        gut(canvas, patient, rng, path, spread(rng, 3, radius), stool=rng.random() < 0.6)
    for _ in range(22):
        centre = mm(rng.uniform(-88, 84) * g, rng.uniform(-22, 66) * g, rng.uniform(-36, 58))
        step = rng.normal(0, (20, 15, 9), (3, 3))
        path = [centre - step[0], centre + 0.4 * step[1], centre + step[2]]
        gut(canvas, patient, rng, path, rng.uniform(9, 14), stool=False)


def gut(
    canvas: Canvas, patient: Patient, rng: np.random.Generator, path: Sequence[Point], radius_mm: float, stool: bool
) -> None:
    """One loop of gut. Stool is food with bubbles; the small bowel holds what the stomach may hold."""
    loop = canvas.claim(canvas.tube(path, radius_mm, rough_mm=2), patient.hu["gut wall"], texture_hu=6)
    lumen = loop.grown(-3.2)
    if stool:
        canvas.paint(lumen, np.where(canvas.fine[lumen.box] > 0.4, -550, 35), 40)
    else:
        level_mm = np.mean(path, axis=0)[1] + spread(rng, 6) if rng.random() < 0.3 else np.inf
        fill(canvas, lumen, float(rng.choice(list(GUT_CONTENTS_HU.values()))), 14, level_mm)


def fill(canvas: Canvas, lumen: Solid, contents_hu: float, lumpy_hu: float, level_mm: float) -> None:
    """Contents, and gas in front of the level y = `level_mm`: patients lie on their backs."""
    mixed = contents_hu + lumpy_hu * canvas.fine[lumen.box]
    canvas.paint(lumen, np.where(canvas.xyz[1][lumen.box] > level_mm, AIR_HU, mixed))
