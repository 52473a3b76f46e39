"""SA-Solver, LCM and TCD: their published formulas by hand, identities, exact laws and weak orders."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from gaussians import alternating, fitted_order, network_of, path_of_ratios, uniform
from multistep import EDM, FLOW, LATENT, VP, X, Z, run, same, smooth
from scipy.integrate import quad

import pyguide
from pyguide import schedules, solvers


def interpolation_weights(lam: Any, i: int, points: list[int], tau: float) -> dict[int, float]:
    """sigma' k e^(-tau^2 lam') int e^(k u) L_j(u) du from lam_i to lam_(i+1), per sigma', by adaptive quadrature.

    With two points, as the authors' code: int e^(-k (lam' - u)) (u - lam_i) du is h^2 / 2.
    """
    k, end, h = 1 + tau * tau, lam[i + 1], lam[i + 1] - lam[i]

    def integral(f: Any) -> float:
        return quad(lambda u: math.exp(-k * (end - u)) * f(u), lam[i], end, epsabs=0, epsrel=1e-13)[0]

    if len(points) == 2:
        (other,) = (j for j in points if j != i)
        slope = k * h * h / 2 / (lam[other] - lam[i])
        return {i: k * integral(lambda u: 1.0) - slope, other: slope}
    return {
        j: k * integral(lambda u: math.prod((u - lam[m]) / (lam[j] - lam[m]) for m in points if m != j))  # noqa: B023
        for j in points
    }


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("orders", [(1, 0), (1, 1), (2, 2), (2, 0), (3, 3), (3, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("tau", [0.0, 1.0, None, lambda t: t / 500])
def test_sa_solver(tau: Any, orders: tuple[int, int], final: bool) -> None:
    """Xue et al. 2023, algorithm 1: predictor, corrector with the same noise, tau constant within a step."""
    path = schedules.linear().path(10, offset=1, final_sigma="min")
    N, (alpha, sigma, lam) = path.steps, (path.alpha, path.sigma, path.lam)
    D: list[Any] = []
    x, base, at = X, X, 0.0
    for i in range(N):
        D.append(smooth(x, path.timestep[i]))
        if i > 0 and orders[1]:
            count = min(orders[1], i + 1, N - i + 2 if final else 9)
            weights = interpolation_weights(lam, i - 1, [i - k for k in range(count)], at)
            x = base + alpha[i] * sum(D[j] * w for j, w in weights.items())
        window = float(200 <= path.timestep[i] <= 800)
        at = window if tau is None else tau(path.timestep[i]) if callable(tau) else tau
        h = lam[i + 1] - lam[i]
        base = sigma[i + 1] / sigma[i] * math.exp(-at * at * h) * x
        base = base + sigma[i + 1] * math.sqrt(1 - math.exp(-2 * at * at * h)) * Z[i]
        count = min(orders[0], i + 1, N - i if final else 9)
        weights = interpolation_weights(lam, i, [i - k for k in range(count)], at)
        x = base + alpha[i + 1] * sum(D[j] * w for j, w in weights.items())
    got = run(
        "sa_solver",
        path,
        "sample",
        predictor_order=orders[0],
        corrector_order=orders[1],
        tau=tau,
        lower_order_final=final,
    )
    same(got, x, 1e-11 if max(orders) == 4 else 1e-12)  # weights of +-10 and more cancel at order 4


def test_the_window_of_tau_on_edm_paths() -> None:
    """Noise where 0.05 <= sigma <= 1 at the start of a step (Xue et al. 2023, their setting for EDM), nowhere else."""
    path = schedules.edm().path(18)
    plan = pyguide.compile("sa_solver", path, prediction="edm")
    inside = [i + 1 for i in range(18) if 0.05 <= path.sigma[i] <= 1 and path.sigma[i + 1] > 0]
    assert list(plan.stochastic_rows) == inside
    assert 0 < len(inside) < 17


@pytest.mark.parametrize(("scaling", "clip"), [(10.0, None), (3.0, 0.7), (None, 0.7)])
def test_lcm(scaling: float | None, clip: float | None) -> None:
    """Luo et al. 2023, algorithm 3, with c_skip = 0.25 / (u^2 + 0.25), c_out = u / sqrt(u^2 + 0.25), u = scaling t."""
    path = LATENT.path(timesteps=[999, 499, 99, 19, 0])
    bar = LATENT.alphas_cumprod[path.timestep.astype(int)]
    x = X
    for i, t in enumerate(path.timestep):
        D = (x - math.sqrt(1 - bar[i]) * smooth(x, t)) / math.sqrt(bar[i])
        D = np.clip(D, -clip, clip) if clip else D
        if scaling:
            D = 0.25 / ((scaling * t) ** 2 + 0.25) * x + scaling * t / math.sqrt((scaling * t) ** 2 + 0.25) * D
        x = math.sqrt(bar[i + 1]) * D + math.sqrt(1 - bar[i + 1]) * Z[i] if i < 4 else D
    same(run("lcm", path, "epsilon", timestep_scaling=scaling, clip=clip), x)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.77, 1.0])
def test_tcd(eta: float) -> None:
    """Zheng et al. 2024, algorithm 4, in alpha-bar; the last step ends at timestep 0, as the reference code has it."""
    path = LATENT.path(timesteps=[999, 759, 499, 239], final_sigma="min")
    bar, t = LATENT.alphas_cumprod, path.timestep.astype(int)
    x = X
    for i in range(4):
        ahead = t[i + 1] if i < 3 else 0
        s = math.floor((1 - eta) * ahead)
        epsilon = smooth(x, t[i])
        D = np.clip((x - math.sqrt(1 - bar[t[i]]) * epsilon) / math.sqrt(bar[t[i]]), -0.9, 0.9)
        x = math.sqrt(bar[s]) * D + math.sqrt(1 - bar[s]) * epsilon
        if i < 3:
            x = math.sqrt(bar[ahead] / bar[s]) * x + math.sqrt(1 - bar[ahead] / bar[s]) * Z[i]
    same(run("tcd", path, "epsilon", eta=eta, clip=0.9), x)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("final", [True, False])
def test_sa_solver_without_noise_is_unipc(order: int, final: bool) -> None:
    """UniPC has one point more in the corrector; its weights are the exact integrals, but bh1's h^2/2 with two points.

    Xue et al. 2023, section 5.2.
    """
    for path in (VP, FLOW, EDM, LATENT.path(9, sigmas="karras", final_sigma="min")):
        unipc = run("unipc", path, order=order, solver_type="bh1", lower_order_final=final)
        options = {"predictor_order": order, "corrector_order": order + 1, "lower_order_final": final}
        same(run("sa_solver", path, tau=0.0, **options), unipc, 1e-10)  # UniPC's phi_n cancel: 1e-16 / h^2


@pytest.mark.parametrize("path", [FLOW, EDM], ids=["flow", "edm"])
def test_tcd_at_eta_1_is_multistep_consistency_sampling(path: Any) -> None:
    """Past t' to clean data and noised again: LCM without boundary scalings (Song et al. 2023, algorithm 1)."""
    same(run("tcd", path, eta=1.0), run("lcm", path, timestep_scaling=None))


def test_lcm_scalings_need_timesteps() -> None:
    same(run("lcm", EDM, "edm"), run("lcm", EDM, "edm", timestep_scaling=None))
    assert np.abs(run("lcm", VP) - run("lcm", VP, timestep_scaling=None)).max() > 1e-7


def test_an_edit_survives_the_corrector() -> None:
    """The corrector continues from the state that the model was given: with a constant D, an edit shrinks as sigma."""
    path = LATENT.path(6, sigmas="karras", final_sigma="min")

    def result(edit: float) -> Any:
        def model(x: Any, level: int) -> Any:
            if level == 3:
                x += edit
            return type("Output", (), {"denoised": np.zeros_like(x)})

        return solvers.resolve("sa_solver")(model, X.copy(), path, noise=lambda i: Z[i], tau=0.0)

    same(result(0.5) - result(0.0), np.full(6, 0.5 * path.sigma[-1] / path.sigma[3]))


def variance(name: str, path: Any, width: float, network: Any = None, **options: Any) -> float:
    """Variance of the result for data N(0, width^2): one column for x and one for each draw."""
    start = np.zeros(path.steps + 1)
    start[0] = math.hypot(path.alpha[0] * width, path.sigma[0])
    basis = iter(np.eye(path.steps + 1)[1:])
    network = network or network_of(path, lambda y, s: width**2 / (width**2 + s**2) * y)
    out = solvers.sample(name, network, start, path, prediction="sample", noise=lambda i: next(basis).copy(), **options)
    return float((out**2).sum())


@pytest.mark.parametrize("grid", [uniform, alternating])
@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({"tau": 1.0}, 2),
        ({"tau": 0.4, "lower_order_final": False}, 2),
        ({"tau": 1.0, "corrector_order": 0}, 2),
        ({"tau": 1.0, "predictor_order": 1}, 2),  # the corrector alone has it
        ({"tau": 1.0, "predictor_order": 1, "corrector_order": 0}, 1),  # DDIM with eta 1
        ({"tau": 1.0, "corrector_order": 1}, 1),
    ],
)
def test_weak_order_of_sa_solver(options: Any, order: int, grid: Any) -> None:
    """The variance tends to that of the data.

    Within a step D moves with the noise, and its integral has the covariance h^2/2 with it. The trapezoid of the
    corrector has that covariance too; of a predictor of two points, the difference to the last D brings it one step
    late. Either way a local error of h^3 is left. The first and last steps, of order 1, cost h^2 once.
    """
    errors, counts = [], (64, 90, 128, 180, 256)
    for n in counts:
        path = path_of_ratios("vp", grid(n, 4.0, 0.4))
        errors.append(
            abs(variance("sa_solver", path, 0.6, **options) - (0.6 * path.alpha[-1]) ** 2 - path.sigma[-1] ** 2)
        )
    assert fitted_order(counts, errors) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("steps", [1, 2, 3, 9])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sa_solver", {"tau": 0.0}),
        ("sa_solver", {"tau": 1.3, "predictor_order": 3, "corrector_order": 3}),
        ("tcd", {"eta": 0.0}),
        ("tcd", {"eta": 0.3}),
        ("tcd", {"eta": 1.0}),
    ],
)
@pytest.mark.parametrize("kind", ["vp", "flow", "edm"])
def test_marginal_of_a_point_is_exact(kind: str, name: str, options: Any, steps: int) -> None:
    """With x0 known, q(x_s | x0) is kept for every strength of the noise and any number of steps."""
    schedule = {"vp": LATENT, "flow": schedules.flow(), "edm": schedules.edm(0.2, 8.0)}[kind]
    path = schedule.path(steps, **({"offset": 30} if kind == "vp" else {}), final_sigma="min")
    zero = variance(name, path, 0.0, network=lambda x, t: np.zeros_like(x), **options)
    assert zero == pytest.approx(path.sigma[-1] ** 2, rel=1e-11)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("kind", ["vp", "flow", "edm"])
@pytest.mark.parametrize("scaling", [None, 10.0])
def test_lcm_with_an_exact_consistency_function_gives_the_law_of_the_data(
    scaling: float | None, kind: str, steps: int
) -> None:
    """For data N(0, w^2) the ODE ends at y w / sqrt(w^2 + s^2): exact in any number of steps, with the scalings too."""
    schedule = {"vp": LATENT, "flow": schedules.flow(), "edm": schedules.edm(0.2, 8.0)}[kind]
    path, width = schedule.path(steps, **({"offset": 30} if kind == "vp" else {})), 0.6
    at = dict(zip(path.timestep, zip(path.alpha, path.sigma, strict=True), strict=False))

    def consistency(x: Any, t: Any) -> Any:
        t = float(np.ravel(t)[0])
        alpha, sigma = at[t]
        clean = x * width / math.hypot(alpha * width, sigma)
        u = (scaling or 0.0) * t
        if not scaling or kind == "edm":
            return clean
        return (clean - 0.25 / (u * u + 0.25) * x) / (u / math.sqrt(u * u + 0.25))

    found = variance("lcm", path, width, network=consistency, timestep_scaling=scaling)
    assert found == pytest.approx(width**2, rel=1e-12)
    if kind != "vp" and not scaling:  # TCD at eta 1 is the same sampler
        assert variance("tcd", path, width, network=consistency, eta=1.0) == pytest.approx(width**2, rel=1e-12)
