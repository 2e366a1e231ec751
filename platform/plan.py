"""From a question to the list of everything that must run: arms, their k pretrainings, the m fine-tunings of each.

A stage's id is the hash of all that decides its result: a finished stage is a look-up, and two sweeps that need the same
pretraining share it. Nothing here imports torch or ray, so that a plan is printed at once.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from medssl.platform import ledger
from medssl.platform.config import RESULTS_VERSION, Experiment, Part, digest
from medssl.platform.errors import UsageError
from medssl.platform.splits import Split
from medssl.platform.store import Store

PROBED = 4  # labelled training patients whom a probe learns from, however many fine-tuning may use (`platform/probe.py`)
ASKED = 16  # validation patients whom it is asked about


@dataclass(frozen=True)
class Stage:
    """One thing that runs from start to end, in a folder named after its content."""

    kind: Literal["pretrain", "finetune"]
    id: str
    seed: int
    steps: int
    parent: str | None  # the pretraining that a fine-tuning starts from; None: a fresh encoder


@dataclass(frozen=True)
class Chain:
    """One pretraining of an arm with its fine-tunings: what one worker does in one go."""

    arm: str
    index: int  # which of the arm's k pretrainings
    experiment: Experiment
    pretraining: Stage | None  # None: from scratch, the encoder as initialised by the seed of this index
    finetunings: tuple[Stage, ...]

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (*([self.pretraining] if self.pretraining else []), *self.finetunings)

    @property
    def encoder_seed(self) -> int:
        """Initial weights of the encoder: the same for every arm at one index, pretrained or not."""
        return self.experiment.seed * 1000 + self.index


def contract(store: Store, split: Split) -> str:
    """What makes two scores comparable: the prepared data, the held-out patients, and the rule of the metrics."""
    return ledger.contract(store.content_hash, digest([split.val, split.test]))


def resolve(experiment: Experiment, store: Store, split: Split) -> Experiment:
    """Fill in what depends on the data: crop sides, numbers of steps, levels of the network.

    Raises UsageError for what the data cannot give.
    """
    labelled = labelled_patients(experiment, split)
    train = set(split.train)
    slices = [volume for volume in store.volumes if volume.patient in train]
    sizes = {(volume.height, volume.width) for volume in slices}
    finetune = _with_training(experiment.finetune, sum(volume.slices for volume in slices if volume.patient in labelled))
    if getattr(finetune.settings, "side", 0) is None:
        longest = max(max(volume.height, volume.width) for volume in store.volumes)
        finetune = _with(finetune, side=min(96, -(-longest // 16) * 16))
    pretrain = experiment.pretrain
    if pretrain:
        pretrain = _with_training(pretrain, sum(volume.slices for volume in slices))
        if getattr(pretrain.settings, "side", 0) is None:
            pretrain = _with(pretrain, side=disjoint_side(sizes))
        if getattr(pretrain.settings, "iou", None) and pretrain.settings.unreachable == "error":
            _refuse_unreachable(pretrain.settings, sizes)
    _refuse_probes(experiment, store, split)
    network = experiment.network
    if getattr(network.settings, "levels", 0) is None:  # from the data alone: arms with and without pretraining share it
        network = _with(network, levels=min(5, disjoint_side(sizes).bit_length() - 2))
    return dataclasses.replace(experiment, network=network, pretrain=pretrain, finetune=finetune)


def labelled_patients(experiment: Experiment, split: Split) -> tuple[str, ...]:
    """The labelled training patients that fine-tuning may use: a prefix of the split's order, so that budgets nest."""
    wanted = experiment.data.labelled
    if wanted is not None and wanted > len(split.labelled):
        raise UsageError(f"data.labelled={wanted}: split {split.name} has {len(split.labelled)} labelled training patients")
    return split.labelled[:wanted]


def probed_patients(split: Split) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The training and the validation patients whom probes of a pretraining see: all arms and label budgets share it."""
    return split.labelled[:PROBED], split.val[:: -(-len(split.val) // ASKED)]


def disjoint_side(sizes: set[tuple[int, int]]) -> int:
    """The largest crop side, at most 96 pixels (CT study) and a multiple of 8, of which two fit apart in every slice."""
    fit = min(min(min(size), max(size) // 2) for size in sizes)
    side = min(96, fit - fit % 8)
    if side < 8:
        raise UsageError(
            f"the smallest training slice is {min(sizes)} pixels: too small for pairs of crops; prepare the data at a finer "
            "spacing or with a larger `pad`"
        )
    return side


def _refuse_probes(experiment: Experiment, store: Store, split: Split) -> None:
    tuned = experiment.finetune.training
    if tuned and tuned.probes:
        raise UsageError("finetune.training.probes: only a pretraining is probed; see finetune.training.evaluations")
    if not _probes(experiment):
        return
    annotated = {volume.patient for volume in store.volumes if volume.labelled}
    if not split.labelled or not annotated & set(split.val):
        raise UsageError(
            f"pretrain.training.probes needs labelled training and validation patients; split {split.name} has "
            f"{len(split.labelled)} and {len(annotated & set(split.val))}; set it to 0, or label some"
        )
    if getattr(experiment.network.settings, "spatial_dims", 2) != 2:
        raise UsageError("pretrain.training.probes needs slices: set it to 0 where network.spatial_dims is 3")


def _probes(experiment: Experiment) -> int:
    """How often the pretraining is probed."""
    return experiment.pretrain.training.probes if experiment.pretrain and experiment.pretrain.training else 0


def _refuse_unreachable(crops: Any, sizes: set[tuple[int, int]]) -> None:
    import numpy as np

    if crops.crop != "fixed":
        return  # sizes vary from draw to draw: `methods/crops.py` conditions them on the interval
    side, (low, high) = crops.side, crops.iou
    for size in sorted(sizes):
        if min(size) < side:
            raise UsageError(f"crops of {side} px do not fit in slices of {size[0]}x{size[1]} px; lower pretrain.side")
        overlap = [np.maximum(side - np.arange(length - side + 1), 0) for length in size]
        shared = np.outer(*overlap)
        iou = shared / (2 * side**2 - shared)
        inside = (iou >= low - 1e-9) if crops.ends[0] == "[" else (iou > low + 1e-9)
        inside &= (iou <= high + 1e-9) if crops.ends[1] == "]" else (iou < high - 1e-9)
        if not inside.any():
            raise UsageError(
                f"iou {crops.ends[0]}{low}, {high}{crops.ends[1]}: two crops of {side} px in a slice of {size[0]}x{size[1]} px "
                f"overlap by an IoU between {iou.min():.3f} and 1; choose an interval in that range, a smaller pretrain.side, "
                "or pretrain.unreachable=skip"
            )


def _with(part: Part, **changes: Any) -> Part:
    return dataclasses.replace(part, settings=dataclasses.replace(part.settings, **changes))


def _with_training(part: Part, slices: int) -> Part:
    """`part` with its number of steps: as given, or from epochs over `slices`."""
    training = part.training
    assert training is not None
    steps = training.steps or max(1, round(training.epochs * slices / training.batch))
    return dataclasses.replace(part, training=dataclasses.replace(training, steps=steps))


def chain(arm: str, index: int, finetunings: int, experiment: Experiment, store: Store, split: Split) -> Chain:
    """Everything that pretraining number `index` of an arm needs, ids included. `experiment` must be resolved."""
    encoder_seed = experiment.seed * 1000 + index
    pretraining = None
    if experiment.pretrain:
        what = [
            "pretrain",
            *_common(experiment, store),
            sorted(split.train),
            experiment.tree()["pretrain"],
            encoder_seed,
            *(probed_patients(split) if _probes(experiment) else []),
        ]
        identity = f"{experiment.pretrain.name}-{digest(what)}"
        pretraining = Stage("pretrain", identity, encoder_seed, _steps(experiment.pretrain), None)
    start = pretraining.id if pretraining else None
    stages = tuple(finetuning(number, encoder_seed, start, experiment, store, split) for number in range(finetunings))
    return Chain(arm, index, experiment, pretraining, stages)


def finetuning(number: int, encoder_seed: int, parent: str | None, experiment: Experiment, store: Store, split: Split) -> Stage:
    """Fine-tuning `number` from a pretraining's id, or from the encoder that `encoder_seed` initialises."""
    tree = experiment.tree()
    seed = encoder_seed * 1000 + number
    data = [contract(store, split), labelled_patients(experiment, split)]
    what = [
        "finetune",
        *_common(experiment, store),
        *data,
        tree["finetune"],
        tree["evaluate"],
        parent or encoder_seed,
        seed,
    ]
    return Stage("finetune", f"{experiment.finetune.name}-{digest(what)}", seed, _steps(experiment.finetune), parent)


def _common(experiment: Experiment, store: Store) -> list[Any]:
    """What decides the result of either kind of stage."""
    tree = experiment.tree()
    order = [tree["resources"]["workers"], tree["data"]["stream"] == "ray"]  # who sees which slice when
    return [RESULTS_VERSION, store.content_hash, tree["network"], *order]


def _steps(part: Part) -> int:
    assert part.training is not None
    assert part.training.steps is not None
    return part.training.steps


def describe(arms: Mapping[str, Experiment], k: int, m: int, store: Store, split: Split, finished: set[str]) -> str:
    """The plan as text: data, arms, repeats, and how much of it is done already."""
    parts = (f"{len(split.train)} training ({len(split.labelled)} labelled)", f"{len(split.val)} validation")
    patients = ", ".join([*parts, f"{len(split.test)} test"])
    lines = [f"data     {store.name}: {len(store.volumes)} volumes; {patients} patients"]
    stages: dict[str, Stage] = {}
    for label, experiment in arms.items():
        for index in range(k):
            stages |= {stage.id: stage for stage in chain(label, index, m, experiment, store, split).stages}
    for label, experiment in arms.items():
        what = f"{_told(experiment.pretrain)}; then " if experiment.pretrain else "no pretraining; then "
        lines.append(f"arm      {label:<16} {what}{_told(experiment.finetune)}")
    network = next(iter(arms.values())).network
    lines.append(f"network  {network.name}: " + ", ".join(f"{key} {value}" for key, value in vars(network.settings).items()))
    kinds = [stage.kind for stage in stages.values()]
    done = sum(stage.id in finished for stage in stages.values())
    lines.append(f"repeats  {k} pretrainings per arm, {m} fine-tunings of each")
    lines.append(
        f"stages   {kinds.count('pretrain')} pretrainings and {kinds.count('finetune')} fine-tunings, {done} done already"
    )
    lines.append(f"steps    {sum(stage.steps for stage in stages.values() if stage.id not in finished):,} to go")
    return "\n".join(lines)


def _told(part: Part) -> str:
    """A stage in a few words."""
    assert part.training is not None
    side = getattr(part.settings, "side", None)
    crops = f" crops of {side} px" if side else ""
    return f"{part.name}, {part.training.steps} steps of {part.training.batch} slices{',' + crops if crops else ''}"
