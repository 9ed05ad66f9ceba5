"""Stand-ins for the vendor's package: its entry points with the signatures that its documentation gives, over plain
torch on the host. What a compiler without side effects loses there, is lost here.

torch-neuronx 2.9 of Neuron 2.32 (pages "PyTorch NeuronX Tracing API for Inference" and "Direct HBM Tensor Allocation
with Neuron" of the vendor's documentation; its T5 tutorial for the keys of input_output_aliases).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SIGNATURES = {
    "trace": (
        "(func, example_inputs, *_, input_output_aliases={}, compiler_workdir=None, compiler_args=None, "
        "partitioner_config=None, inline_weights_to_neff=True, cpu_backend=False)"
    ),
    "move_trace_to_device": "(trace, device_id)",
}
"""As `inspect.signature` spells what the pages give."""


class Traced(torch.nn.Module):
    """A traced program: fixed shapes, inputs that are never changed, and state that only aliased outputs change."""

    def __init__(self, func: Any, examples: Sequence[torch.Tensor], aliases: dict[torch.Tensor, int], own: bool):
        super().__init__()
        object.__setattr__(self, "func", func)  # compiled: none of its parameters is one of the program's
        names = {parameter: name for name, parameter in func.named_parameters()}
        self.names = [names[key] for key in aliases]
        self.numbers = list(aliases.values())
        self.states = torch.nn.ParameterList(
            [torch.nn.Parameter(key.detach().clone(), requires_grad=False) if own else key for key in aliases]
        )
        self.shapes = [(example.shape, example.dtype) for example in examples]
        self.core: int | None = None

    def forward(self, *inputs: torch.Tensor) -> Any:
        if [(tensor.shape, tensor.dtype) for tensor in inputs] != self.shapes:
            raise RuntimeError(f"expected {self.shapes}, given {[(t.shape, t.dtype) for t in inputs]}")
        outputs = self.run(*inputs)
        for number, state in zip(self.numbers, self.states, strict=True):
            if (outputs[number].shape, outputs[number].dtype) != (state.shape, state.dtype):
                raise RuntimeError("an aliased output has another shape or dtype than its input")
            state.copy_(outputs[number])
        return outputs

    def run(self, *inputs: torch.Tensor) -> Any:
        held = {name: state.clone() for name, state in zip(self.names, self.states, strict=True)}
        outputs = torch.func.functional_call(self.func, held, tuple(tensor.clone() for tensor in inputs))
        return outputs.clone() if isinstance(outputs, torch.Tensor) else tuple(output.clone() for output in outputs)


class FakeNeuronx:
    """The package. `own_state`: traced programs keep state of their own, not the tensors that they were given. `fault`:
    what the compiler says instead of compiling."""

    def __init__(self, own_state: bool = False, fault: str = "") -> None:
        self.own_state, self.fault = own_state, fault
        self.calls: list[dict[str, Any]] = []
        self.traced: list[Traced] = []

    def module(self) -> ModuleType:
        module = ModuleType("torch_neuronx")

        def trace(
            func,
            example_inputs,
            *_,
            input_output_aliases={},  # noqa: B006 - as the vendor has it
            compiler_workdir=None,
            compiler_args=None,
            partitioner_config=None,
            inline_weights_to_neff=True,
            cpu_backend=False,
        ):
            self.calls.append({"args": len(_), "aliases": input_output_aliases, "compiler_args": compiler_args})
            if self.fault:
                raise RuntimeError(self.fault)
            if any(example.device.type != "cpu" for example in example_inputs):
                raise RuntimeError("example inputs are taken from the host")
            made = Traced(func, example_inputs, dict(input_output_aliases), self.own_state)
            outputs = made.run(*example_inputs)
            if any(number >= len(outputs) for number in made.numbers):
                raise RuntimeError("an alias names an output that is not there")
            self.traced.append(made)
            return made

        def move_trace_to_device(trace, device_id):
            trace.core = device_id

        vars(module).update(trace=trace, move_trace_to_device=move_trace_to_device)
        return module


def write_package(
    folder: Path, name: str = "torch_neuronx", version: str = "2.9.0.2.15.32035", source: str = "", told: str = ""
) -> None:
    """An installed package: its module, and the metadata that pip would have written."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    head = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}"
    (info / "METADATA").write_text(f"{head}\n\n{told}\n")


PLACEHOLDER = {
    "version": "1.0",
    "source": 'raise ImportError("WRONG PACKAGE. Please install the package from Neuron Repository")',
    "told": "WRONG PACKAGE. Please install the package from Neuron Repository",
}
"""What the public index has under the name."""


def write_machine(root: Path, devices: int = 2, cores: str = "8", driver: bool = True, nodes: bool = True) -> Any:
    """Folders like those of a machine with Neuron devices."""
    from lineshaft_neuron.probe import Machine

    (root / "dev").mkdir(parents=True)
    (root / "sys").mkdir()
    lines = ["Character devices:", "  1 mem", *(["244 neuron"] if driver else []), "", "Block devices:"]
    (root / "devices").write_text("\n".join(lines))
    for number in range(devices):
        architecture = root / "sys" / f"neuron{number}" / "info" / "architecture"
        architecture.mkdir(parents=True)
        (architecture / "device_name").write_text("Trainium2\n")
        (root / "sys" / f"neuron{number}" / "core_count").write_text(f"{cores}\n")
        if nodes:
            (root / "dev" / f"neuron{number}").touch()
    return Machine(majors=root / "devices", devices=root / "sys", nodes=root / "dev")


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """No torch_neuronx is imported when the test begins, and none is left of it."""
    monkeypatch.setitem(sys.modules, "torch_neuronx", None)  # so that the end restores what was, or nothing
    monkeypatch.delitem(sys.modules, "torch_neuronx")
