"""Single-step, ancestral and SDE solvers: identities, limits, refusals, evaluations and slots."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
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


def test_churn_is_refused_on_flow_paths() -> None:
    with pytest.raises(ValueError, match=r"^s_churn: .*flow"):
        run("dpm2", FLOW, s_churn=1.0)


def test_a_step_too_long_for_noise_prediction_is_refused() -> None:
    """Cosine, trailing, 4 steps: sigma / alpha falls from 20,291 to 0.4 in one step of three grid points. On noise its
    weights are 9e6, and 1e-9 / 2^-52 = 4.5e6 of them are what rounding of the predictions allows."""
    path = schedules.cosine().path(4, spacing="trailing")
    message = r"^path: the step from sigma/alpha 20291.2 to 0.42\d* weighs .* by 9e\+06, which no float64 .* on data"
    with pytest.raises(ValueError, match=message):
        solvers.sample("dpm_solver_3s", fail, X, path, prediction="sample", inner="grid")
    with pytest.raises(ValueError, match=message):
        pyguide.compile("dpm_solver_3s", path, prediction="v", inner="grid")
    for name in ("dpm_solver_2s", "dpmpp_2s", "dpmpp_3s"):
        assert pyguide.compile(name, path, prediction="v", inner="grid").evaluations == 4


@pytest.mark.parametrize("editable", [False, True])
@pytest.mark.parametrize("steps", [7, 10, 50, 100])
def test_a_long_step_on_noise_is_the_published_one(steps: int, editable: bool) -> None:
    """What is below it runs as published, however little it is worth: weights of 2e6 at 7 steps. The tables follow to
    1e-9, the limit of the compiler."""
    path = schedules.cosine().path(steps, spacing="trailing")
    plan = pyguide.compile("dpm_solver_3s", path, prediction="v", inner="grid", editable=editable)
    assert plan.evaluations == steps
    assert plan.replay_error <= 1e-9


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
