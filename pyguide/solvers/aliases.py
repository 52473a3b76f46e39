"""The names that people know from diffusers, k-diffusion, A1111 and ComfyUI, in one table.

An alias is a solver with options and, where the name says so, with a grid: " Karras", " Exponential" or " Beta" may
follow any name. Only letters and digits matter, and "++" is "pp", so that "DPM++ 2M" is dpmpp_2m as it stands. A
scheduler of diffusers stands for its own defaults; what it was configured with belongs to the path and to `compile`.
Other applications also change the order or the grid under a name: A1111's and ComfyUI's UniPC are of order 3 with bh1,
ComfyUI's deis is of order 3, and both leave out the sigma before the last for DPM2. Here the solver's own defaults are
meant.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from ..path import NoisePath


@dataclass(frozen=True)
class Alias:
    """solver: pyguide's own name; options: of the solver, a function of the path where they depend on it; path:
    arguments of `Schedule.path` that the name asks for."""

    solver: str
    options: dict[str, Any] = field(default_factory=dict)
    path: dict[str, Any] = field(default_factory=dict)


def below_15_steps(path: NoisePath) -> bool:
    """When diffusers' multistep schedulers lower the order of the last steps, by default."""
    return path.steps < 15


FEW: dict[str, Any] = {"lower_order_final": below_15_steps}

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
        (Alias("dpm2"), ["KDPM2DiscreteScheduler", "sample_dpm_2", "k_dpm_2"]),
        (
            Alias("dpm2_ancestral"),
            ["KDPM2AncestralDiscreteScheduler", "sample_dpm_2_ancestral", "DPM2 a", "k_dpm_2_a"],
        ),
        (Alias("lms"), ["LMSDiscreteScheduler", "sample_lms", "k_lms"]),
        (Alias("dpmpp_2m", FEW), ["DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler"]),
        (Alias("dpmpp_2m"), ["sample_dpmpp_2m", "k_dpmpp_2m"]),
        (Alias("dpmpp_2m_sde", FEW), ["CosineDPMSolverMultistepScheduler"]),
        (Alias("dpmpp_2m_sde"), ["sample_dpmpp_2m_sde", "dpmpp_2m_sde_gpu"]),
        (Alias("dpmpp_2m_sde", {"solver_type": "heun"}), ["DPM++ 2M SDE Heun", "dpmpp_2m_sde_heun_gpu"]),
        (Alias("dpmpp_3m_sde"), ["sample_dpmpp_3m_sde", "dpmpp_3m_sde_gpu"]),
        (Alias("dpmpp_sde"), ["DPMSolverSDEScheduler", "sample_dpmpp_sde", "dpmpp_sde_gpu", "k_dpmpp_sde"]),
        (Alias("dpmpp_2s", {"inner": "grid"}), ["DPMSolverSinglestepScheduler"]),
        (Alias("dpmpp_2s_ancestral"), ["sample_dpmpp_2s_ancestral", "DPM++ 2S a", "k_dpmpp_2s_a"]),
        (Alias("deis", FEW), ["DEISMultistepScheduler"]),
        (Alias("unipc"), ["UniPCMultistepScheduler"]),
        (Alias("unipc", {"solver_type": "bh2"}), ["uni_pc_bh2"]),
        (Alias("pndm"), ["PNDMScheduler"]),
        (Alias("plms"), ["PLMSSampler"]),
        (Alias("ipndm"), ["IPNDMScheduler"]),
        (Alias("sa_solver"), ["SASolverScheduler"]),
        (Alias("lcm"), ["LCMScheduler"]),
        (Alias("lcm", {"timestep_scaling": None}), ["FlowMatchLCMScheduler"]),
        (Alias("tcd"), ["TCDScheduler"]),
    )
    for name in names
}

GRIDS: dict[str, dict[str, Any]] = {name: {"sigmas": name} for name in ("karras", "exponential", "beta")}

REFUSED: dict[str, str] = {
    "dpm_adaptive": "the sizes of its steps depend on the values",
    "dpm_fast": "it chooses its own steps; dpm_solver_3s is its formula on a path",
    "restart": "it goes back to noisier levels; write the passes as a path and a solver each",
}


def squeezed(name: str) -> str:
    """The letters and digits of a name, in lower case; "++" is "pp"."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))


_SQUEEZED = {squeezed(name): alias for name, alias in ALIASES.items()}
_REFUSED = {squeezed(name): reason for name, reason in REFUSED.items()}


def find(name: str, own: Collection[str]) -> Alias:
    """What a name as people write it stands for, given the solvers' own names.

    Raises ValueError: with the reason for samplers that are known and have no plan, else with the nearest name.
    """
    known = {**_SQUEEZED, **{squeezed(solver): Alias(solver) for solver in own}}
    base, grid = squeezed(name), ""
    for word in GRIDS:
        if base.endswith(word):
            base, grid = base.removesuffix(word), word
    if base in _REFUSED:
        raise ValueError(f"solver: {name!r} has no plan: {_REFUSED[base]}")
    if base not in known:
        written = {squeezed(known_name): known_name for known_name in (*ALIASES, *own)}
        written |= {key + word: f"{shown} {word.title()}" for key, shown in written.items() for word in GRIDS}
        near = difflib.get_close_matches(squeezed(name), written, n=1)
        hint = f"did you mean {written[near[0]]!r}? " if near else ""
        raise ValueError(
            f"solver: got {name!r}; {hint}expected one of {', '.join(sorted(own))}, an alias of theirs, or a function"
        )
    alias = known[base]
    return Alias(alias.solver, alias.options, GRIDS[grid]) if grid else alias
