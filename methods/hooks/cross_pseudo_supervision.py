"""Cross pseudo supervision: two networks of unequal beginnings, each trained on the other's most probable classes.

Chen, Yuan, Zeng and Wang, "Semi-supervised semantic segmentation with cross pseudo supervision", CVPR 2021,
https://arxiv.org/abs/2106.01226.

    q_1, q_2    one-hot of argmax_k of f(x) and of the peer g(x)          (m, K, s, s), without gradient
    L           = mean of - Σ_k q_2k ln p_1k  +  mean of - Σ_k q_1k ln p_2k        over unlabelled pixels
    L_s         the supervised terms of g, with their own weights: f has its own

The peer begins with the network's encoder, as the paper's two networks share their backbone's pretraining, and with a decoder
and head initialised anew. f predicts. Differences from the paper: labelled crops take part in L_s only. The weight 1.5 is the
paper's for PASCAL VOC. Transfers: nothing of its own.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, nn

from medssl.methods import agreement, settings
from medssl.methods.augment import Pair
from medssl.methods.protocol import Loss, Step
from medssl.methods.ramps import weight
from medssl.methods.segment import Drawn, Hook, Pass, supervised


@dataclass(frozen=True, kw_only=True)
class Config(settings.Hook):
    weight: float = 1.5


class CrossPseudoSupervision(nn.Module):
    predictor = None

    def __init__(self, network: nn.Module, config: Config):
        super().__init__()
        self.config = config
        self.peer = renewed(network)

    def draw(self, pair: Pair, rng: Generator) -> Drawn:
        return {}

    def terms(self, pass_: Pass, drawn: Drawn, step: Step) -> Loss:
        labels, inside = pass_.views.labels, pass_.pair.inside
        assert labels is not None
        own = supervised(self.peer(pass_.views.images[0]), labels, pass_.config)
        logs = [logits.float().log_softmax(1) for logits in (pass_.image, self.peer(pass_.pair.image))]
        targets = [agreement.hardened(log_p.detach()) for log_p in logs]
        each = [agreement.divergence(target, log_p) for target, log_p in zip(targets[::-1], logs, strict=True)]
        cross = agreement.average(each[0], inside) + agreement.average(each[1], inside)
        agreed = agreement.average((targets[0] == targets[1]).all(1).float(), inside)
        return Loss({"cross": weight(self.config, step) * cross, **own}, {"agreed": agreed})

    def after_step(self, network: nn.Module, step: Step) -> None:
        pass


def renewed(network: nn.Module) -> nn.Module:
    """A copy of `network` with everything but its encoder initialised anew, by a seed beside the global generator's.

    The global generator is left as it was: what else is initialised does not depend on this hook.
    """
    peer = copy.deepcopy(network)
    encoder: nn.Module | None = getattr(peer, "encoder", None)
    kept = set() if encoder is None else set(encoder.modules())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() + 1)
        for module in peer.modules():
            reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
            if module not in kept and reset:
                reset()
    return peer


HOOK: type[Hook] = CrossPseudoSupervision
