"""One pretraining, one fine-tuning, one look at its scores, one prediction: what a sweep does many times, done once."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from medssl.platform import (
    atomic,
    catalogue,
    checkpoint,
    config,
    evaluate,
    ledger,
    metrics,
    plan,
    stages,
    stream,
    trackers,
    watch,
)
from medssl.platform.errors import RunError, UsageError
from medssl.platform.records import Volume
from medssl.platform.site import Site
from medssl.platform.splits import Split
from medssl.platform.store import Store
from medssl.platform.sweep import layers
from medssl.platform.trials import connected

Say = Callable[[str], None]


def pretrain(
    method: str,
    start: str | None,
    data: str,
    seed: int | None,
    files: Sequence[Path],
    overrides: Sequence[str],
    *,
    say: Say,
    index: int = 0,
) -> str:
    """Run or look up one pretraining, of a fresh encoder or of given weights; returns its id, how it ended, and the chain.
    Where the settings have a `further` pretraining, that follows, with a line of its own.

    index   which of those that a sweep gives an arm: it decides the seed
    """
    tree = {"pretrain": {"name": method}} | _given(start, seed)
    experiment, store, split = _experiment(data, files, overrides, tree, say, tuned=False)
    if experiment.start.step is not None:
        raise UsageError("start.step says where fine-tuning starts; to pretrain a snapshot, give its file encoder@STEP.pt")
    chain, lines = plan.chain(method, index, 0, experiment, store, split), []
    for stage in chain.pretrainings:
        done = _fulfil(stages.Job(chain, stage, stages.Work(Site.here(), store.root, split)), say)
        monitors = ", ".join(f"{name} {value:.3f}" for name, value in done["monitors"].items())
        lines.append(f"{stage.id}: {done['status']} after {done['step']} steps; {monitors}; {done['chain']}")
    return "\n".join(lines)


def finetune(
    start: str | None,
    data: str,
    seed: int | None,
    files: Sequence[Path],
    overrides: Sequence[str],
    *,
    say: Say,
    index: int = 0,
    number: int = 0,
) -> str:
    """Run or look up one fine-tuning, from given weights or from scratch; returns its id and test score.

    index, number   which of a sweep's pretrainings, and which fine-tuning of it: they decide the seeds
    """
    tree = {"pretrain": None} | _given(start, seed)
    experiment, store, split = _experiment(data, files, overrides, tree, say)
    stages.check(experiment, store)
    chain = plan.chain(start or "from scratch", index, number + 1, experiment, store, split)
    stage = chain.finetunings[number]
    done = _fulfil(stages.Job(chain, stage, stages.Work(Site.here(), store.root, split)), say)
    return f"{stage.id}: validation {done['validation']:.3f}, test {done['test']:.3f} ({experiment.evaluate.metric})"


def _given(start: str | None, seed: int | None) -> dict[str, Any]:
    """What `--from` and `--seed` set."""
    return ({"start": {"weights": start}} if start else {}) | ({"seed": seed} if seed is not None else {})


def _fulfil(job: stages.Job, say: Say) -> dict[str, Any]:
    """The stage's end, told about on the way; Ray only comes up where the stage asks for several workers or for its stream."""
    resources, data = job.chain.experiment.resources, job.chain.experiment.data
    trackers.check(resources.trackers, job.work.site.runs)
    streamed = job.chain.experiment.spatial_dims == 2 and data.stream != "node"  # volumes are held in memory
    needs_ray = resources.workers > 1 or data.stream == "ray" or (streamed and not stream.fits(Store.open(job.work.store)))
    with connected(None) if needs_ray else contextlib.nullcontext(), watch.Following(job.folder, say):
        return stages.fulfil(job)


def _experiment(
    data: str, files: Sequence[Path], overrides: Sequence[str], last: dict[str, Any], say: Say, tuned: bool = True
) -> tuple[config.Experiment, Store, Split]:
    """tuned   whether a fine-tuning follows, whose hooks then need unlabelled patients and the phases that they ask for"""
    tree = layers(data, tuple(files), tuple(overrides), last)
    config.build(tree)  # refuse what is wrong before any data are touched
    store = catalogue.open_store(data, say=say)
    experiment = config.build(config.suited(store.defaults, tree))
    if not tuned:
        experiment = dataclasses.replace(experiment, hooks=(), unlabelled=None)
    split = catalogue.split(store, experiment.data.split)
    return plan.resolve(experiment, store, split), store, split


def _finetuned(name: str) -> tuple[Path, config.Experiment, Store]:
    """The folder, configuration and data of a finished fine-tuning."""
    site = Site.here()
    folder = site.find_stage(name)
    run = json.loads((folder / "run.json").read_text())
    if run["kind"] != "finetune" or not (folder / "done.json").exists():
        raise UsageError(f"{folder.name} is not a finished fine-tuning")
    return folder, config.rebuilt(run["config"]), Store.open(Path(run["store"]))


def evaluate_run(name: str) -> dict[str, Any]:
    """The scores of a finished fine-tuning as its ledger holds them, summed up by the metric contract."""
    folder, _, store = _finetuned(name)
    rows = ledger.scores(folder.parents[1], folder.name)
    parts = {part: metrics.aggregate([row for row in rows if row.part == part]) for part in ("val", "test")}
    return {
        "run": folder.name,
        "data": store.name,
        "contract": metrics.CONTRACT,
        **{part: dataclasses.asdict(summary) for part, summary in parts.items()},
    }


def describe(summary: dict[str, Any]) -> str:
    """The test scores for people: means, then a line per class."""
    test = summary["test"]
    names = [name for name in test["mean"] if not name.endswith("_ml")]
    width = max(map(len, [*test["by_class"]["dice"], "mean"])) if "dice" in test["by_class"] else 20
    lines = [f"{summary['run']} on the test patients of {summary['data']}"]
    lines.append(" ".join([" " * width, *(f"{name:>10}" for name in names)]))
    classes = list(test["by_class"].get("dice") or (test["by_class"][names[0]] if names else {}))
    for label in classes:
        values = (test["by_class"][name].get(label) for name in names)  # None: no score of single classes, as accuracy
        words = (f"{'':10}" if value is None else f"{value:10.3f}" for value in values)
        lines.append(" ".join([f"{label:<{width}}", *words]).rstrip())
    lines.append(" ".join([f"{'mean':<{width}}", *(f"{test['mean'][name]:10.3f}" for name in names)]))
    lines.append(f"{test['absent']} absent, {test['missed']} missed, {test['hallucinated']} hallucinated")
    return "\n".join([*lines, summary["contract"]])


def _trained(folder: Path, experiment: config.Experiment, store: Store) -> Any:
    """The network that a fine-tuning left."""
    network = stages.selective(stages.network(experiment, store.channels, len(store.classes)), experiment)
    network.load_state_dict(checkpoint.load(folder / "best.pt")["network"])
    return network


def pictures(name: str, out: Path) -> list[Path]:
    """PNGs of the worst and the best test volume of a fine-tuning, reference and prediction outlined."""
    written = []
    for which, prepared, _, predicted in cases(name):
        written.append(out / f"{which}-{prepared.volume}.png")
        _save(written[-1], evaluate.picture(prepared, predicted))
    return written


def cases(name: str, metric: str | None = None) -> Iterator[tuple[str, Volume, float, Tensor]]:
    """The worst and the best test volume of a fine-tuning: which of them, the volume, its score, and what is predicted.

    metric   to tell them by; None: the one that the fine-tuning was selected by
    """
    folder, experiment, store = _finetuned(name)
    model, metric = _trained(folder, experiment, store), metric or experiment.evaluate.metric
    rows = [row for row in ledger.scores(folder.parents[1], folder.name) if row.part == "test" and row.metric == metric]
    patients = {row.volume: row.patient for row in rows}
    means = {volume: metrics.aggregate([row for row in rows if row.volume == volume]).mean[metric] for volume in patients}
    sign = -1 if metric.endswith("_mm") else 1  # distances are better when smaller
    ranked = sorted((volume for volume in means if not math.isnan(means[volume])), key=lambda volume: sign * means[volume])
    if not ranked:
        raise RunError(f"{folder.name}: no test volume has a {metric}; there is nothing to draw")
    for which, volume in (("worst", ranked[0]), ("best", ranked[-1])):
        slices = stream.Slices.read(store, patients=[patients[volume]])
        prepared = next(each for each in slices.volumes() if each.volume == volume)
        predicted = evaluate.infer(model, prepared, **stages.inference(experiment))
        yield which, prepared, means[volume], predicted


def _save(path: Path, image: Any) -> None:
    import matplotlib.image

    atomic.write(path, lambda file: matplotlib.image.imsave(file, image, format="png"))


def predict(name: str, files: Sequence[Path], out: Path, *, say: Say) -> list[Path]:
    """Segment volumes with a finished fine-tuning."""
    from medssl.platform import predict as prediction

    folder, experiment, store = _finetuned(name)
    network = _trained(folder, experiment, store)
    return prediction.predict(
        network,
        store.classes,
        store.preset,
        files,
        out,
        **stages.inference(experiment),
        channels=store.channels // store.preset.depth,  # of the scan: neighbouring slices come with it
        progress=say,
    )
