"""Messages and tools of a chat: what templates get of them, messages that are continued, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lineshaft.errors import ChatError
from lineshaft.tokenizer.chat import ChatTemplate

CHATML = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STRIPPED = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }} .\n{% endfor %}"
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


def render(messages: Any, source: str = CHATML, **more: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **more)


def test_an_answer_is_begun_unless_a_message_is_continued() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}]
    assert render(messages[:1]) == "<|user|>Hi<|end|>\n<|assistant|>"
    assert render(messages[:1], add_generation_prompt=False) == "<|user|>Hi<|end|>\n"
    assert render(messages, continue_final_message=True) == "<|user|>Hi<|end|>\n<|assistant|>Well, "


@pytest.mark.parametrize("source", [CHATML, STRIPPED])
@pytest.mark.parametrize("content", ["Well", "Well, ", " Well", "e", "end|", "a\nb ", "ü "])
def test_continued_messages_are_what_transformers_makes(source: str, content: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "user", "content": "e"}, {"role": "assistant", "content": content}]
    theirs, _ = render_jinja_template(
        [messages], chat_template=source, continue_final_message=True, add_generation_prompt=False
    )
    assert render(messages, source, continue_final_message=True) == theirs[0]
    assert messages[1]["content"] == content  # the caller's own


def test_tools_reach_the_template_as_they_are() -> None:
    first = render([{"role": "user", "content": "Hi"}], tools=[TOOL]).splitlines()[0]
    assert json.loads(first) == [TOOL]
    assert render([{"role": "user", "content": "Hi"}], tools=[]) == render([{"role": "user", "content": "Hi"}])


def test_parts_are_joined_and_arguments_are_objects() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    call = {"type": "function", "id": "x", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "x"},
    ]  # fmt: skip
    said = render(messages)
    assert "<|user|>one\ntwo<|end|>" in said
    assert '<|assistant|>{"a": 1}None<|end|>' in said
    assert messages[0]["content"] is parts


@pytest.mark.parametrize(
    ("messages", "more", "words"),
    [
        ([], {}, "at least one message"),
        ("hello", {}, "at least one message"),
        ([{"role": "user", "content": 5}], {}, "content of message 0 is 5"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], {},
            "has the part .*image_url.*no other input",
        ),
        ([{"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}], {}, "tool call of message 0"),
        ([{"role": "assistant", "content": "", "tool_calls": 7}], {}, "tool call of message 0"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], {},
            "tool call of message 0",
        ),
        ([{"role": "user", "content": "x"}], {"tools": "add"}, "tools must be a list"),
        ([{"role": "user", "content": "x"}], {"tools": [{"name": "add"}]}, r"tools\[0\]: .*is no function"),
        ([{"role": "user", "content": "x"}], {"tools": [TOOL, 3]}, r"tools\[1\]: 3 is no function"),
        (
            [{"role": "user", "content": "x"}], {"tools": [{"type": "function", "function": {"name": ""}}]},
            r"tools\[0\]: its name is ''",
        ),
        (
            [{"role": "user", "content": "x"}],
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "no JSON schema of an object",
        ),
        (
            [{"role": "user", "content": "x"}],
            {"tools": [{"type": "function", "function": {"name": "f", "description": {1, 2}}}]},
            "cannot be written as JSON",
        ),
        ([{"role": "user", "content": ""}], {"continue_final_message": True}, "cannot be continued"),
        (
            [{"role": "user", "content": "x"}], {"continue_final_message": True, "add_generation_prompt": True},
            "exclude each other",
        ),
        (
            [{"role": "user", "content": "x"}], {"continue_final_message": True, "source": "{{ bos_token }}"},
            "leaves the last message out",
        ),
        ([{"role": "user", "content": "x"}], {"source": 7}, "cannot be compiled"),
    ],
)  # fmt: skip
def test_what_is_malformed_is_one_line(messages: Any, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ChatError, match=words) as caught:
        render(messages, **more)
    assert "\n" not in str(caught.value)
