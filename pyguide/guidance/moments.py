"""What methods share whose weights depend on the branches themselves: on their norms, angles and deviations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..checks import number
from ..path import Floats
from ..plan import Plan
from .base import Axes, Guidance, Scale
from .program import Traced, trace


class MomentGuidance(Guidance):
    """Base class of the methods whose weights are functions of the moments of the branches.

    A subclass states its equation once, in the vocabulary of `guidance.vectors`:

        def guide(self, u, c, *, scale):
            d = c - u
            return c + (scale - 1) * (d - d.dot(c) / c.dot(c) * c)

    Every kernel runs the program that is traced from it, and the reference runs it with arrays. u, c, ...: one vector
    per branch, in the method's space; the others are scalars, those of `parameters`. A method that keeps arrays of its
    own from one evaluation to the next (`slots` of them, zeros at the start) takes these after the branches, and
    returns (guided, *slots).

    rescale: phi of Lin et al. 2023 (Common diffusion noise schedules and sample steps are flawed), eqs. 15 and 16: the
        guided output times phi std(c) / std(G) + 1 - phi, with the unbiased deviations of the sample in the method's
        space. 0 leaves it out. A deviation is the difference of two moments: where the mean is m deviations, 1e-7 m^2
        of it is rounding in float32.
    """

    def __init__(
        self,
        scale: Scale,
        *,
        rescale: float = 0.0,
        interval: tuple[float, float] | None = None,
        sigma_interval: tuple[float, float] | None = None,
        space: Literal["model", "denoised", "v"] = "model",
        batched: bool = True,
    ) -> None:
        super().__init__(scale, interval=interval, sigma_interval=sigma_interval, space=space, batched=batched)
        self.rescale = number("rescale", rescale)
        self._programs: dict[Any, Traced] = {}

    def guide(self, *vectors: Any, **scalars: Any) -> Any:
        """The method's equation: see the class."""
        raise NotImplementedError(f"{type(self).__name__}: has no guide()")

    def parameters(self, plan: Plan, batch: int) -> Mapping[str, Floats]:
        """The scalars of the equation by name, [R, B] each."""
        return {"scale": self.scales(plan, batch)}

    def computed(self, plan: Plan, batch: int) -> NDArray[np.bool_]:
        """[R, B] where the equation decides, and all branches run; elsewhere `table` does."""
        return np.asarray(self.acting(plan)[:, None] & (self.scales(plan, batch) != 1))

    def rescaled(self, guided: Any, cond: Any) -> Any:
        """The last line of most equations."""
        if self.rescale == 0:
            return guided
        return guided * (self.rescale * (cond.std() / guided.std()) + (1.0 - self.rescale))

    def traced(self, names: tuple[str, ...], state: int) -> Traced:
        """The program for a launch of `state` slots in all."""
        key = names, state
        if key not in self._programs:
            self._programs[key] = trace(
                self.guide, len(self.branches), self.slots, names, state=state, space=self.space
            )
        return self._programs[key]

    def __repr__(self) -> str:
        text = super().__repr__()
        return f"{text[:-1]}, rescale={self.rescale})" if self.rescale else text

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_programs": {}}


def checked_dim(name: str, dim: Axes) -> Axes:
    """One dim, several, or None; ValueError naming the argument."""
    given = dim if isinstance(dim, (tuple, list)) else () if dim is None else (dim,)
    if any(isinstance(axis, bool) or not isinstance(axis, int) for axis in given) or dim in ((), []):
        raise ValueError(f"{name}: expected a dim of [B, C, *], several that lie side by side, or None, got {dim!r}")
    return dim if dim is None else tuple(given)


def reduced(guidance: Guidance, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The dims of [B, C, *] over which a method takes moments, in order. ValueError naming its argument."""
    if guidance.dim is None:
        return tuple(range(1, len(shape)))
    given = (guidance.dim,) if isinstance(guidance.dim, int) else guidance.dim
    axes = sorted({axis % len(shape) if -len(shape) <= axis < len(shape) else 0 for axis in given})
    if axes[0] < 1 or len(axes) != len(given) or axes != list(range(axes[0], axes[-1] + 1)):
        name, dims = guidance.dim_name, given if len(given) > 1 else given[0]
        raise ValueError(f"{name}: expected dims side by side of a sample in {shape}, got {dims!r}")
    return tuple(axes)
