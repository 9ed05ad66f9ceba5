"""What the prefix cache would gain by sharing the beginning of a page as well, in prompt tokens.

    python benchmarks/partial_pages.py

Two loads: questions below a few system prompts, and conversations whose every turn repeats what was said before. Whole
pages are what the cache manager finds; with parts of pages, a prompt would share its longest common beginning with any
earlier text, to the token. Nothing is evicted, which favours neither.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator

from lineshaft.cache import CacheManager, GroupSpec

REQUESTS = 1000


def questions(rng: random.Random) -> Iterator[tuple[list[int], list[int]]]:
    """Prompts and outputs: one of 8 system prompts of 100 to 800 tokens, a question of 10 to 200, an answer."""
    system = [[rng.randrange(50_000) for _ in range(rng.randint(100, 800))] for _ in range(8)]
    for _ in range(REQUESTS):
        yield rng.choice(system) + words(rng, 10, 200), words(rng, 20, 300)


def conversations(rng: random.Random) -> Iterator[tuple[list[int], list[int]]]:
    """Prompts and outputs: 50 conversations, each turn after all that was said in its own."""
    said = [words(rng, 50, 50) for _ in range(50)]
    for _ in range(REQUESTS):
        talk = rng.randrange(len(said))
        said[talk] = words(rng, 50, 50) if len(said[talk]) > 6000 else said[talk] + words(rng, 5, 100)
        answer = words(rng, 20, 300)
        yield list(said[talk]), answer
        said[talk] += answer


def words(rng: random.Random, least: int, most: int) -> list[int]:
    return [rng.randrange(50_000) for _ in range(rng.randint(least, most))]


def shares(load: list[tuple[list[int], list[int]]], page_size: int) -> tuple[float, float]:
    """The shares of prompt tokens that whole pages spare, and that parts of pages would spare beside them."""
    cache = CacheManager([GroupSpec(2_000_000 // page_size, page_size)])
    trie: dict[int, dict] = {}  # type: ignore[type-arg]
    asked = whole = parts = 0
    for seq, (prompt, output) in enumerate(load):
        text = [*prompt, *output[:-1]]  # the last token is never computed
        cached = cache.open(seq, prompt)
        cache.extend(seq, len(text))
        cache.commit(seq, text, len(text))
        cache.close(seq)
        common, node = 0, trie
        while common < len(prompt) - 1 and prompt[common] in node:
            node, common = node[prompt[common]], common + 1
        asked, whole, parts = asked + len(prompt), whole + cached, parts + common - cached
        node = trie
        for token in text:
            node = node.setdefault(token, {})
    return whole / asked, parts / asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[16, 64])
    args = parser.parse_args()
    print(f"{'load':>14} {'page':>5} {'whole pages':>12} {'and parts':>10}")
    for load in (questions, conversations):
        for page_size in args.page_sizes:
            whole, parts = shares(list(load(random.Random(0))), page_size)
            print(f"{load.__name__:>14} {page_size:5} {whole:12.1%} {parts:10.1%}")


if __name__ == "__main__":
    main()
