"""Receptive fields: which pixels of the input each cell of a feature map can depend on, by name of the module that makes it.

The arithmetic is that of Araujo, Norris and Sim, "Computing Receptive Fields of Convolutional Neural Networks", Distill 2019,
https://doi.org/10.23915/distill.00021. Along each axis cell i of a map sees pixels  low + j·i … high + j·i  of the image,
j being the map's stride, and for the next map

    window k, stride s, dilation d, padding p    low - p j,  high + ((k-1) d - p) j,  stride j s
    its transpose, nearest or linear up-sampling the union over the s phases of the cells that a cell reads, stride j / s
    joining maps (sum, concatenation)            the least low, the greatest high

It is read off one forward pass with tensors that have shapes and no values, so that any network whose maps are convolved,
pooled, padded, joined and up-sampled is understood from its code; norms count as acting on single pixels. What is pooled
over all of the image is noted (`everywhere`), and otherwise left out; so is attention, be it within windows that shift from
block to block. Linear up-sampling counts two whole cells.
"""

import contextlib
import difflib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PROBE = 128  # pixels per side of the empty image: a multiple of every usual stride, so that rounding plays no part


@dataclass(frozen=True)
class Field:
    """What the cells of a map see: per spatial axis, and for the whole map."""

    channels: int
    stride: tuple[int, ...]  # pixels between neighbouring cells
    low: tuple[int, ...]  # first pixel that cell 0 sees; negative where padding is
    high: tuple[int, ...]  # and the last one
    centre: tuple[float, ...]  # where cell 0 lies; the middle of what it sees, unless up-sampling made that lopsided
    everywhere: bool = False  # through a global pooling each cell sees the whole image besides

    @property
    def size(self) -> tuple[int, ...]:
        """Pixels of the receptive field."""
        return tuple(high - low + 1 for low, high in zip(self.low, self.high, strict=True))

    def windowed(
        self, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
    ) -> "Field":
        """After a convolution or pooling."""
        jump, low = self.stride, [a - p * j for a, p, j in zip(self.low, padding, self.stride, strict=True)]
        reach = [(k - 1) * d - p for k, d, p in zip(kernel, dilation, padding, strict=True)]
        high = [b + r * j for b, r, j in zip(self.high, reach, jump, strict=True)]
        centre = [c + (a - b + d - e) / 2 for c, a, b, d, e in zip(self.centre, low, self.low, high, self.high, strict=True)]
        strides = [j * s for j, s in zip(jump, stride, strict=True)]
        return replace(self, low=tuple(low), high=tuple(high), centre=tuple(centre), stride=tuple(strides))

    def raised(self, factor: Sequence[int], place: Sequence[float], reads: Callable[[int, int], tuple[int, int]]) -> "Field":
        """After up-sampling.

        place   where the new cell 0 lies, in new cells after the old one
        reads   `reads(axis, i)`: the first and last old cell that the new cell i reads
        """
        if any(j % s for j, s in zip(self.stride, factor, strict=True)):
            raise ValueError(
                f"receptive fields: a map of stride {self.stride} is up-sampled by {tuple(factor)}, past the image"
            )
        stride = tuple(j // s for j, s in zip(self.stride, factor, strict=True))
        low, high = list(self.low), list(self.high)
        for axis, (s, old, new) in enumerate(zip(factor, self.stride, stride, strict=True)):
            cells = [reads(axis, i) for i in range(s)]
            low[axis] += min(first * old - i * new for i, (first, _) in enumerate(cells))
            high[axis] += max(last * old - i * new for i, (_, last) in enumerate(cells))
        centre = tuple(c + p * j for c, p, j in zip(self.centre, place, stride, strict=True))
        return replace(self, stride=stride, low=tuple(low), high=tuple(high), centre=centre)

    @classmethod
    def joined(cls, fields: Sequence["Field"]) -> "Field":
        """What the cells see of several maps together; they lie where the one that sees least has them."""
        first = fields[0]
        if other := next((field for field in fields if field.stride != first.stride), None):
            raise ValueError(f"receptive fields: maps of strides {first.stride} and {other.stride} are joined")
        low = tuple(min(ends) for ends in zip(*(field.low for field in fields), strict=True))
        high = tuple(max(ends) for ends in zip(*(field.high for field in fields), strict=True))
        least = min(field.size for field in fields)
        local = [field for field in fields if field.size == least]  # the skip, not what came back from below
        centre = tuple(sum(places) / len(local) for places in zip(*(field.centre for field in local), strict=True))
        everywhere = any(field.everywhere for field in fields)
        return replace(local[0], low=low, high=high, centre=centre, everywhere=everywhere)


def fields(network: nn.Module, names: Iterable[str]) -> dict[str, Field]:
    """The fields of the maps that the modules called `names` in `network.named_modules()` return.

    Raises ValueError for a name that does not exist, does not run, or gives no map of the image.
    """
    modules = named(network, names)
    found = _followed(network, modules)
    return {name: _checked(name, *found.get(name, (None, None))) for name in modules}


def maps(network: nn.Module) -> dict[str, Field]:
    """The fields of all maps that the outer modules of encoder and decoder return, in the order in which they are made.

    Outer are the children of the network's parts, or what their lists hold, or a sequence that does not run as a whole; parts
    without children, such as a head, and what gives no map are left out.
    """
    known = dict(network.named_modules())
    names = [name for part, module in network.named_children() if part != "head" for name in _outer(part, module)]
    followed, found = _followed(network, {name: known[name] for name in names if name in known}), dict[str, Field]()
    for name, seen in followed.items():
        if name.rpartition(".")[0] not in followed:
            with contextlib.suppress(ValueError):
                found[name] = _checked(name, *seen)
    return found


def _outer(name: str, module: nn.Module, depth: int = 0) -> Iterator[str]:
    held = isinstance(module, nn.ModuleList | nn.ModuleDict)
    if depth and not held:
        yield name
        if not isinstance(module, nn.Sequential):
            return
    for own, child in module.named_children():
        if own != "gate":  # the head of UAFS is not a map of the network
            yield from _outer(f"{name}.{own}", child, depth + 1)


def listed(found: Mapping[str, Field]) -> str:
    """Modules with the resolution of their maps, for an error."""
    return ", ".join(f"{name} (1/{'x'.join(map(str, sorted(set(field.stride))))})" for name, field in found.items())


def _followed(network: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, tuple[Field | None, Any]]:
    """What these modules return in one pass, with its field, in the order of the pass."""
    first = _entrance(network)
    image = torch.empty(1, first.in_channels, *[PROBE] * (first.weight.dim() - 2), device="meta")
    trace, found = _Trace(image), dict[str, tuple[Field | None, Any]]()
    times = Counter[str]()

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            times[name] += 1
            found[name] = trace.of(output), output

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    modes = [(module, module.training) for module in network.modules()]
    shapes = {key: torch.empty_like(value, device="meta") for key, value in _tensors(network)}
    try:
        network.eval()
        with torch.no_grad(), trace:
            torch.func.functional_call(network, shapes, (image,), tie_weights=False)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return {name: seen for name, seen in found.items() if times[name] == 1}  # what runs again makes several maps


def dimensions(network: nn.Module) -> int:
    """Of the images that the network reads: 2 or 3."""
    dims: int = _entrance(network).weight.dim() - 2
    return dims


def _entrance(network: nn.Module) -> Any:
    first = next((m for m in network.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)), None)
    if first is None:
        raise ValueError(f"receptive fields: the network {type(network).__name__} has no convolution to start from")
    return first


def named(network: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules of these names. Raises ValueError with the nearest name."""
    known = dict(network.named_modules())
    for name in names:
        if name not in known or not name:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f'the network {type(network).__name__} has no module "{name}"{hint}')
    return {name: known[name] for name in names}


def _tensors(network: nn.Module) -> Iterable[tuple[str, Tensor]]:
    for name, module in network.named_modules():  # one that has two names, once; a weight that two share, twice
        for own, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            yield f"{name}.{own}".lstrip("."), tensor


def _checked(name: str, field: Field | None, output: Any) -> Field:
    if field is None:
        raise ValueError(f'the module "{name}" gives no map of the image whose stride and receptive field follow from its code')
    sides = output.shape[2:]
    ratios = [PROBE / jump / count for jump, count in zip(field.stride, sides, strict=False)]  # not 1 where padding differs
    if len(sides) != len(field.stride) or not all(2 / 3 < ratio < 3 / 2 for ratio in ratios):
        raise ValueError(f'the module "{name}" gives {tuple(sides)} cells of {PROBE} pixels, not a stride of {field.stride}')
    return replace(field, channels=output.shape[1])


class _Trace(TorchFunctionMode):
    """Follows the fields of tensors through the functions that are called."""

    def __init__(self, image: Tensor):
        super().__init__()
        axes = image.dim() - 2
        self.known: dict[int, Field | None] = {}  # None: pooled over all of the image, and the same wherever it is put
        self.alive: list[Tensor] = []  # so that no id is given twice
        self._set(image, Field(image.shape[1], (1,) * axes, (0,) * axes, (0,) * axes, (0.0,) * axes))

    def of(self, x: Any) -> Field | None:
        return self.known.get(id(x)) if isinstance(x, Tensor) else None

    def _set(self, x: Tensor, field: Field | None) -> None:
        self.known[id(x)] = field
        self.alive.append(x)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in _flat((*args, *kwargs.values())) if id(x) in self.known]
        before = [self.known[id(x)] for x in given]
        out = func(*args, **kwargs)
        if given and getattr(func, "__name__", "") in APART:
            for part in out:
                self._set(part, before[0])
        if given and isinstance(out, Tensor):
            local = [field for field in before if field is not None]
            field = local[0] if len(local) == 1 else Field.joined(local) if local else None
            if field is not None and len(local) < len(before):
                field = replace(field, everywhere=True)
            rule = RULES.get(getattr(func, "__name__", ""))
            if rule is not None and field is not None:
                field = rule(field, given[0], out, args, kwargs)
            self._set(out, field)
        return out


def _flat(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among arguments, those in lists and tuples included."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _flat(value)
    return found


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], place: int, name: str, axes: int, default: Any) -> list[Any]:
    value = args[place] if place < len(args) else kwargs.get(name, default)
    value = default if value is None or value == [] else value
    return list(value) if isinstance(value, list | tuple) else [value] * axes


def _convolved(field: Field, x: Tensor, out: Tensor, args: Any, kwargs: Any) -> Field:
    axes, kernel = x.dim() - 2, args[1].shape[2:]
    stride, padding, dilation = (_argument(args, kwargs, 3 + i, n, axes, i != 1) for i, n in enumerate(WINDOW))
    if isinstance(padding[0], str):
        padding = [(k - 1) * d // 2 if padding[0] == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
    return field.windowed(kernel, [int(s) for s in stride], [int(p) for p in padding], [int(d) for d in dilation])


def _pooled(field: Field, x: Tensor, out: Tensor, args: Any, kwargs: Any) -> Field:
    axes = x.dim() - 2
    kernel = _argument(args, kwargs, 1, "kernel_size", axes, 1)
    stride = _argument(args, kwargs, 2, "stride", axes, kernel)
    return field.windowed(
        kernel, stride, _argument(args, kwargs, 3, "padding", axes, 0), _argument((), kwargs, 4, "dilation", axes, 1)
    )


def _transposed(field: Field, x: Tensor, out: Tensor, args: Any, kwargs: Any) -> Field:
    axes, kernel = x.dim() - 2, args[1].shape[2:]
    stride = _argument(args, kwargs, 3, "stride", axes, 1)
    padding = _argument(args, kwargs, 4, "padding", axes, 0)
    dilation = _argument(args, kwargs, 7, "dilation", axes, 1)

    def reads(axis: int, i: int) -> tuple[int, int]:
        reach, shifted = (kernel[axis] - 1) * dilation[axis], i + padding[axis]
        return -((reach - shifted) // stride[axis]), shifted // stride[axis]

    place = [p - (k - 1) * d / 2 for p, k, d in zip(padding, kernel, dilation, strict=True)]
    return field.raised(stride, place, reads)


def _interpolated(field: Field, x: Tensor, out: Tensor, args: Any, kwargs: Any) -> Field:
    factor = [round(new / old) for new, old in zip(out.shape[2:], x.shape[2:], strict=True)]
    if any(s < 1 for s in factor):
        raise ValueError(
            f"receptive fields: a map of {tuple(x.shape[2:])} is shrunk to {tuple(out.shape[2:])} by interpolation"
        )
    mode, aligned = kwargs.get("mode", "nearest"), kwargs.get("align_corners")
    if mode not in ("nearest", "linear", "bilinear", "trilinear"):
        raise ValueError(f"receptive fields: up-sampling by {mode} interpolation is not followed; use nearest or linear")

    def reads(axis: int, i: int) -> tuple[int, int]:
        if mode == "nearest" or factor[axis] == 1:
            return 0, 0
        if aligned:  # which two depends on the side; they are never further away
            return -1, 1
        place = (i + 0.5) / factor[axis] - 0.5
        return math.floor(place), math.ceil(place)

    return field.raised(factor, [0.0 if aligned else (1 - s) / 2 for s in factor], reads)


def _padded(field: Field, x: Tensor, out: Tensor, args: Any, kwargs: Any) -> Field:
    before = list(reversed((args[1] if len(args) > 1 else kwargs["pad"])[::2]))
    before = [0] * (x.dim() - 2 - len(before)) + before[-(x.dim() - 2) :]
    shift = [p * j for p, j in zip(before, field.stride, strict=True)]
    low, high = (tuple(a - b for a, b in zip(end, shift, strict=True)) for end in (field.low, field.high))
    centre = tuple(c - b for c, b in zip(field.centre, shift, strict=True))
    return replace(field, low=low, high=high, centre=centre)


def _strided(field: Field, x: Tensor, out: Tensor, args: Any, kwargs: Any) -> Field:
    """x[…, a::s, b::s, …], every s-th cell along each axis, wherever in the tensor the axes are."""
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    taken = [each for each in index if isinstance(each, slice) and (each.step or 1) > 1]
    if len(taken) != len(field.stride):
        return field
    ones, first = [1] * len(taken), [each.start or 0 for each in taken]
    return field.windowed(ones, [each.step for each in taken], [-start for start in first], ones)


def _attended(field: Field, x: Tensor, out: Tensor, args: Any, kwargs: Any) -> Field:
    return replace(field, everywhere=True)


def _global(field: Field, x: Tensor, out: Tensor, args: Any, kwargs: Any) -> Field | None:
    if math.prod(out.shape[2:]) == 1:
        return None
    raise ValueError("receptive fields: adaptive pooling is followed only to a single cell")


APART = ("unbind", "chunk", "split")  # q, k, v = x is the first of them
WINDOW = ("stride", "padding", "dilation")
AXES = ("1d", "2d", "3d")
RULES: dict[str, Callable[..., Field | None]] = {"interpolate": _interpolated, "pad": _padded, "__getitem__": _strided}
RULES |= {"softmax": _attended, "scaled_dot_product_attention": _attended}
RULES |= {f"conv{d}": _convolved for d in AXES} | {f"conv_transpose{d}": _transposed for d in AXES}
RULES |= {f"{kind}_pool{d}": _pooled for kind in ("max", "avg") for d in AXES}
RULES |= {f"adaptive_{kind}_pool{d}": _global for kind in ("max", "avg") for d in AXES}
