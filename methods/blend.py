"""Partners and shares: which other crop a crop is blended or pasted with, and how much of each.

Draws come from a step's generator and stay on its device: nothing waits for the host.
"""

import torch
from torch import Generator, Tensor


def beta(alpha: float, rng: Generator) -> Tensor:
    """One draw of Beta(α, α), () float32."""
    concentration = torch.full((2,), alpha, dtype=torch.float64, device=rng.device)
    return torch._sample_dirichlet(concentration, generator=rng)[0].float()  # float64: small α underflow


def another(count: int, rng: Generator) -> Tensor:
    """For each of `count` crops another one, by a rotation: (count,) int64. One crop alone meets itself."""
    return rotation(count, torch.rand((), generator=rng, device=rng.device))


def rotation(count: int, turn: Tensor) -> Tensor:
    """Each place plus 1 to count - 1, around, as `turn` in [0, 1) says."""
    shift = 1 + (turn * max(count - 1, 1)).floor().long().clamp(max=max(count - 2, 0))
    return (torch.arange(count, device=turn.device) + shift) % count
