"""The native kernel, if this installation has it: ``C`` (the module ``pyguide._C``) or None, and then ``reason`` says why.

``C.Step`` runs one row of the sampler (the formula at the top of csrc/step.h) over raw addresses, laid
out as pyguide/layout.py says. This module never imports torch. Both carry OpenMP by the soname libgomp.so.1, so whichever is loaded first
provides the one runtime that both then use, in either import order.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Final

from . import layout
from .layout import ABI, HEAD, NONFINITE, SAMPLE, SEPARATE, row_width, weights_width

__all__ = ["ABI", "C", "HEAD", "NONFINITE", "SAMPLE", "SEPARATE", "TAGS", "reason", "row_width", "weights_width"]

# Domain tags of the counter-based noise: the fourth word of the Philox counter.
TAGS: Final = {
    "initial": layout.TAG_INITIAL,
    "step": layout.TAG_STEP,
    "churn": layout.TAG_CHURN,
    "inpaint": layout.TAG_INPAINT,
    "user": layout.TAG_USER,
}


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("pyguide._C")
    except ImportError as error:
        note = Path(__file__).with_name("_build_error.txt")
        built = note.read_text(encoding="utf-8").strip() if note.is_file() else ""
        return None, f"the native kernel was not built: {built}" if built else f"pyguide._C does not load: {error}"
    if module.ABI != ABI:
        return None, f"pyguide._C has ABI {module.ABI}, this pyguide needs {ABI}: rebuild it (pip install -e .)"
    return module, None


C, reason = _load()
