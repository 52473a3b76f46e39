"""LMS, iPNDM, PLMS and PNDM: their published formulas by hand, identities, orders; with SA-Solver, LCM and TCD (see
test_solvers_sa_consistency.py) limits, refused options and tables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from gaussians import alternating, exact, fitted_order, network_of, path_of_ratios, uniform
from multistep import EDM, FLOW, LATENT, VP, X, run, same, smooth
from scipy.integrate import quad

import pyguide
from pyguide import schedules, solvers
from pyguide.path import NoisePath
from pyguide.solvers.linear_multistep import lagrange_integrals
from pyguide.solvers.pndm import halfway

ZERO_SNR = schedules.scaled_linear(zero_snr=True).path(8, spacing="trailing")
MULTISTEP = ("lms", "ipndm", "plms", "pndm", "sa_solver")
ALL = (*MULTISTEP, "lcm", "tcd")


# ---- the published formulas, by hand ---------------------------------------------------------------------------------
@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "path", [VP, EDM, LATENT.path(7, sigmas="karras", final_sigma="min")], ids=["vp", "edm", "min"]
)
def test_lms_of_k_diffusion(path: Any, order: int, clip: float | None) -> None:
    """y' = y + sum_k (integral of the Lagrange polynomial of s_k) d_k, the integrals by adaptive quadrature."""
    s, y, slopes = path.sigma / path.alpha, X * path.init_scale / path.alpha[0], []
    for i in range(path.steps):
        D = smooth(y * path.alpha[i], path.timestep[i])
        slopes.insert(0, (y - (np.clip(D, -clip, clip) if clip else D)) / s[i])
        nodes = [s[i - k] for k in range(min(i + 1, order))]
        for node, slope in zip(nodes, slopes, strict=False):
            others = [other for other in nodes if other != node]
            y = y + slope * quad(lambda u: math.prod((u - o) / (node - o) for o in others), s[i], s[i + 1])[0]  # noqa: B023
    same(run("lms", path, "sample", order=order, clip=clip), y * path.alpha[-1])


def test_lagrange_integrals() -> None:
    nodes = (3.0, 4.5, 7.0, 7.5)
    for node, found in zip(nodes, lagrange_integrals(nodes, 3.0, 1.8), strict=True):
        wanted = quad(lambda u: math.prod((u - o) / (node - o) for o in nodes if o != node), 3.0, 1.8)[0]  # noqa: B023
        assert found == pytest.approx(wanted, rel=1e-12)


def adams(slopes: list[Any]) -> Any:
    """The mix of the last slopes, newest first, in equal steps, as printed in Liu et al. 2022, eq. 12."""
    e = slopes
    if len(e) == 1:
        return e[0]
    if len(e) == 2:
        return (3 * e[0] - e[1]) / 2
    if len(e) == 3:
        return (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
    return (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("path", [VP, EDM, schedules.flow(3.0).path(8, strength=0.8)], ids=["vp", "edm", "flow"])
def test_ipndm(path: Any, order: int) -> None:
    x, slopes = X * path.init_scale, []
    for i in range(path.steps):
        D = np.clip(smooth(x, path.timestep[i]), -0.8, 0.8)
        slopes.insert(0, (x - path.alpha[i] * D) / path.sigma[i])
        E = adams(slopes[:order])
        x = path.alpha[i + 1] / path.alpha[i] * (x - path.sigma[i] * E) + path.sigma[i + 1] * E
    same(run("ipndm", path, "sample", order=order, clip=0.8), x)


def transfer(x: Any, e: Any, bar: float, bar_next: float) -> Any:
    """phi of Liu et al. 2022, in alpha-bar."""
    below = math.sqrt(bar) * (math.sqrt((1 - bar_next) * bar) + math.sqrt((1 - bar) * bar_next))
    return math.sqrt(bar_next / bar) * x - (bar_next - bar) / below * e


def test_plms() -> None:
    bar = [*(LATENT.alphas_cumprod[int(t)] for t in VP.timestep), 1.0]
    x = X
    first = smooth(x, VP.timestep[0])
    guess = transfer(x, first, bar[0], bar[1])
    x, slopes = transfer(x, (first + smooth(guess, VP.timestep[1])) / 2, bar[0], bar[1]), [first]
    for i in range(1, VP.steps):
        slopes.insert(0, smooth(x, VP.timestep[i]))
        x = transfer(x, adams(slopes), bar[i], bar[i + 1])
    same(run("plms", prediction="epsilon"), x)


def test_pndm() -> None:
    """Liu et al. 2022, eq. 13 in the first three steps. The timesteps are 100 apart: halfway there is a model's own."""
    bar, t = LATENT.alphas_cumprod, VP.timestep.astype(int)
    x, slopes = X, []
    for i in range(VP.steps):
        here, ahead = bar[t[i]], bar[t[i + 1]] if i + 1 < VP.steps else 1.0
        slopes.insert(0, smooth(x, t[i]))
        if i >= 3:
            x = transfer(x, adams(slopes), here, ahead)
            continue
        middle = t[i] - 50
        e2 = smooth(transfer(x, slopes[0], here, bar[middle]), middle)
        e3 = smooth(transfer(x, e2, here, bar[middle]), middle)
        e4 = smooth(transfer(x, e3, here, ahead), t[i + 1])
        x = transfer(x, (slopes[0] + 2 * e2 + 2 * e3 + e4) / 6, here, ahead)
    same(run("pndm", prediction="epsilon"), x)


def test_halfway_is_a_timestep_wherever_that_says_the_level() -> None:
    assert halfway(VP, 2).timestep == (VP.timestep[2] + VP.timestep[3]) / 2
    karras = LATENT.path(8, sigmas="karras")
    assert halfway(karras, 1).timestep == (karras.timestep[1] + karras.timestep[2]) / 2
    told = LATENT.path(timesteps=[5000.0, 900.0, 800.0], sigmas=[3.0, 1.0, 0.2])  # not of this schedule: lam instead
    for path, i in ((EDM, 2), (told, 0), (told, 1)):
        same(halfway(path, i).lam, (path.lam[i] + path.lam[i + 1]) / 2)
    same(halfway(EDM, 2).timestep, (EDM.timestep[2] + EDM.timestep[3]) / 2)  # of which lam is a multiple


# ---- identities ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", [VP, FLOW, ZERO_SNR, EDM], ids=["vp", "flow", "zero-snr", "edm"])
def test_what_equals_ddim(path: Any) -> None:
    again = {"use_clipped_model_output": True, "clip": 0.8}  # methods on E derive it from the clipped D
    plain = run("ddim", path, **again)
    for name, options in (
        ("lms", {"order": 1}),
        ("ipndm", {"order": 1}),
        ("sa_solver", {"predictor_order": 1, "corrector_order": 0, "tau": 0.0}),
    ):
        same(run(name, path, clip=0.8, **options), plain)
    same(
        run("sa_solver", path, clip=0.8, predictor_order=1, corrector_order=0, tau=1.0),
        run("ddim", path, eta=1.0, **again),
    )
    same(run("tcd", path, clip=0.8, eta=0.0), run("ddim", path, clip=0.8))  # on the model's own E, as DDIM
    for name in MULTISTEP:
        assert np.abs(run(name, path, clip=0.8) - plain).max() > 1e-3


@pytest.mark.parametrize("name", ["lms", "ipndm", "plms", "pndm"])
def test_a_run_of_one_step_is_ddim(name: str) -> None:
    path = LATENT.path(timesteps=[700])
    same(run(name, path), run("ddim", path))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_is_lms_on_equal_steps(order: int) -> None:
    """What the name of its weights says: those of equal steps in s."""
    path = schedules.edm().path(sigmas=[5.0, 4.0, 3.0, 2.0, 1.0])
    same(run("ipndm", path, "sample", order=order), run("lms", path, "sample", order=order))


# ---- limits ----------------------------------------------------------------------------------------------------------
def first_step(name: str, path: Any, **options: Any) -> Any:
    """(T, d, n) of the row after the first evaluation."""
    row = pyguide.compile(name, path, prediction="sample", **options).rows[1]
    return np.array([row.T[0][0], row.d[0], row.n[0]])


@pytest.mark.parametrize("path", [FLOW, ZERO_SNR], ids=["flow", "zero-snr"])
def test_from_pure_noise(path: Any) -> None:
    """At alpha = 0 the first step is of order 1, with one evaluation; a path with alpha = 1e-6 there is its limit.

    What is left of the first grid point in later steps is of the size of s_1 / s_0, below 1e-5 here.
    """
    alpha, sigma = path.alpha.copy(), path.sigma.copy()
    alpha[0] = 1e-6
    sigma[0] = 1 - 1e-6 if path is FLOW else math.sqrt(1 - 1e-12)
    near = NoisePath(alpha, sigma, path.timestep, path.schedule)
    for name in ALL:
        assert np.isfinite(run(name, path)).all()
    for name in MULTISTEP:
        same(first_step(name, path, **({"tau": 0.0} if name == "sa_solver" else {})), first_step("ddim", path))
    order_1 = {"predictor_order": 1, "corrector_order": 0}
    for name, options in (
        ("lms", {}),
        ("ipndm", {}),
        ("sa_solver", {**order_1, "tau": 0.0}),
        ("sa_solver", {**order_1, "tau": 1.0}),
        ("lcm", {}),
        ("tcd", {}),
    ):
        same(run(name, path, **options), run(name, near, **options), 1e-4)
    assert pyguide.compile("plms", path, prediction="v").evaluations == path.steps  # no second slope in the first step
    assert pyguide.compile("pndm", path, prediction="v").evaluations == path.steps + 2 * 3
    # the multistep SA-Solver has no limit there: it starts as if the path began with that step of order 1
    row = first_step("sa_solver", path, tau=1.0)
    same(row, [0.0, path.alpha[1], path.sigma[1]])


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_pndm_so_near_to_pure_noise_that_its_slopes_are_lost(spacing: Any) -> None:
    """The cosine schedule from s = 20,000 to 4 in one step: nested slopes weigh 1e13. DDIM there, Runge-Kutta later.

    The network's v is at most 1, so that the result is of the size of 1; Runge-Kutta's was 1e8.
    """
    path = schedules.cosine().path(7, spacing=spacing)
    same(first_step("pndm", path), first_step("ddim", path))
    assert pyguide.compile("pndm", path, prediction="v").evaluations == path.steps + 2 * 3
    assert np.abs(run("pndm", path)).max() < 3


@pytest.mark.parametrize(("name", "options"), [("sa_solver", {"tau": 1.0}), ("lcm", {}), ("tcd", {})])
@pytest.mark.parametrize("path", [VP, FLOW, EDM], ids=["vp", "flow", "edm"])
def test_the_end_is_clean_data(path: Any, name: str, options: Any) -> None:
    """At sigma' = 0 noise has no weight, and SA-Solver and TCD return the last D itself."""
    plan = pyguide.compile(name, path, prediction="sample", **options)
    assert list(plan.stochastic_rows) == [*range(1, path.steps)]
    last = plan.rows[-1]
    if name != "lcm":
        assert (last.d[0], np.abs(last.T[0]).max(), last.e[0]) == (1.0, 0.0, 0.0)


# ---- options ---------------------------------------------------------------------------------------------------------
REFUSED = [
    ("lms", {"order": 5}, VP, r"^order: expected an integer from 1 to 4, got 5"),
    ("ipndm", {"order": 0}, VP, r"^order: expected an integer from 1 to 4, got 0"),
    ("sa_solver", {"predictor_order": 0}, VP, r"^predictor_order: expected an integer from 1 to 4, got 0"),
    ("sa_solver", {"corrector_order": 5}, VP, r"^corrector_order: expected an integer from 0 to 4, got 5"),
    ("sa_solver", {"corrector_order": 1.5}, VP, r"^corrector_order: .* got 1.5"),
    ("sa_solver", {"tau": -0.1}, VP, r"^tau: expected a finite number >= 0, or a function.* got -0.1"),
    ("sa_solver", {"tau": math.inf}, VP, r"^tau: .* got inf"),
    ("sa_solver", {"tau": "1"}, VP, r"^tau: .* got '1'"),
    ("sa_solver", {"tau": lambda t: math.nan}, VP, r"^tau: .* got nan"),
    ("lcm", {"timestep_scaling": 0.0}, VP, r"^timestep_scaling: expected a finite number > 0 or None, got 0.0"),
    ("lcm", {"timestep_scaling": math.nan}, VP, r"^timestep_scaling: .* got nan"),
    ("tcd", {"eta": 1.5}, VP, r"^eta: expected a number in \[0, 1\], got 1.5"),
    ("tcd", {"eta": math.nan}, VP, r"^eta: .* got nan"),
    ("tcd", {}, LATENT.path(timesteps=[5000, 4000], sigmas=[3.0, 1.0]), r"^path: tcd .* 4000; timesteps: expected"),
    ("tcd", {}, LATENT.path(timesteps=[900, 800], sigmas=[3.0, 0.1]), r"^path: tcd .* timestep 560 .* more noise"),
]


@pytest.mark.parametrize(("name", "options", "path", "message"), REFUSED)
def test_options_refused_before_the_first_evaluation(name: str, options: Any, path: Any, message: str) -> None:
    def network(x: Any, t: Any) -> Any:
        raise AssertionError("the model was called")

    with pytest.raises(ValueError, match=message):
        run(name, path, network=network, **options)


# ---- theory ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["vp", "flow", "edm"])
def test_lms_is_exact_for_polynomials_in_s(kind: str, order: int) -> None:
    """dy/ds = E(s), a polynomial of degree order - 1 in s alone: exact on any steps, once that order is reached.

    The polynomial vanishes at the first grid points, and the end of the step to the last of them is the start.
    """
    s = np.array([5.0, 4.1, 3.9, 2.0, 1.9, 1.2, 0.3, 0.0])
    path = path_of_ratios(kind, s)
    slope = np.polynomial.Polynomial([1.5])
    for root in s[: order - 1]:
        slope = slope * np.polynomial.Polynomial([-root, 1.0])
    at = dict(zip(path.timestep, s, strict=False))

    def network(x: Any, t: Any) -> Any:
        return np.full_like(x, slope(at[float(np.ravel(t)[0])]))

    gained = slope.integ()(0.0) - slope.integ()(s[order - 1])
    got = solvers.sample("lms", network, X * path.alpha[0], path, prediction="epsilon", order=order)
    same(got / path.alpha[-1], X + gained, 1e-11)


def ode_error(name: str, s: Any, history: int) -> float:
    """rms distance from the exact solution; the first `history` states are exact (the network sets them)."""
    y = np.linspace(-1.4, 1.6, 7) * math.hypot(s[0], 1.4)
    states = [exact(y, s[0], s[i]) for i in range(history)]
    path = path_of_ratios("vp", s)
    plain = network_of(path)

    def network(x: Any, t: Any) -> Any:
        i = int(np.ravel(t)[0]) - 10_000
        if 0 <= i < history:
            x[...] = path.alpha[i] * states[i]
        return plain(x, t)

    out = solvers.sample(name, network, y * path.alpha[0], path, prediction="sample")
    return float(np.sqrt(np.mean((out / path.alpha[-1] - exact(y, s[0], s[-1])) ** 2)))


def equal(steps: int, start: float, end: float) -> Any:
    return np.linspace(start, end, steps + 1)


@pytest.mark.parametrize(
    ("name", "grid", "history", "order"),
    [
        ("lms", equal, 0, 2),  # its first step, of order 1, costs h^2 once
        ("lms", equal, 4, 4),
        ("lms", alternating, 4, 4),
        ("ipndm", equal, 0, 2),
        ("ipndm", equal, 4, 4),
        ("ipndm", uniform, 4, 2),  # equal steps in lam are not equal in s: h^2 s'' / 12 is left of the first moment
        ("ipndm", alternating, 4, 1),  # nor is the first moment right at all where steps jump
        ("plms", uniform, 0, 2),
        ("plms", equal, 4, 4),
        ("plms", alternating, 4, 1),
        ("pndm", uniform, 0, 2),
        ("pndm", equal, 4, 4),
        ("pndm", alternating, 0, 1),
    ],
)
def test_order(name: str, grid: Any, history: int, order: int) -> None:
    """Order 4 of the equal-step weights holds on equal steps in s alone; the entries state what is left on others."""
    counts = (64, 90, 128, 180, 256)
    ends = (2.5, 1.0) if grid is equal else (2.5, 0.4)
    errors = [ode_error(name, grid(n, *ends), history) for n in counts]
    assert fitted_order(counts, errors) == pytest.approx(order, abs=0.15)


# ---- as tables -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("editable", [False, True])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize(
    ("name", "options", "slots", "evaluations"),
    [
        ("lms", {}, 4, 12),
        ("lms", {"order": 2}, 2, 12),
        ("ipndm", {}, 4, 12),
        ("plms", {}, 4, 13),
        ("pndm", {}, (5, 6), 12 + 3 * 3),
        ("sa_solver", {}, 3, 12),
        ("sa_solver", {"tau": 1.0, "predictor_order": 3, "corrector_order": 3}, 4, 12),
        ("sa_solver", {"tau": 1.0, "corrector_order": 0}, 2, 12),
        ("lcm", {}, 1, 12),
        ("tcd", {}, 1, 12),
    ],
)
def test_slots_and_evaluations(
    name: str, options: Any, slots: Any, evaluations: int, clip: Any, editable: bool
) -> None:
    """The memory that each recurrence needs and no more: x, and the earlier E's or D's that its next steps weigh.

    PNDM adds its first E and the mean in the making; with edits the inner state's own share.
    """
    path = LATENT.path(12, offset=1)
    plan = pyguide.compile(name, path, prediction="v", clip=clip, editable=editable, **options)
    assert plan.slots == (slots[editable] if isinstance(slots, tuple) else slots)
    assert plan.evaluations == evaluations
    draws = {"lcm": 11, "tcd": 11}.get(name, 0 if name != "sa_solver" else 11 if options else len(plan.stochastic_rows))
    assert len(plan.stochastic_rows) == draws


def test_evaluations_belong_to_their_step() -> None:
    plan = pyguide.compile("plms", VP)
    assert plan.step.tolist() == [0, *range(VP.steps)]


def test_evaluations_of_runge_kutta_belong_to_their_step() -> None:
    plan = pyguide.compile("pndm", VP)
    assert plan.step.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [*range(3, VP.steps)]


def test_lms_with_edits_on_a_short_edm_path() -> None:
    """Near the end, what earlier slopes still add is rounding noise for one step and a millionth for the next."""
    assert pyguide.compile("lms", schedules.edm().path(7), prediction="edm", editable=True).slots == 4
