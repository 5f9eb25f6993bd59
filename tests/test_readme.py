"""What the README files say exists: files, links, commands, settings."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from savelib.cli import app
from savelib.config import PROFILES, Config, make_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / f"{folder}README.md" for folder in ("", "notebooks/", "savelib/", "env/", "data/")]
PAGES.append(ROOT / "CONTRIBUTING.md")
TEXT = {page: page.read_text() for page in PAGES}
TARGETS = re.findall(r"(?m)^([a-z-]+):.*##", (ROOT / "Makefile").read_text())
FOLDERS = ("data/", "env/", "notebooks/", "savelib/", "tests/", "method/", "training/")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def code_spans(text: str) -> list[str]:
    """Inline code, without code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```", "", text))


def commands(text: str) -> list[list[str]]:
    """The words of every `make`, `python -m savelib`, `torchrun` and `papermill` command, in code blocks and inline."""
    lines = []
    for block in re.findall(r"(?ms)^```bash\n(.*?)^```", text):
        lines += block.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in [*lines, *code_spans(text)] if _is_command(line)]
    return [w[w.index("-m") + 1 :] if w[0] in ("python", "torchrun") else w for w in words]


def _is_command(line: str) -> bool:
    return bool(re.match(r"(make|papermill) \S|python -m savelib \S|torchrun \S", line)) and "..." not in line


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def tables(text: str, first: str) -> list[list[str]]:
    """The rows (cells as text) of the tables whose header begins with `first`."""
    rows, inside = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else []
        inside = bool(cells) and (inside or cells[0].strip("| ") == first)
        if inside and cells[0].strip("| ") != first and set(line) - set("|- "):
            rows.append(cells)
    assert rows, f"no table {first!r}"
    return rows


def test_the_readme_is_short():
    assert len(TEXT[ROOT / "README.md"].splitlines()) <= 110


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in {slug(h) for h in re.findall(r"(?m)^#+ (.*)$", file.read_text())}, target


@each_page
def test_files_that_are_named_exist(page):
    """Inline code that begins with one of the project's folders, as seen from the root or from the page."""
    for span in code_spans(TEXT[page]):
        name = re.sub(r"<\w+>/?$", "", span)
        if name.startswith(FOLDERS) and re.fullmatch(r"[\w./-]+", name):
            assert (ROOT / name).exists() or (page.parent / name).exists(), span


@each_page
def test_commands_that_are_named_are_understood(page):
    for program, *words in commands(TEXT[page]):
        if program == "make":
            target, *variables = words
            assert target in TARGETS, target
            known = {"ALGO", "PROFILE", "RULE", "SEED", "ARGS", "PYTHON", "PYTEST_ARGS"}
            assert {v.partition("=")[0] for v in variables} <= known
            given = dict(v.split("=", 1) for v in variables).get("ARGS", "").split()
            if target in ("tables", "bench"):
                parse("study" if target == "tables" else "bench", ["any.yaml"] * (target == "tables") + given)
        elif program == "papermill":
            if not words[0].startswith("-"):
                check_papermill(words)
        else:
            parse(words[0], words[1:])


def parse(command: str, words: list[str]) -> None:
    """Parse options without running anything; settings become a Config."""
    sub = typer.main.get_command(app).commands[command]
    params = sub.make_context(command, list(words)).params
    values = {"profile": params.get("profile") or "tiny"}
    if params.get("config"):
        values["run_id"] = params["config"].parent.name
    values |= dict(pair.split("=", 1) for pair in [*params.get("set_", []), *params.get("parameters", [])])
    make_config(**values)
    for file in [*params.get("files", []), *([params["path"]] if "path" in params else [])]:
        assert file.name == "any.yaml" or (ROOT / file).is_file(), file


def check_papermill(words: list[str]) -> None:
    cells = json.loads((ROOT / words[0]).read_text())["cells"]
    (cell,) = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    own = {node.targets[0].id for node in ast.parse("".join(cell["source"])).body}
    named = {words[i + 1] for i, word in enumerate(words) if word == "-p"}
    assert named <= own | set(Config.model_fields)


def test_every_file_of_savelib_has_a_line_and_no_other_is_named():
    spans = [span for row in tables(TEXT[ROOT / "savelib/README.md"], "file") for span in code_spans(row[0])]
    named = [span for span in spans if span.endswith(".py")]
    files = {str(f.relative_to(ROOT / "savelib")) for f in ROOT.glob("savelib/**/*.py") if f.name != "__init__.py"}
    assert sorted(named) == sorted(files)


def test_open_points_have_the_defaults_that_are_named():
    for _, field, default, other in tables(TEXT[ROOT / "savelib/README.md"], "open point"):
        (name,), stated = code_spans(field), code_spans(default)[0]
        assert str(getattr(make_config(profile="paper"), name)) == stated, name
        for value in code_spans(other):
            make_config(profile="paper", **{name: value})


def test_the_papers_rows_are_settings():
    for _, settings in tables(TEXT[ROOT / "savelib/README.md"], "the paper's row"):
        pairs = [span.split("=", 1) for span in code_spans(settings)]
        assert pairs
        for name, value in pairs:
            make_config(**{name: value})


def test_every_profile_is_described():
    rows = tables(TEXT[ROOT / "savelib/README.md"], "profile")
    assert {code_spans(row[0])[0] for row in rows} == set(PROFILES)


def test_every_notebook_has_its_line_and_the_parameters_that_it_names():
    rows = tables(TEXT[ROOT / "notebooks/README.md"], "notebook")
    named = {re.search(r"\((\S+\.ipynb)\)", first)[1]: parameters for first, _, parameters, *_ in rows}
    files = {f.name for f in ROOT.glob("notebooks/*.ipynb")}
    assert set(named) == files and len(rows) == len(files)
    for name, parameters in named.items():
        check_papermill([f"notebooks/{name}", *parameters.strip("`").split()])
    assert {f"notebooks/{name}" for name in files} <= set(re.findall(r"\(([^)]+)\)", TEXT[ROOT / "README.md"]))
