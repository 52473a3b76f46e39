"""The captured loop on a GPU: replays are the eager loop bit for bit, whatever happens between the evaluations."""

from __future__ import annotations

import pytest
import torch
from gpu_support import DEVICE, PLANS, SEEDS, STOCHASTIC, VP, conditions, free, initial, real, wait

import pyguide
from pyguide import CFG, Sampler, graph

LARGE = (4, 16, 16)


class Net(torch.nn.Module):
    """Convolutions and a norm: kernels of cuDNN and torch with workspaces of their own."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.Conv2d(8, 4, 3, padding=1)
            self.norm = torch.nn.GroupNorm(2, 8)
        self.requires_grad_(False)

    def forward(self, x, t, y=None):
        h = torch.nn.functional.silu(self.norm(self.first(x)) + torch.sin(t.to(x.dtype))[:, None, None, None])
        return torch.tanh(self.last(h)) + (0 if y is None else y[:, None, None, None])


def pair(plan, guidance, backend, model=free):
    """(eager, captured)"""
    return [Sampler(model, plan, guidance, backend=backend, cuda_graph=captured) for captured in (False, True)]


def seeded(name):
    return {"seeds": SEEDS} if name in STOCHASTIC else {}


@pytest.mark.parametrize("name", PLANS)
def test_replays_are_the_eager_loop(name, fused):
    eager, captured = pair(PLANS[name], CFG(3.0), fused)
    for seeds in (SEEDS, SEEDS[::-1], SEEDS):  # later runs replay the graphs of the first with their own noise
        drawn = {"seeds": seeds} if name in STOCHASTIC else {}
        expected = eager(initial(seeds), **conditions(seeds), **drawn)
        assert torch.equal(captured(initial(seeds), **conditions(seeds), **drawn), expected)
    assert not torch.equal(expected, eager(initial(SEEDS[::-1]), **conditions(SEEDS), **seeded(name)))  # control
    assert "cuda_graph=1 recorded" in repr(captured)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_network_with_workspaces(dtype, fused):
    net = Net().to(DEVICE, dtype)
    eager, captured = pair(PLANS["unipc"], CFG(3.0), fused, net)
    noise, conds = initial(SEEDS, LARGE, dtype=dtype), conditions(SEEDS)
    for _ in range(3):
        assert torch.equal(captured(noise, **conds), eager(noise, **conds))


@pytest.mark.parametrize("batched", [True, False])
def test_a_graph_for_each_set_of_branches(batched, fused):
    guidance = CFG(4.0, interval=(0.25, 0.75), batched=batched)
    eager, captured = pair(PLANS["unipc"], guidance, fused)
    for _ in range(2):
        expected = eager(initial(SEEDS), **conditions(SEEDS))
        assert torch.equal(captured(initial(SEEDS), **conditions(SEEDS)), expected)
    assert "cuda_graph=2 recorded" in repr(captured)


@pytest.mark.parametrize("source", ["generator", "noises", "global"])
def test_noise_from_outside(source, fused):
    """Drawn between the replays, where nothing of it is captured."""
    plan, noise = PLANS["ancestral"], initial(SEEDS)

    def drawn():
        if source == "global":
            torch.manual_seed(5)
            return {}
        g = torch.Generator(DEVICE).manual_seed(5)
        if source == "generator":
            return {"generator": g}
        return {"noises": [torch.randn(noise.shape, generator=g, device=DEVICE) for _ in plan.stochastic_rows]}

    eager, captured = pair(plan, CFG(3.0), fused)
    for _ in range(2):
        expected = eager(noise, **conditions(SEEDS), **drawn())
        assert torch.equal(captured(noise, **conditions(SEEDS), **drawn()), expected)


@pytest.mark.parametrize("check", ["off", "flag"])
def test_callback_blend_and_stream(check, fused):
    plan = pyguide.compile("dpmpp_2m", VP.path(8), editable=True)
    noise, known = initial(SEEDS), initial(SEEDS[::-1])

    def blend(event):
        return torch.cat([known[:, :1] * event.level.sigma, event.x[:, 1:]], 1)

    found = []
    for captured in (False, True):
        sampler = Sampler(free, plan, CFG(3.0), backend=fused, cuda_graph=captured, check=check)
        for _ in range(2):
            heard = []
            events = list(sampler.stream(noise, **conditions(SEEDS), blend=blend, callback=heard.append))
            assert all(a is b for a, b in zip(heard, events, strict=True))
        result = sampler(noise, **conditions(SEEDS), blend=blend)
        found.append([result, *(e.x for e in events), *(e.denoised for e in events)])
        assert torch.equal(result, events[-1].x)
        assert check == "off" or not sampler.nonfinite.any()
    for eager, captured in zip(*found, strict=True):
        assert torch.equal(eager, captured)
    plain = Sampler(free, plan, CFG(3.0), backend=fused)(noise, **conditions(SEEDS))
    assert not torch.equal(plain, found[0][0])  # control: blending changes the samples


def test_nan_is_reported(fused):
    noise = initial(SEEDS)
    noise[1, 0, 0, 0] = torch.nan
    for captured in (False, True):
        sampler = Sampler(free, PLANS["unipc"], backend=fused, cuda_graph=captured, check="flag")
        sampler(noise)
        assert sampler.nonfinite.tolist() == [False, True, False, False, False]


def waits(x, t):
    h = torch.tanh(x)
    if h.sum().item() > 1e9:
        h = h * 2
    return h


def test_a_model_that_cannot_be_captured_is_named(fused):
    """And afterwards everything still works: eagerly, and in a capture."""
    noise = initial(SEEDS)
    sampler = Sampler(waits, PLANS["ddim"], backend=fused, cuda_graph=True)
    for _ in range(2):
        with pytest.raises(graph.CaptureError) as caught:
            sampler(noise)
    text, line = str(caught.value), waits.__code__.co_firstlineno + 2
    assert "`if h.sum().item() > 1e9:` in waits" in text
    assert f"{__file__}:{line}" in text
    wait()
    assert torch.isfinite(Sampler(waits, PLANS["ddim"], backend=fused)(noise)).all()
    eager, captured = pair(PLANS["ddim"], CFG(3.0), fused)
    expected = eager(noise, **conditions(SEEDS))
    assert torch.equal(captured(noise, **conditions(SEEDS)), expected)


def test_weights_that_moved_are_captured_again(fused):
    net, noise = Net().to(DEVICE), initial(SEEDS, LARGE)
    eager, captured = pair(PLANS["ddim"], None, fused, net)
    before = captured(noise)
    net.last.weight.data = net.last.weight.data * 0.5
    after = captured(noise)
    assert torch.equal(after, eager(noise))
    assert not torch.equal(after, before)


@real
def test_graph_memory_is_reported(fused):
    """What `repr` says is what the allocator holds for the graphs: a model that needs 64 MiB in between needs them."""

    def hungry(x, t):
        wide = x.flatten()[0].expand(16 << 20) * 1.0  # 64 MiB
        return x * wide[:1]

    sampler = Sampler(hungry, PLANS["ddim"], backend=fused, cuda_graph=True)
    sampler(initial(SEEDS))
    told = float(repr(sampler).partition("recorded, ")[2].partition(" MiB")[0])
    assert 64 <= told < 256
    small = Sampler(free, PLANS["ddim"], backend=fused, cuda_graph=True)  # control
    small(initial(SEEDS))
    assert float(repr(small).partition("recorded, ")[2].partition(" MiB")[0]) < 64
