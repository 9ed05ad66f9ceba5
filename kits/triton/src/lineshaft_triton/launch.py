"""How every kernel of this kit is started: run (compiled or interpreted), or noted by a session that compiles ahead.

Knows no kernel. A session may have a `launcher`; one without runs its kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

Grid = tuple[int, ...]


@dataclass(frozen=True)
class Config:
    """One way to cut a kernel's work up, on one target.

    block   tile sizes: the kernel's constexprs of these names
    extra   what only one vendor's compiler takes (waves_per_eu, maxnreg, ...)
    unit    the matrix instructions its tiles use, where they are not the target's best ("": those)
    default whether a plan takes it unasked: such a configuration may spill no register
    """

    block: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    extra: Mapping[str, Any] = field(default_factory=dict)
    unit: str = ""
    default: bool = True

    @property
    def text(self) -> str:
        """As it is shown and hashed: "block_m=16 block_n=64 warps=4 stages=2"."""
        sizes = {**self.block, "warps": self.num_warps, "stages": self.num_stages, **self.extra}
        return " ".join(f"{name.lower()}={value}" for name, value in sizes.items())


class Launcher(Protocol):
    """Starts a kernel. `args` are its arguments by position, `constexprs` the rest by name; `expects` is the class of
    matrix instructions (`Target.expects`) that its code must hold on the target, "" for none."""

    def __call__(
        self,
        kernel: Any,
        grid: Grid,
        config: Config,
        args: tuple[Any, ...],
        constexprs: Mapping[str, Any],
        expects: str,
    ) -> None: ...


def run(
    kernel: Any, grid: Grid, config: Config, args: tuple[Any, ...], constexprs: Mapping[str, Any], expects: str
) -> None:
    """The launcher of sessions whose device, or interpreter, is here. An empty grid starts nothing."""
    if 0 in grid:
        return
    kernel[grid](
        *args, **constexprs, **config.block, **config.extra, num_warps=config.num_warps, num_stages=config.num_stages
    )


def launch(
    session: Any, kernel: Any, grid: Grid, config: Config, *args: Any, expects: str = "", **constexprs: Any
) -> None:
    """Start `kernel` on a grid of up to three dims, with the tile sizes of `config` among its constexprs."""
    launcher: Launcher = getattr(session, "launcher", run)
    launcher(kernel, grid, config, args, constexprs, expects)
