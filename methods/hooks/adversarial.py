"""Virtual adversarial training: the answer does not change under the small change that would change it most.

Miyato, Maeda, Koyama and Ishii, "Virtual adversarial training", TPAMI 2019, https://arxiv.org/abs/1704.03976.

    d    ← noise of length 1 per crop; P times:  d ← ∇_r D(p(x), p(x + r)) at r = ξ d, brought to length 1
    r    = ε d                                                              (m, c, s, s), without gradient
    L    = D(p(x), p(x + r))        D: mean over pixels of KL, p(x) without gradient

Lengths are root mean squares over a crop's pixels, so that ε does not depend on the side: 0.045 is the paper's 2.5 for the
3072 numbers of an SVHN image. ξ = 0.01, where the paper has 1e-6 in whole length, below what float32 can tell apart. P = 1 and
the weight 1 are the paper's. Passes that look for d leave the running statistics of batch norms alone, and all of them run
in float32. Contrast-You's hook of this name is another idea, a discriminator of label maps. Transfers: nothing of its own.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from medssl.methods import agreement, settings
from medssl.methods.augment import Pair
from medssl.methods.protocol import Loss, Step
from medssl.methods.ramps import weight
from medssl.methods.segment import Drawn, Hook, Pass, untracked


@dataclass(frozen=True, kw_only=True)
class Config(settings.Hook):
    radius: float = 0.045  # ε, root mean square per pixel
    probe: float = 0.01  # ξ, likewise
    iterations: int = 1  # P

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.radius, self.probe) <= 0 or self.iterations < 1:
            raise ValueError(
                f"radius is {self.radius}, probe {self.probe} and iterations {self.iterations}: expected more than 0"
            )


class Adversarial(nn.Module):
    predictor = None

    def __init__(self, network: nn.Module, config: Config):
        super().__init__()
        self.config = config

    def draw(self, pair: Pair, rng: Generator) -> Drawn:
        return {"noise": torch.randn(pair.image.shape, generator=rng, device=pair.image.device)}

    def terms(self, pass_: Pass, drawn: Drawn, step: Step) -> Loss:
        x, inside = pass_.pair.image, pass_.pair.inside
        with torch.autocast(x.device.type, enabled=False):
            target = self._clean(pass_)
            direction = unit(drawn["noise"])
            for _ in range(self.config.iterations):
                r = (self.config.probe * direction).requires_grad_()
                with untracked(pass_.network), torch.enable_grad():
                    distance = self._distance(pass_.network(x + r), target, inside)
                (gradient,) = torch.autograd.grad(distance, r)
                direction = unit(gradient)
            term = self._distance(pass_.of(x + self.config.radius * direction), target, inside)
        return Loss({"divergence": weight(self.config, step) * term})

    def after_step(self, network: nn.Module, step: Step) -> None:
        pass

    def _clean(self, pass_: Pass) -> Tensor:
        """p(x), from the pass that all hooks share where that is in float32."""
        if pass_.image.dtype == torch.float32:
            return pass_.image.detach().softmax(1)
        with torch.no_grad(), untracked(pass_.network):
            logits: Tensor = pass_.network(pass_.pair.image)
        return logits.softmax(1)

    @staticmethod
    def _distance(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        return agreement.average(agreement.divergence(target, logits.log_softmax(1)), valid)


def unit(d: Tensor) -> Tensor:
    """Crops (m, *) of root mean square 1; 0 stays 0."""
    flat = d.flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(1e-30)  # squares of small gradients would be 0 in float32
    return (flat / flat.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)).view_as(d)


HOOK: type[Hook] = Adversarial
