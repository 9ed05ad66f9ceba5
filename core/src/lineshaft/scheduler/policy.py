"""Which request goes first: the policies of admission and preemption, and the queue of waiting requests.

Knows requests and their ranks; not pages or steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush, nsmallest

from lineshaft.errors import InvalidValue
from lineshaft.scheduler.request import Request

ADMISSION = ("fifo", "priority", "sjf")
PREEMPTION = ("recompute", "swap", "reject")
Entry = tuple[tuple[float, ...], Request]

SLACK = 64
"""Stale entries of a heap beyond as many as live ones, before it is made anew."""
TENANTS = 1024
"""Tenants whose share is remembered although they have nothing to do."""


@dataclass(frozen=True)
class Policy:
    """How the scheduler chooses among requests. The defaults are first come, first served."""

    admission: str = "fifo"  # fifo; priority: lowest `priority`, then earliest deadline; sjf: least expected work
    preemption: str = "recompute"  # what becomes of a request whose pages are taken: recompute, swap, reject
    aging: int = 16  # of so many admissions and one more, one is the request's that waits longest
    cache_aware: bool = False  # of the first few in line, prefer the one with most of its prompt in the prefix cache
    fair_tenants: bool = False  # admit from the tenant that was given the fewest tokens
    straggler: float | None = None  # a request whose output is so many times what was expected comes last from then on

    def __post_init__(self) -> None:
        for name, allowed in (("admission", ADMISSION), ("preemption", PREEMPTION)):
            if getattr(self, name) not in allowed:
                raise InvalidValue(f"{name} = {getattr(self, name)!r}: give one of {', '.join(allowed)}")
        if self.aging < 1 or (self.straggler is not None and self.straggler <= 0):
            raise InvalidValue(f"aging = {self.aging}, straggler = {self.straggler}: give numbers above 0")

    def rank(self, request: Request) -> tuple[float, ...]:
        """The place of a request among all others: the lowest is admitted first and preempted last."""
        first = (not request.promoted, request.straggling)
        if self.admission == "priority":
            deadline = float("inf") if request.deadline is None else request.deadline
            return (*first, request.priority, deadline, request.arrival, request.number)
        if self.admission == "sjf":
            return (*first, request.cost.seconds if request.cost else 0.0, request.number)
        return (*first, request.number)


class Queue:
    """Waiting requests in the order of their ranks, so that nobody waits for ever.

    Each time that another than the request waiting longest is taken counts; after `aging` times the longest-waiting one
    is next, and stays before all others until it ends. So a request is passed by younger ones at most `aging` times,
    and as often again for each time that an older one is admitted meanwhile.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._entries: dict[int, Entry] = {}
        self._heaps: dict[bytes, list[Entry]] = {}
        self._waiting: Counter[bytes] = Counter()  # by tenant
        self._oldest: list[tuple[int, Request]] = []
        self._passed = 0
        self._given: dict[bytes, float] = {}  # tokens, by tenant

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def aged(self) -> bool:
        """Whether the longest-waiting request is next, whatever its rank."""
        return self._passed >= self._policy.aging

    def requests(self) -> list[Request]:
        """All that wait, in no order."""
        return [request for _, request in self._entries.values()]

    def push(self, request: Request) -> None:
        """Queue a request at its rank."""
        tenant = self._tenant(request)
        if self._policy.fair_tenants and not self._waiting[tenant]:
            self._arrive(tenant)
        self._waiting[tenant] += 1
        self._entries[request.id] = entry = (request.rank, request)
        heap = self._heaps.setdefault(tenant, [])
        heappush(heap, entry)
        heappush(self._oldest, (request.number, request))
        if len(heap) > 2 * self._waiting[tenant] + SLACK:
            heap[:] = sorted(self._live(heap))
        if len(self._oldest) > 2 * len(self) + SLACK:
            self._oldest = sorted((request.number, request) for _, request in self._entries.values())

    def remove(self, request: Request) -> None:
        """Forget a request that is queued."""
        del self._entries[request.id]
        tenant = self._tenant(request)
        self._waiting[tenant] -= 1
        if not self._waiting[tenant]:
            del self._waiting[tenant], self._heaps[tenant]
        if not self._entries:
            self._oldest.clear()

    def take(self, request: Request) -> None:
        """Remove a request because it is admitted."""
        if request is not self.oldest():
            self._passed += 1
        else:
            request.promoted |= self.aged
            self._passed = 0
        self.remove(request)

    def oldest(self) -> Request:
        """The request that waits longest; there is one."""
        while self._oldest[0][1].id not in self._entries:
            heappop(self._oldest)
        return self._oldest[0][1]

    def first(self, count: int = 1) -> list[Request]:
        """The next requests in line, at most `count`; none only if none waits."""
        if not self._entries or self.aged:
            return [self.oldest()] if self._entries else []
        heap = self._heaps[min(self._waiting, key=lambda tenant: (self._given.get(tenant, 0.0), tenant))]
        while self._entries.get(heap[0][1].id) is not heap[0]:
            heappop(heap)
        if count == 1:
            return [heap[0][1]]
        return [request for _, request in nsmallest(count, self._live(heap))]

    def charge(self, request: Request, tokens: int) -> None:
        """Count tokens that the request's tenant was given."""
        if self._policy.fair_tenants:
            tenant = self._tenant(request)
            self._given[tenant] = self._given.get(tenant, 0.0) + tokens

    def _arrive(self, tenant: bytes) -> None:
        """A tenant that had nothing waiting has saved up nothing: it is no further behind than those that wait."""
        least = min((self._given.get(other, 0.0) for other in self._waiting if other != tenant), default=0.0)
        self._given[tenant] = max(self._given.get(tenant, 0.0), least)
        if len(self._given) > TENANTS:
            self._given = {t: n for t, n in self._given.items() if n > least or self._waiting[t] or t == tenant}

    def _live(self, heap: list[Entry]) -> Iterator[Entry]:
        """The entries of requests that still wait; ranks differ, so that requests are never compared."""
        return (entry for entry in heap if self._entries.get(entry[1].id) is entry)

    def _tenant(self, request: Request) -> bytes:
        return request.salt if self._policy.fair_tenants else b""
