"""The native kernel, if this installation has it: ``C`` (pyguide._C) or None, and ``reason``.

``C.Step`` runs one row of the sampler (the formula at the top of csrc/step.h) over raw addresses, laid out as
pyguide/layout.py says. The caller owns the memory, keeps it alive and does not run one Step from two threads at once.

This module never imports torch. Both want OpenMP under the soname libgomp.so.1, so the one loaded first serves both: in
either import order the process has one pool of threads, and torch.set_num_threads holds here too. (A torch wheel that
bundles a renamed libgomp has a pool of its own: two pools, the same results.)
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from .layout import ABI


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
