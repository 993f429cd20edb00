"""Text of files does no harm to a terminal, a spreadsheet or a folder."""

import csv
import io
import sys
import unicodedata
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nad_attr import GateSite, GateStore, TaskGates
from nad_attr._display import html_table
from nad_attr.evaluation import evaluate
from nad_attr.system.safe_text import cell, members, shown
from tests.helpers import TinyCNN, build, invoke, labelled_images

pytest.importorskip("typer")

#: ESC (OSC 8, OSC 52), C0, DEL, C1, bidirectional marks, separators, a lone surrogate, a tag.
EVIL = (
    "\x1b]8;;http://x\x07 \x00\x08\x7f\x9b2J \u202e\u2066\u200f "
    "\u2028\u2029\x85\r\n \ud800 \U000e0041"
)


def harmless(text: str, lines: bool = False) -> bool:
    kinds = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    return not any(
        unicodedata.category(c) in kinds and c not in "\u200c\u200d" and not (lines and c == "\n")
        for c in text
    )


@given(st.text(st.characters()))
def test_nothing_that_is_shown_is_a_command(text: str) -> None:
    assert harmless(shown(text))
    assert harmless(shown(text, lines=True), lines=True)
    assert text.count("\n") == shown(text, lines=True).count("\n")


def test_what_is_shown_can_be_read() -> None:
    assert not harmless(EVIL)
    assert harmless(shown(EVIL))
    assert shown("\x1b\n\u202e\x9b\u2028\U000e0041") == r"\x1b\n\u202e\x9b\u2028\U000e0041"
    assert shown("naïve 猫 👩‍🔬 C:\\x 3") == "naïve 猫 👩‍🔬 C:\\x 3"


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-cat", "@SUM(A1)", " =1", "=1\t", "-1+1"])
def test_a_cell_is_no_formula(text: str) -> None:
    assert str(cell(text)).startswith("'")


@pytest.mark.parametrize("value", [-0.5, "-0.5", "+3", "1e-3", "-inf", "", "cat", None, 3, "a=b"])
def test_numbers_and_plain_texts_stay(value: object) -> None:
    assert cell(value) == value


@given(st.lists(st.text(st.sampled_from("./\\:a~_\n")), unique=True))
def test_members_stay_where_they_are_unpacked(names: list[str]) -> None:
    found = members({name: i for i, name in enumerate(names)})
    assert len(found) == len(names)
    for name in found:
        parts = name.split("/")
        assert all(part.strip(". ") for part in parts)
        assert not set(name) & {"\\", ":", "\n"}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A file whose every text is hostile."""
    sites = [GateSite(f"../../{EVIL[:-2]}", 2), GateSite("=cmd|' /C calc'!A0", 1)]
    sites = [
        GateSite(s.name.replace("\x00", "").replace("\ud800", ""), s.n_channels) for s in sites
    ]
    text = EVIL.replace("\x00", "").replace("\ud800", "")
    facts = dict.fromkeys(("model", "weights", "data", "device", "model_hash"), text)
    facts["seed"], facts["environment"] = text, {"nad_attr": text, "torch": text}
    gates = TaskGates(
        {sites[0].name: torch.tensor([[0.9, 0.2]]), sites[1].name: torch.tensor([[0.7]])},
        sites, [3], task_names=[f"=x{text}"],
    )  # fmt: skip
    with GateStore.create(tmp_path / "gates.h5", sites, provenance=facts) as opened:
        opened.append(gates)
        opened.write_scores(
            text.replace("/", ""), {s.name: torch.ones(1, s.n_channels) for s in sites}
        )
        opened.write_result(f"evaluation {text.replace('/', '')}", {"a": [1.0]})
    return tmp_path / "gates.h5"


def run(*arguments: object) -> str:
    output: str = invoke(*arguments).output
    return output


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect",),
        ("inspect", "--json"),
        ("inspect", "--tasks", "nothing"),
        ("export", "--csv", "-"),
        ("export", "--json", "-"),
        ("export", "--csv", "-", "--tasks", "\x1b[2J"),
        ("evaluate", "--data", "nowhere"),
        ("report", "--evaluation", "x"),
    ],
    ids=str,
)
def test_the_command_line_shows_no_commands(store: Path, arguments: tuple[str, ...]) -> None:
    command, *more = arguments
    output = run(command, store, *more)
    assert output
    assert harmless(output.replace("\r\n", "\n"), lines=True), ascii(output)


def test_exported_tables_hold_no_formulas(store: Path) -> None:
    rows = list(csv.reader(io.StringIO(run("export", store, "--csv", "-"))))
    assert len(rows) == 4
    assert rows[3][1].startswith("'=x")
    assert rows[3][2] == "'=cmd|' /C calc'!A0"
    assert [float(row[4]) for row in rows[1:]] == pytest.approx([0.9, 0.2, 0.7])


def test_an_evaluation_as_a_table_holds_no_formulas(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    from nad_attr.cli.messages import write_csv

    model = build(TinyCNN)
    data = labelled_images()
    gates = TaskGates(
        {"relu1": torch.rand(2, 6)}, [GateSite("relu1", 6)], [0, 1], task_names=["=1+1", "cat"]
    )
    table = evaluate(model, gates, data, n_random=1).frame()
    write_csv(table, tmp_path / "out.csv", index=True)
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert any("'=1+1" in row for row in rows)
    assert not any(each.startswith("=") for row in rows for each in row)


def test_arrays_lead_nowhere(store: Path, tmp_path: Path) -> None:
    run("export", store, "--npz", tmp_path / "gates.npz")
    with zipfile.ZipFile(tmp_path / "gates.npz") as archive:
        names = archive.namelist()
    assert any(name.startswith("gate/") for name in names)
    for name in names:
        assert ".." not in name.split("/")
        assert harmless(name)


def test_notebooks_show_no_commands() -> None:
    page = html_table(EVIL, [EVIL], [[EVIL]])
    assert harmless(page, lines=True)


@pytest.mark.skipif(sys.platform == "win32", reason="file names as on POSIX")
def test_names_of_broken_photos(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    from nad_attr.data.images import ImageFolderData

    folder = tmp_path / "c\x1b[2J"
    folder.mkdir()
    (folder / "a\x1b[2J\nError.png").write_bytes(b"no image")
    data = ImageFolderData(tmp_path)
    with pytest.raises(ValueError, match="read") as error:
        data[0]
    assert harmless(data.report(), lines=True)
    assert len(data.report().splitlines()) == 2
    assert error
