"""Who decides which arm comes next: Optuna asks for arms, every arm is k chains, Ray Tune runs the chains.

Ray's own `Repeater` reports only a mean and loses its groups on restore, and a killed trial stays RUNNING in an Optuna
study for ever. So the nesting is kept here, the finished stages on disk are the truth, and the study (SQLite, in the
sweep's folder, readable by optuna-dashboard) is a view of it that is put right at every start.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ray.tune.search import Searcher

if TYPE_CHECKING:
    import optuna

Kind = Literal["grid", "tpe", "gp", "random"]
Suggest = Callable[["optuna.Trial"], Mapping[str, Any]]


@dataclass
class Arm:
    """One configuration on its way through its k pretrainings."""

    label: str
    settings: Mapping[str, Any]  # dotted
    trial: "optuna.Trial | None" = None  # None: a control, which no searcher asked for
    started: int = 0
    scores: dict[int, float] = field(default_factory=dict)  # by pretraining: mean validation score of its fine-tunings
    failed: str | None = None
    stopped: bool = False  # the pruner gave up on it

    @property
    def mean(self) -> float:
        return sum(self.scores.values()) / len(self.scores) if self.scores else math.nan


def open_study(folder: Path, kind: Kind, seed: int) -> "optuna.Study":
    """The sweep's Optuna study, created or continued; trials that a kill left RUNNING are failed and asked again."""
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    grid = kind == "grid"
    study = optuna.create_study(
        study_name=folder.name,
        storage=f"sqlite:///{folder / 'study.db'}",
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.NopPruner() if grid else optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=0),
    )
    seed += len(study.get_trials(deepcopy=False))  # a continued search must not draw its first points again
    if kind == "tpe":
        study.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True)
    elif kind == "gp":
        study.sampler = optuna.samplers.GPSampler(seed=seed)
    else:  # a grid's arms are enqueued by name: nothing is drawn
        study.sampler = optuna.samplers.RandomSampler(seed=seed)
    for lost in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(lost.number, state=TrialState.FAIL)
        study.enqueue_trial(lost.params)
    return study


class NestedSearch(Searcher):
    """Hands Ray Tune one chain at a time: a pretraining of an arm, with its fine-tunings.

    grid            every arm has all its k pretrainings; repeats go round all arms before an arm has its next
    tpe, gp, random arms are asked one by one; an arm gets its next pretraining only when the last one is in, and none once
                    its running mean lies below the median of the other arms at the same count (Optuna's MedianPruner).
                    Controls are never stopped.
    """

    def __init__(
        self,
        study: "optuna.Study",
        controls: Mapping[str, Mapping[str, Any]],
        grid: Mapping[str, Mapping[str, Any]] | None,
        suggest: Suggest | None,
        *,
        k: int,
        trials: int,
        record: Callable[[Arm], None],
    ):
        super().__init__(metric="score", mode="max")
        self.study, self.grid, self.suggest_settings = study, grid, suggest
        self.k, self.trials, self.record = k, trials, record
        self.arms = {label: Arm(label, settings) for label, settings in controls.items()}
        self.running: dict[str, tuple[Arm, int]] = {}  # by Tune's trial id
        self._recall()

    def _recall(self) -> None:
        """Take up what earlier starts of this sweep asked for. Finished arms come again: their stages are look-ups."""
        from optuna.trial import TrialState

        known = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        for trial in known:
            arm = Arm(trial.user_attrs["label"], trial.user_attrs["settings"])
            if trial.state == TrialState.PRUNED:
                arm.stopped, arm.scores = (
                    True,
                    {int(index): value for index, value in trial.intermediate_values.items()},
                )
            self.arms[arm.label] = arm
        self.asked = len(known)
        waiting = [trial.system_attrs.get("fixed_params", {}) for trial in self.study.get_trials(states=(TrialState.WAITING,))]
        for label in self.grid or {}:
            if label not in self.arms and {"arm": label} not in waiting:
                self.study.enqueue_trial({"arm": label})

    @property
    def racing(self) -> bool:
        return self.grid is None

    def _ask(self) -> Arm:
        import optuna

        if self.grid is not None:
            trial = self.study.ask({"arm": optuna.distributions.CategoricalDistribution(list(self.grid))})
            label = trial.params["arm"]
            settings = self.grid[label]
        else:
            assert self.suggest_settings is not None
            trial = self.study.ask()
            settings = self.suggest_settings(trial)
            label = ", ".join(f"{key.removeprefix('pretrain.')} {_short(value)}" for key, value in settings.items())
        trial.set_user_attr("label", label)
        trial.set_user_attr("settings", dict(settings))
        self.asked += 1
        arm = self.arms.get(label) or Arm(label, settings)
        arm.trial = trial
        self.arms[label] = arm
        return arm

    def _next(self) -> Arm | None:
        wanted = len(self.grid) if self.grid is not None else self.trials
        open_arms = [arm for arm in self.arms.values() if arm.started < self.k and not arm.stopped and not arm.failed]
        if self.racing:
            ready = [arm for arm in open_arms if arm.started == len(arm.scores)]
            if ready:
                return ready[0]
            return self._ask() if self.asked < wanted else None
        while self.asked < wanted:
            open_arms.append(self._ask())
        return min(open_arms, key=lambda arm: arm.started, default=None)

    def suggest(self, trial_id: str) -> Any:
        """The next chain, a dict; None: wait for a running one; FINISHED: nothing is left."""
        arm = self._next()
        if arm is None:
            return None if self.running else Searcher.FINISHED
        index = arm.started
        arm.started += 1
        self.running[trial_id] = (arm, index)
        if index == 0:
            self.record(arm)
        return {"arm": arm.label, "index": index, "settings": dict(arm.settings)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        from optuna.trial import TrialState

        arm, index = self.running.pop(trial_id)
        if error or not result or result.get("failed"):
            arm.failed = (result or {}).get("failed") or "its worker died and retries were used up"
            if arm.trial:
                self.study.tell(arm.trial, state=TrialState.FAIL)
                arm.trial = None
            return
        arm.scores[index] = result["score"]
        if arm.trial is None:
            return
        arm.trial.report(arm.mean, step=len(arm.scores) - 1)
        if self.racing and len(arm.scores) < self.k and arm.trial.should_prune():
            arm.stopped = True
            self.study.tell(arm.trial, state=TrialState.PRUNED)
        elif len(arm.scores) == self.k:
            self.study.tell(arm.trial, arm.mean)
        else:
            return
        arm.trial = None

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study and the stages on disk hold all there is."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a sweep is continued by typing it again."""


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "[" + ", ".join(map(_short, value)) + "]" if isinstance(value, list | tuple) else str(value)
