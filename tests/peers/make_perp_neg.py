"""Makes perp_neg.npz: whole runs with the lines of Perp-Neg's Stable Diffusion pipeline, unmodified.

    git clone https://github.com/Perp-Neg/Perp-Neg-stablediffusion
    git -C Perp-Neg-stablediffusion checkout 347c203e71e3002b317ac0d096c5596bb8358bdc
    cd tests && python -m peers.make_perp_neg ../Perp-Neg-stablediffusion

The pipeline needs a diffusers of its time and cannot be imported: its two functions and the three statements of
__call__ that combine the branches are compiled from its source as they stand there. They take one sample at a time, so
every sample is a run of its own: DDIM in 20 steps around the network and the conditions of guiders.py, in float64.

Stored, for n cases: meta (JSON: the commit, torch's version, the cases), start [*], float64 [n, *].
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import guiders
import numpy as np
import torch

from .perp_neg_stored import CASES, FILE

PIPELINE = "perpneg_diffusion/perpneg_stable_diffusion/pipeline_perpneg_stable_diffusion.py"


def load(checkout: Path) -> tuple[Any, str]:
    """(combined(scale, negative scale), commit) of an unmodified checkout."""
    git = ["git", "-C", str(checkout)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    changes = subprocess.run(
        [*git, "status", "--porcelain", PIPELINE], check=True, capture_output=True, text=True
    ).stdout
    if changes:
        raise SystemExit(f"the checkout is modified:\n{changes}")
    file = checkout / PIPELINE
    functions = guiders.run_code(guiders.statements(file, "def get_prependicualr_component", 2))
    code = guiders.statements(file, "delta_noise_pred_neg = ", 3)
    aggregate = functions["weighted_prependicualr_aggricator"]

    def combined(scale: float, negative: float) -> Any:
        def of_one(step: int, uncond: Any, cond: Any, rejected: Any) -> Any:
            names = {"mask": torch.tensor([True, False]), "weighted_prependicualr_aggricator": aggregate}
            predictions = {"noise_preds": torch.cat([cond, rejected]), "noise_pred_uncond": uncond}
            weights = {"guidance_scale": scale, "pos_weights": [1.0], "neg_weights": [negative]}
            return guiders.run_code(code, **names, **predictions, **weights)["noise_pred"]

        return of_one

    return combined, commit


def main() -> None:
    parser = argparse.ArgumentParser(description="Make perp_neg.npz from a checkout of Perp-Neg.")
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--out", type=Path, default=FILE)
    arguments = parser.parse_args()
    combined, commit = load(arguments.checkout)
    start, results = guiders.noise(), []
    for scale, negative in CASES.values():
        samples = []
        for b in range(len(start)):
            values = {name: [value[b]] for name, value in guiders.VALUES.items()}
            peer, plan = combined(scale, negative), guiders.PLANS["ddim"]
            samples.append(guiders.theirs(peer, plan, start[b : b + 1], tuple(values), values=values))
        results.append(torch.cat(samples).numpy())
        assert np.isfinite(results[-1]).all()
    meta = {"commit": commit, "torch": torch.__version__, "cases": CASES}
    np.savez_compressed(arguments.out, meta=json.dumps(meta), start=start.numpy(), float64=np.stack(results))
    print(f"{arguments.out.name}: {len(CASES)} cases, {arguments.out.stat().st_size} bytes, Perp-Neg {commit}")


if __name__ == "__main__":
    main()
