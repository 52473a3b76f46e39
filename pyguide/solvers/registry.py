"""The table of solver names, and the reference: a solver run with arrays and a real model."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from ..path import Level, NoisePath
from ..prediction import check_prediction, conversion
from ..reference import clamp, combine, exp
from ..trace import LearnedVariance, Output, Variance
from .aliases import Alias
from .aliases import find as find_alias
from .kdiffusion import adapt, is_kdiffusion

Solver = Callable[..., Any]


@dataclass(frozen=True)
class Entry:
    """A registered solver.

    order: global order of convergence of its steps with default options, to the solution of the probability-flow ODE,
    or weakly to the law of the data if it is stochastic; None for the samplers of distilled models, which converge to
    neither. started: of a whole run, where its own first and last steps are of lower order. source: paper or code.
    """

    name: str
    function: Solver
    order: int | None
    started: int | None
    source: str


_SOLVERS: dict[str, Entry] = {}


def solver(
    name: str, *, order: int | None = None, started: int | None = None, source: str = ""
) -> Callable[[Solver], Solver]:
    """Register a solver function under its name, with what `Entry` says about it."""

    def register(function: Solver) -> Solver:
        if name in _SOLVERS:
            raise ValueError(f"solver: the name {name!r} is taken by {_SOLVERS[name].function.__module__}")
        _SOLVERS[name] = Entry(name, function, order, started if started is not None else order, source)
        return function

    return register


def names() -> list[str]:
    """The solvers' own names, sorted; `pyguide.compile` and `solvers.sample` accept their aliases too."""
    return sorted(_SOLVERS)


def entry(name: str) -> Entry:
    """What is registered under a solver's own name."""
    return _SOLVERS[name]


def alias(name: str) -> Alias:
    """What a name stands for: a solver's own name, options, and the arguments of `Schedule.path` that it asks for.

    >>> alias("DPM++ 2M Karras")
    Alias(solver='dpmpp_2m', options={}, path={'sigmas': 'karras'})
    """
    return Alias(name) if name in _SOLVERS else find_alias(name, _SOLVERS)


def resolve(choice: str | Solver) -> Solver:
    """The solver function of a name or an alias, or a callable as it is; a k-diffusion function is adapted."""
    if isinstance(choice, str):
        return _SOLVERS[alias(choice).solver].function
    if not callable(choice):
        raise TypeError(f"solver: expected a name or a function, got {type(choice).__name__}")
    return adapt(choice) if is_kdiffusion(choice) else choice


@dataclass(frozen=True)
class Prepared:
    """A solver with all that its name stands for: the function, its options and the path that it runs on."""

    name: str
    function: Solver
    path: NoisePath
    options: dict[str, Any]


def prepare(choice: str | Solver, path: NoisePath, options: dict[str, Any]) -> Prepared:
    """Resolve a name, with the options and the grid that come with it; errors name the argument."""
    if not isinstance(path, NoisePath):
        raise TypeError(f"path: expected a NoisePath from Schedule.path(...), got {type(path).__name__}")
    if isinstance(choice, str):
        stands_for = alias(choice)
        name, function = stands_for.solver, _SOLVERS[stands_for.solver].function
        path = _on_grid(choice, path, stands_for.path)
        defaults = {key: value(path) if callable(value) else value for key, value in stands_for.options.items()}
        options = {**defaults, **options}
    else:
        function, name = resolve(choice), getattr(choice, "__name__", "function")
    check_options(function, options)
    return Prepared(name, function, path, options)


def _on_grid(name: str, path: NoisePath, wanted: dict[str, Any]) -> NoisePath:
    """The path, on the grid that an alias asks for: "DPM++ 2M Karras" turns a path that names no sigmas into Karras'.

    Refused where the caller has named another grid, or has its start in use already (image-to-image).
    """
    made = path.made or {}
    if all(made.get(key) == value for key, value in wanted.items()):
        return path
    asks = ", ".join(f"{key}={value!r}" for key, value in wanted.items())
    if made.get("timesteps") is not None or made.get("sigmas") is not None or path.made is None:
        raise ValueError(f"path: {name!r} asks for {asks}, but the path was made with a grid of its own")
    if made["strength"] != 1.0:
        raise ValueError(f"path: {name!r} asks for {asks}; give it to path(...) itself, where noise_at starts from it")
    return path.remade(**wanted)


def check_options(function: Solver, options: dict[str, Any]) -> None:
    """TypeError naming the option that the solver does not have, and those that it has."""
    parameters = inspect.signature(function).parameters.values()
    if not any(p.name == "noise" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise TypeError(f"solver: expected f(model, x, path, *, noise, **options), got f{inspect.signature(function)}")
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "noise"]
    for name in options:
        if name not in known:
            has = f"its options are {', '.join(known)}" if known else "it has no options"
            raise TypeError(f"{name}: {getattr(function, '__name__', 'the solver')} has no such option; {has}")


def clip_bounds(clip: float | tuple[float, float] | None) -> tuple[float, float]:
    """(low, high) of a clip given as a bound, a pair or None; ValueError naming clip."""
    if clip is None:
        return -np.inf, np.inf
    try:
        low, high = map(float, clip if isinstance(clip, (tuple, list, np.ndarray)) else (-clip, clip))
    except (TypeError, ValueError):
        low = high = np.nan
    if not low < high:
        raise ValueError(f"clip: expected a positive bound or (low, high) with low < high, got {clip!r}")
    return low, high


def sample(
    solver: str | Solver,
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    *,
    prediction: str = "epsilon",
    noise: Callable[[int], Any] | None = None,
    clip: float | tuple[float, float] | None = None,
    **options: Any,
) -> Any:
    """The reference sampler: the solver function itself, run with arrays in the dtype of x.

    model(x, t) -> output, x [B, C, *], t [B]; the output is what `prediction` says, and C more channels where the
    solver learns its variance (`Output.gaussian`). x: the state at the first grid point. noise(i): standard normal
    array like x, drawn in step i; default: torch's (numpy's) global generator. Returns the state at the end of the
    path, a new array. Raises ValueError or TypeError naming the argument.
    """
    run = prepare(solver, path, options)
    if not (x.dtype.kind == "f" if isinstance(x, np.ndarray) else x.is_floating_point()):
        raise ValueError(f"x: expected floating point numbers, got {x.dtype}")
    adapted = ArrayModel(model, run.path, prediction, clip_bounds(clip), dtype=x.dtype)
    start = x.copy() if isinstance(x, np.ndarray) else x.clone()  # a solver may write to its state, not to the caller's
    draw = noise or _global_noise(x)

    def checked(step: int) -> Any:
        z = draw(step)
        if tuple(z.shape) != tuple(x.shape):
            raise ValueError(f"noise: expected an array of x's shape {tuple(x.shape)}, got {tuple(z.shape)}")
        return z

    result = run.function(adapted, start, run.path.drawing(checked), noise=checked, **run.options)
    adapted.settle()
    # numpy promotes float32 arrays by the path's float64 scalars: more accurate in between, the caller's dtype at both
    # ends
    return result.astype(x.dtype, copy=False) if isinstance(result, np.ndarray) else result


class ArrayModel:
    """A network as `model(x, level)`: scales its input, tells it the timestep, converts its prediction.

    learned: whether the network returns 2C channels, prediction and variance; None: as the first transition asks.
    gradient(i): g, by which the mean of the transition out of evaluation i is shifted, mean + Sigma g.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        path: NoisePath,
        prediction: str,
        clip: tuple[float, float],
        before: Callable[[int, Any], None] | None = None,
        dtype: Any = None,
        learned: bool | None = None,
        gradient: Callable[[int], Any] | None = None,
    ) -> None:
        check_prediction(prediction)
        self.dtype, self.learned, self.gradient = dtype, learned, gradient
        self.network, self.path, self.prediction, self.clip, self.before = network, path, prediction, clip, before
        self.evaluations = 0
        self.got: tuple[Any, Any] = ((), ())  # shapes of the last input and output
        self.whole = path.schedule.discrete and bool((path.timestep == np.round(path.timestep)).all())

    def __call__(self, x: Any, level: int | Level) -> Output:
        self.settle()
        here = level if isinstance(level, Level) else self.path.level(level)
        c = conversion(self.prediction, here, self.path.schedule.sigma_data)
        if self.before is not None:
            self.before(self.evaluations, x)
        evaluation, self.evaluations = self.evaluations, self.evaluations + 1
        told = x if c.c_in == 1 else x * c.c_in
        if isinstance(told, np.ndarray) and self.dtype is not None:
            told = told.astype(self.dtype, copy=False)
        out = self.network(told, _times(here.timestep, self.whole and here.timestep.is_integer(), told))
        self.got, v = (tuple(x.shape), tuple(out.shape)), None
        if self.got[1] == _doubled(self.got[0]) and self.learned is not False:
            out, v = out[:, : x.shape[1]], out[:, x.shape[1] :]
        elif self.got[1] != self.got[0] or self.learned:
            self._refuse()
        denoised = clamp(combine([(c.a_x, x), (c.a_m, out)], x), *self.clip)
        noise = combine([(c.e_x, x), (c.e_m, out)], x)
        return Output(denoised, lambda: noise, functools.partial(self._gaussian, evaluation, v))

    def _gaussian(self, evaluation: int, v: Any, mean: Any, variance: Variance, z: Any) -> Any:
        """mean + Sigma g + sqrt(Sigma) z, in the dtype of the mean."""
        deviation: Any
        if isinstance(variance, LearnedVariance):
            self.learned = True
            if v is None:
                self._refuse()
            v = v.astype(mean.dtype, copy=False) if isinstance(v, np.ndarray) else v.to(mean.dtype)
            deviation = exp((v + 1) * (0.25 * (variance.high - variance.low)) + 0.5 * variance.low)
        else:
            deviation = math.sqrt(variance)
        x = mean if z is None else mean + z * deviation
        return x if self.gradient is None else x + self.gradient(evaluation) * deviation**2

    def settle(self) -> None:
        """ValueError if the network returns a variance, and the solver has none: it draws before it goes on."""
        if self.learned is None and self.evaluations:
            self.learned = False
            if self.got[1] != self.got[0]:
                self._refuse()

    def _refuse(self) -> NoReturn:
        x, got = self.got
        wanted = f"{x}"
        if self.learned:
            wanted = f"{_doubled(x) or '[B, 2C, *]'}, C channels and as many of its learned variance"
        raise ValueError(f"model: expected an output of shape {wanted}, got {got}")


def _doubled(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """[B, 2C, *] for [B, C, *]; None for an array without channels, beside which there is no variance."""
    return (shape[0], 2 * shape[1], *shape[2:]) if len(shape) > 1 else None


def _times(timestep: float, whole: bool, x: Any) -> Any:
    """[B] timesteps, where x is: see `time_dtype`."""
    count = x.shape[0] if len(x.shape) else 1
    dtype = time_dtype(whole, str(x.dtype).endswith("float64"))
    if isinstance(x, np.ndarray):
        return np.full(count, timestep, dtype)
    import torch

    return torch.full((count,), timestep, dtype=getattr(torch, dtype), device=x.device)


def time_dtype(whole: bool, double: bool) -> str:
    """What timesteps are told in: float64 beside float64 states, int64 if all are whole numbers, else float32."""
    return "float64" if double else "int64" if whole else "float32"


def _global_noise(x: Any) -> Callable[[int], Any]:
    if isinstance(x, np.ndarray):
        return lambda step: np.asarray(np.random.standard_normal(x.shape), x.dtype)  # noqa: NPY002  the global one is meant
    import torch

    return lambda step: torch.randn_like(x)
