"""Single-step, ancestral and SDE solvers: identities, limits, refusals, evaluations and slots."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from gaussians import network_of
from handwritten import FLOW, PATHS, ZERO_SNR, X, Z, fail, network, run, same

import pyguide
from pyguide import schedules, solvers
from pyguide.path import NoisePath

ALL = [
    "ddpm",
    "dpm2",
    "dpm2_ancestral",
    "dpmpp_2s",
    "dpmpp_3s",
    "dpm_solver_2s",
    "dpm_solver_3s",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
]
SINGLE = ["dpmpp_2s", "dpmpp_3s", "dpm_solver_2s", "dpm_solver_3s"]


def test_names_that_are_one_method() -> None:
    for kind, path in PATHS.items():
        same(run("dpm2_ancestral", path, eta=0.0), run("dpm_solver_2s", path))
        same(run("dpmpp_2s_ancestral", path, eta=0.0), run("dpmpp_2s", path))
        same(run("dpmpp_sde", path, eta=0.0), run("dpmpp_2s", path))
        if kind == "flow":  # sigma is its own variable there
            assert np.abs(run("dpm2", path) - run("dpm_solver_2s", path)).max() > 1e-3
        else:
            same(run("dpm2", path), run("dpm_solver_2s", path))
        assert np.abs(run("dpm_solver_2s", path) - run("dpmpp_2s", path)).max() > 1e-3


def one_step(alpha: float, sigma: float, to: tuple[float, float], schedule: Any) -> NoisePath:
    return NoisePath(np.array([alpha, to[0]]), np.array([sigma, to[1]]), np.array([700.0]), schedule)


@pytest.mark.parametrize("schedule", [schedules.linear(zero_snr=True), schedules.flow()], ids=["vp", "flow"])
@pytest.mark.parametrize("name", ALL)
def test_a_step_from_pure_noise(name: str, schedule: Any) -> None:
    """x is the noise itself: x' = alpha' D + sigma' x, or sigma' z where all noise is new. One evaluation."""
    to = (0.6, 0.8) if schedule.discrete else (0.4, 0.6)
    calls = []

    def told(x: Any, t: Any) -> Any:
        calls.append(x.copy())
        return np.cos(x) if len(calls) == 1 else x * np.nan

    new = name in ("ddpm", "dpm2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde")
    wanted = to[0] * np.cos(X) + to[1] * (Z[0] if new else X)
    if name == "dpm2" and not schedule.discrete:  # sigma = 1 is finite
        return
    path = one_step(0.0, 1.0, to, schedule)
    same(solvers.sample(name, told, X, path, prediction="sample", noise=lambda i: Z[0].copy()), wanted)
    assert len(calls) == 1


@pytest.mark.parametrize("schedule", [schedules.linear(), schedules.flow(), schedules.edm()], ids=["vp", "flow", "edm"])
@pytest.mark.parametrize("name", ALL)
def test_a_step_to_clean_data(name: str, schedule: Any) -> None:
    """x' = D, of one evaluation and without noise."""
    path, calls = one_step(*schedule.alpha_sigma(-0.3), (1.0, 0.0), schedule), []

    def told(x: Any, t: Any) -> Any:
        calls.append(t)
        return np.cos(x)

    same(solvers.sample(name, told, X, path, prediction="sample", noise=fail), np.cos(X))
    assert len(calls) == 1


def test_churn_at_pure_noise_keeps_it_so() -> None:
    """The limit of x^ = alpha^ y^ where alpha is 0: (x + sqrt(gamma (2 + gamma)) z) / (1 + gamma), of unit variance."""
    gamma, inputs = min(1.2 / ZERO_SNR.steps, math.sqrt(2) - 1), []

    def watch(x: Any, t: Any) -> Any:
        inputs.append(x.copy())
        return 0 * x

    solvers.sample(
        "dpm2", watch, X, ZERO_SNR, prediction="sample", noise=lambda i: Z[i].copy(), s_churn=1.2, s_noise=1.0
    )
    same(inputs[0], (X + math.sqrt(gamma * (2 + gamma)) * Z[0]) / (1 + gamma))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dpm2", {}),
        ("dpm2", {"s_churn": 2.0, "s_noise": 0.0}),
        ("dpm2", {"s_churn": 2.0, "s_tmin": 1e6}),
        *(
            (n, o)
            for n in ("dpm2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde")
            for o in ({"eta": 0.0}, {"s_noise": 0.0})
        ),
    ],
    ids=str,
)
def test_noise_without_a_weight_is_not_drawn(name: str, options: Any) -> None:
    out = solvers.sample(name, network, X, PATHS["vp"], prediction="sample", noise=fail, **options)
    assert np.isfinite(out).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddpm", {"variance": "learned"}, r'^variance: expected "small" or "large", got \'learned\''),
        ("dpm2", {"s_churn": -1.0}, r"^s_churn: expected a number >= 0, got -1"),
        ("dpm2", {"s_churn": math.nan}, r"^s_churn: expected"),
        *(
            (name, {option: bad}, rf"^{option}: expected a finite number >= 0, got {bad}")
            for name in ("dpm2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde")
            for option in ("eta", "s_noise")
            for bad in (-0.1, math.nan, math.inf)
        ),
        *(("dpmpp_sde", {"r": bad}, r"^r: expected a number in \(0, 1\], got") for bad in (0.0, 1.1, -1.0, math.nan)),
        *((name, {"inner": "half"}, r'^inner: expected "midpoint" or "grid", got \'half\'') for name in SINGLE),
        *((name, {"solver_type": "bh1"}, r'^solver_type: expected "midpoint" or "heun"') for name in SINGLE),
    ],
    ids=str,
)
def test_options_are_refused_before_the_model_runs(name: str, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solvers.sample(name, fail, X, PATHS["edm"], prediction="sample", **options)
    with pytest.raises(ValueError, match=message):
        pyguide.compile(name, PATHS["edm"], prediction="sample", **options)


def test_churn_is_refused_on_flow_paths() -> None:
    with pytest.raises(ValueError, match=r"^s_churn: .*flow"):
        run("dpm2", FLOW, s_churn=1.0)


def test_a_step_too_long_for_noise_prediction_is_refused() -> None:
    """Cosine, trailing: sigma / alpha falls from 20,291 to 1.3 in one step of three grid points. The exact denoiser of
    a mixture with means up to 2 gives 8e5 there (measured); on data the same step is no worse than DDIM's."""
    path = schedules.cosine().path(7, spacing="trailing")
    with pytest.raises(ValueError, match=r"^path: the step from sigma/alpha 20291.*solver on data"):
        solvers.sample("dpm_solver_3s", fail, X, path, prediction="sample", inner="grid")
    with pytest.raises(ValueError, match=r"^path: the step from sigma/alpha 80 .* no use"):
        pyguide.compile("dpm2_ancestral", schedules.edm().path(2), prediction="sample")
    assert pyguide.compile("dpm_solver_2s", path, prediction="sample", inner="grid").evaluations == 7  # weights 1,400
    y = np.linspace(-1, 1, 5)
    net = network_of(path)
    run_on = {
        name: solvers.sample(name, net, y, path, prediction="sample", inner="grid") for name in ("dpmpp_3s", "dpmpp_2s")
    }
    assert all(np.abs(out).max() < 3 for out in run_on.values())


@pytest.mark.parametrize("kind", ["vp", "flow", "edm"])
@pytest.mark.parametrize(("name", "options", "evaluations"), [
    ("ddpm", {}, 1),
    ("dpm2", {}, 2),
    ("dpm2_ancestral", {}, 2),
    ("dpmpp_2s", {}, 2),
    ("dpmpp_3s", {}, 3),
    ("dpm_solver_2s", {}, 2),
    ("dpm_solver_3s", {}, 3),
    ("dpmpp_2s_ancestral", {}, 2),
    ("dpmpp_sde", {}, 2),
    ("dpmpp_2s", {"inner": "grid"}, 1),
    ("dpm_solver_3s", {"inner": "grid", "solver_type": "heun"}, 1),
])  # fmt: skip
def test_evaluations_and_slots(name: str, options: Any, evaluations: int, kind: str) -> None:
    """k a step, one in the last; two slots, what is to come at the step's end beside the state at hand. Order 3 needs
    one more where the caller may change that state."""
    path = PATHS[kind]
    for editable in (False, True):
        plan = pyguide.compile(name, path, prediction="v", clip=1.0, editable=editable, **options)
        assert plan.evaluations == evaluations * (path.steps - 1) + 1
        assert plan.slots == (1 if name == "ddpm" else 3 if editable and "3s" in name else 2)
        assert plan.residual < 1e-13
        assert plan.replay_error < 1e-12
