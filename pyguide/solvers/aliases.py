"""The names that people know from diffusers, A1111 and ComfyUI, in one table."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Alias:
    """solver: pyguide's own name; options: of the solver; path: arguments of `Schedule.path` that the name asks for."""

    solver: str
    options: dict[str, Any] = field(default_factory=dict)
    path: dict[str, Any] = field(default_factory=dict)


def normalised(name: str) -> str:
    """Lower case with single underscores; "++" is "pp"."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower().replace("++", "pp")).strip("_")


def find(name: str) -> Alias | None:
    """The alias of a name as people write it; None if it is none."""
    return None
