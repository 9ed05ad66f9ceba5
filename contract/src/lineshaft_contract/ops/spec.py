"""What an op is: its arguments, its problem, its float64 reference, its cases and its tolerance, in one `OpSpec`.

Dispatch, documentation, conformance and `lineshaft explain` all read the same OpSpec; nothing about an op is written
twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import ml_dtypes
import numpy as np

from lineshaft_contract.problems import Problem
from lineshaft_contract.steps import ArraySpec, StepShape

HostArray = np.ndarray[Any, Any]
Size = Literal["smoke", "full"]
Inferred = ArraySpec | Literal["cache"]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a contract dtype name; bfloat16 and the fp8 flavours come from ml_dtypes.

    Raises TypeError for a name that neither library knows.
    """
    extended = getattr(ml_dtypes, name, None)
    return np.dtype(name if extended is None else extended)


@dataclass(frozen=True)
class Numerics:
    """In which dtype a reference computes and stores: float64 throughout, or as an executed dtype would.

    `load` widens an operand to the accumulation dtype, `save` rounds a result to the stored dtype. The *reference
    run* of conformance is the reference under `Numerics.of(problem.dtype, spec.accumulate)`.
    """

    compute: str = "float64"
    store: str = "float64"

    @classmethod
    def of(cls, dtype: str, accumulate: str) -> Numerics:
        """Compute in `accumulate`, or in `dtype` where that is wider; store in `dtype`."""
        return cls("float64" if dtype == "float64" else accumulate, dtype)

    def load(self, x: HostArray) -> HostArray:
        return np.asarray(x).astype(numpy_dtype(self.compute), copy=False)

    def save(self, x: HostArray) -> HostArray:
        return x.astype(numpy_dtype(self.store), copy=False)


EXACT = Numerics()


@dataclass(frozen=True)
class Tolerance:
    """error <= c * max(error of the reference run, eps(executed dtype) * sqrt(K) * scale), c = 3 (L2) and 5 (Linf).

    Errors are against the float64 reference. K, the length of the reduction, comes from `depth(problem)`; scale is the
    RMS (L2) or the largest magnitude (Linf) of the float64 result. The executed dtype is that of the reference run's
    output: the problem's, or the accumulation dtype where the op does not round (lse, router weights, logprobs), or the
    pages' where a cache is written. Floats of eight bits may be off by one code, and beyond that as the problem's dtype
    may: c times their own eps would allow anything. `exact` ops (indices, copies) allow no difference.
    """

    depth: Callable[[Any], int] = lambda problem: 1
    exact: bool = False
    l2: float = 3.0
    linf: float = 5.0

    def check(self, problem: Problem, got: HostArray, exact: HostArray, reference_run: HostArray) -> str | None:
        """None if `got` is within tolerance, else one sentence that says by how much it is not."""
        if got.shape != exact.shape:
            return f"shape {got.shape} instead of {exact.shape}"
        if self.exact or exact.dtype.kind in "iub":
            wrong = int(np.sum((got != exact) & ((got == got) | (exact == exact))))
            return f"{wrong} of {exact.size} values differ" if wrong else None
        return self._within(problem, got.astype(np.float64), exact.astype(np.float64), reference_run)

    def _within(self, problem: Problem, got: HostArray, exact: HostArray, run: HostArray) -> str | None:
        keep = np.isfinite(exact)
        unlike = (got != exact) & ~(np.isnan(got) & np.isnan(exact)) & ~(np.isfinite(got) & keep)
        if unlike.any():
            return (
                f"{int(unlike.sum())} values like {got[unlike].flat[0]} where the reference is {exact[unlike].flat[0]}"
            )
        for name, error, allowed in self.measure(problem, got[keep], exact[keep], run[keep]):
            if error > allowed:
                c = self.l2 if name == "L2" else self.linf
                return f"{name} error {error:.3g} exceeds {allowed:.3g} (= {c:g} x the reference run's)"
        return None

    def measure(
        self, problem: Problem, got: HostArray, exact: HostArray, run: HostArray
    ) -> list[tuple[Literal["L2", "Linf"], float, float]]:
        """(norm, error, allowed error) of arrays without NaN or infinities; nothing for empty ones. `exact` is float64,
        and so may be `run` for a result that is rounded to the problem's dtype."""
        if not exact.size:
            return []
        executed = problem.dtype if run.dtype == np.float64 or run.dtype.itemsize == 1 else run.dtype.name
        unit = epsilon(executed) * max(self.depth(problem), 1) ** 0.5
        code = one_code(exact, run.dtype) if run.dtype.itemsize == 1 else 0.0
        off, seen = (np.maximum(np.abs(x.astype(np.float64) - exact) - code, 0.0) for x in (got, run))
        return [
            ("L2", _rms(off), self.l2 * max(_rms(seen), unit * _rms(exact))),
            ("Linf", _largest(off), self.linf * max(_largest(seen), unit * _largest(exact))),
        ]


def epsilon(dtype: str) -> float:
    """The distance from 1 to the next larger value of a float dtype."""
    return float(ml_dtypes.finfo(numpy_dtype(dtype)).eps)  # type: ignore[no-untyped-call]


def one_code(x: HostArray, dtype: np.dtype[Any]) -> HostArray:
    """How far apart the values of a float dtype are around x, at most."""
    info = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    return np.abs(x) * float(info.eps) + float(info.smallest_subnormal)


def _rms(x: HostArray) -> float:
    return float(np.sqrt(np.mean(x * x)))


def _largest(x: HostArray) -> float:
    return float(np.max(np.abs(x)))


@dataclass(frozen=True)
class WeightArg:
    """A weight argument of a case: the logical float64 array in checkpoint order; `kind` as in Param.problems."""

    array: HostArray
    kind: str


@dataclass(frozen=True)
class CacheArg:
    """A cache argument of a case in canonical form: {"k": [N, page, Hkv, D], "v": [N, page, Hkv, Dv]}."""

    pages: Mapping[str, HostArray]


@dataclass(frozen=True)
class StepArg:
    """A step argument of a case: named int32 arrays as `forward_inputs(shape)` lists them."""

    arrays: Mapping[str, HostArray]
    shape: StepShape


@dataclass(frozen=True)
class Case:
    """One seeded example: `args` in the op's order, arrays never in the executed dtype.

    float64 arrays are operands, to be rounded to the executed dtype; float32 and integer arrays have that dtype in the
    op's signature and are passed as they are.
    """

    id: str  # stable, e.g. "decode/gqa4-page16-bf16-garbage_tail"
    problem: Problem
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""  # the rule or the public bug (a link) that it exists for, where its id does not say it all


@dataclass(frozen=True)
class Call:
    """One call of an op as the planner sees it: abstract arrays (with `.spec`), weights, caches, step, statics."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    degrees: Mapping[str, int]

    def spec(self, index: int) -> ArraySpec:
        found = self.args[index].spec
        assert isinstance(found, ArraySpec)
        return found


@dataclass(frozen=True)
class OpSpec:
    """One op of the contract.

    name        as called in a forward: `ops.<name>(...)`
    signature   one line for documentation, with shapes
    problem     the descriptor's class
    specialise  (base problem or None, Call) -> Problem: completes what the model declared with the call's shapes
    infer       (problem, Call) -> what comes out: an ArraySpec, "cache" for the consumed one, or a tuple of them
    reference   (problem, *args, num, **optional) -> outputs, NumPy; weights come as arrays, caches as dicts of arrays
                (a consumed cache is copied, changed and returned), steps as StepArg, collectives as a list with one
                array per member (and return such a list)
    cases       (rng, size) -> cases: seeded, with stable ids; a case's problem does not depend on the seed
    fuzz        (rng, n) -> case "fuzz/<n>-<dtype>": a random problem, made of n alone, with values from rng; or None
    copied      names of outputs, as in `named_outputs`, that allow no difference though others do
    weight      the kind under which the op uses its Weight argument ("" if it has none)
    consumes    names of the cache arguments that the op consumes and returns
    optional    keyword-only array -> the problem's feature field that is set exactly when it is passed
    default     decomposition of a composite into other ops: (ops, problem, *args, **optional) -> outputs, or None
    parts       op of that decomposition -> its base problem, for those that want one declared: (problem) -> mapping
    flops/moved work and bytes of one call, for rooflines: (problem) -> int
    """

    name: str
    signature: str
    problem: type[Problem]
    specialise: Callable[[Any, Call], Problem]
    infer: Callable[[Any, Call], Inferred | tuple[Inferred, ...]]
    reference: Callable[..., Any]
    cases: Callable[[np.random.Generator, Size], Iterable[Case]]
    tolerance: Tolerance = Tolerance()
    copied: frozenset[str] = frozenset()
    accumulate: str = "float32"
    required: bool = True
    weight: str = ""
    collective: bool = False
    consumes: tuple[str, ...] = ()
    optional: Mapping[str, str] = field(default_factory=dict)
    default: Callable[..., Any] | None = None
    parts: Callable[[Any], Mapping[str, Problem]] = lambda problem: {}
    fuzz: Callable[[np.random.Generator, int], Case] | None = None
    flops: Callable[[Any], int] = lambda problem: 0
    moved: Callable[[Any], int] = lambda problem: 0

    def tolerance_of(self, output: str) -> Tolerance:
        """The rule of one output, named as in `named_outputs`."""
        return replace(self.tolerance, exact=True) if output in self.copied else self.tolerance
