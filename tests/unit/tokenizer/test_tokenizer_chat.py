"""Chat templates render as in transformers, in a sandbox, and fail with one typed error."""

from __future__ import annotations

from datetime import datetime

import pytest

from lineshaft.errors import ChatError
from lineshaft.tokenizer.chat import ChatTemplate

MESSAGES = [{"role": "user", "content": "<a href='x'>\u00e9</a>"}, {"role": "assistant", "content": "ok"}]


def render(source: str, **variables: object) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(MESSAGES, True, **variables)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages | tojson }}",
        "{{ messages | tojson(indent=2) }}",
        "{{ messages[0] | tojson(sort_keys=true, ensure_ascii=true) }}",
        "{% for m in messages %}\n  {% if loop.index == 2 %}{% break %}{% endif %}\n{{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{{ bos_token }}{{ tools is defined }}{{ add_generation_prompt }}",
        "  {%- if true %}\n    x\n  {%- endif %}\n",
    ],
)
def test_renders_as_transformers_does(source: str) -> None:
    pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    theirs, _ = render_jinja_template([MESSAGES], chat_template=source, add_generation_prompt=True, bos_token="<s>")
    assert render(source) == theirs[0]


def test_variables_reach_the_template() -> None:
    assert render("{{ enable_thinking }}{{ bos_token }}", enable_thinking=False) == "False<s>"


def test_strftime_now_gives_the_date() -> None:
    before = datetime.now().year
    assert before <= int(render("{{ strftime_now('%Y') }}")) <= datetime.now().year


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "{{ raise_exception('roles must\nalternate') }}",
            "fails on these messages: TemplateError: roles must alternate",
        ),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% if %}", "cannot be compiled: TemplateSyntaxError"),
        ("{% generation %}x", "cannot be compiled: TemplateSyntaxError"),
    ],
)
def test_failures_are_one_typed_error(source: str, words: str) -> None:
    with pytest.raises(ChatError, match=words) as caught:
        render(source)
    assert "\n" not in str(caught.value)
