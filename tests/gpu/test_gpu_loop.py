"""Between two model calls a GPU gets one launch, no copy, and nobody waits: as the profiler and torch see it."""

from __future__ import annotations

import pytest
import torch
from gpu_support import DEVICE, PLANS, SEEDS, VP, free, initial, real

import pyguide
from pyguide import CFG, Sampler
from pyguide.bench.clock import CudaClock
from pyguide.bench.gpu import counts
from pyguide.bench.gpu.setup import FULL, Setup

pytestmark = real


@pytest.fixture(scope="module")
def measuring():
    return Setup(CudaClock("cuda:0"), FULL, ("native", "triton"), None, False, 1, 0.0)


@pytest.mark.parametrize("captured", [False, True])
def test_one_launch_an_evaluation_and_nothing_else(captured, fused, measuring):
    (row,) = counts.measured(fused, measuring, captured=captured)
    assert {kind: row[kind] for kind in counts.KINDS} == {
        "launches": 1,
        "copies": 0,
        "copies_from_host": 0,
        "synchronisations": 0,
    }


def test_negative_control_what_a_model_does_is_counted(measuring):
    """A model of one kernel, one copy from the host and one wait: the profiler sees each of them."""
    outputs = torch.zeros(2, 4, 4, 4, device=DEVICE)

    def model(x, t):
        torch.full((1,), 2.0).to(DEVICE)
        torch.cuda.current_stream().synchronize()
        return outputs + 0

    def run(steps):
        sampler = Sampler(model, pyguide.compile("ddim", VP.path(steps)), CFG(2.0))
        return lambda: sampler(torch.zeros(1, 4, 4, 4, device=DEVICE), cond={}, uncond={})

    found = counts.per_evaluation(run(5), run(15), 10, measuring)
    assert found["launches"] == 2
    assert found["copies_from_host"] == 1
    assert found["synchronisations"] >= 1


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("captured", [False, True])
def test_nothing_in_the_loop_waits(name, captured, fused):
    """torch refuses every call that waits for the device, from the first evaluation to the end of the last."""
    plan, noise = PLANS[name], initial(SEEDS)
    sampler = Sampler(free, plan, CFG(3.0, batched=False), backend=fused, cuda_graph=captured)
    sampler(noise, cond={}, uncond={}, seeds=SEEDS)  # captures and compiles wait
    rows = []

    def callback(event):
        torch.cuda.set_sync_debug_mode("error" if event.row < plan.evaluations - 1 else "default")
        rows.append(event.row)

    try:
        sampler(noise, cond={}, uncond={}, seeds=SEEDS, callback=callback)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert rows == list(range(plan.evaluations))


def test_negative_control_a_wait_is_refused(fused):
    def model(x, t):
        return x * float(x.flatten()[0] > 2)

    sampler = Sampler(model, PLANS["ddim"], backend=fused)
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            sampler(initial(SEEDS), callback=lambda event: torch.cuda.set_sync_debug_mode("error"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_run_as_a_whole_does_not_wait(fused):
    """Not even for its tables, noise or result."""
    sampler, noise = Sampler(free, PLANS["unipc"], backend=fused), initial(SEEDS)
    sampler(noise)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler(noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")
