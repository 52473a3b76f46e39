"""How a graph is recorded, call by call, with torch.cuda's functions in place of a device: what streams and pools see
it, and what is put back when a model breaks the recording. tests/gpu records real ones."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pyguide import graph


class Cuda:
    """The part of torch.cuda that a recording uses; `log` has its calls in order."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.current, self.reserved = "caller's stream", 100

    def current_stream(self) -> Any:
        return Stream(self, self.current)

    def set_stream(self, stream: Any) -> None:
        self.current = stream.name

    @contextmanager
    def stream(self, stream: Any) -> Any:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def memory_reserved(self) -> int:
        self.reserved += 7
        return self.reserved

    @contextmanager
    def graph(self, recorded: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Any:
        self.log.append(("capture", pool, stream.name, capture_error_mode))
        self.current = stream.name
        try:
            yield
        except BaseException:  # as torch: its end fails too, and leaves its stream current
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture") from None
        self.current = "caller's stream"


class Stream:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self.cuda, self.name, self.device_index = cuda, name, 0

    def wait_stream(self, other: Any) -> None:
        self.cuda.log.append((self.name, "waits for", other.name))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda()
    for name in ("current_stream", "set_stream", "stream", "synchronize", "memory_reserved", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay="replay"))
    ended = lambda name: lambda index, pool: made.log.append((name, index, pool))  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended("end"), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", ended("release"), raising=False)
    return made


def site(cuda: Cuda) -> Any:
    return SimpleNamespace(device=torch.device("cuda", 0), stream=Stream(cuda, "side"), pool="pool")


def test_warm_up_and_capture_share_a_stream_of_the_device(cuda: Cuda) -> None:
    seen = []

    def note(what: str) -> None:
        seen.append((what, cuda.current, torch.is_grad_enabled(), torch.is_autocast_cache_enabled()))

    recorded = graph.record(lambda: note("warm up"), lambda: note("body"), site(cuda))
    assert seen == [("warm up", "side", False, False), ("body", "side", False, False)]
    assert cuda.log == [
        ("side", "waits for", "caller's stream"),
        ("caller's stream", "waits for", "side"),
        "synchronize",
        ("capture", "pool", "side", "thread_local"),
    ]
    assert recorded == graph.Graph("replay", 7)
    assert cuda.current == "caller's stream"
    assert torch.is_autocast_cache_enabled()
    assert torch.is_grad_enabled()


def test_a_broken_capture_is_named_and_ended(cuda: Cuda) -> None:
    def body() -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    with pytest.raises(
        graph.CaptureError, match=r"`raise RuntimeError\(.*` in body .*test_graph_record.py:.*not permitted"
    ):
        graph.record(lambda: None, body, site(cuda))
    assert cuda.current == "caller's stream"
    assert cuda.log[-2:] == [("end", 0, "pool"), ("release", 0, "pool")]
    assert torch.is_autocast_cache_enabled()
    assert not graph._recording.locked()


def test_an_interrupt_is_no_fault_of_the_model(cuda: Cuda) -> None:
    def body() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        graph.record(lambda: None, body, site(cuda))
    assert cuda.current == "caller's stream"


def test_an_error_of_the_warm_up_is_the_models_own(cuda: Cuda) -> None:
    def warm_up() -> None:
        raise IndexError("of the model")

    with pytest.raises(IndexError, match="of the model"):
        graph.record(warm_up, lambda: None, site(cuda))
    assert not graph._recording.locked()


def test_an_error_that_shows_when_the_capture_ends(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def ending(*args: Any, **options: Any) -> Any:
        yield
        raise RuntimeError("CUDA error: capture was invalidated")

    monkeypatch.setattr(torch.cuda, "graph", ending)
    with pytest.raises(graph.CaptureError, match="cannot record the model: CUDA error: capture was invalidated"):
        graph.record(lambda: None, lambda: None, site(cuda))
