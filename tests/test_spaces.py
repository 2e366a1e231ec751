"""What must hold of every search space, present and future."""

import inspect
from pathlib import Path

import optuna
import pytest

from medssl.platform import config, find, geometry, plan
from medssl.platform.errors import UsageError
from medssl.platform.spaces import load_space
from medssl.platform.splits import Split
from medssl.platform.store import Store, VolumeRecord

SPACES = find.names("space")


def built(settings, space) -> config.Experiment:
    """As a sweep builds it: over the space's defaults, and over what it needs to be given."""
    given = dict.fromkeys(getattr(space, "NEEDS", ()), "given.pt")
    return config.build(
        config.stack([config.nested(getattr(space, "DEFAULTS", {})), config.nested(given), config.nested(settings)])
    )


def resolved(settings, space) -> config.Experiment:
    """On data of 20 patients, 12 of them labelled in training, and with 512 steps of pretraining."""
    more = {**settings, **({} if settings.get("pretrain", "") is None else {"pretrain.training.steps": 512})}
    return plan.resolve(built(more, space), toy_store(), toy_split())


def toy_store() -> Store:
    records = tuple(
        VolumeRecord(f"v{n:02}", f"p{n}", None, True, 40, 64, 48, 1, (1.0, 1.0, 2.0), None, {}, f"d{n}") for n in range(20)
    )
    preset = geometry.PRESETS["mr"]
    return Store(Path("nowhere"), "toy", ("background", "organ"), None, "", "", {}, preset, "content", "", (), records)


def toy_split() -> Split:
    patients = [f"p{number}" for number in range(20)]
    return Split("seed-0", tuple(patients[:16]), tuple(patients[16:18]), tuple(patients[18:]), tuple(patients[:12]))


@pytest.mark.parametrize("name", SPACES)
def test_a_space_asks_a_question_and_carries_its_control(name):
    space = find.load("space", name)
    assert space.QUESTION.endswith("?")
    assert space.CONTROL in space.arms()
    compared = getattr(space, "COMPARE", {})
    assert set(compared) | set(compared.values()) <= set(space.arms())
    assert all(compared[control] == control for control in compared.values()), "a control has no other control"
    assert find.summary("space", name)


@pytest.mark.parametrize("name", SPACES)
def test_every_arm_is_a_configuration_of_its_own(name):
    space = find.load("space", name)
    trees = [built(settings, space).tree() for settings in space.arms().values()]
    assert len({config.digest(tree) for tree in trees}) == len(trees)


@pytest.mark.parametrize("name", [name for name in SPACES if hasattr(find.load("space", name), "suggest")])
def test_whatever_a_searcher_suggests_is_a_configuration(name):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    space = find.load("space", name)
    for _ in range(100):
        built(space.suggest(study.ask()), space)


@pytest.mark.parametrize("name", [name for name in SPACES if name not in ("initialisation",)])  # which needs a file
def test_an_arm_from_scratch_is_from_scratch_whatever_is_typed(name):
    space = find.load("space", name)
    for label, settings in space.arms().items():
        if label.startswith("from scratch"):
            experiment = built({"start.weights": "given.pt", **settings}, space)
            assert experiment.pretrain is None
            assert experiment.start.weights is None


def test_the_iou_arms_are_those_of_the_study():
    space = find.load("space", "iou-interval")
    arms = {label: built(settings, space).pretrain for label, settings in space.arms().items()}
    assert arms.pop("from scratch") is None
    intervals = {label: (part.settings.iou, part.settings.ends, part.settings.crop) for label, part in arms.items()}
    assert intervals == {
        "random crop": (None, "[]", "fixed"),
        "[0, 0]": ((0, 0), "[]", "fixed"),
        "(0, 0.3]": ((0, 0.3), "(]", "fixed"),
        "[0.3, 0.6]": ((0.3, 0.6), "[]", "fixed"),
        "[0.6, 1]": ((0.6, 1), "[]", "fixed"),
    }


def finetunings(name) -> dict[str, plan.Chain]:
    space, split = find.load("space", name), toy_split()
    chains = {}
    for label, settings in space.arms().items():
        chains[label] = plan.chain(label, 0, 1, resolved(settings, space), toy_store(), split)
    return chains


def test_arms_of_one_pretraining_at_different_steps_share_it():
    chains = finetunings("pretraining-epochs")
    assert chains.pop("from scratch").pretraining is None
    assert len({chain.pretraining.id for chain in chains.values()}) == 1
    assert len({chain.finetunings[0].id for chain in chains.values()}) == len(chains) == 9
    steps = [chain.experiment.start.step for chain in chains.values()]
    assert steps == [2, 4, 8, 16, 32, 64, 128, 256, None]
    assert chains["all"].experiment.pretrain.training.snapshots == tuple(steps[:-1])


@pytest.mark.parametrize(("name", "budget"), [("label-fraction", "labelled"), ("slice-fraction", "labelled_slices")])
def test_each_budget_has_its_own_control_and_all_budgets_share_one_pretraining_per_method(name, budget):
    space, chains = find.load("space", name), finetunings(name)
    for label, control in space.COMPARE.items():
        ours, theirs = (getattr(chains[which].experiment.data, budget) for which in (label, control))
        assert ours == theirs
        assert chains[control].pretraining is None
    for method in ("simsiam", "byol"):
        ours = [chain for label, chain in chains.items() if label.startswith(method)]
        assert {chain.experiment.pretrain.name for chain in ours} == {method}
        assert len({chain.pretraining.id for chain in ours}) == 1
        assert [getattr(chain.experiment.data, budget) for chain in ours] == list(space.BUDGETS)
    scratch = [chain.experiment.tree() for chain in chains.values() if not chain.pretraining]
    for tree in scratch:
        tree["data"].pop(budget)
        tree["finetune"]["training"].pop("steps")
    assert all(tree == scratch[0] for tree in scratch), "budgets differ in nothing but labels, and steps that follow from them"


def test_a_label_curve_of_other_methods_takes_the_three_lines_that_its_docstring_gives(tmp_path):
    usual = find.load("space", "label-fraction")
    lines = [line.strip() for line in usual.__doc__.splitlines() if line.startswith("    ")]
    (tmp_path / "mine.py").write_text("\n".join(lines))
    mine = load_space(str(tmp_path / "mine.py"))
    assert len(lines) == 3
    parts = {label: built(settings, mine).pretrain for label, settings in mine.arms().items()}
    series = {"from scratch": None, "mae": "mae", "moco": "moco"}
    expected = {f"{name}, {budget or 'all'}": method for name, method in series.items() for budget in usual.BUDGETS}
    assert {label: part and part.name for label, part in parts.items()} == expected
    assert {label: f"from scratch, {label.split(', ')[1]}" for label in parts} == mine.COMPARE
    assert set(usual.SERIES) == {"from scratch", "simsiam", "byol"}, "the space that it imports is what it was"


def test_slices_of_smaller_budgets_are_among_those_of_larger_ones():
    space, split, before = find.load("space", "slice-fraction"), toy_split(), set()
    for budget in space.BUDGETS[:-1]:
        chosen = plan.labelled_slices(resolved({"data.labelled_slices": budget}, space), toy_store(), split)
        assert len(set(chosen)) == budget
        assert before < set(chosen)
        before = set(chosen)
    labelled = {volume.volume for volume in toy_store().volumes if volume.patient in split.labelled}
    assert {volume for volume, _ in before} == labelled, "300 of 480 slices: some of every labelled training patient"
    with pytest.raises(UsageError, match=r"data\.labelled_slices=481: the labelled training patients have 480"):
        plan.labelled_slices(built({"data.labelled_slices": 481}, space), toy_store(), split)


@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_the_temperature_is_that_of_the_method_that_was_chosen(method):
    space = find.load("space", "temperature")
    for label, settings in space.arms().items():
        part = built({"pretrain.name": method, **settings}, space).pretrain
        assert (part is None) if label == "from scratch" else (part.name, part.settings.temperature) == (method, float(label))


def test_a_method_without_a_temperature_is_refused():
    space = find.load("space", "temperature")
    with pytest.raises(UsageError, match=r'unknown key "pretrain\.temperature"'):
        built({"pretrain.name": "byol", **space.arms()["0.1"]}, space)


@pytest.mark.parametrize(
    ("name", "networks"),
    [
        ("methods", {"unet"}),
        ("methods-vit", {"unetr"}),
        ("methods-short", {"unet", "unetr"}),
        ("methods-short-vit", {"unetr"}),
    ],
)
def test_every_pretraining_method_that_can_train_the_network_is_an_arm(name, networks):
    encoders = {method: find.constant("method", method, "ENCODERS", ()) for method in find.names("method")}
    able = {
        method
        for method, wanted in encoders.items()
        if "encoder" in inspect.signature(find.load("method", method).METHOD).parameters and networks & set(wanted or networks)
    }
    space = find.load("space", name)
    arms = {label: built(settings, space) for label, settings in space.arms().items()}
    assert {arm.network.name for arm in arms.values()} == networks
    assert {arm.pretrain.name for arm in arms.values() if arm.pretrain} == able
    compared = {label: getattr(space, "COMPARE", {}).get(label, space.CONTROL) for label in arms}
    for label, control in compared.items():
        assert (arms[control].pretrain, arms[control].network) == (None, arms[label].network), label


def test_the_default_weights_are_an_arm_of_their_space():
    vicreg = find.load("space", "loss-weights")
    assert built(vicreg.arms()["25 : 25 : 1"], vicreg).pretrain == built({"pretrain.name": "vicreg"}, vicreg).pretrain
    segmentation = find.load("space", "segmentation-weights")
    assert built(segmentation.arms()[segmentation.CONTROL], segmentation).finetune == built({}, segmentation).finetune


def test_pdcr_and_uafs_are_added_to_cross_entropy_at_a_quarter_and_at_all_labels():
    space = find.load("space", "pdcr")
    every = {label: built(settings, space) for label, settings in space.arms().items()}
    arms = {label: plan.resolve(arm, toy_store(), toy_split()) for label, arm in every.items()}
    assert {label: len(plan.labelled_patients(arm, toy_split())) for label, arm in arms.items() if label.startswith("CE")} == {
        "CE, 25 %": 3,
        "CE, 100 %": 12,
    }
    for label, control in space.COMPARE.items():
        ours, theirs = arms[label], arms[control]
        assert [hook.name for hook in ours.hooks] == (["pdcr"] if "PDCR" in label else [])
        assert (ours.finetune.uafs is not None) == ("UAFS" in label)
        plain = {**ours.tree(), "finetune": {key: value for key, value in ours.tree()["finetune"].items() if key != "uafs"}}
        assert {key: value for key, value in plain.items() if key not in ("hooks", "unlabelled")} == theirs.tree()
        assert (ours.finetune.settings.dice, ours.pretrain) == (0, None)


def test_semi_supervised_arms_differ_from_their_control_in_hooks_alone():
    space, chains = find.load("space", "semi-supervised"), finetunings("semi-supervised")
    fed = {name for name in find.names("hook") if not find.constant("hook", name, "LABELLED_ONLY", False)}
    assert {hook for stack in space.STACKS.values() for hook in stack} == fed, "a hook is in no arm"
    for label, control in space.COMPARE.items():
        ours, theirs = chains[label].experiment, chains[control].experiment
        stack = label.partition(",")[0]
        assert {hook.name: hook.settings.weight for hook in ours.hooks} == space.STACKS[stack]
        assert all(hook.settings == find.settings("hook", hook.name)() for hook in ours.hooks), "weights are the files' own"
        tree = {key: value for key, value in ours.tree().items() if key not in ("hooks", "unlabelled")}
        assert tree == theirs.tree()
        assert (chains[label].finetunings[0].id == chains[control].finetunings[0].id) == (label == control)
    typed = config.nested({"hooks.mean_teacher.weight": 3.0})
    settings = space.arms()["supervised, 2"]
    assert not config.build(config.stack([typed, config.nested(settings)])).hooks


def test_the_short_table_has_two_draws_of_labels_and_its_arms_differ_in_hooks_alone():
    space = find.load("space", "semi-supervised-short")
    base = config.nested(space.DEFAULTS)
    built = {label: config.build(config.stack([base, config.nested(settings)])) for label, settings in space.arms().items()}
    assert len(built) == 16
    assert {experiment.data.draws for experiment in built.values()} == {2}
    for label, experiment in built.items():
        tree = {key: value for key, value in experiment.tree().items() if key not in ("hooks", "unlabelled")}
        assert tree == built[space.COMPARE[label]].tree()
        assert {hook.name for hook in experiment.hooks} == set(space.STACKS[label.partition(",")[0]])
