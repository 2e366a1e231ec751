"""Where stages find their place: what a trial holds, and how many trials may run at a time so that none waits for ever.

A one-worker stage runs inside its trial, which holds the stage's cores and GPU share. A stage of several workers opens a
group of its own from within a trial that holds nothing that its workers need, and a group is placed whole or not at all. So no
group holds what others wait for, if as many run at a time as find place: counted machine by machine, as no worker is split
over two. Where machines die, fewer groups are up and the others wait; they have nothing that the running ones lack.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence

from medssl.platform.config import Resources
from medssl.platform.errors import UsageError

Machine = Mapping[str, float]  # "CPU", "GPU"

GROWS = "MEDSSL_CLUSTER"  # machines x CPUs x GPUs that an autoscaled cluster can grow to; Ray itself tells nobody
MOST = 0.9  # of a GPU's memory that stages may fill together: allocators and kernels need the rest
SMALLEST = 0.05  # of a GPU: smaller shares only add contexts, of some 0.5 GB each
CONTEXT = 0.6e9  # bytes of a process's CUDA context and libraries, which no allocator counts


def machines() -> list[Machine]:
    """What the Ray cluster that this process is connected to has, or can grow to where MEDSSL_CLUSTER says so."""
    import ray

    here: list[Machine] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return max(here, planned(), key=lambda some: sum(one.get("CPU", 0.0) for one in some))


def planned() -> list[Machine]:
    """What MEDSSL_CLUSTER says, as in 8x16x1: eight machines of 16 CPUs and a GPU."""
    said = os.environ.get(GROWS, "")
    if not said:
        return []
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", said)
    if not found:
        raise UsageError(f"{GROWS}={said}: expected machines x CPUs x GPUs of each, as in 8x16x1")
    count, cpus, gpus = map(int, found.groups())
    return [{"CPU": float(cpus), "GPU": float(gpus)}] * count


def share(resources: Resources, cluster: Sequence[Machine]) -> tuple[dict[str, float], int]:
    """What one trial holds, and how many may run at a time on these machines.

    Raises UsageError where not even one finds place.
    """
    gpus = resources.gpus if resources.gpus is not None else float(any(one.get("GPU", 0) >= 1 for one in cluster))
    if resources.workers > 1:
        gpus = float(math.ceil(gpus))  # workers of one stage cannot share a GPU: NCCL refuses
    need = {"CPU": float(resources.cpus), "GPU": gpus}
    workers = sum(_fitting(need, one) for one in cluster)
    at_once = workers // resources.workers or int(workers >= resources.least)
    if at_once < 1:
        wanted = " and ".join(f"{amount:g} {kind}" for kind, amount in need.items() if amount)
        each = f"{resources.least} workers of {wanted} each" if resources.least > 1 else wanted
        has = " and ".join(f"{sum(one.get(kind, 0.0) for one in cluster):g} {kind}" for kind in need)
        raise UsageError(
            f"a stage needs {each}, the cluster has {has} on {len(cluster)} machine{'s' if len(cluster) != 1 else ''}; "
            f"if it grows by itself, say how far: {GROWS}=8x16x1 is eight machines of 16 CPUs and a GPU"
        )
    # Tune refuses a trial that asks for nothing; a mebibyte of memory is next to nothing, and no core of the workers'
    return (need if resources.workers == 1 else {"CPU": 0.0, "memory": float(2**20)}), at_once


def _fitting(need: Machine, machine: Machine) -> int:
    """Workers that find place on a machine. Fractions of a GPU are of one GPU: 0.4 fits twice on each, not 2.5 times."""
    amount = need["GPU"]
    on_gpus = math.inf
    if amount:
        gpus = int(machine.get("GPU", 0.0))
        on_gpus = gpus * int(1 / amount + 1e-9) if amount < 1 else gpus // amount
    return int(min(machine.get("CPU", 0.0) // need["CPU"], on_gpus))


def fraction(peak: float, memory: float, cpus: int = 1, cores: float = math.inf, gpus: int = 1, busy: float = 1.0) -> float:
    """The share of a GPU that one-worker stages should ask for, so that as many as pay run on each.

    peak      bytes that the allocator of one stage holds at most, as measured
    memory    bytes of the GPU
    cpus      cores of a stage, of `cores` that the machine has for its `gpus`
    busy      share of the time in which one stage alone keeps the GPU busy: above a half, packing gains little
    1.0: do not pack. Raises UsageError when one stage does not fit.
    """
    each = peak + CONTEXT
    if each > memory:
        raise UsageError(
            f"a stage needs {each / 1e9:.1f} GB, the GPU has {memory / 1e9:.1f}; "
            "lower training.batch, or raise training.accumulate"
        )
    together = int(min(MOST * memory / each, cores / gpus / cpus, 1 / max(busy, SMALLEST) + 1e-9, 1 / SMALLEST))
    return math.floor(10_000 / together) / 10_000 if together > 1 else 1.0
