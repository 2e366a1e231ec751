"""What a sweep costs beside its training: seconds of a worker per stage whose training is a single step.

A small phantom and a tiny network, twelve arms of four stages on two workers. Between the first stage that ends and the last,
workers are warm and do nothing but stages: their time per stage is the cost of scheduling, look-ups, loading, checkpoints,
logs and the scoring of a few small volumes. It must stay under half a second, with all that counted as overhead.
"""

import os
import tempfile
from pathlib import Path

from medssl.platform.bench import Row

ALLOWED = 0.5  # seconds of a worker per stage
ARMS = 12
SPACE = f"""
QUESTION = "What does a stage cost?"
CONTROL = "0"

def arms():
    return {{str(n): {{"pretrain.training.lr": 0.01 + n / 1000}} for n in range({ARMS})}}
"""
SETTINGS = [
    "network.width=4", "network.levels=2", "pretrain.side=16", "pretrain.d=8", "pretrain.bottleneck=4",
    "pretrain.training.steps=1", "pretrain.training.batch=8", "finetune.side=16", "finetune.training.steps=1",
    "finetune.training.batch=4", "finetune.training.evaluations=1", "evaluate.inference=whole",
]  # fmt: skip


def run() -> list[Row]:
    """One row: stages per second of a worker."""
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
            (root / "cost.py").write_text(SPACE)
            request = sweep.Request(str(root / "cost.py"), str(root / "tiny"), 2, 2, overrides=tuple(SETTINGS))
            sweep.run(request, time_budget=None, address=None, say=lambda text: None)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        ended = sorted(file.stat().st_mtime for file in root.glob("runs/stages/*/done.json"))
    stages = ended[len(ended) // 4 :]  # the first ones pay for starting the workers
    workers = min(2, os.cpu_count() or 1)
    rate = (len(stages) - 1) / (stages[-1] - stages[0]) / workers
    what = f"stages of one step in a sweep of {len(ended)}, warm workers, {1 / rate:.2f} s each"
    return [Row(what, "stages/s of a worker", rate, f"a stage that costs {ALLOWED} s", 1 / ALLOWED, target=1.0)]
