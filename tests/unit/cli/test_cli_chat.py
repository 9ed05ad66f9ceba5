"""`lineshaft chat` on a pipe and in a terminal that is a stand-in: turns, commands, transcripts, refusals."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.unit.cli.fakes import FakeLLM

from lineshaft.errors import PromptTooLong

Run = Callable[..., tuple[int, str, str]]
CHAT = ("chat", "--model", "m")
ANSWER = {"role": "assistant", "content": "one two"}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.fixture
def chat(lineshaft_run: Run, fake: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the command on these lines of stdin."""

    def run(lines: str, *options: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        return lineshaft_run(*CHAT, *options)

    return run


@pytest.fixture
def terminal(lineshaft_run: Run, fake: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the command in a terminal where the user types these; an exception is Ctrl-C or Ctrl-D."""

    def run(typed: list[Any], *options: str) -> tuple[int, str, str]:
        keys: Iterator[Any] = iter([*typed, EOFError()])

        def ask(prompt: str) -> str:
            found = next(keys)
            if isinstance(found, BaseException):
                raise found
            return str(found)

        monkeypatch.setattr("builtins.input", ask)
        monkeypatch.setattr("sys.stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
        return lineshaft_run(*CHAT, *options)

    return run


def test_each_line_is_a_turn_of_one_conversation(chat: Any, fake: dict[str, Any]) -> None:
    status, out, err = chat("Hi\n\n  \nAnd you?\n", "--system", "Be brief.")
    assert (status, out, err) == (0, "one two\none two\n", "")
    system = {"role": "system", "content": "Be brief."}
    assert fake["prompts"] == [[system, user("Hi")], [system, user("Hi"), ANSWER, user("And you?")]]
    assert fake["chat"]
    assert fake["params"].max_tokens == 1024
    assert fake["closed"]


def test_options_and_configuration_reach_the_sampling(chat: Any, fake: dict[str, Any]) -> None:
    assert chat("Hi\n", "--set", "sampling.top_k=5", "--min-p", "0.1", "--max-tokens", "7")[0] == 0
    assert (fake["params"].top_k, fake["params"].min_p, fake["params"].max_tokens) == (5, 0.1, 7)


def test_commands_change_what_follows(chat: Any, fake: dict[str, Any]) -> None:
    lines = [
        "one", "/reset", "two", "/system Be kind.", "three", "/system", "four",
        "/params temperature=0.5 ignore_eos=true stop=x seed=3", "five", "/params seed=none", " /quit is a word",
        "/help", "/quit", "never said",
    ]  # fmt: skip
    status, out, err = chat("\n".join(lines))
    assert (status, out) == (0, "one two\n" * 6)
    said = fake["prompts"]
    kind = {"role": "system", "content": "Be kind."}
    assert said[1] == [user("two")]
    assert said[2] == [kind, user("two"), ANSWER, user("three")]
    assert said[3] == [*said[2][1:], ANSWER, user("four")]
    assert said[5][-1] == user("/quit is a word")
    params = fake["params"]
    assert (params.temperature, params.ignore_eos, params.stop, params.seed) == (0.5, True, ("x",), None)
    assert "temperature=0.5" in err
    assert "/reset" in err


def test_the_transcript_is_a_line_of_json_for_each_answer_and_one_of_the_run(chat: Any, fake: dict[str, Any]) -> None:
    status, out, _ = chat("/reset\none\ntwo\n/reset\nthree\n", "--json", "--system", "Be brief.")
    *answers, end = (json.loads(line, parse_constant=pytest.fail) for line in out.splitlines())
    assert (status, set(end), end["plan"]) == (0, {"run", "plan"}, "abc")
    system = {"role": "system", "content": "Be brief."}
    assert [answer["conversation"] for answer in answers] == [0, 0, 1]
    assert [answer["finish_reason"] for answer in answers] == ["length"] * 3
    assert [answer["messages"] for answer in answers] == [
        [system, user("one"), ANSWER], [user("two"), ANSWER], [system, user("three"), ANSWER],
    ]  # fmt: skip


def test_an_error_in_a_later_turn_keeps_the_answers_before_it(chat: Any, fake: dict[str, Any]) -> None:
    status, out, err = chat("one\n/dance\ntwo\n", "--json")
    (answer,) = map(json.loads, out.splitlines())
    assert (status, answer["messages"], "unknown command /dance" in err) == (2, [user("one"), ANSWER], True)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/dance", "unknown command /dance: known are /reset"),
        ("/params temprature=1", "/params temprature=1: give NAME=VALUE"),
        ("/params n=2", "/params n=2"),
        ("/params temperature", "/params temperature"),
        ("/params temperature=hot", "temperature 'hot': it should be a number"),
        ("/params ignore_eos=1", "ignore_eos '1': it should be true or false"),
        ("/params temperature=-1", "temperature = -1"),
    ],
)
def test_a_wrong_command_ends_a_pipe_and_not_a_terminal(
    chat: Any, terminal: Any, fake: dict[str, Any], line: str, words: str
) -> None:
    status, out, err = chat(f"{line}\nHi\n")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err
    status, out, err = terminal([line, "Hi"])
    assert (status, out) == (0, "one two\n\n")
    assert words in err


def test_a_question_that_is_refused_is_forgotten(
    terminal: Any, fake: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FakeLLM.stream

    def refuse(self: FakeLLM, prompt: Any, *more: Any, **options: Any) -> Any:
        if prompt[-1]["content"] == "long":
            raise PromptTooLong("too long")
        yield from real(self, prompt, *more, **options)

    monkeypatch.setattr(FakeLLM, "stream", refuse)
    status, _, err = terminal(["long", "short"], "--system", "S")
    assert (status, "lineshaft: error: PromptTooLong: too long" in err) == (0, True)
    assert fake["prompts"] == [[{"role": "system", "content": "S"}, user("short")]]


def test_ctrl_c_at_the_prompt_begins_the_line_anew(terminal: Any, fake: dict[str, Any]) -> None:
    status, out, err = terminal([KeyboardInterrupt(), "Hi"])
    assert (status, out.splitlines()[0]) == (0, "one two")
    assert "/quit" in err


def test_stdin_that_is_no_text(lineshaft_run: Run, fake: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    status, _, err = lineshaft_run(*CHAT)
    assert (status, "InvalidValue: stdin: the text is not UTF-8" in err) == (2, True)
    monkeypatch.setattr("sys.stdin", None)
    assert lineshaft_run(*CHAT)[0] == 0
