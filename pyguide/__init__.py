"""pyguide: guided diffusion sampling with one kernel between two model calls.

path = pyguide.schedules.scaled_linear().path(30)
plan = pyguide.compile("dpmpp_2m", path, prediction="epsilon")
sampler = pyguide.Sampler(model, plan, pyguide.CFG(5.0))
images = sampler(pyguide.randn(0, (4, 4, 64, 64), like=torch.empty(0)), cond={...}, uncond={...})
"""

from . import models, schedules, solvers
from .compiler import CertificateError, TraceError, compile
from .graph import CaptureError
from .guidance import (
    APG,
    CFG,
    Autoguidance,
    CFGPlusPlus,
    CFGZeroStar,
    ClassifierGuidance,
    Compose,
    CustomGuidance,
    DynamicThresholding,
    EditCFG,
    GradientGuidance,
    Guidance,
    MagnitudeAwareCFG,
    MomentGuidance,
    NormPreservingCFG,
    PerpNeg,
    PerturbedGuidance,
    TangentialCFG,
)
from .noise import randn
from .path import Level, NoisePath
from .plan import Plan
from .run import Event
from .sampler import Sampler
from .version import __version__


def __getattr__(name: str) -> object:
    if name in ("ops", "training"):  # loaded when asked for: ops needs torch to register its operators
        import importlib

        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "APG",
    "CFG",
    "Autoguidance",
    "CFGPlusPlus",
    "CFGZeroStar",
    "CaptureError",
    "CertificateError",
    "ClassifierGuidance",
    "Compose",
    "CustomGuidance",
    "DynamicThresholding",
    "EditCFG",
    "Event",
    "GradientGuidance",
    "Guidance",
    "Level",
    "MagnitudeAwareCFG",
    "MomentGuidance",
    "NoisePath",
    "NormPreservingCFG",
    "PerpNeg",
    "PerturbedGuidance",
    "Plan",
    "Sampler",
    "TangentialCFG",
    "TraceError",
    "__version__",
    "compile",
    "models",
    "randn",
    "schedules",
    "solvers",
]
