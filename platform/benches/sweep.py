"""What a sweep costs beside its training: seconds of a worker per stage whose training is a single step.

A small phantom and a tiny network, twelve arms of four stages on two workers. Between the first stage that ends and the last,
workers are warm and do nothing but stages: their time per stage is the cost of scheduling, look-ups, loading, checkpoints,
logs and the scoring of a few small volumes. It must stay under half a second, with all that counted as overhead.

Then 200 arms whose stages are finished already go through the same path: what is left is what Ray Tune, the searcher, the study
and the look-ups cost, on all workers together. It must stay under 0.3 s an arm.
"""

import contextlib
import os
import tempfile
from pathlib import Path

from medssl.platform.bench import Row

ALLOWED = 0.5  # seconds of a worker per stage
ALLOWED_IDLE = 0.3  # seconds per arm that has nothing to do
ARMS, IDLE_ARMS = 12, 200
SPACE = """
QUESTION = "What does a stage cost?"
CONTROL = "0"

def arms():
    return {str(n): {"pretrain.training.lr": 0.01 + n / 10000} for n in range(ARMS)}
"""
SETTINGS = [
    "network.width=4", "network.levels=2", "pretrain.side=16", "pretrain.d=8", "pretrain.bottleneck=4",
    "pretrain.training.steps=1", "pretrain.training.batch=8", "finetune.side=16", "finetune.training.steps=1",
    "finetune.training.batch=4", "finetune.training.evaluations=1", "evaluate.inference=whole",
]  # fmt: skip


def run() -> list[Row]:
    """Two rows: stages per second of a worker, and arms per second that have nothing to do."""
    from medssl.platform import catalogue, sweep
    from medssl.platform.datasets import phantom

    before = {name: os.environ.get(name) for name in ("MEDSSL_DATA", "MEDSSL_RUNS")}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        try:
            os.environ |= {"MEDSSL_DATA": f"{root}/data", "MEDSSL_RUNS": f"{root}/runs"}
            phantom.generate(root / "tiny", patients=8)
            coarse = {"spacing_mm": (12.0, 12.0, 24.0), "pad": 32}
            catalogue.prepare(str(root / "tiny"), changes=coarse, say=lambda text: None)
            (root / "cost.py").write_text(SPACE.replace("ARMS", str(ARMS)))
            request = sweep.Request(str(root / "cost.py"), str(root / "tiny"), 2, 2, overrides=tuple(SETTINGS))
            sweep.run(request, time_budget=None, address=None, say=lambda text: None)
            ended = sorted(file.stat().st_mtime for file in root.glob("runs/stages/*/done.json"))
            idle = _idle(root)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
    stages = ended[len(ended) // 4 :]  # the first ones pay for starting the workers
    workers = min(2, os.cpu_count() or 1)
    rate = (len(stages) - 1) / (stages[-1] - stages[0]) / workers
    what = f"stages of one step in a sweep of {len(ended)}, warm workers, {1 / rate:.2f} s each"
    rows = [Row(what, "stages/s of a worker", rate, f"a stage that costs {ALLOWED} s", 1 / ALLOWED, target=1.0)]
    what = f"{IDLE_ARMS} arms that have nothing to do, {1 / idle:.2f} s each"
    return [*rows, Row(what, "arms/s", idle, f"an arm that costs {ALLOWED_IDLE} s", 1 / ALLOWED_IDLE, target=1.0)]


def _idle(root: Path) -> float:
    """Arms per second where all stages are finished: each is asked for, handed to a worker, looked up and told to the study."""
    from medssl.platform import atomic, catalogue, plan, search, sweep
    from medssl.platform.errors import RunError
    from medssl.platform.site import Site
    from medssl.platform.spaces import load_space

    (root / "idle.py").write_text(SPACE.replace("ARMS", str(IDLE_ARMS)))
    request = sweep.Request(str(root / "idle.py"), str(root / "tiny"), 1, 1, "grid", overrides=tuple(SETTINGS))
    space = load_space(request.space)
    store = catalogue.open_store(request.data, say=lambda text: None)
    bound, _ = sweep.fitted(request, space, store, space.arms(), lambda text: None)
    split = catalogue.split(store, bound.split)
    done = {"status": "done", "step": 1, "validation": 0.5, "test": 0.5, "seconds": 0.0}
    for label, settings in space.arms().items():
        experiment = plan.resolve(bound.experiment(settings), store, split)
        for stage in plan.chain(label, 0, 1, experiment, store, split).stages:
            atomic.write_json(Site.here().stage(stage.id) / "done.json", done, durable=False)
    with contextlib.suppress(RunError):  # nothing was scored, hence no leaderboard
        sweep.run(request, time_budget=None, address=None, say=lambda text: None)
    trials = search.open_study(bound.folder, "grid", seed=0).trials
    told = sorted(trial.datetime_complete for trial in trials if trial.datetime_complete)
    told = told[len(told) // 4 :]  # the first ones pay for starting the workers
    return (len(told) - 1) / (told[-1] - told[0]).total_seconds()
