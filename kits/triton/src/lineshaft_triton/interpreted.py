"""Sessions without a GPU: kernels run in Triton's interpreter, on a device of fakes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from lineshaft_torch.device_session import DeviceSession
from lineshaft_triton.launch import Config, Grid, run


class InterpretedSession(DeviceSession):
    """A session whose device sees a kernel as one piece of work: not the operators that the interpreter is made of."""

    def launcher(
        self,
        kernel: Any,
        grid: Grid,
        config: Config,
        args: tuple[Any, ...],
        constexprs: Mapping[str, Any],
        expects: str,
    ) -> None:
        """Implements `launch.Launcher`."""
        self.opaque(partial(run, kernel, grid, config, args, constexprs, expects))
