"""Mutants of a whole backend: one that supports nothing, ones that remember, boast, or do not load as they should."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lineshaft_conformance.mutants.mutant import (
    Changed,
    Make,
    Mutant,
    changed,
    with_added,
    with_capabilities,
    with_kernel,
    with_kernels,
    with_program,
)
from lineshaft_contract.backends import BackendInfo, BackendKind
from lineshaft_contract.kernels import Kernel

PROBES = "lineshaft_conformance.mutants.probes"
TOOLCHAINS = "lineshaft_conformance.mutants.toolchains"
KEPT: Make = changed
"""Leaves the started backend as it is: what is broken is its entry."""

# ---- nothing at all --------------------------------------------------------------------------------------------

NULLS = tuple(
    Mutant(
        f"null-{level}", f"supporting nothing is a failure at level {level} too: each names its required minimum",
        level, f"L{level}/*", lambda backend: changed(backend, change_kernels=lambda kernels: []), anywhere=True,
    )
    for level in range(6)
)  # fmt: skip


# ---- memory ----------------------------------------------------------------------------------------------------


def remembering(key: Callable[[Any, Any], Any]) -> Make:
    """Makes a mutant whose programs answer with what they returned first for the same `key(host step, arrays)`."""

    def make_call(session: Any) -> Callable[..., Any]:
        known: dict[Any, Any] = {}

        def call(program: Any, host: Any, arrays: Any, after: Any) -> Any:
            if (at := key(host, arrays)) not in known:
                known[at] = program(host, arrays, after)
            return known[at]

        return call

    return with_program(make_call)


def shapes(host: Any, arrays: Any) -> Any:
    return tuple((item.name, item.shape) for item in host.layout.fields)


def identity(host: Any, arrays: Any) -> Any:
    return host.buffer.ctypes.data


def values(host: Any, arrays: Any) -> Any:
    return bytes(host.buffer) + bytes(str(sorted(arrays)), "utf-8")


MEMORY = (
    Mutant("memoizing-shape", "a program answers by the values of its inputs, not by their shapes", 1,
           "L1/add/*", remembering(shapes)),
    Mutant("memoizing-identity", "a program answers by the values of its inputs, not by where they lie", 3,
           "L3/graph/*", remembering(identity), anywhere=True),
    Mutant("memoizing-values", "a program reads weights and caches as they are now, not only inputs (sessions)", 3,
           "L3/graph/*", remembering(values)),
)  # fmt: skip


# ---- claims ----------------------------------------------------------------------------------------------------


class Moody(Changed):
    """Claims batch determinism when it is asked first, and takes it back."""

    asked = False

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name != "capabilities" or self.asked:
            return found
        object.__setattr__(self, "asked", True)
        return replace(found, determinism=replace(found.determinism, batch=True))


def only_16(kernel: Kernel) -> Kernel:
    def supports(problem: Any) -> str | None:
        size = getattr(problem, "page_size", 16)
        return kernel.supports(problem) if size == 16 else f"pages of 16 tokens only, not {size}"

    return replace(kernel, supports=supports)


def without_float64(kernel: Kernel) -> Kernel:
    def supports(problem: Any) -> str | None:
        return "no float64 here" if problem.dtype == "float64" else kernel.supports(problem)

    return replace(kernel, supports=supports)


def info(**fields: Any) -> Callable[[BackendInfo], BackendInfo]:
    return lambda entry: replace(entry, **fields)


CLAIMS = (
    Mutant("boasting-features", "a kernel handles the features that it lists (kernels)", 2, "L2/attend/mixed/*",
           with_kernels(lambda kernel: replace(kernel, handles=kernel.handles | {"key_ranges", "kv_scheme"}),
                        "attend")),
    Mutant("boasting-dtypes", "every dtype that the capabilities name is executed (backends)", 0, "L0/load/kv_dtypes",
           with_kernels(without_float64, "attend")),
    Mutant("boasting-float8", "every op that is required runs in every dtype that is claimed (backends)", 1,
           "L1/minimum/*", with_capabilities(dtypes=("float32", "float8_e4m3fn"))),
    Mutant("boasting-page-sizes", "page_sizes lists the sizes that run; () is any (backends)", 0, "L0/load/page_size-*",
           with_kernels(only_16)),
    Mutant("boasting-kind", "an accelerator has a device that the system shows (backends)", 0, "L0/load/probe",
           KEPT, info=info(kind=BackendKind.ACCELERATOR, probe=f"{PROBES}:of_no_device")),
)  # fmt: skip


# ---- loading ---------------------------------------------------------------------------------------------------


def described(name: str, op: str, **fields: Any) -> Callable[[str], Kernel]:
    return lambda backend: Kernel(name, op, backend, lambda problem, session: lambda *args: args[0], **fields)


def no_compiler() -> Any:
    raise RuntimeError("the compiler failed")


def raising(problem: Any) -> str | None:
    raise RuntimeError("supports failed")


LOADING = (
    Mutant("probe-imports", "a probe imports no vendor library (backends)", 0, "L0/load/probe", KEPT,
           info=info(probe=f"{PROBES}:with_torch")),
    Mutant("probe-slow", "a probe looks, and tries nothing (backends)", 0, "L0/load/probe", KEPT,
           info=info(probe=f"{PROBES}:that_takes_its_time")),
    Mutant("probe-words", "a probe returns a Probe (backends)", 0, "L0/load/probe", KEPT,
           info=info(probe=f"{PROBES}:in_words")),
    Mutant("probe-raises", "a probe finds or does not find, and says so (backends)", 0, "L0/load/probe", KEPT,
           info=info(probe=f"{PROBES}:that_raises")),
    Mutant("probe-silent", "a probe says why (backends)", 0, "L0/load/probe", KEPT,
           info=info(probe=f"{PROBES}:without_reason")),
    Mutant("api-of-tomorrow", "a plugin of this or the next version of the contract is accepted (backends)", 0,
           "L0/load/manifest", KEPT, info=info(api=7)),
    Mutant("unknown-feature", "handles lists fields of the op's problem (kernels)", 0, "L0/load/kernels",
           with_kernels(lambda kernel: replace(kernel, handles=kernel.handles | {"sliding_window"}), "attend")),
    Mutant("unknown-op", "a kernel implements an op that is registered (kernels)", 0, "L0/load/kernels",
           with_added(described("fast_flash", "flash_attention"))),
    Mutant("tie", "a tie between kernels that are not tunable is an error", 0, "L0/load/kernels",
           with_added(described("another_add", "add"))),
    Mutant("one-name-twice", "a kernel's name is its own (kernels)", 0, "L0/load/kernels",
           with_added(described("torch_add", "add", priority=-5))),
    Mutant("another-backend", "a backend's kernels bear its name (kernels)", 0, "L0/load/kernels",
           with_kernels(lambda kernel: replace(kernel, backend="another"), "add")),
    Mutant("supports-raises", "supports returns None or a reason (kernels)", 0, "L0/load/kernels",
           with_kernels(lambda kernel: replace(kernel, supports=raising), "silu_mul")),
    Mutant("unknown-dtype", "capabilities name dtypes that exist (backends)", 0, "L0/load/capabilities",
           with_capabilities(dtypes=("float32", "float42"))),
    Mutant("moody", "capabilities do not change from call to call (backends)", 0, "L0/load/stable",
           lambda backend: Moody(backend, capabilities=backend.capabilities)),
    Mutant("no-dtype", "a backend executes at least one dtype (backends)", 0, "L0/load/capabilities",
           with_capabilities(dtypes=())),
    Mutant("page-size-0", "page sizes are positive (backends)", 0, "L0/load/capabilities",
           with_capabilities(page_sizes=(0, 16))),
    Mutant("default-page-size", "the default page size is one of page_sizes (backends)", 0, "L0/load/capabilities",
           with_capabilities(page_sizes=(32,), default_page_size=16)),
    Mutant("negative-bucket", "buckets are counts (backends)", 0, "L0/load/capabilities",
           with_capabilities(token_buckets=(64, 8, -1))),
    Mutant("does-not-compile", "every declared kernel compiles for some problem (kernels)", 0, "L0/compiles/rms_norm",
           with_kernel("rms_norm", lambda problem, run: no_compiler())),
    Mutant("takes-nothing", "every declared kernel takes some problem (kernels)", 0, "L0/compiles/rope",
           with_kernels(lambda kernel: replace(kernel, supports=lambda problem: "not on this machine"), "rope")),
    Mutant("without-embed", "every required op has a kernel (ops)", 0, "L0/compiles/embed",
           lambda backend: changed(backend, change_kernels=lambda kernels: [k for k in kernels if k.op != "embed"])),
)  # fmt: skip

# ---- ahead of time ---------------------------------------------------------------------------------------------


def compiling(name: str) -> Callable[[BackendInfo], BackendInfo]:
    return info(toolchain=f"{TOOLCHAINS}:{name}")


AHEAD = (
    Mutant("ahead-fails", "every kernel compiles for every target that it does not decline (toolchain)", 0,
           "L0/ahead/*", KEPT, info=compiling("WithoutBfloat16")),
    Mutant("ahead-no-target", "a toolchain lists the devices that it compiles for (toolchain)", 0, "L0/ahead/*",
           KEPT, info=compiling("WithoutTargets")),
    Mutant("ahead-unmade", "a toolchain that is registered can be made (toolchain)", 0, "L0/ahead/targets", KEPT,
           info=compiling("Unmade")),
    Mutant("ahead-any-target", "an unknown target is refused (toolchain)", 0, "L0/ahead/*", KEPT,
           info=compiling("ForAnything")),
    Mutant("ahead-any-layout", "a layout that a target cannot hold is refused (toolchain)", 0, "L0/ahead/*", KEPT,
           info=compiling("OfAnySize")),
    Mutant("ahead-answers", "a program compiled for a device that is not here cannot be called (toolchain)", 0,
           "L0/ahead/*", KEPT, info=compiling("ThatAnswers")),
    Mutant("ahead-columns", "columns name what a report holds (toolchain)", 0, "L0/ahead/*", KEPT,
           info=compiling("OutOfColumn")),
    Mutant("ahead-guesses", "a report counts bytes and seconds (toolchain)", 0, "L0/ahead/*", KEPT,
           info=compiling("ThatGuesses")),
    Mutant("ahead-lesser", "the matrix instructions that a report expects are in the code (toolchain)", 0,
           "L0/ahead/*", KEPT, info=compiling("OfLesserInstructions")),
    Mutant("ahead-spills", "no default configuration spills a register (toolchain)", 0, "L0/ahead/*", KEPT,
           info=compiling("ThatSpills")),
    Mutant("ahead-odd-problem", "problems are those of the kernel's op (toolchain)", 0, "L0/ahead/*", KEPT,
           info=compiling("OfAnOddProblem")),
)  # fmt: skip

MUTANTS: tuple[Mutant, ...] = (*NULLS, *MEMORY, *CLAIMS, *LOADING, *AHEAD)
