"""What a row reads and writes, decoded on the device: the Triton twin of `Program` and `build` in csrc/step.h."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any

from pyguide.extras import require
from pyguide.layout import HEAD as _HEAD
from pyguide.layout import NONFINITE as _NONFINITE
from pyguide.layout import SAMPLE
from pyguide.layout import SEPARATE as _SEPARATE

triton: Any = require("triton")
tl: Any = require("triton.language")

# int32 words of a sample
TABLE, WEIGHTS, SEED, ROW, END, SLOTS, METHOD, FLAGS, TICKET = (
    tl.constexpr(offset // 4) for _, offset in (SAMPLE.fields[name] for name in SAMPLE.names)
)
WORDS = tl.constexpr(SAMPLE.itemsize // 4)
# columns of a row
A_X, A_G, CLIP_LO, CLIP_HI, C_IN, TIMESTEP, VAR_LO, VAR_HI = (tl.constexpr(i) for i in range(8))
HEAD = tl.constexpr(_HEAD)
SEPARATE, NONFINITE = tl.constexpr(_SEPARATE), tl.constexpr(_NONFINITE)

# `terms` of a slot: bits c: T_rc (a guidance slot: h at bit r), then S + these, then b_rk, then WRITTEN.
TERM_D, TERM_E, TERM_N, TERM_Q, TERM_B = (tl.constexpr(i) for i in range(5))
# `needs` of a sample; from NEED_W on: w_k, v_k, o_c
NEED_D, NEED_V, NEED_INPUT, NEED_NOISE, NEED_GRADIENT, NEED_VARIANCE, NEED_W = (tl.constexpr(i) for i in range(7))


@triton.jit
def long_at(words):
    """The int64 whose two words lie at `words`."""
    return (tl.load(words + 1).to(tl.int64) << 32) | tl.load(words).to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def bit(mask, i):
    return ((mask >> i) & 1) != 0


@triton.jit
def _bits(chosen, lane):
    """Bit i: lane i is chosen. One reduction decodes up to 32 coefficients, instead of as many loads and compares."""
    return tl.sum(tl.where(chosen, tl.full((), 1, lane.dtype) << lane, 0), 0)


@triton.jit
def decode(
    words,  # of the sample
    row,
    head,  # its table row
    w,  # its guidance block
    K: tl.constexpr,
    S: tl.constexpr,
    SG: tl.constexpr,
    DENOISED: tl.constexpr,  # D is wanted whatever the row
    VARIANCE: tl.constexpr,  # there is such an operand
    MASK: tl.constexpr,  # int32, or int64 where its bits would not do
):
    """-> reads (bits: S slots, K branches), needs, terms[S] (see above): a coefficient that is 0 sets no bit."""
    SOLVER: tl.constexpr = S - SG
    B: tl.constexpr = S + TERM_B
    WRITTEN: tl.constexpr = B + K
    lane = tl.arange(0, 64 if tl.int64 == MASK else 32).to(MASK)
    M = tl.load(words + SLOTS)
    guidance = row > 0  # the prologue reads no weights
    b, h = w + (2 * K + S), w + (2 * K + S + S * K)
    every = tl.full((), 0, MASK)
    terms = ()
    for r in tl.static_range(S):
        if r < SOLVER:
            here = r < M
            inside = here & ((lane < M) | ((lane >= S) & (lane < B)))
            at = tl.where(lane < S, lane + r * M, (lane - S + M) * M + r)  # T_r0 .. T_r(M-1) or d e n q
            own = tl.load(head + (at + HEAD), mask=inside, other=0.0)
            diagonal = tl.load(head + (M * r + (HEAD + r)), mask=here, other=0.0)
        else:
            here = guidance
            own = tl.load(h + (lane * 0 + (r - SOLVER)), mask=guidance & (lane == r), other=0.0)
            diagonal = tl.load(h + (r - SOLVER), mask=guidance, other=0.0)
        inside = here & guidance & (lane >= B) & (lane < WRITTEN)
        raw = tl.load(b + (lane + (r * K - B)), mask=inside, other=0.0)
        mask = _bits((own != 0) | (raw != 0), lane)
        kept = (mask == tl.full((), 1, MASK) << r) & (diagonal == 1)
        if r > 0:  # slot 0 is written with zeros
            kept = kept | (mask == 0)
        mask = tl.where(kept, 0, mask | (tl.full((), 1, MASK) << WRITTEN))
        every |= mask
        terms = terms + (mask,)

    any_e, any_n, any_q = bit(every, S + TERM_E), bit(every, S + TERM_N), bit(every, S + TERM_Q)
    wants_d = bit(every, S + TERM_D) | DENOISED
    second = guidance & any_e & ((tl.load(words + FLAGS) & SEPARATE) != 0)
    first = guidance & ((any_e & (second == 0)) | (wants_d & (tl.load(head + A_G) != 0)))
    due = row + 1 < tl.load(words + END)
    learned = (any_n | any_q) & ((tl.load(head + VAR_LO) != 0) | (tl.load(head + VAR_HI) != 0))
    if not VARIANCE:  # absent, though this row reads it: as if a gradient that is NaN were added, see step_kernel
        poisoned = ()
        for r in tl.static_range(S):
            spread = terms[r] | ((terms[r] >> (S + TERM_N)) & learned.to(MASK)) << (S + TERM_Q)
            poisoned = poisoned + (spread,)
        terms = poisoned

    of_first = first & ((lane < K) | ((lane >= 2 * K) & (lane < 2 * K + S)))
    of_second = second & (lane >= K) & (lane < 2 * K)
    weights = _bits(tl.load(w + lane, mask=of_first | of_second, other=0.0) != 0, lane)
    reads_s = (every | (weights >> (2 * K))) & ((1 << S) - 1)
    reads_m = ((every >> B) | weights | (weights >> K)) & ((1 << K) - 1)
    x_in = due & (tl.load(head + C_IN) != 0) & (bit(terms[0], WRITTEN) == 0)
    reads_s |= ((wants_d & (tl.load(head + A_X) != 0)) | x_in).to(MASK)
    needs = wants_d.to(MASK) | second.to(MASK) << NEED_V | due.to(MASK) << NEED_INPUT | any_n.to(MASK) << NEED_NOISE
    needs |= any_q.to(MASK) << NEED_GRADIENT | learned.to(MASK) << NEED_VARIANCE | weights << NEED_W
    return reads_s | (reads_m << S), needs, terms
