"""The repositories that `lineshaft new-plugin` writes: templates by kit, and how their words are filled in.

Files end in `.tmpl` and are `string.Template`s. In paths `dot_` stands for a dot and `package` for the package's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template

KITS: Mapping[str, Mapping[str, str]] = {
    "torch": {
        "requirement": "lineshaft-torch>=0.1,<0.2", "kit_summary": "PyTorch on the CPU, with portable kernels",
        "folders": "./contract ./core ./kits/torch ./conformance", "single_program": "False",
    },
    "jax": {
        "requirement": "lineshaft-jax>=0.1,<0.2", "kit_summary": "JAX on the CPU, with kernels for XLA",
        "folders": "./contract ./core ./kits/jax ./conformance", "single_program": "True",
    },
    "numpy": {
        "requirement": "numpy>=2.0", "kit_summary": "NumPy on the CPU, with the reference ops of lineshaft",
        "folders": "./contract ./core ./conformance", "single_program": "False",
    },
}  # fmt: skip
"""What the templates of each kit's repository need besides the name; `folders` of a checkout are what it installs."""


def identifier(name: str) -> str:
    """A backend's name as a part of Python names."""
    return name.replace("-", "_")


def package(name: str) -> str:
    """The import name of a backend's package."""
    return f"lineshaft_{identifier(name)}"


def distribution(name: str) -> str:
    """The name under which pip installs it."""
    return f"lineshaft-{name}"


def render(name: str, kit: str) -> dict[str, str]:
    """The files of a new repository: text by relative path. Raises KeyError for a kit that is not in KITS."""
    words = {
        "name": name, "kit": kit, "identifier": identifier(name), "package": package(name),
        "distribution": distribution(name), **KITS[kit],
    }  # fmt: skip
    files = {}
    for root in (Path(__file__).parent / "common", Path(__file__).parent / kit):
        for template in sorted(root.rglob("*.tmpl")):
            files[target(template.relative_to(root), name)] = Template(template.read_text("utf-8")).substitute(words)
    return files


def target(template: Path, name: str) -> str:
    """Where the file of a template goes."""
    parts = (package(name) if part == "package" else part.replace("dot_", ".", 1) for part in template.parts)
    return "/".join(parts).removesuffix(".tmpl")
