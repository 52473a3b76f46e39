"""Streams, callbacks and blending: what a run tells while it goes on, and how x may be changed in between."""

from __future__ import annotations

import pytest
import torch
from test_sampler import PLANS, VP, conditions, network

import pyguide
from pyguide import CFG, Sampler, solvers


def test_stream_callback_and_call_are_the_same_run():
    plan, noise = pyguide.compile("heun", VP.path(5)), torch.randn(2, 3, 4, 4)
    sampler, heard = Sampler(network, plan, CFG(2.0)), []
    want = sampler(noise, **conditions(2))
    events = list(sampler.stream(noise, **conditions(2)))
    assert torch.equal(sampler(noise, **conditions(2), callback=heard.append), want)
    assert [e.row for e in events] == list(range(9))
    assert [e.step for e in events] == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert [e.sigma for e in events] == plan.sigma.tolist()
    assert [e.timestep for e in events] == plan.timestep.tolist()
    assert torch.equal(events[-1].x, want)
    assert torch.equal(events[-1].denoised, want)
    assert all(
        torch.equal(a.x, b.x) and torch.equal(a.denoised, b.denoised) for a, b in zip(events, heard, strict=True)
    )
    assert len({e.x.data_ptr() for e in events}) == 9  # copies, not views of one buffer
    assert events[-1].level.sigma == 0
    assert events[0].level.sigma == plan.sigma[1]


def test_a_stream_does_not_change_the_callers_grad_mode():
    stream = Sampler(network, PLANS["ddim"]).stream(torch.randn(1, 3, 4, 4))
    next(stream)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc", "heun"])
def test_blend_answers_edits_as_the_solver_edited_in_place(solver, backend):
    path = VP.path(8)
    plan = pyguide.compile(solver, path, editable=True)
    known = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    fixed, mask = torch.randn(1, 3, 4, 4, dtype=torch.float64), torch.rand(1, 3, 4, 4) < 0.5
    noise = torch.randn(1, 3, 4, 4, dtype=torch.float64)

    def inpaint(x, level):
        return torch.where(mask, x, level.alpha * known + level.sigma * fixed)

    got = Sampler(network, plan, backend=backend)(noise, blend=lambda event: inpaint(event.x, event.level))
    count = iter(range(plan.evaluations))

    def edited(x, t):  # the reference: the tensor that the solver gives to the model is changed in place
        i = next(count)
        if i:
            x.copy_(inpaint(x, plan.level(i)))
        return network(x, t)

    want = inpaint(solvers.sample(solver, edited, noise.clone(), path), plan.level(plan.evaluations))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    assert torch.equal(got[~mask], known[~mask])


def test_a_blend_with_a_graph_leaves_none_behind():
    plan = pyguide.compile("ddim", VP.path(4), editable=True)
    weight = torch.ones(1, requires_grad=True)
    sampler = Sampler(network, plan)
    for _ in range(2):
        out = sampler(torch.ones(1, 3, 4), blend=lambda event: event.x * weight)
        assert not out.requires_grad
    assert torch.equal(out, sampler(torch.ones(1, 3, 4)))


def test_blend_needs_an_editable_plan():
    with pytest.raises(ValueError, match=r"blend.*editable"):
        Sampler(network, PLANS["dpmpp_2m"])(torch.randn(1, 3, 4, 4), blend=lambda event: event.x)


def test_progress_counts_evaluations(capsys):
    Sampler(network, PLANS["ddim"], progress=True)(torch.randn(1, 3, 4, 4))
    assert "12/12" in capsys.readouterr().err
