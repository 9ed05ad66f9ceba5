"""A packed step says where each token sits, which pages its row owns and which rows sample; padding stays zero."""

import numpy as np

from lineshaft.cache import CacheManager, GroupSpec
from lineshaft.runner.messages import ChoiceMessage, StepMessage, StepResult
from lineshaft.runner.pack import need_of, pack_forward
from lineshaft.sampling.logprobs import Logprobs
from lineshaft.sampling.pack import pack_sampling
from lineshaft.sampling.params import SamplingParams
from lineshaft.scheduler import Limits, Request, Scheduler
from lineshaft_contract.steps import HostStep, StepShape, edit_inputs, forward_inputs


def run_one_step() -> tuple[HostStep, Scheduler, CacheManager, list[Request]]:
    """Two prompts of 5 and 2 tokens and a third cut by the budget of 10, with pages of 4 tokens."""
    cache = CacheManager([GroupSpec(20, 4)])
    scheduler = Scheduler(Limits(token_budget=10, max_rows=4, max_model_len=16), cache)
    requests = [
        Request(i, tuple(range(10 * i + 1, 10 * i + 1 + n)), SamplingParams(seed=i)) for i, n in enumerate((5, 2, 7))
    ]
    for request in requests:
        scheduler.add(request)
    batch = scheduler.schedule()
    shape = StepShape(tokens=16, rows=4, pages=(4,), logits=4, max_query=16)
    assert need_of(batch.rows).tokens == 10
    return pack_forward(batch, cache, (4,), shape).host, scheduler, cache, requests


def test_tokens_positions_and_rows() -> None:
    host, _, _, _ = run_one_step()
    assert host["token_ids"].tolist() == [1, 2, 3, 4, 5, 11, 12, 21, 22, 23] + [0] * 6
    assert host["positions"].tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2] + [0] * 6
    assert host["query_starts"].tolist() == [0, 5, 7, 10, 10]
    assert host["logit_rows"].tolist() == [4, 6, 0, 0]  # the third prompt is not at its end
    assert host["context_lens.0"].tolist() == [5, 2, 3, 0]


def test_slots_lie_in_the_row_s_own_pages() -> None:
    host, _, cache, requests = run_one_step()
    slots, table = host["slots.0"], host["page_table.0"]
    for b, request in enumerate(requests):
        start, stop = host["query_starts"][b], host["query_starts"][b + 1]
        pages = list(cache.pages(request.id))
        assert table[b, : len(pages[: -(-(stop - start) // 4)])].tolist() == pages[: -(-(stop - start) // 4)]
        assert [s // 4 for s in slots[start:stop]] == [pages[i // 4] for i in range(stop - start)]
        assert [s % 4 for s in slots[start:stop]] == [i % 4 for i in range(stop - start)]
    assert not slots[10:].any()


def test_messages_survive_their_frames() -> None:
    host, _, _, _ = run_one_step()
    shape = StepShape(tokens=16, rows=4, pages=(4,), logits=4, max_query=16)
    sampling = pack_sampling([SamplingParams(seed=3)], [0], [1], 4)
    edits = HostStep(edit_inputs(4, 64))
    edits["edit_ids"][:] = 7
    message = StepMessage(shape, host, np.array([[0, 1, 2]], np.int32))
    again = StepMessage.from_frames(*message.to_frames())
    assert again.shape == shape and again.copies.tolist() == [[0, 1, 2]]
    for field in forward_inputs(shape).fields:
        assert np.array_equal(again.forward[field.name], host[field.name])
    scored = np.array([3, -1, 4, -1], np.int32)
    choice = ChoiceMessage.from_frames(*ChoiceMessage(sampling, (edits,), logprobs=True, scored=scored).to_frames())
    assert choice.logprobs and not choice.logits and choice.sampling is not None and sampling is not None
    assert np.array_equal(choice.sampling["u"], sampling["u"])
    assert [np.array_equal(step["edit_ids"], edits["edit_ids"]) for step in choice.adjust] == [True]
    assert choice.scored is not None and choice.scored.tolist() == [3, -1, 4, -1]
    assert ChoiceMessage.from_frames(*ChoiceMessage().to_frames()) == ChoiceMessage()
    result = StepResult(np.arange(4, dtype=np.int32), 0.5, Logprobs(*(np.full((4, 2), float(i)) for i in range(3))))
    back = StepResult.from_frames(*result.to_frames())
    assert back.token_ids.tolist() == [0, 1, 2, 3] and back.kernel_seconds == 0.5 and back.logits is None
    assert back.logprobs is not None and back.logprobs.top[0, 0] == 2.0
