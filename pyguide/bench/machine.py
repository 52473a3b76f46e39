"""What a measurement was made on: every row of a JSON file carries it."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .. import native
from ..version import __version__

FALLBACK_CACHE = 32 << 20  # where the machine does not say


def facts() -> dict[str, Any]:
    """device, cores, threads, cache_bytes, isa, versions, commit and date, as plain data."""
    return {
        "device": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": sys.modules["torch"].get_num_threads() if "torch" in sys.modules else 1,
        "cache_bytes": cache_bytes(),
        "isa": native.C.isa() if native.C is not None else f"no native kernel: {native.reason}",
        "versions": versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


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
    for name in ("torch", "diffusers", "sklearn"):
        if name in sys.modules:
            found[name] = str(sys.modules[name].__version__)
    return found


def commit() -> str | None:
    """The commit of the tree that this file lies in, with "+changes" if it has any; None outside a git tree."""
    here = Path(__file__).parent
    try:
        ask = {"cwd": here, "capture_output": True, "text": True, "check": True, "timeout": 10}
        subprocess.run(["git", "ls-files", "--error-unmatch", __file__], **ask)  # type: ignore[call-overload]
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **ask).stdout.strip()  # type: ignore[call-overload]
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], **ask).stdout.strip()  # type: ignore[call-overload]
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+changes" if changed else str(head)
