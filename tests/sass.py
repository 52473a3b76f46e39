"""Machine code of GPU kernels without a GPU: find the CUDA tools, compile, disassemble, and read registers, stack and
memory accesses off the result.

Every number is the compiler's (cuobjdump's resource table) or is counted in nvdisasm's listing; none is an estimate.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("80", "90", "100", "120")
INSTALL = {
    "nvcc": 'CUDA 12.8 or newer on PATH or in /usr/local/cuda, or pip install "cuda-toolkit[cccl,nvcc]==13.0.3"',
    "cuobjdump": "pip install triton, whose package has it, or CUDA 12.8 or newer on PATH",
    "nvdisasm": "pip install triton, whose package has it, or CUDA 12.8 or newer on PATH",
}


# ---- tools ------------------------------------------------------------------------------------------------------
def candidates(tool: str) -> list[Path]:
    """Where `tool` may lie, best first: the machine's own nvcc, but Triton's disassembler, whose age is known."""
    system = [shutil.which(tool), *(f"{root}/bin/{tool}" for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"))]
    pypi = [f"{sysconfig.get_path(place)}/nvidia/cu13/bin/{tool}" for place in ("purelib", "platlib")]
    spec = find_spec("triton")
    triton = [f"{Path(spec.origin).parent}/backends/nvidia/bin/{tool}"] if spec and spec.origin else []
    found = [Path(p) for p in ([*system, *pypi] if tool == "nvcc" else [*triton, *system, *pypi]) if p]
    return [p for p in dict.fromkeys(found) if os.access(p, os.X_OK)]


def missing(tool: str) -> NoReturn:
    """Fail in CI, skip elsewhere; both say what to install."""
    message = f"{tool} was not found; install {INSTALL[tool]}"
    if os.environ.get("CI"):
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


def output(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


@cache
def require(tool: str) -> Path:
    """Its path. nvcc must know the newest of ARCHS: an older one would leave it unproved."""
    for path in candidates(tool):
        if tool != "nvcc" or f"compute_{ARCHS[-1]}" in output(path, "--list-gpu-arch"):
            return path
    missing(tool)


# ---- compiling --------------------------------------------------------------------------------------------------
def compile_cuda(source: Path, folder: Path, flags: Iterable[str] = (), archs: Iterable[str] = ARCHS) -> Path:
    """A binary with machine code for each architecture, by one call of nvcc on two threads."""
    binary = folder / f"{source.stem}.fatbin"
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    output(require("nvcc"), "-std=c++17", "-O3", *flags, *targets, "--threads=2", "-fatbin", source, "-o", binary)
    return binary


def extract(binary: Path, folder: Path) -> dict[str, list[Path]]:
    """The cubins in a binary (an object, a library, a fatbin) by architecture."""
    folder.mkdir(parents=True, exist_ok=True)
    output(require("cuobjdump"), "-xelf", "all", binary.resolve(), cwd=folder)
    cubins: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.cubin")):
        if match := re.search(r"sm_(\d+)", path.name):
            cubins.setdefault(match[1], []).append(path)
    return cubins


# ---- reading ----------------------------------------------------------------------------------------------------
WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
HINTS = {"NA": "no_allocate", "EF": "evict_first", "EL": "evict_last", "LU": "last_use", "CONSTANT": "constant"}
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?PT?\d*)\s+)?([A-Z][\w.]*)\s*(.*)$")
TAIL = re.compile(r"\s*;.*$|\s+[&?].*$")  # newer listings end in ';', older ones in the scoreboard's flags
REGISTER = re.compile(r"(?<![A-Z\w])R(\d+)")


@dataclass(frozen=True)
class Instruction:
    at: int  # bytes from the kernel's entry
    predicate: str
    opcode: str  # with its modifiers: LDG.E.NA.128
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def global_load(self) -> bool:
        return self.name in ("LDG", "LD", "LDGSTS")

    @property
    def global_store(self) -> bool:
        return self.name in ("STG", "ST")

    @property
    def local_memory(self) -> bool:
        return self.name in ("LDL", "STL")

    @property
    def bits(self) -> int:
        """Width of a memory access; an instruction without a width moves 32 bits."""
        return next((WIDTHS[part] for part in self.opcode.split(".")[1:] if part in WIDTHS), 32)

    @property
    def hints(self) -> frozenset[str]:
        return frozenset(HINTS[part] for part in self.opcode.split(".")[1:] if part in HINTS)

    @property
    def registers(self) -> frozenset[int]:
        return frozenset(int(n) for n in REGISTER.findall(self.operands))

    @property
    def loaded(self) -> frozenset[int]:
        """The registers that a load fills."""
        first = REGISTER.match(self.operands)
        return frozenset(range(int(first[1]), int(first[1]) + max(1, self.bits // 32))) if first else frozenset()


@dataclass
class Kernel:
    name: str  # mangled
    arch: str
    registers: int
    stack: int  # bytes per thread: spills and arrays in local memory
    local: int
    shared: int
    code: list[Instruction] = field(default_factory=list)

    def select(self, name: str, hint: str | None = None) -> list[Instruction]:
        return [i for i in self.code if getattr(i, name) and (hint is None or hint in i.hints)]

    def count(self, *names: str) -> int:
        return sum(i.name in names for i in self.code)

    @property
    def calls(self) -> list[str]:
        """Functions called: slow paths of division, square root and the like."""
        targets = (re.search(r"`\((\$[^)]*)\)", i.operands) for i in self.code if i.name == "CALL")
        return [match[1] for match in targets if match]

    def in_flight(self, hint: str | None = None, bits: int = 128) -> int:
        """The most loads of `bits` that are issued before the first use of any of them, in the order of the listing.
        A branch back ends the count: what is in flight over it is not seen."""
        pending: frozenset[int] = frozenset()
        most = count = 0
        for i in self.code:
            if (i.name in ("BRA", "CALL", "EXIT") and not i.predicate) or pending & i.registers:
                pending, count = frozenset(), 0
            if i.global_load and i.loaded and i.bits == bits and (hint is None or hint in i.hints):
                pending, count = pending | i.loaded, count + 1
                most = max(most, count)
        return most


def read(cubin: Path, arch: str) -> list[Kernel]:
    """The kernels of one cubin."""
    usage = output(require("cuobjdump"), "-res-usage", cubin)
    table = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    kernels = {
        name: Kernel(name, arch, int(registers), int(stack), int(local), int(shared))
        for name, registers, stack, shared, local in table
    }
    if not kernels:
        raise RuntimeError(f"{cubin}: no kernel in it\n{usage}")
    into: list[Instruction] | None = None
    for line in output(require("nvdisasm"), "-c", "-ndf", cubin).splitlines():
        if line.startswith(".text."):
            into = kernels[line[len(".text.") : -1]].code
        elif into is not None and (match := LINE.match(line)):
            at, predicate, opcode, rest = match.groups()
            into.append(Instruction(int(at, 16), predicate or "", opcode, TAIL.sub("", rest)))
    for kernel in kernels.values():
        if not kernel.code:
            raise RuntimeError(f"{cubin}: no listing of {kernel.name}")
    return list(kernels.values())


def of_build(folder: Path) -> dict[str, list[Kernel]]:
    """The kernels inside pyguide._C, which are what users run, by architecture. Skips, or fails in CI, without them."""
    from pyguide import native

    C: Any = native.C
    if C is None or not C.build["cuda_archs"]:
        why = native.reason if C is None else C.build["cuda"]
        message = f"pyguide._C: {why}; build it where nvcc is: {INSTALL['nvcc']}"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    if not os.environ.get("CI") and (fewer := set(ARCHS) - set(C.build["cuda_archs"])):
        missing_archs = ", ".join(sorted(fewer, key=int))
        pytest.skip(f"pyguide._C has no code for {missing_archs}: build it without PYGUIDE_CUDA_ARCHS")
    cubins = extract(Path(C.__file__), folder)
    return {arch: [kernel for path in paths for kernel in read(path, arch)] for arch, paths in cubins.items()}


# ---- judging ----------------------------------------------------------------------------------------------------
REGISTERS = 64  # per thread: 1,024 threads on a multiprocessor


def problems(kernel: Kernel, registers: int = REGISTERS) -> list[str]:
    """What no kernel of pyguide may have: too many registers, spills, local memory, functions that are not its own."""
    found = []
    if kernel.registers > registers:
        found.append(f"{kernel.registers} registers, expected at most {registers}")
    if kernel.stack or kernel.local:
        found.append(f"{kernel.stack + kernel.local} bytes of local memory")
    if local := kernel.select("local_memory"):
        found.append(f"{len(local)} accesses to local memory, the first: {local[0].opcode} at {local[0].at:#x}")
    if rough := [i for i in kernel.code if re.match(r"MUFU\.(SIN|COS|TANH|EX2|LG2)", i.opcode)]:
        found.append(f"{rough[0].opcode} at {rough[0].at:#x}: an approximation")
    # correctly rounded, and what no unit does
    exact = re.compile(r"sqrt|div_rn|rcp|_s64|_u64|warpsync|reduxsync|shflsync")
    found += [f"calls {name}" for name in dict.fromkeys(kernel.calls) if not exact.search(name)]
    return found


def bulk_problems(kernel: Kernel, hint: str, widths: tuple[int, ...] = (128,), in_flight: int = 2) -> list[str]:
    """What accesses to tensors, which bear `hint`, may not be: absent, narrow, one at a time."""
    loads, stores = kernel.select("global_load", hint), kernel.select("global_store", hint)
    found = [f"no bulk {what}" for what, some in (("loads", loads), ("stores", stores)) if not some]
    found += [
        f"{i.opcode} at {i.at:#x}: a bulk access of {i.bits} bits" for i in loads + stores if i.bits not in widths
    ]
    if loads and kernel.in_flight(hint) < in_flight:
        found.append(f"{kernel.in_flight(hint)} bulk loads in flight, expected at least {in_flight}")
    return found
