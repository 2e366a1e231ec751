"""How far two probability maps are from each other, or one from certainty: means over valid pixels of all workers' crops.

    squared error   (1/K) Σ_k (p_k - q_k)²        (Tarvainen and Valpola 2017, https://arxiv.org/abs/1703.01780, for maps)
    divergence      Σ_k t_k (ln t_k - ln p_k)     (Kullback and Leibler 1951, https://doi.org/10.1214/aoms/1177729694)
    entropy         - Σ_k p_k ln p_k

    maps (m, k, *)      valid (m, *) bool, pixels that count      per pixel (m, *), otherwise ()

Without a valid pixel a mean is 0, with gradients of 0.
"""

import torch
from torch import Tensor

from medssl.methods import gather

TINY = 1e-12  # below it a probability's logarithm is cut off: 0 ln 0 is 0


def average(values: Tensor, valid: Tensor) -> Tensor:
    """The mean of (m, *) values over valid pixels."""
    return gather.mean(torch.where(valid, values, 0).sum(), valid.sum())


def squared_error(p: Tensor, q: Tensor) -> Tensor:
    """Per pixel, mean over classes."""
    return (p - q).square().mean(1)


def divergence(target: Tensor, log_p: Tensor) -> Tensor:
    """KL(target || p) per pixel; `log_p` as of log_softmax."""
    return (target * (target.clamp_min(TINY).log() - log_p)).sum(1)


def entropy(log_p: Tensor) -> Tensor:
    """Per pixel, in nats; of `log_p`, since the gradient of p ln p does not exist at 0."""
    return -(log_p.exp() * log_p).sum(1)


def hardened(p: Tensor) -> Tensor:
    """The one-hot maps of the most probable class."""
    return torch.zeros_like(p).scatter_(1, p.argmax(1, keepdim=True), 1.0)
