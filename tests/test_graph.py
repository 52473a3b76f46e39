"""The captured loop: one recording per set of branches, one replay per evaluation, and nothing stale in any of them."""

from __future__ import annotations

import copy
import gc
import linecache
import weakref

import numpy as np
import pytest
import recorded
import torch
from test_sampler import PLANS, SHAPES, STOCHASTIC, VP, Counting, conditions, network

import pyguide
from pyguide import CFG, Sampler, buffers, graph


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, simulated) -> recorded.Recorder:
    return recorded.install(monkeypatch, simulated)


def noise_for(plan: pyguide.Plan, shape=(3, 4, 8, 8), seed: int = 3) -> torch.Tensor:
    return pyguide.randn(seed, shape, like=torch.empty(0)) * plan.init_scale


def seeds_of(name: str, seed: int = 11) -> dict:
    return {"seeds": seed} if name in STOCHASTIC else {}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", PLANS)
def test_equals_the_eager_loop_bit_for_bit(name, shape, recorder):
    plan = PLANS[name]
    noise, conds, seeds = noise_for(plan, shape), conditions(shape[0]), seeds_of(name)
    eager = Sampler(network, plan, CFG(3.0))(noise, **conds, **seeds)
    captured = Sampler(network, plan, CFG(3.0), cuda_graph=True)
    for run in (1, 2):
        assert torch.equal(captured(noise, **conds, **seeds), eager), run
    assert (recorder.recorded, recorder.replayed) == (1, 2 * plan.evaluations)


def test_the_tape_asks_python_only_once(recorder):
    """The stand-in itself: what a model's Python does at later calls must not reach a replay."""
    model, plan = Counting(), PLANS["dpmpp_2m"]
    sampler, noise = Sampler(model, plan, CFG(3.0), cuda_graph=True), noise_for(plan)
    sampler(noise, **conditions(3))
    calls = graph.WARM_UPS + 1
    assert model.rows == [6] * calls
    sampler(noise, **conditions(3))
    assert len(model.rows) == calls

    drift = iter(range(100))
    changing = Sampler(lambda x, t: x * (0.1 + 0.1 * next(drift)), plan, cuda_graph=True)
    baked = Sampler(lambda x, t: x * (0.1 + 0.1 * graph.WARM_UPS), plan)
    assert torch.equal(changing(noise), baked(noise))


@pytest.mark.parametrize("batched", [True, False])
def test_a_graph_for_each_number_of_branches(batched, recorder):
    plan, conds = PLANS["dpmpp_2m"], conditions(3)
    guidance = CFG(4.0, interval=(0.25, 0.75), batched=batched)
    sampler, noise = Sampler(network, plan, guidance, cuda_graph=True), noise_for(plan)
    for run in (1, 2):
        assert torch.equal(sampler(noise, **conds), Sampler(network, plan, guidance)(noise, **conds)), run
    assert recorder.recorded == 2
    assert "cuda_graph=2 recorded, 2.0 MiB" in repr(sampler)


def test_later_runs_bring_their_own_noise_seeds_and_conditions(recorder):
    plan = PLANS["ancestral"]
    captured, eager = Sampler(network, plan, CFG(3.0), cuda_graph=True), Sampler(network, plan, CFG(3.0))
    results = []
    for seed in (1, 2, 1):
        noise, conds = noise_for(plan, seed=seed), conditions(3)
        conds["cond"]["y"] = conds["cond"]["y"] * seed
        results.append(captured(noise, **conds, seeds=seed))
        assert torch.equal(results[-1], eager(noise, **conds, seeds=seed))
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])
    assert recorder.recorded == 1


def test_a_scale_that_changes_from_run_to_run(recorder):
    scale = [2.0]
    guidance, plan, conds = CFG(lambda step, steps: scale[0] + step / steps), PLANS["unipc"], conditions(3)
    captured, noise = Sampler(network, plan, guidance, cuda_graph=True), noise_for(plan)
    for scale[0] in (2.0, 5.0):
        assert torch.equal(captured(noise, **conds), Sampler(network, plan, guidance)(noise, **conds))
    assert recorder.recorded == 1


@pytest.mark.parametrize("source", ["generator", "noises"])
def test_noise_from_outside(source, recorder):
    plan, conds = PLANS["ancestral"], conditions(3)
    noise = noise_for(plan)

    def drawn() -> dict:
        g = torch.Generator().manual_seed(5)
        if source == "generator":
            return {"generator": g}
        return {"noises": [torch.randn(noise.shape, generator=g) for _ in plan.stochastic_rows]}

    captured = Sampler(network, plan, CFG(3.0), cuda_graph=True)
    assert torch.equal(captured(noise, **conds, **drawn()), Sampler(network, plan, CFG(3.0))(noise, **conds, **drawn()))
    assert torch.equal(captured(noise, **conds, seeds=4), Sampler(network, plan, CFG(3.0))(noise, **conds, seeds=4))
    assert recorder.recorded == 2  # with a noise tensor, and without


def test_stream_callback_and_blend(recorder):
    plan, conds = pyguide.compile("dpmpp_2m", VP.path(8), editable=True), conditions(3)
    noise, known = noise_for(plan), noise_for(plan, seed=9)

    def blend(event):
        return torch.cat([known[:, :2] * event.level.sigma, event.x[:, 2:]], 1)

    seen: dict[str, list] = {}
    for kind in ("eager", "captured"):
        sampler, heard = Sampler(network, plan, CFG(3.0), cuda_graph=kind == "captured"), []
        events = list(sampler.stream(noise, **conds, blend=blend, callback=heard.append))
        assert all(told is event for told, event in zip(heard, events, strict=True))
        seen[kind] = [
            [e.step for e in events],
            [e.x for e in events],
            [e.denoised for e in events],
            [sampler(noise, **conds, blend=blend)],
        ]
    assert seen["eager"][0] == seen["captured"][0] == list(range(8))
    for eager, captured in zip(seen["eager"][1:], seen["captured"][1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))
    assert recorder.recorded == 1


def test_a_run_that_was_given_up_leaves_its_graphs(recorder):
    plan, conds = PLANS["dpmpp_2m"], conditions(3)
    sampler, noise = Sampler(network, plan, CFG(3.0), cuda_graph=True), noise_for(plan)

    def stop(event):
        if event.row == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler(noise, **conds, callback=stop)
    stream = sampler.stream(noise, **conds)
    next(stream)
    stream.close()
    assert torch.equal(list(sampler.stream(noise, **conds))[-1].x, Sampler(network, plan, CFG(3.0))(noise, **conds))
    assert recorder.recorded == 1


def test_shapes_alternate_and_the_oldest_goes(recorder):
    plan = PLANS["ddim"]
    sampler = Sampler(lambda x, t: x * 0.5, plan, cuda_graph=True)
    shapes = [(1, 4, 8, 8), (2, 4, 8, 8), (1, 4, 8, 8), (2, 4, 8, 8)]
    for shape in shapes:
        assert torch.equal(sampler(noise_for(plan, shape)), Sampler(lambda x, t: x * 0.5, plan)(noise_for(plan, shape)))
    assert recorder.recorded == 2
    for width in range(3, 8):
        sampler(noise_for(plan, (1, 4, 8, width)))
    sampler(noise_for(plan, shapes[0]))
    assert recorder.recorded == 2 + 5 + 1


def test_two_runs_at_a_time_do_not_share_buffers(recorder):
    plan, conds = PLANS["dpmpp_2m"], conditions(3)
    sampler, a, b = Sampler(network, plan, CFG(3.0), cuda_graph=True), noise_for(plan), noise_for(plan, seed=8)
    streams = sampler.stream(a, **conds), sampler.stream(b, **conds)
    *_, last = zip(*streams, strict=True)
    for event, noise in zip(last, (a, b), strict=True):
        assert torch.equal(event.x, Sampler(network, plan, CFG(3.0))(noise, **conds))


def test_weights_that_moved_are_recorded_again(recorder):
    """A graph reads the weights where they lay: of a module one can see where that is."""
    plan, net = PLANS["ddim"], torch.nn.Conv2d(4, 4, 1)
    net.forward = lambda x, t: torch.nn.functional.conv2d(x, net.weight, net.bias)
    noise, sampler = noise_for(plan), Sampler(net, plan, cuda_graph=True)
    sampler(noise)
    with torch.no_grad():
        net.weight *= 2  # in place: the graph sees it
    assert torch.equal(sampler(noise), Sampler(net, plan)(noise))
    assert recorder.recorded == 1
    net.weight.data = net.weight.data * 2
    assert torch.equal(sampler(noise), Sampler(net, plan)(noise))
    assert recorder.recorded == 2


def test_a_model_that_writes_into_its_inputs(recorder):
    """Warming up calls it several times on the same input."""

    def model(x, t):
        x *= 0.5
        t += 1
        return x + t[:, None, None, None] * 1e-3

    plan = PLANS["dpmpp_2m"]
    noise, sampler = noise_for(plan), Sampler(model, plan, cuda_graph=True)
    for run in (1, 2):
        assert torch.equal(sampler(noise), Sampler(model, plan)(noise)), run


def test_ways_to_run_alternate_without_recording_again(recorder):
    plan, conds = PLANS["ancestral"], conditions(3)
    sampler, noise = Sampler(network, plan, CFG(3.0), cuda_graph=True), noise_for(plan)
    for _ in range(2):
        sampler(noise, **conds, seeds=1)
        sampler(noise, **conds, generator=torch.Generator())
        list(sampler.stream(noise, **conds, seeds=1))
    assert recorder.recorded == 3


def test_another_model_in_the_same_sampler(recorder):
    plan = PLANS["ddim"]
    noise, sampler = noise_for(plan), Sampler(lambda x, t: x * 0.5, plan, cuda_graph=True)
    sampler(noise)
    sampler.model = pyguide.models.wrap(lambda x, t: x * 0.25)
    assert torch.equal(sampler(noise), Sampler(lambda x, t: x * 0.25, plan)(noise))


def test_autocast_is_part_of_a_recording(recorder):
    plan, net = PLANS["ddim"], torch.nn.Linear(6, 6)
    net.forward = lambda x, t: torch.nn.functional.linear(x, net.weight).float()
    noise, sampler = noise_for(plan, (3, 17, 6)), Sampler(net, plan, cuda_graph=True)
    for enabled in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert torch.equal(sampler(noise), Sampler(net, plan)(noise)), enabled
    assert recorder.recorded == 2


def test_conditions_with_names_alike_keep_apart(recorder):
    plan, noise = PLANS["ddim"], noise_for(PLANS["ddim"])

    def model(x, t, **cond):
        return x * cond["a"]["b"][:, None, None, None] + cond["a b"][:, None, None, None]

    cond = {"a": {"b": torch.tensor([0.1, 0.2, 0.3])}, "a b": torch.tensor([1.0, 2.0, 3.0])}
    sampler = Sampler(model, plan, cuda_graph=True)
    assert torch.equal(sampler(noise, cond=cond), Sampler(model, plan)(noise, cond=cond))


def test_conditions_leave_no_trail(recorder):
    """Neither a graph for each value ever seen, nor the autograd graph of one that requires grad."""
    plan, noise = PLANS["ddim"], noise_for(PLANS["ddim"])

    def model(x, t, gain, y):
        return x * gain + y[:, None, None, None]

    sampler = Sampler(model, plan, cuda_graph=True)
    y = torch.zeros(3, requires_grad=True)
    for i in range(40):
        sampler(noise, cond={"gain": i / 100, "y": y * 2})
    assert len(sampler._spare.graphs()) == buffers.GRAPHS
    (_, kept), *_ = sampler._spare._free
    assert not any(array.requires_grad for _, array in kept._arrays.values())


@pytest.mark.parametrize("value", [np.zeros(3), torch.zeros(3, device="meta")], ids=["numpy", "elsewhere"])
def test_conditions_that_a_graph_cannot_read(value, recorder):
    sampler = Sampler(lambda x, t, y: x, PLANS["ddim"], cuda_graph=True)
    with pytest.raises((TypeError, ValueError), match=r"cond\['y'\]: expected a tensor on cpu, like the noise, got"):
        sampler(noise_for(PLANS["ddim"]), cond={"y": value})


def test_a_run_that_never_began_gives_its_buffers_back(recorder):
    plan, conds = PLANS["ddim"], conditions(3)
    sampler, noise = Sampler(network, plan, CFG(3.0), cuda_graph=True), noise_for(plan)
    sampler(noise, **conds)
    with pytest.raises(ValueError, match="y"):
        sampler(noise, cond={"y": torch.zeros(2)}, uncond={"y": torch.zeros(3)})
    sampler.stream(noise, **conds)  # and is dropped
    gc.collect()
    sampler(noise, **conds)
    assert recorder.recorded == 1


def test_nothing_of_a_run_waits_for_the_garbage_collector(recorder):
    sampler, noise = Sampler(network, PLANS["ddim"], cuda_graph=True), noise_for(PLANS["ddim"])
    gc.collect()
    gc.disable()
    try:
        seen = weakref.ref(noise)
        sampler(noise)
        del noise
        assert seen() is None
    finally:
        gc.enable()


def test_a_sampler_copies_without_its_graphs(recorder):
    sampler, noise = Sampler(network, PLANS["ddim"], cuda_graph=True), noise_for(PLANS["ddim"])
    expected = sampler(noise)
    other = copy.deepcopy(sampler)
    assert "cuda_graph=0 recorded" in repr(other)
    assert torch.equal(other(noise), expected)


def test_conditions_that_are_no_arrays_are_baked_in_and_told_apart(recorder):
    plan, noise = PLANS["ddim"], noise_for(PLANS["ddim"])

    def model(x, t, gain=1.0):
        return x * gain

    sampler = Sampler(model, plan, cuda_graph=True)
    for gain in (0.1, 0.2, 0.1):
        assert torch.equal(sampler(noise, cond={"gain": gain}), Sampler(model, plan)(noise, cond={"gain": gain}))
    assert recorder.recorded == 2


def test_results_are_not_the_buffers(recorder):
    plan = PLANS["ddim"]
    sampler = Sampler(lambda x, t: x * 0.5, plan, cuda_graph=True)
    first = sampler(noise_for(plan))
    kept = first.clone()
    sampler(noise_for(plan, seed=4))
    assert torch.equal(first, kept)


def test_nonfinite_samples_are_found(recorder):
    plan, noise = PLANS["dpmpp_2m"], noise_for(PLANS["dpmpp_2m"])
    noise[1, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"samples \[1\]"):
        Sampler(lambda x, t: x * 0.5, plan, check="raise", cuda_graph=True)(noise)


def waits(x, t):
    h = torch.tanh(x)
    if h.sum().item() > 1e9:
        h = h * 2
    return h


def test_a_model_that_waits_for_the_device_is_named(recorder):
    noise = noise_for(PLANS["ddim"])
    sampler = Sampler(waits, PLANS["ddim"], cuda_graph=True)
    with pytest.raises(graph.CaptureError) as caught:
        sampler(noise)
    text, line = str(caught.value), waits.__code__.co_firstlineno + 2
    assert "`if h.sum().item() > 1e9:` in waits" in text
    assert f"{__file__}:{line}" in text
    assert "not permitted when stream is capturing" in text
    assert linecache.getline(__file__, line).strip() in text
    assert torch.isfinite(Sampler(waits, PLANS["ddim"])(noise)).all()  # and runs without


def test_an_onnx_session_cannot_be_recorded():
    class Session(pyguide.models.base.Model):
        capturable = False

        def __call__(self, x, t, /, **cond):
            raise AssertionError

    model = Session(None, time="timestep", inputs={}, channel_dim=1)
    with pytest.raises(ValueError, match="cuda_graph: Session runs outside of torch"):
        Sampler(model, PLANS["ddim"], cuda_graph=True)
    assert not pyguide.models.onnx_session.OnnxSession.capturable
