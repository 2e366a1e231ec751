"""Settings: stacked left to right, checked whole before anything starts, named in the error that refuses them."""

import dataclasses
import json
import typing

import pydantic
import pytest

from medssl.methods.settings import UAFS, Unlabelled
from medssl.platform import config, find
from medssl.platform.errors import UsageError


def build(**dotted):
    return config.build(config.nested({key.replace("__", "."): value for key, value in dotted.items()}))


def test_later_files_win_and_mappings_merge():
    tree = config.stack([{"pretrain": {"side": 32, "training": {"batch": 8}}}, {"pretrain": {"training": {"lr": 0.1}}}])
    assert tree == {"pretrain": {"side": 32, "training": {"batch": 8, "lr": 0.1}}}


def test_a_name_stands_for_its_section():
    assert build(pretrain="simsiam").pretrain.name == "simsiam"


def test_null_pretraining_is_from_scratch():
    assert build(pretrain=None).pretrain is None
    tree = config.stack([{"pretrain": {"side": 32}}, config.nested({"pretrain": None})])
    assert config.build(tree).pretrain is None


def test_the_tree_of_an_experiment_builds_the_same_experiment():
    experiment = build(pretrain__iou=(0.0, 0.3), pretrain__ends="(]", network__width=8, data__labelled=2)
    assert config.build(experiment.tree()) == experiment


@pytest.mark.parametrize("name", [name for name in find.names("method") if name != "segment"])
def test_an_experiment_rebuilt_from_its_run_is_hashed_as_it_was(name):
    """225 and 225.0 are one number with two hashes; a default may be spelt as the first, what was typed is the second."""
    network = {"name": find.constant("method", name, "ENCODERS", ("unet",))[0]}
    for training in ({}, {"epochs": 225}, {"epochs": 100.0}, {"epochs": 2.5, "steps": 7, "snapshots": [0.5, 3]}):
        tree = {"network": network, "pretrain": {"name": name, "training": training}, "further": {"name": name}}
        experiment = config.build(tree)
        said = json.loads(json.dumps(experiment.tree()))
        assert config.digest(config.rebuilt(said).tree()) == config.digest(experiment.tree())
        assert config.rebuilt(said) == experiment


def settings_classes():
    kinds = [("method", "Config"), ("method", "Training"), ("network", "Config"), ("hook", "Config")]
    yield from (find.settings(kind, name, which) for kind, which in kinds for name in find.names(kind))
    yield from (config.Data, config.Start, config.Evaluate, config.Resources, Unlabelled, UAFS)


def test_no_default_but_the_epochs_is_spelt_otherwise_than_the_same_value_typed():
    """`epochs` was, before anyone saw that ids follow the spelling; `config.rebuilt` is for it."""
    spelt_otherwise = set()
    for cls in settings_classes():
        hints = typing.get_type_hints(cls, include_extras=True)
        for entry in dataclasses.fields(cls):
            typed = pydantic.TypeAdapter(hints[entry.name]).validate_python(entry.default)
            if repr(typed) != repr(entry.default):
                spelt_otherwise.add(entry.name)
    assert spelt_otherwise == {"epochs"}


def test_defaults_are_those_of_the_files_themselves():
    experiment = config.build({})
    module = find.load("method", "simsiam")
    assert dataclasses.asdict(experiment.pretrain.settings) == dataclasses.asdict(module.Config())
    assert dataclasses.asdict(experiment.pretrain.training) == dataclasses.asdict(module.Training())


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"pretrian": {}}, r'unknown section "pretrian"; did you mean pretrain\?'),
        ({"pretrain": {"name": "simsaim"}}, r'no method "simsaim" in methods/; did you mean simsiam\?'),
        ({"network": {"name": "unit"}}, r'no network "unit".*did you mean unet\?'),
        ({"pretrain": {"name": "simsiam", "iuo": [0, 1]}}, r'unknown key "pretrain.iuo"; did you mean iou\?'),
        ({"pretrain": {"training": {"stepps": 3}}}, r'unknown key "pretrain.training.stepps"; did you mean steps\?'),
        ({"network": {"training": {}}}, r'unknown key "network.training"'),
        ({"pretrain": {"training": {"lr": "fast"}}}, r"pretrain.training.lr: .*valid number.*'fast'"),
        ({"pretrain": {"training": {"lr": -1}}}, r"pretrain.training: lr is -1.* more than 0"),
        ({"pretrain": {"iou": [0.6, 0.3]}}, r"pretrain: iou is \[0.6, 0.3\]: expected 0 <= low <= high <= 1"),
        ({"pretrain": {"iou": [0.3, 0.3], "ends": "(]"}}, r"not empty"),
        ({"pretrain": {"flip_p": 1.5}}, r"flip_p is 1.5: a probability"),
        ({"data": {"labelled": 0}}, r"data: labelled is 0"),
        ({"data": {"stream": "disk"}}, r"data.stream: .*'auto', 'node' or 'ray'"),
        ({"evaluate": {"overlap": 1}}, r"evaluate: overlap is 1"),
        ({"resources": {"workers": 0}}, r"resources: workers"),
        ({"seed": "one"}, r"seed: expected a whole number"),
        ({"pretrain": 3}, r"pretrain: expected a mapping with a name"),
        ({"finetune": {"training": 3}}, r"finetune.training: expected a mapping"),
        ({"hooks": {"mean_taecher": {}}}, r'no hook "mean_taecher" in methods/hooks/; .*did you mean mean_teacher\?'),
        ({"hooks": {"mean-teacher": {"wieght": 1}}}, r'unknown key "hooks.mean_teacher.wieght"; did you mean weight\?'),
        ({"hooks": {"consistency": {"weight": -1}}}, r"hooks.consistency: weight is -1"),
        ({"hooks": {"consistency": {"distance": "l1"}}}, r"hooks.consistency.distance: .*'mse' or 'kl'"),
        ({"hooks": {"consistency": 3}}, r"hooks.consistency: expected a mapping"),
        ({"hooks": 3}, r"hooks: expected names with their settings"),
        ({"hook": {"consistency": {}}}, r'unknown section "hook"; did you mean hooks\?'),
        ({"hooks": ["mean-teacher", "uncertainty-mean-teacher"]}, r"each bring the network that predicts; choose one"),
        ({"pretrain": "segment"}, r"pretrain.name=segment learns from labels.*use `medssl finetune`"),
        ({"unlabelled": {"batch": 0}}, r"unlabelled: batch is 0"),
        ({"unlabelled": {"bacth": 1}}, r'unknown key "unlabelled.bacth"; did you mean batch\?'),
    ],
)
def test_what_is_wrong_is_named_with_what_was_expected(tree, message):
    with pytest.raises(UsageError, match=message):
        config.build(tree)


def test_a_method_with_encoders_of_its_own_is_refused_on_other_networks_with_the_remedy():
    with pytest.raises(
        UsageError, match=r"pretrain.name=ibot .* network.name=unet, only that of unetr; add -o network.name=unetr$"
    ):
        build(pretrain="ibot")
    assert build(pretrain="ibot", network="unetr").network.name == "unetr"
    assert build(pretrain="dino").network.name == "unet"


def test_an_override_is_a_dotted_name_and_a_yaml_value():
    assert config.override("pretrain.iou=[0.1, 0.2]") == ("pretrain.iou", [0.1, 0.2])
    assert config.override("pretrain=null") == ("pretrain", None)
    with pytest.raises(UsageError, match="expected key=value"):
        config.override("pretrain.iou")


def test_a_settings_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        config.read(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(UsageError, match="expected a mapping of sections, found list"):
        config.read(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(UsageError, match="not a YAML file"):
        config.read(tmp_path / "broken.yaml")


def test_a_digest_follows_content_alone():
    assert config.digest({"a": 1, "b": (1, 2)}) == config.digest({"b": [1, 2], "a": 1})
    assert config.digest({"a": 1}) != config.digest({"a": 2})


def test_a_data_sets_defaults_lie_under_what_is_typed_and_apply_where_the_method_has_them():
    defaults = {"pretrain.d": 8, "pretrain.bottleneck": 4, "pretrain.training.steps": 3, "data.labelled": 2}
    experiment = config.build(config.suited(defaults, config.nested({"pretrain.d": 16})))
    assert (experiment.pretrain.settings.d, experiment.pretrain.settings.bottleneck) == (16, 4)
    other = config.build(config.suited(defaults, config.nested({"pretrain.name": "byol"})))
    assert (other.pretrain.name, other.pretrain.settings.d, other.pretrain.training.steps) == ("byol", 8, 3)
    assert config.build(config.suited(defaults, {"pretrain": None})).data.labelled == 2
    with pytest.raises(UsageError, match="unknown key"):
        config.build(config.suited(defaults, config.nested({"pretrain.name": "byol", "pretrain.bottleneck": 2})))


def test_hooks_are_stacked_by_name_however_they_are_typed():
    tree = config.stack(
        [
            {"hooks": ["consistency", "mean-teacher"]},
            {"hooks": {"mean_teacher": {"weight": 5}}},
            config.nested({"hooks.mean-teacher.momentum": 0.9, "unlabelled.batch": 4}),
        ]
    )
    experiment = config.build(tree)
    assert [hook.name for hook in experiment.hooks] == ["consistency", "mean_teacher"]
    teacher = experiment.hooks[1].settings
    assert (teacher.weight, teacher.momentum, experiment.unlabelled.batch) == (5, 0.9, 4)
    assert config.build(experiment.tree()) == experiment


def test_null_switches_a_hook_off_and_without_hooks_nothing_is_said_of_them():
    off = build(hooks__consistency=None, unlabelled__batch=3)
    assert off == build(hooks=None) == build()
    assert not off.tree().keys() & {"hooks", "unlabelled"}


def layered(tmp_path, **files):
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return config.stack(config.read(tmp_path / f"{name}.yaml") for name in files)


def test_files_stack_and_overrides_set_add_and_take_out_in_their_order(tmp_path):
    tree = layered(
        tmp_path,
        base="{data: {labelled: 2}, finetune: {crops: 1}}",
        mt="{hooks: {mean-teacher: {weight: 5, momentum: 0.9}}, data: {labelled: 4}}",
    )
    typed = ["finetune.crops=3", "+hook.mean-teacher.ramp=linear", "~hooks.mean_teacher.momentum", "pretrain=null"]
    experiment = config.build(config.overridden(tree, [*typed, "+hook.infonce.layer=decoder"]))
    infonce, teacher = experiment.hooks
    assert (experiment.data.labelled, experiment.finetune.settings.crops) == (4, 3)
    assert (teacher.settings.weight, teacher.settings.momentum, teacher.settings.ramp) == (5, 0.99, "linear")
    assert (infonce.name, infonce.settings.layer) == ("infonce", "decoder")
    assert tree["hooks"]["mean_teacher"]["momentum"] == 0.9, "the tree itself stays"
    assert [hook.name for hook in config.build(config.overridden(tree, ["~hook.mean-teacher"])).hooks] == []


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("+data.labelled=3", r"data.labelled is set already; leave out the \+"),
        ("~data.labeled", r"no labeled to take out; did you mean labelled\?"),
        ("~hooks.mean_teacher", r"no hooks to take out"),
        ("~data.labelled.more", r"no more to take out; nothing is set there"),
        ("+data.labelled", "expected key=value"),
    ],
)
def test_adding_what_is_there_and_taking_out_what_is_not_are_refused(typed, message):
    with pytest.raises(UsageError, match=message):
        config.overridden({"data": {"labelled": 2}}, [typed])


def test_an_unknown_key_is_refused_however_it_is_set():
    for mark in ("", "+"):
        with pytest.raises(UsageError, match=r'unknown key "hooks.mean_teacher.wieght"; did you mean weight\?'):
            config.build(config.overridden({}, [f"{mark}hook.mean-teacher.wieght=1"]))
