"""Machine code of the CUDA kernel of dynamic thresholding's quantile, without a GPU: registers, local memory, widths of
accesses, counts in shared memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import sass
from test_sass import BULK, C

if not set(sass.ARCHS) <= set(C.build["cuda_archs"]):
    pytest.skip("pyguide._C has no code for some architecture: test_sass.py says more", allow_module_level=True)


@pytest.fixture(scope="module")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    return sass.extract(Path(C.__file__), tmp_path_factory.mktemp("quantile"))


@pytest.mark.parametrize("arch", sass.ARCHS)
def test_cuda_quantile(cubins: dict[str, list[Path]], arch: str) -> None:
    mine = [path for path in cubins[arch] if b".text._ZN7pyguide8quantile" in path.read_bytes()]
    kernels = [kernel for path in mine for kernel in sass.read(path, arch)]
    assert len(kernels) == 2  # float32 and float64 states
    for kernel in kernels:
        assert sass.problems(kernel) == []
        bulk = kernel.select("global_load", BULK)
        assert {i.bits for i in bulk} == {128}
        # where they are dense and aligned: outputs (the guided one of groups among them), slots of o terms, x
        assert len(bulk) == 3
        assert not [i for i in kernel.code if i.name in ("LD", "ST")]  # whose address space is known at run time only
        (bound,) = kernel.select("global_store")
        assert bound.bits == (64 if "Id" in kernel.name else 32)
        assert kernel.count("ATOMS") > 0  # counts
        assert kernel.count("ATOM", "ATOMG", "RED", "REDG") == 0
        # counters at 0, a digit counted, the sums of warps, the bin; once: the program, the next key
        assert kernel.count("BAR") == 6
