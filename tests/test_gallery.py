"""The gallery of guidance methods runs, has them all, and the page shows what it says now."""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("sklearn")
torch = pytest.importorskip("torch")

from pyguide import guidance  # noqa: E402
from pyguide.guidance.base import Scheduled  # noqa: E402

DOCS = Path(__file__).parents[1] / "docs"
BASES = {"Guidance", "MomentGuidance"}
# steps that act, by hand: 0.2 <= step / 25 < 0.8 are 15 of them; a scale of 1 in the first of 25; no call in the first
MODEL_ROWS = {
    "unconditional": 25,
    "conditional": 25,
    "CFG 4": 50,
    "rising scale": 49,
    "interval": 40,
    "APG, momentum": 50,
    "Perp-Neg": 75,
    "weaker model": 50,
    "skipped layer": 50,
    "classifier": 25,
    "own tensor": 50,
    "flow: CFG-Zero* 2": 48,
}


@pytest.fixture(scope="module")
def gallery() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gallery", DOCS / "gallery.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def methods() -> set[str]:
    """The names of all methods, whatever they are called."""
    classes = {name: value for name, value in vars(guidance).items() if inspect.isclass(value)}
    every = {name for name, value in classes.items() if issubclass(value, Scheduled)} - BASES
    return every | {"DynamicThresholding"}


def test_every_method_has_a_row_or_a_reason(gallery: ModuleType) -> None:
    shown = set(re.findall(r"\b(\w+)\(", " ".join(method for _, method in gallery.METHODS.values())))
    assert {"APG", "CFG", "ClassifierGuidance"} <= methods()
    assert methods() <= shown | set(gallery.LEFT_OUT)
    assert not shown & set(gallery.LEFT_OUT)


def test_the_page_has_the_rows_of_the_gallery_and_a_paragraph_for_every_method(gallery: ModuleType) -> None:
    page = gallery.PAGE.read_text()
    stored = re.findall(r"^\| ([^|]+) \| `([^`]+)` \| (.+) \|$", page, re.MULTILINE)
    assert {name: method for name, method, _ in stored} == {n: method for n, (_, method) in gallery.METHODS.items()}
    for _, _, numbers in stored:
        accuracy, recall, precision, frechet, rows = map(float, numbers.split(" | "))
        assert 0 <= min(accuracy, recall, precision) <= max(accuracy, recall, precision) <= 1
        assert frechet > 0
        assert 25 <= rows <= 75
    for name in methods():
        assert f"`{name}`" in page or f"**{name}**" in page or f"`{name}(" in page, name
    for name in gallery.LEFT_OUT:
        assert f"`{name}` is left out" in page
    assert gallery.PICTURE.stat().st_size > 20_000


def test_the_gallery_runs(gallery: ModuleType) -> None:
    threads, count, weak_steps = torch.get_num_threads(), 20, 2
    torch.set_num_threads(1)
    try:
        measured = {row["name"]: (row, images) for row, images in gallery.rows(count=count, weak_steps=weak_steps)}
    finally:
        torch.set_num_threads(threads)
    assert list(measured) == list(gallery.METHODS)
    for row, images in measured.values():
        assert images.shape == (count, 1, 8, 8)
        assert torch.isfinite(images).all(), row["name"]
        assert all(math.isfinite(row[what]) for what in ("accuracy", "recall", "precision", "frechet"))
    assert {name: measured[name][0]["model_rows"] for name in MODEL_ROWS} == MODEL_ROWS
    # Each method is another one: no two rows of a model are the same images.
    for kind in ("epsilon", "velocity"):
        made = [images for name, (_, images) in measured.items() if gallery.METHODS[name][0] == kind]
        close = [(i, j) for i in range(len(made)) for j in range(i) if torch.allclose(made[i], made[j], atol=1e-3)]
        assert close == []
