"""How results show themselves in notebooks, and the figures of gates."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch

from nad_attr import GateSite, SubArchitecture, TaskGates
from nad_attr._display import bar, html_table, html_text
from nad_attr.concepts import Comparison, Concept, UnitConcepts, association
from nad_attr.evaluation import (
    along_depth,
    curves,
    errors,
    evaluate,
    explain_error,
    plot_architecture,
    plot_overlap,
    plot_sizes,
)
from nad_attr.plots.clustering import cluster_order

from .helpers import TinyCNN, build, labelled_images

SITES = (GateSite("relu1", 6), GateSite("relu2", 8))
EVIL = "<img src=x onerror=alert(1)>"


def make_gates(n: int = 3, names: list[str] | None = None) -> TaskGates:
    generator = torch.Generator().manual_seed(1)
    gates = {s.name: torch.rand(n, s.n_channels, generator=generator) for s in SITES}
    return TaskGates(gates, SITES, range(n), task_names=names)


class _Checked(HTMLParser):
    """Well-formed, without scripts or fixed colours of text and ground."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == []
        assert "script" not in self.tags
        assert "background:transparent" in text
        assert "color:inherit" in text
        assert "#fff" not in text.lower()
        assert "white" not in text.lower()
        self.text = " ".join(self.words)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.open.append(tag)
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attributes)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def shown(result: Any) -> _Checked:
    return _Checked(result._repr_html_())


# ---------------------------------------------------------------------------------------------
# Display
# ---------------------------------------------------------------------------------------------


def test_tables_escape_everything() -> None:
    text = html_table(EVIL, [EVIL], [[EVIL]], note=EVIL)
    assert "<img" not in text
    assert _Checked(text).text.count(EVIL) == 4
    assert _Checked(html_text(EVIL)).text == EVIL


@pytest.mark.parametrize(
    ("share", "width"), [(0.25, "25.0%"), (3.0, "100.0%"), (-1.0, "0.0%"), (float("nan"), "0.0%")]
)
def test_bars_stay_in_their_box(share: float, width: str) -> None:
    assert f"width:{width}" in bar(share)


def test_gates_show_tasks_and_sites() -> None:
    gates = make_gates(3, ["cat", EVIL, "dog"])
    page = shown(gates)
    assert EVIL in page.text
    assert "img" not in page.tags
    assert "3 tasks, 2 sites, 14 channels" in page.text
    assert {"relu1", "relu2", "cat", "dog"} <= set(page.words)
    for arch in gates.sub_architectures():
        assert str(arch.n_kept) in page.words
    assert len(make_gates(500)._repr_html_()) < 30_000
    assert "and 488 more tasks" in shown(make_gates(500)).text


def test_sub_architecture_shows_its_sites() -> None:
    arch = make_gates().sub_architecture(1)
    page = shown(arch)
    kept = int(arch["relu1"].sum())
    assert f"{kept} of 6" in page.words
    assert "of task 1" in page.text
    many = [GateSite(f"s{i}", 1) for i in range(40)]
    assert "and 16 more sites" in shown(SubArchitecture.full(many)).text


def test_evaluation_shows_recall_only_beside_what_it_has_to_beat() -> None:
    model, gates, data = build(TinyCNN), make_gates(), labelled_images(12)
    bare = evaluate(model, gates, data, n_random=0)
    assert "recall" not in shown(bare).text
    full = evaluate(model, gates, data, n_random=1, rivals={EVIL: gates.sub_architectures()})
    page = shown(full)
    for word in ("recall", "FPR", "mean", "random, same size", "whole network", EVIL):
        assert word in page.text
    assert f"{full.mean('own_auc'):.3f}" in page.text
    assert "The whole network" in shown(full.whole).text


def test_other_results_show_their_summaries() -> None:
    model, gates, data = build(TinyCNN), make_gates(names=["a", "b", EVIL]), labelled_images(12)
    units = UnitConcepts({"relu1": np.full((6, 1), 0.1)}, [Concept(EVIL)], source=EVIL)
    results = [
        curves(model, gates, data, sizes=[0.5]),
        errors(model, gates, data, voting=False, n_permutations=5),
        along_depth(gates),
        units,
        Comparison.of([association([True, False, True], [True, False, False])]),
    ]
    for result in results:
        page = shown(result)
        assert page.tags == ["pre"]
        assert page.text == result.summary()
    with torch.no_grad():
        calls = model(data[0]).argmax(1)
    wrong = int((calls != data[1]).nonzero()[0])
    found = explain_error(model, gates, data[0][wrong], int(data[1][wrong]))
    assert shown(found).text == str(found)


# ---------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------

pytest.importorskip("matplotlib")


def test_architecture_has_a_cell_for_each_channel() -> None:
    gates = make_gates(3, ["cat", "dog", "cow"])
    figure = plot_architecture(gates, "cat", "dog")
    cells = figure.axes[0].images[0].get_array()
    cat, dog = gates.sub_architecture("cat"), gates.sub_architecture("dog")
    values = cells.compressed() if np.ma.isMaskedArray(cells) else cells[~np.isnan(cells)]
    counts = [int((values == kind).sum()) for kind in range(4)]
    assert counts == [
        (~(cat | dog)).n_kept, (cat - dog).n_kept, (dog - cat).n_kept, (cat & dog).n_kept,
    ]  # fmt: skip
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "only cat", "only dog", "both", "neither",
    ]  # fmt: skip
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["relu1", "relu2"]


def test_architecture_of_one_and_of_two_sub_architectures() -> None:
    gates = make_gates()
    a, b = gates.sub_architecture(0), gates.sub_architecture(1)
    alone = plot_architecture(a)
    assert alone.axes[0].get_title(loc="left") == f"0: {a.n_kept} of 14 channels"
    pair = plot_architecture(a, other=b, axes=alone.axes[0])
    assert pair is alone
    with pytest.raises(ValueError, match="say which with task="):
        plot_architecture(gates)
    with pytest.raises(TypeError, match="one task and size already"):
        plot_architecture(a, 0)
    with pytest.raises(TypeError, match="TaskGates or a SubArchitecture"):
        plot_architecture(3)
    with pytest.raises(ValueError, match="different gate sites"):
        plot_architecture(a, other=SubArchitecture.full([GateSite("x", 2)]))
    with pytest.raises(KeyError):
        plot_architecture(gates, 99)


def test_sizes_are_those_of_the_sub_architectures() -> None:
    gates = make_gates()
    axis = plot_sizes(gates, [2]).axes[0]
    mean, own = axis.lines
    archs = gates.sub_architectures()
    np.testing.assert_allclose(own.get_ydata(), list(archs[2].sizes.values()))
    np.testing.assert_allclose(
        mean.get_ydata(), np.mean([list(arch.sizes.values()) for arch in archs], axis=0)
    )
    single = plot_sizes(gates.select([1]))
    assert [line.get_label() for line in single.axes[0].lines] == ["1"]
    with pytest.raises(TypeError, match="must be TaskGates"):
        plot_sizes(archs)


def test_overlap_is_a_matrix_in_the_order_of_its_names() -> None:
    gates = make_gates(5)
    axis = plot_overlap(gates, chance_corrected=False).axes[0]
    cells = axis.images[0].get_array()
    order = [int(tick.get_text()) for tick in axis.get_yticklabels()]
    assert sorted(order) == list(range(5))
    archs = gates.sub_architectures()
    for i in range(5):
        assert cells.mask[i, i]
        for j in range(i):
            assert cells[i, j] == pytest.approx(archs[order[i]].overlap(archs[order[j]]))
    assert [t.get_text() for t in plot_overlap(make_gates(50)).axes[0].get_yticklabels()] == []
    with pytest.raises(ValueError, match="at least 2"):
        plot_overlap(make_gates(1))


def test_order_puts_alike_tasks_together() -> None:
    generator = np.random.default_rng(0)
    family = generator.permutation(12) % 3
    similarity = np.where(family[:, None] == family[None], 0.8, 0.1)
    np.fill_diagonal(similarity, 1.0)
    ordered = family[cluster_order(similarity)]
    assert (np.diff(ordered) != 0).sum() == 2
    assert cluster_order(np.eye(2)).tolist() == [0, 1]


def test_figures_leave_pyplot_alone() -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    figure = plot_architecture(make_gates(), 0)
    plot_overlap(make_gates())
    figure.canvas.draw()
    assert pyplot.get_fignums() == before
