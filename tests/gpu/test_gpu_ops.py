"""The torch operators on CUDA tensors: against the reference, opcheck, and torch.compile(fullgraph=True) of model and
step."""

from __future__ import annotations

import pytest
import torch
from gpu_support import DEVICE, SIMULATED, real, wait
from step_cases import BF16, CASES, F16, F32, F64, I64, STEP, Case
from step_cases import PLANS as OPERATOR_PLANS
from torch._dynamo.testing import CompileCounterWithBackend

import pyguide
from pyguide import CFG, Sampler, ops
from pyguide.layout import SAMPLE


def moved(tensor):
    """A copy on the device whose memory is laid out the same, what lies around it included."""
    whole = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    return whole.to(DEVICE, copy=True).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def on_device(args, options):
    each = lambda v: [moved(x) for x in v] if isinstance(v, list) else moved(v) if torch.is_tensor(v) else v  # noqa: E731
    return [each(v) for v in args], {key: each(v) for key, v in options.items()}


def to_host(args, options):
    each = lambda v: [x.cpu() for x in v] if isinstance(v, list) else v.cpu() if torch.is_tensor(v) else v  # noqa: E731
    return [each(v) for v in args], {key: each(v) for key, v in options.items()}


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("extras", [False, True], ids=["bare", "extras"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_in_float64(name, extras, row):
    for stacked in (True, False):
        case = Case(name, extras=extras, stacked=stacked, row=row, channels_last=name == "plain")
        if extras and name in ("flat", "double"):
            case.options["noise"] = case.z
        if row == 0 and extras:
            case.args[5][0, 6:8] = 0  # the prologue has no model output, and so no variance
        args, options = on_device(*case.copy())
        STEP(*args, **options)
        wait()
        args, options = to_host(args, options)
        case.check(args, options)
        assert (args[3].numpy().view(SAMPLE).ravel()["row"] == case.samples["row"] + 1).all()


@pytest.mark.parametrize("extras", [False, True], ids=["bare", "extras"])
@pytest.mark.parametrize("name", CASES)
def test_opcheck_step(name, extras):
    for stacked in (True, False):
        args, options = on_device(*Case(name, extras=extras, stacked=stacked).copy())
        torch.library.opcheck(STEP, tuple(args), options)


@pytest.mark.parametrize("dtype", [None, F16, BF16, F64])
@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 1), (3,), (0, 4)])
def test_opcheck_randn(shape, dtype):
    seeds = torch.tensor([7, -1, 2**62][: shape[0]], dtype=I64)
    torch.library.opcheck(torch.ops.pyguide.randn.default, (seeds.to(DEVICE), list(shape)), {"dtype": dtype})
    got = torch.ops.pyguide.randn(seeds.to(DEVICE), shape, dtype=dtype)
    want = torch.ops.pyguide.randn(seeds, shape, dtype=dtype)
    assert got.dtype == (dtype or F32)
    if dtype == F64:
        torch.testing.assert_close(got.cpu(), want, rtol=1e-13, atol=1e-13)
    else:
        assert torch.equal(got.cpu(), want)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.requires_grad_(False)

    def forward(self, x, t):
        return torch.tanh(self.conv(x) + torch.sin(t.to(x.dtype))[:, None, None, None])


class Body(torch.nn.Module):
    """Everything between two rows: the model, then the step."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, state, x, t, samples, table, weights, source, target):
        torch.ops.pyguide.step(state, [x], [t], samples, [self.net(x, t)], table, weights, source, target)
        return state[0].clone()


def start(name, batch=3):
    """(the sampler's own result, operands after row 0)"""
    sampler = Sampler(Net().to(DEVICE), OPERATOR_PLANS[name], CFG(3.0))
    x = pyguide.randn(1, (batch, 4, 8, 8), like=torch.empty(0, device=DEVICE)) * sampler.plan.init_scale
    op = ops.operands(sampler, x, seeds=5)
    STEP(*op.written, [], *op.read)
    return sampler(x, seeds=5, cond={}, uncond={}), op


@pytest.mark.parametrize("name", OPERATOR_PLANS)
def test_a_loop_of_operators_equals_the_sampler(name):
    result, op = start(name)
    net = Net().to(DEVICE)
    for _ in range(OPERATOR_PLANS[name].evaluations):
        STEP(*op.written, [net(op.inputs[0], op.times[0])], *op.read)
    assert torch.equal(op.state[0], result)
    ended = op.state.clone()
    STEP(*op.written, [torch.full_like(op.inputs[0], torch.nan)], *op.read)  # at the end: idle
    assert torch.equal(op.state, ended)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=real)])
@pytest.mark.parametrize("name", OPERATOR_PLANS)
def test_model_and_step_compile_as_one_graph(name, backend):
    torch._dynamo.reset()
    result, op = start(name)
    counter, memory = CompileCounterWithBackend(backend), op.state.data_ptr()
    body = torch.compile(Body().to(DEVICE), backend=counter, fullgraph=True)
    with torch.no_grad():
        for _ in range(OPERATOR_PLANS[name].evaluations):
            body(op.state, op.inputs[0], op.times[0], op.samples, *op.read)
    assert counter.frame_count == 1
    assert op.state.data_ptr() == memory
    torch.testing.assert_close(op.state[0], result, rtol=1e-4, atol=1e-4)  # inductor's tanh and convolution


@real
def test_an_operator_can_be_captured():
    """By torch's own graphs, without the sampler: the same launch for every row."""
    result, op = start("unipc")
    net, evaluations = Net().to(DEVICE), OPERATOR_PLANS["unipc"].evaluations
    saved = [t.clone() for t in (op.state, op.inputs[0], op.times[0], op.samples)]

    def body():
        STEP(*op.written, [net(op.inputs[0], op.times[0])], *op.read)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        body()
        body()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        body()
    for now, before in zip((op.state, op.inputs[0], op.times[0], op.samples), saved):
        now.copy_(before)
    for _ in range(evaluations):
        graph.replay()
    torch.testing.assert_close(op.state[0], result, rtol=1e-5, atol=1e-5)
    assert op.rows.tolist() == [evaluations + 1] * 3


def test_refusals_name_the_argument():
    args, options = on_device(*Case("plain", extras=False).copy())
    if not SIMULATED:
        with pytest.raises(ValueError, match=r"samples: expected a tensor on cuda"):
            STEP(*args[:3], args[3].cpu(), *args[4:], **options)
    with pytest.raises(TypeError, match=r"table: expected torch\.float32, got torch\.float64"):
        STEP(*args[:5], args[5].double(), *args[6:], **options)
    with pytest.raises(ValueError, match=r"overlaps"):
        STEP(*args[:4], [args[1][0]], *args[5:], **options)
