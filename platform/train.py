"""A stage on several workers, through Ray Train; on one, it is a function call.

Ray Train places the workers, joins them into a process group, notices when one dies, and starts the group again. What a
stage needs to continue is its own: a checkpoint in its folder that every worker reads before it starts.

A group that may be smaller than asked for starts with as many workers as find place, and starts again, from the checkpoint,
when a machine dies or there is place for more. Ray counts places anew every 20 s, so that the first group after a loss may
ask for one that is gone; it gives up after a minute (RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S), and the next is right.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from medssl.platform import atomic
from medssl.platform.errors import RunError, UsageError

MAX_FAILURES = 3  # times that a stage survives the loss of workers; the sweep, typed again, goes on from there too

GROWING = 60.0  # seconds between two looks whether a group can grow: to do so, it goes back to its last checkpoint

FINAL = (RunError, UsageError, ValueError)  # errors of the input, not of the machine; methods raise ValueError

Work = Callable[[Any, int, int, torch.device], Any]


def launch(
    function: Work,
    payload: Any,
    *,
    workers: int,
    least: int | None = None,
    gpu: bool,
    folder: Path,
    name: str,
    cpus_per_worker: int = 1,
) -> Any:
    """Run `function(payload, rank, world, device)` in `workers` processes that form a group; gives what rank 0 returned,
    plain values or NumPy arrays.

    One worker is this process: no group, no Ray. More of them need `ray.init`, a `function` that they can import, and, on
    a cluster, a `folder` that all nodes see; Ray Train's own record goes to `folder / name`. When a worker dies, all are
    started again, with the same arguments; with as few as `least` of them where no more find place, and with more once they do.
    Raises the RunError, UsageError or ValueError of a worker as it is: it would only come back, and is not tried again.
    """
    if workers == 1:
        return function(payload, 0, 1, torch.device("cuda" if gpu else "cpu"))

    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    group: dict[str, Any] = {"num_workers": workers}
    if least is not None and least < workers:
        group = {"num_workers": (least, workers), "elastic_resize_monitor_interval_s": GROWING}
    folder = folder.resolve()
    given_up = folder / f"{name}.error"
    given_up.unlink(missing_ok=True)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "function": function,
            "payload": payload,
            "given_up": given_up,
            "folder": Path.cwd(),
            "cpus": cpus_per_worker,
        },
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            use_gpu=gpu, resources_per_worker={"CPU": cpus_per_worker, **({"GPU": 1} if gpu else {})}, **group
        ),
        run_config=RunConfig(name=name, storage_path=str(folder), failure_config=FailureConfig(max_failures=MAX_FAILURES)),
    )
    fitted: Any = trainer.fit()
    result = fitted.return_value
    if isinstance(result, FINAL):
        given_up.unlink(missing_ok=True)
        raise result
    return result


def count_places_here() -> None:
    """Start Ray's account of places on this machine, the driver's.

    Else it lives where the first group was asked for, and dies with that machine; a group that may change asks it how large
    it can be, and would wait for its answer for ever (Ray 2.60, `default_autoscaling_coordinator.py`: hard node affinity).
    """
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as account

    account.get_or_create_autoscaling_coordinator()


def _worker(config: dict[str, Any]) -> Any:
    """One process of the group, as Ray Train starts it.

    A worker that ends while the others wait for it in a collective must fail, or they wait for half an hour. So one that
    has met an error which will come back leaves it in a file, and fails; the group that is started next returns it.
    """
    import ray.train
    import ray.train.torch

    given_up = config["given_up"]
    if given_up.exists():
        kind, text = given_up.read_text().split("\n", 1)
        return next(error for error in FINAL if error.__name__ == kind)(text)
    if config["folder"].is_dir():
        os.chdir(config["folder"])  # Ray Train has changed it: relative paths shall mean what they mean to the caller
    torch.set_num_threads(config["cpus"])
    context = ray.train.get_context()
    rank, world, device = context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device()
    try:
        result = config["function"](config["payload"], rank, world, device)
    except FINAL as error:
        atomic.write_text(given_up, f"{type(error).__name__}\n{error}")
        raise
    return result if rank == 0 else None
