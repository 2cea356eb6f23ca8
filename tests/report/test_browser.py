"""The page in a real browser: Debian's Chromium, driven by Playwright."""

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from conftest import require
from report_material import VALUES, read_csv, write_evaluation, write_run

from bov_lightning.report import write_report

pytestmark = pytest.mark.slow

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
THEMES = ("light", "dark")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")


@pytest.fixture(scope="module")
def browser():
    require(CHROMIUM is not None, "browser", "needs chromium (apt-get install chromium)")
    require(find_spec("playwright") is not None, "browser", "needs playwright (pip install)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield found
        found.close()


@pytest.fixture
def open_page(browser):
    """A function that opens a file; at the end nothing may have gone wrong or left the machine."""
    wrong, contexts = [], []

    def open_page(path: Path, width: int = 1280, theme: str = "light"):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=theme, offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda request: request.url == path.as_uri()
                or request.url.startswith("data:") or wrong.append(request.url))  # fmt: skip
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs of all kinds: seeds, evaluations, unfinished, empty, of another tokenizer."""
    folder = tmp_path_factory.mktemp("report") / "runs"
    random = np.random.default_rng(0)
    for seed in range(3):
        for value in ("standard", "bov", "bov_fixed"):
            bpb = [2.5, 2.0, *np.sort(random.normal(1.5, 0.05, 20))[::-1]]
            run = write_run(folder / f"{value}{seed}", value, seed, bpb)
            write_evaluation(run, 22, {
                "core_arc_easy": [*map(int, random.integers(0, 2, 30))],
                "core_boolq": [*map(int, random.integers(0, 2, 30))],
            })  # fmt: skip
    write_run(folder / "stopped", "bov", 7, [2.0, 1.9], steps=22)
    write_run(folder / "alien", data={"source": "x", "tokenizer": "y", "val_rows": "z"})
    (folder / "empty" / "checkpoints").mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def report(runs) -> Path:
    """Its page, beside its CSV files."""
    path = runs.parent / "report.html"
    write_report([runs], path, baseline="standard")
    write_report([runs], runs.parent / "csv", "csv", baseline="standard")
    return path


def test_numbers_on_the_page_equal_the_csvs(report, open_page):
    page = open_page(report)
    tables = page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll("table")].map((table) => [
            table.id, [...table.rows].map((row) => [...row.cells].map((cell) =>
                [cell.innerText, cell.dataset.value ?? null]))]))"""
    )
    assert len(tables) >= 9
    for name, (head, *body) in tables.items():
        rows = read_csv(report.parent / "csv" / f"{name}.csv")
        assert len(rows) == len(body)
        columns = [re.sub("[ -]", "_", text.strip(" ↕↑↓")) for text, _ in head]
        for row, cells in zip(rows, body, strict=True):
            for column, (text, value) in zip(columns, cells, strict=True):
                assert row[column] == value
                if not value:
                    assert text == "-"
                elif value.replace(".", "").isdigit() and "e" not in text:
                    number = float(text.partition(" [")[0].replace(",", "").rstrip("%"))
                    number = number / 100 if "%" in text else number
                    assert number == pytest.approx(float(value), rel=0.01, abs=0.001)
    links = page.evaluate(
        'Object.fromEntries([...document.querySelectorAll("a[download$=csv]")]'
        ".map((a) => [a.download, a.href]))"
    )
    files = {path.name: path for path in (report.parent / "csv").iterdir()}
    assert links.keys() == files.keys()
    for name, link in links.items():
        assert unquote(link).partition(",")[2] == files[name].read_text()


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_and_can_be_read(report, open_page, width, theme):
    page = open_page(report, width, theme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    # Colours against the background, by WCAG's formula: 4.5 for text, 3 for lines.
    contrast = page.evaluate(
        """() => {
            const probe = document.body.appendChild(document.createElement("i"));
            const luminance = (colour) => {
                probe.style.color = colour;
                const parts = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3)
                    .map((x) => x / 255).map((x) => x <= 0.04045 ? x / 12.92
                    : ((x + 0.055) / 1.055) ** 2.4);
                return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
            };
            const paper = luminance("var(--paper)");
            const names = ["ink", "quiet", "link", ...[...Array(7).keys()].map((i) => `line-${i}`)];
            return Object.fromEntries(names.map((name) => {
                const other = luminance(`var(--${name})`);
                return [name, (Math.max(paper, other) + 0.05) / (Math.min(paper, other) + 0.05)];
            }).concat([["paper", paper]]));
        }"""
    )
    assert (contrast.pop("paper") < 0.1) == (theme == "dark")
    for name, ratio in contrast.items():
        assert ratio >= (3 if name.startswith("line") else 4.5), name
    # Lines and letters of the plots follow the theme.
    colours = page.evaluate(
        """() => ["path[style*='--line-0']", "text"].map((what) => {
            const style = getComputedStyle(document.querySelector(`figure > svg ${what}`));
            return what === "text" ? style.fill : style.stroke;
        })"""
    )
    expected = {
        "light": ["rgb(0, 114, 178)", "rgb(26, 26, 26)"],
        "dark": ["rgb(79, 168, 224)", "rgb(230, 230, 230)"],
    }
    assert colours == expected[theme]


def test_page_can_be_used_without_seeing_it(report, open_page):
    page = open_page(report)
    facts = page.evaluate(
        """() => ({
            ids: [...document.querySelectorAll("[id]")].map((e) => e.id),
            plots: [...document.querySelectorAll("figure > svg")].map((e) =>
                [e.getAttribute("role"), e.getAttribute("aria-label")]),
            captions: [...document.querySelectorAll("table")].map((e) => e.caption.innerText),
            heads: [...document.querySelectorAll("th")].map((e) => e.scope),
            dangling: [...document.querySelectorAll("svg [href]")].map((e) =>
                document.getElementById(e.getAttribute("href").slice(1))).filter((e) => !e).length,
        })"""
    )
    assert len(facts["ids"]) == len(set(facts["ids"]))
    assert len(facts["plots"]) >= 8
    assert all(role == "img" and len(label) > 20 for role, label in facts["plots"])
    assert all(facts["captions"])
    assert set(facts["heads"]) == {"col", "row"}
    assert facts["dangling"] == 0


def test_tables_sort_by_any_column(report, open_page):
    page = open_page(report)

    def column(index: int) -> list[str]:
        return page.evaluate(
            f"[...document.querySelector('#runs').tBodies[0].rows]"
            f".map((row) => row.cells[{index}].dataset.value)"
        )

    names = [th.inner_text().rstrip(" ↕") for th in page.query_selector_all("#runs thead th")]
    # As people sort: an underscore comes before digits and letters.
    keys = {"val bpb": float, "planned": float, "run": lambda name: name.replace("_", " ")}
    for name, key in keys.items():
        index = names.index(name)
        given = column(index)
        known = sorted(filter(None, given), key=key)
        empty = [""] * given.count("")
        button = page.locator("#runs thead button").nth(index)
        button.click()
        assert column(index) == known + empty
        button.click()
        assert column(index) == known[::-1] + empty
        assert page.locator("#runs th[aria-sort]").count() == 1


def test_legends_hide_and_bring_out_rows(report, open_page):
    page = open_page(report)
    section = page.locator("section", has=page.locator("#results-1, #results-2")).nth(1)
    marks = section.locator("svg g[data-row='0']")
    n_mark = marks.count()
    assert n_mark > 5

    def visible() -> int:
        return marks.evaluate_all("all => all.filter((e) => e.style.display !== 'none').length")

    row = section.locator(".legend [data-row='0']")
    row.click()
    assert (visible(), row.get_attribute("aria-pressed")) == (0, "false")
    row.click()
    assert (visible(), row.get_attribute("aria-pressed")) == (n_mark, "true")
    section.locator("[data-all='false']").click()
    assert visible() == 0
    section.locator("[data-all='true']").click()
    assert visible() == n_mark
    row.hover()
    assert section.locator("figure.emphasis").count() == section.locator("figure").count()


def test_names_that_are_markup_run_nothing(tmp_path, open_page):
    hostile = "<img src=x onerror=alert(1)><script>alert(2)<|script>"
    write_run(tmp_path / "runs" / hostile, bpb=[2.0, 1.5])
    write_run(tmp_path / "runs" / "standard", "standard", trainer={"precision": hostile})
    config = tmp_path / "runs" / "broken"
    write_run(config)
    (config / "run.json").write_text(json.dumps({"params": hostile}))
    write_report([tmp_path / "runs"], tmp_path / "r.html")
    page = open_page(tmp_path / "r.html")
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 1
    assert hostile in page.inner_text("#runs")


def test_page_may_run_and_load_nothing_else(report, browser):
    """Even if somebody's text were markup: what is added to the page is blocked."""
    page = browser.new_page()
    page.goto(report.as_uri())
    blocked = """(tag, fill) => new Promise((done) => {
        document.addEventListener("securitypolicyviolation", () => done(true));
        setTimeout(() => done(false), 20000);
        const element = document.createElement(tag);
        Object.assign(element, fill);
        document.body.append(element);
    })"""
    for tag, fill in (("script", {"textContent": "window.ran = 1"}), ("img", {"src": "x.png"})):
        assert page.evaluate(f"([tag, fill]) => ({blocked})(tag, fill)", [tag, fill])
    assert page.evaluate("window.ran") is None
    page.close()


def test_fifty_runs_of_ten_thousand_points_stay_small(tmp_path, open_page):
    random, steps = np.random.default_rng(0), np.arange(1, 10_001)
    for number in range(50):
        seed, value = divmod(number, len(VALUES))
        bpb = 1.5 + 2 / np.sqrt(steps) + random.normal(0, 0.005, len(steps))
        write_run(tmp_path / "runs" / f"{VALUES[value]}{seed}", VALUES[value], seed, bpb.tolist())
    path = tmp_path / "report.html"
    write_report([tmp_path / "runs"], path)
    assert path.stat().st_size < 10 * 2**20
    page = open_page(path)
    assert page.locator("#val_bpb_against_tokens svg g[data-row]").count() == 50
    assert page.locator("#runs tbody tr").count() == 50
