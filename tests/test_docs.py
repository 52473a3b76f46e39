"""The code blocks of the documents run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def unet(x, t, encoder_hidden_states):
    return torch.tanh(x) * encoder_hidden_states.mean((1, 2)).reshape(-1, 1, 1, 1)


# what a reader of the README has at hand
GIVEN = {
    "np": np,
    "unet": unet,
    "prompt": torch.ones(4, 7, 16),
    "empty": torch.zeros(4, 7, 16),
    "image": torch.ones(4, 4, 64, 64),
    "mask": torch.rand(4, 4, 64, 64) < 0.5,
}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_the_code_of_the_documents_runs(name, capsys):
    found = blocks(name)
    assert found, f"{name} has no code block"
    namespace: dict[str, Any] = dict(GIVEN)
    for block in found:
        exec(compile(block, name, "exec"), namespace)
    if name == "README.md":
        assert namespace["latents"].shape == (4, 4, 64, 64)
        assert torch.isfinite(namespace["latents"]).all()
        assert "row   25  result" in capsys.readouterr().out
        kept = ~GIVEN["mask"]
        assert torch.equal(namespace["filled"][kept], GIVEN["image"][kept])


def test_the_readme_shows_both_commands():
    text = (ROOT / "README.md").read_text()
    assert "make bench" in text
    assert "make test" in text
