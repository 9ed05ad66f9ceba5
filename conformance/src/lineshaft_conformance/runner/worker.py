"""The child process: starts the backend, lists its checks and runs them, one request a line, until the parent is gone.

`python -m lineshaft_conformance.runner.worker REQUESTS REPLIES LIFELINE` with the numbers of three open files. Its
stdout and stderr are a file of the parent, so that nothing a plugin prints meets the replies.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from typing import Any

from lineshaft.config import validate_options
from lineshaft.errors import AmbiguousBackend, BackendUnavailable, ConfigError, UnknownBackend
from lineshaft.registry import Registry, discover, load_attribute
from lineshaft.registry.loading import one_line
from lineshaft_conformance.checks import Check
from lineshaft_conformance.runner.attempt import attempt, where
from lineshaft_conformance.subject import Subject, Target, make_subject
from lineshaft_contract import errors

Message = dict[str, Any]
REQUIREMENT = re.compile(r"[A-Za-z0-9._-]+")
"""The name at the beginning of a requirement."""

USERS = (UnknownBackend, AmbiguousBackend, BackendUnavailable, ConfigError)
"""Errors that are no fault of the backend; the parent raises them again."""


class Server:
    """Answers requests: the first is `start`, then any number of `run`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.subject: Subject
        self.checks: dict[str, Check] = {}

    def answer(self, request: Message) -> Message:
        """A message of one key: "done", "failed" or "raised". At its limit the process writes where it is and ends."""
        faulthandler.dump_traceback_later(request["limit"], file=sys.stderr, exit=True)
        try:
            return self._start() if request["do"] == "start" else self._run(request)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _run(self, request: Message) -> Message:
        check = self.checks.get(request["id"])
        if check is None:
            return {"failed": "this check is not listed in every process: what the backend claims differs"}
        return {"done": attempt(check, self.subject, request["seed"])[0].to_json()}

    def _start(self) -> Message:
        try:
            registry = discover()
            self.subject = make_subject(
                Target(**self.config["target"]), wanted(registry, self.config["target"]["backend"])
            )
            len(self.subject.kernels)  # starts the backend
            collect = load_attribute(self.config["collect"])
            self.checks = {c.id: c for c in collect(self.subject, self.config["size"], self.config["level"])}
            return {"done": {"backend": facts(self.subject), "checks": [described(c) for c in self.checks.values()]}}
        except PluginRejected as error:
            return {"failed": str(error)}
        except USERS as error:
            known = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
            return {"raised": {"class": known.__name__, "message": str(error)}}
        except BaseException as error:
            return {"failed": f"raised {one_line(error)} ({where(error)})"}


class PluginRejected(Exception):
    """The registry refused the plugin that is under test; the message is its reason."""


def wanted(registry: Registry, name: str) -> Registry:
    """The registry. Raises PluginRejected if it refused the plugin of that name: a fault, unlike a missing device."""
    for item in registry.rejected:
        if item.plugin == name and name not in registry.backends:
            raise PluginRejected(item.reason)
    return registry


def described(check: Check) -> Message:
    """A check without its function."""
    return {f.name: getattr(check, f.name) for f in dataclasses.fields(check) if f.name != "run"}


def facts(subject: Subject) -> Message:
    """What the parent has to know of the backend, which it never imports."""
    (status,) = [status for status in subject.registry.status() if status.name == subject.info.name]
    return {
        "info": dataclasses.asdict(subject.info),
        "distribution": status.distribution,
        "version": status.version,
        "requirements": requirements(status.distribution),
        "options": options_of(subject),
        "capabilities": dataclasses.asdict(subject.capabilities),
        "environment": dict(os.environ),  # as the plugin left it: an interpreter may be switched on in there
    }


def requirements(distribution: str) -> dict[str, str]:
    """Versions of what a distribution requires directly, and of what its kits do; nothing for one that is unknown."""
    found: dict[str, str] = {}
    todo = [distribution] if distribution else []
    while todo:
        for name in set(required(todo.pop())) - found.keys():
            with suppress(metadata.PackageNotFoundError):
                found[name] = metadata.version(name)
                todo += [name] if name.startswith("lineshaft-") else []
    return dict(sorted(found.items()))


def required(distribution: str) -> list[str]:
    """The names of what a distribution requires without an extra; none of one that is unknown."""
    with suppress(metadata.PackageNotFoundError):
        lines = [line for line in metadata.requires(distribution) or () if "extra ==" not in line]
        return [found[0] for line in lines if (found := REQUIREMENT.match(line))]
    return []


def options_of(subject: Subject) -> Message:
    """All options of the backend with their values, as its factory gets them."""
    options = validate_options(subject.info, subject.target.options)
    return {} if options is None else options.model_dump(mode="json")


def serve(requests: int, replies: int) -> None:
    """Answer every line until the parent asks no more."""
    with os.fdopen(requests, encoding="utf-8") as lines, os.fdopen(replies, "w", encoding="utf-8") as answers:
        server = Server(json.loads(lines.readline()))
        for line in lines:
            answers.write(json.dumps(server.answer(json.loads(line)), default=float) + "\n")
            answers.flush()
        if hasattr(server, "subject"):
            server.subject.close()


def end_with(lifeline: int) -> None:
    """End this process and its children as soon as the parent's end of the pipe is gone, whatever they are doing.

    On Linux the kernel sends the signal, so that code which never lets go of the interpreter is ended too.
    """
    if sys.platform == "linux":
        import fcntl

        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
        if select.select([lifeline], [], [], 0)[0]:
            os._exit(1)  # it went before we asked to be told
    else:
        threading.Thread(target=wait_and_end, args=(lifeline,), daemon=True).start()


def wait_and_end(lifeline: int) -> None:
    os.read(lifeline, 1)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    requests, replies, lifeline = map(int, sys.argv[1:])
    for number in (requests, replies, lifeline):
        os.set_inheritable(number, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(lifeline)
    faulthandler.enable()
    serve(requests, replies)


if __name__ == "__main__":
    main()
