"""AsyncLLM: many streams over one engine, equal to what LLM gives; leaving, aborting, a step's errors, the end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lineshaft import LLM, AsyncLLM, SamplingParams, Structured
from lineshaft.errors import (
    ChatError,
    InvalidSamplingParams,
    InvalidStructure,
    PromptTooLong,
    RequestError,
    SessionClosed,
    TokenOutOfRange,
    WorkerDied,
)
from lineshaft.outputs import RequestOutput, StreamDelta

SETTINGS: dict[str, Any] = {
    "backend": "cpu", "dtype": "float32", "threads": 1, "max_model_len": 256, "cache.pages": 80,
    "scheduler.token_budget": 64, "scheduler.max_rows": 16, "max_logprobs": 3,
}  # fmt: skip
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
Stream = AsyncGenerator[StreamDelta, None]


@pytest.fixture(scope="module", params=["off", "on"])
def engine(even_chat: Path, request: pytest.FixtureRequest) -> Iterator[AsyncLLM]:
    """With steps that overlap, and without."""
    llm = AsyncLLM(str(even_chat), **SETTINGS, overlap=request.param)
    yield llm
    llm.close()


@pytest.fixture
def run(engine: AsyncLLM) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Runs a coroutine to its end, within a minute; afterwards no request is left and no page held."""

    def to_end(work: Coroutine[Any, Any, Any]) -> Any:
        async def bounded() -> Any:
            result = await asyncio.wait_for(work, 60)
            await idle(engine)
            return result

        return asyncio.run(bounded())

    return to_end


async def idle(engine: AsyncLLM) -> None:
    """Wait until what was left is cancelled; nothing may remain."""
    while engine.engine.has_work:
        await engine.metrics()  # between two steps
    await engine.metrics()
    engine.engine.check_integrity()
    assert [cache.used_pages() for cache in engine.engine.caches] == [0]
    assert engine._streams == {}


async def collect(stream: AsyncIterator[StreamDelta]) -> list[StreamDelta]:
    return [delta async for delta in stream]


def output(deltas: list[StreamDelta]) -> RequestOutput:
    """The last delta's output, after a check that all deltas add up to it."""
    *before, last = deltas
    assert last.output is not None
    assert [delta.output for delta in before] == [None] * len(before)
    for completion in last.output.outputs:
        own = [delta for delta in deltas if delta.index == completion.index]
        assert "".join(delta.text for delta in own) == completion.text
        assert [token for delta in own for token in delta.token_ids] == completion.token_ids
        assert own[-1].finish_reason == completion.finish_reason
    return last.output


def test_fifty_streams_give_what_generate_gives(even_chat: Path, engine: AsyncLLM, run: Any) -> None:
    prompts = [f"{number} is a number" * (number % 3 + 1) for number in range(50)]
    params = [
        SamplingParams(temperature=0.9, seed=n, max_tokens=5 + n % 20, logprobs=n % 3 or None, stop=["Q", "zz"])
        for n in range(50)
    ]

    async def all_at_once() -> list[list[StreamDelta]]:
        return await asyncio.gather(*(collect(engine.generate(*pair)) for pair in zip(prompts, params, strict=True)))

    found = [output(deltas) for deltas in run(all_at_once())]
    with LLM(str(even_chat), **SETTINGS) as llm:
        expected = llm.generate(prompts, params, progress=False)
    for one, other in zip(found, expected, strict=True):
        assert one.prompt == other.prompt
        mine, theirs = one.outputs[0], other.outputs[0]
        assert (mine.text, mine.token_ids, mine.finish_reason, mine.stop_reason) == (
            theirs.text, theirs.token_ids, theirs.finish_reason, theirs.stop_reason,
        )  # fmt: skip
        assert [list(place) for place in mine.logprobs or ()] == [list(place) for place in theirs.logprobs or ()]
    assert {one.outputs[0].finish_reason for one in found} == {"stop", "length"}  # both kinds were tried


def test_requests_of_two_event_loops_share_the_engine(engine: AsyncLLM) -> None:
    found: dict[int, list[StreamDelta]] = {}

    def other(number: int) -> None:
        found[number] = asyncio.run(collect(engine.generate("one prompt", SHORT)))

    threads = [threading.Thread(target=other, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert output(found[0]).outputs[0].token_ids == output(found[1]).outputs[0].token_ids


def test_a_name_is_the_requests_own_and_is_free_again_afterwards(engine: AsyncLLM, run: Any) -> None:
    async def twice() -> None:
        first = engine.generate("a", LONG, request_id="mine")
        assert (await anext(first)).request_id == "mine"
        with pytest.raises(RequestError, match="'mine' is running already"):
            await anext(engine.generate("b", LONG, request_id="mine"))
        await first.aclose()
        deltas = await collect(engine.generate("b", SHORT, request_id="mine"))
        assert output(deltas).request_id == "mine"

    run(twice())


@pytest.mark.parametrize("way", ["aclose", "break", "task", "timeout"])
def test_a_consumer_that_leaves_cancels_its_request_and_no_other(engine: AsyncLLM, run: Any, way: str) -> None:
    async def leave(stream: Stream) -> None:
        if way == "aclose":
            await anext(stream)
            await stream.aclose()
        elif way == "break":
            async for _ in stream:
                break
        elif way == "task":
            began = asyncio.Event()

            async def read() -> None:
                async for _ in stream:
                    began.set()

            task = asyncio.create_task(read())
            await began.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await collect(stream)

    async def both() -> RequestOutput:
        bystander = asyncio.create_task(collect(engine.generate("bystander", LONG)))
        await leave(engine.generate("leaver", LONG))
        return output(await bystander)

    assert len(run(both()).outputs[0].token_ids) == 200


def test_a_task_cancelled_before_its_first_token_leaves_nothing(engine: AsyncLLM, run: Any) -> None:
    async def hurry() -> None:
        for _ in range(20):
            task = asyncio.create_task(collect(engine.generate("x" * 100, LONG)))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(hurry())


def test_abort_ends_a_request_for_its_consumer(engine: AsyncLLM, run: Any) -> None:
    async def aborted() -> list[StreamDelta]:
        stream = engine.generate("a", LONG, request_id="doomed")
        deltas = [await anext(stream)]
        await engine.abort("doomed")
        await engine.abort("never heard of")
        return deltas + await collect(stream)

    found = output(run(aborted()))
    assert found.outputs[0].finish_reason == "cancelled"
    assert 0 < len(found.outputs[0].token_ids) < 200


def test_a_slow_consumer_slows_nobody_and_finds_one_delta(engine: AsyncLLM, run: Any) -> None:
    async def slowly() -> list[StreamDelta]:
        slow = engine.generate("slow", LONG)
        first = await anext(slow)
        fast = output(await collect(engine.generate("fast", LONG)))
        assert len(fast.outputs[0].token_ids) == 200
        while engine.engine.has_work:
            await engine.metrics()
        return [first, *await collect(slow)]

    deltas = run(slowly())
    assert len(deltas) <= 4  # one or two before the fast one was done, one or two after
    assert len(output(deltas).outputs[0].token_ids) == 200


def test_the_event_loop_is_never_blocked(engine: AsyncLLM, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While steps take long, the loop goes round."""
    real = engine.engine.step

    def slow_step() -> Any:
        time.sleep(0.1)
        return real()

    monkeypatch.setattr(engine.engine, "step", slow_step)

    async def beats() -> list[float]:
        task = asyncio.create_task(collect(engine.generate("a", SamplingParams(temperature=0, max_tokens=5))))
        times = [time.monotonic()]
        while not task.done():
            await asyncio.sleep(0.002)
            times.append(time.monotonic())
        return times

    times = run(beats())
    gaps = sorted(b - a for a, b in pairwise(times))
    assert times[-1] - times[0] > 0.4
    assert gaps[len(gaps) * 9 // 10] < 0.05


@pytest.mark.parametrize(
    ("prompt", "params", "options", "error", "words"),
    [
        ([1, 999], SHORT, {}, TokenOutOfRange, "999"),
        ([7] * 256, SHORT, {}, PromptTooLong, "256 tokens"),
        (["a", "b"], SHORT, {}, RequestError, "2 prompts for one request"),
        (None, SHORT, {}, RequestError, "NoneType"),
        ("a", {"temperature": 1}, {}, InvalidSamplingParams, "dict"),
        ("a", SamplingParams(logprobs=9), {}, InvalidSamplingParams, "max_logprobs = 3"),
        ("a", SamplingParams(structured=Structured(regex="a")), {}, InvalidStructure, "no end-of-sequence token"),
        ("a", SHORT, {"priority": "high"}, RequestError, "priority = 'high'"),
        ("a", SHORT, {"deadline_s": -1}, RequestError, "deadline_s = -1"),
        ("a", SHORT, {"cache_salt": 3}, RequestError, "cache_salt = 3"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value)[:20],
)
def test_a_wrong_request_is_refused_and_the_others_go_on(
    engine: AsyncLLM, run: Any, prompt: Any, params: Any, options: Any, error: type[Exception], words: str
) -> None:
    async def beside() -> RequestOutput:
        good = asyncio.create_task(collect(engine.generate("good", SHORT)))
        with pytest.raises(error, match=words):
            await anext(engine.generate(prompt, params, **options))
        return output(await good)

    assert len(run(beside()).outputs[0].token_ids) == 6


def test_chats_and_their_errors(engine: AsyncLLM, run: Any) -> None:
    async def ask() -> RequestOutput:
        with pytest.raises(ChatError, match="no chat template"):
            await anext(engine.chat("hello"))
        with pytest.raises(ChatError, match="TemplateError: roles must alternate"):
            await anext(engine.chat("hello", chat_template="{{ raise_exception('roles must alternate') }}"))
        return output(await collect(engine.chat("hello", SHORT, chat_template=TEMPLATE)))

    assert run(ask()).prompt == "user: hello\nassistant:"


def test_an_error_of_a_step_reaches_every_request_and_the_next_one_may_run(
    engine: AsyncLLM, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = engine.engine.step, iter(range(1000))

    def fails_once() -> Any:
        if next(calls) == 3:
            raise WorkerDied("rank 0 is gone")
        return real()

    monkeypatch.setattr(engine.engine, "step", fails_once)

    async def all_fail() -> RequestOutput:
        streams = (collect(engine.generate(f"number {n}", LONG)) for n in range(10))
        found = await asyncio.gather(*streams, return_exceptions=True)
        assert [str(one) for one in found] == ["rank 0 is gone"] * 10
        assert {type(one) for one in found} == {WorkerDied}
        return output(await collect(engine.generate("next", SHORT)))

    assert len(run(all_fail()).outputs[0].token_ids) == 6


def test_an_engine_that_only_fails_says_so_to_all(even_chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = AsyncLLM(str(even_chat), **SETTINGS)

    def fails() -> Any:
        raise WorkerDied("rank 0 is gone")

    monkeypatch.setattr(llm.engine, "step", fails)

    async def ask() -> None:
        for _ in range(3):
            with pytest.raises(WorkerDied, match="rank 0 is gone"):
                await collect(llm.generate("a", LONG))
        await llm.shutdown()

    asyncio.run(asyncio.wait_for(ask(), 60))


@pytest.mark.parametrize("way", ["shutdown", "close in a thread"])
def test_shutting_down_while_streaming(even_chat: Path, way: str) -> None:
    async def shut() -> None:
        llm = AsyncLLM(str(even_chat), **SETTINGS)
        done = await collect(llm.generate("done", SHORT))
        tasks = [asyncio.create_task(collect(llm.generate(f"number {n}", LONG))) for n in range(8)]
        stream = llm.generate("mine", LONG)
        await anext(stream)
        await (llm.shutdown() if way == "shutdown" else asyncio.to_thread(llm.close))
        with pytest.raises(SessionClosed, match="closed before this request was finished"):
            await collect(stream)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(one) for one in found} == {SessionClosed}
        with pytest.raises(SessionClosed):
            await anext(llm.generate("later", SHORT))
        with pytest.raises(SessionClosed):
            await llm.metrics()
        await llm.abort("anything")
        await llm.shutdown()
        assert len(output(done).outputs[0].token_ids) == 6
        assert not llm._thread.is_alive()

    before = threading.active_count()
    asyncio.run(asyncio.wait_for(shut(), 60))
    assert threading.active_count() <= before + 1  # the loop's own pool may keep one


def test_a_context_ends_with_a_shutdown(even_chat: Path) -> None:
    async def use() -> AsyncLLM:
        async with AsyncLLM(str(even_chat), **SETTINGS) as llm:
            assert output(await collect(llm.generate("a", SHORT))).finished
            assert (await llm.metrics()).requests == 1
        return llm

    assert asyncio.run(use()).engine.closed
