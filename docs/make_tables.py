"""Writes the tables of the documentation that repeat what the code says: ops, problems, hooks, keys and mutants.

Run it with `python docs/make_tables.py` after a change of one of them. A table stands between `<!-- table NAME -->` and
`<!-- end -->`; a test fails where one is not what this file would write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lineshaft.config import EngineConfig
from lineshaft.contract.hooks import HookSpecs
from lineshaft.contract.ops import OpSpec, all_ops
from lineshaft.contract.problems import Problem
from lineshaft_conformance.mutants import gallery

DOCS = Path(__file__).parent
TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
TYPES = {bool: "boolean", int: "integer", float: "number", str: "text", Any: "anything"}
Rows = Iterator[Sequence[str]]


def markdown(header: Sequence[str], rows: Rows) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def sentence(doc: str | None) -> str:
    """The first sentence of a docstring: up to a line's end that ends it, or an empty line."""
    paragraph = (doc or "").strip().split("\n\n")[0]
    lines = [line.strip() for line in paragraph.splitlines()]
    end = next((i for i, line in enumerate(lines) if line.endswith(".")), len(lines) - 1)
    return " ".join(lines[: end + 1])


# ---- ops, problems, hooks --------------------------------------------------------------------------------------------


def ops() -> str:
    rows = ((code(op.signature), sentence(op.reference.__doc__), kind(op)) for op in all_ops().values())
    return markdown(("Op", "What it computes", "Kind"), rows)


def code(text: str) -> str:
    """A code span, also of a text that holds backticks."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def kind(op: OpSpec) -> str:
    """Whether every backend has it, whether core can decompose it, what it consumes."""
    words = ["required" if op.required else "feature"]
    words += ["composite"] if op.default is not None else []
    words += [f"consumes {', '.join(op.consumes)}"] if op.consumes else []
    return ", ".join(words)


def problems() -> str:
    used: dict[type[Problem], list[str]] = {}
    for op in all_ops().values():
        used.setdefault(op.problem, []).append(f"`{op.name}`")
    rows = ((f"`{problem.__name__}`", ", ".join(names), features(problem)) for problem, names in used.items())
    return markdown(("Problem", "Ops", "Features (field = default)"), rows)


def features(problem: type[Problem]) -> str:
    found = [f for f in fields(problem) if f.metadata.get("feature")]
    assert all(f.default is not MISSING for f in found)
    return ", ".join(f"`{f.name} = {f.default!r}`" for f in found) or "none"


def hooks() -> str:
    found = {name: hook for name, hook in vars(HookSpecs).items() if name.startswith("lineshaft_")}
    return markdown(("Hook", "What it says"), ((f"`{name}`", sentence(h.__doc__)) for name, h in found.items()))


# ---- configuration ---------------------------------------------------------------------------------------------------


def config() -> str:
    return markdown(("Key", "Type", "Default", "Meaning"), keys(EngineConfig, ""))


def keys(model: type[BaseModel], prefix: str) -> Rows:
    """One row for every key, those of nested tables after their table's name and a dot."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"`{prefix}{name}`", type_of(field), default_of(field), " ".join((field.description or "").split())


def type_of(field: FieldInfo) -> str:
    bounded = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    return words_of(bounded)


def words_of(annotation: Any) -> str:
    """A type as a reader of TOML would call it."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return words_of(args[0]) + bounds(args[1:])
    if origin is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in args)
    if origin in (Union, UnionType):
        return " or unset".join(words_of(arg) for arg in args if arg is not type(None)) + " or unset"
    if origin is dict:
        return f"table of {words_of(args[1])}"
    return TYPES[annotation]


def bounds(metadata: Sequence[Any]) -> str:
    """The limits of a number, in the order in which pydantic keeps them."""
    inner = [item for entry in metadata for item in getattr(entry, "metadata", [entry])]
    found = [(sign, getattr(item, name)) for item in inner for name, sign in BOUNDS.items() if hasattr(item, name)]
    return ",".join(f" {sign} {'2^64' if limit == 2**64 else limit}" for sign, limit in found)


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "none: must be set"
    return "unset" if field.default is None else f"`{json.dumps(field.default)}`"


# ---- conformance -----------------------------------------------------------------------------------------------------


def mutants() -> str:
    rows = (
        (m.rule, f"`{m.name}`", code(m.checks) + (" (full)" if m.size == "full" else "")) for m in gallery().values()
    )
    return markdown(("Rule", "Mutant that breaks it", "Checks that kill it"), rows)


# ---- writing ---------------------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[], str]] = {
    "ops": ops, "problems": problems, "hooks": hooks, "config": config, "mutants": mutants,
}  # fmt: skip


def fill(text: str) -> str:
    """The document with every table as it should be."""
    return TABLE.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def main() -> None:
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        path.write_text(fill(text), encoding="utf-8")


if __name__ == "__main__":
    main()
