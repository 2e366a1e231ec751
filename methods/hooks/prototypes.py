"""Prototypes: a class is several directions of the features, all of them used, no two of them alike.

Peng, Pedersoli and Desrosiers, "Diversified multi-prototype representation for semi-supervised segmentation", 2021,
https://arxiv.org/abs/2111.08651.

    W     (K M, c): M prototypes of each of K classes; q = softmax over K M of W f, f the map under the logits      (m, K M, *)
    p_k   Σ of q over the prototypes of class k
    L     CE of p over labelled pixels
          + w_1 (- mutual information of q(T x) and T q(x), λ, over all cells; `clusters.py`)
          + w_2 mean over all entries of (Ŵ Ŵᵀ - I)², rows of Ŵ of length 1
          + w_3 mean over cells and prototypes of (q(T x) - T q(x))²

Differences from the paper: there W takes the place of the network's last layer. A hook cannot replace what predicts, so W is a
second classifier beside the network's own, and shapes the features that both read; `weight` is a factor of all four terms.
M = 8 and w_1 = w_2 = 0.001 are the defaults of the published code (https://github.com/jizongFox/Contrast-You), which searched
w_1 to 0.1, w_2 to 10 and λ from 0.1 to 1.4, and has w_3 = 0. Transfers: nothing of its own.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from medssl.methods import agreement, clusters, settings
from medssl.methods.augment import Pair
from medssl.methods.protocol import UNLABELLED, Loss, Step
from medssl.methods.ramps import weight
from medssl.methods.segment import Drawn, Hook, Pass, cross_entropy, initial
from medssl.methods.taps import Taps, channels, classes


@dataclass(frozen=True, kw_only=True)
class Config(settings.Hook):
    per_class: int = 8  # M
    information: float = 1e-3  # w_1
    orthogonality: float = 1e-3  # w_2
    agreement: float = 0.0  # w_3
    balance: float = 1.0  # λ

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_class < 1 or min(self.information, self.orthogonality, self.agreement) < 0 or self.balance <= 0:
            raise ValueError("expected per_class of at least 1, weights of at least 0 and balance above 0")


class Prototypes(nn.Module):
    predictor = None

    def __init__(self, network: nn.Module, config: Config):
        super().__init__()
        self.config = config
        self.classes = classes(network)
        self.taps = Taps(network, ["decoder"])
        c = channels(network, "decoder")
        with initial("prototypes"):
            bound = 1 / math.sqrt(c)  # of a convolution in torch
            self.prototypes = nn.Parameter(torch.empty(self.classes * config.per_class, c).uniform_(-bound, bound))

    def draw(self, pair: Pair, rng: Generator) -> Drawn:
        return {}

    def terms(self, pass_: Pass, drawn: Drawn, step: Step) -> Loss:
        config, factor, labels = self.config, weight(self.config, step), pass_.views.labels
        assert labels is not None
        ours, x, y = (self.taps.taken(logits)["decoder"] for logits in (pass_.labelled, pass_.image, pass_.moved))
        with torch.autocast(y.device.type, enabled=False):
            log_p = class_log_probabilities(answers(ours, self.prototypes), self.classes)
            supervised = cross_entropy(log_p, at(labels, log_p.shape[2:]))
            q, other = pass_.move(answers(x, self.prototypes).exp()), answers(y, self.prototypes).exp()
            valid = clusters.within(pass_.pair.valid, other.shape[2:])
            p = clusters.joint(other[None], q[None], valid, symmetric=False)
            terms = {
                "cross_entropy": supervised,
                "information": config.information * clusters.negative_information(p, config.balance, 1e-5).mean(),
                "orthogonality": config.orthogonality * orthogonality(self.prototypes),
            }
            if config.agreement:
                terms["agreement"] = config.agreement * agreement.average(agreement.squared_error(q, other), valid)
        return Loss({name: factor * term for name, term in terms.items()})

    def after_step(self, network: nn.Module, step: Step) -> None:
        pass


def answers(features: Tensor, prototypes: Tensor) -> Tensor:
    """ln q: features (m, c, *) to (m, K M, *)."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    return torch.einsum("pc,mc...->mp...", prototypes, features.to(dtype)).log_softmax(1)


def class_log_probabilities(log_q: Tensor, classes: int) -> Tensor:
    """ln p: (m, K M, *) to (m, K, *), the prototypes of a class standing together."""
    return log_q.unflatten(1, (classes, -1)).logsumexp(2)


def orthogonality(prototypes: Tensor) -> Tensor:
    """How far rows are from being orthogonal, their length aside, ()."""
    unit = F.normalize(prototypes, dim=1)
    return (unit @ unit.T - torch.eye(len(unit), dtype=unit.dtype, device=unit.device)).square().mean()


def at(labels: Tensor, sides: torch.Size) -> Tensor:
    """Labels (m, *) at the resolution of a map; UNLABELLED cells stay so."""
    if labels.shape[1:] == sides:
        return labels
    assert UNLABELLED < 2**24  # exact in float32
    return F.interpolate(labels[:, None].float(), tuple(sides), mode="nearest-exact")[:, 0].long()


HOOK: type[Hook] = Prototypes
