"""Machine code of the GPU kernels, without a GPU: registers, local memory, widths of accesses, loads in flight.

CUDA: the code inside pyguide._C, which is what users run. Triton: what its compiler makes of the kernel for the same
architectures. What the checks find in kernels known to be bad is in test_sass_reader.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import sass

from pyguide import native

C: Any = native.C
if C is None:
    pytest.skip(f"no native kernel: {native.reason}", allow_module_level=True)

BULK = "no_allocate"  # kernels/step.cu marks accesses to tensors so; what else it reads and writes are a row's numbers
Kernels = dict[str, list[sass.Kernel]]


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """All but those of moments and quantiles (test_sass_moments.py, test_sass_quantile.py)."""
    found = sass.of_build(tmp_path_factory.mktemp("cuda"))
    others = ("moments", "guided", "quantile")
    return {arch: [k for k in kernels if not any(name in k.name for name in others)] for arch, kernels in found.items()}


def dense(kernels: list[sass.Kernel]) -> list[sass.Kernel]:
    return [kernel for kernel in kernels if "step_dense" in kernel.name]


def classifier(kernels: list[sass.Kernel]) -> list[sass.Kernel]:
    return [kernel for kernel in kernels if "classifier_grad" in kernel.name]


def test_the_build_has_code_for_every_architecture(cuda: Kernels) -> None:
    assert sorted(cuda, key=int) == list(sass.ARCHS) == C.build["cuda_archs"]
    for kernels in cuda.values():
        names = [kernel.name for kernel in kernels]
        assert len(dense(kernels)) == 6  # up to 1, 2 and 4 slots; float32 and 16-bit operands
        assert sum("step_staged" in name for name in names) == sum("normals" in name for name in names) == 2
        assert len(classifier(kernels)) == 4  # a type of logits each
        assert len(names) == 14


@pytest.mark.parametrize("arch", sass.ARCHS)
def test_cuda_registers_and_local_memory(cuda: Kernels, arch: str) -> None:
    assert {kernel.name: found for kernel in cuda[arch] if (found := sass.problems(kernel))} == {}


@pytest.mark.parametrize("arch", sass.ARCHS)
def test_cuda_bulk_accesses(cuda: Kernels, arch: str) -> None:
    """Dense kernels: all of 128 bits, several in flight; the staged ones also of 64: half a unit of 16-bit elements."""
    assert {k.name: found for k in dense(cuda[arch]) if (found := sass.bulk_problems(k, BULK))} == {}
    for kernel in cuda[arch]:
        if "step_staged" in kernel.name:
            assert sass.bulk_problems(kernel, BULK, widths=(64, 128), in_flight=0) in ([], ["no bulk loads"])
            assert 128 in [i.bits for i in kernel.code if i.name == "LDGSTS"]  # straight to shared memory


@pytest.mark.parametrize("arch", sass.ARCHS)
def test_cuda_has_no_other_access_to_tensors(cuda: Kernels, arch: str) -> None:
    """What a dense kernel accesses without the mark: a sample, its row and routes; timesteps, ticket, row, flag."""
    for kernel in dense(cuda[arch]):
        first = kernel.select("global_load", BULK)[0].at
        unmarked = [i for i in kernel.code if (i.global_load or i.global_store) and BULK not in i.hints]
        assert not [i for i in unmarked if i.name in ("LD", "ST")]  # whose address space is known at run time only
        later = [i for i in unmarked if i.global_load and i.at > first]
        assert {i.bits for i in later} <= {8, 32}, kernel.name
        assert len(later) <= 1  # the flag
        stores = [i.bits for i in unmarked if i.global_store]
        assert len(stores) <= 4, stores  # a timestep of each of three types, the row
        assert kernel.count("ATOMG", "ATOM", "RED", "REDG") == 2  # the ticket and the flag


@pytest.mark.parametrize("arch", sass.ARCHS)
def test_cuda_arithmetic(cuda: Kernels, arch: str) -> None:
    """The formula in fused multiply-adds of the state's type, ten rounds of Philox in registers."""
    for kernel in cuda[arch]:
        if kernel in classifier(cuda[arch]):
            continue
        double = "Id" in kernel.name
        assert kernel.count("DFMA" if double else "FFMA") > 20
        assert double or kernel.count("DFMA", "DADD", "DMUL") <= 2  # rounding a timestep
        wide = sum(i.opcode.startswith(("IMAD.WIDE.U32", "IMAD.HI.U32")) for i in kernel.code)
        assert wide >= 20


@pytest.mark.parametrize("arch", sass.ARCHS)
def test_cuda_classifier_grad(cuda: Kernels, arch: str) -> None:
    """Logits and gradient in 16 bytes, but those of float64, which are 8 and unmarked; fused multiply-adds."""
    for kernel in classifier(cuda[arch]):
        double = "TypeE3" in kernel.name
        assert kernel.count("DFMA" if double else "FFMA") > 20
        assert kernel.count("BAR") == 3
        assert not [i for i in kernel.code if i.name in ("LD", "ST")]
        if double:
            assert not kernel.select("global_load", BULK)
            continue
        assert kernel.count("DFMA", "DMUL") == 0
        loads, stores = kernel.select("global_load", BULK), kernel.select("global_store", BULK)
        assert {i.bits for i in loads + stores} == {128}
        # logits at first and in each pass over more of them; the gradient of both, zeros of both where idle
        assert (len(loads), len(stores)) == (4, 4)


# ---- Triton -----------------------------------------------------------------------------------------------------
CASES = {  # as in sass_triton.py: operands that the model and the state have, and how many accesses of each
    "float32": (2, 1, 1),
    "bfloat16": (2, 1, 2),  # 8 elements of the model, twice 4 of the state
    "float16": (2, 1, 2),
    "single": (1, 1, 1),
    "multistep": (2, 2, 2),
    "slots": (2, 3, 2),
    "three": (3, 3, 1),
    "refresh": (2, 1, 2),
    "normals": (0, 1, 2),
}
FAST = ("float32", "bfloat16")
SPILLED = (("120", "multistep"), ("120", "three"))  # not met


def compile_triton(folder: Path, cases: tuple[str, ...]) -> dict[str, dict[str, sass.Kernel]]:
    """By architecture and case; two processes, without the interpreter that other tests ask for."""
    if find_spec("triton") is None:
        message = "triton is not installed: pip install pyguide[triton]"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(sass.ROOT / "tests"), *sys.path])
    script = [sys.executable, sass.ROOT / "tests" / "sass_triton.py", folder]
    runs = [
        subprocess.Popen(
            [*script, ",".join(archs), ",".join(cases)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for archs in (sass.ARCHS[::2], sass.ARCHS[1::2])
    ]
    for run in runs:
        errors = run.communicate(timeout=600)[1]
        assert run.returncode == 0, errors
    found: dict[str, dict[str, sass.Kernel]] = {arch: {} for arch in sass.ARCHS}
    for cubin in folder.glob("*.cubin"):
        case, _, target, _ = cubin.name.split(".")
        (found[target[3:]][case],) = sass.read(cubin, target[3:])
    return found


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, sass.Kernel]]:
    return compile_triton(tmp_path_factory.mktemp("triton"), FAST)


@pytest.fixture(scope="module")
def more_triton(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, sass.Kernel]]:
    return compile_triton(tmp_path_factory.mktemp("triton"), tuple(case for case in CASES if case not in FAST))


def check_triton(kernel: sass.Kernel, case: str) -> None:
    """Triton has no mark for bulk accesses: there must be as many of 128 bits as the operands need."""
    assert sass.problems(kernel) == []
    branches, slots, parts = CASES[case]
    loads, stores = ([i.bits for i in kernel.select(kind)] for kind in ("global_load", "global_store"))
    written = branches + (slots * parts if case != "refresh" else 0)
    assert stores.count(128) == written, stores
    assert len(stores) - written <= branches + 2  # timesteps, row, ticket
    if case == "normals":
        return
    assert loads.count(128) == slots * parts + (branches if case != "refresh" else 0), loads
    assert {bits for bits in loads if bits != 128} <= {32, 64}
    assert case == "refresh" or kernel.in_flight() >= 2
    assert case == "refresh" or kernel.count("FFMA") > 20
    assert kernel.count("DFMA", "DADD", "DMUL") == 0


@pytest.mark.parametrize("case", FAST)
@pytest.mark.parametrize("arch", sass.ARCHS)
def test_triton(triton: dict[str, dict[str, sass.Kernel]], arch: str, case: str) -> None:
    check_triton(triton[arch][case], case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in FAST])
@pytest.mark.parametrize("arch", sass.ARCHS)
def test_more_of_triton(
    more_triton: dict[str, dict[str, sass.Kernel]], arch: str, case: str, request: pytest.FixtureRequest
) -> None:
    if (arch, case) in SPILLED:
        request.applymarker(pytest.mark.xfail(reason="ptxas for sm_120 spills 8 or 16 bytes", strict=True))
    check_triton(more_triton[arch][case], case)
