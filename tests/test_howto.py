"""Every block of Python on every how-to page runs, in order, in one namespace per page.

A page names the packages that it needs, by the names that they are imported by, in its first line:
``<!-- needs: zennit, matplotlib -->``. It is skipped only where one of them is missing.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path

import pytest
from torch import nn

from nad_attr.system.rng import isolated_rng
from tests.helpers import fit_briefly, learn_briefly

HOWTO = Path(__file__).resolve().parent.parent / "docs" / "howto"
#: The table of contents holds no code.
PAGES = sorted(path.stem for path in HOWTO.glob("*.md") if path.stem != "index")

FENCE = re.compile(r"^(?P<indent> *)```(?P<info>\{?[\w+-]*\}?[^\n]*)$")
NEEDS = re.compile(r"<!-- needs:(?P<names>[^>]*)-->")


def blocks(text: str) -> list[tuple[int, str]]:
    """The blocks of Python: the line that each begins at, counted from 1, and its code."""
    found: list[tuple[int, str]] = []
    inside: str | None = None
    begin, lines = 0, list[str]()
    for number, line in enumerate(text.splitlines(), 1):
        fence = FENCE.match(line)
        if inside is None and fence:
            inside, begin, lines = fence["info"].strip(), number + 1, []
        elif inside is not None and line.strip() == "```":
            if inside.split(" ")[0] in ("python", "py", "{code-cell}", "{code-block}"):
                found.append((begin, "\n".join(lines) + "\n"))
            inside = None
        elif inside is not None:
            lines.append(line)
    assert inside is None, "a block of code is not closed"
    return found


def needs(text: str) -> list[str]:
    """The packages that a page needs."""
    match = NEEDS.match(text)
    assert match, "the first line has to say what the page needs: <!-- needs: zennit -->"
    return [name for name in re.split(r"[\s,]+", match["names"].strip()) if name]


def run_page(path: Path) -> dict[str, object]:
    """Run a page's code; errors name the page and its line."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for begin, code in blocks(path.read_text(encoding="utf-8")):
        # Blank lines in front: the line of an error is the line of the page.
        compiled = compile("\n" * (begin - 1) + code, str(path), "exec")
        exec(compiled, namespace)
    return namespace


def short(patch: pytest.MonkeyPatch) -> None:
    """Learn in few steps, and from smaller digits: how good the results are is not looked at."""
    learn_briefly(patch)
    fit_briefly(patch)
    if importlib.util.find_spec("sklearn") is not None:
        from sklearn import datasets

        digits = datasets.load_digits()
        digits.images = digits.images[:, ::2, ::2]
        patch.setattr(datasets, "load_digits", lambda: digits)


def test_pages_are_there() -> None:
    wanted = (
        "captum contrast crp grad_cam hugging_face lightning quantus torchmetrics virelay zennit"
    )
    assert set(wanted.split()) <= set(PAGES)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = HOWTO / f"{page}.md"
    text = path.read_text(encoding="utf-8")
    for name in needs(text):
        # Only what is not installed may be skipped: a package that fails to import fails the test.
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    assert blocks(text), "the page holds no code to run"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    short(monkeypatch)
    # The same random numbers in every run, and none of them for the tests that come after.
    with warnings.catch_warnings(), isolated_rng(0):
        warnings.simplefilter("ignore")
        namespace = run_page(path)
    # Whatever the page did to its network, nothing of ours is left on it.
    model = namespace.get("model")
    if isinstance(model, nn.Module):
        left = {
            name: [kind for kind in vars(module) if "hooks" in kind and vars(module)[kind]]
            for name, module in model.named_modules()
        }
        assert not {name: kinds for name, kinds in left.items() if kinds}


# ---------------------------------------------------------------------------------------------
# The tests' own tools
# ---------------------------------------------------------------------------------------------

PAGE = """<!-- needs: json, not_there -->
# A page

```python
x = 1
```

```console
rm everything
```

- a list

  ```text
  no python
  ```

```py
x += 1
raise ValueError(x)
```
"""


def test_blocks_are_found_and_run_in_one_namespace(tmp_path: Path) -> None:
    assert needs(PAGE) == ["json", "not_there"]
    assert blocks(PAGE) == [(5, "x = 1\n"), (19, "x += 1\nraise ValueError(x)\n")]
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    with pytest.raises(ValueError, match="2") as caught:
        run_page(path)
    assert caught.traceback[-1].lineno == 19  # counted from 0: line 20 of the page
    assert Path(str(caught.traceback[-1].path)) == path


def test_pages_must_say_what_they_need_and_close_their_blocks() -> None:
    with pytest.raises(AssertionError, match="first line"):
        needs("# A page\n<!-- needs: zennit -->\n")
    with pytest.raises(AssertionError, match="not closed"):
        blocks("```python\nx = 1\n")
