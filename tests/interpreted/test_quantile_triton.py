"""The Triton kernel of the quantile under its interpreter, exactly: D is the step kernel's own, its order statistics
are numpy's, what lies between them is interpolated in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install pyguide[triton]")

import torch

from pyguide.layout import HEAD, SAMPLE, row_width, weights_width

ROWS, K = 4, 2


@pytest.fixture(scope="module")
def kernels() -> Any:
    from pyguide.kernels import launch_triton

    return launch_triton


@pytest.fixture
def blocks(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """For short samples what is there for long ones: several blocks in registers, or none and 64 elements at a time."""
    import pyguide.kernels.quantile_triton as module

    def choose(registers: bool) -> None:
        monkeypatch.setattr(module, "BLOCK", 64 if registers else 128)
        monkeypatch.setattr(module, "PARTS", 4 if registers else 0)

    return choose


def slow(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)


class Launch:
    """Samples at rows[b] of 4; row 3 needs no D."""

    def __init__(self, seed: int = 0, *, batch: int = 2, channels: int = 1, inner: int = 40, rows: Any = 1,
                 state: str = "float32", output: str = "float32", solver: int = 2, own: int = 0,
                 method: int = 0):  # fmt: skip
        self.B, self.N, self.S, self.own = batch, channels * inner, solver + own, own
        self.shape, self.real, self.type = (batch, channels, inner), getattr(torch, state), state
        rng = np.random.default_rng([seed, 3])
        kind = getattr(torch, output)
        self.state = torch.as_tensor(rng.normal(size=(self.S, *self.shape))).to(self.real)
        self.outputs = [torch.as_tensor(rng.normal(size=(batch + 1, channels, inner))).to(kind) for _ in range(K)]
        self.source = np.stack([np.stack([rng.permutation(batch + 1)[:batch] for _ in range(K)], -1)
                                for _ in range(ROWS)]).astype(np.int32)  # fmt: skip
        self.samples = np.zeros(batch, SAMPLE)
        self.samples["row"], self.samples["end"], self.samples["slots"], self.samples["method"] = (
            rows,
            ROWS,
            solver,
            method,
        )
        W, P = row_width(solver), weights_width(K, self.S, own)
        tables = rng.normal(size=(ROWS, W))
        tables[:, 2], tables[:, 3], tables[:, 6:8] = -np.inf, np.inf, 0
        tables[3, HEAD + solver * solver : HEAD + solver * solver + 2 * solver] = 0  # d and e of the last row
        self.tables = torch.as_tensor(tables).to(self.real)
        self.weights = torch.as_tensor(rng.normal(size=(ROWS, batch, P))).to(self.real)
        self.samples["weights"] = np.arange(batch) * ROWS * P
        self.weights = self.weights.transpose(0, 1).contiguous()  # [B][ROWS][P]
        self.bound = torch.full((batch,), -7.0, dtype=self.real)

    def words(self, samples: Any) -> Any:
        return torch.from_numpy(samples.view(np.int32).reshape(self.B, SAMPLE.itemsize // 4))

    def run(self, kernels: Any, q: float = 0.9, least: float = 1e-3, limit: float = math.inf, **options: Any) -> Any:
        kernels.quantile(
            self.state,
            self.outputs,
            self.words(self.samples),
            self.tables,
            self.weights,
            torch.from_numpy(self.source),
            branches=K,
            route_stride=self.B * K,
            guidance_slots=self.own,
            quantile=q,
            least=least,
            limit=limit,
            bound=self.bound,
            **options,
        )
        return self.bound.double().numpy()

    def estimates(self, kernels: Any) -> Any:
        """D [B, N] as the step writes it, which has no bound and no clip here."""
        D = torch.full(self.shape, torch.nan, dtype=self.real)
        kernels.step(
            self.state.clone(),
            self.outputs,
            [torch.zeros(self.B, *self.shape[1:]) for _ in range(K)],
            [torch.zeros(self.B) for _ in range(K)],
            self.words(self.samples.copy()),
            self.tables,
            self.weights,
            torch.from_numpy(self.source),
            torch.full((ROWS * self.B * K,), -1, dtype=torch.int32),
            route_stride=self.B * K,
            guidance_slots=self.own,
            noise=torch.zeros(self.shape, dtype=self.real),
            gradient=torch.zeros(self.shape, dtype=self.real),
            denoised=D,
        )
        return D.reshape(self.B, -1).numpy()


def expected(D: Any, q: float, least: float = 1e-3, limit: float = math.inf) -> Any:
    """numpy's sorted sizes, interpolated in float64, rounded once."""
    sizes = np.sort(np.abs(D), axis=1)
    p = q * (sizes.shape[1] - 1)
    i = int(p)
    low, high = (sizes[:, min(j, sizes.shape[1] - 1)].astype(np.float64) for j in (i, i + 1))
    with np.errstate(invalid="ignore"):
        value = np.where((p == i) | (low == high), low, low + (high - low) * (p - i))
    return np.where(np.isnan(D).any(1), np.nan, np.minimum(np.maximum(value, least), limit)).astype(D.dtype)


def check(launch: Launch, kernels: Any, q: float, **limits: float) -> Any:
    D = launch.estimates(kernels)
    assert np.isfinite(D).all()
    assert len(np.unique(np.abs(D))) > launch.N // 2
    found = launch.run(kernels, q, **limits)
    assert np.array_equal(found, expected(D, q, **limits).astype(np.float64))
    return found


@pytest.mark.parametrize("state", ["float32", "float64"])
@pytest.mark.parametrize("q", [0.0, 0.5, 0.995, 1.0])
def test_quantiles(kernels: Any, q: float, state: str) -> None:
    launch = Launch(1, state=state, channels=3, inner=37, own=1, output="float16")
    found = check(launch, kernels, q)
    D = launch.estimates(kernels).astype(np.float64)  # and numpy's own, which interpolates likewise
    assert np.allclose(found, np.maximum(np.quantile(np.abs(D), q, axis=1), 1e-3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("elements", [1, 2, 3, 64, 65, 255, *map(slow, (127, 128, 256))])
@pytest.mark.parametrize("state", ["float32", slow("float64")])
def test_lengths_in_registers(kernels: Any, blocks: Any, elements: int, state: str) -> None:
    blocks(registers=True)
    for q in (0.3, 1.0):
        check(Launch(elements, inner=elements, state=state), kernels, q)


@pytest.mark.parametrize(
    ("elements", "state"),
    [(65, "float32"), (1, "float32"), (70, "float64"), slow((64, "float32")), slow((300, "float32"))],
)
def test_lengths_out_of_the_cache(kernels: Any, blocks: Any, elements: int, state: str) -> None:
    blocks(registers=False)
    check(Launch(elements, inner=elements, state=state), kernels, 0.9)


@pytest.mark.slow
@pytest.mark.parametrize("state", ["float32", "float64"])
def test_as_many_elements_as_stay_in_registers_and_one_more(kernels: Any, state: str) -> None:
    most = 12288 if state == "float32" else 6144
    for elements in (most, most + 1):
        check(Launch(3, batch=1, inner=elements, state=state), kernels, 0.995)


def test_limits(kernels: Any) -> None:
    launch = Launch(2)
    free = launch.run(kernels, 0.8).copy()
    assert 0.3 < free.min() < free.max() < 20
    middle = float(free.mean())
    assert free.min() < middle < free.max()
    assert np.array_equal(launch.run(kernels, 0.8, least=middle), np.maximum(free, np.float32(middle)))
    assert np.array_equal(launch.run(kernels, 0.8, limit=middle), np.minimum(free, np.float32(middle)))
    assert np.array_equal(launch.run(kernels, 0.8, least=1.1, limit=1.1), np.full(2, np.float32(1.1)))


def test_rows(kernels: Any) -> None:
    """The prologue and a row without D have no bound, a sample at its end keeps what it has."""
    launch = Launch(3, batch=5, rows=[1, 0, 3, ROWS, 2])
    found = launch.run(kernels, 0.7).copy()
    assert found[1] == found[2] == 0
    assert found[3] == -7
    for b, row in ((0, 1), (4, 2)):
        launch.samples["row"] = row
        assert found[b] == expected(launch.estimates(kernels), 0.7)[b]
    launch.samples["row"] = 3
    found = launch.run(kernels, 0.7, denoised=True)
    assert np.array_equal(found, expected(launch.estimates(kernels), 0.7))


def test_a_block_of_its_own(kernels: Any) -> None:
    """What the moments have just written is where the sample says, whatever its row."""
    launch, plain = Launch(4, rows=2, method=1), Launch(4, rows=2)
    check(launch, kernels, 0.9)
    assert not np.array_equal(plain.run(kernels), launch.bound.numpy())


@pytest.mark.parametrize("a_x", [0.0, 1.5])
@pytest.mark.parametrize("a_g", [0.0, -0.5])
def test_what_is_not_read_may_be_anything(kernels: Any, a_x: float, a_g: float) -> None:
    launch = Launch(5, inner=21)
    launch.tables[1, 0], launch.tables[1, 1] = a_x, a_g
    launch.weights[:, 1, 1] = 0  # the second branch
    launch.weights[:, 1, 2 * K : 2 * K + 2] = 0  # slots in G
    launch.source[:, :, 1] = -1
    if not a_x:
        launch.state[0] = torch.nan
    if not a_g:
        launch.outputs = [None, None]
    s, m = launch.state[0].double().numpy(), np.zeros(launch.shape)
    if a_g:
        w = launch.weights[:, 1, 0].double().numpy()[:, None, None]
        m = w * launch.outputs[0][launch.source[1, :, 0].tolist()].double().numpy()
    D = (a_x * s if a_x else 0) + a_g * m
    found = launch.run(kernels, 0.9)
    assert np.allclose(found, expected(D.reshape(2, -1), 0.9), rtol=1e-6, atol=0)


@pytest.mark.parametrize("registers", [True, False])
def test_not_a_number_and_infinity(kernels: Any, blocks: Any, registers: bool) -> None:
    blocks(registers)
    launch = Launch(6, batch=4, inner=60)
    clean = launch.run(kernels, 0.995).copy()
    launch.state[0, 1, 0, 3] = torch.nan
    launch.state[0, 2, 0, 59], launch.state[0, 2, 0, 5] = torch.inf, -torch.inf
    found = launch.run(kernels, 0.995)
    assert np.isnan(found[1])
    assert found[2] == np.inf  # both order statistics are
    assert np.array_equal(found[[0, 3]], clean[[0, 3]])
    assert launch.run(kernels, 0.5)[2] < 10
    launch.source[1, 3, 0] = -1  # an absent branch
    assert np.isnan(launch.run(kernels, 0.5)).tolist() == [False, True, False, True]


def test_ties(kernels: Any) -> None:
    launch = Launch(7, inner=64)
    launch.state[0], launch.tables[1, 1] = torch.as_tensor(np.repeat([1.0, -2.0, 3.0, -3.0], 16)), 0.0
    launch.tables[1, 0] = 1.0
    for q in (0.0, 0.2, 16 / 63, 0.25, 0.5, 0.9):
        sizes = np.repeat([1.0, 2.0, 3.0, 3.0], 16)
        assert np.array_equal(launch.run(kernels, q), np.full(2, np.quantile(sizes, q).astype(np.float32)))


@pytest.mark.parametrize("registers", [True, False])
def test_the_same_bits_in_any_batch(kernels: Any, blocks: Any, registers: bool) -> None:
    blocks(registers)
    launch = Launch(8, batch=3, channels=2, inner=45)
    whole = launch.run(kernels, 0.77).copy()
    for b in range(3):
        single = Launch(8, batch=1, channels=2, inner=45)
        single.state, single.weights = launch.state[:, b : b + 1].contiguous(), launch.weights[b : b + 1]
        single.outputs, single.tables = launch.outputs, launch.tables
        single.source = launch.source[:, b : b + 1].copy()
        assert single.run(kernels, 0.77)[0] == whole[b]
    launch.state[0, 0] *= 1.5  # control
    changed = launch.run(kernels, 0.77) != whole
    assert changed.tolist() == [True, False, False]


def test_nobody(kernels: Any) -> None:
    launch = Launch(batch=1)
    launch.B, launch.state, launch.samples = 0, launch.state[:, :0], launch.samples[:0]
    assert launch.run(kernels) == -7
