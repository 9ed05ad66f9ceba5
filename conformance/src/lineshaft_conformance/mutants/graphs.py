"""Sessions and programs that break what a capture, a result, a freeze or a close promises."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from lineshaft.errors import ContractViolation, MisshapenTensor, SessionPoisoned
from lineshaft_conformance.mutants.mutant import Mutant, with_kernel, with_program, with_session
from lineshaft_contract.sessions import CaptureReport


class Results:
    """A pending step like `pending` but for what is given here."""

    def __init__(self, pending: Any, result: Callable[[str], Any], handle: Callable[[str], Any] | None = None) -> None:
        self._pending, self.result = pending, result
        self.handle = handle or pending.handle

    @property
    def kernel_seconds(self) -> float:
        return float(self._pending.kernel_seconds)


# ---- results ---------------------------------------------------------------------------------------------------


def _one_copy(session: Any) -> Callable[..., Any]:
    def call(program: Any, host: Any, arrays: Any, after: Any) -> Any:
        pending = program(host, arrays, after)
        kept: dict[str, Any] = {}

        def result(name: str) -> Any:
            return kept.setdefault(name, pending.result(name))

        return Results(pending, result)

    return call


def _newest(session: Any) -> Callable[..., Any]:
    latest: list[Any] = []

    def call(program: Any, host: Any, arrays: Any, after: Any) -> Any:
        latest[:] = [program(host, arrays, after)]
        return Results(latest[0], lambda name: latest[0].result(name))

    return call


def _static_output(session: Any) -> Callable[..., Any]:
    static: dict[str, Any] = {}

    def call(program: Any, host: Any, arrays: Any, after: Any) -> Any:
        pending = program(host, arrays, after)
        for name in static:
            static[name][...] = pending.result(name)

        return Results(pending, lambda name: static.setdefault(name, pending.result(name)))

    return call


def _lazy(session: Any) -> Callable[..., Any]:
    queue: list[Callable[[], Any]] = []
    done: dict[int, Any] = {}

    def call(program: Any, host: Any, arrays: Any, after: Any) -> Any:
        host = type(host)(host.layout, host.buffer.copy())
        index = len(queue)
        queue.append(lambda: program(host, arrays, after))

        def get() -> Any:
            for i in range(index + 1):
                if i not in done:
                    pending = queue[i]()
                    done[i] = Results(pending, pending.result)
            return done[index]

        return Late(get)

    return call


class Late:
    """A step that runs when somebody asks for it."""

    kernel_seconds = 0.0

    def __init__(self, get: Callable[[], Any]) -> None:
        self._get = get

    def result(self, name: str) -> Any:
        return self._get().result(name)

    def handle(self, name: str) -> Any:
        return self._get().handle(name)


def _hoards(session: Any) -> Callable[..., Any]:
    kept: list[Any] = []

    def call(program: Any, host: Any, arrays: Any, after: Any) -> Any:
        pending = program(host, arrays, after)
        kept.append({name: pending.result(name).copy() for name in program.capture.host_outputs})
        return pending

    return call


def _old_handle(session: Any) -> Callable[..., Any]:
    first: dict[str, Any] = {}

    def call(program: Any, host: Any, arrays: Any, after: Any) -> Any:
        pending = program(host, arrays, after)

        def handle(name: str) -> Any:
            found = pending.handle(name)
            kept = first.setdefault(name, found.tensor.clone())
            return type(found)(name, kept, found.program, found.run)

        return Results(pending, pending.result, handle)

    return call


def _scribbles(session: Any) -> Callable[..., Any]:
    def call(program: Any, host: Any, arrays: Any, after: Any) -> Any:
        pending = program(host, arrays, after)
        host.buffer[-1] ^= 1
        return pending

    return call


def _takes_any_handle(session: Any) -> Callable[..., Any]:
    def call(program: Any, host: Any, arrays: Any, after: Any) -> Any:
        try:
            return program(host, arrays, after)
        except ContractViolation:
            return Results(None, lambda name: None, lambda name: None)

    return call


# ---- time ------------------------------------------------------------------------------------------------------


def _compiles_late(session: Any) -> Callable[..., Any]:
    calls: list[int] = []

    def call(program: Any, host: Any, arrays: Any, after: Any) -> Any:
        if not calls:
            calls.append(1)
            time.sleep(0.05)
        return program(host, arrays, after)

    return call


def _copies_cache(problem: Any, write: Any) -> Callable[..., Any]:
    def call(cache: Any, *args: Any, **kwargs: Any) -> Any:
        for array in cache.arrays.values():
            array.copy_(array.clone())
        return write(cache, *args, **kwargs)

    return call


# ---- sessions --------------------------------------------------------------------------------------------------


def _never_freezes(session: Any, freeze: Any) -> None:
    return None


def _captures_frozen(session: Any, capture: Any, *given: Any) -> Any:
    frozen = session._frozen
    session._frozen = False
    try:
        return capture(*given)
    finally:
        session._frozen = frozen


def _dirty_capture(session: Any, capture: Any, *given: Any) -> Any:
    program = capture(*given)
    with torch.inference_mode():
        for cache in session.caches:
            for array in cache.arrays.values():
                array[cache.problem.page_size] = 1
    return program


def _forgets_programs(session: Any) -> Callable[..., Any]:
    captured = session.__dict__.setdefault("_mutant_programs", [])
    own = object()
    captured.append(own)

    def call(program: Any, host: Any, arrays: Any, after: Any) -> Any:
        return program(host if captured[-1] is own else type(host)(host.layout), arrays, after)

    return call


def _free_capture(session: Any, capture: Any, *given: Any) -> Any:
    program = capture(*given)
    program.report = CaptureReport(0.0)
    return program


def _close_once(session: Any, close: Any) -> None:
    if session.closed:
        raise RuntimeError("closed twice")
    close()


def _open_after_close(session: Any, read: Any, *given: Any) -> Any:
    return {} if session.closed else read(*given)


def _keeps_memory(session: Any, close: Any) -> None:
    _KEPT.extend(leaf for cache in session.caches for leaf in cache.arrays.values())
    close()


_KEPT: list[torch.Tensor] = []


def _keeps_thread(session: Any, close: Any) -> None:
    if not session.closed:
        threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
    close()


def _not_poisoned(session: Any, require: Any) -> None:
    try:
        require()
    except SessionPoisoned:
        return


# ---- weights ---------------------------------------------------------------------------------------------------


def _quiet_update(session: Any, update: Any, weights: Any) -> Any:
    known = {name: array for name, array in weights.items() if name in session._params}
    return update(known)


def _half_update(session: Any, update: Any, weights: Any) -> Any:
    for name, array in weights.items():
        pending = update({name: array})
    return pending


def _any_shape(session: Any, update: Any, weights: Any) -> Any:
    try:
        return update(weights)
    except MisshapenTensor as error:
        if "no such" in str(error):
            raise
        return update({})


def _baked_constants(session: Any, update: Any, weights: Any) -> Any:
    return update(
        {name: array for name, array in weights.items() if array.dtype.kind == "f" or array.dtype.itemsize == 2}
    )


def _keeps_read(session: Any) -> Any:
    """Keeps a copy of every result that was read."""
    kept: list[Any] = []

    def call(program: Any, *given: Any) -> Any:
        pending = program(*given)

        def result(name: str) -> Any:
            kept.append(pending.result(name).copy())
            return kept[-1].copy()

        return Results(pending, result)

    return call


def _reads_late(session: Any) -> Any:
    """A result that is read after an update is computed again, with the new weights."""
    update, count = session.update, [0]

    def counted(weights: Any) -> Any:
        count[0] += 1
        return update(weights)

    session.update = counted

    def call(program: Any, host: Any, arrays: Any, after: Any) -> Any:
        kept, before, pending = copy.deepcopy(host), count[0], program(host, arrays, after)

        def result(name: str) -> Any:
            return (pending if count[0] == before else program(kept, arrays, ())).result(name)

        return Results(pending, result)

    return call


def _slow_after_update(session: Any) -> Any:
    update, due = session.update, [False]

    def noted(weights: Any) -> Any:
        due[0] = True
        return update(weights)

    session.update = noted

    def call(program: Any, *given: Any) -> Any:
        if due[0]:
            time.sleep(0.02)  # compiles again
            due[0] = False
        return program(*given)

    return call


def _newest_handle(session: Any) -> Any:
    """A handle names the output of its program's latest step."""
    made: dict[int, Any] = session.__dict__.setdefault("_mutant_made", {})
    newest: list[Any] = [None]

    def call(program: Any, host: Any, arrays: Any, after: Any) -> Any:
        now = {name: made[id(h)][1][0].handle(made[id(h)][2]) if id(h) in made else h for name, h in arrays.items()}
        newest[0] = program(host, now, after)

        def handle(name: str) -> Any:
            given = newest[0].handle(name)
            made[id(given)] = (given, newest, name)
            return given

        return Results(newest[0], newest[0].result, handle)

    return call


_CACHES: dict[Any, Any] = {}


def _one_pool(session: Any, alloc: Any, problems: Any, pages: Any, layout: str) -> Any:
    """Equal caches of two sessions that are open at once are the same memory."""
    made, key = alloc(problems, pages, layout), (tuple(problems), tuple(pages), layout)
    owner, first = _CACHES.get(key, (None, ()))
    if owner is None or owner.closed:
        _CACHES[key] = (session, made)
    for mine, other in zip(made, first, strict=False):
        mine.arrays.update({} if owner.closed else other.arrays)
    return made


def _copies_in_prefill(problem: Any, run: Any) -> Any:
    copying = _copies_cache(problem, run)
    return lambda cache, k, *given, **named: (copying if len(k) > 16 else run)(cache, k, *given, **named)


MUTANTS: tuple[Mutant, ...] = (
    Mutant("one_copy", "a result is a private host copy", 3, "L3/graph/private_results", with_program(_one_copy)),
    Mutant(
        "newest_result", "each outstanding step keeps its results", 3, "L3/graph/outstanding",
        with_program(_newest),
    ),
    Mutant(
        "static_output", "no later step changes a result", 3, "L3/graph/private_results",
        with_program(_static_output),
    ),
    Mutant("lazy", "unread steps pile up no work", 3, "L3/graph/unread", with_program(_lazy)),
    Mutant("hoards", "unread steps keep no memory", 3, "L3/graph/unread", with_program(_hoards)),
    Mutant("old_handle", "a handle holds what its step left", 3, "L3/graph/handles", with_program(_old_handle)),
    Mutant(
        "newest_handle", "a handle holds what its step left, or is refused", 3, "L3/graph/handles",
        with_program(_newest_handle),
    ),
    Mutant("keeps_read", "results that were read keep no memory", 3, "L3/graph/unread", with_program(_keeps_read)),
    Mutant(
        "reads_late", "an update does not reach a step that was submitted before", 3, "L3/graph/new_weights",
        with_program(_reads_late),
    ),
    Mutant(
        "slow_after_update", "an update drops no program", 3, "L3/graph/late_compilation",
        with_program(_slow_after_update),
    ),
    Mutant(
        "one_pool", "a session owns its caches", 3, "L3/graph/two_sessions", with_session("alloc_caches", _one_pool)
    ),
    Mutant(
        "copies_in_prefill", "write_kv copies no cache, also in a prefill", 3, "L3/graph/cache_copies",
        with_kernel("write_kv", _copies_in_prefill),
    ),
    Mutant(
        "scribbles", "a program never writes to its host buffer", 3, "L3/graph/host_buffer",
        with_program(_scribbles),
    ),
    Mutant(
        "takes_any_handle", "a missing or misshapen handle is a typed error", 3, "L3/graph/wrong_handles",
        with_program(_takes_any_handle),
    ),
    Mutant(
        "compiles_late", "capture has compiled and run the program before it returns", 3, "L3/graph/late_compilation",
        with_program(_compiles_late),
    ),
    Mutant(
        "free_capture", "a capture reports what it took", 3, "L3/graph/late_compilation",
        with_session("capture", _free_capture),
    ),
    Mutant(
        "copies_cache", "write_kv copies no cache", 3, "L3/graph/cache_copies", with_kernel("write_kv", _copies_cache)
    ),
    Mutant(
        "never_freezes", "a frozen session refuses what traces", 3, "L3/graph/frozen",
        with_session("freeze", _never_freezes),
    ),
    Mutant(
        "captures_frozen", "a frozen session captures nothing", 3, "L3/graph/frozen",
        with_session("capture", _captures_frozen),
    ),
    Mutant(
        "dirty_capture", "capture touches no page but the null page", 3, "L3/graph/late_bucket",
        with_session("capture", _dirty_capture),
    ),
    Mutant(
        "forgets_programs", "a new program leaves the others as they are", 3, "L3/graph/*",
        with_program(_forgets_programs),
    ),
    Mutant("close_once", "close is idempotent", 3, "L3/graph/close", with_session("close", _close_once)),
    Mutant(
        "open_after_close", "every call after close raises SessionClosed", 3, "L3/graph/close",
        with_session("read_pages", _open_after_close),
    ),
    Mutant("keeps_memory", "close frees memory", 3, "L3/graph/close_frees", with_session("close", _keeps_memory)),
    Mutant("keeps_thread", "close joins threads", 3, "L3/graph/close_frees", with_session("close", _keeps_thread)),
    Mutant(
        "not_poisoned", "a step that failed over its caches poisons the session", 3, "L3/graph/poisoned",
        with_session("require_usable", _not_poisoned),
    ),
    Mutant(
        "quiet_update", "an update of an unknown name is a typed error", 3, "L3/graph/new_weights",
        with_session("update", _quiet_update),
    ),
    Mutant(
        "half_update", "an update that is refused changes nothing", 3, "L3/graph/new_weights",
        with_session("update", _half_update),
    ),
    Mutant(
        "any_shape", "an update with another shape is a typed error", 3, "L3/graph/new_weights",
        with_session("update", _any_shape),
    ),
    Mutant(
        "baked_constants", "programs read constants of the rank anew", 3, "L3/graph/constants",
        with_session("update", _baked_constants),
    ),
)  # fmt: skip
