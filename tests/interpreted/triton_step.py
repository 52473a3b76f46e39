"""The Triton kernels under the interpreter, behind the interface of pyguide._C.Step that tests/launches.py drives.

The interpreter differs from a GPU in a way that is not ours: a cast to bfloat16 truncates.
"""

from __future__ import annotations

import ctypes
from types import ModuleType
from typing import Any

import numpy as np
import torch

from pyguide.layout import SAMPLE

TYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64", "int64", "int32")}


def tensor(pointer: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str) -> Any:
    """The memory of somebody else as a tensor."""
    kind = TYPES[dtype]
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    buffer = (ctypes.c_char * (span * kind.itemsize)).from_address(pointer)
    return torch.frombuffer(buffer, dtype=kind).as_strided(shape, strides)


class Step:
    """Collects addresses as `pyguide._C.Step` does; `run` hands them to the Triton kernel as tensors."""

    kernels: ModuleType

    def __init__(self, batch: int, channels: int, inner: int, branches: int, slots: int, guidance_slots: int,
                 state: str, output: str, inputs: str, time: str):  # fmt: skip
        self.shape, self.K, self.S, self.Sg = (batch, channels, inner), branches, slots, guidance_slots
        self.types = {"state": state, "output": output, "input": inputs, "time": time}
        self.state = self.tables = self.weights = self.samples = self.bound = 0
        self.check, self.variance_branch, self.stride = False, 0, 0
        self.output: list[Any] = [None] * branches
        self.input: list[Any] = [None] * branches
        self.time: list[Any] = [None] * branches
        self.optional: dict[str, Any] = {}

    def set_output(self, k: int, *walk: int) -> None:
        self.output[k] = walk

    def set_input(self, k: int, *walk: int) -> None:
        self.input[k] = walk

    def set_time(self, k: int, pointer: int) -> None:
        self.time[k] = pointer

    def set_variance(self, *walk: int, branch: int = 0) -> None:
        self.optional["variance"], self.variance_branch = walk, branch

    def set_gradient(self, *walk: int) -> None:
        self.optional["gradient"] = walk

    def set_noise(self, *walk: int) -> None:
        self.optional["noise"] = walk

    def set_denoised(self, *walk: int) -> None:
        self.optional["denoised"] = walk

    def route(self, source: int, target: int, stride: int = 0) -> None:
        self.stride = stride

    def place(self, device: int, *pointers: int) -> None:
        self.placed = pointers

    def _operand(self, walk: Any, dtype: str, more: int) -> Any:
        batch, channels, inner = self.shape
        return tensor(walk[0], (batch + more, channels, inner), walk[1:], dtype) if walk and walk[0] else None

    def _launch(self, refresh: bool) -> None:
        batch, channels, inner = self.shape
        elements, real = channels * inner, self.types["state"]
        samples, tables, weights, bound, source, target = self.placed
        flat = lambda pointer, dtype, count=1: tensor(pointer, (count,), (1,), dtype) if pointer else None  # noqa: E731
        per_batch = {k: self._operand(self.optional.get(k), real, 0) for k in ("noise", "gradient", "denoised")}
        shape = (self.S, batch, channels, inner)
        self.kernels.step(
            tensor(self.state, shape, (batch * elements, elements, inner, 1), real),
            [self._operand(walk, self.types["output"], 1) for walk in self.output],
            [self._operand(walk, self.types["input"], 1) for walk in self.input],
            [flat(pointer, self.types["time"], batch + 1) for pointer in self.time],
            tensor(samples, (batch, 12), (12, 1), "int32"),
            flat(tables, real),
            flat(weights, real),
            flat(source, "int32"),
            flat(target, "int32"),
            route_stride=self.stride,
            guidance_slots=self.Sg,
            variance=self._operand(self.optional.get("variance"), self.types["output"], 1),
            variance_branch=self.variance_branch,
            bound=flat(bound, real, batch),
            check=self.check,
            refresh=refresh,
            **per_batch,
        )

    def run(self) -> None:
        self._launch(refresh=False)
        memory = (ctypes.c_char * (SAMPLE.itemsize * self.shape[0])).from_address(self.samples)
        host = np.frombuffer(memory, SAMPLE)
        host["row"] += host["row"] < host["end"]

    def refresh(self) -> None:
        self._launch(refresh=True)
