"""What several test files share: one local Ray, and the folder of real scans where there is one."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Tensors here have a few dozen numbers: threads would cost more than they save, tens of times more beside other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One Ray of two CPUs for the whole session, started by the first test that asks for it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Real scans, which never enter git."""
    if not DATA.is_dir():
        pytest.skip(f"no real scans in {DATA}")
    return DATA
