"""The hooks by which plugins are discovered. Hooks run before the first step, never in one.

A plugin is a module or object named by the entry-point group `lineshaft.backends`; it decorates functions of these
names with `hookimpl`. All hooks return sequences; unknown `lineshaft_` names are reported as mistakes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from lineshaft_contract.backends import BackendInfo
    from lineshaft_contract.kernels import Kernel
    from lineshaft_contract.ops import OpSpec

PROJECT = "lineshaft"
ENTRY_POINT_GROUP = "lineshaft.backends"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class HookSpecs:
    """Everything that a plugin may say."""

    @hookspec
    def lineshaft_backends(self) -> Sequence[BackendInfo]:  # type: ignore[empty-body]
        """Backends that this plugin registers."""

    @hookspec
    def lineshaft_kernels(self, backend: str) -> Sequence[Kernel]:  # type: ignore[empty-body]
        """Further kernels for a backend of that name, this plugin's own or another's."""

    @hookspec
    def lineshaft_ops(self) -> Sequence[OpSpec]:  # type: ignore[empty-body]
        """Further ops, each with its reference, cases and tolerance."""

    @hookspec
    def lineshaft_models(self) -> Sequence[Any]:  # type: ignore[empty-body]
        """Further model families (`lineshaft.models.ModelFamily`)."""

    @hookspec
    def lineshaft_quant_schemes(self) -> Sequence[Any]:  # type: ignore[empty-body]
        """Further block-quantization schemes (`lineshaft.weights.decoded.Scheme`)."""

    @hookspec
    def lineshaft_checkpoints(self) -> Sequence[Any]:  # type: ignore[empty-body]
        """Further checkpoint formats (`lineshaft.weights.checkpoint.CheckpointFormat`)."""

    @hookspec
    def lineshaft_executors(self) -> Sequence[Any]:  # type: ignore[empty-body]
        """Further executors (`lineshaft.executors.ExecutorInfo`)."""

    @hookspec
    def lineshaft_plan_frozen(self, plan: Any) -> None:
        """Observe a plan that was just frozen; nothing returned is used."""
