"""Whole sampling runs on a GPU: against the CPU, from batch to batch, on streams and devices, and what they leave."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from gpu_support import DEVICE, PLANS, SEEDS, SHAPE, STOCHASTIC, conditions, free, initial, real, sample, wait

import pyguide
import pyguide.ops
from pyguide import CFG, Sampler


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_the_samples_of_the_cpu(name, dtype, fused):
    """CUDA: the same bits. Triton: to rounding."""
    expected = sample(name, SEEDS[:3], device="cpu", dtype=dtype)
    result = sample(name, SEEDS[:3], fused, dtype=dtype).cpu()
    if fused == "native":
        assert torch.equal(result, expected)
    else:
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("name", PLANS)
def test_float64_equals_the_reference(name, fused):
    expected = sample(name, SEEDS[:2], "reference", device="cpu", dtype=torch.float64)
    result = sample(name, SEEDS[:2], fused, dtype=torch.float64).cpu()
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PLANS)
def test_bits_do_not_depend_on_the_batch(name, fused):
    scales = {seed: 1.0 + i for i, seed in enumerate(SEEDS)}
    alone = {seed: sample(name, [seed], fused, [scales[seed]]) for seed in SEEDS}
    for order in (SEEDS, SEEDS[::-1], SEEDS[2:] + SEEDS[:2], SEEDS[:3]):
        together = sample(name, order, fused, [scales[seed] for seed in order])
        for b, seed in enumerate(order):
            assert torch.equal(together[b], alone[seed][0]), (seed, order)


def test_negative_control_of_the_batch(fused):
    """Without seeds the order matters, and another seed is another sample."""

    def sequence(seeds):
        torch.manual_seed(0)
        sampler = Sampler(free, PLANS["ancestral"], CFG(2.0), backend=fused)
        return sampler(initial(seeds), **conditions(seeds))

    assert not torch.equal(sequence(SEEDS[::-1]).flip(0), sequence(SEEDS))
    assert not torch.equal(sample("ancestral", [1], fused), sample("ancestral", [2], fused))


@pytest.mark.parametrize("name", PLANS)
def test_a_run_is_repeatable(name, fused):
    first = sample(name, SEEDS, fused)
    for _ in range(5):
        assert torch.equal(sample(name, SEEDS, fused), first)


@pytest.mark.parametrize("seeds", [0, [2**63, 5, 2**64 - 1]])
@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (3, 1, 7), (3, 1)])
def test_initial_noise_is_the_hosts(seeds, shape):
    like = torch.empty(0)
    expected = pyguide.randn(seeds, shape, like=like)
    assert torch.equal(pyguide.randn(seeds, shape, like=like.to(DEVICE)).cpu(), expected)
    bits = torch.tensor([s - 2**64 if s >= 2**63 else s for s in (seeds or [0, 1, 2])], device=DEVICE)
    assert torch.equal(torch.ops.pyguide.randn(bits, shape).cpu(), expected)


# ---- what is left behind --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("captured", [False, True])
def test_results_are_not_views_of_buffers(captured, fused):
    sampler = Sampler(free, PLANS["ddim"], backend=fused, cuda_graph=captured)
    first = sampler(initial([1]))
    kept = first.clone()
    second = sampler(initial([2]))
    wait()
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
    assert first.untyped_storage().nbytes() == first.nbytes  # a view of a larger buffer would be more
    events = list(sampler.stream(initial([1])))
    assert len({e.x.data_ptr() for e in events}) == len({e.denoised.data_ptr() for e in events}) == len(events)


@real
@pytest.mark.parametrize("captured", [False, True])
def test_a_hundred_runs_take_no_more_memory_than_two(captured, fused):
    sampler, noise = Sampler(free, PLANS["unipc"], CFG(3.0), backend=fused, cuda_graph=captured), initial(SEEDS)

    def memory() -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    for _ in range(2):
        sampler(noise, **conditions(SEEDS))
    before = memory()
    for _ in range(100):
        sampler(noise, **conditions(SEEDS))
    assert memory() == before
    kept = sampler(noise, **conditions(SEEDS))  # negative control: a result that is kept is seen
    assert memory() >= before + kept.nbytes


# ---- streams and devices --------------------------------------------------------------------------------------------
@real
@pytest.mark.parametrize("captured", [False, True])
def test_runs_on_the_current_stream(captured, fused):
    """Noise that arrives late on a stream: work on any other stream would not wait for it."""
    sampler = Sampler(free, PLANS["unipc"], backend=fused, cuda_graph=captured)
    noise = initial(SEEDS)
    expected = sampler(noise)
    late, stream = torch.zeros_like(noise), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        sampler(late)  # buffers (and a graph) for this stream, so that nothing below waits
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        late.copy_(noise)
        result = sampler(late)
    waited = stream.query()
    torch.cuda.synchronize()
    assert not waited, "the host was kept waiting: the order was not put to the test"
    assert torch.equal(result, expected)


@real
def test_two_streams_two_samplers(fused):
    """Evaluations of two runs in turns, each on its own stream; then from two threads."""
    names = ("unipc", "ancestral")
    noises = [initial(SEEDS), initial(SEEDS[::-1])]
    expected = [Sampler(free, PLANS[name], backend=fused)(x, seeds=7) for name, x in zip(names, noises)]
    samplers = [Sampler(free, PLANS[name], backend=fused) for name in names]
    streams = [torch.cuda.Stream() for _ in names]
    torch.cuda.synchronize()
    runs, last = [], [None, None]
    for sampler, x, stream in zip(samplers, noises, streams):
        with torch.cuda.stream(stream):
            runs.append(sampler.stream(x, seeds=7))
    for _ in range(PLANS["unipc"].evaluations):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                last[i] = next(runs[i])
    torch.cuda.synchronize()
    for event, wanted in zip(last, expected):
        assert torch.equal(event.x, wanted)

    results = [[], []]

    def work(i: int) -> None:
        with torch.cuda.stream(streams[i]):
            results[i] += [samplers[i](noises[i], seeds=7) for _ in range(20)]
            streams[i].synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found, wanted in zip(results, expected):
        assert len(found) == 20
        assert all(torch.equal(result, wanted) for result in found)


@real
@pytest.mark.parametrize("captured", [False, True])
def test_the_current_device_is_restored(captured, fused):
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("needs a GPU beside this one")
    expected = sample("ancestral", SEEDS, fused).cpu()
    assert torch.cuda.current_device() == 0
    result = sample("ancestral", SEEDS, fused, device="cuda:1", cuda_graph=captured)
    assert torch.cuda.current_device() == 0
    assert result.device == torch.device("cuda", 1)
    assert torch.equal(result.cpu(), expected)
    noise = pyguide.randn(1, (2, *SHAPE), like=torch.empty(0, device="cuda:1"))
    assert torch.cuda.current_device() == 0
    assert torch.equal(noise.cpu(), pyguide.randn(1, (2, *SHAPE), like=torch.empty(0)))


def test_which_back_end_ran_is_shown(fused):
    sampler = Sampler(free, PLANS["ddim"], backend=fused)
    sampler(initial([1]))
    if DEVICE == "cuda":
        assert f"backend={fused} (cuda)" in repr(sampler)
    assert STOCHASTIC  # the plans above draw noise
