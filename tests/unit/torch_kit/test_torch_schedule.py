"""How a tape is cut, and where it has to wait: by the memory that calls touch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lineshaft_torch.fake import FakeDevice
from lineshaft_torch.recording import TapeCall
from lineshaft_torch.schedule import Fork, Join, Move, Run, cut, extent, moves_of, overlap, play

BESIDE = frozenset({"all_reduce"})
SIZE, CELLS = 4, 6


def call(name: str, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor], op: str = "add") -> TapeCall:
    def step() -> None:
        total = sum((x.clone() for x in reads), torch.full((SIZE,), float(len(name))))
        for x in writes:
            x.copy_(total)

    return TapeCall(step, name, op, True, tuple(reads), tuple(writes))


def shown(moves: Sequence[Move]) -> list[str]:
    return [
        "+".join(c.name for c in m.calls) if isinstance(m, Run) else f"{type(m).__name__.lower()} {m.call.name}"
        for m in moves
    ]


def cells() -> list[torch.Tensor]:
    return list(torch.zeros(CELLS, SIZE).unbind())


def test_extents_cover_strided_views_and_tell_storages_apart() -> None:
    x = torch.zeros(4, 8)
    assert extent(x[1:3, 2:4])[1:] == (40, 40 + 4 * (8 + 2))
    assert extent(x[:0])[1:] == (0, 0)
    assert overlap([x[0]], [x.view(-1)[7:9]]) and not overlap([x[0]], [x[1]])
    assert overlap([x[:, :4]], [x[:, 4:]]), "gaps between rows count"
    assert not overlap([x], [torch.zeros(4, 8)])


def test_a_tape_is_cut_where_the_kind_changes() -> None:
    a = cells()
    names = ["norm", "attend", "attend", "linear", "add"]
    made = [call(name, [a[0]], [a[1]], name) for name in names]
    pieces = cut(made, lambda c: c.op != "attend")
    assert [([c.name for c in p.calls], p.graphed) for p in pieces] == [
        (["norm"], True), (["attend", "attend"], False), (["linear", "add"], True),
    ]  # fmt: skip
    assert cut([], lambda c: True) == []


@pytest.mark.parametrize(
    ("later", "waits"),
    [
        (lambda a: call("l", [a[3]], [a[4]]), False),
        (lambda a: call("l", [a[1]], [a[4]]), True),
        (lambda a: call("l", [a[3]], [a[1]]), True),
        (lambda a: call("l", [a[3]], [a[0]]), True),
        (lambda a: call("l", [a[0]], [a[4]]), False),
    ],
    ids=["independent", "reads-result", "writes-result", "writes-argument", "reads-argument"],
)
def test_the_main_stream_waits_before_the_first_call_that_touches_what_a_collective_does(later, waits) -> None:
    a = cells()
    reduce = call("r", [a[0]], [a[1]], "all_reduce")
    free, last = call("f", [a[2]], [a[3]]), call("end", [a[5]], [a[5]])
    moves = shown(moves_of([reduce, free, later(a), last], BESIDE))
    assert moves == (["fork r", "f", "join r", "l+end"] if waits else ["fork r", "f+l+end", "join r"])
    assert shown(moves_of([reduce, free], frozenset())) == ["r+f"]


def test_a_wait_for_a_later_collective_is_one_for_those_before_it() -> None:
    a = cells()
    first, second = (call(f"r{i}", [a[i]], [a[i + 2]], "all_reduce") for i in (0, 1))
    use = call("use", [a[3]], [a[4]]), call("both", [a[2]], [a[5]])
    assert shown(moves_of([first, second, *use], BESIDE)) == ["fork r0", "fork r1", "join r1", "use+both"]


TAPES = st.lists(
    st.tuples(st.booleans(), st.lists(st.integers(0, CELLS - 1), max_size=2), st.integers(0, CELLS - 1)), max_size=14
)


@settings(derandomize=True, max_examples=120, deadline=None)
@given(TAPES)
def test_any_tape_gives_what_it_gives_in_order(drawn: list[tuple[bool, list[int], int]]) -> None:
    def result(lazy: tuple[str, ...] | None) -> list[list[float]]:
        a = cells()
        made = [
            call("c" * (i + 1), [a[r] for r in reads], [a[w]], "all_reduce" if beside else "add")
            for i, (beside, reads, w) in enumerate(drawn)
        ]
        if lazy is None:
            for c in made:
                c.step()
        else:
            device = FakeDevice(lazy)
            with device.on(device.main):
                play(device, moves_of(made, BESIDE))
                device.record().synchronize()  # of the main stream alone: it has joined all
        return [x.tolist() for x in a]

    expected = result(None)
    for lazy in ((), ("main",), ("side",), ("main", "side")):
        assert result(lazy) == expected, lazy


def test_without_its_joins_a_schedule_is_wrong() -> None:
    a = cells()
    made = [call("r", [a[0]], [a[1]], "all_reduce"), call("use", [a[1]], [a[2]])]
    moves = [move for move in moves_of(made, BESIDE) if not isinstance(move, Join)]
    assert [type(move) for move in moves] == [Fork, Run]
    device = FakeDevice(("main", "side"))
    with device.on(device.main):
        play(device, moves)
        device.record().synchronize()
    assert not np.array_equal(a[2].numpy(), np.full(SIZE, 4.0)) and float(a[2][0]) == 3.0
