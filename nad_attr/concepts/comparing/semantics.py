"""Do tasks that mean similar things share channels? Similarities of tasks, and Mantel's test."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from nad_attr._checks import check_count
from nad_attr.data.labels import Task
from nad_attr.stats.bootstrap import interval_of, times_drawn
from nad_attr.stats.p_values import permutation_p
from nad_attr.stats.pairs import cosines
from nad_attr.stats.ranks import standard_ranks
from nad_attr.stats.tables import FloatArray
from nad_attr.stats.tests import Statistic
from nad_attr.system.rng import seed_of

__all__ = ["classifier_similarity", "confusion_similarity", "mantel", "wordnet_similarity"]


def _matrix(values: ArrayLike, what: str) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] != array.shape[1]:
        raise ValueError(f"{what} must be a matrix of tasks by tasks, got {array.shape}.")
    off = ~np.eye(len(array), dtype=bool)
    finite = np.isfinite(array)
    if not np.allclose(array[off & finite], array.T[off & finite], rtol=1e-6, atol=1e-9):
        raise ValueError(f"{what} is not symmetric; use (m + m.T) / 2.")
    return array


def mantel(
    a: ArrayLike,
    b: ArrayLike,
    *,
    n_permutations: int = 999,
    n_bootstrap: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    other: str = "",
) -> Statistic:
    """Do two similarities of T tasks go together? Mantel's test with ranks.

    The effect is Spearman's correlation over the T (T - 1) / 2 pairs of tasks. Pairs are not
    independent, so tasks are permuted for the p-value (rows and columns together) and drawn with
    replacement for the interval.

    Args:
        a: (T, T), symmetric, for example the overlap of sub-architectures; the diagonal plays no
            part. Tasks of which nothing is known (NaN to all others) are left out.
        b: (T, T), another one.
        n_permutations: Of the tasks.
        n_bootstrap: Times that tasks are drawn for the interval; 0: none.
        seed: Of both.
        level: Coverage of the interval.
        other: Name of the second similarity, for the sentence.

    Returns:
        The statistic; ``n`` is the number of pairs.

    Raises:
        ValueError: If matrices do not fit, are not symmetric or hold NaN for single pairs.

    Source:
        Mantel 1967.

    Example:
        >>> a = np.array([[0, 3, 1], [3, 0, 2], [1, 2, 0.0]])
        >>> mantel(a, a, n_permutations=99, n_bootstrap=0).effect
        1.0
    """
    first, second = _matrix(a, "a"), _matrix(b, "b")
    if first.shape != second.shape:
        raise ValueError(f"a is of {len(first)} tasks, b of {len(second)}.")
    check_count(n_permutations, "n_permutations")
    check_count(n_bootstrap, "n_bootstrap", least=0)
    diagonal = np.eye(len(first), dtype=bool)
    lost = np.isnan(first) | np.isnan(second) | diagonal
    known = np.flatnonzero(~lost.all(1))
    first, second = (m[np.ix_(known, known)] for m in (first, second))
    t = len(known)
    upper = np.triu_indices(t, 1)
    x, y = first[upper], second[upper]
    if np.isnan(x).any() or np.isnan(y).any():
        raise ValueError("a pair of tasks has no value, but both tasks have values with others.")
    n = len(x)
    if t < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        nothing = (math.nan, math.nan)
        return Statistic("mantel", n, math.nan, nothing, math.nan, 0.0, names={"other": other})
    squares = []
    for values in (x, y):
        square = np.zeros((t, t))
        square[upper] = standard_ranks(values)
        squares.append(square + square.T)
    left, right = squares
    effect = float((left * right).sum() / 2)
    generator = np.random.default_rng(seed_of("mantel", seed))
    draws = np.empty(n_permutations)
    for i in range(n_permutations):
        order = generator.permutation(t)
        draws[i] = np.einsum("ij,ij->", left, right[np.ix_(order, order)]) / 2
    p = float(permutation_p(effect, draws, tail="both"))
    ends = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Statistic(
        "mantel",
        n,
        min(1.0, max(-1.0, effect)),
        _bootstrap(left, right, n_bootstrap, seed, level),
        p,
        0.0,
        float(draws.mean()),
        (float(ends[0]), float(ends[1])),
        {"tasks": float(t)},
        {"other": other},
    )


def _bootstrap(
    left: FloatArray, right: FloatArray, n_draws: int, seed: int, level: float
) -> tuple[float, float]:
    """Interval of the correlation with tasks drawn again; a task makes no pair with itself."""
    t = len(left)
    if n_draws == 0 or t < 4:
        return math.nan, math.nan
    drawn = times_drawn(t, n_draws, seed_of("mantel bootstrap", seed))
    times = np.concatenate([some for _, some in drawn])

    def total(matrix: FloatArray) -> FloatArray:
        return np.asarray(((times @ matrix) * times).sum(1))

    off = 1 - np.eye(t)
    n = total(off)
    with np.errstate(invalid="ignore", divide="ignore"):
        x, y = total(left) / n, total(right) / n
        xx = total(left * left) / n - x * x
        yy = total(right * right) / n - y * y
        r = (total(left * right) / n - x * y) / np.sqrt(xx * yy)
    low, high = interval_of(np.where(np.isfinite(r), r, np.nan), level)
    return float(low), float(high)


def classifier_similarity(
    weight: Tensor | ArrayLike, tasks: Sequence[Task] | None = None
) -> FloatArray:
    """Cosine of two classes' weights in the last layer.

    Args:
        weight: (K, D), the weights of the last linear layer, ``model.fc.weight``.
        tasks: T class indices or groups of them (the mean of their rows); None: all K classes.

    Returns:
        float64 (T, T).

    Raises:
        ValueError: If a class does not exist or the weights are not a matrix.

    Example:
        >>> classifier_similarity([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]], [0, 1])
        array([[1. , 0.6],
               [0.6, 1. ]])
    """
    raw = weight.detach().cpu().numpy() if isinstance(weight, Tensor) else weight
    rows = np.asarray(raw, dtype=np.float64)
    if rows.ndim != 2:
        raise ValueError(f"weight must be (classes, features), got {rows.shape}.")
    return cosines(_grouped(rows, tasks))


def _grouped(rows: FloatArray, tasks: Sequence[Task] | None) -> FloatArray:
    if tasks is None:
        return rows
    chosen = []
    for task in tasks:
        members = list(task) if isinstance(task, tuple) else [task]
        if not all(0 <= k < len(rows) for k in members):
            raise ValueError(f"a task must be one of the classes 0 to {len(rows) - 1}, got {task}.")
        chosen.append(rows[members].mean(0))
    return np.stack(chosen)


def confusion_similarity(confusion: ArrayLike, tasks: Sequence[Task] | None = None) -> FloatArray:
    """How often two classes are mistaken for each other: the mean of both error rates.

    Args:
        confusion: (K, K), how many images of class y (row) were called y' (column).
        tasks: T class indices or groups of them; None: all K classes.

    Returns:
        float64 (T, T), symmetric. A task without images is NaN.

    Raises:
        ValueError: If it is not such a matrix.

    Example:
        >>> confusion_similarity([[8, 2], [1, 9]])
        array([[0.8 , 0.15],
               [0.15, 0.9 ]])
    """
    counts = np.asarray(confusion, dtype=np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"confusion must be (classes, classes), got {counts.shape}.")
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError("confusion must hold numbers of images.")
    if tasks is not None:
        _grouped(counts, tasks)
        groups = [list(task) if isinstance(task, tuple) else [task] for task in tasks]
        rows = np.stack([counts[group].sum(0) for group in groups])
        own = np.stack([rows[:, group].sum(1) for group in groups], axis=1)
        images = rows.sum(1, keepdims=True)
    else:
        own, images = counts, counts.sum(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        rates = np.where(images > 0, own / images, np.nan)
    return np.asarray((rates + rates.T) / 2)


_WNID = re.compile(r"n\d{8}")
_SYNSET = re.compile(r".+\.[nvars]\.\d+")


def wordnet_similarity(names: Sequence[str], wordnet: Any = None) -> FloatArray:
    """Similarity of nouns by WordNet: 1 / (1 + steps up and down the hierarchy between them).

    Args:
        names: T names of tasks: nouns (``"traffic light"``, the first sense counts; of several
            after commas the first that is known), WordNet IDs (``"n02123045"``) or senses
            (``"road.n.01"``).
        wordnet: NLTK's reader of WordNet, or what behaves like it; None: ``nltk.corpus.wordnet``.

    Returns:
        float64 (T, T), symmetric, 1 on the diagonal; NaN for a name that WordNet does not know.

    Raises:
        ImportError: If NLTK is not installed.
        LookupError: If its WordNet corpus is not there; says how to get it.
        ValueError: If WordNet knows none of the names.

    Source:
        Path similarity, as in Pedersen, Patwardhan and Michelizzi 2004.

    Example:
        >>> class Sense:  # two leaves below one root
        ...     def __init__(self, *above): self.above = above
        ...     def hypernyms(self): return list(self.above)
        ...     def instance_hypernyms(self): return []
        >>> root = Sense()
        >>> class Words:
        ...     senses = {"cat": Sense(root), "dog": Sense(root)}
        ...     def synsets(self, name, pos): return [self.senses[name]]
        >>> wordnet_similarity(["cat", "dog"], Words()).round(3)
        array([[1.   , 0.333],
               [0.333, 1.   ]])
    """
    if isinstance(names, str):
        raise TypeError(f"names must be a list of names, got {names!r}.")
    reader = _reader() if wordnet is None else wordnet
    senses = [_sense(reader, str(name)) for name in names]
    if not any(sense is not None for sense in senses):
        raise ValueError(f"WordNet does not know any of the names, such as {list(names)[:3]}.")
    # Distance of each sense to all that is above it; "" is a root above all roots.
    above = [{} if sense is None else _distances(sense) for sense in senses]
    columns = {key: i for i, key in enumerate(dict.fromkeys(k for d in above for k in d))}
    steps = np.full((len(senses), max(len(columns), 1)), np.inf)
    for row, distances in enumerate(above):
        for key, distance in distances.items():
            steps[row, columns[key]] = distance
    result = np.full((len(senses), len(senses)), np.nan)
    for row in range(len(senses)):
        shortest = (steps + steps[row]).min(1)
        result[row] = np.where(np.isfinite(shortest), 1 / (1 + shortest), np.nan)
    return result


def _reader() -> Any:
    try:
        wordnet = import_module("nltk.corpus").wordnet
    except ImportError as error:
        raise ImportError("similarity by WordNet needs NLTK: pip install nltk.") from error
    try:
        wordnet.ensure_loaded()
    except LookupError as error:
        raise LookupError(
            "NLTK's WordNet corpus is not there; get it with python -m nltk.downloader wordnet, "
            "or give wordnet=."
        ) from error
    return wordnet


def _sense(wordnet: Any, name: str) -> Any:
    text = name.strip()
    if _WNID.fullmatch(text):
        return wordnet.synset_from_pos_and_offset("n", int(text[1:]))
    if _SYNSET.fullmatch(text):
        return wordnet.synset(text)
    for part in text.split(","):
        found = wordnet.synsets(part.strip().replace(" ", "_"), pos="n")
        if found:
            return found[0]
    return None


def _distances(sense: Any) -> dict[Any, float]:
    found: dict[Any, float] = {}
    level, distance = [sense], 0.0
    while level:
        following = []
        for each in level:
            if each not in found:
                found[each] = distance
                higher = each.hypernyms() + each.instance_hypernyms()
                following += higher
                if not higher:
                    found.setdefault("", distance + 1)
        level, distance = following, distance + 1
    return found
