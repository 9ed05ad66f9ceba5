"""The options that commands have for SamplingParams: one for each field, read as its type, refused where it is not."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from lineshaft.cli.sampling import CONFIGURED, MEANINGS, add_sampling_arguments
from lineshaft.config.models import SamplingConfig
from lineshaft.sampling.params import SamplingParams
from lineshaft.sampling.structured import Structured

Run = Callable[..., tuple[int, str, str]]
GENERATE = ("generate", "--model", "m", "--quiet")
CASES: dict[str, tuple[list[str], Any]] = {
    "n": (["--n", "3"], 3),
    "best_of": (["--best-of", "3"], 3),
    "temperature": (["--temperature", "0.5"], 0.5),
    "top_p": (["--top-p", "0.9"], 0.9),
    "top_k": (["--top-k", "40"], 40),
    "min_p": (["--min-p", "0.1"], 0.1),
    "typical_p": (["--typical-p", "0.9"], 0.9),
    "repetition_penalty": (["--repetition-penalty", "1.2"], 1.2),
    "presence_penalty": (["--presence-penalty", "-1"], -1.0),
    "frequency_penalty": (["--frequency-penalty", "0.5"], 0.5),
    "logit_bias": (["--logit-bias", "3=-100", "--logit-bias", "4=2.5"], {3: -100.0, 4: 2.5}),
    "allowed_token_ids": (["--allowed-token-ids", "[3, 1, 2]"], (1, 2, 3)),
    "bad_words": (["--bad-words", "a b", "--bad-words", "c"], ("a b", "c")),
    "seed": (["--seed", "7"], 7),
    "stop": (["--stop", "x", "--stop", "y z"], ("x", "y z")),
    "stop_token_ids": (["--stop-token-ids", "1,2 3"], (1, 2, 3)),
    "ignore_eos": (["--ignore-eos"], True),
    "min_tokens": (["--min-tokens", "3"], 3),
    "max_tokens": (["--max-tokens", "30"], 30),
    "logprobs": (["--logprobs", "2"], 2),
    "prompt_logprobs": (["--prompt-logprobs", "2"], 2),
    "detokenize": (["--no-detokenize"], False),
    "skip_special_tokens": (["--no-skip-special-tokens"], False),
    "include_stop_str_in_output": (["--include-stop-str-in-output"], True),
    "truncate_prompt_tokens": (["--truncate-prompt-tokens", "9"], 9),
}


def test_every_field_has_an_option_but_functions() -> None:
    names = {field.name for field in fields(SamplingParams)}
    assert names - set(MEANINGS) == {"structured", "logits_processors"}
    assert set(CASES) == set(MEANINGS) <= names
    assert set(CONFIGURED) == set(SamplingConfig.model_fields)


@pytest.mark.parametrize("name", CASES)
def test_each_option_sets_its_field(lineshaft_run: Run, fake: dict[str, Any], name: str) -> None:
    options, value = CASES[name]
    status, _, err = lineshaft_run(*GENERATE, "--prompt", "x", *options)
    assert (status, err) == (0, "")
    assert getattr(fake["params"], name) == value
    assert fake["params"] == SamplingParams(**{"max_tokens": 256, name: value})


def test_structured_outputs_from_files_and_texts(lineshaft_run: Run, fake: dict[str, Any], tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    (tmp_path / "rules.lark").write_text('start: "a"')
    for options, expected in (
        (["--json-schema", json.dumps(schema)], Structured(json=schema)),
        (["--json-schema", str(tmp_path / "schema.json")], Structured(json=schema)),
        (["--regex", "[0-9]+"], Structured(regex="[0-9]+")),
        (["--grammar", str(tmp_path / "rules.lark")], Structured(grammar='start: "a"')),
        (["--choice", "yes", "--choice", "no"], Structured(choice=["yes", "no"])),
    ):
        assert lineshaft_run(*GENERATE, "--prompt", "x", *options)[0] == 0
        assert fake["params"].structured == expected


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (["--n", "many"], "InvalidValue", "--n 'many': it should be a whole number"),
        (["--n", "0"], "InvalidSamplingParams", "n = 0"),
        (["--n", "2", "--temperature", "0"], "InvalidSamplingParams", "temperature = 0 and 2 outputs"),
        (["--n", "4", "--best-of", "2"], "InvalidSamplingParams", "best_of"),
        (["--min-p", "x"], "InvalidValue", "--min-p 'x': it should be a number"),
        (["--min-p", "nan"], "InvalidSamplingParams", "min_p = nan"),
        (["--logit-bias", "3"], "InvalidValue", "--logit-bias '3': it should be ID=V"),
        (["--logit-bias", "a=1"], "InvalidValue", "--logit-bias 'a=1'"),
        (["--logit-bias", "1=2=3"], "InvalidValue", "--logit-bias '1=2=3'"),
        (["--logit-bias", "1=1000"], "InvalidSamplingParams", "logit_bias"),
        (["--stop-token-ids", "1,,x"], "InvalidValue", "--stop-token-ids '1,,x': it should be token ids"),
        (["--stop-token-ids", ""], "InvalidValue", "--stop-token-ids ''"),
        (["--stop", ""], "InvalidSamplingParams", "stop"),
        (["--regex", "a", "--choice", "b"], "InvalidStructure", "regex and choice"),
        (["--json-schema", "{nonsense"], "InvalidStructure", "no JSON"),
        (["--json-schema", "/nowhere.json"], "InvalidValue", "--json-schema /nowhere.json: it cannot be read"),
        (["--grammar", "/"], "InvalidValue", "--grammar /: it cannot be read"),
        (["--chat-template", "/nowhere"], "InvalidValue", "--chat-template /nowhere: it cannot be read"),
        (["--no-detokenize", "--stop", "x"], "InvalidSamplingParams", "detokenize"),
    ],
    ids=" ".join,
)
def test_what_means_nothing_is_one_line(
    lineshaft_run: Run, fake: dict[str, Any], options: list[str], error: str, words: str
) -> None:
    status, out, err = lineshaft_run(*GENERATE, "--prompt", "x", *options)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"lineshaft: error: {error}: ")
    assert words in err
    assert fake == {}  # nothing was opened


@pytest.mark.parametrize(("text", "ids"), [("1,2,3", [1, 2, 3]), ("[4, 5]", [4, 5]), (" 6 7 ", [6, 7])])
def test_a_prompt_of_token_ids_is_given_as_it_is(
    lineshaft_run: Run, fake: dict[str, Any], text: str, ids: list[int]
) -> None:
    assert lineshaft_run(*GENERATE, "--prompt-ids", text)[:2] == (0, "one two\n")
    assert (fake["prompt"], fake["chat"]) == (ids, False)
    status, out, _ = lineshaft_run(*GENERATE, "--prompt-ids", text, "--prompt-ids", "9", "--json")
    assert (status, fake["prompts"], fake["raw"]) == (0, [ids, [9]], True)
    assert [output["prompt"] for output in json.loads(out)["outputs"]] == [None, None]


@pytest.mark.parametrize("text", ["", "a", "1;2", "1.5", "[]", "[1"])
def test_garbage_for_token_ids(lineshaft_run: Run, fake: dict[str, Any], text: str) -> None:
    status, out, err = lineshaft_run(*GENERATE, "--prompt-ids", text)
    assert (status, out, fake) == (2, "", {})
    assert err.startswith(f"lineshaft: error: InvalidValue: --prompt-ids {text!r}: it should be token ids")


def test_texts_and_ids_do_not_mix(lineshaft_run: Run) -> None:
    status, _, err = lineshaft_run(*GENERATE, "--prompt", "a", "--prompt-ids", "1")
    assert (status, err.count("\n")) == (2, 1)


def test_several_samples_are_numbered(lineshaft_run: Run, fake: dict[str, Any]) -> None:
    _, out, err = lineshaft_run("generate", "--model", "m", "--prompt", "a", "--n", "2")
    assert [line for line in out.splitlines() if not line.startswith(" ")] == ["[1]", "whole", "[2]", "whole1"]
    assert "finish reason: [1] stop, [2] stop\n" in err
    _, out, _ = lineshaft_run(*GENERATE, "--prompt", "a", "--prompt", "b", "--n", "2")
    lines = [line for line in out.splitlines() if line.startswith("[")]
    assert lines == ["[1.1] 'a'", "[1.2] 'a'", "[2.1] 'b'", "[2.2] 'b'"]
    found = json.loads(lineshaft_run(*GENERATE, "--prompt", "a", "--n", "2", "--json")[1])
    assert [sample["text"] for sample in found["outputs"][0]["samples"]] == ["whole", "whole1"]
    assert found["outputs"][0]["text"] == "whole"


def test_token_ids_are_printed_where_there_is_no_text(lineshaft_run: Run, fake: dict[str, Any]) -> None:
    assert lineshaft_run(*GENERATE, "--prompt", "a", "--no-detokenize")[1].splitlines()[0] == "1"


def test_log_probabilities_of_the_prompt(lineshaft_run: Run, fake: dict[str, Any]) -> None:
    _, out, _ = lineshaft_run(*GENERATE, "--prompt", "a", "--prompt-logprobs", "1")
    assert out.splitlines()[0] == "prompt:"
    found = json.loads(lineshaft_run(*GENERATE, "--prompt", "a", "--prompt-logprobs", "1", "--json")[1])
    assert found["outputs"][0]["prompt_logprobs"][0] is None
    assert found["outputs"][0]["prompt_logprobs"][1]["1"]["logprob"] == -0.5


def test_a_template_of_ones_own_reaches_the_chat(lineshaft_run: Run, fake: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    assert lineshaft_run(*GENERATE, "--prompt", "a", "--chat-template", str(tmp_path / "t.jinja"))[0] == 0
    assert fake["more"] == {"chat_template": "{{ messages }}"}


def test_the_options_of_a_command_can_leave_fields_out() -> None:
    parser = ArgumentParser()
    add_sampling_arguments(parser, without={"n"})
    assert not hasattr(parser.parse_args([]), "n")
    assert hasattr(parser.parse_args([]), "min_p")
