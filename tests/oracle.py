"""An independent evaluation of the step in extended precision, term by term as csrc/step.h and the design state it.

Nothing here is shared with the package: layouts, formula and noise are written out again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Wide = np.longdouble
Array = NDArray[Any]

# significand bits, smallest normal exponent
PRECISION = {"float16": (11, -14), "bfloat16": (8, -126), "float32": (24, -126), "float64": (53, -1022)}
STORAGE = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32, "float64": np.float64}


def encode(x: Array, dtype: str) -> Array:
    """Values to storage, round to nearest even."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return np.asarray(x).astype(STORAGE[dtype])
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(np.asarray(x, np.float32)), np.uint16(0x7FC0), rounded)


def decode(x: Array, dtype: str) -> Array:
    with np.errstate(invalid="ignore"):  # signalling NaNs
        if dtype != "bfloat16":
            return np.asarray(x, Wide)
        return (x.astype(np.uint32) << 16).view(np.float32).astype(Wide)


def half_ulp(y: Array, dtype: str) -> Array:
    bits, low = PRECISION[dtype]
    magnitude = np.abs(np.asarray(y, np.float64))
    _, exponent = np.frexp(np.where(np.isfinite(magnitude) & (magnitude > 0), magnitude, 2.0**low))
    return np.ldexp(Wide(0.5), np.maximum(exponent - 1, low) - bits + 1)


def philox(counter: tuple[int, int, int, int], key: tuple[int, int], rounds: int = 10) -> tuple[int, int, int, int]:
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(rounds):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32) ^ b ^ k0, q & 0xFFFFFFFF, (p >> 32) ^ d ^ k1, p & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return a, b, c, d


def normals(first: int, count: int, seed: int, ordinal: int, tag: int) -> tuple[Array, Array]:
    """Normals of elements first .. first + count, and their radius r."""
    z, r = [], []
    for q in range(first // 4, (first + count + 3) // 4):
        x = philox((q & 0xFFFFFFFF, q >> 32, ordinal, tag), (seed & 0xFFFFFFFF, seed >> 32))
        for even, odd in ((x[0], x[1]), (x[2], x[3])):
            u, v = (Wide(even) + 0.5) / 2**32, (Wide(odd) + 0.5) / 2**32
            # near 1 the subtraction from 2^32 is exact, log(u) would not be
            log_u = np.log1p(-(Wide(2**32 - 1 - even) + 0.5) / 2**32) if even >= 2**31 else np.log(u)
            radius = np.sqrt(-2 * log_u)
            angle = 2 * Wide("3.14159265358979323846264338327950288") * v
            z += [radius * np.cos(angle), radius * np.sin(angle)]
            r += [radius, radius]
    skip = first % 4
    return np.array(z[skip : skip + count], Wide), np.array(r[skip : skip + count], Wide)


@dataclass
class Row:
    """A table row and the guidance block of its evaluation (absent in the prologue)."""

    head: Array  # a_x, a_g, clip_lo, clip_hi, c_in, timestep, var_lo, var_hi
    T: Array  # [M, M]
    d: Array
    e: Array
    n: Array
    q: Array
    w: Array | None = None
    v: Array | None = None
    o: Array | None = None
    b: Array | None = None  # [S, K]
    h: Array | None = None  # [Sg]
    separate: bool = False
    bound: float = 0.0


@dataclass
class Result:
    """Values and the magnitude sum |terms| behind each; `slots` holds only what is written."""

    slots: dict[int, Array] = field(default_factory=dict)
    magnitude: dict[int, Array] = field(default_factory=dict)
    x: Array | None = None  # s_0 after the row, written or not
    x_magnitude: Array | None = None
    denoised: Array | None = None
    denoised_magnitude: Array | None = None


def step(row: Row, s: Array, m: Any, z: Any, radius: Any, g: Any, var: Any, want_denoised: bool) -> Result:
    """s [S, N]; m[k] [N] or anything where unread; z, g, var [N] or None."""
    S, N = s.shape
    M, Sg = len(row.d), 0 if row.h is None else len(row.h)
    a_x, a_g, lo, hi, _, _, var_lo, var_hi = (Wide(c) for c in row.head)

    class Sum:
        def __init__(self) -> None:
            self.value, self.size = np.zeros(N, Wide), np.zeros(N, Wide)

        def add(self, c: Any, x: Any, size: Any = None) -> None:
            if c != 0:
                self.value = self.value + Wide(c) * x
                self.size = self.size + abs(Wide(c)) * (np.abs(x) if size is None else size)

    G, U, D = Sum(), Sum(), Sum()
    K = 0 if row.w is None else len(row.w)
    if row.w is not None and row.o is not None and row.v is not None:
        wants_d = want_denoised or np.any(row.d != 0)
        wants_u = bool(np.any(row.e != 0))
        if (wants_d and a_g != 0) or (wants_u and not row.separate):
            for k in range(K):
                G.add(row.w[k], m[k])
            for c in range(S):
                G.add(row.o[c], s[c])
        U = G
        if row.separate and wants_u:
            U = Sum()
            for k in range(K):
                U.add(row.v[k], m[k])
    result = Result()
    if want_denoised or np.any(row.d != 0):
        D.add(a_x, s[0])
        D.add(a_g, G.value, G.size)
        with np.errstate(invalid="ignore"):
            if row.bound != 0:
                bound = Wide(row.bound)
                D.value = np.where(np.isnan(D.value), D.value, np.clip(D.value, -bound, bound)) / bound
                D.size = D.size / abs(bound)
            else:
                D.value = np.where(np.isnan(D.value), D.value, np.clip(D.value, lo, hi))
        result.denoised, result.denoised_magnitude = D.value, D.size
    sigma = Wide(1)
    if (var_lo != 0 or var_hi != 0) and (np.any(row.n != 0) or np.any(row.q != 0)):
        sigma = np.exp(var_lo + (var_hi - var_lo) * (var + 1) / 2)
    for r in list(range(M)) + list(range(S - Sg, S)):
        total = Sum()
        solver = r < M
        b = np.zeros(K) if row.b is None else row.b[r]
        if solver:
            others = [*row.T[r], row.d[r], row.e[r], row.n[r], row.q[r], *b]
            keep = row.T[r, r] == 1 and np.count_nonzero(others) == 1
            for c in range(M):
                total.add(row.T[r, c], s[c])
            total.add(row.d[r], D.value, D.size)
            total.add(row.e[r], U.value, U.size)
        else:
            h = row.h[r - (S - Sg)] if row.h is not None else 0
            others = [h, *b]
            keep = h == 1 and np.count_nonzero(others) == 1
            total.add(h, s[r])
        for k in range(K):
            total.add(b[k], m[k])
        if solver:
            if row.n[r] != 0:
                # a Philox normal is itself only within 4 * 2^-24 of its radius
                total.add(row.n[r], np.sqrt(sigma) * z, np.sqrt(sigma) * (np.abs(z) + radius))
            if row.q[r] != 0:
                total.add(row.q[r], sigma * g)
        if not keep and (np.count_nonzero(others) or r == 0):
            result.slots[r], result.magnitude[r] = total.value, total.size
    written = 0 in result.slots
    result.x = result.slots[0] if written else s[0]
    result.x_magnitude = result.magnitude[0] if written else np.zeros(N, Wide)
    return result


def close(actual: Array, expected: Array, magnitude: Array, dtype: str, state: str) -> Array:
    """0.5 ulp(out) + 4 eps sum |terms| (eps 2^-24, or 2^-53 for a float64 state); NaN and infinities must agree."""
    eps = Wide(2.0**-53 if state == "float64" else 2.0**-24)
    largest = {"float16": 65504.0, "bfloat16": 3.39e38, "float32": 3.4028235e38, "float64": 1e308}[dtype]
    with np.errstate(invalid="ignore", over="ignore"):
        rounding = half_ulp(np.maximum(np.abs(expected), np.abs(actual)), dtype)
        near = np.abs(actual - expected) <= rounding + 4 * eps * magnitude
        infinite = np.isinf(actual) & (np.abs(expected) >= largest) & (np.sign(actual) == np.sign(expected))
    return near | infinite | (np.isnan(actual) & np.isnan(expected))
