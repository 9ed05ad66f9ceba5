"""`lineshaft generate`: texts of one or more prompts on stdout, a summary on stderr; or all as one JSON object."""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from lineshaft.cli.options import add_config_arguments
from lineshaft.cli.progress import Bar
from lineshaft.cli.sampling import add_sampling_arguments, content, convert, ids, sampling
from lineshaft.errors import InvalidValue

if TYPE_CHECKING:
    from lineshaft.config import EngineConfig
    from lineshaft.llm import LLM
    from lineshaft.outputs import CompletionOutput, Logprob, RequestOutput, StreamDelta
    from lineshaft.sampling.params import SamplingParams

HELP = "generate text for one or more prompts"
Prompts = Sequence[str | Sequence[int]]
"""Texts, or token ids."""


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", action="append", help="the prompt, or - for stdin; repeatable")
    prompts.add_argument(
        "--prompt-ids", metavar="IDS", action="append", help="the prompt's token ids: 1,2,3; repeatable"
    )
    add("--raw", action="store_true", help="give the prompt as it is, without the chat template")
    add("--chat-template", metavar="FILE", help="a template in the place of the model's own")
    add("--no-stream", action="store_true", help="print each text once it is whole; so it is with several texts")
    add("--quiet", action="store_true", help="no summary")
    add("--json", action="store_true", help="print one JSON object: outputs, run and plan (does not stream)")
    add_sampling_arguments(parser)
    add_config_arguments(parser)


def run(args: Namespace) -> int:
    config, params = sampling(args)
    prompts: Prompts = read_prompts(args.prompt) if args.prompt else list(map(read_ids, args.prompt_ids))
    chat, more = not (args.raw or args.prompt_ids), template(args)
    with opened(config) as llm:
        if len(prompts) > 1 or args.no_stream or args.json or shows_more(params):
            complete: Any = partial(llm.chat, **more) if chat else llm.generate
            outputs = complete(prompts, params, progress=not (args.quiet or args.json))
            if args.json:
                print(json.dumps(as_json(llm, prompts, outputs), indent=2, allow_nan=False))
                return 0
            print_outputs(prompts, outputs, text=params.detokenize)
            reasons = {label: completion.finish_reason for label, _, completion in listed(prompts, outputs)}
        else:
            reasons = {"": print_stream(llm.stream(prompts[0], params, chat=chat, **more))}
        if not args.quiet:
            print(summary(llm, reasons), file=sys.stderr)
    return 0


def opened(config: EngineConfig) -> LLM:
    """The LLM of a configuration, with a bar while it starts."""
    from lineshaft.llm import LLM

    with closing(Bar()) as bar:
        return LLM.from_config(config, progress=bar)


def shows_more(params: SamplingParams) -> bool:
    """Whether there is more to show than one text."""
    return params.width > 1 or not params.detokenize or (params.logprobs, params.prompt_logprobs) != (None, None)


def template(args: Namespace) -> dict[str, Any]:
    """What is told of the chat's template."""
    return {} if args.chat_template is None else {"chat_template": content("--chat-template", args.chat_template)}


def read_prompts(given: Sequence[str]) -> list[str]:
    """The prompts, with stdin in the place of "-"; empty where stdin is closed. Raises InvalidValue."""
    if given.count("-") > 1:
        raise InvalidValue("--prompt -: stdin can be read once, as one prompt; give the others as text")
    try:
        prompts = [("" if sys.stdin is None else sys.stdin.read()) if prompt == "-" else prompt for prompt in given]
        for prompt in prompts:
            prompt.encode()  # what the terminal could not decode is in there as lone surrogates
    except UnicodeError as error:
        raise InvalidValue(f"--prompt: the text is not UTF-8 ({error}); convert it") from error
    return prompts


def read_ids(text: str) -> list[int]:
    """The token ids of a prompt. Raises InvalidValue."""
    return list(convert("--prompt-ids", text, ids, "token ids like 1,2,3"))


def print_stream(deltas: Iterable[StreamDelta]) -> str | None:
    """Print the text as it comes; return why it ended."""
    reason = None
    for delta in deltas:
        print(delta.text, end="", flush=True)
        reason = delta.finish_reason
    print()
    return reason


def listed(prompts: Prompts, outputs: Sequence[RequestOutput]) -> Iterator[tuple[str, Any, CompletionOutput]]:
    """Every text with its label, which is "" where there is only one, and its prompt where there are several."""
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True), start=1):
        for completion in output.outputs:
            numbers = [number] * (len(prompts) > 1) + [completion.index + 1] * (len(output.outputs) > 1)
            label = f"[{'.'.join(map(str, numbers))}]" if numbers else ""
            yield label, prompt if len(prompts) > 1 else None, completion


def print_outputs(prompts: Prompts, outputs: Sequence[RequestOutput], *, text: bool) -> None:
    """Print each text, or its ids, under its label; before them what is known of the prompts' tokens."""
    for output in outputs:
        for place, token in zip(output.prompt_logprobs or (), output.prompt_token_ids, strict=False):
            print("  " + show_place(place, token) if place is not None else "prompt:")
    for label, prompt, completion in listed(prompts, outputs):
        if label:
            print(label if prompt is None else f"{label} {prompt!r:.100}")
        print(completion.text if text else " ".join(map(str, completion.token_ids)))
        for token, place in zip(completion.token_ids, completion.logprobs or (), strict=False):
            print("  " + show_place(place, token))


def show_place(place: Mapping[int, Logprob], chosen: int) -> str:
    """The tokens of a place with their log-probabilities; the chosen one has a star."""
    return "  ".join(f"{'*' if i == chosen else ''}{p.decoded_token!r} {p.logprob:.3f}" for i, p in place.items())


def summary(llm: LLM, reasons: Mapping[str, str | None]) -> str:
    """What ran, why each text ended and how fast it was."""
    run = llm.metrics()
    ends = [f"{label} {reason}".strip() for label, reason in reasons.items()]
    return (
        f"{llm.plan.summary()}\n"
        f"finish reason: {', '.join(ends)}\n"
        f"TTFT {run.ttft_s * 1e3:.1f} ms, TPOT {run.tpot_s * 1e3:.2f} ms, {run.tokens_per_s:.1f} tokens/s, "
        f"pages {run.pages_used} of {run.pages_total} at most, host {run.host_ms_per_decode_step:.3f} ms a decode step"
    )


def as_json(llm: LLM, prompts: Prompts, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """The outputs in the order of the prompts, the run's metrics, and the plan's hash. A number that is not finite
    (a time that the backend does not measure) is null. Of several texts for a prompt all are its `samples`."""
    answered = [
        {"prompt": prompt if isinstance(prompt, str) else None, "prompt_token_ids": output.prompt_token_ids}
        | asdict(output.outputs[0])
        | {"metrics": asdict(output.metrics)}
        | ({"samples": list(map(asdict, output.outputs))} if len(output.outputs) > 1 else {})
        | ({} if output.prompt_logprobs is None else {"prompt_logprobs": output.prompt_logprobs})
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    plain: dict[str, Any] = finite({"outputs": answered, "run": asdict(llm.metrics()), "plan": llm.plan.hash})
    return plain


def finite(value: Any) -> Any:
    """The same with named tuples as objects and None for every number that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if hasattr(value, "_asdict"):
        return finite(value._asdict())
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
