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
from .layout import NONFINITE, SAMPLE, SEPARATE, TAG_STEP, Row, row_width, split_row, split_weights, weights_width


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
    gradient: Array | None = None  # [B, C, *] in the dtype of the state: the classifier's
    variance: Array | None = None  # [n, C, *] learned variance, like the output of branch `variance_branch`
    variance_branch: int = 0
    bound: Array | None = None  # [B] in the dtype of the state: clip to +-bound and divide by it; 0: the row's clip
    check: bool = False
    threads: int = 0


class Buffers:
    """The arrays of a run by name. A sampler keeps those of its last run: large ones cost page faults when fresh."""

    def __init__(self) -> None:
        self._arrays: dict[str, tuple[Any, Array]] = {}

    def array(self, name: str, shape: Sequence[int], dtype: str, like: Array) -> Array:
        """An uninitialised array: the one of that name if it still fits, else a new one."""
        place = (like.device, arrays.inference_mode()) if arrays.is_torch(like) else None
        key = (tuple(shape), dtype, place)
        if name not in self._arrays or self._arrays[name][0] != key:
            self._arrays[name] = (key, arrays.empty(shape, dtype, like))
        return self._arrays[name][1]


class NativeStep:
    """Rows through `pyguide._C.Step`: one call, no allocation."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.branches = len(launch.inputs)
        self.strides: tuple[int, ...] | None = None
        self.dtype: Any = launch.inputs[0].dtype  # of the model's outputs: what its inputs are until one says otherwise
        self.routes: tuple[Any, Any] = (None, None)
        written = [launch.state, *launch.inputs, *launch.times, *([] if launch.denoised is None else [launch.denoised])]
        tracked = {id(a): a for a in written if arrays.is_torch(a) and not a.is_inference()}
        self.bumped = tuple(tracked.values())
        self.bump: Any = _version_counter() if self.bumped else None
        self.supplied = False
        self.step = self._bind()

    def _bind(self) -> Any:
        a = self.launch
        slots, batch, channels = a.state.shape[:3]
        inner = int(np.prod(a.state.shape[3:]))
        types = [arrays.dtype_name(a.state), str(self.dtype).removeprefix("torch.")]
        types += [arrays.dtype_name(a.inputs[0]), arrays.dtype_name(a.times[0])]
        assert native.C is not None
        step = native.C.Step(batch, channels, inner, self.branches, slots, a.guidance_slots, *types)
        step.state, step.samples = arrays.pointer(a.state), arrays.pointer(a.samples)
        step.tables, step.weights = arrays.pointer(a.tables), arrays.pointer(a.weights)
        step.check, step.threads = a.check, a.threads
        for k in range(self.branches):
            step.set_input(k, *_walk(a.inputs[k]))
            step.set_time(k, arrays.pointer(a.times[k]))
        if a.denoised is not None:
            step.set_denoised(*_walk(a.denoised))
        if self.supplied:
            step.set_noise(*_walk(a.noise))
        if a.gradient is not None:
            step.set_gradient(*_walk(a.gradient))
        if a.variance is not None:
            step.set_variance(*_walk(a.variance), a.variance_branch)
        if a.bound is not None:
            step.bound = arrays.pointer(a.bound)
        self.strides = None
        self.routes = (None, None)
        return step

    def use_noise(self, supplied: bool) -> None:
        """Whether the next rows read `launch.noise` or draw from the seeds."""
        self.supplied = supplied and self.launch.noise is not None
        self.step.set_noise(*(_walk(self.launch.noise) if self.supplied else (0, 0, 0, 0)))

    def advance(self, outputs: Sequence[Array | None], source: NDArray[np.int32], target: NDArray[np.int32]) -> None:
        """Run the next row of every sample. outputs: one array for all branches, one per branch, or none (prologue)."""
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
            self.bump(self.bumped)

    def _set_outputs(self, outputs: Sequence[Array | None]) -> None:
        for k, out in enumerate(outputs):
            if out is None:
                self.step.set_output(k, 0, 0, 0, 0)
                continue
            self.step.set_output(k, *_walk(out))

    def refresh(self) -> None:
        """Write the model inputs that are due again, from the state as it is now."""
        self.step.refresh()
        if self.bumped:
            self.bump(self.bumped)


def _version_counter() -> Any:
    """What torch.autograd.graph.increment_version calls after an isinstance check that costs 1 us a row."""
    bump = sys.modules["torch"]._C._increment_version
    try:
        bump(())
    except (TypeError, RuntimeError):  # releases that take one tensor
        return lambda tensors: [bump(tensor) for tensor in tensors]
    return bump


def _walk(array: Array) -> tuple[int, int, int, int]:
    """Address and (batch, channel, inner) strides of [n, C, *]."""
    strides = arrays.merged_strides(tuple(array.shape), arrays.strides(array))
    assert strides is not None, "callers hand over arrays that a kernel can walk"
    return (arrays.pointer(array), *strides)


class Absent:
    """In place of an operand that was not given: an error that names it as soon as the formula reads it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __mul__(self, other: object) -> Any:
        raise ValueError(f"{self.name}: a row reads it, and it is absent")

    __rmul__ = __add__ = __mul__


class ReferenceStep:
    """Rows through `reference.step`, sample by sample: the definition, on any device that the arrays are on."""

    def __init__(self, launch: Launch) -> None:
        self.launch, self.supplied = launch, False
        self.target: NDArray[np.int32] | None = None

    def use_noise(self, supplied: bool) -> None:
        self.supplied = supplied

    def advance(self, outputs: Sequence[Array], source: NDArray[np.int32], target: NDArray[np.int32]) -> None:
        """As NativeStep.advance. All samples are computed before the first one is written: an error changes nothing."""
        a, self.target = self.launch, target
        due = [b for b, sample in enumerate(a.samples) if sample["row"] != sample["end"]]
        results = [self._computed(b, outputs, source) for b in due]
        for b, (row, slots, done) in zip(due, results, strict=True):
            sample = a.samples[b]
            for c, (old, new) in enumerate(zip(slots, done.slots, strict=True)):
                if new is not old:
                    a.state[c, b] = new
            if a.denoised is not None and done.denoised is not None:
                a.denoised[b] = done.denoised
            if a.check and not bool((abs(a.state[0, b]) < np.inf).all()):
                sample["flags"] |= NONFINITE
            sample["row"] += 1
            if sample["row"] < sample["end"]:
                self._write_input(b, row)

    def _computed(self, b: int, outputs: Sequence[Array], source: NDArray[np.int32]) -> tuple[Row, list[Array], Any]:
        """The row of sample b, its slots as they are, and what the row makes of them."""
        a, K, S = self.launch, len(self.launch.inputs), self.launch.state.shape[0]
        sample, dtype = a.samples[b], arrays.dtype_name(a.state)
        i, block = int(sample["row"]), weights_width(K, S, a.guidance_slots)
        slots, row = [a.state[c, b] for c in range(S)], self._row(sample, i)
        weights = None
        branches: list[Array] = [None] * K
        if i:
            start = int(sample["weights"]) + (0 if sample["method"] else i * block)
            separate = bool(sample["flags"] & SEPARATE)
            weights = split_weights(a.weights[start : start + block], K, S, a.guidance_slots, separate)
            each = [*outputs] * (K if len(outputs) == 1 else 1) or [None] * K
            branches = [
                Absent(f"outputs[{k}] of sample {b}") if place < 0 or out is None else arrays.cast(out[place], dtype)
                for k, (place, out) in enumerate(zip(source[b].tolist(), each, strict=True))
            ]
        z: Any = None
        g: Any = None
        variance: Any = None
        if any(row.n):
            z = a.noise[b] if self.supplied and a.noise is not None else self._normals(sample, i)
        if any(row.q):
            g = Absent("gradient") if a.gradient is None else a.gradient[b]
        if (z is not None or g is not None) and (row.var_lo != 0 or row.var_hi != 0):
            place = source[b, a.variance_branch]
            variance = Absent("variance")
            if a.variance is not None and place >= 0:
                variance = arrays.cast(a.variance[place], dtype)
        bound = 0.0 if a.bound is None else float(a.bound[b])
        operands: dict[str, Any] = {"noise": z, "gradient": g, "variance": variance, "bound": bound}
        operands["want_denoised"] = a.denoised is not None
        return row, slots, reference.step(row, slots, branches, weights, **operands)

    def _row(self, sample: Any, i: int) -> Row:
        width = row_width(int(sample["slots"]))
        start = int(sample["table"]) + i * width
        return split_row(self.launch.tables[start : start + width], int(sample["slots"]))

    def _normals(self, sample: Any, i: int) -> Array:
        shape, like = self.launch.state.shape[2:], self.launch.state
        values = noise.normals(int(sample["seed"]), int(np.prod(shape)), i, TAG_STEP).reshape(shape)
        return arrays.from_numpy(values.astype(arrays.dtype_name(like)), like)

    def _write_input(self, b: int, row: Row) -> None:
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
