"""UniMatch: what the network says of a weakly changed crop teaches it on two strong changes, and with half its features gone.

Yang, Qi, Feng, Zhang and Shi, "Revisiting weak-to-strong consistency in semi-supervised semantic segmentation", CVPR 2023,
https://arxiv.org/abs/2208.09910.

    q, b    argmax_k p_k(x) and [max_k p_k(x) ≥ τ]                     (m, s, s), without gradient; x the weak view
    x_1, x_2   strong intensities of x; with probability ρ a box of another crop pasted in, q and b with it     (CutMix)
    p_F     the decoder's answer to the encoder's maps of x, half of the channels of each dropped and the rest doubled
    L       = ½ CE_b(p_F, q) + ¼ CE_b(p(x_1), q_1) + ¼ CE_b(p(x_2), q_2)
    CE_b    the mean over the pixels of slices of b · cross-entropy

The weak view is that of all hooks: the labelled crops' chain of intensities. Weak and strong share their geometry, as in the
paper.

Differences from the paper: its strong intensities are colour jitter (brightness and contrast by ± 0.5 in four of five images)
and blur, with colour and greyscale besides; ours scale and shift by ± 0.5 and ± 0.25 and blur, of half the images, by up to 2
pixels. The perturbed features take an encoder pass of their own. Its total is (L_s + L) / 2, which at weight 1 is the same
proportion. τ = 0.95 and ρ = 0.5 are the paper's. There is no teacher. Transfers: nothing of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from medssl.methods import agreement, augment, settings
from medssl.methods.augment import Pair
from medssl.methods.blend import another
from medssl.methods.hooks.cutmix import half_boxes
from medssl.methods.protocol import Loss, Step
from medssl.methods.ramps import weight
from medssl.methods.segment import Drawn, Hook, Pass

DROPPED = 0.5  # of the channels of perturbed features


@dataclass(frozen=True, kw_only=True)
class Config(settings.Hook):
    threshold: float = 0.95  # τ
    strong: float = 0.5  # intensities: × (1 ± this), and ± half of it
    strong_p: float = 0.8
    blur: float = 2.0  # pixels, the largest deviation
    blur_p: float = 0.5
    paste_p: float = 0.5  # ρ
    features: float = 0.5  # of the term with dropped features; the strong views share the rest

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("threshold", "strong_p", "blur_p", "paste_p", "features"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 0 to 1")
        if self.strong < 0 or self.blur < 0.1:
            raise ValueError(f"strong is {self.strong} and blur {self.blur}: expected at least 0, and at least 0.1")


class UniMatch(nn.Module):
    predictor = None

    def __init__(self, network: nn.Module, config: Config):
        super().__init__()
        self.config = config
        encoder: Any = network.encoder
        self.channels = cast("tuple[int, ...]", encoder.channels)
        c = config
        self.chain = settings.Chain(
            intensity_scale=c.strong, intensity_scale_p=c.strong_p, intensity_shift=c.strong / 2, intensity_shift_p=c.strong_p,
            blur_sigma=(0.1, c.blur), blur_p=c.blur_p, noise_p=0.0,
        )  # fmt: skip

    def draw(self, pair: Pair, rng: Generator) -> Drawn:
        """Two strong views (2, m, c, s, s), their boxes and partners, and the features' channels that stay."""
        count = len(pair.image)
        drawn = {}
        for view in "12":
            pasted = torch.rand((count, *[1] * (pair.inside.dim() - 1)), generator=rng, device=rng.device) < self.config.paste_p
            drawn[f"strong{view}"] = augment.intensity(pair.image, self.chain, rng)
            drawn[f"box{view}"] = half_boxes(pair.inside.shape, rng) & pasted
            drawn[f"partner{view}"] = another(count, rng)
        kept = torch.rand((count, sum(self.channels)), generator=rng, device=rng.device) >= DROPPED
        return drawn | {"kept": kept}

    def terms(self, pass_: Pass, drawn: Drawn, step: Step) -> Loss:
        pair, p = pass_.pair, pass_.image.detach().float().softmax(1)
        target, sure = agreement.hardened(p), p.amax(1) >= self.config.threshold
        factor = weight(self.config, step)
        with self._perturbed(pass_.network, drawn["kept"]):
            perturbed = pass_.of(pair.image)
        terms = {"features": factor * self.config.features * taught(perturbed, target, sure, pair.inside)}
        for view in "12":
            box, partner = drawn[f"box{view}"], drawn[f"partner{view}"]

            def mixed(maps: Tensor, box: Tensor = box, partner: Tensor = partner) -> Tensor:
                return torch.where(box if maps.dim() == box.dim() else box[:, None], maps[partner], maps)

            loss = taught(pass_.of(mixed(drawn[f"strong{view}"])), mixed(target), mixed(sure), mixed(pair.inside))
            terms[f"strong{view}"] = factor * (1 - self.config.features) / 2 * loss
        return Loss(terms, {"confident": agreement.average(sure.float(), pair.inside)})

    def after_step(self, network: nn.Module, step: Step) -> None:
        pass

    @contextmanager
    def _perturbed(self, network: nn.Module, kept: Tensor) -> Iterator[None]:
        """While it lasts, channels of the encoder's maps are dropped as in `nn.Dropout2d`."""

        def drop(encoder: nn.Module, inputs: Any, maps: list[Tensor]) -> list[Tensor]:
            each = zip(maps, (kept / (1 - DROPPED)).split(self.channels, 1), strict=True)
            return [x * factor.to(x.dtype).view(*factor.shape, *[1] * (x.dim() - 2)) for x, factor in each]

        encoder: Any = network.encoder
        handle = encoder.register_forward_hook(drop)
        try:
            yield
        finally:
            handle.remove()


def taught(logits: Tensor, target: Tensor, sure: Tensor, valid: Tensor) -> Tensor:
    """CE_b, ()."""
    return agreement.average(agreement.divergence(target, logits.float().log_softmax(1)) * sure, valid)


HOOK: type[Hook] = UniMatch
