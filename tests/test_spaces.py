"""What must hold of every search space, present and future."""

import inspect

import optuna
import pytest

from medssl.platform import config, find

SPACES = find.names("space")


def built(settings) -> config.Experiment:
    return config.build(config.nested(settings))


@pytest.mark.parametrize("name", SPACES)
def test_a_space_asks_a_question_and_carries_its_control(name):
    space = find.load("space", name)
    assert space.QUESTION.endswith("?")
    assert space.CONTROL in space.arms()
    assert find.summary("space", name)


@pytest.mark.parametrize("name", SPACES)
def test_every_arm_is_a_configuration_of_its_own(name):
    trees = [built(settings).tree() for settings in find.load("space", name).arms().values()]
    assert len({config.digest(tree) for tree in trees}) == len(trees)


@pytest.mark.parametrize("name", [name for name in SPACES if hasattr(find.load("space", name), "suggest")])
def test_whatever_a_searcher_suggests_is_a_configuration(name):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(100):
        built(find.load("space", name).suggest(study.ask()))


def test_the_iou_arms_are_those_of_the_study():
    arms = {label: built(settings).pretrain for label, settings in find.load("space", "iou-interval").arms().items()}
    assert arms.pop("from scratch") is None
    intervals = {label: (part.settings.iou, part.settings.ends, part.settings.crop) for label, part in arms.items()}
    assert intervals == {
        "random crop": (None, "[]", "fixed"),
        "[0, 0]": ((0, 0), "[]", "fixed"),
        "(0, 0.3]": ((0, 0.3), "(]", "fixed"),
        "[0.3, 0.6]": ((0.3, 0.6), "[]", "fixed"),
        "[0.6, 1]": ((0.6, 1), "[]", "fixed"),
    }


def test_every_pretraining_method_that_takes_any_encoder_is_an_arm_of_the_methods():
    modules = {name: find.load("method", name) for name in find.names("method")}
    around_an_encoder = {name for name, module in modules.items() if "encoder" in inspect.signature(module.METHOD).parameters}
    anywhere = {name for name in around_an_encoder if not hasattr(modules[name], "ENCODERS")}
    arms = {label: built(settings).pretrain for label, settings in find.load("space", "methods").arms().items()}
    assert arms.pop("from scratch") is None
    assert {part.name for part in arms.values()} == anywhere


def test_the_default_weights_are_an_arm_of_their_space():
    vicreg = built(find.load("space", "loss-weights").arms()["25 : 25 : 1"])
    assert vicreg.pretrain == built({"pretrain.name": "vicreg"}).pretrain
    segmentation = find.load("space", "segmentation-weights")
    assert built(segmentation.arms()[segmentation.CONTROL]).finetune == built({}).finetune
