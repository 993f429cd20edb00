"""The conclusion from a statistic, in one sentence that depends on the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

__all__ = ["ALL_TASKS", "DEPTH_MEASURES", "MEASURES", "SIGNIFICANCE_LEVEL", "sentence_of"]

#: The ``task`` of a row about all tasks.
ALL_TASKS = "all tasks"

#: An effect with a smaller p (or q, for many tests together) is not chance.
SIGNIFICANCE_LEVEL = 0.05

#: The name of each test's effect.
MEASURES = {
    "mann_whitney": "AUC",
    "rank_correlation": "Spearman's rho",
    "detectors": "odds ratio",
    "enrichment": "odds ratio",
    "association": "odds ratio",
    "rbo": "rank-biased overlap",
    "kendall": "Kendall's tau",
    "overlap": "kappa",
    "mantel": "Mantel's r",
    "depth_trend": "Spearman's rho",
    "depth": "share",
}

#: Measures at each site along depth, and their names.
DEPTH_MEASURES = {
    "high": "share of high-level detectors",
    "high_of_detectors": "share of high-level concepts among detectors",
    "detectors": "share of detectors",
    "iou": "mean best IoU",
}


def _number(value: float) -> str:
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    if abs(value) < 1:
        return f"{value:.3f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.3g}"


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 0.0001 else f"{value:.0e}"


def _evidence(row: dict[str, Any], level: float) -> str:
    """Interval, control and p-value in brackets."""
    parts = []
    if not math.isnan(row["low"]) and not math.isnan(row["high"]):
        span = f"{_number(row['low'])} to {_number(row['high'])}"
        parts.append(f"{100 * level:g} % interval {span}")
    if not math.isnan(row["control"]):
        control = f"random {_number(row['control'])}"
        if not math.isnan(row["control_low"]):
            control += f", {_number(row['control_low'])} to {_number(row['control_high'])}"
        parts.append(control)
    if not math.isnan(row["q"]):
        parts.append(f"q = {_p(row['q'])}")
    elif not math.isnan(row["p"]):
        parts.append(f"p = {_p(row['p'])}")
    return f" ({'; '.join(parts)})" if parts else ""


def _verdict(row: dict[str, Any]) -> int:
    """1 or -1: above or below chance, with evidence; 0: no conclusion."""
    effect, null = row["effect"], row["null"]
    if math.isnan(effect) or math.isnan(null):
        return 0
    p = row["p"] if math.isnan(row["q"]) else row["q"]
    outside = bool(row["low"] > null or row["high"] < null)
    certain = outside if math.isnan(p) else p < SIGNIFICANCE_LEVEL
    return 0 if not certain or effect == null else (1 if effect > null else -1)


def sentence_of(row: dict[str, Any], level: float = 0.95) -> str:
    """The sentence of one row of a table.

    Args:
        row: ``test``, ``task``, ``site``, ``concept``, ``other``, ``n``, ``effect``, ``low``,
            ``high``, ``p``, ``q``, ``null``, ``control``, ``control_low``, ``control_high``.
        level: Coverage of the interval.

    Example:
        >>> nan = float("nan")
        >>> row = dict(test="mantel", task="", site="", concept="", other="WordNet", n=45)
        >>> row |= dict(effect=0.4, low=0.2, high=0.6, p=0.01, q=nan, null=0.0)
        >>> row |= dict(control=nan, control_low=nan, control_high=nan)
        >>> sentence_of(row)
        'Tasks that are alike by WordNet share more channels: ... (95 % interval ...'
        >>> sentence_of(row | {"p": 0.3})
        'It cannot be concluded that tasks that are alike by WordNet share more channels: ...
    """
    if math.isnan(row["effect"]):
        why = "there is no channel with a known value on one of the sides"
        if row["n"]:
            measure = MEASURES[row["test"]]
            why = f"{row['n']} values do not determine {measure} (a side is empty or equal)"
        return f"Nothing can be said{_where(row)}: {why}."
    write: Callable[[dict[str, Any], int], tuple[str, str]] = _SENTENCES[row["test"]]
    verdict = _verdict(row)
    claim, numbers = write(row, verdict)
    start = "It cannot be concluded that " if verdict == 0 else ""
    text = start + claim
    return f"{text[0].upper()}{text[1:]}: {numbers}{_evidence(row, level)}."


def _where(row: dict[str, Any]) -> str:
    return (f" for {row['task']}" if row["task"] else "") + _at_site(row)


def _of_task(row: dict[str, Any]) -> str:
    return f" of {row['task']}" if row["task"] else ""


def _at_site(row: dict[str, Any]) -> str:
    return f" at {row['site']}" if row["site"] else ""


def _for_task(row: dict[str, Any]) -> str:
    if row["task"] == ALL_TASKS:
        return ", in the mean over tasks,"
    return f" for {row['task']}" if row["task"] else ""


def _channels(row: dict[str, Any]) -> str:
    """Kept channels, of which task and where."""
    return f"channels kept{_for_task(row)}{_at_site(row)}"


def _mann_whitney(row: dict[str, Any], verdict: int) -> tuple[str, str]:
    what = row["concept"] or row["other"] or "best IoU"
    share = f"in {100 * row['effect']:.1f} % of pairs at the same site the kept channel is higher"
    who = _channels(row)
    if verdict == 0:
        return f"{who} differ in {what} from dropped ones", share
    return f"{who} have a {'higher' if verdict > 0 else 'lower'} {what} than dropped ones", share


def _rank_correlation(row: dict[str, Any], verdict: int) -> tuple[str, str]:
    concept = f"the IoU of {row['concept']}" if row["concept"] else "the value"
    numbers = f"rho = {_number(row['effect'])} within sites"
    what = f"gates{_for_task(row)}{_at_site(row)}"
    if verdict == 0:
        return f"{what} go with {concept}", numbers
    return f"{what} {'rise' if verdict > 0 else 'fall'} with {concept}", numbers


def _odds(row: dict[str, Any]) -> str:
    return f"odds ratio {_number(row['effect'])}"


def _detectors(row: dict[str, Any], verdict: int) -> tuple[str, str]:
    who = _channels(row)
    if verdict == 0:
        return f"{who} are detectors more or less often", _odds(row)
    word = "more" if verdict > 0 else "less"
    return f"{who} are detectors {word} often than dropped ones", _odds(row)


def _enrichment(row: dict[str, Any], verdict: int) -> tuple[str, str]:
    who = f"the sub-architecture{_of_task(row)}{_at_site(row)}"
    concept = row["concept"] or "flagged channels"
    if verdict == 0:
        return f"{who} is enriched or depleted in {concept}", _odds(row)
    return f"{who} is {'enriched' if verdict > 0 else 'depleted'} in {concept}", _odds(row)


def _agreement(row: dict[str, Any], verdict: int) -> tuple[str, str]:
    pair = f"NAD and {row['other'] or 'the other ranking'}"
    names = {"rbo": "RBO", "kendall": "tau", "overlap": "kappa"}
    numbers = f"{names[row['test']]} = {_number(row['effect'])}"
    of = f"the channels{_for_task(row)}{_at_site(row)}"
    verb = "choose" if row["test"] == "overlap" else "order"
    if verdict == 0:
        return f"{pair} {verb} {of} alike", numbers
    word = "more alike" if verdict > 0 else "less alike"
    return f"{pair} {verb} {of} {word} than chance", numbers


def _mantel(row: dict[str, Any], verdict: int) -> tuple[str, str]:
    other = f"by {row['other']}" if row["other"] else "by the other measure"
    numbers = f"r = {_number(row['effect'])} over {row['n']} pairs"
    word = "fewer" if verdict < 0 else "more"
    return f"tasks that are alike {other} share {word} channels", numbers


def _depth_trend(row: dict[str, Any], verdict: int) -> tuple[str, str]:
    what = f"the {row['concept'] or 'share of high-level detectors'}"
    groups = {
        "kept": " among kept channels",
        "all": " among all channels",
        "kept - all": " among kept channels beyond that among all channels",
    }
    what += groups.get(row["other"], "")
    numbers = f"rho = {_number(row['effect'])} over {row['n']} sites"
    if verdict == 0:
        return f"{what} rises or falls with depth", numbers
    return f"{what} {'rises' if verdict > 0 else 'falls'} with depth", numbers


def _depth(row: dict[str, Any], verdict: int) -> tuple[str, str]:
    what = f"the {row['concept'] or 'share of high-level detectors'}"
    numbers = f"{_number(row['effect'])} among kept channels{_at_site(row)}"
    if verdict == 0:
        return f"{what} differs from that of random channels", numbers
    return f"{what} is {'higher' if verdict > 0 else 'lower'} than among random channels", numbers


_SENTENCES: dict[str, Callable[[dict[str, Any], int], tuple[str, str]]] = {
    "mann_whitney": _mann_whitney,
    "rank_correlation": _rank_correlation,
    "detectors": _detectors,
    "association": _detectors,
    "enrichment": _enrichment,
    "rbo": _agreement,
    "kendall": _agreement,
    "overlap": _agreement,
    "mantel": _mantel,
    "depth_trend": _depth_trend,
    "depth": _depth,
}
