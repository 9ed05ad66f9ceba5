"""What an executor does, how one is chosen, and how workers are made to agree before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lineshaft.config import EngineConfig
from lineshaft.errors import InvalidValue, LayoutError, PlanMismatch
from lineshaft.registry import Registry
from lineshaft.runner.messages import ChoiceMessage, Settled, Sizes, Started, StepMessage, StepResult
from lineshaft.runner.setup import degrees_of
from lineshaft.runner.worker import Progress


class Executor(Protocol):
    """Runs the same step on every rank of each replica and brings back each replica's result.

    A step is submitted, then told how its tokens are chosen, then collected; only then is the next one submitted. A
    step that the engine was interrupted in is given up: the next one is submitted in its place. Neither of the first
    two waits for the step where the backend or the workers run beside the engine. Their sequences hold one message per
    dp replica.
    """

    beside: bool  # whether workers run beside the engine's thread

    def size(self) -> list[Sizes]: ...  # by rank

    def start(self, pages: tuple[int, ...], progress: Progress) -> list[Started]: ...  # by rank

    def submit(self, steps: Sequence[StepMessage]) -> None: ...

    def choose(self, choices: Sequence[ChoiceMessage]) -> None: ...

    def collect(self) -> list[StepResult]: ...  # one per dp replica

    def close(self) -> None: ...


class Forwarding:
    """An executor that hands every call on to another, `inner`, for those that watch some of them."""

    def __init__(self, inner: Executor) -> None:
        self.inner, self.beside = inner, inner.beside

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@dataclass(frozen=True)
class ExecutorInfo:
    """An executor as core or a plugin registers it.

    `most_workers` bounds the ranks, each of which has a worker of its own; None: there is no bound. `one_program` says
    that it also runs backends of which one worker runs a whole replica (`BackendInfo.single_program`), at any layout.
    """

    name: str
    make: Callable[[EngineConfig, Registry], Executor]
    most_workers: int | None = None
    one_program: bool = False


def builtin_executors() -> tuple[ExecutorInfo, ...]:
    """The executors that core itself brings, in the order in which "auto" tries them."""
    from lineshaft.executors.inproc import InprocExecutor
    from lineshaft.executors.process import ProcessExecutor, most_workers

    return (
        ExecutorInfo("inproc", InprocExecutor, most_workers=1, one_program=True),
        ExecutorInfo("process", ProcessExecutor, most_workers()),
    )


def one_program(config: EngineConfig, registry: Registry) -> bool:
    """Whether one worker of the configured backend runs all ranks of a replica. Raises BackendError."""
    return registry.select(config.backend, config.backend_options).single_program


def make_executor(config: EngineConfig, registry: Registry) -> Executor:
    """The configured executor, or for "auto" the first that runs as many workers as the layout has.

    Raises InvalidValue for an unknown name, LayoutError where it runs fewer workers; then nothing was started.
    """
    known: dict[str, ExecutorInfo] = {info.name: info for info in (*builtin_executors(), *registry.executors())}
    if config.executor != "auto" and config.executor not in known:
        raise InvalidValue(f"executor = {config.executor!r}: known are auto, {', '.join(known)}")
    asked = list(known.values()) if config.executor == "auto" else [known[config.executor]]
    degrees, one = degrees_of(config), one_program(config, registry)
    for info in asked:
        if info.one_program if one else info.most_workers is None or degrees.world <= info.most_workers:
            return info.make(config, registry)
    if one:
        raise LayoutError(
            f"executor = {config.executor!r}: backend {config.backend!r} runs all ranks of a replica in one program, "
            "which that executor cannot; choose 'inproc' or 'auto'"
        )
    most = ", ".join(f"{info.name!r} {info.most_workers}" for info in asked)
    raise LayoutError(
        f"layout {degrees} has {degrees.world} workers; executor = {config.executor!r} runs at most so many on this "
        f"machine: {most}; lower a degree, or choose another executor"
    )


def size_alike(size: Callable[[Settled], list[Sizes]]) -> list[Sizes]:
    """By rank, what `size` gives once all have settled ties of kernels as rank 0 has."""
    found = size(Settled())
    choices = found[0].plan.choices
    return found if all(each.plan.choices == choices for each in found) else size(Settled(choices))


def agree(sizes: Sequence[Sizes]) -> tuple[int, ...]:
    """The pages of each group that every rank can hold. Raises PlanMismatch unless all plans are the same."""
    hashes: dict[str, int] = {}
    for rank, size in enumerate(sizes):
        hashes.setdefault(size.plan.hash, rank)
    if len(hashes) > 1:
        shown = ", ".join(f"rank {rank}: {name[:16]}" for name, rank in hashes.items())
        raise PlanMismatch(
            f"ranks resolved different plans ({shown}); install the same versions of every plugin on all of them"
        )
    return tuple(min(column) for column in zip(*(size.pages for size in sizes), strict=True))
