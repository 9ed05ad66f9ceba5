"""The backend `numpy`: capabilities, options, memory and one kernel per op, made from the op's own reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict

from lineshaft_contract.backends import Capabilities, DeterminismClaims, Probe, World
from lineshaft_contract.errors import InvalidValue
from lineshaft_contract.kernels import Bound, Kernel, always
from lineshaft_contract.ops import all_ops
from lineshaft_contract.ops.quantize import BLOCK_SCHEMES
from lineshaft_contract.ops.spec import Numerics, OpSpec, StepArg
from lineshaft_contract.problems import LinearProblem
from lineshaft_contract.reference.session import ReferenceSession, ValueArray
from lineshaft_contract.sessions import Cache, Memory, UncountedMemory
from lineshaft_contract.steps import StepInputs
from lineshaft_contract.weights import Weight

NAME = "numpy"


class ReferenceOptions(BaseModel):
    """The reference backend has no options."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def probe() -> Probe:
    """NumPy is a dependency of the contract: always usable."""
    return Probe(True, "NumPy is part of every installation", ("host",))


@dataclass(frozen=True)
class ReferenceBackend:
    """A backend on NumPy arrays; `determinism` holds because every row is computed on its own."""

    name: str
    capabilities: Capabilities
    memory: Memory

    def kernels(self) -> Sequence[Kernel]:
        return [reference_kernel(spec, self.name) for spec in all_ops().values()]

    def session(self, rank: int) -> ReferenceSession:
        return ReferenceSession()


def create(options: ReferenceOptions, world: World) -> ReferenceBackend:
    """Raises InvalidValue for more than one worker."""
    if world.size > 1:
        raise InvalidValue(f"backend 'numpy' runs one worker, the layout has {world.size}; set every degree to 1")
    capabilities = Capabilities(dtypes=("float64", "float32", "bfloat16"), determinism=DeterminismClaims(run=True))
    return ReferenceBackend(NAME, capabilities, UncountedMemory())


def reference_kernel(spec: OpSpec, backend: str = NAME) -> Kernel:
    """An op's reference as a kernel of `backend` that takes every problem; of collectives, those of one member. It
    wants a ReferenceSession."""

    def bind(problem: Any, session: Any) -> Bound:
        num = Numerics.of(problem.dtype, spec.accumulate)

        def call(*args: Any, **kwargs: Any) -> Any:
            given = {name: bare(value) for name, value in kwargs.items()}
            if spec.collective:  # its reference takes and returns a list of members: this one alone
                return dress(spec.reference(problem, [bare(args[0])], *args[1:], num=num, **given)[0], None)
            cache = next((item for item in args if isinstance(item, Cache)), None)
            return dress(spec.reference(problem, *map(bare, args), num=num, **given), cache)

        return call

    everything = frozenset(spec.problem.__dataclass_fields__)
    supports = one_member if spec.collective else numbers_alone if spec.problem is LinearProblem else always
    return Kernel(
        name=f"{backend}.{spec.name}", op=spec.name, backend=backend, bind=bind, handles=everything, supports=supports
    )


def one_member(problem: Any) -> str | None:
    """The `supports` of collectives among workers of which there is one."""
    return None if problem.size == 1 else f"the backend runs one worker, not the {problem.size} of this group"


def numbers_alone(problem: LinearProblem) -> str | None:
    """The `supports` of products: a session of this backend holds no blocks, only the numbers that they stand for."""
    return f"takes no blocks of {problem.scheme}" if problem.scheme in BLOCK_SCHEMES else None


def bare(item: Any) -> Any:
    """What a reference takes for what a forward passes."""
    if isinstance(item, ValueArray):
        return item.values
    if isinstance(item, Weight):
        return item.arrays["data"]
    if isinstance(item, Cache):
        return item.arrays
    if isinstance(item, StepInputs):
        return StepArg(bare(item.arrays), item.shape)
    if isinstance(item, Mapping):
        return {name: bare(value) for name, value in item.items()}
    if isinstance(item, (list, tuple)):
        return [bare(value) for value in item]
    return item


def dress(out: Any, cache: Cache | None) -> Any:
    """What a forward gets for what a reference returns; pages by name are those of `cache` from now on."""
    if isinstance(out, tuple):
        return tuple(dress(item, cache) for item in out)
    if isinstance(out, Mapping):
        assert cache is not None
        return replace(cache, arrays=dict(out))
    return ValueArray(out)
