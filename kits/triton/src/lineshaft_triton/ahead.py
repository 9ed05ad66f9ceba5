"""Sessions for GPUs that are not here: tensors without values, and programs that are compiled and never run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch

from lineshaft_contract.backends import Capabilities, World
from lineshaft_contract.errors import ContractViolation, Unsupported
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.packing import empty_share
from lineshaft_contract.sessions import (
    DECLARED,
    Capture,
    CaptureReport,
    Handle,
    Packing,
    PlannedOps,
    StepFunction,
    Transfer,
    UncountedMemory,
)
from lineshaft_contract.steps import ArraySpec, HostStep, InputLayout, StepShape
from lineshaft_contract.weights import Checkpoint, Param
from lineshaft_torch.arrays import torch_dtype
from lineshaft_torch.collectives import NCCL, Group, ProcessGroups, members_of
from lineshaft_torch.kernels import collectives
from lineshaft_torch.packing import host_pack
from lineshaft_torch.program import ProgramBase
from lineshaft_torch.session import TorchSession
from lineshaft_triton.compiling import Compiler, Launch, check, describe_launch
from lineshaft_triton.inspection import Code
from lineshaft_triton.interpreting import compiling
from lineshaft_triton.launch import Config, Grid
from lineshaft_triton.targets import Target

COLUMNS = (
    "registers", "scalars", "spills", "stack_bytes", "shared_bytes", "occupancy", "found", "expected", "default",
    "configs",
)  # fmt: skip
"""What is told of a program, over all launches of it: the most of each, the fewest warps, and all classes."""


Packed = dict[tuple[Any, ...], dict[str, torch.Tensor]]
"""The leaves that packings have made of shapes, for which they take their time."""


class ShapesGroup(Group):
    """A group whose other members are not here: it moves nothing, makes results of the right shape and notes which ops
    were asked for."""

    def __init__(self, axes: tuple[str, ...], index: int, size: int, asked: list[str]) -> None:
        super().__init__(axes, index, size, None, own_dtype=True)
        self._asked = asked

    def _wait(self, op: str, submit: Callable[[Any], Any]) -> None:
        self._asked.append(op)


class ShapesGroups(ProcessGroups):
    """The groups of one rank of a mesh that is not here. `asked` has the ops of all of them, in their order."""

    def __init__(self, world: World) -> None:
        super().__init__(world, NCCL, 0.0)
        self.asked: list[str] = []

    def group(self, axis: str | Sequence[str]) -> Group:
        axes = (axis,) if isinstance(axis, str) else tuple(axis)
        ranks = members_of(self._world, axes)
        return ShapesGroup(axes, ranks.index(self._world.rank), len(ranks), self.asked)


class AheadSession(TorchSession):
    """A session on one GPU to compile for: `load` reads no tensor, `capture` compiles, nothing runs."""

    def __init__(self, world: World, target: Target, compiler: Compiler, packed: Packed | None = None) -> None:
        super().__init__("meta", world)
        self.groups: ShapesGroups = ShapesGroups(world)
        self.target, self.compiler = target, compiler
        self.launches: list[Launch] = []
        self._packed: Packed = {} if packed is None else packed

    def launcher(
        self,
        kernel: Any,
        grid: Grid,
        config: Config,
        args: tuple[Any, ...],
        constexprs: Mapping[str, Any],
        expects: str,
    ) -> None:
        """Implements `launch.Launcher`: notes what would be started."""
        if 0 not in grid:
            self.launches.append(describe_launch(kernel, config, args, constexprs, expects))

    def _read(self, param: Param, checkpoint: Checkpoint, packing: Packing) -> dict[str, torch.Tensor]:
        """A parameter's leaves, which depend on its shape, dtype and the groups of its values, and on no value."""
        if packing.pack is None:
            return {"data": torch.empty(param.shape, dtype=torch_dtype(param.dtype), device=self.device)}
        groups = frozenset(getattr(problem, "group_size", 0) for problem in param.problems.values())
        same = (param.shape, param.dtype, packing.layout, groups)
        if same not in self._packed:
            self._packed[same] = host_pack(packing.pack, param, empty_share(param), self.device)
        return self._packed[same]

    @torch.inference_mode()
    def capture(
        self,
        fn: StepFunction,
        shape: StepShape,
        inputs: InputLayout,
        ops: PlannedOps,
        arrays: Mapping[str, ArraySpec] | None = None,
        host_outputs: frozenset[str] = frozenset(),
    ) -> AheadProgram:
        """Raises ContractViolation for a launch that does not compile, or whose code breaks what was stated of it."""
        self.require_changeable("capture")
        with compiling():
            return AheadProgram(self, Capture(fn, shape, inputs, ops, dict(arrays or {}), host_outputs))

    def update(self, weights: Mapping[str, Any]) -> NoReturn:
        refuse("update")

    def read_pages(self, cache: int, ids: Any) -> NoReturn:
        refuse("read_pages")

    def write_pages(self, cache: int, ids: Any, pages: Mapping[str, Any]) -> NoReturn:
        refuse("write_pages")

    def copy_pages(self, group: int, src: Any, dst: Any) -> NoReturn:
        refuse("copy_pages")


class AheadProgram(ProgramBase):
    """A program whose launches were compiled for a GPU that is not here."""

    def __init__(self, session: AheadSession, capture: Capture) -> None:
        super().__init__(session, capture)
        began = time.perf_counter()
        session.launches.clear()
        session.groups.asked.clear()
        arrays = {name: self._zeros(spec) for name, spec in capture.arrays.items()}
        outputs, _ = self._call_forward(self.ops, arrays)
        launches = list(dict.fromkeys(session.launches))
        codes = [session.compiler.compile(launch, session.target) for launch in launches]
        for launch, code in zip(launches, codes, strict=True):
            check(launch, code, session.target)
        self.report = CaptureReport(
            time.perf_counter() - began,
            ops=len(session.launches),
            arguments=nbytes([self._buffer, *session.tensors(), *arrays.values()]),
            outputs=nbytes(outputs.values()),
            collectives=tuple(f"{DECLARED}{op}" for op in dict.fromkeys(session.groups.asked)),
            details=details(launches, codes, session.target),
        )

    def __call__(
        self, host: HostStep, arrays: Mapping[str, Handle] | None = None, after: Sequence[Transfer] = ()
    ) -> NoReturn:
        refuse("a program's call")


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def details(launches: Sequence[Launch], codes: Sequence[Code], target: Target) -> dict[str, str | int]:
    """The figures of COLUMNS. Raises ContractViolation for a program that starts no kernel."""
    if not launches:
        raise ContractViolation("the program starts no kernel; a kernel of this kit has to start one by launch.launch")
    found = sorted({name for code in codes for name in code.classes})
    expected = sorted({name for launch in launches for name in launch.expects.split("+")} - {""})
    figures: dict[str, str | int] = {"registers": max(code.registers for code in codes)}
    if target.vendor == "amd":
        figures["scalars"] = max(code.scalars for code in codes)
    return figures | {
        "spills": max(code.spills for code in codes),
        "stack_bytes": max(code.stack for code in codes),
        "shared_bytes": max(code.shared for code in codes),
        "occupancy": f"{min(code.occupancy for code in codes)}/{target.sm_warps}",
        "found": "+".join(found) or "none",
        "expected": "+".join(expected) or "none",
        "default": "yes" if all(launch.default for launch in launches) else "no",
        "configs": "; ".join(dict.fromkeys(launch.config for launch in launches)),
    }


@dataclass(frozen=True)
class AheadBackend:
    """A plugin's backend on a target that is not here: its Triton kernels, which are all that there is to compile, and
    among several ranks the collectives of the torch kit, of which a library's code is declared.
    Implements `lineshaft_contract.backends.Backend`."""

    name: str
    world: World
    target: Target
    compiler: Compiler
    capabilities: Capabilities
    packed: Packed = field(default_factory=dict)
    memory: UncountedMemory = field(default_factory=UncountedMemory)

    def kernels(self) -> Sequence[Kernel]:
        from lineshaft_triton.kernels import triton_kernels

        kernels = triton_kernels(self.name, self.target)
        mesh = [] if self.world.size == 1 else [recipe(self.name) for recipe in collectives.recipes()]
        return [*(replace(kernel, supports=_for_compiler(kernel.supports)) for kernel in kernels), *mesh]

    def session(self, rank: int) -> AheadSession:
        return AheadSession(self.world, self.target, self.compiler, self.packed)


def _for_compiler(supports: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    """What a kernel says of a problem where nothing is interpreted."""

    def asked(problem: Any) -> str | None:
        with compiling():
            return supports(problem)

    return asked


def refuse(what: str) -> NoReturn:
    """Raises Unsupported."""
    raise Unsupported(f"{what}: the session compiles ahead of time, for a GPU that is not here; nothing runs on it")
