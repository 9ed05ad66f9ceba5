"""The options of commands that sample: one for each field of SamplingParams, whose type says how it is written."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lineshaft.cli.options import load_config
from lineshaft.errors import InvalidValue

if TYPE_CHECKING:
    from lineshaft.config import EngineConfig
    from lineshaft.sampling.params import SamplingParams

MEANINGS = {
    "n": "how many texts to make of each prompt",
    "best_of": "how many to make, of which the likeliest are kept (default: all)",
    "temperature": "divides the logits; 0 is greedy",
    "top_p": "keep the most probable tokens up to this total probability",
    "top_k": "keep this many of the most probable tokens",
    "min_p": "keep tokens of at least this share of the largest probability",
    "typical_p": "keep the tokens nearest to the expected surprise, up to this total probability",
    "repetition_penalty": "divides the chances of tokens of prompt and text; 1 is off",
    "presence_penalty": "subtracted from the logits of tokens of the text, once",
    "frequency_penalty": "subtracted from the logits of tokens of the text, each time",
    "logit_bias": "added to a token's logit, from -100 to 100; repeatable",
    "allowed_token_ids": "sample no other tokens",
    "bad_words": "never write this; repeatable",
    "seed": "seed of each request's random draws: equal prompts then give equal texts",
    "stop": "end before this text; repeatable",
    "stop_token_ids": "end after one of these tokens",
    "ignore_eos": "go on after the model's end token",
    "min_tokens": "least tokens to generate",
    "max_tokens": "most tokens to generate for a prompt",
    "logprobs": "show the N most probable tokens at each place (does not stream)",
    "prompt_logprobs": "show the N most probable tokens at each place of the prompt (does not stream)",
    "detokenize": "give token ids and no text",
    "skip_special_tokens": "show special tokens too",
    "include_stop_str_in_output": "keep the stop text at the end",
    "truncate_prompt_tokens": "use only so many last tokens of the prompt",
}
"""The fields that have an option. Those of `STRUCTURES` make up the field `structured`."""
STRUCTURES = {
    "json_schema": ("FILE|TEXT", "write JSON that follows this schema"),
    "regex": ("TEXT", "write what this regular expression matches"),
    "grammar": ("FILE", "write what this grammar allows, in Lark's or llama.cpp's notation"),
    "choice": ("TEXT", "write exactly one of these; repeatable"),
}
CONFIGURED = ("temperature", "top_p", "top_k", "max_tokens", "seed")
"""The fields that have a key under [sampling] too."""
OF_SEVERAL = frozenset({"n", "best_of", "logprobs", "prompt_logprobs", "detokenize", "truncate_prompt_tokens"})
"""The fields that mean nothing to a chat."""


def ids(text: str) -> tuple[int, ...]:
    """The token ids of "1,2,3", "[1, 2, 3]" or "1 2 3". Raises ValueError."""
    inner = text.strip()
    if inner.startswith("[") and inner.endswith("]"):
        inner = inner[1:-1]
    found = tuple(int(word) for word in inner.replace(",", " ").split())
    if not found:
        raise ValueError
    return found


def biases(texts: list[str]) -> dict[int, float]:
    """The token ids and numbers of ID=V. Raises ValueError."""
    pairs = (text.split("=") for text in texts)
    return {int(token): float(value) for token, value in pairs}


def truth(text: str) -> bool:
    """Raises ValueError."""
    if text not in ("true", "false"):
        raise ValueError
    return text == "true"


KINDS: Mapping[str, tuple[str, Callable[[Any], Any], str]] = {
    "bool": ("", truth, "true or false"),
    "int": ("N", int, "a whole number"),
    "float": ("X", float, "a number"),
    "str": ("TEXT", list, "a text"),
    "Mapping[int, float]": ("ID=V", biases, "ID=V, a token id and a number"),
    "Sequence[int]": ("IDS", ids, "token ids like 1,2,3"),
    "Sequence[str": ("TEXT", list, "a text"),
}
"""By the beginning of a field's type: what stands for the value, what makes it of the text, and what that must be."""
REPEATABLE = frozenset({"TEXT", "ID=V"})


def add_sampling_arguments(parser: ArgumentParser, *, without: Collection[str] = (), max_tokens: int = 256) -> None:
    """Add the options, but for some fields."""
    from lineshaft.sampling.params import SamplingParams

    group = parser.add_argument_group("sampling")
    for field in fields(SamplingParams):
        if field.name in MEANINGS and field.name not in without:
            add_option(group, field, f" (default {max_tokens})" if field.name == "max_tokens" else "")
    for name, (metavar, text) in STRUCTURES.items():
        group.add_argument(option(name), metavar=metavar, help=text, action="append" if name == "choice" else "store")


def add_option(group: Any, field: Field[Any], default: str) -> None:
    text = MEANINGS[field.name] + default
    if field.type == "bool":
        group.add_argument(turned(field), dest=field.name, action="store_const", const=not field.default, help=text)
        return
    metavar = kind(field)[0]
    action = "append" if metavar in REPEATABLE else "store"
    group.add_argument(turned(field), metavar=metavar, action=action, help=text)


def kind(field: Field[Any]) -> tuple[str, Callable[[Any], Any], str]:
    return next(found for beginning, found in KINDS.items() if str(field.type).startswith(beginning))


def turned(field: Field[Any]) -> str:
    """The option of a field: of a flag that is on, the one that turns it off."""
    return option(f"no_{field.name}" if field.type == "bool" and field.default else field.name)


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def sampling(args: Namespace, max_tokens: int = 256) -> tuple[EngineConfig, SamplingParams]:
    """The configuration, and its sampling defaults with the options of this run. Raises ConfigError, RequestError."""
    from lineshaft.sampling.params import SamplingParams

    config = load_config(args, **{f"sampling.{name}": getattr(args, name) for name in CONFIGURED})
    chosen: dict[str, Any] = {"max_tokens": max_tokens}
    chosen |= {key: value for key, value in config.sampling if value is not None}
    given = {name: getattr(args, name, None) for name in MEANINGS if name not in CONFIGURED}
    chosen |= {name: read(name, value, option(name)) for name, value in given.items() if value is not None}
    return config, SamplingParams(**chosen, structured=structured(args))


def read(name: str, given: bool | str | list[str], said: str) -> Any:
    """The value of a field: of a text as its type says, None of "none" where it may be unset. Raises InvalidValue."""
    from lineshaft.sampling.params import SamplingParams

    field = SamplingParams.__dataclass_fields__[name]
    if isinstance(given, bool) or (given == "none" and "None" in str(field.type)):
        return given if isinstance(given, bool) else None
    metavar, make, allowed = kind(field)
    return convert(said, [given] if metavar in REPEATABLE and isinstance(given, str) else given, make, allowed)


def convert(what: str, value: str | list[str], make: Callable[[Any], Any], allowed: str) -> Any:
    """What `make` makes of it. Raises InvalidValue where that raises ValueError."""
    try:
        return make(value)
    except ValueError as error:
        shown = value if isinstance(value, str) else " ".join(value)
        raise InvalidValue(f"{what} {shown!r}: it should be {allowed}") from error


def structured(args: Namespace) -> Any:
    """What the text must be like, or None."""
    from lineshaft.sampling.structured import Structured

    given = {name.removeprefix("json_"): getattr(args, name) for name in STRUCTURES}
    if (schema := given.pop("schema")) is not None:
        given["json"] = schema if schema.lstrip().startswith("{") else content("--json-schema", schema)
    if given["grammar"] is not None:
        given["grammar"] = content("--grammar", given["grammar"])
    found = {name: value for name, value in given.items() if value is not None}
    return Structured(**found) if found else None


def content(name: str, file: str) -> str:
    """The text of a file that an option names. Raises InvalidValue."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise InvalidValue(f"{name} {file}: it cannot be read: {why}; give the path of a text file") from error
