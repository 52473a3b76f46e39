"""The exact quantile of a sample's denoised estimate, for dynamic thresholding: the Triton twin of csrc/quantile.h.

One program per sample, which finds the order statistic |D|_(i) from its highest bit down: of the bits of |D| without
the sign, as integers, it is the largest t that no more than i of them are below. What follows it is one pass more.
Counts are integers: no order of threads and elements changes the result.

A sample of up to PARTS blocks (12,288 elements of float32) is read once and stays in registers as these bits, of which
1 is found per pass. A larger one is read again in every pass, out of the cache, and D is formed again: 4 bits per pass
by 15 comparisons, so 8 + 1 passes over the operands of a float32 state, 16 + 1 of a float64 one, by one multiprocessor.
tl.histogram would take 4 + 1, but some 50 instructions an element in each.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, misc"

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

from pyguide.extras import require

from .operands_triton import branches_of, on_device, unit_of
from .program_triton import (
    A_G,
    A_X,
    END,
    HEAD,
    METHOD,
    NEED_D,
    NEED_W,
    ROW,
    SLOTS,
    TABLE,
    WEIGHTS,
    WORDS,
    bit,
    decode,
    long_at,
)
from .step_triton import _add, _at

torch: Any = require("torch")
triton: Any = require("triton")
tl: Any = require("triton.language")
Tensor = Any

OPTIONS = {"enable_fp_fusion": False, "maxnreg": 128}
BLOCK = 2048  # elements at a time, half as many of float64
PARTS = 6  # blocks that stay in registers
WARPS = 16  # of a whole block, or of half of one where 15 counts need the registers
BITS, TRIALS = tl.constexpr(4), tl.constexpr(15)  # of a pass over memory


@triton.jit
def _sizes(
    state,
    outputs,
    route,
    head,
    w,
    needs,
    reads,
    b,
    element,
    elements,
    slot_stride,
    inner,
    K: tl.constexpr,
    S: tl.constexpr,
    keys: tl.constexpr,
):
    """The bits of |D| at the elements, as integers; beyond the last element as if NaN. D is that of the step before its
    clip: the same terms in the same order."""
    real: tl.constexpr = state.dtype.element_ty
    own = state + b.to(tl.int64) * elements
    inside = element < elements
    m = ()
    for k in tl.static_range(K):
        index = tl.load(route + k)
        at = _at(outputs[k if len(outputs) > 1 else 0], index, element, inner)
        m = m + (tl.load(at, mask=inside & bit(reads, S + k) & (index >= 0), other=float("nan")).to(real),)
    s = ()
    for c in tl.static_range(S):
        read = bit(needs, NEED_W + 2 * K + c)
        if c == 0:
            read = read | (tl.load(head + A_X) != 0)
        s = s + (tl.load(own + (slot_stride * c + element), mask=inside & read, other=0.0),)
    nothing = tl.zeros(element.shape, real)
    G = _add(nothing, w, m, needs, NEED_W, K)
    G = _add(G, w + 2 * K, s, needs, NEED_W + 2 * K, S)
    D = nothing
    a_x, a_g = tl.load(head + A_X), tl.load(head + A_G)
    if a_x != 0:
        D = a_x * s[0]
    if a_g != 0:
        D = tl.fma(a_g, G, D)
    most: tl.constexpr = (1 << (keys.primitive_bitwidth - 1)) - 1
    return tl.where(inside, D.to(keys, bitcast=True) & most, most)


@triton.jit
def _below(keys, found, shift):
    """By how many keys are below each of the 15 numbers that have `found` and one more digit: parts of the counts."""
    counts = ()
    for digit in tl.static_range(1, TRIALS + 1):
        trial = found | (tl.full((), digit, found.dtype) << shift)
        counts = counts + ((keys < trial).to(tl.int32),)
    return counts


@triton.jit
def _above(keys, found):
    """The keys that are above `found`; in place of the others, what no key is above."""
    most: tl.constexpr = (1 << (keys.dtype.primitive_bitwidth - 1)) - 1
    return tl.where(keys > found, keys, most)


@triton.jit
def _number(low, high):
    """The float64 of two words."""
    return ((high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)).to(tl.float64, bitcast=True)


@triton.jit(
    do_not_specialize=["units", "slot_units", "inner", "given", "route_stride", "rank", "fraction_low", "fraction_high",
                       "least_low", "least_high", "limit_low", "limit_high"]
)  # fmt: skip
def quantile_kernel(
    state,  # [S][B][N]
    outputs,  # of 1 or K operands: (pointer, strides)
    samples,  # int32 [B][12]
    tables,
    weights,
    source,
    bound,  # [B] of the state's type
    units,  # N / UNIT
    slot_units,  # B N / UNIT
    inner,
    given,  # bit k: branch k has an output in this launch
    route_stride,
    rank,  # i
    fraction_low,  # f, like the two after it, in words: an argument would be float32
    fraction_high,
    least_low,
    least_high,
    limit_low,
    limit_high,
    K: tl.constexpr,
    S: tl.constexpr,
    SG: tl.constexpr,
    DENOISED: tl.constexpr,
    MASK: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,  # 0: more than stay in registers
):
    real: tl.constexpr = state.dtype.element_ty
    keys: tl.constexpr = tl.uint64 if real == tl.float64 else tl.uint32
    WIDTH: tl.constexpr = keys.primitive_bitwidth
    INFINITY: tl.constexpr = 0x7FF0000000000000 if real == tl.float64 else 0x7F800000
    elements, slot_stride = units * UNIT, slot_units.to(tl.int64) * UNIT
    b = tl.program_id(0)
    words = samples + b.to(tl.int64) * WORDS
    row = tl.load(words + ROW)
    if (row < 0) | (row >= tl.load(words + END)):
        return
    if row == 0:
        tl.store(bound + b, 0.0)
        return
    M = tl.load(words + SLOTS)
    head = tables + long_at(words + TABLE) + row.to(tl.int64) * (M * M + 4 * M + HEAD)
    w = weights + long_at(words + WEIGHTS)
    if tl.load(words + METHOD) == 0:
        w += row.to(tl.int64) * (2 * K + S + S * K + SG)
    reads, needs, _terms = decode(words, row, head, w, K, S, SG, DENOISED, True, MASK)
    reads &= (given.to(MASK) << S) | ((1 << S) - 1)
    route = source + (row.to(tl.int64) * route_stride + b.to(tl.int64) * K)
    if bit(needs, NEED_D) == 0:
        tl.store(bound + b, 0.0)
        return

    i = rank.to(elements.dtype)
    line = tl.arange(0, BLOCK)
    found = tl.full((), 0, keys)
    not_above, top = elements * 0, tl.full((), 0, keys)  # top: of all |D|, NaN if one is
    nearest = tl.full((BLOCK,), (1 << (WIDTH - 1)) - 1, keys)
    if PARTS > 0:
        parts = ()
        for part in tl.static_range(PARTS):
            element = part * BLOCK + line.to(elements.dtype)
            more = _sizes(
                state, outputs, route, head, w, needs, reads, b, element, elements, slot_stride, inner, K, S, keys
            )
            parts = parts + (more,)
            # joined part by part, so that the operands of one at a time take registers
            top = tl.maximum(top, tl.max(tl.where(element < elements, more, 0), 0))
            tl.debug_barrier()
        # the bits of `found`; then how many keys are not above it
        shift = WIDTH - 2
        while shift >= -1:
            digit = tl.full((), 1, keys) << tl.maximum(shift, 0).to(keys)
            trial = tl.where(shift >= 0, found | digit, found + 1)
            count = tl.zeros((BLOCK,), tl.int32)
            for part in tl.static_range(PARTS):
                count += (parts[part] < trial).to(tl.int32)
            total = tl.sum(count, 0).to(elements.dtype)
            found = tl.where((shift >= 0) & (total <= i), trial, found)
            not_above = total
            shift -= 1
        for part in tl.static_range(PARTS):
            nearest = tl.minimum(nearest, _above(parts[part], found))
    else:
        shift = WIDTH - BITS
        while shift >= 0:
            counts = ()
            for _digit in tl.static_range(TRIALS):
                counts = counts + (tl.zeros((BLOCK,), elements.dtype),)
            start = elements * 0
            while start < elements:
                element = start + line
                more = _sizes(
                    state, outputs, route, head, w, needs, reads, b, element, elements, slot_stride, inner, K, S, keys
                )
                below = _below(more, found, shift.to(keys))
                sums = ()
                for digit in tl.static_range(TRIALS):
                    sums = sums + (counts[digit] + below[digit],)
                counts = sums
                start += BLOCK
            prefix = found
            for digit in tl.static_range(TRIALS):
                trial = prefix | (tl.full((), digit + 1, keys) << shift.to(keys))
                found = tl.where(tl.sum(counts[digit], 0) <= i, trial, found)
            shift -= BITS
        start = elements * 0
        while start < elements:
            element = start + line
            more = _sizes(
                state, outputs, route, head, w, needs, reads, b, element, elements, slot_stride, inner, K, S, keys
            )
            nearest = tl.minimum(nearest, _above(more, found))
            not_above += tl.sum((more <= found).to(elements.dtype), 0)
            top = tl.maximum(top, tl.max(tl.where(element < elements, more, 0), 0))
            start += BLOCK
    higher = tl.where(not_above > i + 1, found, tl.min(nearest, 0))
    low = found.to(real, bitcast=True).to(tl.float64)
    high = higher.to(real, bitcast=True).to(tl.float64)
    fraction, least, limit = (
        _number(fraction_low, fraction_high),
        _number(least_low, least_high),
        _number(limit_low, limit_high),
    )
    value = tl.where((fraction != 0) & (low != high), low + (high - low) * fraction, low)
    value = tl.where(value < least, least, value)
    value = tl.where(value > limit, limit, value)
    tl.store(bound + b, tl.where(top > INFINITY, float("nan"), value).to(real))


def quantile(
    state: Tensor,  # [S, B, C, *] float32 or float64, contiguous
    outputs: Sequence[Tensor | None],  # 1 for all branches or K: [n, C, *], None: absent
    samples: Tensor,  # int32 [B, 12]: layout.SAMPLE; not advanced
    tables: Tensor,
    weights: Tensor,
    source: Tensor,  # int32 [rows, B, K], rows route_stride apart
    *,
    branches: int,  # K
    route_stride: int,
    guidance_slots: int,
    quantile: float,  # q in [0, 1]
    least: float,
    limit: float,
    bound: Tensor,  # [B] in the dtype of the state; written
    denoised: bool = False,  # the step writes D whatever the row
) -> None:
    """bound = min(max(quantile of |D|, least), limit) of every sample that is not at its end (csrc/quantile.h), 0 in a
    prologue and where a row needs no D. One launch; nothing is read back and nothing checked."""
    slots, batch, channels = state.shape[:3]
    elements = math.prod(state.shape[2:])
    if batch == 0 or elements == 0:
        return
    read, given = branches_of(outputs, branches, state[0])
    unit = unit_of(elements)
    halved = 2 if state.dtype == torch.float64 else 1
    most = BLOCK // halved
    whole = elements <= PARTS * most
    block = min(triton.next_power_of_2(elements), most) if whole else most // 2
    position = quantile * float(elements - 1)
    rank = int(position)
    with on_device(state.device):
        quantile_kernel[(batch,)](
            *(state, read, samples, tables, weights, source, bound),
            *(elements // unit, batch * elements // unit, elements // channels, given, route_stride, rank),
            *(
                word
                for number in (position - rank, least, limit)
                for word in struct.unpack("<2i", struct.pack("<d", number))
            ),
            K=branches,
            S=slots,
            SG=guidance_slots,
            DENOISED=denoised,
            MASK=tl.int32 if 2 * branches + slots <= 24 else tl.int64,
            UNIT=unit,
            BLOCK=block,
            PARTS=-(-elements // block) if whole else 0,
            num_warps=max(1, WARPS * block // most) if whole else WARPS,
            **OPTIONS,
        )
