"""What the native step refuses, before anything is written: missing addresses, overlaps, sizes, types, arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from launches import Launch, address

from pyguide import native

C: Any = native.C
if C is None:
    pytest.skip(f"no native kernel: {native.reason}", allow_module_level=True)


@pytest.mark.parametrize(
    "name", ["output", "state", "input", "noise", "gradient", "variance", "tables", "weights", "samples"]
)
def test_missing_address_is_refused_before_anything_is_written(name: str) -> None:
    launch = Launch(6, density=1.0, noise="tensor", gradient=True, variance=True, row=1)
    step = launch.step
    if name in ("output", "input"):
        getattr(step, f"set_{name}")(1, 0, *launch.output[1].strides)
    elif name == "noise":  # no address means Philox: the only one that is not an error
        step.set_noise(0)
    elif name in ("gradient", "variance"):
        getattr(step, f"set_{name}")(0)
    else:
        setattr(step, name, 0)
    before = launch.state.memory.copy()
    if name == "noise":
        step.run()
        return
    with pytest.raises(ValueError, match=name):
        step.run()
    assert before.tobytes() == launch.state.memory.tobytes()
    assert (launch.samples["row"] == 1).all()


def test_absent_branch_with_weight_is_refused() -> None:
    launch = Launch(6, density=1.0, row=1)
    launch.source[1, 0] = -1
    with pytest.raises(ValueError, match=r"source\[1\]\[0\]"):
        launch.step.run()


def test_overlap_is_refused_and_neighbours_are_not() -> None:
    def launch() -> Launch:
        return Launch(7, density=1.0, noise="tensor", gradient=True, denoised=True, row=1)

    cases = {
        r"input\[0\] overlaps output\[1\]": lambda a: a.step.set_input(0, *a.output[1].args),
        r"input\[1\] overlaps state": lambda a: a.step.set_input(1, a.state.pointer + 4, *a.input[1].strides),
        r"input\[0\] overlaps noise": lambda a: a.step.set_input(0, *a.noise.args),
        r"input\[0\] overlaps gradient": lambda a: a.step.set_gradient(*a.input[0].args),
        r"input\[0\] overlaps denoised": lambda a: a.step.set_denoised(*a.input[0].args),
        r"denoised overlaps state": lambda a: a.step.set_denoised(a.state.pointer, *a.denoised.strides),
        r"state overlaps noise": lambda a: a.step.set_noise(a.state.pointer, *a.noise.strides),
    }
    for message, change in cases.items():
        a = launch()
        change(a)
        before = a.state.memory.copy()
        with pytest.raises(ValueError, match=message):
            a.step.run()
        assert before.tobytes() == a.state.memory.tobytes()
    a = launch()  # inputs may share memory, and so may outputs
    a.step.set_output(0, *a.output[1].args)
    a.step.run()
    b = Launch(8, batch=1, inner=16, branches=1, row=1)
    b.source[...], b.target[...] = 0, 0
    memory = np.zeros(48, np.float32)  # state, output and input back to back
    p = address(memory)
    b.step.state = p
    b.step.set_output(0, p + 64, 16, 16, 1)
    b.step.set_input(0, p + 128, 16, 16, 1)
    b.step.run()


def test_run_arguments() -> None:
    launch = Launch(7, row=1)
    with pytest.raises(ValueError, match="3 addresses"):
        launch.step.run(1, 2, 3)
    with pytest.raises(TypeError):
        launch.step.run("x")
    twin, other = Launch(7, row=1), Launch(7, row=1)
    launch.step.run()
    twin.step.set_output(0, 0, *twin.output[0].strides)
    twin.step.run(twin.output[0].pointer, twin.output[1].pointer)
    np.testing.assert_array_equal(launch.state.view, twin.state.view)
    other.step.run(other.output[0].pointer)
    assert other.state.view.tobytes() != twin.state.view.tobytes()
    for row, end, slots in ((3, 2, 1), (-1, 2, 1), (1, 2, 2), (1, 2, 0)):
        launch.samples["row"], launch.samples["end"], launch.samples["slots"] = row, end, slots
        with pytest.raises(ValueError, match=r"samples\[0\]"):
            launch.step.run()


def test_sizes_and_types_are_checked() -> None:
    good = {"batch": 1, "channels": 1, "inner": 1, "branches": 1, "slots": 1, "guidance_slots": 0}
    bad = {"batch": -1, "channels": 0, "inner": 0, "branches": 17, "slots": 0, "guidance_slots": 1}
    bad |= {"state_type": "float16", "output_type": "int64", "input_type": "double", "time_type": "float16"}
    C.Step(**good)
    for name, value in bad.items():
        with pytest.raises(ValueError, match=name):
            C.Step(**{**good, name: value})
    with pytest.raises(ValueError, match="branch"):
        C.Step(**good).set_output(1, 0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"baseline|neon"):
        C.set_isa("sse9")
    C.Step(**{**good, "batch": 0}).run()  # an empty batch needs nothing
