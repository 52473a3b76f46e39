"""What exponential integrators in lam = log(alpha / sigma) are made of: the phi functions and divided differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..path import NoisePath


def phi(n: int, z: float) -> float:
    """phi_n(z) = int_0^1 e^((1 - v) z) v^(n-1) / (n-1)! dv, n >= 1.

    phi_1 = (e^z - 1) / z, phi_(n+1) = (phi_n - 1 / n!) / z, and its series where that cancels.
    """
    if abs(z) < 1:
        return math.fsum(z**j / math.factorial(n + j) for j in range(18))
    value = math.expm1(z) / z
    for k in range(1, n):
        value = (value - 1 / math.factorial(k)) / z
    return value


def divided_differences(path: NoisePath, i: int, recent: Sequence[Any]) -> list[Any]:
    """Newton's divided differences in lam, of F at grid points i, i - 1, ... (`recent`): of order 1, 2, ...

    Those that reach a point of pure noise, lam = -inf, are 0: it says nothing about the slope.
    """
    level, found = list(recent), []
    for k in range(1, len(recent)):
        for j in range(len(recent) - k):
            level[j] = (level[j] - level[j + 1]) * float(1 / (path.lam[i - j] - path.lam[i - j - k]))
        found.append(level[0])
    return found
