"""Trained weights for other libraries: the same function under their names, loaded strictly by their own classes.

    safetensors   what the run trained, under our names, with its card in the file's metadata
    monai         unet            BasicUNet (max-pooling, 5 levels) or DynUNet (`down: stride`, 3 levels and more)
                  swin_unetr      SwinUNETR
    timm          resnet_unet     resnet18, resnet34, resnet50 without a classifier; torchvision's names, too
                  unetr           VisionTransformer without a classifier, in 2D
    nnunet        unet            PlainConvUNet (`down: stride`), as `nnUNetv2_train -pretrained_weights` reads it

timm receives the encoder; monai and nnunet the whole network, whose decoder and head are fresh after a pretraining, but for
blocks that were pretrained: strict loading wants every key. Whatever has no equal in a library is refused, in a sentence that
names what can be exported.

Three places need more than new names:
    BasicUNet   up-samples to the finest level with twice our channels; the second half is 0, and stays so in training
    DynUNet and PlainConvUNet put what was up-sampled before the skip, we after it: input channels change places
    PlainConvUNet has biases before its norms, which take them out again, and heads of deep supervision: both are 0

Files for torch hold tensors and plain values alone: `torch.load(…, weights_only=True)` opens them. All networks expect
intensities and orientation as the card's preprocessing says.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl import __version__
from medssl.methods import settings
from medssl.methods.networks import unet
from medssl.platform import atomic, checkpoint, config, find, stages
from medssl.platform.config import Part
from medssl.platform.errors import UsageError
from medssl.platform.site import Site
from medssl.platform.store import Store

State = dict[str, Tensor]
TARGETS = {"monai": ".monai.pt", "timm": ".timm.pt", "nnunet": ".nnunet.pth", "safetensors": ".safetensors"}
# The layers of a U-Net's block: convolution, norm, convolution, norm.
OURS = ("0.", "1.", "3.", "4.")  # see `unet.block`
BASIC_UNET = ("conv_0.conv.", "conv_0.adn.N.", "conv_1.conv.", "conv_1.adn.N.")
DYNUNET = ("conv1.conv.", "norm1.", "conv2.conv.", "norm2.")
NNUNET = ("convs.0.conv.", "convs.0.norm.", "convs.1.conv.", "convs.1.norm.")
NNUNET_AGAIN = ("convs.0.all_modules.0.", "convs.0.all_modules.1.", "convs.1.all_modules.0.", "convs.1.all_modules.1.")


@dataclass(frozen=True)
class Trained:
    """A finished run, its network whole."""

    id: str
    network: Any
    part: Part  # name and settings of the network
    channels: int
    classes: int
    card: Mapping[str, Any]  # how the weights came to be, and what they want; plain values
    uafs: settings.UAFS | None = None  # with which the network was fine-tuned

    @property
    def whole(self) -> bool:
        """Whether decoder and head are trained, too."""
        return bool(self.card["kind"] == "finetune")


@dataclass(frozen=True)
class Foreign:
    """A network as another library has it."""

    state: State
    module: str  # where its class is imported from
    call: str  # Python that builds it
    note: str = ""  # what its user must know
    whole: bool = True  # decoder and head included
    entry: str = "state_dict"  # of the file, that holds the state
    architecture: Mapping[str, Any] | None = None  # in the library's own words, for its files


def export(run: str, target: str, out: Path | None) -> str:
    """Write the weights of a finished run for `target`; returns the path and the Python that loads them.

    Raises UsageError for an unknown target, for a network that the target has no equal of, and where a file lies already.
    """
    if target not in TARGETS:
        raise UsageError(f"--to {target}: no such target; {find.nearest(target, TARGETS)}")
    trained = read(run)
    path = out or Path(f"{trained.id}{TARGETS[target]}")
    if path.exists():
        raise UsageError(f"{path} exists; choose another file with --out, or remove it")
    lines = _safetensors(trained, path) if target == "safetensors" else _torch_file(trained, convert(trained, target), path)
    return "\n".join([str(path), *lines])


def read(run: str) -> Trained:
    """The network of a finished pretraining or fine-tuning; a pretraining's decoder and head are freshly initialised."""
    site = Site.here()
    folder = site.find_stage(run)
    said = json.loads((folder / "run.json").read_text())
    if not (folder / "done.json").exists():
        raise UsageError(f"{folder.name} is not finished; `medssl status` shows how far it is")
    experiment, store = config.rebuilt(said["config"]), Store.open(Path(said["store"]))
    torch.manual_seed(said["encoder_seed"])
    network = stages.network(experiment, store.channels, len(store.classes)).eval()
    selective = None if said["kind"] == "pretrain" else experiment.finetune.uafs
    if said["kind"] == "pretrain":
        saved = checkpoint.load(folder / "encoder.pt")
        network.encoder.load_state_dict(saved["encoder"])
        network.load_state_dict(saved.get("decoder", {}), strict=False)  # the blocks of it that were pretrained, if any
        method, chain, step = experiment.pretrain, saved["card"]["chain"], saved["card"]["steps"]
    else:
        saved = checkpoint.load(folder / "best.pt")
        network = stages.selective(network, experiment).eval()
        network.load_state_dict(saved["network"])
        method, chain, step = experiment.finetune, saved["chain"], saved["step"]
    assert method is not None
    card = {"run": folder.name, "kind": said["kind"], "method": method.name, "chain": chain, "step": step, "seed": said["seed"]}
    card |= {"uafs": dataclasses.asdict(selective)} if selective else {}
    card |= {"network": experiment.tree()["network"], "channels": store.channels, "classes": store.classes, "data": store.name}
    card |= {"preprocessing": dataclasses.asdict(store.preset), "licence": store.licence, "citation": store.citation}
    plain = json.loads(json.dumps(card | {"medssl": __version__}))
    return Trained(folder.name, network, experiment.network, store.channels, len(store.classes), plain, selective)


def convert(trained: Trained, target: str) -> Foreign:
    """The network as `target` has it. Raises UsageError where it has none, naming the targets that have."""
    if trained.uafs:
        raise UsageError(f"{trained.id} cannot be exported to {target}: no library has UAFS; --to safetensors can be had")
    try:
        return CONVERT[target](trained)
    except _NoEqual as error:
        others = [name for name in CONVERT if name != target and _has(trained, name)]
        raise UsageError(
            f"{trained.id} cannot be exported to {target}: {error}; --to {' or '.join([*others, 'safetensors'])} can be had"
        ) from error


class _NoEqual(Exception):
    """A library has no network that computes the same."""


def _has(trained: Trained, target: str) -> bool:
    try:
        CONVERT[target](trained)
    except _NoEqual:
        return False
    return True


def _torch_file(trained: Trained, foreign: Foreign, path: Path) -> list[str]:
    held = {foreign.entry: foreign.state, "card": trained.card, "architecture": foreign.architecture}
    atomic.write(path, lambda file: torch.save(held, file))
    name = foreign.call.partition("(")[0]
    fresh = foreign.whole and not trained.whole
    notes = ["a pretraining trains the encoder: decoder and head are fresh"] if fresh else []
    return [
        f"import torch; from {foreign.module} import {name}",
        f"network = {foreign.call}",
        f"network.load_state_dict(torch.load({str(path)!r}, weights_only=True)[{foreign.entry!r}])",
        *(f"# {note}" for note in [*notes, foreign.note] if note),
    ]


def _safetensors(trained: Trained, path: Path) -> list[str]:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise UsageError("--to safetensors needs the package safetensors; pip install 'medssl[safetensors]'") from error
    module = trained.network if trained.whole else trained.network.encoder
    tensors = {key: value.contiguous() for key, value in module.state_dict().items()}
    said = {key: value if isinstance(value, str) else json.dumps(value) for key, value in trained.card.items()}
    content = save(tensors, metadata={"format": "pt", **said})
    atomic.write(path, lambda file: file.write(content))
    part, name = trained.part, type(trained.network).__name__
    selective = [f"from medssl.methods.uafs import insert, settings; insert(network, settings.{trained.uafs})"]
    return [
        f"from safetensors.torch import load_file; from medssl.methods.networks.{part.name} import {name}, Config",
        f"network = {name}({trained.channels}, {trained.classes}, {part.settings})",
        *(selective if trained.uafs else []),
        f"network{'' if trained.whole else '.encoder'}.load_state_dict(load_file({str(path)!r}))",
    ]


# --------------------------------------------------------------------------------------------------------------- timm


def timm(trained: Trained) -> Foreign:
    """The encoder; ours bear timm's names already."""
    settings, state = trained.part.settings, dict(trained.network.encoder.state_dict())
    if settings.spatial_dims != 2:
        raise _NoEqual("timm's networks read slices, this one volumes")
    if trained.part.name == "resnet_unet" and settings.width == 64:
        call = f"create_model('resnet{settings.layers}', in_chans={trained.channels}, num_classes=0)"
        return Foreign(
            state, "timm", call, "torchvision's resnet loads it, too, with its fc set to torch.nn.Identity()", whole=False
        )
    if trained.part.name == "unetr":
        side = settings.grid * settings.patch
        call = (
            f"VisionTransformer(img_size={side}, patch_size={settings.patch}, in_chans={trained.channels}, num_classes=0, "
            f"embed_dim={settings.d}, depth={settings.depth}, num_heads={settings.heads}, mlp_ratio={settings.mlp_ratio})"
        )
        return Foreign(state, "timm.models.vision_transformer", call, whole=False)
    raise _NoEqual(f"timm has no encoder like that of this {trained.part.name}, but for resnet_unet of width 64 and unetr")


# -------------------------------------------------------------------------------------------------------------- monai


def monai(trained: Trained) -> Foreign:
    """The whole network."""
    if trained.part.name == "unet":
        return _basic_unet(trained) if trained.part.settings.down == "pool" else _dynunet(trained)
    if trained.part.name == "swin_unetr":
        return _swin_unetr(trained)
    if trained.part.name == "unetr":
        raise _NoEqual("MONAI's UNETR has no class token, and another epsilon in its layer norms")
    raise _NoEqual(f"MONAI has no network like {trained.part.name}")


def _basic_unet(trained: Trained) -> Foreign:
    settings, state = trained.part.settings, dict(trained.network.state_dict())
    width, levels = settings.width, settings.levels or unet.LEVELS
    if levels != 5:
        raise _NoEqual(f"MONAI's BasicUNet has 5 levels, this U-Net {levels}, and its DynUNet strides (network.down=stride)")
    names = ["conv_0.", *(f"down_{level}.convs." for level in range(1, 5))]
    moved: State = {}
    for level, name in enumerate(names):
        moved |= _block(_part(state, f"encoder.blocks.{level}."), name, BASIC_UNET)
    for number in range(4):
        moved |= _block(_part(state, f"decoder.blocks.{number}."), f"upcat_{4 - number}.convs.", BASIC_UNET)
        moved |= _under(f"upcat_{4 - number}.upsample.deconv.", _part(state, f"decoder.ups.{number}."))
    moved |= _under("final_conv.", _part(state, "head."))
    up, wide = "upcat_1.upsample.deconv.", "upcat_1.convs.conv_0.conv.weight"
    moved[f"{up}weight"], moved[wide] = _widened(moved[f"{up}weight"], width), _widened(moved[wide], width)
    moved[f"{up}bias"] = F.pad(moved[f"{up}bias"], (0, width))
    call = (
        f"BasicUNet({_shape(trained)}, features={(*(width * 2**level for level in range(5)), width)}, bias=False, "
        f"act=('leakyrelu', {{'negative_slope': 0.01}}), norm={_monai_norm(settings, 5)})"
    )
    return Foreign(moved, "monai.networks.nets", call, "equal to ours where sides are multiples of 16")


def _widened(weight: Tensor, extra: int) -> Tensor:
    """A kernel with `extra` more channels of 0 in its second dimension."""
    return F.pad(weight, (0, 0) * (weight.dim() - 2) + (0, extra))


def _dynunet(trained: Trained) -> Foreign:
    settings, state = trained.part.settings, dict(trained.network.state_dict())
    levels = settings.levels or unet.LEVELS
    if levels < 3:
        raise _NoEqual(f"MONAI's DynUNet has 3 levels or more, this U-Net {levels}")
    last = levels - 1
    down = ["input_block", *(f"downsamples.{level}" for level in range(last - 1)), "bottleneck"]
    nested = ["skip_layers." + "next_layer." * level for level in range(levels)]  # all layers once more, one in the other
    moved: State = {}
    for level in range(levels):
        block = _part(state, f"encoder.blocks.{level}.")
        again = nested[level] + ("downsample." if level < last else "")
        moved |= _block(block, f"{down[level]}.", DYNUNET) | _block(block, again, DYNUNET)
    for number in range(last):
        up, block = _part(state, f"decoder.ups.{number}."), _swapped(_part(state, f"decoder.blocks.{number}."))
        for name in (f"upsamples.{number}.", f"{nested[last - 1 - number]}upsample."):
            moved |= _under(f"{name}transp_conv.conv.", up) | _block(block, f"{name}conv_block.", DYNUNET)
    moved |= _under("output_block.conv.conv.", _part(state, "head."))
    filters = [settings.width * 2**level for level in range(levels)]
    call = (
        f"DynUNet({_shape(trained)}, kernel_size={[3] * levels}, strides={[1, *[2] * last]}, "
        f"upsample_kernel_size={[2] * last}, filters={filters}, norm_name={_monai_norm(settings, levels)}, trans_bias=True)"
    )
    return Foreign(moved, "monai.networks.nets", call, f"sides must be multiples of {2**last}")


def _swin_unetr(trained: Trained) -> Foreign:
    settings, state = trained.part.settings, dict(trained.network.state_dict())
    moved = _under("swinViT.", _part(state, "encoder.")) | _part(state, "decoder.") | _under("out.", _part(state, "head."))
    heads = tuple(settings.heads * 2**stage for stage in range(4))
    norm = ("group", {"num_groups": math.gcd(unet.GROUPS, settings.width)}) if settings.norm == "group" else "instance"
    call = (
        f"SwinUNETR({_shape(trained)}, feature_size={settings.width}, depths={tuple(settings.depths)}, num_heads={heads}, "
        f"window_size={settings.window}, norm_name={norm!r})"
    )
    return Foreign(moved, "monai.networks.nets", call, "sides must be multiples of 32, at least 64")


def _shape(trained: Trained) -> str:
    dims = trained.part.settings.spatial_dims
    return f"spatial_dims={dims}, in_channels={trained.channels}, out_channels={trained.classes}"


def _monai_norm(settings: Any, levels: int) -> tuple[str, dict[str, Any]]:
    if settings.norm != "group":
        return (settings.norm, {"affine": True})
    groups = {math.gcd(unet.GROUPS, settings.width * 2**level) for level in range(levels)}
    if len(groups) > 1:
        raise _NoEqual(f"MONAI norms all levels in equally many groups, this U-Net of width {settings.width} does not")
    return ("group", {"num_groups": groups.pop()})


# -------------------------------------------------------------------------------------------------------------- nnunet


def nnunet(trained: Trained) -> Foreign:
    """The whole network, as nnU-Net v2 saves its own."""
    settings = trained.part.settings
    if trained.part.name != "unet":
        raise _NoEqual(f"nnU-Net has no network like {trained.part.name}")
    if settings.down != "stride":
        raise _NoEqual("nnU-Net's networks halve by strided convolutions, this U-Net by max-pooling (network.down=stride)")
    levels = settings.levels or unet.LEVELS
    if settings.norm == "group" or levels < 2:
        raise _NoEqual("nnU-Net's plain U-Net has instance or batch norms, and 2 levels or more")
    state, last, dims = dict(trained.network.state_dict()), levels - 1, settings.spatial_dims
    moved: State = {}
    for level in range(levels):
        for name in ("encoder.", "decoder.encoder."):  # the decoder holds the encoder, too
            moved |= _nnunet_block(_part(state, f"encoder.blocks.{level}."), f"{name}stages.{level}.0.")
    for number in range(last):
        moved |= _under(f"decoder.transpconvs.{number}.", _part(state, f"decoder.ups.{number}."))
        moved |= _nnunet_block(_swapped(_part(state, f"decoder.blocks.{number}.")), f"decoder.stages.{number}.")
        head = _part(state, "head.")
        if number < last - 1:  # of deep supervision, which we do not have
            weight = head["weight"].new_zeros(trained.classes, settings.width * 2 ** (last - 1 - number), *[1] * dims)
            head = {"weight": weight, "bias": torch.zeros_like(head["bias"])}
        moved |= _under(f"decoder.seg_layers.{number}.", head)
    arguments = _plain_conv_unet(settings, levels)
    written = ", ".join(f"{key}={value}" for key, value in arguments.items())
    call = f"PlainConvUNet(input_channels={trained.channels}, num_classes={trained.classes}, {written})"
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": arguments,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    note = (
        f"nnUNetv2_train … -pretrained_weights FILE, with the file's entry 'architecture' in the plans; patches in {2**last}s"
    )
    module = "dynamic_network_architectures.architectures.unet"
    return Foreign(moved, module, call, note, entry="network_weights", architecture=architecture)


def _plain_conv_unet(settings: Any, levels: int) -> dict[str, Any]:
    """The arguments of PlainConvUNet, with classes by name as nnU-Net's plans have them."""
    dims = settings.spatial_dims
    return {
        "n_stages": levels,
        "features_per_stage": [settings.width * 2**level for level in range(levels)],
        "conv_op": f"torch.nn.Conv{dims}d",
        "kernel_sizes": [[3] * dims] * levels,
        "strides": [[1] * dims, *[[2] * dims] * (levels - 1)],
        "n_conv_per_stage": [2] * levels,
        "n_conv_per_stage_decoder": [2] * (levels - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.{'InstanceNorm' if settings.norm == 'instance' else 'BatchNorm'}{dims}d",
        "norm_op_kwargs": {"affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def _nnunet_block(block: State, theirs: str) -> State:
    """A block of ours; there, convolutions have biases, and all layers two names."""
    biases = {f"{layer}bias": block[f"{layer}weight"].new_zeros(len(block[f"{layer}weight"])) for layer in OURS[::2]}
    return _block(block | biases, theirs, NNUNET) | _block(block | biases, theirs, NNUNET_AGAIN)


CONVERT: Mapping[str, Callable[[Trained], Foreign]] = {"monai": monai, "timm": timm, "nnunet": nnunet}


# --------------------------------------------------------------------------------------------------------------- names


def _part(state: State, prefix: str) -> State:
    """What lies under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def _block(block: State, theirs: str, names: Sequence[str]) -> State:
    """A block of ours, its layers named `names` under `theirs`."""
    moved: State = {}
    for ours, name in zip(OURS, names, strict=True):
        moved |= _under(theirs + name, _part(block, ours))
    return moved


def _swapped(block: State) -> State:
    """A block of the decoder whose input is (up-sampled, skip) instead of (skip, up-sampled)."""
    skip, up = block["0.weight"].chunk(2, dim=1)
    return {**block, "0.weight": torch.cat([up, skip], dim=1)}
