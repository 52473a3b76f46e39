"""More than 2^31 elements: in one sample, over a batch, and by the stride of a model's output.

The model's output does not depend on its input, so the samples at some elements can be made on the CPU, from noise and
output at those elements alone; they must be the same bits there (Triton: to rounding).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_support import DEVICE, PLANS, real

from pyguide import CFG, Sampler, native
from pyguide.layout import TAG_STEP

pytestmark = real
EDGE = 2**31


@pytest.fixture(autouse=True)
def give_back():
    yield
    torch.cuda.empty_cache()


def need(gigabytes):
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs a GPU with {gigabytes} GB of free memory, this one has {free:.0f}")


def random(*shape, dtype):
    out = torch.empty(shape, dtype=dtype, device=DEVICE)
    for part in out.view(-1).split(1 << 28):
        part.normal_()
    return out


def places(count):
    """(start, stop) of some elements: the first, around 2^31 and around each multiple of 2^30, the last."""
    edges = {0, count, *range(2**30, count, 2**30)}
    return sorted({(max(0, edge - 700), min(count, edge + 700)) for edge in edges})


def same(result, expected, backend):
    if backend == "native":
        return torch.equal(result, expected)
    return torch.allclose(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "ancestral"])
@pytest.mark.parametrize("count", [EDGE + 1003, EDGE + 4096], ids=["odd", "even"])
def test_one_sample(name, count, fused):
    need(50)
    plan, seed = PLANS[name], 2**63 + 7
    noise, out = random(1, 1, count, dtype=torch.float32), random(1, 1, count, dtype=torch.float16)
    result = Sampler(lambda x, t: out, plan, backend=fused)(noise, seeds=[seed])
    for start, stop in places(count):
        zs = []
        for row in plan.stochastic_rows:
            z = np.empty((1, 1, stop - start), np.float32)
            native.C.normals(z.ctypes.data, "float32", z.size, seed, row, TAG_STEP, start)
            zs.append(torch.from_numpy(z))
        given = out[..., start:stop].cpu()
        expected = Sampler(lambda x, t, given=given: given, plan, backend="native")(
            noise[..., start:stop].cpu(), noises=zs or None
        )
        assert same(result[..., start:stop].cpu(), expected, fused), (start, stop)


def test_a_batch(fused):
    """Three samples of 2^30 elements: the last one begins beyond 2^31."""
    need(75)
    shape = (3, 4, 2**28)
    noise, out = random(*shape, dtype=torch.float32), random(*shape, dtype=torch.bfloat16)
    plan = PLANS["ddim"]
    result = Sampler(lambda x, t: out, plan, backend=fused)(noise)
    for b in range(3):
        for channel in (0, 3):
            for part in (slice(0, 999), slice(-1001, None)):
                given = out[b : b + 1, channel : channel + 1, part].cpu()
                expected = Sampler(lambda x, t, given=given: given, plan, backend="native")(
                    noise[b : b + 1, channel : channel + 1, part].cpu()
                )
                found = result[b : b + 1, channel : channel + 1, part].cpu()
                assert same(found, expected, fused), (b, channel, part)


@pytest.mark.parametrize("inner", [4096, 1003])
@pytest.mark.parametrize("channel", [1, -1], ids=["batch", "batch and channel"])
def test_by_stride(inner, channel, fused):
    """A small output spread over 2^31 elements and more; NaN lies between its parts."""
    need(30)
    gap = EDGE + 8
    shape = (2, 2, inner)
    strides = (gap, inner, 1) if channel == 1 else (inner, gap, 1)
    memory = torch.full((gap + 2 * inner + 64,), torch.nan, dtype=torch.float16, device=DEVICE)
    out = memory.as_strided(shape, strides)
    out.copy_(torch.randn(shape, device=DEVICE))
    noise = torch.randn(1, 2, inner, device=DEVICE)
    plan = PLANS["unipc"]
    result = Sampler(lambda x, t: out, plan, CFG(3.0), backend=fused)(noise, cond={}, uncond={})
    given = out.cpu()
    expected = Sampler(lambda x, t: given, plan, CFG(3.0), backend="native")(noise.cpu(), cond={}, uncond={})
    assert same(result.cpu(), expected, fused)
