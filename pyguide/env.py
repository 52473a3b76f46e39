"""What runs here and what does not, with the reason: `python -m pyguide.env [--json]`.

Needs numpy alone. Optional packages are really imported, so that one that is installed but broken shows its error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from typing import Any

import numpy as np

from . import backends, native
from .extras import require
from .version import __version__

OPTIONAL = ("torch", "triton", "onnxruntime", "diffusers")


def _package(name: str) -> str:
    """Its version, or why it cannot be used."""
    try:
        return str(require(name).__version__)
    except ImportError as error:
        return str(error)
    except Exception as error:  # anything can happen while a half-installed package is imported
        return f"installed, but fails to import: {type(error).__name__}: {error}"


def _native() -> dict[str, Any]:
    """The compiled core: what it was built with and what it uses on this machine."""
    module = native.C
    if module is None:
        return {"loaded": False, "reason": native.reason}
    return {
        "loaded": True,
        "file": module.__file__,
        "abi": module.ABI,
        "isa": module.isa(),
        "isas": module.isas(),
        "openmp": module.build["openmp"],
        "threads": _threads() if module.build["openmp"] else 1,
        "compiler": module.build["compiler"],
        "flags": module.build["flags"],
        "cuda": module.build["cuda"],
        "cuda_archs": module.build["cuda_archs"],
    }


def _cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads() -> int:
    """The most threads that one launch takes: what OMP_NUM_THREADS says, else every CPU."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(asked) if asked.isdigit() else _cpus()


def report() -> dict[str, Any]:
    """Versions, the native core and the back ends, as plain data that `json.dumps` accepts.

    Keys: pyguide, python, platform, cpus, packages {name: version or reason}, native {loaded, and reason or else file,
    abi, isa (in use), isas (available), openmp, threads, compiler, flags, cuda (nvcc's version or why there are no CUDA
    kernels), cuda_archs}, backends {name: "ready" or why not}.
    """
    packages = {"numpy": np.__version__} | {name: _package(name) for name in OPTIONAL}
    core = _native()
    torch = "ready" if "torch" in sys.modules else packages["torch"]
    return {
        "pyguide": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()}, {sys.executable})",
        "platform": platform.platform(),
        "cpus": _cpus(),
        "packages": packages,
        "native": core,
        "backends": {
            "native (CPU)": backends.why_not("native", "cpu") or "ready",
            "native (CUDA)": backends.why_not("native", "cuda") or "ready",
            "triton": backends.why_not("triton", "cuda") or "ready",
            "reference": "ready" if torch == "ready" else f"ready for numpy arrays; {torch}",
        },
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pyguide.env", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    found = report()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    sections = {"": {key: found[key] for key in ("pyguide", "python", "platform", "cpus")}}
    sections |= {key: found[key] for key in ("packages", "native", "backends")}
    for title, rows in sections.items():
        if title:
            print(f"\n{title}")
        for key, value in rows.items():
            print(f"  {key:<14} {', '.join(value) if isinstance(value, list) else value}")


if __name__ == "__main__":
    main()
