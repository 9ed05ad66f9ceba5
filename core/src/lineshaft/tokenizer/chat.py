"""Renders a list of messages through a model's chat template, in a sandbox: templates come with models, untrusted.

Offers what templates written for transformers expect. Knows no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lineshaft.errors import TokenizerError


class ChatTemplate:
    """One template with the model's special tokens (`variables`, such as bos_token) in reach."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        self.source = source
        self._variables = dict(variables)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, **variables: Any) -> str:
        """The prompt's text. Raises TokenizerError for a bad message, a bad template, or one that refuses."""
        _check(messages)
        # Templates ask "tools is not none": transformers always passes these two.
        values = {"tools": None, "documents": None} | self._variables | variables
        try:
            return self._compiled.render(messages=messages, add_generation_prompt=add_generation_prompt, **values)
        except TokenizerError:
            raise
        except Exception as error:  # a template is a program: it can fail with anything
            raise TokenizerError(
                f"the chat template fails on these messages: {_one_line(error)}; check the roles, their order and the "
                "fields of each message"
            ) from error

    @cached_property
    def _compiled(self) -> Template:
        try:
            return _environment().from_string(self.source)
        except Exception as error:  # the parser too can fail with more than TemplateError (deep nesting)
            raise TokenizerError(
                f"the model's chat template cannot be compiled: {_one_line(error)}; send a prompt without chat"
            ) from error


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    if not isinstance(messages, list | tuple) or not messages:
        raise TokenizerError(f"messages must be a list of at least one message, not {messages!r}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TokenizerError(f'message {index} must be like {{"role": "user", "content": "..."}}, not {message!r}')


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part for training; here its body is just rendered."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: the environment's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
