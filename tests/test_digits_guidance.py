"""Guidance on a real model does what the papers say: fidelity rises with the scale, diversity falls."""

from __future__ import annotations

import pytest

pytest.importorskip("sklearn")
torch = pytest.importorskip("torch")

import pyguide  # noqa: E402
from pyguide.bench import digits  # noqa: E402
from pyguide.bench.digits import judge  # noqa: E402

COUNT, STEPS = 2000, 50


@pytest.mark.slow
@pytest.mark.parametrize("kind", digits.KINDS)
def test_fidelity_rises_and_diversity_falls_with_the_scale(kind):
    """The trade-off of Ho & Salimans 2022, table 1, on 2,000 fixed seeds."""
    path = (pyguide.schedules.cosine() if kind == "epsilon" else pyguide.schedules.flow()).path(STEPS)
    prediction = "epsilon" if kind == "epsilon" else "flow"
    plan = pyguide.compile("ddim", path, prediction=prediction, clip=1.0, use_clipped_model_output=True)
    noise = pyguide.randn(range(COUNT), (COUNT, *digits.SHAPE), like=torch.empty(0))
    labels = torch.arange(COUNT) % 10
    net, threads, found = digits.load(kind), torch.get_num_threads(), {}
    torch.set_num_threads(1)
    try:
        for scale in (0.0, 1.0, 2.0, 4.0):
            images = pyguide.Sampler(net, plan, pyguide.CFG(scale))(
                noise, cond={"labels": labels}, uncond={"labels": torch.full_like(labels, digits.NULL)}
            )
            found[scale] = judge.evaluate(images, labels)
    finally:
        torch.set_num_threads(threads)
    assert found[2.0]["accuracy"] >= 0.97
    assert found[1.0]["recall"] - found[4.0]["recall"] >= 0.15
    assert found[0.0]["accuracy"] < 0.2  # the negative control: scale 0 does not see the labels
