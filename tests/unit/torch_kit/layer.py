"""A small layer that slices, reshapes, writes keys and attends, and two steps for it."""

from __future__ import annotations

from typing import Any

import numpy as np

from lineshaft_contract.problems import AttendProblem, EmbedProblem, LinearProblem
from lineshaft_contract.steps import HostStep, StepShape, forward_inputs

WIDTH = 8
SHAPE = StepShape(tokens=4, rows=2, pages=(3,), logits=2, max_query=2)


def layer(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
    """A small layer that slices, reshapes, writes keys and attends through the gathered cache rows."""
    x = ops.embed(step.token_ids, weights["embed"], weights["start"])
    normed, total = ops.add_rms_norm(x, x, weights["norm"])
    both = ops.linear(normed, weights["qkv"])
    k, v = (both[:, i * WIDTH : (i + 1) * WIDTH].reshape(4, 2, 4) for i in (0, 1))
    cache = ops.write_kv(caches[0], k, v, step)
    q = both[:, 2 * WIDTH :].reshape(4, 2, 4)
    found = ops.attend(q, cache, step).reshape(4, WIDTH)
    return {"found": found, "sum": ops.add(total, found)}, [cache]


def layer_session(kit: Any, **options: Any) -> Any:
    rng = np.random.default_rng(7)
    session = kit.session(**options)
    table, qkv = rng.standard_normal((10, WIDTH)), rng.standard_normal((3 * WIDTH, WIDTH))
    params = {
        "embed": kit.param("embed", table), "qkv": kit.param("qkv", qkv), "norm": kit.param("norm", np.ones(WIDTH)),
        "start": kit.param("start", np.zeros(1, np.int32), kind="const", dtype="int32"),
    }  # fmt: skip
    session.load(params, None, {})
    session.alloc_caches([kit.kv()], [8], "slots")
    return session


def layer_ops(kit: Any) -> Any:
    attend = AttendProblem(
        dtype="float32", kv_dtype="float32", q_heads=2, kv_heads=2, qk_dim=4, v_dim=4, page_size=4, scale=0.5,
        tokens=4, rows=2, pages=3, max_query=2,
    )  # fmt: skip
    linear = LinearProblem(dtype="float32", n=3 * WIDTH, k=WIDTH)
    embed = EmbedProblem(dtype="float32", vocab=10, width=WIDTH)
    problems = {"embed": embed, "linear": linear, "add_rms_norm": kit.norm(), "write_kv": kit.kv(), "attend": attend}
    return kit.HandPlanned({**problems, **kit.pointwise("add")})


def layer_steps() -> list[HostStep]:
    """Two rows over two pages each: a chunk, then a decode step that reads what the first step wrote."""
    first, second = HostStep(forward_inputs(SHAPE)), HostStep(forward_inputs(SHAPE))
    for host, count, context in ((first, 2, 2), (second, 1, 3)):
        host["token_ids"][: 2 * count] = np.arange(1, 2 * count + 1)
        host["query_starts"][:] = [0, count, 2 * count]
        host["page_table.0"][:, :2] = [[3, 1], [5, 2]]
        host["context_lens.0"][:] = context
        at = np.arange(context - count, context)
        host["slots.0"][: 2 * count] = np.concatenate([3 * 4 + at, 5 * 4 + at])
    return [first, second]


def run_layer(session: Any, kit: Any) -> list[bytes]:
    program = session.capture(layer, SHAPE, forward_inputs(SHAPE), layer_ops(kit), {}, frozenset({"found", "sum"}))
    session.freeze()
    seen = []
    for host in layer_steps():
        pending = program(host)
        seen += [pending.result("found").tobytes(), pending.result("sum").tobytes()]
    return [*seen, session.read_pages(0, np.arange(1, 8))["k"].tobytes()]
