"""From logits to token ids: `apply_logits`, `sample`, `argmax`, `logprobs`.

Logits come in the problem's dtype and are widened on entry. A +inf is the largest of them to `argmax`, and at
temperature 0 to `sample`; where a token is drawn, or logarithms are taken, they hold none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lineshaft_contract.ops.cases import seeded, short
from lineshaft_contract.ops.checks import expect, refuse
from lineshaft_contract.ops.spec import EXACT, Call, Case, HostArray, Numerics, OpSpec, Size, Tolerance, numpy_dtype
from lineshaft_contract.problems import SampleProblem, itemsize
from lineshaft_contract.steps import ArraySpec

Params = Mapping[str, HostArray]
_KEYS = ("temperature", "top_k", "top_p", "min_p")
EDITS = ("edit_ids", "edit_scale", "edit_bias")
"""The arrays of sparse edits, which come together."""


def specs() -> tuple[OpSpec, ...]:
    return (_apply_spec(), _sample_spec(), _argmax_spec(), _logprobs_spec())


def _apply_spec() -> OpSpec:
    return OpSpec(
        name="apply_logits",
        signature=(
            "apply_logits(logits [R, V], *, mask uint32[R, ceil(V / 32)], edit_ids int32[R, K], edit_scale f32[R, K], "
            "edit_bias f32[R, K]) -> [R, V]"
        ),
        problem=SampleProblem,
        specialise=_specialise_apply,
        infer=lambda p, call: call.spec(0),
        reference=apply_logits,
        cases=_apply_cases,
        required=False,
        optional={"mask": "mask", **dict.fromkeys(EDITS, "edits")},
        flops=lambda p: p.rows * p.vocab,
        moved=lambda p: 2 * p.rows * p.vocab * itemsize(p.dtype),
    )


def _sample_spec() -> OpSpec:
    return OpSpec(
        name="sample",
        signature=(
            "sample(logits [R, V], {temperature, top_p, min_p: f32[R], top_k: int32[R], typical_p f32[R] where the "
            "problem is `typical`}, u f32[R, 1]) -> int32[R]; "
            "-1 for a row with a NaN or without a kept token"
        ),
        problem=SampleProblem,
        specialise=_specialise_sample,
        infer=lambda p, call: ArraySpec((p.rows,), "int32"),
        reference=sample,
        cases=_sample_cases,
        tolerance=Tolerance(exact=True),
        flops=lambda p: 20 * p.rows * p.vocab,
        moved=lambda p: p.rows * p.vocab * itemsize(p.dtype),
    )


def _argmax_spec() -> OpSpec:
    return OpSpec(
        name="argmax",
        signature="argmax(logits [R, V]) -> int32[R]; the lowest index wins a tie; -1: NaN, or nothing above -inf",
        problem=SampleProblem,
        specialise=lambda base, call: _over_logits("argmax", call),
        infer=lambda p, call: ArraySpec((p.rows,), "int32"),
        reference=argmax,
        cases=_argmax_cases,
        tolerance=Tolerance(exact=True),
        flops=lambda p: p.rows * p.vocab,
        moved=lambda p: p.rows * p.vocab * itemsize(p.dtype),
    )


def _logprobs_spec() -> OpSpec:
    return OpSpec(
        name="logprobs",
        signature="logprobs(logits [R, V], ids int32[R], k) -> (chosen f32[R], top_ids int32[R, k], top f32[R, k])",
        problem=SampleProblem,
        specialise=_specialise_logprobs,
        infer=_infer_logprobs,
        reference=logprobs,
        cases=_logprobs_cases,
        tolerance=Tolerance(depth=lambda p: p.vocab),
        flops=lambda p: 4 * p.rows * p.vocab,
        moved=lambda p: p.rows * p.vocab * itemsize(p.dtype),
    )


# ---- references ------------------------------------------------------------------------------------------------


def apply_logits(
    problem: SampleProblem,
    logits: HostArray,
    *,
    num: Numerics = EXACT,
    mask: HostArray | None = None,
    edit_ids: HostArray | None = None,
    edit_scale: HostArray | None = None,
    edit_bias: HostArray | None = None,
) -> HostArray:
    """Logits with sparse edits (x / scale where x > 0, else x * scale, then + bias), then -inf where the mask is clear.

    edit_ids     distinct in a row, but for V, which edits nothing and whose scale and bias are not read
    edit_scale   0 counts as 1; a repetition penalty (Keskar et al., 2019)
    edit_bias    -inf bans a token; neither NaN nor +inf
    mask         bit v % 32 of word v // 32 allows token v

    All that is rounded once. Zeros in all three edit arrays leave a row as it is, though they name token 0 repeatedly.
    """
    out = num.load(logits)
    if edit_ids is not None:
        assert edit_scale is not None and edit_bias is not None
        out = _edited(out, edit_ids, num.load(edit_scale), num.load(edit_bias))
    return num.save(out if mask is None else np.where(allowed_tokens(mask, problem.vocab), out, -np.inf))


def _edited(x: HostArray, ids: HostArray, scale: HostArray, bias: HostArray) -> HostArray:
    out, (rows, at) = x.copy(), np.nonzero(ids < x.shape[1])
    old, by = x[rows, ids[rows, at]], scale[rows, at]
    by = np.where(by == 0, 1, by)
    out[rows, ids[rows, at]] = np.where(old > 0, old / by, old * by) + bias[rows, at]
    return out


def allowed_tokens(mask: HostArray, vocab: int) -> HostArray:
    """mask uint32[R, ceil(V / 32)] -> bool[R, V]."""
    bits = (mask[:, :, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    out: HostArray = bits.reshape(len(mask), -1)[:, :vocab].astype(bool)
    return out


def sample(
    problem: SampleProblem, logits: HostArray, params: Params, u: HostArray, *, num: Numerics = EXACT
) -> HostArray:
    """One token per row.

    temperature 0   the largest logit, lowest id first; nothing else is read
    temperature     divides the logits
    top_k           keeps the k largest (0: all; of equal logits the lowest ids, so that exactly k are kept)
    top_p           keeps, in descending order (ties: lowest id first) and renormalised over what top_k kept, each token
                    before which less than top_p has been gathered (0, or 1 and above: all)
    min_p           keeps tokens of at least min_p times the largest probability (0: all)
    typical_p       keeps, in ascending order of |-log p - entropy| (ties: lowest id first) of the probabilities p
                    renormalised over what is left, each token before which less than typical_p has been gathered (0, or
                    1 and above: all; Meister et al., "Locally typical sampling", 2023)
    u in [0, 1)     takes the first kept token, in id order, whose cumulative share exceeds u

    A logit of -inf is never kept. Sums run in float32 or wider: implementations agree but for u on a border.
    """
    values = num.load(logits)
    rows = [_sample_row(values[r], {key: params[key][r] for key in params}, u[r, 0]) for r in range(len(values))]
    return np.array(rows, np.int32).reshape(len(values))


def _sample_row(x: HostArray, own: Mapping[str, Any], u: Any) -> int:
    if np.isnan(x).any() or not (x > -np.inf).any():
        return -1
    if own["temperature"] == 0:
        return int(np.argmax(x))
    filters = int(own["top_k"]), float(own["top_p"]), float(own["min_p"]), float(own.get("typical_p", 0))
    order, weights = kept_tokens(x / x.dtype.type(own["temperature"]), *filters)
    ids = np.argsort(order)
    gathered = np.cumsum(weights[ids])
    return int(order[ids][min(np.searchsorted(gathered, u * gathered[-1], side="right"), len(ids) - 1)])


def kept_tokens(
    x: HostArray, top_k: int, top_p: float, min_p: float, typical_p: float = 0.0
) -> tuple[HostArray, HostArray]:
    """(ids, weights) of what the filters keep of scaled logits x [V], in descending order; the largest weight is 1."""
    order = np.argsort(-x, kind="stable")
    order = order[: top_k if 0 < top_k < len(x) else len(x)]
    order = order[x[order] > -np.inf]
    weights = np.exp(x[order] - x[order[0]])
    if 0 < top_p < 1:
        before = np.cumsum(weights) - weights
        order = order[before < top_p * weights.sum()]
    if min_p > 0:
        order = order[weights[: len(order)] >= min_p]
    weights = weights[: len(order)]
    if 0 < typical_p < 1:
        near, before = typical_order(order, weights)
        kept = np.sort(near[before < typical_p])
        order, weights = order[kept], weights[kept]
    return order, weights


def typical_order(ids: HostArray, weights: HostArray) -> tuple[HostArray, HostArray]:
    """(indices into `ids` from the most typical token on, the share gathered before each) of weights [n] above 0."""
    shares = weights / weights.sum()
    surprise = -np.log(np.maximum(shares, np.finfo(shares.dtype).tiny))
    near = np.lexsort((ids, np.abs(surprise - (shares * surprise).sum())))
    return near, np.cumsum(shares[near]) - shares[near]


def argmax(problem: SampleProblem, logits: HostArray, *, num: Numerics = EXACT) -> HostArray:
    """int32[R]: the id of the largest logit; the lowest wins a tie; -1 for a row with a NaN or nothing above -inf."""
    x = num.load(logits)
    best = np.argmax(x, axis=-1)  # a NaN counts as the largest
    largest = np.take_along_axis(x, best[:, None], -1)[:, 0]
    out: HostArray = np.where(largest > -np.inf, best, -1).astype(np.int32)
    return out


def logprobs(
    problem: SampleProblem, logits: HostArray, ids: HostArray, k: int, *, num: Numerics = EXACT
) -> tuple[HostArray, HostArray, HostArray]:
    """Natural logarithms of the softmax of unfiltered logits: of `ids`, and of the k largest with their ids.

    Descending, ties to the lowest id. An id of -1, as `sample` returns it, is read as 0. Results are not rounded to the
    logits' dtype.
    """
    x = num.load(logits)
    peak = x.max(-1, keepdims=True)
    peak = np.where(peak == -np.inf, 0, peak)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = x - peak - np.log(np.exp(x - peak).sum(-1, keepdims=True))
    chosen = np.take_along_axis(logs, np.maximum(ids, 0)[:, None].astype(np.int64), axis=1)[:, 0]
    top = np.argsort(-x, axis=-1, kind="stable")[:, :k]
    return chosen, top.astype(np.int32), np.take_along_axis(logs, top, axis=1)


# ---- shapes ----------------------------------------------------------------------------------------------------


def _over_logits(op: str, call: Call) -> SampleProblem:
    logits = expect(op, "logits", call.args[0], (None, None))
    return SampleProblem(dtype=logits.dtype, rows=logits.shape[0], vocab=logits.shape[1])


def _specialise_apply(base: Any, call: Call) -> SampleProblem:
    p = _over_logits("apply_logits", call)
    mask, edits = (call.kwargs.get(name) is not None for name in ("mask", "edit_ids"))
    width = (
        expect("apply_logits", "edit_ids", call.kwargs["edit_ids"], (p.rows, None), "int32").shape[1] if edits else 0
    )
    if mask:
        expect("apply_logits", "mask", call.kwargs["mask"], (p.rows, -(-p.vocab // 32)), "uint32")
    for name in EDITS[1:]:
        given = call.kwargs.get(name)
        if edits:
            expect("apply_logits", name, given, (p.rows, width), "float32")
        elif given is not None:
            refuse("apply_logits", f"{name} without edit_ids", f"{', '.join(EDITS)}, or none of them")
    return SampleProblem(dtype=p.dtype, rows=p.rows, vocab=p.vocab, mask=mask, edits=width)


def _specialise_sample(base: Any, call: Call) -> SampleProblem:
    p, params = _over_logits("sample", call), call.args[1]
    typical = params.get("typical_p") is not None
    for name in (*_KEYS, *(("typical_p",) if typical else ())):
        expect("sample", name, params.get(name), (p.rows,), "int32" if name == "top_k" else "float32")
    expect("sample", "u", call.args[2], (p.rows, 1), "float32")
    return SampleProblem(dtype=p.dtype, rows=p.rows, vocab=p.vocab, typical=typical)


def _specialise_logprobs(base: Any, call: Call) -> SampleProblem:
    problem, k = _over_logits("logprobs", call), call.args[2]
    expect("logprobs", "ids", call.args[1], (problem.rows,), "int32")
    if type(k) is not int or not 0 <= k <= problem.vocab:
        refuse("logprobs", f"k = {k!r}", f"an int of 0 to {problem.vocab}")
    return SampleProblem(dtype=problem.dtype, rows=problem.rows, vocab=problem.vocab, top=k)


def _infer_logprobs(p: SampleProblem, call: Call) -> tuple[ArraySpec, ...]:
    top = (p.rows, p.top)
    return ArraySpec((p.rows,), "float32"), ArraySpec(top, "int32"), ArraySpec(top, "float32")


# ---- cases -----------------------------------------------------------------------------------------------------

_DTYPES = ("float32", "bfloat16")  # what logits come in; results are float32 at most, so float64 would check nothing


def _named(rng: np.random.Generator, names: Iterable[str]) -> Iterable[tuple[str, str, np.random.Generator]]:
    draw = seeded(rng)
    for dtype in _DTYPES:
        for name in names:
            case_id = f"{name}-{short(dtype)}"
            yield case_id, dtype, draw(case_id)


def _logits(rng: np.random.Generator, dtype: str, rows: int, vocab: int, spread: float = 3.0) -> HostArray:
    """float64 [R, V] that `dtype` holds exactly."""
    drawn = rng.standard_normal((rows, vocab)) * spread
    return drawn.astype(numpy_dtype(dtype)).astype(np.float64)


MANY_ROWS = 20
"""More rows than a block of a kernel is likely to have."""
_APPLIES = {
    "plain-v40": "",
    "mask-v40": "bit v % 32 of word v // 32; bits beyond the vocabulary mean nothing",
    "mask-v64": "bit v % 32 of word v // 32",
    "edits-v40": "scale, then bias, and one rounding; ids in any order",
    "edits_zero-v40": "zeros change nothing",
    "edits_padding-v40": "the scale and bias of id V are not read",
    "edits_wide-v40": "more edits than tokens: the rest is id V",
    "edits_ban-v40": "a bias of -inf bans a token",
    "edits_signed-v40": "a scale divides what is above 0 and multiplies what is below",
    "mask-edits-v70": "the mask gives -inf whatever the edits",
    "mask_none_allowed-v33": "a row without an allowed token is all -inf; bits beyond the vocabulary allow none",
    "edits-masked-v40": "no edit brings back a logit of -inf",
    "mask-extreme-v40": "logits up to half of what float32 holds pass unchanged",
    "edits-vocabulary-v70000": "an edit lies anywhere in a vocabulary, in any of many rows",
}


def _apply_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    for case_id, dtype, draw in _named(rng, _APPLIES):
        name, vocab = case_id.rsplit("-", 1)[0], int(case_id.split("-v")[-1].split("-")[0])
        rows, kwargs = MANY_ROWS if vocab == 70_000 else 3, {}
        if "mask-" in name or "none" in name:
            kwargs["mask"] = draw.integers(0, 2**32, (rows, -(-vocab // 32)), dtype=np.uint32)
        if "none" in name:
            kwargs["mask"][1], kwargs["mask"][1, -1] = 0, 0xFFFFFFFE  # 33 tokens: all but the first bit lie beyond them
        if "edits" in name:
            kwargs |= _edits(draw, name, rows, vocab)
        logits = _logits(draw, dtype, rows, vocab)
        _shape_logits(name.split("-")[1], logits)
        edits = kwargs["edit_ids"].shape[1] if "edits" in name else 0
        problem = SampleProblem(dtype=dtype, rows=rows, vocab=vocab, mask="mask" in kwargs, edits=edits)
        yield Case(case_id, problem, (logits,), kwargs, _APPLIES[name])


def _edits(rng: np.random.Generator, name: str, rows: int, vocab: int) -> dict[str, HostArray]:
    """Edits of 12 tokens a row, the last of the vocabulary among them, and four paddings."""
    width = 64 if "wide" in name else 16
    if "zero" in name:
        return dict(
            zip(EDITS, (np.zeros((rows, width), kind) for kind in (np.int32, np.float32, np.float32)), strict=True)
        )
    ids = np.full((rows, width), vocab, np.int32)
    ids[:, 1:13] = np.stack([rng.permutation(vocab - 1)[:12] for _ in range(rows)])
    ids[:, 5] = vocab - 1
    scale = rng.uniform(0.5, 2.0, (rows, width)).astype(np.float32)
    bias = (np.zeros if "signed" in name else rng.standard_normal)((rows, width)).astype(np.float32)
    scale[:, 2] = 0  # counts as 1
    if "ban" in name:
        bias[:, 3:6] = -np.inf
    if "padding" in name:
        scale[ids == vocab], bias[ids == vocab] = np.nan, np.nan
    return dict(zip(EDITS, (ids, scale, bias), strict=True))


_FILTERS: dict[str, tuple[dict[str, Any], str]] = {
    "all_zero": ({"temperature": 0.0}, "all-zero parameters are legal and greedy"),
    "greedy_ties": ({"temperature": 0.0}, "the lowest id wins a tie"),
    "greedy_close": ({"temperature": 0.0}, "float32 logits are not rounded"),
    "greedy_infinite": ({"temperature": 0.0}, "+inf is a largest logit; the lowest id of several"),
    "greedy_extreme": ({"temperature": 0.0}, "logits up to half of what float32 holds"),
    "plain": ({}, "the inverse CDF runs in id order"),
    "extreme": ({}, "logits up to half of what float32 holds"),
    "hot": ({"temperature": 2.0}, "the temperature divides"),
    "top_k5": ({"top_k": 5}, ""),
    "top_k1": ({"top_k": 1}, ""),
    "top_k_ties": ({"top_k": 3}, "exactly k are kept, of equal logits the lowest ids"),
    "top_k_beyond_vocab": ({"top_k": 10_000}, ""),
    "top_p": ({"top_p": 0.7}, ""),
    "top_p_tiny": ({"top_p": 1e-6}, "the largest is always kept"),
    "top_p1": ({"top_p": 1.0}, "1 and above keep all"),
    "min_p": ({"min_p": 0.1}, "relative to the largest"),
    "filter_order": ({"top_k": 4, "top_p": 0.6}, "top_p counts what top_k kept, renormalised"),
    "min_p_ladder": ({"min_p": 0.1}, "relative to the largest"),
    "top_p_ladder": ({"top_p": 0.8}, "tokens before which less than top_p has been gathered"),
    "top_k_ladder": ({"top_k": 6}, ""),
    "hot_ladder": ({"temperature": 3.0}, "the temperature divides"),
    "all_filters": ({"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.05}, ""),
    "typical": ({"typical_p": 0.6}, "the most typical tokens, which need not be the likeliest"),
    "typical_ladder": ({"typical_p": 0.4}, "nearest to the entropy first"),
    "typical_tiny": ({"typical_p": 1e-6}, "the most typical token is always kept"),
    "typical_filters": (
        {"temperature": 0.9, "top_k": 14, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.7},
        "typical_p counts what the other filters kept, renormalised",
    ),
    "typical_masked": ({"typical_p": 0.6}, "a logit of -inf is never kept"),
    "typical_mixed_rows": ({"typical_p": 0.5}, "each row has a typical_p of its own; 0 and 1 keep all"),
    "mixed_rows": ({}, "each row has parameters and a u of its own"),
    "masked": ({}, "a logit of -inf is never kept"),
    "nan_and_empty_rows": ({}, "-1 for a row with a NaN or no kept token, and for it alone"),
    "all_masked": ({"temperature": 0.0}, "-1 for a row whose tokens are all masked"),
    "u0": ({}, "u = 0 takes the first kept token"),
    "u0_masked_head": ({}, "u = 0 takes the first kept token, not token 0"),
    "u1": ({}, "the largest u below 1 takes the last kept token"),
    "u1_masked_tail": ({}, "the largest u below 1 takes the last kept token, not the last one"),
}


def _sample_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    vocabs = (37,) if size == "smoke" else (37, 300)
    names = [f"{name}-v{vocab}" for vocab in vocabs for name in _FILTERS]
    for case_id, dtype, draw in _named(rng, [*names, "plain-v70000"]):
        name, vocab = case_id.split("-")[0], int(case_id.split("-v")[1].split("-")[0])
        rows = 6 if vocab < 70_000 else MANY_ROWS
        logits = _logits(draw, dtype, rows, vocab)
        _shape_logits(name, logits)
        params = _params(name, rows)
        u = np.array([[_u(draw, name, params, logits, r)] for r in range(rows)], np.float32)
        problem = SampleProblem(dtype=dtype, rows=rows, vocab=vocab, typical="typical_p" in params)
        yield Case(case_id, problem, (logits, params, u), why=_FILTERS[name][1])


def _u(rng: np.random.Generator, name: str, params: Params, logits: HostArray, row: int) -> float:
    if name.startswith("u0"):
        return 0.0
    if name.startswith("u1"):
        return float(np.nextafter(np.float32(1), np.float32(0)))
    if name.endswith("ladder"):
        return (0.05, 0.3, 0.6, 0.8, 0.95, 0.98)[row]
    return 0.9 if name == "filter_order" else _clear_u(rng, params, logits, row)


def _shape_logits(name: str, logits: HostArray) -> None:
    if name.endswith("ties"):
        logits[:, 4] = logits[:, 9] = logits[:, 20] = logits[:, 30] = logits.max(-1)
    if name.endswith("masked"):
        logits[:, :: 1 if name.startswith("all") else 2] = -np.inf
    if name.endswith("close"):
        logits[:, 5], logits[:, 9], logits[:, 11] = 16.0, 16.0 + 2.0**-18, 16.0 + 2.0**-19  # one value in bfloat16
    if name.endswith("signed_zero"):
        logits[:] = np.where(logits > 0, -0.0, -1.0)
        logits[:, 20] = 0.0
    if name.endswith("extreme"):
        logits[0::3] *= 1e4
        logits[1::3] = np.where(logits[1::3] > 1, 2.0**126, -(2.0**126))
        logits[1::3, 7] = 2.0**127
        logits[2::3, 1:4] = -np.inf
    if name.endswith("infinite"):
        logits[::2, [9, 20]], logits[1, 11] = np.inf, np.inf
        logits[1, 4] = np.nan
    if name == "filter_order" or name.endswith("ladder"):
        logits[:] = -np.arange(logits.shape[1]) / (64 if name == "filter_order" else 8)
    if name.startswith("u1"):
        logits[:] = 0.0
        logits[:, logits.shape[1] - 5 * name.endswith("tail") :] = -np.inf
    if name == "u0_masked_head":
        logits[:, :6] = -np.inf
    if name == "nan_and_empty_rows":
        logits[1, 7], logits[3] = np.nan, -np.inf


def _params(name: str, rows: int) -> dict[str, HostArray]:
    given = {"temperature": 1.0, "top_k": 0, "top_p": 0.0, "min_p": 0.0, **_FILTERS[name][0]}
    params = {key: np.full(rows, value, np.int32 if key == "top_k" else np.float32) for key, value in given.items()}
    if name == "typical_mixed_rows":
        params["typical_p"][1:3] = 0.0, 1.0
    if name == "mixed_rows":
        params["temperature"][::2] = 0.0
        params["top_k"][1], params["top_p"][3] = 4, 0.5
    return params


def _clear_u(rng: np.random.Generator, params: Params, logits: HostArray, row: int) -> float:
    """A u amid the share of a likely token, far from every border; nudges top_p and min_p off theirs."""
    x = logits[row]
    if np.isnan(x).any() or not (x > -np.inf).any() or params["temperature"][row] == 0:
        return 0.0
    scaled = x / np.float64(params["temperature"][row])
    _clear_filters(params, scaled, row)
    filters = (params[key][row].item() for key in ("top_k", "top_p", "min_p", "typical_p") if key in params)
    order, weights = kept_tokens(scaled, *filters)
    shares = (weights / weights.sum())[np.argsort(order)]
    likely = np.flatnonzero(shares >= 0.25 * shares.max())
    pick = int(rng.choice(likely))
    return float(shares[:pick].sum() + shares[pick] / 2)


def _clear_filters(params: Params, scaled: HostArray, row: int) -> None:
    """Move top_p, min_p and typical_p to the middle of the gap they fall into, so that rounding decides nothing."""
    _, weights = kept_tokens(scaled, int(params["top_k"][row]), 0.0, 0.0)
    top_p, min_p = params["top_p"][row], params["min_p"][row]
    if 1e-3 < top_p < 1:
        gathered = np.concatenate([[0.0], np.cumsum(weights) / weights.sum()])
        at = int(np.searchsorted(gathered, top_p))
        params["top_p"][row] = (gathered[at - 1] + gathered[at]) / 2
    if min_p:
        at = int(np.sum(weights >= min_p))
        params["min_p"][row] = (weights[at - 1] + (weights[at] if at < len(weights) else 0.0)) / 2
    if 1e-3 < params.get("typical_p", np.zeros(row + 1))[row] < 1:
        others = (params[key][row].item() for key in ("top_k", "top_p", "min_p"))
        _, before = typical_order(*kept_tokens(scaled, *others))
        at = int(np.searchsorted(before, params["typical_p"][row]))
        params["typical_p"][row] = (before[at - 1] + (before[at] if at < len(before) else 1.0)) / 2


_ARGMAXES = {
    "v37": "", "v1": "", "ties-v37": "the lowest index wins",
    "signed_zero-v37": "-0 and 0 are equal: the lowest index wins", "close-v37": "float32 logits are not rounded",
    "all_negative-v50": "padding of a vocabulary does not win, as 0 would",
    "extreme-v37": "logits up to half of what float32 holds",
    "infinite-v37": "+inf is a largest logit, and no NaN",
    "masked-v37": "", "all_masked-v37": "-1 for a row with nothing above -inf", "nan-v37": "-1 for a row with a NaN",
    "vocabulary-v70000": "the largest lies anywhere in a vocabulary, in any of many rows",
    "large-v5000": "", "ties-v5000": "the lowest index wins across blocks of the vocabulary",
}  # fmt: skip


def _argmax_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    for case_id, dtype, draw in _named(rng, [n for n in _ARGMAXES if size == "full" or "v5000" not in n]):
        vocab = int(case_id.split("v")[-1].split("-")[0])
        rows = MANY_ROWS if case_id.startswith("vocabulary") else 4
        logits = _logits(draw, dtype, rows, vocab)
        _shape_logits(case_id.split("-")[0], logits)
        if case_id.startswith("vocabulary"):
            logits[np.arange(rows), vocab - 1 - 12_000 * (np.arange(rows) % 6)] = 64.0
        if case_id.startswith("ties"):
            logits[:, [vocab // 2, vocab - 1]] = logits.max()
        if case_id.startswith("all_negative"):
            logits = -np.abs(logits) - 1
        if case_id.startswith("nan"):
            logits[1, 3], logits[2] = np.nan, -np.inf
        problem = SampleProblem(dtype=dtype, rows=rows, vocab=vocab)
        yield Case(case_id, problem, (logits,), why=_ARGMAXES[case_id.rpartition("-")[0]])


_LOGPROBS = {
    "v37-k5": "natural logarithms, not rounded to the logits' dtype", "v37-k0": "", "v6-k6": "",
    "ties-v37-k6": "descending, ties to the lowest id", "masked-v37-k4": "a masked token has -inf",
    "large_logits-v37-k4": "the peak is subtracted before exp", "unsampled-v37-k0": "an id of -1 is read as 0",
    "large-v5000-k20": "",
}  # fmt: skip


def _logprobs_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    for case_id, dtype, draw in _named(rng, [n for n in _LOGPROBS if size == "full" or "v5000" not in n]):
        vocab, k = (int(part[1:]) for part in case_id.split("-")[-3:-1])
        logits = _logits(draw, dtype, 3, vocab, spread=1e4 if case_id.startswith("large_logits") else 3.0)
        _shape_logits(case_id.split("-")[0], logits)
        ids = (draw.integers(0, vocab // 2, 3) * 2 + 1).clip(max=vocab - 1).astype(np.int32)
        if case_id.startswith("unsampled"):
            logits[1, 3], ids[1] = np.nan, -1
        problem = SampleProblem(dtype=dtype, rows=3, vocab=vocab, top=k)
        yield Case(case_id, problem, (logits, ids, k), why=_LOGPROBS[case_id.rpartition("-")[0]])
