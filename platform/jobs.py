"""Sweeps as jobs of a Ray cluster: the driver runs on the cluster's head, and the laptop that submitted it may go.

A thin layer over Ray's Jobs API (https://docs.ray.io/en/latest/cluster/running-applications/job-submission/), which is served
by the cluster's dashboard: `ray[default]` on both sides, which `medssl[cluster]` brings. What a job leaves lies in the run
store, as always; typed again from anywhere, a sweep finds it.

A job finds what it needs in the environment of the head, as `ray start` was given it: MEDSSL_DATA and MEDSSL_RUNS, and `medssl`
or a `python` that can import it on the PATH. What a cluster does not say for all can be said for one job: `submit --env`.
"""

import contextlib
import os
import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import Sequence
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

# What the head's shell runs. A job with files starts in a folder that Ray removes afterwards: results must lie elsewhere.
ENTRY = (
    'for place in MEDSSL_DATA MEDSSL_RUNS; do eval "value=\\$$place"; case "$value" in /*|*://*) ;; *) '
    "echo \"error: $place is '$value' on the head, expected an absolute path or a URI that all machines reach; start the "
    'head with it, or submit with --env $place=…" >&2; exit 2;; esac; done; '
    'if command -v medssl >/dev/null; then exec medssl "$@"; else exec python -m medssl.cli "$@"; fi'
)
ALONE = ("pretrain", "finetune")  # commands that train in their own process: on the head, which has no GPU, they would be lost


def client(address: str | None) -> "JobSubmissionClient":
    """The cluster's Jobs API. Raises RunError when this machine lacks what it needs, or nothing answers there.

    Without an address it is that of RAY_API_SERVER_ADDRESS, else ADDRESS.
    """
    try:
        import aiohttp  # noqa: F401  ray.job_submission needs it, and says so less clearly
    except ImportError as error:
        raise RunError(
            'Ray\'s Jobs API needs ray[default], which is not installed here; python -m pip install "medssl[cluster]"'
        ) from error
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    where = address or os.environ.get("RAY_API_SERVER_ADDRESS", ADDRESS)
    os.environ["RAY_API_SERVER_ADDRESS"] = where  # Ray lets it, and RAY_ADDRESS, win over what was typed
    try:
        return JobSubmissionClient(where)
    except (ConnectionError, RuntimeError) as error:
        raise RunError(f"no Ray cluster answers at {where}; is `ray dashboard cluster.yaml` running?") from error
    except AuthenticationError as error:
        raise RunError(
            f"the cluster at {where} wants its token, which this machine lacks or has otherwise; "
            "set RAY_AUTH_TOKEN_PATH to a copy of the head's ~/.ray/auth_token"
        ) from error


def spreads(words: Sequence[str]) -> bool:
    """Whether a command of medssl would spread its work over a cluster's nodes, and has not been told which cluster."""
    command = words[0] == "sweep" or list(words[:2]) == ["data", "prepare"]
    return command and not any(word.split("=")[0] == "--address" for word in words)


def submit(
    words: Sequence[str], address: str | None, environment: Sequence[str] = (), cpus: float | None = None, gpus: float = 0
) -> str:
    """Run `medssl words…` on the cluster; returns the job's name. Files below this folder that are named travel along.

    A sweep, and the preparation of data, is told to use the cluster that it runs on.
    environment   "NAME=VALUE", for the job and its workers
    cpus, gpus    what the command itself holds, on whatever machine has them; None and 0: nothing, and it runs on the head;
                  of a command that trains by itself, one core
    """
    if not words or words[0] not in ("sweep", "pretrain", "finetune", "data", "leaderboard", "report", "doctor", "status"):
        raise UsageError("what shall the cluster do? medssl cluster submit sweep SPACE …")
    words = list(words)
    if spreads(words):
        words += ["--address", "auto"]
    for setting in environment:
        if not setting.partition("=")[0].isidentifier() or "=" not in setting:
            raise UsageError(f"--env {setting}: expected NAME=VALUE, as in --env MEDSSL_RUNS=s3://bucket/runs")
    files = _named(words)
    jobs = client(address)
    with tempfile.TemporaryDirectory() as folder:
        for source in files:
            target = Path(folder) / source
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        there: dict[str, Any] = {"working_dir": folder} if files else {}
        if environment:
            there["env_vars"] = dict(setting.split("=", 1) for setting in environment)
        return jobs.submit_job(
            entrypoint=shlex.join(["sh", "-c", ENTRY, "medssl", *words]),
            submission_id=_name(f"{OURS}{words[0]}"),
            metadata={"command": shlex.join(words)},
            runtime_env=there,
            entrypoint_num_cpus=cpus if cpus is not None else 1 if words[0] in ALONE else 0,
            entrypoint_num_gpus=gpus,
        )


def _name(beginning: str) -> str:
    return f"{beginning}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def _named(words: Sequence[str]) -> list[Path]:
    """The files that words name by a relative path. Raises UsageError for one that lies above this folder."""
    found = []
    for word in words:
        source = Path(word.partition("=")[2] if word.startswith("--") else word)
        with contextlib.suppress(OSError):  # a word too long to be a name
            if not source.is_absolute() and source.is_file():
                if ".." in source.parts:
                    raise UsageError(f"{source}: lies outside this folder, and only files below it travel; copy it here")
                found.append(source)
    return found


def running(address: str | None) -> list[dict[str, Any]]:
    """The jobs that medssl has submitted, newest first: name, status, command, when they began and ended."""
    found = [job for job in client(address).list_jobs() if (job.submission_id or "").startswith(OURS)]
    plain = [
        {
            "job": job.submission_id,
            "status": job.status.value,
            "command": (job.metadata or {}).get("command", job.entrypoint),
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
    return "\n".join(f"{job['job']:<38} {job['status']:<10} {_hours(job)}  {job['command']}" for job in found)


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
    job = jobs.submit_job(entrypoint=SHUTDOWN, submission_id=_name(STOPPING), metadata={"command": "cluster down"})
    with contextlib.suppress(OSError):  # it is down already
        while (status := jobs.get_job_status(job).value) in ("PENDING", "RUNNING"):
            time.sleep(0.5)
        if status != "SUCCEEDED":
            said = jobs.get_job_logs(job).strip().splitlines() or [status]
            raise RunError(
                f"the cluster does not say how to shut it down ({said[-1]}); "
                "use what brought it up: ray down, kubectl delete or scancel"
            )
    return "the cluster is going down"
