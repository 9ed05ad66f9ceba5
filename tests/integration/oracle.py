"""What `transformers` says of the same weights, and how far from it the engine may be. Knows nothing of engines."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

Array = np.ndarray[Any, Any]

FLOAT32_SHARE = 1e-4
"""Most error in float32, as a share of the spread of the oracle's logits: some 1000 roundings of 2**-24, where a
wrong mask, position or head costs 1e-2 and more."""

L2, LINF = 3.0, 5.0
"""How many times the error of the oracle's own bfloat16 run the engine's may be."""

EPS_BFLOAT16 = 2.0**-8

DECIDED_SHARE = 0.9
"""Least share of positions whose two likeliest tokens must be further apart than the tolerance; else an equal argmax
would say little."""


@dataclass(frozen=True)
class Expected:
    """A prompt, the oracle's greedy tokens after it, and its logits [count, V] for each of them, in float32."""

    prompt: list[int]
    tokens: list[int]
    logits: Array


class Oracle:
    """A transformers model that is asked for whole sequences at once, so that no cache of it can be wrong."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()

    @classmethod
    def of(cls, folder: Path, **more: Any) -> Oracle:
        """The checkpoint's values in float32, whatever they are stored as."""
        return cls(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more))

    @property
    def vocab(self) -> int:
        return int(self.model.config.vocab_size)

    @property
    def hidden(self) -> int:
        return int(self.model.config.hidden_size)

    def bfloat16(self) -> Oracle:
        """The same model run in bfloat16; the angles of RoPE stay in float32, as when it is loaded so."""
        half = copy.deepcopy(self.model).to(torch.bfloat16)
        half.model.rotary_emb = copy.deepcopy(self.model.model.rotary_emb)
        return Oracle(half)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Array:
        """Logits [T, V] of the token after each one."""
        out: Array = self.model(torch.tensor([list(ids)]), use_cache=False).logits[0].float().numpy()
        return out

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The likeliest continuation, token by token; end tokens do not end it."""
        tokens: list[int] = []
        feed, past = list(prompt), None
        for _ in range(count):
            out = self.model(torch.tensor([feed]), past_key_values=past, use_cache=True)
            past, feed = out.past_key_values, [int(out.logits[0, -1].argmax())]
            tokens += feed
        return tokens

    def expect(self, prompt: Sequence[int], count: int) -> Expected:
        """What the engine should give for `count` tokens after a prompt."""
        tokens = self.greedy(prompt, count)
        return Expected(list(prompt), tokens, self.after(prompt, tokens))

    def after(self, prompt: Sequence[int], tokens: Sequence[int]) -> Array:
        """Logits [len(tokens), V] that these tokens follow."""
        return self.logits([*prompt, *tokens])[len(prompt) - 1 : -1]

    def prompts(self, seed: int, lengths: Sequence[int]) -> list[list[int]]:
        """Random prompts of these lengths."""
        rng = np.random.default_rng(seed)
        return [[int(token) for token in rng.integers(0, self.vocab, length)] for length in lengths]


def make_model(
    folder: Path, seed: int, *, model_type: str = "llama", store: torch.dtype = torch.float32, shards: str = "1GB",
    change: Callable[[Any], None] = lambda model: None, **more: Any,
) -> Oracle:  # fmt: skip
    """Write a random model to `folder`, a Llama unless told otherwise, which `change` may change first, and return the
    oracle of what was written."""
    print(f"random {model_type}: seed {seed}")
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        model_type,
        **{
            "hidden_size": 72, "intermediate_size": 100, "vocab_size": 131, "num_hidden_layers": 3,
            "max_position_embeddings": 256, "initializer_range": 0.15, "bos_token_id": None, "eos_token_id": None,
            "pad_token_id": None, **more,
        }
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "bias" in name:
                # norms start as one value and biases as zero, which would hide one left out
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
    change(model)
    model.to(store).save_pretrained(folder, max_shard_size=shards)
    return Oracle.of(folder)


# ---- how close is close enough ---------------------------------------------------------------------------------------


def check_float32(expected: Sequence[Expected], got: Sequence[Array]) -> None:
    """Assert the float32 bar, and that the likeliest token is the oracle's wherever the oracle is decided."""
    want, have, allowed = wanted(expected), stack(got), float32_tolerance(expected)
    error = largest(have - want)
    print(f"float32: {len(want)} positions, error {error:.3g}, allowed {allowed:.3g}")
    assert error <= allowed
    check_argmax(want, have, allowed, DECIDED_SHARE)


def check_bfloat16(expected: Sequence[Expected], got: Sequence[Array], half: Oracle, least_decided: float) -> None:
    """Assert the tolerance rule against the oracle's own bfloat16 run on the same tokens."""
    want, have, run = wanted(expected), stack(got), run_by(half, expected)
    for name, factor, norm in (("L2", L2, rms), ("Linf", LINF, largest)):
        unit = EPS_BFLOAT16 * half.hidden**0.5 * norm(want)
        error, theirs = norm(have - want), norm(run - want)
        print(f"bfloat16 {name}: error {error:.3g}, of the oracle's run {theirs:.3g}, one rounding {unit:.3g}")
        assert error <= factor * max(theirs, unit)
    check_argmax(want, have, bfloat16_tolerance(expected, half), least_decided)


def check_most_of_bfloat16(expected: Sequence[Expected], got: Sequence[Array], half: Oracle) -> None:
    """Assert the tolerance rule for the median position: a rounding may route a token to other experts, in either run,
    and what follows then says nothing."""
    want, have, run = wanted(expected), stack(got), run_by(half, expected)
    ours, theirs = (float(np.median(np.sqrt(np.mean((x - want) ** 2, axis=1)))) for x in (have, run))
    unit = EPS_BFLOAT16 * half.hidden**0.5 * rms(want)
    print(f"bfloat16 median: error {ours:.3g}, of the oracle's run {theirs:.3g}, one rounding {unit:.3g}")
    assert ours <= L2 * max(theirs, unit)


def float32_tolerance(expected: Sequence[Expected]) -> float:
    """Largest error of a logit that float32 may have."""
    want = wanted(expected)
    return FLOAT32_SHARE * float(want.max() - want.min())


def bfloat16_tolerance(expected: Sequence[Expected], half: Oracle) -> float:
    """A difference of two logits that survives bfloat16 if each is off by as much as in the oracle's own run."""
    return 2 * largest(run_by(half, expected) - wanted(expected))


def undisputed(expected: Sequence[Expected], tolerance: float) -> list[list[int]]:
    """Each greedy continuation up to the first token about which the oracle itself is not sure."""
    out = []
    for item in expected:
        best = np.sort(item.logits.astype(np.float64), axis=1)[:, -2:]
        unsure = np.flatnonzero(best[:, 1] - best[:, 0] <= tolerance)
        out.append(item.tokens[: int(unsure[0])] if len(unsure) else item.tokens)
    return out


def check_argmax(want: Array, have: Array, tolerance: float, least_decided: float) -> None:
    """Assert equal argmax [n] of logits [n, V] where the oracle's two best differ by more than the tolerance."""
    best = np.sort(want, axis=1)[:, -2:]
    decided = best[:, 1] - best[:, 0] > tolerance
    print(f"decided: {decided.sum()} of {len(decided)} positions at {tolerance:.3g}")
    assert decided.mean() >= least_decided
    assert np.array_equal(have.argmax(axis=1)[decided], want.argmax(axis=1)[decided])


def wanted(expected: Sequence[Expected]) -> Array:
    return stack([item.logits for item in expected])


def run_by(oracle: Oracle, expected: Sequence[Expected]) -> Array:
    return stack([oracle.after(item.prompt, item.tokens) for item in expected])


def stack(parts: Sequence[Array]) -> Array:
    return np.concatenate([np.asarray(part, np.float64) for part in parts])


def rms(x: Array) -> float:
    return float(np.sqrt(np.mean(x * x)))


def largest(x: Array) -> float:
    return float(np.abs(x).max())
