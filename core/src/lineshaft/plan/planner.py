"""From programs to a plan: trace each one, resolve every site, agree on packings, and bind kernels for a session."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from lineshaft.plan.plan import Plan, PlanEntry, make_entry
from lineshaft.plan.resolve import Candidates, Resolver, joint_layout
from lineshaft.plan.trace import Site, Trace, Tracer, dispatch_key, distinct_params, trace_function
from lineshaft.weights.memory import local_bytes, quantized, repacked
from lineshaft_contract.kernels import Bound, HostPrepare, Kernel
from lineshaft_contract.ops.spec import OpSpec
from lineshaft_contract.problems import KVProblem, Problem
from lineshaft_contract.sessions import Cache, Packing, Session, StepFunction, Tree
from lineshaft_contract.steps import ArraySpec, InputLayout, StepShape

Uses = Mapping[str, tuple[str, Problem]]


@dataclass(frozen=True)
class ProgramSpec:
    """One function to capture for one bucket; `optional` names what a run can do without ("": nothing)."""

    name: str
    fn: StepFunction
    shape: StepShape
    inputs: InputLayout
    arrays: Mapping[str, ArraySpec] = field(default_factory=dict)
    host_outputs: frozenset[str] = frozenset()
    optional: str = ""


@dataclass(frozen=True)
class Workload:
    """Everything that is to be planned at once: a model's parameters, caches, declared uses and programs."""

    params: Tree
    caches: Sequence[KVProblem]
    uses: Uses
    programs: Sequence[ProgramSpec]
    degrees: Mapping[str, int]


class BoundOps:
    """The plan's kernels for one program (a `PlannedOps`)."""

    def __init__(self, trace: Trace, chosen: Mapping[tuple[str, Problem], Kernel], specs: Mapping[str, OpSpec]) -> None:
        self._trace, self._chosen, self._specs = trace, chosen, specs

    def bind(self, session: Session) -> Any:
        """A namespace with one callable per name: the bound kernel itself, or a dispatch where a name has several."""
        bound: dict[tuple[str, Problem], Bound] = {}
        tables: dict[str, dict[Any, Bound]] = {}
        namespace = SimpleNamespace()
        for site in self._trace.sites.values():
            pair = (site.op, site.problem)
            if pair not in bound:
                bound[pair] = self._bind_one(site, session, namespace)
            tables.setdefault(site.name, {})[site.key] = bound[pair]
        for name, table in tables.items():
            distinct = list({id(fn): fn for fn in table.values()}.values())
            setattr(namespace, name, distinct[0] if len(distinct) == 1 else _dispatch(table))
        return namespace

    def _bind_one(self, site: Site, session: Session, namespace: Any) -> Bound:
        if not site.composite:
            return self._chosen[site.op, site.problem].bind(site.problem, session)
        default = self._specs[site.op].default
        assert default is not None
        return lambda *args, **kwargs: default(namespace, site.problem, *args, **kwargs)

    def chosen(self, name: str, key: tuple[Any, ...]) -> tuple[Site, Kernel | None]:
        """The site of the function's calls of that name and `dispatch_key`, and the kernel that runs it (None: the op's
        default decomposition)."""
        site = self._trace.sites[name, key]
        return site, self._chosen.get((site.op, site.problem))

    @property
    def digest(self) -> str:
        pairs = dict.fromkeys((site.op, site.problem) for site in self._trace.sites.values() if not site.composite)
        kernels = [make_entry(*pair, self._chosen[pair], (), 0).identity() for pair in pairs]
        content = [repr(self._trace.shape), self._trace.flow, kernels]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def outputs(self) -> Mapping[str, ArraySpec]:
        return self._trace.outputs

    def prepares(self, session: Session) -> list[HostPrepare]:
        """Host planning of each distinct (kernel, problem), in first-call order."""
        pairs = dict.fromkeys((s.op, s.problem) for s in self._trace.sites.values() if not s.composite)
        made = (self._chosen[pair].prepare(pair[1], self._trace.shape, session) for pair in pairs)
        return [prepare for prepare in made if prepare is not None]


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


def make_plan(backend: str, work: Workload, resolver: Resolver, specs: Mapping[str, OpSpec]) -> Planned:
    """Resolve every problem of every program; an optional one that some kernel is missing for is left out.

    Raises Unsupported, Ambiguous, ContractViolation.
    """
    programs, traces, declined = _programs(backend, work, resolver, specs)
    sites = [site for trace in traces for site in trace.sites.values() if not site.composite]
    layouts = _weight_layouts(work, sites, resolver)
    cache_layout = _cache_layout(sites, resolver)
    params = distinct_params(work.params)
    names = [param.name for param in params]
    chosen: dict[tuple[str, Problem], Kernel] = {}
    packings: dict[str, Packing] = {}
    for site in sites:
        layout = layouts[names[site.weights[0]]] if site.weights else cache_layout if site.cache else None
        kernel = resolver.candidates(site.op, site.problem).best(layout)
        chosen[site.op, site.problem] = kernel
        packings |= {names[key]: Packing(kernel.layout, kernel.pack) for key in site.weights}
    plan = Plan(
        backend=backend,
        shapes=tuple(dict.fromkeys(program.shape for program in programs)),
        entries=_entries(traces, chosen, resolver),
        weight_layouts=layouts,
        cache_layout=cache_layout,
        weight_bytes=local_bytes(params, layouts),
        workspace_bytes=max(trace.workspace.most for trace in traces),
        notes=(*repacked(params, layouts), *quantized(params, layouts)),
        declined=declined,
    )
    bound = tuple((p, BoundOps(t, chosen, specs)) for p, t in zip(programs, traces, strict=True))
    return Planned(plan, bound, packings, tuple(trace.outputs for trace in traces))


def _programs(
    backend: str, work: Workload, resolver: Resolver, specs: Mapping[str, OpSpec]
) -> tuple[list[ProgramSpec], list[Trace], dict[str, str]]:
    """The programs to capture, their traces, and for each optional thing that is left out the reason."""
    traced = [(program, _trace(program, work, resolver, specs)) for program in work.programs]
    declined: dict[str, str] = {}
    for program, trace in traced:
        for site in trace.sites.values():
            if program.optional and not (site.composite or resolver.resolvable(site.op, site.problem)):
                reason = resolver.candidates(site.op, site.problem).unsupported()
                declined[program.optional] = f"backend {backend!r} has {reason}; leave it out, or use another backend"
    kept = [(program, trace) for program, trace in traced if program.optional not in declined]
    return [program for program, _ in kept], [trace for _, trace in kept], declined


def _trace(program: ProgramSpec, work: Workload, resolver: Resolver, specs: Mapping[str, OpSpec]) -> Trace:
    caches = [Cache(i, problem, "") for i, problem in enumerate(work.caches)]
    tracer = Tracer(specs, work.uses, work.degrees, program.shape, resolver.resolvable)
    return trace_function(program.fn, tracer, work.params, caches, program.inputs, program.arrays)


def _weight_layouts(work: Workload, sites: Sequence[Site], resolver: Resolver) -> dict[str, str]:
    uses: dict[int, dict[tuple[str, Problem], Candidates]] = {}
    for site in sites:
        for key in site.weights:
            found = resolver.candidates(site.op, site.problem)
            uses.setdefault(key, {})[site.op, site.problem] = found
    decided: dict[frozenset[tuple[str, Problem]], str] = {}
    layouts = {}
    for key, param in enumerate(distinct_params(work.params)):
        if key in uses:
            kind = frozenset(uses[key])
            if kind not in decided:
                decided[kind] = joint_layout(list(uses[key].values()), f"weight {param.name}")
            layouts[param.name] = decided[kind]
    return layouts


def _cache_layout(sites: Sequence[Site], resolver: Resolver) -> str:
    pairs = dict.fromkeys((site.op, site.problem) for site in sites if site.cache)
    return joint_layout([resolver.candidates(*pair) for pair in pairs], "the KV cache") if pairs else ""


def _entries(
    traces: Sequence[Trace], chosen: Mapping[tuple[str, Problem], Kernel], resolver: Resolver
) -> tuple[PlanEntry, ...]:
    calls: dict[tuple[str, Problem], int] = {}
    for trace in traces:
        here: dict[tuple[str, Problem], int] = {}
        for seen, site in trace.sites.items():
            here[site.op, site.problem] = here.get((site.op, site.problem), 0) + trace.calls[seen]
        calls.update({pair: max(n, calls.get(pair, 0)) for pair, n in here.items()})
    return tuple(
        make_entry(*pair, kernel, resolver.candidates(*pair).rejections(kernel), calls[pair])
        for pair, kernel in chosen.items()
    )
