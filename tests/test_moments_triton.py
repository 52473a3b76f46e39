"""Machine code of the Triton kernels of the moments, of groups and of the quantile, without a GPU: no local memory, the
operands 16 bytes at a time, sums in float64."""

from __future__ import annotations

import pytest
import sass
from test_sass import compile_triton

# as in sass_triton.py: accesses of 128 bits to the operands, at least. 128 threads have 2 of each operand of float32 in
# a tile of 1024 elements, 1 of 16 bits; groups are read twice: for the moments and for what follows from them. 0: more
# than 4 vectors, or 15 counts, leave registers for 8 bytes at a time
FAST = {"moments": 3 * 2}
MORE = {
    "moments_half": 2 + 2 * 1,
    "moments_slot": 2 * 2 + 3 * 1,
    "moments_many": 0,
    "moments_double": 4 * 2,
    "groups": 2 * 2 * (2 + 2),
    "groups_half": 0,
    "groups_long": 2 * 2 * (3 + 2),
    "groups_many": 0,
    "groups_double": 2 * 2 * (2 + 2),
    "quantile": 6 * 4,
    "quantile_half": 6 * 2,
    "quantile_large": 0,
    "quantile_double": 3 * 4,
    "quantile_double_large": 0,
}
REGISTERS = {"moments": 168, "groups": 168, "quantile": 128}  # 16 warps of 128 each fill a multiprocessor
MANY = 255
Kernels = dict[str, dict[str, sass.Kernel]]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return compile_triton(tmp_path_factory.mktemp("triton"), tuple(FAST))


@pytest.fixture(scope="module")
def more_kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return compile_triton(tmp_path_factory.mktemp("triton"), tuple(MORE))


def check(kernel: sass.Kernel, case: str, reads: int) -> None:
    kind = case.split("_")[0]
    assert kind in kernel.name
    assert kernel.registers <= (MANY if "many" in case else REGISTERS[kind])
    assert [found for found in sass.problems(kernel) if "registers" not in found] == []
    assert [i.bits for i in kernel.select("global_load")].count(128) >= reads
    tickets = kernel.count("ATOMG", "ATOM", "RED", "REDG")
    assert tickets == (1 if kind == "moments" else 0)
    assert kernel.count("DADD") > (10 if kind != "quantile" else 1)
    assert kernel.count("FFMA", "FFMA2", "FMUL", "FMUL2", "DFMA") >= 5  # one for each vector or operand
    if kind == "quantile":
        assert kernel.count("ISETP") > 30  # comparisons, which are added


@pytest.mark.parametrize("case", FAST)
@pytest.mark.parametrize("arch", sass.ARCHS)
def test_triton(kernels: Kernels, arch: str, case: str) -> None:
    check(kernels[arch][case], case, FAST[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
@pytest.mark.parametrize("arch", sass.ARCHS)
def test_more_of_triton(more_kernels: Kernels, arch: str, case: str) -> None:
    check(more_kernels[arch][case], case, MORE[case])
