"""The designed sample of diffusers' options: for each scheduler class its options, and which case a choice of them is.

Left out of all samples, each with its reason where it is left out: what a scheduler refuses or gets wrong (by name in
test_peers_diffusers_defects.py), and the few switches that none of our options mean.
"""

from __future__ import annotations

from typing import Any

from .diffusers_cases import (
    COSINE,
    FREE,
    LEADING,
    LINEAR,
    MIN,
    SD,
    TRAILING,
    X0,
    ZERO_SNR,
    Case,
    V,
)
from .diffusers_covering import Design

STEPS = {"5": 5, "10": 10, "25": 25}  # 50 among the named cases
STRENGTH = {"": 1.0, "img2img": 0.6}
BETAS = {"scaled": SD, "linear": LINEAR, "cosine": COSINE}
BETAS_0 = {**BETAS, "zero-snr": {**SD, **ZERO_SNR}}
EPS: dict[str, Any] = {}
NO_X0, OUTPUT = {"eps": EPS, "v": V}, {"eps": EPS, "v": V, "x0": X0}
OUTPUT_4 = {**OUTPUT, "flow": {"prediction_type": "flow_prediction"}}
SPACING = {"leading": LEADING, "trailing": TRAILING, "linspace": {"timestep_spacing": "linspace"}}
LEADING_0 = {"timestep_spacing": "leading"}
CURVES = {name: {f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta")}
SIGMAS: dict[str, dict[str, Any]] = {"": {}, **CURVES}
FLOWING = {"use_flow_sigmas": True, "flow_shift": 3.0}
SIGMAS_FLOW = {**SIGMAS, "flow": FLOWING}
END: dict[str, dict[str, Any]] = {"": {}, "min": MIN}
CLIP = {"free": FREE, "clip": {"clip_sample": True}, "clip-0.7": {"clip_sample": True, "clip_sample_range": 0.7}}
TYPE = {"midpoint": "midpoint", "heun": "heun"}
LAST = {"": True, "full": False}
ORDER = {"1": 1, "2": 2, "3": 3}


def unbounded(betas: dict[str, Any], output: dict[str, Any]) -> bool:
    """Noise predicted where there is next to no data, sigma / alpha from 4096 up: D has no digits left in float32."""
    return output is EPS and (betas is COSINE or "rescale_betas_zero_snr" in betas)


def from_noise(betas: dict[str, Any], spacing: dict[str, Any], sigmas: dict[str, Any] = EPS) -> bool:
    """A grid that starts at the last step of the cosine schedule, at sigma / alpha = 20,000, or at sigmas from there.

    What is written in x / alpha, or on noise, is then left with a digit or two in float32.
    """
    return betas is COSINE and (spacing is not LEADING or bool(sigmas))


def mixed(sigmas: dict[str, Any], output: dict[str, Any]) -> bool:
    """A flow's velocity belongs to a flow's sigmas, and nothing else does here."""
    return (sigmas is FLOWING) != (output.get("prediction_type") == "flow_prediction")


def lowered(order: int, last: bool, steps: int, end: dict[str, Any], null: bool, euler: bool = False) -> bool | None:
    """lower_order_final of ours that does what theirs does below 15 steps; None where none does.

    Theirs lowers the last step to order 1 and the one before to 2; euler_at_final the last alone, which a step to clean
    data is anyway. If the last one goes nowhere and is left out, what remains ends with the one before.
    """
    active = last and steps < 15
    if order == 1:
        return False
    if null:
        return None if active and order == 3 else False
    if order == 3 and euler and not active and end is MIN:
        return None
    return active or (euler and order == 2)


# ---- of the levels in alphas_cumprod -----------------------------------------------------------------------------
TABLE_GRID = {"leading": LEADING_0, "offset": LEADING, "trailing": TRAILING}


def _ddim(
    grid: Any, one: bool, clip: Any, eta: float, rederive: bool, betas: Any, output: Any, steps: int, strength: float
) -> Case | None:
    if (grid is LEADING_0 and not one) or (unbounded(betas, output) and (clip is FREE or betas is not COSINE)):
        return None  # t = 0 is already the level of alphas_cumprod[0], where it would end
    config = {**betas, **grid, **clip, **output, "set_alpha_to_one": one}
    both = {"eta": eta, "use_clipped_model_output": rederive}
    return Case("DDIM", config, steps, "ddim", both, step=both, strength=strength)


def _ddpm(variance: str, grid: Any, clip: Any, betas: Any, output: Any, steps: int, strength: float) -> Case | None:
    if unbounded(betas, output) and (clip is FREE or betas is not COSINE):
        return None
    if variance == "fixed_large" and grid in (LEADING, TRAILING):
        return None  # noise is added to the finished sample, see the defects
    config = {**betas, **grid, **clip, **output, "variance_type": variance}
    options = {"variance": "large" if variance == "fixed_large" else "small"}
    return Case("DDPM", config, steps, "ddpm", options, strength=strength)


def _pndm(plms: bool, grid: Any, one: bool, betas: Any, steps: int) -> Case | None:
    if grid is LEADING_0 and not one:
        return None
    config = {**betas, **grid, "skip_prk_steps": plms, "set_alpha_to_one": one}
    return Case("PNDM", config, steps, "plms" if plms else "pndm")


def _distilled(
    scheduler: str, betas: Any, output: Any, original: int, steps: int, strength: float, eta: float, clip: Any, u: float
) -> Case | None:
    if unbounded(betas, output) and (clip is FREE or betas is not COSINE):
        return None
    config = {**betas, **output, **clip, "original_inference_steps": original}
    if scheduler == "TCD":
        return Case("TCD", config, steps, "tcd", {"eta": eta}, step={"eta": eta}, strength=strength)
    config["timestep_scaling"] = u
    return Case("LCM", config, steps, "lcm", {"timestep_scaling": u}, strength=strength)


def _lcm(**values: Any) -> Case | None:
    return _distilled("LCM", eta=0.0, **values)


def _tcd(**values: Any) -> Case | None:
    return _distilled("TCD", clip=FREE, u=10.0, **values)


ORIGINAL = {"": 50, "of-100": 100}
TABLE_DESIGNS = [
    Design(
        "ddim",
        {
            "grid": TABLE_GRID,
            "one": {"": True, "min": False},
            "clip": CLIP,
            "eta": {"": 0.0, "eta-half": 0.5, "eta-1": 1.0},
            "rederive": {"": False, "rederived": True},
            "betas": BETAS_0,
            "output": OUTPUT,
            "strength": STRENGTH,
            "steps": STEPS,
        },
        _ddim,
    ),
    Design(
        "ddpm",
        {
            "variance": {"small": "fixed_small", "small-log": "fixed_small_log", "large": "fixed_large"},
            "grid": {**TABLE_GRID, "linspace": SPACING["linspace"]},
            "clip": CLIP,
            "betas": {**BETAS_0, "sigmoid": {**LINEAR, "beta_schedule": "sigmoid"}},
            "output": OUTPUT,
            "strength": STRENGTH,
            "steps": STEPS,
        },
        _ddpm,
    ),
    Design(
        "pndm",
        {
            "plms": {"plms": True, "prk": False},
            "grid": TABLE_GRID,
            "one": {"": True, "min": False},
            "betas": {"scaled": SD, "linear": LINEAR},
            "steps": STEPS,
        },
        _pndm,
    ),
    Design(
        "lcm",
        {
            "betas": BETAS_0,
            "output": OUTPUT,
            "clip": CLIP,
            "u": {"": 10.0, "u-1": 1.0, "u-0.01": 0.01},
            "original": ORIGINAL,
            "strength": STRENGTH,
            "steps": STEPS,
        },
        _lcm,
    ),
    Design(
        "tcd",
        {
            "eta": {"eta-0": 0.0, "eta-0.3": 0.3, "eta-0.75": 0.75, "eta-1": 1.0},
            "betas": BETAS_0,
            "output": OUTPUT,
            "original": ORIGINAL,
            "strength": STRENGTH,
            "steps": STEPS,
        },
        _tcd,
    ),
]


# ---- of sigma / alpha --------------------------------------------------------------------------------------------
def _euler(spacing: Any, sigmas: Any, end: Any, betas: Any, output: Any, steps: int, strength: float) -> Case | None:
    null = end is MIN and spacing is SPACING["linspace"]  # its last timestep is 0, whose sigma is the smallest
    if unbounded(betas, output) or from_noise(betas, spacing):
        return None
    config = {**betas, **spacing, **sigmas, **end, **output}
    return Case("EulerDiscrete", config, steps, "euler", strength=strength, null=null)


def _single(scheduler: str, solver: str) -> Any:
    def build(
        spacing: Any,
        betas: Any,
        output: Any,
        steps: int,
        strength: float,
        sigmas: Any = EPS,
        clip: Any = EPS,
        order: int = 0,
    ) -> Case | None:
        if unbounded(betas, output) or from_noise(betas, spacing):
            return None
        if order > 1 and strength < 1:
            return None  # LMS in image-to-image: see the defects
        config = {**betas, **spacing, **sigmas, **output, **clip}
        both = {"order": order} if order else {}
        return Case(f"{scheduler}Discrete" if scheduler != "DPMSolverSDE" else scheduler, config, steps, solver, both,
                    step=both, strength=strength)  # fmt: skip

    return build


_RATIO = {"spacing": SPACING, "sigmas": SIGMAS, "betas": BETAS, "output": NO_X0, "strength": STRENGTH, "steps": STEPS}
RATIO_DESIGNS = [
    Design("euler", {**_RATIO, "betas": BETAS_0, "output": OUTPUT, "end": END}, _euler),
    Design(
        "ancestral",
        {"spacing": SPACING, "betas": BETAS_0, "output": NO_X0, "strength": STRENGTH, "steps": STEPS},
        _single("EulerAncestral", "euler_ancestral"),
    ),
    Design("heun", {**_RATIO, "output": OUTPUT, "clip": {**CLIP, "free": EPS}}, _single("Heun", "heun")),
    Design("dpm2", _RATIO, _single("KDPM2", "dpm2")),
    Design("dpm2-ancestral", _RATIO, _single("KDPM2Ancestral", "dpm2_ancestral")),
    Design("dpm-sde", _RATIO, _single("DPMSolverSDE", "dpmpp_sde")),
    Design("lms", {**_RATIO, "output": OUTPUT, "order": {str(k): k for k in range(1, 5)}}, _single("LMS", "lms")),
]
