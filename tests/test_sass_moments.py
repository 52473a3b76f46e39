"""Machine code of the CUDA kernels of moments and of guidance by groups, without a GPU: registers, local memory, widths
of accesses, loads in flight."""

from __future__ import annotations

import re

import pytest
import sass

BULK = "no_allocate"
Kernels = dict[str, list[sass.Kernel]]


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    found = sass.of_build(tmp_path_factory.mktemp("cuda"))
    wanted = re.compile(r"pyguide\d+(moments|guided)")
    return {arch: [k for k in kernels if wanted.search(k.name)] for arch, kernels in found.items()}


def named(kernels: list[sass.Kernel], pattern: str) -> list[sass.Kernel]:
    return [kernel for kernel in kernels if re.search(r"pyguide\d+" + pattern, kernel.name)]


def most_registers(kernel: sass.Kernel) -> int:
    """By threads of a block and blocks of a multiprocessor, which has 65,536 of them."""
    if named([kernel], r"momentsI[fd]Li2E"):
        return 64  # two blocks of 512
    return 65536 // (5 * 128) // 8 * 8 if named([kernel], "guided") else 128  # five of 128, one of 512


@pytest.mark.parametrize("arch", sass.ARCHS)
def test_registers_and_local_memory(cuda: Kernels, arch: str) -> None:
    kernels = cuda[arch]
    expected = {"momentsI": 6, "moments_step_dense": 6, "moments_step_staged": 2, "guided": 4}
    assert {name: len(named(kernels, name)) for name in expected} == expected
    assert len(kernels) == 18
    found = {kernel.name: sass.problems(kernel, most_registers(kernel)) for kernel in kernels}
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize("arch", sass.ARCHS)
def test_bulk_accesses(cuda: Kernels, arch: str) -> None:
    """Of float32 states: all of 128 bits; those of moments of two vectors and more are in flight together."""
    for kernel in cuda[arch]:
        loads, stores = kernel.select("global_load", BULK), kernel.select("global_store", BULK)
        double = re.search(r"I(d|Li\d+EdE)", kernel.name) is not None
        assert {i.bits for i in loads + stores} <= {64, 128} if "staged" in kernel.name else {128}
        if named([kernel], r"momentsIfLi"):
            vectors = int(re.search(r"momentsIfLi(\d)E", kernel.name)[1])  # type: ignore[index]
            assert not stores
            assert len(loads) >= vectors + 1
            assert kernel.in_flight(BULK) >= 2
        elif named([kernel], "moments_step_dense"):
            assert kernel.in_flight(BULK) >= 2
            assert stores
        elif named([kernel], "guided") and not double:
            assert loads
            assert stores
        elif double:
            assert not loads
        assert not [i for i in kernel.code if i.name in ("LD", "ST")]  # an address space known at run time only


@pytest.mark.parametrize("arch", sass.ARCHS)
def test_sums_and_the_join(cuda: Kernels, arch: str) -> None:
    """Sums of lanes in double; fences on both sides of the ticket, which is one atomic of a block."""
    for kernel in cuda[arch]:
        assert kernel.count("DADD") > 5
        if named([kernel], "momentsI"):
            assert kernel.count("ATOMG", "ATOM", "RED", "REDG") == 1
            assert kernel.count("MEMBAR") == 2
        if named([kernel], "guided"):
            assert kernel.count("ATOMG", "ATOM", "RED", "REDG") == 0
