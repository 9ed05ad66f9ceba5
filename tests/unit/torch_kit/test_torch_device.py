"""The layer over torch.cuda, its names and calls held against torch's own, without a device."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock, create_autospec

import pytest
import torch

from lineshaft_torch.device import TorchDevice

REAL = {
    name: getattr(torch.cuda, name)
    for name in (
        "Stream", "Event", "CUDAGraph", "stream", "current_stream", "graph_pool_handle", "mem_get_info",
        "memory_reserved", "memory_allocated", "empty_cache", "synchronize",
    )
}  # fmt: skip


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, MagicMock]]:
    """torch.cuda with stand-ins that have the signatures of what they stand for."""
    made = {name: create_autospec(real) for name, real in REAL.items()}
    for name, stand_in in made.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    made["mem_get_info"].return_value = (300, 1000)
    made["memory_reserved"].return_value, made["memory_allocated"].return_value = 200, 150
    yield made


class Call:
    name = "k"

    def __init__(self) -> None:
        self.made = 0

    def step(self) -> None:
        self.made += 1


def test_streams_are_its_own_and_work_goes_to_the_current_one(cuda: Any) -> None:
    layer, call = TorchDevice(1), Call()
    assert layer.device == torch.device("cuda", 1) and cuda["Stream"].call_count == 2
    with layer.on(layer.side):
        layer.launch([call, call])
        assert layer.opaque(lambda: 5) == 5
    cuda["stream"].assert_called_once_with(layer.side)
    assert call.made == 2


def test_events_are_recorded_waited_for_and_timed(cuda: Any) -> None:
    layer = TorchDevice()
    event, later = layer.record(timing=True), layer.record()
    assert [call.kwargs for call in cuda["Event"].call_args_list] == [{"enable_timing": True}, {"enable_timing": False}]
    event.event.record.assert_called()
    layer.wait(event)
    cuda["current_stream"].return_value.wait_event.assert_called_once_with(event.event)
    event.event.query.return_value, event.event.elapsed_time.return_value = False, 1500.0
    assert event.query() is False and event.seconds_until(later) == 1.5
    event.synchronize()
    event.event.synchronize.assert_called_once_with()


def test_a_graph_is_captured_into_the_pool_with_no_garbage_collected_meanwhile(cuda: Any) -> None:
    layer = TorchDevice()
    pool = layer.pool()
    with layer.capture(pool) as graph:
        assert not gc.isenabled()
        graph.capture_begin.assert_called_once_with(pool=pool, capture_error_mode="thread_local")
        graph.capture_end.assert_not_called()
    graph.capture_end.assert_called_once_with()
    assert gc.isenabled()


def test_a_capture_that_fails_is_ended_and_its_own_error_is_raised(cuda: Any) -> None:
    layer = TorchDevice()
    cuda["CUDAGraph"].return_value.capture_end.side_effect = RuntimeError("capture was invalidated")
    with pytest.raises(RuntimeError, match="not permitted"), layer.capture(layer.pool()):
        raise RuntimeError("operation not permitted when stream is capturing")
    cuda["CUDAGraph"].return_value.capture_end.assert_called_once_with()
    assert gc.isenabled()


def test_reserved_memory_that_is_not_in_use_is_free(cuda: Any) -> None:
    layer = TorchDevice()
    assert layer.memory() == (1000, 350) and layer.reserved() == 200
    layer.release()
    layer.synchronize()
    cuda["empty_cache"].assert_called_once_with()
    cuda["synchronize"].assert_called_once_with(layer.device)


def test_copies_do_not_block_and_pinned_memory_is_asked_for(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, target, source = TorchDevice(), MagicMock(), torch.ones(2, dtype=torch.bfloat16)
    layer.copy(target, source)
    target.copy_.assert_called_once_with(source, non_blocking=True)
    empty = MagicMock()
    monkeypatch.setattr(torch, "empty", empty)
    layer.pinned(source)
    empty.assert_called_once_with(source.shape, dtype=torch.bfloat16, pin_memory=True)
