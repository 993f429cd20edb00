"""Direction of p-values, one rule for ties, one bootstrap."""

from __future__ import annotations

import ast
import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from nad_attr import GateSite, SubArchitecture
from nad_attr.evaluation import evaluate
from nad_attr.evaluation.questions.error_study import Voting
from nad_attr.evaluation.result import Evaluation
from nad_attr.evaluation.sweeps.grid import GRID_MEASURES
from nad_attr.report.parts import evaluation_part
from nad_attr.stats.bootstrap import bootstrap_interval, bootstrap_means, interval_of, times_drawn
from nad_attr.stats.measure_table import MEASURE_TABLE, MEASURES, p_against
from nad_attr.stats.p_values import least_p, permutation_p
from tests.test_evaluation_result import made as evaluation
from tests.test_size_sweep import made as whether_of

PACKAGE = Path(__file__).resolve().parent.parent / "nad_attr"

# -- which way is better -----------------------------------------------------------------------

#: Worked out by hand from what each measure is.
LESS_IS_BETTER = {"fpr", "other_auc", "dead_fraction"}
NEITHER = {"size", "flop_size", "parameter_size", "other_accuracy"}


def with_draws(name: str, observed: float, draws: list[float]) -> Evaluation:
    """A result with one measure's value, and random draws with other values."""

    def one(value: float) -> Evaluation:
        if name in ("own_auc", "other_auc", "disentanglement"):
            off = 0.5 if name == "own_auc" else value if name == "other_auc" else 0.5 - value
            table = np.array([[0.5, off], [off, 0.5]])
            if name == "own_auc":
                table = np.array([[value, 0.5], [0.5, value]])
            return replace(evaluation([0.0, 0.0]), table=table)
        if name == "ba":
            return replace(
                evaluation([0.0, 0.0]), recall=np.full(2, 2 * value - 1), fpr=np.zeros(2)
            )
        return replace(evaluation([0.0, 0.0]), **{name: np.full(2, value)})

    return replace(one(observed), random=tuple(map(one, draws)))


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_has_its_tail_in_results_files_and_reports(name: str, tmp_path) -> None:
    low, high = (with_draws(name, value, [0.3, 0.4, 0.5]) for value in (0.2, 0.6))
    expected = (1 / 4, 1.0) if name in LESS_IS_BETTER else (1.0, 1 / 4)
    for result, p in zip((low, high), expected, strict=True):
        wanted = None if name in NEITHER else p
        assert result.p_value(name) == p or (name in NEITHER and math.isnan(result.p_value(name)))
        result.save(tmp_path / "result.json")
        written = json.loads((tmp_path / "result.json").read_text())
        assert written["p_values"][name] == wanted
        assert written["p_least"] == 1 / 4
        on_page = evaluation_part(result, result.tasks)["p"]
        assert on_page.get(name) == (wanted if name in on_page else None)


@pytest.mark.parametrize("name", GRID_MEASURES)
def test_every_measure_has_its_tail_in_sweeps(name: str) -> None:
    result = whether_of(n_tasks=2, n_random=3)
    random = {m: np.full((3, 1, 2), 0.5) for m in result.random}
    for value, p in ((0.1, 1.0), (0.9, 1 / 4)):
        measured = {"method 0": {m: np.full((1, 2), value) for m in GRID_MEASURES}}
        one = replace(result, random=random, measured={**result.measured, **measured})
        expected = 5 / 4 - p if name in LESS_IS_BETTER else p
        found = one.p_value("method 0", name).tolist()
        assert found == [expected] or (name in NEITHER and math.isnan(found[0]))
    assert result.to_dict()["p_least"] == 1 / 4
    assert "least possible 0.25" in result.summary()


def test_the_fpr_of_the_issue_is_no_success() -> None:
    """An FPR of .74 against random .21 was stored with p = .025."""
    result = with_draws("fpr", 0.74, [0.21] * 39)
    assert result.to_dict()["p_values"]["fpr"] == 1.0
    assert with_draws("fpr", 0.1, [0.21] * 39).p_value("fpr") == 1 / 40


def test_dead_fraction_of_a_real_evaluation() -> None:
    net = torch.nn.Sequential(torch.nn.Identity()).eval()
    data = torch.tensor([[2.0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 3, 0, 0]]), [0, 0, 1, 1]
    site = [GateSite("0", 4, 1)]
    dead, alive = (
        evaluate(
            net,
            [SubArchitecture.from_kept({"0": kept}, site, task=k) for k, kept in enumerate(both)],
            (data[0], torch.tensor(data[1])),
            n_random=9,
        )
        for both in (([2, 3], [2, 3]), ([0], [1]))
    )
    assert dead.mean("dead_fraction") == 1
    assert dead.p_value("dead_fraction") == 1
    assert alive.mean("dead_fraction") == 0
    assert alive.p_value("dead_fraction") < 0.5


def test_no_other_module_says_which_way_is_better() -> None:
    """Only two modules define directions and rules for ties."""
    for path in PACKAGE.rglob("*.py"):
        if path.name in ("measure_table.py", "p_values.py"):
            continue
        text = path.read_text(encoding="utf-8")
        assert "LOWER_IS_BETTER" not in text, path
        for node in ast.walk(ast.parse(text)):
            # (1 + reached) / (n + 1)
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
                over, under = ast.unparse(node.left), ast.unparse(node.right)
                assert not (over.startswith("1 + ") and under.endswith(" + 1")), (path, over)


# -- one rule for ties -------------------------------------------------------------------------


@given(
    observed=st.integers(-5, 5),
    draws=st.lists(st.integers(-5, 5), min_size=1, max_size=12),
    scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e9]),
    wobble=st.integers(0, 99),
)
def test_p_is_the_count_over_whole_numbers(observed, draws, scale, wobble) -> None:
    """Rounding has no effect at any size of numbers."""
    rng = np.random.default_rng(wobble)
    noisy = np.array(draws) * scale * (1 + rng.uniform(-1, 1, len(draws)) * 1e-14)
    n = len(draws)
    for tail, reached in (
        ("higher", sum(d >= observed for d in draws)),
        ("lower", sum(d <= observed for d in draws)),
        ("both", sum(abs(d) >= abs(observed) for d in draws)),
    ):
        expected = float(Fraction(1 + reached, n + 1))
        assert permutation_p(observed * scale, noisy, tail=tail) == pytest.approx(expected)


def test_ties_by_rounding_count_everywhere() -> None:
    """.1 + .2 is a rounding above .3; a draw of the same channels has reached it."""
    above, same = 0.1 + 0.2, 0.3
    assert above > same
    assert permutation_p(above, [same] * 4) == 1
    assert with_draws("fidelity", above, [same] * 3).p_value("fidelity") == 1
    assert with_draws("fidelity", same, [above] * 3).p_value("fidelity", lower=True) == 1
    assert Voting(above, 1.0, (same,) * 3, 1.0, 10).p_value == 1
    result = whether_of(n_tasks=1, n_random=3)
    random = {m: np.full((3, 1, 1), same) for m in result.random}
    own = {"method 0": {m: np.full((1, 1), above) for m in GRID_MEASURES}}
    result = replace(result, random=random, measured={**result.measured, **own})
    assert result.p_value("method 0", "own_auc").tolist() == [1]


def test_unknown_is_nan() -> None:
    nan = math.nan
    assert math.isnan(permutation_p(nan, [1.0]))
    assert math.isnan(permutation_p(1.0, []))
    assert math.isnan(permutation_p(1.0, [nan, nan]))
    assert permutation_p(1.0, [nan, 0.0]) == 1 / 2
    assert permutation_p([[1.0], [nan]], np.zeros((2, 1, 3))).shape == (2, 1)
    assert math.isnan(p_against("size", 0.5, [0.1, 0.2]))
    assert np.isnan(p_against("size", [0.5, 0.5], np.zeros((2, 3)))).all()


def test_p_is_uniform_without_effect() -> None:
    values = np.random.default_rng(0).normal(size=(2000, 10))
    for tail in ("higher", "lower", "both"):
        p = permutation_p(values[:, 0], values[:, 1:], tail=tail)
        counts = np.bincount(np.round(10 * p).astype(int), minlength=11)[1:]
        assert stats.chisquare(counts).pvalue > 1e-3
    assert least_p(3) == 0.25


def test_how_small_p_can_be_is_said() -> None:
    vote = Voting(1.0, 1.0, (0.1, 0.2, 0.3), 1.0, 10)
    assert vote.p_value == least_p(3)
    assert set(MEASURE_TABLE) == set(MEASURES)


# -- one bootstrap -----------------------------------------------------------------------------


def test_rows_are_drawn_with_replacement() -> None:
    generator = np.random.default_rng(4)
    drawn = generator.integers(5, size=(7, 5))
    expected = np.stack([np.bincount(row, minlength=5) for row in drawn])
    ((where, times),) = times_drawn(5, 7, 4)
    assert (where.start, where.stop) == (0, 7)
    np.testing.assert_array_equal(times, expected)
    # Cut into blocks, the draws are the same.
    n = 2_000_001
    first = [times[:1] for _, times in times_drawn(n, 2, 0)]
    assert len(first) == 2
    whole = np.random.default_rng(0).integers(n, size=(2, n))
    for row, times in zip(whole, first, strict=True):
        np.testing.assert_array_equal(times[0], np.bincount(row, minlength=n))


def test_an_interval_is_that_of_the_means_of_rows_drawn() -> None:
    values = np.random.default_rng(1).normal(size=9)
    drawn = np.random.default_rng(3).integers(9, size=(500, 9))
    expected = np.quantile(values[drawn].mean(1), [0.05, 0.95])
    found = bootstrap_interval(values, level=0.9, n_draws=500, seed=3)
    np.testing.assert_allclose(found, expected)
    ends = interval_of(bootstrap_means(values, n_draws=500, seed=3), 0.9)
    np.testing.assert_allclose(ends, expected)
    # Unknown rows are left out.
    with_nan = np.insert(values, 4, math.nan)
    assert bootstrap_interval(with_nan, level=0.9, n_draws=500, seed=3) == found


def test_generators_and_resamplers_are_drawn_from_in_one_module() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert ".multinomial(" not in path.read_text(encoding="utf-8") or "torch" in path.stem, path
