"""Linear multistep methods for dy/ds = E, y = x / alpha, s = sigma / alpha: exact weights (LMS) and equal-step ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..checks import whole
from ..path import Level, NoisePath
from .ddim import ddim_step, noise_estimate, slope_weight
from .registry import solver

# weights of E at the last grid points, newest first, for 1 to 4 of them in equal steps (Adams, Bashforth 1883)
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def equal_step(x: Any, D: Any, recent: Sequence[Any], here: Level, ahead: Level) -> Any:
    """DDIM's step with the Adams-Bashforth mix of `recent`, E at this and earlier grid points, in place of E."""
    x = ddim_step(x, D, here, ahead)
    for weight, earlier in zip(ADAMS_BASHFORTH[len(recent) - 1][1:], recent[1:], strict=True):
        x = x + (earlier - recent[0]) * (weight * slope_weight(here, ahead))
    return x


def lagrange_integrals(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """The integral from start to end of each Lagrange polynomial over the nodes, two or more.

    By Gauss-Legendre quadrature of n points, which is exact, but for rounding, up to degree 2n - 1.
    """
    points, weights = np.polynomial.legendre.leggauss((len(nodes) + 1) // 2)
    half = (end - start) / 2
    at = start + half * (points + 1)
    values = [np.prod([(at - other) / (node - other) for other in nodes if other != node], axis=0) for node in nodes]
    return [half * float(weights @ value) for value in values]


@solver("lms", order=4, started=2, source="k-diffusion, sample_lms")
def lms(model: Callable[..., Any], x: Any, path: NoisePath, *, noise: Callable[[int], Any], order: int = 4) -> Any:
    """y' = y + sum_k c_k E_k, c_k the integral from s to s' of the Lagrange polynomial of s_k over the last s's.

    The Adams-Bashforth method for the steps as they are; a step to clean data (s' = 0) included. Grid points of pure
    noise (s infinite) have no weight. The first steps are of order 1, 2, ..., which leaves order 2 to the run. One
    evaluation a step. Source: k-diffusion, sample_lms; the ODE is Karras et al. 2022, eq. 1 with s(t) = 1.
    """
    order = whole("order", order, 1, 4)
    ratio = np.exp(-path.lam)
    recent: list[tuple[float, Any]] = []  # (s, E), newest first
    for i in range(path.steps):
        here, ahead = path.level(i), path.level(i + 1)
        D = model(x, i).denoised
        E = noise_estimate(x, D, here)
        recent = [(float(ratio[i]), E), *recent[: order - 1]]
        used = [(s, slope) for s, slope in recent if math.isfinite(s)]
        x = ddim_step(x, D, here, ahead)
        if len(used) > 1:
            integrals = lagrange_integrals([s for s, _ in used], float(ratio[i]), float(ratio[i + 1]))
            for integral, (_, earlier) in zip(integrals[1:], used[1:], strict=True):
                x = x + (earlier - E) * (ahead.alpha * integral)
    return x


@solver("ipndm", order=2, source="Zhang, Chen 2023, appendix on iPNDM")
def ipndm(model: Callable[..., Any], x: Any, path: NoisePath, *, noise: Callable[[int], Any], order: int = 4) -> Any:
    """x' = (alpha'/alpha) x + alpha' (s' - s) E_mix, E_mix the Adams-Bashforth mix of the last E's for equal steps:

        E,  (3 E - E_1) / 2,  (23 E - 16 E_1 + 5 E_2) / 12,  (55 E - 59 E_1 + 37 E_2 - 9 E_3) / 24

    PLMS without its second evaluation in the first step. The weights know nothing of the grid: order 4 from an exact
    history on equal steps in s, 2 on grids that change their step smoothly, 1 where it jumps all along. E of pure noise
    is finite and counts like any other. One evaluation a step.
    """
    order = whole("order", order, 1, 4)
    recent: list[Any] = []  # E at the last grid points, newest first
    for i in range(path.steps):
        here = path.level(i)
        D = model(x, i).denoised
        recent = [noise_estimate(x, D, here), *recent[: order - 1]]
        x = equal_step(x, D, recent, here, path.level(i + 1))
    return x
