"""Where diffusers' schedulers are wrong: the steps that they take. pyguide does it right.

Each test states the defect by name, shows it in the installed diffusers, and shows what pyguide does. Of the levels
that they walk on: test_peers_diffusers_defects.py.
"""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any
from unittest import mock

import numpy as np
import pytest
from scipy.integrate import quad

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from peers.common import distance, draw  # noqa: E402
from peers.diffusers_cases import (  # noqa: E402
    BH1,
    COSINE,
    FLOW_SIGMAS,
    FREE,
    FULL,
    LEADING,
    LINEAR,
    MIN,
    SD,
    TRAILING,
    X0,
    Case,
    V,
    unipc,
)
from peers.diffusers_ours import F32, F64, Ours  # noqa: E402
from peers.diffusers_points import POINT, PointNetwork, exact  # noqa: E402
from peers.diffusers_runs import Wide, make, run  # noqa: E402

import pyguide  # noqa: E402
from pyguide import NoisePath, schedules, solvers  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
CLOSE, EXACT = 1e-5, 1e-9
ROUNDED = 1e-6  # the tables are float32: their sigma at a timestep misses the one of alphas_cumprod by up to 2^-22
SDE = {"algorithm_type": "sde-dpmsolver++"}


# ---- NaN ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("config", [BH1, FULL], ids=["bh1", "full-order"])
def test_unipc_scheduler_is_not_finite_at_clean_data(config: dict[str, Any]) -> None:
    """Its last step multiplies an infinite h by zero (bh1), or divides by h_k / h = 0 (order 2). Ours takes the limit.

    In the limit the differences have no weight: the result is the last D, as with bh2 and lower_order_final.
    """
    case, usual = unipc(2, {**SD, **TRAILING, **config}, 10), unipc(2, {**SD, **TRAILING}, 10)
    peer = run(case, F32)
    assert not peer.x.isfinite().any()
    for each in (case, usual):
        ours = Ours(each, peer)
        event = list(pyguide.Sampler(ours.network, ours.plan).stream(draw(1)))[-1]
        assert distance(event.x, event.denoised) <= CLOSE


def test_unipc_scheduler_on_noise_is_not_finite_at_clean_data() -> None:
    """predict_x0=False multiplies sigma' = 0 by e^h. Ours takes the limit, (x - sigma E) / alpha of the corrected x."""
    options = {"predict_x0": False}
    case = Case("UniPCMultistep", {**SD, **TRAILING, **options}, 10, "unipc", options)
    network = PointNetwork(make(case).alphas_cumprod.double())
    peer = run(case, F64, model=network)
    assert not peer.x.isfinite().any()
    assert distance(Ours(case, peer).solve(network=network), torch.full_like(peer.x, POINT)) <= ROUNDED


def test_ddpm_with_the_logarithm_of_the_large_variance_is_nan() -> None:
    """variance_type="fixed_large_log" takes the square root of log(beta), which is negative; "fixed_small_log" is fine.
    Ours is beta itself, as with "fixed_large"."""
    config = {**LINEAR, "variance_type": "fixed_large_log"}
    assert not run(Case("DDPM", config, 10, "ddpm"), F32).x.isfinite().any()
    config["variance_type"] = "fixed_large"
    case = Case("DDPM", config, 10, "ddpm", {"variance": "large"})
    peer = run(case, F64)
    assert distance(Ours(case, peer).solve(), peer.x) <= EXACT


@pytest.mark.parametrize(
    ("name", "solver", "steps"),
    [("EulerAncestralDiscrete", "euler_ancestral", 3), ("KDPM2AncestralDiscrete", "dpm2_ancestral", 5)],
)
def test_ancestral_schedulers_are_nan_where_sigma_falls_far_in_a_step(name: str, solver: str, steps: int) -> None:
    """sigma_down^2 = sigma'^2 - sigma_up^2, a difference of equal numbers where sigma' < sigma / 4000, as on the cosine
    schedule: its rounding is negative in float32, and the root NaN. (KDPM2's also takes the logarithm of a root 0.)
    Ours forms it from lam' - lam; with noise and data prediction alike, its first step leaves next to nothing of x."""
    case = Case(name, {**COSINE, **V, **TRAILING}, steps, solver)
    peer = run(case, F32)
    assert peer.sigmas[0] / peer.sigmas[1] > 2000
    assert not peer.x.isfinite().all()
    ours = Ours(case, peer)
    plan = ours.plan
    assert ours.sample(plan, F32).isfinite().all()
    network = PointNetwork(peer.table, "v")
    x = pyguide.Sampler(network, plan)(ours.start(F32), noises=ours.noises(plan, F32))
    assert distance(x, torch.full_like(x, POINT)) <= CLOSE


# ---- exceptions ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "config", "solver", "prediction"),
    [
        ("DPMSolverMultistep", {**SD, **MIN, "algorithm_type": "sde-dpmsolver"}, "dpm_solver_2m_sde", "epsilon"),
        ("EDMDPMSolverMultistep", SDE, "dpmpp_3m_sde", "edm"),
        ("CosineDPMSolverMultistep", {}, "dpmpp_3m_sde", "edm"),
    ],
)
def test_stochastic_multistep_of_order_3_is_accepted_and_fails(
    name: str, config: dict[str, Any], solver: str, prediction: str
) -> None:
    """solver_order=3 is taken by the constructor, and the first third-order step returns a variable that was never set:
    these have no such step. Ours has one on data, and on noise order 2."""
    case = Case(name, {**config, "solver_order": 3}, 20, solver)
    with pytest.raises(UnboundLocalError):
        run(case, F32)
    schedule = schedules.scaled_linear() if prediction == "epsilon" else schedules.edm()
    assert pyguide.compile(solver, schedule.path(20), prediction=prediction).evaluations == 20


@pytest.mark.parametrize(
    ("name", "solver", "config"),
    [
        ("EulerAncestralDiscrete", "euler_ancestral", X0),
        ("KDPM2Discrete", "dpm2", X0),
        ("KDPM2AncestralDiscrete", "dpm2_ancestral", X0),
        ("DPMSolverSDE", "dpmpp_sde", X0),
        ("PNDM", "pndm", X0),
        ("UniPCMultistep", "unipc", {**FLOW_SIGMAS, "predict_x0": False}),
        ("DPMSolverMultistep", "dpm_solver_2m", {**FLOW_SIGMAS, **MIN, "algorithm_type": "dpmsolver"}),
    ],
)
def test_predictions_that_are_not_implemented(name: str, solver: str, config: dict[str, Any]) -> None:
    """The clean sample, and a flow's velocity with the methods on noise: refused in the first step. Ours take every
    prediction with every solver, and on data that are one point end there."""
    case = Case(name, {**SD, **config}, 10, solver)
    with pytest.raises((NotImplementedError, ValueError), match="prediction_type"):
        run(case, F32)
    if "flow_prediction" in config.values():
        path, network = schedules.flow(3.0).path(10), lambda x, t: (x - POINT) / (t[:, None, None, None] / 1000)
        prediction, options = "flow", {"predict_x0": False} if solver == "unipc" else {}
    else:
        path, prediction, options = schedules.scaled_linear().path(10), "sample", {}
        network = PointNetwork(path.schedule.alphas_cumprod, "sample")
    z = draw(3).double()
    x = solvers.sample(solver, network, draw(1).double(), path, prediction=prediction, noise=lambda step: z, **options)
    assert distance(x, torch.full_like(x, POINT)) <= EXACT


@pytest.mark.parametrize(
    ("name", "algorithm", "solver"),
    [
        ("DPMSolverMultistep", "dpmsolver", "dpm_solver_2m"),
        ("DPMSolverMultistep", "sde-dpmsolver", "dpm_solver_2m_sde"),
        ("DPMSolverSinglestep", "dpmsolver", "dpm_solver_2s"),
    ],
)
def test_methods_on_noise_refuse_to_end_at_clean_data(name: str, algorithm: str, solver: str) -> None:
    """Written with sigma' e^h they would multiply 0 by infinity there. Ours is written so that the limit is finite."""
    with pytest.raises(ValueError, match="final_sigmas_type"):
        make(Case(name, {**SD, "algorithm_type": algorithm}, 10, solver))
    path, z = schedules.scaled_linear().path(10), draw(3).double()
    network = PointNetwork(path.schedule.alphas_cumprod)
    x = solvers.sample(solver, network, draw(1).double(), path, noise=lambda step: z)
    assert distance(x, torch.full_like(x, POINT)) <= EXACT


@pytest.mark.parametrize("name", ["EulerDiscrete", "EDMEuler"])
def test_euler_schedulers_churn_after_the_network_has_looked(name: str) -> None:
    """s_churn: they add the noise of algorithm 2 (Karras et al. 2022) inside step, when the network has been evaluated
    on the state without it, at its level; what it said is then used for the state with it. On data that are one point
    even a perfect network then points elsewhere. Ours adds it before, and tells the level that it leads to."""
    schedule = schedules.edm() if name == "EDMEuler" else schedules.scaled_linear()

    def of_edm(x: Any, t: Any) -> Any:
        s = torch.exp(4 * torch.as_tensor(t).double()).reshape(-1, 1, 1, 1)
        root = (s**2 + 0.25).sqrt()
        return (POINT - 0.25 / root**2 * (x * root)) * root / (0.5 * s)

    network = of_edm if name == "EDMEuler" else PointNetwork(schedule.alphas_cumprod)
    case, found = Case(name, {} if name == "EDMEuler" else {**SD, **LEADING}, 10, "euler"), {}
    x = draw(1).double().as_subclass(Wide)
    for churn in (0.0, 4.0):
        scheduler = make(case, wide=True)
        scheduler.set_begin_index(5)
        t = scheduler.timesteps[5]
        inputs = scheduler.scale_model_input(x, t)
        found[churn] = scheduler.step(network(inputs, t), t, x, s_churn=churn, return_dict=False)[1]
    assert distance(found[0.0], torch.full_like(x, POINT)) <= CLOSE  # its timesteps and sigmas are float32
    assert distance(found[4.0], torch.full_like(x, POINT)) > 0.1
    path = schedule.path(10) if name == "EDMEuler" else schedule.path(10, offset=1)
    plan = pyguide.compile("euler", path, prediction="edm" if name == "EDMEuler" else "epsilon", s_churn=4.0)
    noises = [draw(3 + k).double() for k in range(len(plan.stochastic_rows))]
    assert len(noises) == 10
    for event in pyguide.Sampler(network, plan).stream(draw(1).double() * path.init_scale, noises=noises):
        assert distance(event.denoised, torch.full_like(event.x, POINT)) <= EXACT


# ---- coefficients -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("plms", [True, False])
def test_pndm_scheduler_mixes_velocities_of_different_levels(plms: bool) -> None:
    """With prediction_type="v_prediction" it mixes the v of several levels with Adams' weights and turns the mix into
    noise with the alpha and sigma of the last one. Noise is what the method mixes: on data that are one point it is the
    same at all levels, and v is not."""
    gap = {}
    for prediction in ({}, V):
        case = Case("PNDM", {**SD, **LEADING, **prediction, "skip_prk_steps": plms}, 20, "plms" if plms else "pndm")
        network = PointNetwork(make(case).alphas_cumprod.double(), case.prediction)
        peer = run(case, F64, model=network)
        ours = Ours(case, peer)
        wanted = exact(ours.start(F64), ours.path)
        gap[case.prediction] = distance(peer.x, wanted)
        assert distance(ours.solve(network=network), wanted) <= EXACT
    assert gap["epsilon"] <= EXACT
    assert gap["v"] > 1e-2


def _held_at(case: Case, D: Any) -> tuple[float, Any]:
    """(mean of the peer's end, levels lam), its D at a level being D(lam), from x = 0 and without noise."""
    scheduler = make(case, wide=True)
    lam = -np.log(scheduler.sigmas[: -1 if case.null else None].numpy())
    x = torch.zeros(1, 1, dtype=F64).as_subclass(Wide)
    for t, level in zip(scheduler.timesteps, lam[:-1]):
        output = torch.full_like(x, D(level))
        x = scheduler.step(output, t, x, variance_noise=torch.zeros_like(x), return_dict=False)[0]
    return float(x), lam


def test_stochastic_multistep_of_order_3_has_a_wrong_sign() -> None:
    """DPMSolverMultistepScheduler, "sde-dpmsolver++": its third-order step weighs the curvature of D with
    (1 - e^-2h - 2h) / (2h)^2 - 1/2, which tends to -1 with h; + 1/2 would make it tend to 0. So its order is 1, and its
    error larger than that of its own order 2. For D = lam^2, whose mean is known, on equal steps in lam."""
    errors: dict[str, list[float]] = {"3": [], "2": [], "ours": [], "exact": []}
    for steps in (41, 81, 161):
        for order in ("3", "2"):
            config = {**SD, **X0, **MIN, **SDE, **FULL, "use_lu_lambdas": True, "solver_type": "heun"}
            case = Case("DPMSolverMultistep", {**config, "solver_order": int(order)}, steps, "", null=True)
            found, lam = _held_at(case, lambda level: level**2)
            alpha, sigma = 1 / np.hypot(1, np.exp(-lam)), np.exp(-lam) / np.hypot(1, np.exp(-lam))
            drift = quad(lambda u, end=lam[-1]: 2 * math.exp(2 * (u - end)) * u * u, lam[0], lam[-1], epsabs=1e-13)
            mean = drift[0] * alpha[-1]
            errors[order].append(abs(found - mean))
        path = NoisePath(alpha, sigma, np.arange(steps - 1), schedules.scaled_linear())
        for name, exactly in (("ours", False), ("exact", True)):
            x = solvers.sample(
                "dpmpp_3m_sde",
                lambda x, t, lam=lam: x * 0 + lam[int(t[0])] ** 2,
                np.zeros((1, 1)),
                path,
                prediction="sample",
                noise=lambda step: np.zeros((1, 1)),
                exact_curvature=exactly,
            )
            errors[name].append(abs(float(x[0, 0]) - mean))
    halved = {name: [a / b for a, b in itertools.pairwise(found)] for name, found in errors.items()}
    assert max(halved["3"]) < 2.4  # order 1
    assert min(halved["2"]) > 3.6  # order 2
    assert min(halved["ours"]) > 3.6
    assert errors["3"][-1] > 10 * errors["2"][-1] > 10 * errors["ours"][-1] > 1e4 * errors["exact"][-1]


def test_stochastic_single_steps_draw_independent_noises_for_a_step_and_its_part() -> None:
    """DPMSolverSinglestepScheduler, "sde-dpmsolver++": the noise of the step to a level between and that of the whole
    step are two draws, where those of one path of the SDE correlate. The result has the wrong variance: its weak order
    is 1, and it is further off than its own order 1. dpmpp_sde draws both from one Brownian motion.

    On data N(0, d^2), where all is linear: start and noises are unit vectors, and what comes out is their weights.
    """
    d, off = 0.5, {}
    for steps in (42, 82, 162):
        for order in (1, 2):
            config = {**SD, **X0, **MIN, **SDE, **FULL, "use_exponential_sigmas": True, "solver_order": order}
            scheduler = make(Case("DPMSolverSinglestep", config, steps, ""), wide=True)
            s = scheduler.sigmas.numpy()[:-1]  # the level that it repeats
            alpha, sigma = 1 / np.hypot(1, s), s / np.hypot(1, s)
            weight = alpha * d**2 / (alpha**2 * d**2 + sigma**2)  # D = weight x
            count = steps - 2  # a multiple of the order
            units = torch.eye(steps, dtype=F64) * math.hypot(alpha[0] * d, sigma[0])
            x = units[:1].as_subclass(Wide)
            drawn = mock.Mock(side_effect=list(torch.eye(steps, dtype=F64)[1:, None]))
            with mock.patch.object(sys.modules[type(scheduler).__module__], "randn_tensor", drawn):
                for i, t in enumerate(scheduler.timesteps[:count]):
                    x = scheduler.step(x * weight[i], t, x, return_dict=False)[0]
            variance = (alpha[count] * d) ** 2 + sigma[count] ** 2
            off.setdefault(order, []).append(float((x**2).sum()) / variance - 1)
        grid = slice(0, count + 1, 2)  # our two evaluations a step are at the same levels
        path = NoisePath(alpha[grid], sigma[grid], np.arange(count // 2), schedules.scaled_linear())
        evaluation, normals = iter(weight), iter(np.eye(steps)[1:])
        y = solvers.sample(
            "dpmpp_sde",
            lambda x, t, evaluation=evaluation: x * next(evaluation),
            units[0].numpy(),
            path,
            prediction="sample",
            noise=lambda step, normals=normals: next(normals),
        )
        off.setdefault("ours", []).append(float(y @ y) / variance - 1)
    assert abs(off[2][-2] / off[2][-1]) < 2.2  # order 1
    assert abs(off["ours"][-2] / off["ours"][-1]) > 3.6  # order 2
    for theirs_1, theirs_2, ours in zip(off[1], off[2], off["ours"]):
        assert abs(theirs_2) > abs(theirs_1) > 5 * abs(ours)


def test_sa_solver_scheduler_has_no_digits_left_on_dense_grids() -> None:
    """Its weights are differences of e^lam times polynomials in lam, and not of lam' - lam: with four values on a grid
    of beta sigmas, whose points are close at both ends, float32 keeps none of their digits. Ours keep five."""
    config = {**LINEAR, **LEADING, **FREE, "use_beta_sigmas": True, "tau_func": 0.0}
    config = {k: v for k, v in config.items() if k not in FREE} | {"predictor_order": 2, "corrector_order": 4, **FULL}
    options = {"predictor_order": 2, "corrector_order": 4, "tau": 0.0, "lower_order_final": False}
    case = Case("SASolver", config, 50, "sa_solver", options, null=True)
    narrow, wide = run(case, F32), run(case, F64)
    assert distance(narrow.x, wide.x) > 0.5
    ours = Ours(case, wide)
    assert distance(ours.sample(ours.plan, F32), ours.solve()) <= CLOSE
