"""The C library of the CPU plugin: what the build makes or writes down, and what the loader takes or refuses."""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from lineshaft.errors import Unsupported
from lineshaft_cpu import native

PLUGIN = Path(__file__).parents[3] / "plugins" / "cpu"
SOURCES = PLUGIN / "native"
PING = """
#define PASTE_(level, f) lineshaft_##level##_##f
#define PASTE(level, f) PASTE_(level, f)
__attribute__((visibility("default"))) int PASTE(LEVEL, ping)(void) { return 1; }
"""
OLD_PROCESSOR = """
__attribute__((visibility("default"))) const char *lineshaft_levels(void) { return LEVELS; }
__attribute__((visibility("default"))) int lineshaft_supports(const char *level) { return level[0] == 'p'; }
"""


def load_hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lineshaft_cpu_hatch_build", PLUGIN / "hatch_build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOK = load_hook()


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Sources with one function a level, and an empty package; these tests need a compiler and fail without one."""
    monkeypatch.delenv("CC", raising=False)
    HOOK.compiler()
    sources, package = tmp_path / "native", tmp_path / "package"
    sources.mkdir()
    package.mkdir()
    for name in ("team.h", *(f"{shared}.c" for shared in HOOK.SHARED)):
        shutil.copy(SOURCES / name, sources)
    for name in HOOK.SOURCES:
        (sources / name).write_text("")
    (sources / "kernels.c").write_text(PING)
    return sources, package


def refused() -> set[str]:
    """The levels whose flags the compiler of this machine does not take."""
    command = [*HOOK.compiler(), "-x", "c", "-E", "/dev/null"]
    taken = {level for level, flags in HOOK.LEVELS.items() if not subprocess.run([*command, *flags]).returncode}
    return set(HOOK.LEVELS) - taken


def held(package: Path) -> set[str]:
    return {path.name for path in package.iterdir()}


def write_compiler(folder: Path, text: str) -> str:
    """A stand-in of a compiler: `text` in front of the real one."""
    path = folder / "oldcc"
    path.write_text(f'#!/bin/sh\n{text}\nexec {HOOK.compiler()[0]} "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_the_plugin_was_built_at_every_level() -> None:
    if platform.machine() != "x86_64":
        pytest.skip("other machines get the levels in plain C alone")
    built = native.load("portable").library.lineshaft_levels().decode().split()
    assert set(built) == set(native.LEVELS) - refused()
    text = native.PACKAGE / "_native.txt"
    notes = text.read_text().splitlines() if text.exists() else []
    assert {note.partition(":")[0] for note in notes} == refused()


def test_another_machine_gets_the_levels_in_plain_c_alone(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, package = folders
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert HOOK.build(sources, package) == []
    assert native.load("auto", package).level == "portable"
    assert "'avx2' were not built, only portable, amx_emulated" in str(native.reason("avx2", package))


def test_each_level_that_the_processor_runs_answers(folders: tuple[Path, Path]) -> None:
    sources, package = folders
    HOOK.build(sources, package)
    runs = [level for level in native.LEVELS if native.reason(level, package) is None]
    assert runs[-2:] == ["portable", "amx_emulated"]
    assert native.load("auto", package).level == runs[0]
    for level in runs:
        ping = native.load(level, package).function("ping")
        ping.restype = ctypes.c_int
        assert ping() == 1


def test_the_processor_is_asked_for_all_that_a_level_may_use(folders: tuple[Path, Path]) -> None:
    """Against what Linux says of the processor."""
    sources, package = folders
    HOOK.build(sources, package)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next(line for line in lines if line.startswith(("flags", "Features"))).split())
    v3 = {"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "popcnt"} <= flags
    v4 = v3 and {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags
    supports = native.load("portable", package).library.lineshaft_supports
    assert [supports(level) for level in (b"avx512", b"avx2", b"portable", b"sse")] == [v4, v3, 1, 0]


def test_a_level_that_the_processor_lacks_is_refused(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, package = folders
    (sources / "support.c").write_text(OLD_PROCESSOR)
    monkeypatch.setattr(HOOK, "LEVELS", {"avx2": [], "portable": []})
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    HOOK.build(sources, package)
    assert native.load("auto", package).level == "portable"
    with pytest.raises(
        Unsupported, match=r"this processor does not run .*'avx2'; it runs portable; name one"
    ) as caught:
        native.load("avx2", package)
    assert "compiler" not in str(caught.value), "a build would not help"
    assert native.idle(package) == ("avx2",), "compiled, not executed"


def test_without_a_compiler_there_is_a_reason(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sources, package = folders
    monkeypatch.setenv("PATH", str(tmp_path))
    assert HOOK.build(sources, package) == ["no C compiler was found (cc, gcc, clang)"]
    assert held(package) == {"_native.txt"}
    with pytest.raises(Unsupported, match=r"no C compiler was found \(cc, gcc, clang\).*pip install"):
        native.load("auto", package)


@pytest.mark.parametrize(
    ("cc", "why"),
    [
        ("false", "false failed: exit status 1, no message"),
        ("no-such-cc -O1", "no-such-cc cannot be run: No such file"),
    ],
)
def test_a_compiler_that_does_not_work_is_named(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, cc: str, why: str
) -> None:
    sources, package = folders
    monkeypatch.setenv("CC", cc)
    (note,) = HOOK.build(sources, package)
    assert note.startswith(why)
    assert (package / "_native.txt").read_text() == f"{note}\n"
    assert why in str(native.reason("auto", package))


def test_sources_that_do_not_compile_leave_nothing_of_the_build_before(folders: tuple[Path, Path]) -> None:
    sources, package = folders
    HOOK.build(sources, package)
    assert "_native.so" in held(package)
    (sources / "kernels.c").write_text('#include "absent.h"\nint x = ;\n')
    (note,) = HOOK.build(sources, package)
    assert "failed: kernels.c:1:10: fatal error:" in note and "absent.h" in note
    assert held(package) == {"_native.txt"}


def test_a_level_that_the_compiler_is_too_old_for_is_left_out(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sources, package = folders
    old = 'case "$*" in *x86-64-v4*) echo "cc1: error: bad value for -march" >&2; exit 1;; esac'
    monkeypatch.setenv("CC", write_compiler(tmp_path, old))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    notes = HOOK.build(sources, package)
    assert "avx512: oldcc failed: cc1: error: bad value for -march" in notes
    assert held(package) == {"_native.so", "_native.txt"}
    with pytest.raises(Unsupported, match=r"'avx512' were not built.*bad value for -march"):
        native.load("avx512", package)
    assert native.load("auto", package).level in ("avx2", "portable")


def test_headers_lie_beside_the_sources_and_a_good_build_drops_the_reason_before(folders: tuple[Path, Path]) -> None:
    sources, package = folders
    (package / "_native.txt").write_text("an earlier reason\n")
    (sources / "level.h").write_text(PING)
    (sources / "kernels.c").write_text("#include <level.h>\n")
    notes = HOOK.build(sources, package)
    assert held(package) == ({"_native.so", "_native.txt"} if notes else {"_native.so"})
    assert native.reason("portable", package) is None


def test_auto_never_takes_emulated_tiles(folders: tuple[Path, Path]) -> None:
    sources, package = folders
    HOOK.build(sources, package)
    assert native.load("amx_emulated", package).level == "amx_emulated"
    assert native.load("auto", package).level != "amx_emulated"


def test_switched_off_and_unknown_are_refused(tmp_path: Path) -> None:
    assert native.reason("off") == 'native kernels are switched off (backend_options native = "off")'
    with pytest.raises(Unsupported, match="switched off"):
        native.load("off")
    assert f"allowed are auto, off, {', '.join(native.LEVELS)}" in str(native.reason("sse"))
    assert "no build has made" in str(native.reason("auto", tmp_path))


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF" + bytes(100)])
def test_a_corrupt_library_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "_native.so").write_bytes(content)
    with pytest.raises(Unsupported, match=r"cannot be loaded.*pip install"):
        native.load("auto", tmp_path)


def test_a_function_that_an_older_library_lacks_is_refused(folders: tuple[Path, Path]) -> None:
    sources, package = folders
    HOOK.build(sources, package)
    found = native.load("portable", package)
    with pytest.raises(Unsupported, match="no lineshaft_portable_absent: it is of an earlier build"):
        found.function("absent")
    with pytest.raises(Unsupported, match="no lineshaft_absent: it is of an earlier build"):
        found.shared("absent", None)


def test_build_and_loader_know_the_same_levels() -> None:
    assert tuple(HOOK.LEVELS) == native.LEVELS
