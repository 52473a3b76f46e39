"""DPM-Solver++: exponential integrators in lam, on the prediction of the clean sample (Lu et al. 2022b)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..path import NoisePath
from .registry import solver


@solver("dpmpp_2m", order=2, source="Lu et al. 2022b, algorithm 2")
def dpmpp_2m(
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    *,
    noise: Callable[[int], Any],
    lower_order_final: bool = False,
) -> Any:
    """x' = (sigma'/sigma) x - alpha' expm1(-h) D_mix,  h = lam' - lam,
    D_mix = D + (D - D_previous) h / (2 h_previous).

    The first step is of order 1, and so is one that ends at clean data (its h is infinite); lower_order_final makes the
    last step of order 1 wherever it ends. Order 2, one evaluation a step. Source: Lu et al. 2022b, algorithm 2.
    """
    previous = None
    for i in range(path.steps):
        D = model(x, i).denoised
        h = path.lam[i + 1] - path.lam[i]
        mix = D
        if previous is not None and math.isfinite(h) and not (lower_order_final and i == path.steps - 1):
            mix = D + (D - previous) * (h / (2 * (path.lam[i] - path.lam[i - 1])))
        x = x * (path.sigma[i + 1] / path.sigma[i]) - mix * (path.alpha[i + 1] * math.expm1(-h))
        previous = D
    return x
