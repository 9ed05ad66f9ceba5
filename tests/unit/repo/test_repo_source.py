"""What must hold of the source as text: who imports whom, no vendor's name in core, one reader of the environment."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CORE = ROOT / "core" / "src" / "lineshaft"
SUITE = ROOT / "conformance" / "src"
BENCH = ROOT / "bench" / "src"
SOURCES = [
    ROOT / "core" / "src", SUITE, BENCH,
    *sorted((ROOT / "kits").glob("*/src")), *sorted((ROOT / "plugins").glob("*/src")),
]  # fmt: skip
MODULES = sorted(CORE.rglob("*.py"))
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
    {"errors", "host"},
    {"contract", "cache", "outputs"},
    {"sampling", "registry", "layout", "weights", "meter"},
    {"scheduler", "config", "models", "tokenizer", "plan", "reference"},
    {"runner"},
    {"executors", "flight"},
    {"engine"},
    {"frontend", "explain"},
    {"llm", "async_llm"},
    {"cli"},
)
RANK = {part: rank for rank, parts in enumerate(RANKS) for part in parts}
NARROW = {
    "contract": {"errors"},
    "cache": {"errors"},
    "sampling": {"errors", "host", "contract"},
    "scheduler": {"errors", "cache", "sampling"},
}
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


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_core_names_no_vendor(path: Path) -> None:
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
    roots = {(name(path), module.partition(".")[0]) for path in MODULES for module in imports(path)}
    assert {found for found in roots if found[1] in TENSOR_LIBRARIES or found[1].startswith("lineshaft_")} == set()


def test_the_suite_imports_a_tensor_library_and_plugins_for_its_mutants_only() -> None:
    for path in SUITE.rglob("*.py"):
        roots = {module.partition(".")[0] for module in imports(path)} - {"lineshaft_conformance"}
        if "mutants" not in path.parts:
            assert not {root for root in roots if root in TENSOR_LIBRARIES or root.startswith("lineshaft_")}, path


def test_the_bench_imports_a_tensor_library_in_the_drivers_of_peers_only() -> None:
    for path in BENCH.rglob("*.py"):
        roots = {module.partition(".")[0] for module in imports(path)} - {"lineshaft_bench"}
        if "peers" not in path.parts:
            assert not {root for root in roots if root in TENSOR_LIBRARIES or root.startswith("lineshaft_")}, path


IMPORT_ALL = """
import importlib, json, sys
forbidden = set(sys.argv[1].split())
found = {}
for name in sys.argv[2].split():
    importlib.import_module(name)
    roots = {module.partition(".")[0] for module in sys.modules}
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


def test_only_the_configuration_reads_the_environment() -> None:
    readers = {"environ", "environb", "getenv", "getenvb"}
    found = set()
    for path in MODULES:
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
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= 60]
    assert long == []
