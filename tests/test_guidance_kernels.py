"""Every method on every back end against its equation in float64, over shapes, scales, spaces and dtypes.

One evaluation, whose result is D = a_x x + a_g G. The tolerance is derived from the equation, in float64:

    moments   each is within DELTA of its sum of |terms| (csrc/moments.h; float64: N 2^-53). What that makes of G is the
              sum over the moments of |the change of G| where one of them is off by that much (`spread`)
    weights   rounded once, then the products and their sum: each term within (K + 4) 2^-24 of itself (float32)
    result    rounded once in its dtype
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from test_guidance_identities import METHODS  # noqa: E402

import pyguide  # noqa: E402
from pyguide import native, schedules  # noqa: E402
from pyguide.guidance.program import branch_forms  # noqa: E402
from pyguide.guidance.vectors import Form  # noqa: E402

PLAN = pyguide.compile("ddim", schedules.scaled_linear().path(1, spacing="trailing"))
ALPHA, SIGMA = float(PLAN.alpha[0]), float(PLAN.sigma[0])
FACTORS = {"model": (0.0, 1.0), "denoised": (1 / ALPHA, -SIGMA / ALPHA), "v": (-SIGMA / ALPHA, 1 / ALPHA)}  # p_x, p_m
HALF_ULP = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DELTA = 1e-6  # of float32
BATCH = 2


class Known:
    """Moments [.., n (n + 3) / 2] in the order of csrc/moments.h, as the forms of an equation ask for them."""

    def __init__(self, values: Any, size: int, vectors: int) -> None:
        self.values, self.size, self.n = values, float(size), vectors

    def sum(self, i: int) -> Any:
        return self.values[..., i]

    def inner(self, i: int, j: int) -> Any:
        return self.values[..., self.n + i * self.n - i * (i - 1) // 2 + (j - i)]


def coefficients(method: Any, values: Any, size: int, p_m: float, scale: float) -> Any:
    """[K, ..] of the basis in the guided output of an equation, from moments [.., count]."""
    K = len(method.branches)
    known = Known(values, size, K + method.slots)
    slots = [Form({K + j: 1.0}, known) for j in range(method.slots)]
    extra = {"negative_scale": 1.5} if K == 3 else {}
    with np.errstate(all="ignore"):
        answer = method.equation(*branch_forms(K, known, p_m), *slots, scale=scale, **extra)
    guided = answer[0] if isinstance(answer, tuple) else answer
    return np.stack([np.broadcast_to(guided.parts.get(k, 0.0), values.shape[:-1]) for k in range(K)])


def terms(method: Any, y: list[Any]) -> Any:
    """[groups, count, N] of the moments of a basis and of slots that are 0."""
    every = [*y, *[np.zeros_like(y[0])] * method.slots]
    return np.stack([*every, *(a * b for i, a in enumerate(every) for b in every[i:])], axis=1)


def spread(method: Any, x: Any, branches: list[Any], space: str, scale: float, state: float) -> tuple[Any, Any]:
    """(G, by how much it may be off) [groups, N] in the model's space, in a state whose half ulp is `state`; x and
    branches [groups, N].

    In float64 both sides are rounded, and so are P_k = p_x x + p_m m_k, which the reference forms: terms are counted
    with the operands that they are made of.
    """
    p_x, p_m = FACTORS[space]
    (first, *others), N, wide = branches, x.shape[1], state < 2.0**-24
    y = [p_x * x + p_m * first, *(m - first for m in others)]
    shift = abs(p_x / p_m * x) * wide
    sizes = [abs(v) for v in y]
    if wide:
        sizes = [abs(p_m) * (shift + abs(first)), *(2 * shift + abs(m) + abs(first) for m in others)]
    exact, most = (terms(method, basis).sum(axis=-1) for basis in (y, sizes))  # [groups, count]
    off = np.eye(exact.shape[1])[:, None] * most * (2 * N * state if wide else DELTA)  # [count, groups, count]
    high, low = (coefficients(method, exact + sign * off, N, p_m, scale) for sign in (1, -1))
    share, *parts = coefficients(method, exact, N, p_m, scale)[..., None]  # [groups, 1] each
    w = [part / p_m for part in parts]
    w = [share - sum(w), *w]
    o = (share - 1) * p_x / p_m
    G = o * x + sum(a * m for a, m in zip(w, branches))
    size = abs(o * x) + sum(abs(a) * (abs(m) + shift) for a, m in zip(w, branches))
    change = sum(abs(a - b).sum(axis=0)[:, None] * abs(v) for a, b, v in zip(high, low, y)) / abs(p_m)
    return G, change + (len(branches) + 4) * state * (1 + wide) * size


def expected(method: Any, told: dict[str, Any], x: Any, space: str, scale: float, dtype: Any) -> tuple[Any, Any]:
    """D in float64, and the tolerance of a dtype, [B, C, *]."""
    state = min(HALF_ULP[dtype], 2.0**-24)
    arrays = [x.numpy(), *(told[name].numpy() for name in method.branches)]
    ndim = arrays[0].ndim
    given = tuple(range(1, ndim)) if method.dim is None else np.atleast_1d(method.dim)
    axes = tuple(int(axis) % ndim for axis in given)
    ends = tuple(range(-len(axes), 0))
    moved = [np.moveaxis(array, axes, ends) for array in arrays]
    flat = [array.reshape(-1, int(np.prod(moved[0].shape[-len(axes) :]))) for array in moved]
    found = spread(method, flat[0], flat[1:], space, scale, state)
    G, off = (np.moveaxis(array.reshape(moved[0].shape), ends, axes) for array in found)
    a_x, a_g = FACTORS["denoised"]
    D = a_x * arrays[0] + a_g * G
    off = abs(a_g) * off + 4 * state * (abs(a_x * arrays[0]) + abs(a_g * G))
    return D, off + HALF_ULP[dtype] * abs(D) + (2.0**-25 if dtype == torch.float16 else 0.0)


def sample(method: Any, told: dict[str, Any], x: Any, dtype: Any, backend: str) -> Any:
    conds = {name: {"out": told[name].to(dtype)} for name in method.branches}
    sampler = pyguide.Sampler(lambda x, t, out: out, PLAN, method, backend=backend)
    return sampler(x.to(dtype), conds=conds).double().numpy()


def data(shape: tuple[int, ...], dtype: Any, seed: int) -> tuple[dict[str, Any], Any]:
    """Branches by name, and x: numbers of the dtype, in float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64).to(dtype).double() for _ in range(4)]
    return dict(zip(("uncond", "cond", "negative"), drawn)), drawn[3]


@pytest.mark.parametrize("which", ["native", "reference"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(METHODS)),
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple),
    scale=st.floats(-3, 15).filter(lambda scale: abs(scale - 1) > 1e-9),
    space=st.sampled_from(sorted(FACTORS)),
    dtype=st.sampled_from(list(HALF_ULP)),
    seed=st.integers(0, 2**16),
)
def test_a_back_end_is_within_the_tolerance(
    which: str, name: str, shape: tuple[int, ...], scale: float, space: str, dtype: Any, seed: int
) -> None:
    if which == "native" and native.C is None:
        pytest.skip(f"no native kernel: {native.reason}")
    method = METHODS[name](scale, space=space)
    told, x = data(shape, dtype, seed)
    D, tolerance = expected(method, told, x, space, scale, dtype)
    got = sample(method, told, x, dtype, which)
    known = np.isfinite(D) & np.isfinite(tolerance)  # a sample of one element has no deviation
    assert np.isnan(got[~np.isfinite(D)]).all()
    assert (abs(got - D)[known] <= tolerance[known]).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", METHODS)
def test_samples_of_several_chunks(name: str, dtype: Any, backend: str) -> None:
    """Kernels sum 4096 elements at a time; here a sample has one and a half times as many, and some."""
    method, (told, x) = METHODS[name](4.0, space="denoised"), data((3, 41, 53), dtype, seed=5)
    D, tolerance = expected(method, told, x, "denoised", 4.0, dtype)
    assert (abs(sample(method, told, x, dtype, backend) - D) <= tolerance).all()


@pytest.mark.parametrize("space", FACTORS)
@pytest.mark.parametrize("name", METHODS)
def test_the_tolerance_finds_another_scale(name: str, space: str) -> None:
    """The control: float32 is told from a scale that is 1e-3 larger, and float64 from one that is 1e-9 larger."""
    for dtype, nudge in ((torch.float32, 1e-3), (torch.float64, 1e-9)):
        told, x = data((4, 8, 8), dtype, seed=1)
        D, tolerance = expected(METHODS[name](3.0, space=space), told, x, space, 3.0, dtype)
        other, _ = expected(METHODS[name](3.0, space=space), told, x, space, 3.0 * (1 + nudge), dtype)
        assert (abs(other - D) > tolerance).any()
