"""The rules of the house: who may import whom, who may touch the outside, how large things get."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"pyinfer": ROOT / "pyinfer", "pyinfer_convert": ROOT / "convert", "pyinfer_tools": ROOT / "tools"}

# From the ground up. A module may import its own layer and the ones before it; a name stands for all below
# it.
LAYERS = (
    ("pyinfer.errors", "pyinfer.names", "pyinfer.progress"),
    ("pyinfer.config", "pyinfer.cache_file"),
    ("pyinfer.download", "pyinfer.wheel"),
    ("pyinfer.model_store",),
    ("pyinfer.jit", "pyinfer.text", "pyinfer.gguf_metadata", "pyinfer.section_bytes"),
    ("pyinfer.gguf_file",),
    ("pyinfer.section",),
    ("pyinfer.quants", "pyinfer.program"),
    ("pyinfer.cpu",),
    ("pyinfer.models",),
    ("pyinfer.neurons",),
    ("pyinfer.runtime",),
    ("pyinfer.llama",),
    ("pyinfer.conversation", "pyinfer.interrupts", "pyinfer.cli_stats"),
    ("pyinfer.cli",),
    ("pyinfer.__main__", "pyinfer_convert"),
    ("pyinfer_tools",),
)
# Side by side in one layer, these do not know each other.
STRANGERS = (
    {"pyinfer.jit", "pyinfer.text", "pyinfer.gguf_metadata", "pyinfer.section_bytes"},
    {"pyinfer.quants", "pyinfer.program"},
)

# Packages from outside, and the only modules that may import them (patterns of module names).
OUTSIDE = {
    "llvmlite": r"pyinfer\.jit\..*",
    "numba": r"pyinfer\.jit\..*",
    "click": r"pyinfer\.cli|pyinfer_(convert|tools)\..*",
    "jinja2": r"pyinfer\.text\.chat\w*",
    "tokenizers": r"pyinfer\.text\..*|pyinfer_convert\.vocab_.*",
    "gguf": r"pyinfer_(convert|tools)\..*",
    "huggingface_hub": r"pyinfer_convert\.hub",
    "mip": r"pyinfer\.neurons\.solver",
    "matplotlib": r"pyinfer_tools\.plot_\w+",
    "llama_cpp": r"pyinfer_tools\..*",
    "torch": r"pyinfer_tools\..*|pyinfer_convert\.train_predictor",
    "transformers": r"pyinfer_tools\..*",
    "numpy": r".*",
}

MOST_FILE_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 400, 60, 8


def _modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()
every_module = pytest.mark.parametrize("module", MODULES)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(module: str) -> set[str]:
    """Full names of everything that a module imports, anywhere in it, but not for type checkers only."""
    found = set()
    ignored: set[ast.AST] = set()
    for node in ast.walk(_tree(MODULES[module])):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            ignored.update(ast.walk(node))
        if node in ignored:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else str(node.module))
    return found


def _layer(module: str) -> tuple[int, str]:
    """Number of the layer of a module and the entry it belongs to."""
    for number, layer in enumerate(LAYERS):
        for name in layer:
            if module == name or module.startswith(f"{name}."):
                return number, name
    raise AssertionError(f"{module} has no place in LAYERS")


@every_module
def test_imports_point_down(module):
    ours = {name for name in _imports(module) if name.split(".")[0] in FOLDERS}
    if module == "pyinfer":
        return  # the public names, fetched lazily from every layer
    number, entry = _layer(module)
    for name in ours - {"pyinfer"}:
        other_number, other = _layer(name)
        assert other_number <= number, f"{module} imports {name}, which stands above it"
        if other != entry:
            assert not any({entry, other} <= group for group in STRANGERS), (
                f"{module} imports its neighbour {name}"
            )


def test_public_names_are_imported_lazily():
    eager = [
        node for node in _tree(MODULES["pyinfer"]).body if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    names = {
        alias.name if isinstance(node, ast.Import) else node.module for node in eager for alias in node.names
    }
    assert {str(name) for name in names if str(name).startswith("pyinfer")} == {"pyinfer.errors"}


def test_only_the_command_line_asks_for_the_bare_package():
    """`from pyinfer import Llama` below would be a circle."""
    users = {name for name in MODULES if "pyinfer" in _imports(name)}
    assert users <= {"pyinfer.cli"} | {name for name in MODULES if name.startswith("pyinfer_")}


@every_module
def test_packages_from_outside_stay_in_their_place(module):
    for name in _imports(module):
        package = name.split(".")[0]
        if package in FOLDERS or package in sys.stdlib_module_names:
            continue
        assert package in OUTSIDE, f"{module} imports {package}, which is no dependency"
        assert re.fullmatch(OUTSIDE[package], module), f"{module} must not import {package}"
        assert not (name.startswith("numba.cuda") and not module.startswith("pyinfer.cuda.")), (
            f"{module}: {name}"
        )


@every_module
def test_only_config_reads_the_environment(module):
    if module == "pyinfer.config":
        return
    for node in ast.walk(_tree(MODULES[module])):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os":
            assert node.attr not in ("environ", "environb", "getenv", "putenv"), f"{module}:{node.lineno}"
        assert not (
            isinstance(node, ast.ImportFrom) and node.module == "os" and "environ" in ast.unparse(node)
        ), module


@every_module
def test_the_library_prints_nothing_and_ends_nothing(module):
    if module.startswith("pyinfer_"):
        return
    for node in ast.walk(_tree(MODULES[module])):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            where = f"{module}:{node.lineno} calls {called}"
            assert called not in ("print", "exit", "quit", "os._exit", "os.abort"), where
            # The command line talks with a person; the library never does.
            talks = called in ("sys.exit", "signal.signal", "click.echo", "input")
            assert not talks or module in ("pyinfer.cli", "pyinfer.interrupts", "pyinfer.__main__"), where


@every_module
def test_files_are_short_and_say_what_they_hold(module):
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_FILE_LINES, f"{MODULES[module].relative_to(ROOT)} has {lines} lines"
    assert ast.get_docstring(_tree(MODULES[module])), f"{MODULES[module].relative_to(ROOT)} has no docstring"


def _functions(module: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [
        node
        for node in ast.walk(_tree(MODULES[module]))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def _own_lines(function: ast.AST) -> int:
    """Lines of a function without those of the functions written inside it."""
    inner = [
        node for node in ast.walk(function) if node is not function and isinstance(node, ast.FunctionDef)
    ]
    outermost = [node for node in inner if not any(node in set(ast.walk(other)) - {other} for other in inner)]
    return _span(function) - sum(_span(node) for node in outermost)


def _span(node) -> int:
    return node.end_lineno - node.lineno + 1


@every_module
def test_functions_are_short(module):
    for function in _functions(module):
        lines = _own_lines(function)
        assert lines <= MOST_FUNCTION_LINES, f"{module}.{function.name} has {lines} lines"


@every_module
def test_functions_take_few_parameters(module):
    for function in _functions(module):
        given = function.args
        named = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        count = len([name for name in named if name not in ("self", "cls", "typingctx")])
        assert count <= MOST_PARAMETERS, f"{module}.{function.name} takes {count} parameters"


def test_no_file_names_a_place_on_one_machine():
    places = re.compile(r"(?<![\w.])/(tmp|root|work|home)/")
    kinds = {".py", ".md", ".toml", ".txt", ".cfg", ".yml", ".yaml", ".json"}
    folders = [path for path in (*FOLDERS.values(), ROOT / "docs") if path.is_dir()]
    files = [*ROOT.glob("*.*"), *(path for folder in folders for path in folder.rglob("*"))]
    checked = [path for path in files if path.suffix in kinds and path.is_file()]
    assert len(checked) > len(MODULES)
    for path in checked:
        found = places.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path.relative_to(ROOT)} names {found and found.group()}"


def test_every_test_has_a_docstring_file_and_a_subject():
    """tests/ mirrors the tree: the folder of a test is a folder of the program."""
    folders = {
        path.parent.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("test_*.py")
    }
    parts = {name.split(".")[1] for name in MODULES if name.count(".") and name.startswith("pyinfer.")}
    assert folders <= {".", "convert", "tools", *parts}
    for path in (ROOT / "tests").rglob("*.py"):
        assert ast.get_docstring(_tree(path)), f"{path.relative_to(ROOT)} has no docstring"


def test_test_files_have_names_of_their_own():
    """pytest imports them by name alone: two of one name in different folders break the whole run."""
    found = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(found) == sorted(set(found))
