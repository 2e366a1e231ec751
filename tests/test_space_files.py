"""Spaces of one's own: the W&B sweep schema, and Optuna's define-by-run functions."""

import optuna
import pytest

from medssl.platform import config
from medssl.platform.errors import UsageError
from medssl.platform.spaces import load_space

GRID = """
method: grid
metric: {name: dice, goal: maximize}
parameters:
  pretrain.training.lr: {values: [0.1, 0.03]}
  pretrain:
    parameters:
      iou: {values: [[0.0, 0.3], [0.3, 0.6]]}
      side: {value: 32}
"""
RANGES = """
method: bayes
name: How fast?
parameters:
  pretrain.training.lr: {min: 0.001, max: 0.1, distribution: log_uniform_values}
  pretrain.training.steps: {min: 10, max: 20}
  pretrain.d: {min: 16, max: 64, q: 16, distribution: q_uniform}
  pretrain.iou: {values: [[0.0, 0.3], null]}
"""


def space(folder, text, name="mine.yaml"):
    (folder / name).write_text(text)
    return load_space(str(folder / name))


def test_a_grid_has_every_combination_and_the_control(tmp_path):
    found = space(tmp_path, GRID)
    arms = found.arms()
    assert found.CONTROL == "from scratch"
    assert "from scratch, was added" in found.QUESTION
    assert arms.pop("from scratch") == {"start.weights": None, "pretrain": None}
    varied = {(settings["pretrain.training.lr"], tuple(settings["pretrain.iou"])) for settings in arms.values()}
    assert varied == {(lr, iou) for lr in (0.1, 0.03) for iou in ((0.0, 0.3), (0.3, 0.6))}
    assert {settings["pretrain.side"] for settings in arms.values()} == {32}
    for settings in arms.values():
        config.build(config.nested(settings))


def test_a_control_of_ones_own_may_be_one_of_the_arms(tmp_path):
    control = "control: {pretrain.training.lr: 0.1, pretrain.iou: [0.3, 0.6], pretrain.side: 32}\n"
    found = space(tmp_path, GRID + control)
    assert len(found.arms()) == 4
    assert "added" not in found.QUESTION
    assert "0.1" in found.CONTROL


def test_whatever_is_drawn_from_ranges_lies_in_them(tmp_path):
    found = space(tmp_path, RANGES)
    assert found.SEARCH == "gp"
    assert list(found.arms()) == ["from scratch"]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [found.suggest(study.ask()) for _ in range(60)]
    assert all(0.001 <= one["pretrain.training.lr"] <= 0.1 for one in drawn)
    assert sum(one["pretrain.training.lr"] < 0.01 for one in drawn) in range(15, 46), "uniform in the logarithm: half below"
    assert {one["pretrain.training.steps"] for one in drawn} == set(range(10, 21))
    assert {one["pretrain.d"] for one in drawn} == {16, 32, 48, 64}
    assert {str(one["pretrain.iou"]) for one in drawn} == {"[0.0, 0.3]", "None"}
    for settings in drawn:
        config.build(config.nested(settings))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("method: grid", "methd: grid", r'unknown key "methd"; did you mean method\?'),
        ("method: grid", "method: grit", r"method 'grit'; did you mean grid\?"),
        ("method: grid", "method: grid\nearly_terminate: {type: hyperband}", "`early_terminate` is not taken: losing arms"),
        ("method: grid", "method: grid\nrun_cap: 3", "--trials bounds the arms"),
        ("name: dice", "name: dise", r"metric.name 'dise'; did you mean dice\?"),
        ("goal: maximize", "goal: minimize", "Dice is better when higher"),
        ("values: [0.1, 0.03]", "vals: [0.1, 0.03]", r'lr: unknown key "vals"; did you mean value'),
        ("values: [0.1, 0.03]", "min: 0.1", "lr: uniform takes min, max, got min"),
        ("values: [0.1, 0.03]", "min: 0.2, max: 0.1", "min lies below max"),
        ("values: [0.1, 0.03]", "min: 1e-3, max: 0.1", "write 1.0e-3"),
        ("values: [0.1, 0.03]", "min: 0.1, max: 0.2", "method grid needs values of pretrain.training.lr"),
        ("values: [0.1, 0.03]", "distribution: normal, mu: 0", 'unknown key "mu"'),
        ("values: [0.1, 0.03]", "values: []", "expected a list with at least one"),
        ("parameters:\n  pretrain.t", "control: scratch\nparameters:\n  pretrain.t", "control: expected a mapping"),
    ],
)
def test_what_a_sweep_cannot_mean_is_refused_in_a_sentence(tmp_path, old, new, message):
    assert old in GRID
    with pytest.raises(UsageError, match=message):
        space(tmp_path, GRID.replace(old, new, 1))


@pytest.mark.parametrize("text", ["method: grid\n", "method: grid\nparameters: {}\n", "[]\n", "a: [\n"])
def test_a_space_without_an_arm_is_refused(tmp_path, text):
    with pytest.raises(UsageError, match=r"mine\.yaml"):
        space(tmp_path, text)


def test_a_parameter_must_vary(tmp_path):
    with pytest.raises(UsageError, match="no parameter varies"):
        space(tmp_path, "method: random\nparameters: {pretrain.side: {value: 32}}\n")


def test_a_define_by_run_function_is_a_space(tmp_path):
    found = space(tmp_path, "def suggest(trial):\n    return {'pretrain.side': trial.suggest_int('side', 16, 32)}\n", "mine.py")
    assert (found.SEARCH, found.CONTROL) == ("tpe", "from scratch")
    assert found.arms() == {"from scratch": {"start.weights": None, "pretrain": None}}


def test_a_python_file_without_arms_is_refused(tmp_path):
    with pytest.raises(UsageError, match="gives no arm"):
        space(tmp_path, "QUESTION = 'x?'\nCONTROL = 'a'\ndef arms():\n    return {}\n", "mine.py")
