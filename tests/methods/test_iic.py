"""IIC as a pretraining; known values of its loss are those of hooks/test_known_contrastyou.py."""

import math

import pytest
import torch
from torch import nn

from medssl.methods.iic import IIC, Config
from medssl.methods.networks.unet import Config as UNetConfig
from medssl.methods.networks.unet import Encoder
from medssl.methods.protocol import Step, Views


class Told(nn.Module):
    """An encoder that answers with what it is shown."""

    channels = (4,)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_views_that_agree_on_equal_clusters_have_the_least_loss_and_all_in_one_cluster_none(alpha):
    subject = IIC(Told(), Config(side=8, clusters=4, heads=2, alpha=alpha))
    for head in subject.head.heads:
        head[0].weight.data.copy_(50 * torch.eye(4))
        head[0].bias.data.zero_()
    apart = torch.eye(4).repeat(3, 1)[..., None, None]
    loss = subject.loss(Views([apart, apart]), Step(0, 10))
    assert float(loss.terms["information"].detach()) == pytest.approx(-math.log(4), abs=1e-3)
    assert float(loss.monitors["clusters"]) == pytest.approx(4, abs=1e-3)
    one = torch.eye(4)[:1].repeat(12, 1)[..., None, None]
    collapsed = subject.loss(Views([one, one]), Step(0, 10))
    assert float(collapsed.terms["information"].detach()) > -1e-2
    assert float(collapsed.monitors["clusters"]) == pytest.approx(1, abs=1e-3)


def test_training_on_two_kinds_of_slices_finds_the_kinds():
    torch.manual_seed(0)
    subject = IIC(Encoder(1, UNetConfig(width=4, levels=2, norm="batch")), Config(side=8, clusters=2, heads=1))
    kinds = torch.stack([torch.zeros(8, 8), torch.eye(8)]).repeat(8, 1, 1)[:, None]
    optimizer = torch.optim.Adam(subject.parameters(), lr=1e-2)
    for index in range(40):
        views = Views([kinds + 0.1 * torch.randn_like(kinds) for _ in range(2)])
        loss = subject.loss(views, Step(index, 40))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    assert float(loss.terms["information"].detach()) < -0.9 * math.log(2)
