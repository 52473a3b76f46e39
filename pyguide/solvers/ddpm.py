"""Ancestral sampling of a DDPM (Ho et al. 2020, algorithm 2), with fixed or learned variances."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..checks import choice
from ..path import NoisePath
from ..trace import LearnedVariance, Variance
from .registry import solver


@solver("ddpm", order=1, source="Ho et al. 2020, algorithm 2")
def ddpm(
    model: Callable[..., Any], x: Any, path: NoisePath, *, noise: Callable[[int], Any], variance: str = "small"
) -> Any:
    """The posterior q(x' | x, x0 = D) of x = r x' + sqrt(v) z, r = alpha/alpha', v = sigma^2 - r^2 sigma'^2:

        x' = r (sigma'/sigma)^2 x + alpha' (v / sigma^2) D + sqrt(Sigma) z

    variance: "small", Sigma = beta~ = (sigma'/sigma)^2 v, the posterior's own, exact where the data are one point;
    "large", Sigma = beta = v, exact where they are a unit normal; chosen by C further channels u of the model's output,
    "learned", log Sigma = u, or "learned_range", log Sigma = f log beta + (1 - f) log beta~, f = (u + 1) / 2. At clean
    data there is no noise, and Sigma serves classifier guidance alone: "small" has 0, "large" the beta~ of the step
    before, which is also the beta~ of "learned_range" there (on a path of one step: beta), as guided-diffusion has it.
    On training steps of a DDPM v is beta_t; a grid of fewer steps is its respaced process. Weak order 1, one evaluation
    a step. Source: Ho et al. 2020, eq. 6, 7 and algorithm 2; Nichol, Dhariwal 2021, eq. 15.
    """
    choice("variance", variance, ("small", "large", "learned", "learned_range"))
    before = None  # beta~ of the last step
    for i in range(path.steps):
        out, ahead = model(x, i), path.sigma[i + 1]
        kept = (ahead / path.sigma[i]) ** 2
        gone = -math.expm1(2 * (path.lam[i] - path.lam[i + 1]))  # v / sigma^2, without the difference
        mean = x * (path.alpha[i] / path.alpha[i + 1] * kept) + out.denoised * (path.alpha[i + 1] * gone)
        small, large = float(gone * ahead**2), float(gone * path.sigma[i] ** 2)
        floor = small or before or large
        Sigma: Variance = LearnedVariance(-1.0, 1.0)
        if variance == "learned_range":
            Sigma = LearnedVariance(math.log(floor), math.log(large))
        elif variance != "learned":
            Sigma = small if variance == "small" else large if ahead > 0 else floor
        x, before = out.gaussian(mean, Sigma, noise(i) if ahead > 0 else None), small
    return x
