"""The Triton kernels under their interpreter, in processes of their own: Triton decides at import what it decorates."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install pyguide[triton]")

FILES = sorted(Path(__file__).with_name("interpreted").glob("test_*.py"))
NONE_SELECTED = 5  # pytest's exit status


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_under_the_interpreter(file: Path, which: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-m", which, str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if which == "slow" and done.returncode == NONE_SELECTED:
        return
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    print(done.stdout.strip().splitlines()[-1])
