"""Compiles launches of kernels for GPUs that are not here, in a process of its own, and tells what came out.

A launch is plain data, so that a process which interprets kernels can have them compiled too. What crashes the compiler
ends that process alone. Knows no kernel, and imports no Triton.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from select import select
from typing import IO, Any

from lineshaft_contract.errors import ContractViolation, InvalidValue
from lineshaft_triton.inspection import Code, unexpected
from lineshaft_triton.interpreting import VARIABLE
from lineshaft_triton.launch import Config
from lineshaft_triton.targets import Target

CACHE = "TRITON_CACHE_DIR"
ALIGNMENT = 16
"""Bytes by which Triton asks whether they divide an address, and by which number they divide a size."""
LIMIT = 600.0
"""Seconds that one kernel may take to compile."""
ROOM = 1 << 20
"""Bytes that a compiled kernel takes on its way, about, and the least that a cache has to have free."""
LAST_WORDS = 300
"""Characters of a dead compiler's output that are quoted."""


@dataclass(frozen=True)
class Launch:
    """One kernel with all that its code depends on, as plain data.

    kernel   "module:name"
    args     by position: ["tensor", dtype, aligned, small] | ["value", number or text] | ["dtype", name] |
             ["function", "module:name"]
    named    the same by name: constexprs and tile sizes
    options  of the compiler: warps, stages, and what one vendor's takes
    expects  the class of matrix instructions that has to be there, "" for none
    config   the configuration, as it is shown
    default  whether a plan takes it unasked: then no register may be spilled
    """

    kernel: str
    args: tuple[tuple[Any, ...], ...]
    named: tuple[tuple[str, tuple[Any, ...]], ...]
    options: tuple[tuple[str, Any], ...]
    expects: str = ""
    config: str = ""
    default: bool = True

    @property
    def name(self) -> str:
        return self.kernel.rpartition(":")[2]


def describe_launch(
    kernel: Any, config: Config, args: Sequence[Any], constexprs: Mapping[str, Any], expects: str
) -> Launch:
    """What `launch.launch` was asked to start. A number that is no constexpr is replaced by one that Triton makes the
    same code for, so that launches of other sizes are equal where their code is."""
    fn = kernel.fn
    parameters = inspect.signature(fn).parameters
    fixed = [name for name, parameter in parameters.items() if "constexpr" in str(parameter.annotation)]
    given = [_argument(value, name in fixed) for name, value in zip(parameters, args, strict=False)]
    everything = {**constexprs, **config.block, **config.extra}
    options = {name: value for name, value in everything.items() if name not in parameters}
    named = {name: _argument(value, name in fixed) for name, value in everything.items() if name in parameters}
    return Launch(
        f"{fn.__module__}:{fn.__qualname__}",
        tuple(given),
        tuple(sorted(named.items())),
        tuple({"num_warps": config.num_warps, "num_stages": config.num_stages, **options}.items()),
        expects,
        config.text,
        config.default,
    )


def _argument(value: Any, fixed: bool) -> tuple[Any, ...]:
    if hasattr(value, "data_ptr"):
        small = value.untyped_storage().nbytes() < 1 << 31
        return "tensor", str(value.dtype).removeprefix("torch."), value.data_ptr() % ALIGNMENT == 0, small
    if type(value).__module__.startswith("triton.language"):
        return "dtype", value.name
    if hasattr(value, "fn"):
        return "function", f"{value.fn.__module__}:{value.fn.__qualname__}"
    if isinstance(value, float) and not fixed:
        return "value", 0.5
    if isinstance(value, int) and not isinstance(value, bool) and not fixed and value != 1:
        wide = 0 if -(1 << 31) <= value < 1 << 31 else 1 << 40
        return "value", wide + (ALIGNMENT if value % ALIGNMENT == 0 else ALIGNMENT + 1)
    return "value", value


class Compiler:
    """A process that compiles; it starts when it is first needed, and again after it was lost. `close` ends it.

    limit  seconds for one kernel
    """

    def __init__(self, limit: float = LIMIT) -> None:
        self._limit = limit
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None
        self._known: dict[tuple[str, Launch], Code] = {}

    def compile(self, launch: Launch, target: Target) -> Code:
        """Raises ContractViolation with the compiler's message, or with how it ended."""
        key = target.name, launch
        if key not in self._known:
            answer = self._ask({"launch": asdict(launch), "target": target.name})
            if "failed" in answer:
                raise ContractViolation(f"{launch.name} ({launch.config}) for {target.name}: {answer['failed']}")
            self._known[key] = Code(**{**answer["code"], "classes": tuple(answer["code"]["classes"])})
        return self._known[key]

    def _ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            ready, _, _ = select([process.stdout], [], [], self._limit)
            line = process.stdout.readline() if ready else b""
        except BrokenPipeError:
            ready, line = [process.stdout], b""
        if line:
            answer: Mapping[str, Any] = json.loads(line)
            return answer
        return {"failed": self._lost() if ready else f"the compiler still ran after {self._limit:g} s{self._end()[1]}"}

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._said = tempfile.TemporaryFile()  # noqa: SIM115
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "lineshaft_triton.compiling_worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, env=environment(),
            )  # fmt: skip
        return self._process

    def _lost(self) -> str:
        status, said = self._end()
        if status < 0:
            return f"the compiler ended by signal {-status} ({signal.strsignal(-status)}){said}"
        return f"the compiler ended with status {status}{said}"

    def _end(self) -> tuple[int, str]:
        """End the process. Returns its status, as it was if it had ended, and its last words."""
        process, said, words = self._process, self._said, ""
        self._process = self._said = None
        if process is None or said is None:
            return 0, ""
        assert process.stdin is not None and process.stdout is not None
        process.stdout.close()
        try:
            process.stdin.close()
            status = process.wait(1.0)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            process.kill()
            status = process.wait()
        said.seek(0)
        words = " ".join(said.read().decode(errors="replace").split())[-LAST_WORDS:]
        said.close()
        return status, f"; it said {words!r}" if words else ""

    def close(self) -> None:
        """Idempotent."""
        self._end()


def environment() -> dict[str, str]:
    """The compiler's: this process' modules, no interpreter, and a folder of its own for what it has compiled."""
    kept = {name: value for name, value in os.environ.items() if name != VARIABLE}
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    return {**kept, CACHE: str(cache_folder()), "PYTHONPATH": path}


def cache_folder() -> Path:
    """Where Triton keeps what it compiled ahead of time: TRITON_CACHE_DIR, or else a folder in the user's cache."""
    if given := os.environ.get(CACHE):
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "lineshaft" / "triton"


def require_cache() -> None:
    """Raises InvalidValue where nothing could be kept of what is compiled: then every kernel would fail."""
    folder = cache_folder()
    try:
        if not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(ROOM))
    except OSError as error:
        raise InvalidValue(
            f"compiled kernels cannot be kept in {folder} ({error.strerror}); make room, or set {CACHE} to a folder "
            "that can be written to"
        ) from error


def check(launch: Launch, code: Code, target: Target) -> None:
    """Raises ContractViolation for code that breaks what was stated of it beforehand: the class of its matrix
    instructions, the target's shared memory and registers, and that a default configuration spills nothing."""
    complaints = []
    missing, further = unexpected(code.classes, launch.expects)
    if missing or further:
        expected = launch.expects or "no matrix instructions"
        complaints.append(f"expects {expected} and has {', '.join(code.classes) or 'none'}")
    if code.shared > target.shared:
        complaints.append(f"takes {code.shared} B of shared memory of the {target.shared} B that a block may take")
    elif not code.occupancy:
        complaints.append(f"takes {code.registers} registers a thread, with which no block fits a multiprocessor")
    if launch.default and (code.spills or code.stack):
        complaints.append(f"spills in a default configuration ({code.spills} registers, {code.stack} B of stack)")
    if complaints:
        raise ContractViolation(f"{launch.name} ({launch.config}) for {target.name} {'; '.join(complaints)}")
