"""Files of other programs, laid out as those write them."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nad_attr.concepts import (
    Concept,
    ImportFileError,
    UnitConcepts,
    import_clip_dissect,
    import_condi99,
    import_dissect_report,
    import_netdissect_lite,
)
from nad_attr.concepts.importers import reading

CATEGORIES = ("color", "object", "part", "material", "scene", "texture")
#: (unit, best category, {category: (label, IoU)}), in the order of the score as the tool writes.
UNITS = [
    (3, "object", {"color": ("blue-c", 0.02), "object": ("sky", 0.21), "scene": ("beach-s", 0.03)}),
    (1, "color", {"color": ("purple-c", 0.09), "object": ("bedclothes", 0.012)}),
    (4, "scene", {"scene": ("airport_terminal-s", 0.05), "texture": ("frilly", 0.01)}),
    (2, "texture", {"texture": ("striped", 0.031)}),
]


def _tally(path: Path, units=UNITS) -> Path:
    """The columns of ``FeatureOperator.tally``; a category without overlap has label 0, "-"."""
    columns = ["unit", "category", "label", "score"]
    for category in CATEGORIES:
        columns += [f"{category}-{x}" for x in ("label", "truth", "activation", "intersect", "iou")]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for unit, best, cells in units:
            row = {"unit": unit, "category": best}
            row["label"], row["score"] = cells.get(best, ("-", 0.0))
            for category in CATEGORIES:
                label, iou = cells.get(category, ("-", 0.0))
                row |= {f"{category}-label": label, f"{category}-iou": iou}
                row |= {f"{category}-truth": 100, f"{category}-activation": 9.0}
                row[f"{category}-intersect"] = 3.0
            writer.writerow(row)
    return path


def test_netdissect_lite_numbers_units_from_1(tmp_path):
    units = import_netdissect_lite({"layer4": _tally(tmp_path / "tally.csv")})
    assert units.n_units("layer4") == 4
    index, iou = units.best("layer4")
    names = [units.concepts[i] for i in index]
    assert names == [
        Concept("purple", "colour"),
        Concept("striped", "texture"),
        Concept("sky", "object"),
        Concept("airport terminal", "scene"),
    ]
    np.testing.assert_allclose(iou, [0.09, 0.031, 0.21, 0.05], rtol=1e-6)
    assert units.detectors("layer4").tolist() == [True, False, True, True]
    # Of each category only the best label is known, or that all IoUs are 0: of 8 concepts.
    assert len(units.concepts) == 8
    known, zero = ~np.isnan(units.iou["layer4"]), units.iou["layer4"] == 0
    assert (known & ~zero).sum(1).tolist() == [2, 1, 3, 2]
    assert zero.sum(1).tolist() == [4, 6, 2, 4]
    assert units.iou["layer4"][2, units.concepts.index(Concept("beach", "scene"))] == pytest.approx(
        0.03
    )
    assert units.quantile == 0.005
    raw = import_netdissect_lite({"x": tmp_path / "tally.csv"}, clean_names=False)
    assert Concept("airport_terminal-s", "scene") in raw.concepts


def test_netdissect_lite_of_several_layers_and_of_the_first_columns_only(tmp_path):
    first = _tally(tmp_path / "a.csv")
    second = tmp_path / "b.csv"
    second.write_text("unit,category,label,score\n2,object,car,0.1\n1,object,sky,0.3\n")
    units = import_netdissect_lite({"layer1": first, "layer2": second})
    assert units.sites == ("layer1", "layer2")
    sky, car = (units.concepts.index(Concept(n, "object")) for n in ("sky", "car"))
    assert units.iou["layer2"][0, sky] == np.float32(0.3)
    assert units.iou["layer2"][1, car] == np.float32(0.1)
    assert np.isnan(units.iou["layer2"]).sum() == units.iou["layer2"].size - 2


def test_dead_units_have_iou_0_with_every_concept(tmp_path):
    path = _tally(tmp_path / "tally.csv", [*UNITS, (5, "color", {})])
    units = import_netdissect_lite({"layer4": path})
    assert units.iou["layer4"][4].tolist() == [0.0] * 8
    report = _report(tmp_path / "report.json", [*REPORT, {**REPORT[0], "unit": 3, "iou": 0}])
    assert import_dissect_report({"a": report}).iou["a"][3].tolist() == [0.0, 0.0]
    assert "-" not in [concept.name for concept in units.concepts]


def _edit(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\n3,object", "\n0,object", r"line 2: unit must be 1 or more"),
        ("\n1,color", "\n3,color", r"unit 3 of 'layer4' is there twice"),
        ("\n4,scene", "\nfour,scene", r"line 4: unit must be a whole number, got 'four'"),
        ("0.21", "1.21", r"line 2: score must be an IoU in \[0, 1\], got 1.21"),
        ("0.21", "high", r"line 2: score must be a number, got 'high'"),
        ("0.21", "inf", r"line 2: score is infinite"),
        ("0.21", "0.20", r"line 2: score 0.2 is not the best IoU of the line, 0.21"),
        ("unit,", "units,", r"line 1: no column 'unit'"),
        ("color-truth", "color-iou", r"line 1: the column 'color-iou' is there twice"),
        ("\n2,texture", "\n9,texture", r"unit 2 of 'layer4' is missing"),
        (",sky,", ',"sky,', r"line \d+: "),
        (",purple-c,", ",", r"line 3: 33 cells where the header has 34; was the file written"),
    ],
)
def test_wrong_tallies_are_named_with_their_line(tmp_path, old, new, message):
    path = _edit(_tally(tmp_path / "tally.csv"), old, new)
    with pytest.raises(ImportFileError, match=message) as error:
        import_netdissect_lite({"layer4": path})
    assert str(path) in str(error.value)


def test_truncated_tallies(tmp_path):
    path = _tally(tmp_path / "tally.csv")
    whole = path.read_bytes()
    header = whole.index(b"\n") + 1
    for length in [0, 5, header, header + 30, len(whole) - 40, len(whole) - 4]:
        path.write_bytes(whole[:length])
        with pytest.raises(ImportFileError, match=r"tally.csv"):
            import_netdissect_lite({"layer4": path})


def test_files_that_are_something_else(tmp_path):
    binary = tmp_path / "tally.csv"
    binary.write_bytes(b"\x89PNG\r\n\xff\xfe")
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (binary, folder, tmp_path / "missing.csv"):
        for call in (
            lambda p: import_netdissect_lite({"a": p}),
            lambda p: import_dissect_report({"a": p}),
            lambda p: import_condi99({"a": p}),
            lambda p: import_clip_dissect(p),
        ):
            with pytest.raises(ImportFileError, match=path.name):
                call(path)
    with pytest.raises(TypeError, match="site name"):
        import_netdissect_lite(str(binary))
    with pytest.raises(TypeError, match="at least one site"):
        import_dissect_report({})


# -- dissect -----------------------------------------------------------------------------------


def _report(path: Path, units) -> Path:
    header = {"name": "vgg16 places netpqc", "image": "concepts_99.svg"}
    units = [{"image": f"image/unit{u['unit']}.jpg", **u} for u in units]
    path.write_text(json.dumps({"header": header, "units": units}, indent=1))
    return path


REPORT = [
    {"unit": 0, "iou": 0.0712, "label": "tree", "cat": "object"},
    {"unit": 1, "iou": "NaN", "label": "-", "cat": "-"},
    {"unit": 2, "iou": 0.031, "label": "red", "cat": "color"},
]


def test_dissect_reports_number_units_from_0_and_write_nan_as_text(tmp_path):
    units = import_dissect_report({"features.28": _report(tmp_path / "report.json", REPORT)})
    index, iou = units.best("features.28")
    assert units.concepts == (Concept("tree", "object"), Concept("red", "colour"))
    assert index.tolist() == [0, -1, 1]
    np.testing.assert_allclose(iou, [0.0712, np.nan, 0.031], rtol=1e-6)
    assert units.detectors("features.28").tolist() == [True, False, False]
    assert units.quantile == 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit": -1}, r"units\[0\]: 'unit' must be a number from 0 on"),
        ({"unit": 1}, r"unit 1 of 'a' is there twice"),
        ({"unit": 7}, r"unit 0 of 'a' is missing"),
        ({"iou": "Infinity"}, r"units\[0\]: 'iou' is infinite"),
        ({"iou": [1]}, r"units\[0\]: 'iou' must be a number"),
        ({"iou": 2.0}, r"units\[0\]: 'iou' is 2, which is not an IoU"),
        ({"label": ""}, r"units\[0\]: 'label' must be a text"),
        ({"cat": 3}, r"units\[0\]: 'cat' must be a text"),
    ],
)
def test_wrong_reports_are_named_with_their_unit(tmp_path, change, message):
    path = _report(tmp_path / "report.json", [{**REPORT[0], **change}, *REPORT[1:]])
    with pytest.raises(ImportFileError, match=message):
        import_dissect_report({"a": path})


def test_truncated_and_foreign_reports(tmp_path):
    path = _report(tmp_path / "report.json", REPORT)
    text = path.read_text()
    for length in (1, 40, len(text) // 2, len(text) - 1):
        path.write_text(text[:length])
        with pytest.raises(ImportFileError, match=r"report.json, line \d+: .* written to the end"):
            import_dissect_report({"a": path})
    for foreign in ("[]", "3", '{"units": {}}', '{"units": []}', '{"units": [3]}'):
        path.write_text(foreign)
        with pytest.raises(ImportFileError, match=r"report.json"):
            import_dissect_report({"a": path})
    path.write_text("[" * 100_000)
    with pytest.raises(ImportFileError, match="nested too deep"):
        import_dissect_report({"a": path})
    path.write_text('{"units": [{"unit": 0, "iou": 0.1, "label": "tree"}]}')
    with pytest.raises(ImportFileError, match="no 'cat'"):
        import_dissect_report({"a": path})


def test_files_beyond_the_limit_are_not_read(tmp_path, monkeypatch):
    path = _report(tmp_path / "report.json", REPORT)
    monkeypatch.setattr(reading, "MAX_BYTES", 100)
    with pytest.raises(ImportFileError, match="too large"):
        import_dissect_report({"a": path})


def _condi99(path: Path, counts, means, **more) -> Path:
    """The state of ``RunningConditionalVariance``, as ``save_cached_state`` writes it."""
    state = {
        "constructor": "netdissect.runningstats.RunningConditionalVariance()",
        "conditions": list(counts),
        "sample_size": 1000,
    }
    for i, label in enumerate(counts):
        mean = np.asarray(means[label], np.float32)
        state |= {
            f"{i}.constructor": "netdissect.runningstats.RunningVariance()",
            f"{i}.count": counts[label],
            f"{i}.batchcount": 20,
            f"{i}.mean": mean,
            f"{i}.cmom2": mean * (1 - mean) * counts[label],
        }
    np.savez(path, **{**state, **more})
    return path


#: 10,000 pixels; label 3 on 2,000 of them, label 1 on 500. Two units.
COUNTS = {0: 10_000, 3: 2_000, 1: 500}
MEANS = {0: [0.01, 0.01], 3: [0.04, 0.0], 1: [0.02, 0.16]}


def test_condi99_worked_by_hand(tmp_path):
    path = _condi99(tmp_path / "condi99.npz", COUNTS, MEANS)
    names = ["-", "sky", "not seen", Concept("tree", "object")]
    units = import_condi99({"layer4": path}, names)
    assert units.concepts == (Concept("sky"), Concept("tree", "object"))
    # Unit 0 is on at 100 pixels. On 80 of the 2,000 of tree: 80 / (100 + 2000 - 80); on 10 of the
    # 500 of sky: 10 / (100 + 500 - 10). Unit 1: none of tree, 80 of sky: 80 / (100 + 500 - 80).
    expected = [[10 / 590, 80 / 2020], [80 / 520, 0.0]]
    np.testing.assert_allclose(units.iou["layer4"], expected, rtol=1e-6)
    assert import_condi99({"a": path}).concepts == (Concept("label 1"), Concept("label 3"))
    with pytest.raises(ValueError, match="label 3"):
        import_condi99({"a": path}, ["-", "sky"])


def test_condi99_is_a_pixel_count(tmp_path):
    generator = np.random.default_rng(0)
    on = generator.random((3, 40, 40)) < 0.1
    labels = generator.integers(0, 4, (40, 40))
    counts = {0: labels.size} | {k: int((labels == k).sum()) for k in (1, 2, 3)}
    means = {0: on.mean((1, 2))} | {k: on[:, labels == k].mean(1) for k in (1, 2, 3)}
    path = _condi99(tmp_path / "condi99.npz", counts, means)
    brute = [[(u & (labels == k)).sum() / (u | (labels == k)).sum() for k in (1, 2, 3)] for u in on]
    np.testing.assert_allclose(import_condi99({"a": path}).iou["a"], brute, rtol=1e-5)


def test_labels_that_one_layer_did_not_see_are_unknown(tmp_path):
    first = _condi99(tmp_path / "a.npz", COUNTS, MEANS)
    second = _condi99(tmp_path / "b.npz", {0: 100, 2: 10}, {0: [0.1], 2: [0.5]})
    units = import_condi99({"a": first, "b": second})
    assert [concept.name for concept in units.concepts] == ["label 1", "label 2", "label 3"]
    assert np.isnan(units.iou["a"][:, 1]).all()
    assert np.isnan(units.iou["b"][:, [0, 2]]).all()


def test_nothing_is_unpickled(tmp_path):
    objects = np.array([{"a": 1}], dtype=object)
    harmless = _condi99(tmp_path / "a.npz", COUNTS, MEANS, sample_size=objects)
    assert import_condi99({"a": harmless}).n_units("a") == 2  # never looked at
    wrong = _condi99(tmp_path / "b.npz", COUNTS, MEANS, **{"1.mean": objects})
    with pytest.raises(ImportFileError, match="holds objects"):
        import_condi99({"a": wrong})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conditions": [1, 2]}, "each label once, and 0"),
        ({"conditions": [0, 1, 1]}, "each label once, and 0"),
        ({"conditions": [0.5]}, "not a list of labels"),
        ({"conditions": [0, -1, 2]}, "not labels"),
        ({"conditions": [0, 1, 2, 3]}, r"no array '3.count'"),
        ({"1.count": 0}, "not a number of pixels"),
        ({"1.count": 20_000}, "more pixels than there are"),
        ({"1.mean": [0.1, 0.2, 0.3]}, "has 3 units"),
        ({"1.mean": [[0.1, 0.2]]}, "not a number per unit"),
        ({"1.mean": [5.0, 0.2]}, "not a share of the pixels"),
        ({"1.mean": [np.nan, 0.2]}, "not a share of the pixels"),
    ],
)
def test_wrong_condi99(tmp_path, change, message):
    path = _condi99(tmp_path / "condi99.npz", COUNTS, MEANS, **change)
    with pytest.raises(ImportFileError, match=message):
        import_condi99({"a": path})


def test_truncated_condi99(tmp_path):
    path = _condi99(tmp_path / "condi99.npz", COUNTS, MEANS)
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ImportFileError, match=r"condi99.npz"):
            import_condi99({"a": path})


# -- CLIP-Dissect ------------------------------------------------------------------------------

DESCRIPTIONS = """\
layer,unit,description,similarity
layer1,0,red,0.25616455
layer1,1,snorkeling,-0.4
layer4,0,"stripes, zebra",4.2
layer4,1,red,
layer4,2,train station,0.19
"""


@pytest.fixture
def descriptions(tmp_path):
    path = tmp_path / "descriptions.csv"
    path.write_text(DESCRIPTIONS)
    return path


def test_clip_dissect_keeps_similarities_and_has_no_detectors(descriptions, tmp_path):
    units = import_clip_dissect(descriptions, categories={"red": "color"})
    assert units.sites == ("layer1", "layer4")
    index, value = units.best("layer4")
    assert [None if i < 0 else units.concepts[i].name for i in index] == [
        "stripes, zebra",
        None,
        "train station",
    ]
    np.testing.assert_allclose(value, [4.2, np.nan, 0.19], rtol=1e-6)  # as it is, above 1
    assert units.concepts[0] == Concept("red", "colour")
    assert units.measure == "similarity"
    assert not units.detectors("layer4").any()
    assert "not IoU" in units.summary()
    units.save(tmp_path / "units.h5")
    assert UnitConcepts.load(tmp_path / "units.h5") == units


def test_clip_dissect_layers_are_renamed_and_left_out(descriptions):
    units = import_clip_dissect(descriptions, {"layer4": "backbone.layer4"})
    assert units.sites == ("backbone.layer4",)
    with pytest.raises(ValueError, match=r"no layer 'layer9'; there are \['layer1', 'layer4'\]"):
        import_clip_dissect(descriptions, {"layer9": "x"})
    with pytest.raises(ValueError, match="two layers to one site"):
        import_clip_dissect(descriptions, {"layer1": "x", "layer4": "x"})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("layer4,1", "layer4,0", r"line 5: unit 0 of layer 'layer4' is there twice"),
        ("layer4,1", "layer4,7", r"unit 1 of 'layer4' is missing"),
        ("layer1,1", "layer1,-1", r"line 3: unit must be a whole number"),
        ("snorkeling", "", r"line 3: the description is empty"),
        ("0.25616455", "0.2x", r"line 2: similarity must be a number, got '0.2x'"),
        ("similarity", "score", r"line 1: no column 'similarity'"),
        ("train station,0.19\n", "train sta", r"line 6: 3 cells where the header has 4"),
        ("0.19\n", "0.1", r"line 6: the last line has no end"),
    ],
)
def test_wrong_descriptions_are_named_with_their_line(descriptions, old, new, message):
    with pytest.raises(ImportFileError, match=message):
        import_clip_dissect(_edit(descriptions, old, new))


# -- anything ----------------------------------------------------------------------------------


@pytest.mark.slow
@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_damaged_files_end_in_one_kind_of_error(tmp_path, data):
    """Any bytes in place of others: an import or an ImportFileError, nothing else."""
    path = tmp_path / "file"
    kind = data.draw(st.sampled_from(["tally", "report", "condi99", "clip"]))
    if kind == "tally":
        _tally(path)
    elif kind == "report":
        _report(path, REPORT)
    elif kind == "condi99":
        _condi99(tmp_path / "file.npz", COUNTS, MEANS).rename(path)
    else:
        path.write_text(DESCRIPTIONS)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + 1] = data.draw(st.binary(max_size=2))
    path.write_bytes(bytes(content))
    try:
        if kind == "tally":
            import_netdissect_lite({"a": path})
        elif kind == "report":
            import_dissect_report({"a": path})
        elif kind == "condi99":
            import_condi99({"a": path})
        else:
            import_clip_dissect(path)
    except ImportFileError:
        pass


# ---------------------------------------------------------------------------------------------
# Bounds
# ---------------------------------------------------------------------------------------------


def test_a_line_separator_in_a_cell_ends_no_line(tmp_path):
    path = tmp_path / "descriptions.csv"
    rows = "layer,unit,description,similarity\nlayer1,0,a\u2028b\x85c,0.3\nlayer1,1,d,0.2\n"
    path.write_text(rows, encoding="utf-8")
    found = import_clip_dissect(path)
    assert [concept.name for concept in found.concepts] == ["a\u2028b\x85c", "d"]
    path.write_text(rows.replace("0.2", "x"), encoding="utf-8")
    with pytest.raises(ImportFileError, match=r"descriptions.csv, line 3: "):
        import_clip_dissect(path)


def _distinct(path: Path, n: int) -> Path:
    rows = [f"layer1,{i},label {i},0.3" for i in range(n)]
    path.write_text("\n".join(["layer,unit,description,similarity", *rows, ""]))
    return path


def test_distinct_labels_of_many_units_have_to_fit_into_memory(tmp_path, monkeypatch):
    path = _distinct(tmp_path / "descriptions.csv", 300)
    monkeypatch.setattr(reading, "_UNCHECKED_BYTES", 2**10)
    monkeypatch.setattr(reading, "most_bytes", lambda: 2**19)
    with pytest.raises(ImportFileError, match=r"descriptions.csv: 300 units with 300 different"):
        import_clip_dissect(path)
    monkeypatch.setattr(reading, "most_bytes", lambda: 2**20)
    assert import_clip_dissect(path).iou["layer1"].shape == (300, 300)


@pytest.mark.parametrize(
    ("iou", "words"), [("9" * 400, "too large"), ("9" * 5000, "digits"), ("Infinity", "infinite")]
)
def test_absurd_numbers_in_a_report(tmp_path, iou, words):
    path = tmp_path / "report.json"
    path.write_text(f'{{"units": [{{"unit": 0, "iou": {iou}, "label": "a", "cat": "b"}}]}}')
    with pytest.raises(ImportFileError, match=words) as error:
        import_dissect_report({"a": path})
    assert str(path) in str(error.value)


def test_an_infinite_count(tmp_path):
    path = _condi99(tmp_path / "condi99.npz", {**COUNTS, 0: np.inf}, MEANS)
    with pytest.raises(ImportFileError, match=r"condi99.npz: '\d.count' is not a number of pixels"):
        import_condi99({"a": path})


def test_errors_show_no_control_characters(tmp_path):
    path = tmp_path / "descriptions.csv"
    path.write_text("layer,unit,description,similarity,x\x1b[2J\n")
    with pytest.raises(ImportFileError) as error:
        import_netdissect_lite({"a": path})
    assert str(error.value).isprintable()


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "tally.csv")
    with pytest.raises(ImportFileError, match="no such file"):
        import_netdissect_lite({"a": tmp_path / "tally.csv"})
