"""The exact quantile of |D| of dynamic thresholding: bits, accuracy, special values, and the step that reads it.

Expected bits: |D| as the step itself writes it without a clip, sorted by numpy and interpolated in float64. Expected
values: numpy.quantile of D in extended precision (tests/oracle.py).
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import oracle
import pytest
from launches import Launch, Tensor, address

from pyguide import native
from pyguide.layout import SAMPLE, row_width, weights_width

C: Any = native.C
if C is None:
    pytest.skip(f"no native kernel: {native.reason}", allow_module_level=True)

ISAS = C.isas()
LAYOUTS = ("contiguous", "last", "slice", "gap", "reversed")
NO_LIMIT = {"least": 1e-30, "limit": float("inf")}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Any:
    C.set_isa(request.param)
    yield request.param
    C.set_isa(ISAS[-1])


# ---- what is expected ---------------------------------------------------------------------------------------------
def bound_of(sizes: np.ndarray, quantile: float, least: float, limit: float) -> Any:
    """min(max(quantile, least), limit) of |D|, given in the state's type, rounded to it once."""
    if np.isnan(sizes).any():
        return sizes.dtype.type(np.nan)
    ordered = np.sort(sizes)
    position = quantile * float(sizes.size - 1)
    index = int(position)
    low, fraction = float(ordered[index]), position - index
    value = low
    if fraction and ordered[index] != ordered[index + 1]:
        value = low + (float(ordered[index + 1]) - low) * fraction
    with np.errstate(over="ignore"):
        return sizes.dtype.type(min(max(value, least), limit))


def bits(x: Any) -> bytes:
    return np.asarray(x).tobytes()


class Bounds:
    """[batch] numbers of a state's type amid poison."""

    def __init__(self, batch: int, dtype: str):
        self.memory = np.full(batch + 2, -7, oracle.STORAGE[dtype])
        self.values = self.memory[1:-1]

    def give(self, step: Any, quantile: float, least: float, limit: float) -> None:
        step.set_quantile(quantile, least, limit, address(self.values))

    def untouched_around(self) -> bool:
        return self.memory[0] == self.memory[-1] == -7


class Thresholded:
    """A random launch with a quantile; `sizes` holds |D| in the bits of the step, by sample, None where none is due."""

    def __init__(self, seed: int, quantile: float, least: float = 1e-30, limit: float = float("inf"), *,
                 idle: int = -1, **options: Any):  # fmt: skip
        self.launch, twin = Launch(seed, **options), Launch(seed, **{**options, "denoised": True})
        self.options = quantile, least, limit
        for i, sample in enumerate(twin.samples):  # D without a clip
            width, start = row_width(int(sample["slots"])), int(sample["table"])
            for r in range(twin.at[i] + 2):
                twin.tables[start + r * width + 2 : start + r * width + 4] = -np.inf, np.inf
        twin.run()
        assert twin.denoised is not None
        wants = self.launch.denoised is not None
        if idle >= 0:
            self.launch.samples[idle]["end"] = self.launch.samples[idle]["row"]
        self.sizes: list[np.ndarray | None] = []
        self.expected = np.full(self.launch.B, -7, self.launch.real)
        for i in range(self.launch.B):
            row = self.launch.now(i)
            due = self.launch.samples[i]["row"] < self.launch.samples[i]["end"]
            needed = due and self.launch.at[i] > 0 and (wants or bool(row.d.any()))
            self.sizes.append(np.abs(np.ascontiguousarray(twin.denoised.view[i])).ravel() if needed else None)
            if due:
                sizes = self.sizes[-1]
                self.expected[i] = 0 if sizes is None else bound_of(sizes, *self.options)
        self.bounds = Bounds(self.launch.B, options.get("state", "float32"))
        self.bounds.give(self.launch.step, *self.options)

    def run(self) -> np.ndarray:
        """The bounds that were written."""
        self.launch.run()
        assert self.bounds.untouched_around()
        return self.bounds.values

    def run_and_compare(self) -> None:
        """The bounds' bits, and everything that the step makes of them."""
        for i in range(self.launch.B):
            row = self.launch.rows[i][self.launch.at[i]] = copy.copy(self.launch.now(i))
            row.bound = float(self.expected[i])
        self.launch.run_and_compare()
        assert self.bounds.untouched_around()
        np.testing.assert_array_equal(self.bounds.values, self.expected)


class Given:
    """A step whose D are given numbers [batch, N]: one branch, D = m_0."""

    def __init__(self, D: np.ndarray, dtype: str = "float32"):
        batch, N = D.shape
        real = oracle.STORAGE[dtype]
        self.D = D.astype(real)
        self.C = Launch.C
        self.step = self.C.Step(batch, 1, N, 1, 1, 0, dtype, dtype, dtype, "float32")
        self.tables = np.zeros((2, row_width(1)), real)
        self.tables[1, :4] = 0, 1, -np.inf, np.inf
        self.tables[1, 9] = 1  # d
        self.weights = np.zeros((2, weights_width(1, 1, 0)), real)
        self.weights[1, 0] = 1
        self.samples = np.zeros(batch, SAMPLE)
        self.samples["row"], self.samples["end"], self.samples["slots"] = 1, 2, 1
        self.source = np.arange(batch, dtype=np.int32).reshape(batch, 1)
        self.target = np.full((batch, 1), -1, np.int32)
        self.state = np.full((1, batch, N), np.nan, real)  # not read
        self.bounds = Bounds(batch, dtype)
        step = self.step
        step.state, step.tables, step.weights = address(self.state), address(self.tables), address(self.weights)
        step.samples = address(self.samples)
        step.route(address(self.source), address(self.target), 0)
        step.set_output(0, address(self.D), N, N, 1)

    def run(self, quantile: float, least: float = 1e-30, limit: float = float("inf")) -> np.ndarray:
        """The bounds; the state is then clamp(D, -b, b) / b."""
        self.samples["row"] = 1
        self.bounds.give(self.step, quantile, least, limit)
        if Launch.placed:
            names = self.samples, self.tables, self.weights, None, self.source, self.target
            self.step.place(0, *(0 if a is None else address(a) for a in names))
            self.step.check = False
        self.step.run()
        assert self.bounds.untouched_around()
        return self.bounds.values.copy()

    def compare(self, quantile: float, least: float = 1e-30, limit: float = float("inf")) -> None:
        expected = [bound_of(np.abs(D), quantile, least, limit) for D in self.D]
        np.testing.assert_array_equal(self.run(quantile, least, limit), expected)


# ---- any launch -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(24))
def test_random_plans(isa: str, seed: int) -> None:
    """Types, layouts, branches, slots of solver and guidance, o terms, routes, prologues, idle samples, NaN."""
    rng = np.random.default_rng(5000 + seed)
    pick = lambda *options: options[rng.integers(len(options))]  # noqa: E731
    Thresholded(
        seed, float(pick(0.0, 0.5, 0.9, 0.995, 1.0)), least=float(pick(1e-30, 1.0)), limit=float(pick(1.5, np.inf)),
        idle=int(pick(-1, 2)), batch=3, channels=pick(1, 3), inner=pick(1, 7, 64, 171), branches=pick(1, 2, 3, 6),
        slots=pick((1,), (2, 1), (3, 4)), guidance_slots=pick(0, 0, 2), state=pick("float32", "float32", "float64"),
        output=pick("float32", "float16", "bfloat16", "float64"), layout=pick(*LAYOUTS), offset=pick(0, 1, 4),
        density=pick(0.3, 0.7, 1.0), denoised=pick(True, False), row=pick(1, 2, (0, 1, 3)),
        noise=pick("none", "philox"), routes=pick(True, False), absent=pick(True, False), nan=pick(False, False, True),
    ).run_and_compare()  # fmt: skip


@pytest.mark.parametrize("state", ["float32", "float64"])
def test_lengths(isa: str, state: str) -> None:
    """Tails of vectors and blocks, and the lengths at which the number of threads of a GPU's block changes."""
    for N in (1, 2, 3, 5, 63, 65, 511, 513, 1100, 2049):
        Thresholded(N, 0.7, inner=N, batch=1, branches=1 + N % 3, density=1.0, state=state).run_and_compare()


@pytest.mark.parametrize("state", ["float32", "float64"])
def test_values_are_those_of_exact_arithmetic(isa: str, state: str) -> None:
    """A quantile moves by no more than the element that moves most, and an element has 4 eps sum |terms| at most."""
    eps = 2.0**-24 if state == "float32" else 2.0**-53
    for seed, quantile in enumerate([0.0, 0.35, 0.995, 1.0]):
        case = Thresholded(seed, quantile, inner=257, channels=3, branches=3, density=1.0, state=state, denoised=True)
        assert all(row.head[0] and row.head[1] for i in range(2) for row in [case.launch.now(i)])
        expected, errors = [], []
        for i in range(2):
            row = copy.copy(case.launch.now(i))
            row.head = row.head.copy()
            row.head[2:4] = -np.inf, np.inf
            m = [t.get(case.launch.source[i, k]).ravel() for k, t in enumerate(case.launch.output)]
            z = np.zeros(case.launch.N)
            exact = oracle.step(row, case.launch.state.get()[:, i], m, z, 0, z, z, True)
            expected.append(np.quantile(np.abs(exact.denoised).astype(np.float64), quantile))
            errors.append(4 * eps * float(np.max(exact.denoised_magnitude)) + 2 * eps * abs(expected[-1]))
        values = case.run().astype(np.float64)
        assert (np.abs(values - expected) <= errors).all()
        # the next element is further away than that: another position would show
        assert all(
            np.abs(values[i] - np.quantile(case.sizes[i].astype(np.float64), abs(quantile - 0.01))) > errors[i]
            for i in range(2)
        )


@pytest.mark.parametrize(("state", "N"), [("float32", 300_001), ("float64", 140_003)])
def test_samples_larger_than_what_is_kept(isa: str, state: str, N: int) -> None:
    D = np.random.default_rng(N).normal(size=(1, N))
    given = Given(D, state)
    for quantile in (0.5, 0.995):
        given.compare(quantile)
    Given(np.full((1, N), 0.3) * np.sign(D), state).compare(0.995)  # nothing is left out by any digit


# ---- special values -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("state", ["float32", "float64"])
def test_special_values(isa: str, state: str) -> None:
    rng = np.random.default_rng(3)
    tiny, huge = float(np.finfo(state).smallest_subnormal), float(np.finfo(state).max)
    cases = [
        np.full(70, -1.25),
        np.zeros(9) * -1.0,
        np.r_[np.full(40, 2.0), 3.0],
        np.r_[1.0, np.full(40, -np.inf)],
        np.r_[np.linspace(-3, 3, 30), np.inf],
        np.array([huge, -huge, huge / 2]),
        np.arange(50) * tiny,
        np.ldexp(rng.normal(size=200), rng.integers(-60, 60, size=200)),
        np.nextafter(np.ones(64, state), 2).astype(np.float64) * rng.choice([-1, 1], size=64),
        1 + np.arange(64) * float(np.finfo(state).eps),  # that differ in their last digit alone
        np.array([-0.5]),
    ]
    for D in cases:
        given = Given(D[None], state)
        for quantile in (0.0, 1 / 3, 0.5, 0.97, 0.995, 1.0):
            given.compare(quantile)
            given.compare(quantile, least=1.0, limit=1.5)


@pytest.mark.parametrize("state", ["float32", "float64"])
def test_a_nan_anywhere_is_nan_there_alone(isa: str, state: str) -> None:
    for at in (0, 33, 699):
        D = np.random.default_rng(at).normal(size=(3, 700))
        D[1, at] = np.nan
        given = Given(D, state)
        values = given.run(0.9, least=1.0, limit=1.5)
        assert np.isnan(values).tolist() == [False, True, False]
        assert np.isnan(given.state[0]).all(axis=1).tolist() == [False, True, False]
        assert not np.isnan(given.state[0, ::2]).any()
        given.D[1, at] = 0
        assert not np.isnan(given.run(0.9)).any()


def test_the_step_reads_the_bound(isa: str) -> None:
    """The paper's use: D beyond the 90th percentile saturates, and all is divided by it."""
    D = np.random.default_rng(0).normal(size=(2, 500)) * 3
    given = Given(D)
    (bounds := given.run(0.9, least=1.0))[:, None]
    np.testing.assert_array_equal(given.state[0], np.clip(given.D, -bounds[:, None], bounds[:, None]) / bounds[:, None])
    saturated = (np.abs(given.state[0]) == 1).sum(axis=1)
    assert saturated.tolist() == [50, 50]  # 0.9 * 499 = 449.1: the elements from the 451st on
    given.step.set_quantile(-1, 1, 1, 0)
    given.samples["row"] = 1
    given.step.run()
    np.testing.assert_array_equal(given.state[0], given.D)  # none again


# ---- when there is no bound, and what a sample's bits depend on -----------------------------------------------------
def test_rows_without_d_and_prologues_have_no_bound_and_idle_samples_keep_theirs(isa: str) -> None:
    case = Thresholded(4, 0.5, idle=3, batch=5, row=(0, 1, 2, 1, 2), denoised=True, density=1.0, inner=40)
    case.run_and_compare()
    assert case.bounds.values[0] == 0
    assert case.bounds.values[3] == -7
    assert (case.bounds.values[[1, 2, 4]] > 0).all()
    case = Thresholded(4, 0.5, batch=2, row=1, inner=40, density=0.0)
    case.run_and_compare()
    assert case.bounds.values.tolist() == [0, 0]


@pytest.mark.parametrize("N", [100, 5000])
def test_a_sample_is_the_same_in_any_batch_at_any_index(isa: str, N: int) -> None:
    D = np.random.default_rng(N).normal(size=(5, N)) * np.array([1, 30, 0.1, 2, 5])[:, None]
    alone = [bits(Given(D[i : i + 1]).run(0.995)) for i in range(5)]
    order = [3, 0, 4, 1, 2]
    for threads in (1, 3):
        together = Given(D[order])
        together.step.threads = threads
        assert [bits(b) for b in together.run(0.995)] == [alone[i] for i in order]
    # negative control: a quantile of the batch, as of any other values, has other bits
    assert bits(Given(D.reshape(1, -1)).run(0.995)) not in alone
    assert len(set(alone)) == 5


@pytest.mark.parametrize("state", ["float32", "float64"])
def test_a_guided_output_by_groups_has_the_bound_of_its_weights(isa: str, state: str) -> None:
    """G from the buffer of a method that works by groups, here with the plain weights of the row everywhere."""
    real, N, K, width = oracle.STORAGE[state], 240, 2, weights_width(2, 1, 0)
    m = np.random.default_rng(9).normal(size=(K, 2, N)).astype(real)
    given = Given(m[0], state)
    given.step = step = given.C.Step(2, 1, N, K, 1, 0, state, state, state, "float32")
    given.weights = np.zeros((3, width), real)  # rows 0 and 1 of plain weights; what the step itself then has: w = 1
    given.weights[1, :2] = 7.5, -6.5
    given.source = np.full((2, 2, K), -1, np.int32)  # by row and sample
    given.source[1] = [[0, 0], [1, 1]]
    given.target = np.full((2, 2, K), -1, np.int32)
    step.state, step.tables, step.weights = address(given.state), address(given.tables), address(given.weights)
    step.samples = address(given.samples)
    step.route(address(given.source), address(given.target), 2 * K)
    for k in range(K):
        step.set_output(k, address(m[k]), N, N, 1)
    without = given.run(0.97)
    expected = [bound_of(np.abs(m[0, i] * 7.5 - m[1, i] * 6.5), 0.97, 1e-30, np.inf) for i in range(2)]
    np.testing.assert_allclose(without, expected, rtol=16 * float(np.finfo(real).eps))  # what cancels is less than that

    given.weights[2, 0] = 1
    given.samples["method"], given.samples["weights"] = 1, 2 * width
    program = np.array([K, 3, 0, 1, 0], np.int32).tobytes() + np.array([0, 0], np.uint16).tobytes()
    parameters, pattern, guided = np.zeros(3), np.ones(width, real), np.full((2, N), np.nan, real)
    partial, source = np.zeros((2, 8)), np.full((2, 2, K), -1, np.int32)
    source[1, :, 0] = 0, 1
    step.set_moments(program, address(parameters), 0, 0, 0, width, 0, address(pattern), address(partial), 0, 1, 4, 60,
                     address(guided), address(source))  # fmt: skip
    if Launch.placed:
        step.place_moments(*map(address, (parameters, partial, partial, guided, source)))
    given.state[...] = np.nan
    assert bits(given.run(0.97)) == bits(without)
    np.testing.assert_allclose(guided, m[0] * 7.5 - m[1] * 6.5, rtol=0, atol=64 * float(np.finfo(real).eps))
    assert (np.abs(given.state) <= 1).all()


def test_instruction_sets_agree() -> None:
    if len(fused := ISAS[1:]) < 2:
        pytest.skip("this machine lacks a second instruction set with a fused multiply-add")
    found = set()
    for name in fused:
        C.set_isa(name)
        found.add(bits(Thresholded(1, 0.93, inner=777, branches=3, density=1.0, denoised=True).run()))
    C.set_isa(ISAS[-1])
    assert len(found) == 1


def test_strided_operands_give_the_same_bits(isa: str) -> None:
    values = np.random.default_rng(2).normal(size=(2, 12, 65))
    found = set()
    for layout in LAYOUTS:
        given = Given(values.reshape(2, -1))
        tensor = Tensor(values.shape, "float32", layout, offset=3)
        tensor.set(values)
        given.step = given.C.Step(2, 12, 65, 1, 1, 0, "float32", "float32", "float32", "float32")
        step = given.step
        step.state, step.tables, step.weights = address(given.state), address(given.tables), address(given.weights)
        step.samples = address(given.samples)
        step.route(address(given.source), address(given.target), 0)
        step.set_output(0, *tensor.args)
        found.add(bits(given.run(0.98)))
    assert len(found) == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((1.5, 1, 2), "quantile"), ((0.5, 0, 2), "least"), ((0.5, 2, 1), "limit"), ((float("nan"), 1, 2), "quantile")],
)
def test_arguments_that_are_refused(arguments: tuple[float, float, float], named: str) -> None:
    given = Given(np.ones((1, 4)))
    with pytest.raises(ValueError, match=named):
        given.step.set_quantile(*arguments, address(given.bounds.values))
    with pytest.raises(ValueError, match="bound"):
        given.step.set_quantile(0.5, 1.0, 2.0, 0)
    with pytest.raises(ValueError, match="quantile: a sample of 4294967296 elements"):  # its counts have 32 bits
        C.Step(0, 1 << 16, 1 << 16, 1, 1).set_quantile(0.5, 1.0, 2.0, 0)
