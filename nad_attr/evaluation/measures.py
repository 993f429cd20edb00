"""Measures of sub-architectures as pure functions of tensors: nothing here runs a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nad_attr._checks import tensor_of
from nad_attr.data.labels import Task, own_images
from nad_attr.running.forward import cumulative
from nad_attr.stats.pairs import overlap_matrix

__all__ = [
    "auc",
    "balanced_accuracy",
    "balanced_weights",
    "fidelity",
    "fit_threshold",
    "overlap_matrix",
    "r_squared",
    "spearman",
]


#: Outputs that vary by less than this share of their magnitude are equal up to rounding.
ROUNDING = 1e-5


def _numbers(values: Any, what: str, dtype: torch.dtype | None = None) -> Tensor:
    tensor = tensor_of(values).detach()
    if tensor.ndim == 0 or tensor.is_complex():
        raise ValueError(f"{what} must be real numbers with the images on the last axis.")
    tensor = tensor.to(dtype or torch.float64)
    if bool(tensor.isnan().any()):
        raise ValueError(f"{what} hold NaN; leave those images out.")
    return tensor


def _flags(values: Any, what: str = "positive") -> Tensor:
    tensor = tensor_of(values)
    if tensor.dtype != torch.bool:
        raise TypeError(f"{what} must be boolean, got {tensor.dtype}.")
    return tensor


def _together(*tensors: Tensor) -> tuple[Tensor, ...]:
    try:
        return tuple(torch.broadcast_tensors(*tensors))
    except RuntimeError:
        shapes = " and ".join(str(tuple(t.shape)) for t in tensors)
        raise ValueError(f"shapes {shapes} do not fit; the last axis is the images.") from None


def _midranks(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """The weight of all smaller values plus half the weight of equal ones, on the last axis."""
    values = values.contiguous()
    ordered, order = values.sort(dim=-1)
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    if weights is None:
        return (below + up_to).double() / 2
    total = torch.nn.functional.pad(cumulative(weights.gather(-1, order)), (1, 0))
    return (total.gather(-1, below) + total.gather(-1, up_to)) / 2


def auc(scores: Tensor, positive: Tensor) -> Tensor:
    """Area under the ROC curve: P(score of a positive > of a negative) + P(equal) / 2.

    Args:
        scores: (..., N), higher = more positive; infinite scores are allowed.
        positive: bool (..., N); leading axes broadcast against those of ``scores``.

    Returns:
        float64 (...); NaN where there is no positive or no negative.

    Raises:
        TypeError: If ``positive`` is not boolean.
        ValueError: If scores hold NaN or the shapes do not fit.

    Example:
        >>> auc(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([False, False, True, True]))
        tensor(0.8750, dtype=torch.float64)
    """
    positive = _flags(positive)
    # Ranks need no wider numbers than the scores have, and a table of scores is large.
    single = isinstance(scores, Tensor) and scores.dtype == torch.float32
    scores = _numbers(scores, "scores", torch.float32 if single else None)
    scores, positive = _together(scores, positive)
    n_positive = positive.sum(-1, dtype=torch.float64)
    n_negative = positive.shape[-1] - n_positive
    # Mann and Whitney's U. A rank counts from 1, a midrank as above from one half.
    ranks = torch.where(positive, _midranks(scores), 0.0).sum(-1)
    return (ranks - n_positive.square() / 2) / (n_positive * n_negative)


def _shares(weights: Tensor | None, like: Tensor) -> Tensor:
    """Weights that sum to one over the images; NaN where they sum to zero."""
    if weights is None:
        weights = torch.ones_like(like)
    weights = weights.expand_as(like)
    if bool((weights < 0).any()):
        raise ValueError("weights must not be negative.")
    return weights / weights.sum(-1, keepdim=True)


def _varies(values: Tensor, weights: Tensor | None) -> Tensor:
    """Whether two of the values that count differ (exactly, without rounding)."""
    if values.shape[-1] == 0:
        return torch.zeros(values.shape[:-1], dtype=torch.bool, device=values.device)
    counts = torch.ones_like(values, dtype=torch.bool) if weights is None else weights > 0
    low = values.masked_fill(~counts, torch.inf).amin(-1)
    return values.masked_fill(~counts, -torch.inf).amax(-1) > low


def _prepared(
    a: Any, b: Any, names: tuple[str, str], weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    first, second = _numbers(a, names[0]), _numbers(b, names[1])
    if weights is None:
        first, second = _together(first, second)
        return first, second, None
    first, second, weights = _together(first, second, _numbers(weights, "weights"))
    return first, second, weights


def r_squared(whole: Tensor, gated: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """1 - mean squared difference / variance of the whole network's values.

    Not a correlation: 1 means equal values, 0 as good as always giving the mean, and below 0
    worse than that.

    Args:
        whole: (..., N), values of the whole network.
        gated: (..., N), values of the gated network.
        weights: (..., N), how much each image counts, in the mean as in the variance; None:
            all the same.

    Returns:
        float64 (...); NaN where ``whole`` does not vary.

    Raises:
        ValueError: If values hold NaN, weights are negative, or the shapes do not fit.

    Example:
        >>> r_squared(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 1.0]))
        tensor(0.5000, dtype=torch.float64)
    """
    whole, gated, weights = _prepared(whole, gated, ("whole", "gated"), weights)
    share = _shares(weights, whole)
    mean = (share * whole).sum(-1, keepdim=True)
    variance = (share * (whole - mean).square()).sum(-1)
    error = (share * (whole - gated).square()).sum(-1)
    return torch.where(_varies(whole, weights), 1 - error / variance, torch.nan)


def spearman(a: Tensor, b: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Spearman's rank correlation: Pearson's correlation of the midranks.

    With whole-numbered weights it is exactly the rank correlation of the larger set in which each
    image occurs as often as its weight says.

    Args:
        a: (..., N).
        b: (..., N).
        weights: (..., N), how often each image counts; None: once.

    Returns:
        float64 (...) in [-1, 1]; NaN where ``a`` or ``b`` does not vary.

    Raises:
        ValueError: If values hold NaN, weights are negative, or the shapes do not fit.

    Example:
        >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 30.0, 20.0]))
        tensor(0.5000, dtype=torch.float64)
    """
    a, b, weights = _prepared(a, b, ("a", "b"), weights)
    share = _shares(weights, a)
    x, y = _midranks(a, weights), _midranks(b, weights)
    x = x - (share * x).sum(-1, keepdim=True)
    y = y - (share * y).sum(-1, keepdim=True)
    covariance = (share * x * y).sum(-1)
    # Two square roots, so that equal rankings give 1 up to rounding, never more.
    scale = (share * x * x).sum(-1).sqrt() * (share * y * y).sum(-1).sqrt()
    known = _varies(a, weights) & _varies(b, weights)
    return torch.where(known, (covariance / scale).clamp(-1, 1), torch.nan)


def balanced_weights(own: Tensor) -> Tensor:
    """Weights with which own and other images count the same in all.

    Each own image counts as often as there are other images, and the other way round: whole
    numbers, so that a rank correlation with them is that of a balanced set.

    Args:
        own: bool (..., N).

    Returns:
        float64 (..., N); all zero where there are no own or no other images.

    Example:
        >>> balanced_weights(torch.tensor([True, False, False, False]))
        tensor([3., 1., 1., 1.], dtype=torch.float64)
    """
    n_own = own.sum(-1, keepdim=True, dtype=torch.float64)
    n_other = own.shape[-1] - n_own
    empty = (n_own == 0) | (n_other == 0)
    return torch.where(empty, 0.0, torch.where(own, n_other, n_own))


def fidelity(whole: Tensor, gated: Tensor, own: Tensor, *, ranks: bool = False) -> Tensor:
    """How well the gated network keeps a task output, over own and other images in equal parts.

    Args:
        whole: (..., N), the task output of the whole network.
        gated: (..., N), the task output of the sub-architecture.
        own: bool (..., N), which images are the task's own.
        ranks: False: :func:`r_squared`; True: :func:`spearman`; both with :func:`balanced_weights`.

    Returns:
        float64 (...); NaN where there are no own or no other images, or the whole network's
        output does not vary. A gated output that does not vary has no ranking: 0 with ``ranks``.

    Raises:
        ValueError: If values hold NaN or the shapes do not fit.

    Example:
        >>> own = torch.tensor([True, False, False])
        >>> fidelity(torch.tensor([4.0, 0.0, 0.0]), torch.tensor([2.0, 0.0, 0.0]), own)
        tensor(0.5000, dtype=torch.float64)
    """
    weights = balanced_weights(own)
    if not ranks:
        return r_squared(whole, gated, weights=weights)
    # Not NaN: a dead sub-architecture would drop out of the mean, and so improve it.
    whole, gated, weights = _together(whole, gated, weights)
    dead = _varies(whole, weights) & ~_varies(gated, weights)
    return torch.where(dead, 0.0, spearman(whole, gated, weights=weights))


def fit_threshold(scores: Tensor, positive: Tensor) -> Tensor:
    """The threshold t at which "score > t" has the highest balanced accuracy.

    It lies half-way between two different neighbouring scores, so that equal scores are never
    torn apart, or is infinite where no threshold does better than always saying no. Of equally
    good ones the highest is taken.

    Args:
        scores: (..., N), finite.
        positive: bool (..., N); leading axes broadcast against those of ``scores``.

    Returns:
        float64 (...); NaN where there is no positive or no negative.

    Raises:
        TypeError: If ``positive`` is not boolean.
        ValueError: If scores hold NaN or the shapes do not fit.

    Example:
        >>> fit_threshold(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([False, False, True]))
        tensor(2., dtype=torch.float64)
    """
    positive = _flags(positive)
    scores, positive = _together(_numbers(scores, "scores"), positive)
    n_positive = positive.sum(-1, keepdim=True, dtype=torch.float64)
    n_negative = positive.shape[-1] - n_positive
    if positive.shape[-1] == 0:
        return torch.full(scores.shape[:-1], torch.nan, dtype=torch.float64, device=scores.device)
    # From the highest score down: after the first i images, t would lie below the i-th score.
    ordered, order = scores.sort(dim=-1, descending=True)
    hits = positive.gather(-1, order).cumsum(-1).double()
    called = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=torch.float64)
    # Twice the balanced accuracy less one: recall - FPR. Only between different scores.
    gain = hits / n_positive - (called - hits) / n_negative
    gain = gain[..., :-1].masked_fill(ordered[..., :-1] == ordered[..., 1:], -torch.inf)
    upper, lower = ordered[..., :-1], ordered[..., 1:]
    middle = lower + (upper - lower) / 2
    middle = torch.where(middle < upper, middle, lower)  # neighbouring numbers have none
    between = torch.nn.functional.pad(middle, (1, 0), value=torch.inf)
    best = torch.nn.functional.pad(gain, (1, 0)).argmax(-1, keepdim=True)  # none called: 0
    known = (n_positive > 0) & (n_negative > 0)
    return torch.where(known, between.gather(-1, best), torch.nan)[..., 0]


def balanced_accuracy(calls: Tensor, positive: Tensor) -> Tensor:
    """(share of positives above + share of negatives not above the threshold) / 2.

    Args:
        calls: bool (..., N).
        positive: bool (..., N); leading axes broadcast against those of ``calls``.

    Returns:
        float64 (...); NaN where there is no positive or no negative.

    Raises:
        TypeError: If an argument is not boolean.
        ValueError: If the shapes do not fit.

    Example:
        >>> calls = torch.tensor([True, True, False, False])
        >>> balanced_accuracy(calls, torch.tensor([True, False, False, False]))
        tensor(0.8333, dtype=torch.float64)
    """
    calls, positive = _together(_flags(calls, "calls"), _flags(positive))
    return (share_of(calls, positive) + 1 - share_of(calls, ~positive)) / 2


def among(counts: Tensor, measure: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """A measure of each row (R,) over the images that count for it; all arguments are (R, N).

    Example:
        >>> own = torch.tensor([[True, False, False]])
        >>> among(torch.tensor([[True, True, False]]), auc, torch.tensor([[2.0, 1.0, 3.0]]), own)
        tensor([1.], dtype=torch.float64)
    """
    if bool(counts.all()):
        return measure(*values)
    rows = zip(counts, *values, strict=True)
    return torch.stack([measure(*(v[kept] for v in row)) for kept, *row in rows])


def share_of(flags: Tensor, among: Tensor) -> Tensor:
    """Share of True in ``flags`` (..., N) among the images that count; NaN where none does."""
    count = among.sum(-1, dtype=torch.float64)
    return (flags & among).sum(-1, dtype=torch.float64) / count


def measures_of_rows(
    tasks: Sequence[Task],
    outputs: Tensor,
    whole: Tensor,
    margins: Tensor,
    whole_margins: Tensor,
    calls: Tensor,
    labels: Tensor,
    own: Tensor,
    known: Tensor,
    of_targets: bool,
) -> dict[str, Tensor]:
    """Fidelities, margin AUC, recall, FPR and other accuracy of R rows, (R,) each.

    All tensors are (R, N), but the labels, (N,) or (N, K). A measure that has no meaning for these
    labels or targets is NaN.
    """
    rest = known & ~own
    nothing = torch.full((len(tasks),), torch.nan, dtype=torch.float64, device="cpu")
    found = {
        "fidelity": among(known, fidelity, whole, outputs, own),
        "rank_fidelity": among(known, partial(fidelity, ranks=True), whole, outputs, own),
    }
    if labels.ndim == 1:
        called = torch.stack(
            [own_images(call, [task])[0] for call, task in zip(calls, tasks, strict=True)]
        )
        # Without other classes the margin is infinite for every image.
        margin_auc = auc(constant_up_to_rounding(margins, whole_margins), own)
        found["margin_auc"] = torch.where(torch.isfinite(margins).any(-1), margin_auc, torch.nan)
        found["other_accuracy"] = share_of(calls == labels, rest)
    else:
        called = margins > 0
        found |= {"margin_auc": nothing, "other_accuracy": nothing}
    if of_targets:
        return found | {"recall": nothing, "fpr": nothing}
    return found | {"recall": share_of(called, own), "fpr": share_of(called, rest)}


def constant_up_to_rounding(values: Tensor, whole: Tensor) -> Tensor:
    """Make outputs (..., N) constant that vary by rounding alone, measured by the whole network's.

    Rounding depends on an image's place in its batch, and so on its class if the data are in
    order: ranks would take it for evidence.
    """
    if values.shape[-1] == 0:
        return values
    scale = torch.maximum(values.abs().amax(-1), whole.abs().amax(-1))
    constant = values.amax(-1) - values.amin(-1) <= ROUNDING * scale
    return torch.where(constant[..., None], values[..., :1], values)
