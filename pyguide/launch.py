"""The buffers of one run, and the two ways to execute a row on them: the native kernel and the reference."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import arrays, native, noise, reference
from .arrays import Array
from .layout import SAMPLE, SEPARATE, TAG_STEP, row_width, split_row, split_weights, weights_width


@dataclass
class Launch:
    """What a row reads and writes. B samples [C, *], K branches, S slots; the arrays are of one kind, on one device."""

    state: Array  # [S, B, C, *] float32 or float64
    inputs: list[Array]  # K: [n, C, *] in the model's dtype
    times: list[Array]  # K: [n] float32, float64 or int64
    tables: NDArray[Any]  # rows, in the dtype of the state, on the host
    weights: NDArray[Any]  # guidance blocks, likewise
    samples: NDArray[Any]  # [B] layout.SAMPLE
    guidance_slots: int = 0
    noise: Array | None = None  # [B, C, *] in the dtype of the state: supplied noise; None: from the seeds
    denoised: Array | None = None  # [B, C, *] where D goes, if anyone wants it
    check: bool = False
    threads: int = 0


class NativeStep:
    """Rows through `pyguide._C.Step`: one call, no allocation."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.branches = len(launch.inputs)
        self.strides: tuple[int, ...] | None = None
        self.dtype: Any = launch.inputs[0].dtype  # of the model's outputs: what its inputs are until one says otherwise
        self.routes: tuple[Any, Any] = (None, None)
        tracked = arrays.is_torch(launch.state) and not launch.state.is_inference()
        self.bumped = [launch.state, *launch.inputs, *launch.times] if tracked else []
        self.torch: Any = sys.modules.get("torch")
        self.step = self._bind()

    def _bind(self) -> Any:
        a = self.launch
        slots, batch, channels = a.state.shape[:3]
        inner = int(np.prod(a.state.shape[3:]))
        types = [arrays.dtype_name(a.state), str(self.dtype).removeprefix("torch.")]
        types += [arrays.dtype_name(a.inputs[0]), arrays.dtype_name(a.times[0])]
        step = native.C.Step(batch, channels, inner, self.branches, slots, a.guidance_slots, *types)
        step.state, step.samples = arrays.pointer(a.state), arrays.pointer(a.samples)
        step.tables, step.weights = arrays.pointer(a.tables), arrays.pointer(a.weights)
        step.check, step.threads = a.check, a.threads
        for k in range(self.branches):
            step.set_input(k, arrays.pointer(a.inputs[k]), channels * inner, inner, 1)
            step.set_time(k, arrays.pointer(a.times[k]))
        if a.denoised is not None:
            step.set_denoised(arrays.pointer(a.denoised), channels * inner, inner, 1)
        self.strides = None
        self.routes = (None, None)
        return step

    def use_noise(self, supplied: bool) -> None:
        """Whether the next rows read `launch.noise` or draw from the seeds."""
        buffer = self.launch.noise if supplied else None
        size = int(np.prod(self.launch.state.shape[2:]))
        self.step.set_noise(0 if buffer is None else arrays.pointer(buffer), size, size // self.launch.state.shape[2], 1)

    def advance(
        self, outputs: Sequence[Array | None], source: NDArray[np.int32], target: NDArray[np.int32]
    ) -> None:
        """Run the next row of every sample. outputs: one array for all branches, one per branch, or none in the prologue."""
        first = outputs[0] if len(outputs) == 1 else next((out for out in outputs if out is not None), None)
        if first is not None and first.dtype != self.dtype:
            self.dtype = first.dtype
            self.step = self._bind()
        if source is not self.routes[0] or target is not self.routes[1]:
            self.step.route(source.ctypes.data, target.ctypes.data)
            self.routes = (source, target)
        if first is None:
            self.step.run()
        elif len(outputs) == 1:
            layout = arrays.strides(first) if isinstance(first, np.ndarray) else first.stride()
            if layout != self.strides:
                self._set_outputs([first] * self.branches)
                self.strides = layout
            self.step.run(first.ctypes.data if isinstance(first, np.ndarray) else first.data_ptr())
        else:
            self._set_outputs(outputs)
            self.strides = None
            self.step.run()
        if self.bumped:  # what was written through pointers must not pass for unchanged
            self.torch.autograd.graph.increment_version(self.bumped)

    def _set_outputs(self, outputs: Sequence[Array | None]) -> None:
        for k, out in enumerate(outputs):
            if out is None:
                self.step.set_output(k, 0, 0, 0, 0)
                continue
            strides = arrays.merged_strides(tuple(out.shape), arrays.strides(out))
            assert strides is not None, "the sampler hands over outputs that a kernel can walk"
            self.step.set_output(k, arrays.pointer(out), *strides)

    def refresh(self) -> None:
        """Write the model inputs that are due again, from the state as it is now."""
        self.step.refresh()
        if self.bumped:
            self.torch.autograd.graph.increment_version(self.bumped)


class ReferenceStep:
    """Rows through `reference.step`, sample by sample: the definition, on any device that the arrays are on."""

    def __init__(self, launch: Launch) -> None:
        self.launch, self.supplied = launch, False
        self.target: NDArray[np.int32] | None = None

    def use_noise(self, supplied: bool) -> None:
        self.supplied = supplied

    def advance(self, outputs: Sequence[Array], source: NDArray[np.int32], target: NDArray[np.int32]) -> None:
        a, K, S = self.launch, len(self.launch.inputs), self.launch.state.shape[0]
        self.target = target
        block = weights_width(K, S, a.guidance_slots)
        for b, sample in enumerate(a.samples):
            i = int(sample["row"])
            if i == sample["end"]:
                continue
            slots, dtype = [a.state[c, b] for c in range(S)], arrays.dtype_name(a.state)
            weights, branches = None, [None] * K
            if i:
                start = int(sample["weights"]) + (0 if sample["method"] else i * block)
                separate = bool(sample["flags"] & SEPARATE)
                weights = split_weights(a.weights[start : start + block], K, S, a.guidance_slots, separate)
                for k in range(K):
                    if source[b, k] >= 0 and outputs[k if len(outputs) > 1 else 0] is not None:
                        branches[k] = arrays.cast(outputs[k if len(outputs) > 1 else 0][source[b, k]], dtype)
            row = self._row(sample, i)
            z = None
            if any(row.n):
                z = a.noise[b] if self.supplied else self._normals(sample, i)
            done = reference.step(row, slots, branches, weights, noise=z, want_denoised=a.denoised is not None)
            for c in range(S):
                if done.slots[c] is not slots[c]:
                    a.state[c, b] = done.slots[c]
            if a.denoised is not None and done.denoised is not None:
                a.denoised[b] = done.denoised
            if a.check and not bool((abs(a.state[0, b]) < np.inf).all()):
                sample["flags"] |= 2
            sample["row"] = i + 1
            if i + 1 < sample["end"]:
                self._write_input(b, row)

    def _row(self, sample: Any, i: int) -> Any:
        width = row_width(int(sample["slots"]))
        start = int(sample["table"]) + i * width
        return split_row(self.launch.tables[start : start + width], int(sample["slots"]))

    def _normals(self, sample: Any, i: int) -> Array:
        shape, like = self.launch.state.shape[2:], self.launch.state
        values = noise.normals(int(sample["seed"]), int(np.prod(shape)), i, TAG_STEP).reshape(shape)
        return arrays.from_numpy(values.astype(arrays.dtype_name(like)), like)

    def _write_input(self, b: int, row: Any) -> None:
        a = self.launch
        assert self.target is not None
        for k, (x, t) in enumerate(zip(a.inputs, a.times, strict=True)):
            place = int(self.target[b, k])
            if place >= 0:
                x[place] = arrays.cast(a.state[0, b] * row.c_in, arrays.dtype_name(x))
                t[place] = round(row.timestep) if "int" in str(t.dtype) else row.timestep

    def refresh(self) -> None:
        for b, sample in enumerate(self.launch.samples):
            if 0 < sample["row"] < sample["end"]:
                self._write_input(b, self._row(sample, int(sample["row"]) - 1))


def place_samples(batch: int, rows: int, slots: int, seeds: Sequence[int] | None, block: int) -> NDArray[Any]:
    """Samples at row 0 of one plan of `rows` rows; guidance blocks `block` elements apart (0: shared)."""
    samples = np.zeros(batch, SAMPLE)
    samples["end"], samples["slots"] = rows, slots
    samples["weights"] = np.arange(batch) * block
    if seeds is not None:
        samples["seed"] = np.array(seeds, np.uint64)
    return samples
