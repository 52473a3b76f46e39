"""Rows on a GPU, seen from Python: what is copied there, and the sampler and the operator over the simulated kernel."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from step_cases import CASES, STEP, Case
from step_cases import PLANS as OPERATOR_PLANS
from test_sampler import PLANS, SHAPES, STOCHASTIC, conditions, network

import pyguide
from pyguide import CFG, Sampler, arrays, backends, native, ops
from pyguide.device import ALIGNMENT, CudaStep, Resident
from pyguide.launch import Launch
from pyguide.layout import SAMPLE
from pyguide.run import Run


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, simulated: Any) -> Any:
    """Call it: from then on everything runs on the simulated GPU, whose memory is the host's."""

    def switch() -> None:
        monkeypatch.setattr(native, "C", simulated)
        monkeypatch.setattr(backends, "stepper", lambda backend, device: CudaStep)

    return switch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", PLANS)
def test_a_sampler_gives_the_bits_of_the_cpu(name: str, shape: tuple[int, ...], dtype: Any, on_gpu: Any) -> None:
    plan, seeds = PLANS[name], {"seeds": 5} if name in STOCHASTIC else {}
    noise = (pyguide.randn(3, shape, like=torch.empty(0)) * plan.init_scale).to(dtype)
    sampler = Sampler(network, plan, CFG([2.0, 1.0, 4.0][: shape[0]], interval=(0.2, 0.8)))
    expected = sampler(noise, **conditions(shape[0]), **seeds)
    on_gpu()
    result = sampler(noise, **conditions(shape[0]), **seeds)
    if dtype == torch.float64:  # libm's exp, log and cos on the host, the device's own there
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(result, expected)


@pytest.mark.parametrize("source", ["generator", "noises"])
def test_noise_from_outside(source: str, on_gpu: Any) -> None:
    plan = PLANS["ancestral"]
    noise = pyguide.randn(3, (3, 4, 8, 8), like=torch.empty(0))

    def drawn() -> dict[str, Any]:
        g = torch.Generator().manual_seed(5)
        zs = [torch.randn(noise.shape, generator=g) for _ in plan.stochastic_rows]
        return {"generator": torch.Generator().manual_seed(5)} if source == "generator" else {"noises": zs}

    sampler = Sampler(network, plan, CFG(3.0))
    expected = sampler(noise, **conditions(3), **drawn())
    on_gpu()
    assert torch.equal(sampler(noise, **conditions(3), **drawn()), expected)


def test_events_and_blending(on_gpu: Any) -> None:
    plan = pyguide.compile("dpmpp_2m", pyguide.schedules.scaled_linear().path(6), editable=True)
    noise = pyguide.randn(3, (2, 4, 8, 8), like=torch.empty(0))
    sampler = Sampler(network, plan, CFG(3.0))

    def events() -> list[Any]:
        return list(sampler.stream(noise, **conditions(2), blend=lambda e: e.x * e.level.sigma))

    expected = events()
    on_gpu()
    for got, want in zip(events(), expected, strict=True):
        assert torch.equal(got.x, want.x)
        assert torch.equal(got.denoised, want.denoised)


def test_nonfinite_samples_are_read_from_the_device(on_gpu: Any) -> None:
    noise = pyguide.randn(3, (3, 4, 8, 8), like=torch.empty(0))
    noise[1, 0, 0, 0] = np.inf
    on_gpu()
    sampler = Sampler(network, PLANS["ddim"], check="flag")
    sampler(noise)
    assert sampler.nonfinite is not None
    assert sampler.nonfinite.tolist() == [False, True, False]


def test_the_version_counters_move(on_gpu: Any) -> None:
    on_gpu()
    seen = []

    def model(x: Any, t: Any) -> Any:
        seen.append((x._version, t._version))
        return network(x, t)

    Sampler(model, PLANS["ddim"])(pyguide.randn(3, (1, 4, 8, 8), like=torch.empty(0)))
    assert all(a < b and c < d for (a, c), (b, d) in pairwise(seen))


def test_launches_follow_the_current_stream(on_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu()
    plan = pyguide.compile("ddim", pyguide.schedules.scaled_linear().path(6), editable=True)
    noise = torch.zeros(1, 4, 8, 8)
    run = Run(Sampler(network, plan), noise, None, None, None, None, None, None, None, events=False)
    step: Any = run.step
    outputs = run.evaluate(0, run.routes[0])
    launches = (
        lambda: step.advance(()),
        lambda: step.advance(outputs),
        step.refresh,
        lambda: step.warm_up(outputs),
        lambda: step.enqueue(outputs),
    )
    for stream, launch in enumerate(launches, start=7):
        monkeypatch.setattr(arrays, "current_stream", lambda device, stream=stream: stream)
        launch()
        assert step.step.stream == stream


# ---- the operator -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("extras", "row"), [(False, 0), (False, 1), (True, 1), (True, 2)])
@pytest.mark.parametrize("name", CASES)
def test_the_operator_equals_the_reference_in_float64(name: str, extras: bool, row: int, on_gpu: Any) -> None:
    case = Case(name, extras=extras, row=row)
    args, options = case.copy()
    on_gpu()
    before = args[3]._version
    STEP(*args, **options)
    if case.B == 0:
        return
    case.check(args, options)
    rows = args[3].numpy().view(SAMPLE)["row"].reshape(-1)
    assert rows.tolist() == np.minimum(case.samples["row"] + 1, case.samples["end"]).tolist()
    assert args[3]._version > before


def test_the_operator_reads_no_value_on_the_host(on_gpu: Any) -> None:
    """Which would wait for the device: a sample at its end runs nothing, and nobody looked."""
    case = Case("plain", extras=False)
    args, options = case.copy()
    args[3].view(torch.int32)[:, 6] = 99  # beyond the end, an error on the CPU
    with pytest.raises(ValueError, match=r"samples\[0\]"):
        STEP(*args, **options)
    on_gpu()
    state = args[0].clone()
    STEP(*args, **options)
    assert torch.equal(args[0], state)


@pytest.mark.parametrize("name", OPERATOR_PLANS)
def test_a_loop_of_operators_equals_the_sampler(name: str, on_gpu: Any) -> None:
    plan = OPERATOR_PLANS[name]
    noise = pyguide.randn(3, (2, 4, 8, 8), like=torch.empty(0))
    sampler = Sampler(lambda x, t: torch.tanh(x), plan, CFG(3.0))
    expected = sampler(noise, seeds=4)
    on_gpu()
    op = ops.operands(sampler, noise, seeds=4)
    torch.ops.pyguide.step(*op.written, [], *op.read)
    for _ in range(plan.evaluations):
        torch.ops.pyguide.step(*op.written, [torch.tanh(op.inputs[0])], *op.read)
    assert torch.equal(op.state[0], expected)
    assert op.rows.tolist() == [plan.evaluations + 1] * 2


# ---- what is copied ---------------------------------------------------------------------------------------------
def test_one_copy_fills_everything_that_a_row_reads_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    upload = arrays.upload
    monkeypatch.setattr(arrays, "upload", lambda target, values: (copies.append(values.nbytes), upload(target, values)))
    B, K, rows = 3, 2, 5
    samples = np.zeros(B, SAMPLE)
    samples["row"], samples["end"], samples["seed"] = 1, 4, 2**63 + 7
    tables, weights = np.arange(rows * 13, dtype=np.float32), np.arange(7, dtype=np.float32)
    routes = np.arange((rows + 1) * B * K, dtype=np.int32).reshape(rows + 1, B, K)
    state = torch.zeros(1, B, 4)
    launch = Launch(state, [state[0]] * K, [state[0, :, 0]] * K, tables, weights, samples, routes[:-1], routes[1:])
    resident = Resident.of(launch)
    assert len(copies) == 1
    assert resident.samples.numpy().view(SAMPLE).reshape(-1).tobytes() == samples.tobytes()
    assert resident.idle is not None
    assert not resident.idle.any()
    for got, want in ((resident.tables, tables), (resident.weights, weights)):
        assert np.array_equal(got.numpy(), want)
    assert np.array_equal(resident.source.numpy().reshape(rows, B, K), routes[:-1])
    assert np.array_equal(resident.target.numpy().reshape(rows, B, K), routes[1:])
    parts = (resident.samples, resident.idle, resident.tables, resident.weights, resident.source, resident.target)
    first = resident.samples.data_ptr()
    assert all((part.data_ptr() - first) % ALIGNMENT == 0 for part in parts)
    samples["row"] = 2  # a copy, not a view
    assert (resident.samples[:, 6] == 1).all()
