"""Sweeps as jobs of a Ray cluster: the driver runs on the cluster's head, and the laptop that submitted it may go.

A thin layer over Ray's Jobs API (https://docs.ray.io/en/latest/cluster/running-applications/job-submission/), which is served
by the cluster's dashboard: `ray[default]` on both sides, which `medssl[cluster]` brings. What a job leaves lies in the run
store, as always; typed again from anywhere, a sweep finds it.
"""

import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medssl.platform.errors import RunError, UsageError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ADDRESS = "http://127.0.0.1:8265"  # where `ray dashboard` and `kubectl port-forward` bring a cluster's dashboard
STOPPING = "medssl-shutdown"  # how the job that takes a cluster down is called
OURS = "medssl-"
# The job ends before the machine does, so that it can be told how it went.
SHUTDOWN = (
    'test -n "$MEDSSL_SHUTDOWN" || { echo "MEDSSL_SHUTDOWN is not set on the head"; exit 1; }; '
    'setsid nohup sh -c "sleep 2; $MEDSSL_SHUTDOWN" >/dev/null 2>&1 &'
)

Say = Callable[[str], None]


def client(address: str | None) -> "JobSubmissionClient":
    """The cluster's Jobs API. Raises RunError when this machine lacks what it needs, or nothing answers there."""
    try:
        import aiohttp  # noqa: F401  ray.job_submission needs it, and says so less clearly
    except ImportError as error:
        raise RunError(
            'Ray\'s Jobs API needs ray[default], which is not installed here; python -m pip install "medssl[cluster]"'
        ) from error
    from ray.job_submission import JobSubmissionClient

    where = address or os.environ.get("RAY_API_SERVER_ADDRESS", ADDRESS)
    try:
        return JobSubmissionClient(where)
    except (ConnectionError, RuntimeError) as error:
        raise RunError(f"no Ray cluster answers at {where}; is `ray dashboard cluster.yaml` running?") from error


def submit(words: Sequence[str], address: str | None) -> str:
    """Run `medssl words…` on the cluster; returns the job's name. Files and folders of this folder that are named travel along.

    A sweep is told to use the cluster that it runs on.
    """
    if not words or words[0] not in ("sweep", "pretrain", "finetune", "data", "leaderboard", "report", "doctor", "status"):
        raise UsageError("what shall the cluster do? medssl cluster submit sweep SPACE …")
    words = list(words)
    if words[0] == "sweep" and "--address" not in words:
        words += ["--address", "auto"]
    jobs = client(address)
    with tempfile.TemporaryDirectory() as folder:
        for word in words:
            source = Path(word)
            if not source.is_absolute() and ".." not in source.parts and source.is_file():
                target = Path(folder) / source
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        name = f"{OURS}{words[0]}-{time.strftime('%Y%m%d-%H%M%S')}"
        travelling: dict[str, Any] = {"runtime_env": {"working_dir": folder}} if any(Path(folder).iterdir()) else {}
        return jobs.submit_job(entrypoint=shlex.join(["medssl", *words]), submission_id=name, **travelling)


def running(address: str | None) -> list[dict[str, Any]]:
    """The jobs that medssl has submitted, newest first: name, status, command, when they began and ended."""
    found = [job for job in client(address).list_jobs() if (job.submission_id or "").startswith(OURS)]
    plain = [
        {
            "job": job.submission_id,
            "status": str(getattr(job.status, "value", job.status)),
            "command": job.entrypoint,
            "started": (job.start_time or 0) / 1000,
            "ended": job.end_time / 1000 if job.end_time else None,
        }
        for job in found
    ]
    return sorted(plain, key=lambda job: job["started"], reverse=True)


def describe(found: Sequence[dict[str, Any]]) -> str:
    """A line per job."""
    if not found:
        return "no job of medssl on this cluster"
    return "\n".join(f"{job['job']:<32} {job['status']:<10} {_hours(job)}  {job['command']}" for job in found)


def _hours(job: dict[str, Any]) -> str:
    seconds = round((job["ended"] or time.time()) - job["started"])
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def logs(name: str | None, address: str | None) -> str:
    """What a job has printed so far; of the newest when none is named."""
    return client(address).get_job_logs(_find(name, address))


def stop(name: str | None, address: str | None) -> str:
    """End a job; typing its sweep again continues it."""
    job = _find(name, address)
    client(address).stop_job(job)
    return job


def _find(name: str | None, address: str | None) -> str:
    from medssl.platform import find

    known = [job["job"] for job in running(address) if not job["job"].startswith(STOPPING)]
    hits = [job for job in known if name is None or job.startswith(name)]
    if not hits:
        raise UsageError(f"no job {name or ''} on this cluster; {find.nearest(name or '', known or ['none yet'])}")
    return hits[0]


def down(address: str | None, *, sure: bool) -> str:
    """Take the cluster down, by what its head says does it (MEDSSL_SHUTDOWN; the rendered files set it).

    Raises UsageError while a job runs, unless `sure`.
    """
    busy = [job["job"] for job in running(address) if job["status"] in ("RUNNING", "PENDING")]
    if busy and not sure:
        raise UsageError(f"{', '.join(busy)} still runs; --yes takes the cluster down all the same, and typed again it goes on")
    jobs = client(address)
    job = jobs.submit_job(entrypoint=SHUTDOWN, submission_id=f"{STOPPING}-{time.strftime('%H%M%S')}")
    while str(getattr(status := jobs.get_job_status(job), "value", status)) in ("PENDING", "RUNNING"):
        time.sleep(0.5)
    if str(getattr(status, "value", status)) != "SUCCEEDED":
        raise RunError(
            f"the cluster does not say how to shut it down ({jobs.get_job_logs(job).strip()}); "
            "use what brought it up: ray down, kubectl delete or scancel"
        )
    return "the cluster is going down"
