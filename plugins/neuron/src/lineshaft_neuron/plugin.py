"""What the entry point names: registers the backend, and imports nothing but the contract."""

from __future__ import annotations

from lineshaft_contract.backends import BackendInfo
from lineshaft_contract.hooks import hookimpl


@hookimpl
def lineshaft_backends() -> list[BackendInfo]:
    return [
        BackendInfo(
            name="neuron",
            probe="lineshaft_neuron.probe:probe",
            factory="lineshaft_neuron.backend:create",
            options="lineshaft_neuron.options:NeuronOptions",
            summary="AWS Trainium and Inferentia through torch-neuronx, and a stand-in for them where asked",
        )
    ]
