"""What goes wrong on a GPU is a Python exception that names the call; what did not happen there leaves no trace."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_support import DEVICE, PLANS, DeviceLaunch, Module, free, initial, real, wait

from pyguide import Sampler, native

NAMED = r"^cuda\w+: cudaError\w+: \S"


@pytest.fixture(autouse=True)
def remote(place, monkeypatch):
    monkeypatch.setattr(DeviceLaunch, "C", Module())


@real
def test_a_device_that_does_not_exist():
    with pytest.raises(RuntimeError, match=NAMED):
        native.C.cuda_normals(999, 0, torch.empty(4, device=DEVICE).data_ptr(), "float32", 4, 0, 0, 0)
    launch = DeviceLaunch(0)
    launch.place()
    names = "samples", "tables", "weights", "bound", "source", "target"
    launch.step.place(999, *map(launch.control, names))
    rows = launch.samples["row"].copy()
    with pytest.raises(RuntimeError, match=NAMED):
        launch.step.run()
    assert (launch.samples["row"] == rows).all()  # nothing was launched, so nothing advanced
    assert torch.cuda.current_device() == 0
    torch.ones(3, device=DEVICE).sum().item()  # and torch does not meet the error
    DeviceLaunch(0).run_and_compare()


@pytest.mark.parametrize("what", ["state", "output"])
def test_what_the_host_can_check_is_checked_before_the_launch(what):
    launch = DeviceLaunch(0, row=1, density=1.0)
    launch.place()
    before = launch.state.memory.copy()
    if what == "state":
        launch.step.state = 0
    else:
        launch.step.set_output(0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match=f"{what}.*no address is set"):
        launch.step.run()
    wait()
    launch.leave()
    assert before.tobytes() == launch.state.memory.tobytes()


def test_a_sampler_that_was_refused_runs_again():
    calls = []

    def model(x, t):
        calls.append(x)
        if len(calls) == 3:
            raise KeyError("the model's own error")
        return free(x, t)

    sampler, noise = Sampler(model, PLANS["unipc"]), initial([1, 2])
    with pytest.raises(KeyError, match="own error"):
        sampler(noise)
    result = sampler(noise)
    assert torch.equal(result, Sampler(free, PLANS["unipc"])(noise))


BROKEN = """
import torch
from gpu_support import DeviceLaunch, Module
DeviceLaunch.C = Module()
launch = DeviceLaunch(0, inner=64, row=1, density=1.0)
launch.place()
launch.step.state = 64  # no memory of this process
launch.step.real.run()
try:
    torch.cuda.synchronize()
except RuntimeError:
    print("torch saw it")
launch.samples["row"] = 1
try:
    launch.step.real.run()
except RuntimeError as error:
    print("pyguide:", error)
"""


@real
def test_an_error_of_the_kernel_is_raised_by_the_next_call():
    """In a process of its own: the device's context does not survive it."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), str(here.parents[1])])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))}
    done = subprocess.run([sys.executable, "-c", BROKEN], env=environment, capture_output=True, text=True, timeout=100)
    assert "torch saw it" in done.stdout, done.stderr
    assert "pyguide: cuda" in done.stdout, done.stderr
    assert ": cudaErrorIllegalAddress: " in done.stdout
