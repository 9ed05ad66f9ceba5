"""Tool calls are found in what common models write, and in nothing else."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lineshaft.frontend.tools import tool_calls
from lineshaft.outputs import ToolCall

NAMES = frozenset({"add", "look_up"})
ADD = ToolCall("add", {"a": 1, "b": 2})
LOOK = ToolCall("look_up", {"word": "}</x>"})


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>', [ADD]),
        (
            'Let me see.\n<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>\n'
            '<tool_call>{"name": "look_up", "arguments": {"word": "}</x>"}}</tool_call><|im_end|>',
            [ADD, LOOK],
        ),
        ('<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}', [ADD]),  # the stop token took the end
        ('<tool_call>{"name": "unheard_of", "arguments": {}}</tool_call>', [ToolCall("unheard_of", {})]),
        ('{"name": "add", "parameters": {"a": 1, "b": 2}}', [ADD]),
        ('<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": 2}}<|eom_id|>', [ADD]),
        (
            '{"name": "add", "parameters": {"a": 1, "b": 2}}; {"name": "look_up", "arguments": {"word": "}</x>"}}',
            [ADD, LOOK],
        ),
        ('[TOOL_CALLS][{"name": "add", "arguments": {"a": 1, "b": 2}}]</s>', [ADD]),
        (
            '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": 2}}, '
            '{"name": "look_up", "arguments": {"word": "}</x>"}}]',
            [ADD, LOOK],
        ),
        ('[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}[TOOL_CALLS]look_up{"word": "}</x>"}', [ADD, LOOK]),
        ('[TOOL_CALLS]add[CALL_ID]x1[ARGS]{"a": 1, "b": 2}', [ADD]),
        ('{"name": "add"}', [ToolCall("add", {})]),
        # none of these is a call
        ("3 and 4 make 7.", []),
        ("", []),
        ('{"name": "Ada", "arguments": {"age": 7}}', []),
        ('The answer: {"name": "add", "arguments": {}}', []),
        ('<tool_call>{"name": "add", "arguments": {"a": </tool_call>', []),
        ('<tool_call>{"name": "add", "arguments": "none"}</tool_call>', []),
        ('<tool_call>{"name": 3, "arguments": {}}</tool_call><tool_call></tool_call>', []),
        ("[TOOL_CALLS] not today", []),
        ('<tool_call>["add"]</tool_call>', []),
    ],
)
def test_calls_are_found(text: str, calls: list[ToolCall]) -> None:
    assert tool_calls(text, NAMES) == calls


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    st.dictionaries(st.text(), st.recursive(st.integers() | st.text() | st.none(), st.lists, max_leaves=5), max_size=4)
)
@example({"a": "</tool_call>"})
def test_arguments_come_back_as_they_were(arguments: dict[str, object]) -> None:
    call = json.dumps({"name": "add", "arguments": arguments})
    for text in (f"<tool_call>\n{call}\n</tool_call>", f"[TOOL_CALLS][{call}]", f"<|python_tag|>{call}", call):
        assert tool_calls(text, NAMES) == [ToolCall("add", arguments)]


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.text(alphabet='{}[]":;, \nadx1', max_size=40), st.sampled_from(["", "<tool_call>", "[TOOL_CALLS]"]))
def test_whatever_a_model_writes_it_ends_without_an_error(text: str, mark: str) -> None:
    assert isinstance(tool_calls(mark + text, NAMES), list)
