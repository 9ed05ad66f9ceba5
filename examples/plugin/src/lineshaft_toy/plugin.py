"""What the entry point names: registers the backend `toy`, and imports nothing but the contract."""

from __future__ import annotations

from lineshaft.contract.backends import BackendInfo, BackendKind
from lineshaft.contract.hooks import hookimpl


@hookimpl
def lineshaft_backends() -> list[BackendInfo]:
    return [
        BackendInfo(
            name="toy",
            probe="lineshaft_toy.probe:probe",
            factory="lineshaft_toy.backend:create",
            options="lineshaft_toy.options:ToyOptions",
            kind=BackendKind.HOST,
            summary="an example: the CPU through PyTorch",
        )
    ]
