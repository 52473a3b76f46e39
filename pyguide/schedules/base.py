"""What every schedule is: pairs (alpha, sigma), and the grid of one sampling run."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..checks import as_float, number
from ..path import Floats, NoisePath, log_ratio
from .checks import _count, _descending, _numbers
from .curves import _shape_of_beta, _sigma_curve
from .respacing import _respaced

Spacing = Literal["leading", "trailing", "linspace"]
Sigmas = Literal["karras", "exponential", "beta"]
# lam is a difference of two logarithms below 40 in size: levels closer than their rounding are one level
ONE_LEVEL = 1e-13


class Schedule(ABC):
    """What (alpha, sigma) exist and what the model is told there. `path` makes the grid of one sampling run."""

    train_steps: int = 1000
    sigma_data: float = 0.5
    discrete: bool = False  # trained on whole timesteps, which models may index tables with
    exploding: bool = False  # alpha = 1: the first state is noise of the largest sigma, not of unit variance

    @abstractmethod
    def alpha_sigma(self, lam: float) -> tuple[float, float]:
        """(alpha, sigma) at lam = log(alpha / sigma); the limits at -inf and +inf included."""

    @abstractmethod
    def timestep_at(self, lam: float) -> float:
        """What the model is told at lam, interpolated in log sigma between training steps."""

    @abstractmethod
    def _timesteps(self, steps: int, spacing: Spacing, offset: int) -> Floats | None:
        """The schedule's own grid as timesteps [N]; None where it is a grid of sigmas (Karras)."""

    @abstractmethod
    def levels_of_timesteps(self, timesteps: Floats) -> tuple[Floats, Floats]:
        """(alpha, sigma) at training timesteps, fractional ones interpolated in log sigma."""

    @abstractmethod
    def _levels_of_sigmas(self, sigmas: Floats) -> tuple[Floats, Floats]:
        """(alpha, sigma) at sigmas in the schedule's own unit; sigma = 0 is clean data."""

    @abstractmethod
    def _sigma_range(self) -> tuple[float, float]:
        """Smallest and largest sigma that a sigma grid spans, in the unit of `sigmas`."""

    def path(
        self,
        steps: int | None = None,
        *,
        spacing: Spacing = "leading",
        offset: int = 0,
        timesteps: Sequence[float] | str | None = None,
        sigmas: Sigmas | Sequence[float] | None = None,
        rho: float = 7.0,
        beta: Sequence[float] = (0.6, 0.6),
        strength: float = 1.0,
        final_sigma: Literal["zero", "min"] | float = "zero",
    ) -> NoisePath:
        """The grid of one sampling run.

        steps: number of solver steps N. Optional when timesteps or sigmas are given as values or as a string of counts.
        spacing: how timesteps are spread over the T training ones: "leading" (i T//N + offset), "trailing" (from the
            last one down by T/N), "linspace" (from the last to the first, rounded), as in DDIM of diffusers. Other
            schedulers there spread N + 1 points or do not round: give `timesteps` (and `sigmas`) from one to get its
            grid. A flow path is continuous: leading and trailing are 1, 1-1/N, ..., 1/N, linspace ends at 1/T; an
            edm path has one grid, Karras'.
        timesteps: the timesteps themselves, descending; fractional ones are interpolated in log sigma. Together with
            `sigmas`, they are only what the model is told. On discrete schedules also a respacing string, "25",
            "ddim25" or "10,10,5", see `schedules.respace`.
        sigmas: "karras" (Karras et al. 2022, eq. 5, with rho), "exponential" (rho to infinity), "beta" (quantiles of a
            Beta distribution, Lee et al. 2024; needs scipy), all three from the schedule's largest sigma to its
            smallest; or descending values: sigma / alpha as in k-diffusion, on flow paths sigma itself, which is not
            shifted again. A trailing 0 is the end point, and so is the last of N + 1 sigmas beside N timesteps, as
            schedulers have them. Other lists go on to clean data.
        rho, beta: the exponent of "karras"; the two parameters of "beta".
        strength: in (0, 1], image-to-image: only the last int(N strength) steps are run.
        final_sigma: where the last step ends: "zero" at clean data, "min" at the schedule's smallest sigma. A grid
            whose own last point that is (all sigma grids, linspace, leading without offset) has N + 1 points then, the
            last of which is the end point. A number: at that sigma, in the unit of `sigmas`.
        Raises ValueError naming the argument.
        """
        made = {name: value for name, value in locals().items() if name != "self"}
        if spacing not in ("leading", "trailing", "linspace"):
            raise ValueError(f'spacing: expected "leading", "trailing" or "linspace", got {spacing!r}')
        if not (
            final_sigma in ("zero", "min") if isinstance(final_sigma, str) else 0 < as_float(final_sigma) < math.inf
        ):
            raise ValueError(f'final_sigma: expected "zero", "min" or a positive number, got {final_sigma!r}')
        strength = number("strength", strength, high=1.0, above=True)
        rho = number("rho", rho, 0.1, 1e3)  # beyond, sigma^(1/rho) or its power leaves float64
        beta = _shape_of_beta(beta)
        given_sigmas = self._given_sigmas(sigmas, final_sigma)
        given_times = self._given_timesteps(timesteps)
        if given_sigmas is None and given_times is not None:
            _descending("timesteps", given_times)
        if given_sigmas is not None and given_times is not None and len(given_sigmas) == len(given_times) + 1:
            final_sigma, given_sigmas = float(given_sigmas[-1]), given_sigmas[:-1]
        steps = _count(steps, given_times, given_sigmas)

        ends = {"zero": 0.0, "min": self._sigma_range()[0]}
        end = np.array([ends[final_sigma] if isinstance(final_sigma, str) else float(final_sigma)])
        end_alpha, end_sigma = self._levels_of_sigmas(end)
        furthest = log_ratio(end_alpha, end_sigma)[0] - ONE_LEVEL
        told = given_times
        if given_sigmas is not None:
            alpha, sigma = self._levels_of_sigmas(given_sigmas)
        elif sigmas is None and given_times is not None:
            alpha, sigma = self.levels_of_timesteps(given_times)
        else:
            curve = sigmas if isinstance(sigmas, str) else None
            alpha, sigma, times = self._grid(steps, spacing, offset, curve, rho, beta)
            if final_sigma == "min" and log_ratio(alpha, sigma)[-1] >= furthest:
                if self.discrete and times is not None and steps == self.train_steps:
                    raise ValueError(
                        f'final_sigma: "min" takes the last of {steps} training timesteps for the end point, which '
                        f"leaves at most {steps - 1} steps; got steps={steps}"
                    )
                alpha, sigma, times = self._grid(steps + 1, spacing, offset, curve, rho, beta)
                alpha, sigma, times = alpha[:-1], sigma[:-1], None if times is None else times[:-1]
            told = times if told is None else told
        if log_ratio(alpha, sigma)[-1] >= furthest:
            raise ValueError(
                f"final_sigma: {final_sigma!r} ends at sigma {end[0]:g}, where the last step would start or beyond; "
                'use "zero" or leave the last value out'
            )
        if told is None:
            told = np.array([self.timestep_at(lam) for lam in log_ratio(alpha, sigma).tolist()])
        begin = steps - min(int(steps * strength), steps)
        if begin == steps:
            raise ValueError(f"strength: {strength} of {steps} steps leaves no step to run")
        return NoisePath(
            alpha=np.append(alpha, end_alpha)[begin:],
            sigma=np.append(sigma, end_sigma)[begin:],
            timestep=told[begin:],
            schedule=self,
            init_scale=float(sigma[begin]) if self.exploding else 1.0,
            made=made,
        )

    def _grid(
        self, points: int, spacing: Spacing, offset: int, curve: str | None, rho: float, beta: Sequence[float]
    ) -> tuple[Floats, Floats, Floats | None]:
        """(alpha, sigma, timesteps) of a grid by name; the timesteps are None where they follow from the levels."""
        times = self._timesteps(points, spacing, offset) if curve is None else None
        if times is not None:
            return *self.levels_of_timesteps(times), times
        return *self._levels_of_sigmas(_sigma_curve(curve or "karras", points, *self._sigma_range(), rho, beta)), None

    def _given_sigmas(self, sigmas: str | Sequence[float] | None, final_sigma: str | float) -> Floats | None:
        """The sigmas that are given as values, without an end point 0."""
        if sigmas is None or isinstance(sigmas, str):
            return None
        values = _numbers("sigmas", sigmas)
        if len(values) > 1 and values[-1] == 0:
            if final_sigma != "zero":
                raise ValueError(f'final_sigma: expected "zero" with sigmas that end in 0, got {final_sigma!r}')
            values = values[:-1]
        _descending("sigmas", values)
        if values[-1] == 0:
            raise ValueError(f"sigmas: expected a positive value before the end point 0, got {sigmas!r}")
        return values

    def _given_timesteps(self, timesteps: str | Sequence[float] | None) -> Floats | None:
        """The timesteps that are given as values or as a respacing string."""
        if timesteps is None or not isinstance(timesteps, str):
            return None if timesteps is None else _numbers("timesteps", timesteps)
        if not self.discrete:
            raise ValueError(
                f"timesteps: the respacing string {timesteps!r} counts training timesteps, and "
                f"{type(self).__name__} has none: it is continuous; expected a number of steps, or values"
            )
        return np.array(_respaced("timesteps", timesteps, self.train_steps), np.float64)
