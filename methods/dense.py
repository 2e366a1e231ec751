"""Pretraining of encoder and decoder together: a term of unlabelled crops (`hooks/`), with no supervised term beside it.

    x, T x   a crop, and the same crop moved by a geometry T, each with intensities of its own      (n, c, s, s)
    L        the hook's, of the network's maps of x and of T x

The last convolution, which makes logits, takes no part and stays as it came. With `freeze_encoder` the encoder's weights stay,
too (its batch norms go on normalising by the batch). The methods that are built so differ in the hook: `dense_infonce`,
`dense_iic`, `imsat`, `boundary_aware`. They hand on the encoder, the whole decoder and what lies between the two; heads of the
hook are dropped.
"""

from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from medssl.methods import augment, pairs, settings
from medssl.methods.clusters import pooled
from medssl.methods.optimizers import decay_groups
from medssl.methods.protocol import Batch, Loss, Step, Views
from medssl.methods.segment import Config, Hook, Pass, anywhere
from medssl.methods.taps import Taps


class Dense(nn.Module):
    """Trains the encoder and the decoder of `network` by `hook` alone."""

    def __init__(self, network: nn.Module, hook: Hook, config: settings.Dense):
        super().__init__()
        self.config = config
        self.network = network
        cast(nn.Module, network.head).requires_grad_(False)
        if config.freeze_encoder:
            cast(nn.Module, network.encoder).requires_grad_(False)
        self.hook = hook
        self.taps = Taps(network, ["decoder"])

    def augment(self, batch: Batch, rng: Generator) -> Views:
        """A crop of every slice, anywhere in it, and the crop moved; what the hook draws besides is `drawn["hook"]`."""
        side = self.config.side
        if side is None:
            name = type(self).__module__.rpartition(".")[2]
            raise ValueError(f"{name}: the side of a view is not known; set the section's side to a number of pixels")
        corner = anywhere(batch["size"], side, rng)
        pair = augment.unlabelled_pair(batch["image"], batch["size"], corner, side, self.config, self.config, rng)
        boxes = [corner] * 2, [torch.full_like(corner, side)] * 2
        return Views([pair.image, pair.moved], *boxes, unlabelled=pair, drawn={"hook": dict(self.hook.draw(pair, rng))})

    def loss(self, views: Views, step: Step) -> Loss:
        pass_ = Pass(self.network, Config(), views, views.unlabelled)
        loss = self.hook.terms(pass_, views.drawn["hook"], step)
        features = pooled(self.taps.taken(pass_.image)["decoder"])
        return Loss(loss.terms, loss.monitors | pairs.feature_health(features, step))

    def after_step(self, step: Step) -> None:
        self.hook.after_step(self.network, step)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return decay_groups(self, weight_decay)  # of what asks for a gradient

    def transferable_state(self) -> dict[str, Tensor]:
        """All that the network has but its last convolution, by their names in it."""
        return {key: value for key, value in self.network.state_dict().items() if not key.startswith("head.")}
