"""Programs of a device: tapes whose calls are captured as graphs, and forwards that run anew; both submit and return.

Own staging, graphs and what becomes of a step's results. Know streams and events through the device layer only.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lineshaft_contract.errors import ContractViolation
from lineshaft_contract.ops import all_ops
from lineshaft_contract.sessions import Capture, Transfer
from lineshaft_contract.steps import HostStep
from lineshaft_torch.arrays import HostArray, host_view
from lineshaft_torch.device import Event, Graph, Pool
from lineshaft_torch.program import DeviceArray, EagerProgram, ProgramBase, StepPending, TapeProgram
from lineshaft_torch.recording import TapeCall
from lineshaft_torch.schedule import Move, Piece, cut, moves_of, play
from lineshaft_torch.session import is_out_of_memory, typed_memory

ATTENTION = frozenset({"attend", "latent_attend"})
"""Ops whose work depends on the lengths of a step: made anew by piecewise programs."""
COLLECTIVES = frozenset(name for name, spec in all_ops().items() if spec.collective)


class EventTransfer:
    """Pages on their way: done when the device has passed an event."""

    error: BaseException | None = None

    def __init__(self, session: Any, event: Event) -> None:
        self.session, self._event = session, event

    def done(self) -> bool:
        try:
            return self.session.closed or self._event.query()
        except RuntimeError as error:
            self.error = error
            return True

    def wait(self) -> None:
        try:
            self.session.reach(self._event)
        except BaseException as error:
            self.error = error
            raise


class DevicePending(StepPending):
    """A submitted step; its results for the host lie in pinned memory of its own once the device has passed `ended`."""

    def __init__(
        self,
        session: Any,
        handles: Mapping[str, DeviceArray],
        copies: Mapping[str, torch.Tensor],
        span: tuple[Event, Event],
        done: Event,
    ) -> None:
        self._session, self._handles, self._copies = session, handles, copies
        self._span, self._done = span, done

    @property
    def kernel_seconds(self) -> float:  # type: ignore[override]
        """Device time from the step's inputs to its outputs; waits for it."""
        self._session.reach(self._done)
        return self._span[0].seconds_until(self._span[1])

    def result(self, name: str) -> HostArray:
        """A private host copy; waits for the step. Raises ContractViolation for a stale or unknown output."""
        if name not in self._copies:
            return self._session.fetch(self.handle(name).current())
        self._session.reach(self._done)
        return host_view(self._copies[name]).copy()


class SubmittedProgram(ProgramBase):
    """A program that a device works through after its call has returned, in the order of the main stream."""

    def __init__(self, session: Any, capture: Capture) -> None:
        super().__init__(session, capture)
        self._inputs = session.staging(self._buffer)

    def _submit(self, host: HostStep, given: dict[str, torch.Tensor]) -> DevicePending:
        layer = self.session.layer
        with layer.on(layer.main):
            self._take_inputs(host)
            self._take_arrays(given)
            began = layer.record(timing=True)
            outputs = self._run(given)
            ended = layer.record(timing=True)
            copies = {name: self._to_pinned(outputs[name]) for name in self.capture.host_outputs}
            return DevicePending(self.session, self._handles(outputs), copies, (began, ended), layer.record())

    def _take_inputs(self, host: HostStep) -> None:
        self._inputs.upload(host.buffer[: self._buffer.numel()])
        for prepare in self._prepares:
            prepare(host)

    def _take_arrays(self, given: dict[str, torch.Tensor]) -> None:
        """Put the arrays where the program reads them."""

    def _to_pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        pinned: torch.Tensor = self.session.layer.pinned(tensor)
        self.session.layer.copy(pinned, tensor)
        return pinned

    def _taken(self, handle: Any) -> torch.Tensor:
        """A handle's tensor: it is read in the main stream, before anything overwrites it."""
        return handle.current()

    def _follow(self, transfer: Transfer) -> None:
        """The session's own transfers are in the main stream too."""
        if not isinstance(transfer, EventTransfer) or transfer.session is not self.session:
            transfer.wait()


class AnewProgram(SubmittedProgram, EagerProgram):
    """Runs the forward anew in each step."""

    def release(self) -> None:
        """Nothing is held."""

    def holds_graphs(self) -> bool:
        """It has none."""
        return False


class GraphProgram(SubmittedProgram, TapeProgram):
    """A tape over fixed addresses, cut into graphs.

    `program = "graph"` of the session makes one graph of a step without a prefill, and pieces of others; "piecewise"
    always makes pieces; "tape" makes every call anew. Calls of attention are between pieces, and calls of kernels that
    are not capturable always are. Graphs are captured by `make_ready`, with the program, and again when the session
    freezes or the program is called, if the arena has moved since: it grows with the largest program.
    """

    def __init__(self, session: Any, capture: Capture) -> None:
        super().__init__(session, capture)
        mode = session.options.program
        whole = mode == "graph" and capture.shape.max_query <= 1

        def graphed(call: TapeCall) -> bool:
            return mode != "tape" and call.capturable and (whole or call.op not in ATTENTION)

        self._pieces = [(piece, moves_of(piece.calls, self._beside())) for piece in cut(self._calls, graphed)]
        self._work: list[Graph | Sequence[Move]] = []
        self._address = -1
        counts = {kind: [len(p.calls) for p, _ in self._pieces if p.graphed == kind] for kind in (True, False)}
        details = {"graphs": len(counts[True]), "graph_calls": sum(counts[True]), "eager_calls": sum(counts[False])}
        used = tuple(call.op for call in self._calls if call.op in COLLECTIVES)
        self.report = replace(self.report, details=details, collectives=used)

    def _beside(self) -> frozenset[str]:
        return COLLECTIVES if self.session.options.overlap else frozenset()

    @torch.inference_mode()
    def make_ready(self) -> None:
        """Capture what has not been captured over the arena as it lies now. Runs the empty step once before, eagerly.

        Raises ContractViolation for a call that no graph can hold; it names the kernel and the operator.
        """
        if self._address == self.session.arena.data_ptr():
            return
        began, layer = time.perf_counter(), self.session.layer
        self.release()
        with layer.on(layer.main), typed_memory(f"the graphs of a step of {self.shape.tokens} tokens"):
            self._empty_step()
            self.runs += 1  # handles of earlier runs are overwritten
            for _, moves in self._pieces:
                play(layer, moves)
            self.session.settle()
            before, pool = layer.reserved(), self.session.graph_pool()
            try:
                for piece, moves in self._pieces:
                    self._work.append(self._captured(piece, moves, pool) if piece.graphed else moves)
            except BaseException:
                self.release()
                raise
        self._address = self.session.arena.data_ptr()
        details = {**self.report.details, "pool": layer.reserved() - before}
        self.report = replace(self.report, seconds=self.report.seconds + time.perf_counter() - began, details=details)

    def _captured(self, piece: Piece, moves: Sequence[Move], pool: Pool) -> Graph:
        layer, watch = self.session.layer, Watch()
        try:
            with layer.capture(pool) as graph, watch:
                play(layer, moves, watch.begin)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise self._uncapturable(watch, error) from error
        return graph

    def _uncapturable(self, watch: Watch, error: RuntimeError) -> ContractViolation:
        call, tokens = watch.call, self.shape.tokens
        what = "a step" if call is None else f"kernel {call.name!r}" + (f" for {call.op}" if call.op else "")
        why = " ".join(str(error).split())
        where = f", because of {watch.failed}" if watch.failed else ""
        return ContractViolation(
            f"{what}, in a program of {tokens} tokens, cannot be captured as a graph{where} ({why}); choose another "
            'kernel, say in its recipe that it is not capturable, or set program = "tape"'
        )

    def _take_arrays(self, given: dict[str, torch.Tensor]) -> None:
        for name, tensor in given.items():
            self.session.layer.copy(self._arrays[name], tensor)

    def _run(self, arrays: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        for work in self._work:
            if isinstance(work, Sequence):
                play(self.session.layer, work)
            else:
                work.replay()
        return self._outputs

    def release(self) -> None:
        """Free the graphs."""
        for graph in self._graphs():
            graph.reset()
        self._work, self._address = [], -1

    def holds_graphs(self) -> bool:
        """Whether it has memory of the pool."""
        return bool(self._graphs())

    def _graphs(self) -> list[Graph]:
        return [work for work in self._work if not isinstance(work, Sequence)]


class Watch(TorchDispatchMode):
    """Remembers which call is being captured, and the operator that raised."""

    def __init__(self) -> None:
        super().__init__()
        self.call: TapeCall | None = None
        self.failed = ""

    def begin(self, call: TapeCall) -> None:
        self.call = call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except Exception:
            self.failed = str(func)
            raise
