"""Optional packages, imported where they are used: the one place that knows which extra brings which."""

from __future__ import annotations

import importlib
from types import ModuleType

EXTRA = {
    "torch": "torch",
    "triton": "triton",
    "diffusers": "diffusers",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "matplotlib": "bench",
    "rich": "bench",
    "safetensors": "bench",
    "sklearn": "bench",
    "ray": "ray",
    "scipy": "scipy",
}


def require(name: str) -> ModuleType:
    """Imports the optional module `name`, such as "torch" or "rich.console".

    Raises ImportError with the `pip install pyguide[...]` that brings the package if it is not installed. A package
    that is installed but fails to import raises its own error: installing it again would not help.
    """
    package = name.partition(".")[0]
    extra = EXTRA[package]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ImportError(f"{package} is not installed: pip install pyguide[{extra}]", name=package) from None
