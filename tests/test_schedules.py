"""Noise schedules and grids against closed forms, published formulas and tables worked out by hand."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyguide import Level, NoisePath, schedules

VP = {
    "linear": schedules.linear(),
    "scaled_linear": schedules.scaled_linear(),
    "cosine": schedules.cosine(),
    "sigmoid": schedules.sigmoid(),
    "given": schedules.from_alphas_cumprod(np.linspace(0.999, 0.01, 400)),
}
ALL = VP | {"zero": schedules.scaled_linear(zero_snr=True), "flow": schedules.flow(3.0), "edm": schedules.edm()}


def cumulative(schedule: Any) -> np.ndarray:
    """alpha^2 at every training step, through the public path."""
    T = schedule.train_steps
    return schedule.path(T).alpha[:-1][::-1] ** 2


# ---- levels ----------------------------------------------------------------------------------------------------------
def test_linear_is_the_product_of_ho_et_al() -> None:
    beta = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    expected = [math.exp(math.fsum(math.log1p(-b) for b in beta[: t + 1])) for t in range(1000)]
    np.testing.assert_allclose(cumulative(schedules.linear()), expected, rtol=1e-12)


def test_scaled_linear_is_the_product_of_latent_diffusion() -> None:
    root = [math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * t / 999 for t in range(1000)]
    expected = [math.exp(math.fsum(math.log1p(-(r**2)) for r in root[: t + 1])) for t in range(1000)]
    np.testing.assert_allclose(cumulative(schedules.scaled_linear()), expected, rtol=1e-12)


def test_cosine_telescopes_to_its_closed_form() -> None:
    """alpha-bar = f((t+1)/T) / f(0) until beta is clipped at 0.999, which touches the last step alone at T = 1000."""
    T = 1000
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
    got = cumulative(schedules.cosine())
    np.testing.assert_allclose(got[:-1], [f[t + 1] / f[0] for t in range(T - 1)], rtol=1e-10)
    assert got[-1] == pytest.approx(got[-2] * 0.001, rel=1e-9)


def test_sigmoid_is_the_product_of_geodiff() -> None:
    beta = [1e-4 + (0.02 - 1e-4) / (1 + math.exp(6 - 12 * t / 999)) for t in range(1000)]
    expected = [math.exp(math.fsum(math.log1p(-b) for b in beta[: t + 1])) for t in range(1000)]
    np.testing.assert_allclose(cumulative(schedules.sigmoid()), expected, rtol=1e-12)


def test_custom_ranges() -> None:
    path = schedules.linear(0.1, 0.5, train_steps=3).path(3)
    np.testing.assert_allclose(path.alpha**2, [0.9 * 0.7 * 0.5, 0.9 * 0.7, 0.9, 1.0], rtol=1e-15)
    path = schedules.scaled_linear(0.04, 0.16, train_steps=3).path(3)  # roots 0.2 0.3 0.4
    np.testing.assert_allclose(path.alpha[:-1] ** 2, [0.96 * 0.91 * 0.84, 0.96 * 0.91, 0.96], rtol=1e-14)
    beta = [0.1 + 0.4 / (1 + math.exp(u)) for u in (6, 0, -6)]
    np.testing.assert_allclose(
        cumulative(schedules.sigmoid(3, start=0.1, end=0.5)), np.cumprod(1 - np.array(beta)), rtol=1e-14
    )


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid"])
def test_zero_terminal_snr(name: str) -> None:
    """Lin et al. 2024, algorithm 1: the last alpha is exactly 0, the first is kept, the roots move affinely."""
    plain, zero = cumulative(VP[name]) ** 0.5, cumulative(getattr(schedules, name)(zero_snr=True)) ** 0.5
    assert zero[-1] == 0
    assert zero[0] == pytest.approx(plain[0], rel=1e-14)
    np.testing.assert_allclose(zero, (plain - plain[-1]) * plain[0] / (plain[0] - plain[-1]), atol=1e-14)
    path = getattr(schedules, name)(zero_snr=True).path(4, spacing="trailing")
    assert (path.alpha[0], path.sigma[0], path.lam[0], path.timestep[0]) == (0, 1, -math.inf, 999)


def test_zero_terminal_snr_of_a_given_table() -> None:
    """Roots 0.9, 0.7, 0.5, 0.1 less 0.1, times 0.9 / 0.8; a table that ends at 0 has nothing to be moved."""
    got = cumulative(schedules.from_alphas_cumprod([0.81, 0.49, 0.25, 0.01], zero_snr=True))
    np.testing.assert_allclose(got, np.array([0.9, 0.675, 0.45, 0]) ** 2, rtol=1e-14)
    kept = cumulative(schedules.from_alphas_cumprod(got, zero_snr=True))
    np.testing.assert_allclose(kept, got, rtol=1e-15)


@pytest.mark.parametrize("name", VP)
def test_variance_is_preserved(name: str) -> None:
    for path in (VP[name].path(9), VP[name].path(9, sigmas="karras"), VP[name].path(timesteps=[300.5, 17.25, 3])):
        np.testing.assert_allclose(path.alpha**2 + path.sigma**2, 1, atol=1e-15)


@pytest.mark.parametrize("name", ALL)
def test_every_path_is_a_path(name: str) -> None:
    path = ALL[name].path(7, spacing="trailing")
    assert path.steps == 7
    assert path.alpha.shape == path.sigma.shape == path.lam.shape == (8,)
    assert path.timestep.shape == (7,)
    assert all(array.dtype == np.float64 for array in (path.alpha, path.sigma, path.lam, path.timestep))
    assert (path.alpha[-1], path.sigma[-1], path.lam[-1]) == (1, 0, math.inf)
    assert (np.diff(path.lam) > 0).all()
    finite = slice(1, -1)
    np.testing.assert_allclose(path.lam[finite], np.log(path.alpha[finite] / path.sigma[finite]), atol=1e-14)
    for array in (path.alpha, path.sigma, path.lam, path.timestep):
        with pytest.raises(ValueError, match=r"read-only"):
            array[0] = 1


def test_paths_compare_hash_and_pickle() -> None:
    path = schedules.cosine().path(4)
    assert path == path
    assert len({path, path}) == 1
    copy = pickle.loads(pickle.dumps(path))
    np.testing.assert_array_equal(copy.lam, path.lam)


# ---- grids -----------------------------------------------------------------------------------------------------------
TEN = schedules.linear(0.01, 0.5, train_steps=10)


@pytest.mark.parametrize(
    ("schedule", "steps", "options", "expected"),
    [
        # the first three columns of diffusers' own documentation of spacings (Lin et al. 2024, table 2), T = 1000, N =
        # 10
        (schedules.linear(), 10, {}, [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]),
        (schedules.linear(), 10, {"spacing": "trailing"}, [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]),
        (schedules.linear(), 10, {"spacing": "linspace"}, [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]),
        (schedules.linear(), 10, {"offset": 1}, [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]),
        (TEN, 3, {}, [6, 3, 0]),  # 10 // 3 = 3
        (TEN, 3, {"offset": 2}, [8, 5, 2]),
        (TEN, 3, {"spacing": "trailing"}, [9, 6, 2]),  # 10, 6.67, 3.33 rounded, less 1
        (TEN, 3, {"spacing": "linspace"}, [9, 4, 0]),  # 9, 4.5 (to even), 0
        (TEN, 4, {"spacing": "trailing"}, [9, 7, 4, 1]),  # 10, 7.5 (to even 8), 5, 2.5 (to even 2), less 1
        (TEN, 10, {}, list(range(9, -1, -1))),
        (TEN, 10, {"spacing": "trailing"}, list(range(9, -1, -1))),
        (TEN, 10, {"spacing": "linspace"}, list(range(9, -1, -1))),
        (TEN, 1, {}, [0]),
        (TEN, 1, {"spacing": "trailing"}, [9]),
        (TEN, 1, {"spacing": "linspace"}, [9]),
        (schedules.flow(), 4, {}, [1000, 750, 500, 250]),
        (schedules.flow(), 4, {"spacing": "trailing"}, [1000, 750, 500, 250]),
        (schedules.flow(train_steps=10), 4, {"spacing": "linspace"}, [10, 7, 4, 1]),
        # shift 3: sigma <- 3 sigma / (1 + 2 sigma); 3/4 -> 9/10, 1/2 -> 3/4, 1/4 -> 1/2
        (schedules.flow(3.0), 4, {}, [1000, 900, 750, 500]),
        (schedules.flow(0.5), 2, {}, [1000, 1000 / 3]),  # 1/4 / (1 - 1/4)
    ],
)
def test_spacings(schedule: Any, steps: int, options: dict[str, Any], expected: list[float]) -> None:
    path = schedule.path(steps, **options)
    np.testing.assert_allclose(path.timestep, expected, rtol=1e-14)
    if schedule.train_steps in (10, 1000) and not np.allclose(path.alpha + path.sigma, 1):
        np.testing.assert_allclose(path.alpha[:-1] ** 2, cumulative(schedule)[np.array(expected, int)], rtol=1e-14)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.3])
def test_flow(shift: float) -> None:
    path = schedules.flow(shift).path(8)
    plain = np.array([(8 - i) / 8 for i in range(8)])
    np.testing.assert_allclose(path.alpha + path.sigma, 1, atol=1e-15)
    np.testing.assert_allclose(path.sigma[:-1], shift * plain / (1 + (shift - 1) * plain), rtol=1e-14)
    np.testing.assert_allclose(path.timestep, 1000 * path.sigma[:-1], rtol=1e-15)
    assert (path.alpha[0], path.sigma[0], path.lam[0], path.init_scale) == (0, 1, -math.inf, 1)


def karras(low: float, high: float, n: int, rho: float) -> list[float]:
    return [(high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(n)]


@pytest.mark.parametrize("rho", [7.0, 3.0])
def test_karras_on_edm(rho: float) -> None:
    path = schedules.edm(0.01, 50.0).path(6, rho=rho)
    np.testing.assert_allclose(path.sigma, [*karras(0.01, 50.0, 6, rho), 0], rtol=1e-12)
    assert (path.sigma[0], path.sigma[-2]) == (50.0, 0.01)  # the ends are exact
    np.testing.assert_array_equal(path.alpha, 1)
    np.testing.assert_allclose(path.timestep, np.log(path.sigma[:-1]) / 4, rtol=1e-14)  # c_noise
    assert path.init_scale == 50.0
    ending = schedules.edm(0.01, 50.0).path(5, rho=rho, final_sigma="min")
    np.testing.assert_allclose(ending.sigma, karras(0.01, 50.0, 6, rho), rtol=1e-12)


def test_karras_published_values() -> None:
    """Karras et al. 2022, rho 7 over [0.002, 80] in 18 steps: the first and last of their table, from the formula in
    exact roots."""
    sigma = schedules.edm().path(18).sigma
    step = (80 ** (1 / 7) - 0.002 ** (1 / 7)) / 17
    assert sigma[1] == pytest.approx((80 ** (1 / 7) - step) ** 7, rel=1e-12)
    assert sigma[1] == pytest.approx(57.586, abs=1e-3)
    assert sigma[-3] == pytest.approx((0.002 ** (1 / 7) + step) ** 7, rel=1e-12)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("grid", ["karras", "exponential"])
def test_sigma_grids_on_vp(name: str, grid: str) -> None:
    """sigma / alpha runs over the training range: the sigmas of the first and last training step."""
    bar = cumulative(VP[name])
    low, high = math.sqrt(1 / bar[0] - 1), math.sqrt(1 / bar[-1] - 1)
    n = 9
    if grid == "karras":
        expected = karras(low, high, n, 7.0)
    else:
        expected = [high * (low / high) ** (i / (n - 1)) for i in range(n)]
    path = VP[name].path(n, sigmas=grid)
    np.testing.assert_allclose(path.sigma[:-1] / path.alpha[:-1], expected, rtol=1e-9)
    assert path.timestep[0] == pytest.approx(999, abs=1e-6)
    assert path.timestep[-1] == pytest.approx(0, abs=1e-6)
    log_sigma = 0.5 * np.log(1 / bar - 1)  # the model is told t interpolated in log sigma
    np.testing.assert_allclose(path.timestep, np.interp(np.log(expected), log_sigma, np.arange(1000)), atol=1e-6)
    assert path.init_scale == 1
    ending = VP[name].path(n - 1, sigmas=grid, final_sigma="min")
    np.testing.assert_allclose(ending.sigma, path.sigma[:-1], rtol=1e-12)


def test_zero_snr_leaves_infinite_sigma_out_of_sigma_grids() -> None:
    schedule = schedules.linear(zero_snr=True)
    bar = cumulative(schedule)
    path = schedule.path(5, sigmas="karras")
    assert path.sigma[0] / path.alpha[0] == pytest.approx(math.sqrt(1 / bar[-2] - 1), rel=1e-9)


def test_from_alphas_cumprod_is_taken_as_given() -> None:
    table = np.array([0.9, 0.6, 0.3, 0.1])
    path = schedules.from_alphas_cumprod(table).path(4)
    np.testing.assert_allclose(path.alpha[:-1], np.sqrt(table[::-1]), rtol=1e-15)
    np.testing.assert_allclose(path.sigma[:-1], np.sqrt(1 - table[::-1]), rtol=1e-15)
    table[:] = 0  # a copy was taken
    assert schedules.from_alphas_cumprod([0.9, 0.6]).path(2).alpha[0] == pytest.approx(math.sqrt(0.6))


# ---- explicit grids --------------------------------------------------------------------------------------------------
def test_explicit_timesteps() -> None:
    bar = cumulative(VP["linear"])
    path = VP["linear"].path(timesteps=[999, 250.25, 3])
    np.testing.assert_array_equal(path.timestep, [999, 250.25, 3])
    np.testing.assert_allclose(path.alpha[[0, 2]] ** 2, bar[[999, 3]], rtol=1e-14)
    log_sigma = 0.5 * np.log(1 / bar - 1)
    expected = 0.75 * log_sigma[250] + 0.25 * log_sigma[251]
    assert -path.lam[1] == pytest.approx(expected, abs=1e-12)
    np.testing.assert_array_equal(schedules.flow().path(timesteps=[1000, 400]).sigma, [1, 0.4, 0])


@pytest.mark.parametrize(("strength", "left"), [(1.0, 10), (0.75, 7), (0.3, 3), (0.1, 1)])
def test_strength(strength: float, left: int) -> None:
    for schedule in ALL.values():
        whole, part = schedule.path(10, spacing="trailing"), schedule.path(10, spacing="trailing", strength=strength)
        assert part.steps == left
        for name in ("alpha", "sigma", "lam"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[10 - left :])
        np.testing.assert_array_equal(part.timestep, whole.timestep[10 - left :])
        assert part.init_scale == (part.sigma[0] if schedule is ALL["edm"] else 1)


def test_noise_at() -> None:
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 2, 3, 4))
    for schedule in ALL.values():
        path = schedule.path(10, spacing="trailing", strength=0.5)
        np.testing.assert_allclose(path.noise_at(x0, noise), path.alpha[0] * x0 + path.sigma[0] * noise, rtol=1e-14)
    with pytest.raises(ValueError, match=r"^noise: shape"):
        path.noise_at(x0, noise[:1])


# ---- between grid points ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ALL)
def test_at_inverts_the_grid(name: str) -> None:
    path = ALL[name].path(13, spacing="trailing")
    for i in range(path.steps):
        level = path.at(path.lam[i])
        assert level.alpha == pytest.approx(path.alpha[i], rel=1e-12, abs=1e-15)
        assert level.sigma == pytest.approx(path.sigma[i], rel=1e-12)
        assert level.timestep == pytest.approx(path.timestep[i], rel=1e-9, abs=1e-9)
        assert level.lam == path.lam[i]
        exact = path.level(i)
        assert exact == Level(path.alpha[i], path.sigma[i], path.lam[i], path.timestep[i])
    assert (path.at(math.inf).alpha, path.at(math.inf).sigma) == (1, 0)


@settings(max_examples=60, deadline=None)
@given(lam=st.floats(-12, 12))
def test_at_any_level(lam: float) -> None:
    for name, schedule in ALL.items():
        level = schedule.path(5, spacing="trailing").at(lam)
        total = {"flow": level.alpha + level.sigma, "edm": level.alpha}.get(name, math.hypot(level.alpha, level.sigma))
        assert total == pytest.approx(1, abs=1e-15)
        assert level.sigma / level.alpha == pytest.approx(math.exp(-lam), rel=1e-13)


def test_timestep_between_training_steps_is_linear_in_log_sigma() -> None:
    log_sigma = 0.5 * np.log(1 / cumulative(VP["linear"]) - 1)
    path = VP["linear"].path(5)
    assert path.at(-(0.3 * log_sigma[400] + 0.7 * log_sigma[401])).timestep == pytest.approx(400.7, abs=1e-9)
    assert path.at(-log_sigma[0] + 5).timestep == 0  # beyond the training range: its ends
    assert path.at(-log_sigma[-1] - 5).timestep == 999


# ---- bad input -------------------------------------------------------------------------------------------------------
NAN, INF = math.nan, math.inf
LINEAR, FLOW, EDM = VP["linear"], ALL["flow"], ALL["edm"]


@pytest.mark.parametrize(
    ("schedule", "arguments", "name"),
    [
        *[(LINEAR, {"steps": value}, "steps") for value in (0, -1, None, 1.5, NAN, INF, "a", True, [2], 1001)],
        (EDM, {"steps": 0}, "steps"),
        (FLOW, {"steps": 0}, "steps"),
        (LINEAR, {"steps": 3, "spacing": "even"}, "spacing"),
        (EDM, {"steps": 3, "spacing": "even"}, "spacing"),
        (LINEAR, {"steps": 3, "final_sigma": "one"}, "final_sigma"),
        *[(LINEAR, {"steps": 3, "strength": value}, "strength") for value in (0, -0.5, 1.01, NAN, 0.1)],
        *[(LINEAR, {"steps": 3, "sigmas": "karras", "rho": value}, "rho") for value in (0, -1, NAN, INF)],
        (LINEAR, {"steps": 3, "sigmas": "cubic"}, "sigmas"),
        *[(LINEAR, {"steps": 3, "offset": value}, "offset") for value in (-1, 900, NAN, 0.5, "a")],
        *[
            (LINEAR, {"timesteps": v}, "timesteps")
            for v in ([3, NAN], [3, 5], [5, 5], [1000, 5], [5, -1], [], [[1]], "abc")
        ],
        *[(FLOW, {"timesteps": v}, "timesteps") for v in ([1001, 3], [3, 5])],
        (EDM, {"timesteps": [5, 3]}, "timesteps"),
        (LINEAR, {"steps": 3, "timesteps": [5, 2]}, "timesteps"),
        *[
            (LINEAR, {"sigmas": v}, "sigmas")
            for v in ([3, NAN], [3, 5], [3, 3], [3, -1], [3, 0, 1], [3, 0, 0], [0.0], [INF, 1])
        ],
        *[(FLOW, {"sigmas": v}, "sigmas") for v in ([1.5, 1], [0.5, -0.5])],
        *[(EDM, {"sigmas": v}, "sigmas") for v in ([5, -1], [5, 7])],
        (LINEAR, {"steps": 3, "sigmas": [3, 1]}, "sigmas"),
        (LINEAR, {"sigmas": [3, 2, 1], "timesteps": [5]}, "sigmas|timesteps"),
        # the last value given is where the path would end
        (EDM, {"sigmas": [1, 0.001], "final_sigma": "min"}, "final_sigma"),
        (ALL["zero"], {"timesteps": [998.5, 3]}, "timesteps"),  # between finite and infinite log sigma
    ],
)
def test_bad_grids_name_their_argument(schedule: Any, arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^({name}):"):
        schedule.path(**arguments)


@pytest.mark.parametrize(
    ("make", "arguments", "name"),
    [
        *[(schedules.linear, v, "start") for v in ((0, 0.02), (0.1, 1), (0.02, 0.01), (NAN, 0.02), (1e-4, NAN))],
        *[(schedules.scaled_linear, v, "start") for v in ((-1, 0.02), (0.1, INF))],
        *[(schedules.linear, (1e-4, 0.02, v), "train_steps") for v in (1, 0, 2.5, NAN, True)],
        *[(schedules.cosine, (v,), "train_steps") for v in (1, -5, 2.5)],
        *[(schedules.sigmoid, (v,), "train_steps") for v in (1, -5, 2.5)],
        *[(schedules.flow, (v,), "shift") for v in (0, -1, NAN, INF)],
        *[(schedules.flow, (1, v), "train_steps") for v in (0, 1.5)],
        *[(schedules.edm, v, "sigma_min") for v in ((80, 0.002), (NAN, 80), (0, 80), (0.1, INF), (1, 1))],
        *[(schedules.edm, (0.1, 1, v), "sigma_data") for v in (0, NAN)],
        *[
            (schedules.from_alphas_cumprod, (v,), "alphas_cumprod")
            for v in ([0.5], [0.5, 0.6], [0.5, 0.5], [0.5, NAN], [1.0, 0.5], [0.5, -0.1], [[0.5], [0.1]], "ab", [])
        ],
    ],
)
def test_bad_schedules_name_their_argument(make: Any, arguments: tuple[Any, ...], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}:"):
        make(*arguments)


@pytest.mark.parametrize(
    ("alpha", "sigma", "timestep", "name"),
    [
        ([0.5, 1], [0.5, NAN], [1], "sigma"),
        ([NAN, 1], [0.5, 0], [1], "alpha"),
        ([0.5, 1], [0.5, 0], [INF], "timestep"),
        ([0.5, 0.2], [0.5, 0.9], [1], "the grid"),  # towards more noise
        ([0.5, 0.5, 1], [0.5, 0.5, 0], [2, 1], "the grid"),
        ([0.5, 1], [0.5, 0], [2, 1], "a path"),
        ([1], [0], [], "a path"),
    ],
)
def test_bad_paths(alpha: Any, sigma: Any, timestep: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}"):
        NoisePath(alpha=alpha, sigma=sigma, timestep=timestep, schedule=LINEAR)


def test_bad_levels() -> None:
    path = LINEAR.path(3)
    for index in (-1, 4):
        with pytest.raises(IndexError, match=r"level"):
            path.level(index)
    with pytest.raises(ValueError, match=r"^at: lam"):
        path.at(NAN)
    for lam in (-INF, -800.0):
        with pytest.raises(ValueError, match=r"^at: .*finite sigma"):
            EDM.path(3).at(lam)
