"""Who comes next: arms, their repeats, and what a restart makes of a study that a kill left behind."""

import math
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from optuna.trial import TrialState
from ray.tune.search import Searcher

from medssl.platform import race, search, statistics, sweep
from medssl.platform.benches import racing
from medssl.platform.errors import UsageError

GRID = {"a": {"pretrain.iou": (0.0, 0.1)}, "b": {"pretrain.iou": None}, "c": {"pretrain": None}}


def opened(folder, grid=GRID, suggest=None, controls=None, k=2, trials=6, kind="grid", recorded=None, **more):
    study = search.open_study(folder, kind, seed=0)
    record = (lambda arm, index: recorded.append(arm.label)) if recorded is not None else (lambda arm, index: None)
    return search.NestedSearch(study, controls or {}, grid, suggest, kind=kind, k=k, trials=trials, record=record, **more)


def drain(nested, score, at_once=1, stop_after=math.inf):
    """Play Ray Tune: ask, run, tell, `at_once` at a time. Returns the chains in the order in which they ended."""
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
        report = {"score": math.nan, "failed": value} if failed else {"score": value, "failed": "", "complete": True}
        nested.on_trial_complete(name, report)


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


SCRATCH = {"from scratch": {"pretrain": None}}


def noisy(chain):
    """The higher end of the interval, and some noise that depends on the chain alone."""
    level = 0.1 if "pretrain" in chain["settings"] else chain["settings"]["pretrain.iou"][1]
    return level + 0.02 * random.Random(f"{chain['arm']} {chain['index']}").gauss(0, 1)


def suggest(trial):
    return {"pretrain.iou": (0.0, trial.suggest_float("high", 0.1, 1.0))}


@pytest.mark.parametrize("kind", ["random", "tpe"])
def test_a_searcher_asks_arms_one_after_another_and_stops_losing_ones(tmp_path, kind):
    nested = opened(tmp_path, grid=None, suggest=suggest, controls=SCRATCH, k=3, trials=8, kind=kind)
    chains = drain(nested, noisy)
    trials = nested.study.trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 8, "a stopped arm is told with the mean it had"
    stopped = {trial.user_attrs["label"] for trial in trials if "stopped" in trial.user_attrs}
    assert stopped, "an arm far below the best is given up"
    assert all(sum(arm == label for arm, _ in chains) < 3 for label in stopped)
    assert sum(arm == "from scratch" for arm, _ in chains) == 3, "controls are never stopped"
    best = max(nested.arms.values(), key=lambda arm: arm.mean)
    assert len(best.searched) == 3


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


LEVELS = dict(zip(racing.STUDY, racing.PUBLISHED, strict=True))
STUDY = {label: {"pretrain.seed": number} for number, label in enumerate(LEVELS)}
CONTROL = {"from scratch": STUDY["from scratch"]}


def measured(chain):
    """A score with the study's noise, the same whenever the chain is run again."""
    return LEVELS[chain["arm"]] + racing.noise() * random.Random(f"{chain['arm']} {chain['index']}").gauss(0, 1)


def raced(folder, **more):
    return opened(folder, grid=STUDY, controls=CONTROL, kind="race", k=12, confirm=3, **more)


def split(chains):
    """Chains of the search, and of the confirmation."""
    return [one for one in chains if one[1] < search.CONFIRM], [one for one in chains if one[1] >= search.CONFIRM]


@pytest.mark.parametrize("at_once", [1, 3, 9])
def test_a_race_asks_the_same_chains_however_many_run(tmp_path, at_once):
    (tmp_path / "one").mkdir()
    alone = drain(raced(tmp_path / "one"), measured)
    assert sorted(drain(raced(tmp_path), measured, at_once)) == sorted(alone)
    assert len(set(alone)) == len(alone)


def test_a_race_gives_its_repeats_to_the_leaders_and_no_more_than_half_of_the_grid(tmp_path):
    nested = raced(tmp_path)
    searched, confirmed = split(drain(nested, measured))
    repeats = {label: sum(arm == label for arm, _ in searched) for label in STUDY}
    assert min(repeats.values()) == race.FIRST
    assert repeats["[0.3, 0.6]"] == max(repeats.values()) > race.FIRST
    assert repeats["random crop"] == race.FIRST, "0.03 below the best"
    assert len(searched) + len(confirmed) <= len(STUDY) * 12 / 2
    assert nested.over


@pytest.mark.parametrize("stop_after", [1, 5, 13, 20, 29])
def test_a_race_killed_anywhere_goes_on_to_the_same_end(tmp_path, stop_after):
    (tmp_path / "whole").mkdir()
    whole = drain(raced(tmp_path / "whole"), measured)
    before = drain(raced(tmp_path), measured, at_once=2, stop_after=stop_after)
    again = raced(tmp_path)
    after = drain(again, measured)
    assert sorted(set(before) | set(after)) == sorted(whole), "nothing else is run, nothing is left out"
    assert len(set(after)) == len(after)
    assert sorted(trial.params["arm"] for trial in again.study.trials) == sorted(STUDY), "each arm is told once"


@pytest.mark.parametrize(("stop_after", "at_once"), [(2, 1), (9, 1), (17, 1), (9, 4), (17, 4)])
def test_a_killed_search_recalls_the_arms_it_asked_and_those_it_gave_up(tmp_path, stop_after, at_once):
    def sought():
        return opened(tmp_path, grid=None, suggest=suggest, controls=SCRATCH, k=3, trials=8, kind="random", confirm=2)

    first = sought()
    before = drain(first, noisy, at_once, stop_after)
    stopped = {arm.label: arm.searched for arm in first.arms.values() if arm.stopped}
    again = sought()
    after = drain(again, noisy, at_once)
    for label, scores in stopped.items():
        assert again.arms[label].stopped
        assert again.arms[label].searched == scores
        assert (label, len(scores)) not in before + after, "no further repeat"
    asked = {arm for arm, _ in before}
    assert asked <= set(again.arms)
    assert len(again.arms) == 8 + 1
    assert not again.study.get_trials(states=(TrialState.RUNNING, TrialState.WAITING))


def test_a_free_place_does_not_wait_when_no_arm_is_left_to_be_asked_for(tmp_path):
    nested = opened(tmp_path, grid=None, suggest=suggest, controls=SCRATCH, k=3, trials=2, kind="random")
    handed = [nested.suggest(f"t{number}") for number in range(9)]
    chains = [(chain["arm"], chain["index"]) for chain in handed]
    (scratch, one, other), indices = nested.arms, [index for _, index in chains]
    assert set(chains) == {(arm, index) for arm in (scratch, one, other) for index in range(3)}
    assert chains[:5] == [(scratch, 0), (one, 0), (other, 0), (scratch, 1), (scratch, 2)], "controls first: none is lost"
    assert indices[5:] == [1, 1, 2, 2], "then whoever has most before it"
    assert nested.suggest("t9") is None


def test_what_was_handed_out_ahead_counts_and_a_kill_before_it_is_in_keeps_the_arm_given_up(tmp_path):
    def sought():
        return opened(tmp_path, grid=None, suggest=suggest, controls=SCRATCH, k=4, trials=1, kind="random")

    nested = sought()
    handed = {name: nested.suggest(name) for name in map(str, range(7))}  # all of the control, three of the arm
    arm = next(label for label in nested.arms if label != "from scratch")
    first, second, last = (name for name, chain in handed.items() if chain["arm"] == arm)
    for name, chain in handed.items():
        if chain["arm"] != arm:
            nested.on_trial_complete(name, {"score": 0.8 + 0.001 * chain["index"], "complete": True})
    nested.on_trial_complete(first, {"score": 0.1, "complete": True})
    nested.on_trial_complete(second, {"score": 0.101, "complete": True})
    assert nested.arms[arm].stopped == "losing after 1 of 4 pretrainings"
    assert nested.suggest("7") is None, "no further repeat"
    assert nested.study.trials[0].state == TrialState.RUNNING, "one of its chains is"
    shutil.copy(tmp_path / "study.db", tmp_path / "at the kill")
    nested.on_trial_complete(last, {"score": 0.102, "complete": True})
    assert nested.study.trials[0].value == pytest.approx(0.101)
    assert sought().arms[arm].searched == [0.1, 0.101, 0.102]

    shutil.copy(tmp_path / "at the kill", tmp_path / "study.db")
    again = sought()
    assert (again.arms[arm].searched, again.study.trials[0].value) == ([0.1, 0.101], pytest.approx(0.1005))
    assert {arm for arm, _ in drain(again, noisy)} == {"from scratch"}


@pytest.mark.parametrize("kind", ["grid", "race", "random"])
def test_confirmation_is_fresh_and_covers_the_leaders_and_the_control(tmp_path, kind):
    given = {"grid": STUDY, "race": STUDY, "random": None}[kind]
    controls = CONTROL if given else SCRATCH
    nested = opened(tmp_path, grid=given, suggest=suggest, controls=controls, kind=kind, k=4, confirm=3)
    searched, confirmed = split(drain(nested, measured if given else noisy, at_once=2))
    leaders = [standing.arm for standing in race.standings(nested.scores())]
    expected = [*[arm for arm in leaders if arm != "from scratch"][: race.FINALISTS], "from scratch"]
    assert set(nested.confirming) == {arm for arm, _ in confirmed}
    assert sorted(confirmed) == sorted((arm, search.CONFIRM + n) for arm in expected for n in range(3))
    assert not {index for _, index in confirmed} & {index for _, index in searched}


@pytest.mark.parametrize("fallen", [False, True])
def test_a_chosen_arm_that_was_not_confirmed_is_called_so(tmp_path, fallen):
    levels = {"control": 0.1, "a": 0.5, "b": 0.6, "c": 0.7}
    grid = {label: {"pretrain.seed": number} for number, label in enumerate(levels)}
    nested = opened(tmp_path, grid=grid, controls={"control": {}}, k=2, confirm=4)

    def score(chain):
        return 0.2 if fallen and chain["index"] >= search.CONFIRM else levels[chain["arm"]] + 0.01 * chain["index"] % 0.03

    drain(nested, score)
    said = sweep._chosen(SimpleNamespace(folder=tmp_path), nested)
    assert f"chosen   {'a' if fallen else 'c'}:" in said
    assert ("not confirmed itself" in said) == fallen


def test_more_confirmation_and_a_larger_grid_keep_what_was_confirmed(tmp_path):
    first = drain(opened(tmp_path, grid=STUDY, controls=CONTROL, k=2, confirm=1), measured)
    again = drain(opened(tmp_path, grid=STUDY, controls=CONTROL, k=4, confirm=2), measured)
    assert set(split(first)[0]) < set(split(again)[0])
    assert {index for _, index in split(again)[1]} == {search.CONFIRM, search.CONFIRM + 1}


def test_the_control_is_confirmed_even_when_it_comes_last(tmp_path):
    levels = {"control": 0.1, "a": 0.5, "b": 0.6, "c": 0.7}
    grid = {label: {"pretrain.seed": number} for number, label in enumerate(levels)}

    def score(chain):
        return levels[chain["arm"]] + 0.01 * chain["index"] % 0.03

    nested = opened(tmp_path, grid=grid, controls={"control": {}}, kind="race", k=6, confirm=2)
    chains = drain(nested, score)
    assert [index for arm, index in chains if arm == "control"] == [0, 1, search.CONFIRM, search.CONFIRM + 1]
    assert not nested.arms["control"].stopped


def test_the_winner_has_the_best_posterior_mean_and_not_the_best_run():
    scores = {
        "lucky": [0.876],
        "steady": [0.865, 0.87, 0.875, 0.87, 0.865, 0.875],
        "low": [0.79, 0.87, 0.82],
        "x": [0.80, 0.87],
    }
    assert max(scores, key=lambda arm: max(scores[arm])) == "lucky"
    assert max(scores, key=lambda arm: np.mean(scores[arm])) == "lucky"
    assert race.standings(scores)[0].arm == "steady"


def test_posterior_means_are_those_of_brute_force_integration():
    means, errors = np.array([0.82, 0.85, 0.84, 0.80]), np.array([0.02, 0.03, 0.01, 0.01])
    mu, tau = np.meshgrid(np.linspace(0.6, 1.05, 901), np.linspace(1e-4, 0.2, 800), indexing="ij")
    log = sum(-0.5 * np.log(tau**2 + e**2) - 0.5 * (y - mu) ** 2 / (tau**2 + e**2) for y, e in zip(means, errors, strict=True))
    weight = np.exp(log - log.max())
    expected = [
        float((weight * (y * tau**2 + mu * e**2) / (tau**2 + e**2)).sum() / weight.sum())
        for y, e in zip(means, errors, strict=True)
    ]
    assert statistics.posterior_means(means, errors) == pytest.approx(expected, abs=3e-4)


def test_infeasible_suggestions_are_passed_over_and_told(tmp_path):
    def refuse(settings):
        if settings["pretrain.iou"][1] < 0.5:
            raise UsageError("too low for these data")

    nested = opened(tmp_path, grid=None, suggest=suggest, k=1, trials=6, kind="tpe", refuse=refuse)
    drain(nested, noisy)
    assert len(nested.arms) == 6
    assert all(arm.settings["pretrain.iou"][1] >= 0.5 for arm in nested.arms.values())
    refused = [trial for trial in nested.study.trials if "infeasible" in trial.user_attrs]
    assert refused
    assert {(trial.state, trial.user_attrs["infeasible"]) for trial in refused} == {
        (TrialState.PRUNED, "too low for these data")
    }
    again = opened(tmp_path, grid=None, suggest=suggest, k=1, trials=6, kind="tpe", refuse=refuse)
    assert len(again.arms) == 6, "they are no arms after a restart either"


def test_a_space_without_any_feasible_arm_ends_with_the_reason(tmp_path):
    def refuse(settings):
        raise UsageError("crops do not fit")

    nested = opened(tmp_path, grid=None, suggest=suggest, controls=SCRATCH, k=2, trials=3, kind="random", refuse=refuse)
    chains = drain(nested, noisy)
    assert {arm for arm, _ in chains} == {"from scratch"}
    assert "50 suggestions in a row" in nested.impossible
    assert "crops do not fit" in nested.impossible


def test_a_sampler_that_comes_back_to_an_arm_runs_nothing_twice(tmp_path):
    def two(trial):
        return {"pretrain.iou": (0.0, trial.suggest_categorical("high", [0.4, 0.8]))}

    nested = opened(tmp_path, grid=None, suggest=two, k=2, trials=7, kind="random")
    chains = drain(nested, noisy)
    assert len(chains) == len(set(chains)) <= 4
    assert not nested.study.get_trials(states=(TrialState.RUNNING,))


def test_a_chain_that_the_sweep_stopped_on_its_way_has_no_score(tmp_path):
    nested = opened(tmp_path, k=1)
    nested.suggest("t0")
    nested.on_trial_complete("t0", {"score": 0.9, "failed": "", "complete": False})
    assert not nested.arms["a"].scores
    assert not nested.study.trials
    assert not nested.over


@pytest.mark.parametrize("means", ["published means", "one clear winner"])
def test_a_race_names_the_best_arm_as_often_as_the_grid_at_half_of_its_runs(means):
    grid, race_ = racing.compare(racing.MEANS[means], repetitions=60)
    assert race_.named >= grid.named
    assert race_.used <= 0.5 * grid.used
