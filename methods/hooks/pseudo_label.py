"""Pseudo-labels: the network's own most probable classes are taken for labels, where it is confident.

Lee, "Pseudo-label: the simple and efficient semi-supervised learning method for deep neural networks", ICML workshop 2013,
https://www.kaggle.com/blobs/download/forum-message-attachment-files/746/pseudo_label_final.pdf; with a threshold and two views
of unequal strength: Sohn et al., "FixMatch", NeurIPS 2020, https://arxiv.org/abs/2001.07685.

    q = one-hot of argmax_k p_k(x)            (m, K, s, s), without gradient
    b = [max_k p_k(x) ≥ τ]                    (m, s, s)
    same view     L = mean of b · d(q, p(x))
    moved view    L = mean of T b · d(T q, p(T x)), T nearest
    d             cross-entropy - Σ_k q_k ln p_k, or mse, the mean over classes of (q - p)²

Defaults are Lee's: the same view, cross-entropy, no threshold, weight 3 at the end of a linear ramp (his runs over the 100th to
the 600th epoch of a longer training; here it starts with the first step and ends at half). FixMatch is `view: moved` with
`threshold: 0.95` where `unlabelled` draws strong intensities; its means, too, are over all pixels. Contrast-You
(https://github.com/jizongFox/Contrast-You) has mse with weight 0.1. Transfers: nothing of its own.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Generator, nn

from medssl.methods import agreement, augment, settings
from medssl.methods.augment import Pair
from medssl.methods.protocol import Loss, Step
from medssl.methods.ramps import weight
from medssl.methods.segment import Drawn, Hook, Pass


@dataclass(frozen=True, kw_only=True)
class Config(settings.Hook):
    weight: float = 3.0
    ramp: Literal["constant", "linear", "sigmoid"] = "linear"
    ramp_length: float = 0.5
    distance: Literal["cross_entropy", "mse"] = "cross_entropy"
    threshold: float = 0.0  # τ
    view: Literal["same", "moved"] = "same"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}: a probability lies in [0, 1]")


class PseudoLabel(nn.Module):
    predictor = None

    def __init__(self, network: nn.Module, config: Config):
        super().__init__()
        self.config = config

    def draw(self, pair: Pair, rng: Generator) -> Drawn:
        return {}

    def terms(self, pass_: Pass, drawn: Drawn, step: Step) -> Loss:
        pair, p = pass_.pair, pass_.image.detach().float().softmax(1)
        target, confident = agreement.hardened(p), p.amax(1, keepdim=True) >= self.config.threshold
        logits, valid = pass_.image, pair.inside
        if self.config.view == "moved":
            target, confident = (augment.apply_geometry(x.float(), pair.geometry, mode="nearest") for x in (target, confident))
            logits, valid = pass_.moved, pair.valid
        log_p = logits.float().log_softmax(1)
        mse = self.config.distance == "mse"
        distance = agreement.squared_error(target, log_p.exp()) if mse else agreement.divergence(target, log_p)
        term = agreement.average(distance * confident[:, 0], valid)
        confidence = agreement.average(confident[:, 0].float(), valid)
        return Loss({self.config.distance: weight(self.config, step) * term}, {"confident": confidence})

    def after_step(self, network: nn.Module, step: Step) -> None:
        pass


HOOK: type[Hook] = PseudoLabel
