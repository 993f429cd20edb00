"""Statistics on plain arrays: values worked out by hand, SciPy, and direct references."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import nad_attr
from nad_attr.concepts import (
    Comparison,
    Statistic,
    association,
    benjamini_hochberg,
    classifier_similarity,
    confusion_similarity,
    kendall,
    mann_whitney,
    mantel,
    overlap_above_chance,
    rank_agreement,
    rank_biased_overlap,
    rank_correlation,
    rbo_weight,
    wordnet_similarity,
)
from nad_attr.stats.agreement import places, rbo_of_places
from nad_attr.stats.p_values import permutation_p
from nad_attr.stats.ranks import midranks
from nad_attr.stats.strata import null_counts

# -- kept against dropped ----------------------------------------------------------------------

values_with_ties = st.lists(st.integers(0, 6), min_size=4, max_size=30)


@given(values_with_ties, st.randoms(use_true_random=False))
def test_mann_whitney_is_scipys(values, random):
    kept = np.array([random.random() < 0.5 for _ in values])
    if kept.all() or not kept.any() or len(set(values)) == 1:
        return
    array = np.array(values, dtype=np.float64)
    result = mann_whitney(kept, array, n_permutations=0)
    u, p = stats.mannwhitneyu(array[kept], array[~kept], use_continuity=False, method="asymptotic")
    assert result.details["u"] == u
    assert result.effect == pytest.approx(u / (kept.sum() * (~kept).sum()))
    assert result.p == pytest.approx(p)
    assert result.details["rank_biserial"] == pytest.approx(2 * result.effect - 1)
    np.testing.assert_array_equal(midranks(array), stats.rankdata(array))


def test_mann_whitney_over_strata_by_hand():
    # a: 3 > 1, 3 > 2: 2 of 2 pairs; b: 5 < 9, 7 < 9: 0 of 2; 8 > 6: c has 1 of 1.
    strata = list("aaabbbcc")
    values = [3.0, 1, 2, 5, 7, 9, 8, 6]
    kept = [True, False, False, True, True, False, True, False]
    result = mann_whitney(kept, values, strata, n_permutations=999)
    assert result.effect == pytest.approx(3 / 5)
    assert (result.n, result.details["pairs"], result.null) == (8, 5.0, 0.5)
    # All 3 x 3 x 2 choices within strata: how many AUCs are as far from one half?
    far = []
    for a, b, c in itertools.product(range(3), range(3), range(2)):
        u = sum(values[a] > values[i] for i in range(3) if i != a)
        u += sum(values[3 + i] > values[3 + b] for i in range(3) if i != b)
        u += values[6 + c] > values[7 - c]
        far.append(abs(u / 5 - 0.5) >= 0.1 - 1e-9)
    many = mann_whitney(kept, values, strata, n_permutations=20_000)
    assert many.p == pytest.approx(np.mean(far), abs=0.015)


def test_mann_whitney_interval_is_delongs():
    generator = np.random.default_rng(0)
    values = np.round(generator.normal(size=40), 1)
    kept = generator.random(40) < 0.4
    high, low = values[kept], values[~kept]
    wins = np.array([[1.0 if x > y else 0.5 if x == y else 0.0 for y in low] for x in high])
    variance = wins.mean(1).var(ddof=1) / len(high) + wins.mean(0).var(ddof=1) / len(low)
    result = mann_whitney(kept, values, n_permutations=0)
    half = 1.959964 * math.sqrt(variance)
    assert result.interval == pytest.approx((wins.mean() - half, wins.mean() + half), rel=1e-6)


def test_unknown_values_and_one_sided_choices():
    result = mann_whitney([True, False, True], [1.0, 0.0, math.nan], n_permutations=9)
    assert (result.n, result.effect) == (2, 1.0)
    everything = mann_whitney([True, True], [1.0, 2.0], n_permutations=9)
    assert math.isnan(everything.effect)
    assert math.isnan(everything.p)
    assert "Nothing can be said" in everything.sentence
    assert mann_whitney([True, False], [math.nan] * 2).n == 0


@pytest.fixture(scope="module")
def simpson():
    """Two layers: in each, kept channels are lower; the layer that is kept more is higher."""
    generator = np.random.default_rng(1)
    strata = np.repeat(["early", "late"], 200)
    kept = generator.random(400) < np.where(strata == "late", 0.9, 0.1)
    values = generator.normal(size=400) + np.where(strata == "late", 4.0, 0.0) - 1.2 * kept
    return kept, values, strata


def test_pooled_tests_are_not_fooled_by_layers(simpson):
    kept, values, strata = simpson
    naive, right = (mann_whitney(kept, values, s, n_permutations=999) for s in (None, strata))
    assert naive.effect > 0.8
    assert naive.p < 0.01
    assert right.effect < 0.4
    assert right.p < 0.01
    assert "lower" in right.sentence
    assert "higher best IoU" in naive.sentence

    naive, right = (rank_correlation(kept, values, s, n_permutations=999) for s in (None, strata))
    assert naive.effect > 0.5
    assert right.effect < 0
    assert right.p < 0.01

    flagged = values > np.where(strata == "late", 4.0, 0.0) - 0.3
    late = values > 2
    assert association(kept, late).effect > 5
    assert association(kept, late).p < 0.001
    assert association(kept, flagged, strata).effect < 1


def test_simpsons_paradox_without_any_effect():
    generator = np.random.default_rng(2)
    strata = np.repeat(["early", "late"], 300)
    kept = generator.random(600) < np.where(strata == "late", 0.8, 0.2)
    values = generator.normal(size=600) + np.where(strata == "late", 2.0, 0.0)
    assert mann_whitney(kept, values).p < 1e-3
    assert mann_whitney(kept, values, strata).p > 0.05
    assert rank_correlation(kept, values, strata).p > 0.05
    flagged = generator.random(600) < np.where(strata == "late", 0.6, 0.1)
    assert association(kept, flagged).p < 1e-6
    assert association(kept, flagged, strata).p > 0.05


# -- gates against values ----------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=5, max_size=25))
def test_rank_correlation_is_scipys(pairs):
    a, b = np.array(pairs, dtype=np.float64).T
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert math.isnan(rank_correlation(a, b, n_permutations=0).effect)
        return
    result = rank_correlation(a, b, n_permutations=0)
    rho = stats.spearmanr(a, b).statistic
    assert result.effect == pytest.approx(rho, abs=1e-12)
    z = rho * math.sqrt(len(a) - 1)
    assert result.p == pytest.approx(2 * stats.norm.sf(abs(z)), abs=1e-12)


def test_rank_correlation_over_strata_by_hand():
    # rho 1 with weight 2, and -1 with weight 1.
    result = rank_correlation(
        [1.0, 2, 3, 5, 6], [10.0, 20, 30, 2, 1], list("aaabb"), n_permutations=9
    )
    assert result.effect == pytest.approx((2 * 1 - 1) / 3)
    interval = rank_correlation(np.arange(30), np.arange(30)[::-1] ** 2 % 7, n_permutations=0)
    rho = interval.effect
    half = 1.959964 * math.sqrt(1.06 / 27)
    ends = (math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half))
    assert interval.interval == pytest.approx(ends, rel=1e-6)


# -- kept and flagged --------------------------------------------------------------------------


@given(st.lists(st.integers(0, 12), min_size=4, max_size=4))
def test_association_is_fishers_test(cells):
    a, b, c, d = cells
    if sum(cells) == 0:
        return
    kept = np.repeat([True, True, False, False], cells)
    flagged = np.repeat([True, False, True, False], cells)
    result = association(kept, flagged)
    ratio, p = stats.fisher_exact([[a, b], [c, d]])
    if math.isnan(ratio) or a * d == b * c == 0:
        assert math.isnan(result.effect)
    else:
        assert result.effect == pytest.approx(ratio)
        assert result.p == pytest.approx(p, rel=1e-6)


def _reference_strata(kept, flagged, strata):
    """Mantel-Haenszel, Robins-Breslow-Greenland and the exact test, step by step."""
    r = s = pr = mixed = qs = 0.0
    outcomes = {0: 1.0}
    observed = 0
    for name in dict.fromkeys(strata):
        rows = [i for i in range(len(kept)) if strata[i] == name]
        n = len(rows)
        a = sum(kept[i] and flagged[i] for i in rows)
        b = sum(kept[i] and not flagged[i] for i in rows)
        c = sum(not kept[i] and flagged[i] for i in rows)
        d = n - a - b - c
        ri, si, pi, qi = a * d / n, b * c / n, (a + d) / n, (b + c) / n
        r, s = r + ri, s + si
        pr, mixed, qs = pr + pi * ri, mixed + pi * si + qi * ri, qs + qi * si
        observed += a
        following: dict[int, float] = {}
        for total, probability in outcomes.items():
            for x in range(min(a + b, a + c) + 1):
                mass = stats.hypergeom.pmf(x, n, a + c, a + b)
                following[total + x] = following.get(total + x, 0.0) + probability * mass
        outcomes = following
    variance = pr / (2 * r * r) + mixed / (2 * r * s) + qs / (2 * s * s)
    own = outcomes[observed]
    p = sum(mass for mass in outcomes.values() if mass <= own * (1 + 1e-7))
    centre, half = math.log(r / s), 1.959964 * math.sqrt(variance)
    return r / s, (math.exp(centre - half), math.exp(centre + half)), min(p, 1.0)


def test_association_over_strata():
    generator = np.random.default_rng(3)
    strata = np.repeat(["a", "b", "c"], [20, 30, 15]).tolist()
    kept = (generator.random(65) < 0.4).tolist()
    flagged = (generator.random(65) < 0.3 + 0.3 * np.array(kept)).tolist()
    ratio, interval, p = _reference_strata(kept, flagged, strata)
    result = association(kept, flagged, strata)
    assert result.effect == pytest.approx(ratio)
    assert result.interval == pytest.approx(interval, rel=1e-6)
    assert result.p == pytest.approx(p, rel=1e-9)


def test_empty_cells():
    kept = [True] * 5 + [False] * 5
    result = association(kept, kept)
    assert result.effect == math.inf
    assert result.p == pytest.approx(2 / math.comb(10, 5))
    assert 1 < result.interval[0] < result.interval[1] < math.inf
    assert "infinite" in result.sentence
    nothing = association(kept, [False] * 10)
    assert math.isnan(nothing.effect)
    assert math.isnan(nothing.p)


def test_distribution_of_counts_is_the_same_by_either_way():
    # Long rows go by Fourier transform.
    kept, flagged, total = np.array([[300.0, 500.0]]), np.array([400.0, 300.0]), np.array([1e3] * 2)
    pmf = null_counts(np.repeat(kept, 6, axis=0), flagged, total)[5]
    one = stats.hypergeom.pmf(np.arange(401), 1000, 400, 300)
    other = stats.hypergeom.pmf(np.arange(301), 1000, 300, 500)
    np.testing.assert_allclose(pmf, np.convolve(one, other), atol=1e-14)
    assert pmf.sum() == pytest.approx(1)


# -- many tests --------------------------------------------------------------------------------


def test_benjamini_and_hochbergs_own_example():
    # Benjamini and Hochberg 1995, section 3.3: at 0.05 the first four are rejected.
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459]
    p += [0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0]
    q = benjamini_hochberg(p)
    assert (q < 0.05).sum() == 4
    assert q[3] == pytest.approx(0.0095 * 15 / 4)
    np.testing.assert_allclose(q, stats.false_discovery_control(p))


@given(st.lists(st.floats(0, 1) | st.just(math.nan), max_size=20))
def test_benjamini_hochberg_is_scipys(p):
    q = benjamini_hochberg(p)
    known = ~np.isnan(p) if p else np.zeros(0, dtype=bool)
    assert np.isnan(q[~known]).all()
    if known.any():
        np.testing.assert_allclose(q[known], stats.false_discovery_control(np.array(p)[known]))


def test_permutation_p_values():
    observed, draws = np.array([2.0, 0.0, math.nan]), np.array([[1.0, -2, 3, math.nan]] * 3)
    p = permutation_p(observed, draws, tail="both")
    assert p[:2].tolist() == [3 / 4, 1.0]
    assert math.isnan(p[2])


# -- agreement ---------------------------------------------------------------------------------


def test_rank_biased_overlap_has_published_values():
    # README of b4ny4n/rankmeasures; doctests of dlukes' rbo; Webber et al. 2010, section 4.3: with
    # p = 0.9 the first ten ranks have 86 % of the weight, with 0.98 the first fifty.
    assert rank_biased_overlap([1, 2, 3, 4, 5], [2, 3, 4, 1, 5], 0.9) == pytest.approx(
        0.828, abs=5e-4
    )
    assert rank_biased_overlap("abcdefg", "bacdefg", 0.9) == pytest.approx(0.9, abs=5e-4)
    assert rank_biased_overlap("abcdefg", "abcdefg", 0.9) == pytest.approx(1)
    assert rbo_weight(0.9, 10) == pytest.approx(0.85558544674735182)
    assert rbo_weight(0.98, 50) == pytest.approx(0.85223391031940043)


def _reference_rbo(a, b, p):
    """Equation 32 of Webber et al., as written there."""
    short, long = sorted((a, b), key=len)
    s, n = len(short), len(long)

    def x(d):
        return len(set(short[:d]) & set(long[:d]))

    total = sum(x(d) / d * p**d for d in range(1, n + 1))
    total += sum(x(s) * (d - s) / (s * d) * p**d for d in range(s + 1, n + 1))
    return (1 - p) / p * total + ((x(n) - x(s)) / n + x(s) / s) * p**n


@given(
    st.permutations(range(9)),
    st.permutations(range(12)),
    st.integers(1, 9),
    st.integers(1, 12),
    st.floats(0.1, 0.99),
)
def test_rank_biased_overlap_of_uneven_rankings(a, b, n_a, n_b, p):
    a, b = list(a[:n_a]), list(b[:n_b])
    assert rank_biased_overlap(a, b, p) == pytest.approx(_reference_rbo(a, b, p))
    assert rank_biased_overlap(a, b, p) == pytest.approx(rank_biased_overlap(b, a, p))


@given(st.permutations(range(11)), st.floats(0.1, 0.99))
def test_rank_biased_overlap_of_scores(order, p):
    scores = np.array(order, dtype=np.float64)
    first, second = -scores.argsort(kind="stable")[::-1], scores
    place = places(np.stack([second, second]), 0, "x")
    reference = places(np.arange(11.0)[None], 0, "y").repeat(2, axis=0)
    lists = np.argsort(place[0]).tolist(), np.argsort(reference[0]).tolist()
    found = rbo_of_places(place, reference, p)
    assert found[0] == found[1] == pytest.approx(rank_biased_overlap(*lists, p))
    assert first.shape == second.shape


def test_ties_do_not_look_like_agreement():
    # Both give nearly all channels the same score: in their order they would agree wholly.
    a, b = np.zeros(200), np.zeros(200)
    a[0] = b[199] = 1
    result = rank_agreement(a, b, n_random=199)
    assert result.p > 0.01
    low, high = result.control_interval
    assert low - 0.1 < result.effect < high + 0.1


def test_kendall_is_scipys():
    generator = np.random.default_rng(4)
    a, b = generator.integers(0, 8, (2, 40)).astype(np.float64)
    result, reference = kendall(a, b), stats.kendalltau(a, b, method="asymptotic")
    assert result.effect == pytest.approx(reference.statistic)
    assert result.p == pytest.approx(reference.pvalue)
    strata = np.repeat([0, 1], 20)
    parts = [stats.kendalltau(a[strata == s], b[strata == s]).statistic for s in (0, 1)]
    assert kendall(a, b, strata).effect == pytest.approx(np.mean(parts), abs=0.01)


def test_overlap_above_chance_is_kappa():
    generator = np.random.default_rng(5)
    a, b = generator.random((2, 60)) < 0.4
    strata = np.repeat([0, 1, 2], 20)
    result = overlap_above_chance(a, b, strata)
    each = [
        nad_attr.gates.channels.kappa(torch.tensor(a[strata == s]), torch.tensor(b[strata == s]))
        for s in range(3)
    ]
    assert result.effect == pytest.approx(np.mean(each))
    assert result.p == pytest.approx(association(a, b, strata).p)
    assert result.control == pytest.approx(0, abs=0.03)
    assert result.control_interval[0] < 0 < result.control_interval[1]
    assert overlap_above_chance(a, a, strata).p < 1e-6


# -- tasks against tasks -----------------------------------------------------------------------


def _symmetric(generator, n):
    matrix = generator.normal(size=(n, n))
    return (matrix + matrix.T) / 2


def test_mantel_against_all_permutations():
    generator = np.random.default_rng(6)
    a, b = _symmetric(generator, 5), _symmetric(generator, 5)
    upper = np.triu_indices(5, 1)
    result = mantel(a, b, n_permutations=9999)
    assert result.n == 10
    assert result.effect == pytest.approx(stats.spearmanr(a[upper], b[upper]).statistic)
    every = [
        stats.spearmanr(a[upper], b[np.ix_(order, order)][upper]).statistic
        for order in itertools.permutations(range(5))
    ]
    exact = np.mean(np.abs(every) >= abs(result.effect) - 1e-9)
    assert result.p == pytest.approx(exact, abs=0.02)


def test_mantel_leaves_out_unknown_tasks():
    generator = np.random.default_rng(7)
    a, b = _symmetric(generator, 6), _symmetric(generator, 6)
    lost = b.copy()
    lost[2], lost[:, 2] = np.nan, np.nan
    rest = [0, 1, 3, 4, 5]
    smaller = mantel(a[np.ix_(rest, rest)], b[np.ix_(rest, rest)], n_permutations=99)
    assert mantel(a, lost, n_permutations=99) == smaller
    single = b.copy()
    single[0, 1] = single[1, 0] = np.nan
    with pytest.raises(ValueError, match="pair of tasks"):
        mantel(a, single)
    with pytest.raises(ValueError, match="symmetric"):
        mantel(a, generator.normal(size=(6, 6)))
    assert math.isnan(mantel(a, np.ones((6, 6))).effect)


def test_mantel_interval_holds_the_effect():
    generator = np.random.default_rng(8)
    place = generator.normal(size=(20, 2))
    near = -np.linalg.norm(place[:, None] - place[None], axis=-1)
    result = mantel(near, near + 0.3 * _symmetric(generator, 20), n_permutations=199)
    assert result.interval[0] < result.effect < result.interval[1]
    assert result.p < 0.01
    assert "share more channels" in result.sentence


class _Sense:
    def __init__(self, name, *above):
        self.name, self.above = name, above

    def hypernyms(self):
        return list(self.above)

    def instance_hypernyms(self):
        return []


class _WordNet:
    """entity > animal > (dog > poodle, cat), entity > road."""

    def __init__(self):
        entity = _Sense("entity")
        animal = _Sense("animal", entity)
        dog = _Sense("dog", animal)
        self.senses = {"entity": entity, "animal": animal, "dog": dog}
        self.senses |= {"poodle": _Sense("poodle", dog), "cat": _Sense("cat", animal)}
        self.senses |= {"traffic_light": _Sense("road", entity)}

    def synsets(self, name, pos):
        assert pos == "n"
        return [self.senses[name]] if name in self.senses else []

    def synset(self, name):
        return self.senses[name.split(".")[0]]

    def synset_from_pos_and_offset(self, pos, offset):
        assert (pos, offset) == ("n", 2084071)
        return self.senses["dog"]


def test_wordnet_path_similarity():
    names = ["poodle", "cat", "traffic light", "zzz, dog", "n02084071", "animal.n.01", "unknown"]
    found = wordnet_similarity(names, _WordNet())
    # poodle - dog - animal - cat: 3 steps; poodle - dog - animal - entity - light: 4 steps
    assert found[0, 1] == pytest.approx(1 / 4)
    assert found[0, 2] == pytest.approx(1 / 5)
    assert found[0, 3] == found[0, 4] == pytest.approx(1 / 2)
    assert found[1, 5] == pytest.approx(1 / 2)
    assert np.isnan(found[6]).all()
    np.testing.assert_array_equal(np.diag(found)[:6], 1.0)
    np.testing.assert_array_equal(found, found.T)
    with pytest.raises(ValueError, match="any of the names"):
        wordnet_similarity(["unknown"], _WordNet())
    with pytest.raises(TypeError, match="list of names"):
        wordnet_similarity("dog", _WordNet())


def test_wordnet_that_is_not_there_says_what_to_do():
    nltk = pytest.importorskip("nltk")
    try:
        nltk.data.find("corpora/wordnet")
    except LookupError:
        with pytest.raises(LookupError, match=r"nltk\.downloader wordnet"):
            wordnet_similarity(["dog"])


def test_similarities_of_classifier_and_confusion():
    weight = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    found = classifier_similarity(weight, [0, (0, 1), 2])
    assert found[0, 2] == pytest.approx(math.sqrt(0.5))
    assert found[0, 1] == pytest.approx(1 / math.sqrt(5))
    with pytest.raises(ValueError, match="classes 0 to 2"):
        classifier_similarity(weight, [5])
    confusion = np.array([[6, 2, 2], [1, 9, 0], [0, 4, 6]])
    found = confusion_similarity(confusion, [0, (1, 2)])
    assert found[0, 1] == pytest.approx((4 / 10 + 1 / 20) / 2)
    assert np.isnan(confusion_similarity([[0, 0], [1, 1]])[0]).all()


# -- bad input and sentences -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mann_whitney([1, 0], [1.0, 2.0]), TypeError, "truth value"),
        (lambda: mann_whitney([True], [1.0, 2.0]), ValueError, "1 for 2 channels"),
        (lambda: mann_whitney([True, False], [1.0, math.inf]), ValueError, "infinity"),
        (lambda: mann_whitney([True, False], [1.0, 2.0], ["a"]), ValueError, "strata"),
        (lambda: mann_whitney([True, False], [1.0, 2.0], level=2), ValueError, "level"),
        (lambda: rank_correlation([1.0], [1.0, 2.0]), ValueError, "1 gates"),
        (lambda: rank_correlation([[1.0]], [1.0]), ValueError, "one number per channel"),
        (lambda: association([True], [True], name="x"), ValueError, "enrichment"),
        (lambda: benjamini_hochberg([2.0]), ValueError, "in \\[0, 1\\]"),
        (lambda: rank_biased_overlap([], [1]), ValueError, "at least one"),
        (lambda: rank_biased_overlap([1, 1], [1]), ValueError, "twice"),
        (lambda: rank_biased_overlap([1], [1], 1.0), ValueError, "between 0 and 1"),
        (lambda: rank_agreement([1.0, math.nan], [1.0, 2.0]), ValueError, "NaN"),
        (lambda: overlap_above_chance([1], [True]), TypeError, "truth values"),
        (lambda: mantel(np.zeros((2, 3)), np.zeros((2, 3))), ValueError, "tasks by tasks"),
        (lambda: confusion_similarity([[1, -1], [0, 1]]), ValueError, "numbers of images"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_sentences_change_with_the_numbers():
    def of(effect, p, test="enrichment"):
        names = {"task": "highway", "concept": "road", "other": "Taylor"}
        return Statistic(
            test, 50, effect, (0.1, 0.9), p, 1.0 if test == "enrichment" else 0.0, names=names
        ).sentence

    assert of(3.0, 0.001) == (
        "The sub-architecture of highway is enriched in road: odds ratio 3.00 (95 % interval 0.100 "
        "to 0.900; p = 0.001)."
    )
    assert "is depleted in road" in of(0.3, 0.001)
    assert "cannot be concluded" in of(3.0, 0.2)
    for test in ("rbo", "kendall", "overlap", "mantel", "depth_trend", "rank_correlation"):
        sentences = {of(0.5, 0.001, test), of(-0.5, 0.001, test), of(0.5, 0.5, test)}
        assert len(sentences) == 3
        assert sum("cannot be concluded" in sentence for sentence in sentences) == 1


# -- extras that are missing -------------------------------------------------------------------


def test_missing_extras_are_named(monkeypatch):
    kept, values = [True, False, True], [3.0, 1.0, 2.0]
    table = Comparison.of([mann_whitney(kept, values, n_permutations=9)])
    for module in ("pandas", "nltk.corpus"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pandas: pip install 'nad-attr\[plot\]'"):
        table.frame()
    with pytest.raises(ImportError, match="pip install nltk"):
        wordnet_similarity(["dog"])
    assert "AUC" in table.summary()
