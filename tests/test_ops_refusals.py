"""What the torch operators write, and what they refuse before anything is written."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from step_cases import STEP, Case

from pyguide.layout import NONFINITE, SAMPLE


@pytest.mark.parametrize("which", ["state", "inputs", "times", "denoised"])
def test_versions_are_bumped(which, on):
    case = Case()
    written = {"state": case.args[0], "inputs": case.args[1][0], "times": case.args[2][0], **case.options}[which]
    w = torch.ones_like(written, requires_grad=True)
    loss = (w * written).sum()  # saves `written` for backward
    version = case.args[3]._version
    STEP(*case.args, **case.options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert case.args[3]._version > version


def test_inference_tensors(on):
    with torch.inference_mode():
        case = Case()
        args, options = case.copy()
        STEP(*args, **options)
    case.check(args, options)


def test_nonfinite_is_flagged_per_sample(on):
    case = Case(extras=False)
    case.args[0][:, 1] = torch.nan
    case.args[5][:, 8] = 1.0
    STEP(*case.args, check=True)
    assert (case.args[3].numpy().view(SAMPLE)["flags"].ravel() & NONFINITE).tolist() == [0, NONFINITE]


def change(**samples):
    def apply(case):
        view = case.args[3].numpy().view(SAMPLE).ravel()
        for name, value in samples.items():
            view[name][1] = value

    return apply


def put(position, value, option=None):
    def apply(case):
        at, key = (case.options, option) if option else (case.args, position)
        if isinstance(at[key], list):
            at[key] = [value(x) for x in at[key]]
        else:
            at[key] = value(at[key])

    return apply


def route(position, value):
    def apply(case):
        case.args[position] = case.args[position].clone()
        case.args[position][1, 0] = value

    return apply


def overlap(case):
    memory = case.args[1][0]
    case.args[4] = [memory.as_strided(memory.shape, memory.stride(), 0)]


def share(case):
    case.options["denoised"] = case.args[0][0]


def short(case):
    case.args[4][0], case.options["variance"] = case.args[4][0][:1], case.options["variance"][:1]


REFUSED = {
    "state_dtype": (
        put(0, lambda x: x.half()),
        TypeError,
        "state: expected torch.float32 or torch.float64, got torch.float16",
    ),
    "state_shape": (put(0, lambda x: x[0, 0, :, 0]), ValueError, r"state: expected \[S, B, C, \*\]"),
    "state_empty": (put(0, lambda x: x[:, :, :0]), ValueError, r"state: expected .*got shape \(1, 2, 0, 4, 5\)"),
    "state_strides": (put(0, lambda x: x.transpose(3, 4)), ValueError, "state: expected a contiguous tensor"),
    "state_grad": (put(0, lambda x: x.requires_grad_()), ValueError, "state: requires grad"),
    "input_shape": (
        put(1, lambda x: x[:, :2]),
        ValueError,
        r"inputs\[0\]: expected shape \(4, 3, 4, 5\), got \(4, 2, 4, 5\)",
    ),
    "input_dtype": (put(1, lambda x: x.int()), TypeError, r"inputs\[0\]: expected .*, got torch.int32"),
    "input_count": (put(1, lambda x: x), ValueError, "inputs: expected 1 or 2 tensors, got 3"),
    "input_self": (put(1, lambda x: x[:1].expand(4, 3, 4, 5)), ValueError, r"inputs\[0\]: elements share memory"),
    "time_dtype": (put(2, lambda x: x.bfloat16()), TypeError, r"times\[0\]: expected .* got torch.bfloat16"),
    "samples": (put(3, lambda x: x[:, :5]), ValueError, r"samples: expected shape \(2, 6\), got \(2, 5\)"),
    "output_batch": (
        short,
        ValueError,
        r"source\[0, 1\]: expected -1 \(absent\) or an index of outputs",
    ),
    "output_shape": (put(4, lambda x: x[..., :1]), ValueError, r"outputs\[0\]: expected shape \(4, 3, 4, 5\)"),
    "output_stride": (
        put(4, lambda x: torch.zeros(4, 3, 4, 9)[..., :5]),
        ValueError,
        r"outputs\[0\]: a kernel cannot walk",
    ),
    "output_device": (put(4, lambda x: x.to("meta")), (ValueError, RuntimeError, NotImplementedError), "outputs|meta"),
    "output_grad": (put(4, lambda x: x.clone().requires_grad_()), ValueError, r"outputs\[0\]: requires grad"),
    "table_dtype": (put(5, lambda x: x.double()), TypeError, "table: expected torch.float32, got torch.float64"),
    "table_short": (
        put(5, lambda x: x[:1]),
        ValueError,
        r"samples\[0\]: expected its row 1 inside table of 13 numbers, got 0 to 26",
    ),
    "weights_short": (put(6, lambda x: x[:1]), ValueError, r"samples\[1\]: expected its block inside weights of"),
    "source_dtype": (put(7, lambda x: x.long()), TypeError, "source: expected torch.int32, got torch.int64"),
    "source_low": (
        route(7, -2),
        ValueError,
        r"source\[1, 0\]: expected -1 \(absent\) or an index of outputs, below 4, got -2",
    ),
    "target_high": (route(8, 4), ValueError, r"target\[1, 0\]: expected .* inputs, below 4, got 4"),
    "row_low": (change(row=-1), ValueError, r"samples\[1\]: expected row from 0 to its end, 4, got -1"),
    "row_high": (change(row=5), ValueError, r"samples\[1\]: expected row from 0 to its end, 4, got 5"),
    "slots": (change(slots=2), ValueError, r"samples\[1\]: expected slots from 1 to 1, got 2"),
    "table_far": (change(table=2**62), ValueError, r"samples\[1\]: expected its row 2 inside table"),
    "table_wraps": (change(table=2**63 - 3), ValueError, r"samples\[1\]: expected its row 2 inside table"),
    "weights_low": (change(weights=-1), ValueError, r"samples\[1\]: expected its block inside weights"),
    "bound": (put(0, lambda x: x[:1], "bound"), ValueError, r"bound: expected shape \(2,\), got \(1,\)"),
    "gradient": (put(0, lambda x: x[:1], "gradient"), ValueError, r"gradient: expected shape"),
    "variance": (
        put(0, lambda x: x.half(), "variance"),
        TypeError,
        "variance: expected torch.float32, got torch.float16",
    ),
    "branch": (
        lambda case: case.options.update(variance_branch=2),
        ValueError,
        "variance_branch: expected 0 to 1, got 2",
    ),
    "guidance": (
        lambda case: case.options.update(guidance_slots=1),
        ValueError,
        "guidance_slots: expected 0 to 0, got 1",
    ),
    "no_gradient": (lambda case: case.options.pop("gradient"), ValueError, "gradient"),
    "no_variance": (lambda case: case.options.pop("variance"), ValueError, "variance"),
    "no_outputs": (lambda case: (case.args[4].clear(), case.options.pop("variance")), ValueError, "outputs"),
    "absent": (route(7, -1), ValueError, "source|outputs|variance"),
    "overlap": (overlap, ValueError, r"inputs\[0\] overlaps outputs\[0\]"),
    "shared": (share, ValueError, "state overlaps denoised|denoised overlaps state"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_before_it_writes(name, on):
    spoil, error, message = REFUSED[name]
    case = Case(seed=3)
    case.args[5][:, 8:] = 0.5  # every operand is read
    case.args[6][:] = 0.5
    spoil(case)
    if name == "input_count":
        case.args[1], case.args[2] = case.args[1] * 3, case.args[2] * 3
    with torch.no_grad():
        before = [
            t.clone() for t in (case.args[0], *case.args[1], *case.args[2], case.args[3], case.options["denoised"])
        ]
        with pytest.raises(error, match=message):
            STEP(*case.args, **case.options)
        now = (case.args[0], *case.args[1], *case.args[2], case.args[3], case.options["denoised"])
        assert all(torch.equal(a, b) for a, b in zip(before, now))


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_import_pyguide_does_not_register():
    code = "import sys, pyguide; assert 'pyguide.ops' not in sys.modules; print(pyguide.ops.step.__name__)"
    assert python(code).stdout == "step\n"


def test_without_torch_the_error_names_the_extra():
    done = python("import sys; sys.modules['torch'] = None; import pyguide; import pyguide.ops")
    assert "ImportError: torch is not installed: pip install pyguide[torch]" in done.stderr
