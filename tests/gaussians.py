"""Targets whose denoiser is known exactly, the grids to run on, and the exact solution of the probability-flow ODE.

In y = x / alpha and s = sigma / alpha every path obeys dy/ds = (y - D(y, s)) / s (Karras et al. 2022, eq. 1 with s(t) =
1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.integrate import solve_ivp

from pyguide import NoisePath, schedules

MEANS, WIDTHS, SHARES = np.array([-1.5, 0.2, 2.0]), np.array([0.5, 0.3, 0.7]), np.array([0.3, 0.3, 0.4])


def denoiser(y: Any, s: float) -> Any:
    """E[x0 | y] of the mixture at y = x0 + s noise."""
    variance = WIDTHS**2 + s**2
    gap = np.asarray(y)[..., None] - MEANS
    weight = np.log(SHARES) - 0.5 * gap**2 / variance - 0.5 * np.log(variance)
    weight = np.exp(weight - weight.max(axis=-1, keepdims=True))
    mean = MEANS + WIDTHS**2 / variance * gap
    return (weight * mean).sum(axis=-1) / weight.sum(axis=-1)


def exact(y: Any, s: float, end: float, denoise: Any = denoiser) -> Any:
    """The solution of the ODE at s = end, to about 1e-13."""
    solution = solve_ivp(
        lambda u, y: y - denoise(y, math.exp(u)),
        (math.log(s), math.log(end)),
        y,
        method="DOP853",
        rtol=1e-13,
        atol=1e-13,
    )
    return solution.y[:, -1]


def path_of_ratios(kind: str, s: Any) -> NoisePath:
    """A path over the given s = sigma / alpha; the model is told 10,000 + the index of the grid point."""
    s = np.asarray(s, float)
    with np.errstate(invalid="ignore"):
        alpha = {"vp": 1 / np.hypot(1, s), "flow": 1 / (1 + s), "edm": np.ones_like(s)}[kind]
        sigma = np.where(np.isinf(s), 1.0, alpha * s)
    schedule = {"vp": schedules.linear(), "flow": schedules.flow(), "edm": schedules.edm()}[kind]
    return NoisePath(alpha, sigma, 1e4 + np.arange(len(s) - 1), schedule, s[0] if kind == "edm" else 1.0)


def levels_of(path: NoisePath) -> Callable[[float], tuple[float, float]]:
    """(alpha, sigma) by the timestep that a model is told, at grid points and between; Heun asks at the end too."""
    levels = {path.level(path.steps).timestep: (path.alpha[-1], path.sigma[-1])}  # a grid may tell it before its end
    levels |= dict(zip(path.timestep, zip(path.alpha, path.sigma)))

    def level(t: float) -> tuple[float, float]:
        if t in levels:
            return levels[t]
        if path.schedule.exploding:  # told c_noise = log(sigma) / 4
            return 1.0, math.exp(4 * t)
        inner = path.at_timestep(t)
        return inner.alpha, inner.sigma

    return level


def network_of(path: NoisePath, denoise: Any = denoiser) -> Any:
    """The exact denoiser as a network that predicts x0."""
    level = levels_of(path)

    def network(x: Any, t: Any) -> Any:
        alpha, sigma = level(float(np.ravel(t)[0]))
        # at alpha = 0 the input says nothing: the mean of the data
        return denoise(x / alpha, sigma / alpha) if alpha > 0 else np.full(np.shape(x), float(SHARES @ MEANS))

    return network


def uniform(steps: int, start: float, end: float) -> Any:
    """Equal steps in lam = -log s."""
    return np.exp(np.linspace(math.log(start), math.log(end), steps + 1))


def alternating(steps: int, start: float, end: float) -> Any:
    """Steps of h, 2 h, h, 2 h ... in lam: a multistep method that ignores the ratio of its steps loses its order
    here."""
    sizes = np.where(np.arange(steps) % 2 == 0, 1.0, 2.0)
    lam = np.concatenate([[0], np.cumsum(sizes) / sizes.sum()])
    return np.exp(math.log(start) + lam * (math.log(end) - math.log(start)))


def gentle_start(steps: int, start: float, end: float) -> Any:
    """Three first steps of h^2, then equal ones: the low orders of the warm-up cost only high powers of h."""
    h = math.log(start / end) / steps
    warm = h * h * np.arange(1, 4)
    lam = np.concatenate([[0], warm, np.linspace(warm[-1], math.log(start / end), steps - 2)[1:]])
    return start * np.exp(-lam)


def fitted_order(steps: Any, errors: Any) -> float:
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])
