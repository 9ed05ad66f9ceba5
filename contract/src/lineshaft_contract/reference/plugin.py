"""The reference as a plugin: the one backend that needs no distribution of its own, and is always there."""

from __future__ import annotations

from lineshaft_contract.backends import BackendInfo, BackendKind
from lineshaft_contract.hooks import hookimpl


@hookimpl
def lineshaft_backends() -> list[BackendInfo]:
    return [
        BackendInfo(
            name="numpy",
            probe="lineshaft_contract.reference.backend:probe",
            factory="lineshaft_contract.reference.backend:create",
            options="lineshaft_contract.reference.backend:ReferenceOptions",
            kind=BackendKind.REFERENCE,
            summary="float64/float32 NumPy reference, for checking",
        )
    ]
