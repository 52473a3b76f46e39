"""Counter-based normal noise: the Triton twin of csrc/philox.h, which has the formula and the polynomials' origin.

The integers are exact and every operation rounds once: the float32 normals are the CPU kernel's bit for bit, where a
fused multiply-add is one (the interpreter's is not).
"""

from __future__ import annotations

from typing import Any

from pyguide.extras import require

from .vec_triton import square_root

triton: Any = require("triton")
tl: Any = require("triton.language")


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds on uint32 blocks under a scalar uint32 key. Salmon et al., SC 2011."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), tl.mul(c0, 0xD2511F53, sanitize_overflow=False)
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        c0, c1 = high1 ^ c1 ^ k0, low1
        c2, c3 = high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _log_uniform(x):
    """log u, u = (x + 1/2) 2^-32, in float32: u keeps all its 33 bits as an unevaluated pair."""
    top = (x & 0xFFFFFF00).to(tl.float32)
    low = (x & 0xFF).to(tl.float32) + 0.5
    total = top + low
    error = low - (total - top)
    # total = 2^e (1 + t), sqrt(1/2) <= 1 + t < sqrt(2). Where u is near 1, t is all of log u and keeps its accuracy
    bits = total.to(tl.uint32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    exponent = bits >> 23
    e = exponent.to(tl.float32) - 159.0
    scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    t = tl.fma(error, scale, ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0)
    t2 = t * t
    p = tl.fma(t, 7.0376836292e-2, -1.1514610310e-1)
    p = tl.fma(p, t, 1.1676998740e-1)
    p = tl.fma(p, t, -1.2420140846e-1)
    p = tl.fma(p, t, 1.4249322787e-1)
    p = tl.fma(p, t, -1.6668057665e-1)
    p = tl.fma(p, t, 2.0000714765e-1)
    p = tl.fma(p, t, -2.4999993993e-1)
    p = tl.fma(p, t, 3.3333331174e-1) * t * t2
    p = tl.fma(e, -2.12194440e-4, p)
    p = tl.fma(t2, -0.5, p)
    return tl.fma(e, 0.693359375, t + p)


@triton.jit
def _double(x: tl.constexpr):
    """A constant of tl.fma in float64: as a bare number it would be rounded to float32 first (Triton 3.6)."""
    return tl.full((), x, tl.float64)


@triton.jit
def box_muller(x, y, real: tl.constexpr):
    """r cos(2 pi v), r sin(2 pi v) with r = sqrt(-2 log u), u = (x + 1/2) 2^-32, v = (y + 1/2) 2^-32.

    2 pi v = (pi / 2) quadrant + a remainder that is exact in integers. float32: |z - z*| <= 4 * 2^-24 r. float64: u has
    33 bits, so its logarithm is the library's to an ulp; sine and cosine are those of fdlibm on [-pi/4, pi/4].
    """
    quadrant = tl.add(y, 0x20000000, sanitize_overflow=False) >> 30
    remainder = tl.sub(y, quadrant << 30, sanitize_overflow=False).to(tl.int32, bitcast=True).to(real) + 0.5
    if real == tl.float32:
        log_u = _log_uniform(x)
        a = remainder * 1.862645149230957e-09  # 2^-29: the angle in units of pi / 4
        a2 = a * a
        s = tl.fma(a2, -3.5935103e-5, 2.4899836e-3)
        s = tl.fma(s, a2, -8.0745430e-2)
        s = tl.fma(s, a2, -2.1855694e-8)
        s = tl.fma(a, 0.78539819, s * a)
        c = tl.fma(a2, 3.531154e-6, -3.2594163e-4)
        c = tl.fma(c, a2, 1.5854327e-2)
        c = tl.fma(c, a2, -3.0842513e-1)
        c = tl.fma(c, a2, 1.0)
    else:
        log_u = tl.log((x.to(tl.float64) + 0.5) * 2.3283064365386963e-10)
        a = remainder * 1.4629180792671596e-09  # 2 pi 2^-32
        a2 = a * a
        s = tl.fma(a2, _double(1.58969099521155010221e-10), _double(-2.50507602534068634195e-08))
        s = tl.fma(s, a2, _double(2.75573137070700676789e-06))
        s = tl.fma(s, a2, _double(-1.98412698298579493134e-04))
        s = tl.fma(s, a2, _double(8.33333333332248946124e-03))
        s = tl.fma(s, a2, _double(-1.66666666666666324348e-01))
        s = tl.fma(s * a2, a, a)
        c = tl.fma(a2, _double(-1.13596475577881948265e-11), _double(2.08757232129817482790e-09))
        c = tl.fma(c, a2, _double(-2.75573143513906633035e-07))
        c = tl.fma(c, a2, _double(2.48015872894767294178e-05))
        c = tl.fma(c, a2, _double(-1.38888888888741095749e-03))
        c = tl.fma(c, a2, _double(4.16666666666666019037e-02))
        half = a2 * 0.5
        one = 1.0 - half
        c = one + tl.fma(a2 * a2, c, (1.0 - one) - half)
    r = square_root(log_u * -2.0)
    turned = (quadrant & 1) != 0
    cosine, sine = r * tl.where(turned, s, c), r * tl.where(turned, c, s)
    cosine = tl.where((tl.add(quadrant, 1) & 2) != 0, -cosine, cosine)
    sine = tl.where((quadrant & 2) != 0, -sine, sine)
    return cosine, sine


@triton.jit
def normals_of(quad, seed_low, seed_high, ordinal, tag, real: tl.constexpr):
    """Normals of the elements 4 quad .. 4 quad + 3 in two new last axes of 2: one Philox call gives four.

    quad: a block of int64. Where a thread holds those axes, as in the step, no value changes its thread.
    """
    zero = (quad * 0).to(tl.uint32)
    key0, key1 = seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
    x0, x1, x2, x3 = philox4x32(
        quad.to(tl.uint32),
        (quad >> 32).to(tl.uint32),
        zero + ordinal.to(tl.uint32, bitcast=True),
        zero + tag.to(tl.uint32, bitcast=True),
        key0,
        key1,
    )
    z0, z1 = box_muller(x0, x1, real)
    z2, z3 = box_muller(x2, x3, real)
    return tl.join(tl.join(z0, z2), tl.join(z1, z3))


@triton.jit(do_not_specialize=["seed_low", "seed_high", "ordinal", "tag"])
def normals_kernel(out, count, seed_low, seed_high, ordinal, tag, QUADS: tl.constexpr):
    """Elements [0, count): grid over blocks of 4 QUADS elements."""
    quad = tl.program_id(0).to(tl.int64) * QUADS + tl.arange(0, QUADS)
    element = quad[:, None] * 4 + tl.arange(0, 4)[None, :]
    z = normals_of(quad, seed_low, seed_high, ordinal, tag, out.dtype.element_ty)
    tl.store(out + element, tl.reshape(z, (QUADS, 4)), mask=element < count)
