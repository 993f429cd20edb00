"""The report in a browser: it loads, answers to mouse and keyboard, and is quick."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch

from nad_attr import GateSite, Labels, Recipe, TaskGates, information_flow, learn_gates
from nad_attr.concepts import Concept, UnitConcepts
from nad_attr.evaluation import Evaluation, evaluate
from nad_attr.flow.picture import flow_picture
from nad_attr.gates.history import History
from nad_attr.report import Report

pytest.importorskip("plotly")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.slow

CHROMIUM = next(
    (p for p in map(shutil.which, ("chromium", "chromium-browser", "chrome")) if p), None
)
if CHROMIUM is None:
    pytest.skip("there is no Chromium", allow_module_level=True)

SITES = [GateSite("relu", 16), GateSite("layer1.0", 32), GateSite("layer2.0", 64)]
NAMES = [
    "airplane",
    "cab",
    "minivan",
    '</script><img src=x onerror="window.owned=1">',
    "dog",
    "cat",
]


def made_gates(n: int, sites: list[GateSite], names: list[str] | None = None) -> TaskGates:
    generator = torch.Generator().manual_seed(0)
    gates = {s.name: torch.rand(n, s.n_channels, generator=generator) for s in sites}
    loss = np.linspace(1, 0.2, 5)[:, None] * np.ones((1, n))
    return TaskGates(gates, sites, range(n), task_names=names, history=History({"loss": loss}))


def made_evaluation(gates: TaskGates, auc: float = 0.9, **more: Any) -> Evaluation:
    n = len(gates)
    random = np.random.default_rng(0)
    table = random.uniform(0.4, 0.6, (n, n))
    np.fill_diagonal(table, random.uniform(auc - 0.05, auc + 0.05, n))
    names = gates.task_names or tuple(map(str, gates.tasks))
    return Evaluation(
        tasks=gates.tasks, task_names=names, n_images=10 * n, n_own=np.full(n, 10),
        size=np.full(n, 0.5), sizes={}, table=table, fidelity=random.uniform(0, 1, n),
        rank_fidelity=np.zeros(n), margin_auc=np.zeros(n), recall=random.uniform(0.8, 1, n),
        fpr=random.uniform(0, 0.5, n), other_accuracy=np.zeros(n), **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        try:
            found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"Chromium does not start: {error}")
        yield found
        found.close()


class Opened:
    """A page of the report, with everything that went wrong in it."""

    def __init__(self, browser: Any, file: Path | str, height: int = 900, **options: Any) -> None:
        self.page = browser.new_page(viewport={"width": 1280, "height": height}, **options)
        self.page.set_default_timeout(200_000)  # the machine may be busy
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file if isinstance(file, str) else file.as_uri(), wait_until="load")

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.wrong.append(message.text)

    def through(self) -> None:
        """Scroll to the end, so that every chart is drawn."""
        self.page.evaluate("document.documentElement.style.scrollBehavior = 'auto'")
        for chart in self.page.query_selector_all(".chart"):
            chart.scroll_into_view_if_needed()
            name = chart.get_attribute("id")
            self.page.wait_for_selector(f"#{name} .main-svg", timeout=200_000, state="attached")

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gates = made_gates(6, SITES, NAMES)
    whole = made_evaluation(gates, 0.98)
    result = made_evaluation(
        gates, random=(made_evaluation(gates, 0.5, _whole=whole),), _whole=whole,
        rivals={"taylor <b>": made_evaluation(gates, 0.7, _whole=whole)},
    )  # fmt: skip
    iou = {s.name: np.full((s.n_channels, 1), 0.2) for s in SITES}
    units = UnitConcepts(iou, [Concept("wheel", "part")], source="by hand")
    report = Report(gates, evaluation=result, units=units, title="Six classes")
    return report.save(tmp_path_factory.mktemp("report") / "small.html")


@pytest.fixture
def opened(browser: Any, small: Path) -> Iterator[Opened]:
    found = Opened(browser, small)
    yield found
    assert found.wrong == []
    found.page.close()


class _Slowly(BaseHTTPRequestHandler):
    """Hands out a page, with a pause before its last megabyte."""

    content: bytes

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(self.content[:-1_000_000])
        self.wfile.flush()
        time.sleep(1.5)
        self.wfile.write(self.content[-1_000_000:])

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def test_charts_in_sight_wait_for_the_whole_page(browser: Any, small: Path) -> None:
    handler = type("Handler", (_Slowly,), {"content": small.read_bytes()})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}/"
    try:
        opened = Opened(browser, address, height=6000)  # all charts are in sight at once
        for chart in opened.page.query_selector_all(".chart"):
            name = chart.get_attribute("id")
            opened.page.wait_for_selector(f"#{name} .main-svg", timeout=200_000, state="attached")
    finally:
        server.shutdown()
        server.server_close()
    assert [text for text in opened.wrong if "favicon" not in text] == []
    opened.page.close()


def test_loads_and_draws_without_a_word(opened: Opened) -> None:
    opened.through()
    assert opened.text("h1") == "Six classes"
    charts = opened.page.query_selector_all(".chart")
    assert len(charts) == 5  # AUC, FPR, depth, overlap, learning
    assert [url for url in opened.asked if not url.startswith(("file:", "data:"))] == []
    assert opened.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    # All texts are there, whatever is in them, and none of it has run.
    assert opened.text("#task-3").startswith("</script>")
    assert opened.page.evaluate("window.owned === undefined && document.images.length === 0")


def test_canvas_shows_the_gates(opened: Opened) -> None:
    gates = made_gates(6, SITES, NAMES)
    kept = gates.sub_architecture(0)
    # A pixel in the middle of each of the first site's cells.
    seen = opened.page.evaluate(
        """() => {
          const canvas = document.getElementById("canvas");
          const box = canvas.getBoundingClientRect();
          const found = {};
          for (let y = 4; y < box.height - 30; y += 6) for (let x = 3; x < box.width; x += 6) {
            canvas.dispatchEvent(new MouseEvent("mousemove",
              { clientX: box.left + x, clientY: box.top + y }));
            if (document.getElementById("tip").hidden) continue;
            const lines = [...document.getElementById("tip").children];
            const [name, says] = lines.map((line) => line.textContent);
            found[name] = says;
          }
          return found;
        }"""
    )
    for site in SITES:
        for channel in range(site.n_channels):
            says = seen[f"{site.name}, channel {channel}"]
            gate = float(gates[site.name][0, channel])
            word = "kept" if bool(kept[site.name][channel]) else "closed"
            assert word in says
            assert abs(float(says.rsplit(" ", 1)[1]) - gate) < 0.011
    assert f"kept: {kept.n_kept}" in opened.text("#legend")


def test_hover_tells_channel_gate_and_concept(opened: Opened) -> None:
    # Questions and pictures stand above it, and charts that are drawn later move it: hovering
    # scrolls to it and waits until it stands still.
    opened.page.hover("#canvas", position={"x": 6, "y": 6})
    opened.page.wait_for_selector("#tip", state="visible")
    tip = opened.text("#tip")
    assert "relu, channel 0" in tip
    assert "gate 0." in tip
    assert "wheel (part), IoU 0.200" in tip
    box = opened.page.query_selector("#canvas").bounding_box()
    opened.page.mouse.move(box["x"] + 6, box["y"] - 200)
    opened.page.wait_for_selector("#tip", state="hidden")


def test_search(opened: Opened) -> None:
    opened.page.fill("#search", "CA")
    assert [row.inner_text().split()[0] for row in opened.page.query_selector_all(".task")] == [
        "cab", "cat",
    ]  # fmt: skip
    assert "2 of 6" in opened.text("#found")
    opened.page.keyboard.press("Enter")
    assert opened.text("#name-a") == "cab"
    opened.page.fill("#search", "nothing like it")
    opened.page.keyboard.press("Enter")
    assert opened.text("#name-a") == "cab"
    opened.page.fill("#search", "4")  # a class index
    assert opened.page.query_selector(".task").inner_text().split()[0] == "dog"


def test_order_by_a_measure(opened: Opened) -> None:
    opened.page.select_option("#order", "own_auc up")
    values = [
        float(row.inner_text().split()[-1]) for row in opened.page.query_selector_all(".task")
    ]
    assert values == sorted(values)
    assert len(set(values)) > 1


def test_two_classes_are_compared_as_python_does(opened: Opened) -> None:
    gates = made_gates(6, SITES, NAMES)
    a, b = gates.sub_architecture(1), gates.sub_architecture(5)
    opened.page.click("#task-1")
    opened.page.click("#slot-b")
    opened.page.click("#task-5")
    legend = opened.text("#legend")
    for words in (
        f"only A: {(a - b).n_kept}",
        f"both: {(a & b).n_kept}",
        f"only B: {(b - a).n_kept}",
    ):
        assert words in legend
    assert float(opened.text("#kappa")) == pytest.approx(
        a.overlap(b, chance_corrected=True), abs=0.0006
    )
    # By the keyboard: a page that still moves, on a busy machine, is clicked at another place.
    opened.page.press("#site-table summary", "Enter")
    opened.page.wait_for_selector("#site-table tbody tr", state="visible")
    cells = opened.page.query_selector_all("#site-table tbody tr")[1].inner_text().split()
    name = SITES[1].name
    assert cells[:5] == [
        name, "32", str(int(a[name].sum())), str(int(b[name].sum())), str(int((a & b)[name].sum())),
    ]  # fmt: skip
    assert float(cells[6]) == pytest.approx(a.overlaps(b, chance_corrected=True)[name], abs=0.006)
    opened.page.click("#swap")
    assert opened.text("#name-a") == "cat"
    opened.page.click("#single")
    assert "only B" not in opened.text("#legend")


def test_nearest_classes_lead_to_a_comparison(opened: Opened) -> None:
    opened.page.click("#task-2")
    gates = made_gates(6, SITES, NAMES)
    archs = gates.sub_architectures()
    kappa = [archs[2].overlap(arch, chance_corrected=True) for arch in archs]
    kappa[2] = -np.inf
    opened.page.click("#nearest button")
    assert opened.text("#name-b") == NAMES[int(np.argmax(kappa))]


def test_everything_by_keyboard(opened: Opened) -> None:
    page = opened.page
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"theme", "slot-a", "search", "order", "tasks", "canvas", "arrange"} <= reached
    page.focus("#tasks")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert opened.text("#name-a") == "cab"
    page.keyboard.press("End")
    page.keyboard.press("Shift+Enter")
    assert opened.text("#name-b") == "cat"
    assert page.get_attribute("#tasks", "aria-activedescendant") == "task-5"
    assert page.get_attribute("#task-5", "aria-selected") == "true"
    page.focus("#slot-a")
    page.keyboard.press("ArrowDown")
    assert page.get_attribute("#slot-b", "aria-checked") == "true"
    page.focus("#canvas")
    page.keyboard.press("ArrowRight")
    assert opened.text("#cell").startswith("relu, channel 0")
    page.keyboard.press("ArrowRight")
    assert opened.text("#cell").startswith("relu, channel 1")
    page.keyboard.press("PageDown")
    assert opened.text("#cell").startswith("layer1.0, channel 1")
    page.keyboard.press("End")
    assert opened.text("#cell").startswith("layer2.0")
    # Where the keyboard is can be seen.
    width = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert float(width.removesuffix("px")) >= 2


def test_names_for_screen_readers(opened: Opened) -> None:
    nameless = opened.page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, canvas, figure, [role]")]
          .filter((e) => !(e.getAttribute("aria-label") || e.textContent.trim() ||
                           e.closest("label") || e.getAttribute("role") === "status"))
          .map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert nameless == []


def test_dark_and_light(browser: Any, small: Path) -> None:
    opened = Opened(browser, small, color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = opened.page.evaluate(ground)
    opened.through()
    ink = "getComputedStyle(document.querySelector('#chart-depth .xtitle')).fill"
    dark_ink = opened.page.evaluate(ink)
    opened.page.click("#theme")  # dark, whatever the system says
    assert opened.page.evaluate(ground) == dark
    opened.page.click("#theme")  # light
    assert opened.page.evaluate(ground) == "rgb(246, 247, 248)" != dark
    opened.through()
    opened.page.wait_for_timeout(100)
    assert opened.page.evaluate(ink) != dark_ink
    assert opened.wrong == []
    opened.page.close()


def test_narrow_window_and_print(browser: Any, small: Path, tmp_path: Path) -> None:
    opened = Opened(browser, small)
    opened.page.set_viewport_size({"width": 380, "height": 700})
    opened.through()
    assert opened.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    opened.page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").stat().st_size > 20_000
    assert opened.wrong == []
    opened.page.close()


def test_a_thousand_classes_are_quick(
    browser: Any, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    # As wide as ResNet50's gate sites, in fewer of them.
    sites = [GateSite(f"layer{i}", c) for i, c in enumerate((64, 256, 512, 1024, 2048))]
    gates = made_gates(1000, sites, [f"class number {i}" for i in range(1000)])
    file = Report(gates, evaluation=made_evaluation(gates)).save(tmp_path / "large.html")
    opened = Opened(browser, file)
    paint, shown = opened.page.evaluate(
        """() => [performance.getEntriesByName("first-contentful-paint")[0].startTime,
                  performance.getEntriesByName("nad-attr-shown")[0].startTime]"""
    )
    record_property("first_paint_ms", paint)
    record_property("shown_ms", shown)
    # Under a second on an idle machine; this one may be busy.
    assert paint < 6000
    assert shown < 12000
    assert opened.page.evaluate("document.querySelectorAll('#tasks .task').length") == 1000
    opened.page.fill("#search", "number 777")
    opened.page.keyboard.press("Enter")
    assert opened.text("#name-a") == "class number 777"
    kept = gates.sub_architecture(777).n_kept
    assert f"kept: {kept:,}" in opened.text("#legend")
    assert opened.wrong == []
    opened.page.close()


def test_the_flow_is_traced_by_mouse_and_keyboard(browser: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 1), torch.nn.ReLU(), torch.nn.Conv2d(5, 6, 1), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(6, 3),
    ).eval()  # fmt: skip
    sites, images = [GateSite("1", 5, 1), GateSite("3", 6, 1)], torch.rand(6, 3, 8, 8)
    gates = made_gates(3, sites, ["ant", "bee", "</script>"])
    flows = [information_flow(net, gates, images, tasks=[task]) for task in (0, 1)]
    iou = {s.name: np.full((s.n_channels, 1), 0.2) for s in sites}
    units = UnitConcepts(iou, [Concept("wheel", "part")], source="by hand")
    report = Report(gates, flow=flows, units=units)
    report.measure(net, (images, torch.arange(6) % 3), parts=("pictures",))
    file = report.save(tmp_path / "flow.html")
    found = Opened(browser, file)
    page = found.page
    n = len(flow_picture([flow.flows[0] for flow in flows])["nodes"])
    assert len(page.query_selector_all("#flow .node")) == n
    assert page.query_selector("#flow .t1") is None
    page.select_option("#flow-tasks label:nth-child(2) select", label="bee")
    assert page.query_selector("#flow .t1") is not None
    page.click("#flow .node[data-node='0']")
    assert "Feeds:" in found.text("#flow-said")
    assert "wheel" in found.text("#flow-said")
    assert page.query_selector("#flow-said img").get_attribute("src").startswith("data:image")
    assert page.query_selector("#flow path.faint") is not None
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert "of 3" in found.text("#flow-said b")
    assert "Fed by" in found.text("#flow-said")
    page.keyboard.press("Escape")
    assert "Nothing is traced" in found.text("#flow-said")
    assert page.query_selector("#flow-more").is_hidden()
    page.set_viewport_size({"width": 280, "height": 900})
    page.wait_for_selector("#flow-more", state="visible")
    assert ": 2 sites." in found.text("#flow-more")
    assert found.wrong == []
    page.close()


def test_a_newcomers_question_is_one_click_from_its_answer(opened: Opened) -> None:
    from nad_attr.report.first import NEWCOMERS

    page = opened.page
    assert page.evaluate("document.querySelector('.first').getBoundingClientRect().bottom < 900")
    for name, question in NEWCOMERS:
        answer = page.locator(f"#question-{name} p")
        assert not answer.is_visible()
        page.get_by_text(question, exact=True).click()
        assert answer.is_visible()
        link = page.locator(f"#question-{name} a")
        if link.count():
            target = link.get_attribute("href")
            assert page.locator(target).count() == 1
    page.click("#question-which a")
    page.wait_for_timeout(1500)  # it scrolls smoothly
    assert page.evaluate("document.querySelector('#architecture').getBoundingClientRect().top") < 99


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_at_any_width(
    browser: Any, small: Path, width: int, scheme: str
) -> None:
    opened = Opened(browser, small, color_scheme=scheme)
    opened.page.set_viewport_size({"width": width, "height": 844})
    assert opened.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    cut = opened.page.evaluate(
        """() => [...document.querySelectorAll('.first dd, .questions summary, h1, h2')]
          .filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent)"""
    )
    assert cut == []
    assert opened.wrong == []
    opened.page.close()


@pytest.mark.parametrize("kind", ["classes", "several labels", "regression"])
def test_measures_can_be_read_on_a_phone(browser: Any, tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
    images, drawn = torch.rand(40, 4), torch.rand(40, 3)
    labels = {
        "classes": torch.arange(40) % 3,
        "several labels": Labels((drawn < 0.5).float()),
        "regression": Labels(drawn),
    }[kind]
    gates = learn_gates(net, (images, labels), recipe=Recipe(steps=2, images_per_step=8))
    result = evaluate(net, gates, (images, labels), n_random=2)
    opened = Opened(browser, Report(gates, evaluation=result).save(tmp_path / "phone.html"))
    opened.page.set_viewport_size({"width": 390, "height": 844})
    assert opened.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    # Scrolled to its end, each number is beside the name of its row and below that of its column.
    apart = opened.page.evaluate(
        """() => [...document.querySelectorAll('.scroll')]
          .filter((e) => e.querySelector('tbody th')).map((box) => {
            box.scrollLeft = box.scrollWidth;
            const name = box.querySelector('tbody th').getBoundingClientRect();
            const last = box.querySelector('tbody tr').lastElementChild.getBoundingClientRect();
            return [name.left - box.getBoundingClientRect().left, last.left - name.right,
                    last.right - window.innerWidth]; })"""
    )
    assert apart
    for name, between, over in apart:
        assert abs(name) < 2
        assert between > -1
        assert over < 1
    assert opened.wrong == []
    opened.page.close()
