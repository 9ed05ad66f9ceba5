"""Choosing a kernel for every problem: by name, API, features, `supports` and priority; no tie is broken silently.

Measures nothing: what was measured is given to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lineshaft.errors import Ambiguous, Unsupported
from lineshaft_contract.backends import API_VERSION
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.problems import Problem
from lineshaft_contract.timing import Choice, unmeasurable


@dataclass(frozen=True)
class Rejection:
    """A kernel that was not chosen, and why."""

    kernel: str
    reason: str


@dataclass(frozen=True)
class Candidates:
    """The kernels that take a problem, best first, and those that do not."""

    problem: Problem
    op: str
    taken: list[Kernel]
    rejected: list[Rejection]

    def best(self, layout: str | None = None) -> Kernel:
        """The highest priority (within `layout`), of several to be measured the first by name. Raises as `leading`."""
        return self.leading(layout)[0]

    def leading(self, layout: str | None = None) -> list[Kernel]:
        """The kernel of the highest priority (within `layout`), or several that are to be measured, by name.

        Raises Unsupported with every reason, Ambiguous on a tie that measuring cannot settle.
        """
        fitting = [k for k in self.taken if layout is None or k.layout == layout]
        if not fitting:
            raise Unsupported(self.unsupported(layout))
        top = [k for k in fitting if k.priority == fitting[0].priority]
        firm = ", ".join(k.name for k in top if not k.tunable)
        if len(top) > 1 and (reason := (firm and f"not tunable: {firm}") or unmeasurable(self.problem)):
            names = ", ".join(k.name for k in top)
            raise Ambiguous(
                f"{self.op}: {names} are equally good for {self.problem.describe()} and not measured ({reason}); "
                f'settle it with `[kernels] {self.op} = "{top[0].name}"`'
            )
        return top

    def unsupported(self, layout: str | None = None) -> str:
        """Why no kernel takes the problem (within `layout`), with the reason of each."""
        reasons = [f"{r.kernel}: {r.reason}" for r in self.rejected]
        reasons += [f"{k.name}: uses layout {k.layout!r}, not {layout!r}" for k in self.taken]
        listed = "; ".join(reasons) or "the backend registers no kernel for it"
        return f"no kernel for {self.op} ({self.problem.describe()}): {listed}"

    def rejections(self, chosen: Kernel, choice: Choice | None = None) -> list[Rejection]:
        """Everything but `chosen`, each with its reason; `choice` says how a tie was settled."""
        others = [k for k in self.taken if k.name != chosen.name]
        return [*(Rejection(k.name, _lost(k, chosen, choice)) for k in others), *self.rejected]


def _lost(kernel: Kernel, chosen: Kernel, choice: Choice | None) -> str:
    if kernel.layout != chosen.layout:
        return f"its layout {kernel.layout!r} is not the one chosen jointly, {chosen.layout!r}"
    if choice and kernel.priority == chosen.priority:
        why = "was not slower" if choice.seconds else "comes first by name: not measured"
        return choice.failed.get(kernel.name, f"{chosen.name} {why}")
    return f"priority {kernel.priority} is below {chosen.priority} of {chosen.name}"


class Resolver:
    """Finds candidates once per (op, problem). `named` maps an op to the kernel that the configuration demands,
    `settled` an op and its described problem to how a tie of tunable kernels was settled.

    choices   of all ties that were met; without a time where they are not settled
    ties      the kernels of those
    """

    def __init__(
        self, backend: str, kernels: Iterable[Kernel], named: Mapping[str, str], settled: Mapping[str, Choice] = {}
    ) -> None:
        """Raises Unsupported where the backend has no kernel of such a name."""
        self._named, self._settled = named, settled
        self.choices: dict[tuple[str, Problem], Choice] = {}
        self.ties: dict[tuple[str, Problem], list[Kernel]] = {}
        self._by_op: dict[str, list[Kernel]] = {}
        for kernel in kernels:
            self._by_op.setdefault(kernel.op, []).append(kernel)
        self._found: dict[tuple[str, Problem], Candidates] = {}
        for op, name in named.items():
            known = [k.name for k in self._by_op.get(op, [])]
            if name not in known:
                raise Unsupported(
                    f"[kernels] {op} = {name!r}: backend {backend!r} has no such kernel for {op}; "
                    f"it has {', '.join(known) or 'none'}"
                )

    def resolvable(self, op: str, problem: Problem) -> bool:
        """Whether some kernel takes this problem."""
        return bool(self.candidates(op, problem).taken)

    def candidates(self, op: str, problem: Problem) -> Candidates:
        if (op, problem) not in self._found:
            self._found[op, problem] = self._search(op, problem)
        return self._found[op, problem]

    def choose(self, op: str, problem: Problem, layout: str | None = None) -> Kernel:
        """The best kernel (within `layout`); of those to be measured the one known to be the fastest. Raises as
        `Candidates.leading`."""
        leading = {k.name: k for k in self.candidates(op, problem).leading(layout)}
        first = choice = Choice(next(iter(leading)))
        if len(leading) > 1:
            choice = self._settled.get(f"{op} {problem.describe()}", first)
            same = leading.keys() == {*choice.seconds, *choice.failed} and choice.kernel in leading
            self.choices[op, problem] = choice = choice if same else first
            self.ties |= {} if same else {(op, problem): [*leading.values()]}
        return leading[choice.kernel]

    def rejections(self, pair: tuple[str, Problem], chosen: Kernel) -> list[Rejection]:
        """Every kernel of the op but `chosen`, each with its reason."""
        return self.candidates(*pair).rejections(chosen, self.choices.get(pair))

    def _search(self, op: str, problem: Problem) -> Candidates:
        judged = [(kernel, self._reason(kernel, problem)) for kernel in self._by_op.get(op, [])]
        taken = [kernel for kernel, reason in judged if reason is None]
        rejected = [Rejection(kernel.name, reason) for kernel, reason in judged if reason is not None]
        return Candidates(problem, op, sorted(taken, key=lambda k: (-k.priority, k.name)), rejected)

    def _reason(self, kernel: Kernel, problem: Problem) -> str | None:
        named = self._named.get(kernel.op)
        if named is not None and kernel.name != named:
            return f"[kernels] {kernel.op} names {named}"
        if kernel.api not in (API_VERSION, API_VERSION + 1):
            return f"written for contract version {kernel.api}, this is {API_VERSION}"
        unknown = sorted(problem.features() - kernel.handles)
        if unknown:
            return "does not handle " + ", ".join(unknown)
        return kernel.supports(problem)


def joint_layout(candidates: Sequence[Candidates], what: str) -> str:
    """The one layout under which every problem of a weight or cache has a kernel: the largest sum of priorities.

    Raises Unsupported when there is none, Ambiguous when two layouts are equally good.
    """
    shared = set.intersection(*({k.layout for k in c.taken} for c in candidates))
    if not shared:
        for c in candidates:
            c.best()  # raises with the reasons where one problem has no kernel at all
        needs = "; ".join(f"{c.op}: {sorted({k.layout for k in c.taken})}" for c in candidates)
        raise Unsupported(f"no packing of {what} serves all its uses: {needs}")
    scores = {name: sum(max(k.priority for k in c.taken if k.layout == name) for c in candidates) for name in shared}
    best = max(scores.values())
    top = sorted(name for name, score in scores.items() if score == best)
    if len(top) > 1:
        raise Ambiguous(
            f"layouts {', '.join(top)} are equally good for {what}; name one of their kernels under [kernels]"
        )
    return top[0]
