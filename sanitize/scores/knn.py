"""Nearest neighbours by FAISS, on the GPU where the scan uses one. The only file that imports faiss."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_BATCH = 65_536


def nearest_distances(
    queries: npt.NDArray[np.float32], references: npt.NDArray[np.float32], k: int, gpu: bool = False
) -> npt.NDArray[np.float32]:
    """Euclidean distances of every query to its k nearest references, exact, ascending.

    Args:
        queries: (N, D) float32.
        references: (M, D) float32, M >= k.
        k: neighbours, 1 <= k <= M.
        gpu: use the first GPU, if FAISS finds one.

    Returns:
        (N, k) float32.

    Raises:
        ValueError: k out of range.
    """
    if not 1 <= k <= len(references):
        raise ValueError(f"k = {k}, but there are {len(references)} references")
    import faiss

    index: Any = faiss.IndexFlatL2(references.shape[1])
    if gpu and getattr(faiss, "get_num_gpus", int)() > 0:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    index.add(np.ascontiguousarray(references, dtype=np.float32))
    distances = np.empty((len(queries), k), np.float32)
    for start in range(0, len(queries), _BATCH):
        rows = np.ascontiguousarray(queries[start : start + _BATCH], dtype=np.float32)
        squared, _ = index.search(rows, k)
        # FAISS computes |a|² + |b|² - 2ab, which rounding can take below zero.
        distances[start : start + _BATCH] = np.sqrt(np.maximum(squared, 0.0))
    return distances
