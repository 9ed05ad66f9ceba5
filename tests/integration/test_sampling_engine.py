"""Penalties, bans, structured outputs and processors through the whole engine: equal to transformers, valid, and the
same in any batch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.integration.checkpoints import CHAT
from tests.integration.conftest import Checkpoint, Llama
from tests.integration.driving import BACKENDS, Run, config, drive
from tests.integration.oracle import make_model
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from lineshaft import LLM, SamplingParams, Structured
from lineshaft.engine import Engine
from lineshaft.errors import InvalidSamplingParams, InvalidStructure, RequestError, TokenOutOfRange
from lineshaft.sampling.vocabulary import Vocabulary
from lineshaft.tokenizer import Tokenizer as TextTokenizer

EXTRAS = {"sampling_extras": True, "max_model_len": 64, "cache.pages": 80, "cache.page_size": 4}
CRAMPED = {**EXTRAS, "cache.pages": 18, "scheduler.token_budget": 8}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "yz"]}},
    "required": ["a", "b"], "additionalProperties": False, "x-guidance": {"whitespace_flexible": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose tokens are bytes and an end."""
    folder = tmp_path_factory.mktemp("bytes")
    make_model(folder, **{**CHAT, "vocab_size": 260, "max_position_embeddings": 64})
    tokenizer = Tokenizer(
        BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return folder


@pytest.fixture(scope="module")
def llm(bytes_model: Path) -> Any:
    with LLM.from_config(config(bytes_model, **EXTRAS, max_logprobs=3)) as llm:
        yield llm


# ---- beside transformers ---------------------------------------------------------------------------------------------

ORACLES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "repetition": ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
    "bias": ({"logit_bias": {5: 4.0, 60: 3.0}}, {"sequence_bias": {(5,): 4.0, (60,): 3.0}}),
    "early end": (
        {"min_tokens": 8, "stop_token_ids": list(range(60)), "bad_words": [[100], [101]]},
        {"min_new_tokens": 8, "eos_token_id": list(range(60)), "bad_words_ids": [[100], [101]]},
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_tokens_are_those_of_transformers(llama: Llama, backend: str) -> None:
    checkpoint = llama("gqa1")
    prompts = checkpoint.oracle.prompts(3, [9, 14, 5])
    common = {"temperature": 0, "max_tokens": 20}
    params = [SamplingParams(**{**common, **ours}) for ours, _ in ORACLES.values()]
    small = {**EXTRAS, **BACKENDS[backend], "scheduler.max_rows": 3 if backend == "cpu" else 1}
    with Engine(config(checkpoint.path, **{**small, "scheduler.token_budget": 16})) as engine:
        got = drive(engine, prompts, params, look=False).tokens
        plain = drive(engine, prompts, SamplingParams(**common), look=False).tokens
    for prompt, (_, theirs), tokens in zip(prompts, ORACLES.values(), got, strict=True):
        assert tokens == generated(checkpoint, prompt, theirs)
    assert all(ours != others for ours, others in zip(got, plain, strict=True))


def generated(checkpoint: Checkpoint, prompt: Sequence[int], settings: dict[str, Any]) -> list[int]:
    ids = torch.tensor([list(prompt)])
    out = checkpoint.oracle.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, pad_token_id=0, **settings
    )
    return [int(token) for token in out[0, len(prompt) :]]


# ---- the same in any batch -------------------------------------------------------------------------------------------


def various() -> list[SamplingParams]:
    common = {"max_tokens": 20, "temperature": 1.0}
    settings: list[dict[str, Any]] = [
        {"structured": Structured(json=SCHEMA), "seed": 1},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.4, "typical_p": 0.8, "seed": 2, "ignore_eos": True},
        {"structured": Structured(regex="[a-d]{12}"), "seed": 3, "top_k": 3},
        {"temperature": 0.0, "presence_penalty": 1.0, "ignore_eos": True},
        {"seed": 5, "top_p": 0.9, "ignore_eos": True},
        {"allowed_token_ids": list(range(40, 60)), "seed": 6, "min_tokens": 6},
    ]
    return [SamplingParams(**{**common, **each}) for each in settings]


PROMPTS = [list(range(n, 2 * n)) for n in (3, 11, 6, 9, 5, 4)]


def run(model: Path, which: Sequence[int], **settings: Any) -> Run:
    params = various()
    with LLM.from_config(config(model, **settings)) as llm:
        return drive(llm.engine, [PROMPTS[i] for i in which], [params[i] for i in which], look=False)


def test_neither_batch_nor_chunks_nor_preemption_nor_a_process_change_what_comes(bytes_model: Path) -> None:
    exact = {"backend": "numpy", "dtype": "float64"}
    alone = [run(bytes_model, [i], **EXTRAS, **exact).tokens[0] for i in range(len(PROMPTS))]
    together = run(bytes_model, range(len(PROMPTS)), **EXTRAS, **exact, executor="process")
    cramped = run(bytes_model, range(len(PROMPTS)), **CRAMPED, **exact)
    assert together.preemptions == 0 < cramped.preemptions
    assert together.tokens == alone
    assert cramped.tokens == alone
    assert set(alone[5]) <= set(range(40, 60))


# ---- what users see --------------------------------------------------------------------------------------------------


def test_structured_outputs_parse_and_end_by_themselves(llm: LLM) -> None:
    kinds = [
        (Structured(json=SCHEMA), lambda text: set(json.loads(text)) == {"a", "b"}),
        (Structured(regex="[0-9]{2}:[a-f]{3}"), re.compile("[0-9]{2}:[a-f]{3}").fullmatch),
        (Structured(choice=["north", "south", "süd"]), {"north", "south", "süd"}.__contains__),
        (Structured(grammar='start: "<" /[a-c]/ ">"'), re.compile("<[a-c]>").fullmatch),
    ]
    for structured, right in kinds:
        params = [SamplingParams(structured=structured, seed=seed, max_tokens=50) for seed in range(8)]
        outputs = [output.outputs[0] for output in llm.generate(["tell: "] * 8, params, progress=False)]
        assert {output.finish_reason for output in outputs} == {"stop"}
        assert all(right(output.text) for output in outputs), [output.text for output in outputs]
        assert len({output.text for output in outputs}) > 1


def test_log_probabilities_are_those_of_the_masked_logits(llm: LLM) -> None:
    params = SamplingParams(temperature=0, structured=Structured(choice=["a", "b"]), logprobs=3)
    [output] = llm.generate("x", params, progress=False)
    assert output.outputs[0].logprobs is not None
    [entry] = output.outputs[0].logprobs
    real = {item.decoded_token: item.logprob for item in entry.values() if item.logprob > -np.inf}
    assert set(real) == {"a", "b"} and sum(np.exp(list(real.values()))) == pytest.approx(1)


def test_a_processor_bans_a_token_and_one_that_fails_ends_its_own_request(llm: LLM) -> None:
    seen: list[tuple[list[int], list[int]]] = []

    def ban(output: Sequence[int], prompt: Sequence[int], logits: Any) -> Any:
        seen.append((list(output), list(prompt)))
        logits[banned] = -np.inf
        return logits

    def fail(output: Sequence[int], prompt: Sequence[int], logits: Any) -> Any:
        raise ValueError("no")

    free = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    [plain] = llm.generate("abc", free, progress=False)
    banned = plain.outputs[0].token_ids[2]
    bound = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logits_processors=[ban])
    wrong = SamplingParams(max_tokens=8, logits_processors=[fail])
    first, second, third = (o.outputs[0] for o in llm.generate(["abc"] * 3, [bound, free, wrong], progress=False))
    assert banned not in first.token_ids and first.token_ids[:2] == plain.outputs[0].token_ids[:2]
    assert second.token_ids == plain.outputs[0].token_ids
    assert (third.finish_reason, third.token_ids) == ("error", [])
    assert [output for output, _ in seen] == [first.token_ids[:n] for n in range(8)]
    assert all(prompt == plain.prompt_token_ids for _, prompt in seen)


def test_a_processor_that_asks_the_engine_itself_fails_alone(llm: LLM) -> None:
    said: list[str] = []

    def ask(output: Sequence[int], prompt: Sequence[int], logits: Any) -> Any:
        try:
            return llm.generate("abc", SamplingParams(max_tokens=1), progress=False)
        except RequestError as error:
            said.append(str(error))
            raise

    free = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    [plain] = llm.generate("abc", free, progress=False)
    asking = SamplingParams(max_tokens=8, logits_processors=[ask])
    other, own = (o.outputs[0] for o in llm.generate(["abc"] * 2, [free, asking], progress=False))
    assert other.token_ids == plain.outputs[0].token_ids
    assert own.finish_reason == "error" and "a step is under way" in said[0]
    assert not llm.engine.has_work and [cache.used_pages() for cache in llm.engine.caches] == [0]


def test_a_processor_that_changes_nothing_changes_nothing(llm: LLM) -> None:
    settings: dict[str, Any] = {"seed": 4, "max_tokens": 12, "top_p": 0.9, "logprobs": 2, "repetition_penalty": 1.1}
    keep = SamplingParams(**settings, logits_processors=[lambda output, prompt, logits: logits])
    [one], [other] = (llm.generate("abc", p, progress=False) for p in (SamplingParams(**settings), keep))
    assert one.outputs[0].token_ids == other.outputs[0].token_ids
    assert one.outputs[0].cumulative_logprob == pytest.approx(other.outputs[0].cumulative_logprob, rel=1e-5)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_requests_that_cannot_be_served_are_refused_and_others_go_on(llm: LLM, bytes_model: Path) -> None:
    for error, message, settings in (
        (InvalidStructure, "structured.regex", {"structured": Structured(regex="(a")}),
        (TokenOutOfRange, "logit_bias", {"logit_bias": {260: 1.0}}),
    ):
        with pytest.raises(error, match=message):
            llm.generate("x", SamplingParams(**settings), progress=False)
    assert llm.generate("x", SamplingParams(max_tokens=2), progress=False)[0].finished
    with LLM.from_config(config(bytes_model, **{**EXTRAS, "sampling_extras": False})) as bare:
        for settings in ({"typical_p": 0.5}, {"min_tokens": 2}, {"allowed_token_ids": [1]}):
            with pytest.raises(InvalidSamplingParams, match=f"{next(iter(settings))} .*sampling_extras = false"):
                bare.generate("x", SamplingParams(**settings), progress=False)


def test_an_engine_without_a_tokenizer_takes_a_vocabulary(bytes_model: Path) -> None:
    with Engine(config(bytes_model, **EXTRAS)) as engine:
        params = SamplingParams(structured=Structured(regex="[ab]"))
        with pytest.raises(InvalidSamplingParams, match="token ids alone"):
            engine.add([1], params)
        tokenizer = TextTokenizer.from_checkpoint(bytes_model)
        engine.vocabulary = Vocabulary(tokenizer, engine.vocab, tokenizer.eos_ids)
        request = engine.add([1], params, tokenizer.eos_ids)
        while engine.has_work:
            engine.step()
        assert tokenizer.decode(request.output) in ("a", "b") and request.finish_reason == "stop"
