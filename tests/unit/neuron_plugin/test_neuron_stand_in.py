"""The stand-in holds programs to the device's contract: each refusal has a program that triggers it, and what the
device can do gives what torch gives on the host."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import fx
from torch._dynamo.exc import TorchRuntimeError, Unsupported
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional

from lineshaft_contract.errors import BackendUnavailable, ContractViolation
from lineshaft_neuron import stand_in
from lineshaft_neuron.stand_in import Rejected, StandInCompiler, on_device, on_host

Program = Callable[..., Any]


@pytest.fixture
def x(device: torch.device) -> torch.Tensor:
    """float32[4, 6]"""
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(7)).to(device)


@pytest.fixture
def rows(device: torch.device) -> torch.Tensor:
    """int32[3]: rows of `x`"""
    return torch.tensor([2, 0, 3], dtype=torch.int32).to(device)


def compiled(program: Program, backend: Any = "neuron", dynamic: bool = False) -> Program:
    return torch.compile(program, fullgraph=True, dynamic=dynamic, backend=backend)


# ---- the device by itself ------------------------------------------------------------------------------------------


def test_a_tensor_on_the_device_says_so_and_comes_back_as_it_was(device: torch.device) -> None:
    for dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.bool,
    ):
        host = torch.arange(6).view(2, 3).to(dtype)
        there = host.to("neuron")
        assert there.device == device and there.device.type == "neuron" and there.dtype == dtype
        assert torch.equal(there.cpu().view(torch.uint8), host.view(torch.uint8))
        assert there.to("neuron") is there


def test_allocation_filling_and_copies_work_without_a_program(device: torch.device) -> None:
    made = torch.zeros(2, 3, device=device)
    made.fill_(4)
    made[1].zero_()
    made[0, 1:].copy_(torch.tensor([7.0, 8.0]))
    assert made.cpu().tolist() == [[4, 7, 8], [0, 0, 0]]
    assert torch.full((2,), 3.0, device=device).cpu().tolist() == [3, 3]
    assert torch.ones(2, dtype=torch.int32, device=device).cpu().tolist() == [1, 1]
    assert torch.tensor([[1, 2]], device=device).cpu().tolist() == [[1, 2]]
    assert torch.empty(0, 4, device=device).shape == (0, 4) and torch.empty((), device=device).dim() == 0
    copy = made.clone()
    made.zero_()
    assert copy.cpu().tolist() == [[4, 7, 8], [0, 0, 0]]


def test_views_share_the_memory_of_what_they_view(device: torch.device) -> None:
    base = torch.zeros(4, 6, device=device)
    views = [base.view(24), base.reshape(6, 4), base[1:3], base[2], base.view(torch.int32), base.t(), base.detach()]
    assert {view.untyped_storage()._cdata for view in views} == {base.untyped_storage()._cdata}
    views[3].fill_(1)
    assert base.cpu().sum() == 6 and views[4].cpu()[2].tolist() == [0x3F800000] * 6


def test_tensors_are_made_and_written_in_inference_mode(device: torch.device) -> None:
    with torch.inference_mode():
        inside = torch.zeros(3, device=device)
        inside[1:].fill_(2)
    outside = torch.zeros(3, device=device)
    with torch.inference_mode():
        outside.fill_(1)
    outside[0].fill_(5)
    assert inside.cpu().tolist() == [0, 2, 2] and outside.cpu().tolist() == [5, 1, 1]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("aten.add", lambda x: x + 1),
        ("aten.mm", lambda x: x @ x.t()),
        ("aten.mm", lambda x: functional.linear(x, x)),
        ("aten.sum", lambda x: x.sum()),
        ("aten.index", lambda x: x[torch.tensor([0])]),
        ("aten.index_copy", lambda x: x.index_copy_(0, torch.zeros(4, dtype=torch.int64, device=x.device), x.clone())),
        ("aten._local_scalar_dense", lambda x: x[0, 0].item()),
        ("aten.arange", lambda x: torch.arange(3, device=x.device)),
        ("aten.normal_", lambda x: torch.randn(2, device=x.device)),
        ("a conversion from torch.float32 to torch.bfloat16", lambda x: x.to(torch.bfloat16)),
    ],
)
def test_computation_outside_of_a_program_is_refused(x: torch.Tensor, name: str, call: Program) -> None:
    with pytest.raises(ContractViolation, match=f"{re.escape(name)}.*computation belongs in a compiled program"):
        call(x)


def test_host_and_device_tensors_of_one_memory_are_turned_without_a_copy(device: torch.device) -> None:
    host = torch.zeros(3)
    there = on_device(host)
    there.fill_(2)
    assert host.tolist() == [2, 2, 2] and on_host(there).data_ptr() == host.data_ptr()
    assert on_host(there) is on_host(there) and on_host(host) is host


def test_memory_is_freed_with_the_last_tensor(device: torch.device) -> None:
    host = torch.zeros(3)
    gone = weakref.ref(host)
    there = on_device(host)
    on_host(there).fill_(1)
    del host, there
    gc.collect()
    assert gone() is None


# ---- fakes, over which programs are traced -------------------------------------------------------------------------


def test_fakes_of_the_device_compute_shapes_on_it(x: torch.Tensor) -> None:
    mode = FakeTensorMode()
    with mode:
        made = torch.empty(6, 3, device="neuron")
        product = mode.from_tensor(x) @ made
        cast = product.to(torch.bfloat16).view(3, 4)
    assert isinstance(product, FakeTensor) and product.device == x.device and product.shape == (4, 3)
    assert cast.device == x.device and cast.dtype == torch.bfloat16


# ---- what compiles -------------------------------------------------------------------------------------------------


def attend(x: torch.Tensor) -> torch.Tensor:
    mask = torch.arange(4, dtype=torch.int32, device=x.device)
    scores = torch.where(mask[:, None] >= mask, x @ x.t() * 0.4, float("-inf"))
    return torch.softmax(scores, -1, dtype=torch.float32) @ x


def scattered(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    at = rows.to(torch.int64)
    return torch.zeros_like(x).index_copy(0, at, x[:3]).scatter(0, at[:, None], 2.0) + x.gather(0, at[:1].expand(4, 6))


ALLOWED: dict[str, Program] = {
    "attention": lambda x, rows: attend(x),
    "fused attention": lambda x, rows: functional.scaled_dot_product_attention(x[None], x[None], x[None]),
    "norm": lambda x, rows: functional.rms_norm(x, (6,), x[0]) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "low precision": lambda x, rows: (x.to(torch.bfloat16) * 2).to(torch.float8_e4m3fn).to(torch.float32),
    "int32": lambda x, rows: rows // 2 + rows % 3 + (rows >> 1) + torch.cumsum(rows, 0, dtype=torch.int32),
    "int64 indices": scattered,
    "int32 indices": lambda x, rows: x[rows] + functional.embedding(rows, x),
    "positions": lambda x, rows: x.argmax(-1).to(torch.int32) + x.topk(2).indices.to(torch.int32)[:, 0],
    "uint32 words": lambda x, rows: rows.view(torch.uint32).view(torch.int32) + 1,
    "constants": lambda x, rows: x * torch.tensor([1.0, 2, 3, 4, 5, 6], device="neuron"),
    "masks": lambda x, rows: x.masked_fill(x > 0, 0.0) + x.clamp(min=-1),
    "several": lambda x, rows: (x + 1, rows * 2),
    "views of inputs": lambda x, rows: (x[1], rows.view(3, 1)),
}


@pytest.mark.parametrize("name", ALLOWED)
@pytest.mark.parametrize("inference", [True, False])
def test_a_program_gives_what_torch_gives_on_the_host(
    x: torch.Tensor, rows: torch.Tensor, name: str, inference: bool
) -> None:
    with torch.inference_mode(inference):
        got = compiled(ALLOWED[name])(x, rows)
        want = compiled(_on_host(ALLOWED[name]), "eager")(x.cpu(), rows.cpu())
    for one, other in zip(_tuple(got), _tuple(want), strict=True):
        assert one.device == x.device and torch.equal(one.cpu(), other)


def _on_host(program: Program) -> Program:
    """Programs name the device where they make a constant."""
    return (lambda x, rows: x * torch.tensor([1.0, 2, 3, 4, 5, 6])) if program is ALLOWED["constants"] else program


def _tuple(item: Any) -> Sequence[torch.Tensor]:
    return item if isinstance(item, tuple) else (item,)


def write(cache: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    cache.index_copy_(0, slots.to(torch.int64), values)
    return cache.sum(0)


def test_a_cache_is_written_in_place_where_it_lies(x: torch.Tensor, rows: torch.Tensor) -> None:
    cache = torch.zeros(8, 6, device=x.device)
    address, page = cache.data_ptr(), cache[2]
    program = compiled(write)
    total = program(cache, x[:3], rows)
    want = torch.zeros(8, 6).index_copy_(0, rows.cpu().long(), x[:3].cpu())
    assert torch.equal(cache.cpu(), want) and torch.equal(total.cpu(), want.sum(0))
    assert cache.data_ptr() == address and torch.equal(page.cpu(), x[0].cpu())
    program(cache, x[1:], rows)
    assert torch.equal(page.cpu(), x[1].cpu())
    assert torch.equal(total.cpu(), want.sum(0)), "an output is memory of its own"


def test_an_output_that_is_an_input_is_the_input(x: torch.Tensor) -> None:
    program = StandInCompiler()(fx.symbolic_trace(lambda x: (x, x.mul_(2), x[0], x + 1)), [x])
    own, same, row, fresh = program(x)
    assert own is x and same is x
    row.zero_()
    assert x.cpu()[0].tolist() == [0] * 6 and fresh.cpu()[0].tolist() != [1] * 6


def test_a_compiled_module_has_its_weights_on_the_device(x: torch.Tensor) -> None:
    module = torch.nn.Linear(6, 2)
    want = module(x.cpu())
    with torch.inference_mode():
        assert torch.equal(compiled(module.to(x.device))(x).cpu(), want)


def test_a_program_refuses_inputs_that_it_was_not_compiled_for(x: torch.Tensor) -> None:
    program = StandInCompiler()(fx.symbolic_trace(lambda x: x + 1), [x])
    for other in (x[:2], x.view(torch.int32), x.cpu()):
        with pytest.raises(ContractViolation, match=r"compiled for float32\[4, 6\] was called with"):
            program(other)


# ---- what is refused -----------------------------------------------------------------------------------------------


def autocast(x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return x @ x.t()


VALUES = "depends on values"
SORT = "no sort and no search"
REFUSED: dict[str, tuple[Program, str]] = {
    "sort": (lambda x, rows: x.sort()[0], rf"node 'sort'.*aten\.sort\.default.*{SORT}"),
    "argsort": (lambda x, rows: x.argsort().to(torch.int32), SORT),
    "msort": (lambda x, rows: torch.msort(x), SORT),
    "searchsorted": (lambda x, rows: torch.searchsorted(x[0], x[1]).to(torch.int32), SORT),
    "unique": (lambda x, rows: torch.unique(x), SORT),
    "item": (lambda x, rows: x * x[0, 0].item(), rf"_local_scalar_dense.*{VALUES}"),
    "nonzero": (lambda x, rows: x.nonzero(), rf"nonzero.*{VALUES}"),
    "masked_select": (lambda x, rows: x.masked_select(x > 0), rf"masked_select.*{VALUES}"),
    "mask as index": (lambda x, rows: x[x > 0], rf"aten\.index\.Tensor.*{VALUES}"),
    "mask as place": (lambda x, rows: x.clone().index_put_((x > 0,), x[0, 0]), rf"index_put_.*{VALUES}"),
    "tensor repeats": (lambda x, rows: x[:3].repeat_interleave(rows, 0), rf"repeat_interleave.*{VALUES}"),
    "tensor bound": (lambda x, rows: x[: rows[0]], VALUES),
    "tensor length": (lambda x, rows: torch.arange(rows[0], device=x.device), VALUES),
    "float64": (lambda x, rows: x.double().float(), r"torch\.float64, which the device does not have; use float32"),
    "complex": (lambda x, rows: torch.fft.fft(x).real, r"torch\.complex64, which the device does not have"),
    "int64 sum": (lambda x, rows: rows.to(torch.int64) + 1, r"aten\.add\.Tensor computes with torch\.int64"),
    "int64 by default": (lambda x, rows: torch.cumsum(rows, 0), r"aten\.cumsum.*int64.*give dtype=torch\.int32"),
    "int64 range": (lambda x, rows: x[0] * torch.arange(6, device=x.device), r"aten\.arange.*int64"),
    "int64 positions": (lambda x, rows: x.argmax(-1) * 2, r"aten\.mul\.Tensor computes with torch\.int64"),
    "int64 output": (lambda x, rows: x.argmax(-1), r"an output of torch\.int64: convert it to int32"),
    "uint32": (
        lambda x, rows: rows.view(torch.uint32).bitwise_and(rows.view(torch.uint32)).view(torch.int32),
        r"bitwise_and.*computes with torch\.uint32",
    ),
    "made on the host": (lambda x, rows: torch.ones(3) * 2, "a tensor on cpu.*name the device"),
    "number of the host": (lambda x, rows: x * torch.tensor(3.0), "a tensor on cpu.*name the device"),
    "back on the host": (lambda x, rows: x.cpu(), "a tensor on cpu.*name the device"),
    "autocast": (lambda x, rows: autocast(x), "one flat graph"),
    "control flow": (
        lambda x, rows: torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)),
        "one flat graph",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("inference", [True, False])
def test_a_program_that_the_device_cannot_run_is_refused(
    x: torch.Tensor, rows: torch.Tensor, name: str, inference: bool
) -> None:
    program, reason = REFUSED[name]
    before = stand_in.compiler().counts.compiled
    with torch.inference_mode(inference), pytest.raises(Rejected, match=reason) as refused:
        compiled(program)(x, rows)
    assert refused.value.node is not None and "\n" not in str(refused.value)
    assert stand_in.compiler().counts.compiled == before


def test_a_refusal_names_the_line_of_the_program(x: torch.Tensor) -> None:
    with pytest.raises(
        Rejected, match=r'node \'sort\' \(sort\), File ".*test_neuron_stand_in\.py", line \d+.*sort\(\)'
    ):
        compiled(lambda x: x.sort()[0])(x)


def test_inference_mode_inside_of_a_program_hides_nothing_of_it(x: torch.Tensor) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return functional.linear(x, x).double()

    with pytest.raises(Rejected, match=r"torch\.float64"):
        compiled(program)(x)


def test_symbolic_shapes_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(Rejected, match=r"symbolic.*dynamic=False"):
        compiled(lambda x: x + 1, dynamic=True)(x)
    with FakeTensorMode(shape_env=_shape_env()) as mode:
        symbolic = mode.from_tensor(x)
    with pytest.raises(Rejected, match=r"symbolic shape \[s\d+, s\d+\]"):
        StandInCompiler()(fx.symbolic_trace(lambda x: x + 1), [symbolic])


def _shape_env() -> Any:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return ShapeEnv()


def test_inputs_on_the_host_and_of_float64_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(Rejected, match="an input on cpu: every tensor that a program takes lies on 'neuron'"):
        compiled(lambda x, y: (x + 1, y + 1))(x, x.cpu())
    with pytest.raises(TorchRuntimeError, match="neuron:0 and cpu"):  # Dynamo's own refusal comes first
        compiled(lambda x, y: x + y)(x, x.cpu())
    with pytest.raises(Rejected, match=r"an input of torch\.float64"):
        compiled(lambda x: x + 1)(torch.ones(2, dtype=torch.float64).to(x.device))


def test_inputs_that_require_a_gradient_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(Rejected, match="requires a gradient"):
        compiled(lambda x: x + 1)(x.clone().requires_grad_())


def test_a_graph_that_calls_modules_is_refused(x: torch.Tensor) -> None:
    with pytest.raises(Rejected, match="one flat graph"):
        StandInCompiler()(fx.symbolic_trace(torch.nn.Sequential(torch.nn.ReLU())), [x])


def test_a_graph_without_dynamo_is_held_to_the_same_rules(x: torch.Tensor) -> None:
    for program in (lambda x: x[0, 0].item(), lambda x: x.nonzero(), lambda x: x[x > 0]):
        with pytest.raises(Rejected, match=VALUES):
            StandInCompiler()(fx.symbolic_trace(program), [x])


# ---- programs are counted, and come to an end ----------------------------------------------------------------------


def test_two_shapes_are_two_programs_and_one_shape_is_one(x: torch.Tensor) -> None:
    own = StandInCompiler()
    program = compiled(lambda x: x * 2, own)
    for given in (x, x, x[:2], x, x[:2].clone()):
        assert torch.equal(program(given).cpu(), given.cpu() * 2)
    assert (own.counts.compiled, own.counts.recompiled, own.counts.graph_breaks) == (2, 1, 0)


def test_a_graph_break_is_an_error_or_is_counted(x: torch.Tensor) -> None:
    own = StandInCompiler()

    def program(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    for broken in (program, lambda x: x + 1 if x.sum() > 0 else x):
        with pytest.raises(Unsupported):
            compiled(broken, own)(x)
    assert (own.counts.compiled, own.counts.graph_breaks) == (0, 0)
    in_parts = torch.compile(program, backend=own, dynamic=False)
    assert torch.equal(in_parts(x).cpu(), (x.cpu() + 1) * 2)
    assert (own.counts.compiled, own.counts.graph_breaks) == (2, 1)


def test_once_sealed_nothing_compiles_but_what_is_compiled_runs(x: torch.Tensor) -> None:
    own = StandInCompiler()  # the one that goes by a name is the whole process's
    program = compiled(lambda x: x * 2, own)
    program(x)
    own.seal()
    with pytest.raises(Rejected, match=r"after warm-up, and no compiled program takes float32\[2, 6\]"):
        program(x[:2].clone())
    with pytest.raises(Rejected, match="after warm-up"):
        compiled(lambda x: x * 3, own)(x)
    assert torch.equal(program(x).cpu(), x.cpu() * 2)
    own.unseal()
    assert program(x[:2]).shape == (2, 6)


# ---- its place in torch --------------------------------------------------------------------------------------------


def test_starting_again_changes_nothing(device: torch.device) -> None:
    before = stand_in.compiler()
    assert stand_in.start() == device and stand_in.compiler() is before
    assert torch._dynamo.lookup_backend("neuron") is before


def test_the_compiler_is_there_after_the_start_only(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "neuron")
    with pytest.raises(BackendUnavailable, match=r"call stand_in\.start\(\) first"):
        stand_in.compiler()


def test_where_the_real_device_is_there_is_no_stand_in(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "neuron", SimpleNamespace())
    with pytest.raises(BackendUnavailable, match=r"set stand_in = false .* or TORCH_DEVICE_BACKEND_AUTOLOAD=0"):
        stand_in.start()


def test_where_another_device_is_there_is_no_stand_in(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "neuron")
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "npu")
    with pytest.raises(BackendUnavailable, match="another device, 'npu'"):
        stand_in.start()


def test_where_the_real_compiler_is_there_is_no_stand_in(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "neuron")
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "privateuseone")
    with pytest.raises(BackendUnavailable, match=r"torch\.compile has a backend 'neuron' already"):
        stand_in.start()


def test_tensors_of_the_host_are_what_they_were(device: torch.device) -> None:
    x = torch.ones(3, requires_grad=True)
    (x * 2).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2, 2, 2]
    assert torch.equal(compiled(lambda x: x.sort()[0], "eager")(torch.tensor([2, 1])), torch.tensor([1, 2]))


# ---- several ranks -------------------------------------------------------------------------------------------------

WORKER = """
import json, sys
import torch, torch.distributed as dist
from lineshaft_neuron import stand_in

rank, size, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore(path, size), rank=rank, world_size=size)
name = dist.group.WORLD.group_name
ops = torch.ops._c10d_functional

def program(x):
    total = ops.wait_tensor(ops.all_reduce(x * 2, "sum", name))
    gathered = ops.wait_tensor(ops.all_gather_into_tensor(x, size, name))
    tiles = ops.wait_tensor(ops.reduce_scatter_tensor(gathered, "sum", size, name))
    swapped = ops.wait_tensor(ops.all_to_all_single(gathered, [1] * size, [1] * size, name))
    sent = ops.wait_tensor(ops.broadcast(x, size - 1, name))
    return total, gathered, tiles, swapped, sent

x = torch.tensor([[1.0 + rank, 10.0 * (rank + 1)]]).to(stand_in.start())
made = torch.compile(program, fullgraph=True, dynamic=False, backend="neuron")(x)
print(json.dumps([tensor.cpu().tolist() for tensor in made]))
dist.destroy_process_group()
"""


def test_collectives_pass_through_programs_of_two_ranks(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), "2", str(tmp_path / "store")],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        results = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for rank, (printed, errors) in enumerate(results):
        assert workers[rank].returncode == 0, errors
        own, both = [rank + 1.0, 10.0 * (rank + 1)], [[1.0, 10.0], [2.0, 20.0]]
        assert json.loads(printed) == [[[6.0, 60.0]], both, [[2 * v for v in own]], [own, own], [both[1]]]
