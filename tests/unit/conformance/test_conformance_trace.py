"""A trace agrees with itself and with other correct backends, and names the op, layer and step of a broken one."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lineshaft.cli.main import Parser
from lineshaft.config import EngineConfig, make_config
from lineshaft.errors import InvalidValue
from lineshaft_conformance.cli import trace as command
from lineshaft_conformance.harness.rig import Values
from lineshaft_conformance.harness.tiny import LLAMA, write
from lineshaft_conformance.mutants.kill import TARGET
from lineshaft_conformance.mutants.mutant import changed, with_capabilities, with_kernel
from lineshaft_conformance.trace.digests import SPREAD, digest, estimate, exact
from lineshaft_conformance.trace.errors import TraceError
from lineshaft_conformance.trace.record import record
from lineshaft_conformance.trace.replay import check_claims, replay
from lineshaft_conformance.trace.shaken import Shaken
from lineshaft_conformance.trace.store import read, sha256_of
from lineshaft_contract.backends import Capabilities

MODEL = {**LLAMA, "num_hidden_layers": 3}
PROMPT = [3, 14, 15, 9, 26, 5, 35, 8, 60, 7, 9, 32]
"""Twelve tokens: step s of its generation sees 12 + s keys."""


@pytest.fixture(scope="module")
def llama() -> Iterator[Path]:
    with closing(write(MODEL, 5)) as checkpoint:
        yield checkpoint.path


def config_of(model: Path, dtype: str = "float32", **more: Any) -> EngineConfig:
    scheduler = {"token_budget": 16, "max_rows": 2}
    return make_config(
        model=str(model), backend="cpu", dtype=dtype, threads=1, max_model_len=48, scheduler=scheduler,
        cache={"page_size": 4}, **more,
    )  # fmt: skip


Traces = Callable[[str, bool], Path]


@pytest.fixture(scope="module")
def traces(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Traces:
    """A trace by dtype and fullness: three prompts of which two share pages, chunked prefill, mixed steps."""
    made: dict[tuple[str, bool], Path] = {}

    def get(dtype: str, full: bool) -> Path:
        if (dtype, full) not in made:
            out = tmp_path_factory.mktemp("traces") / "T"
            prompts = [PROMPT, PROMPT + PROMPT[::-1], PROMPT]
            assert record(out, config_of(llama, dtype), prompts, 6, full=full) == 0
            made[dtype, full] = out
        return made[dtype, full]

    return get


@pytest.fixture(scope="module")
def lone(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of one prompt: one prefill, then decode steps."""
    out = tmp_path_factory.mktemp("traces") / "lone"
    record(out, config_of(llama), [PROMPT], 14)
    return out


@pytest.fixture(scope="module")
def on_torch(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, by the engine that mutants are made of."""
    out = tmp_path_factory.mktemp("traces") / "torch"
    record(out, config_of(llama, backend_options=TARGET.options), [PROMPT], 14)
    return out


# ---- correct backends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True], ids=["digests", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(("backend", "options"), [("numpy", {}), ("cpu", {"native": "off", "program": "eager"})])
def test_correct_backends_agree(traces: Traces, backend: str, options: dict[str, Any], dtype: str, full: bool) -> None:
    found = replay(traces(dtype, full), backend, options)
    assert found.first is None, (found.first.place, found.first.what)
    assert len(found.compared) > 300
    worst = max(item.ratio for item in found.compared)
    assert worst < 0.5
    # one kernel for some dtypes; in float64 the native engine's are the references
    assert worst > 0 or backend == "cpu" or dtype == "float64"


def test_the_same_backend_gives_the_same_bytes(traces: Traces) -> None:
    found = replay(traces("float32", False), "cpu")
    assert {item.ratio for item in found.compared} == {0.0}
    assert {item.recorded_kernel == item.kernel for item in found.compared} == {True}


def test_every_op_of_every_layer_is_there(lone: Path) -> None:
    found = replay(lone, "cpu")
    once = [(item.layer, item.op, item.output) for item in found.compared if item.step == 0]
    layer = [
        ("add_rms_norm", "0"), ("add_rms_norm", "1"), ("linear", "0"), ("rope_write_kv", "0"), ("rope_write_kv", "k"),
        ("rope_write_kv", "v"), ("attend", "0"), ("linear", "0"), ("add_rms_norm", "0"), ("add_rms_norm", "1"),
        ("linear", "0"), ("silu_mul", "0"), ("linear", "0"),
    ]  # fmt: skip
    assert [pair for at, *pair in once if at == 1] == [list(pair) for pair in layer]
    assert [op for at, op, _ in once if at is None] == [
        "embed", "add_rms_norm", "add_rms_norm", "gather_rows", "linear", "argmax",
    ]  # fmt: skip
    assert {item.step for item in found.compared} == set(range(14))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_backend_without_a_composites_kernel_agrees(traces: Traces, dtype: str) -> None:
    def without(backend: Any) -> Any:
        return changed(backend, change_kernels=lambda kernels: [k for k in kernels if k.op != "add_rms_norm"])

    found = replay(traces(dtype, False), "cpu", change=without)
    assert found.first is None
    assert {item.kernel for item in found.compared if item.op == "add_rms_norm"} == {"default decomposition"}


# ---- broken backends -------------------------------------------------------------------------------------------


def decode_attend_beyond_20_keys(problem: Any, bound: Any) -> Any:
    def run(q: Any, cache: Any, step: Any) -> Any:
        out = bound(q, cache, step)
        if problem.max_query > 1:
            return out
        return out * (1 - 0.1 * (step.groups[0].context_lens > 20).to(out.dtype))[:, None, None]

    return run


def swapped_gate(problem: Any, bound: Any) -> Any:
    return lambda x: bound(x.roll(x.shape[1] // 2, 1))


def stuck_positions(problem: Any, bound: Any) -> Any:
    return lambda q, k, positions: bound(q, k, positions.clamp(max=15))


def one_weight(problem: Any, bound: Any) -> Any:
    def run(x: Any, weight: Any) -> Any:
        return bound(x, weight) * (1.01 if weight.name == "layers.2.down" else 1.0)

    return run


def stale_values(problem: Any, bound: Any) -> Any:
    return lambda cache, k, v, step: bound(cache, k, v * (step.positions < 17).to(v.dtype)[:, None, None], step)


def nan_norm(problem: Any, bound: Any) -> Any:
    def run(x: Any, r: Any, weight: Any) -> Any:
        h, r = bound(x, r, weight)
        return h.masked_fill(h == h.max(), float("nan")), r

    return run


def largest_but_one(problem: Any, bound: Any) -> Any:
    return lambda logits: logits.topk(2)[1][:, 1].int()


BROKEN = [
    ("attend", decode_attend_beyond_20_keys, 0, 9, "0"),
    ("silu_mul", swapped_gate, 0, 0, "0"),
    ("rope", stuck_positions, 0, 5, "0"),
    ("linear", one_weight, 2, 0, "0"),
    ("write_kv", stale_values, 0, 6, "v"),
    ("add_rms_norm", nan_norm, 0, 0, "0"),
    ("argmax", largest_but_one, None, 0, "0"),
]


@pytest.mark.parametrize(("op", "wrap", "layer", "step", "output"), BROKEN, ids=[case[1].__name__ for case in BROKEN])
def test_a_mutant_is_found_where_it_is(
    on_torch: Path, op: str, wrap: Any, layer: int | None, step: int, output: str
) -> None:
    found = replay(on_torch, "cpu", TARGET.options, change=with_kernel(op, wrap))
    first = found.first
    assert first is not None
    seen = "rope_write_kv" if op in ("rope", "write_kv") else op  # a decomposition is watched as the op it stands for
    assert (first.op, first.layer, first.step, first.output) == (seen, layer, step, output), (first.place, first.what)
    assert first.problem.startswith("dtype=float32") and first.kernel == first.recorded_kernel
    assert found.worst(1)[0].ratio >= first.ratio


def test_a_lower_precision_is_found_at_once(on_torch: Path) -> None:
    rounded = with_kernel("linear", lambda problem, bound: lambda x, w: bound(x.bfloat16().float(), w))
    first = replay(on_torch, "cpu", TARGET.options, change=rounded).first
    assert first is not None and (first.op, first.layer, first.step) == ("linear", 0, 0)


# ---- digests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_a_distance_is_told_from_digests(seed: int) -> None:
    random = np.random.default_rng(seed)
    a = random.standard_normal((37, 111)).astype(np.float32)
    apart = random.standard_normal(a.shape) * 10.0 ** -random.integers(1, 6)
    if seed % 2:
        apart[random.integers(37)] *= 100  # one row far off
    b = (a + apart).astype(np.float32)
    told, true = estimate(digest(a), digest(b)).rms, exact(a, b).rms
    assert true * (2 - SPREAD) < told < true * SPREAD


def test_values_that_are_not_finite_are_counted_and_left_out() -> None:
    a = np.array([[1.0, np.nan], [np.inf, -2.0]], np.float32)
    found = digest(a)
    assert (found.nan, found.inf, found.top, found.l2) == (1, 1, 2.0, 5**0.5)
    assert np.array_equal(found.sketch, digest(np.array([[1.0, 0.0], [0.0, -2.0]])).sketch)


def test_shaken_weights_are_off_by_a_rounding_each() -> None:
    values = np.random.default_rng(3).standard_normal((64, 96)).astype(np.float32)
    one, again, other = (Shaken(Values({"w": values}), "bfloat16", seed) for seed in (0, 0, 1))
    off = one.rows("w", 0, 64).arrays["data"] / values - 1
    assert np.abs(off).max() <= 2**-8 * 1.0001 and 0.9 < off.std() / (2**-7 / 12**0.5) < 1.1
    assert np.array_equal(one.cols("w", 3, 9).arrays["data"], again.cols("w", 3, 9).arrays["data"])
    assert not np.array_equal(one.rows("w", 0, 64).arrays["data"], other.rows("w", 0, 64).arrays["data"])


# ---- bad input -------------------------------------------------------------------------------------------------


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def edit(name: str, change: Callable[[bytes], bytes], folder: Path) -> None:
    (folder / name).write_bytes(change((folder / name).read_bytes()))


def remove(name: str, folder: Path) -> None:
    (folder / name).unlink()


def signed(change: Callable[[dict[str, Any]], object], folder: Path) -> None:
    """Edit the header and write the sha256 of what it has become."""
    header = json.loads((folder / "trace.json").read_text())
    header.pop("sha256")
    change(header)
    (folder / "trace.json").write_text(json.dumps({**header, "sha256": sha256_of(header)}))


def as_fifo(folder: Path) -> None:
    remove("trace.json", folder)
    os.mkfifo(folder / "trace.json")


DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no header": (partial(remove, "trace.json"), "cannot be read"),
    "half a header": (partial(edit, "trace.json", lambda b: b[: len(b) // 2]), "damaged"),
    "another file": (partial(edit, "trace.json", lambda b: b"[1]"), "no header"),
    "another version": (
        partial(edit, "trace.json", lambda b: b.replace(b'"version": 1', b'"version": 2')),
        "version 2",
    ),
    "an edited header": (partial(edit, "trace.json", lambda b: b.replace(b"float32", b"float64")), "sha256"),
    "no pages": (partial(signed, lambda h: h.pop("pages")), "see 'pages'"),
    "a list for a table": (partial(signed, lambda h: h.update(config=[])), "see 'config'"),
    "no calls": (partial(signed, lambda h: h["calls"].clear()), "see 'calls' and 'shapes'"),
    "a file elsewhere": (partial(signed, lambda h: h["files"].update({"../x": ""})), "see '../x'"),
    "a fifo for a header": (as_fifo, "no file of at most"),
    "no steps": (partial(remove, "steps.safetensors"), "missing"),
    "half the digests": (partial(edit, "digests.jsonl", lambda b: b[: len(b) // 2]), "sha256"),
    "one bit of a sketch": (partial(edit, "sketches.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1])), "sha256"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_trace_is_refused(lone: Path, tmp_path: Path, what: str) -> None:
    damage, said = DAMAGED[what]
    damage(folder := copy_of(lone, tmp_path / "T"))
    with pytest.raises(TraceError, match=said):
        replay(folder, "cpu")


def test_another_model_is_refused(lone: Path) -> None:
    with closing(write(MODEL, 6)) as other, pytest.raises(TraceError, match="not the recorded one"):
        replay(lone, "cpu", model=str(other.path))


def test_a_folder_with_something_in_it_is_not_touched(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(TraceError, match="not an empty folder"):
        record(tmp_path, config_of(llama), [PROMPT], 1)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_an_empty_folder_is_filled(llama: Path, tmp_path: Path) -> None:
    record(tmp_path, config_of(llama), [PROMPT], 1)
    assert (tmp_path / "trace.json").is_file()


CLAIMS = [{"max_query": 4}, {"row_buckets": (2,)}, {"token_buckets": (8,)}]


@pytest.mark.parametrize("claims", CLAIMS, ids=str)
def test_steps_beyond_what_a_backend_claims_are_refused(lone: Path, claims: dict[str, Any]) -> None:
    with pytest.raises(TraceError, match="does not claim to take"):
        replay(lone, "cpu", change=with_capabilities(**claims))


def test_prefills_apart_from_decodes_need_no_bucket_of_the_decode_table(lone: Path) -> None:
    steps, apart = read(lone).steps, Capabilities(row_buckets=(2,), max_prefill_rows=1, mixed_steps=False)
    check_claims("cpu", apart, steps[:1])
    for refused in ((replace(apart, mixed_steps=True), steps[:1]), (apart, steps)):
        with pytest.raises(TraceError, match="a bucket of 1 rows"):
            check_claims("cpu", *refused)


def test_a_recording_that_fails_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="one worker"):
        record(tmp_path / "T", config_of(llama, layout={"tp": 2}), [PROMPT], 1)
    assert list(tmp_path.iterdir()) == []


# ---- the command -----------------------------------------------------------------------------------------------


def call(*arguments: str) -> int:
    parser = Parser(prog="lineshaft trace")
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


def test_the_command_says_whether_they_agree(lone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("replay", str(lone), "--backend", "numpy", "--json") == command.AGREES
    told = json.loads(capsys.readouterr().out)
    assert told["agrees"] and told["first"] is None and told["recorded"] == "cpu" and told["backend"] == "numpy"


def test_the_command_finds_a_mutant_of_the_gallery(on_torch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mutant = "attend-drops-page-edge"  # pages hold 4 tokens: the prompt's 12 end one
    assert call("replay", str(on_torch), "--backend", "cpu", "--mutant", mutant) == command.DIFFERS
    told = capsys.readouterr().out
    assert "first: step 0, layer 0, op attend" in told
    assert "max_query=16" in told and "cpu_attend recorded, cpu_attend here" in told


def test_an_unknown_mutant_is_a_mistake(lone: Path) -> None:
    with pytest.raises(InvalidValue, match="did you mean attend-drops-page-edge"):
        call("replay", str(lone), "--backend", "cpu", "--mutant", "attend-drop-page-edge")
