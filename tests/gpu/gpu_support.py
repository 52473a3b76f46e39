"""What the tests of a GPU share: where they run, plans, an exact model, and launches in a device's memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from launches import Launch, Resident, Tensor, address

import pyguide
from pyguide import CFG, Sampler, native, schedules

SIMULATED = os.environ.get("PYGUIDE_GPU_TESTS") == "simulated"
DEVICE = "cpu" if SIMULATED else "cuda"
real = pytest.mark.real  # cannot be rehearsed without a GPU

VP = schedules.scaled_linear()
PLANS = {
    "ddim": pyguide.compile("ddim", VP.path(10), clip=1.0),
    "ancestral": pyguide.compile("euler_ancestral", VP.path(10)),
    "churn": pyguide.compile("heun", VP.path(10), s_churn=3.0),
    "unipc": pyguide.compile("unipc", VP.path(10)),
    "flow": pyguide.compile("euler", schedules.flow(3.0).path(10), prediction="flow"),
}
STOCHASTIC = ("ancestral", "churn")
SHAPE = (3, 9, 11)  # 297 elements: no multiple of a vector, a block or four lanes
SEEDS = [17, 3, 2**63 + 5, 1_000_003, 0]


def wait() -> None:
    if not SIMULATED:
        torch.cuda.synchronize()


def free(x: Any, t: Any, y: Any = None) -> Any:
    """Elementwise, and the same bits in any batch and on any device: one multiplication, one addition."""
    shift = 0.0 if y is None else y.reshape(-1, *[1] * (x.ndim - 1))
    return x * 0.25 + shift


def initial(seeds: Any, shape: tuple[int, ...] = SHAPE, device: str = DEVICE, dtype: Any = torch.float32) -> Any:
    """The same noise on every device: drawn on the host."""
    return pyguide.randn(seeds, (len(seeds), *shape), like=torch.empty(0)).to(device, dtype)


def conditions(seeds: Any, device: str = DEVICE) -> dict[str, Any]:
    y = torch.tensor([0.1 * (seed % 7) for seed in seeds], device=device)
    return {"cond": {"y": y}, "uncond": {"y": y * 0}}


def sample(name: str, seeds: Any, backend: str = "auto", scale: Any = 3.0, **options: Any) -> Any:
    """A run from each sample's own seed. options: device and dtype of the noise, the rest those of the sampler."""
    device, dtype = options.pop("device", DEVICE), options.pop("dtype", torch.float32)
    sampler = Sampler(free, PLANS[name], CFG(scale), backend=backend, **options)
    drawn = {"seeds": seeds} if name in STOCHASTIC else {}
    return sampler(initial(seeds, device=device, dtype=dtype), **conditions(seeds, device), **drawn)


def on_simulated_gpu(kernel: Callable[..., None]) -> Callable[..., None]:
    """pyguide._C.classifier_grad in a rehearsal: the tensors are on the CPU, the launches go to the simulated GPU."""

    def launch(*arguments: Any) -> None:
        *operands, threads, device, stream = arguments
        assert device == -1, "a rehearsal's tensors are on the CPU"
        kernel(*operands, threads, 0, stream)

    return launch


# ---- launches in a device's memory ----------------------------------------------------------------------------------
class Mirror:
    """Bytes of host memory and their copy on the device, at the same address modulo 256."""

    def __init__(self, memory: np.ndarray) -> None:
        self.host = memory.reshape(-1).view(np.uint8)
        space = torch.empty(self.host.size + 256, dtype=torch.uint8, device=DEVICE)
        shift = (address(self.host) - space.data_ptr()) % 256
        self.device = space[shift : shift + self.host.size]
        self.device.copy_(torch.from_numpy(self.host))
        self.low = address(self.host)

    def pointer(self, host: int) -> int:
        return self.device.data_ptr() + host - self.low

    def tensor(self, host: int, dtype: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        """The strided view that begins at a host address."""
        item = torch.empty(0, dtype=dtype).element_size()
        start = (host - self.low) % item
        flat = self.device[start : start + (self.host.size - start) // item * item].view(dtype)
        return flat.as_strided(shape, strides, flat.storage_offset() + (host - self.low - start) // item)

    def download(self) -> None:
        self.host[...] = self.device.cpu().numpy()


class DeviceLaunch(Launch):
    """A random launch whose every operand is copied to the device, run there, and copied back whole."""

    placed = True

    def place(self) -> None:
        source, target = self.by_row or (self.source, self.target)
        given = {"samples": self.samples, "tables": self.tables, "weights": self.weights, "bound": self.bound}
        self.resident = Resident(**given, source=source, target=target)
        self.mirrors: dict[int, Mirror] = {}
        optional = (self.gradient, self.noise, self.denoised, self.variance)
        tensors = [self.state, *self.output, *self.input, *(t for t in optional if t is not None)]
        for memory in (*(t.memory for t in tensors), *self.time, *self.resident.memory.values()):
            self.mirrors[id(memory)] = Mirror(memory)
        self.enter(self.step)
        self.step.after = self.leave

    def on_device(self, t: Tensor) -> tuple[int, int, int, int]:
        return (self.mirrors[id(t.memory)].pointer(t.pointer), *t.strides)

    def control(self, name: str) -> int:
        if name not in self.resident.memory:
            return 0
        return self.mirrors[id(self.resident.memory[name])].pointer(self.resident.pointer(name))

    def enter(self, step: Any) -> None:
        """Tell the step where everything lies now."""
        names = "samples", "tables", "weights", "bound", "source", "target"
        index = 0 if SIMULATED else torch.cuda.current_device()
        step.place(index, *map(self.control, names))
        step.state = self.on_device(self.state)[0]
        for k in range(self.K):
            step.set_output(k, *self.on_device(self.output[k]))
            step.set_input(k, *self.on_device(self.input[k]))
            step.set_time(k, self.mirrors[id(self.time[k])].pointer(address(self.time[k])))
        for t, tell in ((self.gradient, step.set_gradient), (self.noise, step.set_noise)):
            if t is not None:
                tell(*self.on_device(t))
        if self.denoised is not None:
            step.set_denoised(*self.on_device(self.denoised))
        if self.variance is not None:
            step.set_variance(*self.on_device(self.variance), branch=self.K - 1)

    def leave(self) -> None:
        for mirror in self.mirrors.values():
            mirror.download()


class Remote:
    """A packed step that waits for the device and then calls `after`."""

    def __init__(self, *arguments: Any) -> None:
        self.__dict__["real"] = native.C.Step(*arguments)
        self.__dict__["after"] = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "after":
            self.__dict__[name] = value
        else:
            setattr(self.real, name, value)

    def run(self) -> None:
        self._then(self.real.run)

    def refresh(self) -> None:
        self._then(self.real.refresh)

    def _then(self, call: Callable[[], None]) -> None:
        if not SIMULATED:
            self.real.stream = torch.cuda.current_stream().cuda_stream
        call()
        wait()
        self.after()


class Module:
    """In place of pyguide._C for launches: its steps are Remote."""

    Step = Remote

    def __getattr__(self, name: str) -> Any:
        return getattr(native.C, name)


class TritonStep:
    """A packed step that is the Triton kernel, on views of the mirrors. Rows advance on the host too, as there."""

    def __init__(self, *arguments: Any) -> None:
        names = "batch channels inner branches slots guidance_slots state_type output_type input_type time_type"
        self.given = dict(zip(names.split(), arguments, strict=True))
        self.launch: Any = None  # set by a TritonLaunch before it runs

    def __getattr__(self, name: str) -> Any:
        if name.startswith("set_") or name in ("place", "route"):
            return lambda *_, **__: None  # the launch itself is asked
        raise AttributeError(name)

    def run(self) -> None:
        self._launch(refresh=False)

    def refresh(self) -> None:
        self._launch(refresh=True)

    def _launch(self, *, refresh: bool) -> None:
        from pyguide.kernels import launch_triton

        a = self.launch
        channels, inner = a.shape[1:]
        control, operand = a.flat, a.operand
        stride = a.by_row[0][0].size if a.by_row else 0
        launch_triton.step(
            a.mirrors[id(a.state.memory)].tensor(
                a.state.pointer, getattr(torch, a.types[0]), (a.S, a.B, channels, inner), (a.B * a.N, a.N, inner, 1)
            ),
            [operand(t) for t in a.output] if any(a.at) else [],
            [operand(t) for t in a.input],
            [control(t, t.dtype) for t in a.time],
            control(a.resident.memory["samples"], np.int32, a.samples.nbytes // 4, "samples").view(a.B, -1),
            control(a.resident.memory["tables"], a.real, a.tables.size, "tables"),
            control(a.resident.memory["weights"], a.real, a.weights.size, "weights"),
            control(a.resident.memory["source"], np.int32, a.resident.arrays["source"].size, "source"),
            control(a.resident.memory["target"], np.int32, a.resident.arrays["target"].size, "target"),
            route_stride=stride,
            guidance_slots=a.Sg,
            noise=operand(a.noise),
            gradient=operand(a.gradient),
            variance=operand(a.variance),
            variance_branch=a.K - 1 if a.variance is not None else 0,
            bound=None if a.bound is None else control(a.resident.memory["bound"], a.real, a.B, "bound"),
            denoised=operand(a.denoised),
            check=getattr(self, "check", False),
            refresh=refresh,
        )
        wait()
        a.leave()
        if not refresh:
            a.samples["row"] += a.samples["row"] < a.samples["end"]


class TritonLaunch(DeviceLaunch):
    """A launch through the Triton kernel."""

    class C:
        Step = TritonStep

    def enter(self, step: Any) -> None:
        step.launch = self

    def operand(self, t: Tensor | None) -> Any:
        if t is None:
            return None
        return self.mirrors[id(t.memory)].tensor(t.pointer, getattr(torch, t.dtype), t.shape, t.strides)

    def flat(self, memory: np.ndarray, dtype: Any, count: int | None = None, name: str | None = None) -> Any:
        host = address(memory) if name is None else self.resident.pointer(name)
        size = memory.size if count is None else count
        return self.mirrors[id(memory)].tensor(host, getattr(torch, np.dtype(dtype).name), (size,), (1,))


def same_bits(a: np.ndarray, b: np.ndarray, dtype: str) -> bool:
    """Equal bits; of a NaN only that it is one: its sign and payload are each processor's own."""
    import oracle

    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    with np.errstate(invalid="ignore"):
        both = np.isnan(oracle.decode(a, dtype)) & np.isnan(oracle.decode(b, dtype))
    whole = {2: np.uint16, 4: np.uint32, 8: np.uint64}[a.itemsize]
    return bool(((a.view(whole) == b.view(whole)) | both).all())
