"""Model inputs and timesteps written again from the state, after somebody has changed it: in Triton."""

from __future__ import annotations

from typing import Any

from pyguide.extras import require

from .program_triton import C_IN, END, HEAD, ROW, SLOTS, TABLE, TIMESTEP, WORDS, long_at
from .step_triton import _write_inputs, _write_times
from .vec_triton import narrow

triton: Any = require("triton")
tl: Any = require("triton.language")


@triton.jit(do_not_specialize=["units", "inner", "blocks", "route_stride"])
def refresh_kernel(
    state,
    inputs,
    times,
    samples,
    tables,
    target,
    units,
    inner,
    blocks,
    route_stride,
    K: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """The model inputs and timesteps that are due, again: those of the row before the one where a sample stands."""
    elements = units * UNIT
    b, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    words = samples + b.to(tl.int64) * WORDS
    row = tl.load(words + ROW)
    if (row < 1) | (row >= tl.load(words + END)):
        return
    M = tl.load(words + SLOTS)
    head = tables + long_at(words + TABLE) + (row - 1).to(tl.int64) * (M * M + 4 * M + HEAD)
    route = (row - 1).to(tl.int64) * route_stride + b.to(tl.int64) * K
    if block == 0:
        _write_times(times, target + route, tl.load(head + TIMESTEP), K)
    element = block.to(elements.dtype) * TILE + tl.arange(0, TILE)
    inside = element < elements
    c_in = tl.load(head + C_IN)
    x = tl.load(state + b.to(tl.int64) * elements + element, mask=inside & (c_in != 0), other=0.0)
    y = narrow(tl.where(c_in != 0, c_in * x, 0.0), inputs[0][0].dtype.element_ty)
    _write_inputs(inputs, target + route, y, element, inside, inner, K)
