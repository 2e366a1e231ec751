"""The YAML of the published PDCR code as settings of medssl, with a line for everything that cannot be kept.

The keys are those of github.com/lzh19961031/PDCR_UAFR-MIS (its README, its demo, and the older `val` section); `medssl
import-config FILE` prints what `-p` reads. Three things do not carry over by their nature: its losses are sums over images and
pairs, here they are means; its 2D code weighs attraction and repulsion the wrong way round; and data, classes and channels come
from the prepared set.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from medssl.platform import config, find
from medssl.platform.errors import UsageError

Tree = dict[str, Any]
LAYERS = ("stem1", "stem2", "block1", "block2", "block3", "block4", "block5", "block6", "block7")  # numbered from 1 there
GATES = (  # `uncertainty_att_layerchoice`, flag by flag
    *(f"encoder.{name}" for name in ("stem1", "stem2", "exit3", "exit4", "exit5")),
    *(f"pyramid.branches.{number}" for number in range(4)),
    "pyramid.join",
    "decoder.low",
    "decoder.join",
)
WEIGHTS = {"encoder_patchseries": "encoder", "decoder_patchseries": "decoder", "multi_layer_patchseries": "cross"}
DATA = "is a matter of the prepared data (medssl data prepare, --data)"
UNREAD = "is not read by the published code"
KNOWN: dict[str, str] = {  # every key, and why it is not kept where that needs no look at its value; "" where it is looked at
    "epochs": "", "batch_size": "", "seed": "", "class_weight": "", "loss_temperature": "", "criterions": "",
    "num_workers": "has no equal: data are held in memory", "mc": "has no equal: there is no memcached reader",
    "syncbn": "is always so: batch norms are joint over all workers",
    "save_checkpoint": "is by time: resources.checkpoint_seconds",
    "model.mode": "", "model.backbone": "", "model.output_stride": "", "model.freeze_bn": UNREAD,
    "model.num_classes": DATA, "model.input_channel": DATA,
    "model.layer_sample": "", "model.loss_layerchoice": UNREAD, "model.sample_strategy": "", "model.distance_measure": "",
    "model.fea_weight_choice": "", "model.bcl_layer_choice": "", "model.bcl_multi_layer_choice": "",
    "model.layer_sample_multilayer": "", "model.instance_dis": "", "model.patchnumber": "", "model.patchsize": "",
    "model.similarityfirst_encoder": "", "model.similarityfirst_decoder": "", "model.similarityfirst_multi": "",
    "model.patchforeground_weight": "", "model.uncertainty_att_layerchoice": "",
    "dataset.mode": DATA, "dataset.root_path": DATA, "dataset.input_size": "", "dataset.preload": "is always so",
    "dataset.aug": "", "dataset.mean": DATA, "dataset.std": DATA, "dataset.modality": DATA,
    "data_aug.affine.scale": "", "data_aug.affine.translate": "is not among the settings of fine-tuning",
    "data_aug.affine.rotate": "is not among the settings of fine-tuning, but quarter turns: finetune.rot90_p",
    "data_aug.affine.shear": "is not among the settings of fine-tuning", "data_aug.flip": "",
    "optm.mode": "", "optm.use_larc": "",
    **{f"optm.{kind}.{key}": "" for kind in ("sgd", "adam") for key in ("base_lr", "final_lr", "wd")}, "optm.sgd.momentum": "",
    "optm.larc.trust_coefficient": "", "optm.larc.clip": "",
    "schd.mode": "", "schd.cos.start_warmup": "", "schd.cos.warmup_epochs": "",
    "schd.step.milestone": "", "schd.step.decay_rate": "", "schd.exp.gamma": "",
    **{f"{section}.{key}": "is ours: the best of finetune.training.evaluations looks at validation patients is kept, and the "
       "test patients are scored once" for section in ("test", "val") for key in (
        "start_test_epoch", "test_intertest", "start_val_epoch", "val_interval", "rank_metric", "metric_used", "metric_mode",
        "resize_option", "resize_interpolation")},
}  # fmt: skip


def imported(path: Path) -> tuple[Tree, list[str]]:
    """The settings that a file of the published code asks for, and what of it is not kept, a line each.

    Raises UsageError for a file that is none, an unknown key, a value that cannot be, and settings that medssl refuses.
    """
    try:
        flat = _flat(config.read(path))
        settings, lost = translated(flat)
        config.build(settings)
    except UsageError as error:
        raise UsageError(str(error) if str(error).startswith("-p") else f"{path}: {error}") from error
    return settings, lost


def _flat(tree: Mapping[str, Any], above: str = "") -> Tree:
    """Values by dotted key; the names under `criterions` are values, too. Raises UsageError with the nearest key."""
    found: Tree = {}
    for name, value in tree.items():
        key = f"{above}{name}"
        if isinstance(value, Mapping) and key != "criterions" and any(known.startswith(f"{key}.") for known in KNOWN):
            found |= _flat(value, f"{key}.")
        elif key not in KNOWN:
            raise UsageError(f'unknown key "{key}"; {find.nearest(key, KNOWN)}')
        else:
            found[key] = value
    return found


def translated(flat: Mapping[str, Any]) -> tuple[Tree, list[str]]:
    """Settings and losses of what `_flat` gives; absent keys have the values of the published README."""
    lost = [f"{key} {KNOWN[key]}" for key in flat if KNOWN[key]]
    tree: Tree = {"pretrain": None, "seed": _typed(flat, "seed", int, 666)}
    tree["network"] = _network(flat, lost)
    tree["finetune"] = _finetune(flat, lost)
    if hook := _hook(flat, lost):
        tree["hooks"] = {"pdcr": hook}
    if (gates := _gates(flat)) and tree["network"]["backbone"] == "xception":
        tree["finetune"]["uafs"] = {"layers": gates}
    elif gates:
        lost.append("model.uncertainty_att_layerchoice names layers of Xception; set finetune.uafs.layers")
    return tree, lost


def _typed(flat: Mapping[str, Any], key: str, kind: type | tuple[type, ...], default: Any) -> Any:
    value = flat.get(key, default)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        raise UsageError(f"{key}: expected {names}, got {value!r}")
    return value


def _network(flat: Mapping[str, Any], lost: list[str]) -> Tree:
    mode, backbone = _typed(flat, "model.mode", str, "DeepLab"), _typed(flat, "model.backbone", str, "xception")
    if not mode.lower().startswith("deeplab"):
        raise UsageError(f"model.mode: {mode} is not a DeepLab, the only network whose layers these numbers name")
    kinds = [kind for kind in ("xception", "resnet50") if backbone.startswith(kind)]
    if not kinds:
        raise UsageError(f"model.backbone: {backbone}; {find.nearest(backbone, ('xception', 'resnet50'))}")
    if _typed(flat, "model.output_stride", int, 16) != 16:
        lost.append(f"model.output_stride {flat['model.output_stride']} is 16 here")
    return {"name": "deeplab", "backbone": kinds[0]}


def _finetune(flat: Mapping[str, Any], lost: list[str]) -> Tree:
    """The supervised part: cross-entropy over whole images, how it is optimised, and what of the augmentation we have."""
    terms = _terms(flat)
    settings: Tree = {"name": "segment", "dice": 0.0, "cross_entropy": terms["ce"], "crops": 1, "balanced": False}
    width, height, *_ = _typed(flat, "dataset.input_size", list, [512, 512, 3])
    settings["side"] = min(width, height)
    if width != height:
        lost.append(f"dataset.input_size {width} x {height}: crops are square, of {settings['side']} pixels")
    if len(set(_typed(flat, "class_weight", list, [1, 1]))) > 1:
        lost.append(f"class_weight {flat['class_weight']}: classes weigh alike here")
    if _typed(flat, "dataset.aug", bool, True):
        settings |= {"zoom": flat.get("data_aug.affine.scale", [0.8, 1.2]), "zoom_p": 1.0}
        flips = flat.get("data_aug.flip", [0.5, 0.5])
        settings["flip_p"] = list(reversed(flips))  # there columns first, here rows
    else:
        settings |= {f"{name}_p": 0.0 for name in ("flip", "rot90", "intensity_scale", "intensity_shift", "blur", "noise")}
    return settings | {"training": _training(flat, lost)}


def _training(flat: Mapping[str, Any], lost: list[str]) -> Tree:
    epochs, kind = _typed(flat, "epochs", int, 300), _typed(flat, "optm.mode", str, "adam")
    if kind not in ("adam", "sgd"):
        raise UsageError(f"optm.mode: {kind}; {find.nearest(kind, ('adam', 'sgd'))}")
    usual = {"adam": 1e-3, "sgd": 0.1}[kind]
    training = {"epochs": epochs, "batch": _typed(flat, "batch_size", int, 4), "optimizer": kind}
    lost.append(f"batch_size {training['batch']} is of one GPU there, of all workers together here")
    for ours, theirs, default in (("lr", "base_lr", usual), ("end_lr", "final_lr", 1e-5), ("weight_decay", "wd", 1e-5)):
        training[ours] = _number(flat, f"optm.{kind}.{theirs}", default)
    if kind == "sgd":
        training["momentum"] = _number(flat, "optm.sgd.momentum", 0.9)
    if flat.get("optm.use_larc"):
        lost.append("optm.use_larc has no equal: finetune.training.optimizer=lars comes nearest")
    if flat.get("schd.mode", "cos") != "cos":
        lost.append(f"schd.mode {flat['schd.mode']}: the learning rate follows a cosine here")
    training["warmup"] = _number(flat, "schd.cos.warmup_epochs", 2) / epochs
    if flat.get("schd.cos.start_warmup"):
        lost.append("schd.cos.start_warmup is 0 here")
    return training


def _number(flat: Mapping[str, Any], key: str, default: float) -> float:
    value = flat.get(key, default)
    try:
        return float(value)  # YAML reads 1e-3 as text
    except (TypeError, ValueError) as error:
        raise UsageError(f"{key}: expected a number, got {value!r}") from error


def _terms(flat: Mapping[str, Any]) -> dict[str, float]:
    """The weights of the criterions; any name that holds "multi_layer" is the cross-layer term, as there."""
    usual = dict(zip(("ce", *WEIGHTS), (1, 0.1, 0.01, 0.01), strict=True))
    given = flat.get("criterions", usual)
    if not isinstance(given, Mapping):
        raise UsageError(f"criterions: expected names with their weights, got {given!r}")
    weights = {"ce": 0.0, **dict.fromkeys(WEIGHTS.values(), 0.0)}
    for name in given:
        term = "ce" if name == "ce" else "cross" if "multi_layer" in str(name) else WEIGHTS.get(str(name))
        if term is None:
            raise UsageError(f'unknown key "criterions.{name}"; {find.nearest(str(name), ("ce", *WEIGHTS))}')
        weights[term] = _number(given, name, 0.0)
    return weights


def _hook(flat: Mapping[str, Any], lost: list[str]) -> Tree | None:
    """The settings of `hooks.pdcr`; None where no criterion asks for it."""
    terms = _terms(flat)
    if not any(terms[term] for term in WEIGHTS.values()):
        return None
    lost.append(f"criterions {', '.join(WEIGHTS)} keep their numbers, but weigh means here and sums there: search them anew")
    samples = _typed(flat, "model.layer_sample", list, [128, 64, 32, 8, 8, 8, 8])
    encoder = _layers(flat, "model.bcl_layer_choice", [2, 3], lost) if terms["encoder"] else {}
    across = _layers(flat, "model.bcl_multi_layer_choice", [2, 3], lost) if terms["cross"] else {}
    decoder = {"decoder.low": samples[2], "decoder.conv1": samples[3]} if terms["decoder"] else {}
    hook: Tree = {"encoder": list(encoder.values()), "decoder": list(decoder), "cross": list(across.values())}
    hook["encoder_samples"] = [samples[number - 1] for number in encoder]
    hook["decoder_samples"] = list(decoder.values())
    counts = _typed(flat, "model.layer_sample_multilayer", list, [32] * 5)
    hook["cross_samples"] = min((counts[number - 1] for number in across), default=32)
    if len({counts[number - 1] for number in across}) > 1:
        lost.append(f"model.layer_sample_multilayer: all layers have {hook['cross_samples']} samples across layers here")
    hook |= {f"{term}_weight": terms[term] for term in WEIGHTS.values()}
    hook["temperature"] = _number(flat, "loss_temperature", 1.0)
    return hook | _windows(flat, lost)


def _layers(flat: Mapping[str, Any], key: str, default: list[int], lost: list[str]) -> dict[int, str]:
    """Modules by their number there."""
    if not str(flat.get("model.backbone", "xception")).startswith("xception"):
        raise UsageError(f"{key} numbers layers of Xception; write hooks.pdcr by hand for another backbone")
    numbers = _typed(flat, key, list, default)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= len(LAYERS):
            raise UsageError(f"{key}: expected numbers from 1 to {len(LAYERS)}, got {number!r}")
    if 6 in numbers:
        lost.append(f"{key} 6 is block4, as its name says; there a variable's name used twice made it conv4")
    return {number: f"encoder.{LAYERS[number - 1]}" for number in numbers}


def _windows(flat: Mapping[str, Any], lost: list[str]) -> Tree:
    """Patches, how their losses are averaged, and which cells are drawn."""
    patches = _typed(flat, "model.patchsize", list, [5, 7, 9])
    if _typed(flat, "model.patchnumber", int, len(patches)) != len(patches):
        given = flat["model.patchnumber"]
        raise UsageError(f"model.patchnumber is {given}, and model.patchsize has {len(patches)}: make them agree")
    first = {key: _typed(flat, f"model.similarityfirst_{key}", bool, True) for key in ("encoder", "decoder", "multi")}
    if len(set(first.values())) > 1:
        lost.append("model.similarityfirst_decoder and _multi follow model.similarityfirst_encoder: one setting here")
    windows: Tree = {"ratio": "hierarchical", "patches": patches, "average": "losses" if first["encoder"] else "ratios"}
    if not first["encoder"]:
        windows["patch_weights"] = _typed(flat, "model.patchforeground_weight", list, [1] * len(patches))
    only: Tree = {"distance_measure": "cosine", "fea_weight_choice": "receptive_field", "sample_strategy": "stride"}
    only |= {"instance_dis": False}
    for key, value in only.items():
        if flat.get(f"model.{key}", value) != value:
            lost.append(f"model.{key} {flat[f'model.{key}']}: only {value} works in the published code")
    return windows | {"sampling": "stride"}


def _gates(flat: Mapping[str, Any]) -> list[str]:
    flags = _typed(flat, "model.uncertainty_att_layerchoice", list, [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1])
    if len(flags) != len(GATES) or any(flag not in (0, 1) for flag in flags):
        raise UsageError(f"model.uncertainty_att_layerchoice: expected {len(GATES)} flags of 0 or 1, got {flags}")
    return [name for name, flag in zip(GATES, flags, strict=True) if flag]


def text(settings: Tree, lost: list[str], path: Path, say: Callable[[str], None]) -> str:
    """The settings as YAML that `-p` reads; `say` hears what is not kept."""
    import yaml

    for line in lost:
        say(f"not kept: {line}")
    return f"# {path.name} of the published PDCR code, as settings of medssl\n{yaml.safe_dump(settings, sort_keys=False)}"
