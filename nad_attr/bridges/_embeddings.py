"""Points in the plane and clusters of vectors, with what is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from nad_attr.system.rng import isolated_rng, seed_of

__all__ = ["check_embeddings", "check_n_clusters", "clusters", "embeddings", "pca"]

FloatArray: TypeAlias = NDArray[np.float32]
#: Points (N, 2), and the share of each axis, if the method has it.
Embedded: TypeAlias = "tuple[FloatArray, NDArray[np.float64] | None]"

#: The package that each embedding needs.
_PACKAGES = {"pca": "numpy", "tsne": "sklearn", "umap": "umap"}


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def check_embeddings(names: Sequence[str] | None) -> list[str]:
    """The embeddings to make. None: all that are installed.

    Raises:
        ImportError: If a package is missing.
        ValueError: If there is no such embedding, or none.

    Example:
        >>> check_embeddings(["pca"])
        ['pca']
    """
    if names is None:
        return [name for name, package in _PACKAGES.items() if _installed(package)]
    if isinstance(names, str) or not names:
        raise ValueError(f"embeddings must be a list of some of {list(_PACKAGES)}.")
    for name in names:
        if name not in _PACKAGES:
            raise ValueError(f"there is no embedding {name!r}; there are {list(_PACKAGES)}.")
        if not _installed(_PACKAGES[name]):
            how = "nad-attr[virelay]" if _PACKAGES[name] == "sklearn" else "umap-learn"
            raise ImportError(f"the embedding {name!r} needs {how}: pip install '{how}'")
    return list(dict.fromkeys(names))


def check_n_clusters(n_clusters: Sequence[int]) -> list[int]:
    """The numbers of clusters, sorted; none without scikit-learn.

    Raises:
        ValueError: If one is not a whole number from 2 on.

    Example:
        >>> check_n_clusters([])
        []
    """
    for k in n_clusters:
        if isinstance(k, bool) or not isinstance(k, int) or k < 2:
            raise ValueError(f"n_clusters must be whole numbers from 2 on, got {k!r}.")
    return sorted(set(n_clusters)) if _installed("sklearn") else []


def pca(vectors: FloatArray) -> Embedded:
    """The two principal components, with signs that do not depend on the solver.

    Args:
        vectors: float (N, D).

    Returns:
        Points (N, 2), and the variance along each axis.

    Example:
        >>> points, variances = pca(np.array([[0.0, 1.0], [0.0, 3.0]], np.float32))
        >>> points.tolist(), variances.tolist()
        ([[-1.0, 0.0], [1.0, 0.0]], [1.0, 0.0])
    """
    centred = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    points, variances = np.zeros((len(vectors), 2)), np.zeros(2)
    for axis in range(min(2, len(s))):
        sign = 1.0 if vt[axis, np.abs(vt[axis]).argmax()] >= 0 else -1.0
        points[:, axis] = sign * u[:, axis] * s[axis]
        variances[axis] = s[axis] ** 2 / len(vectors)
    return points.astype(np.float32), variances


def _tsne(vectors: FloatArray, seed: int) -> Embedded:
    from sklearn.manifold import TSNE

    # Below the number of points; t-SNE takes three times as many neighbours.
    perplexity = min(30.0, max(1.0, (len(vectors) - 1) / 3))
    method = TSNE(2, perplexity=perplexity, init="random", random_state=seed)
    return method.fit_transform(vectors).astype(np.float32), None


def _umap(vectors: FloatArray, seed: int) -> Embedded:
    from umap import UMAP

    neighbours = min(15, len(vectors) - 1)
    method = UMAP(n_components=2, n_neighbors=neighbours, random_state=seed, init="random")
    return np.asarray(method.fit_transform(vectors), np.float32), None


_METHODS: dict[str, Callable[[FloatArray, int], Embedded]] = {
    "pca": lambda vectors, seed: pca(vectors),
    "tsne": _tsne,
    "umap": _umap,
}


def embeddings(vectors: FloatArray, names: Sequence[str], seed: int) -> dict[str, Embedded]:
    """Put vectors into the plane, by each of some methods.

    Fewer than four vectors have no neighbourhoods to keep: then there is "pca" alone.

    Args:
        vectors: float32 (N, D).
        names: Of :func:`check_embeddings`.
        seed: Of those that draw random numbers.

    Example:
        >>> found = embeddings(np.eye(3, dtype=np.float32), ["pca"], seed=0)
        >>> found["pca"][0].shape
        (3, 2)
    """
    found = {}
    for name in names if len(vectors) >= 4 else ["pca"]:
        number = seed_of("embedding", seed, name) % 2**31
        with isolated_rng(number):
            found[name] = _METHODS[name](vectors, number)
    return found


def clusters(
    vectors: FloatArray, n_clusters: Sequence[int], seed: int
) -> dict[str, NDArray[np.int64]]:
    """Cluster vectors by k-means (scikit-learn), for each number of clusters.

    Args:
        vectors: float32 (N, D).
        n_clusters: Of :func:`check_n_clusters`; no more clusters are made than vectors differ.
        seed: Of the starting points.

    Returns:
        ``{"kmeans-3": int64 (N,)}``.

    Example:
        >>> clusters(np.zeros((2, 1), np.float32), [], seed=0)
        {}
    """
    found: dict[str, NDArray[np.int64]] = {}
    n_different = len(np.unique(vectors, axis=0)) if n_clusters else 0
    for k in n_clusters:
        number = seed_of("clusters", seed, k) % 2**31
        # Importing scikit-learn draws random numbers, too.
        with isolated_rng(number):
            from sklearn.cluster import KMeans

            method = KMeans(min(k, n_different), n_init=10, random_state=number)
            found[f"kmeans-{k}"] = method.fit_predict(vectors).astype(np.int64)
    return found
