"""What the tests of the linear multistep methods, SA-Solver, LCM and TCD share: paths, a network, a run."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyguide import schedules, solvers

X = np.random.default_rng(0).standard_normal(6)
Z = np.random.default_rng(1).standard_normal((12, 6))
LATENT = schedules.scaled_linear()
VP = LATENT.path(10, offset=1)
FLOW = schedules.flow().path(8)
EDM = schedules.edm().path(8)


def smooth(x: Any, t: Any) -> Any:
    return np.sin(x + 0.01 * float(np.ravel(t)[0]))


def same(a: Any, b: Any, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def run(name: str, path: Any = VP, prediction: str = "v", network: Any = smooth, **options: Any) -> Any:
    """A solver's result from X, with the noise Z[i] in step i."""
    start = X * path.init_scale
    return solvers.sample(name, network, start, path, prediction=prediction, noise=lambda i: Z[i].copy(), **options)
