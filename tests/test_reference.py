"""reference.step, the definition of a row, against the extended-precision oracle: values, what is read, NaN, both array
kinds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import oracle
import pytest

from pyguide import reference
from pyguide.layout import (
    Row,
    Weights,
    join_row,
    row_width,
    split_row,
    split_weights,
    weights_width,
)

N = 13
NAN = np.full(N, np.nan)


class Case:
    """A random row, guidance block and operands; coefficients are 0 with probability 1 - density."""

    def __init__(
        self, seed: int, *, M: int = 2, extra: int = 0, K: int = 2, Sg: int = 0, density: float = 0.6, **options: Any
    ) -> None:
        rng = self.rng = np.random.default_rng(seed)
        S = M + extra + Sg

        def some(*shape: int) -> Any:
            return np.where(rng.random(shape) < density, rng.uniform(-2, 2, shape), 0.0)

        self.M, self.S, self.K, self.Sg = M, S, K, Sg
        clip = (-0.7, 1.1) if options.get("clip") else (-math.inf, math.inf)
        var = (-1.5, -0.5) if options.get("variance") else (0.0, 0.0)
        head = np.array([*some(2), *clip, 0.9, 17.0, *var])
        first = options.get("prologue", False)
        separate = options.get("separate", False)
        zero = np.zeros(M)
        self.wide = oracle.Row(
            head=head,
            T=some(M, M),
            d=zero if first else some(M),
            e=zero if first else some(M),
            n=some(M),
            q=some(M),
            separate=separate,
            bound=options.get("bound", 0.0),
        )
        if first:
            head[:2] = 0
        else:
            self.wide.w, self.wide.v, self.wide.o = some(K), some(K), some(S)
            self.wide.b, self.wide.h = some(S, K), some(Sg)
            self.wide.b[M : S - Sg] = 0  # slots of another plan are not this sample's
            self.wide.o[M : S - Sg] = 0
        self.row = Row(*head.tolist(), *(getattr(self.wide, name).tolist() for name in "Tdenq"))
        self.weights = None
        if not first:
            w = self.wide
            self.weights = Weights(
                w.w.tolist(), w.v.tolist() if separate else None, w.o.tolist(), w.b.tolist(), w.h.tolist()
            )
        self.slots = list(rng.standard_normal((S, N)))
        self.outputs = list(rng.standard_normal((K, N)))
        self.noise, self.gradient = rng.standard_normal((2, N))
        self.variance = rng.uniform(-1, 1, N) if options.get("variance") else None
        self.bound = options.get("bound", 0.0)

    def run(self, convert: Any = lambda array: array, **more: Any) -> Any:
        def each(arrays: Any) -> list[Any]:
            return [None if array is None else convert(array) for array in arrays]

        noise, gradient, variance = each([self.noise, self.gradient, self.variance])
        operands = {"noise": noise, "gradient": gradient, "variance": variance, "bound": self.bound} | more
        return reference.step(self.row, each(self.slots), each(self.outputs), self.weights, **operands)

    def expected(self, want_denoised: bool = False) -> oracle.Result:
        variance = np.zeros(N) if self.variance is None else self.variance
        return oracle.step(
            self.wide,
            np.array(self.slots),
            self.outputs,
            self.noise,
            np.abs(self.noise) * 0,
            self.gradient,
            variance,
            want_denoised,
        )

    def check(self, result: Any, want_denoised: bool = False, dtype: str = "float64") -> None:
        expected = self.expected(want_denoised)
        for r, slot in enumerate(result.slots):
            if r in expected.slots:
                close = oracle.close(
                    np.asarray(slot, oracle.Wide), expected.slots[r], expected.magnitude[r], dtype, dtype
                )
                assert close.all(), r
            else:
                np.testing.assert_array_equal(slot, self.slots[r])
        if want_denoised and self.weights is not None:
            close = oracle.close(
                np.asarray(result.denoised, oracle.Wide), expected.denoised, expected.denoised_magnitude, dtype, dtype
            )
            assert close.all()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"clip": True},
    {"clip": True, "separate": True},
    {"bound": 0.8},
    {"variance": True},
    {"variance": True, "clip": True, "separate": True, "Sg": 2},
    {"Sg": 1},
    {"extra": 2, "Sg": 1},
    {"M": 1, "K": 1},
    {"M": 4, "K": 3, "Sg": 2},
    {"prologue": True},
    {"prologue": True, "Sg": 1, "extra": 1},
]


@pytest.mark.parametrize("density", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_against_the_oracle(options: dict[str, Any], density: float) -> None:
    for seed in range(6):
        case = Case(seed, density=density, **options)
        case.check(case.run())
        case.check(case.run(want_denoised=True), want_denoised=True)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_zero_means_not_read(options: dict[str, Any]) -> None:
    """Operands whose coefficients are all exactly 0 may be NaN or absent: the result has the same bits, and no NaN."""
    absent = 0
    for seed in range(12):
        case = Case(seed, density=0.25, **options)
        before = case.run()
        wide, M = case.wide, case.M
        needs_D = wide.d.any()
        reads_G = case.weights is not None and ((needs_D and wide.head[1] != 0) or (wide.e.any() and not wide.separate))
        for c in range(case.S):
            own = c >= case.S - case.Sg
            read = (
                (c < M and wide.T[:, c].any())
                or (reads_G and wide.o[c] != 0)
                or (own and case.weights and wide.h[c - case.S] != 0)
            )
            read = read or (c == 0 and needs_D and wide.head[0] != 0 and case.weights is not None)
            written = c in case.expected().slots
            if not read and written:
                case.slots[c] = NAN
                absent += 1
        for k in range(case.K):
            read = case.weights is not None and (
                (reads_G and wide.w[k] != 0)
                or wide.b[:, k].any()
                or (wide.separate and wide.e.any() and wide.v[k] != 0)
            )
            if not read:
                case.outputs[k] = [NAN, None][seed % 2]
                absent += 1
        if not wide.n.any():
            case.noise = [NAN, None][seed % 2]
        if not wide.q.any():
            case.gradient = [NAN, None][seed % 2]
        for got, expected in zip(case.run().slots, before.slots, strict=True):
            np.testing.assert_array_equal(got, expected)
            assert np.isfinite(got).all()
    assert absent > 5  # the test did poison something


def test_nan_is_never_masked() -> None:
    """NaN in a network's output passes through the clip, the bound and the variance, and reaches every slot that reads
    it."""
    for options in ({"clip": True}, {"bound": 0.5}, {}):
        case = Case(0, density=1.0, **options)
        case.outputs[0] = case.outputs[0].copy()
        case.outputs[0][3] = np.nan
        result = case.run(want_denoised=True)
        for array in (result.denoised, *result.slots):
            assert np.isnan(array[3])
            assert np.isfinite(np.delete(array, 3)).all()
    case = Case(0, density=1.0, variance=True)
    case.variance[5] = np.nan
    assert all(np.isnan(array[5]) and np.isfinite(np.delete(array, 5)).all() for array in case.run().slots)


def test_clip_and_bound_by_hand() -> None:
    row = Row(0.0, 1.0, -0.5, 2.0, 1.0, 0.0, 0.0, 0.0, [[0.0]], [1.0], [0.0], [0.0], [0.0])
    weights = Weights([1.0], None, [0.0], [[0.0]], [])
    m = np.array([-3.0, -0.5, 0.1, 2.0, 9.0, np.inf, -np.inf, np.nan])
    out = reference.step(row, [NAN[:8]], [m], weights).slots[0]
    np.testing.assert_array_equal(out, [-0.5, -0.5, 0.1, 2, 2, 2, -0.5, np.nan])
    # dynamic thresholding (Saharia et al. 2022): clamp to +-b, then over b; it replaces the row's clip
    out = reference.step(row, [NAN[:8]], [m], weights, bound=4.0).slots[0]
    np.testing.assert_array_equal(out, [-0.75, -0.125, 0.025, 0.5, 1, 1, -1, np.nan])


def test_learned_variance_by_hand() -> None:
    """Nichol, Dhariwal 2021, eq. 15: v = 1 is beta, v = -1 is beta~, halfway their geometric mean; noise by its root, g
    by it."""
    low, high = math.log(0.04), math.log(0.25)
    row = Row(0.0, 0.0, -math.inf, math.inf, 1.0, 0.0, low, high, [[0.0]], [0.0], [0.0], [2.0], [3.0])
    weights = Weights([1.0], None, [0.0], [[0.0]], [])
    v, z, g = np.array([-1.0, 0.0, 1.0]), np.ones(3), np.ones(3)
    out = reference.step(row, [NAN[:3]], [None], weights, noise=z, gradient=g, variance=v).slots[0]
    np.testing.assert_allclose(out, [2 * 0.2 + 3 * 0.04, 2 * 0.1**0.5 + 3 * 0.1, 2 * 0.5 + 3 * 0.25], rtol=1e-14)
    without = reference.step(row, [NAN[:3]], [None], weights, noise=z, gradient=g).slots[0]
    np.testing.assert_allclose(without, 5.0)  # no variance operand: it is 1


def test_guidance_by_hand() -> None:
    """G = u + 2 (c - u) feeds D, U = u feeds e: CFG++ in one row; momentum s1' = c - u + 0.5 s1, read through o."""
    u, c, x, old = np.array([1.0, 2.0]), np.array([3.0, 7.0]), np.array([10.0, 20.0]), np.array([4.0, 8.0])
    row = Row(0.5, 1.0, -math.inf, math.inf, 1.0, 0.0, 0.0, 0.0, [[0.0]], [1.0], [100.0], [0.0], [0.0])
    weights = Weights([-1.0, 2.0], [1.0, 0.0], [0.0, 10.0], [[0.0, 0.0], [-1.0, 1.0]], [0.5])
    result = reference.step(row, [x, old], [u, c], weights, want_denoised=True)
    G = u + 2 * (c - u) + 10 * old
    np.testing.assert_allclose(result.denoised, 0.5 * x + G)
    np.testing.assert_allclose(result.slots[0], 0.5 * x + G + 100 * u)
    np.testing.assert_allclose(result.slots[1], c - u + 0.5 * old)


def test_guidance_slots_that_nothing_writes_are_kept() -> None:
    """All coefficients 0 means not written, of a guidance slot too; only slot 0 becomes 0 then. The prologue keeps
    them."""
    row = Row(0.0, 0.0, -math.inf, math.inf, 1.0, 0.0, 0.0, 0.0, [[0.0]], [0.0], [0.0], [0.0], [0.0])
    kept = np.array([4.0, 8.0])
    idle = Weights([1.0], None, [0.0, 0.0], [[0.0], [0.0]], [0.0])
    for weights in (idle, None):
        result = reference.step(row, [NAN[:2], kept], [None], weights)
        np.testing.assert_array_equal(result.slots[0], [0, 0])
        np.testing.assert_array_equal(result.slots[1], kept)
        assert result.denoised is None


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_numpy_and_torch_agree_bit_for_bit(options: dict[str, Any], dtype: str) -> None:
    """The same operations in the same order; only exp, of the learned variance, is each library's own."""
    torch = pytest.importorskip("torch")
    for seed in range(4):
        case = Case(seed, **options)
        ours = case.run(lambda a: a.astype(dtype), want_denoised=True)
        theirs = case.run(lambda a: torch.from_numpy(a.astype(dtype)), want_denoised=True)
        pairs = [*zip(ours.slots, theirs.slots, strict=True)]
        if ours.denoised is not None:
            pairs.append((ours.denoised, theirs.denoised))
        for a, b in pairs:
            assert a.dtype == np.dtype(dtype)
            assert b.dtype == getattr(torch, dtype)
            if options.get("variance"):
                np.testing.assert_allclose(a, b.numpy(), rtol=20 * np.finfo(dtype).eps, atol=20 * np.finfo(dtype).eps)
            else:
                np.testing.assert_array_equal(a, b.numpy())


def test_nothing_is_written_in_place() -> None:
    case = Case(1, density=1.0, Sg=1, variance=True)
    arrays = [*case.slots, *case.outputs, case.noise, case.gradient, case.variance]
    copies = [array.copy() for array in arrays]
    for array in arrays:
        array.setflags(write=False)
    case.run()
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_wrong_numbers_of_operands_are_refused() -> None:
    case = Case(1, density=1.0)
    with pytest.raises(ValueError, match=r"zip"):
        reference.step(case.row, case.slots, case.outputs[:1], case.weights)


# ---- layout ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("slots", [1, 2, 5, 8])
def test_a_row_is_what_the_layout_says(slots: int) -> None:
    """a_x a_g clip_lo clip_hi c_in timestep var_lo var_hi, T[M][M], d, e, n, q: numbered in that order."""
    width = 8 + slots * slots + 4 * slots
    assert row_width(slots) == width
    values = np.arange(width, dtype=np.float64)
    row = split_row(values, slots)
    assert (row.a_x, row.a_g, row.clip_lo, row.clip_hi) == (0, 1, 2, 3)
    assert (row.c_in, row.timestep, row.var_lo, row.var_hi) == (4, 5, 6, 7)
    assert [[8 + r * slots + c for c in range(slots)] for r in range(slots)] == row.T
    start = 8 + slots * slots
    assert [row.d, row.e, row.n, row.q] == [[*range(start + k * slots, start + (k + 1) * slots)] for k in range(4)]
    np.testing.assert_array_equal(join_row(row), values)


@pytest.mark.parametrize(("K", "S", "Sg"), [(1, 1, 0), (2, 3, 1), (3, 4, 2)])
def test_weights_are_what_the_layout_says(K: int, S: int, Sg: int) -> None:
    """w[K] v[K] o[S] b[S][K] h[Sg]; v only where the second combination is its own."""
    width = 2 * K + S + S * K + Sg
    assert weights_width(K, S, Sg) == width
    values = np.arange(width, dtype=np.float64)
    for separate in (False, True):
        weights = split_weights(values, K, S, Sg, separate)
        assert weights.w == [*range(K)]
        assert weights.v == ([*range(K, 2 * K)] if separate else None)
        assert weights.o == [*range(2 * K, 2 * K + S)]
        assert weights.b == [[2 * K + S + r * K + k for k in range(K)] for r in range(S)]
        assert weights.h == [*range(width - Sg, width)]
