"""Hooks that blend, paste, perturb, cluster and contrast, against the same said in loops."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.methods import augment, blend, clusters, infonce, settings
from medssl.methods.hooks import adversarial, bcp, boundary_aware, ict, superpixel, unimatch
from medssl.methods.hooks import infonce as infonce_hook
from medssl.methods.hooks import mutual_information as mi
from medssl.methods.networks.unet import Config as UNetConfig
from medssl.methods.networks.unet import UNet
from medssl.methods.protocol import UNLABELLED, Step, Views
from medssl.methods.segment import Config, Pass, supervised, untracked

STEP = Step(0, 10)


def network() -> UNet:
    torch.manual_seed(0)
    net = UNet(1, 3, UNetConfig(width=4, levels=2))
    net.head.weight.data.mul_(10)
    return net


def passed(net: nn.Module, zoom_p: float = 0.0) -> Pass:
    """Four labelled crops and three unlabelled ones, of which one is half outside its slice."""
    rng = torch.Generator().manual_seed(0)
    image, size = torch.rand(3, 1, 8, 8, generator=rng), torch.tensor([[8, 8], [8, 4], [8, 8]])
    chain = settings.Chain(zoom_p=zoom_p)
    pair = augment.unlabelled_pair(image, size, torch.zeros_like(size), 8, chain, chain, rng)
    pair = replace(pair, groups={"position": torch.tensor([0.0, 0.1, 0.9]), "patient": torch.tensor([1, 2, 2])})
    labels = torch.randint(0, 3, (4, 8, 8), generator=rng)
    labels[0, :2] = UNLABELLED
    return Pass(net, Config(), Views([torch.rand(4, 1, 8, 8, generator=rng)], labels=labels), pair)


def asked(hook: Any, pass_: Pass) -> tuple[Any, Any]:
    drawn = hook.draw(pass_.unlabelled, torch.Generator().manual_seed(3))
    return drawn, hook.terms(pass_, drawn, STEP)


def test_interpolated_crops_are_taught_the_interpolated_predictions():
    net = network()
    pass_, hook = passed(net), ict.ICT(net, ict.Config(weight=1.0, ramp="constant"))
    drawn, loss = asked(hook, pass_)
    x, share = pass_.pair.image, float(drawn["share"])
    q, total, count = net(x).softmax(1), 0.0, 0
    for row, other in enumerate(drawn["partner"].tolist()):
        assert other != row
        blend = net((share * x[row] + (1 - share) * x[other])[None]).softmax(1)[0]
        target = share * q[row] + (1 - share) * q[other]
        seen = pass_.pair.inside[row] & pass_.pair.inside[other]
        total, count = total + (blend - target).square().mean(0)[seen].sum(), count + int(seen.sum())
    torch.testing.assert_close(loss.terms["mse"], total / count)


def test_shares_follow_the_beta_distribution():
    rng = torch.Generator().manual_seed(0)
    drawn = torch.stack([blend.beta(0.2, rng) for _ in range(4000)])
    assert abs(float(drawn.mean()) - 0.5) < 0.02
    assert abs(float(drawn.var()) - 1 / (4 * 1.4)) < 0.01  # αβ / ((α+β)²(α+β+1))


def test_pasted_crops_keep_the_labels_of_where_they_come_from():
    net = network()
    pass_ = passed(net)
    hook = bcp.BCP(net, bcp.Config(weight=1.0, ramp="constant"))
    drawn, loss = asked(hook, pass_)
    x, ours, y = pass_.pair.image, pass_.views.images[0], pass_.views.labels
    taught = net(x).argmax(1).where(pass_.pair.inside, UNLABELLED)
    order = blend.rotation(4, drawn["turn"])[:3]
    images, labelled, unlabelled = [], [], []
    for number, box in enumerate(drawn["box"]):
        row, inner = number % 3, number < 3  # first with the unlabelled crop in the middle, then the labelled one
        from_ours = ~box if inner else box
        images.append(torch.where(from_ours, ours[order[row]], x[row]))
        labelled.append(y[order[row]].where(from_ours, UNLABELLED))
        unlabelled.append(taught[row].where(~from_ours, UNLABELLED))
    logits = net(torch.stack(images))
    for kind, labels, share in (("labelled", labelled, 1.0), ("unlabelled", unlabelled, 0.5)):
        for name, value in supervised(logits, torch.stack(labels), Config()).items():
            torch.testing.assert_close(loss.terms[f"{kind}/{name}"], 2 * share * value)


def test_nobody_is_its_own_partner_and_all_others_come_to_be_it():
    rng = torch.Generator().manual_seed(0)
    partners = torch.stack([blend.another(4, rng) for _ in range(60)])
    assert {tuple(row) for row in partners.tolist()} == {(1, 2, 3, 0), (2, 3, 0, 1), (3, 0, 1, 2)}
    assert blend.another(1, rng).tolist() == [0]


def test_pasted_boxes_have_the_side_that_was_asked_for_and_lie_anywhere():
    boxes = bcp.boxes(torch.Size((500, 12, 12)), 2 / 3, torch.Generator().manual_seed(0))
    assert (boxes.flatten(1).sum(1) == 64).all()
    assert boxes[:, 0].any()
    assert boxes[:, -1].any()


def test_strong_views_and_perturbed_features_are_taught_the_weak_views_confident_classes():
    net = network()
    pass_, hook = passed(net), unimatch.UniMatch(net, unimatch.Config(weight=1.0, threshold=0.5))
    drawn, loss = asked(hook, pass_)
    confidence, classes = net(pass_.pair.image).softmax(1).max(1)
    sure, inside = confidence >= 0.5, pass_.pair.inside

    def taught(logits: Tensor, classes: Tensor, sure: Tensor, inside: Tensor) -> Tensor:
        return (F.cross_entropy(logits, classes, reduction="none") * sure)[inside].mean()

    maps = net.encoder(pass_.pair.image)
    kept = drawn["kept"].split([4, 8], 1)
    perturbed = net.head(net.decoder([x * 2 * keep[..., None, None] for x, keep in zip(maps, kept, strict=True)]))
    torch.testing.assert_close(loss.terms["features"], taught(perturbed, classes, sure, inside) / 2)
    for view in "12":
        rows = []
        for row, other in enumerate(drawn[f"partner{view}"].tolist()):
            box, strong = drawn[f"box{view}"][row], drawn[f"strong{view}"]
            pairs = ((strong, strong), (classes, classes), (sure, sure), (inside, inside))
            rows.append([torch.where(box, theirs[other], ours[row]) for ours, theirs in pairs])
        image, label, certain, shown = (torch.stack(column) for column in zip(*rows, strict=True))
        torch.testing.assert_close(loss.terms[f"strong{view}"], taught(net(image), label, certain, shown) / 4)
    assert 0 < float(loss.monitors["confident"]) < 1


def test_the_adversarial_change_hurts_more_than_a_random_one_of_its_size():
    net = network()
    pass_ = passed(net)
    hook = adversarial.Adversarial(net, adversarial.Config(weight=1.0, iterations=3))
    drawn, loss = asked(hook, pass_)
    p = net(pass_.pair.image).log_softmax(1)

    def hurt(direction: Tensor) -> Tensor:
        other = net(pass_.pair.image + 0.045 * adversarial.unit(direction)).log_softmax(1)
        return F.kl_div(other, p, log_target=True, reduction="none").sum(1)[pass_.pair.inside].mean()

    assert loss.terms["divergence"].detach() > 1.5 * hurt(drawn["noise"]).detach()
    assert adversarial.unit(1e-30 * drawn["noise"]).square().mean(dim=(1, 2, 3)).tolist() == pytest.approx([1, 1, 1])


def test_local_information_is_that_of_pairs_of_cells_counted_one_by_one():
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.rand(2, 3, 2, 4, 5, generator=rng, dtype=torch.float64).softmax(2) for _ in range(2))
    losses = torch.zeros(2, dtype=torch.float64)
    for u, v in itertools.product((-1, 0, 1), repeat=2):
        counts = torch.zeros(2, 2, 2, dtype=torch.float64)
        for s, n, r, c in itertools.product(range(2), range(3), range(4), range(5)):
            if 0 <= r + u < 4 and 0 <= c + v < 5:
                counts[s] += torch.outer(x[s, n, :, r + u, c + v], y[s, n, :, r, c])
        p = counts / counts.sum((1, 2), keepdim=True)
        p = (p + p.mT) / 2
        losses -= (p * (p / (p.sum(1, keepdim=True) * p.sum(2, keepdim=True))).log()).sum((1, 2)) / 9
    torch.testing.assert_close(clusters.local_information(x, y, 1), losses)


def test_cells_beyond_the_move_tell_nothing_and_the_output_is_a_held_target():
    net = network()
    pass_ = passed(net, zoom_p=1.0)
    assert not pass_.pair.valid.all()
    hook = mi.MutualInformation(net, mi.Config(weight=1.0, layers=("output",), shares=(1.0,), reach=(0,)))
    _, loss = asked(hook, pass_)
    q, p = pass_.move(net(pass_.pair.image).softmax(1)), net(pass_.pair.moved).softmax(1)
    valid = pass_.pair.valid
    pairs = torch.einsum("ik,il->kl", q.movedim(1, -1)[valid], p.movedim(1, -1)[valid])
    joint = (pairs + pairs.T) / (2 * pairs.sum())
    expected = -(joint * (joint / (joint.sum(0) * joint.sum(1)[:, None])).log()).sum()
    torch.testing.assert_close(loss.terms["output"], expected)
    assert torch.autograd.grad(loss.terms["output"], [pass_.image], allow_unused=True) == (None,)


def test_like_meta_labels_attract_and_places_answer_across_the_move():
    net = network()
    pass_ = passed(net)
    config = infonce_hook.Config(labels=("partition", "patient", "place"), grid=4, places=3, hidden=8, d=4)
    hook = infonce_hook.InfoNCE(net, config)
    drawn, loss = asked(hook, pass_)
    maps = [net.encoder(x)[-1] for x in (pass_.pair.image, pass_.pair.moved)]
    z = torch.cat([F.normalize(hook.head(x.mean((2, 3))), dim=1) for x in maps])
    for kind, label in (("partition", [0, 0, 2]), ("patient", [1, 2, 2])):
        torch.testing.assert_close(loss.terms[kind], by_loops(z, label * 2))
    cells = [F.adaptive_avg_pool2d(x, 4).flatten(2) for x in (pass_.move(maps[0]), maps[1])]
    shown = F.adaptive_avg_pool2d(clusters.within(pass_.pair.valid, maps[0].shape[2:])[:, None].float(), 4).flatten(1) == 1
    places = drawn["order"].argsort(1)[:, :3]
    rows = [(n, int(place)) for n in range(3) for place in places[n] if shown[n, place]]
    assert 0 < len(rows) < 9
    z = torch.cat([F.normalize(hook.head(torch.stack([x[n, :, at] for n, at in rows])), dim=1) for x in cells])
    torch.testing.assert_close(loss.terms["place"], by_loops(z, list(range(len(rows))) * 2))


def by_loops(z: Tensor, label: list[int]) -> Tensor:
    each = []
    for i in range(len(z)):
        s = z[i] @ z.T / 0.07
        everything = torch.logsumexp(torch.stack([s[a] for a in range(len(z)) if a != i]), 0)
        each.append(torch.stack([everything - s[j] for j in range(len(z)) if j != i and label[j] == label[i]]).mean())
    return torch.stack(each).mean()


def test_a_meta_label_that_the_batch_does_not_tell_is_refused():
    with pytest.raises(ValueError, match='"cycle" needs each slice\'s phase'):
        infonce.meta_label("cycle", {"position": torch.zeros(2)}, 2)
    with pytest.raises(ValueError, match='"thirds" counts the slices'):
        infonce.meta_label("partition", {"position": torch.zeros(2)}, 2, 3, "thirds")


def test_superpixels_follow_the_blobs_of_an_image():
    image = torch.zeros(2, 1, 16, 16)
    image[0, 0, :, 8:] = 1.0
    image[1, 0, 5:, :] = 1.0
    ids = superpixel.superpixels(image, 16, 0.0, 0.1, 10)
    for picture, blocks in zip(image[:, 0], ids, strict=True):
        for number in blocks.unique():
            assert len(picture[blocks == number].unique()) == 1, "no superpixel crosses an edge"
    assert all(8 <= len(blocks.unique()) <= 16 for blocks in ids)
    flat = superpixel.superpixels(torch.zeros(1, 1, 16, 16), 16, 0.0, 0.1, 10)[0]
    assert all((flat == number).sum() == 16 for number in flat.unique()), "without contrast they are the squares of the grid"


def test_edges_are_none_at_the_border_and_flat_windows_and_what_is_beyond_count_nowhere():
    image = torch.zeros(1, 1, 12, 12)
    image[..., 6:] = 1.0
    assert not boundary_aware.edges(image, 1.0)[..., 0].any()
    assert boundary_aware.edges(image, 1.0, border="circular")[..., 0].all()
    q = torch.full((1, 1, 2, 12, 12), 0.5)
    q[:, :, 0, :, 8:], q[:, :, 1, :, 8:] = 0.9, 0.1
    q[:, :, 0, :, :4], q[:, :, 1, :, :4] = 0.9, 0.1
    everywhere = torch.ones(1, 12, 12, dtype=torch.bool)
    whole = boundary_aware.boundary(image, q, everywhere, 3, 1.0)
    image[..., -1], beyond = 5.0, everywhere.clone()
    beyond[..., -1] = False
    assert -1 <= float(whole) < 0
    edge = boundary_aware.edges(torch.where(beyond[:, None], image, 0.0), 1.0, valid=beyond[:, None])
    assert not edge[..., -1].any()


def test_batch_norms_forget_what_they_see_untracked():
    norm = nn.BatchNorm2d(2)
    before = {key: value.clone() for key, value in norm.state_dict().items() if key.startswith("running")}
    with untracked(norm):
        out = norm(torch.randn(4, 2, 3, 3) + 5)
    assert abs(float(out.detach().mean())) < 1e-5, "normalised by the batch"
    assert all(torch.equal(norm.state_dict()[key], value) for key, value in before.items())
    norm(torch.randn(4, 2, 3, 3) + 5)
    assert not torch.equal(norm.running_mean, before["running_mean"])
    assert math.isclose(norm.momentum or 0, 0.1)
