"""Schedules and grids against diffusers' schedulers, live and unmodified.

They compute sigmas in float32 from a float32 table of alphas_cumprod. Given that very table, ours may differ by their
roundings: 1 - a and the quotient (2^-24 each, halved by the root), the root itself (2^-23), what becomes of them
along the curve (the end points weighted by at most 1) and the stored value (2^-24), under 6 x 2^-24 relative.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.schedulers import AysSchedules  # noqa: E402
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr  # noqa: E402

from pyguide import schedules  # noqa: E402

ULP = 2**-24
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LINSPACE = {"timestep_spacing": "linspace"}
NAMES = ("karras", "exponential", "beta")


def make(name: str, config: dict[str, Any], *arguments: Any, **given: Any) -> Any:
    scheduler = getattr(diffusers, f"{name}Scheduler")(**config)
    scheduler.set_timesteps(*arguments, **given)
    return scheduler


def of(scheduler: Any) -> Any:
    """Our schedule over the scheduler's own float32 table."""
    return schedules.from_alphas_cumprod(scheduler.alphas_cumprod.tolist())


def same_sigmas(path: Any, scheduler: Any, ulps: float = 6) -> None:
    ours = path.sigma if isinstance(path.schedule, schedules.Flow) else path.sigma / path.alpha
    np.testing.assert_allclose(ours, scheduler.sigmas.double().numpy(), rtol=ulps * ULP)


def same_timesteps(path: Any, scheduler: Any) -> None:
    """Theirs are interpolated between float32 logarithms: their errors, over the distance of two neighbours."""
    bar = path.schedule.alphas_cumprod
    log_sigma = 0.5 * np.log(1 / bar[bar > 0] - 1)
    error = 4 * (np.abs(log_sigma).max() + 6) * ULP / np.diff(log_sigma).min() + 1000 * ULP
    np.testing.assert_allclose(path.timestep, scheduler.timesteps.double().numpy(), atol=error)


# ---- tables ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("limits", [{}, {"beta_start": 0.001, "beta_end": 0.3}])
@pytest.mark.parametrize("total", [1000, 50])
def test_sigmoid_betas(limits: dict[str, float], total: int) -> None:
    """Constructed with float64 as torch's default type, theirs are float64 throughout: T products, 2^-52 each."""
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        scheduler = diffusers.DDPMScheduler(beta_schedule="sigmoid", num_train_timesteps=total, **limits)
    finally:
        torch.set_default_dtype(kept)
    assert scheduler.alphas_cumprod.dtype == torch.float64
    ours = schedules.sigmoid(total, **{name[5:]: value for name, value in limits.items()})
    np.testing.assert_allclose(ours.alphas_cumprod, scheduler.alphas_cumprod.numpy(), rtol=total * 2**-52)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid"])
def test_zero_terminal_snr(name: str) -> None:
    """Theirs goes back to betas, 1 - a_t / a_{t-1}, which keeps the ratio r to 2^-53 / r."""
    plain = getattr(schedules, name)().alphas_cumprod
    betas = torch.tensor(1 - plain / np.append(1.0, plain[:-1]))
    table = torch.cumprod(1 - betas, 0).numpy()
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0).numpy()
    ours = schedules.from_alphas_cumprod(table, zero_snr=True).alphas_cumprod
    assert ours[-1] == theirs[-1] == 0
    ratio = ours[:-1] / np.append(1.0, ours[:-2])
    limit = np.cumsum(3 / ratio + 4) * 2**-53
    assert (np.abs(ours[:-1] - theirs[:-1]) <= limit * ours[:-1]).all()
    named = getattr(schedules, name)(zero_snr=True).alphas_cumprod
    np.testing.assert_array_equal(named, schedules.from_alphas_cumprod(plain, zero_snr=True).alphas_cumprod)


# ---- sigmas by name --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sigmas", NAMES)
@pytest.mark.parametrize("steps", [2, 10, 33])
@pytest.mark.parametrize("name", ["EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "HeunDiscrete"])
def test_sigmas_by_name(name: str, steps: int, sigmas: str) -> None:
    if sigmas == "beta":
        pytest.importorskip("scipy")
    scheduler = make(name, {**SD, **LINSPACE, f"use_{sigmas}_sigmas": True}, steps)
    path = of(scheduler).path(steps, sigmas=sigmas)
    if name == "HeunDiscrete":  # its second evaluations repeat a level
        scheduler.sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]])
        scheduler.timesteps = torch.cat([scheduler.timesteps[:1], scheduler.timesteps[1::2]])
    same_sigmas(path, scheduler)
    if name == "EulerDiscrete":  # the others round
        same_timesteps(path, scheduler)


@pytest.mark.parametrize("sigmas", NAMES)
@pytest.mark.parametrize("config", [{}, {"use_dynamic_shifting": True}, {"shift_terminal": 0.1}])
def test_sigmas_by_name_on_flow_paths(config: dict[str, Any], sigmas: str) -> None:
    """Between 1 and the end of the grid; dynamic shifting moves that end once."""
    if sigmas == "beta":
        pytest.importorskip("scipy")
    dynamic = "use_dynamic_shifting" in config
    given = {"mu": math.log(3.0)} if dynamic else {}
    scheduler = make("FlowMatchEulerDiscrete", {**config, f"use_{sigmas}_sigmas": True}, 12, **given)
    ours = schedules.flow(3.0 if dynamic else 1.0, terminal=config.get("shift_terminal"))
    path = ours.path(12, sigmas=sigmas)
    same_sigmas(path, scheduler)
    np.testing.assert_allclose(path.timestep, scheduler.timesteps.double(), rtol=8 * ULP)


@pytest.mark.parametrize("sigmas", NAMES)
def test_flow_scheduler_shifts_the_end_of_named_sigmas_twice(sigmas: str) -> None:
    """With a static shift its grid ends at the shift of a shifted 1/T, as without a name. Ours ends at the shift."""
    if sigmas == "beta":
        pytest.importorskip("scipy")
    scheduler = make("FlowMatchEulerDiscrete", {"shift": 3.0, f"use_{sigmas}_sigmas": True}, 12)
    once = 3 * 0.001 / (1 + 2 * 0.001)
    assert scheduler.sigmas[-2].item() == pytest.approx(3 * once / (1 + 2 * once), rel=6 * ULP)
    assert schedules.flow(3.0).path(12, sigmas=sigmas).sigma[-2] == pytest.approx(once, rel=1e-14)


@pytest.mark.parametrize("sigmas", ["karras", "exponential"])
def test_sigmas_by_name_on_edm_paths(sigmas: str) -> None:
    scheduler = make("EDMEuler", {"sigma_schedule": sigmas, "sigma_min": 0.01, "sigma_max": 50.0}, 14)
    path = schedules.edm(0.01, 50.0).path(14, sigmas=sigmas)
    # exponential: float32 points between the logarithms -4.6 and 3.9, start + i step: 4.6 + 8.5 + 4.6 ulp, then exp
    same_sigmas(path, scheduler, ulps=6 if sigmas == "karras" else 20)
    np.testing.assert_allclose(path.timestep, scheduler.timesteps.double(), rtol=6 * ULP, atol=6 * ULP)  # log / 4


# ---- Align Your Steps ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["StableDiffusion", "StableDiffusionXL"])
@pytest.mark.parametrize("name", ["EulerDiscrete", "DPMSolverMultistep"])
def test_published_timesteps(name: str, model: str) -> None:
    values = AysSchedules[f"{model}Timesteps"]
    scheduler = make(name, SD, timesteps=values)
    path = of(scheduler).path(timesteps=values)
    same_sigmas(path, scheduler)
    assert path.timestep.tolist() == scheduler.timesteps.tolist() == values


@pytest.mark.parametrize("model", ["StableDiffusion", "StableDiffusionXL"])
def test_published_sigmas(model: str) -> None:
    """N + 1 values that end in 0; the first, 14.615, lies just beyond the training range and is told as its end."""
    values = AysSchedules[f"{model}Sigmas"]
    assert values[-1] == 0
    scheduler = make("EulerDiscrete", SD, sigmas=values)
    path = of(scheduler).path(sigmas=values)
    assert path.steps == len(values) - 1 == scheduler.num_inference_steps
    same_sigmas(path, scheduler)
    same_timesteps(path, scheduler)
    assert path.timestep[0] == 999


def test_published_sigmas_of_video() -> None:
    """Stable Video Diffusion: continuous timesteps log(sigma) / 4, which is an edm path."""
    values = AysSchedules["StableDiffusionVideoSigmas"]
    continuous = {"timestep_type": "continuous", "prediction_type": "v_prediction"}
    scheduler = make("EulerDiscrete", {**SD, **continuous}, sigmas=values)
    path = schedules.edm().path(sigmas=values)
    same_sigmas(path, scheduler)
    np.testing.assert_allclose(path.timestep, scheduler.timesteps.double(), rtol=6 * ULP, atol=6 * ULP)
    assert path.init_scale == 700


def test_edm_scheduler_takes_given_sigmas_for_positions_on_its_curve() -> None:
    """EDMEulerScheduler.set_timesteps(sigmas=...) puts them where its Karras ramp from 0 to 1 belongs."""
    values = [5.0, 1.0, 0.2]
    scheduler = make("EDMEuler", {}, 3, sigmas=torch.tensor(values))
    a, b = 80 ** (1 / 7), 0.002 ** (1 / 7)
    np.testing.assert_allclose(scheduler.sigmas[:-1].double(), [(a + u * (b - a)) ** 7 for u in values], rtol=1e-5)
    np.testing.assert_array_equal(schedules.edm().path(sigmas=values).sigma, [*values, 0])


def test_lists_on_flow_paths() -> None:
    values = [1.0, 0.85, 0.5, 0.125]
    scheduler = make("FlowMatchEulerDiscrete", {}, sigmas=values)
    for given in (values, [*values, 0.0]):
        path = schedules.flow().path(sigmas=given)
        same_sigmas(path, scheduler)
        np.testing.assert_allclose(path.timestep, scheduler.timesteps.double(), rtol=2 * ULP)
    times = [1000, 800, 500, 50]
    scheduler = make("FlowMatchEulerDiscrete", {}, timesteps=times)
    path = schedules.flow().path(timesteps=times)
    same_sigmas(path, scheduler)
    assert path.timestep.tolist() == scheduler.timesteps.tolist() == times
    scheduler = make("FlowMatchEulerDiscrete", {}, timesteps=times, sigmas=values)
    path = schedules.flow().path(timesteps=times, sigmas=values)
    same_sigmas(path, scheduler)
    assert path.timestep.tolist() == scheduler.timesteps.tolist() == times


# ---- flow: shift and terminal ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("tokens", [256, 1024, 3600, 4096, 16384])
@pytest.mark.parametrize("terminal", [None, 0.02])
def test_dynamic_shift(tokens: int, terminal: float | None) -> None:
    """As pipelines run it: sigmas 1 .. 1/N and mu. By itself the scheduler spreads them down to 1/T: linspace."""
    shift = schedules.flow_shift(tokens)
    config = {"use_dynamic_shifting": True, "shift_terminal": terminal}
    given = np.linspace(1, 1 / 20, 20).tolist()
    ours = schedules.flow(shift, terminal=terminal)
    # the given sigmas are stored in float32 first; 1 - sigma, which is stretched, has an error of 2^-24 absolute
    for scheduler, spacing in (
        (make("FlowMatchEulerDiscrete", config, sigmas=given, mu=math.log(shift)), "leading"),
        (make("FlowMatchEulerDiscrete", config, 20, mu=math.log(shift)), "linspace"),
    ):
        path = ours.path(20, spacing=spacing)
        limit = {"rtol": 6 * ULP, "atol": 0 if terminal is None else 6 * ULP}
        np.testing.assert_allclose(path.sigma, scheduler.sigmas.double(), **limit)
        np.testing.assert_allclose(path.timestep / 1000, scheduler.timesteps.double() / 1000, **limit)


def test_linear_time_shift_takes_mu_for_the_shift() -> None:
    config = {"use_dynamic_shifting": True, "time_shift_type": "linear"}
    scheduler = make("FlowMatchEulerDiscrete", config, 20, mu=2.5)
    same_sigmas(schedules.flow(2.5).path(20, spacing="linspace"), scheduler)


def test_flow_scheduler_is_not_finite_where_one_step_is_stretched() -> None:
    """It divides by 1 - sigma of the last point, which is the first: sigma = 1. Ours is the one step from noise."""
    with np.errstate(invalid="ignore"):
        scheduler = make("FlowMatchEulerDiscrete", {"shift_terminal": 0.1}, 1)
    assert scheduler.sigmas[0].isnan()
    assert schedules.flow(terminal=0.1).path(1).sigma.tolist() == [1, 0]


# ---- the end point ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 5, 24, 333])
def test_the_smallest_sigma_as_the_end_point(spacing: Any, steps: int) -> None:
    """DPMSolverMultistepScheduler spreads N + 1 points and drops the one at timestep 0: our grids that end there."""
    scheduler = make("DPMSolverMultistep", {**SD, "timestep_spacing": spacing, "final_sigmas_type": "sigma_min"}, steps)
    path = of(scheduler).path(steps, spacing=spacing, final_sigma="min")
    same_sigmas(path, scheduler)
    assert path.timestep.tolist() == scheduler.timesteps.tolist()


def test_the_smallest_sigma_after_an_offset() -> None:
    config = {**SD, "timestep_spacing": "leading", "steps_offset": 1, "final_sigmas_type": "sigma_min"}
    scheduler = make("EulerDiscrete", config, 25)
    path = of(scheduler).path(25, offset=1, final_sigma="min")
    same_sigmas(path, scheduler)
    assert path.timestep.tolist() == scheduler.timesteps.tolist()
