"""The native kernel against tests/oracle.py: instruction sets, types, strides, lengths, zero patterns."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import oracle
import pytest
from launches import Launch, Tensor, address

from pyguide import native
from pyguide.layout import ABI, NONFINITE, SAMPLE, row_width, weights_width

C: Any = native.C
if C is None:
    pytest.skip(f"no native kernel: {native.reason}", allow_module_level=True)

ISAS = C.isas()
LAYOUTS = ("contiguous", "last", "slice", "gap", "reversed")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Any:
    C.set_isa(request.param)
    yield request.param
    C.set_isa(ISAS[-1])


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
        output, inputs = types[inner % 3], types[inner // 3 % 3]
        Launch(inner, inner=inner, channels=1 + inner % 3, batch=1, layout=layout, offset=inner % 17, output=output,
               slots=(1 + inner % 3,), inputs=inputs, denoised=inner % 2 == 0).run_and_compare()  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks(isa: str, layout: str) -> None:
    for seed, (channels, inner) in enumerate([(4, 300), (1, 1537), (1300, 1), (3, 1024), (2, 512), (5, 297)]):
        for output in ("float32", "bfloat16"):
            for noise in ("none", "philox"):
                Launch(seed, channels=channels, inner=inner, output=output, layout=layout, slots=(2,),
                       noise=noise).run_and_compare()  # fmt: skip


@pytest.mark.parametrize("seed", range(60))
def test_random_plans(isa: str, seed: int) -> None:
    """Every optional operand, mixed plans and slot counts, absent branches, prologues and idle samples."""
    rng = np.random.default_rng(1000 + seed)
    pick = lambda *options: options[rng.integers(len(options))]  # noqa: E731
    slots = pick((1,), (2,), (3,), (1, 3, 2), (4, 1), (8, 5))
    half = "float16", "bfloat16"
    launch = Launch(
        seed, batch=4, channels=pick(1, 2, 4), inner=pick(5, 33, 80), branches=pick(1, 2, 2, 3, 8), slots=slots,
        guidance_slots=pick(0, 0, 1, 2), state=pick("float32", "float32", "float64"), output=pick("float32", *half),
        inputs=pick("float32", *half), time=pick("float32", "int64", "float64"), layout=pick(*LAYOUTS),
        density=pick(0.2, 0.5, 1.0), denoised=pick(True, False), noise=pick("none", "tensor", "philox"),
        gradient=pick(True, False), variance=pick(True, False), bound=pick(True, False),
        row=pick(0, 1, 2, 3, (2, 1, 3)), absent=pick(True, False), nan=pick(True, False), routes=pick(True, False),
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


@pytest.mark.parametrize("threads", [1, 3])
def test_mixed_layouts_and_split_channels(isa: str, threads: int) -> None:
    """Only one operand strided; ranges of threads that begin and end inside a channel."""
    for channels, inner in ((7, 700), (20, 300), (1, 1700)):
        for layout in ("contiguous", "last", "gap"):
            launch = Launch(1, channels=channels, inner=inner, layout=layout, gradient=True, noise="tensor")
            other = "gap" if layout == "contiguous" else "contiguous"
            launch.denoised = Tensor(launch.shape, "float32", other)
            launch.step.threads = threads
            launch.bind()
            launch.run_and_compare()


def convert(values: np.ndarray, state: str, inputs: str) -> np.ndarray:
    """s_0 as the model reads it: c_in = 1, nothing else."""
    launch = Launch(0, batch=1, inner=values.size, branches=1, slots=(1,), state=state, inputs=inputs, row=0)
    launch.tables.reshape(2, -1)[0] = [0, 0, -np.inf, np.inf, 1, 0, 0, 0, 1, 0, 0, 0, 0]
    launch.state.view[0, 0] = values
    launch.run()
    return np.array(launch.input[0].view[launch.target[0, 0], 0])


@pytest.mark.parametrize("state", ["float32", "float64"])
def test_narrowing_rounds_once_to_nearest_even(isa: str, state: str) -> None:
    real = np.dtype(state).type
    for inputs, bits in (("float16", np.arange(0x7C00)), ("bfloat16", np.arange(0x7F80))):
        value = oracle.decode(bits.astype(np.uint16).view(oracle.STORAGE[inputs]), inputs).astype(np.float64)
        middle = (value[:-1] + value[1:]) / 2  # exact; ties go to the even one
        below, above = bits[:-1], bits[1:]
        even = np.where(below % 2 == 0, below, above)
        up, down = np.nextafter(middle.astype(real), real(np.inf)), np.nextafter(middle.astype(real), real(0))
        for x, expected in ((value, bits), (middle, even), (up, above), (down, below)):
            for sign in (1, -1):
                got = convert((sign * x).astype(real), state, inputs).view(np.uint16)
                np.testing.assert_array_equal(got, expected + (0x8000 if sign < 0 else 0))
        top = value[-1]
        half = (value[-1] - value[-2]) / 2
        got = convert(
            np.array([top + half, np.nextafter(real(top + half), real(0)), np.inf, np.nan, -np.nan], real),
            state,
            inputs,
        )
        infinity = bits[-1] + 1
        assert got.view(np.uint16)[:3].tolist() == [infinity, infinity - 1, infinity]
        assert ((got.view(np.uint16)[3:] & 0x7FFF) > infinity).all()


def test_every_16_bit_value_is_read_exactly(isa: str) -> None:
    for output in ("float16", "bfloat16"):
        for inputs in (output, "float32"):  # straight and through the staging block
            launch = Launch(0, batch=1, inner=1 << 16, branches=1, slots=(1,), output=output, inputs=inputs, row=1)
            launch.tables.reshape(3, -1)[1] = [0, 1, -np.inf, np.inf, 0, 0, 0, 0, 0, 1, 0, 0, 0]
            launch.weights.reshape(3, -1)[1] = [1, 0, 0, 0]
            launch.output[0].view[launch.source[0, 0], 0] = (
                np.arange(1 << 16).astype(np.uint16).view(oracle.STORAGE[output])
            )
            launch.run()
            expected = launch.output[0].get(launch.source[0, 0]).ravel()
            got = launch.state.get((0, 0))
            assert np.array_equal(got, expected, equal_nan=True)


def test_identity_is_not_rewritten(isa: str) -> None:
    """T_rr = 1 alone (h = 1 for a guidance slot) leaves the slot: -0 stays, and nothing written is nothing to check."""
    launch = Launch(0, batch=1, inner=70, branches=1, slots=(2,), guidance_slots=1, row=1, check=True)
    launch.tables.reshape(3, -1)[1] = [1, 1, -np.inf, np.inf, 0.5, 7, 0, 0, 1, 0, 0, 1, *[0] * 8]
    launch.weights[...] = 0
    launch.weights.reshape(3, -1)[1, -1] = 1
    launch.state.view[...] = -0.0
    launch.state.view[0, 0, 5:7] = np.inf, 3
    launch.bind(check=True)
    before = launch.state.memory.copy()
    launch.run()
    assert before.tobytes() == launch.state.memory.tobytes()
    assert launch.samples["flags"][0] & NONFINITE == 0
    x = launch.input[0].get(launch.target[0, 0]).ravel()
    assert x[5:7].tolist() == [np.inf, 1.5]  # c_in s_0
    assert np.signbit(x).sum() == 68
    launch.tables.reshape(3, -1)[0:, 8] = 2  # negative control: 2 s_0 is written
    launch.samples["row"] = 1
    launch.run()
    assert launch.samples["flags"][0] & NONFINITE


def test_int64_timesteps_round_to_nearest(isa: str) -> None:
    launch = Launch(3, time="int64", row=1)
    launch.run()
    for i in range(launch.B):
        for k in range(launch.K):
            assert launch.time[k][launch.target[i, k]] == 8  # 7.5 away from zero
    assert sum((t == -7).sum() for t in launch.time) == launch.K  # and the index that nothing targets


def result_bytes(launch: Launch) -> bytes:
    launch.run()
    return b"".join(t.view.tobytes() for t in launch.written())


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
        width = row_width(1)
        launch.samples[at] = only.samples[0]
        launch.samples[at]["seed"] = seed
        launch.samples[at]["method"] = 1
        launch.tables = np.concatenate([launch.tables, only.tables])
        launch.weights = np.concatenate([launch.weights, only.weights])
        launch.samples[at]["table"] = launch.tables.size - only.tables.size
        launch.samples[at]["weights"] = launch.weights.size - weights_width(2, 1, 0)
        assert only.tables.size == 3 * width
        launch.state.view[0, at] = only.state.view[0, 0]
        for k in range(2):
            launch.output[k].view[launch.source[at, k]] = only.output[k].view[only.source[0, k]]
        launch.bind()
        launch.run()
        return launch.state.view[0, at].tobytes() + launch.input[0].view[launch.target[at, 0]].tobytes()

    reference = run(1, 0, 0)
    assert reference == run(4, 3, 0) == run(4, 1, 5)
    assert reference != run(1, 0, 0, seed=10)  # negative control


def test_nonfinite_is_flagged(isa: str) -> None:
    for inner in (5, 64, 2000):
        for value in (np.nan, np.inf):
            launch = Launch(1, batch=3, inner=inner, density=1.0, check=True, row=1)
            launch.output[0].view[launch.source[1, 0], 0, inner - 1] = value
            launch.run()
            assert [bool(f & NONFINITE) for f in launch.samples["flags"]] == [False, True, False]
    launch = Launch(1, batch=3, density=1.0, check=False, row=1)  # negative control
    launch.output[0].view[...] = np.nan
    launch.run()
    assert not (launch.samples["flags"] & NONFINITE).any()


def test_nan_passes_through_the_clip(isa: str) -> None:
    for bound in (False, True):
        launch = Launch(2, batch=1, inner=40, density=1.0, row=1, denoised=True, bound=bound)
        launch.tables.reshape(3, -1)[1, 2:4] = -0.5, 0.5
        launch.output[1].view[launch.source[0, 1], 0, 7] = np.nan
        launch.run()
        assert np.flatnonzero(np.isnan(launch.denoised.get(0).ravel())).tolist() == [7]


def test_refresh_writes_the_input_that_is_due(isa: str) -> None:
    launch = Launch(4, batch=3, inner=70, inputs="bfloat16", slots=(2,), row=1)
    launch.samples["end"] = 3, 2, 3
    launch.run()
    launch.state.set(np.random.default_rng(0).normal(size=launch.state.shape))
    before = launch.state.memory.copy()
    samples = launch.samples.copy()
    for t in launch.input:
        t.set(np.full(t.shape, 99.0))
    for time in launch.time:
        time[...] = -7
    launch.refresh()
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


def test_layout_constants_match() -> None:
    assert SAMPLE.itemsize == 48
    assert row_width(3) == 8 + 9 + 12
    assert weights_width(2, 3, 1) == 2 * 2 + 3 + 3 * 2 + 1
    assert C.ABI == ABI


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
            samples, route = np.zeros(1, SAMPLE), np.zeros(2, np.int32)
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
