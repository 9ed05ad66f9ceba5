"""Programs of static shape: traced once, compiled by the session's lane, run over arrays that stay on the device."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import torch

from lineshaft_contract.sessions import Capture, CaptureReport
from lineshaft_contract.steps import HostStep
from lineshaft_neuron.collectives import NAMESPACE, peers
from lineshaft_neuron.inputs import PackedInputs
from lineshaft_neuron.tracing import Result, trace
from lineshaft_torch.program import ProgramBase

log = logging.getLogger(__name__)


class StaticProgram(ProgramBase):
    """One bucket. Outputs are fresh in each run; caches are written in place.

    `digest` is sha256 of what was compiled, equal on all ranks of a run.
    """

    def __init__(self, session: Any, capture: Capture) -> None:
        super().__init__(session, capture)
        began = time.perf_counter()
        empty = {name: self._zeros(spec) for name, spec in capture.arrays.items()}
        given = [*self._packed.arrays.values(), *empty.values()]
        traced = trace(lambda: self._forward(empty), given)
        self.digest, self._outputs, self._held = traced.digest, traced.outputs, traced.held
        self._collectives = tuple(traced.calls(NAMESPACE))
        session.room.take(capture.shape, traced.workspace)
        before = session.lane.counts.cached
        with peers("a first step", self._collectives):
            self._compiled = session.lane.compile(traced.graph, [*given, *traced.held], traced.written)
        self._take_inputs(HostStep(capture.inputs))
        self._run(empty)
        self.report = CaptureReport(
            time.perf_counter() - began,
            ops=sum(node.op.startswith("call") for node in traced.graph.graph.nodes),
            temporaries=traced.workspace,
            packed=sum(array.nbytes for array in self._packed.arrays.values()),
            collectives=self._collectives,
            cached=session.lane.counts.cached > before,
        )
        log.info(
            "program of %d tokens, %d rows, %d rows of logits: %d calls, %.1f s%s", self.shape.tokens, self.shape.rows,
            self.shape.logits, self.report.ops, self.report.seconds, ", from the cache" if self.report.cached else "",
        )  # fmt: skip

    def _make_inputs(self) -> dict[str, torch.Tensor]:
        self._packed = PackedInputs(self.capture.inputs, self.session.device)
        return {}  # they are cut out where the program is traced

    def _forward(self, arrays: dict[str, torch.Tensor]) -> Result:
        self.step.arrays.update(self._packed.views())
        outputs, after = self._call_forward(self.ops, arrays)
        return outputs, [
            (array, new.arrays[name])
            for old, new in zip(self.session.caches, after, strict=True)
            for name, array in old.arrays.items()
        ]

    def _take_inputs(self, host: HostStep) -> None:
        self._packed.take(host)
        for prepare in self._prepares:
            prepare(host)

    def _run(self, arrays: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        given = list(arrays.values())
        if len(set(map(id, given))) < len(given):  # it is compiled for tensors of which no two are one
            given = [array.detach() for array in given]
        with peers("a step", self._collectives):
            made = self._compiled(*self._packed.arrays.values(), *given, *self._held)
        return dict(zip(self._outputs, made, strict=True))
