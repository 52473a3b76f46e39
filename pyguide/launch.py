"""The buffers of one run, and the native CPU kernel's way to execute a row on them.

device.py has the ways that run on a GPU, reference_step.py the definition. All of them are a `Step`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from . import arrays, native
from .arrays import Array
from .buffers import Buffers
from .layout import NONFINITE, SAMPLE
from .moments import Moments


class Quantile(NamedTuple):
    """Dynamic thresholding: bound[b] = min(max(quantile of |D|, least), limit) before each row."""

    quantile: float
    least: float
    limit: float
    bound: Array  # [B] in the dtype of the state


@dataclass
class Launch:
    """What a row reads and writes. B samples [C, *], K branches, S slots; the arrays are of one kind, on one device."""

    state: Array  # [S, B, C, *] float32 or float64
    inputs: list[Array]  # K: [n, C, *] in the model's dtype
    times: list[Array]  # K: [n] float32, float64 or int64
    tables: NDArray[Any]  # rows, in the dtype of the state, on the host
    weights: NDArray[Any]  # guidance blocks, likewise
    samples: NDArray[Any]  # [B] layout.SAMPLE
    source: NDArray[np.int32]  # [B, K], or by row [rows, B, K]: where each branch lies in its output, -1: absent
    target: NDArray[np.int32]  # likewise where the next model input goes
    guidance_slots: int = 0
    moments: Moments | None = None  # weights that are computed from the branches before a row
    quantile: Quantile | None = None  # the bound likewise
    noise: Array | None = None  # [B, C, *] in the dtype of the state: supplied noise; None: from the seeds
    denoised: Array | None = None  # [B, C, *] where D goes, if anyone wants it
    gradient: Array | None = None  # [B, C, *] in the dtype of the state: the classifier's
    variance: Array | None = None  # [n, C, *] learned variance, like the output of branch `variance_branch`
    variance_branch: int = 0
    bound: Array | None = None  # [B] in the dtype of the state: clip to +-bound and divide by it; 0: the row's clip
    # (that of the quantile, if there is one)
    check: bool = False
    threads: int = 0
    buffers: Buffers = field(default_factory=Buffers)  # where a back end that needs more arrays keeps them

    def attach(self, gradient: Array | None, variance: Array | None) -> None:
        """What the next rows read; None: as before."""
        self.gradient = self.gradient if gradient is None else gradient
        self.variance = self.variance if variance is None else variance

    @property
    def route_stride(self) -> int:
        """Elements from the routes of one row to those of the next."""
        return int(self.source[0].size) if self.source.ndim == 3 else 0


class Step(Protocol):
    """A way to execute rows on the arrays of a launch."""

    launch: Launch
    on_device: bool  # samples advance in a copy on the device; device.py says what such a step has besides

    def use_noise(self, supplied: bool) -> None:
        """Whether the next rows read `launch.noise` or draw from the seeds."""

    def attach(self, *, gradient: Array | None = None, variance: Array | None = None) -> None:
        """What the next rows read as the classifier's gradient and as the learned variance; None: as before."""

    def advance(self, outputs: Sequence[Array | None]) -> None:
        """Run the next row of every sample. outputs: one array for all branches, one per branch, or none (prologue)."""

    def refresh(self) -> None:
        """Write the model inputs that are due again, from the state as it is now."""

    def flagged(self, flag: int = NONFINITE) -> NDArray[np.bool_]:
        """[B] which samples have a flag of layout.py, by default: have met NaN or infinity, if the launch checks for
        them."""


class NativeStep:
    """Rows through `pyguide._C.Step`: one call, no allocation."""

    on_device = False

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.branches = len(launch.inputs)
        self.layouts: tuple[Any, ...] | None = None  # strides of the outputs that the kernel was told last
        self.dtype: Any = launch.inputs[0].dtype  # of the model's outputs: what its inputs are until one says otherwise
        self.bumped, self.bump = versions(launch)
        self.supplied = False
        self.asks = launch.moments is not None and not launch.moments.own
        self.walked: dict[Any, tuple[int, ...]] = {}
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
        step.route(arrays.pointer(a.source), arrays.pointer(a.target), a.route_stride)
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
        self._bind_bound(step)
        if a.moments is not None:
            self._bind_moments(step, a.moments)
        if a.quantile is not None:
            quantile, least, limit, bound = a.quantile
            step.set_quantile(quantile, least, limit, arrays.pointer(bound))
        self.layouts = None
        return step

    def _bind_moments(self, step: Any, m: Moments) -> None:
        """The program and where its parameters lie on the host, where the checks read them too."""
        width = len(m.pattern)
        step.set_moments(
            m.program.packed(),
            *(arrays.pointer(m.parameters), m.row_stride, m.sample_stride),
            *(0, width, m.plain_sample_stride, arrays.pointer(m.pattern)),
            *(0 if array is None else arrays.pointer(array) for array in (m.partial, m.moments)),
            *m.groups,
            *(0 if m.guided is None else arrays.pointer(m.guided), arrays.pointer(m.guided_source)),
        )
        step.own = m.own

    def _bind_bound(self, step: Any) -> None:
        if self.launch.bound is not None:
            step.bound = arrays.pointer(self.launch.bound)

    def use_noise(self, supplied: bool) -> None:
        self.supplied = supplied and self.launch.noise is not None
        self.step.set_noise(*(_walk(self.launch.noise) if self.supplied else (0, 0, 0, 0)))

    def attach(self, *, gradient: Array | None = None, variance: Array | None = None) -> None:
        self.launch.attach(gradient, variance)
        if gradient is not None:
            self.step.set_gradient(arrays.pointer(gradient), *self._strides(gradient))
        if variance is not None:
            self.step.set_variance(arrays.pointer(variance), *self._strides(variance), self.launch.variance_branch)

    def _strides(self, array: Array) -> tuple[int, ...]:
        """Those of `_walk`; the same few come at every evaluation."""
        key = tuple(array.shape), array.strides if isinstance(array, np.ndarray) else array.stride()
        known = self.walked.get(key)
        if known is None:
            known = self.walked[key] = _walk(array)[1:]
        return known

    def advance(self, outputs: Sequence[Array | None]) -> None:
        addresses = self._addresses(outputs)  # first: outputs of another dtype make another step
        if self.asks:
            self.step.moments(*addresses)
            self._weigh()
        self.step.run(*addresses)
        if self.bumped:  # what was written through pointers must not pass for unchanged
            self.bump(self.bumped)

    def _weigh(self) -> None:
        """The samples' own blocks by a function of the moments; where rows do not act, they are the host's already."""
        m: Any = self.launch.moments
        if m.acts(self.launch.samples["row"]).all():
            m.weigh(m.moments, *self._own_blocks(m), len(self.launch.state))

    def _own_blocks(self, m: Moments) -> tuple[Array, Array]:
        """The parameters [B, P] of the samples' rows, and the samples' own blocks [B, width]."""
        a, width = self.launch, len(m.pattern)
        table = m.of_rows(a.samples["row"])
        blocks = a.weights[-len(table) * width :].reshape(len(table), width)
        return (table, blocks) if isinstance(a.state, np.ndarray) else (arrays.tensor(table), arrays.tensor(blocks))

    def _addresses(self, outputs: Sequence[Array | None]) -> tuple[int, ...]:
        """Of the outputs, whose strides the kernel is told where they are new."""
        first = outputs[0] if len(outputs) == 1 else next((out for out in outputs if out is not None), None)
        if first is None:
            return ()
        if first.dtype != self.dtype:
            self.dtype = first.dtype
            self.step = self._bind()
        if isinstance(first, np.ndarray):
            layouts = tuple(None if out is None else arrays.strides(out) for out in outputs)
            addresses = tuple(0 if out is None else out.ctypes.data for out in outputs)
        else:
            layouts = tuple(None if out is None else out.stride() for out in outputs)
            addresses = tuple(0 if out is None else out.data_ptr() for out in outputs)
        if layouts != self.layouts:
            self._set_outputs([first] * self.branches if len(outputs) == 1 else outputs)
            self.layouts = layouts
        return addresses

    def _set_outputs(self, outputs: Sequence[Array | None]) -> None:
        for k, out in enumerate(outputs):
            if out is None:
                self.step.set_output(k, 0, 0, 0, 0)
                continue
            self.step.set_output(k, *_walk(out))

    def refresh(self) -> None:
        self.step.refresh()
        if self.bumped:
            self.bump(self.bumped)

    def flagged(self, flag: int = NONFINITE) -> NDArray[np.bool_]:
        return flagged(self.launch.samples, flag)


def versions(launch: Launch) -> tuple[tuple[Array, ...], Any]:
    """The tensors that a row writes through pointers, and what to call with them: their version counters then move.

    That is what torch.autograd.graph.increment_version calls, after a check that costs 1 us a row.
    """
    written = [launch.state, *launch.inputs, *launch.times, *([] if launch.denoised is None else [launch.denoised])]
    tracked = tuple({id(a): a for a in written if arrays.is_torch(a) and not a.is_inference()}.values())
    if not tracked:
        return (), None
    bump = sys.modules["torch"]._C._increment_version
    try:
        bump(())
    except (TypeError, RuntimeError):  # releases that take one tensor
        return tracked, lambda tensors: [bump(tensor) for tensor in tensors]
    return tracked, bump


def _walk(array: Array) -> tuple[int, int, int, int]:
    """Address and (batch, channel, inner) strides of [n, C, *]."""
    strides = arrays.merged_strides(tuple(array.shape), arrays.strides(array))
    assert strides is not None, "callers hand over arrays that a kernel can walk"
    return (arrays.pointer(array), *strides)


def flagged(samples: NDArray[Any], flag: int) -> NDArray[np.bool_]:
    return np.asarray((samples["flags"] & flag) != 0)


def place_samples(batch: int, rows: int, slots: int, seeds: Sequence[int] | None, block: int) -> NDArray[Any]:
    """Samples at row 0 of one plan of `rows` rows; guidance blocks `block` elements apart (0: shared)."""
    samples = np.zeros(batch, SAMPLE)
    samples["end"], samples["slots"] = rows, slots
    samples["weights"] = np.arange(batch) * block
    if seeds is not None:
        samples["seed"] = np.array(seeds, np.uint64)
    return samples
