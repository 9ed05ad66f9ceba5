"""L4: tiny models through the real scheduler on the subject; logits and tokens of every step beside the reference.

Each scenario shows that what it is named for really happened. Unused pages and page 0 hold NaN before every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lineshaft.errors import Unsupported
from lineshaft_conformance.checks import Check, Found, NotClaimed, require_dtype, rule_of
from lineshaft_conformance.harness.stage import Stage, smallest_page
from lineshaft_conformance.harness.tiny import FEATURED, TINY, tiny
from lineshaft_conformance.subject import Subject
from lineshaft_contract.ops.spec import Size

Play = Callable[[Stage], None]
DTYPES = ("float32", "bfloat16", "float64", "float16")


@dataclass(frozen=True)
class Scenario:
    """A way to use an engine: its settings for a page size in tokens, and what is done."""

    name: str
    play: Play
    settings: Callable[[int], Mapping[str, Any]] = lambda page: {}
    page: int = 4  # tokens a page, or the next larger size that the subject takes


def one_token(stage: Stage) -> None:
    """Prompts of one token: a first step whose row is as short as a decode row and has no context."""
    for _ in range(3):
        stage.add(stage.prompt(1), 5)
        stage.step()
    stage.finish()
    stage.happened("a row of one token and no context", any(r.start == 0 and r.count == 1 for r in flat(stage)))


def decode(stage: Stage) -> None:
    """One sequence that grows over page edges, one token a step."""
    stage.add(stage.prompt(3), 3 * stage.page_size)
    stage.finish()
    stage.happened("decode rows on three pages", any(r.count == 1 and len(r.pages) > 2 for r in flat(stage)))


def chunks(stage: Stage) -> None:
    """Prompts prefilled in chunks, which begin and end in mid-page."""
    stage.add(stage.prompt(40), 3)
    stage.step(2)
    stage.add(stage.prompt(23), 3)
    stage.finish()
    later = [row for row in flat(stage) if row.start and row.count > 1]
    stage.happened("a chunk that is not the first", later)
    if stage.page_size > 1:
        stage.happened("a chunk that begins in mid-page", any(row.start % stage.page_size for row in later))


def prefixes(stage: Stage) -> None:
    """Prompts with a common beginning, whose pages they share while each goes on by itself."""
    size = stage.page_size
    common = stage.prompt(2 * size)
    stage.add([*common, *stage.prompt(2)], 2)
    stage.finish()
    pair = [stage.add([*common, *stage.prompt(n)], size + 2) for n in (1, 3)]
    stage.finish()
    stage.happened("two prompts found their prefix", all(request.cached == 2 * size for request in pair))
    stage.happened("two rows of a step share pages", any(_share(rows) for rows in stage.rows()))
    fresh = stage.prompt(2 * size)
    pair = [stage.add([*fresh, *stage.prompt(n)], 2) for n in (2, 4)]
    stage.finish()
    stage.happened("a prompt found what another one began with", [r.cached for r in pair] == [0, 2 * size])
    if stage.subject.capabilities.max_prefill_rows != 1:
        filled = any(_fills_for_another(rows, size) for rows in stage.rows())
        stage.happened("a row reads pages that another row of its step fills", filled)


def cached(stage: Stage) -> None:
    """A prompt all of whose pages are cached: one token is left to compute, over a context that others wrote."""
    prompt = stage.prompt(3 * stage.page_size + 1)
    first = stage.add(prompt, 4)
    stage.finish()
    before = len(stage.steps)
    again = stage.add(prompt, 4)
    stage.finish()
    stage.happened("all but one token was cached", again.cached == len(prompt) - 1 and first.cached == 0)
    row = stage.steps[before].rows(stage.page_size)[0]
    stage.happened("a first step of one token", row.start == len(prompt) - 1 and row.count == 1)


def preemption(stage: Stage) -> None:
    """A pool for fewer sequences than run: the youngest loses its pages and is computed anew."""
    for _ in range(3):
        stage.add(stage.prompt(stage.page_size + 1), 3 * stage.page_size)
    stage.finish()
    stage.happened("a preemption", stage.engine.metrics().preemptions)


def mixed(stage: Stage) -> None:
    """Steps that hold decode rows and prefill rows; requests of many lengths that come and go."""
    if not stage.subject.capabilities.mixed_steps:
        raise NotClaimed("Capabilities.mixed_steps is false")
    for length in (5, 1, 14, 9, 30, 2, 17, 6):
        stage.add(stage.prompt(length), 4 + length % 3)
        stage.step()
    stage.finish()
    kinds = [({row.count == 1 and row.start > 0 for row in rows}, len(rows)) for rows in stage.rows()]
    stage.happened("decode and prefill in one step", any(len(kind) == 2 and rows > 2 for kind, rows in kinds))


def sampled(stage: Stage) -> None:
    """Requests that draw, each with its own seed and filters, beside a greedy one; their log-probabilities too."""
    prompt = stage.prompt(6)
    ways: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": 5},
        {"temperature": 1.0, "seed": 6},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 2**64 - 1},
        {"temperature": 1.5, "min_p": 0.02, "seed": 7, "logprobs": 3},
        {"temperature": 0.0},
    ]
    requests = [stage.add(prompt, 12, **way) for way in ways]
    stage.finish()
    hosts = [(step.live, step.choice.sampling) for step in stage.steps if step.choice.sampling is not None]
    uniform = [len(np.unique(host["u"][:live])) for live, host in hosts]
    stage.happened("rows of a step with random numbers of their own", any(n > 3 for n in uniform))
    stage.happened("log-probabilities", any(step.logprobs is not None for step in stage.steps))
    stage.happened("other tokens for another seed", len({tuple(request.output) for request in requests}) > 3)


def cancelled(stage: Stage) -> None:
    """Requests cancelled in the middle of their output and in the queue; others take their pages while more run on."""
    size = stage.page_size
    first, second, _ = (stage.add(stage.prompt(n), 2 * size + 2) for n in (2 * size, size + 1, 3))
    while not first.output and not first.finished:
        stage.step()
    stage.step()
    stage.happened("a request that had begun to answer", not first.finished)
    stage.engine.cancel(first.id)
    before = len(stage.steps)
    stage.add(stage.prompt(2 * size + 1), size)
    waiting = stage.add(stage.prompt(4), size)
    stage.engine.cancel(waiting.id)
    stage.step(2)
    stage.engine.cancel(second.id)
    last = stage.add(stage.prompt(3), 2 * size)
    stage.finish()
    later = {page for rows in stage.rows()[before:] for row in rows for page in row.pages}
    stage.happened("pages of a cancelled request in another's hands", stage.held[first.id] & later)
    stage.happened("the last request ran to its end", len(last.output) == 2 * size)


def long(stage: Stage) -> None:
    """A long context, prefilled in many chunks and then decoded."""
    stage.add(stage.prompt(300), 4)
    stage.finish()
    stage.happened("a context of 300", max(row.start + row.count for row in flat(stage)) >= 300)


SCENARIOS = (
    Scenario("one_token", one_token),
    Scenario("decode", decode),
    Scenario("chunks", chunks, lambda page: {"scheduler.token_budget": 7, "max_model_len": max(48, 8 * page)}),
    Scenario("prefixes", prefixes),
    Scenario("cached", cached),
    Scenario("preemption", preemption, lambda page: {"cache.pages": 9}),
    Scenario(
        "mixed",
        mixed,
        lambda page: {"scheduler.max_rows": 6, "scheduler.token_budget": 19, "max_model_len": max(40, 8 * page)},
    ),
    Scenario("sampled", sampled, lambda page: {"scheduler.max_rows": 5, "max_logprobs": 3}),
    Scenario("cancelled", cancelled, lambda page: {"cache.prefix_caching": False, "cache.pages": 10}),
    Scenario("long", long, lambda page: {"scheduler.token_budget": 60, "max_model_len": 320, "cache.pages": 350}, 16),
)


def flat(stage: Stage) -> list[Any]:
    """The rows of all steps."""
    return [row for rows in stage.rows() for row in rows]


def _share(rows: list[Any]) -> bool:
    return len(rows) > 1 and bool(set(rows[0].pages) & set(rows[1].pages))


def _fills_for_another(rows: list[Any], size: int) -> bool:
    """Whether a row's context has pages that another row of the step writes."""
    filled = [set(row.pages[row.start // size :]) for row in rows]
    return any(row is not other and filled[i] & set(row.pages) for row in rows for i, other in enumerate(rows))


def checks(subject: Subject, size: Size) -> Iterator[Check]:
    """Every check of this file. Smoke: all in float32 (or what the subject prefers, where it has no float32), and each
    scenario on one model in bfloat16; models that need what a backend may lack in one scenario, or if full in all.
    """
    models = list(TINY)
    main = subject.main_dtype if subject.capabilities.dtypes else "float32"
    for name in models:
        for i, scenario in enumerate(SCENARIOS):
            turn = i % len(models) == models.index(name)
            for dtype in DTYPES:
                if size == "full" or dtype == main or (dtype == "bfloat16" and turn):
                    yield make_check(name, scenario, dtype)
    for name in FEATURED:
        for scenario in SCENARIOS:
            if size == "full" or scenario.play is chunks:
                yield make_check(name, scenario, main)


def make_check(name: str, scenario: Scenario, dtype: str) -> Check:
    """The check of a scenario on a tiny model in a dtype."""

    def run(subject: Subject, seed: int) -> Found:
        require_dtype(subject, dtype)
        page = smallest_page(subject, scenario.page)
        try:
            made = Stage(subject, tiny(subject, name, seed), dtype, seed, page, **scenario.settings(page))
        except Unsupported as error:
            if name in FEATURED:
                raise NotClaimed(str(error)) from error
            raise
        with made as stage:
            scenario.play(stage)
            return stage.judge()

    return Check(
        f"L4/{name}/{scenario.name}-{dtype}", run, rule_of(scenario.play), dtype=dtype, shape_class=scenario.name
    )
