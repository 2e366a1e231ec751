"""What a training leaves behind: the state to continue from, bit for bit, and weights for another network to start from."""

import hashlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medssl.platform import atomic
from medssl.platform.errors import RunError

FORMAT = 1  # raised when older checkpoints can no longer be read

State = dict[str, Any]  # nested dicts, lists and tuples of tensors and plain values


def digest(state: Any) -> str:
    """Hash of everything in a nested state: equal for states that are equal bit by bit, on whatever device they lie."""
    running = hashlib.blake2b(digest_size=16)

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            running.update(f"{value.dtype}{tuple(value.shape)}".encode())
            running.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            for key, entry in value.items():
                running.update(f"{{{key!r}".encode())
                feed(entry)
        elif isinstance(value, list | tuple):
            running.update(f"[{len(value)}".encode())
            for entry in value:
                feed(entry)
        else:
            running.update(repr(value).encode())

    feed(state)
    return running.hexdigest()


def save(path: Path, state: State) -> None:
    """Write `state` in one step. It holds tensors, numbers and strings only: nothing in the file is code."""
    whole = {"format": FORMAT, "digest": digest(state), "state": state}
    atomic.write(path, lambda file: torch.save(whole, file))


def load(path: Path, device: torch.device | str = "cpu") -> State:
    """The state that `save` wrote, its tensors on `device`.

    Raises RunError when the file is missing, cut short, changed since, or of another format. torch alone notices only the
    first two: a flipped bit in a weight would pass.
    """
    remedy = "delete it to start this stage again"
    try:
        whole = torch.load(path, map_location=device, weights_only=True)
        form, expected, state = whole["format"], whole["digest"], whole["state"]
    except FileNotFoundError as error:
        raise RunError(f"{path}: no such checkpoint") from error
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise RunError(f"{path}: not a whole checkpoint of medssl; {remedy}") from error
    if form != FORMAT:
        raise RunError(f"{path}: checkpoint format {form}, this version reads {FORMAT}; {remedy}")
    if digest(state) != expected:
        raise RunError(f"{path}: its content has changed since it was written; {remedy}")
    loaded: State = state
    return loaded


def capture(method: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, step: int) -> State:
    """All that the next steps depend on. No random state: every draw is seeded by (seed, rank, step).

    The tensors are the live ones, not copies: save the state before training on.
    """
    return {
        "step": step,
        "method": method.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }


def restore(state: Mapping[str, Any], method: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> int:
    """Put back what `capture` took; returns the step to continue from.

    Raises RunError, naming the first differences, when the state is that of another architecture or optimizer.
    """
    compared = compare(state["method"], method.state_dict())
    if not compared.exact:
        raise RunError(f"the checkpoint is of another architecture: {compared.differences()}")
    method.load_state_dict(state["method"])
    try:
        optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError) as error:
        raise RunError(f"the checkpoint is of another optimizer: {error}") from error
    scaler.load_state_dict(state["scaler"])
    step: int = state["step"]
    return step


@dataclass(frozen=True)
class Transfer:
    """How the keys of a given state and of a module met."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]  # in the module, not in the state: stay as initialised
    unexpected: tuple[str, ...]  # in the state, not in the module: left out
    reshaped: tuple[str, ...]  # in both, of different shapes (given → wanted): stay as initialised

    @property
    def exact(self) -> bool:
        return not (self.missing or self.unexpected or self.reshaped)

    def differences(self, limit: int = 3) -> str:
        """The first `limit` keys of each kind of difference, for an error or a log."""

        def some(keys: tuple[str, ...]) -> str:
            return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")

        kinds = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.reshaped}
        return "; ".join(f"{len(keys)} {kind} ({some(keys)})" for kind, keys in kinds.items() if keys)


def compare(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Transfer:
    """Which keys of `given` fit into `wanted`, by name and shape; keys keep the order of their own state."""
    shared = [key for key in wanted if key in given]
    fits = [key for key in shared if given[key].shape == wanted[key].shape]
    return Transfer(
        matched=tuple(fits),
        missing=tuple(key for key in wanted if key not in given),
        unexpected=tuple(key for key in given if key not in wanted),
        reshaped=tuple(f"{key} {tuple(given[key].shape)} → {tuple(wanted[key].shape)}" for key in shared if key not in fits),
    )


def transfer(state: Mapping[str, Tensor], module: nn.Module, *, partial: bool = False) -> Transfer:
    """Start `module` (the encoder of a fine-tuning's network) from `state` (a method's `transferable_state`).

    Returns what matched and what did not. Raises RunError when nothing matched, and when only a part did unless
    `partial` asks for that: a network that silently starts from random weights makes a comparison worthless.
    """
    result = compare(state, module.state_dict())
    if not result.matched:
        raise RunError(f"none of the pretrained weights fits the network: {result.differences()}")
    if not (result.exact or partial):
        raise RunError(f"only {len(result.matched)} pretrained weights fit the network: {result.differences()}")
    module.load_state_dict({key: state[key] for key in result.matched}, strict=False)
    return result
