"""The frozen choice of kernels: what was chosen for each problem, what was rejected and why, and a hash to compare."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lineshaft.plan.resolve import Rejection
from lineshaft_contract.backends import API_VERSION
from lineshaft_contract.problems import Problem
from lineshaft_contract.steps import StepShape
from lineshaft_contract.timing import Choice


@dataclass(frozen=True)
class PlanEntry:
    """One problem of one op: the kernel chosen for it, its packing, and each kernel that was rejected."""

    op: str
    problem: str
    dtype: str  # executed
    kernel: str
    version: str
    layout: str
    options: Mapping[str, str]
    rejected: tuple[Rejection, ...]
    calls: int  # in one step of the largest bucket that has it
    api: int = API_VERSION  # of the contract that the kernel was written for

    @property
    def label(self) -> str:
        """The kernel's name, with the contract's version where it was written for another."""
        return self.kernel if self.api == API_VERSION else f"{self.kernel} (written for contract version {self.api})"

    def identity(self) -> list[Any]:
        return [self.op, self.problem, self.kernel, self.version, self.layout, sorted(self.options.items())]


@dataclass(frozen=True)
class Plan:
    """A frozen plan. Its hash covers op, problem, kernel, version, packing, options; never timings, hosts or paths."""

    backend: str
    shapes: tuple[StepShape, ...]
    entries: tuple[PlanEntry, ...]
    weight_layouts: Mapping[str, str]
    cache_layout: str
    weight_bytes: int
    workspace_bytes: int  # of intermediate results at once, in the bucket that needs most
    notes: tuple[str, ...] = ()  # what a reader should know beside the kernels, a line each
    declined: Mapping[str, str] = field(default_factory=dict)  # optional programs that were left out: name -> reason
    choices: Mapping[str, Choice] = field(default_factory=dict)  # how ties were settled, by op and described problem

    @property
    def hash(self) -> str:
        """sha256 in hexadecimal."""
        content = [
            [dataclasses.astuple(shape) for shape in self.shapes],
            sorted((entry.identity() for entry in self.entries), key=json.dumps),
            sorted(self.weight_layouts.items()),
            self.cache_layout,
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def summary(self) -> str:
        """A few lines: backend, buckets, the kernel of each op, the hash, the notes."""
        chosen: dict[str, dict[str, None]] = {}
        for entry in self.entries:
            chosen.setdefault(entry.op, {})[entry.label] = None
        lines = [
            f"plan {self.hash[:16]}  backend {self.backend}  buckets {len(self.shapes)}  problems {len(self.entries)}"
        ]
        width = max((len(op) for op in chosen), default=0)
        lines += [f"  {op:<{width}}  {', '.join(names)}" for op, names in chosen.items()]
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  without {name}: {reason}" for name, reason in self.declined.items()]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {"hash": self.hash, **dataclasses.asdict(self)}


def make_entry(op: str, problem: Problem, kernel: Any, rejected: Sequence[Rejection], calls: int) -> PlanEntry:
    """An entry for a chosen kernel."""
    return PlanEntry(
        op, problem.describe(), problem.dtype, kernel.name, kernel.version, kernel.layout, dict(kernel.options),
        tuple(rejected), calls, kernel.api,
    )  # fmt: skip


def make_shape(data: Mapping[str, Any]) -> StepShape:
    """A StepShape from its fields as JSON gives them back."""
    return StepShape(**{**data, "pages": tuple(data["pages"])})
