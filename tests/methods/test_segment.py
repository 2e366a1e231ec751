"""The loss is MONAI's DiceCE where everything is labelled, and what nobody labelled has no say."""

import dataclasses
import warnings

import pytest
import torch
from torch import nn

from medssl.methods import augment, settings
from medssl.methods.networks.unet import Config as UNetConfig
from medssl.methods.networks.unet import UNet
from medssl.methods.protocol import UNLABELLED, Loss, Step, Views
from medssl.methods.segment import Config, Pass, Segment, Training, anywhere, cross_entropy, dice_loss, jaccard_loss

STEP = Step(0, 10)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*sides: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (4, 3, *sides) with a gradient, and labels without the class 2 in the first slice."""
    logits = torch.randn(4, 3, *sides, generator=rng()).mul_(3).requires_grad_()
    labels = torch.randint(0, 3, (4, *sides), generator=rng(1))
    labels[0].clamp_(max=1)
    return logits, labels


def segment(hooks=None, **chosen) -> Segment:
    torch.manual_seed(0)
    return Segment(UNet(1, 3, UNetConfig(width=4, levels=2)), Config(**({"side": 8} | chosen)), hooks)


@pytest.mark.parametrize("sides", [(9, 7), (5, 4, 6)])
def test_loss_and_gradient_equal_monais_dice_ce(sides):
    from monai.losses import DiceCELoss

    logits, labels = drawn(*sides)
    ours = dice_loss(logits, labels) + cross_entropy(logits, labels)
    theirs = DiceCELoss(softmax=True, to_onehot_y=True)(logits, labels[:, None])
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))


def test_weighted_terms_are_monais_and_equal_weights_change_no_bit():
    from monai.losses import DiceCELoss

    views = Views([torch.rand(2, 1, 8, 8, generator=rng())], labels=torch.randint(0, 3, (2, 8, 8), generator=rng(1)))
    logits, labels = segment().network(views.images[0]), views.labels
    weighted = segment(dice=0.3, cross_entropy=2.0).loss(views, STEP).total
    theirs = DiceCELoss(softmax=True, to_onehot_y=True, lambda_dice=0.3, lambda_ce=2.0)(logits, labels[:, None])
    torch.testing.assert_close(weighted, theirs)

    subject = segment()
    subject.loss(views, STEP).total.backward()
    plain = [p.grad.clone() for p in subject.parameters()]
    subject.zero_grad()
    logits = subject.network(views.images[0])
    torch.stack([dice_loss(logits, labels), cross_entropy(logits, labels)]).sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, subject.parameters(), strict=True))


@pytest.mark.parametrize("weights", [{"dice": -1.0}, {"dice": 0.0, "cross_entropy": 0.0}])
def test_weights_that_weigh_nothing_are_refused(weights):
    with pytest.raises(ValueError, match="at least 0, not both 0"):
        Config(**weights)


@pytest.mark.parametrize("sides", [(9, 7), (5, 4, 6)])
def test_dice_over_the_batch_equals_monais(sides):
    from monai.losses import DiceLoss

    logits, labels = drawn(*sides)
    ours = dice_loss(logits, labels, "batch")
    theirs = DiceLoss(softmax=True, to_onehot_y=True, batch=True)(logits, labels[:, None])
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))


def test_dice_over_the_batch_asks_only_for_classes_that_it_holds():
    logits, labels = drawn(9, 7)
    labels.clamp_(max=1)
    wide = torch.cat([logits, torch.full_like(logits[:, :1], -1e9)], 1)  # a fourth class that nobody has or predicts
    torch.testing.assert_close(dice_loss(wide, labels, "batch"), dice_loss(logits, labels, "batch"))


def loop_jaccard(logits, labels):
    """Class by class and pixel by pixel."""
    p, classes = logits.detach().double().softmax(1), logits.shape[1]
    total = 0.0
    for k in range(classes):
        shared = union = present = 0.0
        for place in (labels != UNLABELLED).nonzero():
            slice_, *pixel = place.tolist()
            chance, is_k = float(p[(slice_, k, *pixel)]), float(labels[(slice_, *pixel)] == k)
            shared, union, present = shared + chance * is_k, union + chance + is_k - chance * is_k, present + is_k
        total += 1 - shared / union if present else 0.0
    return total / classes


@pytest.mark.parametrize("sides", [(9, 7), (3, 4, 5)])
def test_jaccard_equals_a_loop_over_classes_and_pixels(sides):
    logits, labels = drawn(*sides)
    labels[1, :2] = UNLABELLED
    assert jaccard_loss(logits, labels).item() == pytest.approx(loop_jaccard(logits, labels), abs=1e-6)
    labels[labels == 2] = 1  # now a class that nobody has: it counts 0 among three
    assert jaccard_loss(logits, labels).item() == pytest.approx(loop_jaccard(logits, labels), abs=1e-6)


def test_jaccard_of_hand_drawn_masks():
    """As Dice below: class 0 shares 1 of 2 pixels, class 1 shares 2 of 3; a third that is only predicted counts 0."""
    labels = torch.tensor([[[0, 0, 1, 1]]])
    logits = 100.0 * nn.functional.one_hot(torch.tensor([[[0, 1, 1, 1]]]), 3).movedim(-1, 1)
    assert float(jaccard_loss(logits, labels)) == pytest.approx((1 / 2 + 1 / 3 + 0) / 3, abs=1e-6)
    logits = 100.0 * nn.functional.one_hot(torch.tensor([[[0, 2, 1, 1]]]), 3).movedim(-1, 1)
    assert float(jaccard_loss(logits, labels)) == pytest.approx((1 / 2 + 0 + 0) / 3, abs=1e-6)


def test_with_jaccard_for_overlap_and_no_cross_entropy_the_loss_is_jaccards():
    views = Views([torch.rand(2, 1, 8, 8, generator=rng())], labels=torch.randint(0, 3, (2, 8, 8), generator=rng(1)))
    subject = segment(overlap="jaccard", dice_over="batch", cross_entropy=0.0)
    found = subject.loss(views, STEP)
    assert set(found.terms) == {"jaccard", "cross_entropy"}
    torch.testing.assert_close(found.total, jaccard_loss(subject.network(views.images[0]), views.labels))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlap": "jaccard"}, "set dice_over to batch"),
        ({"crop": "resized"}, "set balanced to false"),
        ({"scale": (0.5, 0.1)}, "each low first"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def over_the_batch(logits, labels):
    return dice_loss(logits, labels, "batch")


def test_dice_of_hand_drawn_masks():
    """Three of four pixels right with certainty: class 0 overlaps 1 of (2 + 1), class 1 overlaps 2 of (2 + 3)."""
    labels = torch.tensor([[[0, 0, 1, 1]]])
    prediction = torch.tensor([[[0, 1, 1, 1]]])
    logits = 100.0 * nn.functional.one_hot(prediction, 2).movedim(-1, 1)
    expected = ((1 - 2 * 1 / 3) + (1 - 2 * 2 / 5)) / 2
    assert float(dice_loss(logits, labels)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("term", [dice_loss, jaccard_loss, over_the_batch, cross_entropy])
def test_unlabelled_pixels_have_no_say_and_no_gradient(term):
    logits, labels = drawn(9, 7)
    labels[1, :4] = labels[2] = UNLABELLED
    (gradient,) = torch.autograd.grad(term(logits, labels), logits)
    unknown = (labels == UNLABELLED)[:, None].expand_as(gradient)
    assert not gradient[unknown].any()
    assert gradient[~unknown].all()
    changed = torch.where(unknown, torch.randn_like(logits), logits)
    torch.testing.assert_close(term(changed, labels), term(logits, labels), rtol=0, atol=0)


@pytest.mark.parametrize("term", [dice_loss, jaccard_loss, over_the_batch, cross_entropy])
def test_a_loss_over_partly_labelled_slices_is_that_of_their_labelled_part(term):
    logits, labels = drawn(8, 6)
    part = term(logits[..., :3], labels[..., :3])
    labels[..., 3:] = UNLABELLED
    torch.testing.assert_close(term(logits, labels), part)


def test_a_batch_without_labels_has_loss_zero_and_gradients_of_zero():
    method = segment()
    views = Views([torch.randn(2, 1, 8, 8)], labels=torch.full((2, 8, 8), UNLABELLED))
    loss = method.loss(views, STEP)
    loss.total.backward()
    assert loss.total.detach() == 0
    assert float(loss.monitors["labelled"]) == 0
    assert all(p.grad is not None and not p.grad.any() for p in method.parameters())


def batch(n: int = 3) -> dict[str, torch.Tensor]:
    """Slices whose pixels tell their place, labelled by that value, the last row and column being padding."""
    image = torch.arange(20 * 15, dtype=torch.float32).reshape(1, 1, 20, 15).repeat(n, 1, 1, 1)
    label = (image[:, 0].long() % 3).to(torch.uint8)
    label[:, 19], label[:, :, 14] = UNLABELLED, UNLABELLED
    return {"image": image, "label": label, "size": torch.tensor([[19, 14]]).repeat(n, 1)}


@pytest.mark.parametrize("balanced", [True, False])
def test_labels_move_with_their_image(balanced):
    """With a chain that moves pixels and changes none, label = pixel mod 3 holds everywhere in every view."""
    still = {"intensity_scale_p": 0.0, "intensity_shift_p": 0.0, "blur_p": 0.0, "noise_p": 0.0, "flip_p": 0.5, "rot90_p": 0.5}
    views = segment(crops=4, balanced=balanced, **still).augment(batch(), rng())
    assert views.images[0].shape == (12, 1, 8, 8)
    assert views.labels.dtype == torch.int64
    torch.testing.assert_close(views.images[0][:, 0].long() % 3, views.labels)
    assert len(views.corners[0].unique(dim=0)) > 1


def test_labels_move_with_a_resized_box():
    """A label is that of the pixel under the middle of the view's pixel: found again by inverting box, flip and turn."""
    still = {"intensity_scale_p": 0.0, "intensity_shift_p": 0.0, "blur_p": 0.0, "noise_p": 0.0, "flip_p": 0.0, "rot90_p": 0.0}
    subject = segment(crops=6, balanced=False, crop="resized", scale=(0.1, 0.9), side=7, **still)
    views = subject.augment(batch(), rng())
    assert len(views.extents[0].unique(dim=0)) > 6
    for corner, extent, labels in zip(views.corners[0], views.extents[0], views.labels, strict=True):
        rows, columns = (((torch.arange(7) + 0.5) * e / 7 + c).floor().long() for c, e in zip(corner, extent, strict=True))
        torch.testing.assert_close(labels, batch(1)["label"][0][rows][:, columns].long())
    assert not (views.labels == UNLABELLED).any(), "boxes lie in the slice and not in its padding"


@pytest.mark.parametrize("moves", [{"flip_p": 1.0}, {"rot90_p": 1.0}, {"flip_p": (1.0, 0.0)}])
def test_a_resized_box_and_its_labels_flip_and_turn_alike(moves):
    """An image of two flat halves: away from where they meet, a pixel's label follows from its intensity."""
    image = torch.zeros(4, 1, 24, 24)
    image[:, :, :, 12:] = 1.0
    given = {"image": image, "label": image[:, 0].to(torch.uint8), "size": torch.tensor([[24, 24]] * 4)}
    still = {"intensity_scale_p": 0.0, "intensity_shift_p": 0.0, "blur_p": 0.0, "noise_p": 0.0, "flip_p": 0.0, "rot90_p": 0.0}
    views = segment(crops=4, balanced=False, crop="resized", scale=(0.5, 1.0), side=12, **(still | moves)).augment(given, rng())
    flat = (views.images[0][:, 0] == 0) | (views.images[0][:, 0] == 1)
    assert float(flat.float().mean()) > 0.5
    assert torch.equal(views.images[0][:, 0][flat].long(), views.labels[flat])
    assert views.labels.unique().tolist() == [0, 1]


def test_crops_anywhere_are_uniform_over_the_corners_that_fit():
    corner = anywhere(torch.tensor([[10, 9]]).expand(6000, 2), 8, rng())
    counts = torch.bincount(corner[:, 0] * 2 + corner[:, 1])
    assert len(counts) == 6  # three rows, two columns
    assert ((counts - 1000).abs() < 5 * (1000 * 5 / 6) ** 0.5).all()
    assert not anywhere(torch.tensor([[5, 8]]), 8, rng()).any()


class Pull(nn.Module):
    """A toy hook with state: pulls the logits to a vector that it learns, and counts its steps."""

    predictor = None

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.config, self.centre = settings.Hook(weight=weight), nn.Parameter(torch.zeros(3))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def draw(self, pair, rng):
        return {"shift": torch.rand((), generator=rng)}

    def terms(self, pass_, drawn, step):
        far = pass_.image - self.centre.view(1, -1, 1, 1) - drawn["shift"]
        return Loss({"far": self.config.weight * far.square().mean()}, {"shift": drawn["shift"]})

    def after_step(self, network, step):
        self.steps += 1


def joint_batch(n: int = 2) -> dict[str, torch.Tensor]:
    other = batch(n)
    return batch() | {"unlabelled_image": other["image"], "unlabelled_size": other["size"]}


def test_hooks_add_their_terms_and_monitors_under_their_names_and_their_state_is_saved():
    method = segment(hooks={"pull": Pull()})
    loss = method.loss(method.augment(joint_batch(), rng()), STEP)
    assert loss.terms.keys() == {"dice", "cross_entropy", "pull/far"}
    assert loss.monitors.keys() == {"labelled", "pull/shift"}
    method.after_step(STEP)
    saved = method.state_dict()
    assert {key: int(value) for key, value in saved.items() if key.endswith("steps")} == {"hook_state.pull.steps": 1}
    trained = [id(p) for group in method.parameter_groups(0.0) for p in group["params"]]
    assert id(method.hooks["pull"].centre) in trained


def test_a_hook_without_weight_neither_draws_nor_trains():
    method = segment(hooks={"pull": Pull(weight=0.0)})
    views = method.augment(batch(), rng())
    assert method.loss(views, STEP).terms.keys() == {"dice", "cross_entropy"}
    assert not method.hooks["pull"].centre.requires_grad


def test_the_moved_crop_is_the_crop_moved_and_its_valid_pixels_are_those_that_it_shows():
    """With a chain that changes no intensity, T x = moved; the padding of the slices is valid nowhere."""
    still = dict.fromkeys(("intensity_scale_p", "intensity_shift_p", "blur_p", "noise_p"), 0.0)
    method = segment(hooks={"pull": Pull()}, crops=50, **still)
    method.unlabelled = settings.Unlabelled(zoom_p=1.0, **still)
    pair = method.augment(joint_batch(), rng()).unlabelled
    moved = augment.apply_geometry(pair.image, pair.geometry)
    torch.testing.assert_close(moved, pair.moved)
    shown = augment.apply_geometry(torch.ones_like(pair.image), pair.geometry, mode="nearest")[:, 0] > 0
    assert torch.equal(pair.valid, shown)
    assert not shown.all()

    short = joint_batch() | {"unlabelled_size": torch.tensor([[5, 14], [19, 14]])}
    method.unlabelled = settings.Unlabelled(zoom_p=0.0, flip_p=0.0, rot90_p=0.0, **still)
    pair = method.augment(short, rng()).unlabelled
    assert torch.equal(pair.valid, pair.inside)
    assert not pair.inside[:50, 5:].any()
    assert pair.inside[:50, :5].all()
    assert pair.inside[50:].all()


@pytest.mark.parametrize("dims", [2, 3])
def test_a_pointwise_network_is_equivariant_where_pixels_are_valid(dims):
    """T f(x) = f(T x) for f without a bias: exactly so without a zoom, and for a linear f with one, too."""
    still = dict.fromkeys(("intensity_scale_p", "intensity_shift_p", "blur_p", "noise_p"), 0.0)
    image = torch.rand(40, 1, *(9,) * dims, generator=rng())
    size = torch.full((40, dims), 9)
    chain = settings.Chain(zoom_p=0.5, **still)
    pair = augment.unlabelled_pair(image, size, torch.zeros_like(size), 9, chain, chain, rng())
    convolution = (nn.Conv2d if dims == 2 else nn.Conv3d)(1, 3, 1, bias=True)
    pass_ = Pass(convolution, Config(), Views([image]), pair)
    valid = pair.valid[:, None].expand_as(pass_.moved)
    torch.testing.assert_close(pass_.move(pass_.image)[valid], pass_.moved[valid])
    assert not torch.allclose(pass_.move(pass_.image), pass_.moved)  # what a zero fill would have compared


def test_the_encoder_is_a_group_of_its_own_rate_and_rest_and_no_other_parameter_is():
    method = segment(hooks={"pull": Pull()}, freeze_encoder=0.25, encoder_lr=0.1)
    encoder = set(method.network.encoder.parameters())
    for group in method.parameter_groups(0.1):
        inside = set(group["params"]) <= encoder
        assert inside or not set(group["params"]) & encoder
        assert (group["frozen"], group["lr_scale"]) == ((0.25, 0.1) if inside else (0.0, 1.0))


def test_rest_and_rate_of_the_encoder_are_checked():
    with pytest.raises(ValueError, match=r"freeze_encoder is 1\.5"):
        Config(freeze_encoder=1.5)
    with pytest.raises(ValueError, match="encoder_lr 0: expected"):
        Config(encoder_lr=0)
    with pytest.raises(ValueError, match="need a network with an `encoder`"):
        Segment(nn.Conv2d(1, 3, 1), Config(side=8, freeze_encoder=0.5)).parameter_groups(0.1)


def test_what_fine_tuning_hands_on_is_the_network_without_hooks():
    method = segment(hooks={"pull": Pull()})
    assert method.transferable_state().keys() == method.network.state_dict().keys()


def test_an_unresolved_side_is_refused():
    with pytest.raises(ValueError, match=r"side of a crop is not known; set finetune\.side"):
        segment(side=None).augment(batch(), rng())


def test_defaults_are_the_fine_tuning_of_the_study():
    chosen = dataclasses.asdict(Config())
    milder = {f"{operation}_p": 0.15 for operation in ("blur", "intensity_scale", "intensity_shift", "noise")}
    expected = milder | {"flip_p": 0.25, "rot90_p": 0.25, "zoom_p": 0.0, "crops": 2, "balanced": True}
    assert {key: chosen[key] for key in expected} == expected
    training = dataclasses.asdict(Training())
    expected = {"optimizer": "adamw", "lr": 1e-3, "end_lr": 5e-5, "epochs": 225, "batch": 32, "weight_decay": 1e-5}
    assert {key: training[key] for key in expected} == expected
    assert training["warmup"] * training["epochs"] == pytest.approx(10)


def test_half_precision_logits_give_the_loss_of_their_full_precision():
    logits, labels = drawn(9, 7)
    half = logits.detach().bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(dice_loss(half, labels), dice_loss(half.float(), labels))
    assert cross_entropy(half, labels).dtype == torch.float32
