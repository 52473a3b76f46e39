"""Names that people know: what each stands for, that it compiles to that, and the grids that come with a name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pyguide
from pyguide import schedules, solvers
from pyguide.solvers.aliases import ALIASES, Alias, below_15_steps, squeezed

SD = schedules.scaled_linear()

KNOWN = {
    "DPM++ 2M Karras": ("dpmpp_2m", {}, {"sigmas": "karras"}),
    "DPM++ 2M": ("dpmpp_2m", {}, {}),
    "dpm++ 2m": ("dpmpp_2m", {}, {}),
    "DPM++ 2M SDE Exponential": ("dpmpp_2m_sde", {}, {"sigmas": "exponential"}),
    "DPM++ 2M SDE Heun Karras": ("dpmpp_2m_sde", {"solver_type": "heun"}, {"sigmas": "karras"}),
    "DPM++ SDE Karras": ("dpmpp_sde", {}, {"sigmas": "karras"}),
    "DPM++ 3M SDE": ("dpmpp_3m_sde", {}, {}),
    "DPM++ 2S a Karras": ("dpmpp_2s_ancestral", {}, {"sigmas": "karras"}),
    "Euler a": ("euler_ancestral", {}, {}),
    "euler_a": ("euler_ancestral", {}, {}),
    "euler_ancestral": ("euler_ancestral", {}, {}),
    "Euler": ("euler", {}, {}),
    "LMS Karras": ("lms", {}, {"sigmas": "karras"}),
    "Heun": ("heun", {}, {}),
    "DPM2 a": ("dpm2_ancestral", {}, {}),
    "DPM2 Karras": ("dpm2", {}, {"sigmas": "karras"}),
    "dpm_2_ancestral": ("dpm2_ancestral", {}, {}),
    "PLMS": ("plms", {}, {}),
    "DDIM": ("ddim", {}, {}),
    "UniPC": ("unipc", {}, {}),
    "uni_pc": ("unipc", {}, {}),
    "uni_pc_bh2": ("unipc", {"solver_type": "bh2"}, {}),
    "dpmpp2m": ("dpmpp_2m", {}, {}),
    "DPM++2M Karras": ("dpmpp_2m", {}, {"sigmas": "karras"}),
    "Euler Beta": ("euler", {}, {"sigmas": "beta"}),
    "eulera": ("euler_ancestral", {}, {}),
    "k_dpmpp_2m": ("dpmpp_2m", {}, {}),
    "LCM": ("lcm", {}, {}),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", {"lower_order_final": below_15_steps}, {}),
    "FlowMatchLCMScheduler": ("lcm", {"timestep_scaling": None}, {}),
    "FlowMatchEulerDiscreteScheduler": ("euler", {}, {}),
    "KDPM2AncestralDiscreteScheduler": ("dpm2_ancestral", {}, {}),
    "sample_dpmpp_2m_sde": ("dpmpp_2m_sde", {}, {}),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_names(name: str) -> None:
    assert solvers.alias(name) == Alias(*KNOWN[name])


@pytest.mark.parametrize("name", ALIASES)
@pytest.mark.parametrize("grid", ["", " Karras", " Exponential"])
def test_every_alias_compiles_to_what_it_stands_for(name: str, grid: str) -> None:
    alias = ALIASES[name]
    assert alias.solver in solvers.names()
    wanted = SD.path(6, sigmas=grid.strip().lower() or None)
    plan = pyguide.compile(f"{name}{grid}", SD.path(6))
    options = {key: True if value is below_15_steps else value for key, value in alias.options.items()}
    same = pyguide.compile(alias.solver, wanted, **options)
    np.testing.assert_array_equal(plan.table, same.table)
    assert plan.solver == alias.solver


def test_own_names_are_no_aliases() -> None:
    """An alias that is a solver's own name would be hidden by it, and of two equal ones the first."""
    own = {squeezed(name) for name in solvers.names()}
    assert len({squeezed(name) for name in ALIASES}) == len(ALIASES)
    assert len(own) == len(solvers.names())
    assert not {squeezed(name) for name in ALIASES} & own


def test_the_callers_options_win() -> None:
    path = SD.path(8)
    plan = pyguide.compile("uni_pc_bh2", path, solver_type="bh1")
    np.testing.assert_array_equal(plan.table, pyguide.compile("unipc", path, solver_type="bh1").table)
    end = SD.path(8, offset=1, final_sigma="min")
    plan = pyguide.compile("DEISMultistepScheduler", end, lower_order_final=False)
    np.testing.assert_array_equal(plan.table, pyguide.compile("deis", end).table)


def test_the_reference_takes_the_grid_too() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3))

    def sample(name: str, path: Any) -> Any:
        return solvers.sample(name, lambda x, t: np.tanh(x + np.mean(t)), x, path)

    karras = sample("DPM++ 2M Karras", SD.path(6))
    np.testing.assert_array_equal(karras, sample("dpmpp_2m", SD.path(6, sigmas="karras")))
    assert np.abs(karras - sample("dpmpp_2m", SD.path(6))).max() > 1e-3


def test_a_grid_keeps_the_other_arguments_of_the_path() -> None:
    path = SD.path(6, offset=1, rho=5.0, final_sigma="min")
    plan = pyguide.compile("dpmpp_2m karras", path)
    wanted = SD.path(6, rho=5.0, final_sigma="min", sigmas="karras")
    np.testing.assert_array_equal(plan.sigma, wanted.sigma[:-1])
    assert plan.end == (wanted.alpha[-1], wanted.sigma[-1])


def test_a_path_with_that_grid_is_taken_as_it_is() -> None:
    path = SD.path(6, sigmas="karras", strength=0.5)
    np.testing.assert_array_equal(pyguide.compile("Euler Karras", path).sigma, path.sigma[:-1])


@pytest.mark.parametrize(
    "path",
    [
        SD.path(6, sigmas="exponential"),
        SD.path(timesteps=[900, 500, 100]),
        SD.path(sigmas=[10.0, 3.0, 0.5]),
        SD.path(6, strength=0.5),
        pyguide.NoisePath([0.5, 1.0], [0.5, 0.1], [10.0], SD),
    ],
    ids=["exponential", "timesteps", "sigmas", "strength", "arrays"],
)
def test_a_grid_that_contradicts_the_path_is_refused(path: Any) -> None:
    with pytest.raises(ValueError, match=r"^path: 'Euler Karras' asks for sigmas='karras'"):
        pyguide.compile("Euler Karras", path)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"^solver: 'DPM adaptive' has no plan: the sizes of its steps"):
        pyguide.compile("DPM adaptive", SD.path(4))
    with pytest.raises(TypeError, match=r"^order: heun has no such option"):
        pyguide.compile("Heun Karras", SD.path(4), order=2)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("DPM++ 2M Karas", "dpmpp_2m Karras"),
        ("DPMSolverMultistep", "DPMSolverMultistepScheduler"),
        ("UniPCMultistepSheduler", "UniPCMultistepScheduler"),
        ("EulerDiscrete", "EulerDiscreteScheduler"),
        ("huen", "heun"),
    ],
)
def test_a_misspelt_name_is_told_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"^solver: got '.*'; did you mean '{meant}'\? expected one of .*ddim"):
        pyguide.compile(typed, SD.path(4))
