"""The curves from the largest sigma to the smallest that grids of sigmas follow.

With u_i = i / (n - 1) for i = 0 .. n-1:

    karras       sigma_i = (max^(1/rho) + u_i (min^(1/rho) - max^(1/rho)))^rho       Karras et al. 2022, eq. 5
    exponential  sigma_i = max^(1 - u_i) min^(u_i), linear in log sigma              its limit for rho to infinity
    beta         sigma_i = min + (max - min) F^-1(1 - u_i), F the distribution function of Beta(a, b)
                                                 Lee et al. 2024, "Beta Sampling is All You Need", with a = b = 0.6
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..extras import require
from ..path import Floats
from .checks import _finite


def _sigma_curve(
    name: str, points: int, low: float, high: float, rho: float = 7.0, beta: Sequence[float] = (0.6, 0.6)
) -> Floats:
    """[points] sigmas, the first exactly `high` and the last exactly `low`; a single point is `high`."""
    ramp = np.linspace(0.0, 1.0, points)
    if name == "karras":
        return _ends((high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho, high, low)
    if name == "exponential":
        return _ends(np.exp(math.log(high) + ramp * (math.log(low) - math.log(high))), high, low)
    if name == "beta":
        a, b = beta
        quantile = np.asarray(require("scipy.special").betaincinv(a, b, 1.0 - ramp), np.float64)
        curve = _ends(low + quantile * (high - low), high, low)
        if not (curve[1:] < curve[:-1]).all():
            raise ValueError(f"beta: {points} quantiles of Beta({a:g}, {b:g}) are too close to tell apart in float64")
        return curve
    raise ValueError(f'sigmas: expected "karras", "exponential", "beta" or a sequence, got {name!r}')


def _ends(curve: Floats, high: float, low: float) -> Floats:
    """The curve with its ends exact: a root and a power do not undo each other to the last bit."""
    curve[0] = high
    if len(curve) > 1:
        curve[-1] = low
    return curve


def _shape_of_beta(beta: Sequence[float]) -> tuple[float, float]:
    """The two parameters (a, b) of the Beta distribution."""
    try:
        a, b = beta
    except (TypeError, ValueError):
        raise ValueError(f"beta: expected the two parameters (a, b) of a Beta distribution, got {beta!r}") from None
    return _finite("beta", a, positive=True), _finite("beta", b, positive=True)
