"""Sessions on a device: calls return at once, order is kept, and what goes wrong is told to whoever waits."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from lineshaft.errors import ContractViolation, OutOfMemory, SessionClosed, SessionPoisoned, WorkerDied
from lineshaft_contract.backends import World
from lineshaft_contract.sessions import DoneTransfer
from lineshaft_contract.steps import HostStep, InputField, InputLayout, StepShape
from lineshaft_torch.bound import BoundKernel
from lineshaft_torch.collectives import Group
from lineshaft_torch.device import LayerMemory
from lineshaft_torch.fake import FakeDevice
from lineshaft_torch.staging import PinnedStaging

ROWS = InputLayout([InputField("x", "float32", (2, 4))])
SHAPE = StepShape(2, 2, (), 2, 1)
TWO = World(axes=(("dp", 1), ("pp", 1), ("cp", 1), ("ep", 1), ("tp", 2)))
PROGRAMS = ["graph", "piecewise", "tape", "eager"]


def step(value: float) -> HostStep:
    host = HostStep(ROWS)
    host["x"][:] = value
    return host


def doubling(kit: Any, device: FakeDevice, world: World | None = None, **options: Any) -> tuple[Any, Any]:
    """A session, frozen, with a program y = x + x."""
    session = kit.on(device, world).session(**options)

    def fn(ops: Any, weights: Any, caches: Any, given: Any, arrays: Any) -> Any:
        return {"y": ops.add(given.arrays["x"], given.arrays["x"])}, caches

    ops = kit.HandPlanned(kit.pointwise("add"))
    program = session.capture(fn, SHAPE, ROWS, ops, {}, frozenset({"y"}))
    session.freeze()
    return session, program


# ---- asynchronous steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["graph", "tape"])
def test_a_call_returns_before_the_device_has_begun_and_the_host_buffer_is_free(kit, program: str) -> None:
    device = FakeDevice()
    _, captured = doubling(kit, device, program=program)
    del device.ran[:]
    host = step(3.0)
    pending = captured(host)
    host.buffer[:] = 0xFF
    assert device.ran == []
    assert (pending.result("y") == 6.0).all()
    assert pending.kernel_seconds > 0


@pytest.mark.parametrize("program", PROGRAMS)
def test_several_steps_may_be_outstanding_and_results_are_private(kit, program: str) -> None:
    session, captured = doubling(kit, FakeDevice(), program=program)
    pendings = [captured(step(value)) for value in range(7)]
    for value, pending in reversed(list(enumerate(pendings))):
        first = pending.result("y")
        first[:] = -1
        assert (pending.result("y") == 2 * value).all()
    session.close()
    assert (pendings[0].result("y") == 0).all(), "what was waited for stays"


def test_the_host_waits_only_when_all_staging_is_being_read(kit) -> None:
    device = FakeDevice()
    _, captured = doubling(kit, device, staging=3)
    del device.ran[:]
    for value in range(3):
        captured(step(value))
    assert device.ran == []
    captured(step(3))
    assert device.ran == ["copy"], "it waited for the inputs of the first step alone"


def test_staging_that_is_not_waited_for_gives_another_steps_inputs(kit, monkeypatch) -> None:
    _, captured = doubling(kit, FakeDevice(), staging=2)
    monkeypatch.setattr(captured._inputs, "_reach", lambda event: None)
    pendings = [captured(step(value)) for value in range(4)]
    assert [float(pending.result("y").max()) for pending in pendings] != [0, 2, 4, 6]


def test_values_planned_on_the_host_belong_to_their_own_step(kit) -> None:
    device = FakeDevice()
    session = kit.on(device).session()
    workspace = torch.zeros(4)
    staging = session.staging(workspace)
    add = BoundKernel(lambda x: x + workspace, session, False, name="planned", op="add")

    class Planned(kit.HandPlanned):
        def prepares(self, session: Any) -> list[Any]:
            return [lambda host: staging.upload(host["x"][0] * 10)]

    def fn(ops: Any, weights: Any, caches: Any, given: Any, arrays: Any) -> Any:
        return {"y": ops.add(given.arrays["x"])}, caches

    captured = session.capture(fn, SHAPE, ROWS, Planned({}, {"add": add}), {}, frozenset({"y"}))
    session.freeze()
    pendings = [captured(step(value)) for value in range(6)]
    assert [float(pending.result("y").max()) for pending in pendings] == [11.0 * value for value in range(6)]


def test_staging_of_a_session_on_the_host_copies_at_once(kit) -> None:
    target, values = torch.zeros(2, 2), np.arange(4, dtype=np.float32)
    kit.session().staging(target).upload(values)
    assert target.tolist() == [[0, 1], [2, 3]]


# ---- pages -----------------------------------------------------------------------------------------------------


def writing(kit: Any, device: FakeDevice) -> tuple[Any, Any]:
    """A session with one cache, and a program that writes x into slots 4 and 5: the first of page 1."""
    session = kit.on(device).session()
    session.alloc_caches([kit.kv(kv_heads=1)], [4], "slots")
    layout = InputLayout([*ROWS.fields, InputField("slots.0", "int32", (2,))])

    def fn(ops: Any, weights: Any, caches: Any, given: Any, arrays: Any) -> Any:
        x = given.arrays["x"].reshape(2, 1, 4)
        return {}, [ops.write_kv(caches[0], x, x, given)]

    shape = StepShape(2, 2, (1,), 2, 1)
    captured = session.capture(fn, shape, layout, kit.HandPlanned({"write_kv": kit.kv(kv_heads=1)}))
    session.freeze()

    def write(value: float, after: Any = ()) -> Any:
        host = HostStep(layout)
        host["x"][:], host["slots.0"][:] = value, [4, 5]
        return captured(host, {}, after)

    return session, write


def test_pages_are_read_written_and_copied_in_the_order_of_the_steps(kit) -> None:
    device = FakeDevice()
    session, write = writing(kit, device)
    one, two = np.array([1]), np.array([2])
    write(1.0)
    copied = session.copy_pages(0, one, two)
    write(2.0, [copied, DoneTransfer()])
    sent = {name: np.full((1, 4, 1, 4), 7.0, np.float32) for name in "kv"}
    moved = session.write_pages(0, np.array([3]), sent)
    for array in sent.values():
        array[:] = -1
    read = session.read_pages(0, np.array([1, 2, 3]))
    assert read["k"][:, 0].reshape(3, 4).tolist() == [[2.0] * 4, [1.0] * 4, [7.0] * 4]
    assert read["v"][2].max() == read["v"][2].min() == 7.0
    for transfer in (copied, moved):
        transfer.wait()
        assert transfer.done() and transfer.error is None


def test_a_transfer_that_fails_says_so(kit) -> None:
    device = FakeDevice()
    session, _ = writing(kit, device)
    transfer = session.copy_pages(0, np.array([1]), np.array([2]))
    device.fail(RuntimeError("device error: fell over"))
    with pytest.raises(RuntimeError, match="fell over"):
        transfer.wait()
    assert transfer.done() and "fell over" in str(transfer.error)


# ---- failures --------------------------------------------------------------------------------------------------


def test_a_step_that_fails_on_the_device_poisons_the_session_when_it_is_read(kit) -> None:
    device = FakeDevice()
    session, captured = doubling(kit, device)
    first = captured(step(1.0))
    assert (first.result("y") == 2.0).all()
    pending = captured(step(2.0))
    device.fail(RuntimeError("device error: fell over"))
    with pytest.raises(RuntimeError, match="fell over"):
        pending.result("y")
    for call in (lambda: captured(step(1.0)), session.thaw, lambda: session.read_pages(0, np.zeros(1))):
        with pytest.raises(SessionPoisoned, match="fell over"):
            call()
    session.close()
    session.close()
    with pytest.raises(SessionClosed):
        captured(step(1.0))


def test_peers_that_do_not_come_end_the_step_within_the_time_limit(kit, monkeypatch) -> None:
    device = FakeDevice()
    session, captured = doubling(kit, device, TWO, timeout_s=0.2)
    aborted: list[str] = []
    monkeypatch.setattr(session.groups, "abort", lambda: aborted.append("abort"))
    pending = captured(step(1.0))
    device.hang()
    began = time.monotonic()
    with pytest.raises(WorkerDied, match=r"0\.2 s"):
        pending.result("y")
    with pytest.raises(SessionPoisoned):
        captured(step(1.0))
    session.close()
    assert time.monotonic() - began < 5 and aborted == ["abort", "abort"]


def test_a_group_aborts_what_its_transport_can() -> None:
    calls: list[str] = []

    class Transporting:
        def abort(self) -> None:
            calls.append("abort")

    for backend in (Transporting(), object(), None):
        Group(("tp",), 0, 2, backend).abort()
    assert calls == ["abort"]


def test_after_close_every_call_raises_and_nothing_is_held(kit) -> None:
    device = FakeDevice()
    session, captured = doubling(kit, device)
    captured(step(1.0))
    session.close()
    assert device.ran[-1] == "copy", "it waited for the step"
    assert not captured.holds_graphs()
    for call in (
        lambda: captured(step(1.0)), session.freeze, lambda: session.load({}, None, {}), lambda: session.update({}),
        lambda: session.alloc_caches([], [], ""), lambda: session.read_pages(0, np.zeros(1)),
        lambda: session.write_pages(0, np.zeros(1), {}), lambda: session.copy_pages(0, np.zeros(1), np.zeros(1)),
        lambda: session.capture(lambda *_: ({}, []), SHAPE, ROWS, kit.HandPlanned({})),
    ):  # fmt: skip
        with pytest.raises(SessionClosed):
            call()


# ---- memory ----------------------------------------------------------------------------------------------------


def test_caches_that_do_not_fit_say_how_many_pages_would(kit) -> None:
    problem, narrow = kit.kv(), kit.kv(group=1, kv_dtype="bfloat16")
    budget = 40 * problem.page_bytes
    device = FakeDevice(budget=budget)
    session = kit.on(device).session()
    with pytest.raises(OutOfMemory, match="KV caches") as caught:
        session.alloc_caches([problem, narrow, problem], [100, 50], "slots")
    text = str(caught.value)
    assert "\n" not in text and "[100, 50] pages" in text and f"{budget} are free" in text
    fitting = [17, 8]  # 2 * 17 + 8 / 2 pages of 40; the next share, [18, 9], takes 40.5
    assert f"{fitting} pages would fit" in text
    session.alloc_caches([problem, narrow, problem], fitting, "slots")
    assert LayerMemory(device).total_free() == device.memory()
    with pytest.raises(OutOfMemory):
        session.alloc_caches([problem, narrow, problem], [18, 9], "slots")


def test_memory_that_is_gone_while_caches_are_allocated_is_told_the_same_way(kit, monkeypatch) -> None:
    device = FakeDevice(budget=10_000)
    session = kit.on(device).session()
    free = iter([(10_000, 10_000_000)])  # another process takes it in between
    monkeypatch.setattr(device, "memory", lambda: next(free, (10_000, 2 * kit.kv().page_bytes)))
    with pytest.raises(OutOfMemory, match=r"\[100\] pages .* \[2\] pages would fit"):
        session.alloc_caches([kit.kv()], [100], "slots")
    assert device.reserved() < 1000, "what was allocated before the failure is freed"


def test_the_memory_of_a_layer_synchronizes_it(kit) -> None:
    device = FakeDevice()
    _, captured = doubling(kit, device)
    del device.ran[:]
    captured(step(1.0))
    memory = LayerMemory(device)
    memory.synchronize()
    assert device.ran and memory.page_bytes(kit.kv()) == kit.kv().page_bytes


def test_a_wrong_handle_of_a_pending_is_refused(kit) -> None:
    _, captured = doubling(kit, FakeDevice())
    with pytest.raises(ContractViolation, match="no output 'z'"):
        captured(step(1.0)).result("z")


def test_pinned_staging_takes_turns() -> None:
    device, target, reached = FakeDevice(), torch.zeros(2), []
    staging = PinnedStaging(device, target, 2, lambda event: (reached.append(event), event.synchronize())[0])
    with device.on(device.main):
        for value in range(4):
            staging.upload(np.full(2, value, np.float32))
    device.synchronize()
    assert len(reached) == 2 and target.tolist() == [3, 3]
