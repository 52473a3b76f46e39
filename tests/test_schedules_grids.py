"""Grids by name, explicit lists, respacing strings and shifts, against closed forms and published rules."""

from __future__ import annotations

import hashlib
import math
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyguide
from pyguide import schedules

LINEAR, ZERO, FLOW, EDM = schedules.linear(), schedules.linear(zero_snr=True), schedules.flow(3.0), schedules.edm()
ALL = {"linear": LINEAR, "cosine": schedules.cosine(), "zero": ZERO, "flow": FLOW, "edm": EDM}
NAN, INF = math.nan, math.inf


def own(path: Any) -> np.ndarray:
    """The levels in the unit of `sigmas`: sigma / alpha, on flow paths sigma."""
    with np.errstate(divide="ignore"):
        return path.sigma if isinstance(path.schedule, schedules.Flow) else path.sigma / path.alpha


def ends(schedule: Any) -> tuple[float, float]:
    """(smallest, largest) sigma by the definitions of the three families."""
    if isinstance(schedule, schedules.EDM):
        return schedule.sigma_min, schedule.sigma_max
    if isinstance(schedule, schedules.Flow):
        return schedule.shift * 0.001 / (1 + (schedule.shift - 1) * 0.001), 1.0
    bar = schedule.alphas_cumprod[schedule.alphas_cumprod > 0]
    return math.sqrt(1 / bar[0] - 1), math.sqrt(1 / bar[-1] - 1)


# ---- sigmas by name --------------------------------------------------------------------------------------------------
# Quantile functions of Beta(a, b) that have a closed form.
BETA = {
    (1.0, 1.0): lambda q: q,
    (0.5, 0.5): lambda q: math.sin(math.pi * q / 2) ** 2,  # the arcsine law
    (2.0, 1.0): lambda q: math.sqrt(q),
    (1.0, 3.0): lambda q: 1 - (1 - q) ** (1 / 3),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("parameters", BETA)
def test_beta_sigmas_are_quantiles(name: str, parameters: tuple[float, float]) -> None:
    pytest.importorskip("scipy")
    low, high = ends(ALL[name])
    expected = [low + (high - low) * BETA[parameters](1 - i / 8) for i in range(9)]
    path = ALL[name].path(9, sigmas="beta", beta=parameters)
    # 1 - alphas_cumprod is 4e-5 at the clean end of the cosine schedule: 2^-53 / 4e-5, a few times over
    np.testing.assert_allclose(own(path), [*expected, 0], rtol=2e-11)
    ending = ALL[name].path(8, sigmas="beta", beta=parameters, final_sigma="min")
    np.testing.assert_allclose(own(ending), expected, rtol=2e-11)


def test_beta_sigmas_by_default_are_those_of_six_tenths() -> None:
    """F(x) of Beta(0.6, 0.6) by the trapezoidal rule in t^0.6, which takes the singularity at 0 away."""
    pytest.importorskip("scipy")
    sigma = schedules.edm(1.0, 2.0).path(9, sigmas="beta").sigma[:-1] - 1
    np.testing.assert_allclose(sigma + sigma[::-1], 1, atol=1e-12)  # a = b: symmetric
    whole = math.gamma(0.6) ** 2 / math.gamma(1.2)
    for i in range(5, 8):
        u = np.linspace(0, sigma[i] ** 0.6, 20001)
        density = (1 - u ** (1 / 0.6)) ** -0.4 / 0.6
        mass = (density.sum() - (density[0] + density[-1]) / 2) * u[1]
        assert mass / whole == pytest.approx(1 - i / 8, rel=1e-7)


@pytest.mark.parametrize("name", ["flow", "edm"])
def test_curves_between_the_ends(name: str) -> None:
    low, high = ends(ALL[name])
    root = [high ** (1 / 5) + i / 6 * (low ** (1 / 5) - high ** (1 / 5)) for i in range(7)]
    np.testing.assert_allclose(own(ALL[name].path(7, sigmas="karras", rho=5)), [*(r**5 for r in root), 0], rtol=1e-12)
    ratio = [high * (low / high) ** (i / 6) for i in range(7)]
    path = ALL[name].path(7, sigmas="exponential")
    np.testing.assert_allclose(own(path), [*ratio, 0], rtol=1e-12)
    told = np.log(path.sigma[:-1]) / 4 if name == "edm" else 1000 * path.sigma[:-1]
    np.testing.assert_allclose(path.timestep, told, rtol=1e-12)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("grid", ["karras", "exponential", "beta"])
def test_one_step_by_name_starts_at_the_largest_sigma(name: str, grid: str) -> None:
    if grid == "beta":
        pytest.importorskip("scipy")
    low, high = ends(ALL[name])
    np.testing.assert_allclose(own(ALL[name].path(1, sigmas=grid)), [high, 0], rtol=1e-9)
    np.testing.assert_allclose(own(ALL[name].path(1, sigmas=grid, final_sigma="min")), [high, low], rtol=1e-9)


def test_without_scipy_beta_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name.partition(".")[0] == "scipy":
                raise ModuleNotFoundError(f"No module named {name!r}", name="scipy")

    for module in [m for m in sys.modules if m.partition(".")[0] == "scipy"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"^scipy is not installed: pip install pyguide\[scipy\]$"):
        LINEAR.path(5, sigmas="beta")
    assert LINEAR.path(5, sigmas="karras").steps == 5


# ---- the end point ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("schedule", "steps", "options", "told"),
    [
        (LINEAR, 4, {}, [800, 600, 400, 200]),  # five points 200 apart: the last is timestep 0
        (LINEAR, 5, {"offset": 1}, [801, 601, 401, 201, 1]),  # ends before timestep 0 by itself
        (LINEAR, 3, {"spacing": "linspace"}, [999, 666, 333]),
        (LINEAR, 5, {"spacing": "trailing"}, [999, 799, 599, 399, 199]),
        (LINEAR, 999, {}, list(range(999, 0, -1))),
        (ZERO, 3, {"spacing": "linspace"}, [999, 666, 333]),
        (LINEAR, 2, {"timesteps": [900, 7]}, [900, 7]),
        (schedules.flow(train_steps=10), 3, {"spacing": "linspace"}, [10, 7, 4]),
        (schedules.flow(train_steps=10), 2, {}, [10, 5]),
    ],
)
def test_the_smallest_sigma_as_the_end_point(
    schedule: Any, steps: int, options: dict[str, Any], told: list[float]
) -> None:
    path = schedule.path(steps, final_sigma="min", **options)
    np.testing.assert_allclose(path.timestep, told, rtol=1e-12)
    at_zero = 0.1 if schedule.train_steps == 10 else math.sqrt(1e-4 / (1 - 1e-4))  # beta_1 = 1e-4
    assert own(path)[-1] == pytest.approx(at_zero, rel=1e-9)
    if not options.get("timesteps"):
        to_zero = schedule.path(timesteps=path.timestep.tolist())
        np.testing.assert_array_equal(path.sigma[:-1], to_zero.sigma[:-1])


def test_timestep_zero_is_the_smallest_sigma_whatever_the_rounding() -> None:
    """Lam of the table there and of the smallest sigma take two ways: in some tables the end comes out less noisy."""
    for start in np.linspace(1e-4, 2e-3, 40):
        path = schedules.linear(float(start)).path(4, final_sigma="min")
        assert path.timestep.tolist() == [800, 600, 400, 200]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_grid_can_end_at_the_smallest_sigma(name: str, spacing: Any) -> None:
    for steps in (1, 2, 7, 30, 333, 700, 999):
        path = ALL[name].path(steps, spacing=spacing, final_sigma="min")
        assert path.steps == steps
        low = schedules.linear().alphas_cumprod[0] if name == "zero" else None
        expected = math.sqrt(1 / low - 1) if low is not None else ends(ALL[name])[0]
        assert own(path)[-1] == pytest.approx(expected, rel=1e-9)


# ---- explicit lists --------------------------------------------------------------------------------------------------
def test_explicit_sigmas() -> None:
    for values in ([5.0, 1.0, 0.2], [5.0, 1.0, 0.2, 0.0]):  # a trailing 0 is the end point
        path = LINEAR.path(sigmas=values)
        np.testing.assert_allclose(path.sigma / path.alpha, [5, 1, 0.2, 0], rtol=1e-14)
        np.testing.assert_array_equal(schedules.edm().path(sigmas=values).sigma, [5, 1, 0.2, 0])
    np.testing.assert_allclose(schedules.flow().path(sigmas=[0.9, 0.3]).sigma, [0.9, 0.3, 0], rtol=1e-15)
    assert schedules.edm().path(sigmas=[5.0, 1.0]).init_scale == 5.0


def test_timesteps_beside_sigmas_are_only_told() -> None:
    path = schedules.edm().path(sigmas=[5.0, 1.0], timesteps=[7, 3])
    np.testing.assert_array_equal(path.timestep, [7, 3])
    np.testing.assert_array_equal(path.sigma, [5, 1, 0])


@pytest.mark.parametrize("name", ["linear", "cosine", "edm"])
def test_a_list_of_sigmas_that_ends_in_zero(name: str) -> None:
    """N + 1 values for N steps, as the published lists of Align Your Steps (Sabour et al. 2024) are given."""
    values = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0]
    path = ALL[name].path(sigmas=values)
    assert path.steps == 10
    np.testing.assert_allclose(own(path), values, rtol=1e-14)
    assert ALL[name].path(10, sigmas=values).steps == 10


# ---- respacing strings -----------------------------------------------------------------------------------------------
# Outputs of the unmodified space_timesteps of openai/guided-diffusion, commit 22e0df8183507e13a7813f8d38d51b072ca1e67c
# (Python 3.11), descending.
# fmt: off
SPACED = [
    (1000, "25", [999, 957, 916, 874, 832, 791, 749, 708, 666, 624, 583, 541, 500, 458, 416, 375, 333, 291, 250, 208,
                  166, 125, 83, 42, 0]),
    (1000, "23", [999, 954, 908, 863, 817, 772, 727, 681, 636, 590, 545, 499, 454, 409, 363, 318, 272, 227, 182, 136,
                  91, 45, 0]),
    (1000, "ddim25", [*range(960, -1, -40)]),
    (1000, "10,10,5", [999, 916, 833, 750, 667, 666, 629, 592, 555, 518, 482, 445, 408, 371, 334, 333, 296, 259, 222,
                       185, 148, 111, 74, 37, 0]),
    (300, "10,15,20", [299, 294, 289, 283, 278, 273, 268, 263, 257, 252, 247, 242, 236, 231, 226, 221, 216, 210, 205,
                       200, 199, 192, 185, 178, 171, 164, 157, 149, 142, 135, 128, 121, 114, 107, 100, 99, 88, 77, 66,
                       55, 44, 33, 22, 11, 0]),
    (11, "3,2", [10, 6, 5, 2, 0]),
    (100, "3,0,2,1", [75, 74, 50, 24, 12, 0]),
    (4000, "ddim7", [3432, 2860, 2288, 1716, 1144, 572, 0]),
    (1000, "1", [0]),
    (8, "8", [7, 6, 5, 4, 3, 2, 1, 0]),
]
# fmt: on
# SHA-256 of repr(descending list), one after the other: T = 1000 and 777 with every count "1" .. str(T), then T = 1000
# with f"{k},{j},{k}" for k in range(1, 201, 7) for j in range(1, 201, 9)
SPACED_DIGEST = "d6ed0259cb63cb4d83116eecc84d84394e6bbff64a9008c913d66aaa2e312e25"


@pytest.mark.parametrize(("total", "text", "expected"), SPACED)
def test_respacing_is_that_of_guided_diffusion(total: int, text: str, expected: list[int]) -> None:
    assert schedules.respace(text, total) == expected
    path = schedules.linear(train_steps=total).path(timesteps=text)
    assert path.timestep.tolist() == expected
    assert path.steps == len(expected)


def test_respacing_of_all_counts_is_that_of_guided_diffusion() -> None:
    """Where the exact position is half way between two timesteps, the rounding of its running sum decides: 278 of the
    counts of T = 1000 differ if positions are products."""
    digest = hashlib.sha256()
    for total in (1000, 777):
        for count in range(1, total + 1):
            digest.update(repr(schedules.respace(str(count), total)).encode())
    for k in range(1, 201, 7):
        for j in range(1, 201, 9):
            digest.update(repr(schedules.respace(f"{k},{j},{k}")).encode())
    assert digest.hexdigest() == SPACED_DIGEST


@settings(max_examples=200, deadline=None)
@given(total=st.integers(1, 600), counts=st.lists(st.integers(0, 40), min_size=1, max_size=5))
def test_respacing_rounds_evenly_spaced_positions(total: int, counts: list[int]) -> None:
    """Every section keeps its count, both ends included, at the integers nearest to equal distances."""
    text, size, longer = ",".join(map(str, counts)), total // len(counts), total % len(counts)
    lengths = [size + (i < longer) for i in range(len(counts))]
    if not any(counts) or any(count > length for count, length in zip(counts, lengths)):
        with pytest.raises(ValueError, match=r"^text:"):
            schedules.respace(text, total)
        return
    kept = schedules.respace(text, total)[::-1]
    assert kept == sorted(set(kept))
    start = 0
    for count, length in zip(counts, lengths):
        section = [t - start for t in kept if start <= t < start + length]
        assert len(section) == count
        for j, t in enumerate(section):
            exact = Fraction(j * (length - 1), max(count - 1, 1))
            assert abs(t - exact) <= Fraction(1, 2)
        start += length


@pytest.mark.parametrize("count", [1, 4, 25, 50, 250, 1000])
def test_ddim_striding_is_leading_where_the_count_divides(count: int) -> None:
    assert schedules.respace(f"ddim{count}") == LINEAR.path(count).timestep.tolist()


@pytest.mark.parametrize("text", ["25", "ddim25", "10,10,5", "90,60,60,20,20"])
def test_a_respaced_process_has_the_alphas_of_its_timesteps(text: str) -> None:
    """Betas between the kept timesteps, and their product from scratch (Nichol, Dhariwal 2021, eq. 19)."""
    beta = np.linspace(1e-4, 0.02, 1000)
    bar = [math.exp(math.fsum(np.log1p(-beta[: t + 1]))) for t in range(1000)]
    kept = schedules.respace(text)[::-1]
    respaced = [1 - bar[t] / (bar[kept[k - 1]] if k else 1) for k, t in enumerate(kept)]
    # beta keeps r = bar[t] / bar[t'] >= 0.19 to 2^-53 / r, 250 times at most; 2^-53 for each product of the table
    got = LINEAR.path(timesteps=text).alpha[:-1][::-1] ** 2
    np.testing.assert_allclose(got, np.cumprod(1 - np.array(respaced)), rtol=(250 / 0.19 + 1000) * 2**-53)


def test_paths_made_from_strings_can_be_made_again() -> None:
    path = LINEAR.path(timesteps="10,10,5")
    part = path.remade(strength=0.2)
    assert part.timestep.tolist() == path.timestep.tolist()[20:]
    assert path.remade(timesteps="ddim5").timestep.tolist() == [800, 600, 400, 200, 0]
    pytest.importorskip("scipy")
    path = FLOW.path(6, sigmas="beta", beta=(0.5, 0.5))
    np.testing.assert_array_equal(path.remade(rho=3.0).sigma, path.sigma)
    longer = path.remade(steps=12)
    np.testing.assert_array_equal(longer.sigma, FLOW.path(12, sigmas="beta", beta=(0.5, 0.5)).sigma)


def test_strings_and_lists_compile() -> None:
    for path in (LINEAR.path(timesteps="10,10,5"), LINEAR.path(sigmas=[9.0, 1.0, 0.2, 0.0])):
        assert pyguide.compile("dpmpp_2m", path).evaluations == path.steps


# ---- flow: shift and terminal ----------------------------------------------------------------------------------------
def test_flow_shift_is_a_line_in_mu() -> None:
    assert schedules.flow_shift(256) == pytest.approx(math.exp(0.5), rel=1e-15)
    assert schedules.flow_shift(4096) == pytest.approx(math.exp(1.15), rel=1e-15)
    assert schedules.flow_shift(1024) == pytest.approx(math.exp(0.63), rel=1e-14)  # a fifth of the way
    assert schedules.flow_shift(7936) == pytest.approx(math.exp(1.8), rel=1e-14)  # the line goes on
    assert schedules.flow_shift(4224, max_tokens=8192, max_shift=0.9) == pytest.approx(math.exp(0.7), rel=1e-14)
    assert schedules.flow_shift(100, 50, 150, 1, 2) == pytest.approx(math.exp(1.5), rel=1e-14)


@pytest.mark.parametrize(("options", "last"), [({}, 0.25), ({"spacing": "linspace"}, 0.001)])
def test_terminal_stretches_the_grid(options: dict[str, Any], last: float) -> None:
    """1 - sigma is scaled: 0 stays 0, the last becomes 1 - terminal, ratios are kept."""
    plain = np.linspace(1, last, 4)
    plain = 3 * plain / (1 + 2 * plain)
    schedule = schedules.flow(3.0, terminal=0.1)
    path = schedule.path(4, **options)
    np.testing.assert_allclose(1 - path.sigma[:-1], (1 - plain) * 0.9 / (1 - plain[-1]), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(path.timestep, 1000 * path.sigma[:-1], rtol=1e-15)
    assert path.sigma[-2] == 0.1
    ending = schedule.path(3, **options, final_sigma="min")
    if options:  # leading points move with N
        np.testing.assert_allclose(ending.sigma, path.sigma[:-1], rtol=1e-13)
    assert ending.sigma[-1] == 0.1
    assert schedule.path(5, sigmas="exponential").sigma[-2] == 0.1
    assert schedule.path(1, **options).sigma.tolist() == [1, 0]


# ---- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("schedule", "arguments", "name", "says"),
    [
        (LINEAR, {"steps": 3, "sigmas": "cubic"}, "sigmas", '"beta".*cubic'),
        *[
            (LINEAR, {"steps": 3, "sigmas": "beta", "beta": v}, "beta", r"\(a, b\)|positive")
            for v in ((0.6,), (1, 2, 3), 0.6, None, "ab", (0, 1), (1, -1), (NAN, 1), (1, INF), (True, 1), ("1", 1))
        ],
        (EDM, {"steps": 3, "beta": (0, 1)}, "beta", "positive number, got 0"),
        *[
            (LINEAR, {"timesteps": v}, "timesteps", "respacing string")
            for v in ("", "abc", "10,,5", "-5", "2.5", "ddim", "ddimx", "ddim-4", "ddim5,5", "1_0", "10;5", "10,5,")
        ],
        (LINEAR, {"timesteps": "1001"}, "timesteps", "section 0 of '1001' has 1000 timesteps, fewer than the 1001"),
        (LINEAR, {"timesteps": "5,600"}, "timesteps", "section 1 of '5,600' has 500"),
        (LINEAR, {"timesteps": "0,0"}, "timesteps", "at least one"),
        (LINEAR, {"timesteps": "ddim999"}, "timesteps", "no whole stride takes exactly 999 of 1000"),
        (LINEAR, {"timesteps": "ddim0"}, "timesteps", "no whole stride"),
        (LINEAR, {"timesteps": "25", "steps": 24}, "timesteps", "25 values .* steps=24"),
        (LINEAR, {"timesteps": 25}, "timesteps", "sequence"),
        (FLOW, {"timesteps": "25"}, "timesteps", "Flow has none: it is continuous"),
        (EDM, {"timesteps": "ddim25"}, "timesteps", "EDM has none"),
        (LINEAR, {"timesteps": [500, 0], "final_sigma": "min"}, "final_sigma", "leave the last value out"),
        (LINEAR, {"timesteps": "25", "final_sigma": "min"}, "final_sigma", "ends at sigma 0.01"),
        (FLOW, {"sigmas": [0.5, 0.002], "final_sigma": "min"}, "final_sigma", "ends at sigma"),
        *[
            (s, {"sigmas": [0.9, 0.5, 0], "final_sigma": "min"}, "final_sigma", "end in 0, got 'min'")
            for s in (LINEAR, FLOW, EDM)
        ],
        (LINEAR, {"steps": 1000, "final_sigma": "min"}, "final_sigma", "at most 999 steps; got steps=1000"),
        (LINEAR, {"steps": 1001, "final_sigma": "min"}, "steps", "at most the 1000"),
    ],
)
def test_bad_grids_say_what_was_expected(schedule: Any, arguments: dict[str, Any], name: str, says: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)^{name}: .*({says})"):
        schedule.path(**arguments)


def test_quantiles_that_float64_cannot_tell_apart() -> None:
    pytest.importorskip("scipy")
    with pytest.raises(ValueError, match=r"^beta: 9 quantiles of Beta\(0.001, 0.001\)"):
        EDM.path(9, sigmas="beta", beta=(1e-3, 1e-3))


@pytest.mark.parametrize(
    ("make", "arguments", "name"),
    [
        *[(schedules.sigmoid, {"start": a, "end": b}, "start") for a, b in ((0, 0.1), (0.2, 0.1), (NAN, 1), (0.1, 1))],
        *[(schedules.flow, {"terminal": v}, "terminal") for v in (0, 1, -0.1, NAN, INF, "a", True)],
        *[(schedules.flow, {"shift": v}, "shift") for v in ("3", None, True, [1])],
        *[(schedules.flow_shift, {"tokens": v}, "tokens") for v in (0, -1, 2.5, NAN, "a", None, 10**9)],
        (schedules.flow_shift, {"tokens": 4, "base_tokens": 0}, "base_tokens"),
        (schedules.flow_shift, {"tokens": 4, "max_tokens": 256}, "max_tokens"),
        (schedules.flow_shift, {"tokens": 4, "base_shift": NAN}, "base_shift"),
        (schedules.flow_shift, {"tokens": 4, "max_shift": "1"}, "max_shift"),
        (schedules.from_alphas_cumprod, {"alphas_cumprod": [0.5, 0.6], "zero_snr": True}, "alphas_cumprod"),
        *[(schedules.respace, {"text": v}, "text") for v in (25, None, [25], b"25", "x", "")],
        *[(schedules.respace, {"text": "5", "train_steps": v}, "train_steps") for v in (0, 2.5, "a", True)],
    ],
)
def test_bad_arguments_are_named(make: Any, arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        make(**arguments)
