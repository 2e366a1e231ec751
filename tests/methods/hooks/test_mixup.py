"""Mixup by its definition: cross-entropy with the mixed label, and the law of its share."""

import pytest
import torch
import torch.nn.functional as F

from medssl.methods.hooks import mixup
from medssl.methods.networks.unet import Config as UNetConfig
from medssl.methods.networks.unet import UNet
from medssl.methods.protocol import Step, Views
from medssl.methods.segment import Config, Segment


def segment(**settings) -> Segment:
    torch.manual_seed(0)
    network = UNet(1, 3, UNetConfig(width=4, levels=2))
    hook = mixup.Mixup(network, mixup.Config(**settings))
    return Segment(network, Config(side=8, dice=0.0), {"mixup": hook})


def test_the_term_is_cross_entropy_with_the_mixed_label():
    subject = segment(weight=0.5)
    rng = torch.Generator().manual_seed(1)
    images, labels = torch.rand(5, 1, 8, 8, generator=rng), torch.randint(0, 3, (5, 8, 8), generator=rng)
    share = torch.tensor(0.3)
    loss = subject.loss(Views([images], labels=labels, drawn={"mixup": {"share": share}}), Step(0, 10))
    partner = [3, 4, 0, 1, 2]
    soft = F.one_hot(labels, 3).movedim(-1, 1).float()
    mixed = 0.3 * soft + 0.7 * soft[partner]
    logits = subject.network(0.3 * images + 0.7 * images[partner])
    expected = -(mixed * logits.log_softmax(1)).sum(1).mean()
    assert loss.terms["mixup/mixed"].item() == pytest.approx(0.5 * expected.item(), rel=1e-5)


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_shares_have_the_mean_and_variance_of_their_beta_law(alpha):
    hook, rng = segment(alpha=alpha).hooks["mixup"], torch.Generator().manual_seed(0)
    shares = torch.stack([hook.draw(None, rng)["share"] for _ in range(4000)])
    assert shares.shape == (4000,)
    assert 0 <= float(shares.min()) <= float(shares.max()) <= 1
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(shares.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), abs=0.012)
