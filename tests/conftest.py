"""What all tests share: the back ends that a step can run on."""

from __future__ import annotations

import pytest

from pyguide import native


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every way to run a row here; a new back end adds its name, and every test of the step runs on it."""
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
