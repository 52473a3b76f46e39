"""What all tests share: the back ends that a step can run on."""

from __future__ import annotations

from types import ModuleType

import pytest

from pyguide import native


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """pyguide._C whose GPU is simulated in this process: the CUDA kernels compiled for the host (once a session)."""
    if native.C is None:
        pytest.skip(f"no native kernel: {native.reason}")
    from simulated.build import build  # needs pybind11

    return build(tmp_path_factory.mktemp("simulated"))


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """The ways to run a row on a CPU. Those of a GPU: test_device.py and tests/gpu."""
    if request.param == "native" and native.C is None:
        pytest.skip(f"no native kernel: {native.reason}")
    return str(request.param)


@pytest.fixture
def on(backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The back end that the torch operators pick."""
    if backend == "reference":
        monkeypatch.setattr(native, "C", None)
        monkeypatch.setattr(native, "reason", "switched off by the test")
    return backend
