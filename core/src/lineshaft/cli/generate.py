"""`lineshaft generate`: texts of one or more prompts on stdout, a summary on stderr; or all as one JSON object."""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lineshaft.cli.options import add_config_arguments, load_config
from lineshaft.cli.progress import Bar
from lineshaft.errors import InvalidValue

if TYPE_CHECKING:
    from lineshaft.config import EngineConfig
    from lineshaft.llm import LLM
    from lineshaft.outputs import Logprob, RequestOutput
    from lineshaft.sampling.params import SamplingParams

HELP = "generate text for one or more prompts"
SAMPLING = {
    "max_tokens": "most tokens to generate for a prompt (default 256)",
    "temperature": "divides the logits; 0 is greedy",
    "top_p": "keep the most probable tokens up to this total probability",
    "top_k": "keep this many of the most probable tokens",
    "seed": "seed of each request's random draws: equal prompts then give equal texts",
}


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--prompt", metavar="TEXT", action="append", required=True, help="the prompt, or - for stdin; repeatable")
    for name, text in SAMPLING.items():
        add(f"--{name.replace('_', '-')}", metavar="N", help=text)
    add("--stop", metavar="TEXT", action="append", default=[], help="end before this text; repeatable")
    add("--logprobs", metavar="N", type=int, help="show the N most probable tokens at each place (does not stream)")
    add("--ignore-eos", action="store_true", help="go on after the model's end token")
    add("--raw", action="store_true", help="give the prompt as it is, without the chat template")
    add("--no-stream", action="store_true", help="print each text once it is whole; so it is with several prompts")
    add("--quiet", action="store_true", help="no summary")
    add("--json", action="store_true", help="print one JSON object: outputs, run and plan (does not stream)")
    add_config_arguments(parser)


def run(args: Namespace) -> int:
    config = load_config(args, **{f"sampling.{name}": getattr(args, name) for name in SAMPLING})
    params = sampling_params(args, config)
    prompts = read_prompts(args.prompt)
    from lineshaft.llm import LLM

    with closing(Bar()) as bar:
        llm = LLM.from_config(config, progress=bar)
    with llm:
        if args.json:
            outputs = complete(llm, prompts, params, raw=args.raw, progress=False)
            print(json.dumps(as_json(llm, prompts, outputs), indent=2, allow_nan=False))
            return 0
        if len(prompts) > 1 or args.no_stream or args.logprobs is not None:
            outputs = complete(llm, prompts, params, raw=args.raw, progress=not args.quiet)
            print_outputs(prompts, outputs)
            reasons = [output.outputs[0].finish_reason for output in outputs]
        else:
            reasons = [stream(llm, prompts[0], params, raw=args.raw)]
        if not args.quiet:
            print(summary(llm, reasons), file=sys.stderr)
    return 0


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


def sampling_params(args: Namespace, config: EngineConfig) -> SamplingParams:
    """The configuration's sampling defaults with the options of this run."""
    from lineshaft.sampling.params import SamplingParams

    chosen: dict[str, Any] = {"max_tokens": 256}
    chosen |= {key: value for key, value in config.sampling if value is not None}
    return SamplingParams(stop=args.stop or None, logprobs=args.logprobs, ignore_eos=args.ignore_eos, **chosen)


def stream(llm: LLM, prompt: str, params: SamplingParams, *, raw: bool) -> str | None:
    """Print the text as it comes; return why it ended."""
    reason = None
    for delta in llm.stream(prompt, params, chat=not raw):
        print(delta.text, end="", flush=True)
        reason = delta.finish_reason
    print()
    return reason


def complete(llm: LLM, prompts: list[str], params: SamplingParams, *, raw: bool, progress: bool) -> list[RequestOutput]:
    return (llm.generate if raw else llm.chat)(prompts, params, progress=progress)


def print_outputs(prompts: list[str], outputs: list[RequestOutput]) -> None:
    """Print each text, in the order of the prompts; of several each under its number and prompt."""
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True), start=1):
        if len(prompts) > 1:
            print(f"[{number}] {prompt!r:.100}")
        completion = output.outputs[0]
        print(completion.text)
        for token, place in zip(completion.token_ids, completion.logprobs or (), strict=False):
            print("  " + "  ".join(show_logprob(found, chosen=token == key) for key, found in place.items()))


def show_logprob(found: Logprob, *, chosen: bool) -> str:
    """A token with its log-probability; the chosen one has a star."""
    return f"{'*' if chosen else ''}{found.decoded_token!r} {found.logprob:.3f}"


def summary(llm: LLM, reasons: Sequence[str | None]) -> str:
    """What ran, why each text ended and how fast it was."""
    run = llm.metrics()
    ends = [f"[{number}] {reason}" for number, reason in enumerate(reasons, start=1)]
    return (
        f"{llm.plan.summary()}\n"
        f"finish reason: {', '.join(ends) if len(ends) > 1 else reasons[0]}\n"
        f"TTFT {run.ttft_s * 1e3:.1f} ms, TPOT {run.tpot_s * 1e3:.2f} ms, {run.tokens_per_s:.1f} tokens/s, "
        f"pages {run.pages_used} of {run.pages_total} at most, host {run.host_ms_per_decode_step:.3f} ms a decode step"
    )


def as_json(llm: LLM, prompts: list[str], outputs: list[RequestOutput]) -> dict[str, Any]:
    """The outputs in the order of the prompts, the run's metrics, and the plan's hash. A number that is not finite
    (a time that the backend does not measure) is null."""
    answered = [
        {"prompt": prompt, "prompt_token_ids": output.prompt_token_ids}
        | asdict(output.outputs[0])
        | {"metrics": asdict(output.metrics)}
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
