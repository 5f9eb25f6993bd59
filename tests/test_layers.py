"""Imports go down only, no file is in a circle, and the method needs torch alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "savelib"
FLOORS = [  # lowest first; parts of one floor do not import each other
    {"errors", "signals"},
    {"method", "paths", "processes", "progress", "show"},
    {"config"},
    {"data"},
    {"models"},
    {"training", "benchmarks"},
    {"runs"},
    {"analysis", "trl"},
    {"plots", "experiments"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: i for i, names in enumerate(FLOORS) for name in names}
FILES = sorted(ROOT.rglob("*.py"))
MODULES = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in FILES}


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Modules of savelib, without its name, that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.startswith("savelib.")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "savelib":
            base = node.module.partition(".")[2]
            for a in node.names:
                whole = f"{base}.{a.name}".strip(".")
                is_module = whole in MODULES or f"{whole}.__init__" in MODULES
                found.add(whole if is_module else base)
    return found - {""}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    me = part(path)
    if me == "__init__":
        assert not imported(path)
        return
    parts = {name.split(".")[0] for name in imported(path)} - {me}
    bad = {other for other in parts if LEVEL[other] >= LEVEL[me]}
    assert not bad, f"{path.relative_to(ROOT)} imports {bad} from its own floor or above"


def test_no_circle():
    """Repeatedly take away the files that import nothing that is left: nothing may remain."""
    package = {name.removesuffix(".__init__"): name for name in MODULES}
    left = {name: {package[m] for m in imported(f) if m in package} - {name} for name, f in MODULES.items()}
    while ground := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in ground}
    assert not left, f"in a circle, or above one: {sorted(left)}"


def test_the_method_needs_torch_alone():
    allowed = {"__future__", "collections", "dataclasses", "math", "torch", "typing"}
    for path in (ROOT / "method").glob("*.py"):
        assert all(name.startswith("method") for name in imported(path))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {a.name.split(".")[0] for a in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom) and not node.module.startswith("savelib"):
                assert node.module.split(".")[0] in allowed
