"""The fake device is as strict as a real one: order only where it was asked for, graphs of operators, not of Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from lineshaft_torch.fake import FakeDevice

LAZY = [(), ("main",), ("side",), ("main", "side")]


@dataclass
class Named:
    name: str
    step: Callable[[], Any]


def calls(**steps: Callable[[], Any]) -> list[Named]:
    return [Named(name, step) for name, step in steps.items()]


def cross(device: FakeDevice, *, wait: bool) -> float:
    """x = 1 on main, y = 2 x on side, z = 3 y on main; z, with the waits between them or without."""
    x, y, z = (torch.zeros(1) for _ in range(3))
    with device.on(device.main):
        device.launch(calls(x=lambda: x.fill_(1.0)))
        ready = device.record()
        with device.on(device.side):
            if wait:
                device.wait(ready)
            device.launch(calls(y=lambda: torch.add(x, x, out=y)))
            done = device.record()
        if wait:
            device.wait(done)
        device.launch(calls(z=lambda: torch.mul(y, 3.0, out=z)))
    device.synchronize()
    return float(z)


@pytest.mark.parametrize("lazy", LAZY)
def test_work_that_waits_runs_after_what_it_waits_for(lazy: tuple[str, ...]) -> None:
    assert cross(FakeDevice(lazy), wait=True) == 6.0


def test_a_missing_wait_gives_a_wrong_result_under_some_choice_of_lazy_streams() -> None:
    assert {cross(FakeDevice(lazy), wait=False) for lazy in LAZY} == {6.0, 0.0}


def test_the_order_of_what_is_not_ordered_depends_on_which_stream_is_lazy() -> None:
    ran = {}
    for lazy in (("main",), ("side",)):
        device = FakeDevice(lazy)
        with device.on(device.side):
            device.launch(calls(side=lambda: None))
        with device.on(device.main):
            device.launch(calls(main=lambda: None))
        device.synchronize()
        ran[lazy] = device.ran
    assert ran == {("main",): ["side", "main"], ("side",): ["main", "side"]}


def test_what_torch_computes_inside_on_comes_after_the_work_of_that_stream() -> None:
    device, x = FakeDevice(), torch.zeros(1)
    with device.on(device.main):
        device.launch(calls(x=lambda: x.fill_(4.0)))
        assert device.ran == []
        assert float(x + 1) == 5.0


def test_an_event_passes_piece_by_piece_and_tells_the_time_between() -> None:
    device, x = FakeDevice(), torch.zeros(1)
    with device.on(device.main):
        began = device.record(timing=True)
        device.launch(calls(a=lambda: x.add_(1), b=lambda: x.add_(1)))
        ended = device.record(timing=True)
    seen = []
    while not ended.query():
        seen.append(float(x))
    assert seen == [0.0, 1.0, 2.0, 2.0]
    assert began.seconds_until(ended) > 0


# ---- graphs ----------------------------------------------------------------------------------------------------


def captured(device: FakeDevice, run: Callable[[], Any], name: str = "k") -> Any:
    with device.on(device.main), torch.inference_mode(), device.capture(device.pool()) as graph:
        device.launch(calls(**{name: run}))
    return graph


def test_a_graph_repeats_its_operators_over_the_same_memory_and_no_python() -> None:
    device, x, y, runs = FakeDevice(), torch.arange(6.0).view(2, 3), torch.zeros(3, 2), []

    def run() -> None:
        runs.append(1)
        turned = x.t()
        wide = torch.nn.functional.linear(turned.reshape(6)[None], torch.ones(1, 6))
        y.copy_(turned * len(runs) + wide)

    graph = captured(device, run)
    for seed in (1, 2):
        x.copy_(torch.from_numpy(np.random.default_rng(seed).standard_normal((2, 3)).astype(np.float32)))
        expected = x.t() + x.sum()
        y.zero_()
        graph.replay()
        assert not y.any(), "a replay is work for later"
        device.synchronize()
        torch.testing.assert_close(y, expected)
    assert runs == [1]


def test_a_device_that_is_current_twice_counts_no_operator_twice() -> None:
    device, x = FakeDevice(), torch.ones(3)
    with device.on(device.main):
        graph = captured(device, lambda: x.add_(1))
    before = x.clone()
    graph.replay()
    device.synchronize()
    torch.testing.assert_close(x, before + 1)


def test_memory_of_a_graphs_temporaries_holds_nothing_before_its_replay() -> None:
    device, x, kept = FakeDevice(), torch.ones(2), []
    graph = captured(device, lambda: kept.append(x + 1))
    assert kept[0].isnan().all()
    graph.replay()
    device.synchronize()
    assert kept[0].tolist() == [2.0, 2.0]


def test_what_no_operator_does_is_repeated_if_the_device_knows_of_it() -> None:
    device, x = FakeDevice(), np.zeros(1)

    def run() -> None:
        device.opaque(lambda: np.add(x, 1, out=x))

    graph = captured(device, run)
    before = float(x[0])
    graph.replay()
    graph.replay()
    device.synchronize()
    assert x[0] == before + 2


def test_a_graph_over_memory_that_has_moved_is_an_error() -> None:
    device, x = FakeDevice(), torch.zeros(4)
    graph = captured(device, lambda: x.fill_(1.0))
    x.untyped_storage().resize_(1 << 20)
    graph.replay()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        device.synchronize()


@pytest.mark.parametrize(
    ("name", "illegal"),
    {
        "item": lambda x: x[0].item(),
        "is_nonzero": lambda x: bool(x[0] > 1),
        "aten.item": lambda x: int(x[0]),
        "tolist": lambda x: x.tolist(),
        "numpy": lambda x: x.numpy(),
        "cpu": lambda x: x.cpu(),
        "Tensor.to": lambda x: x.to("cpu"),
        "nonzero": lambda x: torch.nonzero(x),
        "masked_select": lambda x: x.masked_select(x > 0),
        "index.Tensor with a mask": lambda x: x[x > 0],
        "_unique2": lambda x: x.unique(),
        "repeat_interleave": lambda x: x.repeat_interleave((x + 1).long()),
        "equal": lambda x: torch.equal(x, x),
        "values of the host": lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
        "pinned memory": lambda x: torch.empty(3, pin_memory=True),
    }.items(),
)
def test_what_a_device_cannot_capture_is_refused_by_name(name: str, illegal: Callable[[Any], Any]) -> None:
    device, x = FakeDevice(), torch.arange(3.0)
    with pytest.raises(RuntimeError, match=f"not permitted when stream is capturing: .*{name}"):
        captured(device, lambda: illegal(x))
    assert captured(device, lambda: x.add_(1)), "the device goes on"


@pytest.mark.parametrize(
    "legal",
    [
        lambda x: x.__setitem__(slice(0, 2), 3.0),
        lambda x: x.to(x.device),
        lambda x: x.repeat_interleave(2),
        lambda x: x[torch.arange(2)],
        lambda x: x.masked_fill_(x > 1, 0.0),
    ],
)
def test_what_it_can_capture_is_not_refused(legal: Callable[[Any], Any]) -> None:
    x = torch.arange(3.0)
    captured(FakeDevice(), lambda: legal(x))


@pytest.mark.parametrize("call", ["synchronize", "query", "pinned"])
def test_the_layer_waits_for_nothing_while_it_captures(call: str) -> None:
    device, x = FakeDevice(), torch.zeros(1)
    with device.on(device.main):
        event = device.record()
    act = {"synchronize": device.synchronize, "query": event.query, "pinned": lambda: device.pinned(x)}[call]
    with pytest.raises(RuntimeError, match="capturing"):
        captured(device, act)


@pytest.mark.parametrize("fault", ["fork", "join", "foreign"])
def test_streams_join_a_capture_by_events_and_have_to_come_back(fault: str) -> None:
    device, x = FakeDevice(), torch.zeros(1)
    step = calls(k=lambda: x.add_(1))
    with device.on(device.main):
        before = device.record()
        with (
            pytest.raises(
                RuntimeError, match={"fork": "waits for nothing", "join": "does not wait"}.get(fault, "outside")
            ),
            device.capture(device.pool()),
        ):
            ready = device.record()
            with device.on(device.side):
                if fault != "fork":
                    device.wait(before if fault == "foreign" else ready)
                device.launch(step)


def test_a_pool_is_gone_with_the_last_of_its_graphs() -> None:
    device, x = FakeDevice(), torch.zeros(1)
    pool = device.pool()

    def capture() -> Any:
        with device.on(device.main), device.capture(pool) as graph:
            device.launch(calls(k=lambda: x.add_(1)))
        return graph

    first, second = capture(), capture()
    first.reset()
    third = capture()
    for graph in (second, third):
        graph.reset()
    with pytest.raises(RuntimeError, match="pool is gone"):
        capture()
    with pytest.raises(RuntimeError, match="reset"):
        third.replay()


# ---- what goes wrong -------------------------------------------------------------------------------------------


def test_a_failure_is_told_by_everything_that_follows() -> None:
    device, x = FakeDevice(), torch.zeros(1)
    with device.on(device.main):
        device.launch(calls(k=lambda: x.add_(1)))
        event = device.record()
    device.fail(RuntimeError("device error: fell over"))
    for call in (event.synchronize, event.query, device.synchronize, lambda: device.launch(calls(k=lambda: None))):
        with pytest.raises(RuntimeError, match="fell over"):
            call()


def test_a_device_that_hangs_passes_no_event() -> None:
    device = FakeDevice()
    with device.on(device.main):
        event = device.record()
    device.hang()
    assert [event.query() for _ in range(3)] == [False] * 3
    with pytest.raises(RuntimeError, match="for ever"):
        event.synchronize()


def test_memory_runs_out_and_comes_back() -> None:
    device = FakeDevice(budget=1000)
    with device.on(device.main):
        held = torch.empty(150)
        assert device.memory() == (1000, 400)
        with pytest.raises(torch.OutOfMemoryError, match="allocate"):
            torch.zeros(150)
        del held
        assert device.memory() == (1000, 1000)
        torch.zeros(150)
