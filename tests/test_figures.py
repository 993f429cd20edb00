"""Figures: their content, and what they do not change."""

from __future__ import annotations

import io
import itertools
import re
import sys
from importlib import resources

import numpy as np
import pytest
import torch
from torch import nn

from nad_attr.evaluation.figures.curves import plot_curves
from nad_attr.evaluation.sweeps.curves import Curves, curves
from nad_attr.flow.plot import _COLOURS
from nad_attr.plots import style as figures
from nad_attr.sites.site import GateSite
from tests.test_size_sweep import made

pytest.importorskip("matplotlib")


def some_curves() -> Curves:
    net = nn.Sequential(nn.Identity()).eval()
    data = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 3.0]]), [0, 0, 1, 1]
    return curves(
        net, {"0": torch.eye(2)}, data, sites=[GateSite("0", 2, 1)], tasks=[0, 1], sizes=[0.5]
    )


def names(axis) -> list[str]:
    return axis.get_legend_handles_labels()[1]


def line_of(axis, name: str):
    return next(line for line in axis.lines if line.get_label() == name)


def draw(figure) -> None:
    figure.savefig(io.BytesIO(), format="png")


# ---------------------------------------------------------------------------------------------
# The shared parts
# ---------------------------------------------------------------------------------------------


def test_new_figure_and_panels() -> None:
    figure, axes = figures.new_figure(2, 3, panel=(2.0, 1.0), extra=(0.5, 0.25))
    assert axes.shape == (2, 3)
    assert figure.get_size_inches().tolist() == [6.5, 2.25]
    figure, flat = figures.panels(5, columns=3)
    assert len(flat) == len(figure.axes) == 5
    assert figures.panels(5, np.array(flat))[1] == flat
    assert figures.panels(1, flat[0])[0] is figure
    with pytest.raises(ValueError, match="5 axes were given for 2 panels"):
        figures.panels(2, flat)
    with pytest.raises(TypeError, match="matplotlib Axes"):
        figures.panels(1, "axes")
    with pytest.raises(ValueError, match="at least one panel"):
        figures.new_figure(0, 1)


def test_panels_of_a_sub_figure() -> None:
    whole, _ = figures.new_figure()
    part = whole.subfigures(1, 2)[1]
    assert figures.panels(1, part.subplots())[0] is whole


def test_line_styles_can_be_told_apart() -> None:
    styles = figures.line_styles([f"m{i}" for i in range(20)] + ["random"])
    looks = {(s["color"], s["marker"], s["linestyle"]) for s in styles.values()}
    assert len(looks) == 21
    first = [styles[f"m{i}"] for i in range(len(figures.PALETTE))]
    assert len({s["color"] for s in first}) == len({s["marker"] for s in first}) == len(first)
    assert styles["random"]["color"] == figures.GREY


#: Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
EYES = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}


def linear(colour: str) -> np.ndarray:
    from matplotlib.colors import to_rgb

    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def seen(colour: str, eyes: str) -> np.ndarray:
    """CIE Lab under D65 of what such eyes see."""
    xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    ) @ np.clip(EYES[eyes] @ linear(colour), 0, 1)
    x, y, z = (
        v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz / [0.9505, 1.0, 1.0890]
    )
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_seen_colours_are_those_worked_out_by_others() -> None:
    # CIE Lab of sRGB's primaries, as in Lindbloom's tables (D65).
    for colour, lab in {
        "#FF0000": (53.24, 80.09, 67.20),
        "#0000FF": (32.30, 79.19, -107.86),
    }.items():
        np.testing.assert_allclose(seen(colour, "normal"), lab, atol=0.1)
    # The confusions that give the deficiencies their names.
    for one, other, eyes in (("#D00000", "#606000", "deuteranopia"),):
        apart = [np.linalg.norm(seen(one, e) - seen(other, e)) for e in ("normal", eyes)]
        assert apart[1] < apart[0] / 2


def test_palette_is_visible_on_white_and_apart() -> None:
    for colour in (*figures.PALETTE, figures.GREY):
        luminance = linear(colour) @ [0.2126, 0.7152, 0.0722]
        assert 1.05 / (luminance + 0.05) > 2  # contrast to white
    for eyes in EYES:
        colours = [seen(c, eyes) for c in figures.PALETTE]
        for i, a in enumerate(colours):
            assert all(np.linalg.norm(a - b) > 8 for b in colours[i + 1 :])


def test_colours_of_a_flow_are_apart_for_all_eyes() -> None:
    """Two classes, and the choice of channels, on the page and in the figure; signs are dashes."""
    style = (resources.files("nad_attr.report") / "static" / "report.css").read_text()
    themes = [dict(re.findall(r"--(\w+): (#[0-9a-f]{3,6})\b", rules))
              for rules in re.findall(r"\{([^{}]*--a: [^{}]*)\}", style)]  # fmt: skip
    assert len(themes) == 4  # light, dark by the system, dark by choice, paper
    sets = [
        ([*_COLOURS], "#ffffff"),
        *([[t["a"], t["b"], t["both"]], t.get("card", "#ffffff")] for t in themes),
    ]
    for colours, ground in sets:
        for eyes in EYES:
            for one, other in itertools.combinations([*colours, ground], 2):
                assert np.linalg.norm(seen(one, eyes) - seen(other, eyes)) > 30, (one, other, eyes)


def test_line_leaves_nan_out() -> None:
    _, axes = figures.new_figure()
    axis = axes[0, 0]
    figures.line(axis, [1, 2, 3], [0.1, np.nan, 0.3], low=[0, 0, np.nan], high=[1, 1, 1], label="a")
    assert axis.lines[0].get_xdata().tolist() == [1, 3]
    figures.line(axis, [1], [np.nan], low=[np.nan], high=[np.nan], label="b")
    assert len(axis.collections) == 1


def test_size_axis_labels_do_not_overlap() -> None:
    _, axes = figures.new_figure()
    axis = axes[0, 0]
    figures.size_axis(axis, [0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8], log=False)
    texts = [tick.get_text() for tick in axis.get_xticklabels()]
    assert texts == ["1", "", "", "10", "20", "40", "60", "80"]
    assert axis.get_xscale() == "linear"
    figures.size_axis(axis, [0.0, 0.01, 0.1, 1.0])
    assert axis.get_xscale() == "log"
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["1", "10", "100"]
    figures.size_axis(axis, [0.5])
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["50"]


def test_legend_names_each_line_once() -> None:
    figure, flat = figures.panels(2)
    height = figure.get_figheight()
    for axis in flat:
        figures.line(axis, [0, 1], [0, 1], label="a")
        figures.line(axis, [0, 1], [1, 0], label="b")
    figures.legend(figure, flat, order=["b"])
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["b", "a"]
    assert figure.get_figheight() > height
    figures.legend(figure, flat, own_figure=False)
    assert [text.get_text() for text in flat[0].get_legend().get_texts()] == ["a", "b"]
    empty, axes = figures.new_figure()
    figures.legend(empty, list(axes.flat))
    assert not empty.legends


def test_missing_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"nad-attr\[plot\]"):
        made().plot()


def test_missing_pandas_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    for result in (made(), some_curves()):
        with pytest.raises(ImportError, match=r"nad-attr\[plot\]"):
            result.frame()


# ---------------------------------------------------------------------------------------------
# whether, curves
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_whether_has_a_panel_per_measure_and_a_line_per_method() -> None:
    result = made(n_sizes=4, n_methods=3)
    figure = result.plot()
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles[:4] == ["own AUC", "other AUC", "disentanglement", "fidelity (R²)"]
    assert titles[4:] == ["rank fidelity", "recall", "FPR", "balanced accuracy"]
    expected = ["method 0", "method 1", "method 2", "random (3 draws)", "whole network"]
    for axis, measure in zip(figure.axes, ["own_auc", "other_auc"], strict=False):
        assert sorted(names(axis)) == expected
        for method in result.methods:
            line = line_of(axis, method)
            np.testing.assert_allclose(line.get_ydata(), result.mean(method, measure))
            np.testing.assert_allclose(line.get_xdata(), result.sizes)
        whole = line_of(axis, "whole network")
        assert whole.get_linestyle() == "--"
        assert whole.get_ydata()[0] == pytest.approx(result.whole[measure].mean())
        assert len(axis.collections) == 4  # bands
        assert axis.get_xscale() == "log"
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == expected
    draw(figure)


@pytest.mark.slow
def test_whether_draws_into_given_axes() -> None:
    result = made(n_sizes=4, n_random=0)
    figure, axes = figures.new_figure(1, 2)
    size = figure.get_size_inches().tolist()
    found = result.plot(["recall", "fpr"], log=False, axes=axes)
    assert found is figure
    assert [axis.get_title(loc="left") for axis in axes.flat] == ["recall", "FPR"]
    assert not figure.legends
    assert axes[0, 0].get_legend() is not None
    assert figure.get_size_inches().tolist() == size
    assert axes[0, 0].get_xscale() == "linear"
    assert "random (0 draws)" not in names(axes[0, 0])
    with pytest.raises(ValueError, match="empty"):
        result.plot([])
    with pytest.raises(ValueError, match="2 axes"):
        result.plot(["recall"], axes=axes)
    draw(figure)


@pytest.mark.slow
def test_one_task_has_no_band() -> None:
    figure = made(n_sizes=2, n_tasks=1, n_random=0).plot(["ba"])
    assert len(figure.axes[0].collections) == 0
    draw(figure)


@pytest.mark.slow
def test_curves_of_one_ranking() -> None:
    figure = some_curves().plot()
    [axis] = figure.axes
    assert names(axis) == [
        "top channels kept, S",
        "top channels removed, N",
        "whole network",
        "all closed",
    ]
    assert line_of(axis, "top channels kept, S").get_ydata().tolist() == [0.5, 1, 1]
    assert line_of(axis, "top channels removed, N").get_ydata().tolist() == [1, 0.5, 0.5]
    assert line_of(axis, "top channels kept, S").get_xdata().tolist() == [0, 0.5, 1]
    assert axis.get_title(loc="left") == "own AUC: delta 0.250"
    draw(figure)
    log = some_curves().plot("fidelity", log=True).axes[0]
    assert line_of(log, "top channels kept, S").get_xdata().tolist() == [0.5, 1]


@pytest.mark.slow
def test_curves_of_several_methods() -> None:
    result = some_curves()
    figure = plot_curves({"a": result, "b": result})
    assert [axis.get_title(loc="left") for axis in figure.axes] == [
        "top channels kept",
        "top channels removed",
    ]
    for axis in figure.axes:
        assert names(axis) == ["a", "b", "whole network", "all closed"]
    scaled = plot_curves({"a": result}, normalised=True)
    assert [axis.get_title(loc="left") for axis in scaled.axes] == [
        "faithfulness (own AUC)",
        "completeness (own AUC)",
    ]
    assert line_of(scaled.axes[1], "a").get_ydata().tolist() == [0, 1, 1]
    draw(figure)
    with pytest.raises(TypeError, match="Curves"):
        plot_curves({"a": 1})
    with pytest.raises(ValueError, match="no curves"):
        plot_curves({})


@pytest.mark.slow
def test_nothing_global_is_touched() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw(made(n_sizes=3).plot())
    draw(some_curves().plot())
    assert dict(matplotlib.rcParams) == before
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []
