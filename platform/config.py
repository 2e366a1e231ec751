"""The configuration of a run: files stacked left to right, dotted overrides, every key and type checked before anything starts.

    data       which prepared set, how many labelled patients
    start      the weights that the encoder begins from; null: random ones
    network    name (a file of methods/networks/) and its settings
    pretrain   name (a file of methods/) and its settings, `training` below it; null: from scratch
    further    the same, for a second pretraining that begins where `pretrain` ends; of no account without that
    finetune   the same, for the supervised stage
    hooks      names (files of methods/hooks/) with their settings: semi-supervised terms of fine-tuning; null switches one off
    unlabelled how hooks are fed; of no account without any
    evaluate   how volumes are predicted and scored
    resources  where and how often, without effect on results

`-p a.yaml -p b.yaml` stacks mappings, a name such as `-p simsiam-ct` is a preset of methods/presets/, and
`-o pretrain.training.lr=0.05` sets one key, `-o +key=value` adds one that no file names, `-o ~key` takes one out. Torch is
never imported here.
"""

import dataclasses
import hashlib
import json
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from medssl.methods.settings import UAFS, Deformation, Pictures, Training, Unlabelled
from medssl.platform import find
from medssl.platform.errors import UsageError

RESULTS_VERSION = 1  # raised whenever a change alters results: every stage's hash holds it (CHANGELOG says why)


@dataclass(frozen=True, kw_only=True)
class Data:
    name: str = "phantom"  # a data set of platform/datasets/, a prepared set, or a folder of scans
    labelled: int | float | None = None  # labelled training patients that fine-tuning may use; below 1: a share; None: all
    labelled_slices: int | None = None  # of their slices; None: all
    draw: int = 0  # which order labelled patients are taken in; 0: the split's own
    draws: int = 1  # an arm's repeat number i takes them in order draw + i modulo this: its repeats differ in their labels, too
    split: str = "seed-0"  # a rule (fold-0-of-5-seed-0, `medssl data split --help`), or a file
    stream: Literal["auto", "node", "ray"] = "auto"  # one copy in memory per node, or streamed from disk by Ray Data

    def __post_init__(self) -> None:
        if self.labelled is not None and (self.labelled <= 0 or (self.labelled >= 1 and self.labelled != int(self.labelled))):
            raise ValueError(f"labelled is {self.labelled}: expected 1 or more, a share of them below 1, or null for all")
        if self.labelled_slices is not None and self.labelled_slices < 1:
            raise ValueError(f"labelled_slices is {self.labelled_slices}: at least 1 labelled slice, or null for all")
        if self.draw < 0 or self.draws < 1:
            raise ValueError(f"draw is {self.draw} and draws {self.draws}: expected at least 0, and at least 1")
        if self.labelled_slices is not None and self.stream == "ray":
            raise ValueError("labelled_slices picks slices in memory, stream=ray reads whole volumes; use stream=node")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where an encoder begins. With a pretraining, `weights` is what that begins from; without one, what fine-tuning does."""

    weights: str | None = None  # a medssl pretraining (its id, a beginning of it, its folder), or a file of weights
    step: int | float | None = None  # fine-tune from the pretraining's snapshot here, not from its end; below 1: a fraction
    partial: bool = False  # accept weights of which only a part fits the network

    def __post_init__(self) -> None:
        if self.step is not None and (self.step <= 0 or (self.step > 1 and self.step != int(self.step))):
            raise ValueError(f"step is {self.step}: expected a whole step from 1, or a fraction of the steps between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    inference: Literal["window", "whole"] = "window"  # sliding windows of the training crop's side, or whole slices
    overlap: float = 0.25  # of neighbouring windows, as a fraction of their side (CT study)
    metric: Literal["dice", "legacy-slice-dice"] = "dice"  # what selects a checkpoint and ranks arms

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap is {self.overlap}: expected 0 <= overlap < 1")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What only moves work around. `workers` alone enters a stage's hash: each worker draws its own views."""

    workers: int = 1  # data-parallel processes of one stage
    cpus: int = 1  # cores of each worker
    gpus: float | None = None  # GPUs of each worker, fractions share one; None: one where the cluster has GPUs, else none
    checkpoint_seconds: float = 60.0  # between two checkpoints
    retries: int = 2  # how often a stage whose machine died is tried again
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()  # that every stage is also told to, as a run of its own

    def __post_init__(self) -> None:
        if self.workers < 1 or self.cpus < 1 or self.retries < 0 or (self.gpus or 0) < 0:
            raise ValueError("workers and cpus are at least 1, gpus and retries at least 0")


@dataclass(frozen=True)
class Part:
    """A named piece with its settings: a network, a pretraining method, the fine-tuning, a hook."""

    name: str
    settings: Any
    training: Training | None = None
    uafs: UAFS | None = None  # of the fine-tuning: where its network weights maps by their certainty


@dataclass(frozen=True)
class Experiment:
    """One arm's configuration, checked and whole."""

    data: Data
    network: Part
    pretrain: Part | None
    finetune: Part
    evaluate: Evaluate
    resources: Resources
    seed: int = 0
    start: Start = Start()
    further: Part | None = None  # the pretraining upon the pretraining
    hooks: tuple[Part, ...] = ()  # by name
    unlabelled: Unlabelled | None = None  # None without hooks that learn from unlabelled slices
    given: Mapping[str, Any] = field(default_factory=dict, compare=False)  # the tree it was built from

    @property
    def spatial_dims(self) -> int:
        """What a training element is: a slice (2) or a volume (3). The network's setting is the only switch."""
        return getattr(self.network.settings, "spatial_dims", 2)

    def tree(self) -> dict[str, Any]:
        """Every setting, defaults included, as plain values."""

        def part(value: Part | None) -> dict[str, Any] | None:
            if value is None:
                return None
            training = {"training": dataclasses.asdict(value.training)} if value.training else {}
            selective = {"uafs": dataclasses.asdict(value.uafs)} if value.uafs else {}  # else ids are as before
            return {"name": value.name, **_asked(value.settings), **training, **selective}

        semi: dict[str, Any] = {"further": part(self.further)} if self.further else {}
        if self.hooks:  # what has none reads as before there were any
            settings = {hook.name: dataclasses.asdict(hook.settings) for hook in self.hooks}
            semi |= {"hooks": settings, "unlabelled": dataclasses.asdict(self.unlabelled) if self.unlabelled else {}}
        return {
            "seed": self.seed,
            "data": dataclasses.asdict(self.data),
            "start": dataclasses.asdict(self.start),
            "network": part(self.network),
            "pretrain": part(self.pretrain),
            "finetune": part(self.finetune),
            "evaluate": dataclasses.asdict(self.evaluate),
            "resources": dataclasses.asdict(self.resources),
            **semi,
        }


BASE: dict[str, Any] = {"network": {"name": "unet"}, "pretrain": {"name": "simsiam"}, "finetune": {"name": "segment"}}


def stack(layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge nested mappings, later ones winning. A section given as a name (`pretrain: byol`) means `{name: byol}`.

    In the names of hooks - and _ are one, so that a hook's settings meet however it was typed; a list of names is a mapping
    of these to no settings.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if key in ("network", "pretrain", "further", "finetune") and isinstance(value, str):
                value = {"name": value}
            if key == "hooks" and isinstance(value, list | Mapping):
                hooks = value.items() if isinstance(value, Mapping) else ((name, {}) for name in value)
                value = {str(name).replace("-", "_"): settings for name, settings in hooks}
            if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
                merged[key] = stack([merged[key], value])
            else:
                merged[key] = stack([value]) if isinstance(value, Mapping) else value
    return merged


def nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} as {"a": {"b": 1}}."""
    tree: dict[str, Any] = {}
    for name, value in dotted.items():
        *heads, last = name.split(".")
        layer: dict[str, Any] = {last: value}
        for head in reversed(heads):
            layer = {head: layer}
        tree = stack([tree, layer])
    return tree


def suited(defaults: Mapping[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` on top of a data set's dotted defaults, those left out that its network and methods have no setting for.

    What it says of a pretraining it says of a further one, too.
    """
    chosen, kept = stack([BASE, tree]), {}
    if chosen.get("further"):
        again = {
            dotted.replace("pretrain", "further", 1): value
            for dotted, value in defaults.items()
            if dotted.startswith("pretrain.")
        }
        defaults = {**defaults, **again}
    for dotted, value in defaults.items():
        section, _, key = dotted.partition(".")
        kind = {"network": "network", "pretrain": "method", "further": "method", "finetune": "method"}.get(section)
        part = chosen.get(section)
        if kind and isinstance(part, Mapping) and not key.startswith("training."):
            names = {entry.name for entry in dataclasses.fields(find.settings(kind, part["name"]))}
            if key not in names:
                continue
        kept[dotted] = value
    return stack([nested(kept), tree])


def override(text: str) -> tuple[str, Any]:
    """One `-o key=value` as (dotted name, YAML value)."""
    import yaml

    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f'-o "{text}": expected key=value, as in -o pretrain.training.lr=0.05')
    try:
        return name.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(f'-o "{text}": {value!r} is not a YAML value') from error


def overridden(tree: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`tree` with the `-o` of a command line, in their order.

    key=value sets, whether or not the tree names the key; +key=value adds one that it does not name; ~key takes one out that it
    does, so that its default holds again (of a hook: the hook). `hook.` is `hooks.`.
    """
    changed = stack([tree])
    for text in overrides:
        keys = override_name(text).split(".")
        if text.startswith("~"):
            changed = _without(changed, keys, text)
            continue
        if text.startswith("+") and _named(changed, keys):
            raise UsageError(f'-o "{text}": {".".join(keys)} is set already; leave out the + to replace it')
        value = override(text.removeprefix("+"))[1]
        changed = stack([changed, nested({".".join(keys): value})])
    return changed


def override_name(text: str) -> str:
    """The dotted name of an `-o`, as the tree spells it."""
    name = text[1:].strip() if text.startswith("~") else override(text.removeprefix("+"))[0]
    section, *rest = name.split(".")
    if section not in ("hook", "hooks"):
        return name
    return ".".join(["hooks", *(key.replace("-", "_") for key in rest[:1]), *rest[1:]])


def _named(tree: Any, keys: list[str]) -> bool:
    for key in keys:
        if not isinstance(tree, Mapping) or key not in tree:
            return False
        tree = tree[key]
    return True


def _without(tree: Mapping[str, Any], keys: list[str], text: str) -> dict[str, Any]:
    key, *rest = keys
    below = tree.get(key)
    if key not in tree:
        known = find.nearest(key, tree) if tree else "nothing is set there"
        raise UsageError(f'-o "{text}": there is no {key} to take out; {known}')
    if rest:
        return {**tree, key: _without(below if isinstance(below, Mapping) else {}, rest, text)}
    return {name: value for name, value in tree.items() if name != key}


def read(path: Path) -> dict[str, Any]:
    """A `-p` file; where there is none and the name has no suffix, the preset of that name in methods/presets/."""
    import yaml

    if not path.suffix and not path.is_file():
        path = find.path("preset", str(path))
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError as error:
        raise UsageError(f"-p {path}: no such file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"-p {path}: not a YAML file ({str(error).splitlines()[0]})") from error
    if not isinstance(tree, dict):
        raise UsageError(f"-p {path}: expected a mapping of sections, found {type(tree).__name__}")
    return tree


def build(tree: Mapping[str, Any]) -> Experiment:
    """Check a whole tree. Raises UsageError that names the dotted key, what was expected, and the nearest known key."""
    tree = stack([BASE, tree])
    known = {entry.name for entry in dataclasses.fields(Experiment)} - {"given"}
    for key in tree:
        if key not in known:
            raise UsageError(f'unknown section "{key}"; {find.nearest(key, known)}')
    seed = tree.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UsageError(f"seed: expected a whole number, got {seed!r}")
    network = _part("network", "network", tree["network"])
    pretrain = None if tree["pretrain"] is None else _part("method", "pretrain", tree["pretrain"])
    further = _part("method", "further", tree["further"]) if tree.get("further") and pretrain else None
    hooks = _hooks(tree.get("hooks") or {})
    unlabelled = _dataclass(Unlabelled, tree.get("unlabelled") or {}, "unlabelled")
    for section, part in (("pretrain", pretrain), ("further", further)):
        if part:
            _refuse_labels(section, part.name)
            _refuse_encoder(section, part.name, network.name)
    return Experiment(
        data=_dataclass(Data, tree.get("data") or {}, "data"),
        network=network,
        pretrain=pretrain,
        finetune=_part("method", "finetune", tree["finetune"]),
        evaluate=_dataclass(Evaluate, tree.get("evaluate") or {}, "evaluate"),
        resources=_dataclass(Resources, tree.get("resources") or {}, "resources"),
        seed=seed,
        start=_dataclass(Start, tree.get("start") or {}, "start"),
        further=further,
        hooks=hooks,
        unlabelled=unlabelled if any(_fed(hook) for hook in hooks) else None,
        given=tree,
    )


def rebuilt(tree: Mapping[str, Any]) -> Experiment:
    """The experiment whose `tree` this is, as run.json holds it; its stages have the ids that they had.

    Of a float, 225.0 was typed, in whichever way, and 225 is a default as its file spells it (`epochs: float = 225`). Ids tell
    the two apart, and `build` takes both for typed.
    """
    experiment = build(tree)
    trained = {section: getattr(experiment, section) for section in ("pretrain", "further", "finetune")}
    for section, part in trained.items():
        if part and part.training:
            said = tree[section]["training"]
            spelt = {name: said[name] for name, value in vars(part.training).items() if type(value) is float and name in said}
            trained[section] = dataclasses.replace(part, training=dataclasses.replace(part.training, **spelt))
    return dataclasses.replace(experiment, **trained)


def _fed(hook: Part) -> bool:
    """Whether a hook learns from unlabelled slices."""
    return not find.constant("hook", hook.name, "LABELLED_ONLY", False)


def _hooks(tree: Any) -> tuple[Part, ...]:
    """The hooks that are not switched off, by name."""
    if not isinstance(tree, Mapping):
        raise UsageError(
            f"hooks: expected names with their settings, as in `hooks: {{mean_teacher: {{weight: 5}}}}`, got {tree!r}"
        )
    chosen = {name: values for name, values in sorted(tree.items()) if values is not None}
    hooks = tuple(Part(name, _dataclass(find.settings("hook", name), chosen[name], f"hooks.{name}")) for name in chosen)
    if len(predict := [hook.name for hook in hooks if find.constant("hook", hook.name, "PREDICTS", False)]) > 1:
        raise UsageError(f"hooks: {' and '.join(predict)} each bring the network that predicts; choose one of them")
    return hooks


def _refuse_labels(section: str, method: str) -> None:
    if method == "segment":
        raise UsageError(
            f"{section}.name=segment learns from labels, which is fine-tuning: use `medssl finetune`; a pretraining can begin "
            "with what that leaves, `--from …/best.pt`"
        )


def _refuse_encoder(section: str, method: str, network: str) -> None:
    """A method that declares its ENCODERS works with the encoders of these networks alone."""
    encoders = find.constant("method", method, "ENCODERS", ())
    if encoders and network.replace("-", "_") not in encoders:
        raise UsageError(
            f"{section}.name={method} cannot train the encoder of network.name={network}, only that of "
            f"{' or '.join(encoders)}; add -o network.name={encoders[0]}"
        )


def _asked(settings: Any) -> dict[str, Any]:
    """Settings without those of an augmentation that is off: stages that do not use it are named as before there was any."""
    off = {
        field
        for kind in (Deformation, Pictures)
        if isinstance(settings, kind)
        and not any(getattr(settings, key) for key in kind.__dataclass_fields__ if key.endswith("_p"))
        for field in kind.__dataclass_fields__
    }
    return {key: value for key, value in dataclasses.asdict(settings).items() if key not in off}


def _part(kind: str, section: str, tree: Any) -> Part:
    if not isinstance(tree, Mapping) or not isinstance(tree.get("name"), str):
        raise UsageError(f"{section}: expected a mapping with a name, got {tree!r}")
    name = tree["name"]
    beside = ("name",) if kind == "network" else ("name", "training", *(("uafs",) if section == "finetune" else ()))
    values = {key: value for key, value in tree.items() if key not in beside}
    if kind == "network" and "spatial_dims" in values and name not in (solid := _solid()):
        raise UsageError(f"network.spatial_dims: {name} reads slices only; leave it out, or choose {' or '.join(solid)}")
    settings = _dataclass(find.settings(kind, name), values, section, beside)
    if kind == "network":
        return Part(name, settings)
    training = _dataclass(find.settings(kind, name, "Training"), tree.get("training") or {}, f"{section}.training")
    uafs = None if tree.get("uafs") is None else _dataclass(UAFS, tree["uafs"], f"{section}.uafs")
    return Part(name, settings, training, uafs)


def _solid() -> list[str]:
    """Networks that can read volumes."""
    settings = {name: find.settings("network", name) for name in find.names("network")}
    return [name for name, cls in settings.items() if "spatial_dims" in {entry.name for entry in dataclasses.fields(cls)}]


def _dataclass(cls: type, values: Any, section: str, beside: tuple[str, ...] = ()) -> Any:
    """An instance of a settings dataclass from plain values."""
    import pydantic

    if not isinstance(values, Mapping):
        raise UsageError(f"{section}: expected a mapping of settings, got {values!r}")
    hints = typing.get_type_hints(cls, include_extras=True)
    names = [entry.name for entry in dataclasses.fields(cls)]
    checked = {}
    for key, value in values.items():
        if key not in names:
            raise UsageError(f'unknown key "{section}.{key}"; {find.nearest(key, [*names, *beside])}')
        try:
            checked[key] = pydantic.TypeAdapter(hints[key]).validate_python(value)
        except pydantic.ValidationError as error:
            raise UsageError(f"{section}.{key}: {error.errors()[0]['msg'].lower()}, got {value!r}") from error
    try:
        return cls(**checked)
    except ValueError as error:  # out of range: the settings check themselves
        raise UsageError(f"{section}: {error}") from error


def digest(value: Any) -> str:
    """Content hash of plain values: 12 hexadecimal digits of SHA-256 over canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]
