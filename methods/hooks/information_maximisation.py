"""Information maximisation: be sure of every pixel, and use all classes over the batch.

Hu, Miyato, Tokui, Matsumoto and Sugiyama, "Learning discrete representations via information maximizing self-augmented
training", ICML 2017, https://arxiv.org/abs/1702.08720 (IMSAT), after Krause, Perona and Gomes, NeurIPS 2010.

    L = mean over pixels of H(p) - μ H(mean over pixels of p)           p (m, K, s, s), H in nats; averaged over x and T x

Differences from the paper: what keeps an answer the same under changes (its "SAT") is a term of its own, `adversarial.py` or
`consistency.py`. μ is 1, as in Contrast-You (https://github.com/jizongFox/Contrast-You), which weighs L by 0.001, because
classes of an image are far from equally many; the paper has 4. `dynamic` lets μ rise by 0.01 (ln K - H(mean)) a step, which is
the state of this hook. Transfers: nothing of its own.
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from medssl.methods import agreement, gather, settings
from medssl.methods.augment import Pair
from medssl.methods.protocol import Loss, Step
from medssl.methods.ramps import weight
from medssl.methods.segment import Drawn, Hook, Pass

RATE = 0.01  # of the dynamic balance


@dataclass(frozen=True, kw_only=True)
class Config(settings.Hook):
    weight: float = 1e-3
    balance: float = 1.0  # μ, at the first step
    dynamic: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.balance < 0:
            raise ValueError(f"balance is {self.balance}: expected at least 0")


class InformationMaximisation(nn.Module):
    predictor = None
    balance: Tensor
    missing: Tensor

    def __init__(self, network: nn.Module, config: Config):
        super().__init__()
        self.config = config
        self.register_buffer("balance", torch.tensor(config.balance, dtype=torch.float64))
        self.register_buffer("missing", torch.tensor(0.0, dtype=torch.float64), persistent=False)  # ln K - H(mean)

    def draw(self, pair: Pair, rng: Generator) -> Drawn:
        return {}

    def terms(self, pass_: Pass, drawn: Drawn, step: Step) -> Loss:
        views = ((pass_.image, pass_.pair.inside), (pass_.moved, pass_.pair.valid))
        sure, used = (torch.stack(each) for each in zip(*(entropies(*view) for view in views), strict=True))
        term = (sure - self.balance.float() * used).mean()
        if self.config.dynamic:
            self.missing.copy_(math.log(pass_.image.shape[1]) - used.detach().mean())
        return Loss({"information": weight(self.config, step) * term}, {"used": used.detach().mean()})

    def after_step(self, network: nn.Module, step: Step) -> None:
        self.balance.add_(raised(self.missing))


def raised(missing: Tensor) -> Tensor:
    """What the dynamic balance gains in a step."""
    return RATE * missing


def entropies(logits: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The mean entropy of valid pixels' answers, and the entropy of their mean answer; over all workers' crops, () each."""
    log_p = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(1)
    total, count = (log_p.exp() * valid[:, None]).movedim(1, -1).flatten(0, -2).sum(0), valid.sum()
    mean = gather.total(total) / gather.total(count.to(total.dtype)).clamp(min=1)
    return agreement.average(agreement.entropy(log_p), valid), -(mean * mean.clamp_min(agreement.TINY).log()).sum()


HOOK: type[Hook] = InformationMaximisation
