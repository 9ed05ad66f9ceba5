"""A plugin `far` for tests: a backend whose devices are nowhere, with a toolchain that does what an option says."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict

from lineshaft_conformance.mutants.toolchains import PlainTarget, PlainToolchain
from lineshaft_contract.backends import BackendInfo, Probe, World
from lineshaft_contract.hooks import hookimpl
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops import OpSpec
from lineshaft_contract.problems import AttendProblem, Problem


class Options(BaseModel):
    """`does` is what goes wrong; with `here` the backend runs without a device, as far as it can."""

    model_config = ConfigDict(extra="forbid")
    does: str = ""
    here: bool = False


class Toolchain(PlainToolchain):
    """Right, unless told otherwise."""

    backend = "far"

    def __init__(self, options: Any) -> None:
        self.does = options.does

    def targets(self) -> Sequence[str]:
        return () if self.does == "no targets" else super().targets()

    def problems(self, kernel: Kernel) -> Sequence[Problem]:
        if kernel.op == "latent_attend":
            return (
                AttendProblem(
                    dtype="bfloat16", q_heads=16, kv_heads=1, qk_dim=192, v_dim=128, page_size=16, scale=0.07,
                    kv_dtype="bfloat16", tokens=32, rows=32, pages=512, max_query=1,
                ),
            )  # fmt: skip
        return super().problems(kernel)

    def kernel(self, spec: OpSpec) -> Kernel:
        made = super().kernel(spec)
        if spec.name == "rope":
            made = replace(made, priority=10, version="3", layout="", options={"block": "128"})
        if spec.name == "add" and self.does == "declines":
            return replace(made, supports=lambda problem: "adds on no device")
        return made

    def binder(self, spec: OpSpec) -> Any:
        if spec.name != "linear" or not self.does.startswith("linear"):
            return super().binder(spec)

        def bind(problem: Any, session: Any) -> Any:
            if self.does == "linear dies":
                print("last words", flush=True)
                os._exit(7)
            if self.does == "linear is interrupted":
                raise KeyboardInterrupt
            raise RuntimeError("out of\nscratch memory")

        return bind

    def details(self) -> Mapping[str, str | int]:
        return {"scratch": 512 if self.does == "more scratch" else 256}


def probe() -> Probe:
    """No device, ever."""
    return Probe(False, "no device of it is here", unless={"here": "true"})


def factory(options: Options, world: World) -> PlainTarget:
    """What an option makes of it, where it is said to be here."""
    assert options.here, "the factory needs a device"
    return Toolchain(options).start("big:2x4", world)


@hookimpl
def lineshaft_backends() -> list[BackendInfo]:
    def entry(name: str, **more: Any) -> BackendInfo:
        return BackendInfo(name, "far:probe", "far:factory", "far:Options", summary="nowhere", **more)

    single = entry("far-single", toolchain="far:Toolchain", single_program=True)
    return [entry("far", toolchain="far:Toolchain"), single, entry("toolless")]
