"""A k-diffusion function f(model, x, sigmas, ...) as a solver: its x is our state over alpha, its sigma is sigma / alpha."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from ..path import NoisePath


def is_kdiffusion(function: Callable[..., Any]) -> bool:
    """True for the signature (model, x, sigmas, ...)."""
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return False
    return parameters[2:3] == ["sigmas"]


def adapt(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same sampler in pyguide's contract. Its noise_sampler, when it has one, draws from `noise`; needs torch."""
    parameters = inspect.signature(function).parameters

    def solver(model: Any, x: Any, path: NoisePath, *, noise: Callable[[int], Any], **options: Any) -> Any:
        from ..extras import require

        torch = require("torch")
        with np.errstate(divide="ignore"):
            ratio = np.exp(-path.lam)
        step = 0

        def denoiser(x: Any, sigma: Any, **extra: Any) -> Any:
            nonlocal step
            value = float(torch.as_tensor(sigma).reshape(-1)[0])
            on_grid = np.flatnonzero(np.isclose(ratio, value, rtol=1e-12, atol=0.0))
            level = path.level(int(on_grid[0])) if len(on_grid) else path.at(-np.log(value))
            step = int(np.searchsorted(-ratio, -value, side="right")) - 1
            return model(x * level.alpha, level).denoised

        if "noise_sampler" in parameters and "noise_sampler" not in options:
            options["noise_sampler"] = lambda sigma, sigma_next: noise(step)
        if "disable" in parameters:
            options.setdefault("disable", True)  # k-diffusion's own progress bar
        if path.alpha[0] == 0:
            raise ValueError("solver: a k-diffusion function cannot start at alpha = 0 (its sigma would be infinite)")
        sigmas = torch.tensor(ratio, dtype=torch.float64)
        return function(denoiser, x / float(path.alpha[0]), sigmas, **options) * float(path.alpha[-1])

    solver.__name__ = getattr(function, "__name__", "kdiffusion")
    return solver
