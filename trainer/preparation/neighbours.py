"""Who is near whom among many: neighbours by faiss, where comparing all pairs would take days."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import TrainerError

ALL_PAIRS = 1000
"""Up to so many hashes every pair is compared."""
NEIGHBOURS = 32
"""Of each vector that are looked for."""
_CELL, _PROBED, _TRAINED = 250, 24, 64


def _faiss(what: str) -> Any:
    try:
        import faiss
    except ImportError as error:
        raise TrainerError(f"{what} needs faiss: pip install 'feedface[scale]'") from error
    return faiss


def near_pairs(hashes: np.ndarray, distance: int) -> np.ndarray:
    """The pairs of 64-bit hashes that differ in few bits.

    All of them are found: where hashes differ in ``distance`` bits, one of ``distance`` + 1 parts of them is the same.

    Args:
        hashes: ``(N,)`` uint64.
        distance: in so many bits at most.

    Returns:
        ``(P, 2)`` int64, places of the pairs, the smaller one first, in order.

    Raises:
        TrainerError: many hashes, and no faiss.
    """
    count = len(hashes)
    codes = np.ascontiguousarray(hashes, np.uint64).view(np.uint8).reshape(count, 8)
    if count <= ALL_PAIRS or distance > 7:  # eight parts of eight bits tell little apart
        first, second = np.triu_indices(count, 1)
        near = np.unpackbits(codes[first] ^ codes[second], axis=1).sum(1) <= distance
        return np.stack([first[near], second[near]], 1)
    faiss = _faiss(f"looking for near-duplicates among {count} photos of a person")
    index = faiss.IndexBinaryMultiHash(64, distance + 1, 64 // (distance + 1))
    index.add(codes)
    limits, _, found = index.range_search(codes, distance + 1)  # distances below this
    first = np.repeat(np.arange(count), np.diff(limits.astype(np.int64)))
    pairs = np.stack([first, found], 1)
    return np.unique(pairs[pairs[:, 0] < pairs[:, 1]], axis=0)


def neighbour_groups(vectors: np.ndarray, distance: float) -> np.ndarray:
    """Groups of vectors such that neighbours within a distance are in the same one.

    Average linkage cut at the distance joins two clusters only if some pair of them is within it. So each of its
    clusters lies in one group, and clustering the groups one by one gives what clustering everything would, as far as
    the neighbours are found. Of each vector the :data:`NEIGHBOURS` nearest are looked for, in the nearest cells of a
    partition (faiss ``IndexIVFFlat``).

    Args:
        vectors: ``(N, D)``.
        distance: Euclidean.

    Returns:
        The number of each vector's group, ``(N,)``.

    Raises:
        TrainerError: no faiss.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    faiss = _faiss(f"finding people among {len(vectors)} photos")
    vectors = np.ascontiguousarray(vectors, np.float32)
    count, width = vectors.shape
    cells = max(1, count // _CELL)
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(width), width, cells, faiss.METRIC_L2)
    index.cp.seed, index.cp.max_points_per_centroid, index.cp.min_points_per_centroid = 0, _TRAINED, 1
    index.nprobe = min(_PROBED, cells)
    index.train(vectors)
    index.add(vectors)
    squares, found = index.search(vectors, min(NEIGHBOURS, count))
    near = (squares <= distance**2) & (found >= 0)
    first = np.repeat(np.arange(count), found.shape[1]).reshape(found.shape)[near]
    graph = coo_matrix((np.ones(len(first), np.bool_), (first, found[near])), (count, count))
    return connected_components(graph, directed=False)[1]
