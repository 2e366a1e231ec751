"""The network has the weights, maps and convolutions that were counted in the source."""

import pytest
import torch
from torch import nn

from medssl.methods.local_contrast import Config as Settings
from medssl.methods.local_contrast import LocalContrast
from medssl.methods.networks.unet_chaitanya import Config, UNet
from medssl.methods.protocol import Step


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize(("classes", "head"), [(4, 5_280), (3, 5_136), (8, 5_856)])
def test_weights_are_as_many_as_in_the_source(classes, head):
    network = UNet(1, classes)
    assert count(network.encoder) == 885_552
    assert count(network.decoder) == 1_204_928
    assert count(network.head) == head
    blocks = [count(network.decoder.ups[:n], network.decoder.blocks[:n]) for n in range(1, 6)]
    assert blocks == [509_056, 1_018_112, 1_162_048, 1_198_176, 1_204_928]


@pytest.mark.parametrize(("side", "coarsest"), [(192, 6), (160, 5)])
def test_maps_are_as_large_as_in_the_source(side, coarsest):
    network = UNet(1, 4).eval()
    with torch.no_grad():
        maps = network.encoder(torch.rand(1, 1, side, side))
        assert (maps[-1].shape[1:], network.encoder.channels) == ((128, coarsest, coarsest), (16, 32, 64, 128, 128, 128))
        decoded = [network.decoder(maps, blocks).shape[1:] for blocks in range(1, 6)]
    sides = [coarsest * 2**block for block in range(1, 6)]
    assert decoded == [(c, s, s) for c, s in zip((128, 128, 64, 32, 16), sides, strict=True)]


def test_an_up_convolution_looks_below_and_to_the_right():
    up = UNet(1, 2, Config(width=2, levels=2)).decoder.ups[0][:3]
    x = torch.zeros(1, 4, 3, 3)
    x[0, :, 1, 1] = 1  # pixels 2 and 3 once up-sampled
    touched = (up(x) - up(torch.zeros_like(x))).abs().sum((0, 1)) > 1e-7
    places = touched.nonzero()
    assert (places.amin(0).tolist(), places.amax(0).tolist()) == ([1, 1], [3, 3])


def test_layers_of_one_shape_begin_different():
    first, second = (block[3].weight for block in (UNet(1, 2).encoder.blocks[4], UNet(1, 2).encoder.blocks[5]))
    assert first.shape == second.shape
    assert not torch.equal(first, second)
    assert first.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("blocks", [1, 3, 5])
def test_local_contrast_trains_exactly_the_blocks_that_were_asked_for(blocks):
    torch.manual_seed(0)
    network = UNet(1, 3, Config(width=4))
    subject = LocalContrast(network, Settings(side=64, blocks=blocks, region=1, regions=4, negatives=2))
    rng = torch.Generator().manual_seed(0)
    batch = {"image": torch.rand(3, 1, 64, 64, generator=rng), "size": torch.full((3, 2), 64)}
    views = subject.augment(batch | {"position": torch.rand(3), "volume": torch.arange(3)}, rng)
    subject.loss(views, Step(0, 10)).total.backward()
    reached = {".".join(name.split(".")[:3]) for name, p in network.named_parameters() if p.grad is not None}
    assert reached == {f"decoder.{kind}.{block}" for kind in ("ups", "blocks") for block in range(blocks)}
    sent = {".".join(name.split(".")[:3]) for name in subject.transferable_state() if name.startswith("decoder.")}
    assert sent == reached
