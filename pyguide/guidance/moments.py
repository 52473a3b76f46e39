"""What methods share whose weights depend on the branches themselves: on their norms, angles and deviations."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import number
from ..path import Floats
from ..plan import Plan
from .base import Axes, Guidance, Interval, Scale, Space
from .program import RESERVED, Traced, trace
from .vectors import where


class MomentGuidance(Guidance):
    """Base class of the methods whose weights are functions of the moments of the branches.

    A subclass states its equation once, in the vocabulary of `guidance.vectors`:

        def guide(self, u, c, *, scale):
            d = c - u
            return c + (scale - 1) * (d - d.dot(c) / c.dot(c) * c)

    Every kernel runs the program that is traced from it, and the reference runs it with arrays. u, c, ...: one vector
    per branch, in the order of `branches` and in the method's space; the others are scalars, those that `names` lists
    and `parameters` gives. A method that keeps arrays of its own from one evaluation to the next (`slots` of them,
    zeros at the start of a run) takes these after the branches, and returns (guided, *slots). Where it does not act
    (`computed`) the branch "cond" is called alone, or the last one if none has that name.

    rescale: phi of Lin et al. 2023 (Common diffusion noise schedules and sample steps are flawed), eqs. 15 and 16: the
        guided output times phi std(c) / std(G) + 1 - phi, with the unbiased deviations of the sample in the method's
        space. 0 leaves it out. A deviation is the difference of two moments: where the mean is m deviations, 1e-7 m^2
        of it is rounding in float32.
    """

    names: tuple[str, ...] = ("scale",)  # of the scalars of the equation
    neutral_scale: float | None = None  # at which the equation is known to be the branch "cond", which then runs alone

    def __init__(
        self,
        scale: Scale,
        *,
        rescale: float = 0.0,
        interval: Interval = None,
        sigma_interval: Interval = None,
        space: Space = "model",
        batched: bool = True,
    ) -> None:
        super().__init__(scale, interval=interval, sigma_interval=sigma_interval, space=space, batched=batched)
        self.rescale = number("rescale", rescale, 0.0, 1.0)
        self._programs: dict[Any, Traced] = {}

    def guide(self, *vectors: Any, **scalars: Any) -> Any:
        """The method's equation: see the class."""
        raise NotImplementedError(f"{type(self).__name__}: has no guide()")

    def parameters(self, plan: Plan, batch: int) -> Mapping[str, Floats]:
        """The scalars of the equation by name, [R, B] each."""
        return {"scale": self.scales(plan, batch)}

    def computed(self, plan: Plan, batch: int) -> NDArray[np.bool_]:
        """[R, B] where the equation decides: inside the intervals, but for samples of the neutral scale."""
        acting = np.broadcast_to(self.acting(plan)[:, None], (plan.evaluations, batch))
        return acting if self.neutral_scale is None else acting & (self.scales(plan, batch) != self.neutral_scale)

    def table(self, plan: Plan, batch: int) -> Floats:
        """Weights [R, B, K] where the equation does not act."""
        return self.conditional_alone(plan, batch)

    def equation(self, *vectors: Any, **scalars: Any) -> tuple[Any, ...]:
        """(guided, *slots): `guide` and the rescaling."""
        answer = self.guide(*vectors, **scalars)
        guided, *kept = answer if isinstance(answer, tuple) else (answer,)
        if self.rescale and hasattr(guided, "std"):
            length = guided.std()
            ratio = vectors[self.conditional].std() / where(length > 0.0, length, 1.0)
            guided = guided * where(length > 0.0, self.rescale * ratio + (1.0 - self.rescale), 1.0)
        return (guided, *kept)

    def traced(self, state: int) -> Traced:
        """The program for a launch of `state` slots in all; TypeError or ValueError naming what guide() cannot say."""
        numbers = {k: v for k, v in vars(self).items() if isinstance(v, (int, float, str, tuple, type(None)))}
        key = state, *sorted(numbers.items())
        if key not in self._programs:
            taken = set(self.names) & set(RESERVED)
            if taken:
                raise ValueError(f"names: {sorted(taken)} are names of the kernel's own, in {type(self).__name__}")
            try:
                self._programs[key] = trace(
                    self.equation, len(self.branches), self.slots, self.names, state=state, space=self.space
                )
            except (TypeError, ValueError) as error:
                raise type(error)(f"{type(self).__name__}: {error}") from error
        return self._programs[key]

    def __repr__(self) -> str:
        text = super().__repr__()[:-1]
        text += f", rescale={self.rescale}" if self.rescale else ""
        text += f", space={self.space!r}" if self.space != "model" else ""
        return text + ")"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_programs": {}}


class ScaleGuidance(MomentGuidance):
    """Base class of the methods whose weights are their scales, `table`: they need moments for `rescale` alone."""

    def computed(self, plan: Plan, batch: int) -> NDArray[np.bool_]:
        weights = self.table(plan, batch)
        alone = np.arange(len(self.branches)) == self.conditional
        return np.asarray(self.acting(plan)[:, None] & (self.rescale != 0) & (weights != alone).any(axis=-1))


def checked_dim(name: str, dim: Axes) -> Axes:
    """One dim, several, or None; ValueError naming the argument."""
    if dim is None:
        return None
    try:
        given = tuple(operator.index(axis) for axis in (dim if isinstance(dim, (tuple, list)) else (dim,)))
    except TypeError:
        given = ()
    if not given or isinstance(dim, bool):
        raise ValueError(f"{name}: expected a dim of [B, C, *], several that lie side by side, or None, got {dim!r}")
    return given


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
