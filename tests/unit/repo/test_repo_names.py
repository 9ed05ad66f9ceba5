"""What users hold on to: the exported names, the tree of errors, the example, and what the distributions share."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lineshaft
from lineshaft.config import load_config
from lineshaft_contract import errors

ROOT = Path(__file__).parents[3]
DISTRIBUTIONS = sorted(
    path.parent
    for pattern in ("contract", "core", "bench", "conformance", "kits/*", "plugins/*")
    for path in ROOT.glob(f"{pattern}/pyproject.toml")
)


def test_the_exported_names_are_these_and_all_resolve() -> None:
    assert sorted(lineshaft.__all__) == [
        "AsyncLLM",
        "CompletionOutput",
        "EngineConfig",
        "LLM",
        "RequestOutput",
        "SamplingParams",
        "Structured",
        "__version__",
    ]
    assert dir(lineshaft) == sorted(lineshaft.__all__)
    assert all(getattr(lineshaft, name) is not None for name in lineshaft.__all__)
    assert lineshaft.LLM.__name__ == "LLM"


def test_a_name_that_is_not_exported_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="exported are LLM, AsyncLLM"):
        lineshaft.Absent  # noqa: B018


def test_importing_the_package_imports_nothing_else() -> None:
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; import lineshaft; print(*{{'numpy', 'pydantic'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


def drawn_tree() -> list[tuple[str, str]]:
    """(error, parent) for every line of the tree in the docstring."""
    block = re.search(r"```\n(.*?)```", errors.__doc__ or "", re.DOTALL)
    assert block
    path: list[str] = []
    pairs = []
    for line in block[1].splitlines():
        start = re.search(r"\w", line)
        assert start
        depth = start.start() // 4
        path[depth:] = [line[start.start() :].split()[0]]
        pairs.append((path[-1], path[-2] if depth else "Exception"))
    return pairs


def test_the_drawn_tree_of_errors_is_the_tree_of_classes() -> None:
    classes = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]
    drawn = drawn_tree()
    assert len(drawn) == len(classes)
    assert dict(drawn) == {kind.__name__: kind.__base__.__name__ for kind in classes}
    assert all(kind.__doc__ for kind in classes)


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.name)
def test_an_example_is_a_configuration(example: Path) -> None:
    assert load_config(example, {}, {}).model


def test_the_distributions_agree() -> None:
    projects = [tomllib.loads((folder / "pyproject.toml").read_text())["project"] for folder in DISTRIBUTIONS]
    assert {"lineshaft", "lineshaft-torch", "lineshaft-cpu", "lineshaft-conformance"} <= {
        project["name"] for project in projects
    }
    assert len({(project["version"], project["requires-python"], project["license"]) for project in projects}) == 1
    assert len({(folder / "LICENSE").read_text() for folder in [ROOT, *DISTRIBUTIONS]}) == 1
    assert "project" not in tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_distribution_is_installed_for_development_and_tagged_as_typed() -> None:
    requirements = (ROOT / "requirements-dev.txt").read_text().splitlines()
    for folder in DISTRIBUTIONS:
        assert f"-e ./{folder.relative_to(ROOT)}" in [line.partition("[")[0] for line in requirements]
        assert len(list(folder.glob("src/*/py.typed"))) == 1


def test_test_files_have_unique_names() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
