"""A plan: what a stage's id depends on, what the data allow, and labelled subsets that nest."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

from medssl.methods import crops
from medssl.methods.settings import PairCrops
from medssl.platform import config, find, geometry, plan
from medssl.platform.errors import UsageError
from medssl.platform.splits import Split
from medssl.platform.store import Store, VolumeRecord


def store(sizes=((64, 48), (60, 52), (64, 48), (72, 50), (64, 48)), slices=10) -> Store:
    records = tuple(
        VolumeRecord(f"v{number}", f"p{number}", None, True, slices, *size, 1, (1.0, 1.0, 2.0), None, {}, f"digest{number}")
        for number, size in enumerate(sizes)
    )
    preset = geometry.PRESETS["mr"]
    return Store(Path("nowhere"), "toy", ("background", "organ"), None, "", "", {}, preset, "content", "", (), records)


SPLIT = Split("seed-0", ("p0", "p1", "p2"), ("p3",), ("p4",), ("p2", "p0", "p1"))


def resolved(**dotted):
    tree = config.nested({key.replace("__", "."): value for key, value in dotted.items()})
    return plan.resolve(config.build(tree), store(), SPLIT)


def ids(m=2, index=0, **dotted):
    return [stage.id for stage in plan.chain("arm", index, m, resolved(**dotted), store(), SPLIT).stages]


WIDE = {"pretrain__training__batch": 24, "finetune__training__batch": 12}  # that one to four workers can share


def test_equal_settings_give_equal_stages_and_orchestration_changes_none():
    assert ids() == ids()
    assert ids() == ids(resources__cpus=4) == ids(resources__checkpoint_seconds=1.0) == ids(data__stream="node")
    assert ids() == ids(resources__trackers=("wandb",))


@pytest.mark.parametrize(
    "change",
    [
        {"pretrain__iou": (0.1, 0.2)},
        {"pretrain__training__lr": 0.1},
        {"network__width": 8},
        {"seed": 1},
        {"resources__workers": 2},
        {"resources__workers": 2, "resources__min_workers": 1},
        {"data__stream": "ray"},
        {"pretrain__training__steps": 7},
    ],
    ids=str,
)
def test_what_changes_a_pretraining_changes_all_that_follows_it(change):
    assert not set(ids()) & set(ids(**change))


def test_a_group_that_may_not_shrink_is_one_of_fixed_size_and_one_that_may_is_another_stage():
    fixed = ids(resources__workers=2)
    assert fixed == ids(resources__workers=2, resources__min_workers=2)
    assert not set(fixed) & set(ids(resources__workers=2, resources__min_workers=1))
    assert len({ids(resources__workers=4, resources__min_workers=least, **WIDE)[0] for least in (1, 2, 3, 4)}) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resources__workers": 5}, r"pretrain.training.batch=24 cannot be shared by 5 workers .* a multiple of 5,"),
        ({"resources__workers": 4, "resources__min_workers": 2, "finetune__training__batch": 8}, "finetune.* 2 to 4 .* of 12"),
        ({"resources__workers": 3, "pretrain__training__accumulate": 4, "finetune__training__batch": 10}, "finetune.* of 3,"),
        ({"resources__workers": 4, "pretrain__training__accumulate": 4}, "accumulate=4; use a multiple of 16"),
        ({"resources__workers": 2, "resources__min_workers": 3}, "min_workers is 3: expected at least 1 and at most workers"),
    ],
    ids=str,
)
def test_a_batch_that_a_group_of_some_size_could_not_share_is_refused_before_anything_starts(change, message):
    with pytest.raises(UsageError, match=message):
        resolved(**{**WIDE, **change})


@pytest.mark.parametrize(
    "change",
    [{"data__labelled": 1}, {"finetune__training__lr": 0.1}, {"evaluate__overlap": 0.5}, {"finetune__side": 32}],
    ids=str,
)
def test_what_changes_a_fine_tuning_leaves_its_pretraining_to_be_shared(change):
    before, after = ids(), ids(**change)
    assert before[0] == after[0]
    assert not set(before[1:]) & set(after[1:])


def test_repeats_are_different_stages_and_more_of_them_keep_the_first():
    every = [identity for index in range(3) for identity in ids(index=index)]
    assert len(set(every)) == 3 * 3
    assert ids(m=5)[:3] == ids(m=2)


def test_from_scratch_has_no_pretraining_but_the_same_initial_encoders():
    scratch = plan.chain("scratch", 1, 2, resolved(pretrain=None), store(), SPLIT)
    pretrained = plan.chain("arm", 1, 2, resolved(), store(), SPLIT)
    assert scratch.pretraining is None
    assert scratch.encoder_seed == pretrained.encoder_seed
    assert [stage.seed for stage in scratch.finetunings] == [stage.seed for stage in pretrained.finetunings]


def test_labelled_subsets_nest():
    chosen = [plan.labelled_patients(resolved(data__labelled=n), SPLIT) for n in (1, 2, 3)]
    assert chosen == [("p2",), ("p2", "p0"), ("p2", "p0", "p1")]
    with pytest.raises(UsageError, match=r"data\.labelled=4: split seed-0 has 3"):
        plan.labelled_patients(config.build({"data": {"labelled": 4}}), SPLIT)


def test_a_share_of_the_labelled_patients_is_the_number_nearest_to_it_and_one_at_least():
    assert ids(data__labelled=0.7) == ids(data__labelled=2) == ids(data__labelled=2.0)
    assert resolved(data__labelled=0.1).data.labelled == 1
    for wrong in (0, -1, 1.5, 0.0):
        with pytest.raises(UsageError, match=r"data: labelled is .*a share of them below 1"):
            resolved(data__labelled=wrong)


def test_epochs_become_steps_of_the_slices_that_a_stage_trains_on():
    experiment = resolved(
        pretrain__training__epochs=8, pretrain__training__batch=5, data__labelled=1, finetune__training__epochs=8
    )
    assert experiment.pretrain.training.steps == 8 * 30 / 5
    assert experiment.finetune.training.steps == round(8 * 10 / 32)


@pytest.mark.parametrize("sizes", [((300, 250),), ((64, 48), (60, 52)), ((50, 35),), ((400, 400),)])
def test_two_crops_of_the_chosen_side_fit_apart_in_every_slice(sizes):
    side = plan.disjoint_side(set(sizes))
    assert side <= 96
    assert crops.feasible(torch.tensor(sizes), PairCrops(side=side, iou=(0.0, 0.0))).all()
    assert side == 96 or not crops.feasible(torch.tensor(sizes), PairCrops(side=side + 8, iou=(0.0, 0.0))).all()


@pytest.mark.parametrize("ends", ["[]", "(]", "[)", "()"])
def test_the_plan_refuses_exactly_what_the_sampler_cannot_draw(ends):
    values = (0.0, 0.1, 0.3, 0.6, 1.0)
    for low, high in itertools.combinations(values, 2):
        for size in itertools.product((16, 17, 20, 27, 40), repeat=2):
            settings = PairCrops(side=16, iou=(low, high), ends=ends)
            possible = bool(crops.feasible(torch.tensor([size]), settings).item())
            experiment = config.build({"pretrain": {"side": 16, "iou": (low, high), "ends": ends}})
            try:
                plan.resolve(experiment, store([size] * 5), SPLIT)
                allowed = True
            except UsageError:
                allowed = False
            assert allowed == possible, (size, settings)


# Three dimensions


CUBES = [(24, 30, 20), (16, 16, 40), (27, 16, 16), (40, 40, 40), (17, 20, 9), (31, 40, 5)]  # the last two are padded


@pytest.mark.parametrize("ends", ["[]", "(]", "[)", "()"])
@pytest.mark.parametrize("size", CUBES)
def test_the_plan_refuses_exactly_the_volumes_that_the_sampler_cannot_draw_from(size, ends):
    padded = torch.tensor([[max(length, 16) for length in size]])
    for low, high in itertools.combinations((0.0, 0.02, 0.1, 0.3, 0.6, 1.0), 2):
        settings = PairCrops(side=16, iou=(low, high), ends=ends)
        pretrain = {"side": 16, "iou": (low, high), "ends": ends}
        experiment = config.build({"network": {"spatial_dims": 3}, "pretrain": pretrain})
        try:
            plan.resolve(experiment, store([size[:2]] * 5, size[2]), SPLIT)
            allowed = True
        except UsageError:
            allowed = False
        assert allowed == bool(crops.feasible(padded, settings).item()), settings


def test_an_epoch_in_3d_goes_over_volumes():
    experiment = resolved(
        network__spatial_dims=3, pretrain__training__epochs=8, pretrain__training__batch=2, data__labelled=2,
        finetune__training__epochs=50, finetune__training__batch=4,
    )  # fmt: skip
    assert experiment.pretrain.training.steps == 8 * 3 / 2
    assert experiment.finetune.training.steps == 50 * 2 / 4


@pytest.mark.parametrize(
    ("sizes", "slices", "finetune", "pretrain", "levels"),
    [
        ([(300, 250)] * 5, 150, 96, 96, 5),
        ([(35, 50), (31, 40), (43, 59)], 35, 40, 16, 3),  # as in the hippocampus data
        ([(256, 256)] * 5, 10, 16, 16, 3),  # a cardiac stack: a cube is mostly image
    ],
)
def test_sides_and_levels_of_cubes_follow_from_the_volumes(sizes, slices, finetune, pretrain, levels):
    split = Split("seed-0", ("p0", "p1"), (), ("p2",), ("p0", "p1"))
    experiment = plan.resolve(config.build({"network": {"spatial_dims": 3}}), store(sizes, slices), split)
    chosen = experiment.finetune.settings.side, experiment.pretrain.settings.side, experiment.network.settings.levels
    assert chosen == (finetune, pretrain, levels)
    assert pretrain / 2 ** (levels - 1) >= 4
    padded = [[max(length, pretrain) for length in (*size, slices)] for size in sizes]
    assert crops.feasible(torch.tensor(padded), PairCrops(side=pretrain, iou=(0.0, 0.0))).all()


def test_a_stage_in_3d_is_another_stage():
    assert not set(ids()) & set(ids(network__spatial_dims=3))
    with pytest.raises(UsageError, match=r"not volumes; in 3D leave data\.stream out"):
        resolved(network__spatial_dims=3, data__stream="ray")


def test_a_network_without_the_setting_is_refused_in_3d(tmp_path, monkeypatch):
    shutil.copytree(find.ROOT / "methods", tmp_path / "methods", ignore=shutil.ignore_patterns("__pycache__"))
    settings = '"""Flat."""\n@dataclass(frozen=True, kw_only=True)\nclass Config:\n    width: int = 8\n'
    (tmp_path / "methods" / "networks" / "flat.py").write_text(settings)
    monkeypatch.setattr(find, "ROOT", tmp_path)
    config.build({"network": {"name": "flat", "width": 4}})
    with pytest.raises(UsageError, match=r"network\.spatial_dims: flat reads slices only; leave it out, or choose .*unet"):
        config.build({"network": {"name": "flat", "spatial_dims": 3}})


def test_a_contract_follows_data_and_held_out_patients_only():
    first = plan.contract(store(), SPLIT)
    assert first == plan.contract(store(), dataclasses.replace(SPLIT, train=("p0",), labelled=("p0",)))
    assert first != plan.contract(store(), dataclasses.replace(SPLIT, test=("p3",), val=("p4",)))
    assert first != plan.contract(dataclasses.replace(store(), content_hash="other"), SPLIT)


def given(tmp_path, content=b"weights", name="a.pth") -> str:
    (tmp_path / name).write_bytes(content)
    return str(tmp_path / name)


def run_folder(tmp_path, identity="simsiam-0123456789ab", snapshots=(3, 5)) -> str:
    """What a finished pretraining leaves, as far as a plan looks at it."""
    folder = tmp_path / identity
    folder.mkdir()
    training = {"steps": 9, "snapshots": list(snapshots)}
    (folder / "run.json").write_text(json.dumps({"kind": "pretrain", "config": {"pretrain": {"training": training}}}))
    return str(folder)


def test_given_weights_count_by_content_not_by_path(tmp_path):
    a, same = given(tmp_path), given(tmp_path, name="b.pth")
    other = given(tmp_path, b"others", "c.pth")
    for pretrain in ({}, {"pretrain": None}):
        of_a, of_same, of_other = (ids(start__weights=name, **pretrain) for name in (a, same, other))
        assert of_a == of_same
        assert not set(of_a) & set(of_other)
        assert not set(of_a) & set(ids(**pretrain))
        assert not set(of_a) & set(ids(start__weights=a, start__partial=True, **pretrain))
    before = ids(start__weights=a)
    (tmp_path / "a.pth").write_bytes(b"changed since")
    assert not set(before) & set(ids(start__weights=a))


def test_a_fine_tuning_has_one_id_whether_its_pretraining_is_the_arms_own_or_given(tmp_path):
    arm = plan.chain("arm", 0, 2, resolved(), store(), SPLIT)
    folder = run_folder(tmp_path, arm.pretraining.id)
    by_name = plan.chain("given", 0, 2, resolved(pretrain=None, start__weights=folder), store(), SPLIT)
    assert by_name.pretraining is None
    assert by_name.finetunings == arm.finetunings
    (Path(folder) / "encoder.pt").write_bytes(b"its end")
    assert ids(pretrain=None, start__weights=folder) == [stage.id for stage in arm.finetunings]


def test_a_pretraining_upon_another_names_its_parent(tmp_path):
    folder = run_folder(tmp_path)
    upon = plan.chain("arm", 0, 1, resolved(start__weights=folder), store(), SPLIT)
    assert upon.pretraining.parent == Path(folder).name
    assert upon.finetunings[0].parent == upon.pretraining.id
    assert plan.chain("arm", 0, 1, resolved(start__weights=given(tmp_path)), store(), SPLIT).pretraining.parent is None


def test_fine_tunings_from_different_snapshots_share_their_pretraining():
    snapshots = {"pretrain__training__steps": 100, "pretrain__training__snapshots": (0.05, 10, 0.5)}
    assert resolved(**snapshots).pretrain.training.snapshots == (5, 10, 50)
    chains = [
        plan.chain("arm", 0, 1, resolved(**snapshots, start__step=step), store(), SPLIT)
        for step in (0.05, 5, 10, 50, 100, None)
    ]
    assert len({chain.pretraining.id for chain in chains}) == 1
    tuned = [chain.finetunings[0].id for chain in chains]
    assert tuned[0] == tuned[1], "a step and the fraction that it is"
    assert tuned[4] == tuned[5], "the last step is the end"
    assert len(set(tuned)) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pretrain__training__snapshots": (10,), "start__step": 11}, r"no snapshot at step 11 \(kept: 10, and its end\)"),
        ({"start__step": 0.5}, r"no snapshot at step 50 \(kept: none"),
        ({"pretrain__training__snapshots": (101,)}, "step 101 lies beyond the 100 steps"),
        ({"finetune__training__snapshots": (1,)}, "only a pretraining keeps snapshots"),
        ({"pretrain": None, "start__step": 3}, "no medssl pretraining whose snapshot"),
        ({"start__weights": "absent.pth"}, "absent.pth: neither a file of weights nor the folder of a pretraining"),
    ],
    ids=str,
)
def test_a_start_that_cannot_be_is_refused(change, message):
    steps = {} if "pretrain" in change else {"pretrain__training__steps": 100}
    with pytest.raises(UsageError, match=message):
        ids(**steps, **change)


def test_the_snapshots_of_a_given_pretraining_are_known(tmp_path):
    folder = run_folder(tmp_path)
    experiment = {step: resolved(pretrain=None, start__weights=folder, start__step=step) for step in (3, 5, 9)}
    assert [each.start.step for each in experiment.values()] == [3, 5, None]
    with pytest.raises(UsageError, match=r"no snapshot at step 4 \(kept: 3, 5, and its end\)"):
        resolved(pretrain=None, start__weights=folder, start__step=4)


def test_the_plan_says_that_repeats_share_given_weights(tmp_path):
    arms = {"given": resolved(pretrain=None, start__weights=given(tmp_path)), "fresh": resolved(pretrain=None)}
    text = plan.describe(arms, 2, 1, store(), SPLIT, set())
    assert "the 2 repeats of an arm share the given weights as initial encoder: given" in text
    assert "from a.pth; no pretraining; then segment" in text
    assert "share" not in plan.describe({"fresh": arms["fresh"]}, 2, 1, store(), SPLIT, set())


def test_labelled_slices_decide_fine_tunings_and_their_steps():
    few, more = ids(data__labelled_slices=3), ids(data__labelled_slices=4)
    assert few[0] == more[0] == ids()[0]
    assert not set(few[1:]) & set(more[1:])
    assert resolved(data__labelled_slices=16, finetune__training__epochs=8).finetune.training.steps == 8 * 16 / 32


HOOKED = {"data__labelled": 1, "hooks__mean_teacher__weight": 5.0}


def test_without_hooks_nothing_about_them_enters_an_id():
    assert not {"hooks", "unlabelled"} & resolved(unlabelled__batch=4).tree().keys()
    assert ids(hooks__consistency=None, unlabelled__batch=4) == ids()


@pytest.mark.parametrize(
    "change",
    [
        {"hooks__mean_teacher__weight": 6.0},
        {"hooks__mean_teacher__momentum": 0.9},
        {"hooks__consistency": {}},
        {"hooks__mean_teacher": None},
        {"unlabelled__batch": 4},
        {"unlabelled__zoom_p": 0.0},
    ],
    ids=str,
)
def test_hooks_and_how_they_are_fed_decide_a_fine_tuning_and_not_its_pretraining(change):
    before, after = ids(**HOOKED), ids(**HOOKED | change)
    assert before[0] == after[0]
    assert not set(before[1:]) & set(after[1:])


def test_hooks_learn_from_the_training_patients_beyond_the_labelled_ones():
    experiment = resolved(**HOOKED)
    assert plan.labelled_patients(experiment, SPLIT) == ("p2",)
    assert plan.unlabelled_patients(experiment, SPLIT) == ("p0", "p1")
    assert experiment.unlabelled.batch == experiment.finetune.training.batch
    text = plan.describe({"arm": resolved(**HOOKED | {"unlabelled__batch": 6})}, 1, 1, store(), SPLIT, set())
    assert " + mean_teacher, 6 unlabelled slices, 1 labelled patients" in text


def test_a_hook_that_learns_from_labelled_slices_only_needs_no_others():
    labelled_only = {"data__labelled": None, "hooks__pdcr__weight": 2.0}
    experiment = resolved(**labelled_only)
    assert not plan.unlabelled_patients(experiment, SPLIT)
    assert experiment.unlabelled is None
    assert ids(**labelled_only)[1:] == ids(**labelled_only, unlabelled__batch=4)[1:] != ids()[1:]
    assert resolved(**HOOKED | {"hooks__pdcr": {}}).unlabelled is not None
    text = plan.describe({"arm": experiment}, 1, 1, store(), SPLIT, set())
    assert " + pdcr" in text
    assert "unlabelled" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data__labelled": None}, r"hooks \(mean_teacher\) learn from .* beyond data.labelled, .* none left; set .* below 3"),
        ({"unlabelled__batch": 3, "resources__workers": 2}, r"unlabelled.batch=3 cannot be shared .* a multiple of 2"),
    ],
)
def test_hooks_that_cannot_be_fed_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        resolved(**HOOKED | change)


def test_draws_give_repeats_other_labelled_patients_in_turn_and_all_arms_the_same():
    budget = {"data__labelled": 2, "pretrain": None}

    def labelled(index, **change):
        chain = plan.chain("arm", index, 1, resolved(**budget | change), store(), SPLIT)
        return plan.labelled_patients(chain.experiment, SPLIT)

    orders = [labelled(0, data__draw=draw) for draw in range(4)]
    assert orders[0] == SPLIT.labelled[:2]
    assert len(set(orders)) > 1
    taken = [labelled(index, data__draws=4) for index in range(8)]
    assert taken == orders * 2
    assert taken == [labelled(index, data__draws=4, hooks__mean_teacher={}) for index in range(8)]
    assert all(set(labelled(3, data__draws=4, data__labelled=1)) < set(order) for order in orders[3:])
    assert ids(**budget, data__draws=2) == ids(**budget), "the first repeat is the one without draws"
    text = plan.describe({"arm": resolved(**budget, data__draws=2)}, 1, 1, store(), SPLIT, set())
    assert "2 labelled patients in 2 draws" in text
    with pytest.raises(UsageError, match="draws 0"):
        resolved(data__draws=0)
