"""Makes guided_diffusion.npz: what p_sample_loop and ddim_sample_loop of guided-diffusion, unmodified, return.

    git clone https://github.com/openai/guided-diffusion
    git -C guided-diffusion checkout 22e0df8183507e13a7813f8d38d51b072ca1e67c
    cd tests && python -m peers.make_guided_diffusion ../guided-diffusion

guided-diffusion is neither installed nor copied: its create_gaussian_diffusion and loops are run from the checkout,
with a cond_fn, around the models and the classifier of guided_diffusion_cases.py. The noises are injected where its
code draws them, in place of torch.randn_like during a run. Every case is run twice with the same numbers:

    float32   the code as it is
    float64   with float64 states, and its casts to float32 lifted. Those of the tables (_extract_into_tensor), of the
              mean and the gradient (condition_mean) and of rescaled timesteps are all calls of Tensor.float, which is
              Tensor.double during such a run.

Stored, for n cases in the order of the meta:

    meta                JSON: the commit, torch's version, the cases
    start, noises       [*], [250, *] the start and the normals that steps draw, in order
    float32, float64    [n, *] the results
    rounding            [n] the largest distance of float32 from float64, of this and of six other starts and noises
    told                the timesteps that the model and cond_fn were told in the float32 run, of all cases one after
                        another; told_lengths [n]; told_float [n]: whether they came as floating point numbers
    images, labels      images in [-1, 1] and beyond, [5, 3, 6, 4], as an npz of pyguide's save_npz holds them
    evaluated           [5, 6, 4, 3] what the evaluator's own reader takes from that npz, in batches of two
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from pyguide.integrations.guided_diffusion import save_npz

from .guided_diffusion_cases import CASES, SHAPE, Case, Model, Tensor, distance, draws, gradient_of, labels

SEEDS = (1, 2, 3, 4, 5, 6)  # besides that of the case, for the rounding


def load(checkout: Path) -> tuple[Any, Any, str]:
    """(script_util, evaluator, commit) of an unmodified checkout; the evaluator without its tensorflow."""
    git = ["git", "-C", str(checkout)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    changes = subprocess.run(
        [*git, "status", "--porcelain", "guided_diffusion", "evaluations"], check=True, capture_output=True, text=True
    ).stdout
    if changes:
        raise SystemExit(f"the checkout is modified:\n{changes}")
    for name in ("requests", "tensorflow", "tensorflow.compat", "tensorflow.compat.v1"):
        stub = types.ModuleType(name)
        stub.__getattr__ = lambda attribute: mock.MagicMock(name=attribute)  # type: ignore[method-assign]
        sys.modules[name] = stub
    sys.path[:0] = [str(checkout), str(checkout / "evaluations")]
    return importlib.import_module("guided_diffusion.script_util"), importlib.import_module("evaluator"), commit


def run(script_util: Any, case: Case, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """(the result, the timesteps told to the model and, in turns, to cond_fn) of a case in float32 or in float64."""
    diffusion = script_util.create_gaussian_diffusion(steps=case.diffusion_steps, **case.flags())
    if case.learned:
        diffusion.model_var_type = script_util.gd.ModelVarType.LEARNED
    start, noises = draws(case.seed)
    told: list[Tensor] = []

    def listening(function: Any) -> Any:
        def called(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
            assert x.dtype == dtype
            told.append(t)
            return function(x, t, **kwargs)

        return None if function is None else called

    loop = diffusion.ddim_sample_loop if case.use_ddim else diffusion.p_sample_loop
    drawn = iter(noises.to(dtype))
    arguments = {
        "noise": start.to(dtype),
        "clip_denoised": case.clip_denoised,
        "cond_fn": listening(gradient_of(case)),
        "model_kwargs": {"y": labels()},
        "device": "cpu",
    }
    if case.use_ddim:
        arguments["eta"] = case.eta
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(torch, "randn_like", side_effect=lambda x: next(drawn)))
        if dtype == torch.float64:
            patches.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        out = loop(listening(Model(case)), SHAPE, **arguments)
    assert out.dtype == dtype
    assert out.isfinite().all()
    return out, told


def one_for_each(case: Case, told: list[Tensor]) -> Tensor:
    """The timesteps of the evaluations; the classifier is told the same as the model, every sample the same."""
    told = [t.unique() for t in told]
    assert all(t.numel() == 1 for t in told)
    if case.scale is not None:
        assert all(torch.equal(t, after) for t, after in zip(told[::2], told[1::2], strict=True))
        told = told[::2]
    return torch.cat(told)


def read_by_evaluator(evaluator: Any, images: Tensor, classes: Tensor) -> np.ndarray:
    """What the evaluator reads, without loading all of it at once, from the npz that pyguide writes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "samples.npz"
        save_npz(file, images, classes)
        with evaluator.open_npz_array(str(file), "arr_0") as reader:
            assert isinstance(reader, evaluator.StreamingNpzArrayReader)
            return np.concatenate(list(reader.read_batches(2)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make guided_diffusion.npz from a checkout of guided-diffusion.")
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("guided_diffusion.npz"))
    arguments = parser.parse_args()
    script_util, evaluator, commit = load(arguments.checkout)
    narrow, wide, rounding, told = [], [], [], []
    for name, case in CASES.items():
        small, listened = run(script_util, case, torch.float32)
        large, _ = run(script_util, case, torch.float64)
        told.append(one_for_each(case, listened))
        gap = distance(small, large)
        for seed in SEEDS:
            other = Case(**{**case.as_json(), "seed": seed})
            gap = max(gap, distance(*(run(script_util, other, dtype)[0] for dtype in (torch.float32, torch.float64))))
        assert gap < 1e-2, f"{name}: float32 is {gap} from float64"
        narrow.append(small.numpy())
        wide.append(large.numpy())
        rounding.append(gap)
        print(f"{name:40s} {len(told[-1]):3d} steps, |x| to {large.abs().max():6.3g}, float32 from float64 {gap:.1e}")
    start, noises = draws(0)
    images = torch.linspace(-1.2, 1.2, 5 * 3 * 6 * 4).reshape(5, 3, 6, 4)
    classes = torch.tensor([7, 0, 999, 3, 1])
    meta = {
        "commit": commit,
        "torch": torch.__version__,
        "cases": {name: case.as_json() for name, case in CASES.items()},
    }
    np.savez_compressed(
        arguments.out,
        meta=json.dumps(meta),
        start=start.numpy(),
        noises=noises.numpy(),
        float32=np.stack(narrow),
        float64=np.stack(wide),
        rounding=np.array(rounding),
        told=torch.cat([t.double() for t in told]).numpy(),
        told_lengths=np.array([len(t) for t in told]),
        told_float=np.array([t.is_floating_point() for t in told]),
        images=images.numpy(),
        labels=classes.numpy(),
        evaluated=read_by_evaluator(evaluator, images, classes),
    )
    size = arguments.out.stat().st_size
    print(f"{arguments.out.name}: {len(CASES)} cases, {size} bytes, guided-diffusion {commit}")


if __name__ == "__main__":
    main()
