"""A toolchain for imaginary devices, right as it stands, and broken ones; imports the contract and the planner alone.

Its compiler runs the function once on arrays that have a shape and no values, and counts bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from lineshaft.errors import InvalidValue, LayoutError, Unsupported
from lineshaft.plan.trace import AbstractArray
from lineshaft_contract.backends import Capabilities, World
from lineshaft_contract.kernels import Bound, Kernel
from lineshaft_contract.ops import OpSpec, all_ops
from lineshaft_contract.ops.spec import Call, Inferred
from lineshaft_contract.problems import AttendProblem, KVProblem, LinearProblem, Problem
from lineshaft_contract.sessions import Cache, CaptureReport, SessionState, Tree, leaves, map_tree
from lineshaft_contract.steps import ArraySpec, InputLayout, StepInputs, StepShape
from lineshaft_contract.weights import Param, Weight

DEVICES: Mapping[str, tuple[int, int]] = {"small:1x1": (1, 1 << 30), "big:2x4": (8, 16 << 30)}
"""How many devices each target has, and the bytes of memory of one."""
REAL: Mapping[str, tuple[Problem, ...]] = {
    "linear": (LinearProblem(dtype="bfloat16", m=32, n=4096, k=4096),),
    "attend": (
        AttendProblem(
            dtype="bfloat16", q_heads=32, kv_heads=8, qk_dim=128, v_dim=128, page_size=16, scale=0.088,
            kv_dtype="bfloat16", tokens=32, rows=32, pages=512, max_query=1,
        ),
    ),
}  # fmt: skip
"""Problems of an imaginary model by op."""


@dataclass(frozen=True)
class PlainMemory:
    """So many bytes, all of them free."""

    total: int

    def total_free(self) -> tuple[int, int]:
        return self.total, self.total

    def page_bytes(self, problem: KVProblem) -> int:
        return problem.page_bytes

    def synchronize(self) -> None:
        """Nothing runs."""


class PlainSession(SessionState):
    """Keeps shapes in the place of values, and calls nothing on a device."""

    def __init__(self, toolchain: PlainToolchain) -> None:
        self._toolchain = toolchain
        self._weights: Tree = {}
        self._params: dict[str, Param] = {}
        self._caches: list[Cache] = []
        self._pool = 0

    def load(self, params: Tree, checkpoint: Any, packings: Any) -> Tree:
        self._params = {param.name: param for param in leaves(params)}
        keys = {name: key for key, name in enumerate(self._params)}

        def one(param: Param) -> Any:
            if "const" in param.problems:
                return AbstractArray(ArraySpec(param.shape, param.dtype), param.name)
            return Weight(keys[param.name], param.name, param.problems, "")

        self._weights = map_tree(one, params)
        return self._weights

    def alloc_caches(self, problems: Sequence[KVProblem], pages: Sequence[int], layout: str) -> list[Cache]:
        self._caches = [Cache(i, problem, layout) for i, problem in enumerate(problems)]
        self._pool = sum(pages[problem.group] * problem.page_bytes for problem in problems)
        return self._caches

    def capture(
        self, fn: Any, shape: StepShape, inputs: InputLayout, ops: Any, arrays: Any = None, host: Any = frozenset()
    ) -> PlainProgram:
        views = {item.name: AbstractArray(ArraySpec(item.shape, item.dtype), item.name) for item in inputs.fields}
        given = {name: AbstractArray(spec, name) for name, spec in (arrays or {}).items()}
        outputs, _ = fn(ops.bind(self), self._weights, list(self._caches), StepInputs(views, shape), given)
        weights = sum(ArraySpec(p.shape, p.dtype).nbytes for p in self._params.values())
        results = sum(array.spec.nbytes for array in outputs.values())
        handed = sum(array.spec.nbytes for array in given.values())
        report = CaptureReport(
            0.5, arguments=weights + self._pool + inputs.nbytes + handed, outputs=results + self._pool,
            aliased=self._pool, temporaries=results // 2, flops=2 * weights, moved=weights, code=4096,
            details=self._toolchain.details(),
        )  # fmt: skip
        return self._toolchain.program(shape, report)

    def write_pages(self, *_: Any) -> NoReturn:
        raise Unsupported("the device is not here: nothing runs on it")

    read_pages = copy_pages = update = write_pages

    def close(self) -> None:
        self.closed = True


@dataclass(frozen=True)
class PlainProgram:
    """Compiled, and not to be called."""

    shape: StepShape
    report: CaptureReport

    def __call__(self, host: Any, arrays: Any = None, after: Any = ()) -> Any:
        raise Unsupported("the device is not here: nothing runs on it")


@dataclass(frozen=True)
class PlainTarget:
    """The backend on an imaginary device."""

    name: str
    memory: PlainMemory
    toolchain: PlainToolchain

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(dtypes=("bfloat16", "float32"), collectives=True)

    def kernels(self) -> list[Kernel]:
        return [self.toolchain.kernel(spec) for spec in all_ops().values()]

    def session(self, rank: int) -> PlainSession:
        return PlainSession(self.toolchain)


class PlainToolchain:
    """Made by every attribute of this file that is a ToolchainFactory; mutants override a part of it."""

    backend = "cpu"

    def __init__(self, options: Any) -> None:
        """Takes any options."""

    def targets(self) -> Sequence[str]:
        return tuple(DEVICES)

    def columns(self) -> Sequence[str]:
        return ("scratch",)

    def details(self) -> Mapping[str, str | int]:
        return {"scratch": 256}

    def problems(self, kernel: Kernel) -> Sequence[Problem]:
        return REAL.get(kernel.op, ())

    def start(self, target: str, world: World) -> PlainTarget:
        if target not in DEVICES:
            raise InvalidValue(f"target {target!r}: known are {', '.join(DEVICES)}")
        devices, memory = DEVICES[target]
        if world.size > devices:
            raise LayoutError(f"target {target!r} has {devices} devices, the layout asks for {world.size}")
        return PlainTarget(self.backend, PlainMemory(memory), self)

    def program(self, shape: StepShape, report: CaptureReport) -> PlainProgram:
        return PlainProgram(shape, report)

    def kernel(self, spec: OpSpec) -> Kernel:
        """A kernel that gives arrays of the right shapes and takes whatever the op does."""
        features = frozenset(field.name for field in fields(spec.problem) if field.metadata.get("feature"))
        return Kernel(f"plain_{spec.name}", spec.name, self.backend, self.binder(spec), handles=features)

    def binder(self, spec: OpSpec) -> Any:
        def bind(problem: Any, session: Any) -> Bound:
            def call(*args: Any, **kwargs: Any) -> Any:
                def one(item: Inferred) -> AbstractArray | Cache:
                    if isinstance(item, ArraySpec):
                        return AbstractArray(item, spec.name)
                    return next(given for given in args if isinstance(given, Cache))

                out = spec.infer(problem, Call(args, kwargs, {}))
                return tuple(map(one, out)) if isinstance(out, tuple) else one(out)

            return call

        return bind


# ---- broken ones -----------------------------------------------------------------------------------------------


class WithoutBfloat16(PlainToolchain):
    """Its compiler refuses a product in bfloat16."""

    def binder(self, spec: OpSpec) -> Any:
        def bind(problem: Any, session: Any) -> Bound:
            if spec.name == "linear" and problem.dtype == "bfloat16":
                raise RuntimeError("operand does not fit the scratch memory")
            return PlainToolchain.binder(self, spec)(problem, session)  # type: ignore[no-any-return]

        return bind


class WithoutTargets(PlainToolchain):
    """Compiles for nothing."""

    def targets(self) -> Sequence[str]:
        return ()


class Unmade(PlainToolchain):
    """Cannot be made."""

    def __init__(self, options: Any) -> None:
        raise RuntimeError("the compiler's library is not installed")


class ForAnything(PlainToolchain):
    """Takes any name for a target."""

    def start(self, target: str, world: World) -> PlainTarget:
        return super().start(target if target in DEVICES else "big:2x4", world)


class OfAnySize(PlainToolchain):
    """Takes any layout."""

    def start(self, target: str, world: World) -> PlainTarget:
        return super().start(target, World(threads=world.threads))


class ThatAnswers(PlainToolchain):
    """Its programs return something when they are called."""

    def program(self, shape: StepShape, report: CaptureReport) -> Any:
        program = PlainProgram(shape, report)
        return type("Answers", (), {"shape": shape, "report": report, "__call__": lambda *given: program})()


class OutOfColumn(PlainToolchain):
    """Tells figures that it does not announce."""

    def columns(self) -> Sequence[str]:
        return ("code",)


class OfLesserInstructions(PlainToolchain):
    """Multiplies by wider operands than it states."""

    def columns(self) -> Sequence[str]:
        return ("expected", "found")

    def details(self) -> Mapping[str, str | int]:
        return {"expected": "mma.fp8", "found": "mma.f16"}


class ThatSpills(PlainToolchain):
    """Makes code that holds some of its registers in memory."""

    def columns(self) -> Sequence[str]:
        return ("spills", "stack_bytes")

    def details(self) -> Mapping[str, str | int]:
        return {"spills": 3, "stack_bytes": 12}


class ThatGuesses(PlainToolchain):
    """Counts bytes below 0."""

    def program(self, shape: StepShape, report: CaptureReport) -> PlainProgram:
        return PlainProgram(shape, CaptureReport(math.nan, temporaries=-1))


class OfAnOddProblem(PlainToolchain):
    """Names a problem of another op."""

    def problems(self, kernel: Kernel) -> Sequence[Problem]:
        return REAL["attend"] if kernel.op == "linear" else ()
