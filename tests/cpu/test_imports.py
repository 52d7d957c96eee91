"""The house has floors: modules import from their own floor and below, and no module-level import goes in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moetrain

ROOT = Path(moetrain.__file__).parent
# From the top. A name stands for the module and everything below it.
FLOORS = (
    ("launch", "launcher", "dry_run", "cli", "top", "__main__"),
    ("plan", "bench"),
    ("trainer", "prepare", "create", "readback", "facts"),
    ("auto",),
    ("parallelize", "sharded_init", "graph", "compiled"),
    ("moe", "optim", "report", "doctor", "sinks"),
    ("attention", "data", "fsdp"),
    ("kernels", "backends", "checkpoint", "loss", "metrics", "guard", "mesh", "config", "families"),
    ("tape",),
)
FLOOR_OF = {name: len(FLOORS) - i for i, names in enumerate(FLOORS) for name in names}


def module_name(path: Path) -> str:
    parts = ("moetrain", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports_of(module: str, node: ast.AST) -> set[str]:
    """Modules of the package that one import statement needs."""
    if isinstance(node, ast.Import):
        found = {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
        package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
        for _ in range(node.level - 1):
            package = package.rpartition(".")[0]
        base = ".".join(filter(None, (package, node.module))) if node.level else node.module or ""
        names = {f"{base}.{alias.name}" for alias in node.names}
        submodules = names & MODULES.keys()
        found = submodules if len(submodules) == len(names) else submodules | {base}
    else:
        return set()
    return {name for name in found if name in MODULES}


def all_imports(module: str, module_level_only: bool) -> set[str]:
    """Without those under TYPE_CHECKING, which never run."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if module_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        found.update(imports_of(module, node))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(MODULES[module].read_text(encoding="utf-8")))
    return found


def floor_of(module: str) -> int:
    return FLOOR_OF[module.split(".")[1]]


MEMBERS = [module for module in MODULES if module != "moetrain"]


@pytest.mark.parametrize("module", MEMBERS)
def test_imports_only_go_down(module: str) -> None:
    assert module.split(".")[1] in FLOOR_OF, f"give {module} a floor in FLOORS"
    above = {
        name
        for name in all_imports(module, module_level_only=False) & set(MEMBERS)
        if floor_of(name) > floor_of(module)
    }
    assert not above, f"{module} imports from a floor above its own"


def test_no_circle_at_module_level() -> None:
    graph = {module: all_imports(module, module_level_only=True) - {module} for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module in done:
            return
        for name in sorted(graph[module]):
            visit(name, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_import_statements_are_understood() -> None:
    def found(source: str, module: str = "moetrain.cli") -> set[str]:
        return {name for node in ast.walk(ast.parse(source)) for name in imports_of(module, node)}

    assert found("import torch, moetrain.config") == {"moetrain.config"}
    assert found("from moetrain.config import RunConfig") == {"moetrain.config"}
    assert found("from moetrain import mesh, config") == {"moetrain.mesh", "moetrain.config"}
    assert found("from moetrain import __version__") == {"moetrain"}
    assert found("from .config import RunConfig") == {"moetrain.config"}
    assert found("from . import config", module="moetrain") == {"moetrain.config"}


def test_the_package_and_its_command_line_import_nothing_heavy() -> None:
    code = "import sys, moetrain, moetrain.cli; print(sorted({'torch', 'transformers', 'rich'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert result.stdout.strip() == "[]"


def test_the_launcher_needs_no_torch() -> None:
    code = "import sys, moetrain.launcher; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert result.stdout.strip() == "False"
