"""The numbers that exponential integrators are made of, against sums of their series in rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from pyguide.solvers.exponential import phi
from pyguide.solvers.unipc import _weights

EPS = 2.0**-52


def exact_phi(n: int, z: float) -> Fraction:
    """sum_j z^j / (n + j)!, without rounding; n = 0 is e^z. What is left out is below 2^-120 of it."""
    x, term, total, j = Fraction(z), Fraction(1, math.factorial(n)), Fraction(0), 0
    # all terms have one sign for z > 0; for z < 0 the sum is at least e^z / n!, or of the size 1 / |z|
    least = Fraction(1, 2**120) * Fraction(math.exp(min(z, 0.0))) * term
    while abs(term) > least or j < abs(z):
        total += term
        j += 1
        term *= x / (n + j)
    return total


def solved(matrix: list[list[Fraction]], right: list[Fraction]) -> list[Fraction]:
    """Gauss's elimination, without rounding."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for k in range(len(rows)):
        pivot = next(i for i in range(k, len(rows)) if rows[i][k] != 0)
        rows[k], rows[pivot] = rows[pivot], rows[k]
        rows[k] = [value / rows[k][k] for value in rows[k]]
        for i in range(len(rows)):
            if i != k:
                rows[i] = [a - rows[i][k] * b for a, b in zip(rows[i], rows[k], strict=True)]
    return [row[-1] for row in rows]


@pytest.mark.parametrize(
    "z", [-40.0, -3.0, -1.001, -1.0, -0.9999, -1e-3, -1e-6, -1e-12, 1e-12, 1e-9, 0.3, 0.5, 1.0, 3.0, 20.0]
)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_phi(n: int, z: float) -> None:
    """To what the recurrence loses where it is used, |z| >= 1: a rounding of each phi_k before, relative to phi_n."""
    wanted = exact_phi(n, z)
    lost = sum(abs(exact_phi(k, z) / Fraction(z) ** (n - k)) + Fraction(1, math.factorial(k)) for k in range(1, n))
    limit = 4 * EPS * (1 + (float(lost / abs(wanted)) if abs(z) >= 1 else 0.0))
    assert limit < 1e-12
    assert abs(float(Fraction(phi(n, z)) / wanted - 1)) <= limit


@pytest.mark.parametrize("z", [-300.0, -1e6])
def test_phi_of_steps_with_much_noise(z: float) -> None:
    """Its recurrence from phi_1 = -1/z, in rational numbers: e^z is nothing there."""
    wanted = -1 / Fraction(z)
    for n in range(1, 5):
        assert abs(float(Fraction(phi(n, z)) / wanted - 1)) <= 4 * n * EPS
        wanted = (wanted - Fraction(1, math.factorial(n))) / Fraction(z)


@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize(
    "ratios", [(-1.0, 1.0), (-0.5, -1.25), (-1.0, -2.0, 1.0), (-0.9, -1.7, -2.6), (-0.8, -1.5, 1.0)], ids=str
)
@pytest.mark.parametrize("h", [1e-6, 1e-3, 0.005, 0.3, 0.99, 1.01, 3.0, 8.0])
def test_weights_of_unipc(h: float, ratios: Any, solver_type: str) -> None:
    """Zhao et al. 2023, eq. 11: to the rounding of the linear system. phi by its recurrence would lose 3e-9 of the
    third weight at h = 0.005."""
    count = len(ratios)
    power = [[Fraction(ratio) ** n for ratio in ratios] for n in range(count)]
    condition = float(np.linalg.cond(np.array(power, float)))
    for z in (-h, h):
        x = Fraction(z)
        scale = x if solver_type == "bh1" else exact_phi(0, z) - 1
        right = [x * math.factorial(n) * exact_phi(n + 1, z) / scale for n in range(1, count + 1)]
        wanted = [float(value) for value in solved(power, right)]
        rho, B = _weights(z, ratios, solver_type)
        assert pytest.approx(float(scale), rel=2 * EPS) == B
        # three roundings of the matrix' powers, its elimination (3 n^2), and those of phi and of the right side
        assert np.abs(rho - wanted).max() <= (3 + 3 * count**2 + 32) * EPS * condition * np.abs(wanted).max()


def test_a_single_difference_of_unipc_weighs_a_half() -> None:
    for z in (-0.3, 0.3, -math.inf):
        rho, B = _weights(z, [1.0], "bh2")
        assert (rho.tolist(), B) == ([0.5], math.expm1(z))
    assert _weights(0.1, [], "bh1")[0].size == 0
