"""scikit-learn's bundled digits: 1,797 images 8 x 8 in 17 grey levels, split between the generator and its judge."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pyguide.bench.digits import SHAPE
from pyguide.extras import require

SPLIT = "sklearn.datasets.load_digits, stratified, random_state 0, generator 2/3, judge 1/3"


class Digits(NamedTuple):
    """Images with their labels."""

    images: npt.NDArray[np.float32]  # [N, 1, 8, 8] in [-1, 1]
    labels: npt.NDArray[np.int64]  # [N] in 0..9


@cache
def everything() -> Digits:
    """All 1,797 digits, as arrays that cannot be written to."""
    digits = require("sklearn.datasets").load_digits()
    images = (digits.data / 8 - 1).astype(np.float32).reshape(-1, *SHAPE)
    labels = digits.target.astype(np.int64)
    images.flags.writeable = labels.flags.writeable = False
    return Digits(images, labels)


@cache
def split() -> tuple[Digits, Digits]:
    """(for the generator: 1,198 digits, for the judge: the 599 others); the same in every process."""
    images, labels = everything()
    rows = require("sklearn.model_selection").train_test_split(
        np.arange(len(labels)), test_size=1 / 3, random_state=0, stratify=labels
    )
    generator, judge = (Digits(images[part], labels[part]) for part in rows)
    return generator, judge
