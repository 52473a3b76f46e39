"""Which back end runs where, and that nothing falls back in silence."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import pyguide
from pyguide import Sampler, backends, native

PLAN = pyguide.compile("ddim", pyguide.schedules.scaled_linear().path(3))
NOISE = torch.zeros(1, 4)


def reasons(monkeypatch: pytest.MonkeyPatch, **why: str | None) -> None:
    monkeypatch.setattr(backends, "why_not", lambda name, device: why.get(name))


def test_the_order_of_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons(monkeypatch)
    assert backends.choose("auto", "cuda") == "native"
    reasons(monkeypatch, native="no nvcc")
    assert backends.choose("auto", "cuda") == "triton"
    assert backends.choose("auto", "cpu") == "reference"  # never Triton's interpreter unasked
    reasons(monkeypatch, native="no nvcc", triton="no Triton")
    assert backends.choose("auto", "cuda") == "reference"


@pytest.mark.parametrize("name", backends.FUSED)
def test_one_that_was_asked_for_and_does_not_run_is_an_error(name, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons(monkeypatch, **{name: "of this reason"})
    with pytest.raises(ValueError, match=f"backend: '{name}' does not run on cuda: of this reason"):
        backends.choose(name, "cuda")


def test_the_reference_is_announced_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons(monkeypatch, native="no kernel here")
    sampler = Sampler(lambda x, t: x, PLAN)
    with pytest.warns(RuntimeWarning, match="slow reference on cpu: native: no kernel here$") as told:
        sampler(NOISE)
    assert told[0].filename == __file__
    assert "backend=reference (cpu)" in repr(sampler)
    sampler(NOISE)
    assert len(told) == 1
    reasons(monkeypatch, native="no kernel here", triton="nor there")
    with pytest.warns(RuntimeWarning, match="slow reference on cuda: native: no kernel here; triton: nor there"):
        sampler._backend_for("cuda")


def test_the_one_that_ran_is_shown() -> None:
    sampler = Sampler(lambda x, t: x, PLAN)
    assert "backend=auto" in repr(sampler)
    sampler(NOISE)
    assert "backend=native (cpu)" in repr(sampler)


def test_the_cuda_kernels_are_built_and_say_why_they_do_not_run_here() -> None:
    assert native.C is not None
    reason = backends.why_not("native", "cuda")
    if os.environ.get("PYGUIDE_CUDA") == "1":
        assert native.C.build["cuda_archs"]
    if reason is None:
        assert torch.cuda.is_available()
    else:
        assert reason == native.C.cuda_reason()
        assert reason.startswith(("cudaGetDeviceCount: cuda", "built without CUDA: "))


def test_an_unknown_device_has_no_native_kernel() -> None:
    assert "not on mps" in str(backends.why_not("native", "mps"))


def test_import_asks_no_gpu_and_loads_no_triton() -> None:
    """A process that forks later must not have touched the driver, and Triton's import costs a second."""
    code = (
        "import sys, pyguide; assert 'triton' not in sys.modules and 'torch' not in sys.modules; "
        "print(open('/proc/self/maps').read().count('libcuda'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
