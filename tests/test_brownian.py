"""Brownian motion over the noise levels: its law, computed exactly, and how many normals it draws.

The normals are unit vectors, a new one for each draw, so that an increment is the list of its coefficients and the
covariance of two of them is an inner product.
"""

from __future__ import annotations

import itertools
import math
import threading
from typing import Any

import numpy as np
import pytest

from pyguide import schedules, solvers
from pyguide.brownian import Brownian

INF = math.inf


class Normals:
    """noise(step): the next unit vector; remembers the steps that it was told."""

    def __init__(self, size: int = 120) -> None:
        self.size, self.steps = size, []

    def __call__(self, step: int) -> Any:
        self.steps.append(step)
        return np.eye(1, self.size, len(self.steps) - 1)[0]

    @property
    def drawn(self) -> int:
        return len(self.steps)


def motion(step: Any = lambda time: 0) -> tuple[Brownian, Normals]:
    normals = Normals()
    return Brownian(normals, step), normals


def covariance(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Of (W(t1) - W(t0)) / sqrt|t1 - t0| over two intervals: the length that they share, over the root of both
    lengths; negative if they run in opposite directions. Up to infinity all of the length lies beyond every time."""
    (low_a, high_a), (low_b, high_b) = sorted(a), sorted(b)
    if INF in (high_a, high_b):
        shared = 1.0 if high_a == high_b else 0.0
    else:
        shared = max(0.0, min(high_a, high_b) - max(low_a, low_b))
        shared /= math.sqrt((high_a - low_a) * (high_b - low_b))
    return shared if (a[0] > a[1]) == (b[0] > b[1]) else -shared


def check_law(queries: list[tuple[float, float]]) -> Normals:
    brownian, normals = motion()
    rows = np.array([brownian(*query) for query in queries])
    wanted = [[covariance(a, b) for b in queries] for a in queries]
    np.testing.assert_allclose(rows @ rows.T, wanted, rtol=0, atol=1e-14)
    return normals


# ---- the law ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(40))
def test_law_of_any_queries_in_any_order(seed: int) -> None:
    """Nested, crossing, repeated, reversed, far apart: covariance = what they share, to the rounding of float64."""
    rng = np.random.default_rng(seed)
    times = [*np.exp(rng.uniform(-4, 4, 6)), *([INF] if seed % 2 else []), *([0.0] if seed % 3 else [])]
    pairs = list(itertools.permutations(times, 2))
    check_law([pairs[k] for k in rng.integers(len(pairs), size=12)])


@pytest.mark.parametrize("queries", list(itertools.permutations([(4.0, 1.0), (3.0, 2.0), (3.5, 2.5)])))
def test_law_in_every_order(queries: Any) -> None:
    check_law([*queries, (2.0, 4.0), (1.0, 2.0)])


def test_the_normal_of_a_refinement_is_the_one_of_the_bridge() -> None:
    """W(s) given W(t): (t - s)/t of the way back and sqrt(s (t - s) / t) z, with z positive, for W(0) = 0."""
    brownian, _ = motion()
    t, s = 5.0, 2.0
    whole, part = brownian(0.0, t) * math.sqrt(t), brownian(0.0, s) * math.sqrt(s)
    np.testing.assert_allclose(part, whole * (s / t) + np.eye(1, 120, 1)[0] * math.sqrt(s * (t - s) / t), atol=1e-15)
    np.testing.assert_allclose(brownian(s, t) * math.sqrt(t - s), whole - part, atol=1e-15)


# ---- what is drawn ---------------------------------------------------------------------------------------------------
def test_disjoint_queries_are_fresh_normals_unchanged() -> None:
    """Down a grid, as a solver with one noise a step goes: bit for bit what noise(i) gives."""
    normals = Normals()
    grid = np.exp(np.linspace(4, -6, 40))
    path = schedules.edm(grid[-1], 1e3).path(sigmas=grid[:-1], final_sigma="min").drawing(normals)
    for i, (s, t) in enumerate(itertools.pairwise(path.sigma)):
        np.testing.assert_array_equal(path.brownian(s, t), np.eye(1, 120, i)[0])
    assert normals.steps == list(range(39))


@pytest.mark.parametrize(
    ("queries", "draws"),
    [
        ([(4, 3), (4, 2)], [1, 1]),  # a step of DPM++ SDE: the inner noise, then the whole
        ([(4, 2), (4, 3)], [1, 1]),  # r > 1
        ([(4, 2), (4, 2)], [1, 0]),  # r = 1
        ([(4, 2), (2, 4)], [1, 0]),
        ([(4, 3), (3, 2), (4, 2)], [1, 1, 0]),
        ([(4, 3), (2, 1), (4, 1), (3, 2)], [1, 1, 1, 0]),
        ([(4, 1), (3, 2)], [1, 2]),
        ([(INF, 4), (4, 3), (INF, 3)], [1, 1, 0]),
        ([(INF, 4), (INF, 3), (4, 3)], [1, 0, 1]),  # what has no share in it is not drawn with it
        ([(INF, 4), (6, 5), (5, 4)], [1, 1, 1]),
    ],
)
def test_number_of_draws(queries: Any, draws: list[int]) -> None:
    brownian, normals = motion()
    for query, count in zip(queries, draws, strict=True):
        before = normals.drawn
        brownian(*map(float, query))
        assert normals.drawn - before == count, query
    check_law([(float(a), float(b)) for a, b in queries])


def test_sign() -> None:
    brownian, _ = motion()
    np.testing.assert_array_equal(brownian(3.0, 1.0), np.eye(1, 120, 0)[0])
    np.testing.assert_array_equal(brownian(1.0, 3.0), -np.eye(1, 120, 0)[0])
    np.testing.assert_array_equal(brownian(1.0, 0.5), np.eye(1, 120, 1)[0])


def test_arrays_are_its_own() -> None:
    """A solver may write to what it is given, and a caller to what it returned: the motion does not change."""
    buffer = np.zeros(2)

    def noise(step: int) -> Any:
        buffer[:] += 1
        return buffer

    brownian = Brownian(noise, lambda time: 0)
    first = brownian(4.0, 2.0)
    first *= 7
    np.testing.assert_array_equal(brownian(4.0, 2.0), [1, 1])
    np.testing.assert_array_equal(brownian(2.0, 1.0), [2, 2])
    np.testing.assert_array_equal(brownian(4.0, 2.0), [1, 1])
    assert first.tolist() == [7, 7]


@pytest.mark.parametrize("ulps", [-3, -1, 1, 3])
def test_times_that_differ_by_rounding_are_one(ulps: int) -> None:
    """exp(-lam) and sigma / alpha: an interval between them would have a normal of its own and a weight of 1e-8."""
    brownian, normals = motion()
    s = 2.0 * (1 + ulps * 2.0**-52)
    rows = np.array([brownian(4.0, 2.0), brownian(s, 1.0), brownian(4.0, s), brownian(4.0, 1.0)])
    assert normals.drawn == 2
    np.testing.assert_array_equal(rows[2], rows[0])
    np.testing.assert_allclose(rows[3] @ rows.T, [math.sqrt(2 / 3), math.sqrt(1 / 3), math.sqrt(2 / 3), 1], atol=1e-15)


@pytest.mark.parametrize("shift", [-1e-15, 0.0, 1e-15])
def test_noise_is_told_the_step_that_begins_there(shift: float) -> None:
    path, normals = schedules.scaled_linear().path(6), Normals()
    ratio, run = path.sigma / path.alpha, path.drawing(normals)
    for i in range(6):
        begin, end = ratio[i] * (1 + shift), ratio[i + 1]
        run.brownian(begin, (begin + end) / 2)
        run.brownian(begin, end)
    assert normals.steps == [i for i in range(6) for _ in range(2)]


# ---- pure noise ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "path",
    [schedules.flow().path(4), schedules.scaled_linear(zero_snr=True).path(4, spacing="trailing")],
    ids=["flow", "zero-snr"],
)
def test_from_infinite_time(path: Any) -> None:
    """alpha = 0 at the start: an increment from there is one normal, and independent of every finite one."""
    normals = Normals()
    run = path.drawing(normals)
    with np.errstate(divide="ignore"):
        s = path.sigma / path.alpha
    assert s[0] == INF
    inner, whole = run.brownian(s[0], 2 * s[1]), run.brownian(s[0], s[1])
    np.testing.assert_array_equal(inner, whole)
    np.testing.assert_array_equal(whole, np.eye(1, 120, 0)[0])
    np.testing.assert_array_equal(run.brownian(s[1], s[2]), np.eye(1, 120, 1)[0])
    assert normals.steps == [0, 1]


# ---- one run, one motion ---------------------------------------------------------------------------------------------
def test_each_run_has_its_own() -> None:
    path = schedules.edm().path(4)
    first, second = path.drawing(Normals()), path.drawing(Normals())
    a, b = first.brownian(80.0, 1.0), second.brownian(80.0, 40.0)
    np.testing.assert_array_equal(a, b)  # each began with its own first normal
    assert first.brownian(80.0, 40.0) @ a == pytest.approx(math.sqrt(40 / 79), abs=1e-14)
    np.testing.assert_array_equal(second.brownian(80.0, 40.0), b)
    with pytest.raises(ValueError, match=r"^brownian: this path belongs to no run"):
        path.brownian(80.0, 1.0)


def test_threads_share_nothing() -> None:
    """Runs of one path at the same time, each with its own noises, give what they give one after another."""
    path = schedules.scaled_linear().path(12, sigmas="karras")

    def run(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        return solvers.sample(
            "dpmpp_sde", lambda x, t: np.tanh(x), rng.standard_normal((1, 4)), path,
            noise=lambda step: rng.standard_normal((1, 4)),
        )  # fmt: skip

    results: dict[int, Any] = {}
    barrier = threading.Barrier(8)

    def worker(seed: int) -> None:
        barrier.wait()
        for _ in range(5):
            results[seed] = run(seed)

    threads = [threading.Thread(target=worker, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(8):
        np.testing.assert_array_equal(results[seed], run(seed))


def test_a_long_run_forgets() -> None:
    """What ends before the previous step is dropped, so that memory does not grow; asking for it is an error, and what
    is still known keeps its law."""
    path, normals = schedules.edm().path(50), Normals()
    run = path.drawing(normals)
    s = path.sigma
    for i in range(40):
        run.brownian(s[i], math.sqrt(s[i] * s[i + 1]))
        run.brownian(s[i], s[i + 1])
        assert len(run._increments._pieces) <= 4
    a, b, c = run.brownian(s[38], s[39]), run.brownian(s[39], s[40]), run.brownian(s[38], s[40])
    assert normals.drawn == 80
    assert a @ b == pytest.approx(0, abs=1e-14)
    assert c @ a == pytest.approx(covariance((s[38], s[39]), (s[38], s[40])), abs=1e-14)
    with pytest.raises(ValueError, match=r"^brownian: a run goes from more to less noise; .* is forgotten"):
        run.brownian(s[30], s[40])


@pytest.mark.parametrize("times", [(1.0, 1.0), (-1.0, 2.0), (2.0, -1.0), (math.nan, 1.0), (1.0, math.nan), (INF, INF)])
def test_times_that_are_no_interval(times: tuple[float, float]) -> None:
    brownian, normals = motion()
    with pytest.raises(ValueError, match=r"^brownian: expected two different noise levels"):
        brownian(*times)
    assert normals.drawn == 0


# ---- DPM-Solver++ SDE ------------------------------------------------------------------------------------------------
class Recorded:
    """A run's `brownian` that remembers what it was asked and what it gave."""

    def __init__(self, increments: Any) -> None:
        self.increments, self.calls = increments, []

    def __call__(self, t0: float, t1: float) -> Any:
        self.calls.append(((t0, t1), self.increments(t0, t1)))
        return self.calls[-1][1]


def two_noises(path: Any, **options: Any) -> tuple[list[Any], Normals]:
    """((inner interval, its noise), (whole interval, its noise)) of each step of a run of dpmpp_sde."""
    normals = Normals()
    run = path.drawing(normals)
    recorded = Recorded(run._increments)

    class Output:
        denoised = noise = np.zeros(normals.size)

    object.__setattr__(run, "_increments", recorded)
    solvers.resolve("dpmpp_sde")(lambda x, level: Output(), np.zeros(normals.size), run, noise=normals, **options)
    return list(zip(recorded.calls[::2], recorded.calls[1::2], strict=True)), normals


GRIDS = {
    "karras": schedules.scaled_linear().path(12, sigmas="karras"),
    "leading": schedules.scaled_linear().path(10, offset=1),
    "exponential": schedules.scaled_linear().path(15, sigmas="exponential"),
    "edm": schedules.edm().path(18),
}


@pytest.mark.parametrize("name", GRIDS)
def test_the_two_noises_of_a_step_correlate(name: str) -> None:
    """By the root of the inner one's share of the time: 1 / sqrt(1 + sqrt(s' / s)) at the middle of the step in log s.

    In the median step this is 0.74 to 0.78 on grids of 10 to 18 steps, and it falls to the 0.71 of short steps. With
    independent noises, correlation 0, it is another sampler.
    """
    path = GRIDS[name]
    steps, normals = two_noises(path)
    assert normals.steps == [i for i in range(path.steps - 1) for _ in range(2)]  # the last step ends at clean data
    correlations = []
    for i, ((_, inner), (interval, whole)) in enumerate(steps):
        np.testing.assert_allclose(interval, np.exp(-path.lam[i : i + 2]), rtol=1e-14)
        assert inner @ inner == pytest.approx(1, abs=1e-14)
        assert whole @ whole == pytest.approx(1, abs=1e-14)
        correlations.append(inner @ whole)
    theory = 1 / np.sqrt(1 + np.exp((path.lam[:-2] - path.lam[1:-1]) / 2))
    np.testing.assert_allclose(correlations, theory, rtol=1e-12)
    assert min(correlations) > math.sqrt(0.5)
    assert 0.735 <= np.median(correlations) <= 0.785  # the same with two digits


@pytest.mark.parametrize(("r", "draws"), [(0.2, 2), (0.5, 2), (1.0, 1)])
def test_the_inner_point_sets_the_share(r: float, draws: int) -> None:
    path = GRIDS["edm"]
    steps, normals = two_noises(path, r=r, eta=0.7)
    assert normals.drawn == draws * (path.steps - 1)
    for ((s, inner_end), inner), ((_, end), whole) in steps:
        assert inner_end == pytest.approx(s ** (1 - r) * end**r, rel=1e-12)
        assert inner @ whole == pytest.approx(math.sqrt((s - inner_end) / (s - end)), rel=1e-12)


def test_without_noise_nothing_is_drawn() -> None:
    for options in ({"eta": 0.0}, {"s_noise": 0.0}):
        steps, normals = two_noises(GRIDS["edm"], **options)
        assert not steps
        assert normals.drawn == 0
