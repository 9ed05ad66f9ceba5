"""From programs to a plan: trace each one, resolve every site, agree on packings, and bind kernels for a session."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from lineshaft.plan.plan import Plan, PlanEntry, make_entry
from lineshaft.plan.resolve import Resolver, joint_layout
from lineshaft.plan.trace import (
    Pair,
    Parts,
    ProgramSpec,
    Site,
    Trace,
    Workload,
    dispatch_key,
    distinct_params,
    trace_program,
)
from lineshaft.weights.memory import local_bytes, quantized, repacked
from lineshaft_contract.kernels import Bound, HostPrepare, Kernel
from lineshaft_contract.ops.spec import OpSpec
from lineshaft_contract.sessions import Packing, Session
from lineshaft_contract.steps import ArraySpec
from lineshaft_contract.timing import Contest


class BoundOps:
    """The plan's kernels for one program (a `PlannedOps`)."""

    def __init__(self, trace: Trace, chosen: Mapping[Pair, Kernel], specs: Mapping[str, OpSpec]) -> None:
        self._trace, self._chosen, self._specs = trace, chosen, specs

    def bind(self, session: Session) -> Any:
        """A namespace with one callable per name: the bound kernel itself, or a dispatch where a name has several."""
        bound: dict[Pair, Bound] = {}
        tables: dict[str, dict[Any, Bound]] = {}
        namespace = SimpleNamespace()
        for site in self._trace.sites.values():
            if site.pair not in bound:
                bound[site.pair] = self._bind_one(site, session, namespace)
            tables.setdefault(site.name, {})[site.key] = bound[site.pair]
        for name, table in tables.items():
            distinct = list({id(fn): fn for fn in table.values()}.values())
            setattr(namespace, name, distinct[0] if len(distinct) == 1 else _dispatch(table))
        return namespace

    def _bind_one(self, site: Site, session: Session, namespace: Any) -> Bound:
        if not site.composite:
            return self._chosen[site.pair].bind(site.problem, session)
        spec = self._specs[site.op]
        assert spec.default is not None
        return partial(spec.default, Parts(namespace, site.name, spec.parts(site.problem)), site.problem)

    def chosen(self, name: str, key: tuple[Any, ...]) -> tuple[Site, Kernel | None]:
        """The site of the function's calls of that name and `dispatch_key`, and the kernel that runs it (None: the op's
        default decomposition)."""
        site = self._trace.sites[name, key]
        return site, self._chosen.get(site.pair)

    @property
    def digest(self) -> str:
        kernels = [make_entry(*pair, self._chosen[pair], (), 0).identity() for pair in self._pairs]
        content = [repr(self._trace.shape), self._trace.flow, kernels]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def outputs(self) -> Mapping[str, ArraySpec]:
        return self._trace.outputs

    def prepares(self, session: Session) -> list[HostPrepare]:
        """Host planning of each distinct (kernel, problem), in first-call order."""
        made = (self._chosen[pair].prepare(pair[1], self._trace.shape, session) for pair in self._pairs)
        return [prepare for prepare in made if prepare is not None]

    @property
    def _pairs(self) -> Iterable[Pair]:
        return dict.fromkeys(site.pair for site in self._trace.sites.values() if not site.composite)


def _dispatch(table: Mapping[Any, Bound]) -> Bound:
    def call(*args: Any, **kwargs: Any) -> Any:
        return table[dispatch_key(args, kwargs)](*args, **kwargs)

    return call


@dataclass(frozen=True)
class Planned:
    """A plan with what a session needs to carry it out; `programs` pairs each ProgramSpec with its bound ops."""

    plan: Plan
    programs: tuple[tuple[ProgramSpec, BoundOps], ...]
    packings: Mapping[str, Packing]
    outputs: tuple[Mapping[str, ArraySpec], ...]  # of each program, as traced
    ties: Sequence[Contest]  # that are not settled


def make_plan(backend: str, work: Workload, resolver: Resolver, specs: Mapping[str, OpSpec]) -> Planned:
    """Resolve every problem of every program; an optional one that some kernel is missing for is left out.

    Raises Unsupported, Ambiguous, ContractViolation.
    """
    traced, declined = _trace_all(backend, work, resolver, specs)
    traces = [trace for _, trace in traced]
    sites = [site for trace in traces for site in trace.sites.values() if not site.composite]
    layouts = _weight_layouts(work, sites, resolver)
    cache_layout = _cache_layout(sites, resolver)
    params = distinct_params(work.params)
    names = [param.name for param in params]
    chosen: dict[Pair, Kernel] = {}
    packings: dict[str, Packing] = {}
    for site in sites:
        layout = layouts[names[site.weights[0]]] if site.weights else cache_layout if site.cache else None
        kernel = resolver.choose(*site.pair, layout)
        chosen[site.pair] = kernel
        packings |= {names[key]: Packing(kernel.layout, kernel.pack) for key in site.weights}
    plan = Plan(
        backend=backend,
        shapes=tuple(dict.fromkeys(program.shape for program, _ in traced)),
        entries=_entries(traces, chosen, resolver),
        weight_layouts=layouts,
        cache_layout=cache_layout,
        weight_bytes=local_bytes(params, layouts),
        workspace_bytes=max(trace.workspace.most for trace in traces),
        notes=(f"programs {len(traced)}", *work.notes, *repacked(params, layouts), *quantized(params, layouts)),
        declined=declined,
        choices={f"{op} {problem.describe()}": choice for (op, problem), choice in resolver.choices.items()},
    )
    bound = tuple((program, BoundOps(trace, chosen, specs)) for program, trace in traced)
    open_sites = [site for site in sites if site.pair in resolver.ties]
    ties = [Contest(specs[s.op], s.problem, resolver.ties[s.pair], s.operands, params) for s in open_sites]
    return Planned(plan, bound, packings, tuple(trace.outputs for trace in traces), ties)


def _trace_all(
    backend: str, work: Workload, resolver: Resolver, specs: Mapping[str, OpSpec]
) -> tuple[list[tuple[ProgramSpec, Trace]], dict[str, str]]:
    """The programs to capture with their traces, and for each optional thing that is left out the reason."""
    traced = [(program, trace_program(program, work, specs, resolver.resolvable)) for program in work.programs]
    declined: dict[str, str] = {}
    for program, trace in traced:
        for site in trace.sites.values():
            if program.optional and not (site.composite or resolver.resolvable(*site.pair)):
                reason = resolver.candidates(*site.pair).unsupported()
                declined[program.optional] = f"backend {backend!r} has {reason}; leave it out, or use another backend"
    return [(program, trace) for program, trace in traced if program.optional not in declined], declined


def _weight_layouts(work: Workload, sites: Sequence[Site], resolver: Resolver) -> dict[str, str]:
    uses: dict[int, dict[Pair, None]] = {}
    for site in sites:
        for key in site.weights:
            uses.setdefault(key, {})[site.pair] = None
    return {
        param.name: _joint(uses[key], resolver, f"weight {param.name}")
        for key, param in enumerate(distinct_params(work.params))
        if key in uses
    }


def _cache_layout(sites: Sequence[Site], resolver: Resolver) -> str:
    pairs = dict.fromkeys(site.pair for site in sites if site.cache)
    return _joint(pairs, resolver, "the KV cache") if pairs else ""


def _joint(pairs: Iterable[Pair], resolver: Resolver, what: str) -> str:
    return joint_layout([resolver.candidates(*pair) for pair in pairs], what)


def _entries(traces: Sequence[Trace], chosen: Mapping[Pair, Kernel], resolver: Resolver) -> tuple[PlanEntry, ...]:
    calls: Counter[Pair] = Counter()
    for trace in traces:
        here: Counter[Pair] = Counter()
        for seen, site in trace.sites.items():
            here[site.pair] += trace.calls[seen]
        calls |= here  # the larger number of each
    return tuple(
        make_entry(*pair, kernel, resolver.rejections(pair, kernel), calls[pair]) for pair, kernel in chosen.items()
    )
