"""Searches on real Ray Tune: lagging pretrainings are stopped, races and confirmations run, kills change nothing."""

import json
import math

import pytest
from optuna.trial import TrialState

from medssl.platform import search

SCRATCH = {"from scratch": {"pretrain": None}}


def chain(settings):
    """A stand-in for a chain: four probes of a pretraining, then two fine-tunings. The level is in the settings."""
    from pathlib import Path

    from ray import tune

    level = settings["settings"].get("level", 0.0)
    ended = Path(settings["settings"].get("folder", "/nowhere"))
    try:
        for step in (10, 20, 30, 40) if "level" in settings["settings"] else ():
            tune.report({"step": step, "probe": level * step, "score": math.nan, "failed": "", "complete": False})
        for number in (1, 2):
            noise = 0.01 * ((settings["index"] * 7 + number) % 5)
            tune.report({"score": level + noise, "failed": "", "complete": number == 2})
    finally:
        if ended.is_dir():
            name = f"{level:.4f}-{settings['index']}-{len(list(ended.iterdir()))}"
            (ended / name).touch()


def tuned(folder, suggest, trials, kind="random", **more):
    from ray import tune

    study = search.open_study(folder, kind, seed=0)
    nested = search.NestedSearch(
        study, SCRATCH, None, suggest, kind=kind, trials=trials, record=lambda arm, index: None, **{"k": 2, **more}
    )
    tune.Tuner(
        chain,
        tune_config=tune.TuneConfig(
            search_alg=nested,
            scheduler=search.Lagging(nested, grace=10),
            num_samples=-1,
            reuse_actors=True,
            max_concurrent_trials=2,
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0),
    ).fit()
    return nested


@pytest.mark.slow
def test_a_pretraining_whose_probe_lags_is_stopped_told_and_never_run_again(tmp_path, ray_local):
    ended = tmp_path / "ended"
    ended.mkdir()

    def suggest(trial):
        level = 0.9 - 0.1 * trial.number
        return {"level": trial.suggest_float("level", level, level + 1e-6), "folder": str(ended)}

    nested = tuned(tmp_path, suggest, trials=7)
    stopped = [arm for arm in nested.arms.values() if arm.stopped and "probe" in arm.stopped]
    assert stopped, "each arm is worse than the ones before it"
    assert all(len(arm.scores) < 2 and not arm.failed for arm in stopped)
    assert not all(arm.scores for arm in stopped), "some in their first pretraining"
    told = {trial.user_attrs["label"]: trial.state for trial in nested.study.trials}
    for arm in stopped:
        assert told[arm.label] == (TrialState.COMPLETE if arm.scores else TrialState.PRUNED)
    assert len(nested.arms["from scratch"].scores) == 2
    assert nested.over
    before = set(ended.iterdir())
    assert len(before) >= sum(len(arm.scores) for arm in nested.arms.values() if "level" in arm.settings) + len(stopped)
    again = tuned(tmp_path, suggest, trials=7)
    rerun = [file.name for file in set(ended.iterdir()) - before]
    assert not {float(name.split("-")[0]) for name in rerun} & {round(arm.settings["level"], 4) for arm in stopped}
    assert {arm.label for arm in stopped} <= {label for label, arm in again.arms.items() if arm.stopped}
    assert not [arm for arm in again.arms.values() if arm.failed]


@pytest.mark.slow
def test_a_search_ends_with_fresh_pretrainings_of_its_leaders(tmp_path, ray_local):
    def suggest(trial):
        return {"level": trial.suggest_float("level", 0.5, 0.9)}

    nested = tuned(tmp_path, suggest, trials=4, confirm=2)
    confirmed = {arm.label: [index for index in arm.scores if index >= search.CONFIRM] for arm in nested.arms.values()}
    assert {label for label, indices in confirmed.items() if indices} == set(nested.confirming)
    assert all(len(indices) in (0, 2) for indices in confirmed.values())
    assert "from scratch" in nested.confirming
    assert json.dumps(nested.scores(confirmed=True))
