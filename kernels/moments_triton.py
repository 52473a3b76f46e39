"""Moments of the branches, the guidance method's program and what comes of it: the Triton twin of csrc/moments.h.

One program per chunk of CHUNK elements, its sums in `partial`; the last of a sample to arrive joins the chunks, JOINED
side by side, runs the method's program in float64 and writes the sample's guidance block. Groups of elements have a
kernel of their own, groups_triton.py. The order of the sums is that of sums_triton.py.

Bytes per element: what is read, once (K = 2 in float32: 8, and 4 of s_0 in another space than the model's). The program
is a compile-time constant, its parameters are data. Up to 168 registers per thread with 4 vectors, more with more.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pyguide.extras import require
from pyguide.layout import CHUNK, moments_count, weights_width

from .groups_triton import groups_kernel
from .operands_triton import branches_of, on_device, unit_of
from .program_triton import END, ROW, TICKET, WEIGHTS, WORDS, long_at
from .step_triton import WARPS
from .sums_triton import (
    ACTING,
    add_all,
    add_columns,
    add_rows,
    branches_at,
    moments_of,
    no_moments,
    numbers_at,
    run_program,
    space_of,
    vectors_of,
)

torch: Any = require("torch")
triton: Any = require("triton")
tl: Any = require("triton.language")
Tensor = Any

LANES = tl.constexpr(32 * WARPS)
JOINED = tl.constexpr(32)  # chunks side by side
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}
REGISTERS = 168  # per thread, up to MANY vectors; more have what there is
MANY = 4
NARROW = 16  # elements of a group at a time where those of other groups lie between them


@triton.jit(
    do_not_specialize=["units", "slot_units", "inner", "chunks", "given", "route_stride", "row_stride",
                       "sample_stride", "plain", "plain_row_stride", "plain_sample_stride"]
)  # fmt: skip
def moments_kernel(
    state,  # [S][B][N]
    outputs,  # of 1 or K operands: (pointer, strides)
    samples,  # int32 [B][12]
    weights,
    source,
    parameters,  # float64; of row r and sample b at r row_stride + b sample_stride
    partial,  # float64 [B][chunks][COUNT]
    moments,  # float64 [B][COUNT] or None
    units,  # N / UNIT
    slot_units,  # B N / UNIT
    inner,
    chunks,
    given,  # bit k: branch k has an output in this launch
    route_stride,
    row_stride,
    sample_stride,
    plain,  # in weights, of row r and sample b at plain + r plain_row_stride + b plain_sample_stride
    plain_row_stride,
    plain_sample_stride,
    K: tl.constexpr,
    S: tl.constexpr,
    SG: tl.constexpr,
    PARAMETERS: tl.constexpr,  # how many
    OPERATIONS: tl.constexpr,  # of (code, a, b, c)
    RESULTS: tl.constexpr,  # of (place, register)
    SUMS: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,  # elements at a time
    LINE: tl.constexpr,  # a power of 2, COUNT at least
    PLACES: tl.constexpr,  # likewise, of the block
):
    N: tl.constexpr = K + SG
    COUNT: tl.constexpr = N * (N + 3) // 2
    FIRST: tl.constexpr = 0 if SUMS else N  # of the moments that are needed
    WIDTH: tl.constexpr = 2 * K + S + S * K + SG
    real: tl.constexpr = state.dtype.element_ty
    elements, slot_stride = units * UNIT, slot_units.to(tl.int64) * UNIT
    b, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    words = samples + b.to(tl.int64) * WORDS
    row = tl.load(words + ROW)
    if (row < 1) | (row >= tl.load(words + END)):
        return
    given_here = parameters + (row.to(tl.int64) * row_stride + b.to(tl.int64) * sample_stride)
    to = weights + long_at(words + WEIGHTS)
    place = tl.arange(0, PLACES)
    if tl.load(given_here + ACTING) == 0:
        if chunk == 0:
            block = weights + (row.to(tl.int64) * plain_row_stride + b.to(tl.int64) * plain_sample_stride + plain)
            tl.store(to + place, tl.load(block + place, mask=place < WIDTH), mask=place < WIDTH)
        return

    route = source + (row.to(tl.int64) * route_stride + b.to(tl.int64) * K)
    own = state + b.to(tl.int64) * elements
    space = space_of(given_here, real)
    sums = no_moments(N, (1, LANES), SUMS)
    start = 0
    while start < CHUNK:
        element = chunk.to(elements.dtype) * CHUNK + (start + tl.arange(0, TILE)[None, :])
        inside = element < elements
        m = branches_at(outputs, route, element, inside, inner, given, K, real)
        y = vectors_of(m, own, slot_stride, element, inside, space, S, SG)
        sums = add_all(sums, moments_of(y, LANES, SUMS))
        start += TILE
    mine = partial + b.to(tl.int64) * chunks * COUNT
    for i in tl.static_range(COUNT - FIRST):
        total = tl.sum(tl.reshape(add_columns(sums[i], 1), (1,)), 0)
        tl.store(mine + (chunk.to(tl.int64) * COUNT + (FIRST + i)), total)

    # What every warp wrote is there before the one that takes the ticket; the last program to arrive sees all of it.
    tl.debug_barrier()
    if tl.atomic_add(words + TICKET, 1, sem="acq_rel") == chunks - 1:
        tl.store(words + TICKET, 0)
        line = tl.arange(0, LINE)[None, :]
        joined = tl.zeros((JOINED, LINE), tl.float64)
        start = 0
        while start < chunks:
            at = start + tl.arange(0, JOINED)[:, None]
            read = (at < chunks) & (line >= FIRST) & (line < COUNT)
            joined += tl.load(mine + at * COUNT + line, mask=read, other=0.0, cache_modifier=".cg")
            start += JOINED
        totals = add_rows(joined)
        tl.debug_barrier()
        line = tl.arange(0, LINE)
        tl.store(mine + line, totals, mask=line < COUNT)
        if moments is not None:
            tl.store(moments + b.to(tl.int64) * COUNT + line, totals, mask=line < COUNT)
        tl.debug_barrier()
        if len(RESULTS) > 0:
            registers = run_program(numbers_at(mine, COUNT) + numbers_at(given_here, PARAMETERS), OPERATIONS)
            block = tl.zeros((PLACES,), tl.float64)
            for i in tl.static_range(len(RESULTS)):
                block = tl.where(place == RESULTS[i][0], registers[RESULTS[i][1]], block)
            tl.store(to + place, block.to(weights.dtype.element_ty), mask=place < WIDTH)


def moments(
    state: Tensor,  # [S, B, C, *] float32 or float64, contiguous; with groups the method's slots are written
    outputs: Sequence[Tensor | None],  # 1 for all branches or K: [n, C, *], None: absent
    samples: Tensor,  # int32 [B, 12]: layout.SAMPLE; not advanced
    weights: Tensor,  # in the dtype of the state; a sample's own block is written
    source: Tensor,  # int32 [rows, B, K], rows route_stride apart
    *,
    route_stride: int,
    guidance_slots: int,
    program: Any,  # pyguide.guidance.program.Program
    parameters: Tensor,  # float64; of row r and sample b at r row_stride + b sample_stride
    row_stride: int,
    sample_stride: int,
    plain: int,  # the blocks of samples that do not act: in weights, at plain + r plain_row_stride + b ..
    plain_row_stride: int,
    plain_sample_stride: int,
    partial: Tensor | None = None,  # float64 [B, chunks, count]: scratch; not with groups
    moments: Tensor | None = None,  # float64 [B, count]; written for the samples that act
    outer: int = 0,  # a sample is [outer, reduce, inner], a group all `reduce` of an (outer, inner)
    reduce: int = 0,  # 0: all of a sample
    inner: int = 0,
    guided: Tensor | None = None,  # with groups [B, N] in the dtype of the state, contiguous; written
) -> None:
    """The guidance blocks of all samples that are past their prologue and not at their end (csrc/moments.h) or, with
    groups, their guided outputs and the method's slots, in one launch. Nothing is read back and nothing checked: a
    branch that is absent counts as NaN."""
    slots, batch, channels = state.shape[:3]
    elements = math.prod(state.shape[2:])
    if batch == 0 or elements == 0:
        return
    branches = program.vectors - guidance_slots
    read, given = branches_of(outputs, branches, state[0])
    unit = unit_of(elements)
    count, width = moments_count(program.vectors), weights_width(branches, slots, guidance_slots)
    tile = 8 * 32 * WARPS // (4 if program.vectors > MANY else 1) // (2 if state.dtype == torch.float64 else 1)
    sizes = elements // unit, batch * elements // unit, elements // channels
    strides = route_stride, row_stride, sample_stride, plain, plain_row_stride, plain_sample_stride
    constants = {
        "K": branches,
        "S": slots,
        "SG": guidance_slots,
        "PARAMETERS": program.parameters,
        "SUMS": program.sums,
    }
    constants["OPERATIONS"] = tuple(tuple(operation) for operation in program.operations)
    options: dict[str, Any] = dict(OPTIONS) if program.vectors > MANY else {**OPTIONS, "maxnreg": REGISTERS}
    with on_device(state.device):
        if reduce == 0:
            chunks = -(-elements // CHUNK)
            assert partial is not None, "the sums of chunks need a place"
            moments_kernel[(batch * chunks,)](
                *(state, read, samples, weights, source, parameters, partial, moments, *sizes, chunks, given, *strides),
                RESULTS=tuple(tuple(result) for result in program.results),
                UNIT=unit,
                CHUNK=CHUNK,
                TILE=tile,
                LINE=triton.next_power_of_2(count),
                PLACES=triton.next_power_of_2(width),
                **constants,
                **options,
            )
            return
        assert guided is not None, "the guided outputs need a place"
        assert guided.is_contiguous(), "callers hand over an array that a kernel can walk"
        assert outer * reduce * inner == elements, "groups are all of a sample"
        assert moments is None, "groups have no moments of a sample"
        last = inner == 1
        unit = unit_of(elements, reduce if last else inner)
        columns = min(triton.next_power_of_2(reduce), tile if last else NARROW)
        groups = tile // columns
        if not last:
            groups = min(groups, triton.next_power_of_2(inner))
        blocks = -(-outer // groups) if last else outer * -(-inner // groups)
        registers = dict(program.results)
        first = 2 * branches + slots
        own = {slots - guidance_slots + j: first + slots * branches + j for j in range(guidance_slots)}
        updated = [
            r for r in own if {own[r], *range(first + r * branches, first + (r + 1) * branches)} & set(registers)
        ]
        groups_kernel[(batch * blocks,)](
            *(state, read, samples, weights, source, parameters, guided),
            *(elements // unit, batch * elements // unit, elements // channels, given, *strides),
            *(blocks, outer, reduce // unit if last else reduce, 1 if last else inner // unit),
            PLACES=tuple(registers.get(place, -1) for place in range(width)),
            UPDATED=sum(1 << r for r in updated),
            UNIT=unit,
            LAST=last,
            GROUPS=groups,
            COLUMNS=columns,
            **constants,
            **options,
        )
