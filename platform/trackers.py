"""Every stage as a run of Weights & Biases or MLflow too: `-o resources.trackers='[wandb]'`, `[mlflow]`, or both.

A run is named after its arm, grouped by sweep and arm, and holds the stage's record (run.json) as its configuration, the
scalars that TensorBoard gets, and the numbers of done.json as its summary. Its identity is the stage's: a stage that was
killed and continued goes on in the same run. Both are set up by their own environment variables (WANDB_MODE, WANDB_PROJECT,
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME), on every node of a cluster; `WANDB_MODE=offline` writes under the stage's folder,
and MLflow without an address writes to RUNS/mlflow.db. Both packages are imported late.
"""

import contextlib
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from medssl.platform.errors import UsageError

LONGEST = 128  # characters of a group's name in Weights & Biases
OFFLINE = ("offline", "dryrun", "disabled")  # values of WANDB_MODE that need no account


class Run(Protocol):
    """One stage in one tracker."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def end(self, done: Mapping[str, Any]) -> None:
        """What the stage leaves; nested numbers get dotted names."""

    def close(self, failed: bool) -> None: ...


class Runs:
    """One stage in all its trackers. One that fails on the way is left out from there: its network must not cost a training.

    lost    why, by tracker; the stage's done.json keeps it and the sweep tells it
    """

    def __init__(self) -> None:
        self.open: dict[str, Run] = {}
        self.lost: dict[str, str] = {}

    def begin(self, name: str, start: Callable[[], Run]) -> None:
        with self._kept(name):
            self.open[name] = start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, run in list(self.open.items()):
            with self._kept(name):
                run.log(step, values)

    def end(self, done: Mapping[str, Any]) -> None:
        for name, run in list(self.open.items()):
            with self._kept(name):
                run.end(done)

    def close(self, failed: bool) -> None:
        for name, run in list(self.open.items()):
            with self._kept(name):
                run.close(failed)

    @contextlib.contextmanager
    def _kept(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any package below: there is no list of what a network can do
            self.open.pop(name, None)
            self.lost[name] = (str(error).strip() or type(error).__name__).splitlines()[0]


def check(names: Sequence[str], store: Path) -> None:
    """Refuse, before anything starts, what could not be told; prepares MLflow's store, which two processes cannot do at once.

    Raises UsageError when a package is missing, when W&B has no account to write to, or when MLflow's store does not answer.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"resources.trackers: {name} is not installed; pip install medssl[{name}]")
    if "wandb" in names and os.environ.get("WANDB_MODE") not in OFFLINE:
        import wandb

        if not wandb.login(prompt=False):
            raise UsageError("resources.trackers: wandb has no account here; type `wandb login`, or set WANDB_MODE=offline")
    if "mlflow" in names:
        from mlflow.exceptions import MlflowException

        try:
            _experiment(_client(store))
        except MlflowException as error:
            raise UsageError(f"resources.trackers: mlflow does not answer ({str(error).splitlines()[0]})") from error


@contextlib.contextmanager
def opened(names: Sequence[str], folder: Path, sweep: str, store: Path) -> Iterator[Runs]:
    """The trackers named, for the stage whose folder holds run.json; closed at the end, as failed on an error."""
    runs, failed = Runs(), True
    try:
        if names:
            record = json.loads((folder / "run.json").read_text())
            makers: dict[str, Callable[[], Run]] = {
                "wandb": lambda: _Wandb(folder, record, sweep),
                "mlflow": lambda: _MLflow(store, record, sweep),
            }
            for name in names:
                runs.begin(name, makers[name])
        yield runs
        failed = False
    finally:
        runs.close(failed)


def _title(record: Mapping[str, Any]) -> str:
    return f"{record['arm']} #{record['pretraining'] + 1} {record['kind']}"


def _group(record: Mapping[str, Any], sweep: str) -> str:
    return (f"{sweep}/{record['arm']}" if sweep else str(record["arm"]))[:LONGEST]


class _Wandb:
    def __init__(self, folder: Path, record: Mapping[str, Any], sweep: str):
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "medssl"),
            id=record["stage"],
            resume="allow",
            name=_title(record),
            group=_group(record, sweep),
            job_type=record["kind"],
            config=dict(record),
            dir=str(folder),
            reinit="create_new",  # Ray reuses processes: the run of the stage before is not ours
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def end(self, done: Mapping[str, Any]) -> None:
        self.run.summary.update(_flat(done))

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class _MLflow:
    def __init__(self, store: Path, record: Mapping[str, Any], sweep: str):
        self.client = _client(store)
        experiment = _experiment(self.client)
        known = self.client.search_runs([experiment], f"tags.`medssl.stage` = '{record['stage']}'", max_results=1)
        if known:  # goes on
            self.id = known[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
        else:
            tags = {"medssl.stage": record["stage"], "medssl.kind": record["kind"], "medssl.group": _group(record, sweep)}
            self.id = self.client.create_run(experiment, run_name=_title(record), tags=tags).info.run_id
            from mlflow.entities import Param

            self.client.log_batch(self.id, params=[Param(name, str(value)) for name, value in _flat(record).items()])
        self.pending: Any = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        rows = self._metrics(step, values)
        self.pending = self.client.log_batch(self.id, metrics=rows, synchronous=False)  # a slow store must not slow training

    def _metrics(self, step: int, values: Mapping[str, float]) -> list[Any]:
        from mlflow.entities import Metric

        at = int(time.time() * 1000)
        return [Metric(name, float(value), at, step) for name, value in values.items()]

    def end(self, done: Mapping[str, Any]) -> None:
        flat = _flat(done)
        numbers = {name: value for name, value in flat.items() if isinstance(value, int | float) and math.isfinite(value)}
        final = {f"final/{name}": value for name, value in numbers.items()}
        self.client.log_batch(self.id, metrics=self._metrics(int(flat.get("step", 0)), final))
        for name in flat.keys() - numbers.keys():
            self.client.set_tag(self.id, f"medssl.{name}", str(flat[name]))

    def close(self, failed: bool) -> None:
        if self.pending is not None:
            self.pending.wait()
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


def _client(store: Path) -> Any:
    from mlflow import MlflowClient

    store.mkdir(parents=True, exist_ok=True)
    return MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store / 'mlflow.db'}")


def _experiment(client: Any) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "medssl")
    found = client.get_experiment_by_name(name)
    return found.experiment_id if found else client.create_experiment(name)


def _flat(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return flat
