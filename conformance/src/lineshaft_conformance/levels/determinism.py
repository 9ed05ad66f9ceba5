"""L5: what stays bit-identical, in five classes. What is claimed is checked; the least is that a run repeats itself.

Tokens are forced, so that a difference in one position cannot show as another sequence later on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from lineshaft.config import EngineConfig
from lineshaft.engine import Engine
from lineshaft.executors import Executor
from lineshaft.sampling.params import SamplingParams
from lineshaft.scheduler import Request
from lineshaft_conformance.checks import Check, Found, NotClaimed, fail, rule_of
from lineshaft_conformance.harness.rank import mesh_executor
from lineshaft_conformance.harness.stage import engine_config, smallest_page
from lineshaft_conformance.harness.tiny import EVEN, checkpoint
from lineshaft_conformance.harness.watched import WatchedExecutor
from lineshaft_conformance.subject import Subject
from lineshaft_contract.ops.spec import Size
from lineshaft_contract.sessions import HostArray

CLASSES = ("run", "batch", "chunk", "tp", "device")
TOKENS = 6
LENGTHS = (45, 3, 17, 30, 9, 1, 22, 12)

Logits = dict[tuple[int, int], HostArray]
"""f32 [V] by (which prompt, position)."""
MakeExecutor = Callable[[Subject, EngineConfig], Executor]
Pairs = Iterator[tuple[str, Logits, Logits]]
"""What was changed, and the logits without and with the change."""


class Bench:
    """Runs some of eight fixed prompts on engines of the subject, along fixed tokens."""

    def __init__(self, subject: Subject, dtype: str, seed: int) -> None:
        self.subject, self.dtype, self.seed = subject, dtype, seed
        rng = np.random.default_rng([seed, 5])
        vocab = EVEN["vocab_size"]
        self.prompts = [[int(token) for token in rng.integers(0, vocab, n)] for n in LENGTHS]
        self.tokens = [[int(token) for token in rng.integers(0, vocab, TOKENS)] for _ in LENGTHS]

    def run(self, which: Sequence[int], executor: MakeExecutor = WatchedExecutor, **settings: Any) -> Logits:
        """The logits of these prompts, all added at once to an engine of their own."""
        page = smallest_page(self.subject, 4)
        model = checkpoint(self.subject, "even model", EVEN, self.seed)
        limits = {"scheduler.max_rows": 8, "scheduler.token_budget": 160, "max_model_len": max(64, page)}
        config = engine_config(self.subject, model, self.dtype, page, **{**limits, "cache.pages": 160, **settings})
        with Engine(config, registry=self.subject.registry, executor=executor(self.subject, config)) as engine:
            return self._drive(engine, which)

    def _drive(self, engine: Engine, which: Sequence[int]) -> Logits:
        seen: Logits = {}
        order: dict[int, int] = {}

        def teacher(request: Request, logits: HostArray) -> int:
            prompt = order[request.id]
            seen[prompt, len(request.tokens)] = np.array(logits)
            return self.tokens[prompt][len(request.output)]

        engine.teacher = teacher
        params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
        for prompt in which:
            order[engine.add(self.prompts[prompt], params).id] = prompt
        while engine.has_work:
            engine.step()
        return seen


def run_pairs(bench: Bench) -> Pairs:
    """The same requests on an engine made anew give the same bits, also in another process where a rank has its own."""
    first = bench.run(range(8))
    for time in ("second", "third"):
        yield f"a {time} engine", first, bench.run(range(8))
    if not bench.subject.info.single_program:
        yield "an engine whose worker is another process", first, bench.run(range(8), mesh_executor)


def batch_pairs(bench: Bench) -> Pairs:
    """A request gives the same bits alone and beside any others, in any place among them."""
    alone: Logits = {}
    for prompt in range(8):
        alone |= bench.run([prompt])
    for others in ((0, 1), (1, 0), (5, 2, 3), tuple(range(8)), tuple(reversed(range(8)))):
        yield f"batched as {others}", alone, bench.run(others)


def chunk_pairs(bench: Bench) -> Pairs:
    """A prompt gives the same bits however it is cut into chunks."""
    few: dict[str, Any] = {"scheduler.max_rows": 2}
    whole = bench.run([0], **few)
    for budget in (32, 16, 10, 7):
        yield f"chunks of {budget}", whole, bench.run([0], **{**few, "scheduler.token_budget": budget})


def tp_pairs(bench: Bench) -> Pairs:
    """Two tensor-parallel ranks give the same bits as one."""
    yield "tp = 2", bench.run(range(8)), bench.run(range(8), mesh_executor, layout={"tp": 2})


PAIRS: dict[str, Callable[[Bench], Pairs]] = {
    "run": run_pairs, "batch": batch_pairs, "chunk": chunk_pairs, "tp": tp_pairs,
}  # fmt: skip

DEVICE = (
    "Capabilities.determinism.device: two devices cannot be compared in one run, so the claim cannot be certified; "
    "take it back"
)


def checks(subject: Subject, size: Size) -> Iterator[Check]:
    """One check a class."""
    for name in CLASSES:
        rule = rule_of(PAIRS[name]) if name in PAIRS else "Another device gives the same bits."
        yield Check(f"L5/determinism/{name}", partial(check, name), rule, shape_class=name, limit=600.0)


def check(name: str, subject: Subject, seed: int) -> Found:
    """One class in every dtype that the subject executes. Raises Failure where a claim does not hold, and where not
    even a run repeats itself; NotClaimed tells whether the class happened to hold."""
    claimed = getattr(subject.capabilities.determinism, name)
    if name == "device":
        if claimed:
            fail(DEVICE)
        raise NotClaimed("not claimed by Capabilities.determinism")
    if name == "run" and not claimed:
        fail("Capabilities.determinism.run is false; the least that level 5 asks is that a run repeats itself")
    if name == "tp" and not subject.capabilities.collectives:
        if claimed:
            fail("Capabilities.determinism.tp is true, and Capabilities.collectives false: nothing can run at tp = 2")
        raise NotClaimed("not claimed by Capabilities.determinism; the backend has no collectives")
    notes = []
    for dtype in subject.capabilities.dtypes[: None if claimed else 1]:
        for text, same in compare(name, Bench(subject, dtype, seed)):
            notes.append(text)
            if not same and claimed:
                fail(f"Capabilities.determinism.{name} is claimed, but {text}")
            if not same:
                raise NotClaimed(f"not claimed by Capabilities.determinism (it does not hold: {text})")
    if not claimed:
        raise NotClaimed(f"not claimed by Capabilities.determinism (in {dtype} it happened to hold)")
    return Found(notes=tuple(notes))


def compare(name: str, bench: Bench) -> Iterator[tuple[str, bool]]:
    """A line for each change that was tried, and whether no bit differs."""
    for what, before, after in PAIRS[name](bench):
        common = before.keys() & after.keys()
        other = [key for key in common if before[key].tobytes() != after[key].tobytes()]
        text = f"{bench.dtype}, {what}: {len(other)} of {len(common)} rows of logits differ"
        yield text, bool(common) and not other
