"""What every guidance method shares: a scale, the steps in which it acts, and the weights of each evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..path import Floats
from ..plan import Plan

Scale = Any  # a number, an array [B], or a function (step, steps) -> number
Space = Literal["model", "denoised", "v"]
Interval = tuple[float, float] | None
Axes = int | tuple[int, ...] | None
Checked = Floats | Callable[[int, int], float]


class Scheduled:
    """A scale, and the steps in which it acts: what classifier-free and classifier guidance share.

    scale: a number, one per sample [B], or a function of (step, steps), which may be asked more than once.
    interval: (a, b), the method acts in the steps with a <= step / steps < b.
    sigma_interval: (low, high), the same in noise levels: low < sigma <= high for the `plan.sigma` that the step starts
        at. Published intervals (Kynkaanniemi et al. 2024) are in sigma / alpha: s is s / sqrt(1 + s^2) on a
        variance-preserving path. All evaluations of a step are treated alike.
    """

    shown: tuple[str, ...] = ("scale",)  # by repr
    neutral: float  # the scale outside the intervals, at which the method does nothing

    def __init__(
        self,
        scale: Scale,
        *,
        interval: Interval = None,
        sigma_interval: Interval = None,
    ) -> None:
        for name, pair in (("interval", interval), ("sigma_interval", sigma_interval)):
            if pair is not None and not _ordered(pair):
                raise ValueError(f"{name}: expected (low, high) with low <= high, got {pair!r}")
        if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"interval: expected fractions of the steps in [0, 1], got {interval!r}")
        self.scale = scale
        self.interval, self.sigma_interval = interval, sigma_interval

    @property
    def scale(self) -> Checked:
        return self._scale

    @scale.setter
    def scale(self, scale: Scale) -> None:
        self._scale = checked("scale", scale)

    def scales(self, plan: Plan, batch: int) -> Floats:
        """The scale of every evaluation and sample, [R, B] float64; `neutral` outside the intervals."""
        return self.scheduled("scale", self.scale, plan, batch, self.neutral)

    def scheduled(self, name: str, scale: Checked, plan: Plan, batch: int, outside: float) -> Floats:
        """A scale of every evaluation and sample, [R, B]; `outside` outside the intervals."""
        steps = plan.steps
        if callable(scale):
            try:
                answers = {step: scale(step, steps) for step in dict.fromkeys(plan.step.tolist())}
            except TypeError as error:
                raise TypeError(f"{name}: a function of (step, steps) is called, and {error}") from error
            values = {step: _finite(name, answer) for step, answer in answers.items()}
            if any(value.ndim for value in values.values()):
                raise ValueError(f"{name}: a function of (step, steps) must return a number")
            column = np.array([float(values[step]) for step in plan.step.tolist()])
            table = np.broadcast_to(column[:, None], (plan.evaluations, batch))
        else:
            if scale.ndim and scale.shape != (batch,):
                hint = "; guidance.scales.Table has one per step" if scale.shape == (steps,) else ""
                raise ValueError(
                    f"{name}: expected a number or one per sample ({batch}), got shape {scale.shape}{hint}"
                )
            table = np.broadcast_to(scale, (plan.evaluations, batch))
        return np.where(self.acting(plan)[:, None], table, outside)

    def acting(self, plan: Plan) -> NDArray[np.bool_]:
        """[R] which evaluations lie inside the intervals."""
        acting = np.ones(plan.evaluations, bool)
        if self.interval is not None:
            part = plan.step / plan.steps
            acting &= (part >= self.interval[0]) & (part < self.interval[1])
        if self.sigma_interval is not None:
            start = plan.sigma[np.searchsorted(plan.step, plan.step)]  # of the first evaluation of the step
            acting &= (start > self.sigma_interval[0]) & (start <= self.sigma_interval[1])
        return acting

    def __repr__(self) -> str:
        shown = [*self.shown, *(name for name in ("interval", "sigma_interval") if getattr(self, name) is not None)]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)}' for name in shown)})"


class Guidance(Scheduled):
    """Base class of the methods that combine the outputs of branches.

    scale: 1 is purely conditional, 0 purely unconditional, more is stronger; the papers' w is scale - 1. Outside
        `interval` and `sigma_interval` (see `Scheduled`) the method is purely conditional: the other branches are not
        run.
    batched: call the model once for all branches (stacked, unconditional first), or once per branch.
    space: where the branches are combined. For weights that sum to 1 the spaces are equal, each prediction being an
        affine map of the others at the same x.
    """

    neutral = 1.0
    branches: tuple[str, ...] = ("uncond", "cond")
    models: Mapping[str, Any] = {}  # of branches that another model is called for
    dim: Axes = None  # of [B, C, *], over which moments are taken; None: all of a sample
    dim_name = "dim"  # of the argument that gives them
    slots = 0  # arrays of its own that it keeps from one evaluation to the next
    defaults: Mapping[str, str] = {}  # branches whose conditions are those of another one unless they are given

    def __init__(
        self,
        scale: Scale,
        *,
        interval: Interval = None,
        sigma_interval: Interval = None,
        space: Space = "model",
        batched: bool = True,
    ) -> None:
        super().__init__(scale, interval=interval, sigma_interval=sigma_interval)
        if space not in ("model", "denoised", "v"):
            raise ValueError(f'space: expected "model", "denoised" or "v", got {space!r}')
        self.space, self.batched = space, bool(batched)

    @property
    def conditional(self) -> int:
        """The index of the branch "cond", or of the last one if none has that name."""
        return self.branches.index("cond") if "cond" in self.branches else len(self.branches) - 1

    def conditional_alone(self, plan: Plan, batch: int) -> Floats:
        """Weights [R, B, K] of that branch and no other."""
        table = np.zeros((plan.evaluations, batch, len(self.branches)))
        table[..., self.conditional] = 1.0
        return table

    @property
    def per_sample(self) -> bool:
        """Whether its scales are those of samples, and not the same for all of a batch."""
        return any(getattr(scale, "ndim", 0) for scale in self.all_scales)

    @property
    def all_scales(self) -> tuple[Checked, ...]:
        return (self.scale,)

    def table(self, plan: Plan, batch: int) -> Floats:
        """Weights [R, B, K] of the branches; one of exactly 0 drops the branch. Here those of two branches."""
        scale = self.scales(plan, batch)
        return np.stack([1.0 - scale, scale], axis=-1)

    def computed(self, plan: Plan, batch: int) -> NDArray[np.bool_]:
        """[R, B] where weights come from the outputs themselves, and all branches run, instead of from `table`."""
        return np.zeros((plan.evaluations, batch), bool)

    def second(self, plan: Plan, batch: int) -> Floats | None:
        """Weights [R, B, K] of U, what the noise estimate is made of, if it is another combination than G."""
        return None


def checked(name: str, scale: Scale) -> Checked:
    """A scale as float64, or as the function that it is; ValueError or TypeError naming it."""
    if hasattr(scale, "parameters"):
        got = f"the module {type(scale).__name__}"
        raise TypeError(f"{name}: expected a number, one per sample, or a function (step, steps), got {got}")
    return scale if callable(scale) else _finite(name, scale)


def _ordered(pair: Any) -> bool:
    try:
        low, high = pair
        return bool(low <= high)
    except (TypeError, ValueError):
        return False


def _finite(name: str, scale: Any) -> Floats:
    if isinstance(scale, (str, Mapping)):
        raise TypeError(f"{name}: expected a number, one per sample, or a function (step, steps), got {scale!r}")
    values = np.array(scale.tolist() if hasattr(scale, "tolist") else scale, np.float64)
    if values.ndim > 1 or not np.isfinite(values).all():
        raise ValueError(f"{name}: expected a finite number, one per sample, or a function, got {scale!r}")
    return values
