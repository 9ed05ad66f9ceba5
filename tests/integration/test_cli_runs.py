"""The command line on the small model: the demo's answer, streams and whole texts, and Ctrl-C in the middle."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.integration.conftest import SMOLLM2
from tests.integration.processes import COMMAND, SECONDS, Watch, environment, folders_of, lineshaft, start

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "examples" / "demo.toml")
QUESTION = "What is the capital of France?"
SMALL = ("--set", "scheduler.token_budget=64", "--set", "scheduler.max_rows=2", "--set", "max_logprobs=3")


def test_the_demo_answers_paris() -> None:
    command = [str(Path(sys.executable).with_name("lineshaft")), "generate", "--config", DEMO, "--prompt", QUESTION]
    done = subprocess.run(
        [*command, "--max-tokens", "32", "--temperature", "0"],
        env=environment(), capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "Traceback" not in done.stderr
    for word in ("cpu", "tokens/s", "pages", "finish reason: stop", "TTFT", "TPOT", "plan "):
        assert word in done.stderr


def test_streamed_and_whole_texts_are_the_same() -> None:
    common = ("generate", "--config", DEMO, "--prompt", QUESTION, "--max-tokens", "16", "--temperature", "0", *SMALL)
    streamed, whole = lineshaft(*common, "--quiet"), lineshaft(*common, "--quiet", "--no-stream")
    assert streamed.stdout == whole.stdout != ""
    assert streamed.stderr == whole.stderr == ""


def test_several_prompts_and_log_probabilities() -> None:
    done = lineshaft(
        "generate", "--config", DEMO, "--raw", "--prompt", "1 2 3", "--prompt", "a b c", "--max-tokens", "4",
        "--temperature", "0", "--logprobs", "2", "--quiet", *SMALL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("*") == 8  # one chosen token at each of four places of two texts


def test_json_says_what_the_run_gave(even_chat: Path) -> None:
    common = ("generate", "--model", str(even_chat), "--backend", "cpu", "--raw", "--max-tokens", "5", *SMALL)
    done = lineshaft(*common, "--prompt", "a", "--prompt", "bc", "--temperature", "0", "--ignore-eos", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert [output["prompt"] for output in found["outputs"]] == ["a", "bc"]
    assert [len(output["token_ids"]) for output in found["outputs"]] == [5, 5]
    assert [output["finish_reason"] for output in found["outputs"]] == ["length", "length"]
    assert all(output["metrics"]["ttft_s"] > 0 for output in found["outputs"])
    assert (found["run"]["requests"], found["run"]["output_tokens"]) == (2, 10)
    assert len(found["plan"]) == 64


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_everything_with_one_line(tmp_path: Path, workers: int, even_chat: Path) -> None:
    model = SMOLLM2 if workers == 1 else str(even_chat)
    process = start(
        "generate", "--model", model, "--backend", "cpu", "--raw", "--prompt", "Once upon a time",
        "--max-tokens", "100000", "--ignore-eos", "--quiet", "--tp", str(workers), *SMALL,
        env={"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(1)  # it generates
    with Watch.children(process.pid) as children:
        assert len(children.pids) >= (workers if workers > 1 else 0)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=SECONDS)
        assert children.all_end(10)
    assert process.returncode == 130
    assert said.splitlines() == ["lineshaft: interrupted"]
    assert folders_of(tmp_path) == []


CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def test_token_ids_and_several_samples(even_chat: Path) -> None:
    common = (
        "generate",
        "--model",
        str(even_chat),
        "--backend",
        "cpu",
        "--dtype",
        "float32",
        "--max-tokens",
        "4",
        *SMALL,
    )
    done = lineshaft(*common, "--prompt-ids", "[64, 65]", "--n", "3", "--seed", "1", "--prompt-logprobs", "1", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (output,) = json.loads(done.stdout)["outputs"]
    assert (output["prompt"], output["prompt_token_ids"]) == (None, [64, 65])
    assert len({tuple(sample["token_ids"]) for sample in output["samples"]}) == 3
    assert output["prompt_logprobs"][0] is None
    assert "65" in output["prompt_logprobs"][1]
    again = lineshaft(*common, "--prompt-ids", "64,65", "--n", "3", "--seed", "1", "--no-detokenize", "--quiet")
    assert [line.split() for line in again.stdout.splitlines() if not line.startswith("[")] == [
        [str(token) for token in sample["token_ids"]] for sample in output["samples"]
    ]


def test_a_text_follows_its_schema() -> None:
    schema = '{"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}'
    done = lineshaft(
        "generate", "--config", DEMO, "--prompt", QUESTION, "--json-schema", schema, "--temperature", "0", "--quiet",
        "--max-tokens", "60", *SMALL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "city" in json.loads(done.stdout)


def test_a_conversation_on_a_pipe_remembers() -> None:
    done = subprocess.run(
        [*COMMAND, "chat", "--config", DEMO, "--temperature", "0", "--max-tokens", "24", "--json", *SMALL],
        env=environment(), input=f"{QUESTION}\nWhat did I ask?\n", capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    *answers, end = map(json.loads, done.stdout.splitlines())
    said = [turn for answer in answers for turn in answer["messages"]]
    assert [turn["role"] for turn in said] == ["user", "assistant"] * 2
    assert set(end) == {"run", "plan"}
    assert "Paris" in said[1]["content"]


def test_ctrl_c_ends_the_answer_and_not_the_conversation(even_chat: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(CHAT_TEMPLATE)
    process = start(
        "chat", "--model", str(even_chat), "--backend", "cpu", "--chat-template", str(tmp_path / "t.jinja"),
        "--max-tokens", "10000", "--ignore-eos", "--no-skip-special-tokens", *SMALL, stdin=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("endless\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate("/params max_tokens=3\nshort\n", timeout=SECONDS)
    assert process.returncode == 0, err
    assert "max_tokens=3" in err
    assert "Traceback" not in err
    assert len(out) > 3


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = start(
        "generate", "--model", SMOLLM2, "--backend", "cpu", "--raw", "--prompt", "Once", "--max-tokens", "200",
        "--ignore-eos", "--quiet", *SMALL,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(1)
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(SECONDS) == 141
    assert said == ""
