"""A sample with a seed is the same bits in any batch; between two model calls there is one kernel and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import pyguide
from pyguide import CFG, Sampler, native, schedules

PATH = schedules.scaled_linear().path(10)
PLANS = {
    "ancestral": pyguide.compile("euler_ancestral", PATH),
    "churn": pyguide.compile("heun", PATH, s_churn=3.0),
    "unipc": pyguide.compile("unipc", PATH),
}
SHAPE = (3, 9, 11)  # 297 elements: no multiple of a vector, a block or four lanes
SEEDS = [17, 3, 2**63 + 5, 1_000_003, 0]


def free(x, t, y):
    """Elementwise and exact in any batch: what differs can only come from the sampler."""
    return x * 0.25 + y.reshape(-1, 1, 1, 1)


def run(name, seeds, scales, backend="native", seeded=True):
    noise = pyguide.randn(seeds, (len(seeds), *SHAPE), like=torch.empty(0))
    y = torch.tensor([0.1 * (seed % 7) for seed in seeds])
    sampler = Sampler(free, PLANS[name], CFG(scales), backend=backend)
    return sampler(noise, cond={"y": y}, uncond={"y": y * 0}, seeds=seeds if seeded else None)


@pytest.mark.parametrize("name", PLANS)
def test_bits_do_not_depend_on_the_batch(name, backend):
    scales = {seed: 1.0 + i for i, seed in enumerate(SEEDS)}
    alone = {seed: run(name, [seed], [scales[seed]], backend) for seed in SEEDS}
    for order in (SEEDS, SEEDS[::-1], SEEDS[2:] + SEEDS[:2], SEEDS[:3]):
        together = run(name, order, [scales[seed] for seed in order], backend)
        for b, seed in enumerate(order):
            assert torch.equal(together[b], alone[seed][0]), (seed, order)


def test_negative_control_batch_order_matters_without_seeds():
    def sequence(seeds):
        torch.manual_seed(0)
        return run("ancestral", seeds, [2.0] * len(seeds), seeded=False)

    assert not torch.equal(sequence(SEEDS[::-1]).flip(0), sequence(SEEDS))


def test_negative_control_another_seed_is_another_sample():
    noise = torch.zeros(1, *SHAPE)
    runs = [Sampler(lambda x, t: x * 0.25, PLANS["ancestral"])(noise, seeds=s) for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.skipif(native.C is None, reason="no native kernel in this installation")
@pytest.mark.parametrize("name", PLANS)
def test_bits_do_not_depend_on_the_number_of_threads(name):
    before = torch.get_num_threads()
    noise = pyguide.randn(1, (2, 4, 96, 96), like=torch.empty(0))  # large enough to be split
    out = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)  # one OpenMP runtime: it is the kernel's setting too
            out.append(Sampler(lambda x, t: x * 0.25, PLANS[name])(noise, seeds=5))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*out)


def test_seeds_of_an_integer_count_up():
    assert np.array_equal(pyguide.randn(7, (3, 5)), np.concatenate([pyguide.randn([s], (1, 5)) for s in (7, 8, 9)]))


# ---- between two model calls --------------------------------------------------------------------------------------


def _free_sampler(steps, **options):
    plan = pyguide.compile("unipc", schedules.scaled_linear().path(steps), **options)
    out = torch.zeros(4, 3, 8, 8)
    return Sampler(lambda x, t: out, plan, CFG(2.0), backend="native")


def _events(steps):
    sampler, noise = _free_sampler(steps), torch.zeros(2, 3, 8, 8)
    sampler(noise, cond={}, uncond={})
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        sampler(noise, cond={}, uncond={})
    return [event.name for event in prof.events()]


@pytest.mark.skipif(native.C is None, reason="no native kernel in this installation")
def test_no_aten_call_and_no_tensor_allocation_between_two_model_calls():
    """Ten times as many evaluations make not one more event: all calls and allocations are around the loop."""
    few, many = _events(5), _events(50)
    assert few
    assert sorted(few) == sorted(many)


@pytest.mark.parametrize(("scale", "rows"), [(3.0, 2), (1.0, 1), (0.0, 1)])
def test_model_rows_are_counted(scale, rows):
    seen = []
    plan = PLANS["unipc"]
    Sampler(lambda x, t: (seen.append(len(x)), x * 0.1)[1], plan, CFG(scale))(
        torch.zeros(5, *SHAPE), cond={}, uncond={}
    )
    assert seen == [5 * rows] * plan.evaluations
