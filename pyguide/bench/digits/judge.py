"""Judges samples of the digits models: a classifier and distances that never saw the generator.

The classifier is trained on the third of the data that the generator was not given; the distances are to all real
digits, in pixel space, which for 64 pixels needs no feature network.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyguide.bench.digits import SHAPE, data
from pyguide.extras import require

NEIGHBOURS = 3  # k of the manifold estimate, as in the paper
Images = npt.NDArray[np.float32]


def evaluate(images: Any, labels: Any) -> dict[str, float]:
    """Fidelity and diversity of generated digits.

    Args:
        images: samples [N, 1, 8, 8], array or CPU tensor, nominally in [-1, 1].
        labels: the classes asked for [N], 0..9.

    Returns:
        accuracy: share of samples that an SVM, trained on the held-out third, assigns to the class asked for.
        precision: share of samples within the manifold of real digits; recall: share of real digits within the manifold
            of samples (k = 3 nearest neighbours). Both depend on N: compare runs of equal N only.
        frechet: Frechet distance of Gaussians fitted to samples and real digits, in squared pixel units.

    Raises:
        ValueError: shapes that do not match, too few samples, values that are not finite.

    Source: Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models",
        equations 1 and 2; Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", equation 6.
    """
    samples = _pixels(images)
    if len(samples) <= NEIGHBOURS:
        raise ValueError(f"images: more than {NEIGHBOURS} samples are needed, got {len(samples)}")
    if np.shape(labels) != (len(samples),):
        raise ValueError(f"labels must have shape ({len(samples)},), got {np.shape(labels)}")
    real = _real()
    precision, recall = _precision_recall(samples)
    return {
        "accuracy": float(np.mean(classify(images) == np.asarray(labels))),
        "recall": recall,
        "precision": precision,
        "frechet": _frechet(real, samples),
    }


def classify(images: Any) -> npt.NDArray[np.int64]:
    """Classes [N] of images [N, 1, 8, 8] by the judge's own SVM, 98 to 99 % right on real digits it has not seen."""
    classes: npt.NDArray[np.int64] = _classifier().predict(_pixels(images))
    return classes


@cache
def _classifier() -> Any:
    _, judge = data.split()
    return require("sklearn.svm").SVC(C=10, gamma=0.02).fit(_pixels(judge.images), judge.labels)


def _pixels(images: Any) -> npt.NDArray[np.float64]:
    """[N, 64] float64; float64 because samples without a clip can lie far outside [-1, 1]."""
    array = np.asarray(images, np.float64)
    if array.shape[1:] != SHAPE:
        raise ValueError(f"images must have shape (N, {', '.join(map(str, SHAPE))}), got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("images hold values that are not finite")
    return array.reshape(len(array), -1)


@cache
def _real() -> npt.NDArray[np.float64]:
    return _pixels(data.everything().images)


@cache
def _real_radius() -> npt.NDArray[np.float64]:
    return _radius(_real())


def _radius(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The distance [N] of each point to its k-th nearest neighbour."""
    pairwise = require("sklearn.metrics").pairwise_distances(points)
    # Entry k, not k - 1: the smallest distance of a point is the one to itself.
    radius: npt.NDArray[np.float64] = np.partition(pairwise, NEIGHBOURS, axis=1)[:, NEIGHBOURS]
    return radius


def _precision_recall(fake: npt.NDArray[np.float64]) -> tuple[float, float]:
    """(share of fake within real's manifold, share of real within fake's); a manifold is a union of k-NN balls."""
    distance = require("sklearn.metrics").pairwise_distances(_real(), fake)  # [real, fake]
    precision = np.mean((distance <= _real_radius()[:, None]).any(0))
    recall = np.mean((distance <= _radius(fake)[None, :]).any(1))
    return float(precision), float(recall)


def _frechet(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2).

    The symmetric form, because pixels that never change make the covariance A singular.
    """
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def grid(
    rows: Sequence[Any],
    path: str | Path,
    *,
    row_labels: Sequence[str],
    column_labels: Sequence[str] = tuple("0123456789"),
    title: str = "",
) -> None:
    """Writes a PNG of samples: a row for each setting (guidance scale), a column for each class.

    Args:
        rows: for each setting images [k * columns, 1, H, W], the classes in turn (0, .., 9, 0, ..): k lines of digits,
            as wide as those of the other settings, whatever their H and W.
        path: where the PNG is written.
        row_labels: a label for each row, such as "scale 4".
        column_labels: a label for each column.
        title: above the grid.

    Raises:
        ValueError: a number of labels or images that does not fit.
    """
    columns = len(column_labels)
    if not rows or len(row_labels) != len(rows):
        raise ValueError(f"row_labels: expected one for each of {len(rows)} rows (at least 1), got {len(row_labels)}")
    bands = [_band(images, columns) for images in rows]
    # A Figure of its own instead of pyplot: no global state, no display.
    shapes = [len(band) / band.shape[1] for band in bands]
    width = 0.05 * bands[0].shape[1]  # inches, 0.05 a pixel of the first row
    size = (width + 1.2, width * sum(shapes) + 0.7)
    figure = require("matplotlib.figure").Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(bands), 1, squeeze=False, height_ratios=shapes)[:, 0]
    for axis, band, label in zip(axes, bands, row_labels):
        axis.imshow(band, cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest", aspect="auto")
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0].xaxis.tick_top()
    axes[0].set_xticks((np.arange(columns) + 0.5) * bands[0].shape[1] / columns - 0.5, column_labels)
    axes[0].tick_params(length=0)
    figure.suptitle(title)
    figure.savefig(path, dpi=150, format="png")


def _band(images: Any, columns: int) -> Images:
    """[k * columns, 1, H, W] -> one image [k * (H + 2), columns * (W + 2)], a blank pixel around each digit."""
    array = np.asarray(images, np.float32)
    if array.ndim != 4 or array.shape[1] != 1 or not array.size or len(array) % columns:
        raise ValueError(f"rows: expected images [k * {columns}, 1, H, W], got {array.shape}")
    tiles = np.pad(array[:, 0], ((0, 0), (1, 1), (1, 1)), constant_values=-1)
    _, height, width = tiles.shape
    return tiles.reshape(-1, columns, height, width).transpose(0, 2, 1, 3).reshape(-1, columns * width)
