"""Solvers: short functions in the vocabulary of their papers, run with arrays or compiled to a table.

A solver is `f(model, x, path, *, noise, **options) -> x`:

    model(x, level)  .denoised: D, clipped if a clip was asked for; .noise: E = (x - alpha D) / sigma before the clip
    path             alpha, sigma, lam = log(alpha / sigma) [N+1] in float64; steps = N; at(lam) between grid points
    noise(i)         a fresh standard normal array, drawn in step i

A level is a grid index or `path.at(lam)`. States may be added, subtracted and multiplied by numbers; everything else is
computed from the path. To add a solver, write the function and register it under its name with `@solver`.
"""

from __future__ import annotations

from .registry import names, resolve, sample, solver

# each module registers its functions on import
from . import ddim, dpmpp, heun, unipc  # isort: skip

__all__ = ["ddim", "dpmpp", "heun", "names", "resolve", "sample", "solver", "unipc"]
