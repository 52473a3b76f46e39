"""Configurations of diffusers' schedulers and what each of them is in pyguide: data, which needs neither package.

`Case` is one configuration. NAMED are those chosen one by one; diffusers_grid.py adds a designed sample of all others.
`config` holds what the scheduler's constructor takes, by diffusers' names; `solver` and `options` are ours.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample", "flow_prediction": "flow"}
EDM = ("EDMEuler", "EDMDPMSolverMultistep", "CosineDPMSolverMultistep")  # told a function of sigma, not a timestep
FLOW = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM")
TABLE = ("DDIM", "DDPM", "PNDM", "LCM", "TCD")  # whose levels are entries of alphas_cumprod
CLIPPED = ("DDIM", "DDPM")  # clip unless told not to


@dataclass(frozen=True)
class Case:
    """scheduler, config, steps: its name without "Scheduler", the arguments of its constructor, the number of steps.

    solver, options: ours. call: arguments of set_timesteps, in place of the number of steps if they name a grid. step:
    of step. strength: image-to-image, the last int(steps strength) steps. begin: leave out so many first steps, and
    start from noise. null: the grid ends with a step from a level to itself, which is left out on both sides. A
    tau_func in config is a number.
    """

    scheduler: str
    config: dict[str, Any]
    steps: int
    solver: str
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)
    strength: float = 1.0
    begin: int = 0
    null: bool = False

    def __post_init__(self) -> None:
        assert 0 < self.strength <= 1

    @property
    def first(self) -> int:
        """The solver step that the run begins with."""
        return self.begin + self.steps - int(self.steps * self.strength)

    @property
    def clip(self) -> float | None:
        clips = self.config.get("clip_sample", self.scheduler in CLIPPED)
        return float(self.config.get("clip_sample_range", 1.0)) if clips else None

    @property
    def prediction(self) -> str:
        """What the network predicts; EDM's schedulers mean by v_prediction that its output is negated."""
        if self.scheduler in EDM:
            return "edm"
        if self.scheduler == "IPNDM":
            return "v"
        return "flow" if self.scheduler in FLOW else PREDICTIONS[self.config.get("prediction_type", "epsilon")]

    @property
    def negated(self) -> bool:
        usual = "v_prediction" if self.scheduler == "CosineDPMSolverMultistep" else "epsilon"
        return self.scheduler in EDM and self.config.get("prediction_type", usual) == "v_prediction"

    @property
    def flows(self) -> bool:
        return self.scheduler in FLOW or bool(self.config.get("use_flow_sigmas"))

    @property
    def draws(self) -> int:
        """How many normals the peer draws in a step."""
        return 2 if self.scheduler == "DPMSolverSDE" else 1

    def as_json(self) -> dict[str, Any]:
        usual = {"options": {}, "call": {}, "step": {}, "strength": 1.0, "begin": 0, "null": False}
        return {k: v for k, v in asdict(self).items() if k not in usual or v != usual[k]}


SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
LEADING, TRAILING = {"timestep_spacing": "leading", "steps_offset": 1}, {"timestep_spacing": "trailing"}
V, X0 = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
FLOW_SIGMAS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
MIN, KARRAS = {"final_sigmas_type": "sigma_min"}, {"use_karras_sigmas": True}
ZERO_SNR = {"rescale_betas_zero_snr": True}
BH1, FULL = {"solver_type": "bh1"}, {"lower_order_final": False}
FREE, SD_MIN = {"clip_sample": False}, {"set_alpha_to_one": False}
# timesteps that Sabour et al. 2024, "Align Your Steps", give for Stable Diffusion 1.5 in ten steps
AYS = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]


def ddim(config: dict[str, Any], steps: int, eta: float = 0.0, rederive: bool = False, **rest: Any) -> Case:
    both = {"eta": eta, "use_clipped_model_output": rederive}
    return Case("DDIM", config, steps, "ddim", both, step=both, **rest)


def euler(config: dict[str, Any], steps: int, **rest: Any) -> Case:
    return Case("EulerDiscrete", config, steps, "euler", **rest)


def ancestral(config: dict[str, Any], steps: int, **rest: Any) -> Case:
    return Case("EulerAncestralDiscrete", config, steps, "euler_ancestral", **rest)


def heun(config: dict[str, Any], steps: int, **rest: Any) -> Case:
    return Case("HeunDiscrete", config, steps, "heun", **rest)


def dpm(config: dict[str, Any], steps: int, **rest: Any) -> Case:
    """Theirs lowers the last order below 15 steps, ours when asked."""
    options = {"lower_order_final": steps < 15 and config.get("lower_order_final", True)}
    return Case("DPMSolverMultistep", config, steps, "dpmpp_2m", options, **rest)


def dpm_of(algorithm: str, order: int, config: dict[str, Any], steps: int) -> Case:
    config = {"algorithm_type": algorithm, "solver_order": order, **config}
    if order == 1:
        return Case("DPMSolverMultistep", config, steps, "dpm_solver_1" if algorithm == "dpmsolver" else "dpmpp_1")
    options = {"lower_order_final": steps < 15, "solver_type": config.get("solver_type", "midpoint")}
    solver = f"{'dpmpp' if algorithm.endswith('++') else 'dpm_solver'}_{order}m{'_sde' if 'sde' in algorithm else ''}"
    return Case("DPMSolverMultistep", config, steps, solver, options)


def single(algorithm: str, order: int, config: dict[str, Any], steps: int) -> Case:
    config = {"algorithm_type": algorithm, "solver_order": order, "lower_order_final": True, **config}
    options = {"inner": "grid", "lower_order_final": True, "solver_type": config.get("solver_type", "midpoint")}
    solver = f"{'dpmpp' if algorithm.endswith('++') else 'dpm_solver'}_{order}s"
    return Case("DPMSolverSinglestep", config, steps, solver, options)


def unipc(order: int, config: dict[str, Any], steps: int, **rest: Any) -> Case:
    options = {name: config[name] for name in ("solver_type", "lower_order_final") if name in config}
    if "disable_corrector" in config:
        options["corrector"] = False
    return Case(
        "UniPCMultistep", {"solver_order": order, **config}, steps, "unipc", {"order": order, **options}, **rest
    )


def flow(shift: float, steps: int, given: bool = False, solver: str = "euler", **rest: Any) -> Case:
    """given: the sigmas 1, 1 - 1/N .. 1/N, as a pipeline passes them; else the scheduler's own."""
    call = {"sigmas": np.linspace(1, 1 / steps, steps).tolist()} if given else {}
    name = "FlowMatchHeunDiscrete" if solver == "heun" else "FlowMatchEulerDiscrete"
    return Case(name, {"shift": shift}, steps, solver, call=call, **rest)


NAMED: dict[str, Case] = {
    "ddim-leading-min": ddim({**SD, **FREE, **LEADING, **SD_MIN}, 50),
    "ddim-leading": ddim({**SD, **FREE}, 20),
    "ddim-clip-eta-half": ddim(LINEAR, 25, 0.5),
    "ddim-clip-rederived-eta-1": ddim(LINEAR, 10, 1.0, True),
    "ddim-clip-min": ddim({**SD, **LEADING, **SD_MIN}, 25),
    "ddim-clip-rederived-min": ddim({**SD, **LEADING, **SD_MIN}, 25, 0.0, True),
    "ddim-v-zero-snr": ddim({**SD, **FREE, **V, **TRAILING, **ZERO_SNR}, 25),
    "ddim-v-zero-snr-eta-1": ddim({**SD, **FREE, **V, **TRAILING, **ZERO_SNR}, 10, 1.0),
    "ddim-sample-eta-1": ddim({**LINEAR, **FREE, **X0, **TRAILING}, 20, 1.0),
    # where the grids agree: with as many steps as training steps, see the defects
    "ddim-linspace": ddim({**LINEAR, **FREE, "timestep_spacing": "linspace", "num_train_timesteps": 100}, 100),
    "ddim-v-cosine-clip": ddim({**COSINE, "clip_sample_range": 0.8, **V}, 5),
    "ddim-img2img": ddim({**SD, **FREE, **LEADING, **SD_MIN}, 20, strength=0.6),
    "euler-linspace": euler(SD, 25),
    "euler-v-leading": euler({**SD, **LEADING, **V}, 20),
    "euler-sample-trailing": euler({**SD, **TRAILING, **X0}, 10),
    "euler-karras": euler({**SD, **KARRAS}, 20),
    "euler-exponential": euler({**SD, "use_exponential_sigmas": True}, 5),
    "euler-beta": euler({**SD, "use_beta_sigmas": True}, 10),
    "euler-min": euler({**SD, **TRAILING, **MIN}, 20),
    "euler-v-zero-snr": euler({**SD, **TRAILING, **V, **ZERO_SNR}, 50),  # sigma 4096, not our infinite one
    "euler-img2img": euler({**SD, **LEADING}, 25, strength=0.8),
    "euler-v-continuous": euler({**SD, **V, "timestep_type": "continuous"}, 10),  # told log(sigma) / 4
    "euler-log-linear": euler({**SD, **TRAILING, "interpolation_type": "log_linear"}, 20),
    "euler-range": euler({**SD, **KARRAS, "sigma_min": 0.1, "sigma_max": 10.0}, 10),
    "euler-given-timesteps": euler({**SD, **TRAILING}, 10, call={"timesteps": AYS}),
    "euler-given-sigmas": euler({**SD, **TRAILING}, 5, call={"sigmas": [14.6, 4.7, 1.8, 0.7, 0.2, 0.0]}),
    "ancestral-leading": ancestral({**SD, **LEADING}, 25),
    "ancestral-linspace": ancestral(SD, 50),
    "ancestral-v-trailing": ancestral({**SD, **V, **TRAILING}, 20),
    "ancestral-v-zero-snr": ancestral({**SD, **V, **TRAILING, **ZERO_SNR}, 10),
    "ancestral-img2img": ancestral({**SD, **LEADING}, 20, strength=0.5),
    "heun-linspace": heun(SD, 10),
    "heun-v-trailing": heun({**SD, **V, **TRAILING}, 20),
    "heun-sample-karras": heun({**SD, **X0, **KARRAS}, 25),
    "heun-clip": heun({**SD, **LEADING, "clip_sample": True}, 10),
    "heun-img2img": heun({**SD, **LEADING}, 20, strength=0.5),
    "dpm-trailing": dpm({**SD, **TRAILING}, 20),
    "dpm-min": dpm({**SD, **TRAILING, **MIN}, 25),
    "dpm-min-lower-order-final": dpm({**SD, **TRAILING, **MIN}, 10),
    "dpm-min-full-order": dpm({**SD, **TRAILING, **MIN, **FULL}, 5),
    "dpm-v-karras": dpm({**SD, **KARRAS, **V}, 20),  # its timesteps are rounded, ours are not: as numbers only
    "dpm-linspace": dpm(SD, 50),
    "dpm-sample-leading": dpm({**LINEAR, **LEADING, **X0}, 25),
    "dpm-v-zero-snr": dpm({**SD, **V, **TRAILING, **ZERO_SNR}, 20),
    "dpm-flow": dpm({**FLOW_SIGMAS, "flow_shift": 3.0}, 20),
    "dpm-1-is-ddim": Case("DPMSolverMultistep", {**SD, **TRAILING, "solver_order": 1}, 20, "ddim"),
    "dpm-img2img": dpm({**SD, **TRAILING}, 25, strength=0.6),
    "dpm-given-timesteps": dpm({**SD, **TRAILING}, 10, call={"timesteps": AYS}),
    "dpm-lu-lambdas": dpm({**SD, "use_lu_lambdas": True}, 10),
    "dpm-clipped-lambda": dpm({**COSINE, **V, "lambda_min_clipped": -5.1}, 20),
    "dpm-3": dpm_of("dpmsolver++", 3, {**SD, **TRAILING, **V}, 20),
    "dpm-3-min": dpm_of("dpmsolver++", 3, {**SD, **LEADING, **MIN}, 10),
    "dpm-noise-1": dpm_of("dpmsolver", 1, {**SD, **LEADING, **MIN}, 20),
    "dpm-noise-1-v": dpm_of("dpmsolver", 1, {**LINEAR, **LEADING, **MIN, **V}, 10),
    "dpm-noise-2": dpm_of("dpmsolver", 2, {**SD, **LEADING, **MIN}, 20),
    "dpm-noise-2-heun": dpm_of("dpmsolver", 2, {**SD, **LEADING, **MIN, **V, "solver_type": "heun"}, 10),
    "dpm-noise-3": dpm_of("dpmsolver", 3, {**SD, **LEADING, **MIN}, 20),
    "dpm-noise-3-v": dpm_of("dpmsolver", 3, {**SD, **LEADING, **MIN, **V}, 10),
    "dpm-sde-2": dpm_of("sde-dpmsolver++", 2, {**SD, **LEADING, **MIN}, 20),
    "dpm-noise-sde-2": dpm_of("sde-dpmsolver", 2, {**SD, **LEADING, **MIN}, 10),
    "dpm-noise-sde-2-in-50": dpm_of("sde-dpmsolver", 2, {**SD, **LEADING, **MIN}, 50),
    "dpm-noise-sde-2-heun": dpm_of("sde-dpmsolver", 2, {**LINEAR, **LEADING, **MIN, **V, "solver_type": "heun"}, 10),
    "single-2": single("dpmsolver++", 2, SD, 20),
    "single-2-heun": single("dpmsolver++", 2, {**SD, **MIN, **V, "solver_type": "heun"}, 10),
    "single-3": single("dpmsolver++", 3, SD, 15),
    "single-3-heun": single("dpmsolver++", 3, {**SD, **MIN, **V, "solver_type": "heun"}, 12),
    "single-3-karras": single("dpmsolver++", 3, {**SD, **KARRAS}, 15),
    "single-3-min": single("dpmsolver++", 3, {**LINEAR, **MIN}, 21),
    "single-noise-2": single("dpmsolver", 2, {**SD, **MIN}, 20),
    "single-noise-3": single("dpmsolver", 3, {**SD, **MIN, **V}, 12),
    "unipc-1": unipc(1, {**SD, **TRAILING}, 20),
    "unipc-2": unipc(2, {**SD, **TRAILING}, 20),
    "unipc-3": unipc(3, {**SD, **TRAILING}, 25),
    "unipc-3-in-5-steps": unipc(3, {**SD, **TRAILING}, 5),
    "unipc-2-bh1-min": unipc(2, {**SD, **TRAILING, **MIN, **BH1}, 10),
    "unipc-3-bh1-min": unipc(3, {**SD, **TRAILING, **MIN, **BH1}, 20),
    "unipc-3-min-full-order": unipc(3, {**SD, **TRAILING, **MIN, **FULL}, 10),
    "unipc-2-predictor-only": unipc(2, {**SD, "disable_corrector": list(range(25))}, 25),
    "unipc-v-karras": unipc(2, {**SD, **KARRAS, **V}, 20),
    "unipc-sample-leading": unipc(2, {**LINEAR, **LEADING, **X0}, 50),
    "unipc-flow": unipc(2, {**FLOW_SIGMAS, "flow_shift": 3.0}, 20),
    "unipc-3-flow": unipc(3, FLOW_SIGMAS, 10),
    "unipc-v-zero-snr": unipc(2, {**SD, **V, **TRAILING, **ZERO_SNR}, 20),
    "unipc-img2img": unipc(2, {**SD, **TRAILING}, 20, strength=0.6),
    "flow-euler": flow(1.0, 20),
    "flow-euler-given": flow(1.0, 50, given=True),
    "flow-euler-shift": flow(3.0, 10),
    "flow-euler-shift-given-is-ddim": flow(3.0, 25, given=True, solver="ddim"),
    "flow-euler-img2img": flow(3.0, 20, given=True, strength=0.7),
    "flow-heun": flow(1.0, 10, solver="heun"),
    "flow-heun-shift": flow(3.0, 20, solver="heun"),
    "flow-euler-dynamic": Case(  # as a pipeline of 1024 tokens sets it
        "FlowMatchEulerDiscrete",
        {"use_dynamic_shifting": True},
        20,
        "euler",
        call={"sigmas": np.linspace(1, 1 / 20, 20).tolist(), "mu": 0.63},
    ),
    "edm-karras": Case("EDMEuler", {}, 20, "euler"),
    "edm-dpm": Case("EDMDPMSolverMultistep", {}, 20, "dpmpp_2m"),
    "ddpm-sigmoid": Case("DDPM", {**LINEAR, **FREE, "beta_schedule": "sigmoid"}, 20, "ddpm"),
    "ddpm-clip-large": Case("DDPM", {**LINEAR, "variance_type": "fixed_large"}, 25, "ddpm", {"variance": "large"}),
    "dpm2-leading": Case("KDPM2Discrete", {**SD, **LEADING}, 20, "dpm2"),
    "dpm2-ancestral-leading": Case("KDPM2AncestralDiscrete", {**SD, **LEADING}, 20, "dpm2_ancestral"),
    "dpm-sde-leading": Case("DPMSolverSDE", {**SD, **LEADING}, 20, "dpmpp_sde"),
    "lms-karras": Case("LMSDiscrete", {**SD, **KARRAS}, 20, "lms"),
    "deis-trailing": Case("DEISMultistep", {**SD, **TRAILING, "solver_order": 3}, 20, "deis", {"order": 3}),
    "sa-trailing": Case("SASolver", {**SD, **TRAILING}, 20, "sa_solver"),
    "plms-leading": Case("PNDM", {**SD, **LEADING, "skip_prk_steps": True}, 20, "plms"),
    "pndm-leading": Case("PNDM", {**SD, **LEADING}, 20, "pndm"),
    "lcm-10": Case("LCM", {}, 10, "lcm"),
    "tcd-5": Case("TCD", {}, 5, "tcd", step={"eta": 0.3}),
    "tcd-5-v": Case("TCD", {**LINEAR, **V}, 5, "tcd", {"eta": 0.5}, step={"eta": 0.5}),
    "tcd-4-sample": Case("TCD", {**SD, **X0}, 4, "tcd", {"eta": 0.1}, step={"eta": 0.1}),
    "tcd-5-is-ddim": Case("TCD", {}, 5, "tcd", {"eta": 0.0}, step={"eta": 0.0}),
    "edm-exponential": Case("EDMEuler", {"sigma_schedule": "exponential", "sigma_min": 0.01}, 10, "euler"),
}
IN_20 = "ddpm-sigmoid heun-v-trailing dpm2-leading dpm2-ancestral-leading dpm-sde-leading lms-karras deis-trailing"
IN_20 += " sa-trailing plms-leading pndm-leading dpm-3 dpm-noise-1 dpm-noise-2 dpm-noise-3 dpm-sde-2 single-2"
IN_20 += " single-3 single-noise-2 unipc-3 edm-karras flow-heun-shift lcm-10 tcd-5"
NAMED |= {f"{name}-in-50": replace(NAMED[name], steps=50) for name in IN_20.split()}
