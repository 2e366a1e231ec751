"""Who decides which chain comes next: arms, their repeats, and what a restart makes of them. Ray Tune runs the chains.

    grid            every arm has all its k pretrainings; repeats go round all arms before an arm has its next
    race            repeats go to the arms that may still be the best, for at most half of the grid (race.py)
    tpe, gp, random Optuna asks for arms one by one; an arm gets its next pretraining when the last one is in, and none once it
                    is losing (race.losing). Controls have all k. Once no arm is left to be asked for, a free place does not
                    wait: it takes the next pretraining of a control, or else of the arm that has most of them before it. If
                    such an arm turns out to be losing, what was handed out ahead is what is lost; it is finished and counts.

Then the leading arms and the controls are confirmed, if that was asked for, on fresh pretrainings: indices from `CONFIRM` on,
which no search uses however it grows.

What Optuna is told is an arm's mean over its pretrainings: a trial of Optuna 5 has no place for a standard error.
GPSampler fits one noise variance to all trials (`deterministic_objective=False`), and TPE ranks. An arm that was stopped is
told as complete with the mean it had, because GPSampler learns from complete trials alone; an infeasible one as pruned, which
keeps TPE away from it.

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

from ray.tune.schedulers import MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from medssl.platform import race
from medssl.platform.errors import UsageError

if TYPE_CHECKING:
    import optuna

Kind = Literal["grid", "race", "tpe", "gp", "random"]
Settings = Mapping[str, Any]  # dotted
Suggest = Callable[["optuna.Trial"], Settings]

CONFIRM = 500  # the first index of the pretrainings that only confirm
NEVER = 2**62  # steps: a pretraining without rivals to be compared with goes on, and is not paused for others
INFEASIBLE = 50  # suggestions in a row that cannot be built, after which the search ends


@dataclass
class Arm:
    """One configuration on its way through its pretrainings."""

    label: str
    settings: Settings
    trial: "optuna.Trial | None" = None  # None: a control or an arm of a grid, which no sampler asked for
    started: int = 0  # pretrainings of the search
    scores: dict[int, float] = field(default_factory=dict)  # by pretraining: mean validation score of its fine-tunings
    failed: str | None = None
    stopped: str | None = None  # why it was given up

    @property
    def searched(self) -> list[float]:
        """Scores of the search, in order of pretraining."""
        return [score for index, score in sorted(self.scores.items()) if index < CONFIRM]

    @property
    def mean(self) -> float:
        return sum(self.searched) / len(self.searched) if self.searched else math.nan


def open_study(folder: Path, kind: Kind, seed: int) -> "optuna.Study":
    """The sweep's Optuna study, created or continued.

    Of the trials that a kill left RUNNING, those given up are told with what they had; the others fail and are asked again.
    """
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    study = optuna.create_study(
        study_name=folder.name, storage=f"sqlite:///{folder / 'study.db'}", direction="maximize", load_if_exists=True
    )
    seed += len(study.get_trials(deepcopy=False))  # a continued search must not draw its first points again
    if kind == "tpe":
        study.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True)
    elif kind == "gp":
        study.sampler = optuna.samplers.GPSampler(seed=seed, deterministic_objective=False)
    else:  # the arms of a grid and of a race are given: nothing is drawn
        study.sampler = optuna.samplers.RandomSampler(seed=seed)
    for lost in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if "stopped" in lost.user_attrs:  # what it still ran was handed out ahead, and is left where it is
            scores = lost.user_attrs["scores"].values()
            study.tell(lost.number, sum(scores) / len(scores) if scores else None, None if scores else TrialState.PRUNED)
            continue
        study.tell(lost.number, state=TrialState.FAIL)
        study.enqueue_trial(lost.params)
    return study


class NestedSearch(Searcher):
    """Hands Ray Tune one chain at a time: a pretraining of an arm, with its fine-tunings.

    controls    labels and settings of the arms that others are compared with; never stopped, always confirmed
    grid        all arms, controls included; None: `suggest` makes them from trials
    record      hears of every chain before it is handed out
    refuse      raises UsageError for settings that cannot be built on these data: such a suggestion is passed over
    """

    def __init__(
        self,
        study: "optuna.Study",
        controls: Mapping[str, Settings],
        grid: Mapping[str, Settings] | None,
        suggest: Suggest | None,
        *,
        kind: Kind,
        k: int,
        trials: int,
        record: Callable[[Arm, int], None],
        confirm: int = 0,
        refuse: Callable[[Settings], object] = lambda settings: None,
    ):
        super().__init__(metric="score", mode="max")
        self.study, self.kind, self.grid, self.suggest_settings = study, kind, grid, suggest
        self.controls, self.k, self.trials, self.confirm = tuple(controls), k, trials, confirm
        self.record, self.refuse = record, refuse
        self.arms = {label: Arm(label, settings) for label, settings in (grid or controls).items()}
        self.running: dict[str, tuple[Arm, int]] = {}  # by Tune's trial id
        self.queue: list[tuple[Arm, int]] = []  # the rest of a race's round, or of the confirmation
        self.confirming: list[str] | None = None  # the finalists; None: the search goes on
        self.impossible: str | None = None  # why the search ended before it had its arms
        self._recall()

    def _recall(self) -> None:
        """Take up what earlier starts of this sweep asked for. Finished arms come again: their stages are look-ups."""
        from optuna.trial import TrialState

        known = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        known = [trial for trial in known if "infeasible" not in trial.user_attrs]
        self.told = {trial.user_attrs["label"] for trial in known}
        self.asked = len(known)
        for trial in known:
            label, stopped = trial.user_attrs["label"], trial.user_attrs.get("stopped")
            if self.grid is None or stopped:
                self.arms[label] = Arm(label, trial.user_attrs["settings"], stopped=stopped)
            if stopped:
                self.arms[label].scores = {int(index): score for index, score in trial.user_attrs["scores"].items()}

    @property
    def over(self) -> bool:
        """Whether nothing is left to do, as opposed to having been stopped."""
        return self.confirming is not None and not self.queue and not self.running

    def scores(self, confirmed: bool = False) -> dict[str, list[float]]:
        """Of every arm that is in the running: its scores in the search, or with those of the confirmation."""
        alive = [arm for arm in self.arms.values() if not (arm.failed or (arm.stopped and not arm.scores))]
        return {arm.label: [arm.scores[index] for index in sorted(arm.scores)] if confirmed else arm.searched for arm in alive}

    def suggest(self, trial_id: str) -> Any:
        """The next chain, a dict; None: wait for a running one; FINISHED: nothing is left."""
        chain = self._next()
        if chain is None:
            return None if self.running else Searcher.FINISHED
        arm, index = chain
        self.running[trial_id] = chain
        self.record(arm, index)
        return {"arm": arm.label, "index": index, "settings": dict(arm.settings)}

    def _next(self) -> tuple[Arm, int] | None:
        while not self.queue and self.confirming is None:
            arm = self._next_arm()
            if arm:
                arm.started += 1
                return arm, arm.started - 1
            if self.queue or self.running:
                break
            self._conclude()
        while self.queue:
            arm, index = self.queue.pop(0)
            if not arm.failed:
                return arm, index
        return None

    def _next_arm(self) -> Arm | None:
        """The arm that the search repeats next; None: it must wait, has filled the queue, or is over."""
        if self.kind == "race":
            if not self.running:
                self._fill()
            return None
        open_arms = [arm for arm in self.arms.values() if arm.started < self.k and not arm.stopped and not arm.failed]
        if self.kind == "grid":
            return min(open_arms, key=lambda arm: arm.started, default=None)
        ready = [arm for arm in open_arms if arm.started == len(arm.searched)]
        if ready:
            return ready[0]
        if self.asked < self.trials and not self.impossible and (new := self._ask()):
            return new
        # places would stand empty; longest first, those that are never given up before those that still may be
        return min(open_arms, key=lambda arm: (arm.trial is not None, arm.started), default=None)

    def _fill(self) -> None:
        """Put the next round of a race into the queue: decided when the last one is in, whatever its order was."""
        scores = {label: seen for label, seen in self.scores().items() if not self.arms[label].stopped}
        if not scores:
            return
        for label in race.Race(self.controls, self.k, self.confirm).round(scores):
            self.queue.append((self.arms[label], len(scores[label])))

    def _conclude(self) -> None:
        """The search is over: tell the study what it was not told yet, and queue the confirmation of the leading arms."""
        for arm in self.arms.values():
            self._tell_given(arm)
        scores = {label: seen for label, seen in self.scores().items() if seen}
        self.confirming = race.finalists(scores, self.controls) if self.confirm else []
        fresh = range(CONFIRM, CONFIRM + self.confirm)
        self.queue = [(self.arms[label], index) for index in fresh for label in self.confirming]

    def _ask(self) -> Arm | None:
        """A new arm from the sampler; infeasible suggestions are told as such and passed over."""
        import optuna
        from optuna.trial import TrialState

        assert self.suggest_settings is not None
        why = ""
        for _ in range(INFEASIBLE):
            trial = self.study.ask()
            try:
                settings = self.suggest_settings(trial)
                self.refuse(settings)
            except (UsageError, ValueError, optuna.TrialPruned) as error:
                why = str(error) or "the space gave it up"
                trial.set_user_attr("infeasible", why)
                self.study.tell(trial, state=TrialState.PRUNED)
                continue
            return self._enter(trial, settings)
        self.impossible = f"{INFEASIBLE} suggestions in a row cannot be built on these data, the last one because {why}"
        return None

    def _enter(self, trial: "optuna.Trial", settings: Settings) -> Arm | None:
        label = describe(settings)
        twins = [arm for arm in self.arms.values() if arm.label.split(" · ")[0] == label]
        same = next((arm for arm in twins if dict(arm.settings) == dict(settings)), None)
        trial.set_user_attr("label", label := same.label if same else f"{label} · {len(twins) + 1}" if twins else label)
        trial.set_user_attr("settings", dict(settings))
        self.asked += 1
        if same:  # the sampler came back to an arm: it has its repeats, and nothing is run twice
            self._tell(trial, same)
            return self._next_arm()
        self.arms[label] = Arm(label, settings, trial)
        return self.arms[label]

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        arm, index = self.running.pop(trial_id)
        result = result or {}
        if error or result.get("failed"):
            arm.failed = result.get("failed") or "its worker died and retries were used up"
        elif not result.get("complete"):  # stopped on the way: by `Lagging`, or with the sweep, which then goes on next time
            pass
        else:
            arm.scores[index] = result["score"]
        if index >= CONFIRM:
            return
        repeats = len(arm.searched)
        undecided = arm.trial and not arm.stopped and result.get("complete") and arm.started < self.k
        if undecided and race.losing(self.scores(), arm.label):
            arm.stopped = f"losing after {repeats} of {self.k} pretrainings"
        if arm.trial and (arm.failed or arm.stopped or repeats == self.k):
            if any(other is arm for other, _ in self.running.values()):  # handed out ahead: those count, too
                _keep(arm.trial, arm)
                return
            self._tell(arm.trial, arm)
            arm.trial = None
        elif arm.failed or arm.stopped or (self.kind == "grid" and len(arm.searched) == self.k):
            self._tell_given(arm)

    def lagged(self, label: str, step: int, probe: float) -> None:
        """The probe of an arm's pretraining lags behind the others': the arm is given up."""
        self.arms[label].stopped = f"its probe was {probe:.3f} after {step} steps, below the median of the others"

    def _tell(self, trial: "optuna.Trial", arm: Arm) -> None:
        from optuna.trial import TrialState

        _keep(trial, arm)
        if arm.failed:
            self.study.tell(trial, state=TrialState.FAIL)
            return
        for index, score in enumerate(arm.searched):
            trial.report(score, step=index)
        if arm.searched:
            self.study.tell(trial, arm.mean)
        else:
            self.study.tell(trial, state=TrialState.PRUNED)

    def _tell_given(self, arm: Arm) -> None:
        """Enter an arm of a grid or race, which no sampler asked for, into the study: one write, once."""
        from optuna.distributions import CategoricalDistribution
        from optuna.trial import TrialState, create_trial

        if self.grid is None or arm.label in self.told or not (arm.searched or arm.failed or arm.stopped):
            return
        self.told.add(arm.label)
        attributes: dict[str, Any] = {"label": arm.label, "settings": dict(arm.settings), "scores": _keyed(arm)}
        attributes |= {name: why for name, why in (("failed", arm.failed), ("stopped", arm.stopped)) if why}
        state = TrialState.FAIL if arm.failed else TrialState.COMPLETE if arm.searched else TrialState.PRUNED
        self.study.add_trial(
            create_trial(
                state=state,
                value=arm.mean if state == TrialState.COMPLETE else None,
                params={"arm": arm.label},
                distributions={"arm": CategoricalDistribution(list(self.grid))},
                user_attrs=attributes,
                intermediate_values=dict(enumerate(arm.searched)),
            )
        )

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study and the stages on disk hold all there is."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a sweep is continued by typing it again."""


class Lagging(MedianStoppingRule):
    """Stops a pretraining whose best probe so far lies below the median of what the others had on average by then.

    Reports are {"step", "probe", "score": nan} during a pretraining; those of fine-tunings carry no probe and are let pass.
    Controls and confirmations are never stopped, nor is anything before `grace` steps or with fewer than three others.
    """

    def __init__(self, nested: NestedSearch, grace: int):
        super().__init__(time_attr="step", metric="probe", mode="max", grace_period=grace, min_time_slice=NEVER)
        self.nested = nested

    @property
    def metric(self) -> None:
        """None: Tune must not look for the probe in every report."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "probe" not in result or trial.config["index"] >= CONFIRM:
            return TrialScheduler.CONTINUE
        if trial.config["arm"] in self.nested.controls:
            self._results[trial].append(result)  # for the median of the others
            return TrialScheduler.CONTINUE
        decision = super().on_trial_result(tune_controller, trial, result)
        if decision != TrialScheduler.STOP:
            return TrialScheduler.CONTINUE
        self.nested.lagged(trial.config["arm"], result["step"], result["probe"])
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if "probe" in result:
            super().on_trial_complete(tune_controller, trial, result)


def describe(settings: Settings) -> str:
    """The label of an arm that has none."""
    if settings == {"pretrain": None}:
        return "from scratch"
    return ", ".join(f"{key.removeprefix('pretrain.')} {_short(value)}" for key, value in settings.items())


def _keep(trial: "optuna.Trial", arm: Arm) -> None:
    """Write down what became of an arm, so that a kill before the study is told does not undo that it was given up."""
    trial.set_user_attr("scores", _keyed(arm))
    for name, why in (("failed", arm.failed), ("stopped", arm.stopped)):
        if why:
            trial.set_user_attr(name, why)


def _keyed(arm: Arm) -> dict[str, float]:
    return {str(index): score for index, score in arm.scores.items()}


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "[" + ", ".join(map(_short, value)) + "]" if isinstance(value, list | tuple) else str(value)
