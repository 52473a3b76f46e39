"""Ancestral sampling of a DDPM (Ho et al. 2020, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..checks import choice
from ..path import NoisePath
from .registry import solver


@solver("ddpm", order=1, source="Ho et al. 2020, algorithm 2")
def ddpm(
    model: Callable[..., Any], x: Any, path: NoisePath, *, noise: Callable[[int], Any], variance: str = "small"
) -> Any:
    """The posterior q(x' | x, x0 = D) of x = r x' + sqrt(v) z, r = alpha/alpha', v = sigma^2 - r^2 sigma'^2:

        x' = r (sigma'/sigma)^2 x + alpha' (v / sigma^2) D + sqrt(w) z,    w = (sigma'/sigma)^2 v or v

    variance: "small", beta~, the posterior's own variance, exact where the data are one point; "large", beta, exact
    where they are a unit normal. No noise at clean data. On training steps of a DDPM v is beta_t; a grid of fewer steps
    is its respaced process. Weak order 1, one evaluation a step. Source: Ho et al. 2020, eq. 6, 7 and algorithm 2.
    """
    choice("variance", variance, ("small", "large"))
    for i in range(path.steps):
        D = model(x, i).denoised
        kept = (path.sigma[i + 1] / path.sigma[i]) ** 2
        gone = -math.expm1(2 * (path.lam[i] - path.lam[i + 1]))  # v / sigma^2, without the difference
        x = x * (path.alpha[i] / path.alpha[i + 1] * kept) + D * (path.alpha[i + 1] * gone)
        if path.sigma[i + 1] > 0:
            x = x + noise(i) * math.sqrt(gone * (path.sigma[i + 1] if variance == "small" else path.sigma[i]) ** 2)
    return x
