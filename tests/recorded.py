"""A CUDA graph's stand-in for machines without a GPU: a tape of the operators and launches that ran while it recorded.

As in a real graph, Python is not asked again: a replay repeats the recorded operators on the recorded tensors, with the
arguments that they had, and what would have to wait for the device (`.item()`, `if tensor:`) is refused. Step launches
are those of the simulated CUDA kernel; while the tape records, they are noted and not run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyguide import backends, device, graph, native
from pyguide.classifier_grad import ClassifierGrad
from pyguide.sampler import Sampler

WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Tape(TorchDispatchMode):
    recording: Tape | None = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITS:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            if func is None:
                args()
                continue
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():  # not a view and not in place
                    old.copy_(new)


def hide_dispatch(traceback: Any) -> None:
    """CUDA refuses from within torch's own code: there is no Python frame below the line that asked."""
    while traceback is not None:
        below = traceback.tb_next
        if below is not None and below.tb_frame.f_code is Tape.__torch_dispatch__.__code__:
            traceback.tb_next = None
        traceback = traceback.tb_next


class Recorder:
    """In place of graph.record; counts what was recorded and replayed."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, warm_up: Any, body: Any, site: Any) -> graph.Graph:
        with torch.no_grad():
            warm_up()
            Tape.recording = tape = Tape()
            try:
                with tape:
                    body()
            except Exception as error:
                hide_dispatch(error.__traceback__)
                raise graph.CaptureError(f"model: a CUDA graph cannot record {graph.broken_call(error)}") from error
            finally:
                Tape.recording = None
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            with torch.no_grad():
                tape.replay()

        return graph.Graph(replay, 2**20)


def install(monkeypatch: Any, simulated: Any) -> Recorder:
    """Samplers run the simulated CUDA kernel on CPU tensors, and record with tapes."""

    def enqueue(self: device.CudaStep, outputs: Any) -> None:
        gradient, variance = self.launch.gradient, self.launch.variance

        def put(kernel: str) -> None:
            def launch() -> None:  # with the addresses of now: a real graph keeps the arguments of its launches
                self.attach(gradient=gradient, variance=variance)
                addresses = self._addresses(outputs)
                getattr(self.step, kernel)(*addresses)

            if Tape.recording is None:
                launch()
            else:
                Tape.recording.calls.append((None, launch, None, None))

        if self.asks:
            put("enqueue_moments")
            self._weigh()
        put("enqueue")

    def classifier_grad(self: ClassifierGrad, logits: Any, first: int) -> Any:
        grad = torch.empty(logits.shape, dtype=logits.dtype)
        if Tape.recording is None:
            self.launch(logits, grad, first)
        else:
            Tape.recording.calls.append((None, lambda: self.launch(logits, grad, first), None, None))
        return grad

    recorder = Recorder()
    monkeypatch.setattr(ClassifierGrad, "__call__", classifier_grad)
    monkeypatch.setattr(native, "C", simulated)
    monkeypatch.setattr(device.CudaStep, "enqueue", enqueue)
    monkeypatch.setattr(backends, "stepper", lambda backend, where: device.CudaStep)
    monkeypatch.setattr(Sampler, "_backend_for", lambda self, where: "native")
    monkeypatch.setattr(graph, "record", recorder)
    monkeypatch.setattr(graph, "Site", lambda device: device)  # it would make a stream
    return recorder
