"""Whole sampling loops through the torch operators: eager, compiled, exported, against the sampler."""

from __future__ import annotations

import io
import textwrap

import pytest
import torch
from step_cases import PLANS, STEP
from torch._dynamo.testing import CompileCounterWithBackend

import pyguide
from pyguide import CFG, Sampler, ops


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
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


def start(name, batch=3, guidance=None):
    sampler = Sampler(Net(), PLANS[name], guidance or CFG(3.0))
    x = pyguide.randn(1, (batch, 4, 8, 8), like=torch.empty(0)) * sampler.plan.init_scale
    op = ops.operands(sampler, x, seeds=5)
    STEP(*op.written, [], *op.read)
    return sampler, x, op


def flat(op):
    return op.state, op.inputs[0], op.times[0], op.samples, *op.read


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("batched", [True, False])
def test_a_loop_equals_the_sampler(name, batched, on):
    sampler, x, op = start(name, guidance=CFG(2.0, batched=batched))
    for row in range(1, sampler.plan.evaluations + 1):
        assert op.rows.tolist() == [row] * 3
        STEP(*op.written, [sampler.model(a, t) for a, t in zip(op.inputs, op.times)], *op.read)
    assert torch.equal(op.state[0], sampler(x, seeds=5, cond={}, uncond={}))
    ended = op.state.clone()
    STEP(*op.written, [torch.full_like(a, torch.nan) for a in op.inputs], *op.read)  # at the end: idle
    assert torch.equal(op.state, ended)
    assert op.rows.tolist() == [row + 1] * 3


def test_a_loop_with_a_guidance_interval_equals_the_sampler(on):
    sampler = Sampler(Net(), PLANS["unipc"], CFG(3.0, interval=(0.2, 0.7)))
    x = pyguide.randn(1, (2, 4, 8, 8), like=torch.empty(0))
    op = ops.operands(sampler, x)
    with pytest.raises(ValueError, match="routes: evaluations call different branches"):
        op.read  # noqa: B018
    for row in range(sampler.plan.evaluations + 1):
        n = int(op.routes[row].max()) + 1
        outputs = [sampler.model(op.inputs[0][:n], op.times[0][:n])] if row else []
        STEP(*op.written, outputs, op.table, op.weights, op.routes[row], op.routes[row + 1])
    assert torch.equal(op.state[0], sampler(x, cond={}, uncond={}))


@pytest.mark.parametrize("name", PLANS)
def test_compiled_body_equals_eager_and_compiles_once(name, on):
    torch._dynamo.reset()
    sampler, x, op = start(name)
    counter = CompileCounterWithBackend("aot_eager")
    body = torch.compile(Body(), backend=counter, fullgraph=True)
    for _ in range(sampler.plan.evaluations):
        body(*flat(op))
    assert counter.frame_count == 1
    assert torch.equal(op.state[0], sampler(x, seeds=5, cond={}, uncond={}))
    if name != "unipc":  # nor does another plan with as many slots and rows
        _, _, other = start("ancestral" if name == "ddim" else "ddim")
        body(*flat(other))
        assert counter.frame_count == 1


def test_a_stochastic_plan_needs_seeds():
    with pytest.raises(ValueError, match=r"seeds.*got none"):
        ops.operands(Sampler(Net(), PLANS["ancestral"]), torch.zeros(1, 4, 8, 8))


def test_compile_reports_a_refusal():
    torch._dynamo.reset()
    _, _, op = start("ddim")
    counter = CompileCounterWithBackend("aot_eager")
    body = torch.compile(Body(), backend=counter, fullgraph=True)
    with pytest.raises(Exception, match=r"table: expected torch\.float32, got torch\.float64"):
        body(op.state, op.inputs[0], op.times[0], op.samples, op.table.double(), *op.read[1:])
    assert counter.frame_count == 0  # while tracing, by the fake implementation
    assert op.rows.tolist() == [1] * 3


def test_the_example_of_the_module(on):
    torch._dynamo.reset()
    sampler, noise, net = Sampler(Net(), PLANS["unipc"]), pyguide.randn(0, (2, 4, 8, 8), like=torch.empty(0)), Net()
    text = ops.__doc__.partition("every row:\n\n")[2].partition("Registered")[0]
    names = {"pyguide": pyguide, "torch": torch, "sampler": sampler, "noise": noise, "net": net}
    exec(textwrap.dedent(text).replace("fullgraph=True", "fullgraph=True, backend='aot_eager'"), names)
    assert torch.equal(names["op"].state[0], sampler(noise, cond={}))


@pytest.mark.slow
def test_inductor_equals_eager_and_writes_in_place():
    torch._dynamo.reset()
    sampler, x, op = start("unipc")
    counter = CompileCounterWithBackend("inductor")
    body = torch.compile(Body(), backend=counter, fullgraph=True)
    memory = op.state.data_ptr()
    for _ in range(sampler.plan.evaluations):
        body(*flat(op))
    assert counter.frame_count == 1
    assert op.state.data_ptr() == memory
    torch.testing.assert_close(op.state[0], sampler(x, seeds=5, cond={}, uncond={}), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["module", "decomposed", "loaded"])
def test_export_runs_back_equal(form, on):
    sampler, x, op = start("unipc")
    program = torch.export.export(Body(), flat(op), strict=False)
    if form == "decomposed":
        program = program.run_decompositions()
    if form == "loaded":
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        program = torch.export.load(file)
    assert any("pyguide" in str(node.target) or "pyguide" in str(node.args) for node in program.graph.nodes)
    body = program.module()
    for _ in range(sampler.plan.evaluations):
        last = body(*flat(op))
    want = sampler(x, seeds=5, cond={}, uncond={})
    assert torch.equal(op.state[0], want)
    assert torch.equal(last, want)


def test_export_with_a_dynamic_batch():
    sampler, x, op = start("ddim", batch=2)
    b = torch.export.Dim("b", min=2, max=64)
    two, none = {0: 2 * b}, {}
    shapes = ({1: b}, two, two, {0: b}, none, none, {0: b}, {0: b})
    program = torch.export.export(Body(), flat(op), dynamic_shapes=shapes, strict=False)
    sampler, x, op = start("ddim", batch=5)
    for _ in range(sampler.plan.evaluations):
        program.module()(*flat(op))
    assert torch.equal(op.state[0], sampler(x, seeds=5, cond={}, uncond={}))
