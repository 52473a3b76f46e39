"""The native kernel against tests/oracle.py: every instruction set, types, strides, lengths, zero patterns, refusals."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import oracle
import pytest

from pyguide import native

C: Any = native.C
if C is None:
    pytest.skip(f"no native kernel: {native.reason}", allow_module_level=True)

ISAS = C.isas()
LAYOUTS = ("contiguous", "last", "slice", "gap", "reversed")
TAG_STEP = 0x70796702


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Any:
    C.set_isa(request.param)
    yield request.param
    C.set_isa(ISAS[-1])


def address(a: np.ndarray) -> int:
    return int(a.__array_interface__["data"][0])


def poison(size: int, dtype: str) -> np.ndarray:
    a = np.empty(size, oracle.STORAGE[dtype])
    a.view(np.uint8)[...] = 0xFF  # a NaN in every float type
    return a


class Tensor:
    """A strided [n, C, I] view inside NaN-poisoned memory, `offset` elements past a 64-byte boundary."""

    def __init__(self, shape: tuple[int, int, int], dtype: str, layout: str = "contiguous", offset: int = 0):
        n, channels, inner = shape
        self.dtype, self.shape = dtype, shape
        N = channels * inner
        strides = {
            "contiguous": (N, inner, 1),
            "last": (N, 1, channels),
            "slice": (2 * N, inner, 1),
            "gap": (3 * N + 5, 3 * inner, 2),
            "reversed": (N, inner, -1),
        }[layout]
        start = 64 + offset + {"slice": N, "reversed": inner - 1}.get(layout, 0)
        self.memory = poison(start + n * abs(strides[0]) + 3 * N + 64, dtype)
        itemsize = self.memory.itemsize
        start += -(address(self.memory) // itemsize) % (64 // itemsize)
        self.strides, self.pointer = strides, address(self.memory) + start * itemsize
        byte_strides = tuple(s * itemsize for s in strides)
        self.view = np.lib.stride_tricks.as_strided(self.memory[start:], shape, byte_strides)

    def set(self, values: np.ndarray) -> None:
        self.view[...] = oracle.encode(values, self.dtype).reshape(self.shape)

    def get(self, index: Any = slice(None)) -> np.ndarray:
        return oracle.decode(np.ascontiguousarray(self.view[index]), self.dtype)

    @property
    def args(self) -> tuple[int, int, int, int]:
        return (self.pointer, *self.strides)


class Launch:
    """A random launch: B samples, each at a row of its own plan, and what every buffer must hold afterwards."""

    def __init__(self, seed: int, *, batch: int = 2, channels: int = 1, inner: int = 7, branches: int = 2,
                 slots: tuple[int, ...] = (1,), guidance_slots: int = 0, state: str = "float32", output: str = "float32",
                 inputs: str = "float32", time: str = "float32", layout: str = "contiguous", offset: int = 0,
                 density: float = 0.7, denoised: bool = False, noise: str = "none", gradient: bool = False,
                 variance: bool = False, bound: bool = False, row: int = 2, absent: bool = False, check: bool = False, nan: bool = False):  # fmt: skip
        rng = np.random.default_rng(seed)
        self.rng, self.B, self.K, self.shape = rng, batch, branches, (batch, channels, inner)
        self.N, self.S, self.Sg = channels * inner, max(slots) + guidance_slots, guidance_slots
        self.types = state, output, inputs
        N, S, Sg, K = self.N, self.S, self.Sg, branches
        self.step = C.Step(batch, channels, inner, K, S, Sg, state, output, inputs, time)
        real = oracle.STORAGE[state]
        self.real = real

        def coefficients(*shape: int) -> np.ndarray:
            return (rng.normal(size=shape) * (rng.random(shape) < density)).astype(real)

        self.samples = np.zeros(batch, native.SAMPLE)
        tables, blocks, self.rows = [], [], []
        table_offset = weights_offset = 0
        width = native.weights_width(K, S, Sg)
        for i in range(batch):
            M = slots[i % len(slots)]
            rows = []
            for r in range(row + 2):
                head = rng.normal(size=8).astype(real)
                head[2:4] = (-0.5, 0.8) if rng.random() < 0.5 else (-np.inf, np.inf)
                head[4] *= rng.random() < 0.8
                head[5] = r * 7.5
                head[6:8] = rng.uniform(-14, -1, 2) if variance else 0
                off = density if r > 0 else 0
                head[0:2] *= rng.random(2) < off
                prologue = 0 if r == 0 else 1
                rows.append(oracle.Row(
                    head, coefficients(M, M), coefficients(M) * prologue, coefficients(M) * prologue,
                    coefficients(M) * (noise != "none"), coefficients(M) * gradient, coefficients(K), coefficients(K),
                    coefficients(S) * (rng.random() < 0.5), coefficients(S, K) * (rng.random() < 0.5), coefficients(Sg)))  # fmt: skip
            now = rows[row]
            if row == 0:
                now.w = now.v = now.o = now.b = now.h = None
            now.separate = bool(rng.random() < 0.5)
            if bound:
                now.bound = float(rng.choice([0, 0.75, 2]))
            self.rows.append(rows)
            s = self.samples[i]
            s["table"], s["seed"] = table_offset, rng.integers(2**64, dtype=np.uint64)
            s["row"], s["end"], s["slots"], s["flags"] = row, row + 1 + (i % 3 != 2), M, native.SEPARATE * now.separate
            s["method"], s["weights"] = i % 2, weights_offset
            for q in rows:
                tables.append(np.concatenate([q.head, q.T.ravel(), q.d, q.e, q.n, q.q]))
                table_offset += tables[-1].size
            if row == 0:
                continue
            kept = [now] if i % 2 else rows  # method 0: a block per row; else the one block
            for q in kept:
                blocks.append(np.concatenate([q.w, q.v, q.o, q.b.ravel(), q.h]))
                assert blocks[-1].size == width
                weights_offset += width
        self.tables = np.concatenate(tables).astype(real)
        self.weights = np.concatenate(blocks).astype(real) if blocks else np.zeros(1, real)
        self.bound = np.array([self.rows[b][row].bound for b in range(batch)], real) if bound else None

        self.state = Tensor((S, batch, N), state, offset=offset)
        self.state.set(rng.normal(size=(S, batch, N)))
        for i in range(batch):  # slots beyond the plan hold anything, unless the guidance reads them
            o = self.rows[i][row].o
            for c in range(int(self.samples[i]["slots"]), S - Sg):
                if o is None or o[c] == 0:
                    self.state.view[c, i] = np.nan
        order = lambda: np.stack([rng.permutation(batch + 1)[:batch] for _ in range(K)], 1).astype(np.int32)  # noqa: E731
        self.source, self.target = order(), order()
        if absent:
            self.target[rng.random(self.target.shape) < 0.4] = -1
            for i in range(batch):
                for k in range(K):
                    if not self.reads(i, k) and not (variance and k == K - 1):
                        self.source[i, k] = -1
        big = (batch + 1, channels, inner)
        self.output = [Tensor(big, output, layout, offset) for _ in range(K)]
        self.input = [Tensor(big, inputs, layout, offset) for _ in range(K)]
        self.time = [np.full(batch + 1, -7, time) for _ in range(K)]
        optional = lambda wanted, n, dtype: Tensor((n, channels, inner), dtype, layout, offset) if wanted else None  # noqa: E731
        self.gradient = optional(gradient, batch, state)
        self.noise = optional(noise == "tensor", batch, state)
        self.denoised = optional(denoised, batch, state)
        self.variance = optional(variance, batch + 1, output)
        for k in range(K):
            values = rng.normal(size=big)
            self.output[k].set(values)
            for i in range(batch):
                if self.source[i, k] >= 0 and not self.reads(i, k):
                    self.output[k].view[self.source[i, k]] = poison(1, output)[0]
        for t in (self.gradient, self.noise):
            if t is not None:
                t.set(rng.normal(size=self.shape))
        if self.variance is not None:
            self.variance.set(rng.uniform(-1, 1, size=big))
        if nan:  # in one element of operands that some sums read and others must not
            self.state.view[rng.integers(S), :, N // 2] = np.nan
            self.output[rng.integers(K)].view[:, 0, 0] = poison(1, output)[0]
            for t in (self.gradient, self.noise, self.variance):
                if t is not None:
                    t.view[:, 0, inner - 1] = poison(1, t.dtype)[0]
        self.use_philox = noise == "philox"
        self.row = row
        self.bind(check)

    def reads(self, i: int, k: int) -> bool:
        r = self.rows[i][len(self.rows[i]) - 2]
        return r.w is not None and bool(r.w[k] or r.v[k] or r.b[:, k].any())

    def bind(self, check: bool = False) -> None:
        step = self.step
        step.state, step.tables, step.weights = self.state.pointer, address(self.tables), address(self.weights)
        step.samples, step.check = address(self.samples), check
        step.bound = 0 if self.bound is None else address(self.bound)
        step.route(address(self.source), address(self.target))
        for k in range(self.K):
            step.set_output(k, *self.output[k].args)
            step.set_input(k, *self.input[k].args)
            step.set_time(k, address(self.time[k]))
        if self.gradient is not None:
            step.set_gradient(*self.gradient.args)
        if self.noise is not None:
            step.set_noise(*self.noise.args)
        if self.denoised is not None:
            step.set_denoised(*self.denoised.args)
        if self.variance is not None:
            step.set_variance(*self.variance.args, branch=self.K - 1)

    def written(self) -> list[Tensor]:
        return [self.state, *self.input, *([self.denoised] if self.denoised is not None else [])]

    def expect(self) -> list[tuple[Tensor, Any, np.ndarray, np.ndarray]]:
        """(tensor, index, values, magnitude) of everything that the launch writes."""
        expected: list[tuple[Tensor, Any, np.ndarray, np.ndarray]] = []
        state = self.state.get()
        for i in range(self.B):
            sample, row = self.samples[i], self.rows[i][self.row]
            if sample["row"] == sample["end"]:
                continue
            m = [self.output[k].get(self.source[i, k]).ravel() if self.source[i, k] >= 0 else None for k in range(self.K)]
            z, radius = (self.noise.get(i).ravel(), 0) if self.noise is not None else (None, 0)
            if self.use_philox:
                z, radius = oracle.normals(0, self.N, int(sample["seed"]), self.row, TAG_STEP)
            g = None if self.gradient is None else self.gradient.get(i).ravel()
            v = None if self.variance is None else self.variance.get(self.source[i, self.K - 1]).ravel()
            got = oracle.step(row, state[:, i], m, z, radius, g, v, self.denoised is not None)
            for r, values in got.slots.items():
                expected.append((self.state, (r, i), values, got.magnitude[r]))
            if self.denoised is not None:
                expected.append((self.denoised, i, got.denoised, got.denoised_magnitude))
            if sample["row"] + 1 < sample["end"]:
                c_in = row.head[4]
                for k in range(self.K):
                    if self.target[i, k] >= 0:
                        x = oracle.Wide(c_in) * got.x if c_in else np.zeros(self.N)
                        index = self.target[i, k]
                        expected.append((self.input[k], index, x, abs(c_in) * np.maximum(got.x_magnitude, abs(got.x))))
        return expected

    def run_and_compare(self) -> None:
        expected = self.expect()
        before = {id(t): t.memory.copy() for t in self.written()}
        rows = self.samples["row"].copy()
        active = rows < self.samples["end"]
        self.step.run()
        np.testing.assert_array_equal(self.samples["row"], rows + active)
        for tensor, index, values, magnitude in expected:
            actual = tensor.get(index).ravel()
            good = oracle.close(actual, values, magnitude, tensor.dtype, self.types[0])
            at = np.flatnonzero(~good)
            assert good.all(), (index, at[:5], actual[at][:5], values[at][:5], magnitude[at][:5])
        for tensor in self.written():  # nothing else changed: put the old values back where a write was due
            for other, index, _, _ in expected:
                if other is tensor:
                    old = before[id(tensor)]
                    shift = address(old) - address(tensor.memory)
                    start = (tensor.view.__array_interface__["data"][0] - address(tensor.memory)) // old.itemsize
                    view = np.lib.stride_tricks.as_strided(old[start:], tensor.view.shape, tensor.view.strides)
                    assert shift
                    view[index] = tensor.view[index]
            assert before[id(tensor)].tobytes() == tensor.memory.tobytes()


@pytest.mark.parametrize("state", ["float32", "float64"])
@pytest.mark.parametrize("output", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("inputs", ["float32", "float16", "bfloat16", "float64"])
def test_types(isa: str, state: str, output: str, inputs: str) -> None:
    for seed in range(4):
        Launch(seed, state=state, output=output, inputs=inputs, inner=67, channels=3, batch=3, slots=(2, 3),
               branches=1 + seed % 3).run_and_compare()  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lengths_and_alignments(isa: str, layout: str) -> None:
    for inner in range(1, 68):
        types = ("float32", "float16", "bfloat16")
        Launch(inner, inner=inner, channels=1 + inner % 3, batch=1, layout=layout, offset=inner % 17, slots=(1 + inner % 3,),
               output=types[inner % 3], inputs=types[inner // 3 % 3], denoised=inner % 2 == 0).run_and_compare()  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks(isa: str, layout: str) -> None:
    for seed, (channels, inner) in enumerate([(4, 300), (1, 1537), (1300, 1), (3, 1024), (2, 512)]):
        for output in ("float32", "bfloat16"):
            Launch(seed, channels=channels, inner=inner, output=output, layout=layout, slots=(2,)).run_and_compare()


@pytest.mark.parametrize("seed", range(60))
def test_random_plans(isa: str, seed: int) -> None:
    """Every optional operand, mixed plans and slot counts, absent branches, prologues and idle samples."""
    rng = np.random.default_rng(1000 + seed)
    pick = lambda *options: options[rng.integers(len(options))]  # noqa: E731
    slots = pick((1,), (2,), (3,), (1, 3, 2), (4, 1), (8, 5))
    launch = Launch(
        seed, batch=4, channels=pick(1, 2, 4), inner=pick(5, 33, 80), branches=pick(1, 2, 2, 3, 8), slots=slots,
        guidance_slots=pick(0, 0, 1, 2), state=pick("float32", "float32", "float64"), output=pick("float32", "float16", "bfloat16"),
        inputs=pick("float32", "float16", "bfloat16"), time=pick("float32", "int64", "float64"), layout=pick(*LAYOUTS),
        density=pick(0.2, 0.5, 1.0), denoised=pick(True, False), noise=pick("none", "tensor", "philox"), gradient=pick(True, False),
        variance=pick(True, False), bound=pick(True, False), row=pick(0, 1, 2, 3), absent=pick(True, False),
        nan=pick(True, False),
    )  # fmt: skip
    idle = int(rng.integers(4))
    launch.samples[idle]["end"] = launch.samples[idle]["row"]
    launch.run_and_compare()


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("branches", [1, 2, 3, 8])
def test_dense_specialisations(isa: str, branches: int, slots: int) -> None:
    for state in ("float32", "float64"):
        Launch(5, branches=branches, slots=(slots,), inner=200, density=1.0, state=state).run_and_compare()


@pytest.mark.parametrize("seed", range(12))
def test_zero_coefficients_are_not_products(isa: str, seed: int) -> None:
    for slots, branches in ((1, 1), (2, 2), (3, 2), (4, 3)):
        Launch(seed, slots=(slots,), branches=branches, inner=150, density=0.5, nan=True, denoised=seed % 2 == 0,
               guidance_slots=int(seed % 3 == 0)).run_and_compare()  # fmt: skip


def test_identity_is_not_rewritten(isa: str) -> None:
    """T_rr = 1 alone (h = 1 for a guidance slot) leaves the slot: -0 stays, and nothing written is nothing to check."""
    launch = Launch(0, batch=1, inner=70, branches=1, slots=(2,), guidance_slots=1, row=1, check=True)
    launch.tables.reshape(3, -1)[1] = [1, 1, -np.inf, np.inf, 0.5, 7, 0, 0, 1, 0, 0, 1, *[0] * 8]
    launch.weights[...] = 0
    launch.weights.reshape(3, -1)[1, -1] = 1
    launch.state.view[...] = -0.0
    launch.state.view[0, 0, 5] = np.inf
    launch.bind(check=True)
    before = launch.state.memory.copy()
    launch.step.run()
    assert before.tobytes() == launch.state.memory.tobytes()
    assert launch.samples["flags"][0] & native.NONFINITE == 0
    x = launch.input[0].get(launch.target[0, 0]).ravel()
    assert x[5] == np.inf
    assert np.signbit(x).sum() == 69
    launch.tables.reshape(3, -1)[0:, 8] = 2  # negative control: 2 s_0 is written
    launch.samples["row"] = 1
    launch.step.run()
    assert launch.samples["flags"][0] & native.NONFINITE


def test_int64_timesteps_round_to_nearest(isa: str) -> None:
    launch = Launch(3, time="int64", row=1)
    launch.step.run()
    for i in range(launch.B):
        for k in range(launch.K):
            assert launch.time[k][launch.target[i, k]] == 8  # 7.5 away from zero
    assert sum((t == -7).sum() for t in launch.time) == launch.K  # and the index that nothing targets


def result_bytes(launch: Launch) -> bytes:
    launch.step.run()
    return b"".join(t.memory.tobytes() for t in launch.written())


def test_threads_do_not_change_bits(isa: str) -> None:
    def run(threads: int, seed: int = 0) -> bytes:
        launch = Launch(seed, batch=3, channels=4, inner=700, slots=(2, 3), noise="philox", density=1.0)
        launch.step.threads = threads
        return result_bytes(launch)

    assert run(1) == run(2) == run(5)
    assert run(1) != run(1, seed=1)  # negative control


def test_batch_position_does_not_change_bits(isa: str) -> None:
    """A sample alone, at another index, behind another alignment: the same bits; another seed: others."""
    N = 333

    def run(batch: int, at: int, offset: int, seed: int = 9) -> bytes:
        launch = Launch(0, batch=batch, inner=N, noise="philox", density=1.0, offset=offset, row=1, slots=(1,))
        only = Launch(0, batch=1, inner=N, noise="philox", density=1.0, row=1, slots=(1,))
        width = native.row_width(1)
        launch.samples[at] = only.samples[0]
        launch.samples[at]["seed"] = seed
        launch.samples[at]["method"] = 1
        launch.tables = np.concatenate([launch.tables, only.tables])
        launch.weights = np.concatenate([launch.weights, only.weights])
        launch.samples[at]["table"] = launch.tables.size - only.tables.size
        launch.samples[at]["weights"] = launch.weights.size - native.weights_width(2, 1, 0)
        assert only.tables.size == 3 * width
        launch.state.view[0, at] = only.state.view[0, 0]
        for k in range(2):
            launch.output[k].view[launch.source[at, k]] = only.output[k].view[only.source[0, k]]
        launch.bind()
        launch.step.run()
        return launch.state.view[0, at].tobytes() + launch.input[0].view[launch.target[at, 0]].tobytes()

    reference = run(1, 0, 0)
    assert reference == run(4, 3, 0) == run(4, 1, 5)
    assert reference != run(1, 0, 0, seed=10)  # negative control


def test_nonfinite_is_flagged(isa: str) -> None:
    for inner in (5, 64, 2000):
        for value in (np.nan, np.inf):
            launch = Launch(1, batch=3, inner=inner, density=1.0, check=True, row=1)
            launch.output[0].view[launch.source[1, 0], 0, inner - 1] = value
            launch.step.run()
            assert [bool(f & native.NONFINITE) for f in launch.samples["flags"]] == [False, True, False]
    launch = Launch(1, batch=3, density=1.0, check=False, row=1)  # negative control
    launch.output[0].view[...] = np.nan
    launch.step.run()
    assert not (launch.samples["flags"] & native.NONFINITE).any()


def test_nan_passes_through_the_clip(isa: str) -> None:
    for bound in (False, True):
        launch = Launch(2, batch=1, inner=40, density=1.0, row=1, denoised=True, bound=bound)
        launch.tables.reshape(3, -1)[1, 2:4] = -0.5, 0.5
        launch.output[1].view[launch.source[0, 1], 0, 7] = np.nan
        launch.step.run()
        assert np.flatnonzero(np.isnan(launch.denoised.get(0).ravel())).tolist() == [7]


def test_refresh_writes_the_input_that_is_due(isa: str) -> None:
    launch = Launch(4, batch=3, inner=70, inputs="bfloat16", slots=(2,), row=1)
    launch.samples["end"] = 3, 2, 3
    launch.step.run()
    launch.state.set(np.random.default_rng(0).normal(size=launch.state.shape))
    before = launch.state.memory.copy()
    samples = launch.samples.copy()
    for t in launch.input:
        t.set(np.full(t.shape, 99.0))
    for time in launch.time:
        time[...] = -7
    launch.step.refresh()
    np.testing.assert_array_equal(launch.samples, samples)
    assert before.tobytes() == launch.state.memory.tobytes()
    for i in range(3):
        c_in, timestep = launch.rows[i][1].head[4], launch.rows[i][1].head[5]
        for k in range(2):
            index = launch.target[i, k]
            x = launch.input[k].get(index).ravel()
            if i == 1:  # at its end: no evaluation is due
                assert (x == 99).all()
                assert launch.time[k][index] == -7
            else:
                expected = oracle.Wide(c_in) * launch.state.get((0, i))
                assert oracle.close(x, expected, abs(expected), "bfloat16", "float32").all()
                assert launch.time[k][index] == timestep


@pytest.mark.parametrize("name", ["output", "state", "input", "noise", "gradient", "variance", "tables", "weights", "samples"])
def test_missing_address_is_refused_before_anything_is_written(name: str) -> None:
    launch = Launch(6, density=1.0, noise="tensor", gradient=True, variance=True, row=1)
    step = launch.step
    if name in ("output", "input"):
        getattr(step, f"set_{name}")(1, 0, *launch.output[1].strides)
    elif name == "noise":  # no address means Philox: the only one that is not an error
        step.set_noise(0)
    elif name in ("gradient", "variance"):
        getattr(step, f"set_{name}")(0)
    else:
        setattr(step, name, 0)
    before = launch.state.memory.copy()
    if name == "noise":
        step.run()
        return
    with pytest.raises(ValueError, match=name):
        step.run()
    assert before.tobytes() == launch.state.memory.tobytes()
    assert (launch.samples["row"] == 1).all()


def test_absent_branch_with_weight_is_refused() -> None:
    launch = Launch(6, density=1.0, row=1)
    launch.source[1, 0] = -1
    with pytest.raises(ValueError, match=r"source\[1\]\[0\]"):
        launch.step.run()


def test_overlap_is_refused_and_neighbours_are_not() -> None:
    def launch() -> Launch:
        return Launch(7, density=1.0, noise="tensor", gradient=True, denoised=True, row=1)

    cases = {
        r"input\[0\] overlaps output\[1\]": lambda a: a.step.set_input(0, *a.output[1].args),
        r"input\[1\] overlaps state": lambda a: a.step.set_input(1, a.state.pointer + 4, *a.input[1].strides),
        r"input\[0\] overlaps noise": lambda a: a.step.set_input(0, *a.noise.args),
        r"input\[0\] overlaps gradient": lambda a: a.step.set_gradient(*a.input[0].args),
        r"input\[0\] overlaps denoised": lambda a: a.step.set_denoised(*a.input[0].args),
        r"denoised overlaps state": lambda a: a.step.set_denoised(a.state.pointer, *a.denoised.strides),
        r"state overlaps noise": lambda a: a.step.set_noise(a.state.pointer, *a.noise.strides),
    }
    for message, change in cases.items():
        a = launch()
        change(a)
        before = a.state.memory.copy()
        with pytest.raises(ValueError, match=message):
            a.step.run()
        assert before.tobytes() == a.state.memory.tobytes()
    a = launch()  # inputs may share memory, and so may outputs
    a.step.set_output(0, *a.output[1].args)
    a.step.run()
    b = Launch(8, batch=1, inner=16, branches=1, row=1)
    b.source[...], b.target[...] = 0, 0
    memory = np.zeros(48, np.float32)  # state, output and input back to back
    p = address(memory)
    b.step.state = p
    b.step.set_output(0, p + 64, 16, 16, 1)
    b.step.set_input(0, p + 128, 16, 16, 1)
    b.step.run()


def test_run_arguments() -> None:
    launch = Launch(7, row=1)
    with pytest.raises(ValueError, match="3 addresses"):
        launch.step.run(1, 2, 3)
    with pytest.raises(TypeError):
        launch.step.run("x")
    twin, other = Launch(7, row=1), Launch(7, row=1)
    launch.step.run()
    twin.step.set_output(0, 0, *twin.output[0].strides)
    twin.step.run(twin.output[0].pointer, twin.output[1].pointer)
    np.testing.assert_array_equal(launch.state.view, twin.state.view)
    other.step.run(other.output[0].pointer)
    assert other.state.view.tobytes() != twin.state.view.tobytes()
    for row, end, slots in ((3, 2, 1), (-1, 2, 1), (1, 2, 2), (1, 2, 0)):
        launch.samples["row"], launch.samples["end"], launch.samples["slots"] = row, end, slots
        with pytest.raises(ValueError, match=r"samples\[0\]"):
            launch.step.run()


def test_sizes_and_types_are_checked() -> None:
    good = {"batch": 1, "channels": 1, "inner": 1, "branches": 1, "slots": 1, "guidance_slots": 0}
    bad = {"batch": -1, "channels": 0, "inner": 0, "branches": 17, "slots": 0, "guidance_slots": 1, "state_type": "float16",
           "output_type": "int64", "input_type": "double", "time_type": "float16"}  # fmt: skip
    C.Step(**good)
    for name, value in bad.items():
        with pytest.raises(ValueError, match=name):
            C.Step(**{**good, name: value})
    with pytest.raises(ValueError, match="branch"):
        C.Step(**good).set_output(1, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="baseline|neon"):
        C.set_isa("sse9")
    C.Step(**{**good, "batch": 0}).run()  # an empty batch needs nothing


def test_layout_constants_match() -> None:
    assert native.SAMPLE.itemsize == 48
    assert native.row_width(3) == 8 + 9 + 12
    assert native.weights_width(2, 3, 1) == 2 * 2 + 3 + 3 * 2 + 1
    assert C.ABI == native.ABI


def test_nothing_past_an_operand_is_touched(isa: str) -> None:
    """Operands flush against a page without access: a read past the end would end the process."""
    page = mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)

    def guarded(n: int, dtype: Any) -> np.ndarray:
        area = mmap.mmap(-1, 2 * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(area))
        assert libc.mprotect(ctypes.c_void_p(base + page), ctypes.c_size_t(page), 0) == 0
        keep.append(area)
        a = np.frombuffer(area, dtype, n, page - n * np.dtype(dtype).itemsize)
        a[...] = 1
        return a

    keep: list[Any] = []
    for n in (1, 3, 15, 16, 17, 63, 64, 65, 67, 511, 513, 600):
        for dtype in ("float32", "float16"):
            step = C.Step(1, 1, n, 2, 1, 0, "float32", dtype, dtype)
            arrays = [guarded(n, np.float32), *(guarded(n, dtype) for _ in range(4))]
            table = np.array([1, -1, -1, 1, 1, 0, 0, 0, 0.5, 0.5, 0, 0, 0] * 3, np.float32)
            weights = np.array([-1, 2, 0, 0, 0, 0, 0] * 3, np.float32)
            samples, route = np.zeros(1, native.SAMPLE), np.zeros(2, np.int32)
            samples["row"], samples["end"], samples["slots"] = 1, 3, 1
            step.state, step.tables, step.weights, step.samples = map(address, (arrays[0], table, weights, samples))
            step.route(address(route), address(route))
            for k in range(2):
                step.set_output(k, address(arrays[1 + k]), n, n, 1)
                step.set_input(k, address(arrays[3 + k]), n, n, 1)
            step.run()
            assert (arrays[0] == 0.5).all()
            assert (arrays[3] == 0.5).all()
            assert (arrays[4] == 0.5).all()
    C.set_isa(isa)
