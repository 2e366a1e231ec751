"""One file that answers a sweep's question: the verdict first, then what it rests on, then how to do all of it again.

It is made of what lies in the folders and so can be made at any time: what an unfinished sweep cannot show yet is left
out, with a line that says why.
"""

import dataclasses
import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medssl.platform import answers, atomic, catalogue, config, figures, history, leaderboard, metrics, page, render, words
from medssl.platform.answers import Scored
from medssl.platform.errors import RunError, UsageError
from medssl.platform.figures import Curve, Histogram, Spent
from medssl.platform.leaderboard import Leaderboard
from medssl.platform.plan import Chain, Stage, labelled_patients
from medssl.platform.site import Site
from medssl.platform.store import Store
from medssl.platform.sweep import Settings, Sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Say = Callable[[str], None]
Values = Mapping[str, Any]  # of one parameter, by arm

ENOUGH = 20  # complete trials from which on importance is told; PED-ANOVA wants at least 5 among the best quarter
BUDGETS = {"data.labelled": "labelled training patients", "data.labelled_slices": "labelled training slices"}
KINDS = {"pretrain": "pretraining", "finetune": "fine-tuning"}


@dataclass(frozen=True)
class Drawing:
    """A figure of the report, or the reason why there is none."""

    name: str  # of its file
    title: str
    caption: str
    figure: "Figure | None" = None
    why: str = ""  # there is none
    raster: bool = False  # a PNG in the page: images inside


@dataclass(frozen=True)
class Evidence:
    """Everything that a report rests on, as it lies in the folders now."""

    site: Site
    sweep: Sweep
    chains: Sequence[Chain]
    found: Scored | None
    board: Leaderboard | None
    searched: Leaderboard | None  # that of the search, every arm in it; the same one where nothing is confirmed
    unranked: str  # why there is no leaderboard
    metric: str

    @classmethod
    def gather(cls, site: Site, folder: Path, metric: str, wanted: float) -> "Evidence":
        sweep = Sweep.open(folder)
        chains = sweep.chains()
        try:
            found = answers.scored(site, folder, metric)
        except RunError as error:  # nothing has been scored yet
            return cls(site, sweep, chains, None, None, None, str(error), metric)

        def ranked(scored: Scored) -> Leaderboard:
            return leaderboard.rank(scored.runs, sweep.control, metric=metric, wanted=wanted, compare=sweep.compare)

        board = ranked(found)
        if found.phase == "search":
            return cls(site, sweep, chains, found, board, board, "", metric)
        noted = dataclasses.replace(board, notes=(answers.CONFIRMED, *board.notes))
        return cls(site, sweep, chains, found, noted, ranked(answers.scored(site, folder, metric, "search")), "", metric)

    @cached_property
    def stages(self) -> dict[str, Stage]:
        """Every stage once, in the order of arms."""
        return {stage.id: stage for chain in self.chains for stage in chain.stages}

    @cached_property
    def done(self) -> dict[str, dict[str, Any]]:
        """What each finished stage left."""
        found = {identity: self.site.done(identity) for identity in self.stages}
        return {identity: done for identity, done in found.items() if done is not None}

    @cached_property
    def recorded(self) -> dict[str, Any]:
        """Where the sweep itself came from: versions, machine, command."""
        said: dict[str, Any] = json.loads(self.sweep.file.read_text())["provenance"]
        return said

    @property
    def arms(self) -> list[str]:
        """Every arm once: those of the leaderboard in its order, then those that the search ranks, then as asked for."""
        ranked = [row.arm for board in (self.board, self.searched) if board for row in board.rows]
        return list(dict.fromkeys([*ranked, *self.sweep.arms()]))


def write(name: str | None, out: Path | None, folder: Path | None, metric: str, wanted: float, *, say: Say) -> list[Path]:
    """Write the report of a sweep, and its figures into `folder` where one is given; returns the files, the report first.

    out    the file; None: report.html in the sweep's own folder
    Raises UsageError when there is no such sweep or metric.
    """
    site = Site.here()
    evidence = Evidence.gather(site, site.find_sweep(name), metric, wanted)
    drawings = list(_drawings(evidence, say))
    path = out or evidence.sweep.folder / "report.html"
    atomic.write_text(path, html(evidence, drawings))
    written = [path]
    for drawing in drawings if folder else ():
        if drawing.figure and folder:
            written += figures.save(drawing.figure, folder, drawing.name)
    return written


# --- what there is to draw ---


def _drawings(evidence: Evidence, say: Say) -> Iterator[Drawing]:
    """Every figure of the report, in its order."""
    yield from _of_scores(evidence)
    yield from _of_search(evidence)
    yield from _of_training(evidence)
    yield from _cases(evidence, say)
    caption = (
        "Stages done of those planned, and the time that worker groups have spent on them, repeats after kills included; to "
        "come is what is left at the pace so far."
    )
    if evidence.sweep.search != "grid":
        caption += " A search leaves the repeats of losing arms out on purpose: they count as planned and are never done."
    yield Drawing("spent", "Plan against what was spent", caption, figures.spent(_spent(evidence)))


def _of_scores(evidence: Evidence) -> Iterator[Drawing]:
    board, found, searched = evidence.board, evidence.found, evidence.searched
    if board is None or found is None or searched is None:
        yield Drawing("forest", "Arms", "", why=evidence.unranked)
        return
    if any(row.mean is not None for row in board.rows):
        caption = (
            f"Each arm's mean {evidence.metric} over the test patients with its 95 % interval; dots are the means of single "
            "pretrainings, the dashed line is the control. Arms that share a letter cannot be told apart. k×m: pretrainings "
            "and fine-tunings of each."
        )
        yield Drawing("forest", "Arms, confirmed" if found.phase == "confirm" else "Arms", caption, figures.forest(board))
    if searched is not board and any(row.mean is not None for row in searched.rows):
        caption = (
            "The same for every arm of the search, on its own pretrainings. These scores chose the arms above, and flatter "
            "them; the confirmation does not."
        )
        yield Drawing("forest-search", "Arms of the search", caption, figures.forest(searched))
    intervals = _intervals(evidence.sweep.arms())
    if len({intervals[row.arm] for row in searched.rows if row.arm in intervals and row.mean is not None}) > 1:
        caption = (
            "A bar spans the interval that the IoU of a pair of crops was drawn from, at the height of the arm's mean; "
            "the line through its middle is the 95 % interval. Dashed: arms without an interval."
        )
        yield Drawing("over-interval", "Over the IoU interval", caption, figures.over_interval(searched, intervals))
    scores = answers.by_class(evidence.site, found, evidence.metric)
    if scores:
        caption = (
            "Boxes over test patients (median, quartiles, whiskers to 1.5 times their distance), each patient the mean over "
            "all runs of the arm. What is undefined or infinite is left out."
        )
        order = [name for name in Store.open(evidence.sweep.store).classes if name in scores]
        scores = {name: scores[name] for name in (*order, *sorted(scores.keys() - set(order)))}
        drawn = figures.classes(scores, [row.arm for row in board.rows], board.control, evidence.metric)
        yield Drawing("classes", "Per class", caption, drawn)
    yield from _labelled(evidence, board)


def _labelled(evidence: Evidence, board: Leaderboard) -> Iterator[Drawing]:
    """The label-fraction curve, over patients or slices, where arms differ in how many they may use."""
    experiments = {chain.arm: chain.experiment for chain in evidence.chains}
    varied = [key for key in BUDGETS if len({_budget(key, each.data) for each in experiments.values()}) > 1]
    if not varied:
        why = f"no arm varies the number of {' or of '.join(f'{what} ({key})' for key, what in BUDGETS.items())}"
        yield Drawing("labelled", "Over labelled patients", "", why=why)
    for key in varied:
        amounts = {arm: _amount(evidence, key, experiment) for arm, experiment in experiments.items()}
        series, control = _series(evidence, board, key, amounts)
        caption = "A line per initialisation, its points the arms' means, its band their 95 % intervals."
        drawn = figures.labelled(series, control, evidence.metric, unit=BUDGETS[key])
        over = key.removeprefix("data.").replace("_", "-")
        yield Drawing(over, f"Over {BUDGETS[key].replace('training ', '')}", caption, drawn)


def _series(
    evidence: Evidence, board: Leaderboard, key: str, amounts: Mapping[str, int]
) -> tuple[dict[str, list[tuple[float, leaderboard.Row]]], str | None]:
    """Arms that differ in `key` alone, as points (amount, row) by what their labels share; and which of them is the control."""
    rows = {row.arm: row for row in board.rows if row.mean is not None}
    groups: dict[str, list[str]] = {}
    for arm, settings in evidence.sweep.arms().items():
        if arm in rows and arm in amounts:
            rest = {name: value for name, value in _flat(settings).items() if name != key}
            groups.setdefault(json.dumps(rest, sort_keys=True), []).append(arm)
    series = {_common(members): [(float(amounts[arm]), rows[arm]) for arm in members] for members in groups.values()}
    return series, next((_common(members) for members in groups.values() if board.control in members), None)


def _budget(key: str, data: config.Data) -> int | None:
    if key == "data.labelled":
        return None if data.labelled is None else int(data.labelled)  # `plan.resolve` has counted them
    return data.labelled_slices


def _amount(evidence: Evidence, key: str, experiment: config.Experiment) -> int:
    """The labelled patients or slices of an arm; all that there are where it sets no number."""
    if (number := _budget(key, experiment.data)) is not None:
        return number
    store = Store.open(evidence.sweep.store)
    patients = labelled_patients(experiment, catalogue.split(store, evidence.sweep.split))
    if key == "data.labelled":
        return len(patients)
    return sum(volume.slices for volume in store.volumes if volume.labelled and volume.patient in patients)


def _common(labels: Sequence[str]) -> str:
    """What labels of one series share, in words: `simsiam, 4 labelled` and `simsiam, 8 labelled` are `simsiam`."""
    words_of = [label.replace(",", " ").replace(":", " ").split() for label in labels]
    shared = [word for word in words_of[0] if all(word in others for others in words_of)]
    named = [word for word in shared if word not in ("label", "labels", "labelled", "patient", "patients", "with", "on")]
    return " ".join(named) or labels[0]


def _of_search(evidence: Evidence) -> Iterator[Drawing]:
    """Score over the parameters that the arms vary, as every arm has it from the search."""
    board = evidence.searched
    if board is None:
        return
    scored = {row.arm for row in board.rows if row.mean is not None}
    varied = _varied({arm: settings for arm, settings in evidence.sweep.arms().items() if arm in scored})
    numeric = {name: values for name, values in varied.items() if all(_is_number(value) for value in values.values())}
    numeric = {name: values for name, values in numeric.items() if len(set(values.values())) > 2 and name not in BUDGETS}
    title, caption = "Over each parameter", "Mean and 95 % interval of every arm over what it sets; dashed, the control."
    if not numeric:
        yield Drawing("slices", title, "", why="no number is set to more than two values by the arms")
        return
    yield Drawing("slices", title, caption, figures.slices(board, numeric))
    if len(numeric) == 2:
        (first, ones), (second, others) = numeric.items()
        points = {arm: (ones[arm], others[arm]) for arm in ones if arm in others}
        if len(points) > 3:
            caption = (
                f"{words.count(len(points), 'arm')} in the colour of their means; contours between them, where there are 10."
            )
            yield Drawing("plane", "Over two parameters", caption, figures.plane(board, (first, second), points))
    everywhere = {name: values for name, values in varied.items() if numeric.keys() & {name} or _is_kind(values)}
    lines = set.intersection(*(set(values) for values in everywhere.values()))
    if len(everywhere) > 1 and len(lines) > 3:
        caption = "A line per arm through its parameters to its mean; the best is orange."
        yield Drawing("parallel", "All parameters at once", caption, figures.parallel(board, everywhere))
    if evidence.sweep.search != "grid":
        yield _importance(evidence)


def _importance(evidence: Evidence) -> Drawing:
    """What decides whether a trial is good, by the sweep's own study."""
    import optuna

    name, title = "importance", "Importance of the parameters"
    file = evidence.sweep.folder / "study.db"
    if not file.exists():
        return Drawing(name, title, "", why="the sweep has no study yet")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{file}")
    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len(complete) < ENOUGH or len({key for trial in complete for key in trial.params}) < 2:
        why = f"it takes two parameters and {ENOUGH} complete trials; the study has {len(complete)}"
        return Drawing(name, title, "", why=why)
    best_quarter = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
    shares = optuna.importance.get_param_importances(study, evaluator=best_quarter)
    caption = "How far each parameter decides whether a trial is among the best quarter by validation score; shares of 1."
    return Drawing(name, title, caption, figures.importance(shares, len(complete)))


def _of_training(evidence: Evidence) -> Iterator[Drawing]:
    """Curves of both kinds of stage, and the realised IoU."""
    for kind, what in KINDS.items():
        told = []
        for chain in evidence.chains:
            stages = [stage for stage in chain.stages if stage.kind == kind]
            told += [Curve(chain.arm, kind, history.read(evidence.site.stage(stage.id))) for stage in stages]
        told = [curve for curve in told if curve.rows]
        names = _ordered(_moving(told))
        title = f"Curves of {what}"
        if not names:
            yield Drawing(f"curves-{kind}", title, "", why=f"no {what} has left scalars that move")
            continue
        caption = f"A line per stage, {len(told)} in all, as it reported while it trained."
        drawn = figures.curves(told, names, evidence.arms, evidence.sweep.control)
        yield Drawing(f"curves-{kind}", title, caption, drawn)
    title, caption = (
        "Realised IoU of the pairs",
        "Pairs of the first batches of each arm's pretrainings; the shade is what was asked for.",
    )
    histograms = list(_histograms(evidence))
    if histograms:
        yield Drawing("realised-iou", title, caption, figures.realised(histograms))
    else:
        yield Drawing("realised-iou", title, "", why="no pretraining has left pairs to count")


def _moving(curves: Sequence[Curve]) -> set[str]:
    """The scalars that are not one and the same number throughout."""
    values: dict[str, set[float]] = {}
    for curve in curves:
        for row in curve.rows:
            for name, value in row.items():
                if not math.isnan(value):
                    values.setdefault(name, set()).add(value)
    return {name for name, seen in values.items() if len(seen) > 1}


def _ordered(names: set[str]) -> list[str]:
    """Losses, then validation, then what shows a collapse, then the rest; at most as many as a figure has panels."""
    names -= {"step", "seconds", "lr"}
    first = ("validation", "collapse", "effective_rank", "feature_spread")
    rest = sorted(names - set(first), key=lambda name: (not name.startswith("loss/"), name))
    losses = [name for name in rest if name.startswith("loss/")]
    chosen = [*losses, *(name for name in first if name in names), *(name for name in rest if name not in losses)]
    return chosen[: figures.PANELS]


def _histograms(evidence: Evidence) -> Iterator[Histogram]:
    intervals = _intervals(evidence.sweep.arms())
    for arm in evidence.arms:
        counted = []
        for chain in evidence.chains:
            for stage in chain.pretrainings if chain.arm == arm else ():
                file = evidence.site.stage(stage.id) / "iou.json"
                counted += [json.loads(file.read_text())] if file.exists() else []
        if counted:
            counts = np.sum([each["counts"] for each in counted], axis=0).tolist()
            yield Histogram(arm, counts, sum(each["exactly_0"] for each in counted), intervals.get(arm))


def _cases(evidence: Evidence, say: Say) -> Iterator[Drawing]:
    """The worst and the best test volume of the leading arm and of the control, each by its median run."""
    board, found = evidence.board, evidence.found
    if board is None or found is None:
        return
    leading = next((row.arm for row in board.rows if row.mean is not None), None)
    for arm in dict.fromkeys([leading, board.control]):
        runs = [(run.score, stage) for stage, run in zip(found.owners, found.runs, strict=True) if run.arm == arm]
        finished = sorted((score, stage) for score, stage in runs if math.isfinite(score))
        if arm is None or not finished:
            continue
        score, stage = finished[(len(finished) - 1) // 2]
        say(f"drawing the worst and the best case of {stage}")
        role = "control" if arm == board.control else "leading arm"
        which = f"The {role} {arm}, its median run {stage} (test {evidence.metric} {score:.3f})"
        try:
            yield from _drawn(stage, evidence.metric, role, which)
        except (RunError, UsageError, FileNotFoundError) as error:
            yield Drawing(f"cases-{role.split()[0]}", f"Cases of the {role}", "", why=str(error))


def _drawn(stage: str, metric: str, role: str, which: str) -> Iterator[Drawing]:
    from medssl.platform import evaluate, single

    for end, volume, score, predicted in single.cases(stage, metric):
        name, title = f"{end}-case-{role.split()[0]}", f"{end.capitalize()} case of the {role}"
        caption = f"{which}: its {end} test volume, {volume.volume}, scores {score:.3f}. Reference solid, prediction dashed."
        yield Drawing(name, title, caption, evaluate.outlined(volume, predicted), raster=True)


def _spent(evidence: Evidence) -> list[Spent]:
    """Stages and hours, planned and spent, by kind."""
    found = []
    for kind, what in KINDS.items():
        stages = [stage for stage in evidence.stages.values() if stage.kind == kind]
        if not stages:
            continue
        seconds = {
            stage.id: max(evidence.done.get(stage.id, {}).get("seconds", 0.0), history.spent(evidence.site.stage(stage.id)))
            for stage in stages
        }
        done = [stage for stage in stages if stage.id in evidence.done]
        steps = sum(stage.steps for stage in done)
        left = sum(stage.steps for stage in stages) - steps
        pace = sum(seconds[stage.id] for stage in done) / steps if steps else None
        to_come = 0.0 if not left else None if pace is None else left * pace / 3600
        found.append(Spent(what, len(stages), len(done), sum(seconds.values()) / 3600, to_come))
    return found


# --- what arms vary ---


def _flat(settings: Settings, before: str = "") -> dict[str, Any]:
    """Dotted settings, nested ones opened."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{before}{key}.")
        else:
            flat[f"{before}{key}"] = value
    return flat


def _intervals(arms: Mapping[str, Settings]) -> dict[str, tuple[float, float]]:
    """The IoU interval of each arm that sets one."""
    found = {}
    for arm, settings in arms.items():
        for key, value in _flat(settings).items():
            if key.rpartition(".")[2] == "iou" and _is_pair(value):
                found[arm] = (float(value[0]), float(value[1]))
    return found


def _varied(arms: Mapping[str, Settings]) -> dict[str, Values]:
    """What arms set to different values: numbers and words by dotted name, intervals by midpoint and width."""
    found: dict[str, dict[str, Any]] = {}
    for arm, settings in arms.items():
        for key, value in _flat(settings).items():
            name = key.removeprefix("pretrain.")
            if _is_pair(value):
                low, high = map(float, value)
                found.setdefault(f"{name}, midpoint", {})[arm] = round((low + high) / 2, 9)
                found.setdefault(f"{name}, width", {})[arm] = round(high - low, 9)
            elif _is_number(value) or isinstance(value, str):
                found.setdefault(name, {})[arm] = value
    return {name: values for name, values in found.items() if len(set(map(str, values.values()))) > 1}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value))


def _is_kind(values: Values) -> bool:
    return all(isinstance(value, str) for value in values.values())


# --- the page ---


def html(evidence: Evidence, drawings: Sequence[Drawing]) -> str:
    """The whole report."""
    sections = [
        ("answer", "Answer", _answer(evidence)),
        ("figures", "Figures", "".join(map(_figure, drawings))),
        ("rule", "What is measured", f"<p>{page.escape(metrics.CONTRACT)}</p>"),
        ("design", "Design", _design(evidence)),
        ("again", "How to reproduce it", _again(evidence)),
    ]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    body = f'<p class="kicker">medssl report · {page.escape(evidence.sweep.folder.name)}</p>'
    body += f"<h1>{page.escape(evidence.sweep.question)}</h1><nav>{links}</nav>"
    body += "".join(f'<section id="{name}"><h2>{title}</h2>{text}</section>' for name, title, text in sections)
    return page.page(f"{evidence.sweep.question} – medssl", body)


def _answer(evidence: Evidence) -> str:
    """Verdict, what is missing, and the leaderboard."""
    if evidence.board:
        text = f'<p class="verdict">{page.prose(evidence.board.verdict)}</p>{_missing(evidence)}'
        notes = "".join(f"<li>{page.prose(note)}</li>" for note in evidence.board.notes)
        return f'{text}{render.html_table(evidence.board)}<ul class="notes">{notes}</ul>'
    asked = "".join(f"<li>{page.escape(arm)}</li>" for arm in evidence.arms)
    verdict = f"No answer yet: {evidence.unranked}."
    return f'<p class="verdict">{page.escape(verdict)}</p>{_missing(evidence)}<p>Arms asked for so far:</p><ul>{asked}</ul>'


def _missing(evidence: Evidence) -> str:
    """What an unfinished sweep has not done yet; empty for a finished one."""
    left = [stage for identity, stage in evidence.stages.items() if identity not in evidence.done]
    if not left:
        return ""
    kinds = [words.count(sum(stage.kind == kind for stage in left), what) for kind, what in KINDS.items()]
    by_arm: dict[str, int] = {}
    for chain in evidence.chains:
        absent = sum(stage.id not in evidence.done for stage in chain.stages)
        by_arm[chain.arm] = by_arm.get(chain.arm, 0) + absent
    where = ", ".join(f"{arm} ({absent})" for arm, absent in by_arm.items() if absent)
    said = f"Unfinished: {' and '.join(kinds)} of {len(evidence.stages)} stages have not been done: {where}. "
    said += "Typing the sweep again does them"
    said += "." if evidence.sweep.search == "grid" else "; a search leaves the repeats of losing arms out on purpose."
    return f'<p class="missing">{page.escape(said)}</p>'


def _figure(drawing: Drawing) -> str:
    heading = f"<h3>{page.escape(drawing.title)}</h3>"
    if drawing.figure is None:
        return f'{heading}<p class="left-out">Left out: {page.escape(drawing.why)}.</p>'
    content = figures.png(drawing.figure, dpi=120) if drawing.raster else figures.svg(drawing.figure)
    return heading + page.picture(content, "png" if drawing.raster else "svg+xml", drawing.caption)


def _design(evidence: Evidence) -> str:
    """Repeats, patients, data and contract."""
    sweep = evidence.sweep
    store = Store.open(sweep.store)
    split = catalogue.split(store, sweep.split)
    facts = [
        ("control", sweep.control),
        ("repeats", f"{words.count(sweep.k, 'pretraining')} per arm, {words.count(sweep.m, 'fine-tuning')} of each"),
        ("search", sweep.search),
        ("unit of evidence", "the pretraining: fine-tunings of one share its luck"),
        ("data", f"{store.name}: {words.count(len(store.volumes), 'volume')}, classes {', '.join(store.classes[1:])}"),
        ("licence", store.licence),
        (
            "patients",
            f"{len(split.train)} training ({len(split.labelled)} labelled), {len(split.val)} validation, {len(split.test)} "
            f"test; split {split.name}",
        ),
        ("selection", "by the validation patients; the test patients are scored once"),
        ("content hash of the data", store.content_hash),
        ("contract of the scores", evidence.found.contract if evidence.found else "nothing scored yet"),
    ]
    return page.facts(facts)


def _again(evidence: Evidence) -> str:
    """The sweep's command and origin, then every arm: its settings, and each of its cells with its own command."""
    said = evidence.recorded
    versions = ", ".join(f"{name} {version}" for name, version in said["versions"].items())
    machine = ", ".join(f"{name} {value}" for name, value in said["machine"].items())
    origin = [("medssl", said["medssl"]), ("commit", said["commit"]), ("Python", said["python"]), ("versions", versions)]
    origin += [("machine", machine), ("started", said["started"])]
    text = "<p>The whole sweep, as it was typed; what is finished is looked up and not computed again:</p>"
    text += f"<pre>{page.escape(said['command'])}</pre>{page.facts(origin)}"
    text += (
        "<p>A single cell is computed, or looked up, by its own commands below; they lead to the same ids, because an id "
        "is the hash of all that decides the result. Each stage's <code>run.json</code> holds its whole configuration and "
        "origin.</p>"
    )
    return text + "".join(_cells(evidence, arm) for arm in evidence.arms)


def _cells(evidence: Evidence, arm: str) -> str:
    """One arm: its settings, a line per stage, the commands and origins."""
    lines, commands = [], []
    for chain in evidence.chains:
        for number, stage in enumerate(chain.stages) if chain.arm == arm else ():
            done = evidence.done.get(stage.id)
            run = evidence.site.stage(stage.id) / "run.json"
            origin = json.loads(run.read_text())["provenance"] if run.exists() else {}
            finetuning = number - len(chain.pretrainings)
            which = f"#{chain.index + 1}" + ("" if stage.kind == "pretrain" else f".{finetuning + 1}")
            numbers = [done.get(name) if done else None for name in ("validation", "test", "seconds")]
            cells = [page.Cell(f"{KINDS[stage.kind]} {which}"), page.Cell(stage.id), page.Cell(str(stage.seed), stage.seed)]
            cells += [page.Cell(f"{done['status']}" if done else "not done"), page.Cell(f"{stage.steps:,}", stage.steps)]
            cells += [page.Cell(words.number(value), value) for value in numbers[:2]]
            cells += [page.Cell("–" if numbers[2] is None else f"{numbers[2]:.0f} s", numbers[2])]
            versions = origin.get("versions", {})
            cells += [page.Cell(f"{origin.get('commit', '–')[:12]}, torch {versions.get('torch', '–')}" if origin else "–")]
            lines.append(page.Line(cells))
            commands.append(command(evidence.sweep, chain, stage, max(finetuning, 0)))
    settings = evidence.sweep.arms()[arm]
    head = ["stage", "id", "seed", "status", "steps", "validation", "test", "time", "computed by"]
    told = json.dumps(settings, ensure_ascii=False, indent=1, default=str)
    experiment = next((chain.experiment for chain in evidence.chains if chain.arm == arm), None)
    whole = json.dumps(experiment.tree(), ensure_ascii=False, indent=1, default=str) if experiment else ""
    return (
        f"<details><summary><strong>{page.escape(arm)}</strong>: {words.count(len(lines), 'stage')}</summary>"
        f"<p>It differs from the others in</p><pre>{page.escape(told)}</pre>"
        f"{page.table(head, lines, kind='text')}"
        f"<pre>{page.escape(chr(10).join(commands))}</pre>"
        f"<details><summary>All of its settings</summary><pre>{page.escape(whole)}</pre></details></details>"
    )


def command(sweep: Sweep, chain: Chain, stage: Stage, number: int) -> str:
    """The command line that computes one stage by itself, under the same id; a fine-tuning's needs its pretraining first."""
    tree = config.stack([sweep.base, config.nested(sweep.arms()[chain.arm])])
    data = tree["data"]["name"]
    if stage.kind == "pretrain":
        part = stage.seen(chain.experiment).pretrain
        assert part is not None
        words_ = ["medssl", "pretrain", part.name, *(["--from", str(stage.parent)] if stage.further else [])]
        tree = {**tree, "pretrain": tree["further"]} if stage.further else tree
    else:
        words_ = ["medssl", "finetune", *(["--from", stage.parent] if stage.parent else [])]
    words_ += ["--data", data, "--seed", str(chain.experiment.seed), "--index", str(chain.index)]
    words_ += ["--number", str(number)] if stage.kind == "finetune" else []
    dropped = ("seed", "data.name", "pretrain.name", "further", *(["start.weights"] if stage.further else [])) + (
        ("finetune.", "evaluate.") if stage.kind == "pretrain" else ("pretrain",)
    )
    for key, value in _flat(tree).items():
        if not key.startswith(dropped):
            words_ += ["-o", f"{key}={_yaml(value)}"]
    return shlex.join(words_)


def _yaml(value: Any) -> str:
    """A plain value as `-o` reads it."""
    import yaml

    plain = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump(plain, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip()
