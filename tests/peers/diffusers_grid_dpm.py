"""The rest of the designed sample: the classes of DPM-Solver's family, EDM and flow matching. See diffusers_grid.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from .diffusers_cases import MIN, NAMED, Case
from .diffusers_covering import Design
from .diffusers_grid import (
    BETAS,
    BETAS_0,
    CURVES,
    END,
    FLOWING,
    LAST,
    ORDER,
    OUTPUT_4,
    RATIO_DESIGNS,
    SIGMAS,
    SIGMAS_FLOW,
    SPACING,
    STEPS,
    STRENGTH,
    TABLE_DESIGNS,
    TYPE,
    from_noise,
    lowered,
    mixed,
    unbounded,
)

EULER = {"": {}, "euler": {"euler_at_final": True}}
SDE_1 = {"eta": 1.0}  # SDE-DPM-Solver++(1) is DDIM at eta 1


def _multistep_solver(algorithm: str, order: int, kind: str, last: bool) -> tuple[str, dict[str, Any]]:
    """Our solver and its options for diffusers' algorithm_type, solver_order, solver_type."""
    sde = algorithm.startswith("sde")
    if order == 1:
        return ("ddim", SDE_1) if sde else ({"dpmsolver": "dpm_solver_1", "dpmsolver++": "dpmpp_1"}[algorithm], {})
    name = f"{'dpmpp' if algorithm.endswith('++') else 'dpm_solver'}_{order}m{'_sde' if sde else ''}"
    return name, {"lower_order_final": last, "solver_type": kind}


def _multistep(
    of: tuple[str, int], kind: str, last: bool, end: Any, euler: Any, spacing: Any, sigmas: Any, betas: Any,
    output: Any, steps: int, strength: float,
) -> Case | None:  # fmt: skip
    algorithm, order = of
    null = end is MIN and (sigmas in CURVES.values() or "use_lu_lambdas" in sigmas)
    lower = lowered(order, last, steps, end, null, bool(euler))
    if unbounded(betas, output) or mixed(sigmas, output) or lower is None:
        return None
    if not algorithm.endswith("++") and (end is not MIN or sigmas is FLOWING):
        return None  # which the scheduler refuses: it divides by sigma, and has no noise prediction of a velocity
    if not algorithm.endswith("++") and from_noise(betas, spacing, sigmas):
        return None
    chosen = _multistep_solver(algorithm, order, kind, lower)
    config = {"algorithm_type": algorithm, "solver_order": order, "solver_type": kind, "lower_order_final": last}
    config |= {**betas, **spacing, **sigmas, **end, **euler, **output}
    return Case("DPMSolverMultistep", config, steps, *chosen, strength=strength, null=null)


def _singlestep(
    of: tuple[str, int], kind: str, last: bool, end: Any, sigmas: Any, betas: Any, output: Any, steps: int,
    strength: float,
) -> Case | None:  # fmt: skip
    algorithm, order = of
    noise, null = algorithm == "dpmsolver", end is MIN and sigmas in CURVES.values()
    lower = last or end is not MIN or steps % order > 0  # else it sets it by itself, with a warning
    if unbounded(betas, output) or mixed(sigmas, output) or (noise and (end is not MIN or sigmas is FLOWING)):
        return None
    if noise and from_noise(betas, SPACING["linspace"]):
        return None
    if null and order > 1 and (not lower or (order == 3 and steps % 3 == 2)):
        return None  # a step of order 2 or 3 spans the last levels: it has two evaluations at one of them
    if (steps - int(steps * strength)) % order:
        return None  # image-to-image cuts a step in two
    config = {"algorithm_type": algorithm, "solver_order": order, "solver_type": kind, "lower_order_final": last}
    config |= {**betas, **sigmas, **end, **output}
    options = {"inner": "grid", "solver_type": kind, "lower_order_final": lower and not null}
    solver = f"{'dpm_solver' if noise else 'dpmpp'}_{order}s"
    if order == 1:
        solver, options = {"dpmsolver": ("dpm_solver_1", {}), "dpmsolver++": ("dpmpp_1", {})}.get(
            algorithm, ("ddim", SDE_1)
        )
    return Case("DPMSolverSinglestep", config, steps, solver, options, strength=strength, null=null)


def _deis(
    order: int, last: bool, spacing: Any, sigmas: Any, betas: Any, output: Any, steps: int, strength: float
) -> Case | None:
    null = bool(sigmas)  # it always ends at its smallest sigma
    lower = lowered(order, last, steps, MIN, null)
    if unbounded(betas, output) or mixed(sigmas, output) or lower is None or from_noise(betas, spacing, sigmas):
        return None
    config = {**betas, **spacing, **sigmas, **output, "solver_order": order, "lower_order_final": last}
    options = {"order": order, "lower_order_final": lower}
    return Case("DEISMultistep", config, steps, "deis", options, strength=strength, null=null)


def _unipc(
    order: int, kind: str, last: bool, end: Any, data: bool, off: Any, spacing: Any, sigmas: Any, betas: Any,
    output: Any, steps: int, strength: float,
) -> Case | None:  # fmt: skip
    null = end is MIN and bool(sigmas)
    if unbounded(betas, output) or mixed(sigmas, output) or (null and last and order == 3):
        return None
    if end is not MIN and (kind == "bh1" or not data or (not last and order > 1)):
        return None  # NaN, see the defects
    if not data and (sigmas is FLOWING or from_noise(betas, spacing, sigmas)):
        return None  # the first it refuses
    disabled = [k for k in range(steps) if off(k)]
    config = {"solver_order": order, "solver_type": kind, "lower_order_final": last, "predict_x0": data}
    config |= {**betas, **spacing, **sigmas, **end, **output, "disable_corrector": disabled}
    first = steps - int(steps * strength)
    options = {"order": order, "solver_type": kind, "lower_order_final": last and not null, "predict_x0": data}
    options["disable_corrector"] = [k - first for k in disabled if k >= first]
    return Case("UniPCMultistep", config, steps, "unipc", options, strength=strength, null=null)


def _sa_solver(
    predictor: int, corrector: int, tau: float | None, last: bool, spacing: Any, sigmas: Any, betas: Any, output: Any,
    steps: int, begin: float,
) -> Case | None:  # fmt: skip
    """begin: started late, from noise; its add_noise makes a state of another level, see the defects."""
    null = bool(sigmas)
    if unbounded(betas, output) or mixed(sigmas, output) or (null and last and predictor > 2):
        return None
    if sigmas is CURVES["beta"] and steps == 25 and max(predictor, corrector) > 2:
        return None  # its points are so close that float32 keeps no digit of the weights
    config = {"predictor_order": predictor, "corrector_order": corrector, "lower_order_final": last}
    config |= {**betas, **spacing, **sigmas, **output, **({} if tau is None else {"tau_func": tau})}
    options = {"predictor_order": predictor, "corrector_order": corrector, "tau": tau}
    options["lower_order_final"] = last and not null
    return Case("SASolver", config, steps, "sa_solver", options, begin=int(steps * begin), null=null)


_DPM = {"sigmas": SIGMAS_FLOW, "betas": BETAS, "output": OUTPUT_4, "strength": STRENGTH, "steps": STEPS}
ALGORITHM = {"": "dpmsolver++", "noise": "dpmsolver", "sde": "sde-dpmsolver++", "noise-sde": "sde-dpmsolver"}
# algorithm and order, which are a solver of ours. Not SDE-DPM-Solver-1, which we have not; not sde of order 3, and of
# order 2 in single steps: see the defects
OF = {"-".join(filter(None, (name, str(k)))): (value, k) for name, value in ALGORITHM.items() for k in (1, 2, 3)}
MULTISTEP = {name: of for name, of in OF.items() if name not in ("noise-sde-1", "noise-sde-3", "sde-3")}
SINGLESTEP = {name: of for name, of in OF.items() if "sde" not in name or name == "sde-1"}
EDM_MULTISTEP = {name: of for name, of in MULTISTEP.items() if "noise" not in name}
DPM_DESIGNS = [
    Design(
        "multistep",
        {
            "of": MULTISTEP,
            "kind": TYPE,
            "last": LAST,
            "end": END,
            "euler": EULER,
            "spacing": SPACING,
            **_DPM,
            "sigmas": {**SIGMAS_FLOW, "lu": {"use_lu_lambdas": True}},
            "betas": BETAS_0,
        },
        _multistep,
    ),
    Design(
        "singlestep",
        {
            "of": SINGLESTEP,
            "kind": TYPE,
            "last": LAST,
            "end": END,
            **_DPM,
            "steps": {**STEPS, "6": 6, "15": 15},
        },
        _singlestep,
    ),
    Design("deis", {"order": ORDER, "last": LAST, "spacing": SPACING, **_DPM}, _deis),
    Design(
        "unipc",
        {
            "order": ORDER,
            "kind": {"": "bh2", "bh1": "bh1"},
            "last": LAST,
            "end": END,
            "data": {"": True, "noise": False},
            "off": {"": lambda k: False, "off-0": lambda k: k == 0, "off-odd": lambda k: k % 2, "off": lambda k: True},
            "spacing": SPACING,
            **_DPM,
            "betas": BETAS_0,
        },
        _unipc,
    ),
    Design(
        "sa",
        {
            "predictor": {f"p{k}": k for k in range(1, 5)},
            "corrector": {f"c{k}": k for k in range(1, 5)},
            "tau": {"": None, "tau-0": 0.0, "tau-half": 0.5, "tau-1": 1.0},
            "last": LAST,
            "spacing": SPACING,
            **{option: values for option, values in _DPM.items() if option != "strength"},
            "begin": {"": 0.0, "late": 0.4},
        },
        _sa_solver,
    ),
]


# ---- EDM, iPNDM, flow matching -----------------------------------------------------------------------------------
def _edm(
    scheduler: str, curve: str, span: Any, data: float, output: str, end: Any, steps: int, strength: float,
    rho: float = 7.0, of: tuple[str, int] = ("", 1), kind: str = "", last: bool = True, euler: Any = None,
) -> Case | None:  # fmt: skip
    (algorithm, order), null = of, end is MIN
    config = {"sigma_schedule": curve, "sigma_data": data, "prediction_type": output, "rho": rho, **span, **end}
    if scheduler == "EDMEuler":
        return Case(scheduler, config, steps, "euler", strength=strength, null=null)
    lower = lowered(order, last, steps, end, null, bool(euler))
    if lower is None:
        return None
    chosen = _multistep_solver(algorithm, order, kind, lower)
    config |= {"solver_order": order, "solver_type": kind, "lower_order_final": last, **euler}
    if scheduler == "EDMDPMSolverMultistep":
        config["algorithm_type"] = algorithm
    return Case(scheduler, config, steps, *chosen, strength=strength, null=null)


def _edm_euler(**values: Any) -> Case | None:
    return _edm("EDMEuler", **values)


def _edm_dpm(**values: Any) -> Case | None:
    return _edm("EDMDPMSolverMultistep", **values)


def _cosine(**values: Any) -> Case | None:
    return _edm("CosineDPMSolverMultistep", **values)


def _ipndm(begin: int, steps: int) -> Case:
    """begin 0: from given sigmas below 1. Its own begin at 1, where it loses the first evaluation: see the defects."""
    config = {} if begin else {"trained_betas": (0.98 * np.linspace(1, 0, steps + 1) ** 1.5).tolist()}
    return Case("IPNDM", config, steps, "ipndm", begin=begin)


def _flow(
    shift: float, curve: Any, dynamic: Any, terminal: Any, given: bool, stochastic: bool, steps: int, strength: float
) -> Case | None:
    if dynamic and shift != 1:
        return None  # which it ignores then
    call: dict[str, Any] = {"mu": 0.8} if dynamic else {}
    if given:
        call["sigmas"] = np.linspace(1, 1 / steps, steps).tolist()
    config = {"shift": shift, "stochastic_sampling": stochastic, **curve, **dynamic, **terminal}
    chosen: tuple[str, dict[str, Any]] = ("lcm", {"timestep_scaling": None}) if stochastic else ("euler", {})
    return Case("FlowMatchEulerDiscrete", config, steps, *chosen, call=call, strength=strength)


def _flow_heun(shift: float, steps: int, strength: float) -> Case:
    return Case("FlowMatchHeunDiscrete", {"shift": shift}, steps, "heun", strength=strength)


def _flow_lcm(shift: float, curve: Any, steps: int, strength: float) -> Case:
    config = {"shift": shift, **curve}
    return Case("FlowMatchLCM", config, steps, "lcm", {"timestep_scaling": None}, strength=strength)


_EDM = {
    "curve": {"": "karras", "exponential": "exponential"},
    "span": {"": {}, "narrow": {"sigma_min": 0.05, "sigma_max": 20.0}},
    "data": {"": 0.5, "data-1": 1.0},
    "output": {"eps": "epsilon", "v": "v_prediction"},
    "end": END,
    "strength": STRENGTH,
    "steps": STEPS,
}
_EDM_DPM = {"kind": TYPE, "last": LAST, "euler": EULER, **_EDM}
SHIFT = {"": 1.0, "shift-3": 3.0, "shift-7": 7.0}
OTHER_DESIGNS = [
    Design("edm-euler", {**_EDM, "rho": {"": 7.0, "rho-3": 3.0}}, _edm_euler),
    Design("edm-dpm", {"of": EDM_MULTISTEP, **_EDM_DPM}, _edm_dpm),
    Design("cosine", {"of": {"1": OF["sde-1"], "2": OF["sde-2"]}, **_EDM_DPM}, _cosine),
    Design("ipndm", {"begin": {"given": 0, "from-1": 1, "from-2": 2}, "steps": STEPS}, _ipndm),
    Design(
        "flow",
        {
            "shift": SHIFT,
            "curve": SIGMAS,
            "dynamic": {
                "": {},
                "dynamic": {"use_dynamic_shifting": True},
                "dynamic-linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
            },
            "terminal": {"": {}, "terminal": {"shift_terminal": 0.1}},
            "given": {"": False, "given": True},
            "stochastic": {"": False, "stochastic": True},
            "strength": STRENGTH,
            "steps": STEPS,
        },
        _flow,
    ),
    Design("flow-heun", {"shift": SHIFT, "strength": STRENGTH, "steps": STEPS}, _flow_heun),
    Design("flow-lcm", {"shift": SHIFT, "curve": SIGMAS, "strength": STRENGTH, "steps": STEPS}, _flow_lcm),
]
DESIGNS = [*TABLE_DESIGNS, *RATIO_DESIGNS, *DPM_DESIGNS, *OTHER_DESIGNS]


def every_case() -> dict[str, Case]:
    """NAMED and the designed sample, by name."""
    cases = dict(NAMED)
    for design in DESIGNS:
        for labels in design.sample:
            name = design.name(labels)
            assert name not in cases, name
            cases[name] = design.case(labels)
    return cases
