"""The CUDA step kernel on a simulated GPU at extreme sizes: grids, and more than 2^31 elements.

Large tensors lie in memory that is reserved and hardly ever touched.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import oracle
import pytest
from launches import Launch, Resident, address
from simulated.build import parts

from pyguide import native
from pyguide.layout import SAMPLE, row_width, weights_width

if native.C is None:
    pytest.skip(f"no native kernel: {native.reason}", allow_module_level=True)

MAP_NORESERVE = 0x4000


def sparse(count: int, dtype: Any) -> np.ndarray:
    """`count` zeros of which only what is touched takes memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return np.frombuffer(mmap.mmap(-1, count * np.dtype(dtype).itemsize, flags=flags), dtype)


@pytest.mark.parametrize("resident", [1, 7, 264, 1056, 1188, 4096])
@pytest.mark.parametrize("tile", [512, 1024])
def test_a_grid_fills_the_device_and_no_more(simulated: Any, tile: int, resident: int) -> None:
    """Blocks of each sample: all fit at once, or so many wait in turn that an eighth of the device idles at the end."""
    for batch in (*range(1, 65), 132, 133, 1000, 65_537, 2**31 - 1):
        for elements in (1, tile - 1, tile, tile + 1, 16_384, 2**20 + 1, 2**33):
            count, tiles = parts(simulated, batch, elements, tile, resident), -(-elements // tile)
            assert 1 <= count <= tiles
            assert batch * count <= 2**31 - 1  # the limit of a grid
            if count == tiles or batch * (count + 1) > 2**31 - 1:
                continue
            if batch * 8 <= resident:
                assert batch * count <= resident < batch * (count + 1)
            else:
                assert batch * count >= 8 * resident


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("types", [("float32", "float32"), ("float16", "float16"), ("float16", "bfloat16")])
def test_operands_that_reach_past_2_31_elements(
    simulated: Any, monkeypatch: pytest.MonkeyPatch, types: tuple[str, str], strided: bool
) -> None:
    """Samples, or channels, 2^31 elements and more apart."""
    monkeypatch.setattr(Launch, "C", simulated)
    monkeypatch.setattr(Launch, "placed", True)
    far = 2**31 + 2**20 + 8
    launch = Launch(7, batch=2, channels=2, inner=32, branches=2, output=types[0], inputs=types[1], density=1.0)
    expected = launch.expect()
    for k in range(2):
        for old, set_operand in ((launch.output[k], launch.step.set_output), (launch.input[k], launch.step.set_input)):
            memory = sparse(3 * far, oracle.STORAGE[old.dtype])
            strides = (64, far, 1) if strided else (far, 32, 1)
            byte_strides = tuple(s * memory.itemsize for s in strides)
            view = np.lib.stride_tricks.as_strided(memory, old.view.shape, byte_strides)
            view[...] = old.view
            old.view = view
            set_operand(k, address(memory), *strides)
    launch.run()
    assert len(expected) == 2 * 3  # state and two inputs of two samples
    for tensor, index, values, magnitude in expected:
        assert oracle.close(tensor.get(index).ravel(), values, magnitude, tensor.dtype, "float32").all()


@pytest.mark.parametrize("aligned", [True, False])
def test_a_state_of_more_than_2_31_elements(simulated: Any, aligned: bool) -> None:
    """The last of 1,025 samples, the others idle: s'_0 = 2 s_0 + m, s'_1 = s_1 - s_0."""
    B, N = 1025, 2**21 + (0 if aligned else 1)
    state = sparse(2 * B * N, np.float32).reshape(2, B, N)
    output, model_input = np.arange(N, dtype=np.float32), np.zeros(N, np.float32)
    state[0, -1], state[1, -1] = np.arange(N) % 1000, np.arange(N) % 7
    table = np.zeros((3, row_width(2)), np.float32)
    table[1] = [0, 0, -np.inf, np.inf, 0.5, 7, 0, 0, 2, 0, -1, 1, *[0] * 8]
    weights = np.zeros((3, weights_width(1, 2, 0)), np.float32)
    weights[1, 2 + 2] = 1  # b_00
    samples, route = np.zeros(B, SAMPLE), np.full((B, 1), -1, np.int32)
    samples["slots"] = 2
    samples[-1:]["row"], samples[-1:]["end"], route[-1] = 1, 3, 0
    copies = Resident(samples=samples, tables=table, weights=weights, source=route, target=route)
    step = simulated.Step(B, 1, N, 1, 2)
    step.state, step.tables, step.weights, step.samples = map(address, (state, table, weights, samples))
    step.route(address(route), address(route))
    step.set_output(0, address(output), N, N, 1)
    step.set_input(0, address(model_input), N, N, 1)
    step.place(0, *map(copies.pointer, ("samples", "tables", "weights", "bound", "source", "target")))
    step.run()
    s0, s1 = np.arange(N) % 1000, np.arange(N) % 7
    np.testing.assert_array_equal(state[0, -1], (2 * s0 + output).astype(np.float32))
    np.testing.assert_array_equal(state[1, -1], s1 - s0)
    np.testing.assert_array_equal(model_input, state[0, -1] / 2)
    assert copies.arrays["samples"]["row"].tolist() == [0] * (B - 1) + [2]
