"""What must hold of the source as text: who imports whom, no vendor's name in core, one reader of the environment."""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CORE = ROOT / "core" / "src" / "lineshaft"
CONTRACT = ROOT / "contract" / "src" / "lineshaft_contract"
SUITE = ROOT / "conformance" / "src"
BENCH = ROOT / "bench" / "src"
SOURCES = [
    ROOT / "contract" / "src", ROOT / "core" / "src", SUITE, BENCH,
    *sorted((ROOT / "kits").glob("*/src")), *sorted((ROOT / "plugins").glob("*/src")),
]  # fmt: skip
MODULES = sorted(CORE.rglob("*.py"))
NEUTRAL = sorted([*MODULES, *CONTRACT.rglob("*.py")])
ALL_MODULES = sorted(path for source in SOURCES for path in source.rglob("*.py"))

# fmt: off
VENDORS = {
    "amd", "cann", "cublas", "cuda", "cudnn", "cutlass", "gaudi", "habana", "hip", "inferentia", "neuron", "nccl",
    "nvidia", "oneapi", "pallas", "ptx", "rccl", "rocm", "tpu", "trainium", "triton", "xla", "xpu",
}
# fmt: on
TENSOR_LIBRARIES = {"cupy", "jax", "mlx", "tensorflow", "tinygrad", "torch", "triton"}

# An import goes from a higher rank to a lower one. A new folder or module gets its rank here, on purpose.
RANKS = (
    {"errors"},
    {"cache", "outputs"},
    {"sampling", "registry", "layout", "weights", "meter"},
    {"scheduler", "config", "models", "tokenizer", "plan"},
    {"runner"},
    {"executors", "flight"},
    {"engine"},
    {"frontend", "explain"},
    {"llm", "async_llm"},
    {"cli"},
)
RANK = {part: rank for rank, parts in enumerate(RANKS) for part in parts}
NARROW = {
    "cache": {"errors"},
    "sampling": {"errors"},
    "scheduler": {"errors", "cache", "sampling"},
}
NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip
WITHOUT_ARRAYS = ("cache", "scheduler", "config", "registry", "cli")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[str]:
    """The full names of all modules that a file imports, lazily or for types too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative import"
            module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names)


def part(path: Path) -> str:
    """The folder or module directly under the package that a file belongs to."""
    return path.relative_to(CORE).parts[0].removesuffix(".py")


def words(text: str) -> set[str]:
    """The lower-case parts of all words and identifiers: snake_case, camelCase and digits taken apart."""
    return {found.lower() for found in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", text)}


def test_the_lint_takes_identifiers_apart() -> None:
    assert words("has_cuda CudaGraph rocm6 CompletionOutput isTPU HIP_PATH") >= {"cuda", "rocm", "tpu", "hip"}
    assert not words("CompletionOutput throughput relationship hipster") & VENDORS


@pytest.mark.parametrize("path", NEUTRAL, ids=name)
def test_core_and_contract_name_no_vendor(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    named = [f"{number}: {line.strip()}" for number, line in enumerate(lines, 1) if words(line) & VENDORS]
    assert named == []


def test_imports_point_one_way() -> None:
    wrong = []
    for path in MODULES:
        if path == CORE / "__init__.py":
            continue
        here = part(path)
        assert here in RANK, f"{name(path)}: give {here!r} a rank"
        for module in imports(path):
            root, _, rest = module.partition(".")
            there = rest.partition(".")[0]
            if root == "lineshaft" and there in RANK and there != here:
                allowed = there in NARROW[here] if here in NARROW else RANK[there] < RANK[here]
                wrong += [] if allowed else [f"{name(path)} imports {module}"]
    assert wrong == []


@pytest.mark.parametrize("folder", WITHOUT_ARRAYS)
def test_host_logic_uses_no_array_library(folder: str) -> None:
    arrays = TENSOR_LIBRARIES | {"numpy", "ml_dtypes"}
    used = {module for path in (CORE / folder).rglob("*.py") for module in imports(path)}
    assert {module for module in used if module.partition(".")[0] in arrays} == set()


def test_core_imports_no_tensor_library_nor_plugin_even_lazily() -> None:
    roots = {(name(path), module.partition(".")[0]) for path in NEUTRAL for module in imports(path)}
    assert {found for found in roots if found[1] in TENSOR_LIBRARIES or plugin(found[1])} == set()


def plugin(module: str) -> bool:
    """Whether a top-level module is another distribution of ours than core and contract."""
    return module.startswith("lineshaft_") and module != "lineshaft_contract"


def test_the_contract_and_what_is_built_on_it_do_not_know_core() -> None:
    below = [path for path in ALL_MODULES if not path.is_relative_to(CORE) and SUITE not in path.parents]
    knowing = {name(path) for path in below if BENCH not in path.parents and "lineshaft" in roots(path)}
    assert knowing == set()
    assert {module for path in CONTRACT.rglob("*.py") for module in roots(path) if plugin(module)} == set()


def roots(path: Path) -> set[str]:
    """The top-level modules that a file imports."""
    return {module.partition(".")[0] for module in imports(path)}


def test_the_suite_imports_a_tensor_library_and_plugins_for_its_mutants_only() -> None:
    for path in SUITE.rglob("*.py"):
        if "mutants" not in path.parts:
            others = roots(path) - {"lineshaft_conformance"}
            assert not {root for root in others if root in TENSOR_LIBRARIES or plugin(root)}, path


def test_the_bench_imports_a_tensor_library_in_the_drivers_of_peers_only() -> None:
    for path in BENCH.rglob("*.py"):
        if "peers" not in path.parts:
            others = roots(path) - {"lineshaft_bench"}
            assert not {root for root in others if root in TENSOR_LIBRARIES or plugin(root)}, path


IMPORT_ALL = """
import importlib, json, sys
forbidden = set(sys.argv[1].split())
found = {}
for name in sys.argv[2].split():
    importlib.import_module(name)
    roots = {module.partition(".")[0] for module in sys.modules} - {"lineshaft_contract"}
    found[name] = sorted(root for root in roots if root in forbidden or root.startswith("lineshaft_"))
print(json.dumps(found))
"""


def test_a_process_that_imports_all_of_core_holds_no_tensor_library_nor_plugin() -> None:
    names = [
        ".".join(path.relative_to(CORE.parent).with_suffix("").parts).removesuffix(".__init__") for path in MODULES
    ]
    code = f"import sys; sys.path[:] = {sys.path!r}\n{IMPORT_ALL}"
    command = [sys.executable, "-c", code, " ".join(TENSOR_LIBRARIES), " ".join(names)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held = json.loads(done.stdout)
    assert len(held) == len(MODULES)
    assert {module: roots for module, roots in held.items() if roots} == {}


MOST_LINES = 9_000
"""Of code in core: neither blank lines, comments nor docstrings."""


def test_core_stays_small() -> None:
    assert sum(map(lines_of_code, MODULES)) <= MOST_LINES


def lines_of_code(path: Path) -> int:
    """How many lines hold code, of the file at `path`."""
    text = path.read_text(encoding="utf-8")
    return len(lines_of_tokens(text) - lines_of_docstrings(ast.parse(text)))


def lines_of_tokens(text: str) -> set[int]:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {line for token in tokens if token.type not in NO_CODE for line in range(token.start[0], token.end[0] + 1)}


def lines_of_docstrings(tree: ast.Module) -> set[int]:
    """Of modules, classes and functions, and of texts that stand alone below what they describe."""
    texts = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    return {line for node in texts for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}


def test_lines_of_code_are_those_that_do_something(tmp_path: Path) -> None:
    path = tmp_path / "counted.py"
    path.write_text('''"""A module
of two lines."""

# a comment
X = (
    1,  # counted
)
"""What X is."""


def f() -> int:
    """Nothing."""
    return """a text
that counts"""
''')
    assert lines_of_code(path) == 6


def test_only_the_configuration_reads_the_environment() -> None:
    readers = {"environ", "environb", "getenv", "getenvb"}
    found = set()
    for path in NEUTRAL:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            of_os = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
            if of_os and node.attr in readers:
                found.add(name(path))
        if any(module in {f"os.{reader}" for reader in readers} for module in imports(path)):
            found.add(name(path))
    assert found == {"core/src/lineshaft/config/environment.py"}


@pytest.mark.parametrize("path", ALL_MODULES, ids=name)
def test_a_module_says_what_it_owns_and_its_functions_are_short(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "no docstring"
    functions = [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and not any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
    ]  # what runs on a GPU is one function, marked into stages
    long = [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= 60]
    assert long == []
