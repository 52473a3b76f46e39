"""The three families of schedules: variance preserving, flow matching, variance exploding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..checks import whole
from ..path import Floats, log_ratio
from .base import Schedule, Spacing
from .checks import _finite, _in_range, _numbers


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

    def __repr__(self) -> str:
        with np.errstate(over="ignore"):
            low, high = np.exp(-self._lam[[0, -1]])
        return f"VariancePreserving({self.train_steps} training steps, sigma/alpha {low:.3g} to {high:.4g})"

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
        offset = whole("offset", offset, 0)
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
    terminal stretches a shifted grid to end there: 1 - sigma <- (1 - sigma) (1 - terminal) / (1 - last sigma); it is
    then the smallest sigma of every grid by name (LTX-Video's code, HaCohen et al. 2024; diffusers' shift_terminal).
    """

    def __init__(self, shift: float = 1.0, train_steps: int = 1000, terminal: float | None = None) -> None:
        self.shift, self.train_steps = _finite("shift", shift, positive=True), whole("train_steps", train_steps, 1)
        self.terminal = None if terminal is None else _finite("terminal", terminal)
        if self.terminal is not None and not 0 < self.terminal < 1:
            raise ValueError(f"terminal: expected a sigma between 0 and 1, got {terminal}")

    def __repr__(self) -> str:
        return f"Flow(shift={self.shift:g}, train_steps={self.train_steps}, terminal={self.terminal})"

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
        return self.terminal or float(self._shifted(np.array([1.0 / self.train_steps]))[0]), 1.0

    def _timesteps(self, steps: int, spacing: Spacing, offset: int) -> Floats | None:
        last = 1.0 / self.train_steps if spacing == "linspace" else 1.0 / steps
        sigmas = self._shifted(np.linspace(1.0, last, steps))
        if (
            self.terminal is not None and sigmas[-1] < 1
        ):  # a grid of one point is sigma = 1: there is nothing to stretch
            sigmas = 1.0 - (1.0 - sigmas) * ((1.0 - self.terminal) / (1.0 - sigmas[-1]))
            sigmas[-1] = self.terminal
        return self.train_steps * sigmas


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

    def __repr__(self) -> str:
        return f"EDM(sigma_min={self.sigma_min:g}, sigma_max={self.sigma_max:g}, sigma_data={self.sigma_data:g})"

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
