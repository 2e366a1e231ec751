"""A probe finds what the features hold and nothing else, and looking changes nothing of what is looked at."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.methods.protocol import UNLABELLED
from medssl.platform import catalogue, checkpoint, config, plan, probe, splits, stages
from medssl.platform.datasets import phantom
from medssl.platform.errors import UsageError
from medssl.platform.records import Volume
from medssl.platform.site import Site
from medssl.platform.store import Store

CLASSES = ("background", "liver", "spleen")
RATES = (0.7, 0.2, 0.1)  # of the classes' pixels


def volumes(patients: range, d: int = 6, sides: tuple[int, int] = (12, 9)) -> list[Volume]:
    """Random labels, of which the lowest slices show background alone; the image is the label."""
    made = []
    for patient in patients:
        rng = torch.Generator().manual_seed(patient)
        draw = torch.rand(d, *sides, generator=rng)
        label = ((draw > RATES[0]).long() + (draw > RATES[0] + RATES[1]).long()).byte()
        label[: d // 3] = 0
        made.append(Volume(f"p{patient}", f"v{patient}", label[:, None], label, (1.0, 1.0, 1.0)))
    return made


class Seer(nn.Module):
    """An encoder whose finest map is the label, one-hot, and whose coarsest is which classes the slice shows."""

    def __init__(self) -> None:
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = F.one_hot((x[:, 0] * 255).round().long(), 3).movedim(-1, 1).float()
        return [fine, fine.amax(tuple(range(2, fine.dim())), keepdim=True)]


class Blind(Seer):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [torch.ones(len(x), 4, *side[: x.dim() - 2]) for side in ((6, 5, 3), (2, 2, 1))]


def test_a_probe_of_features_that_hold_the_label_is_right() -> None:
    reading = probe.look(Seer().eval(), volumes(range(4)), volumes(range(4, 7)), CLASSES)
    assert reading.dice == 1
    assert reading.knn == 1
    assert reading.rank > 1.5


def test_a_probe_of_constant_features_is_at_chance() -> None:
    """The largest class everywhere: no foreground, Dice 0; one answer for all slices: balanced accuracy one half."""
    reading = probe.look(Blind().eval(), volumes(range(4)), volumes(range(4, 7)), CLASSES)
    assert reading.dice == 0
    assert reading.knn == 0.5
    assert reading.rank == pytest.approx(1, abs=1e-3)
    assert reading.spread == pytest.approx(0, abs=1e-6)


def test_pixels_that_nobody_labelled_neither_teach_nor_count() -> None:
    def hidden(patients: range) -> list[Volume]:
        kept = []
        for volume in volumes(patients):
            assert volume.label is not None
            label, image = volume.label.clone(), volume.image.clone()
            label[:, :6], image[:, :, :6] = UNLABELLED, 2 - image[:, :, :6]  # there, the image lies
            kept.append(Volume(volume.patient, volume.volume, image, label, volume.spacing_mm))
        return kept

    assert probe.look(Seer().eval(), hidden(range(4)), hidden(range(4, 7)), CLASSES).dice == 1


def test_the_classifier_is_the_ridge_regression_that_least_squares_finds() -> None:
    """Of √D-weighted rows, with one row of √λ per weight and an intercept that nothing pulls to 0."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 5)) * [1, 10, 0.1, 3, 1] + [0, 5, 1, -2, 0]
    ids, shares = rng.integers(0, 3, 60), np.array(RATES)
    of_class = np.sqrt(shares) / np.sqrt(shares).sum()
    d = of_class[ids] / np.bincount(ids)[ids]
    mean = d @ x
    z = (x - mean) / np.sqrt(d @ (x - mean) ** 2)
    rows = np.vstack([np.sqrt(d)[:, None] * np.hstack([z, np.ones((60, 1))]), np.sqrt(probe.RIDGE) * np.eye(5, 6)])
    target = np.vstack([np.sqrt(d)[:, None] * np.eye(3)[ids], np.zeros((5, 3))])
    solution = np.linalg.lstsq(rows, target, rcond=None)[0]

    weight, bias = probe.ridge(torch.from_numpy(x), torch.from_numpy(ids), torch.from_numpy(shares))
    np.testing.assert_allclose((x @ weight.numpy()) + bias.numpy(), z @ solution[:5] + solution[5], atol=1e-10)


def test_a_class_without_pixels_is_never_said_and_a_constant_feature_changes_nothing() -> None:
    x, ids = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
    weight, bias = probe.ridge(x, ids, torch.tensor([0.6, 0.4, 0.0]))
    assert not (x @ weight + bias).argmax(1).eq(2).any()
    wide, same = probe.ridge(torch.cat([x, torch.full((40, 1), 7.0)], 1), ids, torch.tensor([0.6, 0.4, 0.0]))
    torch.testing.assert_close(wide[:3], weight)
    assert not wide[3].any()
    torch.testing.assert_close(same, bias)


@pytest.mark.parametrize("sides", [(9, 7), (6, 5, 4)])
def test_a_pixels_features_and_logits_are_those_of_the_maps_brought_to_full_resolution(sides: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, c, *(-(-side // s) for side in sides), generator=rng) for c, s in [(3, 1), (4, 2), (5, 4)]]
    mode = "bilinear" if len(sides) == 2 else "trilinear"
    full = torch.cat([F.interpolate(values, size=sides, mode=mode) for values in maps], 1)  # (2, 12, *sides)
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (2, *sides)), indexing="ij"), -1).flatten(0, -2)
    torch.testing.assert_close(probe.at(maps, places, sides), full.movedim(1, -1).flatten(0, -2))

    weight, bias = torch.randn(12, 3, generator=rng), torch.randn(3, generator=rng)
    wanted = (full.movedim(1, -1) @ weight + bias).movedim(-1, 1)
    torch.testing.assert_close(probe.logits(maps, weight, bias, sides), wanted, atol=1e-5, rtol=1e-5)


def test_neighbours_are_those_of_brute_force() -> None:
    rng = np.random.default_rng(1)
    x, reference, known = rng.normal(size=(7, 4)), rng.normal(size=(20, 4)), rng.random((20, 3)) < 0.5
    wanted = []
    for row in x:
        cosines = [float(row @ other / np.linalg.norm(row) / np.linalg.norm(other)) for other in reference]
        nearest = sorted(range(20), key=lambda at: -cosines[at])[:5]
        wanted.append([sum(bool(known[at, column]) for at in nearest) >= 3 for column in range(3)])
    said = probe.neighbours(*(torch.from_numpy(values) for values in (x, reference, known)))
    assert said.tolist() == wanted


def test_balanced_accuracy_leaves_out_classes_that_all_slices_show_or_none() -> None:
    true = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 1, 0], [0, 1, 0]]).bool()
    said = torch.tensor([[1, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1]]).bool()
    assert probe.balanced_accuracy(said, true) == pytest.approx((0.5 + 1) / 2)
    assert np.isnan(probe.balanced_accuracy(said[:, 1:], true[:, 1:]))


def test_volumes_are_thinned_evenly_and_those_without_a_label_are_left_out() -> None:
    (whole,), (tall,) = volumes(range(1)), volumes(range(1, 2), d=50)
    unlabelled = Volume("p9", "v9", whole.image, None, whole.spacing_mm)
    short, thin = probe.thinned([whole, unlabelled, tall])
    assert torch.equal(short.image, whole.image)
    assert len(thin.image) == probe.SLICES
    rows = [next(i for i in range(50) if torch.equal(tall.image[i], row)) for row in thin.image[probe.SLICES // 2 :]]
    assert set(np.diff(rows)) <= {3, 4}


# Three dimensions


def cubes(patients: range, side: int = 6) -> list[Volume]:
    """The volumes of `volumes`, whose lowest third shows background alone, as cubes."""
    return probe.thinned(volumes(patients, d=18, sides=(12, 9)), side)


def test_a_probe_of_cubes_is_right_where_their_features_hold_the_label_and_at_chance_where_they_are_constant() -> None:
    seen = probe.look(Seer().eval(), cubes(range(4)), cubes(range(4, 7)), CLASSES)
    assert (seen.dice, seen.knn) == (1, 1)
    assert seen.rank > 1.5
    blind = probe.look(Blind().eval(), cubes(range(4)), cubes(range(4, 7)), CLASSES)
    assert (blind.dice, blind.knn) == (0, 0.5)
    assert blind.rank == pytest.approx(1, abs=1e-3)
    assert blind.spread == pytest.approx(0, abs=1e-6)


class Flat(nn.Module):
    """Three random convolutions of slices, each coarser than the one before; of volumes that are one slice thick, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Conv2d(a, b, 3, 2, 1) for a, b in ((1, 4), (4, 6), (6, 8))])

    def forward(self, x: Tensor) -> list[Tensor]:
        solid, maps = x.dim() == 5, []
        x = (x[..., 0] if solid else x) * 100
        for layer in self.layers:
            x = layer(x).relu()
            maps.append(x[..., None] if solid else x)
        return maps


def test_the_probe_of_volumes_one_slice_thick_is_that_of_the_slices() -> None:
    def solid(flat: list[Volume]) -> list[Volume]:
        return [Volume(v.patient, v.volume, v.image[..., None], v.label[..., None], v.spacing_mm) for v in flat]  # type: ignore[index]

    reference, validation = volumes(range(4), d=20), volumes(range(4, 7), d=20)
    flat = probe.look(Flat().eval(), reference, validation, CLASSES)
    thick = probe.look(Flat().eval(), solid(reference), solid(validation), CLASSES)
    assert 0 < flat.dice < 1
    assert vars(thick) == pytest.approx(vars(flat), rel=1e-4)


def test_cubes_lie_evenly_apart_from_each_other_and_what_pads_them_is_not_labelled() -> None:
    h, w, d = 20, 13, 5
    where = torch.arange(d * h * w, dtype=torch.int16).view(d, h, w)
    made = Volume("p", "v", where[:, None], torch.zeros(d, h, w, dtype=torch.uint8), (1.0, 1.0, 1.0))
    (cut,) = probe.thinned([made, Volume("q", "u", where[:, None], None, (1.0, 1.0, 1.0))], 6)
    assert cut.label is not None
    assert cut.image.shape == (3 * 2 * 1, 1, 6, 6, 6)
    assert (cut.label[..., d:] == UNLABELLED).all()
    assert not cut.label[..., :d].any()
    assert not cut.image[..., d:].any()
    corners = [np.unravel_index(int(number), (d, h, w))[1:] for number in cut.image[:, 0, 0, 0, 0]]
    assert corners == [(row, column) for row in (0, 7, 13) for column in (0, 6)]
    inside = cut.image[:, 0, :, :, :d].flatten()
    assert len(inside.unique()) == len(inside)
    assert torch.equal(cut.image[0, 0, :, :, :d].movedim(-1, 0), where[:, :6, :6])


def test_no_volume_has_more_cubes_than_its_share_of_voxels_but_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "VOXELS", 6**3 * 3)
    (few,) = probe.thinned(volumes(range(1), d=18, sides=(12, 12)), 6)  # of 12
    assert len(few.image) == 3
    monkeypatch.setattr(probe, "VOXELS", 1)
    assert [len(cut.image) for cut in probe.thinned(volumes(range(2), d=18, sides=(12, 12)), 6)] == [2, 2]


# A pretraining and its probes


SMALL = {
    "network": {"width": 4, "levels": 3},
    "pretrain": {"side": 16, "d": 16, "bottleneck": 8, "training": {"steps": 9, "batch": 8}},
    "finetune": {"side": 32, "training": {"steps": 2, "batch": 4, "evaluations": 1}},
    "evaluate": {"inference": "whole"},
    "resources": {"checkpoint_seconds": 0.0, "gpus": 0},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: Any) -> Store:
    """Seven small phantoms."""
    source, data = tmp_path_factory.mktemp("scans") / "seven", tmp_path_factory.mktemp("data")
    phantom.generate(source, patients=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSSL_DATA", str(data))
        catalogue.prepare(str(source), changes={"spacing_mm": (6.0, 6.0, 12.0), "pad": 32}, workers=1, say=lambda text: None)
    return Store.open(data / "seven")


class Pretraining:
    """One pretraining in a runs folder of its own, with what its probes told."""

    def __init__(self, store: Store, runs: Path, probes: int, dims: int = 2):
        split = splits.load(store, "seed-0")
        changes = {"network": {"spatial_dims": dims}, "pretrain": {"training": {"probes": probes}}}
        experiment = config.build(config.stack([SMALL, changes]))
        chain = plan.chain("arm", 0, 0, plan.resolve(experiment, store, split), store, split)
        self.chain, self.work = chain, stages.Work(Site(store.root.parent, runs), store.root, split)
        self.told: list[tuple[int, float]] = []
        assert chain.pretraining is not None
        self.folder = self.work.site.stage(chain.pretraining.id)

    def run(self, stop: int | None = None) -> None:
        def hear(step: int, dice: float) -> None:
            self.told.append((step, dice))
            if step == stop:
                raise KeyboardInterrupt

        stages.run_chain(self.chain, self.work, probe=hear)

    @property
    def weights(self) -> str:
        return checkpoint.digest(checkpoint.load(self.folder / "encoder.pt")["encoder"])


def test_probes_are_told_kept_and_change_no_weight(prepared: Store, tmp_path: Path) -> None:
    plain, probed = Pretraining(prepared, tmp_path, 0), Pretraining(prepared, tmp_path, 3)
    plain.run()
    probed.run()
    assert plain.told == []
    assert [step for step, _ in probed.told] == [0, 3, 6, 9]
    assert plain.weights == probed.weights
    assert plain.chain.pretraining != probed.chain.pretraining  # their done.json differ

    done = probed.work.site.done(probed.folder.name)
    assert done is not None
    assert [(entry["step"], entry["dice"]) for entry in done["probe"]] == probed.told
    assert done["probe"][0].keys() == {"step", "dice", "knn", "rank", "spread"}
    assert "probe/dice" in (probed.folder / "progress.json").read_text()
    assert (probed.folder / "log.txt").read_text().count("probe/dice") == 4
    assert list((probed.folder / "tensorboard").iterdir())

    again = Pretraining(prepared, tmp_path, 3)
    again.run()  # a look-up tells the same
    assert again.told == probed.told


def test_a_pretraining_that_was_stopped_at_a_probe_ends_as_if_it_had_not_been(prepared: Store, tmp_path: Path) -> None:
    whole, parts = Pretraining(prepared, tmp_path / "whole", 3), Pretraining(prepared, tmp_path / "parts", 3)
    whole.run()
    with pytest.raises(KeyboardInterrupt):
        parts.run(stop=6)
    assert parts.told == whole.told[:3]
    parts.told.clear()
    parts.run()
    assert parts.told == whole.told
    assert parts.weights == whole.weights


def test_what_is_probed_before_the_first_step_is_the_encoder_that_a_run_from_scratch_starts_with(
    prepared: Store, tmp_path: Path
) -> None:
    pretraining = Pretraining(prepared, tmp_path, 1)
    pretraining.run()
    chain, work = pretraining.chain, pretraining.work
    torch.manual_seed(chain.encoder_seed)
    encoder = stages.network(chain.experiment, prepared.channels, len(prepared.classes)).encoder.eval()
    learnt_from, asked = plan.probed_patients(work.split)
    reading = probe.look(
        encoder,
        probe.thinned(work.slices("train", learnt_from).volumes()),
        probe.thinned(work.slices("val", asked).volumes()),
        prepared.classes,
    )
    assert pretraining.told[0] == (0, pytest.approx(reading.dice))


def test_a_pretraining_on_volumes_is_probed_on_cubes_of_its_own_side_and_unchanged(prepared: Store, tmp_path: Path) -> None:
    plain, probed = (Pretraining(prepared, tmp_path, probes, dims=3) for probes in (0, 1))
    plain.run()
    probed.run()
    assert [step for step, _ in probed.told] == [0, 9]
    assert plain.weights == probed.weights
    learnt_from, asked = plan.probed_patients(probed.work.split)
    torch.manual_seed(probed.chain.encoder_seed)
    encoder = stages.network(probed.chain.experiment, prepared.channels, len(prepared.classes)).encoder.eval()
    given = [
        probe.thinned(probed.work.slices(part, patients).volumes(), 16)
        for part, patients in (("train", learnt_from), ("val", asked))
    ]
    assert {cut.image.shape[1:] for cuts in given for cut in cuts} == {(1, 16, 16, 16)}
    reading = probe.look(encoder, *given, prepared.classes)
    assert probed.told[0][1] == pytest.approx(reading.dice)
    assert 0 <= reading.dice < 1


def test_probes_where_they_cannot_be_are_refused_before_anything_starts(prepared: Store) -> None:
    split = splits.load(prepared, "seed-0")

    def resolve(tree: dict[str, Any], split: splits.Split = split) -> None:
        plan.resolve(config.build(config.stack([SMALL, tree])), prepared, split)

    probes = {"pretrain": {"training": {"probes": 2}}}
    resolve(probes)
    nobody = splits.Split(split.name, split.train, split.val, split.test, ())
    with pytest.raises(UsageError, match=r"pretrain\.training\.probes needs labelled training and validation patients"):
        resolve(probes, nobody)
    with pytest.raises(UsageError, match=r"only a pretraining is probed; see finetune\.training\.evaluations"):
        resolve({"finetune": {"training": {"probes": 2}}})
    with pytest.raises(UsageError, match="probes is -1: expected at least 0"):
        resolve({"pretrain": {"training": {"probes": -1}}})


def test_at_most_so_many_patients_are_probed_whatever_the_label_budget() -> None:
    names = tuple(f"p{number:02}" for number in range(40))
    learnt_from, asked = plan.probed_patients(splits.Split("seed-0", names[:10], names[10:35], names[35:], names[9::-1]))
    assert learnt_from == ("p09", "p08", "p07", "p06")
    assert asked == names[10:35:2]
