"""What benchmarks/gpu.sh prints: the machine at its beginning, the short table at its end.

    python -m pyguide.bench.gpu --machine
    python -m pyguide.bench.gpu --rows FILE --stages FILE

Rows are those of `--json FILE.jsonl`; stages are lines "name<TAB>how it ended<TAB>seconds". A file that is missing or a
line that was cut off counts as not there: this must print whatever happened before.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import machine
from .reaches import details, faster, table

ROOM = 40  # lines in all
PACKAGES = ("torch", "triton", "numpy", "pybind11", "setuptools", "ninja", "pytest", "rich", "safetensors", "diffusers")


def describe() -> Iterator[str]:
    """The machine in lines; of a GPU's compute capability one by itself, "arch 90", for the build."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    commit = machine.commit() or "unknown"
    yield f"{machine.cpu_model()}, {cores} cores, python {platform.python_version()}, commit {commit}"
    said = []
    for name in PACKAGES:
        try:
            said.append(f"{name} {getattr(importlib.import_module(name), '__version__', '')}".strip())
        except Exception as error:  # anything can happen in a package that is half installed
            said.append(f"no {name} ({type(error).__name__})")
    yield ", ".join(said)
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is None or not cuda.is_available():
        yield "no GPU: torch finds no CUDA device"
        return
    for i in range(cuda.device_count()):
        gpu, memory = cuda.get_device_properties(i), cuda.mem_get_info(i)
        yield (
            f"GPU {i}: {gpu.name}, {gpu.multi_processor_count} multiprocessors, L2 {gpu.L2_cache_size >> 20} MiB, "
            f"{memory[0] >> 20} of {memory[1] >> 20} MiB free, driver {machine.driver()}, "
            f"CUDA {sys.modules['torch'].version.cuda}"
        )
    yield "arch {}{}".format(*cuda.get_device_capability())


def read(file: Path | None) -> list[dict[str, Any]]:
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file is not None and file.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # the benchmark was ended in the middle of it
    return [row for row in rows if row.get("suite") == "gpu"]


def report(rows: list[dict[str, Any]], stages: list[list[str]]) -> list[str]:
    lines = []
    if rows:
        row = rows[-1]
        where = [row["device"]] + ([f"driver {row['driver']}"] if row.get("driver") else [])
        versions = [f"{name} {version}" for name, version in row["versions"].items()]
        lines.append(", ".join([*where, *versions, f"commit {row['commit'] or 'unknown'}"]))
    lines += [f"{name:<12} {ended:<40} {seconds:>5} s" for name, ended, seconds in stages]
    lines += ["", *table(rows)]
    more = [*faster(rows), *details(rows)]
    return lines + more[: max(0, ROOM - len(lines))]


def main() -> None:
    made = argparse.ArgumentParser(prog="python -m pyguide.bench.gpu", description=__doc__.partition("\n")[0])
    made.add_argument("--rows", type=Path, metavar="FILE", help="JSON lines of the suite gpu")
    made.add_argument("--stages", type=Path, metavar="FILE", help="how the stages of benchmarks/gpu.sh ended")
    made.add_argument("--machine", action="store_true", help="say what this machine is, and no table")
    options = made.parse_args()
    if options.machine:
        print("\n".join(describe()))
        return
    text = options.stages.read_text(encoding="utf-8") if options.stages and options.stages.is_file() else ""
    stages = [line.split("\t") for line in text.splitlines() if line.count("\t") == 2]
    print("\n".join(report(read(options.rows), stages)))


if __name__ == "__main__":
    main()
