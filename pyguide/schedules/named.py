"""The schedules that people know, by name."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..checks import whole
from ..path import Floats
from .base import Schedule
from .checks import _finite
from .families import EDM, Flow, VariancePreserving


def _zero_terminal_snr(alphas_cumprod: Floats) -> Floats:
    """sqrt(abar_t) <- (sqrt(abar_t) - sqrt(abar_T)) sqrt(abar_1) / (sqrt(abar_1) - sqrt(abar_T)), t = 1 .. T.

    The last is exactly 0, pure noise; the first is kept. Source: Lin et al. 2024, algorithm 1.
    """
    root = np.sqrt(alphas_cumprod)
    return np.asarray(np.square((root - root[-1]) * (root[0] / (root[0] - root[-1]))), np.float64)


def _from_betas(betas: Floats, zero_snr: bool) -> VariancePreserving:
    """alphas_cumprod = cumprod(1 - beta), with zero terminal SNR where asked."""
    cumulative: Floats = np.asarray(np.cumprod(1.0 - betas), np.float64)
    return VariancePreserving(_zero_terminal_snr(cumulative) if zero_snr else cumulative)


def _beta_range(start: float, end: float, train_steps: int) -> None:
    if not 0 < start <= end < 1:
        raise ValueError(f"start: expected 0 < start <= end < 1, got start={start} and end={end}")
    whole("train_steps", train_steps, 2)


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
    whole("train_steps", train_steps, 2)
    f = np.cos((np.arange(train_steps + 1) / train_steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return _from_betas(np.minimum(1.0 - f[1:] / f[:-1], 0.999), zero_snr)


def sigmoid(train_steps: int = 1000, zero_snr: bool = False, *, start: float = 1e-4, end: float = 0.02) -> Schedule:
    """beta_t = start + (end - start) / (1 + exp(-u_t)), u_t linear from -6 to 6.

    Source: GeoDiff (Xu et al. 2022), whose code and diffusers' "sigmoid" have these ends.
    """
    _beta_range(start, end, train_steps)
    return _from_betas(start + (end - start) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, train_steps))), zero_snr)


def from_alphas_cumprod(alphas_cumprod: Sequence[float] | Floats, zero_snr: bool = False) -> Schedule:
    """A variance-preserving schedule from a trained model's own table, alphas_cumprod [T] descending in [0, 1).

    zero_snr: rescaled to end at 0 (Lin et al. 2024, algorithm 1), which leaves a table that ends there alone.
    """
    given = VariancePreserving(alphas_cumprod)
    rescale = zero_snr and given.alphas_cumprod[-1] > 0
    return VariancePreserving(_zero_terminal_snr(given.alphas_cumprod)) if rescale else given


def flow(shift: float = 1.0, train_steps: int = 1000, terminal: float | None = None) -> Schedule:
    """Flow matching, x = (1 - sigma) x0 + sigma noise, with the timestep shift of Esser et al. 2024, eq. 23.

    shift: > 0; `flow_shift` computes it from the resolution. terminal: the sigma that grids are stretched to end at
    (LTX-Video 0.1, Qwen-Image 0.02), None for none.
    """
    return Flow(shift, train_steps, terminal)


def flow_shift(
    tokens: int, base_tokens: int = 256, max_tokens: int = 4096, base_shift: float = 0.5, max_shift: float = 1.15
) -> float:
    """The shift for `flow` at a resolution: exp(mu), mu linear in the number of image tokens (FLUX.1, SD3).

        mu = base_shift + (max_shift - base_shift) (tokens - base_tokens) / (max_tokens - base_tokens)

    tokens: of the latent image, (height / 16) (width / 16) in pixels for FLUX and SD3; beyond the two ends the line
    goes on. base_shift, max_shift: mu at the ends, as diffusers' scheduler configurations name them. What diffusers
    calls time_shift_type "linear" takes its mu for the shift itself: flow(shift=mu).
    Source: the shift is Esser et al. 2024, eq. 23; the line in mu is that of the FLUX.1 code (Black Forest Labs 2024).
    """
    tokens = whole("tokens", tokens, 1)
    base_tokens, max_tokens = whole("base_tokens", base_tokens, 1), whole("max_tokens", max_tokens, 1)
    if base_tokens == max_tokens:
        raise ValueError(f"max_tokens: expected a number other than base_tokens, got {max_tokens} for both")
    base_shift, max_shift = _finite("base_shift", base_shift), _finite("max_shift", max_shift)
    mu = base_shift + (max_shift - base_shift) * (tokens - base_tokens) / (max_tokens - base_tokens)
    if not -700.0 < mu < 700.0:  # exp leaves float64
        raise ValueError(f"tokens: {tokens} tokens are out of reach of the line through the ends, mu would be {mu:g}")
    return math.exp(mu)


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5) -> Schedule:
    """The continuous variance-exploding schedule of Karras et al. 2022, table 1."""
    return EDM(sigma_min, sigma_max, sigma_data)
