"""The step in Triton: the twin of csrc/step.h, for GPUs without a CUDA build of pyguide.

One launch runs the row at which each sample stands; `step` says what it takes, `step_kernel` how it works.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any

from pyguide.extras import require
from pyguide.layout import TAG_STEP

from .philox_triton import normals_of
from .program_triton import (
    A_G,
    A_X,
    C_IN,
    CLIP_HI,
    CLIP_LO,
    END,
    FLAGS,
    HEAD,
    METHOD,
    NEED_D,
    NEED_GRADIENT,
    NEED_INPUT,
    NEED_NOISE,
    NEED_V,
    NEED_VARIANCE,
    NEED_W,
    NONFINITE,
    ROW,
    SEED,
    SLOTS,
    TABLE,
    TERM_B,
    TERM_D,
    TERM_E,
    TERM_N,
    TERM_Q,
    TICKET,
    TIMESTEP,
    VAR_HI,
    VAR_LO,
    WEIGHTS,
    WORDS,
    bit,
    decode,
    long_at,
)
from .vec_triton import divide, narrow, round_away, row_variance, square_root

torch: Any = require("torch")
triton: Any = require("triton")
tl: Any = require("triton.language")

WARPS = 4
LANES = tl.constexpr(32)
COLUMNS = tl.constexpr(4)  # elements side by side in one thread: 16 bytes of float32, and what one Philox call gives
STEP_TAG = tl.constexpr(TAG_STEP)


@triton.jit
def _add(total, coefficients, operands, mask, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """total + sum over i of coefficient i times operand i, where bit FIRST + i of mask is set."""
    for i in tl.static_range(COUNT):
        if bit(mask, FIRST + i):
            total = tl.fma(tl.load(coefficients + i), operands[i].to(total.dtype), total)
    return total


@triton.jit
def _at(operand, index, element, inner):
    """Addresses of a sample's elements in an operand, (pointer, strides): of the batch where it is dense, or all."""
    start = operand[0] + index.to(tl.int64) * operand[1][0]
    if len(operand[1]) == 1:
        return start + element
    else:
        channel = element // inner
        return start + channel.to(tl.int64) * operand[1][1] + (element - channel * inner).to(tl.int64) * operand[1][2]


@triton.jit
def _quads(part, WARPS: tl.constexpr, PARTS: tl.constexpr):
    """Of 4 elements each, [warps, lanes]: a warp's parts lie side by side, PARTS * 128 elements in all."""
    warp, lane = tl.arange(0, WARPS)[:, None], tl.arange(0, LANES)[None, :]
    return warp * (PARTS * LANES) + (lane + part * LANES)


@triton.jit
def _tile(part, WARPS: tl.constexpr, PARTS: tl.constexpr):
    """The elements of one part of a tile, [warps, lanes, columns]."""
    return _quads(part, WARPS, PARTS)[:, :, None] * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]


@triton.jit
def _split(line, WARPS: tl.constexpr):
    """The two parts of a line of elements."""
    return tl.split(tl.permute(tl.reshape(line, (WARPS, 2, LANES, COLUMNS)), (0, 2, 3, 1)))


@triton.jit
def _joined(parts, WARPS: tl.constexpr):
    """The line of elements of two parts."""
    line = tl.permute(tl.join(parts[0], parts[1]), (0, 3, 1, 2))
    return tl.reshape(line, (WARPS * 2 * LANES * COLUMNS,))


@triton.jit
def _write_times(times, target, value, K: tl.constexpr):
    for k in tl.static_range(K):
        index = tl.load(target + k)
        if index >= 0:
            time = times[k if len(times) > 1 else 0]
            if time.dtype.element_ty == tl.int64:
                tl.store(time + index, round_away(value))
            else:
                tl.store(time + index, value.to(time.dtype.element_ty))


@triton.jit
def _write_inputs(inputs, target, value, element, inside, inner, K: tl.constexpr):
    for k in tl.static_range(K):
        index = tl.load(target + k)
        if index >= 0:
            tl.store(_at(inputs[k if len(inputs) > 1 else 0], index, element, inner), value, mask=inside)


@triton.jit(do_not_specialize=["units", "slot_units", "inner", "blocks", "given", "route_stride"])
def step_kernel(
    state,  # [S][B][N]
    outputs,  # of 1 or K operands: (pointer, strides)
    inputs,  # likewise
    times,  # of 1 or K pointers
    samples,  # int32 [B][12]
    tables,
    weights,
    source,
    target,
    noise,  # an operand or None, like the next three
    gradient,
    variance,
    denoised,
    bound,  # [B] or None
    units,  # N / UNIT
    slot_units,  # B N / UNIT
    inner,
    blocks,  # programs per sample
    given,  # bit k: branch k has an output in this launch
    route_stride,
    K: tl.constexpr,
    S: tl.constexpr,
    SG: tl.constexpr,
    VARIANCE_BRANCH: tl.constexpr,
    UNIT: tl.constexpr,
    OUTPUTS_PACKED: tl.constexpr,  # 16 bits wide and read 8 elements at a time, the variance too
    INPUTS_PACKED: tl.constexpr,  # written so
    WARPS: tl.constexpr,
    MASK: tl.constexpr,  # of the decoded row: int32 where its bits suffice
    CHECK: tl.constexpr,
):
    PARTS: tl.constexpr = 2 if OUTPUTS_PACKED or INPUTS_PACKED else 1
    TILE: tl.constexpr = WARPS * PARTS * LANES * COLUMNS
    SOLVER: tl.constexpr = S - SG
    B: tl.constexpr = S + TERM_B
    real: tl.constexpr = state.dtype.element_ty
    elements, slot_stride = units * UNIT, slot_units.to(tl.int64) * UNIT
    b, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    words = samples + b.to(tl.int64) * WORDS
    row = tl.load(words + ROW)
    if (row < 0) | (row >= tl.load(words + END)):
        return
    M = tl.load(words + SLOTS)
    head = tables + long_at(words + TABLE) + row.to(tl.int64) * (M * M + 4 * M + HEAD)
    w = weights + long_at(words + WEIGHTS)
    if tl.load(words + METHOD) == 0:
        w += row.to(tl.int64) * (2 * K + S + S * K + SG)
    reads, needs, terms = decode(words, row, head, w, K, S, SG, denoised is not None, variance is not None, MASK)
    reads &= (given.to(MASK) << S) | ((1 << S) - 1)
    route = row.to(tl.int64) * route_stride + b.to(tl.int64) * K
    if bit(needs, NEED_INPUT) & (block == 0):
        _write_times(times, target + route, tl.load(head + TIMESTEP), K)

    start = block.to(elements.dtype) * TILE
    line = start + tl.arange(0, TILE)
    lines = ()
    if OUTPUTS_PACKED:
        for k in tl.static_range(K):
            index = tl.load(source + route + k)
            inside = (line < elements) & bit(reads, S + k) & (index >= 0)
            operand = outputs[k if len(outputs) > 1 else 0]
            lines = lines + (_split(tl.load(_at(operand, index, line, inner), mask=inside, other=float("nan")), WARPS),)
        if variance is not None:
            index = tl.load(source + route + VARIANCE_BRANCH)
            inside = (line < elements) & bit(needs, NEED_VARIANCE) & (index >= 0)
            at = _at(variance, index, line, inner)
            lines = lines + (_split(tl.load(at, mask=inside, other=float("nan")), WARPS),)
    nothing = tl.zeros((WARPS, LANES, COLUMNS), real)
    packed = ()
    for part in tl.static_range(PARTS):
        element = start + _tile(part, WARPS, PARTS)
        inside = element < elements
        z = nothing
        if bit(needs, NEED_NOISE):
            if noise is None:
                quad = (start // COLUMNS).to(tl.int64) + _quads(part, WARPS, PARTS)
                low, high, tag = tl.load(words + SEED), tl.load(words + (SEED + 1)), tl.full((), STEP_TAG, tl.int32)
                z = normals_of(quad, low, high, tl.load(words + ROW), tag, real)
                z = tl.reshape(z, (WARPS, LANES, COLUMNS))
            else:
                z = tl.load(_at(noise, b, element, inner), mask=inside, other=0.0)
        g = nothing + float("nan")
        if gradient is not None:
            g = nothing
            if bit(needs, NEED_GRADIENT):
                g = tl.load(_at(gradient, b, element, inner), mask=inside, other=0.0)
        s = ()
        own = state + b.to(tl.int64) * elements
        for c in tl.static_range(S):
            s = s + (tl.load(own + (slot_stride * c + element), mask=inside & bit(reads, c), other=0.0),)
        m = ()
        for k in tl.static_range(K):
            if OUTPUTS_PACKED:
                m = m + (lines[k][part],)
            else:
                index = tl.load(source + route + k)
                read = inside & bit(reads, S + k) & (index >= 0)
                at = _at(outputs[k if len(outputs) > 1 else 0], index, element, inner)
                m = m + (tl.load(at, mask=read, other=float("nan")).to(real),)
        if bit(needs, NEED_VARIANCE):
            if variance is None:
                g = nothing + float("nan")
            else:
                if OUTPUTS_PACKED:
                    v = lines[K][part].to(real)
                else:
                    index = tl.load(source + route + VARIANCE_BRANCH)
                    at = _at(variance, index, element, inner)
                    v = tl.load(at, mask=inside & (index >= 0), other=float("nan")).to(real)
                spread = row_variance(v, tl.load(head + VAR_LO), tl.load(head + VAR_HI))
                z = square_root(spread) * z
                g = spread * g
        tl.debug_barrier()

        # From here on the registers hold the elements. What the addresses are made of is read and computed again, from
        # numbers to which a zero was added that the compiler does not know to be one: otherwise all of it stays alive,
        # in 70 to 90 registers instead of 64.
        M = tl.load(words + SLOTS)
        hidden = M >> 31
        row = tl.load(words + (ROW + hidden))
        head = tables + long_at(words + (TABLE + hidden)) + row.to(tl.int64) * (M * M + 4 * M + HEAD)
        w = weights + long_at(words + (WEIGHTS + hidden))
        if tl.load(words + METHOD) == 0:
            w += row.to(tl.int64) * (2 * K + S + S * K + SG)
        own = state + (b + hidden).to(tl.int64) * elements
        element = (block + hidden).to(elements.dtype) * TILE + _tile(part, WARPS, PARTS)
        inside = element < elements
        needs |= hidden
        reads |= hidden
        G = _add(nothing, w, m, needs, NEED_W, K)
        G = _add(G, w + 2 * K, s, needs, NEED_W + 2 * K, S)
        D = nothing
        if bit(needs, NEED_D):
            a_x, a_g = tl.load(head + A_X), tl.load(head + A_G)
            if a_x != 0:
                D = a_x * s[0]
            if a_g != 0:
                D = tl.fma(a_g, G, D)
            low, high = tl.load(head + CLIP_LO), tl.load(head + CLIP_HI)
            limit = low * 0
            if bound is not None:
                limit = tl.load(bound + b)
                low, high = tl.where(limit != 0, -limit, low), tl.where(limit != 0, limit, high)
            D = tl.where(low > D, low, D)  # a NaN is neither below nor above and stays
            D = tl.where(high < D, high, D)
            if bound is not None:
                if limit != 0:
                    D = divide(D, limit)
            if denoised is not None:
                tl.store(_at(denoised, b, element, inner), D, mask=inside)
        if bit(needs, NEED_V):  # D has used G: from here on it is U
            G = _add(nothing, w + K, m, needs, NEED_W + K, K)
        x = s[0]
        for r in tl.static_range(S - 1, -1, -1):  # x last: it goes on
            mask = terms[r] | hidden
            if bit(mask, B + K):
                if r < SOLVER:
                    total = _add(nothing, head + (M * r + HEAD), s, mask, 0, SOLVER)
                    column = head + (M * M + (HEAD + r))
                    total = _add(total, column, (D,), mask, S + TERM_D, 1)
                    total = _add(total, column + M, (G,), mask, S + TERM_E, 1)
                    total = _add(total, w + (2 * K + S + r * K), m, mask, B, K)
                    total = _add(total, column + 2 * M, (z,), mask, S + TERM_N, 1)
                    total = _add(total, column + 3 * M, (g,), mask, S + TERM_Q, 1)
                else:
                    total = _add(nothing, w + (2 * K + S + S * K + r - SOLVER), (s[r],), mask, r, 1)
                    total = _add(total, w + (2 * K + S + r * K), m, mask, B, K)
                tl.store(own + (slot_stride * r + element), total, mask=inside)
                if r == 0:
                    x = total
                    if CHECK:
                        bad = (inside & ((tl.abs(x) < float("inf")) == 0)).to(tl.int32)
                        if tl.max(tl.reshape(bad, (TILE // PARTS,)), 0) != 0:
                            tl.atomic_or(words + FLAGS, NONFINITE)
        c_in = tl.load(head + C_IN)
        y = narrow(tl.where(c_in != 0, c_in * x, 0.0), inputs[0][0].dtype.element_ty)
        if INPUTS_PACKED:
            packed = packed + (y,)
        elif bit(needs, NEED_INPUT):
            route = tl.load(words + ROW).to(tl.int64) * route_stride + b.to(tl.int64) * K
            _write_inputs(inputs, target + route, y, element, inside, inner, K)
    if INPUTS_PACKED:
        if bit(needs, NEED_INPUT):
            route = tl.load(words + ROW).to(tl.int64) * route_stride + b.to(tl.int64) * K
            _write_inputs(inputs, target + route, _joined(packed, WARPS), line, line < elements, inner, K)

    # Every warp has read the row before the one that takes the ticket: the last program to arrive may advance it.
    tl.debug_barrier()
    if tl.atomic_add(words + TICKET, 1) == blocks - 1:
        tl.store(words + ROW, tl.load(words + ROW) + 1)
        tl.store(words + TICKET, 0)
