"""pyguide._C with the CUDA kernels run on the host: blocks and threads are simulated, all else is the module's own."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11

ROOT = Path(__file__).resolve().parents[2]
# The arithmetic must be that of the CPU kernel: no contraction. No fortified longjmp, which some compilers turn on by
# themselves: it takes a jump from one fiber's stack to another's for an overflow and aborts.
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-g0", "-U_FORTIFY_SOURCE"]
FLAGS += ['-DPG_VERSION="simulated"']
WARNINGS = ["-O1", "-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
SOURCES = {  # the rest as fast as it compiles
    "tests/simulated/step.cpp": WARNINGS,
    "csrc/bindings.cpp": ["-O0"],
    "csrc/classifier_grad_bindings.cpp": ["-O0"],
    "csrc/moments_bindings.cpp": ["-O0"],
    "csrc/cpu.cpp": ["-O0"],
    "csrc/dispatch.cpp": ["-O0"],
}
COUNTERS = ("bulk_loads", "bulk_stores", "bulk_copies", "small_copies", "loads", "stores", "blocks", "launches")


def build(folder: Path) -> ModuleType:
    """Compiles and loads the module in `folder`. RuntimeError with what the compiler said."""
    include = [pybind11.get_include(), sysconfig.get_path("include"), str(ROOT / "csrc")]
    arguments = ["c++", *FLAGS, *(f"-I{path}" for path in include)]

    def run(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")

    objects = [folder / f"{i}.o" for i in range(len(SOURCES))]
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            [*arguments, *options, "-DPG_LEVEL=0", "-c", str(ROOT / source), "-o", str(to)]
            for (source, options), to in zip(SOURCES.items(), objects, strict=True)
        ]
        list(pool.map(run, jobs))
    library = folder / "simulated_C.so"
    run(["c++", "-shared", "-o", str(library), *map(str, objects)])
    # Python looks for the symbol PyInit__C: the last part of the name
    loader = importlib.machinery.ExtensionFileLoader("simulated._C", str(library))
    spec = importlib.util.spec_from_file_location("simulated._C", library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def reset(module: ModuleType, seed: int, processors: int = 2) -> None:
    """The order of blocks and threads from now on, and the multiprocessors of the device; the counters begin at 0."""
    _library(module).simulated_device(ctypes.c_uint64(seed), processors)


def separate(module: ModuleType, wanted: bool) -> None:
    """Whether moments and step are two launches even where one would do."""
    _library(module).simulated_separate(int(wanted))


def counts(module: ModuleType) -> dict[str, int]:
    """Accesses by kind, blocks and launches since `reset`."""
    count = _library(module).simulated_count
    count.restype = ctypes.c_uint64
    return {name: int(count(i)) for i, name in enumerate(COUNTERS)}


def parts(module: ModuleType, batch: int, elements: int, tile: int, resident: int) -> int:
    """Blocks of each sample on a device that holds `resident` blocks at a time."""
    function = _library(module).simulated_parts
    function.argtypes, function.restype = [ctypes.c_int64] * 4, ctypes.c_int64
    return int(function(batch, elements, tile, resident))


def _library(module: ModuleType) -> Any:
    return ctypes.CDLL(module.__file__)
