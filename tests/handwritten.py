"""What the tests with published formulas written out by hand share: paths, a network, runs, laws of linear samplers.

The hand-written runs work in y = x / alpha and s = sigma / alpha, where every path obeys dy/ds = (y - D) / s, or in
alpha, sigma and lam as the papers print it; the package works in x with differences of D.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from gaussians import fitted_order, network_of, path_of_ratios

from pyguide import schedules, solvers
from pyguide.path import NoisePath

X = np.random.default_rng(0).standard_normal(6)
Z = np.random.default_rng(1).standard_normal((40, 6))
PATHS = {
    "vp": schedules.scaled_linear().path(6, sigmas="karras"),
    "vp-min": schedules.linear().path(5, sigmas="exponential", final_sigma="min"),
    "flow": schedules.flow(3.0).path(sigmas=[0.95, 0.8, 0.6, 0.35, 0.1]),
    "edm": schedules.edm().path(7),
    "edm-min": schedules.edm(0.05, 10.0).path(4, final_sigma="min"),
}
ZERO_SNR = schedules.scaled_linear(zero_snr=True).path(6, spacing="trailing")
FLOW = schedules.flow(3.0).path(6)  # from sigma = 1


def network(x: Any, t: Any) -> Any:
    return np.sin(x + 0.01 * float(np.ravel(t)[0])) + 0.3 * x


def same(got: Any, wanted: Any) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12 * np.abs(wanted).max())


def fail(*args: Any) -> Any:
    raise AssertionError("called")


def run(name: str, path: NoisePath, **options: Any) -> Any:
    drawn = iter(Z)
    noise = lambda i: next(drawn).copy()  # noqa: E731
    return solvers.sample(name, network, X * path.init_scale, path, prediction="sample", noise=noise, **options)


class Hand:
    """D(y, s) of the network on a path, and the start of a run: what a hand-written formula needs."""

    def __init__(self, path: NoisePath) -> None:
        self.path, self.s, self.z = path, path.sigma / np.where(path.alpha > 0, path.alpha, np.nan), iter(Z)
        self.y = X * path.init_scale / path.alpha[0]

    def D(self, y: Any, s: float) -> Any:
        on_grid = np.flatnonzero(np.isclose(self.s, s, rtol=1e-12, atol=0))
        level = self.path.level(int(on_grid[0])) if len(on_grid) else self.path.at(-math.log(s))
        return network(y * level.alpha, level.timestep)

    def steps(self) -> Any:
        return enumerate(itertools.pairwise(self.s))

    def result(self, y: Any) -> Any:
        return y * self.path.alpha[-1]


def down_up(s: float, to: float, eta: float) -> tuple[float, float]:
    up = min(to, eta * math.sqrt(to**2 * (s**2 - to**2) / s**2))
    return math.sqrt(max(to**2 - up**2, 0)), up


def alpha_of(path: NoisePath, lam: float) -> tuple[float, float]:
    """(alpha, sigma) from the definitions of the paths."""
    s = math.exp(-lam)
    alpha = {"EDM": 1.0, "Flow": 1 / (1 + s)}.get(type(path.schedule).__name__, 1 / math.hypot(1, s))
    return alpha, alpha * s


def variance_of(name: str, path: NoisePath, width: float, **options: Any) -> float:
    """Variance of the result for data N(0, width^2): the sampler is linear then, one column for x and for each draw."""
    draws = 2 * path.steps
    start = np.zeros(draws + 1)
    start[0] = math.hypot(path.alpha[0] * width, path.sigma[0])
    drawn = iter(np.eye(draws + 1)[1:])
    net = network_of(path, lambda y, s: width**2 / (width**2 + s**2) * y)
    noise = lambda i: next(drawn).copy()  # noqa: E731
    return float((solvers.sample(name, net, start, path, prediction="sample", noise=noise, **options) ** 2).sum())


def weak_order(name: str, grid: Any, **options: Any) -> float:
    errors, counts = [], (32, 46, 64, 90, 128)
    for steps in counts:
        path = path_of_ratios("vp", grid(steps, 8.0, 0.2))
        errors.append(
            abs(variance_of(name, path, 0.6, **options) - math.hypot(path.alpha[-1] * 0.6, path.sigma[-1]) ** 2)
        )
    return fitted_order(counts, errors)
