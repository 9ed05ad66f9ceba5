"""The one backend that the core brings along, registered like any plugin's."""

from __future__ import annotations

from lineshaft.contract.backends import BackendInfo, BackendKind
from lineshaft.contract.hooks import hookimpl


class ReferencePlugin:
    """Registers the NumPy reference."""

    @hookimpl
    def lineshaft_backends(self) -> list[BackendInfo]:
        return [
            BackendInfo(
                name="numpy",
                probe="lineshaft.reference.backend:probe",
                factory="lineshaft.reference.backend:create",
                options="lineshaft.reference.backend:ReferenceOptions",
                kind=BackendKind.REFERENCE,
                summary="float64/float32 NumPy reference, for checking",
            )
        ]
