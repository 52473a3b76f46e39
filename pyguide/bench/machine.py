"""What a measurement was made on: every row of a JSON file carries it."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .. import native
from ..version import __version__

FALLBACK_CACHE = 32 << 20  # where the machine does not say


def facts(device: str = "cpu") -> dict[str, Any]:
    """device, cores, threads, cache_bytes, isa, versions, commit and date, as plain data.

    Of a GPU ("cuda", "cuda:1"): device is its name and cache_bytes its L2; driver, capability and the host's cpu too.
    """
    found: dict[str, Any] = {
        "device": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": sys.modules["torch"].get_num_threads() if "torch" in sys.modules else 1,
        "cache_bytes": cache_bytes(),
        "isa": native.C.isa() if native.C is not None else f"no native kernel: {native.reason}",
        "versions": versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    return found | (_gpu(device) if device.startswith("cuda") else {})


def _gpu(device: str) -> dict[str, Any]:
    properties = sys.modules["torch"].cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "driver": driver(),
        "capability": f"{properties.major}.{properties.minor}",
        "cache_bytes": properties.L2_cache_size,
        "cpu": cpu_model(),
    }


@cache
def driver() -> str | None:
    """Version of the GPU's driver, as nvidia-smi says it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def cpu_model() -> str:
    """The CPU's name, else the machine type."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cache_bytes() -> int:
    """Size of the largest CPU cache."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="ascii").strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        if text.rstrip("KMG").isdigit():
            sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes, default=FALLBACK_CACHE)


def versions() -> dict[str, str]:
    """Versions of what takes part; packages that are not imported are left out."""
    found = {"pyguide": __version__, "python": platform.python_version(), "numpy": np.__version__}
    for name in ("torch", "diffusers", "sklearn", "triton"):
        if name in sys.modules:
            found[name] = str(sys.modules[name].__version__)
    if "torch" in sys.modules and sys.modules["torch"].version.cuda is not None:
        found["cuda"] = str(sys.modules["torch"].version.cuda)
    if native.C is not None and native.C.build.get("cuda_archs"):
        found["nvcc"] = str(native.C.build["cuda"]).removeprefix("nvcc ")
    return found


@cache
def commit() -> str | None:
    """The commit of the tree that this file lies in, with "+changes" if it has any; None outside a git tree.

    A copy of a tree that went without its .git can say it in the variable PYGUIDE_COMMIT.
    """
    here = Path(__file__).parent
    try:
        ask = {"cwd": here, "capture_output": True, "text": True, "check": True, "timeout": 10}
        subprocess.run(["git", "ls-files", "--error-unmatch", __file__], **ask)  # type: ignore[call-overload]
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **ask).stdout.strip()  # type: ignore[call-overload]
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], **ask).stdout.strip()  # type: ignore[call-overload]
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("PYGUIDE_COMMIT") or None
    return f"{head}+changes" if changed else str(head)
