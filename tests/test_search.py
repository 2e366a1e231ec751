"""Who comes next: arms, their repeats, and what a restart makes of a study that a kill left behind."""

import math

import pytest
from optuna.trial import TrialState
from ray.tune.search import Searcher

from medssl.platform import search

GRID = {"a": {"pretrain.iou": (0.0, 0.1)}, "b": {"pretrain.iou": None}, "c": {"pretrain": None}}


def opened(folder, grid=GRID, suggest=None, controls=None, k=2, trials=6, kind="grid", recorded=None):
    study = search.open_study(folder, kind, seed=0)
    record = (lambda arm: recorded.append(arm.label)) if recorded is not None else (lambda arm: None)
    return search.NestedSearch(study, controls or {}, grid, suggest, k=k, trials=trials, record=record)


def drain(nested, score, at_once=1, stop_after=math.inf):
    """Play Ray Tune: ask, run, tell, `at_once` at a time. Returns the chains in the order in which they were handed out."""
    done, running = [], []
    while True:
        handed = nested.suggest(f"t{len(done) + len(running)}") if len(running) < at_once else None
        if isinstance(handed, dict):
            running.append((f"t{len(done) + len(running)}", handed))
            continue
        if handed == Searcher.FINISHED or len(done) >= stop_after:
            return done
        name, chain = running.pop(0)
        value = score(chain)
        done.append((chain["arm"], chain["index"]))
        failed = isinstance(value, str)
        nested.on_trial_complete(name, {"score": math.nan, "failed": value} if failed else {"score": value, "failed": ""})


def test_a_grid_goes_round_all_arms_before_any_repeats(tmp_path):
    recorded = []
    chains = drain(opened(tmp_path, recorded=recorded), lambda chain: 0.5)
    assert chains == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1), ("c", 1)]
    assert set(recorded) == set(GRID)


@pytest.mark.parametrize("at_once", [1, 2, 4, 9])
def test_every_chain_is_handed_out_once_however_many_run(tmp_path, at_once):
    chains = drain(opened(tmp_path, k=3), lambda chain: 0.5, at_once)
    assert sorted(chains) == sorted((arm, index) for arm in GRID for index in range(3))


def test_the_study_holds_the_mean_over_pretrainings(tmp_path):
    nested = opened(tmp_path)
    drain(nested, lambda chain: {"a": 0.2, "b": 0.4, "c": 0.6}[chain["arm"]] + 0.1 * chain["index"])
    values = {trial.params["arm"]: trial.value for trial in nested.study.trials}
    assert values == pytest.approx({"a": 0.25, "b": 0.45, "c": 0.65})


def test_a_failed_arm_gets_no_further_repeat_and_keeps_its_reason(tmp_path):
    nested = opened(tmp_path)
    chains = drain(nested, lambda chain: "diverged" if chain["arm"] == "b" else 0.5)
    assert ("b", 1) not in chains
    assert nested.arms["b"].failed == "diverged"
    assert {trial.params["arm"]: trial.state for trial in nested.study.trials}["b"] == TrialState.FAIL


def test_a_restart_hands_out_all_that_is_known_and_all_that_is_missing(tmp_path):
    drain(opened(tmp_path), lambda chain: 0.5, at_once=2, stop_after=3)  # as a kill would: trials stay RUNNING
    again = opened(tmp_path)
    assert not again.study.get_trials(states=(TrialState.RUNNING,))
    assert sorted(drain(again, lambda chain: 0.5)) == sorted((arm, index) for arm in GRID for index in range(2))
    complete = [trial.params["arm"] for trial in again.study.get_trials(states=(TrialState.COMPLETE,))]
    assert sorted(complete) == sorted(GRID), "each arm is told once"


def test_more_pretrainings_extend_a_finished_study(tmp_path):
    drain(opened(tmp_path, k=1), lambda chain: 0.5)
    assert ("a", 2) in drain(opened(tmp_path, k=3), lambda chain: 0.5)


def suggest(trial):
    return {"pretrain.iou": (0.0, trial.suggest_float("high", 0.1, 1.0))}


@pytest.mark.parametrize("kind", ["random", "tpe"])
def test_a_searcher_asks_arms_one_after_another_and_stops_losing_ones(tmp_path, kind):
    controls = {"from scratch": {"pretrain": None}}
    nested = opened(tmp_path, grid=None, suggest=suggest, controls=controls, k=3, trials=8, kind=kind)
    chains = drain(
        nested, lambda chain: 0.1 if chain["settings"].get("pretrain", 1) is None else chain["settings"]["pretrain.iou"][1]
    )
    states = [trial.state for trial in nested.study.trials]
    assert len(states) == 8
    assert TrialState.PRUNED in states, "an arm below the median after a pretraining is given up"
    assert sum(arm == "from scratch" for arm, _ in chains) == 3, "controls are never stopped"
    pruned = [trial for trial in nested.study.trials if trial.state == TrialState.PRUNED]
    assert all(sum(arm == trial.user_attrs["label"] for arm, _ in chains) < 3 for trial in pruned)


def test_a_restarted_searcher_does_not_repeat_its_first_draws(tmp_path):
    drain(opened(tmp_path, grid=None, suggest=suggest, k=1, trials=3, kind="random"), lambda chain: 0.5)
    nested = opened(tmp_path, grid=None, suggest=suggest, k=1, trials=6, kind="random")
    drain(nested, lambda chain: 0.5)
    highs = [trial.params["high"] for trial in nested.study.trials]
    assert len(set(highs)) == 6


def test_a_gaussian_process_finds_the_better_half(tmp_path):
    nested = opened(tmp_path, grid=None, suggest=suggest, k=1, trials=14, kind="gp")
    drain(nested, lambda chain: -((chain["settings"]["pretrain.iou"][1] - 0.8) ** 2))
    assert abs(nested.study.best_params["high"] - 0.8) < 0.1
