"""Backends that are right op by op and wrong under an engine, or wrong in what they say of determinism and speed.

Most break the packed inputs of whole forward programs alone, so that no program of a single op shows it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lineshaft_conformance.mutants.mutant import Make, Mutant, with_call, with_capabilities, with_program
from lineshaft_contract.backends import DeterminismClaims
from lineshaft_contract.steps import HostStep

Change = Callable[[Any, HostStep, dict[str, Any]], None]
"""Changes the inputs of a step: (session, a copy of the step, what the program remembers)."""


def is_forward(inputs: Any) -> bool:
    """Whether a program takes what a whole forward takes and nothing else."""
    names = {item.name.partition(".")[0] for item in inputs.fields}
    steps = {"token_ids", "positions", "query_starts", "logit_rows", "slots", "page_table", "context_lens"}
    return "token_ids" in names and names <= steps


def is_sampling(inputs: Any) -> bool:
    return any(item.name == "u" for item in inputs.fields)


def with_step(change: Change, which: Callable[[Any], bool] = is_forward) -> Make:
    """Makes a mutant whose whole forwards (or what `which` says of their inputs) run on changed inputs."""

    def make_call(session: Any) -> Callable[..., Any]:
        kept: dict[str, Any] = {}

        def call(program: Any, host: HostStep, arrays: Any, after: Any) -> Any:
            changed = HostStep(host.layout)
            changed.buffer[:] = host.buffer[: len(changed.buffer)]
            change(session, changed, kept)
            return program(changed, arrays, after)

        return call

    return with_program(make_call, which)


def counts(host: HostStep) -> Any:
    return np.diff(host["query_starts"])


# ---- level 4 -----------------------------------------------------------------------------------------------------


def short_context(session: Any, host: HostStep, kept: dict[str, Any]) -> None:
    np.minimum(host["context_lens.0"], 48, out=host["context_lens.0"])


def later_rows(session: Any, host: HostStep, kept: dict[str, Any]) -> None:
    host["positions"][host["query_starts"][min(2, len(host["query_starts"]) - 1)] :] += 1


def stale_table(session: Any, host: HostStep, kept: dict[str, Any]) -> None:
    """A row's pages are taken anew only when its context does not go on by one."""
    table, lens = host["page_table.0"], host["context_lens.0"]
    if "lens" in kept:
        goes_on = (lens == kept["lens"] + 1) & (lens > 0)
        table[goes_on] = kept["table"][goes_on]
    kept["table"], kept["lens"] = table.copy(), lens.copy()


def chunk_in_mid_page(session: Any, host: HostStep, kept: dict[str, Any]) -> None:
    size = session.caches[0].problem.page_size
    for row, count in enumerate(counts(host)):
        start = host["context_lens.0"][row] - count
        if count > 1 and start % size:
            host["slots.0"][host["query_starts"][row]] -= 1


def mixed_rows(session: Any, host: HostStep, kept: dict[str, Any]) -> None:
    lengths = [int(count) for count in counts(host) if count]
    if 1 in lengths and max(lengths) > 1:
        rows = host["logit_rows"]
        rows[:] = np.where(rows > 0, rows - 1, rows)


def prefix_from_zero(session: Any, host: HostStep, kept: dict[str, Any]) -> None:
    """Positions of a prefill count from its own first token: right but for prefixes and later chunks."""
    for row, count in enumerate(counts(host)):
        first = host["query_starts"][row]
        if count > 1:
            host["positions"][first : first + count] = np.arange(count)


def pages_of_this_step(session: Any, host: HostStep, kept: dict[str, Any]) -> None:
    """A row sees of its prefix what earlier steps wrote, and not what another row of this one does."""
    table, slots = host["page_table.0"], host["slots.0"]
    bounds, size = host["query_starts"], session.caches[0].problem.page_size
    for row in range(len(table)):
        others = [*slots[: bounds[row]], *slots[bounds[row + 1] : bounds[-1]]]
        table[row][np.isin(table[row], np.array(others, np.int32) // size)] = 0


def one_draw(session: Any, host: HostStep, kept: dict[str, Any]) -> None:
    host["u"][:] = host["u"][0]


def wears_out(session: Any, host: HostStep, kept: dict[str, Any]) -> None:
    """The sixth and later steps of a program take the tokens of the fifth."""
    kept["steps"] = kept.get("steps", 0) + 1
    if kept["steps"] == 5:
        kept["tokens"] = host["token_ids"].copy()
    if kept["steps"] > 5:
        host["token_ids"][:] = kept["tokens"]


def keeps_cancelled(session: Any, host: HostStep, kept: dict[str, Any]) -> None:
    """Padding rows keep the query of the row that was there before, which goes on writing to its page."""
    slots, live = host["slots.0"], int(host["query_starts"][-1])
    if "slots" in kept and live < len(slots):
        slots[live:] = kept["slots"][live:]
    kept["slots"] = slots.copy()


class Likely:
    """A pending step whose greedy token is the second likeliest where two are near."""

    def __init__(self, pending: Any) -> None:
        self._pending, self.kernel_seconds, self.handle = pending, pending.kernel_seconds, pending.handle

    def result(self, name: str) -> Any:
        found = self._pending.result(name)
        if name != "token_ids":
            return found
        logits = self._pending.result("logits").astype(np.float32)
        order = np.argsort(-logits, -1)[:, :2]
        first, second = np.take_along_axis(logits, order, -1).T
        return np.where(first - second < 0.5, order[:, 1], found).astype(np.int32)


def with_forward(call: Callable[..., Any]) -> Make:
    """Makes a mutant whose whole forwards are called as `call(program, host, arrays, after)`."""
    return with_program(lambda session: call, is_forward)


def near_tokens(program: Any, *args: Any) -> Any:
    return Likely(program(*args))


# ---- level 5 -----------------------------------------------------------------------------------------------------


def by_process(problem: Any, run: Any, *args: Any) -> Any:
    """Off by less than a rounding of float32, so that float64 alone shows it."""
    return run(*args) * (1 + 2.0**-40 * os.getpid())


def noisy(problem: Any, run: Any, *args: Any, **kwargs: Any) -> Any:
    """A rounding more in one value of 64, in others each time: within every tolerance."""
    out = run(*args, **kwargs)
    return torch.where(torch.rand(out.shape) < 1 / 64, out * (1 + torch.finfo(out.dtype).eps), out)


def ten_times(run: Any, *args: Any, **kwargs: Any) -> Any:
    return [run(*args, **kwargs) for _ in range(10)][-1]


def slow_kernel(problem: Any, run: Any, *args: Any, **kwargs: Any) -> Any:
    return ten_times(run, *args, **kwargs)


def quadratic(problem: Any, run: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """So too where a product of few rows takes as long as one of many, as with matrix units."""
    return [run(x, *args, **kwargs) for _ in range(max(1, (len(x) // 32) ** 2))][-1]


def whole_table(problem: Any, run: Any, q: Any, cache: Any, step: Any, **kwargs: Any) -> Any:
    """Gathers the keys of every column first, those past the context too."""
    pages = step.groups[problem.group].page_table.long().reshape(-1, 1) * problem.page_size
    cache.arrays["k"].view(torch.uint8)[(pages + torch.arange(problem.page_size)).reshape(-1)].clone()
    return run(q, cache, step, **kwargs)


def whole_vocabulary(problem: Any, run: Any, ids: Any, table: Any, *args: Any, **kwargs: Any) -> Any:
    for array in table.arrays.values():
        array.clone()
    return run(ids, table, *args, **kwargs)


def claims(**classes: bool) -> Make:
    return with_capabilities(determinism=DeterminismClaims(**{"run": True, **classes}))


MUTANTS = (
    Mutant("engine-short-context", "a key is seen however long the context is", 4, "L4/*/long-*",
           with_step(short_context)),
    Mutant("engine-later-rows", "a row's result does not depend on its place in the batch", 4, "L4/*/mixed-*",
           with_step(later_rows)),
    Mutant("engine-stale-table", "a page table is read anew each step", 4, "L4/*/decode-*", with_step(stale_table)),
    Mutant("engine-chunk-in-mid-page", "a chunk may begin in mid-page", 4, "L4/*/chunks-*",
           with_step(chunk_in_mid_page)),
    Mutant("engine-mixed-rows", "logit_rows name tokens, also where decode and prefill mix", 4, "L4/*/mixed-*",
           with_step(mixed_rows)),
    Mutant("engine-prefix-positions", "positions are given, and do not begin at the step's first token", 4,
           "L4/*/prefixes-*", with_step(prefix_from_zero)),
    Mutant("engine-pages-of-this-step", "a row sees what all rows of its step wrote", 4, "L4/*/prefixes-*",
           with_step(pages_of_this_step)),
    Mutant("engine-one-draw", "each row has a random number of its own", 4, "L4/*/sampled-*",
           with_step(one_draw, is_sampling)),
    Mutant("engine-wears-out", "the n-th replay reads its inputs as the first did", 4, "L4/*/decode-*",
           with_step(wears_out)),
    Mutant("engine-keeps-cancelled", "padding tokens write to the null page alone", 4, "L4/*/cancelled-*",
           with_step(keeps_cancelled)),
    Mutant("engine-near-tokens", "a greedy token is the argmax of the same step's logits", 4, "L4/*/mixed-*",
           with_forward(near_tokens)),
    Mutant("determinism-noise", "what claims run determinism repeats itself", 5, "L5/determinism/run",
           with_call("linear", noisy)),
    Mutant("determinism-by-process", "a run repeats itself in another process", 5, "L5/determinism/run",
           with_call("linear", by_process), anywhere=True),
    Mutant("determinism-none", "a backend's runs repeat themselves", 5, "L5/determinism/run", claims(run=False)),
    Mutant("determinism-boasts-batch", "claims are true: batch", 5, "L5/determinism/batch", claims(batch=True)),
    Mutant("determinism-boasts-chunk", "claims are true: chunk", 5, "L5/determinism/chunk", claims(chunk=True)),
    Mutant("determinism-boasts-tp", "claims are true: tp", 5, "L5/determinism/tp", claims(tp=True)),
    Mutant("determinism-boasts-device", "what cannot be checked is not certified", 5, "L5/determinism/device",
           claims(device=True)),
    Mutant("speed-slow-step", "a decode step comes near its roofline: this one is ten times slower", 5,
           "L5/speed/roofline/decode", with_forward(ten_times)),
    Mutant("speed-slow-attend", "attend comes near its roofline: this one is ten times slower", 5,
           "L5/speed/roofline/attend", with_call("attend", slow_kernel)),
    Mutant("speed-quadratic", "a product's time grows with its rows, not with their square", 5,
           "L5/speed/growth/linear", with_call("linear", quadratic)),
    Mutant("speed-whole-table", "a step costs no more where the page table has room for more", 5,
           "L5/speed/unused/columns", with_call("attend", whole_table)),
    Mutant("speed-whole-vocabulary", "looking up tokens does not cost the whole table", 5,
           "L5/speed/unused/vocabulary", with_call("embed", whole_vocabulary)),
)  # fmt: skip
