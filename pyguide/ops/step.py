"""torch.ops.pyguide.step: one row of the sampler on tensors, and the operands that it takes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import backends, native
from ..device import Resident
from ..launch import Launch
from ..layout import SAMPLE, row_width, weights_width
from ..run import Run
from ..sampler import Sampler
from .library import FLOATS, LIBRARY, STATES, TAG, Tensor, expect, torch

TIMES = (torch.float32, torch.float64, torch.int64)
WORDS = SAMPLE.itemsize // 8  # int64 words of a sample
NOTHING = np.empty(0)  # host copies that a launch on a GPU does without
NOWHERE = np.empty((0, 0), np.int32)

LIBRARY.define(
    "step(Tensor(a!) state, Tensor(b!)[] inputs, Tensor(c!)[] times, Tensor(d!) samples, Tensor[] outputs, "
    "Tensor table, Tensor weights, Tensor source, Tensor target, *, Tensor? noise=None, Tensor? gradient=None, "
    "Tensor? variance=None, int variance_branch=0, Tensor? bound=None, Tensor(e!)? denoised=None, "
    "int guidance_slots=0, bool check=False, int threads=0) -> ()",
    tags=(TAG,),
)


class Operands(NamedTuple):
    """The operands of a sampler's run: torch.ops.pyguide.step(*written, outputs, *read, noise=noise)."""

    state: Tensor  # [S, B, C, *] float32 or float64
    inputs: list[Tensor]  # 1 (all branches stacked) or K: [n, C, *] in the model's dtype
    times: list[Tensor]  # as many: [n]
    samples: Tensor  # [B, 6] int64
    table: Tensor  # [(R+1) W] in the dtype of the state
    weights: Tensor  # guidance blocks, likewise
    routes: Tensor  # [R+2, B, K] int32: row i reads its outputs by routes[i] and writes its inputs by routes[i+1]
    noise: Tensor | None  # [B, C, *]: to be filled before each stochastic row if there are no seeds

    @property
    def written(self) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        return self.state, self.inputs, self.times, self.samples

    @property
    def read(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For a run whose evaluations all call the same branches; otherwise give source and target of each row."""
        same = self.routes[1:-1] == self.routes[1]
        if not bool(same.all()):
            raise ValueError("routes: evaluations call different branches; pass routes[i], routes[i + 1] with row i")
        return self.table, self.weights, self.routes[1], self.routes[1]

    @property
    def rows(self) -> Tensor:
        """The row that each sample runs next, [B] int32, a view of `samples`."""
        return self.samples.view(torch.int32)[:, 6]


def operands(sampler: Sampler, noise: Tensor, *, seeds: int | Sequence[int] | None = None) -> Operands:
    """The buffers and tables with which the operator runs a sampler's plan and guidance from `noise` [B, C, *].

    The operator does what the sampler does between two model calls; the caller calls the model. `noise` is copied. A
    stochastic plan needs seeds: its rows draw their noise from them. With classifier guidance the caller gives
    gradient= at each evaluation i with sampler.guided.classifier[i] (form "input", whose rows are others, is refused),
    with a learned variance variance=, the second half of the model's channels.
    Errors as in Sampler.__call__.
    """
    if not sampler.guided.model.all():
        raise ValueError("sampler: form='input' adds rows to the plan; expected form='score' or 'mean'")
    if seeds is None and sampler.plan.stochastic_rows:
        raise ValueError("seeds: the plan adds noise; expected one seed a sample, got none")
    branches = ("cond",) if sampler.cfg is None else sampler.cfg.branches
    conds: dict[str, Any] = {name: {} for name in branches}
    run = Run(sampler, noise, None, None, conds, seeds, None, None, None, events=False, classify=False)
    if run.is_numpy:
        raise TypeError("noise: expected a torch tensor, got ndarray")
    run.release(to_caller=True)
    a, count = run.launch, 1 if run.batched else len(branches)
    routes = np.concatenate([a.source, a.target[-1:]])
    samples = a.samples.view(np.int64).reshape(run.batch, WORDS)
    # the table is the sampler's own: a copy. The rest was made for this run.
    given = (samples, a.tables.copy(), a.weights, routes)
    placed, table, weights, routed = (torch.from_numpy(array).to(run.device) for array in given)
    return Operands(a.state, a.inputs[:count], a.times[:count], placed, table, weights, routed, a.noise)


# ---- checks: of shapes, types and layouts while tracing too, of values where there are values ----------------------


def _count(name: str, given: int, *allowed: int) -> None:
    if given not in allowed:
        raise ValueError(f"{name}: expected {' or '.join(map(str, sorted(set(allowed))))} tensors, got {given}")


def _check_operands(
    state: Tensor,
    inputs: Sequence[Tensor],
    times: Sequence[Tensor],
    samples: Tensor,
    outputs: Sequence[Tensor],
    table: Tensor,
    weights: Tensor,
    source: Tensor,
    target: Tensor,
    *,
    noise: Tensor | None = None,
    gradient: Tensor | None = None,
    variance: Tensor | None = None,
    variance_branch: int = 0,
    bound: Tensor | None = None,
    denoised: Tensor | None = None,
    guidance_slots: int = 0,
    check: bool = False,
    threads: int = 0,
) -> None:
    """Shapes, dtypes, devices and layouts of a step's operands. The fake implementation too: a step returns nothing."""
    if state.ndim < 3 or 0 in state.shape[2:] or state.shape[0] == 0:
        raise ValueError(f"state: expected [S, B, C, *] with slots and elements, got shape {tuple(state.shape)}")
    slots, shape, device, real = state.shape[0], tuple(state.shape[1:]), state.device, (state.dtype,)
    batch = shape[0]
    if source.ndim != 2 or source.shape[1] == 0:
        raise ValueError(f"source: expected [B, K] with K >= 1 branches, got shape {tuple(source.shape)}")
    branches = source.shape[1]
    if not 0 <= guidance_slots < slots:
        raise ValueError(f"guidance_slots: expected 0 to {slots - 1}, got {guidance_slots}")
    if not 0 <= variance_branch < branches:
        raise ValueError(f"variance_branch: expected 0 to {branches - 1}, got {variance_branch}")
    if threads < 0:
        raise ValueError(f"threads: expected 0 (automatic) or more, got {threads}")
    _count("inputs", len(inputs), 1, branches)
    _count("times", len(times), len(inputs))
    _count("outputs", len(outputs), 0, 1, branches)
    expect("state", state, STATES, None, device, "contiguous")
    for k, (x, t) in enumerate(zip(inputs, times)):
        expect(f"inputs[{k}]", x, (inputs[0].dtype,) if k else FLOATS, (*x.shape[:1], *shape[1:]), device, "walked")
        expect(f"times[{k}]", t, (times[0].dtype,) if k else TIMES, (x.shape[0],), device, "contiguous")
    for k, m in enumerate(outputs):
        expect(f"outputs[{k}]", m, (outputs[0].dtype,) if k else FLOATS, (*m.shape[:1], *shape[1:]), device, "walked")
    if variance is not None:
        if not outputs:
            raise ValueError("variance: it is part of a model's output, and outputs has none")
        read = outputs[variance_branch if len(outputs) > 1 else 0]
        expect("variance", variance, (read.dtype,), tuple(read.shape), device, "walked")
    for name, operand in (("noise", noise), ("gradient", gradient), ("denoised", denoised)):
        if operand is not None:
            expect(name, operand, real, shape, device, "walked")
    if bound is not None:
        expect("bound", bound, real, (batch,), device, "contiguous")
    expect("samples", samples, (torch.int64,), (batch, WORDS), device, "contiguous")
    expect("table", table, real, None, device, "contiguous")
    expect("weights", weights, real, None, device, "contiguous")
    expect("source", source, (torch.int32,), (batch, branches), device, "contiguous")
    expect("target", target, (torch.int32,), (batch, branches), device, "contiguous")


def _span(tensor: Tensor) -> tuple[int, int]:
    """Bytes from the first to behind the last element."""
    low = tensor.data_ptr()
    if tensor.is_contiguous():
        return low, low + tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return low, low + (last + 1) * tensor.element_size()


def _check_overlap(tensors: Sequence[Tensor], written: int, names: Callable[[], list[str]]) -> None:
    """The first `written` tensors lie apart from all others, and no two elements of one of them in one place."""
    spans = [_span(tensor) for tensor in tensors]
    for i, (low, high) in enumerate(spans[:written]):
        for j, (start, stop) in enumerate(spans[i + 1 :], i + 1):
            if low < stop and start < high:
                a, b = names()[i], names()[j]
                raise ValueError(f"{a} overlaps {b}: what a step writes must share no memory with other operands")
        if not tensors[i].is_contiguous():
            reach, shape, strides = 0, tuple(tensors[i].shape), tensors[i].stride()
            for stride, size in sorted(zip(strides, shape)):
                if size > 1 and stride <= reach:
                    raise ValueError(f"{names()[i]}: elements share memory, shape {shape}, strides {strides}")
                reach += (size - 1) * stride


def _check_samples(
    samples: NDArray[Any],  # [B] layout.SAMPLE
    source: list[list[int]],
    target: list[list[int]],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    slots: int,
    guidance_slots: int,
    table: int,  # numbers in it
    weights: int,
) -> None:
    """Rows, slots, offsets and routes of the samples that run. In Python's integers, which cannot wrap."""
    branches = len(source[0])
    block = weights_width(branches, slots, guidance_slots)
    sizes = [[t.shape[0] for t in tensors] * (branches if len(tensors) == 1 else 1) for tensors in (outputs, inputs)]
    sizes[0] = sizes[0] or [0] * branches
    for b, (at, first, _, row, end, own, method, *_) in enumerate(samples.tolist()):
        if row == end:
            continue
        if not 0 <= row < end:
            raise ValueError(f"samples[{b}]: expected row from 0 to its end, {end}, got {row}")
        if not 1 <= own <= slots - guidance_slots:
            raise ValueError(f"samples[{b}]: expected slots from 1 to {slots - guidance_slots}, got {own}")
        last = at + (row + 1) * row_width(own)
        if at < 0 or last > table:
            raise ValueError(
                f"samples[{b}]: expected its row {row} inside table of {table} numbers, got {at} to {last}"
            )
        last = first + (row + 1 if method == 0 else 1) * block
        if row and (first < 0 or last > weights):
            raise ValueError(
                f"samples[{b}]: expected its block inside weights of {weights} numbers, got {first} to {last}"
            )
        routes = (("source", source[b], sizes[0], "outputs"), ("target", target[b], sizes[1], "inputs"))
        for name, route, limits, of in routes if row else routes[1:]:
            for k, (place, size) in enumerate(zip(route, limits)):
                if not -1 <= place < size:
                    expected = f"expected -1 (absent) or an index of {of}, below {size}"
                    raise ValueError(f"{name}[{b}, {k}]: {expected}, got {place}")


# ---- implementations ------------------------------------------------------------------------------------------------


def step(
    state: Tensor,  # [S, B, C, *] float32 or float64, contiguous; written
    inputs: Sequence[Tensor],  # 1 or K: [n, C, *]; written
    times: Sequence[Tensor],  # 1 or K: [n] float32, float64 or int64; written
    samples: Tensor,  # [B, 6] int64: layout.SAMPLE; its row is advanced
    outputs: Sequence[Tensor],  # none (prologue), 1 or K: [n, C, *]
    table: Tensor,  # rows, [R+1, W] or those of several plans one after another, in the dtype of the state
    weights: Tensor,  # guidance blocks, in the dtype of the state
    source: Tensor,  # [B, K] int32: where in outputs branch k of sample b lies, -1: absent
    target: Tensor,  # [B, K] int32: where its next model input goes
    *,
    noise: Tensor | None = None,  # [B, C, *] in the dtype of the state; None: from the samples' seeds
    gradient: Tensor | None = None,  # [B, C, *] in the dtype of the state
    variance: Tensor | None = None,  # like the output of branch `variance_branch`
    variance_branch: int = 0,
    bound: Tensor | None = None,  # [B] in the dtype of the state
    denoised: Tensor | None = None,  # [B, C, *] in the dtype of the state; D is written there
    guidance_slots: int = 0,
    check: bool = False,
    threads: int = 0,
) -> None:
    """The next row of every sample that is not at its end: state, model inputs, timesteps and samples, in place.

        D    = clip(a_x s_0 + a_g sum_k w_k m_k)
        s'_r = sum_c T_rc s_c + d_r D + e_r U + sum_k b_rk m_k + n_r sqrt(Sig) z + q_r Sig g;   next input = c_in s'_0

    (in full: reference.py). On the first back end that runs on the device, as in Sampler(backend="auto"). A single
    tensor of inputs or outputs holds all branches.
    check: NONFINITE in a sample's flags if a written x is not finite. threads: 0 is automatic; for a CPU.
    A GPU kernel is enqueued on the current stream and nothing is read back: there the values of samples, source and
    target are not looked at (a sample whose row is not below its end is left alone), and must be those of `operands`.
    Raises TypeError (dtype) or ValueError (shape, device, layout, overlap, an operand that requires grad, a row or an
    index out of range, an operand that a row reads and that is absent) naming the argument, before anything is written.
    """
    options: dict[str, Any] = {"noise": noise, "gradient": gradient, "variance": variance, "bound": bound}
    options.update(denoised=denoised, variance_branch=variance_branch, guidance_slots=guidance_slots)
    options.update(check=check, threads=threads)
    _check_operands(state, inputs, times, samples, outputs, table, weights, source, target, **options)
    if state.shape[1] == 0:
        return
    optional = {k: options[k] for k in ("noise", "gradient", "variance", "bound") if options[k] is not None}
    written = [state, samples, *([] if denoised is None else [denoised]), *inputs, *times]

    def names() -> list[str]:
        first = ["state", "samples", *([] if denoised is None else ["denoised"])]
        lists = (("inputs", inputs), ("times", times), ("outputs", outputs))
        listed = [f"{name}[{k}]" for name, tensors in lists for k in range(len(tensors))]
        return [*first, *listed, "table", "weights", "source", "target", *optional]

    every = [*written, *outputs, table, weights, source, target, *optional.values()]
    _check_overlap(every, len(written), names)
    device, branches = state.device.type, source.shape[1]
    repeat = branches if len(inputs) == 1 else 1
    operated = state, [*inputs] * repeat, [*times] * repeat
    stepper = _stepper(device, native.C)
    if stepper.on_device:  # nothing is read back: the values are the kernel's to follow
        resident = Resident(samples.view(torch.int32), table.flatten(), weights.flatten(), source, target)
        launch = Launch(*operated, NOTHING, NOTHING, samples=NOTHING, source=NOWHERE, target=NOWHERE, **options)
        runner = stepper(launch, resident)
        runner.use_noise(noise is not None)
        runner.enqueue(outputs)
        _bump(samples)
        return
    host = samples.cpu().numpy().view(SAMPLE).reshape(-1)
    here, there = source.cpu().numpy(), target.cpu().numpy()
    sizes = state.shape[0], guidance_slots, table.numel(), weights.numel()
    _check_samples(host, here.tolist(), there.tolist(), inputs, outputs, *sizes)
    options["bound"] = None if bound is None else bound.cpu()
    tables, blocks = table.cpu().flatten(), weights.cpu().flatten()
    launch = Launch(*operated, tables, blocks, host, here, there, **options)
    runner = stepper(launch)
    runner.use_noise(noise is not None)
    runner.advance(outputs)
    if device != "cpu":
        samples.copy_(torch.from_numpy(host.view(np.int64).reshape(-1, WORDS)))
    else:  # written through numpy
        _bump(samples)


@functools.cache
def _stepper(device: str, core: Any) -> Any:
    """What runs rows on a device type; `core` is native.C, on which that depends."""
    return backends.stepper(backends.choose("auto", device), device)


def _bump(tensor: Tensor) -> None:
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


LIBRARY.impl("step", step, "CompositeExplicitAutograd")
torch.library.register_fake("pyguide::step", _check_operands, lib=LIBRARY)
