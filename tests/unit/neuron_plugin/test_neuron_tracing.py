"""What the flat graph of a function holds, and that it computes what the function does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lineshaft_contract.errors import ContractViolation
from lineshaft_neuron.tracing import Result, Traced, trace

X = torch.arange(6.0).view(2, 3)
W = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.5]])


def traced(run: Callable[[], dict[str, torch.Tensor]], *given: torch.Tensor) -> Traced:
    with torch.no_grad():
        return trace(lambda: (run(), []), given)


@pytest.mark.parametrize(
    "run",
    [
        lambda: torch.mm(X, W.t()),
        lambda: X @ W,
        lambda: (X + 1) * 2 - X / 3,
        lambda: torch.einsum("ij,kj->ik", X, W),
        lambda: torch.cat(X.chunk(3, -1)[::-1], 1),
        lambda: W.max(-1).indices.to(torch.int32),
        lambda: W.mT.contiguous()[1:, None, :2],
        lambda: torch.where(X != 2, X, -torch.inf).softmax(-1),
        lambda: torch.mul(X, X, out=torch.empty_like(X)),
        lambda: torch.nn.functional.silu(X).add_(X[0]).masked_fill_(X == 1, 5.0),
        lambda: torch.arange(3, device=X.device, dtype=torch.int32).add_(1) * X,
        lambda: torch.stack([part.sum(0, keepdim=True) for part in W.split(1)]),
        lambda: ~(X > 2) & (X >= 1),
    ],
)
def test_the_graph_computes_what_the_function_does(run: Callable[[], torch.Tensor]) -> None:
    found = traced(lambda: {"out": run()}, X)
    expected, got = run(), found.graph(X, *found.held)[0]
    assert got.dtype == expected.dtype and torch.equal(got, expected)
    other = X.flip(0)
    expected, X.data = X.clone(), other
    try:
        again = run()
    finally:
        X.data = expected
    assert torch.equal(found.graph(other, *found.held)[0], again)


def test_what_a_function_holds_becomes_an_input_once() -> None:
    unused = torch.ones(3)
    found = traced(lambda: {"out": torch.mm(X, W) + torch.mm(X, W.t())}, X, unused)
    assert [id(tensor) for tensor in found.held] == [id(W)]
    placeholders = [node for node in found.graph.graph.nodes if node.op == "placeholder"]
    assert len(placeholders) == 3
    assert not [node for node in found.graph.graph.nodes if node.op == "get_attr"]


def test_nothing_is_computed_while_tracing() -> None:
    cache = torch.zeros(4, 3)

    def run() -> dict[str, torch.Tensor]:
        cache.index_copy_(0, torch.tensor([1, 2]), X)
        return {"sum": cache.sum(0)}

    found = traced(run, X)
    assert not cache.any()
    assert torch.equal(found.graph(X, *found.held)[0], X.sum(0))
    assert torch.equal(cache[1:3], X)


def test_arrays_that_are_written_are_known_also_by_their_views() -> None:
    first, second, third = torch.zeros(4), torch.zeros(4), torch.zeros(4)

    def run() -> dict[str, torch.Tensor]:
        first.view(2, 2)[0].copy_(X[0, :2])
        return {"out": second + third, "more": second.view(2, 2).add_(1).sum()}

    found = traced(run, X)
    assert [id(([X, *found.held])[number]) for number in found.written] == [id(first), id(second)]


def test_updates_are_made_at_the_end_of_the_graph() -> None:
    held, new = torch.zeros(2), {}

    def run() -> Result:
        new["value"] = held + X[0, :2] + 1
        return {"before": held * 1}, [(held, new["value"])]

    with torch.no_grad():
        found = trace(run, [X])
    assert torch.equal(found.graph(X, *found.held)[0], torch.zeros(2))
    assert held.tolist() == [1, 2] and found.written == (1,)


def test_an_update_by_itself_is_none() -> None:
    held = torch.zeros(2)
    with torch.no_grad():
        found = trace(lambda: ({"out": held + 1}, [(held, held)]), [])
    assert found.written == ()


@pytest.mark.parametrize(
    "run",
    [lambda: X, lambda: X.view(3, 2), lambda: W, lambda: W[1:], lambda: X.t()],
    ids=["input", "view", "held", "view of held", "turned"],
)
def test_an_output_never_lies_in_the_memory_of_an_input(run: Callable[[], torch.Tensor]) -> None:
    found = traced(lambda: {"out": run()}, X)
    got = found.graph(X, *found.held)[0]
    assert torch.equal(got, run())
    assert got.is_contiguous() and got.untyped_storage().data_ptr() not in (X.data_ptr(), W.data_ptr())


def test_graphs_of_equal_work_have_one_digest_whatever_the_values() -> None:
    def digest(held: torch.Tensor, add: float = 1.0) -> str:
        return traced(lambda: {"out": X @ held + add}, X).digest

    assert digest(W) == digest(W * 2)
    assert len({digest(W), digest(W, 2.0), digest(W[:, :2]), digest(W[:, :2].clone())}) == 3


def test_calls_of_a_namespace_are_listed_in_order() -> None:
    def run() -> dict[str, torch.Tensor]:
        ops = torch.ops._c10d_functional
        return {"out": ops.wait_tensor(ops.all_reduce(X, "sum", "a group"))}

    assert traced(run, X).calls("_c10d_functional") == ["all_reduce", "wait_tensor"]


def test_a_tensor_that_no_call_of_torch_made_is_refused() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        stranger = torch.empty(3)
    with pytest.raises(ContractViolation, match=r"shape \[3\] that comes from no call of torch"):
        traced(lambda: {"out": X + stranger}, X)


def test_the_workspace_is_what_lives_at_once() -> None:
    def chain() -> dict[str, torch.Tensor]:
        total = X
        for number in range(1, 9):
            total = total * number  # each result is last read by the next call
        return {"out": total}

    def fan() -> dict[str, torch.Tensor]:
        return {"out": torch.stack([X * number for number in range(1, 9)])}

    one = X.nbytes
    assert 2 * one <= traced(chain, X).workspace < 8 * one
    assert traced(fan, X).workspace >= 16 * one
    few = traced(lambda: {"out": W.view(9)[:3] + 1}, X).workspace  # views, and what is held, take no room
    assert few == traced(lambda: {"out": X[0] + 1}, X).workspace < traced(fan, X).workspace


def test_what_is_computed_alike_is_computed_once_unless_it_is_written() -> None:
    def run() -> dict[str, torch.Tensor]:
        first, second = X * 2, X * 2
        third, fourth = X + 1, X + 1
        return {"out": first + second, "more": third.add_(1) + fourth, "unread": (X - 5, X)[1] * 1}

    found = traced(run, X)
    calls = [str(node.target) for node in found.graph.graph.nodes if node.op.startswith("call")]
    assert calls.count("mul") == 2 and calls.count("sub") == 0  # one of first and second, and the last output
    out, more, _ = found.graph(X, *found.held)
    assert torch.equal(out, X * 4) and torch.equal(more, X * 2 + 3)
