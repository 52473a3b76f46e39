"""The CUDA step kernel on a simulated GPU: the same source compiled for the host, blocks and threads as indices.

tests/simulated builds it; its "device memory" is this process's, so that poison around each operand shows what a launch
reads and writes. Expected values come from tests/oracle.py; bits are compared with the CPU kernel's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from launches import Launch, Resident, Tensor
from simulated.build import counts, reset
from test_step import (  # noqa: F401  the table of the CPU kernel, collected here too
    test_batch_position_does_not_change_bits,
    test_blocks,
    test_dense_specialisations,
    test_every_16_bit_value_is_read_exactly,
    test_identity_is_not_rewritten,
    test_int64_timesteps_round_to_nearest,
    test_lengths_and_alignments,
    test_mixed_layouts_and_split_channels,
    test_nan_passes_through_the_clip,
    test_narrowing_rounds_once_to_nearest_even,
    test_nonfinite_is_flagged,
    test_random_plans,
    test_refresh_writes_the_input_that_is_due,
    test_types,
    test_zero_coefficients_are_not_products,
)

from pyguide import native
from pyguide.layout import ABI, NONFINITE, SAMPLE, TAG_STEP, row_width

if native.C is None:
    pytest.skip(f"no native kernel: {native.reason}", allow_module_level=True)

FLOATS = "float32", "float16", "bfloat16", "float64"


class Placed(Launch):
    """A launch on the simulated GPU."""

    placed = True


@pytest.fixture
def isa(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the tests of test_step.py run on."""
    monkeypatch.setattr(Launch, "C", simulated)
    monkeypatch.setattr(Launch, "placed", True)
    return "simulated GPU"


@pytest.fixture(autouse=True)
def placed(simulated: Any) -> None:
    Placed.C = simulated
    reset(simulated, seed=1)


def everything(launch: Launch) -> bytes:
    """All that a launch may write."""
    return b"".join(a.tobytes() for a in (*(t.view for t in launch.written()), *launch.time))


# ---- values -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("state", ["float32", "float64"])
@pytest.mark.parametrize("count", range(1, 17))
def test_every_number_of_branches_and_slots(state: str, count: int) -> None:
    for seed, (branches, slots) in enumerate([(count, 1), (1, count), (count, 17 - count), (count, count)]):
        for nan in (False, True):
            Placed(seed, state=state, branches=branches, slots=(slots,), inner=40, density=0.8, nan=nan, batch=1,
                   guidance_slots=0 if slots == 16 else seed % 2).run_and_compare()  # fmt: skip


@pytest.mark.parametrize("output", FLOATS)
@pytest.mark.parametrize("inputs", FLOATS)
def test_lengths_around_a_unit_and_a_block(output: str, inputs: str) -> None:
    """Dense: whole units of 16 bytes, one more, one less; one block and several; aligned and not."""
    for seed, inner in enumerate((1, 2, 3, 4, 7, 8, 9, 15, 16, 24, 1016, 1024, 1032, 1023, 2047, 2048, 4104)):
        for offset in (0, 4, 8, 1) if inner < 1000 else (0,):
            for noise in ("none", "philox") if inner < 100 else ("philox",):
                Placed(seed, batch=1 + (inner < 100), inner=inner, output=output, inputs=inputs, offset=offset,
                       noise=noise, denoised=seed % 2 == 0).run_and_compare()  # fmt: skip


@pytest.mark.parametrize("noise", ["none", "tensor", "philox"])
@pytest.mark.parametrize("routes", [False, True])
def test_samples_at_different_rows_of_different_plans(noise: str, routes: bool) -> None:
    for seed in range(4):
        for inner in (64, 65):
            Placed(seed, batch=6, slots=(1, 3, 2), row=(0, 3, 1, 2), inner=inner, noise=noise, routes=routes,
                   branches=3, absent=True, guidance_slots=seed % 2, gradient=seed > 1, variance=seed > 1,
                   denoised=seed % 2 == 0).run_and_compare()  # fmt: skip


@pytest.mark.parametrize("routes", [False, True])
def test_a_refresh_goes_where_the_row_before_it_pointed(routes: bool) -> None:
    launch = Placed(4, batch=5, inner=64, slots=(2,), row=(1, 2, 3), routes=routes, time="int64")
    launch.samples["end"] += 1
    launch.run()
    launch.state.set(np.random.default_rng(0).normal(size=launch.state.shape))
    launch.samples[3]["row"], launch.samples[4]["end"] = 0, launch.samples[4]["row"]  # nothing is due: prologue, end
    state, samples = launch.state.memory.copy(), launch.samples.copy()
    for t, time in zip(launch.input, launch.time, strict=True):
        t.set(np.full(t.shape, 99.0))
        time[...] = -7
    launch.refresh()
    assert state.tobytes() == launch.state.memory.tobytes()
    assert samples.tobytes() == launch.samples.tobytes() == launch.resident.arrays["samples"].tobytes()
    for i in range(3):
        c_in, timestep = launch.now(i).head[4:6]
        expected = oracle.Wide(c_in) * launch.state.get((0, i))
        for k in range(2):
            x = launch.input[k].get(launch.target[i, k]).ravel()
            assert oracle.close(x, expected, abs(expected), "float32", "float32").all()
            assert launch.time[k][launch.target[i, k]] == np.floor(timestep + 0.5)
    for k in range(2):  # the two samples, and the index that nothing targets
        assert (launch.time[k] == -7).sum() == 3
        assert (launch.input[k].get() == 99).all(axis=(1, 2)).sum() == 3


@pytest.mark.parametrize("output", FLOATS)
@pytest.mark.parametrize("inputs", FLOATS)
def test_nothing_past_an_operand_is_touched(output: str, inputs: str) -> None:
    """Every operand ends at a page without access; whole units of 16 bytes at the end of it, and parts of one."""
    for state in ("float32", "float64"):
        for seed, inner in enumerate((1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 31, 64, 509)):
            Placed(seed, state=state, inner=inner, output=output, inputs=inputs, guard=True, noise="tensor",
                   gradient=True, variance=True, denoised=True, density=1.0).run_and_compare()  # fmt: skip


@pytest.mark.parametrize("type", FLOATS)
def test_normals(simulated: Any, type: str) -> None:
    for count, first in ((1, 0), (7, 0), (64, 4), (4100, 0), (129, 2), (10, 2**34 - 5)):
        z, radius = oracle.normals(first, count, 2**63 + 5, 3, TAG_STEP)
        out = Tensor((1, 1, count), type, offset=count % 5)
        simulated.cuda_normals(0, 0, out.pointer, type, count, 2**63 + 5, 3, TAG_STEP, first)
        real = "float64" if type == "float64" else "float32"
        assert oracle.close(out.get(0).ravel(), z, radius, type, real).all()
        same = Tensor((1, 1, count), type, offset=count % 5)
        native.C.normals(same.pointer, type, count, 2**63 + 5, 3, TAG_STEP, first)
        if type != "float64":  # whose logarithm and cosine are each library's own
            assert same.view.tobytes() == out.view.tobytes()
        out.view.view(np.uint8)[...] = 0xFF
        assert (out.memory.view(np.uint8) == 0xFF).all()  # nothing beside it was written


# ---- bits ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(24))
def test_the_bits_of_the_cpu_kernel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pick = lambda *options: options[rng.integers(len(options))]  # noqa: E731
    options: dict[str, Any] = {
        "batch": 3, "channels": pick(1, 3), "inner": pick(16, 67, 256), "branches": pick(1, 2, 3),
        "slots": pick((1,), (2, 1), (4,)), "guidance_slots": pick(0, 1), "output": pick(*FLOATS[:3]),
        "inputs": pick(*FLOATS[:3]), "density": pick(0.5, 1.0), "denoised": pick(True, False),
        "noise": pick("none", "tensor", "philox"), "gradient": pick(True, False), "variance": pick(True, False),
        "bound": pick(True, False), "row": pick(0, 1, (2, 1, 3)), "layout": pick("contiguous", "gap"),
        "time": pick("float32", "int64"), "routes": pick(True, False),
    }  # fmt: skip
    cpu, gpu = Launch(seed, **options), Placed(seed, **options)
    cpu.run()
    gpu.run()
    assert everything(cpu) == everything(gpu)
    assert cpu.samples.tobytes() == gpu.samples.tobytes()
    other = Placed(seed + 1, **options)  # negative control
    other.run()
    assert everything(cpu) != everything(other)


@pytest.mark.parametrize("inner", [512, 511, 8192, 8193])
def test_no_order_of_blocks_and_threads_and_no_device_changes_bits(simulated: Any, inner: int) -> None:
    def run(order: int, processors: int = 2, seed: int = 5) -> tuple[bytes, int]:
        launch = Placed(seed, batch=3, channels=2, inner=inner, output="bfloat16", inputs="bfloat16", density=1.0,
                        slots=(2, 1), noise="philox", check=True)  # fmt: skip
        reset(simulated, order, processors)
        launch.run()
        assert (launch.resident.arrays["samples"]["ticket"] == 0).all()
        assert launch.resident.arrays["samples"]["row"].tolist() == launch.samples["row"].tolist() == [3] * 3
        return everything(launch), counts(simulated)["blocks"]

    bits, blocks = run(1)
    assert all(run(order)[0] == bits for order in range(2, 8))
    grids = {processors: run(9, processors) for processors in (1, 4, 12, 200)}
    assert all(other == bits for other, _ in grids.values())
    if inner > 1000:
        assert len({blocks, *(count for _, count in grids.values())}) > 2  # blocks had different tiles
    assert run(1, seed=6)[0] != bits  # negative control


# ---- what is read and written ---------------------------------------------------------------------------------------
def bulk_bytes(launch: Launch) -> tuple[int, int]:
    """Bytes that the rows of a launch read and write, each operand once and only if its coefficients are not 0."""
    read = written = 0
    real, half = (np.dtype(oracle.STORAGE[name]).itemsize for name in launch.types[:2])
    for i in range(launch.B):
        row, M = launch.now(i), int(launch.samples[i]["slots"])
        slots, branches, more, kept = set(), set(), 0, set()
        for r in range(M):
            terms = [*row.T[r], row.d[r], row.e[r], row.n[r], row.q[r], *row.b[r]]
            if (row.T[r, r] == 1 and np.count_nonzero(terms) == 1) or (r > 0 and not np.any(terms)):
                kept.add(r)
        live = [r for r in range(M) if r not in kept]
        slots |= {c for r in live for c in range(M) if row.T[r, c]}
        branches |= {k for r in live for k in range(launch.K) if row.b[r, k]}
        wants_d, wants_u = any(row.d[live]) or launch.denoised is not None, any(row.e[live])
        if wants_d and row.head[0]:
            slots.add(0)
        if (wants_d and row.head[1]) or (wants_u and not row.separate):
            branches |= set(np.flatnonzero(row.w).tolist())
            slots |= set(np.flatnonzero(row.o).tolist())
        if wants_u and row.separate:
            branches |= set(np.flatnonzero(row.v).tolist())
        due = launch.samples[i]["row"] + 1 < launch.samples[i]["end"]
        if due and row.head[4] and 0 not in live:
            slots.add(0)
        more = (any(row.n[live]) and launch.noise is not None) + (any(row.q[live]) and launch.gradient is not None)
        read += launch.N * (real * (len(slots) + more) + half * len(branches))
        written += launch.N * (real * (len(live) + (launch.denoised is not None and wants_d)))
        written += launch.N * half * due * int((launch.target[i] >= 0).sum())
    return read, written


@pytest.mark.parametrize("seed", range(40))
def test_each_operand_is_read_once_in_16_bytes_and_only_if_its_row_reads_it(simulated: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pick = lambda *options: options[rng.integers(len(options))]  # noqa: E731
    type = pick(*FLOATS[:3])
    launch = Placed(seed, batch=3, inner=pick(64, 1024, 4160), output=type, inputs=type, branches=pick(1, 2),
                    slots=pick((1,), (2, 1), (3, 4)), density=pick(0.3, 0.6, 1.0), absent=True,
                    noise=pick("none", "tensor", "philox"), gradient=pick(True, False),
                    denoised=pick(True, False))  # fmt: skip
    read, written = bulk_bytes(launch)
    launch.run_and_compare()
    count = counts(simulated)
    assert count["launches"] == 1
    assert (16 * count["bulk_loads"], 16 * count["bulk_stores"]) == (read, written)
    assert count["bulk_copies"] == 0  # the way of what is not dense


# ---- the device's copies and the host's -----------------------------------------------------------------------------
def test_run_advances_both_copies_and_enqueue_the_device_alone() -> None:
    launch = Placed(1, batch=3, inner=64, row=(1, 2), noise="philox")
    launch.samples["end"] = launch.samples["row"] + (3, 1, 0)  # one idle
    launch.place()
    host, device = launch.samples, launch.resident.arrays["samples"]
    rows = host["row"].copy()
    launch.step.run()
    assert host["row"].tolist() == device["row"].tolist() == (rows + (1, 1, 0)).tolist()
    launch.step.enqueue()
    assert host["row"].tolist() == (rows + (1, 1, 0)).tolist()
    assert device["row"].tolist() == (rows + (2, 1, 0)).tolist()
    assert (device["ticket"] == 0).all()
    for name in ("table", "weights", "seed", "end", "slots", "method", "flags"):
        np.testing.assert_array_equal(host[name], device[name])


def test_the_kernel_reads_the_device_copies_and_the_checks_the_host_copies() -> None:
    truth, launch = Placed(2, density=1.0, inner=64), Placed(2, density=1.0, inner=64)
    truth.run()
    launch.place()
    for name in ("tables", "weights"):
        getattr(launch, name)[...] = np.where(getattr(launch, name) == 0, 0, 7)
    launch.samples["seed"] += 1
    launch.step.run()
    assert everything(launch) == everything(truth)
    launch = Placed(2, density=1.0, inner=64)
    launch.place()
    launch.source[1, 0] = -1
    with pytest.raises(ValueError, match=r"source\[1\]\[0\]: a branch with non-zero weight is absent"):
        launch.step.run()
    assert launch.resident.arrays["samples"].tobytes() == launch.samples.tobytes()


def test_enqueue_takes_the_outputs_and_looks_at_nothing_on_the_host() -> None:
    truth, launch = (Placed(3, density=1.0, inner=64, batch=1) for _ in range(2))
    truth.run()
    launch.place()
    launch.samples["row"] = -5
    launch.step.samples = launch.step.tables = launch.step.weights = 0
    launch.step.route(0, 0)
    for k, t in enumerate(launch.output):
        launch.step.set_output(k, 0, *t.strides)
    launch.step.enqueue(*(t.pointer for t in launch.output))
    assert everything(launch) == everything(truth)
    assert launch.samples["row"] == -5


@pytest.mark.parametrize("type", FLOATS)
@pytest.mark.parametrize("inner", [64, 61])
@pytest.mark.parametrize("state", ["float32", "float64"])
def test_an_absent_branch_that_a_row_reads_is_nan(state: str, inner: int, type: str) -> None:
    """Under enqueue, where no host looks at routes: neither a fault nor a zero that nobody would notice."""
    options: dict[str, Any] = {"state": state, "output": type, "inputs": type, "inner": inner, "density": 1.0}
    truth, launch = (Placed(3, check=True, denoised=True, **options) for _ in range(2))
    truth.run()
    launch.place()
    launch.resident.arrays["source"][1, 0] = -1
    launch.step.enqueue()
    targets = {id(t): k for k, t in enumerate(launch.input)}
    for t, other in zip(launch.written(), truth.written(), strict=True):
        good, bad = launch.target[:, targets[id(t)]] if id(t) in targets else (0, 1)
        good, bad = ((0, good), (0, bad)) if t is launch.state else (good, bad)
        assert np.isnan(t.get(bad).astype(float)).all()
        assert t.view[good].tobytes() == other.view[good].tobytes()
        assert np.isfinite(t.get(good).astype(float)).all()
    assert (launch.resident.arrays["samples"]["flags"] & NONFINITE).tolist() == [0, NONFINITE]


@pytest.mark.parametrize("row", [-1, 3, 4, 2**31 - 1, -(2**31)])
def test_a_sample_outside_its_rows_is_idle_on_the_device(row: int) -> None:
    launch = Placed(3, batch=2, inner=64, check=True)
    launch.place()
    device = launch.resident.arrays["samples"]
    device["row"], device["end"] = (row, 2), (3, 3)
    expected = device.copy()
    before = launch.state.view.copy(), [t.view.copy() for t in launch.input]
    launch.step.enqueue()
    expected["row"][1] = 3
    assert device.tobytes() == expected.tobytes()
    assert before[0][:, 0].tobytes() == launch.state.view[:, 0].tobytes()
    assert before[0][:, 1].tobytes() != launch.state.view[:, 1].tobytes()
    for old, t, target in zip(before[1], launch.input, launch.target.T, strict=True):
        assert old[target[0]].tobytes() == t.view[target[0]].tobytes()


def test_nonfinite_is_flagged_in_the_device_copy_alone() -> None:
    for inner, at in ((64, 63), (5, 4), (3000, 2999), (3000, 1)):
        launch = Placed(1, batch=3, inner=inner, density=1.0, check=True, row=1)
        launch.output[0].view[launch.source[1, 0], 0, at] = np.nan
        launch.place()
        launch.step.run()
        flags = launch.resident.arrays["samples"]["flags"] & NONFINITE
        assert flags.tolist() == [0, NONFINITE, 0]
        assert (launch.samples["flags"] & NONFINITE == 0).all()


# ---- errors ---------------------------------------------------------------------------------------------------------
def test_enqueue_without_a_place_is_refused() -> None:
    launch = Launch(1)
    with pytest.raises(ValueError, match=r"enqueue: place\(\) was not called"):
        launch.step.enqueue()
    with pytest.raises(ValueError, match="device: got -1, expected at least 0"):
        launch.step.place(-1, 0, 0, 0, 0, 0, 0)
    for missing, addresses in {"samples": (0, 8), "tables": (8, 0)}.items():
        with pytest.raises(ValueError, match=f"{missing}: no address"):
            launch.step.place(0, *addresses, 0, 0, 0, 0)
    launch.C.Step(0, 1, 8, 1, 1).place(0, 0, 0, 0, 0, 0, 0)  # no samples


def test_everything_that_the_cpu_step_refuses_is_refused_before_the_launch() -> None:
    launch = Placed(6, density=1.0, row=1, gradient=True)
    launch.step.set_gradient(0)
    before = everything(launch)
    with pytest.raises(ValueError, match="gradient: no address is set, and a row reads it"):
        launch.run()
    assert everything(launch) == before
    assert (launch.resident.arrays["samples"]["row"] == 1).all()
    with pytest.raises(ValueError, match="enqueue: got 3 addresses, expected 0, 1 or one for each of 2 branches"):
        launch.step.enqueue(1, 2, 3)


def test_the_stream_and_dependent_launch_are_kept(simulated: Any) -> None:
    launch = Placed(1)
    assert launch.step.stream == 0
    assert launch.step.dependent_launch is False
    launch.step.stream, launch.step.dependent_launch = 2**40 + 8, True
    assert launch.step.stream == 2**40 + 8
    assert launch.step.dependent_launch is True


def test_the_simulated_module_is_the_same_interface(simulated: Any) -> None:
    assert simulated.ABI == native.C.ABI == ABI
    assert set(dir(native.C)) <= set(dir(simulated))
    assert set(dir(native.C.Step)) == set(dir(simulated.Step))


def test_without_a_gpu_a_launch_names_what_failed() -> None:
    """The real module on this machine: why it cannot run, and an error instead of a launch."""
    reason = native.C.cuda_reason()
    if not reason:
        pytest.skip("this machine has a GPU; benchmarks/gpu.sh tests it")
    built = bool(native.C.build["cuda_archs"])
    start = r"^cuda\w+: cudaError\w+: \w" if built else "^built without CUDA: "
    launch = Launch(1, batch=1, inner=64)
    copies = Resident(samples=launch.samples, tables=launch.tables)
    launch.step.place(0, copies.pointer("samples"), copies.pointer("tables"), 0, 0, 0, 0)
    before = everything(launch)
    for call in (launch.step.run, launch.step.enqueue):
        with pytest.raises(RuntimeError, match=start):
            call()
    with pytest.raises(RuntimeError, match=start):
        native.C.cuda_normals(0, 0, launch.state.pointer, "float32", 4, 1, 0, TAG_STEP)
    assert everything(launch) == before
    assert (launch.samples["row"] == 2).all()  # a launch that failed does not count as a row
    assert SAMPLE.itemsize == 48
    assert row_width(1) == 13
