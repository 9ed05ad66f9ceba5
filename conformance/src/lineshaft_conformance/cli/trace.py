"""`lineshaft trace`: records what every op of a real generation returns, and finds where another backend differs."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from contextlib import closing
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lineshaft.cli.generate import read_prompts
from lineshaft.cli.options import add_config_arguments, load_config, pairs
from lineshaft.cli.progress import Bar
from lineshaft.cli.table import table
from lineshaft.errors import InvalidValue

if TYPE_CHECKING:
    from lineshaft.config import EngineConfig
    from lineshaft.tokenizer import Tokenizer
    from lineshaft_conformance.trace.compare import Compared
    from lineshaft_conformance.trace.replay import Change, Replayed

HELP = "record every op of a generation, and find where another backend differs from it"
AGREES, DIFFERS = 0, 1
WORST = 8


def add_arguments(parser: ArgumentParser) -> None:
    parser.epilog = "Exit status: 0 done, or all within tolerance; 1 something beyond tolerance; 2 an error."
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add_record(
        commands.add_parser(
            "record", help="run a greedy generation and keep what every op returned", allow_abbrev=False
        )
    )
    add_replay(
        commands.add_parser(
            "replay", help="run the recorded steps on a backend and compare every op", allow_abbrev=False
        )
    )


def add_record(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", metavar="FOLDER", type=Path, required=True, help="where the trace goes: a new or an empty folder")
    add("--prompt", metavar="TEXT", action="append", required=True, help="the prompt, or - for stdin; repeatable")
    add("--max-tokens", metavar="N", type=int, default=16, help="most tokens to generate for a prompt (default 16)")
    add("--raw", action="store_true", help="give the prompt as it is, without the chat template")
    add("--full", action="store_true", help="keep the tensors too: compared exactly, and much larger")
    add_config_arguments(parser)


def add_replay(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("trace", metavar="FOLDER", type=Path, help="what `lineshaft trace record` wrote")
    add("--backend", metavar="NAME", required=True, help="the backend to run the steps on")
    add("--backend-option", metavar="KEY=VALUE", action="append", default=[], help="repeatable")
    add("--model", metavar="REF", help="where the recorded model is on this machine")
    add("--threads", metavar="N", type=int, help="CPU threads")
    add("--mutant", metavar="NAME", default="", help="break the backend like this mutant of the gallery")
    add("--json", action="store_true", help="print one JSON object")


def run(args: Namespace) -> int:
    return {"record": run_record, "replay": run_replay}[args.action](args)


def run_record(args: Namespace) -> int:
    if args.max_tokens < 1:
        raise InvalidValue(f"--max-tokens {args.max_tokens}: it should be at least 1")
    config, texts = load_config(args), read_prompts(args.prompt)
    from lineshaft_conformance.trace.record import record

    tokenizer = open_tokenizer(config)
    prompts = [encode(tokenizer, text, raw=args.raw) for text in texts]
    with closing(Bar()) as bar:
        changed = record(
            args.out, config, prompts, args.max_tokens, eos_ids=tokenizer.eos_ids, full=args.full, progress=bar
        )
    if changed:
        print(
            f"note: in {changed} steps the watched run chose another token than the generation; this backend computes "
            "differently when its ops are watched",
            file=sys.stderr,
        )
    print(f"recorded {args.out}")
    return 0


def open_tokenizer(config: EngineConfig) -> Tokenizer:
    from lineshaft.tokenizer import Tokenizer
    from lineshaft.weights.refs import resolve

    return Tokenizer.from_checkpoint(resolve(config.tokenizer or config.model))


def encode(tokenizer: Tokenizer, text: str, *, raw: bool) -> list[int]:
    return list(tokenizer.encode(text) if raw else tokenizer.encode(tokenizer.chat(text), add_special=False))


def run_replay(args: Namespace) -> int:
    from lineshaft_conformance.trace.replay import replay

    options = dict(pairs("--backend-option", args.backend_option))
    if args.mutant:
        options = {**mutable(args.backend), **options}
    with closing(Bar()) as bar:
        found = replay(
            args.trace, args.backend, options, model=args.model, threads=args.threads,
            change=mutation(args.mutant), progress=bar,
        )  # fmt: skip
    print(json.dumps(as_json(found), indent=2, allow_nan=False) if args.json else as_text(found))
    return AGREES if found.first is None else DIFFERS


def mutable(backend: str) -> Mapping[str, Any]:
    """The options of a backend that mutants can be made of."""
    from lineshaft_conformance.mutants.kill import TARGET

    return TARGET.options if backend == TARGET.backend else {}


def mutation(name: str) -> Change:
    """What breaks the backend as the mutant of that name is; nothing for "". Raises InvalidValue for an unknown one."""
    if not name:
        return lambda backend: backend
    from lineshaft_conformance.mutants import gallery

    if name not in gallery():
        near = get_close_matches(name, gallery(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InvalidValue(f"--mutant {name!r}: {hint}`lineshaft conformance mutants` lists them")
    return gallery()[name].make


def as_json(found: Replayed) -> dict[str, object]:
    first = found.first
    return {
        "recorded": found.recorded, "backend": found.backend, "full": found.full, "agrees": first is None,
        "compared": len(found.compared), "beyond": sum(item.beyond for item in found.compared),
        "first": None if first is None else first.to_json(),
        "worst": [item.to_json() for item in found.worst(WORST)],
    }  # fmt: skip


def as_text(found: Replayed) -> str:
    """The first op beyond tolerance, then the worst ones."""
    beyond = sum(item.beyond for item in found.compared)
    steps = 1 + max((item.step for item in found.compared), default=-1)
    said = f"{found.backend} against {found.recorded}: {len(found.compared)} outputs of {steps} steps"
    lines = [f"{said}, {f'{beyond} beyond tolerance' if beyond else 'all within tolerance'}"]
    if found.first is not None:
        lines += first_lines(found.first)
    rows = [
        (f"{i.ratio:.3g}", str(i.step), layer(i), i.op, i.output, i.recorded_kernel, i.kernel)
        for i in found.worst(WORST)
    ]
    header = ("ERROR/ALLOWED", "STEP", "LAYER", "OP", "OUTPUT", "RECORDED KERNEL", "KERNEL")
    return "\n".join([*lines, "", "worst ops:", table(header, rows)])


def first_lines(first: Compared) -> list[str]:
    return [
        f"first: {first.place}",
        f"  {first.what}",
        f"  problem  {first.problem}",
        f"  kernels  {first.recorded_kernel} recorded, {first.kernel} here",
    ]


def layer(found: Compared) -> str:
    return "-" if found.layer is None else str(found.layer)
