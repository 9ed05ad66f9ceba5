"""Log-probabilities as a request gets them: of each token that was chosen, and of the prompt's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lineshaft_contract.sessions import HostArray

TokenLogprobs = dict[int, tuple[float, int]]
"""Token id -> (log-probability, rank; 1 is the likeliest, 0 below those asked for)."""


@dataclass(frozen=True)
class Logprobs:
    """Natural-log probabilities of R rows: the chosen token's [R], and the k likeliest [R, k] with their ids [R, k]."""

    chosen: HostArray
    top_ids: HostArray
    top: HostArray


def top_logprobs(found: Logprobs, row: int, token: int, wanted: int) -> TokenLogprobs:
    """The `wanted` likeliest tokens of a row and the chosen one."""
    top = {
        int(i): (float(p), rank + 1) for rank, (i, p) in enumerate(zip(found.top_ids[row], found.top[row], strict=True))
    }
    kept = dict(list(top.items())[:wanted])
    kept[token] = top.get(token, (float(found.chosen[row]), 0))
    return kept


class PromptLogprobs:
    """Gathers the log-probabilities of a prompt's tokens, given what was before each, as its chunks are computed."""

    def __init__(self, prompt: Sequence[int], wanted: int) -> None:
        """wanted: how many of the likeliest tokens at each place."""
        self._prompt, self._wanted = np.array(prompt, np.int32), wanted
        self._found: list[TokenLogprobs | None] = [None] * len(prompt)

    def ids(self, start: int, count: int) -> HostArray:
        """For the rows of logits of the tokens [start, start + count): the id int32 that came next in the prompt; -1
        after its last token."""
        following = np.full(count, -1, np.int32)
        part = self._prompt[start + 1 : start + count + 1]
        following[: len(part)] = part
        return following

    def add(self, start: int, count: int, found: Logprobs, row: int) -> None:
        """Take what the step found in its rows [row, row + count), those of the tokens [start, start + count). A place
        that is computed again after a preemption is left as it is."""
        for i in range(min(count, len(self._prompt) - 1 - start)):
            at = start + i + 1
            if self._found[at] is None:
                self._found[at] = top_logprobs(found, row + i, int(self._prompt[at]), self._wanted)

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return None not in self._found[1:]

    @property
    def result(self) -> list[TokenLogprobs | None]:
        """One for each token of the prompt: None for the first, which nothing was before."""
        return list(self._found)
