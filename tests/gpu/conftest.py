"""Tests of a real GPU: marked `gpu`, skipped where there is none. benchmarks/gpu.sh runs each file in its own process.

PYGUIDE_NEEDS_GPU=1: without a GPU they end in an error instead. PYGUIDE_GPU_TESTS=simulated rehearses the tests
themselves without one: tensors on the CPU, the CUDA kernel simulated there, graphs as tapes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_support
import pytest

HERE = Path(__file__).parent


def why_not() -> str | None:
    if gpu_support.SIMULATED:
        return None
    try:
        import torch
    except ImportError as error:
        return f"needs a GPU, and torch to reach it: {error}"
    return None if torch.cuda.is_available() else "needs a GPU: torch finds no CUDA device"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    if mine and os.environ.get("PYGUIDE_NEEDS_GPU") and why_not() is not None:
        raise pytest.UsageError(why_not())
    for item in mine:
        item.add_marker(pytest.mark.gpu)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skipped here and not by markers: all of them are one line of the summary."""
    why = why_not()
    if why is None and gpu_support.SIMULATED and item.get_closest_marker("real"):
        why = "needs a GPU: this is a rehearsal"
    if why is not None:
        pytest.skip(why)


@pytest.fixture(autouse=True)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What a rehearsal puts in the place of a GPU; on a GPU an error that a test left behind is found in that test."""
    if not gpu_support.SIMULATED:
        import torch

        # float32 convolutions by one algorithm, so that two ways to run them can be compared
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        yield None
        torch.cuda.synchronize()
        return
    import recorded

    simulated = request.getfixturevalue("simulated")
    monkeypatch.setattr(simulated, "classifier_grad", gpu_support.on_simulated_gpu(simulated.classifier_grad))
    yield recorded.install(monkeypatch, simulated)


@pytest.fixture(params=["native", "triton"])
def fused(request: pytest.FixtureRequest) -> str:
    """The back ends of a GPU."""
    name = str(request.param)
    if gpu_support.SIMULATED:
        if name == "triton":
            pytest.skip("needs a GPU: this is a rehearsal")
        return name
    from pyguide import backends

    why = backends.why_not(name, "cuda")
    if why is not None and (name == "native" or "pip install" not in why):  # built here, so that it has to run
        pytest.fail(f"{name}: {why}")
    if why is not None:
        pytest.skip(why)
    return name
