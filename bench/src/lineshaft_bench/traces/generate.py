"""Traces made from a seed, by a text such as `poisson:rate=4,requests=1000,prompt=lognormal(512,1),output=200`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from random import Random

from lineshaft.errors import InvalidValue
from lineshaft_bench.traces.arrivals import MOST_TOKENS, Arrival
from lineshaft_bench.traces.formats import Contents

Draw = Callable[[Random], float]
ITEM = re.compile(r"\s*(?P<key>\w+)\s*=\s*(?P<value>[^,()]+(\([^()]*\))?)\s*(,|$)")
CALL = re.compile(r"(?P<name>[a-z]+)\((?P<numbers>[^()]*)\)")
DISTRIBUTIONS: Mapping[str, tuple[int, Callable[..., Draw]]] = {
    "uniform": (2, lambda low, high: lambda rng: rng.uniform(low, high)),
    "exponential": (1, lambda mean: lambda rng: rng.expovariate(1 / mean)),
    "lognormal": (2, lambda median, sigma: lambda rng: median * rng.lognormvariate(0, sigma)),
}
"""Numbers that each takes, and what it draws: lognormal(median,sigma), uniform(low,high), exponential(mean)."""


class Spec:
    """The options of a generated trace; each is asked for once, and what nobody asked for is an error."""

    def __init__(self, text: str) -> None:
        self.kind, _, rest = text.partition(":")
        self._given: dict[str, str] = {}
        self._known: list[str] = []
        while rest:
            item = ITEM.match(rest)
            if item is None:
                raise InvalidValue(f"{text!r}: cannot read {rest!r}; write {self.kind}:key=value,key=value")
            self._given[item["key"]] = item["value"].strip()
            rest = rest[item.end() :]

    def number(self, key: str, default: float | None, low: float = 0.0) -> float:
        """A number above `low`."""
        given = self._take(key, default)
        try:
            value = float(given)
        except ValueError:
            value = low
        if not low < value <= 1e12:
            raise InvalidValue(f"{self.kind}: {key} = {given}: give a number above {low:g}")
        return value

    def count(self, key: str, default: int | None, low: int = 1) -> int:
        """A whole number from `low` on, as large as a trace can bear."""
        value = self.number(key, default, low - 1)
        if not value.is_integer() or value > MOST_TOKENS:
            raise InvalidValue(f"{self.kind}: {key} = {value:g}: give a whole number from {low} to {MOST_TOKENS}")
        return int(value)

    def draw(self, key: str, default: str) -> Draw:
        """A number or a distribution."""
        given = self._take(key, default)
        call = CALL.fullmatch(given)
        try:
            arity, make = DISTRIBUTIONS[call["name"]] if call else (1, lambda value: lambda rng: value)
            numbers = [float(number) for number in (call["numbers"] if call else given).split(",")]
            if len(numbers) == arity and all(0 <= number <= 1e12 for number in numbers) and numbers[0] > 0:
                return make(*numbers)
        except (ValueError, KeyError):
            pass
        allowed = ", ".join(f"{name} of {arity}" for name, (arity, _) in DISTRIBUTIONS.items())
        raise InvalidValue(f"{self.kind}: {key} = {given}: give a number above 0, or of so many numbers: {allowed}")

    def done(self) -> None:
        """Raise InvalidValue for an option that the kind does not have."""
        for key in self._given.keys() - set(self._known):
            raise InvalidValue(f"{self.kind}: unknown option {key!r}; it has {', '.join(self._known)}")

    def _take(self, key: str, default: object) -> str:
        self._known.append(key)
        if key not in self._given and default is None:
            raise InvalidValue(f"{self.kind}: give {key}=N")
        return self._given.get(key, str(default))


def independent(spec: Spec, rng: Random) -> Iterator[Arrival]:
    """Requests that know nothing of each other; with `prefix`, each begins with one of `prefixes` shared beginnings.

    The gaps are gamma-distributed: of shape 1 for `poisson`, of shape `burstiness` below that for `bursty`.
    """
    rate, requests = spec.number("rate", 1.0), spec.count("requests", 100)
    shape = spec.number("burstiness", 0.25) if spec.kind == "bursty" else 1.0
    prompt, output = spec.draw("prompt", "lognormal(512,1)"), spec.draw("output", "200")
    prefix, prefixes = spec.count("prefix", 0, 0), spec.count("prefixes", 1)
    spec.done()
    contents, at = Contents(), 0.0
    shared = [contents.fresh() for _ in range(prefixes)]
    for _ in range(requests):
        begin = ((rng.choice(shared), prefix),) if prefix else ()
        yield Arrival(at, (*begin, (contents.fresh(), tokens(prompt, rng))), tokens(output, rng))
        at += 1 / rate if spec.kind == "constant" else rng.gammavariate(shape, 1 / (rate * shape))


def chat(spec: Spec, rng: Random) -> Iterator[Arrival]:
    """Sessions of several turns, `rate` of them a second: each prompt is all that was said before and a new part.

    All begin with the same `system` tokens; `turns` is their mean number, `think` the mean seconds between two.
    """
    rate, requests = spec.number("rate", 1.0), spec.count("requests", 100)
    system, turns = spec.count("system", 512, 0), spec.number("turns", 4)
    think, prompt = spec.number("think", 20), spec.draw("prompt", "lognormal(256,1)")
    output = spec.draw("output", "lognormal(200,0.7)")
    spec.done()
    contents, at, made = Contents(), 0.0, list[Arrival]()
    begin = ((contents.fresh(), system),) if system else ()
    while len(made) < requests:
        at += rng.expovariate(rate)
        now, said = at, begin
        for _ in range(requests):
            said = (*said, (contents.fresh(), tokens(prompt, rng)))
            made.append(Arrival(now, said, tokens(output, rng), reply := contents.fresh()))
            said = (*said, (reply, made[-1].output_tokens))
            now += rng.expovariate(1 / think)
            if rng.random() < 1 / turns:
                break
    yield from sorted(made, key=lambda arrival: arrival.at)[:requests]


KINDS: Mapping[str, Callable[[Spec, Random], Iterator[Arrival]]] = {
    "poisson": independent,
    "bursty": independent,
    "constant": independent,
    "chat": chat,
}


def tokens(draw: Draw, rng: Random) -> int:
    """A drawn number of tokens."""
    try:
        return max(1, round(min(MOST_TOKENS, draw(rng))))
    except OverflowError:  # a lognormal's far tail
        return MOST_TOKENS


def generate(text: str, seed: int) -> list[Arrival]:
    """The requests of a kind and its options. Raises InvalidValue."""
    spec = Spec(text)
    return list(KINDS[spec.kind](spec, Random(seed)))
