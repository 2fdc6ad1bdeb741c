"""How the package is laid out: public names stand once, no import circles, few files a folder, short docstrings."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "qlora_dpo"
MODULES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}
FOLDERS = sorted({path.parent for path in MODULES})
MAX_FILES = 25
ALLOWED_TWICE = {"Record", "logger"}
"""Names that several modules may define: the alias of a mapping's type, and each module's own logger."""


def dotted(path: Path) -> str:
    """The name under which `path` is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def public_names(tree: ast.Module) -> Iterator[str]:
    """Functions, classes and constants that a module defines without an underscore."""
    for node in tree.body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names = [node.name]
            case ast.Assign():
                names = [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            case ast.AnnAssign(target=ast.Name(id=name)):
                names = [name]
            case _:
                names = []
        yield from (name for name in names if not name.startswith("_"))


def imports(path: Path) -> set[str]:
    """The package's modules that the module at `path` imports, for type checkers and inside functions too."""
    known, found = {dotted(module) for module in MODULES}, set()
    for node in ast.walk(TREES[path]):
        match node:
            case ast.Import():
                found |= {alias.name for alias in node.names}
            case ast.ImportFrom(module=str(module), level=0):
                below = {f"{module}.{alias.name}" for alias in node.names}
                found |= {name if name in known else module for name in below}
    return found & known - {dotted(path)}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Every module that imports itself by way of others, in one group with those others."""
    reached = {start: _reachable(graph, start) for start in graph}
    groups = {tuple(sorted(end for end in reached[start] if start in reached[end])) for start in graph}
    return sorted(list(group) for group in groups if group)


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """What `start` imports, directly or by way of others."""
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - reached
        reached |= new
        waiting += new
    return reached


def test_a_public_name_stands_once_in_the_package() -> None:
    counts = Counter(name for tree in TREES.values() for name in set(public_names(tree)))
    twice = {
        name: [dotted(path) for path, tree in TREES.items() if name in public_names(tree)]
        for name, count in counts.items()
        if count > 1 and name not in ALLOWED_TWICE
    }
    assert twice == {}


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circles({dotted(path): imports(path) for path in MODULES}) == []


def test_a_circle_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


@pytest.mark.parametrize("folder", FOLDERS, ids=[dotted(folder) for folder in FOLDERS])
def test_a_folder_has_few_files(folder: Path) -> None:
    assert len(list(folder.glob("*.py"))) <= MAX_FILES


@pytest.mark.parametrize("path", MODULES, ids=[dotted(path) for path in MODULES])
def test_a_module_says_in_one_or_two_sentences_what_it_is(path: Path) -> None:
    text = ast.get_docstring(TREES[path])
    assert text, "it has no docstring"
    first = text.partition("\n\n")[0]  # a legend or the reasons may follow
    assert 1 <= len(re.findall(r"[.!?](?:\s+[A-Z`]|$)", first)) <= 2
