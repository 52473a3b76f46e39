"""SA-Solver: stochastic Adams methods, a predictor and a corrector for SDEs of any noise strength (Xue et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..checks import flag, number, whole
from ..path import NoisePath
from .exponential import phi
from .registry import solver


@solver("sa_solver", order=2, source="Xue et al. 2023, algorithm 1")
def sa_solver(
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    *,
    noise: Callable[[int], Any],
    predictor_order: int = 2,
    corrector_order: int = 2,
    tau: float | Callable[[float], float] | None = None,
    lower_order_final: bool = True,
) -> Any:
    """From lam to lam' = lam + h, with k = 1 + tau^2 and fresh z ~ N(0, 1):

        x' = (sigma'/sigma) e^(-tau^2 h) x + alpha' k int e^(-k (lam' - u)) P(u) du + sigma' sqrt(1 - e^(-2 tau^2 h)) z

    P interpolates D at the last predictor_order grid points (SA-Predictor); then, once more with the D that this x'
    gives and with the same z, at the last corrector_order ones, the new one counted (SA-Corrector; 0: none). With two
    points int e^(-k (lam' - u)) (u - lam) du is replaced by h^2/2, as in the authors' code: a change by h^3.

    tau: the strength of the noise: 0 is the ODE, 1 the reverse SDE; a number, or f(timestep) where a step starts. None:
    1 in the middle of the path, where the timestep is in [0.2 T, 0.8 T] (on edm paths sigma in [0.05, 1]), else 0.
    lower_order_final: the last step is of order 1, the one before of at most 2, and so on. The first steps build the
    order up, and a step from pure noise or to clean data (h infinite) is of order 1. Orders up to 4, one evaluation a
    step. The defaults are of order 2, where tau > 0 in the weak sense, as trapezoids are with additive noise; strongly
    of order 1 there (the paper's theorems). Source: Xue et al. 2023, algorithm 1.
    """
    predictor_order = whole("predictor_order", predictor_order, 1, 4)
    corrector_order = whole("corrector_order", corrector_order, 0, 4)
    lower_order_final = flag("lower_order_final", lower_order_final)
    strength = _strengths(path, tau)
    D: dict[int, Any] = {}  # at the last grid points
    predicted: dict[int, float] = {}  # weights of D_j - D_i in the last predictor step
    for i in range(path.steps):
        D[i] = model(x, i).denoised
        if corrector_order and i > 0:
            points = min(corrector_order, i + 1, path.steps - i + 2 if lower_order_final else 4)
            corrected = _weights(path, i - 1, range(i, i - points, -1), strength[i - 1])
            change = {j: corrected.get(j, 0.0) - predicted.get(j, 0.0) for j in {*corrected, *predicted}}
            x = _moved(x, D, i - 1, change)  # x' with other weights: what an edit made of x' stays
        points = min(predictor_order, i + 1, path.steps - i if lower_order_final else 4)
        predicted = _weights(path, i, range(i, i - points, -1), strength[i])
        D = {j: D[j] for j in range(max(0, i + 1 - max(predictor_order, corrector_order - 1)), i + 1)}

        h, rate = float(path.lam[i + 1] - path.lam[i]), strength[i] ** 2
        kept = math.exp(-rate * h) if rate > 0 else 1.0
        x = x * (kept * path.sigma[i + 1] / path.sigma[i]) - D[i] * (path.alpha[i + 1] * math.expm1(-(1 + rate) * h))
        x = _moved(x, D, i, predicted)
        if rate > 0 and path.sigma[i + 1] > 0:
            x = x + noise(i) * (path.sigma[i + 1] * math.sqrt(-math.expm1(-2 * rate * h)))
    return x


def _strengths(path: NoisePath, tau: float | Callable[[float], float] | None) -> list[float]:
    """tau of each step; ValueError naming tau."""
    total = path.schedule.train_steps
    if tau is None:
        inside = [
            0.2 * total <= t <= 0.8 * total if total else 0.05 <= sigma <= 1
            for t, sigma in zip(path.timestep, path.sigma)
        ]
        return [float(value) for value in inside]
    values = [tau(float(t)) if callable(tau) else tau for t in path.timestep]
    return [number("tau", value, or_else=", or a function of the timestep that gives one") for value in values]


def _weights(path: NoisePath, i: int, points: range, tau: float) -> dict[int, float]:
    """Weights of D_j - D_i, j != i, in the step from i to i + 1, for the polynomial through D at `points`.

    They solve sum_j w_j r_j^n = alpha' k h I_n, n = 0, 1, ..., with r_j = (lam_j - lam_i) / h and
    I_n = int_0^1 e^(-k h (1 - v)) v^n dv = n! phi_(n+1)(-k h).
    A point of pure noise, lam = -inf, has no weight.
    """
    h, k = float(path.lam[i + 1] - path.lam[i]), 1 + tau * tau
    if not math.isfinite(h):
        return {}
    used = [j for j in points if math.isfinite(path.lam[j])]
    right = [math.factorial(n) * phi(n + 1, -k * h) for n in range(len(used))]
    if len(used) == 2:
        right[1] = 0.5
    ratios = np.array([(path.lam[j] - path.lam[i]) / h for j in used])
    solved = np.linalg.solve(np.vander(ratios, increasing=True).T, right) * (path.alpha[i + 1] * k * h)
    return {j: float(weight) for j, weight in zip(used, solved, strict=True) if j != i}


def _moved(x: Any, D: dict[int, Any], i: int, weights: dict[int, float]) -> Any:
    """x + sum_j w_j (D_j - D_i)."""
    for j, weight in sorted(weights.items()):
        if weight != 0:
            x = x + (D[j] - D[i]) * weight
    return x
