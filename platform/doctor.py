"""What this machine has, and what its processor really executes.

Some virtual machines advertise instructions (AMX for bf16) that then fault, which no Python can catch. So each number
format is tried in a child process, and the verdict is the child's exit status.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from medssl.platform import site

PROBE = """
import torch
x = torch.randn(8, 8, 32, 32)
with torch.autocast("cpu", torch.{dtype}, enabled={autocast}):
    y = torch.nn.Conv2d(8, 16, 3)(x).float() + 0
    z = (torch.randn(128, 128) @ torch.randn(128, 128)).float()
assert y.isfinite().all() and z.isfinite().all()
"""
FORMATS = {
    "fp32": ("float32", False, {}),
    "bf16": ("bfloat16", True, {}),
    "bf16 with ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16": ("bfloat16", True, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}),
}


def probe(dtype: str, autocast: bool, environment: dict[str, str]) -> str:
    """How a convolution and a matrix product of this format end: "works", or why not."""
    code = PROBE.format(dtype=dtype, autocast=autocast)
    child = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if child.returncode == 0:
        return "works"
    if child.returncode < 0:
        return f"faults ({signal.Signals(-child.returncode).name}): this processor advertises what it does not execute"
    return f"fails: {child.stderr.strip().splitlines()[-1]}"


def examine() -> dict[str, Any]:
    """Versions, devices, memory, folders, and the probes."""
    import torch

    here = site.Site.here()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        **site.provenance(),
        "memory_gib": round(pages / 2**30, 1),
        "gpus": [{"name": device.name, "memory_gib": round(device.total_memory / 2**30, 1)} for device in devices],
        "folders": {name: _folder(path) for name, path in (("data", here.data), ("runs", here.runs))},
        "processor": {name: probe(*how) for name, how in FORMATS.items()},
        "default": "bf16 on GPUs is yours to choose (training.precision=bf16); on a CPU fp32 is the default",
    }


def _folder(path: Path) -> dict[str, Any]:
    there = path
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free / 2**30
    return {
        "path": str(path),
        "exists": path.exists(),
        "writable": os.access(there, os.W_OK),
        "free_gib": round(free, 1),
    }


def describe(found: dict[str, Any]) -> str:
    """The same for people."""
    lines = [f"medssl {found['medssl']} (commit {found['commit'][:10]}), Python {found['python']}"]
    lines.append("packages   " + ", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    lines.append(f"machine    {found['machine']['cores']} cores, {found['memory_gib']} GiB of memory")
    lines.append("GPUs       " + (", ".join(f"{gpu['name']} {gpu['memory_gib']} GiB" for gpu in found["gpus"]) or "none"))
    for name, folder in found["folders"].items():
        note = "" if folder["writable"] else ", NOT WRITABLE"
        lines.append(f"{name:<10} {folder['path']} ({folder['free_gib']} GiB free{note})")
    lines += [f"processor  {name}: {verdict}" for name, verdict in found["processor"].items()]
    return "\n".join([*lines, f"           {found['default']}"])
