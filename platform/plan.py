"""From a question to the list of everything that must run: arms, their k pretrainings, the m fine-tunings of each.

A stage's id is the hash of all that decides its result: a finished stage is a look-up, and two sweeps that need the same
pretraining share it. Nothing here imports torch or ray, so that a plan is printed at once.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medssl.methods.settings import Unlabelled
from medssl.platform import find, ledger
from medssl.platform.config import RESULTS_VERSION, Experiment, Part, Start, digest
from medssl.platform.errors import UsageError
from medssl.platform.splits import Split, drawn
from medssl.platform.store import Store, VolumeRecord

Size = tuple[int, ...]  # rows and columns of a slice; rows, columns and slices of a volume


class TooFewLabels(UsageError):
    """A budget of labels that is larger than what the data have."""


@dataclass(frozen=True)
class Origin:
    """Weights that were there before the experiment: the end of a medssl pretraining, or a file."""

    file: Path
    identity: str  # of a pretraining its id; of a file a hash of its content, wherever it lies
    run: str | None  # the pretraining's id


PROBED = 4  # labelled training patients whom a probe learns from, however many fine-tuning may use (`platform/probe.py`)
ASKED = 16  # validation patients whom it is asked about


@dataclass(frozen=True)
class Stage:
    """One thing that runs from start to end, in a folder named after its content."""

    kind: Literal["pretrain", "finetune"]
    id: str
    seed: int
    steps: int
    parent: str | None  # the medssl pretraining that it starts from; None: a fresh encoder, or a file of weights
    further: bool = False  # the pretraining upon the pretraining

    def seen(self, experiment: Experiment) -> Experiment:
        """`experiment` as it would be typed for this stage alone: a pretraining is then its only one."""
        if self.kind == "finetune":
            return experiment
        return dataclasses.replace(
            experiment, pretrain=experiment.further if self.further else experiment.pretrain, further=None
        )


@dataclass(frozen=True)
class Chain:
    """One pretraining of an arm with its fine-tunings: what one worker does in one go."""

    arm: str
    index: int  # which of the arm's k pretrainings
    experiment: Experiment
    pretraining: Stage | None  # None: from scratch, the encoder as initialised by the seed of this index
    finetunings: tuple[Stage, ...]
    further: Stage | None = None  # the pretraining that begins where `pretraining` ends

    @property
    def pretrainings(self) -> tuple[Stage, ...]:
        """In order: fine-tunings start from the last."""
        return tuple(stage for stage in (self.pretraining, self.further) if stage)

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (*self.pretrainings, *self.finetunings)

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
    experiment = _counted(experiment, split)
    labelled = labelled_patients(experiment, split)
    train, dims = set(split.train), experiment.spatial_dims
    if dims == 3 and experiment.data.stream == "ray":
        raise UsageError("data.stream=ray streams slices, not volumes; in 3D leave data.stream out, or set it to node")
    volumes = [volume for volume in store.volumes if volume.patient in train]
    sizes = _sizes(volumes, dims)
    chosen = labelled_slices(experiment, store, split)
    count = _elements([each for each in volumes if each.patient in labelled], dims) if chosen is None else len(chosen)
    finetune = _with_training(experiment.finetune, count)
    if finetune.training and finetune.training.snapshots:
        raise UsageError("finetune.training.snapshots: only a pretraining keeps snapshots; leave it out")
    if getattr(finetune.settings, "side", 0) is None:
        every = _sizes(store.volumes, dims)
        side = cube_side(every) if dims == 3 else slice_side(every)
        finetune = _with(finetune, side=side)
    pretrain, further = (
        part and _resolved_pretraining(section, part, experiment, volumes)
        for section, part in (("pretrain", experiment.pretrain), ("further", experiment.further))
    )
    _refuse_probes(experiment, store, split)
    _refuse_cycle(experiment, store)
    unlabelled = _resolved_unlabelled(experiment, store, split)
    network = experiment.network
    if getattr(network.settings, "levels", 0) is None:  # from the data alone: arms with and without pretraining share it
        network = _with(network, levels=min(5, disjoint_side(sizes).bit_length() - 2))
    for section, part in (("pretrain", pretrain), ("further", further)):
        _refuse_blocks(section, part, network)
    start = _resolved_start(experiment.start, further or pretrain)
    return dataclasses.replace(
        experiment, network=network, pretrain=pretrain, further=further, finetune=finetune, start=start, unlabelled=unlabelled
    )


def _counted(experiment: Experiment, split: Split) -> Experiment:
    """With `data.labelled` as a number of patients: a share of them is rounded, to one at least."""
    share = experiment.data.labelled
    if share is None or isinstance(share, int):
        return experiment
    count = max(1, round(share * len(split.labelled))) if share < 1 else int(share)
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, labelled=count))


def _resolved_pretraining(section: str, part: Part, experiment: Experiment, volumes: list[VolumeRecord]) -> Part:
    """A pretraining with its steps and the side of its views."""
    dims = experiment.spatial_dims
    if dims == 3 and find.constant("method", part.name, "SLICES_ONLY", False):
        raise UsageError(f"{section}.name={part.name} trains on slices only; choose another, or set network.spatial_dims=2")
    part, sizes = _with_training(part, _elements(volumes, dims)), _sizes(volumes, dims)
    if getattr(part.settings, "side", 0) is None:
        whole = dims == 2 and find.constant("method", part.name, "VIEWS", "crops") == "whole slices"
        part = _with(part, side=slice_side(sizes) if whole else disjoint_side(sizes))
    if getattr(part.settings, "iou", None) and part.settings.unreachable == "error":
        _refuse_unreachable(part.settings, sizes)
    if dims == 2 and composed(part):
        _refuse_composed(section, part, experiment)
    return part


def _refuse_blocks(section: str, part: Part | None, network: Part) -> None:
    asked, levels = getattr(part and part.settings, "blocks", 0), getattr(network.settings, "levels", None)
    if asked and levels and asked > levels - 1:
        raise UsageError(
            f"{section}.blocks={asked}: the decoder of a {network.name} of {levels} levels has {levels - 1}; lower it, or "
            "raise network.levels"
        )


def composed(part: Part) -> int:
    """S where batches are composed of volumes x S partitions (`platform/partitions.py`), else 0."""
    return 0 if getattr(part.settings, "strategy", "random") == "random" else getattr(part.settings, "partitions", 0)


def _refuse_composed(section: str, part: Part, experiment: Experiment) -> None:
    assert part.training is not None
    count, batch = composed(part), part.training.batch
    whole = count * experiment.resources.workers * part.training.accumulate
    if batch % whole:
        raise UsageError(
            f"{section}.training.batch={batch}: {part.name} composes a batch of volumes x {count} partitions, for each worker "
            f"and micro-batch whole volumes; use a multiple of {whole}, or {section}.strategy=random"
        )
    if experiment.data.stream == "ray":
        raise UsageError(
            f"data.stream=ray delivers slices as they lie on disk, and {part.name} composes batches of volumes x {count} "
            f"partitions; leave data.stream out, or set {section}.strategy=random"
        )


def _resolved_unlabelled(experiment: Experiment, store: Store, split: Split) -> Unlabelled | None:
    """How hooks are fed, with its batch. Raises UsageError when there is nothing to feed them, or it cannot be shared."""
    unlabelled, training = experiment.unlabelled, experiment.finetune.training
    if unlabelled is None or training is None:
        return unlabelled
    names = ", ".join(hook.name for hook in experiment.hooks)
    if not unlabelled_patients(experiment, split):
        raise UsageError(
            f"hooks ({names}) learn from training patients beyond data.labelled, and split {split.name} has none left; "
            f"set data.labelled below {len(split.train)}, or leave the hooks out"
        )
    batch, parts = unlabelled.batch or training.batch, experiment.resources.workers * training.accumulate
    if batch % parts:
        raise UsageError(f"unlabelled.batch={batch} cannot be shared by workers and micro-batches; use a multiple of {parts}")
    return dataclasses.replace(unlabelled, batch=batch)


def _refuse_cycle(experiment: Experiment, store: Store) -> None:
    """The meta-label "cycle" needs volumes that name their phase."""
    asking = [part.name for part in (*experiment.hooks, experiment.pretrain) if part and "cycle" in _meta_labels(part)]
    nameless = sum(volume.phase is None for volume in store.volumes)
    if asking and nameless:
        raise UsageError(
            f'{", ".join(asking)}: the meta-label "cycle" needs the phase of every volume, and {nameless} of {store.name} name '
            "none; give cases.json a phase and prepare again, or leave the label out"
        )


def _meta_labels(part: Part) -> tuple[str, ...]:
    labels: tuple[str, ...] = getattr(part.settings, "labels", ())
    return labels


def place(at: float, steps: int) -> int:
    """A step that was given as such, or, below 1, as a fraction of the steps."""
    return max(1, round(at * steps)) if at < 1 else int(at)


def _resolved_start(start: Start, pretrain: Part | None) -> Start:
    """`start` with its snapshot's step. Raises UsageError when the pretraining keeps no snapshot there."""
    if start.step is None:
        return start
    found = origin(start)
    if pretrain and pretrain.training:
        steps, snapshots = _steps(pretrain), pretrain.training.snapshots
    elif found and found.run:
        training = json.loads((found.file.parent / "run.json").read_text())["config"]["pretrain"]["training"]
        steps, snapshots = training["steps"], training.get("snapshots", ())
    else:
        raise UsageError(f"start.step={start.step}: there is no medssl pretraining whose snapshot that could be; leave it out")
    step = place(start.step, steps)
    if step == steps:
        return dataclasses.replace(start, step=None)  # its end
    if step not in snapshots:
        kept = ", ".join(map(str, snapshots)) or "none"
        raise UsageError(
            f"start.step={start.step}: the pretraining of {steps} steps keeps no snapshot at step {step} (kept: {kept}, and "
            "its end); choose one of these, or name the step in pretrain.training.snapshots"
        )
    return dataclasses.replace(start, step=step)


def origin(start: Start) -> Origin | None:
    """What `start.weights` names, by its path. Raises UsageError when nothing lies there."""
    if start.weights is None:
        return None
    path = Path(start.weights)
    if (path / "run.json").is_file():
        return Origin(path / "encoder.pt", path.name, path.name)
    if not path.is_file():
        raise UsageError(f"start.weights={start.weights}: neither a file of weights nor the folder of a pretraining")
    about = path.stat()
    return Origin(path, _content(path, about.st_size, about.st_mtime_ns), None)


@functools.cache
def _content(path: Path, size: int, changed: int) -> str:
    """Hash of a file's content; read again only when the file has changed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def labelled_patients(experiment: Experiment, split: Split) -> tuple[str, ...]:
    """The labelled training patients that fine-tuning may use: a prefix of the split's order, or of another draw's.

    So budgets nest inside a draw. All arms have the same draws.
    """
    wanted = experiment.data.labelled
    assert not isinstance(wanted, float), "`resolve` counts them"
    if wanted is not None and wanted > len(split.labelled):
        raise TooFewLabels(f"data.labelled={wanted}: split {split.name} has {len(split.labelled)} labelled training patients")
    draw = experiment.data.draw
    order = tuple(drawn(split.labelled, draw, "label draw")) if draw else split.labelled
    return order[:wanted]


def unlabelled_patients(experiment: Experiment, split: Split) -> tuple[str, ...]:
    """The training patients whom hooks learn from: those beyond `labelled_patients`, whatever is known of their labels."""
    return tuple(sorted(set(split.train) - set(labelled_patients(experiment, split))))


def labelled_slices(experiment: Experiment, store: Store, split: Split) -> tuple[tuple[str, int], ...] | None:
    """The labelled slices that fine-tuning may use, as (volume, slice_index); None: all of the labelled patients'.

    A prefix of an order that volumes' names alone decide, so that budgets nest.
    """
    wanted, patients = experiment.data.labelled_slices, labelled_patients(experiment, split)
    if wanted is None:
        return None
    if experiment.spatial_dims == 3:
        raise UsageError("data.labelled_slices counts slices, a 3D network trains on volumes; use data.labelled")
    volumes = [volume for volume in store.volumes if volume.labelled and volume.patient in patients]
    every = {f"{volume.volume}/{index}": (volume.volume, index) for volume in volumes for index in range(volume.slices)}
    if wanted > len(every):
        raise TooFewLabels(f"data.labelled_slices={wanted}: the labelled training patients have {len(every)} labelled slices")
    return tuple(every[name] for name in drawn(every, 0, "slices")[:wanted])


def probed_patients(split: Split) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The training and the validation patients whom probes of a pretraining see: all arms and label budgets share it."""
    return split.labelled[:PROBED], split.val[:: -(-len(split.val) // ASKED)]


def _sizes(volumes: Iterable[VolumeRecord], dims: int) -> set[Size]:
    return {(volume.height, volume.width, volume.slices)[:dims] for volume in volumes}


def _elements(volumes: Iterable[VolumeRecord], dims: int) -> int:
    """What an epoch goes over: slices, or volumes in 3D."""
    return sum(volume.slices if dims == 2 else 1 for volume in volumes)


def disjoint_side(sizes: set[Size]) -> int:
    """The largest crop side, at most 96 pixels (CT study) and a multiple of 8, of which two fit apart in every slice.

    In 3D two cubes fit apart along the longest axis, and no cube is larger than `cube_side`.
    """
    if len(min(sizes)) == 3:
        fit = min(cube_side(sizes), min(max(size) // 2 for size in sizes))
    else:
        fit = min(min(min(size), max(size) // 2) for size in sizes)
    side = min(96, fit - fit % 8)
    if side < 8:
        raise UsageError(
            f"the smallest training {_called(min(sizes))} is {min(sizes)} pixels: too small for pairs of crops; prepare the "
            "data at a finer spacing or with a larger `pad`"
        )
    return side


def slice_side(sizes: set[Size]) -> int:
    """The side of a square that holds the largest slice, at most 96 pixels and a multiple of 16."""
    return min(96, -(-max(map(max, sizes)) // 16) * 16)


def cube_side(sizes: set[Size]) -> int:
    """The side of a cube that is image rather than padding: the shortest axis of a middling volume, in eights, at most 96.

    Thinner volumes are padded to it (see `platform/volumes.py`). Where slices lie far apart this is a small cube: resample
    such data to about equal spacings (`data prepare -o spacing_mm=…`), or stay in 2D.
    """
    shortest = sorted(min(size) for size in sizes)[len(sizes) // 2]
    return min(96, -(-shortest // 8) * 8)


def _called(size: Size) -> str:
    return "slice" if len(size) == 2 else "volume"


def _refuse_probes(experiment: Experiment, store: Store, split: Split) -> None:
    tuned = experiment.finetune.training
    if tuned and tuned.probes:
        raise UsageError("finetune.training.probes: only a pretraining is probed; see finetune.training.evaluations")
    if not _probes(experiment.pretrain) + _probes(experiment.further):
        return
    annotated = {volume.patient for volume in store.volumes if volume.labelled}
    if not split.labelled or not annotated & set(split.val):
        raise UsageError(
            f"pretrain.training.probes needs labelled training and validation patients; split {split.name} has "
            f"{len(split.labelled)} and {len(annotated & set(split.val))}; set it to 0, or label some"
        )


def _probes(pretrain: Part | None) -> int:
    """How often a pretraining is probed."""
    return pretrain.training.probes if pretrain and pretrain.training else 0


def _refuse_unreachable(crops: Any, sizes: set[Size]) -> None:
    import numpy as np

    if crops.crop != "fixed":
        return  # sizes vary from draw to draw: `methods/crops.py` conditions them on the interval
    side, (low, high) = crops.side, crops.iou
    asked = set()
    for size in sorted(sizes):
        if min(size) < side and len(size) == 2:  # volumes are padded to the side
            raise UsageError(f"crops of {side} px do not fit in slices of {size[0]}x{size[1]} px; lower pretrain.side")
        least = tuple(max(side - max(length - side, 0), 0) for length in size)  # shared by two crops, on each axis
        if least in asked:
            continue
        asked.add(least)
        shared = functools.reduce(np.multiply.outer, [np.arange(shares, side + 1) for shares in least])
        iou = shared / (2 * side ** len(size) - shared)
        inside = (iou >= low - 1e-9) if crops.ends[0] == "[" else (iou > low + 1e-9)
        inside &= (iou <= high + 1e-9) if crops.ends[1] == "]" else (iou < high - 1e-9)
        if not inside.any():
            raise UsageError(
                f"iou {crops.ends[0]}{low}, {high}{crops.ends[1]}: two crops of {side} px in a {_called(size)} of "
                f"{'x'.join(str(max(length, side)) for length in size)} px "
                f"overlap by an IoU between {iou.min():.3f} and 1; choose an interval in that range, a smaller pretrain.side, "
                "or pretrain.unreachable=skip"
            )


def _with(part: Part, **changes: Any) -> Part:
    return dataclasses.replace(part, settings=dataclasses.replace(part.settings, **changes))


def _with_training(part: Part, elements: int) -> Part:
    """`part` with its number of steps: as given, or from epochs over so many slices or volumes."""
    training = part.training
    assert training is not None
    steps = training.steps or max(1, round(training.epochs * elements / training.batch))
    snapshots = tuple(sorted({place(at, steps) for at in training.snapshots}))
    if snapshots and snapshots[-1] > steps:
        raise UsageError(f"training.snapshots: step {snapshots[-1]} lies beyond the {steps} steps of {part.name}")
    return dataclasses.replace(part, training=dataclasses.replace(training, steps=steps, snapshots=snapshots))


def chain(arm: str, index: int, finetunings: int, experiment: Experiment, store: Store, split: Split) -> Chain:
    """Everything that pretraining number `index` of an arm needs, ids included. `experiment` must be resolved."""
    experiment = _with_draw(experiment, index)
    encoder_seed = experiment.seed * 1000 + index
    pretraining, further, found = None, None, origin(experiment.start)
    if experiment.pretrain:
        given = _given(experiment.start, found)
        pretraining = _pretraining("pretrain", encoder_seed, given, found.run if found else None, experiment, store, split)
    if pretraining and experiment.further:
        further = _pretraining("further", encoder_seed, [pretraining.id], pretraining.id, experiment, store, split)
    last = further or pretraining
    stages = tuple(finetuning(number, encoder_seed, last, experiment, store, split) for number in range(finetunings))
    return Chain(arm, index, experiment, pretraining, stages, further)


def _pretraining(
    section: Literal["pretrain", "further"],
    seed: int,
    begins: list[Any],
    parent: str | None,
    experiment: Experiment,
    store: Store,
    split: Split,
) -> Stage:
    """A pretraining that begins from what `begins` says, `parent` if that is one of medssl.

    Its id is the same whether it is an arm's first, its further, or has the one that it begins from given by name.
    """
    part: Part | None = getattr(experiment, section)
    assert part is not None
    what = [
        "pretrain",
        *_common(experiment, store),
        sorted(split.train),
        experiment.tree()[section],
        seed,
        *begins,
        *(["composed"] if experiment.spatial_dims == 2 and composed(part) else []),  # before, such batches came at random
        *(probed_patients(split) if _probes(part) else []),
    ]
    return Stage("pretrain", f"{part.name}-{digest(what)}", seed, _steps(part), parent, further=section == "further")


def _with_draw(experiment: Experiment, index: int) -> Experiment:
    """The experiment as repeat number `index` of its arm makes it, with the labelled patients that are its turn."""
    data = experiment.data
    return dataclasses.replace(experiment, data=dataclasses.replace(data, draw=data.draw + index % data.draws, draws=1))


def finetuning(
    number: int, encoder_seed: int, pretraining: Stage | None, experiment: Experiment, store: Store, split: Split
) -> Stage:
    """Fine-tuning `number` from a pretraining, from the given weights, or from the encoder that `encoder_seed` initialises.

    One that starts from a pretraining has the same id whether the pretraining belongs to its arm or was given by name.
    """
    tree = experiment.tree()
    seed = encoder_seed * 1000 + number
    data: list[Any] = [contract(store, split), labelled_patients(experiment, split)]
    if (slices := labelled_slices(experiment, store, split)) is not None:
        data.append(slices)
    found = None if pretraining else origin(experiment.start)
    parent = pretraining.id if pretraining else found.run if found else None
    begins: Any = parent or encoder_seed
    if found and (not found.run or experiment.start.partial):
        begins = _given(experiment.start, found)
    if parent and experiment.start.step is not None:
        begins = [begins, experiment.start.step]
    what = [
        "finetune",
        *_common(experiment, store),
        *data,
        tree["finetune"],
        tree["evaluate"],
        begins,
        seed,
    ]
    if experiment.hooks:  # what has none keeps the id from before there were any
        what.append(tree["hooks"])
    if experiment.unlabelled:
        what += [tree["unlabelled"], unlabelled_patients(experiment, split)]
    return Stage("finetune", f"{experiment.finetune.name}-{digest(what)}", seed, _steps(experiment.finetune), parent)


def _given(start: Start, found: Origin | None) -> list[Any]:
    """What given weights add to a hash."""
    return [found.identity, *(["partial"] if start.partial else [])] if found else []


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
        of = "slices" if experiment.spatial_dims == 2 else "volumes"
        given = f"from {Path(experiment.start.weights).name}; " if experiment.start.weights else ""
        what = "".join(f"{_told(part, of)}; then " for part in (experiment.pretrain, experiment.further) if part)
        what = what or "no pretraining; then "
        snapshot = f"from its step {experiment.start.step}: " if experiment.start.step else ""
        lines.append(f"arm      {label:<16} {given}{what}{snapshot}{_tuned(experiment, of)}{_budget(experiment)}")
    network = next(iter(arms.values())).network
    lines.append(f"network  {network.name}: " + ", ".join(f"{key} {value}" for key, value in vars(network.settings).items()))
    kinds = [stage.kind for stage in stages.values()]
    done = sum(stage.id in finished for stage in stages.values())
    lines.append(f"repeats  {k} pretrainings per arm, {m} fine-tunings of each")
    if shared := [label for label, experiment in arms.items() if experiment.start.weights]:
        lines.append(f"start    the {k} repeats of an arm share the given weights as initial encoder: {', '.join(shared)}")
    lines.append(
        f"stages   {kinds.count('pretrain')} pretrainings and {kinds.count('finetune')} fine-tunings, {done} done already"
    )
    lines.append(f"steps    {sum(stage.steps for stage in stages.values() if stage.id not in finished):,} to go")
    return "\n".join(lines)


def _tuned(experiment: Experiment, of: str) -> str:
    """The fine-tuning, and its hooks."""
    beside = ["UAFS"] if experiment.finetune.uafs else []
    told = " + ".join([_told(experiment.finetune, of), *beside, *(hook.name for hook in experiment.hooks)])
    return f"{told}, {experiment.unlabelled.batch} unlabelled {of}" if experiment.unlabelled else told


def _budget(experiment: Experiment) -> str:
    data = experiment.data
    counts = {"labelled patients": data.labelled, "labelled slices": data.labelled_slices}
    told = "".join(f", {count} {what}" for what, count in counts.items() if count is not None)
    return told + (f" in {data.draws} draws" if data.draws > 1 else "")


def _told(part: Part, of: str) -> str:
    """A stage in a few words."""
    assert part.training is not None
    side = getattr(part.settings, "side", None)
    crops = f" crops of {side} px" if side else ""
    return f"{part.name}, {part.training.steps} steps of {part.training.batch} {of}{',' + crops if crops else ''}"
