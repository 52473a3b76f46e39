"""DEIS: an exponential integrator on the noise, in rho = sigma / alpha (Zhang, Chen 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..checks import flag, whole
from ..path import NoisePath
from .ddim import ddim_step, noise_estimate
from .exponential import divided_differences, phi
from .registry import solver


def moment(n: int, h: float) -> float:
    """int_0^h e^-u u^n du = n! e^-h h^(n+1) phi_(n+1)(h); n! at infinity."""
    if h > 100:  # what is beyond is below rounding
        return float(math.factorial(n))
    return math.factorial(n) * math.exp(-h) * h ** (n + 1) * phi(n + 1, h)


@solver("deis", order=2, source="Zhang, Chen 2023, eq. 13 to 15 (tAB-DEIS), with polynomials in log rho")
def deis(
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    *,
    noise: Callable[[int], Any],
    order: int = 2,
    lower_order_final: bool = False,
) -> Any:
    """x'/alpha' = x/alpha + int_rho^rho' E(r) dr,  rho = sigma / alpha, with E(r) the polynomial in log r = -lam that
    goes through the last `order` values of E = (x - alpha D) / sigma.

    With u = lam(r) - lam, E(u) = E + u E[1] + u (u + h_previous) E[2] in Newton's divided differences, and
    int u^n dr = -rho int_0^h e^-u u^n du, finite for a step that ends at clean data too: it keeps its order.
    order: 1 (DDIM) to 3. The first steps have the order that their history allows; lower_order_final: the last step
    is of order 1, the one before of order 2 at most. One evaluation a step.
    Source: Zhang, Chen 2023, eq. 13 to 15 (tAB-DEIS); polynomials in log rho as in diffusers, DEISMultistepScheduler.
    """
    order, lower_order_final = whole("order", order, 1, 3), flag("lower_order_final", lower_order_final)
    recent: list[Any] = []  # E at the last grid points, newest first
    for i in range(path.steps):
        here, D = path.level(i), model(x, i).denoised
        recent = [noise_estimate(x, D, here), *recent[: order - 1]]
        x = ddim_step(x, D, here, path.level(i + 1))
        used = min(order, i + 1, path.steps - i if lower_order_final else order)
        if used == 1:
            continue
        h, last = float(path.lam[i + 1] - path.lam[i]), float(path.lam[i] - path.lam[i - 1])
        scale = path.alpha[i + 1] * path.sigma[i] / path.alpha[i]
        slope, *curvature = divided_differences(path, i, recent[:used])
        x = x - slope * (scale * moment(1, h))
        if curvature:
            x = x - curvature[0] * (scale * (moment(2, h) + last * moment(1, h)))
    return x
