"""The names that people know from diffusers, k-diffusion, A1111 and ComfyUI, in one table.

An alias is a solver with options and, where the name says so, with a grid. It stands for the defaults of what bears the
name: "uni_pc" is of order 3 with bh1 in ComfyUI, `UniPCMultistepScheduler` of order 2 with bh2, and `PNDMScheduler`
starts with Runge-Kutta steps unless it was told to skip_prk_steps, which is "PLMS". Case, spaces, dashes and
underscores do not matter and "++" is "pp", so that "DPM++ 2M" is dpmpp_2m as it stands; " Karras" or " Exponential" may
follow any name. What a scheduler of diffusers was configured with (prediction, spacing, thresholds) belongs to the path
and to `compile`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Alias:
    """solver: pyguide's own name; options: of the solver; path: arguments of `Schedule.path` that the name asks for."""

    solver: str
    options: dict[str, Any] = field(default_factory=dict)
    path: dict[str, Any] = field(default_factory=dict)


ALIASES: dict[str, Alias] = {
    name: alias
    for alias, names in (
        (Alias("ddim"), ["DDIMScheduler", "DDIMParallelScheduler"]),
        (Alias("ddpm"), ["DDPMScheduler", "DDPMParallelScheduler"]),
        (
            Alias("euler"),
            [
                "EulerDiscreteScheduler",
                "EDMEulerScheduler",
                "FlowMatchEulerDiscreteScheduler",
                "sample_euler",
                "k_euler",
            ],
        ),
        (
            Alias("euler_ancestral"),
            ["EulerAncestralDiscreteScheduler", "sample_euler_ancestral", "Euler a", "k_euler_a", "k_euler_ancestral"],
        ),
        (Alias("heun"), ["HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "sample_heun", "k_heun"]),
        (Alias("dpm2"), ["KDPM2DiscreteScheduler", "sample_dpm_2", "dpm_2", "k_dpm_2"]),
        (
            Alias("dpm2_ancestral"),
            ["KDPM2AncestralDiscreteScheduler", "sample_dpm_2_ancestral", "DPM2 a", "dpm_2_ancestral", "k_dpm_2_a"],
        ),
        (Alias("lms"), ["LMSDiscreteScheduler", "sample_lms", "k_lms"]),
        (
            Alias("dpmpp_2m"),
            ["DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler", "sample_dpmpp_2m"],
        ),
        (
            Alias("dpmpp_2m_sde"),
            ["CosineDPMSolverMultistepScheduler", "sample_dpmpp_2m_sde", "dpmpp_2m_sde_gpu"],
        ),
        (Alias("dpmpp_2m_sde", {"solver_type": "heun"}), ["DPM++ 2M SDE Heun", "dpmpp_2m_sde_heun_gpu"]),
        (Alias("dpmpp_3m_sde"), ["sample_dpmpp_3m_sde", "dpmpp_3m_sde_gpu"]),
        (Alias("dpmpp_sde"), ["DPMSolverSDEScheduler", "sample_dpmpp_sde", "dpmpp_sde_gpu"]),
        (Alias("dpmpp_2s", {"inner": "grid", "lower_order_final": True}), ["DPMSolverSinglestepScheduler"]),
        (Alias("dpmpp_2s_ancestral"), ["sample_dpmpp_2s_ancestral", "DPM++ 2S a"]),
        (Alias("deis"), ["DEISMultistepScheduler"]),
        (Alias("unipc"), ["UniPCMultistepScheduler"]),
        (Alias("unipc", {"order": 3, "solver_type": "bh1"}), ["uni_pc"]),
        (Alias("unipc", {"order": 3}), ["uni_pc_bh2"]),
        (Alias("pndm"), ["PNDMScheduler"]),
        (Alias("plms"), ["PLMSSampler"]),
        (Alias("ipndm"), ["IPNDMScheduler"]),
        (Alias("sa_solver"), ["SASolverScheduler"]),
        (Alias("lcm"), ["LCMScheduler"]),
        (Alias("tcd"), ["TCDScheduler"]),
    )
    for name in names
}

GRIDS: dict[str, dict[str, Any]] = {"karras": {"sigmas": "karras"}, "exponential": {"sigmas": "exponential"}}

REFUSED: dict[str, str] = {
    "dpm_adaptive": "the sizes of its steps depend on the values",
    "dpm_fast": "it chooses its own steps; dpm_solver_3s is its formula on a path",
    "restart": "it goes back to noisier levels; write the passes as a path and a solver each",
}


def normalised(name: str) -> str:
    """Lower case with single underscores; "++" is "pp"."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower().replace("++", "pp")).strip("_")


_BY_NORMALISED = {normalised(name): alias for name, alias in ALIASES.items()}


def find(name: str, own: Collection[str]) -> Alias | None:
    """What a name as people write it stands for, given the solvers' own names; None if nothing.

    Raises ValueError with the reason for samplers that are known and have no plan.
    """
    base, grid = normalised(name), ""
    for word in GRIDS:
        if base.endswith(f"_{word}"):
            base, grid = base.removesuffix(f"_{word}"), word
    if base in REFUSED:
        raise ValueError(f"solver: {name!r} has no plan: {REFUSED[base]}")
    alias = Alias(base) if base in own else _BY_NORMALISED.get(base)
    if alias is None or not grid:
        return alias
    return Alias(alias.solver, alias.options, GRIDS[grid])
