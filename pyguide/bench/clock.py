"""Clocks: CUDA events around work on a GPU, the host's clock around work on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from . import machine
from .extras import require
from .timing import FreeModel

Work = Callable[[], None]
HEAD_START = 400_000  # cycles (about 0.2 ms) that the GPU is kept busy while the host fills its queue


class Clock(Protocol):
    """Where work runs and how its time is taken. name: "cuda" or "host"; every row of the GPU suite says which."""

    name: str
    device: str

    @property
    def cache_bytes(self) -> int:
        """Of the last-level cache."""

    def seconds(self, work: Work) -> float:
        """How long the device takes for what `work` puts on it."""

    def captured(self, work: Work) -> Work:
        """`work` as one CUDA graph, recorded after two runs of it; on the host `work` itself."""

    def wait(self) -> None:
        """Until the device is idle."""

    def free_model(self, outputs: list[Any], calls: int) -> FreeModel:
        """A model that costs nothing, for a run that calls it `calls` times."""


class HostClock:
    name, device = "host", "cpu"

    @property
    def cache_bytes(self) -> int:
        return machine.cache_bytes()

    def seconds(self, work: Work) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def captured(self, work: Work) -> Work:
        return work

    def wait(self) -> None:
        pass

    def free_model(self, outputs: list[Any], calls: int) -> FreeModel:
        return FreeModel(outputs)


class CudaClock:
    """Events on the current stream of one device."""

    name = "cuda"

    def __init__(self, device: str) -> None:
        self.torch = require("torch")
        self.device = device
        self.events = tuple(self.torch.cuda.Event(enable_timing=True) for _ in range(2))

    @property
    def cache_bytes(self) -> int:
        return int(self.torch.cuda.get_device_properties(self.device).L2_cache_size)

    def seconds(self, work: Work) -> float:
        start, end = self.events
        self.torch.cuda._sleep(HEAD_START)  # else the first launches would be timed as the host makes them
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def captured(self, work: Work) -> Work:
        cuda = self.torch.cuda
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            work()
            work()
        cuda.current_stream().wait_stream(side)
        cuda.synchronize()
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            work()
        replay: Work = graph.replay
        return replay

    def wait(self) -> None:
        self.torch.cuda.synchronize()

    def free_model(self, outputs: list[Any], calls: int) -> FreeModel:
        return EventModel(outputs, calls, self)


class EventModel(FreeModel):
    """A free model that takes the time on the stream: from its first call of a run to the last of `calls`."""

    def __init__(self, outputs: list[Any], calls: int, clock: CudaClock) -> None:
        self.calls, self.clock = calls, clock
        super().__init__(outputs)

    def begin(self) -> None:
        self._turn, self._count = 0, len(self.outputs)
        self.clock.wait()

    def __call__(self, x: Any, t: Any) -> Any:
        if self._turn == 0:
            self.clock.events[0].record()
        self._turn += 1
        if self._turn == self.calls:
            self.clock.events[1].record()
        return self.outputs[self._turn % self._count]

    @property
    def per_evaluation(self) -> float:
        start, end = self.clock.events
        if self._turn != self.calls:
            raise RuntimeError(f"the model was called {self._turn} times instead of {self.calls}")
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / (self.calls - 1)


def clock_for(device: str) -> Clock:
    """ "cpu", "cuda" or "cuda:1"."""
    return CudaClock(device) if device.startswith("cuda") else HostClock()
