"""Weights of other people and other runs: a checkpoint's layout is told by its keys, and its encoder renamed to ours.

    medssl              encoder.pt and encoder@STEP.pt of a pretraining (with its blocks of a decoder), best.pt of a fine-tuning
    plain               the state_dict of an encoder, or of a whole network (`encoder.…`)
    ResNet              torchvision and timm names (`conv1`, `layer1.0.…`), or the numbers of a Sequential (`0`, `4.0.…`)
    ViT                 timm names (`blocks.0.attn.qkv.…`), or torchvision's, which are renamed to timm's
    solo-learn          `backbone.…`; a file that holds nothing but `momentum_backbone.…` gives that
    lightly             `backbone.…` over the numbers of a Sequential, as its examples build it
    BYOL-PyTorch        `online_network.encoder.…`, or the entry `online_backbone` of the published file; its authors
                        recommend the online network over the target (yaox12/BYOL-PyTorch, issue 2)
    MONAI Swin          `swinViT.…`, or bare as in the self-supervised files; `mlp.fc1` becomes `mlp.linear1`
    nnssl               `network_weights` with the keys that its adaptation plan names

Wrappers that hold every key (`module.`, `_orig_mod.`) are taken off first. Heads of a classifier are left out. The first layer
adapts to the channels of the data: c channels become 1 by their sum, and n > 1 by repeating their kernels, times c / n, so that
an image of n equal channels gives what one of c equal channels gave (in the BYOL study, https://arxiv.org/abs/2209.00314, c
is 3 or 1). Positional embeddings of a ViT on another square grid are interpolated; everything else must fit as it is.

Files are read with `weights_only`: nothing in them is run. Those that end in `.safetensors`, as timm's on the Hugging Face hub
and what `medssl export` writes, are a state_dict of any of these layouts; ours carry their chain along.
"""

import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medssl.platform import checkpoint
from medssl.platform.checkpoint import Transfer
from medssl.platform.errors import RunError

State = dict[str, Tensor]

# Entries of a checkpoint that hold a state_dict, the one to be preferred first. The name is the layout, where it tells.
ENTRIES = {
    "network_weights": "nnssl",
    "online_backbone": "BYOL-PyTorch",
    "target_backbone": "BYOL-PyTorch (target network)",
    "encoder": "",
    "network": "",
    "state_dict": "",
    "model_state_dict": "",
    "model": "",
}
# Where in a state_dict the encoder lies, the one to be preferred first.
PREFIXES = {
    "online_network.encoder.": "BYOL-PyTorch",
    "target_network.encoder.": "BYOL-PyTorch (target network)",
    "backbone.": "solo-learn",
    "momentum_backbone.": "solo-learn (momentum)",
    "swinViT.": "MONAI Swin",
    "encoder.": "whole network",
}
WRAPPERS = ("module.", "_orig_mod.")
SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}  # a ResNet's children
TORCHVISION_VIT = {
    r"^class_token$": "cls_token",
    r"^encoder\.pos_embedding$": "pos_embed",
    r"^conv_proj\.": "patch_embed.proj.",
    r"^encoder\.layers\.encoder_layer_(\d+)\.": r"blocks.\1.",
    r"^encoder\.ln\.": "norm.",
    r"\.ln_([12])\.": r".norm\1.",
    r"\.self_attention\.in_proj_": ".attn.qkv.",
    r"\.self_attention\.out_proj\.": ".attn.proj.",
    r"\.mlp\.linear_([12])\.": r".mlp.fc\1.",
    r"\.mlp\.0\.": ".mlp.fc1.",  # files of torchvision before 0.12
    r"\.mlp\.3\.": ".mlp.fc2.",
}
SWIN = {
    r"^encoder\.(layers\d\.0)\.0\.": r"\1.",  # disruptive autoencoders (https://arxiv.org/abs/2307.16896)
    r"^encoder\.": "",
    r"\.mlp\.fc([12])\.": r".mlp.linear\1.",
}
HEADS = {  # of each family: what stands on the encoder
    "ResNet": ("fc.", "classifier."),
    "ViT": ("head.", "heads.", "head_dist.", "fc_norm.", "mask_token"),
    "Swin": ("norm.", "mask_token", "rotation_head.", "contrastive_head.", "conv.", "out."),
}
# Buffers that the architecture decides, or that only count: old files have more of them, others fewer.
IMMATERIAL = ("num_batches_tracked", "relative_position_index", "attn_mask")


@dataclass(frozen=True)
class Weights:
    """An encoder's weights out of a file."""

    layout: str
    state: State  # named as our encoders name them
    left_out: tuple[str, ...]  # keys of heads, decoders, teachers
    chain: str  # how the weights came to be: `imagenet (ResNet) -> byol:acdc@25`
    decoder: State = field(default_factory=dict)  # blocks of a decoder that a medssl pretraining trained, as `decoder.…`


def begin(encoder: nn.Module, file: Path, *, partial: bool = False) -> tuple[Weights, Transfer]:
    """Start `encoder` from a file of any layout; returns what was read and which keys met.

    Raises RunError with the key report when nothing fits, and when not everything does unless `partial` allows it.
    """
    weights = read(file)
    try:
        return weights, checkpoint.transfer(fit(weights.state, encoder), encoder, partial=partial)
    except RunError as error:
        remedy = "" if partial else "; start.partial=true would start from what fits"
        raise RunError(
            f"{file} (layout: {weights.layout}; {len(weights.left_out)} keys beside the encoder left out): {error}{remedy}"
        ) from error


def begin_network(network: Any, file: Path, *, partial: bool = False) -> tuple[Weights, Transfer]:
    """Start the encoder of `network`, and the blocks of its decoder that the file has; everything else stays as it is.

    Returns what was read and which keys of the network met: `missing` is what stays. Raises RunError as `begin` does.
    """
    weights, met = begin(network.encoder, file, partial=partial)
    blocks = checkpoint.compare(weights.decoder, network.state_dict())
    if (blocks.unexpected or blocks.reshaped) and not partial:
        differences = replace(blocks, missing=()).differences()
        raise RunError(f"{file}: pretrained blocks of a decoder do not fit the network: {differences}")
    network.load_state_dict({key: weights.decoder[key] for key in blocks.matched}, strict=False)
    inside = {name: tuple(f"encoder.{key}" for key in keys) for name, keys in vars(met).items()}
    matched = (*inside["matched"], *blocks.matched)
    return weights, Transfer(
        matched=matched,
        missing=tuple(key for key in network.state_dict() if key not in matched),
        unexpected=(*inside["unexpected"], *blocks.unexpected),
        reshaped=(*inside["reshaped"], *blocks.reshaped),
    )


def handed_on(state: Mapping[str, Tensor], what: str) -> dict[str, State]:
    """What a method transfers, as a pretraining's file holds it: `encoder`, and of an "encoder+decoder" `decoder` beside it."""
    if what == "encoder":
        return {"encoder": dict(state)}
    encoder, rest = _kept(state, "encoder.")
    return {"encoder": encoder, "decoder": {key: state[key] for key in rest}}


def read(file: Path) -> Weights:
    """The encoder in a file, in our names. Raises RunError for a file that is none, or that only pickled code could open."""
    if file.suffix == ".safetensors":
        tensors, said = _safetensors(file)
        layout, state, left = _encoder("", tensors, {})
        return Weights(layout, state, left, said["chain"] if "medssl" in said else f"{file.name.split('.')[0]} ({layout})")
    held = _load(file)
    if isinstance(held, Mapping) and {"format", "digest", "state"} <= held.keys():
        held = checkpoint.load(file)
        kind, entry = ("pretraining", "encoder") if "encoder" in held else ("fine-tuning", "network")
        if entry not in held:
            raise RunError(f"{file}: a checkpoint of medssl, but neither encoder.pt nor best.pt of a stage")
        chain = held["card"]["chain"] if "card" in held else held.get("chain", file.stem)
        state, left = _kept(held[entry], "encoder." if entry == "network" else "")
        return Weights(f"medssl {kind}", state, left, chain, held.get("decoder", {}))
    name, state = _state_dict(held, file)
    layout, state, left = _encoder(name, state, held)
    return Weights(layout, state, left, f"{file.name.split('.')[0]} ({layout})")


def _load(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise RunError(f"{file}: no such file of weights") from error
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):
            raise RunError(f"{file}: not a checkpoint that torch can read") from error
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise RunError(
            f"{file}: opening it would run pickled code{f' ({found[1]})' if found else ''}, which medssl does not; if you "
            "trust it, convert it once: torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW), or its entry"
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, TypeError) as error:
        raise RunError(f"{file}: not a checkpoint that torch can read ({str(error)[:100] or 'empty'})") from error


def _safetensors(file: Path) -> tuple[State, dict[str, str]]:
    """What a file in the safetensors format holds, and what its metadata say."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise RunError(f"{file}: reading it needs the package safetensors; pip install 'medssl[safetensors]'") from error
    try:
        with safe_open(file, "pt") as held:
            return {key: held.get_tensor(key) for key in held.keys()}, held.metadata() or {}  # noqa: SIM118 (no mapping)
    except FileNotFoundError as error:
        raise RunError(f"{file}: no such file of weights") from error
    except (SafetensorError, OSError) as error:
        raise RunError(f"{file}: not a file that safetensors can read ({str(error)[:100]})") from error


def _tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(entry, Tensor) for entry in value.values())


def _state_dict(held: Any, file: Path, name: str = "") -> tuple[str, State]:
    """The state_dict in a checkpoint, and the layout where an entry gives it away."""
    if _tensors(held):
        return name, {key: value for key, value in held.items() if isinstance(value, Tensor)}
    for entry, layout in ENTRIES.items():
        if isinstance(held, Mapping) and isinstance(held.get(entry), Mapping) and held[entry]:
            return _state_dict(held[entry], file, layout or name)
    found = ", ".join(map(str, list(held)[:8])) if isinstance(held, Mapping) else type(held).__name__
    raise RunError(f"{file}: no weights found in it; expected a state_dict, or one under {', '.join(ENTRIES)}; found: {found}")


def _encoder(name: str, state: State, held: Any) -> tuple[str, State, tuple[str, ...]]:
    """Layout, the encoder's part of a state_dict in our names, and what was left out."""
    for wrapper in WRAPPERS * 2:
        if all(key.startswith(wrapper) for key in state):
            state = {key.removeprefix(wrapper): value for key, value in state.items()}
    if name == "nnssl":
        return (name, *_nnssl(state, held.get("nnssl_adaptation_plan") or {}))
    left: tuple[str, ...] = ()
    if "class_token" in state and "encoder.pos_embedding" in state:
        state, name = _renamed(state, TORCHVISION_VIT), name or "torchvision ViT"
    elif not any(re.match(r"(encoder\.)?layers1\.0\.", key) for key in state):  # a bare Swin has no prefix to look for
        prefix = next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in state)), "")
        if prefix:
            state, left = _kept(state, prefix)
            name = name or PREFIXES[prefix]
    family, state = _family(state)
    if name == "solo-learn" and family == "Sequential":
        name = "lightly"
    family = "ResNet" if family == "Sequential" else family
    heads = tuple(key for key in state if key.startswith(HEADS.get(family, ())))
    state = {key: value for key, value in state.items() if key not in heads}
    return name or {"Swin": "MONAI Swin"}.get(family, family) or "encoder", state, (*left, *heads)


def _family(state: State) -> tuple[str, State]:
    """The architecture whose names these are, and the state in the names that our encoders use."""
    if "4.0.conv1.weight" in state:
        parts = ((*key.partition("."), value) for key, value in state.items())
        return "Sequential", {f"{SEQUENTIAL.get(head, head)}{dot}{tail}": value for head, dot, tail, value in parts}
    if "layer1.0.conv1.weight" in state:
        return "ResNet", state
    if any(re.match(r"(encoder\.)?layers1\.0\.", key) for key in state):
        return "Swin", _renamed(state, SWIN)
    return ("ViT" if "blocks.0.attn.qkv.weight" in state else ""), state


def _nnssl(state: State, plan: Mapping[str, Any]) -> tuple[State, tuple[str, ...]]:
    """The weights under the keys of an nnssl adaptation plan; layers registered twice (`all_modules`) are taken once."""
    named = [plan.get("key_to_encoder", "encoder"), plan.get("key_to_stem"), plan.get("key_to_lpe")]
    kept = {
        key: value
        for key, value in state.items()
        if any(key == name or key.startswith(f"{name}.") for name in named if name) and ".all_modules." not in key
    }
    left = tuple(key for key in state if key not in kept)
    return {key.removeprefix("encoder."): value for key, value in kept.items()}, left


def _kept(state: Mapping[str, Tensor], prefix: str) -> tuple[State, tuple[str, ...]]:
    """What lies under a prefix, without it; and the keys that do not."""
    kept = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return kept, tuple(key for key in state if not key.startswith(prefix))


def _renamed(state: State, rules: Mapping[str, str]) -> State:
    def name(key: str) -> str:
        for pattern, replacement in rules.items():
            key = re.sub(pattern, replacement, key)
        return key

    return {name(key): value for key, value in state.items()}


def fit(state: State, encoder: nn.Module) -> State:
    """`state` with the first layer on the encoder's channels and positional embeddings on its grid."""
    wanted = encoder.state_dict()
    fitted = {key: value for key, value in state.items() if key in wanted or not key.endswith(IMMATERIAL)}
    fitted |= {key: value for key, value in wanted.items() if key.endswith(IMMATERIAL) and key not in state}
    positions = next((key for key in wanted if key.endswith("pos_embed")), None)
    if positions in fitted:
        fitted = _placed(fitted, wanted, positions)
    entrance = next((key for key, value in wanted.items() if value.ndim >= 4 and not key.endswith("pos_embed")), None)
    if entrance in fitted and fitted[entrance].ndim == wanted[entrance].ndim:
        fitted[entrance] = channels(fitted[entrance], wanted[entrance].shape[1])
    return fitted


def channels(weight: Tensor, wanted: int) -> Tensor:
    """A first layer's kernels (out, c, …) for `wanted` input channels: their sum for 1, otherwise repeats times c / wanted."""
    given = weight.shape[1]
    if given == wanted:
        return weight
    if wanted == 1:
        return weight.sum(1, keepdim=True)
    repeats = weight[:, torch.arange(wanted) % given]
    return repeats * (given / wanted)


def _placed(state: State, wanted: Mapping[str, Tensor], key: str) -> State:
    """`state` with the positional embeddings of the encoder's grid; those of a class token go with the token."""
    token = key.removesuffix("pos_embed") + "cls_token"
    ours, given = int(token in wanted), int(token in state)
    kernel = wanted[key.removesuffix("pos_embed") + "patch_embed.proj.weight"]
    special, grid = state[key][:, :given], state[key][:, given:]
    if not ours:
        state = {name: value for name, value in state.items() if name != token}
    if ours > given or grid.ndim != 3:
        return state
    grid = positions(grid, wanted[key].shape[1] - ours, kernel.ndim - 2)
    return state | {key: torch.cat([special[:, :ours], grid], dim=1)}


def positions(grid: Tensor, wanted: int, spatial_dims: int) -> Tensor:
    """Positional embeddings (1, t, d) of a square (or cubic) grid on one of `wanted` places: bicubic, in 3D trilinear.

    Where either number is no such grid, they come back as they are, and will not fit.
    """
    sides = [round(number ** (1 / spatial_dims)) for number in (grid.shape[1], wanted)]
    if grid.shape[1] == wanted or [side**spatial_dims for side in sides] != [grid.shape[1], wanted]:
        return grid
    mode = {1: "linear", 2: "bicubic", 3: "trilinear"}[spatial_dims]
    maps = grid.transpose(1, 2).reshape(1, grid.shape[2], *[sides[0]] * spatial_dims)
    moved = nn.functional.interpolate(maps.float(), size=[sides[1]] * spatial_dims, mode=mode, align_corners=False)
    return moved.reshape(1, grid.shape[2], math.prod(moved.shape[2:])).transpose(1, 2).to(grid.dtype)
