"""UniPC: a predictor and a corrector of arbitrary order from the same evaluations (Zhao et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from ..checks import choice, flag, whole
from ..path import Floats, NoisePath
from .ddim import ddim_step, noise_estimate
from .exponential import phi
from .registry import solver


def _weights(z: float, ratios: Sequence[float], solver_type: str) -> tuple[Floats, float]:
    """rho of  sum_k rho_k ratio_k^(n-1) = z n! phi_(n+1)(z) / B(z),  n = 1 .. order, and B(z): eq. 11, theorem 3.1.

    A single difference has rho 1/2, as published: it is exact enough for the order, for either B.
    """
    scale = z if solver_type == "bh1" else math.expm1(z)
    if len(ratios) <= 1:
        return np.full(len(ratios), 0.5), scale
    orders = range(1, len(ratios) + 1)
    power = np.array([[ratio ** (n - 1) for ratio in ratios] for n in orders])
    right = np.array([z * math.factorial(n) * phi(n + 1, z) / scale for n in orders])
    return np.linalg.solve(power, right), scale


def _uncorrected(path: NoisePath, disable_corrector: Collection[int]) -> set[int]:
    """The steps of disable_corrector; ValueError naming it."""
    try:
        return {whole("disable_corrector", step, 0, path.steps - 1) for step in disable_corrector}
    except (TypeError, ValueError):
        raise ValueError(
            f"disable_corrector: expected indices of steps, from 0 to {path.steps - 1}, got {disable_corrector!r}"
        ) from None


@solver("unipc", order=3, started=2, source="Zhao et al. 2023, algorithms 1 and 2")
def unipc(
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    *,
    noise: Callable[[int], Any],
    order: int = 2,
    solver_type: str = "bh2",
    corrector: bool = True,
    lower_order_final: bool = True,
    disable_corrector: Collection[int] = (),
    predict_x0: bool = True,
) -> Any:
    """From level s to t, with h = lam_t - lam_s and differences D_k - D_s at ratios r_k = (lam_k - lam_s) / h:

        x_t = (sigma_t/sigma_s) x_s - alpha_t expm1(-h) D_s - alpha_t B(-h) sum_k rho_k (D_k - D_s) / r_k

    The predictor uses earlier D_k; the corrector, run when D_t is known, adds it with r = 1 and replaces x_t. B(z) is
    expm1(z) (bh2) or z (bh1). predict_x0 False is the same on the noise that each D leaves of the state it was made of:

        x_t = (alpha_t/alpha_s) x_s - sigma_t expm1(h) E_s - sigma_t B(h) sum_k rho_k (E_k - E_s) / r_k

    order: 1 to 3; lower_order_final lowers it toward the end, as published. disable_corrector: steps whose result is
    not corrected. A step has order p = order, p + 1 with the corrector; a run at most 3 because of its first step (2
    without the corrector), and 2 with lower_order_final. One evaluation a step.
    Source: Zhao et al. 2023, algorithms 1 and 2; on the noise: section 3 and diffusers, UniPCMultistepScheduler.
    """
    order = whole("order", order, 1, 3)
    choice("solver_type", solver_type, ("bh1", "bh2"))
    corrector, predict_x0 = flag("corrector", corrector), flag("predict_x0", predict_x0)
    lower_order_final = flag("lower_order_final", lower_order_final)
    uncorrected = _uncorrected(path, disable_corrector)
    recent: list[Any] = []  # D, or E, at the last grid points, newest first
    used, last = 0, (x, x, x)  # order of the step before; its state, the one that D was made of, and D
    for i in range(path.steps):
        D = model(x, i).denoised
        F, seen = D if predict_x0 else noise_estimate(x, D, path.level(i)), x
        if corrector and i > 0 and i - 1 not in uncorrected:
            x = _update(path, last, recent, i - 1, used, solver_type, predict_x0, ahead=F)
        last = x, seen, D
        recent = [F, *recent[:2]]
        used = min(order, i + 1, path.steps - i if lower_order_final else order)
        x = _update(path, last, recent, i, used, solver_type, predict_x0)
    return x


def _first_order(path: NoisePath, x: Any, seen: Any, D: Any, i: int, predict_x0: bool) -> Any:
    """The exponential Euler step on D or on E; both are DDIM where x is the state that D was made of (`seen`)."""
    if predict_x0:
        h = path.lam[i + 1] - path.lam[i]
        return x * (path.sigma[i + 1] / path.sigma[i]) - D * (path.alpha[i + 1] * math.expm1(-h))
    step = ddim_step(seen, D, path.level(i), path.level(i + 1))
    return step if x is seen else step + (x - seen) * float(path.alpha[i + 1] / path.alpha[i])


def _update(
    path: NoisePath,
    last: tuple[Any, Any, Any],
    recent: Sequence[Any],
    i: int,
    order: int,
    solver_type: str,
    predict_x0: bool,
    ahead: Any = None,
) -> Any:
    """One update from grid point i to i + 1: the predictor, or with the prediction at i + 1 (`ahead`) the corrector."""
    h = float(path.lam[i + 1] - path.lam[i])
    x = _first_order(path, *last, i, predict_x0)
    if path.sigma[i + 1] == 0 or not (math.isfinite(h) or (predict_x0 and solver_type == "bh2")):
        return x  # to clean data, or with an infinite B(z): the differences have no weight
    differences = []
    for k in range(1, order):
        ratio = float((path.lam[i - k] - path.lam[i]) / h)
        if math.isfinite(ratio):  # a point of pure noise, lam = -inf, says nothing about the slope
            differences.append((ratio, (recent[k] - recent[0]) / ratio))
    if ahead is not None:
        differences.append((1.0, ahead - recent[0]))
    c, z = (path.alpha[i + 1], -h) if predict_x0 else (path.sigma[i + 1], h)
    rho, scale = _weights(z, [ratio for ratio, _ in differences], solver_type)
    for weight, (_, difference) in zip(rho, differences, strict=True):
        x = x - difference * (c * scale * weight)
    return x
