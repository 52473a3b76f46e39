"""Which back end executes the rows on which device, and why the others do not."""

from __future__ import annotations

from typing import Any, Literal

from . import native
from .launch import NativeStep
from .reference_step import ReferenceStep

Backend = Literal["auto", "native", "triton", "reference"]
FUSED = ("native", "triton")  # by priority; behind them the reference


def why_not(backend: str, device: str) -> str | None:
    """None if a back end runs on arrays of a device type ("cpu", "cuda", ...), else the reason."""
    if backend == "reference":
        return None
    if backend == "triton":
        try:
            from .kernels import launch_triton
        except ImportError as error:
            return str(error)
        except Exception as error:  # anything can happen while a half-installed package is imported
            return f"Triton is installed, but fails to import: {type(error).__name__}: {error}"
        if device == "cpu" and not launch_triton.INTERPRETED:
            return "Triton runs on a GPU, and on a CPU only under its interpreter (TRITON_INTERPRET=1)"
        why: str | None = launch_triton.reason()
        return why
    if native.C is None:
        return native.reason
    if device == "cpu":
        return None
    if device == "cuda":
        return native.C.cuda_reason() or None
    return f"the native kernels run on the CPU and on CUDA, not on {device}"


def candidates(device: str) -> tuple[str, ...]:
    """What "auto" tries on a device type; on a CPU not Triton, whose interpreter is slower than the reference."""
    return FUSED[:1] if device == "cpu" else FUSED


def choose(backend: Backend, device: str) -> str:
    """The back end for a device type: the one that was asked for, or the first that runs there.

    Raises ValueError (backend) with the reason if the one that was asked for does not run there.
    """
    if backend == "auto":
        return next((name for name in candidates(device) if why_not(name, device) is None), "reference")
    why = why_not(backend, device)
    if why is not None:
        raise ValueError(f"backend: {backend!r} does not run on {device}: {why}")
    return backend


def stepper(backend: str, device: str) -> Any:
    """The class that runs the rows of a launch: see launch.Step."""
    if backend == "reference":
        return ReferenceStep
    if backend == "native" and device == "cpu":
        return NativeStep
    from .device import CudaStep, TritonStep

    return CudaStep if backend == "native" else TritonStep
