"""Settings that several methods share, as plain frozen dataclasses.

This file imports nothing but the standard library: `platform/find.py` reads the `Config` and `Training` classes of a
method from its source, so that a plan can be checked without importing torch. They may use the names defined here,
`dataclass`, `field`, `Literal`, and literals.
"""

from dataclasses import dataclass
from typing import Literal

Optimizer = Literal["sgd", "lars", "adam", "adamw"]


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long and how fast a stage trains. A method's own file overrides these with its paper's values."""

    steps: int | None = None  # optimizer steps; None: `epochs` times the slices, over the batch
    epochs: float = 100  # passes over the slices, used when `steps` is None
    batch: int = 128  # slices per step, over all workers together
    optimizer: Optimizer = "adamw"  # "adam" adds its decay to the gradient (L2), "adamw" takes it off the weight
    lr: float = 1e-3  # peak learning rate; never scaled by the batch behind the user's back
    end_lr: float = 1e-6  # where the cosine ends
    warmup: float = 0.0  # fraction of the steps in which lr rises linearly from 0
    weight_decay: float = 1e-5  # on weights of two and more dimensions only
    end_weight_decay: float | None = None  # where it goes, along a cosine over all steps; None: it stays
    momentum: float = 0.9  # of sgd and lars
    eta: float = 1e-3  # of lars: the trust coefficient
    clip_lr: bool = False  # of lars: lr bounds a tensor's rate instead of multiplying it (see `lars.py`)
    betas: tuple[float, float] = (0.9, 0.999)  # of adam and adamw
    clip: float | None = None  # largest gradient norm
    accumulate: int = 1  # micro-batches per optimizer step
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    evaluations: int = 10  # evenly spaced looks at the validation patients; the best one is kept (fine-tuning only)
    snapshots: tuple[int | float, ...] = ()  # also keep the encoder here: steps, or, below 1, fractions of them
    probes: int = 0  # evenly spaced looks at the frozen encoder, and one before the first step (pretraining only)
    stop_on_collapse: bool = True  # end a pretraining whose features have collapsed (see `platform/loop.py`)

    def __post_init__(self) -> None:
        positive = {"steps": self.steps or 1, "batch": self.batch, "epochs": self.epochs, "lr": self.lr}
        positive |= {"accumulate": self.accumulate, "evaluations": self.evaluations, "clip": self.clip or 1}
        positive |= {"eta": self.eta}
        for name, value in positive.items():
            if value <= 0:
                raise ValueError(f"{name} is {value}: expected more than 0")
        if any(place <= 0 or (place > 1 and place != int(place)) for place in self.snapshots):
            raise ValueError(f"snapshots are {self.snapshots}: expected whole steps from 1, or fractions between 0 and 1")
        if self.probes < 0:
            raise ValueError(f"probes is {self.probes}: expected at least 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}: expected 0 <= beta < 1")
        if self.end_weight_decay is not None and self.end_weight_decay < 0:
            raise ValueError(f"end_weight_decay is {self.end_weight_decay}: expected at least 0, or null for a constant decay")
        if self.steps == 0 or not 0 <= self.warmup < 1 or self.weight_decay < 0 or not 0 <= self.end_lr <= self.lr:
            raise ValueError("expected steps > 0, 0 <= warmup < 1, weight_decay >= 0 and 0 <= end_lr <= lr")
        if self.batch % self.accumulate:
            raise ValueError(f"batch {self.batch} cannot be cut into {self.accumulate} equal micro-batches")


@dataclass(frozen=True, kw_only=True)
class PairCrops:
    """Which two crops of one slice make a positive pair (see `crops.py`)."""

    side: int | None = None  # pixels of a view; None: 96, or less where the slices are too small for two disjoint crops
    iou: tuple[float, float] | None = (0.3, 0.6)  # overlap of the two source boxes; None: any
    ends: Literal["[]", "(]", "[)", "()"] = "[]"  # which ends of the interval belong to it
    law: Literal["conditional", "pair", "iou"] = "conditional"  # what is uniform inside the interval
    crop: Literal["fixed", "resized"] = "fixed"  # boxes of `side` pixels, or random-resized boxes
    scale: tuple[float, float] = (0.08, 1.0)  # area of a resized box, as a fraction of the slice
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height of a resized box
    unreachable: Literal["error", "skip"] = "error"  # a slice that cannot hold such a pair: refuse, or leave out and count

    def __post_init__(self) -> None:
        if self.side is not None and self.side < 1:
            raise ValueError(f"side is {self.side}: expected at least 1 pixel")
        if self.iou is not None:
            low, high = self.iou
            empty = low == high and self.ends != "[]"
            if not 0 <= low <= high <= 1 or empty:
                raise ValueError(
                    f"iou is {self.ends[0]}{low}, {high}{self.ends[1]}: expected 0 <= low <= high <= 1 and not empty"
                )
        if not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"scale {self.scale} must lie in (0, 1] and ratio {self.ratio} above 0, each low first")
        super_check = getattr(super(), "__post_init__", None)  # of the next class where a method combines several
        if super_check:
            super_check()


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The intensity and geometry chain of the CT study (see `augment.py`); operations in this order."""

    zoom: tuple[float, float] = (0.8, 1.2)
    zoom_p: float = 0.75
    flip_p: float | tuple[float, ...] = 0.5  # of every axis alike, or of rows, columns (and slices) each its own
    rot90_p: float = 0.5
    intensity_scale: float = 0.1  # x (1 + f), f uniform in ±
    intensity_scale_p: float = 0.75
    intensity_shift: float = 0.1  # x + o, o uniform in ±, intensities being in [0, 1]
    intensity_shift_p: float = 0.75
    blur_sigma: tuple[float, float] = (0.25, 1.5)  # pixels, each axis its own
    blur_p: float = 0.25
    noise_std: float = 0.01  # the deviation is itself uniform in [0, this]
    noise_p: float = 0.25

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            each = value if isinstance(value, tuple) else (value,)
            if name.endswith("_p") and not all(0 <= p <= 1 for p in each):
                raise ValueError(f"{name} is {value}: a probability lies in [0, 1]")
        if not 0 < self.zoom[0] <= self.zoom[1] or not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"zoom {self.zoom} and blur_sigma {self.blur_sigma}: expected 0 < low <= high")
        super_check = getattr(super(), "__post_init__", None)
        if super_check:
            super_check()


@dataclass(frozen=True, kw_only=True)
class Deformation:
    """Affine and elastic deformation of labelled slices, off unless asked for (see `deform.py`)."""

    affine_p: float = 0.0  # of an image to have one of four affine deformations (source: 0.8)
    rotation: float = 15.0  # degrees, uniform in ±
    rescale: tuple[float, float] = (0.95, 1.05)
    elastic_p: float = 0.0  # (source: about 0.525)
    elastic_sigma: float = 5.0  # pixels: standard deviation of the displacement of a node
    elastic_nodes: int = 3  # per axis

    def __post_init__(self) -> None:
        if not all(0 <= p <= 1 for p in (self.affine_p, self.elastic_p)):
            raise ValueError(f"affine_p is {self.affine_p} and elastic_p {self.elastic_p}: a probability lies in [0, 1]")
        if not 0 < self.rescale[0] <= self.rescale[1] or self.rotation < 0:
            raise ValueError(f"rescale {self.rescale}: expected 0 < low <= high; rotation {self.rotation}: at least 0")
        if self.elastic_sigma < 0 or self.elastic_nodes < 2:
            raise ValueError(
                f"elastic_sigma is {self.elastic_sigma} and elastic_nodes {self.elastic_nodes}: expected at least 0 and 2"
            )
        super_check = getattr(super(), "__post_init__", None)
        if super_check:
            super_check()


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Warps and changes of colour of labelled pictures, off unless asked for (see `colour.py`); numbers are PDCR's."""

    warp_p: float = 0.0  # of a picture to be warped (source: 1)
    warp_scale: tuple[float, float] = (0.8, 1.2)  # of columns and rows, each its own
    warp_shift: float = 0.1  # of columns and rows, each its own, uniform in ± this share of the side
    warp_rotation: float = 90.0  # degrees, uniform in ±
    warp_shear: float = 20.0  # degrees, uniform in ±
    colour_p: float = 0.0  # of a picture of three channels to change its colours (source: 1)
    hue: float = 50 / 255  # share of the circle, uniform in ±
    saturation: float = 50 / 255  # added, uniform in ±
    brightness: float = 0.0  # added to the value, uniform in ±

    def __post_init__(self) -> None:
        if not all(0 <= p <= 1 for p in (self.warp_p, self.colour_p)):
            raise ValueError(f"warp_p is {self.warp_p} and colour_p {self.colour_p}: a probability lies in [0, 1]")
        if not 0 < self.warp_scale[0] <= self.warp_scale[1] or not 0 <= self.warp_shear < 45:
            raise ValueError(
                f"warp_scale {self.warp_scale}: expected 0 < low <= high; warp_shear {self.warp_shear}: 0 to below 45"
            )
        ranges = (self.warp_shift, self.warp_rotation, self.hue, self.saturation, self.brightness)
        if min(ranges) < 0:
            raise ValueError(f"warp_shift, warp_rotation, hue, saturation, brightness are {ranges}: each at least 0")
        super_check = getattr(super(), "__post_init__", None)
        if super_check:
            super_check()


@dataclass(frozen=True, kw_only=True)
class SelfDistillation(PairCrops, Chain):
    """Views, head and teacher of DINO (see `dino.py`) and of what is built on it."""

    crop: Literal["fixed", "resized"] = "resized"
    scale: tuple[float, float] = (0.4, 1.0)  # of the global views
    local_crops: int = 8  # small views of each slice, besides the two global ones; 0: none
    local_side: int | None = None  # pixels of a local view; None: about 3/7 of `side`, as 96 of 224
    local_scale: tuple[float, float] = (0.05, 0.4)  # area of a local view's box, as a fraction of the slice
    hidden: int = 2048  # hidden size of the head
    bottleneck: int = 256  # what it ends in before the prototypes
    prototypes: int = 65536  # K; memory and time of a step grow with it, and small data need few (CT study: 1024)
    temperature: float = 0.1  # of the student
    teacher_temperature: tuple[float, float] = (0.04, 0.07)  # at the first step, and after `teacher_warmup`
    teacher_warmup: float = 0.1  # fraction of the steps: 30 of 300 epochs
    momentum: float = 0.996  # of the teacher at the first step, from where it rises to 1
    centre_momentum: float = 0.9
    freeze_last_layer: float = 1 / 300  # fraction of the steps in which the prototypes do not move: the first epoch

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.local_crops < 0 or (self.local_side is not None and self.local_side < 1):
            raise ValueError(f"local_crops is {self.local_crops} and local_side {self.local_side}: expected at least 0 and 1")
        if not 0 < self.local_scale[0] <= self.local_scale[1] <= 1:
            raise ValueError(f"local_scale is {self.local_scale}: expected 0 < low <= high <= 1")
        for name in ("hidden", "bottleneck", "prototypes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        for name in ("teacher_warmup", "momentum", "centre_momentum", "freeze_last_layer"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 0 to 1")
        if min(self.temperature, *self.teacher_temperature) <= 0:
            raise ValueError(
                f"temperature is {self.temperature} and teacher_temperature {self.teacher_temperature}: expected more than 0"
            )


@dataclass(frozen=True, kw_only=True)
class Dense(Chain):
    """Views of a pretraining of encoder and decoder, and what of them it trains (see `dense.py`)."""

    side: int | None = None  # pixels of a crop; None: 96, or less where the slices are too small
    freeze_encoder: bool = False  # train the decoder alone

    def __post_init__(self) -> None:
        if self.side is not None and self.side < 1:
            raise ValueError(f"side is {self.side}: expected at least 1 pixel")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """Clusters that are balanced, and unsure at edges: a hook and a pretraining (see `hooks/boundary_aware.py`)."""

    clusters: int = 40  # K
    heads: int = 3  # S
    hidden: int | None = None  # hidden size of a head; None: it is linear
    redundancy: float = 1.0  # of L_RR
    boundary: float = 1.0  # of L_CC
    alpha: float = 0.5  # of L_RR
    balance: float = 1.0
    window: int = 5  # cells
    power: float = 0.75  # of the edges

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or self.clusters < 2 or self.heads < 1 or min(self.balance, self.power) <= 0:
            raise ValueError("expected alpha in [0, 1], clusters of at least 2, heads of at least 1, balance and power above 0")
        if min(self.redundancy, self.boundary) < 0 or self.redundancy + self.boundary == 0:
            raise ValueError("redundancy and boundary: expected weights of at least 0, not both 0")
        if self.window < 3 or self.window % 2 == 0:
            raise ValueError(f"window is {self.window}: expected an odd number from 3")
        super_check = getattr(super(), "__post_init__", None)
        if super_check:
            super_check()


@dataclass(frozen=True, kw_only=True)
class Unlabelled(Chain):
    """How hooks are fed: unlabelled slices per step, and the chain of their second view (the first has the labelled one's)."""

    batch: int | None = None  # unlabelled slices per step, over all workers together; None: as many as labelled ones
    track: bool = True  # the running statistics of batch norms follow unlabelled crops, too

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch is {self.batch}: expected at least 1 unlabelled slice per step, or null")


@dataclass(frozen=True, kw_only=True)
class Hook:
    """What every hook has: the weight of its term, and how it rises (see `ramps.py`)."""

    weight: float = 1.0  # 0: no term
    ramp: Literal["constant", "linear", "sigmoid"] = "constant"
    ramp_length: float = 1.0  # fraction of the steps after which the weight is whole

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight is {self.weight}: expected at least 0")
        if not 0 < self.ramp_length <= 1:
            raise ValueError(f"ramp_length is {self.ramp_length}: expected more than 0, and at most 1")


@dataclass(frozen=True, kw_only=True)
class TeacherHook(Hook):
    """A hook whose teacher follows the network (see `hooks/mean_teacher.py`)."""

    weight: float = 10.0
    ramp: Literal["constant", "linear", "sigmoid"] = "sigmoid"
    momentum: float = 0.99  # a: the share of its own that the teacher keeps at a step
    decay: float = 0.0  # λ: of the teacher's weights at a step

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.momentum <= 1 and 0 <= self.decay < 1):
            raise ValueError(f"momentum is {self.momentum} and decay {self.decay}: expected 0 to 1, and 0 to less than 1")


@dataclass(frozen=True, kw_only=True)
class UAFS:
    """Maps weighted by how certain a small head is of each position (see `uafs.py`)."""

    layers: tuple[str, ...] | None = None  # modules of the network, after which maps are weighted; None: the paper's
    outcomes: int = 2  # M; it has nothing to do with the number of classes
    hidden: int | None = 16  # channels inside the head; None: a quarter of the map's (the paper's choice in 3D)
    kernel: int = 3  # of its first convolution, odd
    dropout: float = 0.0  # inside the head (paper: 0.1 in pyramid and decoder)

    def __post_init__(self) -> None:
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise ValueError(f"layers is {self.layers}: expected names of modules, each once")
        if min(self.outcomes, self.hidden or 1) < 1 or self.hidden == 0:
            raise ValueError(f"outcomes is {self.outcomes} and hidden {self.hidden}: expected at least 1")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel is {self.kernel}: expected an odd number, so that maps keep their sides")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: expected a probability below 1")


@dataclass(frozen=True, kw_only=True)
class ContrastHook(Hook):
    """A hook that contrasts features by what their slices share (see `infonce.py`)."""

    layer: str = "encoder"  # a module of the network: "encoder" gives its coarsest map, "decoder" the map under the head
    labels: tuple[Literal["partition", "patient", "cycle", "self", "place"], ...] = ("partition",)  # meta-labels
    shares: tuple[float, ...] | None = None  # the weight of each meta-label's term; None: 1 each
    temperature: float = 0.07  # τ
    rivals: Literal["all", "negatives"] = "all"  # the denominator: everything else, or other labels and the positive itself
    partitions: int = 3  # parts of a volume that slices are told apart by
    partition: Literal["equal", "thirds", "blocks"] = "equal"  # where they end (see `infonce.by_height`)
    hidden: int = 256  # hidden size of the head
    d: int = 256  # size of z
    grid: int = 10  # of "place": the map is averaged to so many cells per axis
    places: int = 5  # of "place": cells drawn in each crop

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.labels or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels are {self.labels}: expected one at least, and none twice")
        if self.shares is not None and (len(self.shares) != len(self.labels) or min(self.shares) < 0):
            raise ValueError(f"shares are {self.shares} for the labels {self.labels}: expected a weight of at least 0 for each")
        for name in ("temperature", "partitions", "hidden", "d", "grid", "places"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected more than 0")
        if self.places > self.grid**2:
            raise ValueError(f"places is {self.places}: a map of {self.grid} x {self.grid} cells has fewer")
        if self.partition == "thirds" and self.partitions != 3:
            raise ValueError(f"partition is thirds and partitions {self.partitions}: expected 3")
