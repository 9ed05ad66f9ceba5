"""Bound kernels of this kit, and how they make themselves known to a recording session.

The planner may wrap a bound kernel in any Python it likes: while a session records, the kernel reports itself, so that
a replay calls the kernel and nothing around it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lineshaft_contract.binding import DENSE, Recipe, dense, stateless, with_problem
from lineshaft_contract.kernels import Kernel, always

__all__ = ["DENSE", "BoundKernel", "Recipe", "dense", "recipe", "stateless", "with_problem"]


class BoundKernel:
    """`run(*args, **kwargs)` under a session. With `out`, `run` also takes `out=`: a tensor or a tuple of tensors that
    it writes its results to, and returns, instead of allocating them. `name` and `op` are those of its Kernel."""

    __slots__ = ("capturable", "name", "op", "out", "run", "session")

    def __init__(
        self,
        run: Callable[..., Any],
        session: Any,
        out: bool,
        *,
        name: str = "",
        op: str = "",
        capturable: bool = True,
    ) -> None:
        self.run = run
        self.session = session
        self.out = out
        self.name, self.op, self.capturable = name or getattr(run, "__name__", "a kernel"), op, capturable

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorder = self.session.recorder
        return self.run(*args, **kwargs) if recorder is None else recorder.call(self, args, kwargs)


def always_capturable(problem: Any) -> bool:
    """The `capturable` of a kernel whose work depends on shapes only."""
    return True


def recipe(
    name: str,
    op: str,
    bind: Callable[[Any, Any], Callable[..., Any]],
    *,
    out: bool = False,
    capturable: Callable[[Any], bool] = always_capturable,
    **fields: Any,
) -> Recipe:
    """A Recipe for `op`. `bind(problem, session)` returns a plain function, which is wrapped as a BoundKernel.

    Where `capturable(problem)` is false, the kernel never becomes part of a device's graph: it reads values on the host
    or launches what depends on them.

    Every kernel of a recipe declines to compute in a dtype of eight bits; `supports` says what else it declines.
    """
    declines = fields.pop("supports", always)

    def supports(problem: Any) -> str | None:
        if problem.dtype.startswith("float8"):
            return f"computes in floats of 16 bits and more, not in {problem.dtype}"
        return declines(problem)

    def bind_recorded(problem: Any, session: Any) -> BoundKernel:
        return BoundKernel(bind(problem, session), session, out, name=name, op=op, capturable=capturable(problem))

    return lambda backend: Kernel(name=name, op=op, backend=backend, bind=bind_recorded, supports=supports, **fields)
