"""The statistics that LeRobot keeps of each column: of an episode, and over episodes without holding them.

Their names, shapes and the way they are joined are those of `lerobot/datasets/compute_stats.py` (0.4.4). Quantiles
of an episode are exact here; over episodes they are, as there, the mean weighted by frames.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.backend import UInt8

Stats = dict[str, NDArray[Any]]
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


def column_stats(values: NDArray[Any]) -> Stats:
    """Of numbers `[n, ...]`: each statistic `[k]`, k the size of the last axis (1 for `[n]`); `count` is `[n]`."""
    flat = values.reshape(len(values), -1) if values.ndim < 2 else values.reshape(-1, values.shape[-1])
    flat = flat.astype(np.float64)
    stats = {"min": flat.min(0), "max": flat.max(0), "mean": flat.mean(0), "std": flat.std(0)}
    stats |= {name: np.quantile(flat, q, axis=0) for name, q in QUANTILES.items()}
    return {**stats, "count": np.array([len(values)])}


def image_stats(images: Iterable[UInt8]) -> Stats:
    """Of images `[H, W, 3]`, from 0 to 1: each statistic `[3, 1, 1]`. All pixels count."""
    counts, n = np.zeros((3, 256), np.int64), 0
    for image in images:
        n += 1
        for channel in range(3):
            counts[channel] += np.bincount(image[:, :, channel].ravel(), minlength=256)
    level = np.arange(256) / 255.0
    total = counts.sum(1)
    mean = counts @ level / total
    spread = np.sqrt(np.maximum(counts @ level**2 / total - mean**2, 0.0))
    below = counts.cumsum(1)
    quantiles = {
        name: np.array([level[np.searchsorted(below[c], q * total[c])] for c in range(3)])
        for name, q in QUANTILES.items()
    }
    stats = {
        "min": np.array([level[np.flatnonzero(counts[c])[0]] for c in range(3)]),
        "max": np.array([level[np.flatnonzero(counts[c])[-1]] for c in range(3)]),
        "mean": mean,
        "std": spread,
        **quantiles,
    }
    return {**{name: value.reshape(3, 1, 1) for name, value in stats.items()}, "count": np.array([n])}


def join(first: Stats, second: Stats) -> Stats:
    """Those of two sets of frames together (Chan et al. for the variance)."""
    counts = first["count"].item(), second["count"].item()
    share = np.array(counts) / sum(counts)
    joined: Stats = {
        name: first[name] * share[0] + second[name] * share[1]
        for name in first
        if name not in ("min", "max", "std", "count")
    }
    variance = first["std"] ** 2 * share[0] + second["std"] ** 2 * share[1]
    variance = variance + share[0] * share[1] * (first["mean"] - second["mean"]) ** 2
    joined["std"] = np.sqrt(variance)
    joined["min"], joined["max"] = np.minimum(first["min"], second["min"]), np.maximum(first["max"], second["max"])
    joined["count"] = first["count"] + second["count"]
    return joined
