"""Writes what the documentation repeats of the code: ops, problems, hooks, keys, requests, commands and mutants.

Run it with `python docs/make_tables.py` after a change of one of them. A table stands between `<!-- table NAME -->` and
`<!-- end -->`; a test fails where one is not what this file would write.
"""

from __future__ import annotations

import json
import re
from argparse import Action, ArgumentParser, _HelpAction, _SubParsersAction
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, fields
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lineshaft.cli.main import COMMANDS, parser
from lineshaft.cli.options import DOTTED, KEYS, add_config_arguments
from lineshaft.cli.plugins import further_commands
from lineshaft.cli.sampling import CONFIGURED, MEANINGS, STRUCTURES, option, turned
from lineshaft.config import EngineConfig
from lineshaft.config.load import variable
from lineshaft.config.values import is_table
from lineshaft.sampling.params import SamplingParams
from lineshaft_conformance.matrix import load_matrix
from lineshaft_conformance.mutants import gallery
from lineshaft_conformance.report.matrix import document
from lineshaft_contract.hooks import HookSpecs
from lineshaft_contract.ops import OpSpec, all_ops
from lineshaft_contract.problems import Problem

DOCS = Path(__file__).parent
TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
CONFIGURATION = "configuration"  # the group of the options that commands share
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
    rows = (
        (code(op.signature), plain(sentence(op.reference.__doc__)), kind(op), f"`{op.problem.__name__}`", tolerance(op))
        for op in all_ops().values()
    )
    return markdown(("Op", "What it computes", "Kind", "Problem", "Tolerance"), rows)


def code(text: str) -> str:
    """A code span, also of a text that holds backticks."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def plain(text: str) -> str:
    """A text whose brackets are no links."""
    return text.replace("[", "\\[")


def kind(op: OpSpec) -> str:
    """Whether every backend has it, whether core can decompose it, what it consumes."""
    words = ["required" if op.required else "feature"]
    words += ["composite"] if op.default is not None else []
    words += [f"consumes {', '.join(op.consumes)}"] if op.consumes else []
    return ", ".join(words)


class Read:
    """A problem that only notes which of its fields a rule reads."""

    def __init__(self) -> None:
        self.fields: list[str] = []

    def __getattr__(self, name: str) -> int:
        self.fields.append(name)
        return 1


def tolerance(op: OpSpec) -> str:
    """ "exact", or the fields of the problem from which the rule takes K, the terms of a sum."""
    read = Read()
    op.tolerance.depth(read)
    return "exact" if op.tolerance.exact else f"rule, K: {', '.join(f'`{field}`' for field in read.fields) or '1'}"


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
    return markdown(("Key", "Type", "Default", "Meaning", "Option and variable"), keys(EngineConfig, ()))


def keys(model: type[BaseModel], table: tuple[str, ...]) -> Rows:
    """One row for every key, those of nested tables after their table's name and a dot."""
    for name, field in model.model_fields.items():
        path = (*table, name)
        if is_table(field):
            yield from keys(field.annotation, path)
            continue
        free = get_origin(field.annotation) is dict  # a table whose keys are not ours
        meaning = " ".join((field.description or "").split())
        by = f"`{option_of('.'.join(path), free)}` `{variable((*path, 'key') if free else path)}`"
        yield f"`{'.'.join(path)}`", type_of(field), default_of(field), meaning, by


def option_of(key: str, free: bool) -> str:
    """The option that sets a dotted key: one of its own name where there is one."""
    if key == "backend_options":
        return "--backend-option KEY=VALUE"
    own = {DOTTED.get(name, name): name for name in KEYS} | {f"sampling.{name}": name for name in CONFIGURED}
    if key in own:
        return f"--{own[key].replace('_', '-')}"
    return f"--set {key}.KEY=VALUE" if free else f"--set {key}=VALUE"


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


def backend_options(reference: str) -> str:
    """One row for each option of a backend, by its "module:attribute"."""
    rows = (
        (f"`{name}`", options_type(field), default_of(field), " ".join((field.description or "").split()))
        for name, field in resolve_name(reference).model_fields.items()
    )
    return markdown(("Option", "Type", "Default", "Meaning"), rows)


def options_type(field: FieldInfo) -> str:
    return (
        f"list of {words_of(get_args(field.annotation)[0])}"
        if get_origin(field.annotation) is tuple
        else type_of(field)
    )


# ---- requests --------------------------------------------------------------------------------------------------------

NOT_OPTIONS = {
    "structured": ("what the text must be like", [option(name) for name in STRUCTURES]),
    "logits_processors": ("functions that change the logits, run on the host one after the other", []),
}


def sampling() -> str:
    """One row for each field of SamplingParams."""
    return markdown(("Field", "Default", "Meaning", "Option"), map(sampling_row, fields(SamplingParams)))


def sampling_row(field: Field[Any]) -> Sequence[str]:
    meaning, written = NOT_OPTIONS.get(field.name, (MEANINGS.get(field.name, ""), [turned(field)]))
    return f"`{field.name}`", f"`{field.default!r}`", meaning, ", ".join(f"`{name}`" for name in written)


# ---- commands --------------------------------------------------------------------------------------------------------


def commands() -> str:
    """A section for every command of every installed distribution, with its arguments and options."""
    top = parser({**COMMANDS, **further_commands()})
    shared = ArgumentParser(add_help=False)
    add_config_arguments(shared)
    heading = "\n## Configuration options\n\n"
    return "".join(sections(top, "lineshaft", "")) + heading + options(shared, shared._action_groups[-1]._group_actions)


def sections(command: ArgumentParser, name: str, said: str) -> Iterator[str]:
    """The section of a command, if it can be run itself, and those of its own commands."""
    further = [action for action in command._actions if isinstance(action, _SubParsersAction)]
    for action in further:
        helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for word, inner in action.choices.items():
            yield from sections(inner, f"{name} {word}", helps[word])
    if not further:
        yield f"\n## `{name}`\n\n{said[:1].upper()}{said[1:].removesuffix('.')}.\n\n{arguments_of(command)}"


def arguments_of(command: ArgumentParser) -> str:
    """The table of a command's own arguments; the shared ones, which set the configuration, only by a link."""
    shared = next((group for group in command._action_groups if group.title == CONFIGURATION), None)
    common = [] if shared is None else shared._group_actions
    own = [action for action in command._actions if action not in common and not isinstance(action, _HelpAction)]
    link = "\nAnd the [configuration options](#configuration-options).\n" if common else ""
    return options(command, own) + link


def options(command: ArgumentParser, actions: Sequence[Action]) -> str:
    formatter = command._get_formatter()
    rows = ((called(action), formatter._expand_help(action) if action.help else "") for action in actions)
    return markdown(("Argument", "Meaning"), rows)


def called(action: Action) -> str:
    """How an argument is written: `-v`, `--verbose`, or `--prompt TEXT`, and whether it must be."""
    words = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
    value = "" if action.nargs == 0 else f" {words}" if action.option_strings else str(words)
    required = " (required)" if action.required and action.nargs not in ("*", "?") else ""
    return ", ".join(f"`{name}{value}`" for name in action.option_strings or [""]) + required


# ---- conformance -----------------------------------------------------------------------------------------------------


def mutants() -> str:
    rows = (
        (m.rule, f"`{m.name}`", code(m.checks) + (" (full)" if m.size == "full" else "")) for m in gallery().values()
    )
    return markdown(("Rule", "Mutant that breaks it", "Checks that kill it"), rows)


def gpu_matrix() -> str:
    return document(load_matrix(DOCS / "kernels" / "gpu-matrix.json"))


# ---- writing ---------------------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[], str]] = {
    "ops": ops, "problems": problems, "hooks": hooks, "config": config, "sampling": sampling,
    "commands": commands, "mutants": mutants, "gpu_matrix": gpu_matrix,
    "cuda_options": partial(backend_options, "lineshaft_cuda.options:CudaOptions"),
    "rocm_options": partial(backend_options, "lineshaft_rocm.options:RocmOptions"),
    "neuron_options": partial(backend_options, "lineshaft_neuron.options:NeuronOptions"),
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
