"""The multistep exponential integrators: their published formulas by hand, their integrals by quadrature, their limits,
orders of the options that are not defaults, and the methods that are one method under two names."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from gaussians import alternating, exact, fitted_order, gentle_start, network_of, path_of_ratios, uniform

import pyguide
from pyguide import schedules, solvers
from pyguide.solvers.deis import moment

X = np.random.default_rng(0).standard_normal(6)
Z = np.random.default_rng(1).standard_normal((12, 6))
PATHS = {
    "vp": schedules.scaled_linear().path(7, offset=1),
    "vp-min": schedules.scaled_linear().path(7, sigmas="karras", final_sigma="min"),
    "zero-snr": schedules.linear(zero_snr=True).path(7, spacing="trailing"),
    "flow": schedules.flow(3.0).path(7),
    "edm": schedules.edm(0.05, 10.0).path(7),
    "one": schedules.scaled_linear().path(sigmas=[3.0], final_sigma="min"),
}
STOCHASTIC = ("dpmpp_2m_sde", "dpmpp_3m_sde", "dpm_solver_2m_sde")
NAMES = ("dpmpp_1", "dpmpp_2m", "dpmpp_3m", "dpm_solver_1", "dpm_solver_2m", "dpm_solver_3m", "deis", *STOCHASTIC)


def smooth(x: Any, t: Any) -> Any:
    return np.sin(x + 0.01 * float(np.ravel(t)[0]))


def same(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * np.abs(b).max())


def sample(name: str, path: Any, network: Any = smooth, prediction: str = "sample", **options: Any) -> Any:
    options.setdefault("noise", lambda i: Z[i].copy())
    return solvers.sample(name, network, X * path.init_scale, path, prediction=prediction, **options)


def by_hand(path: Any, step: Any) -> Any:
    """step(i, x, D, E, h): from x with the histories of D and E (newest last) and h(k) = lam_(k+1) - lam_k.

    Done here is what has no finite h: from pure noise and to clean data a step is alpha' D + sigma' z, z = x / sigma
    or, where the step has a `noise`, that many times a fresh normal. Later slopes from pure noise are 0, as 1 / inf.
    """
    x, D, E = X * path.init_scale, [], []

    def h(k: int) -> float:
        return float(path.lam[k + 1] - path.lam[k])

    for i in range(path.steps):
        D.append(smooth(x, path.timestep[i]))
        E.append((x - path.alpha[i] * D[-1]) / path.sigma[i])
        if math.isinf(h(i)):
            z = step.noise * Z[i] if hasattr(step, "noise") else x / path.sigma[i]
            x = path.alpha[i + 1] * D[-1] + path.sigma[i + 1] * z
        else:
            x = step(i, x, D, E, h)
    return x


def differences(i: int, F: list[Any], h: Any, order: int) -> tuple[Any, Any]:
    """D1 and D2 of the published codes: r0 = h_(i-1) / h_i, r1 = h_(i-2) / h_i."""
    if i == 0 or order == 1:
        return None, None
    r0 = h(i - 1) / h(i)
    D1_0 = (1 / r0) * (F[-1] - F[-2])
    if i == 1 or order == 2:
        return D1_0, None
    r1 = h(i - 2) / h(i)
    D1_1 = (1 / r1) * (F[-2] - F[-3])
    return D1_0 + (r0 / (r0 + r1)) * (D1_0 - D1_1), (1 / (r0 + r1)) * (D1_0 - D1_1)


# ---- the published formulas ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", ["midpoint", "heun"])
@pytest.mark.parametrize(("order", "lower"), [(2, False), (2, True), (3, False), (3, True)])
@pytest.mark.parametrize("family", ["dpmpp", "dpm_solver"])
def test_multistep(name: str, kind: str, order: int, lower: bool, family: str) -> None:
    """(2M) and (3M) of the code of Lu et al. and of diffusers; on the noise with alpha for sigma and h for -h."""
    path = PATHS[name]

    def step(i: int, x: Any, D: Any, E: Any, h: Any) -> Any:
        F, sign, kept, c = (D, -1, path.sigma, path.alpha) if family == "dpmpp" else (E, 1, path.alpha, path.sigma)
        phi_1 = math.exp(sign * h(i)) - 1
        phi_2 = phi_1 / h(i) - sign
        F1, F2 = differences(i, F, h, min(order, path.steps - i if lower else 3))
        x = kept[i + 1] / kept[i] * x - c[i + 1] * phi_1 * F[-1]
        if F1 is not None:
            x = x - c[i + 1] * (phi_1 / 2 if kind == "midpoint" and F2 is None else sign * phi_2) * F1
        return x if F2 is None else x - c[i + 1] * (phi_2 / h(i) - 0.5) * F2

    same(sample(f"{family}_{order}m", path, solver_type=kind, lower_order_final=lower), by_hand(path, step))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(("eta", "s_noise"), [(1.0, 1.0), (0.4, 1.1), (1.6, 0.9)])
@pytest.mark.parametrize("method", ["midpoint", "heun", "3m"])
def test_dpmpp_sde(name: str, eta: float, s_noise: float, method: str) -> None:
    """k-diffusion's two, in its variables: x / alpha, s = sigma / alpha, H = (1 + eta) h."""
    path = PATHS[name]

    def step(i: int, x: Any, D: Any, E: Any, h: Any) -> Any:
        H, s = (1 + eta) * h(i), path.sigma[i + 1] / path.alpha[i + 1]
        y = math.exp(-H) * x / path.alpha[i] + (1 - math.exp(-H)) * D[-1]
        D1, D2 = differences(i, D, h, 3 if method == "3m" else 2)
        phi_2 = (math.exp(-H) - 1) / H + 1
        if D1 is not None:
            y = y + (0.5 * (1 - math.exp(-H)) if method == "midpoint" else phi_2) * D1
        if D2 is not None:
            y = y - (phi_2 / H - 0.5) * D2
        return path.alpha[i + 1] * (y + s * math.sqrt(1 - math.exp(-2 * eta * h(i))) * s_noise * Z[i])

    step.noise = s_noise  # type: ignore[attr-defined]
    solver, options = ("dpmpp_3m_sde", {}) if method == "3m" else ("dpmpp_2m_sde", {"solver_type": method})
    same(sample(solver, path, eta=eta, s_noise=s_noise, **options), by_hand(path, step))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", ["midpoint", "heun"])
@pytest.mark.parametrize("lower", [False, True])
def test_dpm_solver_sde(name: str, kind: str, lower: bool) -> None:
    """sde-dpmsolver of diffusers, of orders 1 and 2."""
    path = PATHS[name]

    def step(i: int, x: Any, D: Any, E: Any, h: Any) -> Any:
        ahead, growth = path.sigma[i + 1], math.exp(h(i)) - 1
        x = path.alpha[i + 1] / path.alpha[i] * x - 2 * ahead * growth * E[-1]
        E1, _ = differences(i, E, h, min(2, path.steps - i if lower else 2))
        if E1 is not None:
            x = x - ahead * (growth if kind == "midpoint" else 2 * (growth / h(i) - 1)) * E1
        return x + ahead * math.sqrt(math.exp(2 * h(i)) - 1) * Z[i]

    step.noise = 1.0  # type: ignore[attr-defined]
    same(sample("dpm_solver_2m_sde", path, solver_type=kind, lower_order_final=lower), by_hand(path, step))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("on", ["data", "noise"])
@pytest.mark.parametrize("without", [(), (0,), (1, 3), (2, 6)])
def test_unipc_2_with_chosen_correctors(name: str, on: str, without: tuple[int, ...]) -> None:
    """UniPC-2 with B = e^z - 1 (bh2), algorithms 1 and 2, each system of two equations solved by Cramer's rule."""
    path, Ds, F, old, used, x = PATHS[name], [], [], None, 0, X * PATHS[name].init_scale

    def update(x: Any, i: int, order: int, ahead: Any = None) -> Any:
        h = path.lam[i + 1] - path.lam[i]
        c, z = (path.alpha[i + 1], -h) if on == "data" else (path.sigma[i + 1], h)
        if on == "noise" and path.alpha[i] == 0:
            return path.alpha[i + 1] * Ds[i] + path.sigma[i + 1] * F[i]
        if path.sigma[i + 1] == 0:  # e^h sigma' -> alpha' sigma / alpha
            return path.alpha[i + 1] * (F[i] if on == "data" else (x - path.sigma[i] * F[i]) / path.alpha[i])
        B = math.exp(z) - 1
        linear = path.sigma[i + 1] / path.sigma[i] if on == "data" else path.alpha[i + 1] / path.alpha[i]
        out = linear * x - c * B * F[i]
        r = (path.lam[i - 1] - path.lam[i]) / h if order == 2 and path.alpha[i - 1] > 0 else None
        if ahead is None:
            return out if r is None else out - c * B * (F[i - 1] - F[i]) / r / 2
        if r is None:
            return out - c * B * (ahead - F[i]) / 2
        b1 = (B / z - 1) / B  # rho_1 + rho_2 = b1 and r rho_1 + rho_2 = b2
        b2 = 2 * ((B / z - 1) / z - 0.5) / B
        rho_1 = (b1 - b2) / (1 - r)
        return out - c * B * (rho_1 * (F[i - 1] - F[i]) / r + (b1 - rho_1) * (ahead - F[i]))

    for i in range(path.steps):
        Ds.append(smooth(x, path.timestep[i]))
        value = Ds[i] if on == "data" else (x - path.alpha[i] * Ds[i]) / path.sigma[i]
        if i > 0 and i - 1 not in without:
            x = update(old, i - 1, used, value)
        F.append(value)
        old, used = x, min(2, i + 1, path.steps - i)
        x = update(x, i, used)
    steps = [k for k in without if k < path.steps]
    same(sample("unipc", path, predict_x0=on == "data", disable_corrector=steps), x)


@pytest.mark.parametrize("predict_x0", [True, False])
def test_a_corrector_answers_an_edit_through_the_prediction_alone(predict_x0: bool) -> None:
    """UniPC-1: the corrected state is made of the one before the predictor, not of the model's input."""
    path = PATHS["vp-min"]
    kept, held = (path.sigma, path.alpha) if predict_x0 else (path.alpha, path.sigma)
    old = F = None
    x = X

    def step(i: int, x: Any, F: Any) -> Any:
        ratio = kept[i + 1] / kept[i]
        return ratio * x + (held[i + 1] - held[i] * ratio) * F

    for i in range(path.steps):
        x = x + 0.1 * Z[i]
        D = smooth(x, path.timestep[i])
        value = D if predict_x0 else (x - path.alpha[i] * D) / path.sigma[i]
        if i:
            x = step(i - 1, old, (F + value) / 2)
        old, F = x, value
        x = step(i, x, F)

    rows = itertools.count()

    def editing(x: Any, t: Any) -> Any:
        x += 0.1 * Z[next(rows)]
        return smooth(x, t)

    same(sample("unipc", path, editing, order=1, predict_x0=predict_x0), x)


# ---- the integrals ---------------------------------------------------------------------------------------------------
def quadrature(f: Any, low: float, high: float) -> float:
    nodes, weights = np.polynomial.legendre.leggauss(60)
    return float((weights * f((high - low) / 2 * nodes + (high + low) / 2)).sum() * (high - low) / 2)


@pytest.mark.parametrize("h", [1e-6, 0.3, 1.0, 4.0, 30.0, 99.0, 101.0, math.inf])
def test_moments_of_deis(h: float) -> None:
    ends = np.linspace(0, min(h, 60.0), 9)  # the rest is below 60^2 e^-60
    for n in (1, 2):
        wanted = sum(quadrature(lambda u, n=n: np.exp(-u) * u**n, *pair) for pair in itertools.pairwise(ends))
        assert moment(n, h) == pytest.approx(wanted, rel=1e-13)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("lower", [False, True])
def test_deis_against_quadrature(name: str, order: int, lower: bool) -> None:
    """x'/alpha' = x/alpha + sum_k E_k int_rho^rho' L_k dr, L_k the Lagrange polynomials in log r; by quadrature in
    log r, for a step to rho' = 0 by Gauss and Laguerre's rule. From pure noise the step is DDIM, and its E is no node.
    """
    path = PATHS[name]
    E: list[Any] = []
    x = X * path.init_scale
    for i in range(path.steps):
        D = smooth(x, path.timestep[i])
        E.append((x - path.alpha[i] * D) / path.sigma[i])
        nodes = [k for k in range(i, -1, -1) if path.alpha[k] > 0][: min(order, path.steps - i if lower else 3)]
        if not nodes:
            x = path.alpha[i + 1] * D + path.sigma[i + 1] * x
            continue
        at = {k: -path.lam[k] for k in nodes}  # log rho
        rho, total = path.sigma[i] / path.alpha[i], 0.0
        for k in nodes:

            def lagrange(u: Any, k: int = k, at: Any = at) -> Any:
                return math.prod([(u - at[j]) / (at[k] - at[j]) for j in at if j != k], start=np.ones_like(u))

            if path.sigma[i + 1] > 0:
                weight = quadrature(lambda u: lagrange(u) * np.exp(u), -path.lam[i], -path.lam[i + 1])
            else:  # r = rho e^-v
                v, w = np.polynomial.laguerre.laggauss(4)
                weight = -rho * float((w * lagrange(at[i] - v)).sum())
            total = total + weight * E[k]
        x = path.alpha[i + 1] * (x / path.alpha[i] + total)
    same(sample("deis", path, order=order, lower_order_final=lower), x)


# ---- limits ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [*NAMES, "unipc"])
def test_from_pure_noise_to_clean_data_in_one_step(name: str) -> None:
    for path in (schedules.flow().path(1), schedules.linear(zero_snr=True).path(1, spacing="trailing")):
        assert path.alpha[0] == path.sigma[-1] == 0
        same(sample(name, path, noise=lambda i: pytest.fail("a noise of weight 0 was drawn")), smooth(X, path.timestep))


@pytest.mark.parametrize("name", NAMES)
def test_the_noise_of_weight_zero_is_not_drawn(name: str) -> None:
    def drawn(where: str, **options: Any) -> list[int]:
        steps: list[int] = []
        sample(name, PATHS[where], noise=lambda i: steps.append(i) or Z[i].copy(), **options)
        return steps

    assert drawn("vp") == (list(range(6)) if name in STOCHASTIC else [])  # the last step ends at clean data
    assert drawn("vp-min") == (list(range(7)) if name in STOCHASTIC else [])
    for options in ({"eta": 0.0}, {"s_noise": 0.0}) if name in STOCHASTIC[:2] else ():
        assert not drawn("vp-min", **options)


# ---- one method, two names -------------------------------------------------------------------------------------------
HEUN, EXACT = {"solver_type": "heun"}, {"exact_curvature": True}
UNIP_3 = {"corrector": False, "order": 3, "lower_order_final": False}
ONE = [
    ("dpmpp_1", {}, "ddim", {}, PATHS),
    ("dpm_solver_1", {}, "ddim", {}, PATHS),
    ("deis", {"order": 1}, "ddim", {}, PATHS),
    ("dpmpp_2m_sde", {}, "ddim", {"eta": 1.0}, ("one",)),  # the first step: the posterior of the diffusion
    ("dpmpp_3m_sde", {}, "ddim", {"eta": 1.0}, ("one",)),
    ("dpmpp_2m_sde", {"eta": 0.0}, "dpmpp_2m", {}, PATHS),
    ("dpmpp_2m_sde", {"eta": 0.0, **HEUN}, "dpmpp_2m", HEUN, PATHS),
    ("dpmpp_3m_sde", {"eta": 0.0}, "dpmpp_3m", HEUN, PATHS),
    ("dpmpp_3m_sde", {"eta": 0.0, **EXACT}, "dpmpp_3m", {**HEUN, **EXACT}, PATHS),
    ("unipc", {"disable_corrector": range(7)}, "unipc", {"corrector": False}, [k for k in PATHS if k != "one"]),
    ("unipc", {"disable_corrector": (0,)}, "unipc", {"corrector": False}, ("one",)),
    ("unipc", {"corrector": False, "predict_x0": False}, "dpm_solver_2m", {"lower_order_final": True}, PATHS),
    # one slope from three points of which one is pure noise: the limit of the parabola, or 1/2 as for any one slope
    ("unipc", UNIP_3, "dpmpp_3m", EXACT, ("vp", "vp-min", "edm")),
    ("unipc", {**UNIP_3, "predict_x0": False}, "dpm_solver_3m", EXACT, ("vp", "vp-min", "edm")),
    # DEIS keeps its order where it ends at clean data
    ("deis", {}, "dpm_solver_2m", HEUN, ("vp-min",)),
    ("deis", {"order": 3}, "dpm_solver_3m", {**HEUN, **EXACT}, ("vp-min",)),
]


@pytest.mark.parametrize(("a", "a_options", "b", "b_options", "paths"), ONE)
@pytest.mark.parametrize("clip", [None, 0.7])
def test_one_method(a: str, a_options: Any, b: str, b_options: Any, paths: Any, clip: Any) -> None:
    more = {"use_clipped_model_output": True} if b == "ddim" else {}
    for path in map(PATHS.__getitem__, paths):
        same(sample(a, path, clip=clip, **a_options), sample(b, path, clip=clip, **b_options, **more))


# ---- orders of what is no default ------------------------------------------------------------------------------------
COUNTS, FINE = (64, 90, 128, 180, 256), (128, 180, 256, 360)
THREE = [(name, options, order) for name in ("dpmpp_3m", "dpm_solver_3m") for options, order in (({}, 2), (EXACT, 3))]


@pytest.mark.parametrize(("name", "options", "order"), [*THREE, ("deis", {"order": 3}, 3)])
def test_curvature(name: str, options: Any, order: int) -> None:
    """First steps of h^2 show the order of the others: 3 with the parabola's integral, 2 with the published half."""
    y, errors = np.linspace(-1.4, 1.6, 7) * math.hypot(2.5, 1.4), []
    for steps in COUNTS:
        path = path_of_ratios("vp", gentle_start(steps, 2.5, 0.4))
        out = solvers.sample(name, network_of(path), y * path.alpha[0], path, prediction="sample", **options)
        errors.append(np.sqrt(np.mean((out / path.alpha[-1] - exact(y, 2.5, 0.4)) ** 2)))
    assert fitted_order(COUNTS, errors) == pytest.approx(order, abs=0.15)


def variance(solver: str, path: Any, width: float, **options: Any) -> float:
    """Of the result, for data N(0, width^2): the sampler is linear then, one column for x and one for each draw."""
    columns = np.zeros(path.steps + 1)
    columns[0] = math.hypot(path.alpha[0] * width, path.sigma[0])
    network = network_of(path, lambda y, s: width**2 / (width**2 + s**2) * y)
    unit = np.eye(path.steps + 1)
    out = solvers.sample(
        solver, network, columns, path, prediction="sample", noise=lambda i: unit[i + 1].copy(), **options
    )
    return float((out**2).sum())


@pytest.mark.parametrize("grid", [uniform, alternating])
@pytest.mark.parametrize(
    ("solver", "options"),
    [
        *(("dpmpp_2m_sde", options) for options in ({}, HEUN, {"eta": 0.5})),
        *(("dpmpp_3m_sde", options) for options in ({}, EXACT, {"eta": 0.5})),
        *(("dpm_solver_2m_sde", options) for options in ({}, HEUN)),
    ],
)
def test_weak_order_2(solver: str, options: Any, grid: Any) -> None:
    """The noise of a step is exact and D follows it one step later; weighted by the extrapolation, what D answers is
    right to h^2 when summed over the steps, and the last one misses h of a noise of variance h."""
    errors = []
    for path in (path_of_ratios("vp", grid(n, 8.0, 0.2)) for n in FINE):
        wanted = (path.alpha[-1] * 0.6) ** 2 + path.sigma[-1] ** 2
        errors.append(abs(variance(solver, path, 0.6, **options) - wanted))
    assert fitted_order(FINE, errors) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("solver", ["dpmpp_2m_sde", "dpmpp_3m_sde"])
@pytest.mark.parametrize("eta", [0.3, 1.0, 1.6])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_marginal_of_a_point_is_exact(solver: str, eta: float, steps: int) -> None:
    path = path_of_ratios("vp", uniform(steps, 8.0, 0.2))
    assert variance(solver, path, 0.0, eta=eta) == pytest.approx(path.sigma[-1] ** 2, rel=1e-12)


# ---- compiled --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", PATHS)
def test_compiled(name: str, where: str) -> None:
    """Certified with and without edits and clip, in x and as many earlier predictions as the method has."""
    slots = 1 if name.endswith("_1") or where == "one" else 3 if "3m" in name else 2
    for editable, clip in itertools.product((False, True), (None, 1.0)):
        plan = pyguide.compile(name, PATHS[where], prediction="sample", editable=editable, clip=clip)
        assert (plan.slots, plan.evaluations) == (slots, PATHS[where].steps)
