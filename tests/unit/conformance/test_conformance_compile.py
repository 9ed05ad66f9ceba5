"""`lineshaft compile` for imaginary devices: what it compiles, counts, refuses and stores."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lineshaft.cli.main import main
from lineshaft.cli.options import degrees
from lineshaft.errors import InvalidValue
from lineshaft_conformance.ahead import CompiledProgram
from lineshaft_conformance.amounts import amount, human
from lineshaft_conformance.cli.compile import Told
from lineshaft_contract.backends import World
from lineshaft_contract.sessions import CaptureReport
from lineshaft_contract.steps import StepShape

FAR = Path(__file__).parents[1] / "far"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "vocab_size": 128, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": False,
}  # fmt: skip
SMALL = [
    "--set",
    "scheduler.max_rows=4",
    "--set",
    "scheduler.token_budget=32",
    "--set",
    "max_logprobs=0",
    "--set",
    "sampling_extras=false",
]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that holds a config and no weight."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def run(install: Callable[[Path], None], model: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Compiles the small model with further options; returns status, stdout and stderr."""
    install(FAR)

    def compile(*options: object, backend: str = "far", topology: str = "big:2x4") -> tuple[int, str, str]:
        given = ["--backend", backend, "--topology", topology, "--model", model, *SMALL, *options]
        try:
            status = main(["compile", *map(str, given)])
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return compile


def test_a_table_a_row_for_each_program_and_what_a_device_holds(run: Run) -> None:
    status, out, err = run("--layout", "tp=4")
    assert status == 0
    lines = out.splitlines()
    assert lines[0].split() == [
        "PROGRAM", "TOKENS", "ROWS", "PAGES", "LOGITS", "ARGUMENTS", "OUTPUTS", "TEMPORARIES", "ALIASED", "FLOPS",
        "MOVED", "SECONDS", "CACHED",
    ]  # fmt: skip
    labels = [line.split()[0] for line in lines[1 : lines.index("")]]
    assert len(set(labels)) == len(labels)
    assert {"forward/t32-b4-r4-q32", "forward/t4-b4-r4-q1", "forward/t1-b1-r1-q1", "sample/b4-r4"} <= set(labels)
    assert "a device of big:2x4: 16.00 GiB of memory" in out
    assert "fits: " in out and "room for" in out
    assert f"tp=4  {len(labels)} of {len(labels)} programs" in out and out.rstrip().endswith("compiled-only")
    told = err.splitlines()
    assert len(told) == len(labels)
    assert "remain" not in told[0] and "about 0 s remain" in told[2] and "remain" not in told[-1]


def test_json_holds_what_the_compiler_told_and_adds_up(run: Run, tmp_path: Path) -> None:
    status, out, _ = run("--json", "--out", tmp_path / "o.json", "--set", "cache.pages=100")
    found = json.loads(out)
    assert (status, found) == (0, json.loads((tmp_path / "o.json").read_text()))
    assert (found["backend"], found["topology"], found["dtype"]) == ("far", "big:2x4", "bfloat16")
    memory, pages = found["memory"], found["pages"]
    page = 16 * 4 * 8 * 2 * 2 * 2  # tokens, heads, dim, k and v, layers, bytes
    assert (pages["chosen"], pages["page_bytes"], memory["kv_pool"]) == ([100], [page], 100 * page)
    one = max(found["programs"], key=lambda p: p["outputs"] - p["aliased"] + p["temporaries"])
    resident = memory["weights"] + memory["kv_pool"]
    works = one["arguments"] - resident + one["outputs"] - one["aliased"] + one["temporaries"]
    assert memory["largest_at_work"] == works > 0
    assert memory["code"] == 4096 * len(found["programs"])
    assert memory["spare"] == 2**34 - resident - works - memory["code"]
    assert pages["room"] == (memory["spare"] + memory["kv_pool"]) // page
    assert pages["room_tokens"] == 16 * (pages["room"] - 1)
    assert memory["fits"] and one["details"] == {"scratch": 256}


def test_what_nobody_counts_is_no_number(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from lineshaft_conformance.mutants import toolchains

    def report(seconds: float, **figures: Any) -> CaptureReport:
        return CaptureReport(seconds, arguments=figures["arguments"], outputs=figures["outputs"])

    monkeypatch.setattr(toolchains, "CaptureReport", report)
    monkeypatch.setattr(toolchains.PlainMemory, "total_free", lambda self: None)
    status, out, _ = run("--programs", "forward/*-q1")
    assert status == 0
    line = out.splitlines()[1].split("  ")
    assert [text.strip() for text in line if text.strip()][-6:-2] == ["-"] * 4
    assert "needs at least" in out and "temporaries and code are not counted" in out
    assert "0 B" not in out and "fits" not in out
    found = json.loads(run("--programs", "forward/*-q1", "--json")[1])
    names = ("temporaries", "aliased", "code", "flops", "moved")
    assert all(program[name] is None for program in found["programs"] for name in names)
    memory = found["memory"]
    assert memory["code"] is memory["largest_at_work"] is memory["fits"] is None
    assert memory["needed"] == memory["weights"] + memory["kv_pool"] + memory["one_step"] > 0


def test_weights_are_cut_by_the_layout_and_the_world_is_the_one_asked_for(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = json.loads(run("--json")[1])
    far = importlib.import_module("far")

    worlds: list[World] = []
    start = far.Toolchain.start

    def spy(self: Any, target: str, world: World) -> Any:
        worlds.append(world)
        return start(self, target, world)

    monkeypatch.setattr(far.Toolchain, "start", spy)
    shared = json.loads(run("--json", "--layout", "dp=2,tp=4")[1])
    (world,) = worlds
    assert (dict(world.axes)["dp"], dict(world.axes)["tp"], world.rank, world.ranks) == (2, 4, 0, 1)
    assert shared["memory"]["weights"] < whole["memory"]["weights"] / 3
    assert shared["layout"] == {"dp": 2, "pp": 1, "cp": 1, "ep": 1, "tp": 4}
    assert run("--json", "--layout", "dp=2,tp=4", backend="far-single")[0] == 0
    assert (worlds[1].rank, worlds[1].ranks) == (0, 4)


def test_only_chosen_programs(run: Run) -> None:
    status, out, _ = run("--json", "--programs", "forward/*-q1", "--programs", "sample/b1-r1")
    found = json.loads(out)
    assert status == 0
    assert [p["program"] for p in found["programs"]] == [
        "forward/t4-b4-r4-q1", "forward/t2-b2-r2-q1", "forward/t1-b1-r1-q1", "sample/b1-r1",
    ]  # fmt: skip
    assert found["programs_of_the_run"] > 4
    assert "judged by the programs compiled alone" in run("--programs", "sample/*")[1]
    status, _, err = run("--programs", "backward")
    assert status == 2 and "forward/t4-b4-r4-q1" in err


def test_what_does_not_fit_says_by_how_much_and_what_to_change(run: Run) -> None:
    status, _, err = run("--set", "cache.pages=300000", topology="small:1x1")
    assert status == 2 and "OutOfMemory" in err and "too much" in err and "fewer pages" in err
    tiny = ["--set", "scheduler.token_budget=4"]  # results that a plan counts are less than the programs themselves
    room = json.loads(run("--json", *tiny, topology="small:1x1")[1])["pages"]["room"]
    assert run(*tiny, "--set", f"cache.pages={room}", topology="small:1x1")[0] == 0
    status, out, err = run(*tiny, "--set", f"cache.pages={room + 1}", topology="small:1x1")
    assert (status, "does NOT fit" in out) == (2, True)
    assert "OutOfMemory" in err and "too much" in err and f"set cache.pages to at most {room}," in err


@pytest.mark.parametrize(
    ("options", "named", "said"),
    [
        ([], {"backend": "toolless"}, "backend 'toolless' has no toolchain"),
        ([], {"backend": "numpy"}, " far, far-single"),
        ([], {"backend": "auto"}, "name the backend"),
        ([], {"backend": "fra"}, "far"),
        ([], {"topology": "huge:9x9"}, "known are small:1x1, big:2x4"),
        (["--layout", "tp=2"], {"topology": "small:1x1"}, "LayoutError"),
        (["--layout", "tp=3"], {}, "LayoutError"),
        (["--layout", "tp"], {}, "KEY=VALUE"),
        (["--layout", "tp=two"], {}, "allowed are dp, pp, cp, ep, tp"),
        (["--layout", "tp=2,tp=4"], {}, "each once"),
        (["--layout", "xp=2"], {}, "allowed are dp"),
        (["--backend-option", "speed=9"], {}, "no option backend_options.speed"),
        (["--out", "."], {}, "it cannot be written"),
        (["--out", "absent/o.json"], {}, "it cannot be written"),
        (["--dtype", "float16"], {}, "executes bfloat16, float32"),
    ],
)
def test_bad_input_is_one_line(run: Run, options: list[str], named: dict[str, str], said: str) -> None:
    status, out, err = run(*options, **named)
    assert (status, out) == (2, "")
    assert said in err.splitlines()[-1] and len(err.splitlines()) == 1


def test_an_interrupt_ends_it_and_closes_the_session(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from lineshaft_conformance.mutants.toolchains import PlainSession

    closed: list[bool] = []
    monkeypatch.setattr(PlainSession, "close", lambda self: closed.append(True))
    status, out, err = run("--backend-option", "does=linear is interrupted")
    assert (status, out, err, closed) == (130, "", "lineshaft: interrupted\n", [True])


def test_a_compiler_that_fails_is_the_failure_of_the_command(run: Run) -> None:
    status, out, err = run("--backend-option", "does=linear fails")
    assert (status, out) == (2, "")
    assert err.startswith("lineshaft: error: PluginError: forward/") and "RuntimeError: out of scratch memory" in err


def test_a_config_alone_is_enough_to_compile_only(run: Run, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--programs", "sample/b1-r1")[0] == 0
    assert main(["explain", "--backend", "numpy", "--model", str(model)]) == 2
    assert "neither model.safetensors nor" in capsys.readouterr().err


def test_what_is_left_is_estimated_from_what_was_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 10.0, 20.0, 30.0, 100.0])
    monkeypatch.setattr("lineshaft_conformance.cli.compile.time.monotonic", lambda: next(clock))
    told, program = Told(), CompiledProgram("forward/t1-b1-r1-q1", StepShape(1, 1, (1,), 1, 1), CaptureReport(2.0))
    for done in range(1, 5):
        told(done, 4, program)
    lines = capsys.readouterr().err.splitlines()
    assert ["remain" in line for line in lines] == [False, False, True, False]
    assert lines[2] == "3 of 4: forward/t1-b1-r1-q1 in 2.0 s, about 10 s remain"


def test_layout_options_add_up_and_an_option_of_the_key_wins(run: Run) -> None:
    assert degrees(["dp=2, tp=4", "cp=1"]) == {"layout.dp": "2", "layout.tp": "4", "layout.cp": "1"}
    with pytest.raises(InvalidValue, match="each once"):
        degrees(["tp=2", "tp=2"])
    found = json.loads(run("--json", "--layout", "tp=4", "--tp", "2", "--set", "layout.dp=2")[1])
    assert (found["layout"]["tp"], found["layout"]["dp"]) == (2, 2)


def test_sizes_in_words() -> None:
    assert [human(n) for n in (0, 1023, 1024, 3 << 20, 3 << 29)] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "3.00 MiB",
        "1.50 GiB",
    ]
    assert [amount(n) for n in (7, 1500, 2 * 10**9)] == ["7", "1.50 k", "2.00 G"]
