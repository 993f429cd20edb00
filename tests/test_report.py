"""The report without a browser: what the page says, how it says it, and what it refuses."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from nad_attr import (
    ChannelCertainty,
    GateSite,
    GateStore,
    GateStoreError,
    Recipe,
    RunOptions,
    TaskGates,
)
from nad_attr.concepts import Comparison, Concept, UnitConcepts, mann_whitney
from nad_attr.evaluation import Evaluation, curves, errors, evaluate, mosaics
from nad_attr.gates.history import History
from nad_attr.pictures import class_mosaics
from nad_attr.report import Report
from nad_attr.report.contents import Results, contents, not_there, summary
from nad_attr.report.first import NEWCOMERS
from nad_attr.report.measuring import evenly, example_rows, responses, sampled
from nad_attr.report.overlaps import block_means, overlaps_part
from nad_attr.report.packing import gate_levels, plain, script_json
from nad_attr.report.pictures import is_picture, tensor_picture
from nad_attr.report.saving import found_results, keep_results
from nad_attr.store import write_result
from tests.helpers import invoke

from .helpers import TinyCNN, assert_model_untouched, build, labelled_images

pytest.importorskip("plotly")

SITES = (GateSite("relu1", 6), GateSite("relu2", 8))
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><script>window.owned=1</script>"


def make_gates(n: int = 3, **options: Any) -> TaskGates:
    generator = torch.Generator().manual_seed(1)
    logits = {s.name: torch.randn(n, s.n_channels, generator=generator) for s in SITES}
    options = {"task_names": [f"class {i}" for i in range(n)], **options}
    return TaskGates({k: v.sigmoid() for k, v in logits.items()}, SITES, range(n), **options)


class _Page(HTMLParser):
    """The scripts, ids and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[dict[str, Any]] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.words: list[str] = []
        self._script: dict[str, Any] | None = None
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self._script = {**dict(attributes), "text": ""}
            self.scripts.append(self._script)

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self._script["text"] += data
        else:
            self.words.append(data)

    def ids(self) -> set[str]:
        return {a["id"] for _, a in self.tags if "id" in a}

    def data(self) -> Any:
        return json.loads(next(s["text"] for s in self.scripts if s.get("id") == "data"))


def page_of(report: Report) -> _Page:
    return _Page(report.html())


@pytest.fixture(scope="module")
def measured() -> Report:
    """Everything that a report can measure, on a tiny network."""
    model = build(TinyCNN)
    gates = make_gates()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with assert_model_untouched(model):
        report = Report(gates).measure(model, labelled_images(24), n_images=20, n_random=2)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    return report


# ---------------------------------------------------------------------------------------------
# Packing
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@example([0.5, np.nextafter(0.5, 1.0)], 8)
@example([0.5, np.nextafter(0.5, 1.0)], 4)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40), st.sampled_from([4, 8]))
def test_levels_never_move_a_channel_over_the_threshold(values: list[float], bits: int) -> None:
    half = 2 ** (bits - 1)
    packed = gate_levels(values, bits)
    if bits == 4:
        packed = np.stack([packed >> 4, packed & 15], -1).ravel()[: len(values)]
    found = np.where(
        packed < half, packed / (half - 1) / 2, 0.5 + (packed - float(half)) / (half - 1) / 2
    )
    assert ((packed >= half) == (np.float64(values) > 0.5)).all()
    assert np.abs(found - values).max() <= 0.25 / (half - 1) + 1e-6


def test_bits_other_than_four_and_eight_are_refused() -> None:
    with pytest.raises(ValueError, match="4 or 8"):
        gate_levels([0.5], 2)


@pytest.mark.slow
@given(st.text())
def test_json_in_a_script_comes_back_and_cannot_end_it(text: str) -> None:
    packed = script_json({"name": text})
    assert not set(packed) & set("<>&\u2028\u2029")
    assert json.loads(packed) == {"name": text}


def test_plain_values_are_json() -> None:
    value = {"a": np.float32(np.inf), "b": [np.int64(3), (0.12345678, None)], "c": Path("x")}
    assert plain(value) == {"a": None, "b": [3, [0.1235, None]], "c": "x"}


@pytest.mark.parametrize(
    "text",
    ["javascript:alert(1)", "data:image/svg+xml;base64,AAAA", 'data:image/png;base64,AA"AA', 3],
)
def test_only_pictures_are_pictures(text: object) -> None:
    assert not is_picture(text)


def test_picture_of_a_tensor_has_its_range() -> None:
    picture = tensor_picture(torch.tensor([[[-1.0, 3.0]]]), -1.0, 3.0)
    assert list(picture.getdata()) == [(0, 0, 0), (255, 255, 255)]
    with pytest.raises(ValueError, match="an image has shape"):
        tensor_picture(torch.zeros(2, 3, 3), 0.0, 1.0)


# ---------------------------------------------------------------------------------------------
# Overlaps
# ---------------------------------------------------------------------------------------------


def test_block_means_leave_the_diagonal_out() -> None:
    matrix = np.ones((5, 5)) * 0.25
    np.fill_diagonal(matrix, 1.0)
    small = block_means(matrix, 3)
    # The last block holds the diagonal's last element and nothing else.
    np.testing.assert_allclose(small, [[0.25] * 3, [0.25] * 3, [0.25, 0.25, 1.0]])


def test_overlaps_are_those_of_the_sub_architectures() -> None:
    gates = make_gates(5)
    archs = gates.sub_architectures()
    part = overlaps_part({n: gates[n] > 0.5 for n in gates})
    cells = np.frombuffer(base64.b64decode(part["cells"]), np.uint8).reshape(5, 5) / 127 - 1.0
    for i, a in enumerate(part["order"]):
        for j, b in enumerate(part["order"]):
            kappa = archs[a].overlap(archs[b], chance_corrected=True)
            assert cells[i, j] == pytest.approx(kappa, abs=0.004)
    for row, near in enumerate(part["nearest"]):
        others = [archs[row].overlap(archs[k], chance_corrected=True) for k in range(5) if k != row]
        assert near[0][1] == pytest.approx(max(others), abs=1e-3)
        assert row not in [task for task, _ in near]
    assert overlaps_part({"a": torch.ones(1, 3, dtype=torch.bool)}) is None


# ---------------------------------------------------------------------------------------------
# What the page says
# ---------------------------------------------------------------------------------------------


def _evaluation(scale: float, *, random: Any = (), rivals: Any = None, whole: Any = None) -> Any:
    n = 3
    table = np.full((n, n), 0.5)
    np.fill_diagonal(table, 0.5 + 0.4 * scale)
    return Evaluation(
        tasks=(0, 1, 2), task_names=("class 0", "class 1", "class 2"), n_images=90,
        n_own=np.full(n, 30), size=np.full(n, 0.5), sizes={}, table=table,
        fidelity=np.full(n, 0.8 * scale), rank_fidelity=np.zeros(n), margin_auc=np.zeros(n),
        recall=np.full(n, 0.9 * scale), fpr=np.full(n, 0.2 * scale), other_accuracy=np.zeros(n),
        random=tuple(random), rivals=rivals or {}, _whole=whole,
    )  # fmt: skip


def test_summary_puts_every_number_beside_what_it_has_to_beat() -> None:
    whole = _evaluation(1.2)
    weak, strong = _evaluation(0.4, whole=whole), _evaluation(0.7, whole=whole)
    result = _evaluation(
        1.0, random=[_evaluation(0.0, whole=whole)], rivals={"weak": weak, "strong": strong},
        whole=whole,
    )  # fmt: skip
    gates = make_gates()
    first, second, third = summary(gates, result)
    kept = sum(arch.n_kept for arch in gates.sub_architectures()) / 3
    assert f"keep {kept:,.0f} of 14 channels" in first
    assert "own AUC 0.90 (random channels 0.50; best rival, strong, 0.78; whole" in second
    assert "fidelity 0.80 (random channels 0.00; best rival, strong, 0.56)" in second
    assert "recall is 0.90 at a false-positive rate of 0.20: balanced accuracy 0.85" in third
    assert "best rival, strong, 0.74" in third
    page = page_of(Report(gates, evaluation=result))
    assert third in page.text
    assert {"measured", "chart-auc", "chart-fpr"} <= page.ids()
    # Recall is not shown without the rate of false positives.
    assert "fidelity recall FPR BA these gates" in page.text


def test_size_of_the_measurement_is_said_if_it_is_another() -> None:
    gates = make_gates()
    result = _evaluation(1.0)
    object.__setattr__(result, "size", np.full(3, 0.1))
    assert "and cut at 10 % of the channels" in summary(gates, result)[1]


def test_what_is_not_known_is_left_out_and_named_with_a_command(tmp_path: Path) -> None:
    make_gates().save(tmp_path / "gates.h5")
    report = Report(tmp_path / "gates.h5")
    page = page_of(report)
    assert not page.ids() & {"measured", "curves", "mosaics", "errors", "channels", "learning"}
    assert "nad-attr evaluate gates.h5 --data HELD_OUT --out gates.h5" in page.text
    assert "was not measured" in page.text
    assert "recall" not in page.text.replace("recall, false-positive rate, AUC, fidelity", "")
    assert "nothing measured" in repr(report)


def test_gates_are_in_the_page_bit_by_bit() -> None:
    gates = make_gates()
    page = page_of(Report(gates))
    lines = next(s["text"] for s in page.scripts if s.get("id") == "gates").split("\n")
    assert len(lines) == 3
    for row, line in enumerate(lines):
        levels = np.frombuffer(base64.b64decode(line), np.uint8)
        flat = torch.cat([gates[n][row] for n in gates]).numpy()
        assert ((levels >= 128) == (flat > 0.5)).all()
    counts = np.frombuffer(base64.b64decode(page.data()["counts"]), np.uint32).reshape(3, 2)
    assert counts.tolist() == [[int(a[n].sum()) for n in gates] for a in gates.sub_architectures()]


def test_large_stores_get_four_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nad_attr.report.contents.MAX_GATES_OF_EIGHT_BITS", 10)
    found = Report(make_gates()).contents()
    assert found.data["bits"] == 4
    assert len(base64.b64decode(found.gates[0])) == 7


def test_concepts_and_statistics_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "gates.h5"
    make_gates().save(path)
    iou = {"relu1": np.full((6, 2), [0.2, 0.01]), "relu2": np.full((8, 2), np.nan)}
    UnitConcepts(iou, [Concept("wheel", "part"), Concept("sky")], source="by hand").save(path)
    test = mann_whitney([True] * 8 + [False] * 8, range(16, 0, -1), n_permutations=99)
    Comparison.of([test]).save(path)
    page = page_of(Report(path))
    part = page.data()["units"]
    best = np.frombuffer(base64.b64decode(part["best"]), np.int32)
    assert best.tolist() == [0] * 6 + [-1] * 8
    assert part["counts"] == {"part": 6}
    assert {"channels", "statistics-0"} <= page.ids()
    headings = [a for tag, a in page.tags if tag == "th"]
    assert headings
    assert "Channels kept have a higher best IoU" in page.text
    assert " q " in page.text
    with pytest.raises(ValueError, match="of units of other sites"):
        Report(make_gates(), units=UnitConcepts({"x": [[0.1]]}, [Concept("a")], source=""))


def test_statistics_take_any_frame() -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(
        {"test": ["b", "a"], "p": [0.5, 0.001], "q": [0.5, 0.002], "empty": [np.nan, None]}
    )
    found = Report(make_gates(), comparison={"Mine": frame}).results.statistics["Mine"]
    assert found["columns"] == ["test", "p", "q"]
    assert [row[0] for row in found["rows"]] == ["a", "b"]
    with pytest.raises(TypeError, match=r"frame\(\)"):
        Report(make_gates(), comparison=3)


def test_learning_curves() -> None:
    loss = np.linspace(1, 0, 6)[:, None] * [1.0, 2.0, np.nan]
    page = page_of(Report(make_gates(history=History({"loss": loss}))))
    part = page.data()["history"]
    assert part["steps"] == [1, 2, 3, 4, 5, 6]
    assert part["quantities"][0]["mean"][0] == 1.5
    assert part["quantities"][0]["tasks"][2] == [None] * 6


# ---------------------------------------------------------------------------------------------
# A page that cannot do harm
# ---------------------------------------------------------------------------------------------


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    names = [HOSTILE, "@@GATES@@", "a & b <b>"]
    sites = [GateSite(HOSTILE, 6), GateSite("relu2", 8)]
    old = make_gates()
    gates = TaskGates(
        {HOSTILE: old["relu1"], "relu2": old["relu2"]}, sites, range(3), task_names=names,
        info={"model": HOSTILE, "seed": HOSTILE},
    )  # fmt: skip
    result = _evaluation(1.0, rivals={HOSTILE: _evaluation(0.5)})
    plain_page, page = (
        page_of(Report(old, evaluation=result)),
        page_of(Report(gates, evaluation=result, title=HOSTILE)),
    )
    # Not one element more than with harmless names.
    count = [t for t, _ in page.tags].count
    assert count("img") == 0
    assert count("script") == [t for t, _ in plain_page.tags].count("script") == 4
    assert page.data()["tasks"] == names
    assert not any(k.startswith("on") for _, attributes in page.tags for k in attributes)


def test_page_asks_nothing_of_the_network_and_runs_its_own_scripts_only() -> None:
    page = page_of(Report(make_gates()))
    policy = next(a["content"] for _, a in page.tags if "http-equiv" in a)
    assert "default-src 'none'" in policy
    script = policy.split("script-src")[1].split(";")[0]
    assert "unsafe" not in script
    assert script.count("'sha256-") == 2
    assert not [a for _, a in page.tags if "src" in a]
    links = [a["href"] for t, a in page.tags if t in ("link", "a") and "href" in a]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert sum("Plotly" in s["text"][:4000] or "plotly.js" in s["text"][:400] for s in page.scripts)


@pytest.mark.slow
def test_damaged_results_are_left_out_with_a_note(tmp_path: Path) -> None:
    path = tmp_path / "gates.h5"
    make_gates().save(path)

    def put(name: str, text: str, version: int = 1) -> None:
        about = {"what": f"report {name}", "format": version}
        write_result(
            path, f"report/{name}", {"json": np.frombuffer(text.encode(), np.uint8)}, about
        )

    put("pictures", json.dumps({"album": ["javascript:alert(1)"]}))
    put("mosaics", "[" * 100_000)
    put("errors", "{}")
    put("curves", "[]", version=9)
    node = {"site": 0, "channel": 1, "effect": [0.5], "n": 1}
    link = {"task": 0, "from": 0, "to": 7, "flow": 1.0, "straight": 0.0}
    flow = {"sites": ["a"], "tasks": ["t"], "nodes": [node], "drawn": [1.0], "n_images": [1]}
    put("flow", json.dumps({**flow, "links": [link]}))
    write_result(path, "comparison/comparison", {"test": ["x"]}, {})
    report = Report(path)
    assert (report.results.pictures, report.results.errors) == (None, None)
    assert report.results.flow is None
    assert len(report.results.notes) == 6
    assert "alert(1)" not in report.html()
    assert "What did not work" in page_of(report).text


ERRORS = {
    "n_errors": 3, "n_images": 9, "n_others": 2, "similarity": "kappa", "confused": [],
    "examples": [],
    "rows": [{"name": "x", "hits": {"1": 0.5}, "null": {"1": 0.3}, "p": {"1": 0.1}, "mrr": 0.4}],
}  # fmt: skip
MOSAICS = {
    "n": 8, "n_tasks": 2, "top": 0.1, "sites": ["a"], "excess": [0.1], "low": [0.0], "high": [0.2],
    "tasks": [[0.1], [0.2]], "task_names": ["cat", "dog"], "left_out": {},
    "examples": [
        {
            "mosaic": "data:image/png;base64,AAAA", "coloured": "data:image/png;base64,AAAA",
            "tasks": ["cat", "dog", "cow", "owl"], "shares": [0.1, 0.2, 0.3, 0.4],
        }
    ],
}  # fmt: skip
CURVES = [
    {
        "name": "gates", "measure": "auc", "sizes": [0.0, 1.0], "full": 0.9, "empty": 0.5,
        "delta": 0.1, "n_images": 9,
        **{key: [0.5, 0.9] for key in ("keep", "keep_low", "keep_high")},
        **{key: [0.5, 0.9] for key in ("ablate", "ablate_low", "ablate_high")},
    }
]  # fmt: skip
PICTURES = {"album": ["data:image/png;base64,AAAA"], "top": "AAAAAA==", "per_channel": 1}


def changed(part: object, *where: object, to: object) -> object:
    """A copy in which one thing is another."""
    copy = json.loads(json.dumps(part))
    inner = copy
    for step in where[:-1]:
        inner = inner[step]
    inner[where[-1]] = to
    return copy


MALFORMED = {
    "errors rows": ("errors", changed(ERRORS, "rows", to=[1])),
    "errors hits": ("errors", changed(ERRORS, "rows", 0, "hits", to=None)),
    "errors null": ("errors", changed(ERRORS, "rows", 0, "null", to=[1])),
    "errors mrr": ("errors", changed(ERRORS, "rows", 0, "mrr", to="x")),
    "errors counts": ("errors", changed(ERRORS, "n_errors", to="many")),
    "errors examples": ("errors", changed(ERRORS, "examples", to=5)),
    "three shares": ("mosaics", changed(MOSAICS, "examples", 0, "shares", to=[0.1, 0.2, 0.3])),
    "mosaics top": ("mosaics", changed(MOSAICS, "top", to="x")),
    "mosaics sites": ("mosaics", changed(MOSAICS, "sites", to=None)),
    "mosaics tasks": ("mosaics", changed(MOSAICS, "tasks", to=[[0.1, 0.2]])),
    "curves texts": ("curves", changed(CURVES, 0, "keep", to=["a", "b"])),
    "curves short": ("curves", changed(CURVES, 0, "ablate_low", to=[0.5])),
    "curves number": ("curves", 5),
    "curves of numbers": ("curves", [5]),
    "pictures cut short": ("pictures", changed(PICTURES, "top", to="AAAA")),
    "pictures no base64": ("pictures", changed(PICTURES, "top", to="?")),
    "pictures none": ("pictures", changed(PICTURES, "album", to=None)),
}


def write_part(path: Path, name: str, part: object) -> None:
    text = json.dumps(part).encode()
    about = {"what": f"report {name}", "format": 1}
    write_result(path, f"report/{name}", {"json": np.frombuffer(text, np.uint8)}, about)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_part_is_left_out_with_a_note(tmp_path: Path, name: str, part: object) -> None:
    path = tmp_path / "gates.h5"
    make_gates().save(path)
    well = {"errors": ERRORS, "mosaics": MOSAICS, "curves": CURVES, "pictures": PICTURES}
    for other, good in well.items():
        write_part(path, other, part if other == name else good)
    page = page_of(Report(path))
    data = page.data()
    assert f"No {name}" in page.text
    assert data[name] is None
    assert all(data[other] is not None for other in well if other != name)
    assert page.text.count("cannot be") == 1


def test_results_that_cannot_even_be_read_are_left_out_with_a_note(tmp_path: Path) -> None:
    path = tmp_path / "gates.h5"
    make_gates().save(path)
    write_result(path, "evaluation", {"auc": [0.5]}, {"what": "evaluation", "format": 1})
    write_result(path, "evaluation2", {"auc": [0.5]}, {})
    write_result(path, "comparison/x", {"test": ["x"]}, {"what": "comparison", "format": 1})
    write_result(path, "units/dissection", {"iou.0": [[0.5]]}, {"what": "units", "format": 1})
    with h5py.File(path, "r+") as file:
        del file["evaluation2/auc"]
        file["evaluation2/auc"] = h5py.SoftLink("/nowhere")
    page = page_of(Report(path))
    assert "No evaluation" in page.text
    assert "No statistics" in page.text
    assert "No concepts" in page.text
    assert "Left out" in page.text


# ---------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_everything_is_measured_and_shown(measured: Report) -> None:
    page = page_of(measured)
    assert {"measured", "curves", "errors", "flow", "channels"} <= page.ids()
    assert "mosaics" not in page.ids()  # four tasks at least
    assert measured.results.notes == []
    assert measured.results.evaluation.n_images == 20
    assert all(map(is_picture, page.data()["pictures"]["album"]))


@pytest.mark.skipif(
    not hasattr(getattr(torch.export, "Dim", None), "DYNAMIC"), reason="needs torch >= 2.6"
)
def test_classes_networks_stand_beside_the_whole_one(measured: Report) -> None:
    part = measured.results.export
    assert part is not None
    whole, *own = part["rows"]
    assert whole["name"] == "whole network"
    assert own
    assert all(row["multiply_adds"] < whole["multiply_adds"] for row in own)
    assert all(row["seconds"] > 0 for row in part["rows"])
    assert "What a class&#x27;s network alone costs" in measured.html()


def test_errors_are_explained_as_by_hand(measured: Report) -> None:
    from nad_attr.evaluation import explain_error

    model, gates = build(TinyCNN), make_gates()
    examples = measured.results.errors["examples"]
    assert examples
    sample = sampled(labelled_images(24), 20)
    (inputs,), labels = sample.inputs, sample.labels
    with torch.no_grad():
        calls = model(inputs).argmax(1)
    rows = example_rows(labels.numpy(), calls.numpy(), gates, 12)
    assert len(rows) == len(examples)
    for row, said in zip(rows, examples, strict=True):
        found = explain_error(model, gates, inputs[row], int(labels[row]))
        assert (said["right"], said["called"]) == (found.right, found.called)
        assert said["kappa"] == pytest.approx(found.kappa, rel=1e-3)
        assert said["rank"] == found.rank
        assert said["shared"] == sum(len(site.shared) for site in found.sites)


def test_top_images_are_the_highest_responses() -> None:
    model, gates = build(TinyCNN), make_gates()
    sample = sampled(labelled_images(12), 12)
    calls, highest = responses(model, gates, sample, RunOptions(batch_size=5))
    (x,) = sample.inputs
    with torch.no_grad():
        first = model.relu1(model.bn1(model.conv1(x)))
        assert calls.tolist() == model(x).argmax(1).tolist()
    np.testing.assert_allclose(highest[:, :6], first.amax((2, 3)).numpy(), rtol=1e-5)
    report = Report(gates).measure(model, labelled_images(12), parts=["pictures"], n_images=12)
    part = report.results.pictures
    top = np.frombuffer(base64.b64decode(part["top"]), np.int32).reshape(14, 5)
    order = np.argsort(-highest[:, 0], kind="stable")[:5]
    assert len(set(top[0].tolist())) == 5
    again = Report(gates).measure(
        model, labelled_images(12), parts=["pictures"], n_images=12, run=RunOptions(batch_size=1)
    )
    assert again.results.pictures == part
    assert len(order) == 5


def test_sample_is_even_and_a_function_of_the_seed() -> None:
    labels = torch.tensor([0] * 10 + [1] * 3 + [2] * 10)
    chosen = evenly(labels, 9, seed=0)
    assert labels[chosen].bincount().tolist() == [3, 3, 3]
    assert evenly(labels, 12, seed=0) == evenly(labels, 12, seed=0)
    assert set(chosen) <= set(evenly(labels, 12, seed=0))
    assert evenly(labels, 100, seed=0) == list(range(23))


def test_results_that_are_given_take_the_place_of_measured_ones() -> None:
    model, gates = build(TinyCNN), make_gates()
    data = labelled_images(12)
    result = evaluate(model, gates, data, n_random=0)
    study = errors(model, gates, data, voting=False, n_permutations=10)
    curve = curves(model, gates, data, sizes=[0.5])
    report = Report(gates, evaluation=result, errors=study, curves=curve)
    report.measure(model, data, parts=["pictures"])
    assert report.results.evaluation is result
    page = page_of(report)
    assert page.data()["errors"]["examples"] == []
    assert page.data()["curves"][0]["keep"][1] == pytest.approx(
        float(curve.mean("keep")[0]), rel=1e-3
    )


@pytest.mark.slow
def test_mosaics_of_four_tasks(tmp_path: Path) -> None:
    torch_model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Flatten()).eval()
    model = torch.nn.Sequential(
        torch_model[0], torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    ).eval()
    sites = [GateSite("0", 8)]
    generator = torch.Generator().manual_seed(0)
    gates = TaskGates({"0": torch.rand(4, 8, generator=generator)}, sites, range(4))
    data = torch.randn(16, 3, 8, 8, generator=generator), torch.arange(16) % 4
    result = mosaics(model, gates, data, n=20)
    page = page_of(Report(gates, mosaics=result))
    assert "chart-mosaics" in page.ids()
    assert page.data()["mosaics"]["excess"] == pytest.approx(result.mean("excess"), rel=1e-3)

    path = tmp_path / "gates.h5"
    gates.save(path)
    report = Report(path).measure(model, data, parts=["mosaics"])
    assert report.results.notes == []
    made = report.results.mosaics["examples"]
    assert all(is_picture(found[kind]) for found in made for kind in ("mosaic", "coloured"))
    assert all(sorted(found["tasks"]) == ["0", "1", "2", "3"] for found in made)
    found = class_mosaics(model, gates, data, n=len(made))
    shares = [np.nan if share is None else share for share in made[0]["shares"]]
    assert shares == pytest.approx(found.own_share()[0].tolist(), rel=1e-2, nan_ok=True)
    report.keep()
    again = page_of(Report(path))
    pictures = [a["src"] for tag, a in again.tags if tag == "img" and "src" in a]
    assert pictures == [found[kind] for found in made for kind in ("mosaic", "coloured")]
    assert "examples" not in again.data()["mosaics"]  # not twice in the page

    made[0]["coloured"] = "https://example.org/x.png"
    keep_results(path, report.results)
    report = Report(path)
    assert report.results.mosaics is None
    assert "example.org" not in report.html()


def test_what_cannot_be_measured_is_noted() -> None:
    model, gates = build(TinyCNN), make_gates()
    images, labels = labelled_images(12)
    report = Report(gates).measure(model, (images, labels * 0 + 9), parts=["evaluation", "errors"])
    assert report.results.evaluation is None
    assert any("No evaluation" in note for note in report.results.notes)


@pytest.mark.slow
def test_kept_results_come_back(tmp_path: Path, measured: Report) -> None:
    path = tmp_path / "gates.h5"
    with GateStore.create(path, SITES, recipe=Recipe(size=0.5)) as store:
        store.append(make_gates(recipe=Recipe(size=0.5)))
    report = Report(path)
    report.results = measured.results
    written = report.keep()
    assert written == [
        "evaluation", "report/curves", "report/errors", "report/flow", "report/pictures",
        "report/where", "report/export",
    ]  # fmt: skip
    again = Report(path)
    assert again.results.pictures == measured.results.pictures
    assert again.results.errors["examples"][0]["picture"] >= 0
    assert again.results.flow["sites"] == [*(site.name for site in SITES), "output"]
    assert again.missing() == [
        "a verdict on each class",
        "other methods at equal size",
        "how sure each channel is, and whether it is needed",
        "concepts of channels",
        "statistics of gates against concepts",
    ]
    with pytest.raises(ValueError, match="not in a file"):
        measured.keep()


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------


def test_bad_arguments(tmp_path: Path) -> None:
    gates, model = make_gates(), build(TinyCNN)
    with pytest.raises(TypeError, match="a file, a GateStore or TaskGates"):
        Report(3)
    with pytest.raises(TypeError, match="are not in a file"):
        Report(gates, evaluation="evaluation")
    with pytest.raises(TypeError, match="must be an Evaluation"):
        Report(gates, evaluation=3)
    with pytest.raises(TypeError, match="expected a MosaicResult"):
        Report(gates, mosaics=3)
    with pytest.raises(ValueError, match="no part 'heat'"):
        Report(gates).measure(model, labelled_images(12), parts=["heat"])
    with pytest.raises(ValueError, match="n_images"):
        Report(gates).measure(model, labelled_images(12), n_images=0)
    with pytest.raises(GateStoreError):
        Report(tmp_path / "none.h5")
    gates.save(tmp_path / "gates.h5")
    with pytest.raises(GateStoreError, match="no evaluation 'held_out'; there are none"):
        Report(tmp_path / "gates.h5", evaluation="held_out")
    with GateStore.create(tmp_path / "empty.h5", SITES):
        pass
    with pytest.raises(GateStoreError, match="no task is finished"):
        Report(tmp_path / "empty.h5")


def test_an_open_store_and_a_single_task(tmp_path: Path) -> None:
    make_gates(1).save(tmp_path / "gates.h5")
    with GateStore.open(tmp_path / "gates.h5") as store:
        page = page_of(Report(store, title="One"))
    assert page.data()["overlaps"] is None
    assert "overlap" not in page.ids()
    assert "For 1 class, the gates keep" in page.text


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------


def test_command_writes_the_page(tmp_path: Path) -> None:
    make_gates().save(tmp_path / "gates.h5")
    result = _evaluation(1.0, random=[_evaluation(0.1)])
    result.save(tmp_path / "evaluation.json")
    out = tmp_path / "page.html"
    outcome = invoke(
        "report", tmp_path / "gates.h5", "--out", out, "--title", "Mine", "--evaluation",
        tmp_path / "evaluation.json",
    )  # fmt: skip
    assert outcome.exit_code == 0, outcome.output
    assert f"written: {out}" in " ".join(outcome.output.split())
    page = _Page(out.read_text(encoding="utf-8"))
    assert "Mine" in page.text
    assert "measured" in page.ids()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--with", "taylor"], 2, "--with needs --data"),
        (["--with", "magic", "--data", "x"], 2, "--with takes"),
        (["--keep"], 2, "--keep needs --data"),
        (["--out", "none/report.html"], 2, "there is no folder none"),
        (["--out", "gates.h5"], 2, "gates.h5, which is read"),
        (["--evaluation", "held_out"], 1, "no evaluation 'held_out'"),
        (["--data", "none"], 1, "none"),
    ],
)
def test_command_says_what_is_wrong(
    options: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_gates().save("gates.h5")
    outcome = invoke("report", "gates.h5", *options)
    assert outcome.exit_code == code, outcome.output
    assert message in " ".join(outcome.output.split())
    assert not Path("report.html").exists()


PHOTOS = """
import torch
from torch import nn


class Colours(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1, bias=False)
        self.relu = nn.ReLU()
        self.linear = nn.Linear(6, 3, bias=False)

    def forward(self, x):
        return self.linear(self.relu(self.conv(x)).mean((2, 3)))


def report_colours():
    torch.manual_seed(0)
    return Colours()
"""


@pytest.mark.slow
def test_command_measures_on_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report_nets.py").write_text(PHOTOS)
    random = np.random.default_rng(0)
    for name in ("blue", "green", "red"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            pixels = random.integers(0, 255, (8, 8, 3)).astype(np.uint8)
            image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    model = ("--model", "report_nets:report_colours", "--device", "cpu", "-q")
    learned = invoke("learn", *model, "--data", "photos", "--steps", 2, "--out", "gates.h5")
    assert learned.exit_code == 0, learned.output
    options = ("--trust-file", "--data", "photos", "--with", "energy", "--keep", "--device", "cpu")
    options = (*options, "--random", 1)
    outcome = invoke("report", "gates.h5", *options)
    assert outcome.exit_code == 0, outcome.output
    page = _Page(Path("report.html").read_text(encoding="utf-8"))
    assert {"measured", "curves", "channels"} <= page.ids()
    assert "energy" in page.text
    kept = Report("gates.h5")
    assert "energy" in kept.results.evaluation.rivals
    assert kept.results.pictures == json.loads(json.dumps(page.data()["pictures"]))


@pytest.mark.parametrize(
    ("origin", "title"),
    [
        (
            {"model": "torchvision:resnet18:none", "weights": "a/b.pt"},
            "torchvision:resnet18 with b.pt",
        ),
        ({"model": "torchvision:resnet18:none"}, "torchvision:resnet18:none"),
        ({}, "sub-architectures"),
    ],
)
def test_the_title_names_the_weights(origin: dict[str, str], title: str) -> None:
    found = contents(make_gates(), Results(), provenance=origin)
    assert found.data["title"] == title


def sure_of(gates: TaskGates) -> ChannelCertainty:
    kept = torch.cat([gates[s.name] for s in gates.sites], dim=1).numpy() > 0.5
    n_tasks, n = kept.shape
    label = np.where(kept, 1 + np.arange(n) % 4, 0)
    nan = np.full(kept.shape, np.nan)
    return ChannelCertainty(
        gates.tasks, tuple(map(str, gates.tasks)), gates.sites, kept / 1.0, 4 * kept.astype(int), 2,
        kept.sum(1) / 1.0, nan, nan, nan, label, np.zeros(n_tasks, int), ((),) * n_tasks,
        np.ones(n_tasks), np.ones((n_tasks, 0, n), bool), np.ones((n_tasks, 0)),
        np.ones((n_tasks, 0), bool), None, None, 0.05, 0.02, {}, 0,
    )  # fmt: skip


def test_certain_and_doubtful_channels_are_told_apart(tmp_path: Path) -> None:
    """The page holds each channel's label, if certainty was measured on these very gates."""
    gates = make_gates()
    sure = sure_of(gates)
    path = tmp_path / "gates.h5"
    gates.save(path)
    sure.save(path, "certainty")
    results = found_results(path, gates.sites)
    data = contents(gates, results).data["certainty"]
    labels = np.frombuffer(base64.b64decode(data["labels"]), np.uint8).reshape(sure.label.shape)
    assert (labels == sure.label).all()
    chosen = np.frombuffer(base64.b64decode(data["chosen"]), np.uint8).reshape(sure.label.shape)
    assert set(chosen[labels > 0]) == {255}
    assert data["names"][1:] == ["needed", "replaceable", "no effect seen", "undecided"]
    one = gates.select(gates.tasks[1:2])
    labels = base64.b64decode(contents(one, results).data["certainty"]["labels"])
    assert np.array_equal(np.frombuffer(labels, np.uint8), sure.label[1])
    asked = [command for _, command in not_there(gates, Results(), "gates.h5")]
    assert "nad-attr certainty gates.h5 --held-out HELD_OUT --out gates.h5" in asked
    other = TaskGates({s.name: 1 - gates[s.name] for s in gates.sites}, gates.sites, gates.tasks)
    found = contents(other, results)
    assert found.data["certainty"] is None
    assert any("No certainty: it is of other gates" in note for note in found.notes)


@pytest.mark.parametrize("known", [False, True])
def test_ten_questions_of_a_newcomer_are_answered(known: bool, measured: Report) -> None:
    """Each has an answer one click away, and what it says it shows is on the page."""
    report = measured if known else Report(measured.gates)
    found = report.contents()
    html = report.html()
    assert [question.name for question in found.questions] == [name for name, _ in NEWCOMERS]
    assert len(found.questions) == 10
    assert list(found.first) == ["Asked", "Answer", "How sure", "Compared with"]
    for name, question, answer, section in found.questions:
        item = f'<details id="question-{name}"><summary>{question}</summary><p>'
        assert item in html
        assert len(answer) > 40
        assert html.count(f'id="{section}"') == (1 if section else 0), (name, section)
    by_name = {question.name: question for question in found.questions}
    if known:
        assert all(by_name[name].section for name in ("respond", "place", "feeds", "beside"))
        assert "Not tested. To add it: nad-attr verdict" in by_name["enough"].answer
    else:
        unknown = [q.name for q in found.questions if "nad-attr" in q.answer]
        assert unknown == ["enough", "needed", "sure", "respond", "place", "feeds"]
        assert "not known" in found.first["Answer"]


def test_places_are_coloured_where_the_channels_speak(tmp_path: Path) -> None:
    """A network that looks for bright pixels: they are coloured, and nothing else."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1))
    images = torch.zeros(2, 1, 8, 8)
    images[0, 0, :4, :4] = 1.0
    images[1, 0, 4:, 4:] = -1.0
    gates = TaskGates(
        {"1": torch.tensor([[0.9, 0.1], [0.1, 0.9]])}, [GateSite("1", 2)], [0, 1],
        task_names=["bright", "dark"],
    )  # fmt: skip
    report = Report(gates).measure(model, (images, torch.tensor([0, 1])), parts=["where"])
    assert [row["task"] for row in report.results.where] == ["bright", "dark"]
    for row, corner in zip(report.results.where, ((0, 0), (1, 1)), strict=True):
        ((_, coloured),) = row["images"]
        data = base64.b64decode(coloured.partition(",")[2])
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=float)
        blue = (pixels[..., 2] - pixels[..., 0])[4:-4, 4:-4]
        half = len(blue) // 2
        halves = blue.reshape(2, half, 2, half).mean((1, 3))
        assert halves.argmax() == 2 * corner[0] + corner[1]
        assert halves[corner] > 60 > 20 > np.sort(halves.ravel())[-2]
    assert 'id="where"' in report.html()
    words = Report(gates).measure(
        nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2)).eval(),
        (torch.rand(4, 4), torch.arange(4) % 2),
        parts=["where"],
    )
    assert words.results.where is None
    assert "the inputs are not images" in words.results.notes[0]
