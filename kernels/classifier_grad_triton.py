"""Gradient of a classifier's log-probability by its logits, scaled per sample: the Triton twin of
csrc/classifier_grad.h. The formula: pyguide.reference.classifier_grad.

One program per sample, whose bits depend on nothing else in the launch. Its classes lie in one block, which is read
once, or in several: three passes (maxima, sums, gradient) then go through them in the same order, the later ones
finding the logits in the cache (21,841 of float32: 87 KB).

Bytes per sample: the logits once from memory, the gradient once; a distribution like the logits. The elements are
float32 (float64 for float64 logits) with exponentials within 2 ulp; the sums and logarithms, a few per sample, are
float64: summed in float32, 21,841 terms could cost 1e-6 of the gradient by themselves. 64 registers per thread.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from typing import Any

from pyguide.extras import require
from pyguide.layout import NONFINITE_LOGITS as _NONFINITE_LOGITS

from .program_triton import END, FLAGS, ROW, WORDS
from .step_triton import WARPS
from .vec_triton import exp_sum

torch: Any = require("torch")
triton: Any = require("triton")
tl: Any = require("triton.language")
Tensor = Any

NONFINITE_LOGITS = tl.constexpr(_NONFINITE_LOGITS)
OPTIONS = {"enable_fp_fusion": False, "maxnreg": 64}
LEAST, MOST = 128, 2048  # classes of a block; half as many of float64
LANES = 256  # classes per warp, 8 per thread; half as many of float64, and of several blocks, which need more registers


@triton.jit
def _logits(own, k, classes, class_stride, real: tl.constexpr, DENSE: tl.constexpr):
    """The logits of a block of classes; -inf beyond the last."""
    at = own + k if DENSE else own + k.to(tl.int64) * class_stride
    return tl.load(at, mask=k < classes, other=float("-inf")).to(real)


@triton.jit
def _share(wanted, k, classes, width, real: tl.constexpr, DISTRIBUTION: tl.constexpr):
    """What the target says of a block of classes: q_k, or 1 for those that the labels name. A label is only compared,
    never part of an address."""
    if DISTRIBUTION:
        return tl.load(wanted + k, mask=k < classes, other=0.0).to(real)
    else:
        named = k < 0
        j = 0
        while j < width:  # not `for`: the interpreter of Triton 3.6 has no range over an argument
            label = tl.load(wanted + j)
            named = named | (k == tl.where((label >= 0) & (label < classes), label, -1).to(tl.int32))
            j += 1
        return named.to(real)


@triton.jit
def _maxima(x, share, DISTRIBUTION: tl.constexpr):
    """Of all logits; of those that the labels name; 1 if a logit is NaN or +inf."""
    top = tl.max(x, 0)
    top_named = top if DISTRIBUTION else tl.max(tl.where(share != 0, x, float("-inf")), 0)
    return top, top_named, tl.max(((x < float("inf")) == 0).to(tl.int32), 0)


@triton.jit
def _named_exp(x, share, top):
    """exp(x - top) of the classes that the labels name, 0 of the others, however far above the top they are."""
    return exp_sum(tl.where(share != 0, x - top, float("-inf")), 0.0)


@triton.jit
def _sums(x, share, top, top_named, DISTRIBUTION: tl.constexpr):
    """Sum of exp(x - top); that of the named classes or of q; sum of q_k (x_k - top) over the classes with q_k != 0."""
    total = tl.sum(exp_sum(x - top, 0.0).to(tl.float64), 0)
    if DISTRIBUTION:
        q = share.to(tl.float64)
        away = tl.where(share != 0, x, top).to(tl.float64) - top.to(tl.float64)
        return total, tl.sum(q, 0), tl.sum(q * away, 0)
    else:
        return total, tl.sum(_named_exp(x, share, top_named).to(tl.float64), 0), total


@triton.jit
def _gradient(x, share, top, top_named, total, total_named, s, DISTRIBUTION: tl.constexpr):
    p = exp_sum(x - top, 0.0) * (1.0 / total).to(x.dtype)
    if DISTRIBUTION:
        return s * (share - p * total_named.to(x.dtype))
    else:
        return s * (_named_exp(x, share, top_named) * (1.0 / total_named).to(x.dtype) - p)


@triton.jit(
    do_not_specialize=["units", "batch_units", "class_stride", "width", "target_stride", "scale_stride", "first"]
)
def classifier_grad_kernel(
    logits,  # sample first + b at b batch_units UNIT, its classes class_stride apart
    target,  # sample i at i target_stride: labels or a distribution
    scale,  # sample i at row scale_stride + i
    samples,  # int32 [first + batch][12], or None: all at row 0
    grad,  # [batch][classes]
    log_prob,  # [first + batch] or None
    units,  # classes / UNIT
    batch_units,
    class_stride,
    width,  # labels per sample
    target_stride,
    scale_stride,
    first,
    DISTRIBUTION: tl.constexpr,
    DENSE: tl.constexpr,  # class_stride is 1
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # one block has all classes
    CHECK: tl.constexpr,
):
    real: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    kind: tl.constexpr = grad.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    i = b + first
    classes = units * UNIT
    own, out = logits + b * batch_units * UNIT, grad + b * classes
    wanted = target + i * target_stride
    lane = tl.arange(0, BLOCK)
    words = samples
    row = tl.full((), 0, tl.int32)
    if samples is not None:
        words = samples + i * WORDS
        row = tl.load(words + ROW)
        if (row < 0) | (row >= tl.load(words + END)):
            start = 0
            while start < classes:
                tl.store(out + (start + lane), tl.zeros((BLOCK,), kind), mask=start + lane < classes)
                start += BLOCK
            if log_prob is not None:
                tl.store(log_prob + i, 0.0)
            return
    s = tl.load(scale + row.to(tl.int64) * scale_stride + i).to(real)

    if WHOLE:
        x = _logits(own, lane, classes, class_stride, real, DENSE)
        share = _share(wanted, lane, classes, width, real, DISTRIBUTION)
        top, top_named, bad = _maxima(x, share, DISTRIBUTION)
    else:
        top, bad = tl.full((), float("-inf"), real), tl.full((), 0, tl.int32)
        top_named = top
        start = 0
        while start < classes:
            x = _logits(own, start + lane, classes, class_stride, real, DENSE)
            share = _share(wanted, start + lane, classes, width, real, DISTRIBUTION)
            more, more_named, worse = _maxima(x, share, DISTRIBUTION)
            top, top_named, bad = tl.maximum(top, more), tl.maximum(top_named, more_named), bad | worse
            start += BLOCK
    if not DISTRIBUTION:
        # A label that is no class makes all that follows NaN. So do no label, or only classes that cannot be: their
        # maximum is -inf
        invalid = top_named == float("-inf")
        j = 0
        while j < width:
            invalid = invalid | (tl.load(wanted + j) >= classes)
            j += 1
        top_named = tl.where(invalid, float("nan"), top_named)
    if CHECK:
        if bad != 0:
            tl.atomic_or(words + FLAGS, NONFINITE_LOGITS)

    # A NaN or +inf among the logits, which a maximum may pass over, is in `total` from here on
    if WHOLE:
        total, total_named, mean = _sums(x, share, top, top_named, DISTRIBUTION)
    else:
        total = tl.full((), 0.0, tl.float64)
        total_named, mean = total, total
        start = 0
        while start < classes:
            x = _logits(own, start + lane, classes, class_stride, real, DENSE)
            share = _share(wanted, start + lane, classes, width, real, DISTRIBUTION)
            more, more_named, more_mean = _sums(x, share, top, top_named, DISTRIBUTION)
            total, total_named, mean = total + more, total_named + more_named, mean + more_mean
            start += BLOCK
    if log_prob is not None:
        if DISTRIBUTION:
            value = mean - total_named * tl.log(total)
        else:
            value = top_named.to(tl.float64) - top.to(tl.float64) + (tl.log(total_named) - tl.log(total))
        tl.store(log_prob + i, value.to(log_prob.dtype.element_ty))

    if WHOLE:
        g = _gradient(x, share, top, top_named, total, total_named, s, DISTRIBUTION)
        tl.store(out + lane, g.to(kind), mask=lane < classes)
    else:
        start = 0
        while start < classes:
            x = _logits(own, start + lane, classes, class_stride, real, DENSE)
            share = _share(wanted, start + lane, classes, width, real, DISTRIBUTION)
            g = _gradient(x, share, top, top_named, total, total_named, s, DISTRIBUTION)
            tl.store(out + (start + lane), g.to(kind), mask=start + lane < classes)
            start += BLOCK


def classifier_grad(
    logits: Tensor,  # [n, classes], of the samples from `first` on
    target: Tensor,  # int64 [B, width]: labels, a negative one is none; or [B, classes] in the dtype of the scale
    scale: Tensor,  # [rows, B] float32 or float64
    *,
    samples: Tensor | None = None,  # int32 [B, 12]: layout.SAMPLE; their rows choose the scale. None: row 0
    first: int = 0,
    grad: Tensor,  # [n, classes] in the dtype of the logits, contiguous; written
    log_prob: Tensor | None = None,  # [B] in the dtype of the scale; [first : first + n] written
    check: bool = False,  # a NaN or +inf logit sets NONFINITE_LOGITS in its sample
) -> None:
    """grad = scale * d log p(y | x) / d logits and log_prob = log p(y | x) of n samples, in one launch.

    Zeros for a sample at its end. Nothing is read back and nothing checked. Nothing of a row, a label or a scale is
    compiled in: the types, the number of classes up to the next power of two, and what is absent are.
    """
    batch, classes = logits.shape
    if batch == 0:
        return
    walkable = grad.is_contiguous() and all(t.stride(1) == 1 or t.shape[1] == 1 for t in (target, scale))
    assert walkable, "callers hand over arrays that a kernel can walk"
    assert samples is not None or not check, "a flag needs samples"
    batch_stride, class_stride = logits.stride()
    if batch == 1:
        batch_stride = 0  # it is arbitrary, and must not decide the vectors and the order of the sums
    halved = 2 if logits.dtype == torch.float64 else 1
    block = min(max(triton.next_power_of_2(classes), LEAST), MOST // halved)
    whole = classes <= block
    dense = class_stride == 1 or classes == 1
    unit = next(unit for unit in (8, 4, 1) if classes % unit == 0 and (batch_stride % unit == 0 or unit == 1))
    if not dense:
        unit = 1
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        classifier_grad_kernel[(batch,)](
            *(logits, target, scale, samples, grad, log_prob),
            *(classes // unit, batch_stride // unit, class_stride, target.shape[1]),
            *(target.stride(0), scale.stride(0) if len(scale) > 1 else 0, first),
            DISTRIBUTION=target.is_floating_point(),
            DENSE=dense,
            UNIT=unit,
            BLOCK=block,
            WHOLE=whole,
            CHECK=check,
            num_warps=max(WARPS, block * halved // LANES * (1 if whole else 2)),
            **OPTIONS,
        )
