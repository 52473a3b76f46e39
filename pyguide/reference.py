"""The step, the guidance methods and the classifier's gradient, in plain array arithmetic: the definition that every
back end must match, and the fallback.

The step. Per element, with the K branch outputs m_k, the slots s_c (s_0 is the noisy x) and standard normal noise z:

    G    = sum_k w_k m_k + sum_c o_c s_c
    U    = G, or sum_k v_k m_k where the guidance method keeps a second combination
    D    = clip(a_x s_0 + a_g G, lo, hi)               or clamp(., -b, b) / b with a per-sample bound b
    S    = 1, or exp(var_lo + (var_hi - var_lo) (v + 1) / 2) with a variance branch v
    s'_r = sum_c T_rc s_c + d_r D + e_r U + sum_k b_rk m_k + n_r sqrt(S) z + q_r S g        solver slots
    s'_r = h_r s_r + sum_k b_rk m_k                                                         guidance slots
    next model input = c_in s'_0

A coefficient that is exactly 0 means "not read": the operand may hold anything, NaN included. Works on numpy arrays and
on torch tensors, in the dtype of the state. csrc/step.h has the same formula; `classifier_grad` has its own below.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .arrays import cast, dtype_name, from_numpy
from .guidance.vectors import Dense
from .layout import Row, Weights

Array = Any


class Stepped(NamedTuple):
    slots: list[Array]  # S arrays: what each slot holds after the row
    denoised: Array | None  # D, where the row or the caller needs it


def combine(terms: Iterable[tuple[float, Array]], like: Array) -> Array:
    """sum of coefficient * operand over the terms whose coefficient is not exactly 0; zeros if none is left."""
    total = None
    for coefficient, operand in terms:
        if coefficient != 0:
            product = operand * coefficient
            total = product if total is None else total + product
    return zeros_like(like) if total is None else total


def zeros_like(array: Array) -> Array:
    return np.zeros_like(array) if isinstance(array, np.ndarray) else array.new_zeros(array.shape)


def clamp(array: Array, low: float, high: float) -> Array:
    """min(max(array, low), high); NaN stays NaN in numpy's clip and in torch's clamp alike."""
    if low == -np.inf and high == np.inf:
        return array
    return np.clip(array, low, high) if isinstance(array, np.ndarray) else array.clamp(low, high)


def exp(array: Array) -> Array:
    return np.exp(array) if isinstance(array, np.ndarray) else array.exp()


def step(
    row: Row,
    slots: Sequence[Array],  # S arrays [C, *] (any shape): solver slots first, then guidance slots
    outputs: Sequence[Array | None],  # K arrays like the slots, None where the branch is absent
    weights: Weights | None,  # None in the prologue
    *,
    noise: Array | None = None,
    gradient: Array | None = None,
    variance: Array | None = None,
    bound: float = 0.0,
    want_denoised: bool = False,
) -> Stepped:
    """One row for one sample (or for many that share the row). Returns new arrays; nothing is written in place."""
    x, solver_slots = slots[0], len(row.d)
    own = len(slots) if weights is None else len(slots) - len(weights.h)
    needs_denoised = want_denoised or any(row.d)
    guided = second = None
    if weights is not None:
        needs_guided = (needs_denoised and row.a_g != 0) or (any(row.e) and weights.v is None)
        if needs_guided:
            guided = combine([*zip(weights.w, outputs, strict=True), *zip(weights.o, slots, strict=True)], x)
        second = guided
        if weights.v is not None and any(row.e):
            second = combine(zip(weights.v, outputs, strict=True), x)
    denoised = None
    if needs_denoised and weights is not None:
        denoised = combine([(row.a_x, x), (row.a_g, guided)], x)  # as in `bound`
        denoised = clamp(denoised, -bound, bound) / bound if bound else clamp(denoised, row.clip_lo, row.clip_hi)
    scale: Any = 1.0
    if variance is not None and (row.var_lo != 0 or row.var_hi != 0):
        scale = exp((variance + 1) * (0.5 * (row.var_hi - row.var_lo)) + row.var_lo)
    raw = [] if weights is None else weights.b
    new: list[Array] = []
    for r, old in enumerate(slots):
        branches = list(zip(raw[r], outputs, strict=True)) if raw else []
        if r >= own:  # the guidance method's own slots; the prologue has no guidance and leaves them alone
            terms = [] if weights is None else [(weights.h[r - own], old), *branches]
            new.append(combine(terms, x) if any(coefficient != 0 for coefficient, _ in terms) else old)
            continue
        if r >= solver_slots:  # of another plan in the same launch
            new.append(old)
            continue
        terms = [*zip(row.T[r], slots[:solver_slots], strict=True), (row.d[r], denoised), (row.e[r], second), *branches]
        if row.n[r] != 0:
            terms.append((row.n[r], scale**0.5 * noise))
        if row.q[r] != 0:
            terms.append((row.q[r], scale * gradient))
        unused = r > 0 and all(coefficient == 0 for coefficient, _ in terms)
        new.append(old if unused else combine(terms, x))
    return Stepped(new, denoised)


def guided(
    guide: Callable[..., Any],
    x: Array,  # [C, *] like the branches
    branches: Sequence[Array],
    own: Sequence[Array],  # the method's slots
    scalars: Mapping[str, float],
    *,
    p_x: float,
    p_m: float,
    axes: tuple[int, ...],
) -> tuple[Array, list[Array]]:
    """A method's equation, run with arrays: the guided output, and the method's slots afterwards.

    The branches enter as P_k = p_x x + p_m m_k, the guided P leaves as G = (P - p_x x) / p_m. In float64, one rounding
    to the dtype of x; norms and products over `axes`.
    """
    real = dtype_name(x)
    x, *vectors = (cast(array, "float64") for array in (x, *branches, *own))
    count = len(branches)
    if (p_x, p_m) != (0.0, 1.0):
        vectors[:count] = [p_x * x + p_m * m for m in vectors[:count]]
    with np.errstate(invalid="ignore", divide="ignore"):
        answer = guide(*(Dense(vector, axes) for vector in vectors), **scalars)
    first, *kept = answer if isinstance(answer, tuple) else (answer,)
    G = first.array if (p_x, p_m) == (0.0, 1.0) else (first.array - p_x * x) / p_m
    return cast(G, real), [cast(slot.array, real) for slot in kept]


def moments(
    x: Array,  # [C, *] like the branches
    branches: Sequence[Array],
    *,
    p_x: float,
    p_m: float,
) -> list[float]:
    """Sums and inner products of P_0 and of the differences m_k - m_0, in the order of csrc/moments.h."""
    x, first, *others = (cast(array, "float64") for array in (x, *branches))
    vectors = [p_x * x + p_m * first if p_x else p_m * first, *(m - first for m in others)]
    sums = [float(vector.sum()) for vector in vectors]
    return sums + [float((a * b).sum()) for i, a in enumerate(vectors) for b in vectors[i:]]


def bound(
    row: Row,
    slots: Sequence[Array],
    outputs: Sequence[Array | None],
    weights: Weights | None,
    *,
    quantile: float,
    least: float,
    limit: float,
    want_denoised: bool = False,
) -> float:
    """min(max(quantile of |D|, least), limit), D before it is clipped, the quantile interpolated linearly; NaN if any D
    is. 0 where a row needs no D."""
    if weights is None or not (want_denoised or any(row.d)):
        return 0.0
    x = slots[0]
    G = combine([*zip(weights.w, outputs, strict=True), *zip(weights.o, slots, strict=True)], x) if row.a_g else None
    D = combine([(row.a_x, x), (row.a_g, G)], x)
    sizes = np.abs(np.asarray(D.cpu() if hasattr(D, "cpu") else D, np.float64))
    return float(np.minimum(np.maximum(np.quantile(sizes, quantile), least), limit))


def classifier_grad(
    logits: Array,  # [B, classes], any strides
    target: Array,  # int [B] or [B, n]: labels, a negative one is none; float [B, classes]: a distribution over classes
    scale: Array,  # [B]
) -> tuple[Array, Array]:
    """scale * d log p(y | x) / d logits [B, classes], and log p(y | x) [B], of a classifier p = softmax(logits):

        labels Y:        log p(y | x) = log sum_{k in Y} p_k    grad_k = scale ([k in Y] p_k / sum_{j in Y} p_j - p_k)
        distribution q:  log p(y | x) = sum_k q_k log p_k       grad_k = scale (q_k - p_k sum_j q_j)

    Each of the two softmaxes (that over the classes, that over Y) subtracts its own maximum, so that neither overflows
    nor loses all its terms: any finite logits will do. A label given twice counts once. q need not sum to 1; its zeros
    are not read, so that a class which cannot be, with a logit of -inf, may stand there. NaN, for that sample only: a
    logit that is NaN or +inf, a label >= classes, no label at all, or only labels of classes that cannot be.

    Arithmetic: float64 for float64 logits, else float32. grad has the dtype of the logits, log p(y | x) of the scale.
    Source: the gradient is that of Dhariwal and Nichol 2021 (arXiv:2105.05233), algorithm 1, before the chain rule.
    """
    xp: Any = np if isinstance(logits, np.ndarray) else sys.modules["torch"]
    real = "float64" if dtype_name(logits) == "float64" else "float32"
    l, s = cast(logits, real), cast(scale, real)  # noqa: E741
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):  # what is NaN or -inf here is so by definition
        top = xp.amax(l, axis=1, keepdims=True)
        shifted = l - top
        normaliser = xp.log(xp.exp(shifted).sum(axis=1, keepdims=True))
        log_p = shifted - normaliser
        p = xp.exp(log_p)
        if "int" in dtype_name(target):
            member, invalid = members(target, l)
            nothing = xp.full_like(l, -np.inf)
            # of l and not of `shifted`: a difference that is rounded once
            own = xp.amax(xp.where(member, l, nothing), axis=1, keepdims=True)
            own = xp.where(invalid[:, None], xp.full_like(own, np.nan), own)
            inner = xp.exp(xp.where(member, l - own, nothing))
            total = inner.sum(axis=1, keepdims=True)
            log_prob = ((own - top) + (xp.log(total) - normaliser))[:, 0]
            grad = inner / total - p
        else:
            q = cast(target, real)
            log_prob = xp.where(q != 0, q * log_p, xp.zeros_like(q)).sum(axis=1)
            grad = q - p * q.sum(axis=1, keepdims=True)
        return cast(s[:, None] * grad, dtype_name(logits)), cast(log_prob, dtype_name(scale))


def members(
    labels: Array,  # int [B] or [B, n]
    like: Array,  # [B, classes]
) -> tuple[Array, Array]:
    """Which classes the labels name, bool [B, classes], and whether they name none or what is no class, bool [B]."""
    labels = labels.reshape(len(labels), -1)
    classes = from_numpy(np.arange(like.shape[1]), like)
    member = labels[:, :1] == classes
    for k in range(1, labels.shape[1]):  # one at a time: all at once would be [B, n, classes]
        member = member | (labels[:, k : k + 1] == classes)
    return member, (labels >= like.shape[1]).any(axis=1) | ~member.any(axis=1)
