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

from lineshaft.errors import ChatError
from lineshaft.tokenizer.messages import check_tools, plain_messages

_END = "\N{END OF TRANSMISSION BLOCK}"
"""Marks, with a space after it, the end of a message that is to be continued."""


class ChatTemplate:
    """One template with the model's special tokens (`variables`, such as bos_token) in reach."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        self.source = source
        self._variables = dict(variables)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt's text.

        add_generation_prompt: whether it ends with the beginning of an answer; None: unless a message is continued.
        tools: functions as OpenAI's API describes them. continue_final_message: the text ends inside the last message.
        variables: what else the template reads. Raises ChatError for what is malformed, and where the template fails.
        """
        turns = plain_messages(messages)
        if continue_final_message:
            if add_generation_prompt:
                raise ChatError("continue_final_message and add_generation_prompt exclude each other: give one of them")
            turns[-1]["content"] = f"{_text_of(turns[-1])}{_END} "
        answer = not continue_final_message if add_generation_prompt is None else add_generation_prompt
        # Templates ask "tools is not none": transformers always passes these two.
        values = {"tools": check_tools(tools), "documents": None} | self._variables | variables
        text = self._render(values | {"messages": turns, "add_generation_prompt": answer})
        return _cut(text) if continue_final_message else text

    def _render(self, values: dict[str, Any]) -> str:
        template = self._compiled
        try:
            return template.render(values)
        except Exception as error:  # a template is a program: it can fail with anything
            raise ChatError(
                f"the chat template fails on these messages: {_one_line(error)}; check the roles, their order and the "
                "fields of each message"
            ) from error

    @cached_property
    def _compiled(self) -> Template:
        try:
            return _environment().from_string(self.source)
        except Exception as error:  # the parser too can fail with more than TemplateError (deep nesting)
            raise ChatError(
                f"the chat template cannot be compiled: {_one_line(error)}; give another, or a prompt without chat"
            ) from error


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if not isinstance(content, str) or not content:
        raise ChatError(f"the last message cannot be continued: its content is {content!r}; give it a text")
    return content


def _cut(text: str) -> str:
    """The text up to the mark; without spaces before it where the template took away the one after it."""
    before, mark, after = text.rpartition(_END)
    if not mark:
        raise ChatError("the chat template leaves the last message out, which was to be continued; check its role")
    return before if after.startswith(" ") else before.rstrip()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
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
