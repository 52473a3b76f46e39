"""Solvers: short functions in the vocabulary of their papers, run with arrays or compiled to a table.

A solver is `f(model, x, path, *, noise, **options) -> x`:

    model(x, level)  .denoised: D, clipped if a clip was asked for; .noise: E = (x - alpha D) / sigma before the clip;
                     .gaussian(mean, variance, z): mean + sqrt(variance) z, of a step that draws from a Gaussian
    path             alpha, sigma, lam = log(alpha / sigma) [N+1] in float64; steps = N; at(lam) and at_timestep(t)
                     between grid points; brownian(s, s') for noise that several draws of one step share
    noise(i)         a fresh standard normal array, drawn in step i

A level is a grid index or `path.at(lam)`. States may be added, subtracted and multiplied by numbers; everything else is
computed from the path. To add a solver, write the function and register it under its name with `@solver`: every module
of this package is imported.
"""

from __future__ import annotations

import importlib
import pkgutil

from ..trace import LearnedVariance
from .registry import alias, entry, names, resolve, sample, solver

for _module in pkgutil.iter_modules(__path__):  # each module registers its functions on import
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["LearnedVariance", "alias", "entry", "names", "resolve", "sample", "solver"]
