"""Several workers, one batch: what a loss needs when its batch is spread over the workers of a training.

Data-parallel training averages the workers' gradients. So the gradient of the joint loss J comes out right when the mean
of the workers' losses is J and every collective hands the gradient back to whom the value came from: each worker's
backward pass then yields the gradient of the *sum* of all losses by its own copy of the weights, and the average over
workers is the gradient of J. `torch.distributed.all_gather` alone cuts that path, which loses a factor of the number of
workers on whatever was gathered.

Outside a process group, or in a group of one, everything here is the plain operation and costs nothing.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def workers() -> int:
    """How many processes share the batch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]


def stack(x: Tensor) -> Tensor:
    """The tensors of all workers, of equal shape (*), as (workers, *), with gradients to each."""
    if workers() == 1:
        return x[None]
    stacked: Tensor = _Stack.apply(x.contiguous())
    return stacked


def total(x: Tensor) -> Tensor:
    """The sum over all workers of tensors of equal shape, with gradients to each."""
    return stack(x).sum(0)


def rows(x: Tensor) -> tuple[Tensor, int]:
    """The rows of all workers, (n, d) each with its own n, as one (N, d) in order of rank; and where this worker's begin.

    A loss that compares each of its rows with everybody's rows averages over its own and is the joint loss on average.
    """
    if workers() == 1:
        return x, 0
    counts = stack(torch.tensor(len(x), device=x.device)).tolist()
    padded = torch.cat([x, x.new_zeros(max(counts) - len(x), *x.shape[1:])])  # all_gather wants equal shapes
    joint = torch.cat([part[:count] for part, count in zip(stack(padded), counts, strict=True)])
    return joint, sum(counts[: dist.get_rank()])


def mean(total: Tensor, count: Tensor | int) -> Tensor:
    """Σ total / Σ count over all workers, as this worker's share: the average of the shares is the joint mean.

    total   (), the sum of what is averaged; its gradient is kept
    count   how many things were summed; may differ between workers, which is why a mean of means would not do
    Returns 0, with gradients of 0, when nothing was counted anywhere.
    """
    count = torch.as_tensor(count, device=total.device, dtype=total.dtype)
    if workers() > 1:
        count = count.clone()
        dist.all_reduce(count)
    return total * workers() / count.clamp(min=1)


class JointBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation of (n, c, *) over the joint batch of all workers; state and result are those of nn.BatchNorm.

    Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167. Unlike nn.SyncBatchNorm it runs on CPUs (gloo) too, and is
    nn.BatchNorm itself when there is one worker. Workers may hold different numbers of slices, none included.
    Raises ValueError when one worker alone has fewer than two values per channel to learn from.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch normalisation needs (n, c, *), not a tensor of shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        learns = self.training or self.running_mean is None
        if learns and workers() > 1:
            return self._joint(input)
        if learns and input.numel() < 2 * self.num_features:
            raise ValueError(
                f"batch normalisation over {len(input)} slice(s) of shape {tuple(input.shape[1:])} has no variance to "
                "learn from; use a larger batch, or crops that more of the slices can hold"
            )
        return super().forward(input)

    def _joint(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        axes = [axis for axis in range(x.dim()) if axis != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        values = x.float()  # half precision cannot hold the sums
        n = torch.full((self.num_features,), values.numel() / self.num_features, device=x.device)
        mean = values.sum(axes) / n.clamp(min=1)
        squares = (values - mean.view(shape)).square().sum(axes)

        # One collective: each worker's count, mean and centred squares, combined as in Chan, Golub and LeVeque 1983.
        counts, means, parts = stack(torch.stack([n, mean, squares])).unbind(1)
        count = counts.sum(0).clamp(min=1)
        mean = (counts * means).sum(0) / count
        squares = (parts + counts * (means - mean).square()).sum(0)
        variance = squares / count
        self._remember(mean.detach(), (squares / (count - 1).clamp(min=1)).detach())

        out = (values - mean.view(shape)) * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards those of this batch."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)
