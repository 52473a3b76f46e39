"""Machine code of the Triton kernel of the classifier's gradient, without a GPU: registers, local memory, the logits
read once where one block has them, 16 bytes at a time where they lie densely."""

from __future__ import annotations

import pytest
import sass
from test_sass import compile_triton

# as in sass_triton.py: accesses of 128 bits to the logits; 0: rows of 10 or 21,841 begin anywhere, a stride scatters
FAST = {"classifier": 2, "classifier_many": 0}
MORE = {
    "classifier_half": 1,
    "classifier_float16": 1,
    "classifier_few": 0,
    "classifier_double": 2,
    "classifier_double_distribution": 0,
    "classifier_distribution": 2,
    "classifier_wide": 2,
    "classifier_many_half": 0,
    "classifier_many_distribution": 0,
    "classifier_strided": 0,
}
Kernels = dict[str, dict[str, sass.Kernel]]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return compile_triton(tmp_path_factory.mktemp("triton"), tuple(FAST))


@pytest.fixture(scope="module")
def more_kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return compile_triton(tmp_path_factory.mktemp("triton"), tuple(MORE))


def check(kernel: sass.Kernel, case: str, reads: int) -> None:
    assert "classifier_grad" in kernel.name
    assert sass.problems(kernel) == []
    loads, stores = ([i.bits for i in kernel.select(kind)] for kind in ("global_load", "global_store"))
    assert loads.count(128) == reads, loads
    assert (stores.count(128) > 0) == (reads > 0), stores  # the gradient, the zeros of a sample at its end
    assert kernel.count("ATOMG", "ATOM", "RED", "REDG") == 1  # the flag
    elements = ("DFMA",) if "double" in case else ("FFMA", "FFMA2")  # sm_100 has them in pairs
    assert kernel.count(*elements) > 10  # the exponentials, by polynomials: none is the hardware's approximation


@pytest.mark.slow
@pytest.mark.parametrize("case", FAST)
@pytest.mark.parametrize("arch", sass.ARCHS)
def test_triton(kernels: Kernels, arch: str, case: str) -> None:
    check(kernels[arch][case], case, FAST[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
@pytest.mark.parametrize("arch", sass.ARCHS)
def test_more_of_triton(more_kernels: Kernels, arch: str, case: str) -> None:
    check(more_kernels[arch][case], case, MORE[case])
