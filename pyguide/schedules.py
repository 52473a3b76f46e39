"""Noise schedules and the grids that samplers walk on.

A state is x = alpha x0 + sigma noise. A `Schedule` says which pairs (alpha, sigma) exist and what the model is told
there; `Schedule.path` picks a grid of them, in float64, from the noisiest to the cleanest:

    variance preserving   alpha^2 + sigma^2 = 1     DDPM models, 1,000 discrete training steps (Ho et al. 2020)
    flow                  alpha + sigma = 1         flow matching, rectified flow (Lipman et al. 2023)
    edm                   alpha = 1                 variance exploding, continuous (Karras et al. 2022)

lam = log(alpha / sigma) is half the log signal-to-noise ratio; it is -inf at pure noise and +inf at clean data.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np

from .path import Floats, NoisePath, log_ratio

Spacing = Literal["leading", "trailing", "linspace"]
Sigmas = Literal["karras", "exponential"]


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
        timesteps: Sequence[float] | None = None,
        sigmas: Sigmas | Sequence[float] | None = None,
        rho: float = 7.0,
        strength: float = 1.0,
        final_sigma: Literal["zero", "min"] = "zero",
    ) -> NoisePath:
        """The grid of one sampling run.

        steps: number of solver steps N. Optional when timesteps or sigmas are sequences.
        spacing: how timesteps are spread over the T training ones: "leading" (i T//N + offset), "trailing" (from the
            last one down by T/N), "linspace" (from the last to the first, rounded), as in DDIM of diffusers. Other
            schedulers there spread N + 1 points or do not round: give `timesteps` (and `sigmas`) from one to get its
            grid. A flow path is continuous: leading and trailing are 1, 1-1/N, ..., 1/N, linspace ends at 1/T; an
            edm path has one grid, Karras'.
        timesteps: the timesteps themselves, descending; fractional ones are interpolated in log sigma. Together with
            `sigmas`, they are only what the model is told.
        sigmas: "karras" (Karras et al. 2022, eq. 5, with rho), "exponential" (rho to infinity), or descending values:
            sigma / alpha as in k-diffusion, on flow paths sigma itself. A trailing 0 is the end point.
        strength: in (0, 1], image-to-image: only the last int(N strength) steps are run.
        final_sigma: where the last step ends: "zero" at clean data, "min" at the schedule's smallest sigma.
        Raises ValueError naming the argument.
        """
        made = {name: value for name, value in locals().items() if name != "self"}
        if spacing not in ("leading", "trailing", "linspace"):
            raise ValueError(f'spacing: expected "leading", "trailing" or "linspace", got {spacing!r}')
        if final_sigma not in ("zero", "min"):
            raise ValueError(f'final_sigma: expected "zero" or "min", got {final_sigma!r}')
        if not 0.0 < strength <= 1.0:
            raise ValueError(f"strength: expected a number in (0, 1], got {strength}")
        if not 0.1 <= rho <= 1e3:  # beyond, sigma^(1/rho) or its power leaves float64
            raise ValueError(f"rho: expected a number in [0.1, 1000], got {rho}")
        given_sigmas = None if sigmas is None or isinstance(sigmas, str) else _numbers("sigmas", sigmas)
        if given_sigmas is not None and len(given_sigmas) > 1 and given_sigmas[-1] == 0:
            given_sigmas = given_sigmas[:-1]
        given_times = None if timesteps is None else _numbers("timesteps", timesteps)
        if given_sigmas is not None:
            _descending("sigmas", given_sigmas)
            if given_sigmas[-1] == 0:
                raise ValueError(f"sigmas: expected a positive value before the end point 0, got {sigmas!r}")
        elif given_times is not None:
            _descending("timesteps", given_times)
        steps = _count(steps, given_times, given_sigmas)

        told = given_times
        if sigmas is None and told is None:
            told = self._timesteps(steps, spacing, offset)
            sigmas = "karras" if told is None else None
        if given_sigmas is not None:
            alpha, sigma = self._levels_of_sigmas(given_sigmas)
        elif isinstance(sigmas, str):
            # with final_sigma="min" a sigma grid arrives at the smallest sigma as its end point
            curve = self._sigma_curve(sigmas, steps if final_sigma == "zero" else steps + 1, rho)
            alpha, sigma = self._levels_of_sigmas(curve[:steps])
        else:
            assert told is not None
            alpha, sigma = self.levels_of_timesteps(told)
        if told is None:
            told = np.array([self.timestep_at(lam) for lam in log_ratio(alpha, sigma).tolist()])
        end = 0.0 if final_sigma == "zero" else self._sigma_range()[0]
        end_alpha, end_sigma = self._levels_of_sigmas(np.array([end]))
        if not end_sigma[0] * alpha[-1] < sigma[-1] * end_alpha[0]:
            raise ValueError(f'final_sigma: the grid is at the smallest sigma {end:g} before its end point; use "zero"')
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

    def _sigma_curve(self, name: str, points: int, rho: float) -> Floats:
        """Karras: (max^(1/rho) + i/(n-1) (min^(1/rho) - max^(1/rho)))^rho; exponential: linear in log sigma."""
        low, high = self._sigma_range()
        ramp = np.linspace(0.0, 1.0, points)
        if name == "karras":
            return _ends((high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho, high, low)
        if name == "exponential":
            return _ends(np.exp(math.log(high) + ramp * (math.log(low) - math.log(high))), high, low)
        raise ValueError(f'sigmas: expected "karras", "exponential" or a sequence, got {name!r}')


def _ends(curve: Floats, high: float, low: float) -> Floats:
    """The curve with its ends exact: a root and a power do not undo each other to the last bit."""
    curve[0] = high
    if len(curve) > 1:
        curve[-1] = low
    return curve


def _numbers(name: str, values: Sequence[float] | Floats) -> Floats:
    try:
        array = np.array(values, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected a sequence of numbers, got {values!r}") from None
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name}: expected a sequence of numbers, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: every value must be finite, got {array}")
    return array


def _descending(name: str, values: Floats) -> None:
    if not (values >= 0).all():
        raise ValueError(f"{name}: expected values >= 0, got {values.min():g}")
    if not (values[1:] < values[:-1]).all():
        i = int(np.argmin(values[1:] < values[:-1]))
        raise ValueError(
            f"{name}: expected strictly descending values, got {values[i]:g} then {values[i + 1]:g} at step {i}"
        )


def _integer(name: str, value: object, low: int) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = low - 1
    if number < low or isinstance(value, bool):
        raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")
    return number


def _in_range(name: str, values: Floats, high: float) -> None:
    if not ((values >= 0) & (values <= high)).all():
        raise ValueError(f"{name}: expected values in [0, {high:g}], got {values.max():g} to {values.min():g}")


def _count(steps: int | None, timesteps: Floats | None, sigmas: Floats | None) -> int:
    for name, given in (("timesteps", timesteps), ("sigmas", sigmas)):
        if given is None:
            continue
        if steps is not None and steps != len(given):
            raise ValueError(f"{name}: {len(given)} values were given for steps={steps}")
        steps = len(given)
    if timesteps is not None and sigmas is not None and len(timesteps) != len(sigmas):
        raise ValueError(f"timesteps: {len(timesteps)} values were given beside {len(sigmas)} sigmas")
    return _integer("steps", steps, 1)


class VariancePreserving(Schedule):
    """Discrete schedule of a DDPM: alpha_t = sqrt(alphas_cumprod[t]), sigma_t = sqrt(1 - alphas_cumprod[t])."""

    discrete = True

    def __init__(self, alphas_cumprod: Sequence[float] | Floats) -> None:
        table = _numbers("alphas_cumprod", alphas_cumprod)
        if table.size < 2:
            raise ValueError(f"alphas_cumprod: expected at least 2 values, got shape {table.shape}")
        if not (table[1:] < table[:-1]).all() or table[-1] < 0 or table[0] >= 1:
            raise ValueError("alphas_cumprod: expected finite, strictly descending values in [0, 1)")
        table.setflags(write=False)
        self.alphas_cumprod = table
        self.train_steps = len(table)
        self._lam = 0.5 * (log_ratio(table, 1.0 - table))
        self._known = np.isfinite(self._lam)  # a zero terminal SNR has lam = -inf at the last step

    def alpha_sigma(self, lam: float) -> tuple[float, float]:
        if lam == math.inf:
            return 1.0, 0.0
        if lam < 0:  # exp(lam) is small: no cancellation on either side
            ratio = math.exp(lam)
            return ratio / math.hypot(1.0, ratio), 1.0 / math.hypot(1.0, ratio)
        ratio = math.exp(-lam)
        return 1.0 / math.hypot(1.0, ratio), ratio / math.hypot(1.0, ratio)

    def timestep_at(self, lam: float) -> float:
        if lam == -math.inf:
            return float(self.train_steps - 1)
        times = np.arange(self.train_steps)[self._known]
        return float(np.interp(-lam, -self._lam[self._known], times))

    def levels_of_timesteps(self, timesteps: Floats) -> tuple[Floats, Floats]:
        _in_range("timesteps", timesteps, self.train_steps - 1)
        whole = timesteps.astype(int)
        alpha, sigma = np.sqrt(self.alphas_cumprod[whole]), np.sqrt(1.0 - self.alphas_cumprod[whole])
        for i in np.flatnonzero(timesteps != whole):
            below, above = self._lam[whole[i]], self._lam[whole[i] + 1]
            if not math.isfinite(above):
                raise ValueError(f"timesteps: {timesteps[i]:g} has no level, log sigma is infinite at {whole[i] + 1}")
            lam = below + (timesteps[i] - whole[i]) * (above - below)
            alpha[i], sigma[i] = self.alpha_sigma(float(lam))
        return alpha, sigma

    def _levels_of_sigmas(self, sigmas: Floats) -> tuple[Floats, Floats]:
        root = np.hypot(1.0, sigmas)
        return 1.0 / root, sigmas / root

    def _sigma_range(self) -> tuple[float, float]:
        lam = self._lam[self._known]
        return math.exp(-lam[0]), math.exp(-lam[-1])

    def _timesteps(self, steps: int, spacing: Spacing, offset: int) -> Floats | None:
        total = self.train_steps
        offset = _integer("offset", offset, 0)
        if steps > total:
            raise ValueError(f"steps: expected at most the {total} training steps, got {steps}")
        if spacing == "leading":
            times = np.arange(steps, dtype=np.float64)[::-1] * (total // steps) + offset
        elif spacing == "trailing":
            # in floating point the range can hold one value too many (61 steps of 1000)
            times = np.round(np.arange(total, 0, -total / steps)[:steps]) - 1
        else:
            times = np.linspace(0, total - 1, steps)[::-1].round() if steps > 1 else np.array([total - 1.0])
        if times[0] > total - 1:
            raise ValueError(f"offset: {offset} moves timestep {times[0]:g} out of [0, {total - 1}]")
        return times


class Flow(Schedule):
    """Flow matching: x = (1 - sigma) x0 + sigma noise, the model is told train_steps * sigma.

    shift moves the grid toward noise: sigma <- shift sigma / (1 + (shift - 1) sigma) (Esser et al. 2024, eq. 23).
    """

    def __init__(self, shift: float = 1.0, train_steps: int = 1000) -> None:
        if not (math.isfinite(shift) and shift > 0):
            raise ValueError(f"shift: expected a positive number, got {shift}")
        self.shift, self.train_steps = float(shift), _integer("train_steps", train_steps, 1)

    def alpha_sigma(self, lam: float) -> tuple[float, float]:
        if lam >= 0:
            ratio = math.exp(-lam)
            return 1.0 / (1.0 + ratio), ratio / (1.0 + ratio)
        ratio = math.exp(lam)
        return ratio / (1.0 + ratio), 1.0 / (1.0 + ratio)

    def timestep_at(self, lam: float) -> float:
        return self.train_steps * self.alpha_sigma(lam)[1]

    def _levels_of_sigmas(self, sigmas: Floats) -> tuple[Floats, Floats]:
        _in_range("sigmas", sigmas, 1.0)
        return 1.0 - sigmas, sigmas

    def levels_of_timesteps(self, timesteps: Floats) -> tuple[Floats, Floats]:
        _in_range("timesteps", timesteps, self.train_steps)
        return self._levels_of_sigmas(timesteps / self.train_steps)

    def _shifted(self, sigmas: Floats) -> Floats:
        return self.shift * sigmas / (self.shift * sigmas + (1.0 - sigmas))  # this way sigma 1 stays exactly 1

    def _sigma_range(self) -> tuple[float, float]:
        return float(self._shifted(np.array([1.0 / self.train_steps]))[0]), 1.0

    def _timesteps(self, steps: int, spacing: Spacing, offset: int) -> Floats | None:
        last = 1.0 / self.train_steps if spacing == "linspace" else 1.0 / steps
        return self.train_steps * self._shifted(np.linspace(1.0, last, steps))


class EDM(Schedule):
    """Karras et al. 2022: alpha = 1, sigma from sigma_max to sigma_min, the model is told c_noise = log(sigma) / 4."""

    exploding = True
    train_steps = 0

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5) -> None:
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"sigma_min: expected 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        if not (math.isfinite(sigma_data) and sigma_data > 0):
            raise ValueError(f"sigma_data: expected a positive number, got {sigma_data}")
        self.sigma_min, self.sigma_max, self.sigma_data = float(sigma_min), float(sigma_max), float(sigma_data)

    def alpha_sigma(self, lam: float) -> tuple[float, float]:
        return 1.0, math.exp(-lam)

    def timestep_at(self, lam: float) -> float:
        return -lam / 4 if math.isfinite(lam) else 0.0

    def levels_of_timesteps(self, timesteps: Floats) -> tuple[Floats, Floats]:
        raise ValueError("timesteps: an edm path is given by sigmas; timesteps alone do not define it")

    def _levels_of_sigmas(self, sigmas: Floats) -> tuple[Floats, Floats]:
        return np.ones_like(sigmas), sigmas

    def _sigma_range(self) -> tuple[float, float]:
        return self.sigma_min, self.sigma_max

    def _timesteps(self, steps: int, spacing: Spacing, offset: int) -> Floats | None:
        return None


def _from_betas(betas: Floats, zero_snr: bool) -> VariancePreserving:
    """alphas_cumprod = cumprod(1 - beta); zero_snr shifts and scales its root to end at 0 (Lin et al. 2024)."""
    cumulative: Floats = np.asarray(np.cumprod(1.0 - betas), np.float64)
    if zero_snr:
        root = np.sqrt(cumulative)
        cumulative = np.square((root - root[-1]) * (root[0] / (root[0] - root[-1])))
    return VariancePreserving(cumulative)


def _beta_range(start: float, end: float, train_steps: int) -> None:
    if not 0 < start <= end < 1:
        raise ValueError(f"start: expected 0 < start <= end < 1, got start={start} and end={end}")
    _integer("train_steps", train_steps, 2)


def linear(start: float = 1e-4, end: float = 0.02, train_steps: int = 1000, zero_snr: bool = False) -> Schedule:
    """beta_t linear from start to end (Ho et al. 2020, section 4)."""
    _beta_range(start, end, train_steps)
    return _from_betas(np.linspace(start, end, train_steps), zero_snr)


def scaled_linear(
    start: float = 0.00085, end: float = 0.012, train_steps: int = 1000, zero_snr: bool = False
) -> Schedule:
    """sqrt(beta_t) linear from sqrt(start) to sqrt(end): the schedule of latent diffusion (Rombach et al. 2022)."""
    _beta_range(start, end, train_steps)
    return _from_betas(np.square(np.linspace(start**0.5, end**0.5, train_steps)), zero_snr)


def cosine(train_steps: int = 1000, zero_snr: bool = False) -> Schedule:
    """beta_t = min(1 - f((t+1)/T) / f(t/T), 0.999), f(u) = cos^2((u + 0.008) / 1.008 pi/2).

    Source: Nichol, Dhariwal 2021, eq. 17.
    """
    _integer("train_steps", train_steps, 2)
    f = np.cos((np.arange(train_steps + 1) / train_steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return _from_betas(np.minimum(1.0 - f[1:] / f[:-1], 0.999), zero_snr)


def flow(shift: float = 1.0, train_steps: int = 1000) -> Schedule:
    """Flow matching, x = (1 - sigma) x0 + sigma noise, with the timestep shift of Esser et al. 2024, eq. 23."""
    return Flow(shift, train_steps)


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5) -> Schedule:
    """The continuous variance-exploding schedule of Karras et al. 2022, table 1."""
    return EDM(sigma_min, sigma_max, sigma_data)


def from_alphas_cumprod(alphas_cumprod: Sequence[float] | Floats) -> Schedule:
    """A variance-preserving schedule from a trained model's own table, alphas_cumprod [T] descending."""
    return VariancePreserving(alphas_cumprod)
