"""The Triton kernel under its interpreter, against tests/oracle.py, in memory poisoned with NaN."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
from launches import Launch, Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install pyguide[triton]")

import triton_step


@pytest.fixture(scope="module")
def kernels() -> Any:
    from pyguide.kernels import launch_triton

    return launch_triton


@pytest.fixture(autouse=True)
def interpreter(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches run on the interpreter, and its truncating cast to bfloat16 is allowed for: one ulp, not half of one."""
    monkeypatch.setattr(triton_step.Step, "kernels", kernels, raising=False)
    half_ulp = oracle.half_ulp
    monkeypatch.setattr(oracle, "half_ulp", lambda y, dtype: half_ulp(y, dtype) * (2 if dtype == "bfloat16" else 1))


class Interpreted(Launch):
    placed = True
    C = SimpleNamespace(Step=triton_step.Step)


EVERYTHING = {"denoised": True, "noise": "philox", "gradient": True, "variance": True, "bound": True, "check": True}


def slow(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)


@pytest.mark.parametrize("inputs", ["float32", "bfloat16", *map(slow, ("float16", "float64"))])
@pytest.mark.parametrize("output", ["float32", "float16", *map(slow, ("bfloat16", "float64"))])
@pytest.mark.parametrize("state", ["float32", "float64"])
def test_types(state: str, output: str, inputs: str) -> None:
    for seed, extra in enumerate(({}, EVERYTHING)):
        Interpreted(seed, state=state, output=output, inputs=inputs, inner=24, slots=(2,), **extra).run_and_compare()


@pytest.mark.parametrize("time", ["float32", "float64", "int64"])
def test_timesteps(time: str) -> None:
    Interpreted(1, time=time, batch=3).run_and_compare()


@pytest.mark.parametrize("layout", ["last", "slice", *map(slow, ("contiguous", "gap"))])
@pytest.mark.parametrize("offset", [0, slow(3)])
def test_layouts(layout: str, offset: int) -> None:
    for seed, output in enumerate(("float32", "bfloat16")):
        Interpreted(
            seed, channels=3, inner=8, layout=layout, offset=offset, output=output, **EVERYTHING
        ).run_and_compare()


@pytest.mark.parametrize("inner", [1, 7, 513, 1032, *map(slow, (3, 4, 8, 511, 512, 1024, 2050))])
def test_lengths_around_a_tile(inner: int) -> None:
    for seed, half in enumerate(("float32", "float16")):
        Interpreted(seed, inner=inner, output=half, inputs=half, noise="philox", batch=1).run_and_compare()


@pytest.mark.parametrize(
    ("branches", "slots", "own"), [(1, 1, 0), (2, 4, 1), slow((3, 2, 2)), slow((5, 6, 0)), (16, 8, 8)]
)
def test_branches_and_slots(branches: int, slots: int, own: int) -> None:
    for seed in range(2):
        Interpreted(
            seed, branches=branches, slots=(slots,), guidance_slots=own, nan=bool(seed), batch=1
        ).run_and_compare()


def test_samples_at_different_rows_of_different_plans() -> None:
    Interpreted(3, batch=5, slots=(1, 3, 2), row=(0, 2, 1, 3), routes=True, absent=True, inner=40).run_and_compare()


@pytest.mark.parametrize("noise", ["philox", "tensor"])
@pytest.mark.parametrize("nan", [False, True])
def test_every_operand(noise: str, nan: bool) -> None:
    for seed in range(3):
        Interpreted(seed, channels=2, inner=21, slots=(2, 1), guidance_slots=1, nan=nan, **EVERYTHING | {"noise": noise}
                    ).run_and_compare()  # fmt: skip


@pytest.mark.parametrize("row", [0, 1, 2])
def test_prologue_and_refresh(row: int) -> None:
    launch = Interpreted(7, row=row, batch=3, inner=16)
    launch.run_and_compare()
    written = [t.view.copy() for t in launch.input]
    for t in launch.input:
        t.set(np.ones(t.shape))
    launch.refresh()
    for t, before in zip(launch.input, written, strict=True):
        k = next(k for k in range(launch.K) if t is launch.input[k])
        running = launch.samples["row"] < launch.samples["end"]
        due = [int(place) for place in launch.target[running, k] if place >= 0]
        assert due
        assert t.view[due].tobytes() == before[due].tobytes()


def everything(launch: Launch) -> bytes:
    return b"".join(a.tobytes() for a in (*(t.view for t in launch.written()), *launch.time))


def test_the_same_bits_twice_and_in_any_batch() -> None:
    first, again = (Interpreted(5, batch=3, inner=600, noise="philox") for _ in range(2))
    other = Interpreted(5, batch=3, inner=600, noise="philox")
    other.samples["seed"][0] += 1  # another neighbour, and a control: its own numbers change
    for launch in (first, again, other):
        launch.run()
    assert everything(first) == everything(again)
    assert first.state.view[:, 1:].tobytes() == other.state.view[:, 1:].tobytes()
    assert first.state.view[:, 0].tobytes() != other.state.view[:, 0].tobytes()


def test_normals(kernels: Any) -> None:
    import torch

    for seed, count in ((0, 1), (2**64 - 1, 1030), (12345, 4096)):
        out = torch.empty(count)
        kernels.normals(out, seed, 3, 0x70796702)
        z, radius = oracle.normals(0, count, seed, 3, 0x70796702)
        assert (np.abs(out.numpy() - z) <= 4 * 2.0**-24 * radius + oracle.half_ulp(z, "float32")).all()


def test_the_interpreter_truncates_to_bfloat16() -> None:
    """So that the ulp allowed above is known to be its, not the kernel's."""
    launch = Interpreted(2, inputs="bfloat16", inner=256, batch=1)
    launch.run_and_compare()
    state = launch.state.get((0, 0)).astype(np.float32)
    c_in = np.float32(launch.now(0).head[4])
    assert c_in
    exact = (state * c_in).view(np.uint32)
    for k in range(launch.K):
        assert np.array_equal(launch.input[k].view[launch.target[0, k]].ravel(), (exact >> 16).astype(np.uint16))
    assert isinstance(launch.input[0], Tensor)


def test_a_sampler(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import pyguide
    from pyguide import backends, device

    monkeypatch.setattr(device, "launch_triton", lambda: kernels)
    plan = pyguide.compile("dpmpp_2m_sde", pyguide.schedules.scaled_linear().path(6), editable=True)
    noise = pyguide.randn(0, (2, 3, 5, 5), like=torch.empty(0))

    def sampled() -> Any:
        sampler = pyguide.Sampler(lambda x, t: torch.tanh(x), plan, pyguide.CFG(3.0, interval=(0.2, 0.8)))
        return sampler(noise, seeds=3, blend=lambda e: e.x * 0.9)

    expected = sampled()
    monkeypatch.setattr(backends, "stepper", lambda backend, where: device.TritonStep)
    torch.testing.assert_close(sampled(), expected, rtol=1e-5, atol=1e-5)
