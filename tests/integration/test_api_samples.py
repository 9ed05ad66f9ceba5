"""Several samples of a prompt, the best of several, priorities, deadlines, salts, token ids alone, chats with tools."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lineshaft import LLM, RequestOutput, SamplingParams
from lineshaft.errors import ChatError, InvalidSamplingParams, RequestError, TokenOutOfRange
from lineshaft.outputs import ToolCall

SETTINGS: dict[str, Any] = {
    "backend": "cpu", "dtype": "float32", "threads": 1, "max_model_len": 512, "cache.pages": 160,
    "scheduler.token_budget": 64, "scheduler.max_rows": 8, "max_logprobs": 3,
}  # fmt: skip
PROMPT = "Once upon a time"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module", params=["off", "on"])
def llm(even_chat: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    """With steps that overlap, and without."""
    with LLM(str(even_chat), **SETTINGS, overlap=request.param) as llm:
        yield llm


@pytest.fixture(autouse=True)
def books_balance(llm: LLM) -> Iterator[None]:
    yield
    assert not llm.engine.has_work
    llm.engine.check_integrity()
    assert [cache.used_pages() for cache in llm.engine.caches] == [0]


def params(**more: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": 5, "max_tokens": 12, "ignore_eos": True} | more)


def one(outputs: list[RequestOutput]) -> RequestOutput:
    assert len(outputs) == 1
    return outputs[0]


# ---- several samples -------------------------------------------------------------------------------------------------


def test_n_samples_are_different_and_repeat_with_their_seed(llm: LLM) -> None:
    first, again = (one(llm.generate(PROMPT, params(n=4))) for _ in range(2))
    texts = [completion.token_ids for completion in first.outputs]
    assert [completion.index for completion in first.outputs] == [0, 1, 2, 3]
    assert len({tuple(ids) for ids in texts}) == 4
    assert texts == [completion.token_ids for completion in again.outputs]
    alone = one(llm.generate(PROMPT, params()))
    assert alone.outputs[0].token_ids == texts[0]


def test_samples_of_several_prompts_keep_their_places(llm: LLM) -> None:
    outputs = llm.generate([PROMPT, "Two", "Three"], [params(n=2), params(n=1), params(n=3)])
    assert [len(output.outputs) for output in outputs] == [2, 1, 3]
    assert [output.prompt for output in outputs] == [PROMPT, "Two", "Three"]
    assert all(output.finished and output.metrics.total_s > 0 for output in outputs)


def test_best_of_keeps_the_likeliest(llm: LLM) -> None:
    every = one(llm.generate(PROMPT, params(n=5, logprobs=0))).outputs
    best = one(llm.generate(PROMPT, params(n=2, best_of=5))).outputs
    ranked = sorted(every, key=lambda completion: -(completion.cumulative_logprob or 0))
    assert [completion.token_ids for completion in best] == [completion.token_ids for completion in ranked[:2]]
    assert [completion.index for completion in best] == [0, 1]
    assert [completion.logprobs for completion in best] == [None, None]
    assert best[0].cumulative_logprob == pytest.approx(ranked[0].cumulative_logprob)


def test_a_stream_of_samples_tells_which_is_which(llm: LLM) -> None:
    whole = one(llm.generate(PROMPT, params(n=3)))
    deltas = list(llm.stream(PROMPT, params(n=3)))
    for completion in whole.outputs:
        own = [delta for delta in deltas if delta.index == completion.index]
        assert "".join(delta.text for delta in own) == completion.text
        assert [token for delta in own for token in delta.token_ids] == completion.token_ids
    assert [delta.output is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    assert deltas[-1].output is not None
    assert deltas[-1].output.outputs == whole.outputs


def test_a_stream_of_the_best_of_several_comes_at_the_end(llm: LLM) -> None:
    whole = one(llm.generate(PROMPT, params(n=2, best_of=4)))
    deltas = list(llm.stream(PROMPT, params(n=2, best_of=4)))
    assert [delta.index for delta in deltas] == [0, 1]
    assert [list(delta.token_ids) for delta in deltas] == [completion.token_ids for completion in whole.outputs]


def test_a_reader_that_leaves_cancels_all_samples(llm: LLM) -> None:
    stream = llm.stream(PROMPT, params(n=4, max_tokens=200))
    next(stream)
    stream.close()  # the fixture checks what is left


def test_best_of_without_log_probabilities_is_refused(even_chat: Path) -> None:
    small = SETTINGS | {"max_logprobs": 0, "max_model_len": 32, "cache.pages": 8, "scheduler.max_rows": 2}
    with LLM(str(even_chat), **small) as llm:
        with pytest.raises(InvalidSamplingParams, match=r"best_of = 3 for n = 1: .*max_logprobs = 0"):
            llm.generate("a", params(n=1, best_of=3))
        assert not llm.engine.has_work
        assert len(one(llm.generate("a", params(n=2))).outputs) == 2


def test_logprobs_of_each_sample_are_its_own(llm: LLM) -> None:
    for completion in one(llm.generate(PROMPT, params(n=3, logprobs=2))).outputs:
        assert completion.logprobs is not None
        chosen = [places[token] for token, places in zip(completion.token_ids, completion.logprobs, strict=True)]
        assert completion.cumulative_logprob == pytest.approx(sum(place.logprob for place in chosen))


# ---- token ids, texts ------------------------------------------------------------------------------------------------


def test_token_ids_in_and_out_need_no_text(llm: LLM) -> None:
    ids = llm.tokenize(PROMPT)
    assert llm.detokenize(ids) == PROMPT
    output = one(llm.generate({"prompt_token_ids": ids}, params(detokenize=False)))
    assert (output.prompt, output.prompt_token_ids, output.outputs[0].text) == (None, ids, "")
    with_text = one(llm.generate({"prompt": PROMPT}, params()))
    assert with_text.outputs[0].token_ids == output.outputs[0].token_ids
    assert with_text.outputs[0].text == llm.detokenize(output.outputs[0].token_ids)


@pytest.mark.parametrize("ids", [[256], [-1], [1.0], [True], "ab", None], ids=str)
def test_ids_that_are_none_are_refused(llm: LLM, ids: Any) -> None:
    with pytest.raises(RequestError) as caught:
        llm.detokenize(ids)
    assert isinstance(caught.value, TokenOutOfRange) == isinstance(ids, list)


def test_only_the_last_tokens_of_a_prompt_where_no_more_are_wanted(llm: LLM) -> None:
    output = one(llm.generate("x" * 600, params(truncate_prompt_tokens=7)))
    assert output.prompt_token_ids == llm.tokenize("x" * 7)


def test_a_stop_string_before_min_tokens_does_not_count(llm: LLM) -> None:
    text = one(llm.generate(PROMPT, params())).outputs[0].text
    stop = text[1]
    assert len(one(llm.generate(PROMPT, params(stop=stop))).outputs[0].token_ids) <= 2
    late = one(llm.generate(PROMPT, params(stop=[*text], min_tokens=8))).outputs[0]
    assert len(late.token_ids) >= 8


# ---- who runs when ---------------------------------------------------------------------------------------------------


def test_prompts_share_pages_under_one_salt_only(llm: LLM) -> None:
    prompt = "a prompt that nobody else has asked, long enough to fill some pages of the cache"
    cached = [
        one(llm.generate(prompt, params(), cache_salt=salt)).num_cached_tokens
        for salt in ("tenant one", "tenant one", "tenant two", "", "tenant two")
    ]
    assert [count > 0 for count in cached] == [False, True, False, False, True]
    mixed = llm.generate([{"prompt": prompt, "cache_salt": "tenant three"}, {"prompt": prompt}], params())
    assert [output.num_cached_tokens > 0 for output in mixed] == [False, True]


def test_a_deadline_ends_what_is_unfinished(llm: LLM) -> None:
    late, in_time = llm.generate(PROMPT, params(max_tokens=450), deadline_s=1e-3), llm.generate(PROMPT, params())
    assert one(late).outputs[0].finish_reason == "deadline"
    assert one(late).finished
    assert one(in_time).outputs[0].finish_reason == "length"
    deltas = list(llm.stream(PROMPT, params(max_tokens=450), deadline_s=0.05))
    assert deltas[-1].finish_reason == "deadline"


def test_each_request_has_its_priority(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    real, added = llm.engine.add, []

    def add(*given: Any, **more: Any) -> Any:
        added.append(real(*given, **more))
        return added[-1]

    monkeypatch.setattr(llm.engine, "add", add)
    llm.generate(["a", "b"], params(n=2), priority=[-3, 7])
    llm.generate(["a", "b"], params(), priority=5)
    assert [request.priority for request in added] == [-3, -3, 7, 7, 5, 5]
    assert [request.fork for request in added] == [0, 1, 0, 1, 0, 0]
    assert added[1].parent is added[0]


def test_a_lower_priority_runs_first_where_priorities_decide(even_chat: Path) -> None:
    few = SETTINGS | {"scheduler.admission": "priority", "scheduler.max_rows": 2, "max_logprobs": 0}
    with LLM(str(even_chat), **few) as llm:
        outputs = llm.generate([f"prompt {n}" for n in range(8)], params(), priority=[*range(8, 0, -1)])
    waited = [output.metrics.queue_s for output in outputs]
    assert waited == sorted(waited, reverse=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"priority": 1.5}, "priority = 1.5"),
        ({"priority": [1, 2]}, "one for each prompt"),
        ({"priority": True}, "priority = True"),
        ({"deadline_s": 0}, "deadline_s = 0"),
        ({"deadline_s": float("nan")}, "deadline_s = nan"),
        ({"deadline_s": 10**400}, "deadline_s = 1000"),
        ({"deadline_s": "soon"}, "deadline_s = 'soon'"),
        ({"cache_salt": b"x"}, "cache_salt = b'x'"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(llm: LLM, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        llm.generate(PROMPT, params(), **options)


@pytest.mark.parametrize(
    "prompt", [{}, {"text": "a"}, {"prompt": 3}, {"prompt": "a", "cache_salt": 3}, {"prompt_token_ids": "a", "x": 1}]
)
def test_wrong_prompts_are_refused(llm: LLM, prompt: Any) -> None:
    with pytest.raises(RequestError):
        llm.generate(prompt, params())


def test_an_unknown_option_is_a_mistake_of_the_caller(llm: LLM) -> None:
    with pytest.raises(TypeError, match="pirority"):
        llm.generate(PROMPT, params(), pirority=3)  # type: ignore[call-arg]


# ---- chats -----------------------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def test_a_template_of_the_callers_own_and_what_it_reads(llm: LLM) -> None:
    source = TEMPLATE + "{{ mood }}{% if add_generation_prompt %}assistant:{% endif %}"
    output = one(llm.chat("hi", params(), chat_template=source, chat_template_kwargs={"mood": "merry "}))
    assert output.prompt == "user: hi\nmerry assistant:"
    with pytest.raises(RequestError, match="chat_template_kwargs"):
        llm.chat("hi", params(), chat_template=source, chat_template_kwargs={"tools": 3})


def test_a_continued_message_goes_on_where_it_ends(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, I "}]
    output = one(llm.chat(messages, params(), chat_template=TEMPLATE, continue_final_message=True))
    assert output.prompt == "user: hi\nassistant: Well, I "


def test_tool_calls_are_in_the_output_and_the_text_is_kept(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    script = llm.tokenize(answer)
    llm.engine.teacher = lambda request, logits: script[len(request.output)]
    try:
        asked: dict[str, Any] = {"chat_template": TEMPLATE, "tools": [TOOL]}
        output = one(llm.chat("hi", params(max_tokens=len(script)), **asked))
        last = list(llm.stream("hi", params(max_tokens=len(script)), chat=True, **asked))[-1]
        without = one(llm.chat("hi", params(max_tokens=len(script)), chat_template=TEMPLATE))
    finally:
        llm.engine.teacher = None
    assert output.outputs[0].text == answer
    assert output.outputs[0].tool_calls == [ToolCall("add", {"a": 1})]
    assert last.output is not None
    assert last.output.outputs[0].tool_calls == [ToolCall("add", {"a": 1})]
    assert without.outputs[0].tool_calls == []


@pytest.mark.parametrize(
    ("conversation", "options", "words"),
    [
        ([], {}, "at least one|no prompts|0 prompts"),
        ([[]], {}, "at least one message"),
        ("hi", {"tools": [{"name": "add"}]}, "is no function"),
        ("hi", {"tools": {"name": "add"}}, "must be a list"),
        ("hi", {"chat_template": "{{ raise_exception('only once') }}"}, "TemplateError: only once"),
        ("hi", {"chat_template": None}, "no chat template"),
        ("hi", {"chat_template": "{% if %}"}, "cannot be compiled"),
    ],
)
def test_wrong_chats_are_refused(llm: LLM, conversation: Any, options: dict[str, Any], words: str) -> None:
    if conversation == []:
        assert llm.chat(conversation, params(), chat_template=TEMPLATE) == []
        return
    with pytest.raises(ChatError, match=words):
        llm.chat(conversation, params(), **{"chat_template": TEMPLATE} | options)
