"""The house rules: imports go one way, each heavy dependency has one room, files and functions stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nolora_vision"
FILES = sorted(PACKAGE.rglob("*.py"))

FLOORS = {
    "config": 0,
    "kernels": 1,
    "surgery": 2,
    "adapters": 3,
    "methods": 4,
    "training": 5,
    "benchmark": 6,
    "commands": 7,
    "__main__": 8,
}
LEAVES = {
    "nolora_vision.config",
    *(f"nolora_vision.training.{name}" for name in ("record", "errors", "neutral", "registry", "table", "vtab")),
}
ROOMS = {
    "accelerate": {"training/engine.py", "training/processes.py"},
    "datasets": {"training/hub_dataset.py"},
    "matplotlib": {"training/figures.py", "benchmark/report_figures.py"},
    "peft": {"methods/peft_layers.py"},
    "triton": {
        "kernels/triton_formulas.py",
        "kernels/triton_kernels.py",
        "kernels/triton_rank.py",
        "kernels/triton_stages.py",
    },
    "onnx": {"adapters/export.py"},
    "onnxruntime": {"adapters/export.py"},
    "onnxscript": {"adapters/export.py"},
    "yaml": {"training/yaml_file.py"},
    "pydantic": {"training/kinds.py"},
    "sklearn": {"training/digits.py"},
}
LONG_FUNCTIONS = {"fit": 70}
MOST_LINES, MOST_FUNCTION_LINES = 300, 50


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(source: str) -> Iterator[str]:
    """Full names of the modules that a source imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(module: str) -> int | None:
    parts = module.split(".")
    if parts[0] != "nolora_vision":
        return None
    return FLOORS.get(parts[1]) if len(parts) > 1 else None


def import_problems(name: str, source: str) -> list[str]:
    found = set(imports(source))
    problems = [
        f"{name} imports {other}, which is upstairs"
        for other in found
        if name != "nolora_vision" and (floor(other) or 0) > (floor(name) or 0)
    ]
    if name in LEAVES:
        problems += [f"{name} is a leaf but imports {other}" for other in found if floor(other) is not None]
    if name == "nolora_vision.training.engine":
        given = ("nolora_vision.training.backbone", "nolora_vision.training.data")
        problems += [f"engine is given objects, but imports {other}" for other in found if other in given]
    return problems


def room_problems(relative: str, source: str) -> list[str]:
    heavy = {other.split(".")[0] for other in imports(source)} & ROOMS.keys()
    return [f"{relative} imports {name}; its room is {ROOMS[name]}" for name in heavy if relative not in ROOMS[name]]


def size_problems(relative: str, source: str) -> list[str]:
    problems = []
    if (lines := source.count("\n")) > MOST_LINES:
        problems.append(f"{relative} has {lines} lines")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > LONG_FUNCTIONS.get(node.name, MOST_FUNCTION_LINES):
                problems.append(f"{relative}: {node.name} has {length} lines")
    return problems


def docstring_problems(relative: str, source: str) -> list[str]:
    tree = ast.parse(source)
    problems = [] if ast.get_docstring(tree) else [f"{relative} has no docstring"]
    bodies = [tree.body, *(n.body for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_"))]
    for node in (node for body in bodies for node in body):
        public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
        stub = isinstance(node, ast.FunctionDef) and isinstance(node.body[-1], ast.Expr) and len(node.body) == 1
        if public and not ast.get_docstring(node) and not stub:
            problems.append(f"{relative}: {node.name} has no docstring")
    return problems


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_house_rules(path: Path) -> None:
    source, relative = path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix()
    assert not import_problems(module_name(path), source)
    assert not room_problems(relative, source)
    assert not size_problems(relative, source)
    assert not docstring_problems(relative, source)
    assert path.stem not in {"utils", "common", "helpers", "misc"}


def test_the_rules_can_fail() -> None:
    assert import_problems("nolora_vision.kernels.eager", "from nolora_vision.surgery import plan")
    assert import_problems("nolora_vision.training.engine", "from nolora_vision.training.data import Split")
    assert import_problems("nolora_vision.config", "def f():\n    import nolora_vision.kernels")
    assert not import_problems("nolora_vision.training.run", "from nolora_vision.surgery import plan")
    assert room_problems("training/run.py", "def f():\n    from accelerate.utils import set_seed")
    assert not room_problems("training/engine.py", "import accelerate")
    assert size_problems("a.py", "x = 1\n" * 301)
    assert size_problems("a.py", "def f():\n" + "    x = 1\n" * 51)
    assert docstring_problems("a.py", "def f():\n    return 1\n")


def test_the_rooms_readme_shows_every_file_with_its_own_sentence() -> None:
    tree = (ROOT / "nolora_vision" / "README.md").read_text(encoding="utf-8")
    for path in FILES:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        sentence = docstring.split("\n")[0].rstrip(".")
        if path.name != "__init__.py":
            line = f"- `{path.name}`: {sentence}\n"
            assert line in tree, f"nolora_vision/README.md lacks {line}"


def test_train_py_is_short() -> None:
    assert (ROOT / "train.py").read_text().count("\n") <= 40
