"""The Python API on SmolLM2, as its users see it: generate, chat, stream, stop, seeds, log-probabilities, errors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from tests.integration.conftest import SMOLLM2, Llama
from tests.integration.driving import config, greedy

from lineshaft import LLM, RequestOutput, SamplingParams
from lineshaft.engine import Engine
from lineshaft.errors import (
    EmptyPrompt,
    InvalidSamplingParams,
    OutOfMemory,
    PoolTooSmall,
    PromptTooLong,
    RequestError,
    SessionClosed,
    TokenOutOfRange,
)

FRANCE = "The capital of France is"
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SETTINGS: dict[str, Any] = {
    "backend": "cpu", "dtype": "float32", "threads": 1, "max_model_len": 256, "cache.pages": 40,
    "scheduler.token_budget": 64, "scheduler.max_rows": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(SMOLLM2, **SETTINGS) as llm:
        yield llm


@pytest.fixture(autouse=True)
def books_balance(llm: LLM) -> Iterator[None]:
    """After every test no request is left, no page is held, and the cache manager's books balance."""
    yield
    assert not llm.engine.has_work
    llm.engine.check_integrity()
    assert [replica.cache.used_pages() for replica in llm.engine._replicas] == [0]


def one(outputs: list[RequestOutput]) -> RequestOutput:
    assert len(outputs) == 1
    return outputs[0]


def test_a_text_a_list_of_texts_and_token_ids_are_prompts(llm: LLM) -> None:
    ids = llm.tokenizer.encode(FRANCE)
    text = one(llm.generate(FRANCE, GREEDY))
    listed = llm.generate([FRANCE, ids], GREEDY)
    tokens = one(llm.generate(ids, GREEDY))
    assert "Paris" in text.outputs[0].text
    assert {output.outputs[0].text for output in (text, tokens, *listed)} == {text.outputs[0].text}
    assert (text.prompt, tokens.prompt) == (FRANCE, None)
    assert text.prompt_token_ids == tokens.prompt_token_ids == ids


def test_an_output_has_the_fields_that_users_know(llm: LLM) -> None:
    output = one(llm.generate(FRANCE, GREEDY))
    completion = output.outputs[0]
    assert output.finished
    assert completion.index == 0
    assert len(completion.token_ids) == 12
    assert completion.text == llm.tokenizer.decode(completion.token_ids)
    assert (completion.finish_reason, completion.stop_reason) == ("length", None)
    assert (completion.logprobs, completion.cumulative_logprob) == (None, None)
    metrics = output.metrics
    assert 0 <= metrics.queue_s <= metrics.ttft_s < metrics.total_s
    assert metrics.total_s == pytest.approx(metrics.ttft_s + 11 * metrics.tpot_s, rel=0.5)


def test_each_prompt_may_have_its_own_params_and_keeps_its_place(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (9, 2, 5, 1, 7, 3)]
    outputs = llm.generate([f"{n} plus one is" for n in range(6)], params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [9, 2, 5, 1, 7, 3]
    assert [output.prompt for output in outputs] == [f"{n} plus one is" for n in range(6)]
    with pytest.raises(InvalidSamplingParams, match="2 sampling params for 1 prompts"):
        llm.generate([FRANCE], params[:2])


def test_a_prompt_that_was_seen_is_cached(llm: LLM) -> None:
    prompt = " ".join(str(n) for n in range(500, 530))
    first, again = (one(llm.generate(prompt, GREEDY)) for _ in range(2))
    page = llm.metrics().page_size
    assert first.num_cached_tokens == 0
    assert again.num_cached_tokens == (len(again.prompt_token_ids) - 1) // page * page > 0


def test_chat_uses_the_models_template(llm: LLM) -> None:
    question = "What is the capital of France?"
    alone = one(llm.chat(question, SamplingParams(temperature=0, max_tokens=20)))
    listed = one(llm.chat([{"role": "user", "content": question}], SamplingParams(temperature=0, max_tokens=20)))
    assert "Paris" in alone.outputs[0].text
    assert alone.outputs[0].text == listed.outputs[0].text
    assert alone.prompt is not None
    assert "<|im_start|>user" in alone.prompt
    assert alone.outputs[0].finish_reason == "stop"
    assert alone.outputs[0].stop_reason in llm.tokenizer.eos_ids
    assert "<|im_end|>" not in alone.outputs[0].text


def test_ignore_eos_goes_on(llm: LLM) -> None:
    output = one(llm.chat("Say hi.", SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)))
    assert len(output.outputs[0].token_ids) == 40
    assert llm.tokenizer.eos_ids & set(output.outputs[0].token_ids)


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_text(llm: LLM, include: bool) -> None:
    whole = one(llm.generate(FRANCE, GREEDY)).outputs[0].text
    params = SamplingParams(temperature=0, max_tokens=12, stop=["nowhere", "Paris"], include_stop_str_in_output=include)
    completion = one(llm.generate(FRANCE, params)).outputs[0]
    end = whole.index("Paris") + (len("Paris") if include else 0)
    assert completion.text == whole[:end]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "Paris")
    assert len(completion.token_ids) < 12


def test_a_stop_token_ends_the_text(llm: LLM) -> None:
    tokens = one(llm.generate(FRANCE, GREEDY)).outputs[0].token_ids
    stop = tokens[4]
    first = tokens.index(stop)
    params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[stop])
    completion = one(llm.generate(FRANCE, params)).outputs[0]
    assert completion.token_ids == tokens[: first + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


def test_seeds_repeat_and_differ(llm: LLM) -> None:
    def text(seed: int) -> str:
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=12, ignore_eos=True)
        return one(llm.generate("Once upon a time", params)).outputs[0].text

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(4)}) > 1


def test_log_probabilities_are_probabilities(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=8, logprobs=5, ignore_eos=True)
    completion = one(llm.generate(FRANCE, params)).outputs[0]
    assert completion.logprobs is not None
    assert len(completion.logprobs) == 8
    for token, places in zip(completion.token_ids, completion.logprobs, strict=True):
        assert token in places
        assert len(places) in (5, 6)  # the five likeliest, and the chosen one if it is not one of them
        ranked = sorted((place for place in places.values() if place.rank), key=lambda place: place.rank)
        assert [place.rank for place in ranked][:5] == [1, 2, 3, 4, 5]
        assert [place.logprob for place in ranked] == sorted((place.logprob for place in ranked), reverse=True)
        assert all(place.logprob <= ranked[-1].logprob for place in places.values() if not place.rank)
        assert sum(math.exp(place.logprob) for place in places.values()) <= 1 + 1e-3
        assert all(place.decoded_token == llm.tokenizer.decode([i], skip_special=False) for i, place in places.items())
    total = sum(places[token].logprob for token, places in zip(completion.token_ids, completion.logprobs, strict=True))
    assert completion.cumulative_logprob == pytest.approx(total)


def test_all_log_probabilities_sum_to_one(llama: Llama) -> None:
    path, oracle = llama("gqa1").path, llama("gqa1").oracle
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=oracle.vocab)
    with Engine(config(path, max_logprobs=oracle.vocab, **{"cache.pages": 40})) as engine:
        engine.add([1, 2, 3], params)
        while engine.has_work:
            for token in engine.step():
                assert token.logprobs is not None
                assert sorted(rank for _, rank in token.logprobs.values()) == list(range(1, oracle.vocab + 1))
                assert sum(math.exp(p) for p, _ in token.logprobs.values()) == pytest.approx(1, abs=1e-4)
                assert token.logprobs[token.token_id][1] == 1


def test_a_stream_adds_up_to_what_generate_gives(llm: LLM) -> None:
    params = SamplingParams(temperature=0.8, seed=11, max_tokens=20, ignore_eos=True)
    whole = one(llm.generate("Write a haiku 🌸:", params)).outputs[0]
    deltas = list(llm.stream("Write a haiku 🌸:", params))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]


def test_two_streams_in_turns_are_what_each_is_alone(llm: LLM) -> None:
    prompts = [FRANCE, "The largest ocean is"]
    alone = [one(llm.generate(prompt, GREEDY)).outputs[0].token_ids for prompt in prompts]
    turns = list(zip_longest(*(llm.stream(prompt, GREEDY) for prompt in prompts)))  # a turn may bring two tokens
    assert [[token for turn in turns if turn[i] for token in turn[i].token_ids] for i in range(2)] == alone


def test_a_reader_that_leaves_cancels_its_request(llm: LLM) -> None:
    stream = llm.stream("Count to a hundred:", SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
    assert next(stream).token_ids
    assert llm.engine._replicas[0].cache.used_pages() > 0
    stream.close()  # the fixture checks that its pages are free


def test_a_text_longer_than_the_context_ends_there(llm: LLM) -> None:
    prompt = [5] * 250
    completion = one(llm.generate(prompt, SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))).outputs[0]
    assert completion.finish_reason == "length"
    assert len(completion.token_ids) == 256 - 250


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        ([], EmptyPrompt, "no tokens"),
        ([1, 49152], TokenOutOfRange, "49152.*from 0 to 49151"),
        ([-1, 1], TokenOutOfRange, "-1"),
        ([1, True], TokenOutOfRange, "True"),
        ([1, 2.0], TokenOutOfRange, "2.0"),
        ([7] * 256, PromptTooLong, "256 tokens.*at most 255"),
    ],
)
def test_a_wrong_prompt_is_refused_and_the_others_go_on(
    llm: LLM, prompt: list[Any], error: type[RequestError], words: str
) -> None:
    bystander = llm.stream(FRANCE, GREEDY)
    tokens = list(next(bystander).token_ids)
    with pytest.raises(error, match=words):
        llm.generate([[1, 2, 3], prompt], GREEDY)
    tokens += [token for delta in bystander for token in delta.token_ids]
    assert tokens == one(llm.generate(FRANCE, GREEDY)).outputs[0].token_ids


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": math.nan},
        {"temperature": -1},
        {"max_tokens": 0},
        {"max_tokens": -3},
        {"top_p": 0.0},
        {"stop": ""},
    ],
    ids=str,
)
def test_params_that_mean_nothing_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidSamplingParams, match=next(iter(values))):
        SamplingParams(**values)


def test_more_log_probabilities_than_the_engine_was_made_for(llm: LLM) -> None:
    with pytest.raises(InvalidSamplingParams, match="max_logprobs = 20"):
        llm.generate(FRANCE, SamplingParams(logprobs=21))


@pytest.mark.parametrize(("pages", "error"), [(5, PoolTooSmall), (10**12, OutOfMemory)])
def test_a_pool_that_cannot_be_is_refused_before_anything_is_loaded(pages: int, error: type[Exception]) -> None:
    with pytest.raises(error, match="pages"):
        LLM(SMOLLM2, **{**SETTINGS, "cache.pages": pages})


def test_after_close_nothing_runs(llama: Llama) -> None:
    engine = Engine(config(llama("gqa1").path, **{"cache.pages": 40}))
    engine.add([1, 2, 3], greedy(4))
    engine.close()
    engine.close()
    assert not engine.has_work
    with pytest.raises(SessionClosed, match="closed"):
        engine.add([1, 2, 3], greedy(4))


def test_closing_during_a_stream_is_an_error_for_its_reader(even_chat: Path) -> None:
    with LLM(str(even_chat), **{**SETTINGS, "max_logprobs": 0}) as llm:
        done, cut = llm.stream("ab", greedy(1)), llm.stream("abc", greedy(100))
        assert next(cut).token_ids
        assert next(done).finish_reason == "length"
        llm.close()
        assert list(done) == []  # it was finished
        with pytest.raises(SessionClosed, match="closed before this request was finished"):
            list(cut)


@pytest.mark.parametrize("token", [-1, 300, 2.0, True], ids=str)
def test_a_teachers_token_outside_the_vocabulary_is_refused_and_the_engine_goes_on(llama: Llama, token: Any) -> None:
    checkpoint = llama("gqa1")
    assert checkpoint.oracle.vocab <= 300
    with Engine(config(checkpoint.path, max_model_len=32, **{"cache.pages": 8})) as engine:
        request = engine.add([1, 2, 3], greedy(4))
        engine.teacher = lambda request, logits: token
        with pytest.raises(TokenOutOfRange, match=f"teacher's token for request 0 {token!r}.*from 0 to"):
            engine.step()
        assert request.output == []
        engine.teacher = None
        while engine.has_work:
            engine.step()
            engine.check_integrity()
        expected = checkpoint.oracle.expect([1, 2, 3], 4).tokens
        assert request.output == list(expected)


@pytest.mark.parametrize(
    ("prompts", "params"),
    [
        ([[1, 2, 3], None], None),
        (["a", 1], None),
        (5, None),
        (None, None),
        ({"a": 1}, None),
        (b"abc", None),
        ([[1, 2], [3]], [GREEDY, None]),
        ("a", {"temperature": 0}),
    ],
    ids=["a prompt is None", "a prompt is a number", "number", "None", "dict", "bytes", "params None", "params dict"],
)
def test_arguments_of_wrong_types_are_refused_and_leave_nothing(llm: LLM, prompts: Any, params: Any) -> None:
    with pytest.raises(RequestError):
        llm.generate(prompts, params)
    assert "Paris" in one(llm.generate(FRANCE, GREEDY)).outputs[0].text


def test_logprobs_of_an_engine_made_without_them_are_refused(llama: Llama) -> None:
    settings = config(llama("gqa1").path, max_logprobs=0, max_model_len=32, **{"cache.pages": 8})
    with Engine(settings) as engine, pytest.raises(InvalidSamplingParams, match="max_logprobs = 0"):
        engine.add([1, 2], SamplingParams(logprobs=0))


def test_several_threads_may_generate_at_once(llm: LLM) -> None:
    prompts = [FRANCE, "Once upon a time", "The sky is", "Two and two"]
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(lambda prompt: one(llm.generate(prompt, GREEDY)).outputs[0].token_ids, prompts * 2))
    assert found == expected * 2
