"""A k-diffusion function f(model, x, sigmas, ...) as a solver: its x is our x / alpha, its sigma our sigma / alpha."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from ..extras import require
from ..path import NoisePath
from ..trace import Form


def is_kdiffusion(function: Callable[..., Any]) -> bool:
    """True for the signature (model, x, sigmas, ...); TypeError for (model, x, sigma_min, sigma_max, ...)."""
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return False
    if parameters[2:4] == ["sigma_min", "sigma_max"]:
        raise TypeError(
            f"solver: {getattr(function, '__name__', 'the function')} makes its own grid from sigma_min to sigma_max; "
            "expected f(model, x, sigmas, ...), which runs on the grid of a path"
        )
    return parameters[2:3] == ["sigmas"]


def adapt(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same sampler in pyguide's contract; needs torch, and runs numpy states as torch tensors.

    Its draws by torch.randn_like are noise(0), noise(1), ... in the order in which it makes them, and so are those of
    its `noise_sampler`; but one that k-diffusion would make of a Brownian tree is `path.brownian`. An edit of the
    model's input changes its x as well, as a callback of k-diffusion would.
    """
    parameters = inspect.signature(function).parameters
    one_motion = _draws_from_a_tree(function)

    def solver(model: Any, x: Any, path: NoisePath, *, noise: Callable[[int], Any], **options: Any) -> Any:
        torch = require("torch")
        if path.alpha[0] == 0:
            raise ValueError("path: a k-diffusion function cannot start at alpha = 0 (its sigma would be infinite)")
        ratio = np.exp(-path.lam)
        numpy = isinstance(x, np.ndarray)
        draws, in_model = itertools.count(), False

        def inside(array: Any) -> Any:
            return torch.from_numpy(np.array(array)) if numpy else array

        def outside(tensor: Any) -> Any:
            return tensor.numpy() if numpy else tensor

        def draw() -> Any:
            return inside(noise(next(draws)))

        class Draws(torch.overrides.TorchFunctionMode):  # type: ignore[name-defined]
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                return draw() if func is torch.randn_like and not in_model else func(*args, **(kwargs or {}))

        def on_grid(value: float) -> int | None:
            """The grid index of a sigma, which may have been rounded to float32."""
            near = np.flatnonzero(np.isclose(ratio, value, rtol=1e-6, atol=0.0))
            return int(near[0]) if len(near) else None

        def brownian(sigma: Any, sigma_next: Any) -> Any:
            ends = [float(torch.as_tensor(s).reshape(-1)[0]) for s in (sigma, sigma_next)]
            snapped = [s if (k := on_grid(s)) is None else float(ratio[k]) for s in ends]
            return inside(path.brownian(*snapped))

        def denoiser(y: Any, sigma: Any, **extra: Any) -> Any:
            nonlocal in_model
            value = float(torch.as_tensor(sigma).reshape(-1)[0])
            level = path.at(-np.log(value)) if (k := on_grid(value)) is None else path.level(k)
            state = y * level.alpha
            before = _value(state)
            in_model = True
            try:
                denoised = inside(model(outside(state), level).denoised)
            finally:
                in_model = False
            if _changed(state, before):
                _assign(y, state / level.alpha)
            return denoised

        if "noise_sampler" in parameters:
            options.setdefault("noise_sampler", brownian if one_motion else lambda sigma, sigma_next: draw())
        if "disable" in parameters:
            options.setdefault("disable", True)  # k-diffusion's own progress bar
        x = inside(x) / float(path.alpha[0])
        exact = isinstance(x, Form) or x.dtype == torch.float64
        # a sigma of one dimension or more would raise a float32 state to its own float64
        sigmas = torch.tensor(ratio, dtype=torch.float64 if exact else torch.float32)
        with Draws():
            y = function(denoiser, x, sigmas if isinstance(x, Form) else sigmas.to(x.device), **options)
        return outside(y * float(path.alpha[-1])) if hasattr(y, "shape") else y

    solver.__name__ = getattr(function, "__name__", "kdiffusion")
    return solver


def _draws_from_a_tree(function: Callable[..., Any]) -> bool:
    """True if the code of the function, or of a function within it, refers to a Brownian tree."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    codes = [getattr(function, "__code__", None)]
    while codes:
        code = codes.pop()
        if code is None:
            continue
        if any("brownian" in name.lower() for name in (*code.co_names, *code.co_freevars)):
            return True
        codes += [constant for constant in code.co_consts if inspect.iscode(constant)]
    return False


def _value(state: Any) -> Any:
    return state.vector if isinstance(state, Form) else state.clone()


def _changed(state: Any, before: Any) -> bool:
    return state.vector is not before if isinstance(state, Form) else not bool((state == before).all())


def _assign(target: Any, value: Any) -> None:
    if isinstance(target, Form):
        target.vector = value.vector
    else:
        target.copy_(value)
