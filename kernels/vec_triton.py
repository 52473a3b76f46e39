"""Arithmetic that Triton lacks or rounds loosely, in float32 and float64: the twin of csrc/vec.h."""

from __future__ import annotations

from typing import Any

from pyguide.extras import require

triton: Any = require("triton")
tl: Any = require("triton.language")


@triton.jit
def divide(x, y):
    """x / y, correctly rounded (Triton's own division of float32 is not)."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def square_root(x):
    """sqrt(x), correctly rounded (Triton's own square root of float32 is not)."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x in another floating type, rounded once to nearest even.

    A compiler goes from float64 to 16 bits by way of float32, which would round twice: rounding to odd there, as
    csrc/vec.h does, makes the second rounding what one alone would have been.
    """
    if x.dtype == tl.float64 and dtype.primitive_bitwidth == 16:
        near = x.to(tl.float32)
        back = near.to(tl.float64)
        bits = near.to(tl.int32, bitcast=True)
        odd = (bits - (tl.abs(back) > tl.abs(x)).to(tl.int32)) | 1
        exact = (back == x) | (x != x)
        return tl.where(exact, bits, odd).to(tl.float32, bitcast=True).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def round_away(t):
    """The nearest integer as int64, halves away from zero, as llround: |t| - floor(|t|) is exact, |t| + 1/2 is not."""
    size = tl.abs(t)
    whole = tl.floor(size)
    nearest = whole.to(tl.int64) + (size - whole >= 0.5).to(tl.int64)
    return tl.where(t < 0, -nearest, nearest)


@triton.jit
def two_sum(a, b):
    """s = a + b as rounded, and what the rounding left."""
    s = a + b
    back = s - a
    return s, (a - (s - back)) + (b - back)


@triton.jit
def product_error(a, b, product):
    """a b - product, exactly. fma would give it in one instruction, but not in interpreters that round it twice, and
    this is off the common path: Dekker's splitting into halves whose products are exact."""
    factor: tl.constexpr = 4097.0 if a.dtype == tl.float32 else 134217729.0
    ta, tb = a * factor, b * factor
    a_high, b_high = ta - (ta - a), tb - (tb - b)
    a_low, b_low = a - a_high, b - b_high
    return ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


@triton.jit
def exp_sum(high, low):
    """exp(high + low) for a small low, within 2 * 2^-24 relative in float32: Cephes' expf, whose reduced argument takes
    the low part. tl.exp of float32 would lose |high| ulps."""
    if high.dtype == tl.float64:
        scale = tl.exp(high)
        return tl.where(scale < float("inf"), scale + scale * low, scale)
    else:
        x = tl.where(high < -150.0, -150.0, high)
        x = tl.where(x > 130.0, 130.0, x)
        shifted = tl.fma(x, 1.44269504, tl.full(x.shape, 12582912.0, tl.float32))
        n = shifted - 12582912.0
        r = tl.fma(-n, 0.693359375, x)
        r = tl.fma(n, 2.12194440e-4, r) + low
        p = tl.fma(r, 1.9875691500e-4, 1.3981999507e-3)
        p = tl.fma(p, r, 8.3334519073e-3)
        p = tl.fma(p, r, 4.1665795894e-2)
        p = tl.fma(p, r, 1.6666665459e-1)
        p = tl.fma(p, r, 5.0000001201e-1)
        p = tl.fma(p, r * r, r) + 1.0
        # 2^n in two factors, so that neither leaves the exponent range
        k = shifted.to(tl.int32, bitcast=True) - (0x4B400000 - 512)
        first = k >> 1
        second = k - first
        return (
            p * ((first - 129) << 23).to(tl.float32, bitcast=True) * ((second - 129) << 23).to(tl.float32, bitcast=True)
        )


@triton.jit
def row_variance(v, var_lo, var_hi):
    """Sig = exp(var_lo + (var_hi - var_lo) (v + 1) / 2) for scalar bounds, as in csrc/step.h: log Sig is carried as a
    pair, so that |log Sig| does not cost accuracy."""
    width, width_low = two_sum(var_hi, -var_lo)
    zero = v * 0.0
    half, half_low = zero + width * 0.5, width_low * 0.5
    mid, error = two_sum(var_lo, width * 0.5)
    product = half * v
    total, rest = two_sum(zero + mid, product)
    rest = rest + product_error(half, v, product)
    return exp_sum(total, rest + tl.fma(zero + half_low, v, zero + (error + half_low)))
