"""The terms of hooks without a teacher, against the same by other means."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.methods import augment, settings
from medssl.methods.hooks import consistency, cross_pseudo_supervision, entropy_minimisation, pseudo_label
from medssl.methods.networks.unet import Config as UNetConfig
from medssl.methods.networks.unet import UNet
from medssl.methods.protocol import Step, Views
from medssl.methods.segment import Config, Pass, supervised

STEP = Step(0, 10)


def passed(network: nn.Module) -> Pass:
    """Three crops, one half outside its slice, moved without a zoom."""
    rng = torch.Generator().manual_seed(0)
    image, size = torch.rand(3, 1, 8, 8, generator=rng), torch.tensor([[8, 8], [8, 4], [8, 8]])
    chain = settings.Chain(zoom_p=0.0)
    pair = augment.unlabelled_pair(image, size, torch.zeros_like(size), 8, chain, chain, rng)
    labels = torch.randint(0, 3, (3, 8, 8), generator=rng)
    return Pass(network, Config(), Views([image], labels=labels), pair)


def network() -> UNet:
    torch.manual_seed(0)
    return UNet(1, 3, UNetConfig(width=4, levels=2))


def over(values: Tensor, where: Tensor) -> Tensor:
    return values[where].mean()


@pytest.mark.parametrize("distance", ["mse", "kl"])
def test_consistency_pulls_the_moved_view_to_the_moved_prediction(distance):
    net = network()
    pass_ = passed(net)
    hook = consistency.Consistency(net, consistency.Config(weight=1.0, distance=distance))
    term = hook.terms(pass_, {}, STEP).terms[distance]
    pair = pass_.pair
    q, log_p = pass_.move(net(pair.image).softmax(1)), net(pair.moved).log_softmax(1)
    if distance == "mse":
        expected = over((q - log_p.exp()).square().mean(1), pair.valid)
    else:
        expected = over(F.kl_div(log_p, q, reduction="none").sum(1), pair.valid)
    torch.testing.assert_close(term, expected)
    (toward,) = torch.autograd.grad(term, [pass_.image], allow_unused=True)
    assert toward is None  # the target is held


def test_entropy_is_that_of_the_categorical_distribution():
    net = network()
    pass_ = passed(net)
    term = entropy_minimisation.EntropyMinimisation(net, entropy_minimisation.Config(weight=1.0)).terms(pass_, {}, STEP)
    expected = torch.distributions.Categorical(logits=net(pass_.pair.image).movedim(1, -1)).entropy()
    torch.testing.assert_close(term.terms["entropy"], over(expected, pass_.pair.inside))


@pytest.mark.parametrize("view", ["same", "moved"])
@pytest.mark.parametrize("distance", ["cross_entropy", "mse"])
@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_pseudo_labels_are_confident_predictions(view, distance, threshold):
    net = network()
    pass_ = passed(net)
    config = pseudo_label.Config(weight=1.0, ramp="constant", distance=distance, threshold=threshold, view=view)
    loss = pseudo_label.PseudoLabel(net, config).terms(pass_, {}, STEP)
    confidence, labels = net(pass_.pair.image).softmax(1).max(1)
    sure, valid, logits = confidence >= threshold, pass_.pair.inside, net(pass_.pair.image)
    if view == "moved":
        labels, sure = (pass_.move(x[:, None].float())[:, 0].round().long() for x in (labels, sure))
        valid, logits = pass_.pair.valid, net(pass_.pair.moved)
    if distance == "cross_entropy":
        each = F.cross_entropy(logits, labels, reduction="none")
    else:
        each = (F.one_hot(labels, 3).movedim(-1, 1) - logits.softmax(1)).square().mean(1)
    torch.testing.assert_close(loss.terms[distance], over(each * sure, valid))
    torch.testing.assert_close(loss.monitors["confident"], over(sure.float(), valid))
    assert threshold == 0 or 0 < float(loss.monitors["confident"]) < 1


def test_two_networks_teach_each_other_and_each_has_its_own_supervision():
    net = network()
    pass_ = passed(net)
    hook = cross_pseudo_supervision.CrossPseudoSupervision(net, cross_pseudo_supervision.Config(weight=1.0))
    loss = hook.terms(pass_, {}, STEP)
    mine, theirs = net(pass_.pair.image), hook.peer(pass_.pair.image)
    pairs = ((mine, theirs), (theirs, mine))
    crossed = sum(F.cross_entropy(learns, teaches.argmax(1), reduction="none") for learns, teaches in pairs)
    torch.testing.assert_close(loss.terms["cross"], over(crossed, pass_.pair.inside))
    own = supervised(hook.peer(pass_.views.images[0]), pass_.views.labels, Config())
    assert loss.terms.keys() == {"cross", *own}
    assert all(torch.equal(loss.terms[key], value) for key, value in own.items())


def test_the_peer_has_the_encoder_of_the_network_and_a_decoder_and_head_of_its_own():
    net = network()
    state = torch.get_rng_state()
    peers = [cross_pseudo_supervision.renewed(net) for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    same = {key: torch.equal(value, net.state_dict()[key]) for key, value in peers[0].state_dict().items()}
    assert all(equal for key, equal in same.items() if key.startswith("encoder"))
    assert not any(equal for key, equal in same.items() if key.startswith(("decoder.ups", "head")))
    assert all(torch.equal(a, b) for a, b in zip(*(peer.parameters() for peer in peers), strict=True))
