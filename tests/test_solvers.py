"""Solvers against theory: order of convergence, published formulas written out by hand, exact laws of the stochastic
ones."""

from __future__ import annotations

import itertools
import math
from typing import Any

import gaussians
import numpy as np
import pytest
from gaussians import alternating, exact, fitted_order, gentle_start, network_of, path_of_ratios, uniform

import pyguide
from pyguide import schedules, solvers

EVEN = (32, 46, 64, 90, 128)
FINE = (64, 90, 128, 180, 256)


def error_and_step(
    solver: str, kind: str, grid: Any, steps: int, ends: tuple[float, float], options: Any
) -> tuple[float, float]:
    """rms distance from the exact solution of the ODE at the end, and the largest step in lam."""
    start, end = ends
    y = np.linspace(-1.4, 1.6, 7) * math.hypot(start, 1.4)
    path = path_of_ratios(kind, grid(steps, start, end))
    out = solvers.sample(solver, network_of(path), y * path.alpha[0], path, prediction="sample", **options)
    return float(np.sqrt(np.mean((out / path.alpha[-1] - exact(y, start, end)) ** 2))), float(np.diff(path.lam).max())


def measured_order(solver: str, kind: str, grid: Any, ends: tuple[float, float], counts: Any, options: Any) -> float:
    errors, steps = zip(*(error_and_step(solver, kind, grid, n, ends, options) for n in counts), strict=True)
    return fitted_order(1 / np.array(steps), errors)


def test_the_exact_solution() -> None:
    """The integrator against the closed form of one Gaussian N(m, w^2): y - m shrinks as sqrt(s^2 + w^2)."""
    m, w, y = 0.7, 0.4, np.array([-3.0, 0.1, 5.0])
    solved = exact(y, 5.0, 0.1, lambda y, s: m + w * w / (w * w + s * s) * (y - m))
    np.testing.assert_allclose(solved, m + (y - m) * math.sqrt((0.01 + w * w) / (25 + w * w)), rtol=1e-12)


def unipc_order(order: int, corrector: bool, lower_order_final: bool, warm_up: bool) -> int:
    """Global order of UniPC from the local errors of its steps.

    A step of predictor order p has local error h^(p+1), one of the corrector too h^(p+2): p or p + 1 globally. A local
    error that is made once counts as it is. The first step is of order 1 and corrected (h^3), or not (h^2). The last
    step has no evaluation after it, so no corrector: h^(p+1), with lower_order_final p = 1: h^2.
    """
    orders = [order + corrector, 2 if lower_order_final else order + 1]
    if warm_up and order > 1:
        orders.append(3 if corrector else 2)
    return min(orders)


SINGLE = [
    ("ddim", {}, 1),
    ("euler", {}, 1),
    ("euler_ancestral", {"eta": 0.0}, 1),
    ("heun", {}, 2),
    ("dpmpp_2m", {}, 2),  # its first step is of order 1: h^2 once
    ("dpmpp_2m", {"lower_order_final": True}, 2),  # so is then the last one
]
UNIPC = [
    {"order": order, "corrector": corrector, "lower_order_final": final, "solver_type": kind}
    for order in (1, 2, 3)
    for corrector in (True, False)
    for final in (True, False)
    for kind in ("bh1", "bh2")
]


@pytest.mark.parametrize("kind", ["vp", "flow", "edm"])
@pytest.mark.parametrize("grid", [uniform, alternating])
@pytest.mark.parametrize(("solver", "options", "order"), SINGLE)
def test_order(solver: str, options: Any, order: int, grid: Any, kind: str) -> None:
    assert measured_order(solver, kind, grid, (2.5, 0.4), EVEN, options) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("options", UNIPC, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("grid", [uniform, alternating, gentle_start])
def test_order_of_unipc(options: Any, grid: Any) -> None:
    """On gentle_start the first steps have length h^2, which shows the order p + 1 that the method has after its
    warm-up.

    Order 3 with corrector adds terms h^3 and h^4 of similar size; its ranges are those where the leading one shows.
    """
    ends, counts = (2.5, 0.4), EVEN
    if options["order"] == 3 and options["corrector"] and not options["lower_order_final"]:
        ends, counts = {uniform: (2.5, 0.4), alternating: (2.0, 0.3), gentle_start: (4.0, 0.4)}[grid], FINE
    theory = unipc_order(options["order"], options["corrector"], options["lower_order_final"], grid is not gentle_start)
    assert measured_order("unipc", "vp", grid, ends, counts, options) == pytest.approx(theory, abs=0.15)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_on_flow_from_pure_noise(solver: str, order: int) -> None:
    """From sigma = 1 (lam = -inf) in equal steps of sigma, the grid of a flow model: the limit is taken, not
    avoided."""
    noise = np.linspace(-2, 2, 7)
    sigma_end = 1 / 8

    def velocity(sigma: float, x: Any) -> Any:
        if sigma == 1:
            return x - gaussians.SHARES @ gaussians.MEANS
        return (x - gaussians.denoiser(x / (1 - sigma), sigma / (1 - sigma))) / sigma

    from scipy.integrate import solve_ivp

    reference = solve_ivp(velocity, (1.0, sigma_end), noise, method="DOP853", rtol=1e-13, atol=1e-13).y[:, -1]
    errors = []
    for steps in EVEN:
        sigma = np.linspace(1, sigma_end, steps + 1)
        with np.errstate(divide="ignore"):
            path = path_of_ratios("flow", sigma / (1 - sigma))
        out = solvers.sample(solver, network_of(path), noise, path, prediction="sample")
        errors.append(np.sqrt(np.mean((out - reference) ** 2)))
    assert fitted_order(EVEN, errors) == pytest.approx(order, abs=0.15)


# ---- the published formulas, by hand ---------------------------------------------------------------------------------
X = np.random.default_rng(0).standard_normal(6)
VP = schedules.scaled_linear().path(6, offset=1)


def smooth(x: Any, t: Any) -> Any:
    return np.sin(x + 0.01 * float(np.ravel(t)[0]))


def same(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_ddim_equation_12() -> None:
    """Song et al. 2021, eq. 12 and 16, in alpha-bar and the network's epsilon, with clipping of x0."""
    for eta, clip, again in ((0.0, None, False), (0.6, None, False), (1.0, 0.8, False), (0.3, 0.8, True)):
        z = np.random.default_rng(1).standard_normal((6, 6))
        x = X
        bar = [*VP.alpha[:-1] ** 2, 1.0]
        for i in range(6):
            epsilon = smooth(x, VP.timestep[i])
            clean = (x - math.sqrt(1 - bar[i]) * epsilon) / math.sqrt(bar[i])
            if clip:
                clean = np.clip(clean, -clip, clip)
            if again:
                epsilon = (x - math.sqrt(bar[i]) * clean) / math.sqrt(1 - bar[i])
            s = eta * math.sqrt((1 - bar[i + 1]) / (1 - bar[i])) * math.sqrt(1 - bar[i] / bar[i + 1])
            x = math.sqrt(bar[i + 1]) * clean + math.sqrt(max(0, 1 - bar[i + 1] - s * s)) * epsilon + s * z[i]
        got = solvers.sample(
            "ddim", smooth, X, VP, noise=lambda i, z=z: z[i].copy(), clip=clip, eta=eta, use_clipped_model_output=again
        )
        same(got, x)


def test_ddim_at_eta_1_is_the_ddpm_posterior() -> None:
    """Ho et al. 2020, eq. 6 and 7: mean and standard deviation of q(x_(t-1) | x_t, x0), on all training steps."""
    path = schedules.linear(0.01, 0.2, train_steps=5).path(5)
    rows = pyguide.compile("ddim", path, prediction="sample", eta=1.0).rows
    beta = np.linspace(0.01, 0.2, 5)
    bar = np.cumprod(1 - beta)
    for i, row in enumerate(rows[1:]):
        t = 4 - i
        before = bar[t - 1] if t else 1.0
        same(row.T[0][0] + row.e[0], math.sqrt(1 - beta[t]) * (1 - before) / (1 - bar[t]))
        same(row.d[0], math.sqrt(before) * beta[t] / (1 - bar[t]))
        same(row.n[0], math.sqrt((1 - before) / (1 - bar[t]) * beta[t]))


def test_flow_euler_is_a_step_along_the_velocity() -> None:
    path = schedules.flow(3.0).path(5)
    x = X
    for i in range(5):
        x = x + (path.sigma[i + 1] - path.sigma[i]) * smooth(x, path.timestep[i])
    same(solvers.sample("euler", smooth, X, path, prediction="flow"), x)


def test_euler_ancestral_of_k_diffusion() -> None:
    path = schedules.edm().path(6)
    z = np.random.default_rng(2).standard_normal((6, 6))
    x = X * 80
    s = path.sigma
    for i in range(6):
        D = smooth(x, path.timestep[i])
        up = min(s[i + 1], 0.7 * math.sqrt(s[i + 1] ** 2 * (s[i] ** 2 - s[i + 1] ** 2) / s[i] ** 2))
        down = math.sqrt(s[i + 1] ** 2 - up**2)
        x = x + (x - D) / s[i] * (down - s[i]) + z[i] * up * 1.1
    got = solvers.sample(
        "euler_ancestral", smooth, X * 80, path, prediction="sample", noise=lambda i: z[i].copy(), eta=0.7, s_noise=1.1
    )
    same(got, x)


@pytest.mark.parametrize("kind", ["edm", "vp", "flow"])
def test_heun_is_algorithm_2_of_karras(kind: str) -> None:
    """In y and s as printed; with churn off the flow path, where y = x, the slope is the velocity and time is sigma."""
    path = {"edm": schedules.edm().path(5), "vp": VP, "flow": schedules.flow().path(5)}[kind]
    z = np.random.default_rng(3).standard_normal((6, 6))
    a = np.ones(path.steps + 1) if kind == "flow" else path.alpha
    churn = {"s_churn": 2.0, "s_noise": 1.01, "s_tmin": 0.05, "s_tmax": 30.0} if kind != "flow" else {}
    s = path.sigma / a
    y = X * path.init_scale / a[0]

    def D(y: Any, s: float, lam: float | None = None) -> Any:
        level = path.at(-math.log(s)) if kind != "flow" else path.at(math.log((1 - s) / s) if s < 1 else -math.inf)
        return smooth(y * (level.alpha if kind != "flow" else 1), level.timestep)

    for i in range(path.steps):
        gamma = min(2.0 / path.steps, math.sqrt(2) - 1) if churn and 0.05 <= s[i] <= 30.0 else 0.0
        s_hat = s[i] * (1 + gamma)
        y_hat = y + math.sqrt(s_hat**2 - s[i] ** 2) * 1.01 * z[i]
        d = (y_hat - D(y_hat, s_hat)) / s_hat
        y = y_hat + (s[i + 1] - s_hat) * d
        if s[i + 1] > 0:
            y = y_hat + (s[i + 1] - s_hat) * (d + (y - D(y, s[i + 1])) / s[i + 1]) / 2
    got = solvers.sample(
        "heun", smooth, X * path.init_scale, path, prediction="sample", noise=lambda i: z[i].copy(), **churn
    )
    np.testing.assert_allclose(got, y * a[-1], rtol=1e-8, atol=1e-10)  # timesteps at off-grid levels are interpolated


def test_heun_from_pure_noise_begins_with_a_first_order_step() -> None:
    """sigma / alpha is infinite at zero terminal SNR: one evaluation, DDIM's step, then Heun's."""
    path = schedules.linear(zero_snr=True).path(4, spacing="trailing")
    first = path.alpha[1] * -smooth(X, path.timestep[0]) + path.sigma[1] * X
    rest = schedules.linear(zero_snr=True).path(timesteps=path.timestep[1:])
    got = solvers.sample("heun", smooth, X, path, prediction="v")
    same(got, solvers.sample("heun", smooth, first, rest, prediction="v"))
    assert pyguide.compile("heun", path, prediction="v").evaluations == 1 + 2 + 2 + 1


def test_euler_with_churn_is_that_of_k_diffusion() -> None:
    path = schedules.edm().path(6)
    z, s, x = np.random.default_rng(5).standard_normal((6, 6)), path.sigma, X * 80
    for i in range(6):
        gamma = min(2.0 / 6, math.sqrt(2) - 1) if 0.05 <= s[i] <= 30.0 else 0.0
        hat = s[i] * (1 + gamma)
        x = x + math.sqrt(hat**2 - s[i] ** 2) * 1.01 * z[i]
        x = x + (s[i + 1] - hat) * (x - np.clip(smooth(x, math.log(hat) / 4), -0.9, 0.9)) / hat
    churn = {"s_churn": 2.0, "s_tmin": 0.05, "s_tmax": 30.0, "s_noise": 1.01, "clip": 0.9}
    got = solvers.sample("euler", smooth, X * 80, path, prediction="sample", noise=lambda i: z[i].copy(), **churn)
    same(got, x)


def test_heun_is_stable_over_an_enormous_first_step() -> None:
    """Cosine, trailing: sigma / alpha falls from 20,000 to 7 in one step. Written in y, the terms of x cancel to 1 part
    in 3,000 (error 1e-8 after 11 steps, measured); collected, the float64 run agrees with 80-bit arithmetic to
    1e-12."""
    path = schedules.cosine().path(11, spacing="trailing")
    run = {}
    for dtype in (np.float64, np.longdouble):
        function = solvers.resolve("heun")

        def model(x: Any, level: Any, dtype: Any = dtype) -> Any:
            here = level if not isinstance(level, int) else path.level(level)
            m = np.tanh(x)
            return type("Output", (), {"denoised": np.clip(x * dtype(here.alpha) - m * dtype(here.sigma), -1, 1)})

        run[dtype] = function(model, X.astype(dtype), path, noise=None)
    error = np.abs(run[np.float64] - run[np.longdouble]).max() / np.abs(run[np.longdouble]).max()
    assert error < 1e-12


def test_dpmpp_2m_algorithm_2() -> None:
    """Lu et al. 2022b, algorithm 2, with r = h_previous / h."""
    x, last, lam = X, None, VP.lam
    for i in range(6):
        D = smooth(x, VP.timestep[i])
        if last is None or i == 5:
            mix = D
        else:
            r = (lam[i] - lam[i - 1]) / (lam[i + 1] - lam[i])
            mix = (1 + 1 / (2 * r)) * D - 1 / (2 * r) * last
        x = VP.sigma[i + 1] / VP.sigma[i] * x - VP.alpha[i + 1] * (math.exp(-(lam[i + 1] - lam[i])) - 1) * mix
        last = D
    same(solvers.sample("dpmpp_2m", smooth, X, VP, prediction="sample"), x)


def test_names_that_are_one_method() -> None:
    def run(name: str, path: Any = VP, prediction: str = "v", **options: Any) -> Any:
        return solvers.sample(name, smooth, X, path, prediction=prediction, **options)

    same(run("euler"), run("ddim"))
    same(run("euler_ancestral", eta=0.0), run("ddim"))
    same(run("unipc", order=1, corrector=False), run("ddim"))  # the exponential Euler step
    flow = schedules.flow().path(6)
    same(run("unipc", flow, "flow", order=1, corrector=False), run("euler", flow, "flow"))
    same(
        run("unipc", corrector=False, solver_type="bh2"), run("dpmpp_2m", lower_order_final=True)
    )  # UniP-2 with rho = 1/2
    for name in ("heun", "dpmpp_2m", "unipc"):
        assert np.abs(run(name) - run("ddim")).max() > 1e-3
    z = np.random.default_rng(4).standard_normal((6, 6))
    same(run("euler_ancestral", noise=lambda i: z[i].copy()), run("ddim", eta=1.0, noise=lambda i: z[i].copy()))


# ---- the law of the stochastic samplers ------------------------------------------------------------------------------
def variance(solver: str, path: Any, width: float, **options: Any) -> float:
    """Variance of the result for data N(0, width^2): the sampler is linear then, one column for x and one for each
    draw."""
    draws = path.steps
    start = np.zeros(draws + 1)
    start[0] = math.sqrt((path.alpha[0] * width) ** 2 + path.sigma[0] ** 2)
    drawn = iter(range(1, draws + 1))

    def noise(i: int) -> Any:
        z = np.zeros(draws + 1)
        z[next(drawn)] = 1
        return z

    network = network_of(path, lambda y, s: width**2 / (width**2 + s**2) * y)
    return float((solvers.sample(solver, network, start, path, prediction="sample", noise=noise, **options) ** 2).sum())


STOCHASTIC = [
    ("ddim", {"eta": 0.5}),
    ("ddim", {"eta": 1.0}),
    ("euler_ancestral", {}),
    ("euler_ancestral", {"eta": 0.3}),
]


@pytest.mark.parametrize("kind", ["vp", "flow", "edm"])
@pytest.mark.parametrize(("solver", "options"), STOCHASTIC)
def test_covariance_is_propagated_as_in_closed_form(solver: str, options: Any, kind: str) -> None:
    """y' = D + (s_down / s)(y - D) + s_up z with D = g y, g = w^2 / (w^2 + s^2): var' = (g + (1 - g) s_down / s)^2 var
    + s_up^2."""
    width, s, eta = 0.6, uniform(12, 8.0, 0.2), options.get("eta", 1.0)
    var = width**2 + s[0] ** 2
    for here, ahead in itertools.pairwise(s):
        up = eta * ahead * math.sqrt(1 - (ahead / here) ** 2)
        down = math.sqrt(ahead**2 - up**2)
        g = width**2 / (width**2 + here**2)
        var = (g + (1 - g) * down / here) ** 2 * var + up**2
    path = path_of_ratios(kind, s)
    assert variance(solver, path, width, **options) == pytest.approx(path.alpha[-1] ** 2 * var, rel=1e-12)


@pytest.mark.parametrize(("solver", "options"), STOCHASTIC)
def test_marginal_converges_to_that_of_the_data(solver: str, options: Any) -> None:
    """The variance tends to alpha^2 w^2 + sigma^2 at first order in the step."""
    errors = []
    for steps in EVEN:
        path = path_of_ratios("vp", uniform(steps, 8.0, 0.2))
        errors.append(abs(variance(solver, path, 0.6, **options) - (path.alpha[-1] * 0.6) ** 2 - path.sigma[-1] ** 2))
    assert fitted_order(EVEN, errors) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(("solver", "options"), STOCHASTIC)
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_marginal_of_a_point_is_exact(solver: str, options: Any, steps: int) -> None:
    """Song et al. 2021, theorem 1: with x0 known, q(x_s | x0) is kept for every eta and any number of steps."""
    path = path_of_ratios("vp", uniform(steps, 8.0, 0.2))
    assert variance(solver, path, 0.0, **options) == pytest.approx(path.sigma[-1] ** 2, rel=1e-12)


# ---- running with arrays ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", solvers.names())
def test_numpy_and_torch_agree_and_nothing_is_written(name: str) -> None:
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((2, 3, 4))
    z = np.random.default_rng(1).standard_normal((9, 2, 3, 4))
    tensor, kept = torch.from_numpy(x.copy()), x.copy()
    out = solvers.sample(name, lambda x, t: x * 0.5, x, VP, prediction="v", noise=lambda i: z[i], clip=1.0)
    twin = solvers.sample(
        name, lambda x, t: x * 0.5, tensor, VP, prediction="v", noise=lambda i: torch.from_numpy(z[i]), clip=1.0
    )
    np.testing.assert_array_equal(x, kept)
    np.testing.assert_array_equal(tensor.numpy(), kept)
    np.testing.assert_allclose(out, twin.numpy(), rtol=1e-14, atol=1e-15)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"^x: expected floating point numbers, got int64"):
        solvers.sample("ddim", smooth, np.zeros((2, 3), np.int64), VP)
    with pytest.raises(ValueError, match=r"^noise: expected an array of x's shape \(2, 3\), got \(3,\)"):
        solvers.sample("ddpm", smooth, np.zeros((2, 3)), VP, noise=lambda step: np.ones(3))
    with pytest.raises(ValueError, match=r"^model: expected an output of shape \(2, 3\), got \(1, 3\)"):
        solvers.sample("ddim", lambda x, t: x[:1], np.zeros((2, 3)), VP)
    with pytest.raises(ValueError, match=r"^solver: the name 'ddim' is taken"):
        solvers.solver("ddim")(lambda: None)


def test_the_reference_leaves_the_callers_array_alone() -> None:
    noise = np.ones((1, 2, 3))
    solvers.sample("ddim", lambda x, t: np.multiply(x, 0.5, out=x), noise, schedules.scaled_linear().path(3))
    assert (noise == 1).all()
