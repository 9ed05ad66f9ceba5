"""`lineshaft chat`: a conversation, in a terminal or from a pipe, one message of the user a line.

Answers go to stdout and all else to stderr. Ctrl-C ends the answer under way.
"""

from __future__ import annotations

import json
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lineshaft.cli.generate import finite, opened, template
from lineshaft.cli.options import add_config_arguments
from lineshaft.cli.sampling import MEANINGS, OF_SEVERAL, add_sampling_arguments, read, sampling
from lineshaft.errors import InvalidValue, RequestError

if TYPE_CHECKING:
    from lineshaft.llm import LLM
    from lineshaft.sampling.params import SamplingParams

HELP = "talk with a model"
MAX_TOKENS = 1024
COMMANDS = {
    "/reset": "forget what was said",
    "/system": "/system TEXT: what the model is told first; without a text nothing",
    "/params": "/params NAME=VALUE ...: change how tokens are sampled; without a name show it",
    "/help": "list these commands",
    "/quit": "end, as Ctrl-D does; Ctrl-C ends an answer",
}
EPILOG = "in the conversation: " + "; ".join(f"{name} {text}" for name, text in COMMANDS.items())


def add_arguments(parser: ArgumentParser) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--system", metavar="TEXT", help="what the model is told first")
    add("--chat-template", metavar="FILE", help="a template in the place of the model's own")
    add("--json", action="store_true", help="print a line of JSON for each answer, and at the end one of run and plan")
    add_sampling_arguments(parser, without=OF_SEVERAL, max_tokens=MAX_TOKENS)
    add_config_arguments(parser)


def run(args: Namespace) -> int:
    config, params = sampling(args, MAX_TOKENS)
    more = template(args)
    terminal = sys.stdin is not None and sys.stdin.isatty()
    with opened(config) as llm:
        talk = Talk(llm, params, args.system, more, args.json)
        for line in typed() if terminal else piped():
            try:
                if talk.take(line):
                    break
            except (RequestError, InvalidValue) as error:
                if not terminal:
                    raise
                print(f"lineshaft: error: {type(error).__name__}: {error}", file=sys.stderr)
        if args.json:
            print(json.dumps(finite({"run": asdict(llm.metrics()), "plan": llm.plan.hash}), allow_nan=False))
    return 0


def typed() -> Iterator[str]:
    """What the user types, until the end of input; Ctrl-C begins the line anew."""
    with suppress(ImportError):
        import readline  # noqa: F401  (lines can then be edited, and called back)
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit ends)", file=sys.stderr)
        except EOFError:
            print()
            return


def piped() -> Iterator[str]:
    """The lines of stdin. Raises InvalidValue where they are no text."""
    try:
        for line in sys.stdin or ():
            yield line.rstrip("\r\n")
    except UnicodeError as error:
        raise InvalidValue(f"stdin: the text is not UTF-8 ({error}); convert it") from error


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Gives what tells whether Ctrl-C was pressed: a step must not be interrupted. The second one ends the program."""
    pressed = 0

    def note(number: int, frame: object) -> None:
        nonlocal pressed
        pressed += 1
        if pressed > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed > 0
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass
class Talk:
    """What was said, and how the next answer is made."""

    llm: LLM
    params: SamplingParams
    system: str | None
    more: dict[str, Any]
    json: bool
    number: int = 0  # of the conversation
    said: list[dict[str, str]] = field(default_factory=list)

    def take(self, line: str) -> bool:
        """Answer a message, or do what a command says; whether that ends the conversation. Raises LineshaftError."""
        word, _, rest = line.strip().partition(" ")
        if not word.startswith("/") or line.startswith(" "):
            if word:
                self.answer(line.strip())
            return False
        if word not in COMMANDS:
            raise InvalidValue(
                f"unknown command {word}: known are {', '.join(COMMANDS)}; a space before it makes it a message"
            )
        done = {"/reset": self.reset, "/system": self.tell, "/params": self.change, "/help": self.help}
        if word in done:
            print(done[word](rest.strip()), file=sys.stderr)
        return word == "/quit"

    def answer(self, text: str) -> None:
        """Ask, show the answer as it comes, and remember both; a question that is refused is forgotten."""
        asked = [{"role": "user", "content": text}]
        if not self.said and self.system:
            asked.insert(0, {"role": "system", "content": self.system})
        parts, reason = self.stream(self.said + asked)
        answer = {"role": "assistant", "content": "".join(parts)}
        self.said += [*asked, answer]
        if self.json:
            turn = {"conversation": self.number, "messages": [*asked, answer], "finish_reason": reason}
            print(json.dumps(turn), flush=True)

    def stream(self, messages: list[dict[str, str]]) -> tuple[list[str], str | None]:
        """The pieces of the answer, and why it ended."""
        parts, reason = [], None
        answer = self.llm.stream(messages, self.params, chat=True, **self.more)
        with interruptible() as interrupted, closing(answer) as deltas:  # type: ignore[type-var]
            for delta in deltas:
                parts.append(delta.text)
                reason = delta.finish_reason
                if not self.json:
                    print(delta.text, end="", flush=True)
                if reason is None and interrupted():
                    reason = "interrupted"
                    break
        if not self.json:
            print(flush=True)
        return parts, reason

    def reset(self, _: str) -> str:
        self.number += bool(self.said)
        self.said = []
        return "(forgotten)"

    def tell(self, text: str) -> str:
        self.system = text or None
        self.said = [turn for turn in self.said if turn["role"] != "system"]
        if text and self.said:
            self.said.insert(0, {"role": "system", "content": text})
        return "(told)" if text else "(nothing is told)"

    def change(self, text: str) -> str:
        """Set NAME=VALUE; return what all are. Raises InvalidValue and InvalidSamplingParams."""
        allowed = [name for name in MEANINGS if name not in OF_SEVERAL]
        changed: dict[str, Any] = {}
        for pair in text.split():
            name, equals, value = pair.partition("=")
            name = name.replace("-", "_")
            if name not in allowed or not equals:
                raise InvalidValue(f"/params {pair}: give NAME=VALUE, with a name of {', '.join(allowed)}")
            changed[name] = read(name, value, name)
        self.params = replace(self.params, **changed)
        return " ".join(f"{name}={getattr(self.params, name)}" for name in allowed)

    def help(self, _: str) -> str:
        return "\n".join(f"{name:8} {text}" for name, text in COMMANDS.items())
