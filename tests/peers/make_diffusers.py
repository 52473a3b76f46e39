"""Makes diffusers.npz: what diffusers' schedulers, unmodified, return for a small network and recorded noises.

    cd tests && python -m peers.make_diffusers

needs diffusers and scipy (for its LMS and its beta sigmas); torchsde is not needed. diffusers_cases.py and
diffusers_grid.py say which configurations are run, diffusers_runs.py how: each in float32, untouched, and in float64,
with the same numbers. Stored, for n cases in the order of the meta:

    meta                JSON: versions, and the case table
    start, noises       [2, *] initial noise and image-to-image's image; [100, *] the normals that steps add, in order
    rounding            [n] the largest distance of float32 from float64 in four runs that differ in all their normals
    float32, float64    [n, *] the state at the end
    scale               [n] the state at the start is start[0] times this, unless it is made of start[1] too
    told, sigmas        timesteps of the grid points and sigmas there, the end included, of all cases one after another
    inner               [., 2] sigma / alpha and timestep of the evaluations between grid points, likewise
    tables              the different alphas_cumprod, likewise
    lengths             [n, 3] how much of told, sigmas and inner belongs to a case
    table               [n] index of its table, -1 where it has none;  table_lengths: how much of tables is each
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import scipy
import torch

from .common import distance, draw
from .diffusers_grid_dpm import every_case
from .diffusers_ours import Array, normals
from .diffusers_runs import run

SEEDS = (1000, 2000, 3000)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make diffusers.npz from the installed diffusers.")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("diffusers.npz"))
    arguments = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    cases, begin = every_case(), time.monotonic()
    tables: dict[bytes, tuple[int, Array]] = {}
    rows: list[dict[str, Any]] = []
    for name, case in cases.items():
        narrow, wide = run(case, torch.float32), run(case, torch.float64)
        gap = distance(narrow.x, wide.x)
        for seed in SEEDS:
            gap = max(gap, distance(run(case, torch.float32, seed=seed).x, run(case, torch.float64, seed=seed).x))
        assert gap < 0.02, f"{name}: float32 is {gap} from float64"
        place = -1
        if wide.table is not None:
            place = tables.setdefault(wide.table.tobytes(), (len(tables), wide.table))[0]
        rows.append(
            {
                "float32": narrow.x.numpy(),
                "float64": wide.x.numpy(),
                "rounding": gap,
                "scale": wide.scale,
                "told": wide.told,
                "sigmas": wide.sigmas,
                "inner": wide.inner,
                "table": place,
            }
        )
    parts = ("told", "sigmas", "inner")
    meta = {
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "cases": {name: case.as_json() for name, case in cases.items()},
    }
    np.savez_compressed(
        arguments.out,
        meta=json.dumps(meta),
        start=np.stack([draw(1).numpy(), draw(2).numpy()]),
        noises=normals().numpy(),
        **{key: np.stack([row[key] for row in rows]) for key in ("float32", "float64", "rounding", "scale", "table")},
        **{key: np.concatenate([row[key] for row in rows]) for key in parts},
        lengths=np.array([[len(row[key]) for key in parts] for row in rows]),
        tables=np.concatenate([table for _, table in tables.values()]),
        table_lengths=np.array([len(table) for _, table in tables.values()]),
    )
    size, seconds = arguments.out.stat().st_size, time.monotonic() - begin
    print(f"{arguments.out.name}: {len(cases)} cases, {size} bytes, diffusers {diffusers.__version__}, {seconds:.0f} s")


if __name__ == "__main__":
    main()
