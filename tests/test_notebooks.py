"""The notebooks: their form; papermill runs each to its end from either folder, and misspelt parameters are refused."""

import ast
import html
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from forked_engine import execute
from safetensors.torch import load_file, save_file
from test_show import loads
from tiny_models import make_reward_model

from savelib.analysis import METRICS
from savelib.benchmarks.judged.local_judge import local_judge
from savelib.config import Config, make_config, notebook_config
from savelib.data import world
from savelib.runs.folder import read_metrics
from savelib.runs.launch import once_id
from savelib.runs.train import train
from savelib.show.page import export

ROOT = Path(__file__).resolve().parent.parent
PATHS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))}
SPINE = ("00_bt_preferences", "01_value_head", "02_onpolicy_filtering", "03_save_train", "04_analysis")
BENCHDATA = ROOT.parent / "shared" / "benchdata"
ANNOTATIONS = BENCHDATA / "alpaca_eval"
KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(PATHS[name], as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


# form


def test_the_spine_is_there():
    assert set(SPINE) <= set(PATHS)


@pytest.mark.parametrize("name", PATHS)
def test_file_is_plain(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata == {"kernelspec": KERNEL}
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    for cell in code_cells(notebook):
        assert cell.outputs == [] and cell.execution_count is None, cell.id
    assert all(cell.metadata == {} or cell.metadata == {"tags": ["parameters"]} for cell in notebook.cells)


@pytest.mark.parametrize("name", PATHS)
def test_cells_are_short(name):
    lengths = [len(cell.source.splitlines()) for cell in code_cells(read(name))]
    assert 15 <= len(lengths) <= 30
    assert statistics.median(lengths) <= 8 and max(lengths) <= 25
    assert min(lengths) >= 1


@pytest.mark.parametrize("name", PATHS)
def test_parameters_cell_is_literals_with_comments_and_is_checked(name):
    cells = code_cells(read(name))
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == cells[:1], "one parameters cell, the first code cell"
    first, *lines = tagged[0].source.splitlines()
    assert first == "# Parameters"
    for line in lines:
        assignment = re.fullmatch(r"[a-z_]+ = (.+?)  # \S.*", line)
        assert assignment, line
        ast.literal_eval(assignment[1])
    assert re.search(r"config = notebook_config\(\s*In", cells[1].source), "the cell after it makes the config"
    also = re.search(r"also=(\(.*?\))", cells[1].source)
    config = notebook_config([tagged[0].source], ast.literal_eval(also[1]) if also else ())
    assert config.profile == ("smol" if name == "14_real_language_model" else "tiny")


@pytest.mark.parametrize("name", PATHS)
def test_text_has_the_parts_and_nothing_switches_escaping_off(name):
    notebook = read(name)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert notebook.cells[0].source.startswith("# ")
    for part in ("**Question.**", "**Paper.**", "**Time.**", "## Exercises", "**Next", "What you should see"):
        assert part in prose, part
    for cell in code_cells(notebook):
        assert not re.search(r"escape\s*=|\.style\b|pip install|os\.chdir|\.\./", cell.source), cell.id


# execution


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """The folder of the runs that these tests make, and of the executed copies."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def made(runs) -> Path:
    """`runs` with the short runs that notebooks 04, 05 and 06 would make, made once, in this process, for all three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAVE_RUNS", str(runs))
        for rule in ("save", "frozen"):
            config = make_config(rule=rule, total_steps=3)
            first, *others = (once_id(config, prefix) for prefix in ("04", "05", "06"))
            train(config.model_copy(update={"run_id": first}))
            for name in others:
                shutil.copytree(runs / first, runs / name)
    return runs


def papermill(name: str, runs: Path, cwd: Path = ROOT, /, **parameters) -> tuple[str, Path]:
    """Run a notebook in a fork of this process (forked_engine.py): the error's text or "", and the executed copy."""
    if torch.cuda.is_available():
        done, copy = in_a_kernel(name, runs, cwd, **parameters)
        return done.stderr if done.returncode else "", copy
    copy = runs / f"{name}-{len(list(runs.glob('*.ipynb')))}.ipynb"
    given = {key: value if isinstance(value, int | float) else str(value) for key, value in parameters.items()}
    return execute(PATHS[name], copy, given, cwd, {"SAVE_RUNS": str(runs)}), copy


def in_a_kernel(name: str, runs: Path, cwd: Path = ROOT, /, **parameters) -> tuple[subprocess.CompletedProcess, Path]:
    """`papermill notebook copy -p name value ...`, as a user types it."""
    copy = runs / f"{name}-{len(list(runs.glob('*.ipynb')))}.ipynb"
    given = [word for key, value in parameters.items() for word in ("-p", key, str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "papermill", os.path.relpath(PATHS[name], cwd), str(copy), "--no-progress-bar", *given],
        cwd=cwd,
        env=os.environ | {"SAVE_RUNS": str(runs), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    return done, copy


def executed(name: str, runs: Path, cwd: Path = ROOT, /, **parameters) -> nbformat.NotebookNode:
    """The executed copy of a notebook; fails unless it ended well, showed a figure and wrote no error or warning."""
    error, copy = papermill(name, runs, cwd, **parameters)
    assert not error, error[-3000:]
    return checked(copy)


def checked(copy: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(copy, as_version=4)
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert all(cell.execution_count for cell in code_cells(notebook))
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no figure"
    page = export(copy).read_text()
    assert loads(page) == [] and "$$" not in re.sub(r"(?s)<(script|pre|code).*?</\1>", "", page)
    return notebook


def text_of(notebook: nbformat.NotebookNode) -> str:
    """What was printed and shown, also inside of what unfolds."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    data = [output.get("data", {}) for output in outputs]
    said = [
        output.get("text") or one.get("text/html") or one.get("text/plain", "")
        for output, one in zip(outputs, data, strict=True)
    ]
    return html.unescape(re.sub(r"<[^>]*>", "", "\n".join(said)))


def manifest(runs: Path, run_id: str) -> dict:
    return json.loads((runs / run_id / "manifest.json").read_text())


@pytest.mark.parametrize(
    "name, folder",
    [
        ("00_bt_preferences", "."),
        ("01_value_head", "notebooks"),
        ("02_onpolicy_filtering", "."),
        ("07_audit", "."),
        ("08_reproduce_tables", "notebooks"),
        ("09_when_does_it_work", "."),
        ("10_theory", "notebooks"),
        ("13_remedies", "notebooks"),
        ("14_real_language_model", "."),
    ],
)
def test_notebook_without_training_runs(name, folder, runs):
    executed(name, runs, ROOT / folder, **{"seeds": 3} if name.startswith("09") else {})


def check_training(notebook: nbformat.NotebookNode, runs: Path, run_id: str) -> None:
    assert manifest(runs, run_id)["status"] == "done"
    assert set(read_metrics(runs / run_id)) <= {"step", *METRICS}, "a metric without a word in the glossary"
    assert "LlamaForSequenceClassification" in text_of(notebook)
    assert "reward model, held-out pairs (accuracy)" in text_of(notebook)


@pytest.mark.parametrize(
    "folder, parameters",
    [
        ("notebooks", {"algo": "rloo", "rule": "frozen", "total_steps": 4}),  # no anchor, no filter: figures say so
        (".", {"algo": "reinforce_pp", "rule": "offline_bt", "total_steps": 4, "checkpoint_every": 2}),
        (".", {"total_steps": 3, "num_processes": 2, "backend": "deepspeed_zero2"}),
    ],
)
def test_training_notebook_runs(folder, parameters, runs):
    run_id = f"test-{parameters.get('algo') or parameters.get('backend')}"
    notebook = executed("03_save_train", runs, ROOT / folder, run_id=run_id, **parameters)
    check_training(notebook, runs, run_id)


def test_training_notebook_runs_in_a_kernel_of_its_own_and_jupyter_exports_it(runs):
    done, copy = in_a_kernel("03_save_train", runs, ROOT / "notebooks", run_id="kernel", total_steps=6, eval_every=3)
    assert done.returncode == 0, done.stderr[-3000:]
    check_training(checked(copy), runs, "kernel")
    ours = copy.with_suffix(".html").read_text()
    config = ROOT / "notebooks" / "jupyter_nbconvert_config.py"
    words = ["nbconvert", "--config", str(config), "--to", "html", str(copy), "--output", "jupyters"]
    subprocess.run(
        [sys.executable, "-m", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )
    theirs = (runs / "jupyters.html").read_text()
    assert loads(theirs) == [] and theirs.count("<math") == ours.count("<math") > 10


def test_evaluation_compares_a_run_with_its_start(made):
    notebook = executed("05_evaluate_rm", made, ROOT / "notebooks", total_steps=3)
    assert "256 rows of judgebench" in text_of(notebook) and "resolved by 256 rows" in text_of(notebook)
    (folder,) = made.glob("05-*-save-*")
    figures = json.loads((folder / "evaluation/first/judgebench.json").read_text())
    accuracy = read_metrics(folder)["eval/rm_accuracy"].iloc[-1]
    assert figures["overall"] == pytest.approx(100 * accuracy), "the run measured the same pairs"


@pytest.mark.skipif(not BENCHDATA.is_dir(), reason=f"the benchmarks' own files are not in {BENCHDATA}")
def test_evaluation_compares_on_several_benchmarks(runs, tmp_path):
    first, second = make_reward_model(tmp_path / "first"), tmp_path / "second"
    shutil.copytree(first, second)
    weights = load_file(second / "model.safetensors")
    save_file(weights | {"score.weight": -weights["score.weight"]}, second / "model.safetensors", {"format": "pt"})
    notebook = executed(
        "05_evaluate_rm", runs, first=first, second=second, benchmarks="judgebench,rmbench", data_dir=BENCHDATA,
        out=tmp_path / "out",
    )  # fmt: skip
    overall = [
        [
            json.loads((tmp_path / "out" / model / f"{name}.json").read_text())["overall"]
            for model in ("first", "second")
        ]
        for name in ("judgebench", "rmbench")
    ]
    assert all(sum(both) == pytest.approx(100, abs=0.5) and both[0] != both[1] for both in overall), "ties apart"
    mean = sum(a - b for a, b in overall) / 2
    assert f"average: {mean:+.1f} points" in text_of(notebook)


def test_policies_are_judged_by_gold_on_loopback(made):
    notebook = executed("06_evaluate_policy", made, ROOT / "notebooks", total_steps=3, prompts_used=40)
    assert "resolved by 40 prompts" in text_of(notebook) and "'judged_by': {'logprobs': 40}" in text_of(notebook)
    (judged,) = made.glob("06-tiny-save-*/judged")
    rows = json.loads((judged / "first.annotations.json").read_text())
    gold = [(world.gold(r["instruction"], r["output_1"]), world.gold(r["instruction"], r["output_2"])) for r in rows]
    assert [r["preference"] for r in rows] == [1.5 + (ours - theirs) / 2 for theirs, ours in gold]


def test_a_judge_s_key_is_written_nowhere(made, monkeypatch, tmp_path):
    key = "sk-that-nobody-may-read-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", key)

    def prefer(question, first, second):
        return 0.5 + 0.49 * (world.gold(question, second) - world.gold(question, first))

    with local_judge(prefer, "some-judge") as endpoint:
        executed("06_evaluate_policy", made, total_steps=3, prompts_used=10, base_url=endpoint.base_url,
                 judge_model="some-judge", out=tmp_path / "judged")  # fmt: skip
    assert len(json.loads((tmp_path / "judged/first.annotations.json").read_text())) == 10
    files = [f for folder in (made, tmp_path) for f in folder.rglob("*") if f.is_file()]
    assert len(files) > 20 and not [f for f in files if key.encode() in f.read_bytes()]


@pytest.mark.skipif(not ANNOTATIONS.is_dir(), reason=f"alpaca_eval's own files are not in {ANNOTATIONS}")
def test_published_annotations_give_published_win_rates(runs):
    files = {"first": ANNOTATIONS / "ann_gemma-7b-it.json", "second": ANNOTATIONS / "ann_claude-2.json"}
    notebook = executed("06_evaluate_policy", runs, **files)
    said = " ".join(text_of(notebook).split())
    assert "resolved by 805 prompts" in said and " 6.94 " in said
    assert "17.19" in text_of(notebook)


def test_analysis_finds_its_runs_and_reads_given_ones(made):
    before = sorted(made.glob("04-*"))
    notebook = executed("04_analysis", made, ROOT / "notebooks", compare="save,frozen", seeds=1, total_steps=3)
    assert "save: 1 run(s)" in text_of(notebook) and "frozen: 1 run(s)" in text_of(notebook)
    assert sorted(made.glob("04-*")) == before and len(before) == 2, "found, not made"
    notebook = executed("04_analysis", made, runs=f"{before[1].name}, {before[0]}")  # an id and a path
    assert before[1].name in text_of(notebook) and "frozen: 1 run(s)" in text_of(notebook)


def test_what_a_policy_says_stays_text(made):
    """A policy that answers with markup, formulas and terminal codes, in notebook 04 and its page."""
    said = "<script>alert(1)</script> <img src=x onerror=alert(2)> $x^2$ **b** \x1b[31m"
    other, run = sorted(made.glob("04-*"))  # frozen, save
    evil = Path(shutil.copytree(run, made / "evil"))
    rows = [json.loads(line) | {"response": said} for line in (run / "samples.jsonl").read_text().splitlines()]
    (evil / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    executed("04_analysis", made, runs=f"{evil}, {other}")
    page = max(made.glob("04_analysis-*.html"), key=lambda f: f.stat().st_mtime).read_text()
    assert (
        "&lt;script&gt;alert" in page
        and "<script>alert" not in page
        and "<img src=x" not in page
        and "\x1b" not in page
    )
    shutil.rmtree(evil)


# exercises


def variants() -> list[tuple[str, dict]]:
    """(notebook, parameters) of each variant that an exercise names by `-p`, without those that name files."""
    found = []
    for name in PATHS:
        (exercises,) = [c.source for c in read(name).cells if c.cell_type == "markdown" and "## Exercises" in c.source]
        for span in re.findall(r"`(-p [^`]+)`", exercises):
            given = dict(re.findall(r"-p (\w+) (\S+)", span))
            if not any(re.search(r"[A-Z/]", value) for value in given.values()):
                found.append((name, {key: yaml.safe_load(value) for key, value in given.items()}))
    return found


@pytest.mark.parametrize("name, parameters", variants())
def test_variants_that_exercises_name_are_parameters(name, parameters):
    (cell,) = [c for c in code_cells(read(name)) if "parameters" in c.metadata.get("tags", [])]
    own = {line.split(" = ")[0] for line in cell.source.splitlines()[1:]}
    make_config(**{key: value for key, value in parameters.items() if key in Config.model_fields})
    assert set(parameters) <= own | set(Config.model_fields)


@pytest.mark.exercises
@pytest.mark.parametrize("name, parameters", variants())
def test_variants_that_exercises_name_run(name, parameters, runs):
    if parameters.get("data_dir") == "hub":
        parameters = parameters | {"data_dir": BENCHDATA}
        if not BENCHDATA.is_dir():
            pytest.skip("no benchmark files beside the project")
    few = {"total_steps": 3} if name[:2] in ("03", "04", "05", "06", "12") else {}  # a variant only has to run
    executed(name, runs, ROOT, **parameters | few)


def test_trl_trains_beside_our_own_loop(runs):
    notebook = executed("12_trl", runs, ROOT / "notebooks", total_steps=2)
    assert "2 steps in" in text_of(notebook) and "1 label · the trained weights: True" in text_of(notebook)
    assert "num_iterations = 2: " in text_of(notebook), "refused"


# what is refused


@pytest.mark.parametrize("name, folder", [("00_bt_preferences", "notebooks"), ("03_save_train", ".")])
def test_misspelt_parameter_name_is_refused(name, folder, runs):
    error, _ = papermill(name, runs, ROOT / folder, alg="rloo")
    assert "unknown parameter 'alg' (did you mean 'algo'?); valid names: " in error


def test_bad_values_are_refused_with_the_valid_ones(runs):
    error, _ = papermill("03_save_train", runs, ROOT / "notebooks", algo="rlo", rule="sav")
    assert "rule = 'sav': not one of save, " in error
    assert "algo = 'rlo': not one of grpo, gspo, rloo, reinforce_pp" in error


def test_bad_rule_to_compare_is_refused(runs):
    error, _ = papermill("04_analysis", runs, compare="save,hlbt")
    assert "rule = 'hlbt': not one of save, " in error


def test_training_that_fails_fails_the_notebook_with_its_own_error(runs, tmp_path):
    broken = tmp_path / "prompts.jsonl"
    broken.write_text('{"prompt": "fruit mary monday :"}\n{"prompt": \n')
    error, _ = papermill("03_save_train", runs, prompts=broken)
    assert f"{broken}: row 2 is not valid JSON" in error
