"""Rows on a GPU: one launch each, no synchronisation and no copy from the host after the first.

What the kernels read besides the arrays of a launch (samples, tables, guidance blocks, routes) is copied to the device
once, in one piece, when a step is made. Where a sample stands is part of it: the kernel advances the row itself, so
that the same launch, captured once, serves every row.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import arrays
from .arrays import Array
from .launch import Launch, NativeStep, flagged, versions
from .layout import NONFINITE, SAMPLE
from .moments import Moments

ROW_WORD = int(SAMPLE.fields["row"][1]) // 4  # type: ignore[index]  # of a sample's int32 words
ALIGNMENT = 16  # bytes, of each part of a resident copy


class Resident(NamedTuple):
    """What the kernels read on the device besides the arrays of a launch."""

    samples: Array  # int32 [B, 12]: the words of layout.SAMPLE
    tables: Array  # in the dtype of the state
    weights: Array  # likewise
    source: Array  # int32
    target: Array  # int32
    parameters: Array | None = None  # float64, of a guidance method's program
    guided_source: Array | None = None  # int32
    idle: Array | None = None  # like samples: all at their end
    layout: tuple[int, ...] = ()  # where they lie in their buffer

    @staticmethod
    def of(launch: Launch) -> Resident:
        """Copies of the launch's host arrays, in one buffer that one copy fills."""
        parts = {
            "samples": launch.samples.view(np.int32),
            "idle": np.zeros_like(launch.samples).view(np.int32),  # all at their end
            "tables": launch.tables,
            "weights": launch.weights,
            "source": launch.source,
            "target": launch.target,
        }
        if launch.moments is not None:
            parts["parameters"] = launch.moments.parameters
            parts["guided_source"] = launch.moments.guided_source
        offsets, size = [], 0
        for part in parts.values():
            offsets.append(size)
            size += -(-part.nbytes // ALIGNMENT) * ALIGNMENT
        packed = np.zeros(size, np.uint8)
        for part, start in zip(parts.values(), offsets, strict=True):
            packed[start : start + part.nbytes] = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        buffer = launch.buffers.array("resident", packed.shape, "uint8", launch.state)
        arrays.upload(buffer, packed)
        torch, words = sys.modules["torch"], (len(launch.samples), SAMPLE.itemsize // 4)
        placed = {
            name: buffer[start : start + part.nbytes].view(getattr(torch, str(part.dtype)))
            for (name, part), start in zip(parts.items(), offsets, strict=True)
        }
        for name in ("samples", "idle"):
            placed[name] = placed[name].view(words)
        return Resident(**placed, layout=(size, *offsets))

    def own_blocks(self, m: Moments) -> tuple[Array, Array]:
        """Parameters [B, P] of the rows that the samples stand at, and the samples' own blocks [B, width]: no copy to
        the host, so that a capture can have them."""
        batch, width = len(self.samples), len(m.pattern)
        rows = self.samples[:, ROW_WORD].long()
        table = self.parameters.view(m.parameters.shape)  # type: ignore[union-attr]  # there are moments
        each = rows.new_zeros(batch) if table.shape[1] == 1 else sys.modules["torch"].arange(batch, device=rows.device)
        return table[rows, each], self.weights[-batch * width :].view(batch, width)

    def flagged(self, flag: int) -> NDArray[np.bool_]:
        """[B] which samples have a flag. Waits for the device."""
        return flagged(self.samples.cpu().numpy().view(SAMPLE).reshape(-1), flag)


class CudaStep(NativeStep):
    """Rows through the CUDA kernel of `pyguide._C.Step`, on the stream that is current when they are launched."""

    on_device = True

    def __init__(self, launch: Launch, resident: Resident | None = None) -> None:
        self.resident, self.device = resident or Resident.of(launch), launch.state.device
        super().__init__(launch)

    def _bind(self) -> Any:
        step = super()._bind()
        self._place(step, self.resident.samples)
        self.stream = step.stream = arrays.current_stream(self.device)
        return step

    def _place(self, step: Any, samples: Array) -> None:
        r, bound = self.resident, self.launch.bound
        data = (samples, r.tables, r.weights, bound, r.source, r.target)
        step.place(self.device.index or 0, *(0 if part is None else arrays.pointer(part) for part in data))

    def _bind_bound(self, step: Any) -> None:
        """Nothing: the host cannot read it, and no check depends on it."""

    def _bind_moments(self, step: Any, m: Moments) -> None:
        super()._bind_moments(step, m)
        placed = (self.resident.parameters, m.partial, m.moments, m.guided, self.resident.guided_source)
        step.place_moments(*(0 if array is None else arrays.pointer(array) for array in placed))

    def _own_blocks(self, m: Moments) -> tuple[Array, Array]:
        return self.resident.own_blocks(m)

    def _follow(self) -> None:
        """Launch on the stream that is current now."""
        stream = arrays.current_stream(self.device)
        if stream != self.stream:
            self.stream = self.step.stream = stream

    def advance(self, outputs: Sequence[Array | None]) -> None:
        self._follow()
        super().advance(outputs)

    def refresh(self) -> None:
        self._follow()
        super().refresh()

    def enqueue(self, outputs: Sequence[Array | None]) -> None:
        """The launch alone, for a capture: nothing on the host is checked or advanced."""
        addresses = self._addresses(outputs)
        self._follow()
        if self.asks:
            self.step.enqueue_moments(*addresses)
            self._weigh()
        self.step.enqueue(*addresses)
        if self.bumped:
            self.bump(self.bumped)

    def warm_up(self, outputs: Sequence[Array | None]) -> None:
        """The same launch over samples that are at their end: it loads the kernel and does nothing."""
        addresses = self._addresses(outputs)
        self._follow()
        self._place(self.step, self.resident.idle)
        try:
            if self.asks:
                self.step.enqueue_moments(*addresses)
                self._weigh()
            self.step.enqueue(*addresses)
        finally:
            self._place(self.step, self.resident.samples)

    def flagged(self, flag: int = NONFINITE) -> NDArray[np.bool_]:
        return self.resident.flagged(flag)


def launch_triton() -> Any:
    """The module of the Triton kernels; imported late, for Triton takes a second."""
    from .kernels import launch_triton as module

    return module


class TritonStep:
    """Rows through the Triton kernel: kernels/launch_triton.py."""

    on_device = True

    def __init__(self, launch: Launch, resident: Resident | None = None) -> None:
        self.launch, self.resident = launch, resident or Resident.of(launch)
        self.supplied, self._kernels = False, launch_triton()
        self.bumped, self.bump = versions(launch)

    def use_noise(self, supplied: bool) -> None:
        self.supplied = supplied and self.launch.noise is not None

    def attach(self, *, gradient: Array | None = None, variance: Array | None = None) -> None:
        self.launch.attach(gradient, variance)

    def advance(self, outputs: Sequence[Array | None]) -> None:
        self.enqueue(outputs)
        rows = self.launch.samples["row"]
        rows += rows < self.launch.samples["end"]

    def enqueue(self, outputs: Sequence[Array | None]) -> None:
        """The launch alone, for a capture: nothing on the host is checked or advanced."""
        self._launch(outputs, self.resident.samples)

    def warm_up(self, outputs: Sequence[Array | None]) -> None:
        """The same launch over samples that are at their end: it compiles and loads the kernel and does nothing."""
        self._launch(outputs, self.resident.idle)

    def refresh(self) -> None:
        self._launch((), self.resident.samples, refresh=True)

    def _launch(self, outputs: Sequence[Array | None], samples: Array, *, refresh: bool = False) -> None:
        a, r, m = self.launch, self.resident, self.launch.moments
        each = [*outputs] * len(a.inputs) if len(outputs) == 1 else [*outputs]
        common: dict[str, Any] = {"route_stride": a.route_stride, "guidance_slots": a.guidance_slots}
        read, source, bound = each, r.source, a.bound
        if m is not None and not refresh and a.samples["row"].any():
            self._weigh(m, each or [None] * len(a.inputs), samples, common)
            if m.guided is not None:
                read, source = [m.guided, *[None] * (len(a.inputs) - 1)], r.guided_source
        if a.quantile is not None:
            quantile, least, limit, bound = a.quantile
            limits: dict[str, Any] = {"quantile": quantile, "least": least, "limit": limit, "bound": bound}
            limits |= {"branches": len(a.inputs), "denoised": a.denoised is not None}
            if not refresh:
                self._kernels.quantile(a.state, read, samples, r.tables, r.weights, source, **common, **limits)
        self._kernels.step(
            a.state,
            read,
            a.inputs,
            a.times,
            samples,
            r.tables,
            r.weights,
            source,
            r.target,
            **common,
            noise=a.noise if self.supplied else None,
            gradient=a.gradient,
            variance=a.variance,
            variance_branch=a.variance_branch,
            bound=bound,
            denoised=a.denoised,
            check=a.check,
            refresh=refresh,
        )
        if self.bumped:
            self.bump(self.bumped)

    def _weigh(self, m: Moments, outputs: Sequence[Array | None], samples: Array, common: dict[str, Any]) -> None:
        """What the rows need of the branches first: the samples' own blocks, or the guided output of groups."""
        a, r = self.launch, self.resident
        outer, reduce, inner = m.groups
        self._kernels.moments(
            *(a.state, outputs, samples, r.weights, r.source),
            **common,
            program=m.program,
            parameters=r.parameters,
            partial=m.partial,
            moments=m.moments,
            row_stride=m.row_stride,
            sample_stride=m.sample_stride,
            plain=0,
            plain_row_stride=len(m.pattern),
            plain_sample_stride=m.plain_sample_stride,
            outer=outer,
            reduce=reduce,
            inner=inner,
            guided=m.guided,
        )
        if not m.own and m.acts(a.samples["row"]).all():
            m.weigh(m.moments, *r.own_blocks(m), len(a.state))

    def flagged(self, flag: int = NONFINITE) -> NDArray[np.bool_]:
        return self.resident.flagged(flag)
