"""DDPM, ancestral and SDE solvers of single steps: published formulas by hand, exact laws, the noises of a step.

Weak orders of the defaults are measured in test_orders.py, limits and refusals in test_solvers_singlestep_limits.py.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from gaussians import alternating, path_of_ratios, uniform
from handwritten import (
    FLOW,
    PATHS,
    ZERO_SNR,
    Hand,
    X,
    Z,
    alpha_of,
    down_up,
    network,
    run,
    same,
    variance_of,
    weak_order,
)

from pyguide import schedules, solvers
from pyguide.path import NoisePath


# ---- DDPM ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("clip", [None, 0.7])
def test_ddpm_on_its_training_steps(variance: str, clip: float | None) -> None:
    """Ho et al. 2020: algorithm 2 with the posterior mean of eq. 7 from x0 of eq. 15, sigma_t^2 = beta~_t or beta_t."""
    path = schedules.linear(0.01, 0.3, train_steps=6).path(6)
    beta = np.linspace(0.01, 0.3, 6)
    bar = np.cumprod(1 - beta)
    x, z = X, iter(Z)
    for t in range(5, -1, -1):
        before = bar[t - 1] if t else 1.0
        clean = (x - math.sqrt(1 - bar[t]) * network(x, t)) / math.sqrt(bar[t])
        clean = clean if clip is None else np.clip(clean, -clip, clip)
        x = (
            math.sqrt(before) * beta[t] / (1 - bar[t]) * clean
            + math.sqrt(1 - beta[t]) * (1 - before) / (1 - bar[t]) * x
        )
        if t:
            x = x + math.sqrt(beta[t] if variance == "large" else (1 - before) / (1 - bar[t]) * beta[t]) * next(z)
    drawn = iter(Z)
    got = solvers.sample("ddpm", network, X, path, noise=lambda i: next(drawn).copy(), clip=clip, variance=variance)
    same(got, x)


def test_ddpm_is_ddim_at_eta_1() -> None:
    """With the small variance, and E re-derived from the clipped D: Song et al. 2021, section 4.1."""
    for path in [*PATHS.values(), ZERO_SNR, FLOW]:
        same(run("ddpm", path, clip=0.5), run("ddim", path, clip=0.5, eta=1.0, use_clipped_model_output=True))


@pytest.mark.parametrize("kind", ["vp", "flow", "edm"])
def test_ddpm_variance_is_exact_for_a_point_or_for_a_unit_normal(kind: str) -> None:
    """Ho et al. 2020, section 3.2: beta~ if x0 is one point, beta if x0 ~ N(0, 1), where x_t ~ N(0, 1) for all t."""
    path = path_of_ratios(kind, uniform(7, 8.0, 0.2))
    assert variance_of("ddpm", path, 0.0) == pytest.approx(path.sigma[-1] ** 2, rel=1e-12)
    if kind == "vp":
        assert variance_of("ddpm", path, 1.0, variance="large") == pytest.approx(1, rel=1e-12)
        assert variance_of("ddpm", path, 1.0) < 0.99


def test_ddpm_large_weak_order() -> None:
    assert weak_order("ddpm", uniform, variance="large") == pytest.approx(1, abs=0.15)


# ---- ancestral and SDE -----------------------------------------------------------------------------------------------
NOISES = [{"eta": 1.0}, {"eta": 0.6, "s_noise": 1.1}, {"eta": 0.0}, {"eta": 1.05}]


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("options", NOISES, ids=str)
@pytest.mark.parametrize("name", ["dpm2_ancestral", "dpmpp_2s_ancestral"])
def test_ancestral_steps_of_k_diffusion(name: str, options: Any, kind: str) -> None:
    """At eta 1.05 s_down is 0 in long steps: Euler's step, and the noise of s' (which sample_dpm_2_ancestral omits)."""
    hand = Hand(PATHS[kind])
    y, eta, s_noise = hand.y, options["eta"], options.get("s_noise", 1.0)
    shortened = 0
    for _, (s, to) in hand.steps():
        down, up = down_up(s, to, eta)
        D = hand.D(y, s)
        if down == 0:
            y, shortened = D, shortened + (to > 0)
        elif name == "dpm2_ancestral":
            middle = math.sqrt(s * down)
            inner = y + (y - D) / s * (middle - s)
            y = y + (inner - hand.D(inner, middle)) / middle * (down - s)
        else:
            h = math.log(s / down)
            inner = math.exp(-h / 2) * y - math.expm1(-h / 2) * D
            y = down / s * y - math.expm1(-h) * hand.D(inner, s * math.exp(-h / 2))
        if up > 0:
            y = y + next(hand.z) * up * s_noise
    np.testing.assert_allclose(run(name, hand.path, **options), hand.result(y), rtol=1e-10, atol=1e-10)
    assert shortened == 0 or eta > 1
    if kind == "edm" and eta > 1:
        assert shortened > 0


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("r", [0.5, 0.3, 1.0])
@pytest.mark.parametrize("options", NOISES[:3], ids=str)
def test_dpmpp_sde_of_k_diffusion(options: Any, r: float, kind: str) -> None:
    """With increments of one Brownian motion: over (s, m) z_1, over (s, s') sqrt(q) z_1 + sqrt(1 - q) z_2 with
    q = (s - m) / (s - s'), in units of their deviations."""
    hand = Hand(PATHS[kind])
    y, eta, s_noise = hand.y, options["eta"], options.get("s_noise", 1.0)
    for _, (s, to) in hand.steps():
        D = hand.D(y, s)
        if to == 0:
            y = D
            continue
        middle = math.exp((1 - r) * math.log(s) + r * math.log(to)) if r < 1 else to
        q = (s - middle) / (s - to)
        z1 = next(hand.z) if eta > 0 else 0.0
        z2 = next(hand.z) if eta > 0 and r < 1 else 0.0
        down, up = down_up(s, middle, eta)
        inner = down / s * y + (1 - down / s) * D + z1 * s_noise * up
        mixed = (1 - 1 / (2 * r)) * D + 1 / (2 * r) * hand.D(inner, middle)
        down, up = down_up(s, to, eta)
        y = down / s * y + (1 - down / s) * mixed + (math.sqrt(q) * z1 + math.sqrt(1 - q) * z2) * s_noise * up
    np.testing.assert_allclose(run("dpmpp_sde", hand.path, r=r, **options), hand.result(y), rtol=1e-11, atol=1e-11)


def test_at_r_1_the_second_evaluation_is_at_the_next_grid_point() -> None:
    """What the model is told there is the grid's own timestep, and the step draws one normal."""
    path, told, drawn = path_of_ratios("vp", [4.0, 2.0, 1.0]), [], []

    def watch(x: Any, t: Any) -> Any:
        told.append(float(t[0]))
        return network(x, t)

    def noise(i: int) -> Any:
        drawn.append(i)
        return Z[i].copy()

    solvers.sample("dpmpp_sde", watch, X, path, prediction="sample", noise=noise, r=1.0)
    assert told == [1e4, 1e4 + 1, 1e4 + 1, path.level(2).timestep]
    assert drawn == [0, 1]


def noises_of_a_step(path: NoisePath, **options: Any) -> Any:
    """[states, draws]: what each draw adds to the model's inputs and the result, for D = 0 and a start of 0."""
    count = 2 * path.steps
    inputs = []

    def silent(x: Any, t: Any) -> Any:
        inputs.append(x.copy())
        return 0 * x

    drawn = iter(np.eye(count))
    out = solvers.sample(
        "dpmpp_sde", silent, np.zeros(count), path, prediction="sample", noise=lambda i: next(drawn).copy(), **options
    )
    return np.array([*inputs, out])


@pytest.mark.parametrize("kind", ["vp", "flow", "edm"])
@pytest.mark.parametrize("r", [0.5, 0.3, 0.9])
def test_the_two_noises_of_a_dpmpp_sde_step(r: float, kind: str) -> None:
    """Their variances are s_up^2, their correlation sqrt((s - m) / (s - s')): increments from s of one motion in s."""
    s, to = 3.0, 1.2
    path = path_of_ratios(kind, [s, to])
    middle = s ** (1 - r) * to**r
    _, inner, whole = noises_of_a_step(path, r=r)
    alpha = alpha_of(path, -math.log(middle))[0]
    assert inner @ inner == pytest.approx((alpha * down_up(s, middle, 1.0)[1]) ** 2, rel=1e-12)
    assert whole @ whole == pytest.approx((path.alpha[1] * down_up(s, to, 1.0)[1]) ** 2, rel=1e-12)
    correlation = inner @ whole / math.sqrt((inner @ inner) * (whole @ whole))
    assert correlation == pytest.approx(math.sqrt((s - middle) / (s - to)), rel=1e-12)


def test_they_correlate_as_the_noises_of_the_diffusion_do() -> None:
    """Of dy = 2 (D - y) dlam + sqrt(2) s dW, D fixed: n = int e^(-2 (end - lam)) sqrt(2) s dW over (0, r h) and (0, h)
    correlate by e^(-(1 - r) h) sqrt((1 - e^(-2 r h)) / (1 - e^(-2 h))). Both are sqrt(r) + O(h), as weak order 2 needs.
    """
    r, gaps = 0.4, []
    for h in (0.1, 0.05, 0.025):
        _, inner, whole = noises_of_a_step(path_of_ratios("edm", [1.0, math.exp(-h)]), r=r)
        correlation = inner @ whole / math.sqrt((inner @ inner) * (whole @ whole))
        gaps.append(correlation - math.exp(-(1 - r) * h) * math.sqrt(math.expm1(-2 * r * h) / math.expm1(-2 * h)))
        assert abs(correlation - math.sqrt(r)) < h
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.1)
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.1)


def test_noises_of_different_steps_are_independent() -> None:
    """With D = 0 a later state holds the earlier noise times s_down / s: taking that out leaves what is independent."""
    path = path_of_ratios("edm", [4.0, 2.0, 1.0])
    _, _, first, _, second = noises_of_a_step(path)
    own = second - first * down_up(2.0, 1.0, 1.0)[0] / 2.0
    assert own @ first == pytest.approx(0, abs=1e-14)
    assert own @ own == pytest.approx(down_up(2.0, 1.0, 1.0)[1] ** 2, rel=1e-12)


def test_independent_noises_are_another_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weak order 1 instead of 2, and another result."""
    path = PATHS["edm"]
    assert weak_order("dpmpp_sde", uniform) == pytest.approx(2, abs=0.15)
    correlated = run("dpmpp_sde", path)
    monkeypatch.setattr(NoisePath, "brownian", lambda self, t0, t1: self._increments._noise(0))
    assert weak_order("dpmpp_sde", uniform) == pytest.approx(1, abs=0.15)
    assert np.abs(run("dpmpp_sde", path) - correlated).max() > 1e-2


@pytest.mark.parametrize("name", ["dpm2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde"])
def test_weak_order_for_every_eta(name: str) -> None:
    """Every eta has the same marginals; eta 1 is measured in test_orders.py."""
    assert weak_order(name, alternating, eta=0.5) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("name", ["ddpm", "dpm2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde"])
@pytest.mark.parametrize("kind", ["vp", "flow", "edm"])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_marginal_of_a_point_is_exact(name: str, kind: str, steps: int) -> None:
    """With x0 known, D = x0: s_down and s_up keep q(x_s | x0) for any number of steps."""
    path = path_of_ratios(kind, uniform(steps, 8.0, 0.2))
    for options in [{}] if name == "ddpm" else [{}, {"eta": 0.4}]:
        assert variance_of(name, path, 0.0, **options) == pytest.approx(path.sigma[-1] ** 2, rel=1e-12)


@pytest.mark.parametrize("name", ["dpm2_ancestral", "dpmpp_2s_ancestral"])
def test_variance_of_the_ancestral_steps_in_closed_form(name: str) -> None:
    """For D = g(s) y, g = w^2 / (w^2 + s^2), a step is y' = k y + s_up z."""
    width, s = 0.6, uniform(9, 8.0, 0.2)
    var = width**2 + s[0] ** 2
    for here, ahead in itertools.pairwise(s):
        down, up = down_up(here, ahead, 1.0)
        middle = math.sqrt(here * down)
        g, g_middle = (width**2 / (width**2 + v**2) for v in (here, middle))
        inner = g + (1 - g) * middle / here
        k = (
            1 + (down - here) * (1 - g_middle) * inner / middle
            if name == "dpm2_ancestral"
            else down / here + (1 - down / here) * g_middle * inner
        )
        var = k**2 * var + up**2
    for kind in ("vp", "flow", "edm"):
        path = path_of_ratios(kind, s)
        assert variance_of(name, path, width) == pytest.approx(path.alpha[-1] ** 2 * var, rel=1e-11)
