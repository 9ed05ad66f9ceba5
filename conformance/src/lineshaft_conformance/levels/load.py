"""L0: the backend is found, tells the truth about itself without importing a vendor's library, and its kernels bind."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic import BaseModel

from lineshaft.config import validate_options
from lineshaft.errors import LineshaftError
from lineshaft.plan.resolve import Resolver
from lineshaft.registry import load_attribute
from lineshaft_conformance.checks import Check, Found, NotClaimed, fail, require
from lineshaft_conformance.evidence import boasts, os_devices
from lineshaft_conformance.harness.op_case import prepare
from lineshaft_conformance.levels.ops import claims
from lineshaft_conformance.subject import Subject
from lineshaft_contract.backends import (
    API_VERSION,
    Backend,
    BackendInfo,
    BackendKind,
    Capabilities,
    DeterminismClaims,
    Probe,
    World,
)
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops import Case, OpSpec
from lineshaft_contract.ops.spec import Size, numpy_dtype
from lineshaft_contract.problems import AttendProblem, KVProblem, Problem

PAGE_SIZES = (1, 8, 16, 24, 32, 64, 128)
"""Sizes that a backend which takes any page size must have kernels for."""

_PROBE = """
import json, sys, time
began = time.perf_counter()
import lineshaft.config, lineshaft_contract.ops, lineshaft_contract.host, lineshaft.registry
from lineshaft.registry import load_attribute
core, before = time.perf_counter(), set(sys.modules)
load_attribute(sys.argv[1])()
ratio = (time.perf_counter() - core) / (core - began)
print(json.dumps([ratio, sorted({name.partition(".")[0] for name in set(sys.modules) - before})]))
"""


def checks(subject: Subject, size: Size) -> Iterator[Check]:
    """Every check of this file."""
    for name, run, rule in (
        ("load/manifest", _manifest, "what a plugin registers is complete, and its references can be loaded"),
        ("load/probe", _probe, "a probe imports no vendor library, and names only devices that are there"),
        ("load/options", _options, "an unknown option is refused with a typed error"),
        ("load/capabilities", _capabilities, "every field of Capabilities has a value that the contract allows"),
        ("load/memory", _memory, "Memory counts in bytes: a page takes at least its canonical size"),
        ("load/kernels", _kernels, "kernels have names of their own, known ops, known features, and never tie"),
        ("load/stable", _stable, "two starts give the same kernels, so that the plan's hash can be compared"),
        ("load/kv_dtypes", _kv_dtypes, "each dtype that pages may hold has kernels that write and read it"),
    ):
        yield Check(f"L0/{name}", run, rule=rule, shape_class="load")
    for page_size in PAGE_SIZES:
        yield _page_size_check(page_size)
    for spec in subject.ops.values():
        if not spec.collective:
            yield _compiles_check(spec)


def _manifest(subject: Subject, seed: int) -> Found:
    info = subject.info
    require(re.fullmatch(r"[a-z][a-z0-9_-]*", info.name), f"name {info.name!r}: lower case, digits, - and _ only")
    require(isinstance(info.kind, BackendKind), f"kind {info.kind!r} is no BackendKind")
    require(info.api in (API_VERSION, API_VERSION + 1), f"api {info.api}: this contract is version {API_VERSION}")
    require(info.summary.strip(), "summary is empty; one line that says what the backend runs on")
    require(subject.backend.name == info.name, f"the factory makes {subject.backend.name!r}, not {info.name!r}")
    return Found()


def _probe(subject: Subject, seed: int) -> Found:
    info, own = subject.info, subject.info.probe.partition(":")[0].partition(".")[0]
    done = subprocess.run([sys.executable, "-c", _PROBE, info.probe], capture_output=True, text=True, timeout=30)
    require(done.returncode == 0, f"the probe fails in a process of its own: {done.stderr.strip()[-300:]}")
    ratio, imported = json.loads(done.stdout.splitlines()[-1])
    require(ratio < 1, f"probing takes {ratio:.1f} times as long as importing the core; it is for a list of backends")
    others = [name for name in imported if name not in sys.stdlib_module_names and name.lstrip("_") != own]
    foreign = [name for name in others if not name.startswith("lineshaft_")]  # what a kit of ours imports counts
    require(not foreign, f"probing imports {', '.join(foreign)}; look at files and find_spec only")
    probe = load_attribute(info.probe)()
    require(isinstance(probe, Probe), f"the probe returns {type(probe).__name__}, not a Probe")
    require(probe.reason.strip(), "the probe gives no reason for what it found")
    runs = probe.runs_with(subject.target.options)
    require(runs, f"the backend runs, but its probe says it cannot: {probe.reason}")
    _unless(info, probe)
    boast = boasts(info, probe, subject.target.options, os.environ, os_devices)
    require(boast is None, boast or "")
    return Found()


def _unless(info: BackendInfo, probe: Probe) -> None:
    """Raises Failure unless `Probe.unless` names options of the backend, with values that they take."""
    model = load_attribute(info.options) if info.options else None
    for name, value in probe.unless.items():
        known = model is not None and name in model.model_fields
        require(known, f"the probe's `unless` names {name!r}, which is no option of the backend")
        try:
            validate_options(info, {name: value})
        except LineshaftError as error:
            fail(f"the probe's `unless` has {name} = {value!r}, which the backend refuses: {error}")


def _options(subject: Subject, seed: int) -> Found:
    info = subject.info
    if not info.options:
        raise NotClaimed("the backend has no options")
    model = load_attribute(info.options)
    require(isinstance(model, type) and issubclass(model, BaseModel), f"{info.options} is no pydantic model")
    try:
        validate_options(info, {**subject.target.options, "no_such_option": 1})
    except LineshaftError:
        return Found()
    fail("the unknown option 'no_such_option' is taken without a word; forbid extra fields")


def _capabilities(subject: Subject, seed: int) -> Found:
    can = subject.capabilities
    require(isinstance(can, Capabilities), f"capabilities is {type(can).__name__}, not Capabilities")
    require(can.dtypes, "dtypes is empty: a backend executes at least one dtype")
    for field in ("dtypes", "kv_dtypes"):
        for name in getattr(can, field):
            try:
                numpy_dtype(name)
            except TypeError:
                fail(f"{field} lists {name!r}, which is no dtype of the contract")
    for field in ("page_sizes", "token_buckets", "row_buckets"):
        values = getattr(can, field) or ()
        natural = all(type(n) is int and n > 0 for n in values)
        require(natural and len(set(values)) == len(values), f"{field} = {values}: different whole numbers above 0")
        require(getattr(can, field) != () or field == "page_sizes", f"{field} is empty; None stands for no restriction")
    for field in ("default_page_size", "max_prefill_rows", "max_query"):
        value = getattr(can, field)
        optional = field != "default_page_size"
        require((optional and value is None) or (type(value) is int and value > 0), f"{field} = {value!r}")
    listed = not can.page_sizes or can.default_page_size in can.page_sizes
    require(listed, f"default_page_size {can.default_page_size} is not among page_sizes {can.page_sizes}")
    for field in ("mixed_steps", "asynchronous", "graphs", "collectives", "fixed_kv_size", "weights_fixed"):
        require(type(getattr(can, field)) is bool, f"{field} = {getattr(can, field)!r} is neither True nor False")
    claimed = can.determinism
    require(isinstance(claimed, DeterminismClaims), f"determinism is {type(claimed).__name__}, not DeterminismClaims")
    return Found()


def _memory(subject: Subject, seed: int) -> Found:
    memory, found = subject.backend.memory, subject.backend.memory.total_free()
    if found is not None:
        total, free = found
        require(type(total) is int and type(free) is int and 0 <= free <= total, f"total_free() gives {found}")
    problem = kv_problem(subject, subject.capabilities.dtypes[0], subject.capabilities.default_page_size)
    size = memory.page_bytes(problem)
    require(
        type(size) is int and size >= problem.page_bytes,
        f"page_bytes gives {size!r} for {problem.describe()}, whose canonical page has {problem.page_bytes} bytes",
    )
    memory.synchronize()
    return Found()


def _kernels(subject: Subject, seed: int) -> Found:
    names = [kernel.name for kernel in subject.kernels]
    require(names, "the backend has no kernel")
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"two kernels are named {', '.join(twice)}")
    for kernel in subject.kernels:
        _kernel_fields(subject, kernel)
    resolver = Resolver(subject.info.name, subject.kernels, {})
    for spec in subject.ops.values():
        for case in _cases(spec, seed):
            found = resolver.candidates(spec.name, case.problem)
            for layout in {kernel.layout for kernel in found.taken}:
                found.best(layout)  # raises Ambiguous for a tie
    return Found(tuple(names))


def _kernel_fields(subject: Subject, kernel: Kernel) -> None:
    require(isinstance(kernel, Kernel), f"{kernel!r} is no Kernel")
    spec = subject.ops.get(kernel.op)
    if spec is None:
        fail(f"kernel {kernel.name} is for {kernel.op!r}, which is no op")
    require(kernel.backend == subject.info.name, f"kernel {kernel.name} names the backend {kernel.backend!r}")
    known = {field.name for field in dataclasses.fields(spec.problem)}
    unknown = sorted(kernel.handles - known)
    require(not unknown, f"kernel {kernel.name} handles {', '.join(unknown)}, no field of {spec.problem.__name__}")


def _stable(subject: Subject, seed: int) -> Found:
    def listed(backend: Backend) -> list[tuple[object, ...]]:
        return [
            (k.name, k.op, k.version, k.priority, k.layout, k.tunable, sorted(k.handles), sorted(k.options.items()))
            for k in backend.kernels()
        ]

    again = subject.start(World(threads=1))
    claims = (subject.capabilities, subject.capabilities, again.capabilities)
    require(claims[0] == claims[1] == claims[2], "capabilities change from one call, or from one start, to the next")
    first, second = listed(subject.backend), listed(again)
    unlike = [str(a[0]) for a, b in zip(first, second, strict=False) if a != b]
    require(len(first) == len(second) and not unlike, f"a second start gives other kernels: {', '.join(unlike)}")
    return Found(tuple(str(item[0]) for item in first))


def _kv_dtypes(subject: Subject, seed: int) -> Found:
    can, names = subject.capabilities, []
    for dtype in can.dtypes:
        for kv_dtype in can.kv_dtypes or (dtype,):
            names += _paged_kernels(subject, kv_problem(subject, dtype, can.default_page_size, kv_dtype))
    return Found(tuple(dict.fromkeys(names)))


def _page_size_check(page_size: int) -> Check:
    def run(subject: Subject, seed: int) -> Found:
        can = subject.capabilities
        if can.page_sizes and page_size not in can.page_sizes:
            raise NotClaimed(f"Capabilities.page_sizes lists {can.page_sizes}")
        return Found(tuple(_paged_kernels(subject, kv_problem(subject, can.dtypes[0], page_size))))

    rule = "each page size that Capabilities allows has kernels that write and read it"
    return Check(f"L0/load/page_size-{page_size}", run, rule=rule, shape_class="load")


def kv_problem(subject: Subject, dtype: str, page_size: int, kv_dtype: str = "") -> KVProblem:
    """A cache as a small model has it."""
    return KVProblem(dtype=dtype, kv_heads=2, qk_dim=64, v_dim=64, page_size=page_size, kv_dtype=kv_dtype or dtype)


def _paged_kernels(subject: Subject, cache: KVProblem) -> list[str]:
    """Names of the kernels that write and read a cache; raises Failure where there are none."""
    attend = AttendProblem(
        dtype=cache.dtype, q_heads=4, kv_heads=2, qk_dim=64, v_dim=64, page_size=cache.page_size, scale=0.125,
        kv_dtype=cache.kv_dtype, tokens=8, rows=2, pages=4, max_query=7,
    )  # fmt: skip
    names: list[str] = []
    problems: list[tuple[str, Problem]] = [("write_kv", dataclasses.replace(cache, rows=8)), ("attend", attend)]
    for op, problem in problems:
        found = claims(subject, subject.ops[op], problem)
        reasons = "; ".join(f"{r.kernel}: {r.reason}" for r in found.rejected) or "none is registered"
        require(found.taken, f"Capabilities allows {problem.describe()}, but no kernel of {op} takes it: {reasons}")
        names += [kernel.name for kernel in found.taken]
    return names


def _compiles_check(spec: OpSpec) -> Check:
    def run(subject: Subject, seed: int) -> Found:
        own = [kernel for kernel in subject.kernels if kernel.op == spec.name]
        if not own:
            require(not spec.required, f"the backend has no kernel of {spec.name}, which the contract requires")
            raise NotClaimed(f"the backend has no kernel of {spec.name}")
        for kernel in own:
            _compile(subject, spec, kernel, seed)
        return Found(tuple(kernel.name for kernel in own))

    return Check(
        f"L0/compiles/{spec.name}", run, rule="every kernel takes some problem of its op, and binds to it",
        op=spec.name, shape_class="compiles",
    )  # fmt: skip


def _compile(subject: Subject, spec: OpSpec, kernel: Kernel, seed: int) -> None:
    """Capture the first case that a kernel claims. Raises Failure where it claims none."""
    resolver = Resolver(subject.info.name, [kernel], {})
    others = [other for other in subject.kernels if other.op != spec.name]
    for case in _cases(spec, seed):
        listed = case.problem.dtype in subject.capabilities.dtypes
        if listed and resolver.candidates(spec.name, case.problem).taken:
            prepare(spec, case).rig(subject, [kernel, *others]).session.close()
            return
    fail(f"kernel {kernel.name} takes no case of {spec.name} in any of Capabilities.dtypes")


def _cases(spec: OpSpec, seed: int) -> list[Case]:
    found: Any = spec.cases(np.random.default_rng(seed), "smoke")
    return list(found)
