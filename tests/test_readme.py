"""Every command, snippet and link in README.md, CONTRIBUTING.md and docs/ is run or checked."""

import ast
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import tomllib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, SHARED, require
from forks import bov
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import bov_lightning
from bov_lightning.cli import COMMANDS, main
from bov_lightning.recipe.building import build
from bov_lightning.recipe.keys import check_keys
from bov_lightning.recipe.overlays import import_source
from bov_lightning.recipe.sections import Recipe

PAGES = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md",
        *sorted((REPOSITORY / "docs").rglob("*.md")),
    )
}  # fmt: skip

EXEMPT = {
    r"make .*": "test_make_targets_in_the_texts_exist; make test would call itself",
    r"bov fit .*bov-(135m|780m).*": "needs GPUs; test_shrunken_copy_of_every_recipe runs it small",
    r"bov prepare .*bov-(135m|780m).*": "reads the hub; the quickstart's is run",
    r"bov (import nanochat|generate imports/theirs) .*": "tests/model/test_parity.py imports",
    r"bov serve .*|\.venv-serving/bin/python .*": "needs vLLM; serving/vllm/tests starts them",
    r"torchrun .*": "tests/distributed/test_distributed.py starts ranks so",
    r"bov submit (?!.*--dry-run).*": "needs SLURM; tests/slurm submits",
    r"bov sweep (?!.*--dry-run).*": "trains several runs; tests/launch/test_sweep.py does, small",
    r"(\.venv/bin/)?python -m (pip|venv) .*": "installs for minutes; offline.md: how it was tried",
    r"bov probe SmolLM2-135M .*": "needs a model of somebody's; tests/value_probe makes tiny ones",
    r"(BOV_OVERLAYS=\S+ )?python -m pytest .*": "is this suite",
}
"""Commands that are not run here, by a pattern of the whole line, and why."""

CUT = {
    "fit": ["--model.budget.steps", "2", "--model.config.n_layer", "3",
            "--validation.tokens", "2048", "--evaluation.tasks", "[]"],
    "evaluate": ["--max-per-task", "20"],
    "generate": ["--max-new-tokens", "9"],
    "validate": ["--validation.tokens", "2048"],
    "probe": ["--tokens", "2000", "--held-out", "800", "--row-length", "64", "--own-rows", "64"],
}  # fmt: skip
"""What makes a command short: layers, steps, rows, tokens, and the tasks of CORE."""

RECORDED = r"bov (--help|recipes|plan)\b.*"
"""Commands of commands.md that `test_recorded_output_is_what_commands_print` runs."""


def blocks(text: str, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for _, block in found]


def commands(text: str) -> list[str]:
    lines = "\n".join(blocks(text, "bash")).splitlines()
    return [line for line in (re.sub(r"\s+#.*", "", line).strip() for line in lines) if line]


def is_exempt(line: str) -> bool:
    return any(re.fullmatch(pattern, line) for pattern in EXEMPT)


def write_pages():
    """The module docs/write_pages.py."""
    spec = spec_from_file_location("write_pages", REPOSITORY / "docs" / "write_pages.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_exemptions_are_needed():
    lines = [line for text in PAGES.values() for line in commands(text)]
    for pattern in EXEMPT:
        assert any(re.fullmatch(pattern, line) for line in lines), pattern


def test_every_command_is_one_that_can_be_run():
    """A line is ours, an `export`, or exempt: nothing is left out silently."""
    for name, text in PAGES.items():
        for line in commands(text):
            known = re.match(r"(\w+=\S+ )*(bov|export) ", line) or is_exempt(line)
            assert known, f"{name}: {line}"


def test_make_targets_in_the_texts_exist():
    targets = {
        line.removeprefix("make ")
        for text in PAGES.values()
        for line in commands(text)
        if line.startswith("make ")
    }
    assert {"quickstart", "test", "docs"} <= targets
    subprocess.run(
        ["make", "--dry-run", *sorted(targets)], cwd=REPOSITORY, check=True, capture_output=True
    )


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory) -> Path:
    """What the pages suppose: the quickstart's run and the baseline's, two steps long."""
    folder = tmp_path_factory.mktemp("runs")
    with contextlib.chdir(folder):
        for overlay in ([], ["--config", "values/standard"]):
            assert main(["fit", "--config", "quickstart", *overlay, *CUT["fit"]]) == 0
    return folder


def copy_or_link(source: str, target: str) -> None:
    """Tensors and rows, most of the megabytes, are replaced by commands but never changed."""
    is_large = os.path.getsize(source) > 1_000_000
    (os.link if is_large else shutil.copy2)(source, target)


@pytest.fixture
def home(two_runs, workplace, monkeypatch) -> Path:
    """The two runs, recipes, examples and the files of CORE."""
    for name in ("runs", "data"):
        shutil.copytree(two_runs / name, workplace / name, copy_function=copy_or_link)
    for path in (REPOSITORY / "recipes", REPOSITORY / "examples", SHARED / "eval_bundle"):
        (workplace / path.name).symlink_to(path)
    (workplace / "library").symlink_to(sysconfig.get_paths()["stdlib"])
    monkeypatch.setattr("sys.path", [*sys.path])
    return workplace


def run_line(line: str, monkeypatch) -> None:
    """One line of a page, in this process; training and CORE are cut short."""
    words = shlex.split(line.partition("|")[0].replace("2>&1", ""))
    while re.match(r"\w+=", words[0]) or words[0] == "export":
        if words[0] != "export":
            name, _, value = words[0].partition("=")
            monkeypatch.setenv(name, value)
            sys.path += [value] if name == "PYTHONPATH" else []
        if not words[1:]:
            return
        words = words[1:]
    assert words[0] == "bov", line
    command, *arguments = words[1:]
    if command == "fit" and "--keys" not in arguments:
        arguments += CUT["fit"]
    if command in ("probe", "generate", "validate", "evaluate"):
        arguments += CUT[command]
    if command == "evaluate":
        arguments += [] if "heldout" in arguments else ["--tasks", "core_copa"]
    if "--trainer.devices" in arguments:
        # Several processes repeat the command line. Twice: it starts, and it resumes.
        for steps in ("2", "3"):
            again = [command, *arguments, "--model.budget.steps", steps]
            result = bov(*again, check=True, fork_children=True)
        assert "resuming runs/two from step 2" in result.stderr
        return
    # A page shows a failure by what it prints.
    assert main([command, *arguments]) == (2 if "| tail -n 1" in line else 0), line


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n, text in PAGES.items() if not all(map(is_exempt, commands(text)))]
)
def test_commands_run(name, home, monkeypatch, capsys):
    """As written, in order."""
    if "--data-dir" in PAGES[name]:
        require((home / "eval_bundle").is_dir(), "shared", "the CORE files are not there")
    recorded = [line for line in commands(PAGES["docs/commands.md"]) if re.match(RECORDED, line)]
    for line in commands(PAGES[name]):
        if not is_exempt(line) and line not in recorded:
            run_line(line, monkeypatch)
    for snippet in blocks(PAGES[name], "python"):
        if "\nclass " not in snippet:  # the worked example, which is tested as a file
            exec(snippet, {})
    if any("--compare" in line for line in commands(PAGES[name])):
        assert "minus runs/quickstart-standard, paired by row" in capsys.readouterr().out


def test_python_is_python():
    for text in PAGES.values():
        for snippet in blocks(text, "python"):
            ast.parse(snippet)


def memory_apart(output: str) -> tuple[str, list[float]]:
    """The text without columns, and its gigabytes, which every change of the network moves."""
    sizes = re.findall(r"([\d.]+) GiB", output)
    return " ".join(re.sub(r"[\d.]+ GiB", "GiB", output).split()), [float(size) for size in sizes]


@pytest.mark.slow
def test_recorded_output_is_what_commands_print(workplace, monkeypatch, capfd):
    """Of those that need no run: the rest was true on the machine that it was recorded on."""
    (workplace / "recipes").symlink_to(REPOSITORY / "recipes")
    pages = write_pages()
    monkeypatch.setenv("COLUMNS", str(pages.WIDTH))
    checked = 0
    for found in pages.COMMANDS.finditer(PAGES["docs/commands.md"]):
        if not re.match(RECORDED, found["commands"]):
            continue
        capfd.readouterr()
        run_line(found["commands"].strip(), monkeypatch)
        printed = "".join(capfd.readouterr())
        if found["commands"].endswith("| tail -n 1\n"):
            printed = printed.splitlines()[-1]
        (expected, sizes), (text, real) = map(memory_apart, (found["output"], printed))
        assert text == expected, (
            "run: python docs/write_pages.py commands.md . '^bov (--help|recipes|plan)'"
        )
        assert real == pytest.approx(sizes, rel=0.25)
        checked += 1
    assert checked == 5


def test_every_command_has_its_row_and_its_section(capsys):
    assert set(re.findall(r"^\| `bov (\w+)", PAGES["README.md"], re.MULTILINE)) == set(COMMANDS)
    sections = re.findall(r"^## bov (\w+)$", PAGES["docs/commands.md"], re.MULTILINE)
    assert set(sections) == set(COMMANDS)
    assert main(["--help"]) == 0
    assert set(re.findall(r"^  (\w+)  ", capsys.readouterr().out, re.MULTILINE)) == set(COMMANDS)


def test_keys_are_those_of_the_code():
    assert PAGES["docs/keys.md"] == write_pages().keys(), "run: python docs/write_pages.py"


def test_yaml_snippets_are_valid():
    """Whole recipes and parts of them; a part of the data section names what exists."""
    from bov_lightning.recipe.data_module import check_class

    n_recipe = 0
    for name, text in PAGES.items():
        for snippet in blocks(text, "yaml"):
            data = yaml.safe_load(snippet)
            if set(data) == {"source"}:
                check_class(data["source"], "data", name)
                continue
            check_keys(data, name)
            import_source(data, name)
            build(Recipe, data, name)
            if data.get("data"):
                check_class(data["data"], "data", name)
            n_recipe += 1
    assert n_recipe >= 5


def without_code(text: str) -> str:
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """What headings are called in links, as code hosts and MyST do it."""
    titles = re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    """Files, headings, images, also in raw HTML; `make docs` checks them its own way."""
    text = without_code(PAGES[name])
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    for target in targets:
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (REPOSITORY / name).parent / file if file else REPOSITORY / name
        assert path.exists(), f"{name}: {target}"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{name}: {target}"


def test_the_worked_example_is_the_one_that_is_tested():
    """value-sources.md shows the files that tests/variants.py runs through everything."""
    shown = blocks(PAGES["docs/value-sources.md"], "python")
    for name, text in zip(("low_rank_bank", "bigram_bank"), shown, strict=True):
        assert text == (REPOSITORY / "examples" / f"{name}.py").read_text(encoding="utf-8")
    (overlay,) = blocks(PAGES["docs/value-sources.md"], "yaml")
    assert overlay == (REPOSITORY / "examples" / "low_rank_bank.yaml").read_text(encoding="utf-8")


def test_the_citation_is_valid():
    """Against what the format requires: see the Citation File Format 1.2.0."""
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == bov_lightning.__version__
    assert {"message", "title", "authors"} <= set(citation)
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors"} <= set(paper)
    for author in (*citation["authors"], *paper["authors"]):
        assert "family-names" in author or "name" in author
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["He", "Liu", "Huang", "Zhang"]
    assert "2606.02780" in paper["url"]


def test_every_dependency_is_pinned_within_its_bounds():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"]:
        needed = Requirement(text)
        assert needed.specifier.contains(pins[canonicalize_name(needed.name)]), text
