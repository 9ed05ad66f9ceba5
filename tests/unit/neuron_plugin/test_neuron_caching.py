"""The cache of compiled programs: who chooses where it is, the compiler's flags, and how hits are counted, with a
compiler that writes such folders."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lineshaft.errors import InvalidValue
from lineshaft_neuron.caching import CompileCache, compilers_own, set_up
from lineshaft_neuron.options import NeuronOptions

FOLDERS = ("TORCH_NEURONX_NEFF_CACHE_DIR", "TORCH_NEURONX_NEFF_LOCAL_CACHE_DIR", "TORCH_NEURONX_HLO_CACHE_DIR")
LAYOUTS: dict[str, Callable[[str], str]] = {
    "wrapper": lambda key: f"neuronxcc-2.15.1+a3ad0f342/MODULE_{key}+d41d8cd9/model.neff",
    "sharded": lambda key: f"{key[:2]}/{key[2:4]}/{key}.neff",
}
"""The vendor's two: of PyTorch/XLA, by its page "Neuron Persistent Cache"; and of torch-neuronx with a device."""


class Compiler:
    """Keeps programs as the vendor's does, and compiles what it does not have."""

    def __init__(self, folder: Path, layout: str) -> None:
        self.folder, self.path, self.ran = folder, LAYOUTS[layout], 0

    def __call__(self, key: str) -> None:
        path = self.folder / self.path(key)
        if not path.exists() or not path.stat().st_size:
            self.ran += 1
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_bytes(b"neff")
            part.replace(path)


@pytest.fixture(params=sorted(LAYOUTS))
def compiler(request: pytest.FixtureRequest, tmp_path: Path) -> Compiler:
    return Compiler(tmp_path / "cache", request.param)


def compile_all(cache: CompileCache, compiler: Compiler, keys: list[str]) -> list[bool]:
    found = []
    for key in keys:
        with cache.counted() as lookup:
            compiler(key)
        found.append(lookup.hit)
    return found


def test_a_program_that_the_folder_has_is_a_hit_and_one_that_it_has_not_a_miss(compiler: Compiler) -> None:
    keys = ["198775565831", "224866829708", "198775565831"]
    first = CompileCache(compiler.folder, "")
    assert compile_all(first, compiler, keys) == [False, False, True] and (first.hits, first.misses) == (1, 2)
    again = CompileCache(compiler.folder, "")
    assert compile_all(again, compiler, [*keys, "350000000000"]) == [True, True, True, False]
    assert compiler.ran == 3 == first.misses + again.misses


def test_a_compilation_that_failed_before_is_no_hit(compiler: Compiler) -> None:
    failed = compiler.folder / compiler.path("12486829708")
    failed.parent.mkdir(parents=True)
    failed.touch()
    assert compile_all(CompileCache(compiler.folder, ""), compiler, ["12486829708"] * 2) == [False, True]


def test_a_program_that_is_compiled_anew_in_the_same_place_is_a_miss(compiler: Compiler) -> None:
    compiler("1111")
    cache = CompileCache(compiler.folder, "")
    with cache.counted() as lookup:
        path = compiler.folder / compiler.path("1111")
        part = path.with_suffix(".part")
        part.write_bytes(b"another")
        part.replace(path)
    assert not lookup.hit and cache.misses == 1


def test_nothing_is_a_hit_where_nothing_is_kept(tmp_path: Path) -> None:
    for cache in (CompileCache(None, "off"), CompileCache(tmp_path / "absent", ""), CompileCache(tmp_path, "")):
        with cache.counted() as lookup:
            pass
        assert not lookup.hit and (cache.hits, cache.misses) == (0, 1)


def test_an_error_of_the_compiler_is_not_counted(tmp_path: Path) -> None:
    cache = CompileCache(tmp_path, "")
    with pytest.raises(ValueError, match="broken"), cache.counted():
        raise ValueError("broken")
    assert (cache.hits, cache.misses) == (0, 0)


def test_other_processes_may_come_and_go_in_the_folder(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is listed and gone when looked at; then programs that others write while this one compiles."""
    compiler("1111")
    compiler("2222")
    real = os.stat
    gone = str(compiler.folder / compiler.path("2222"))

    def stat(path: str, *args: object, **more: object) -> os.stat_result:
        if path == gone:
            raise FileNotFoundError(path)
        return real(path, *args, **more)  # type: ignore[arg-type]

    cache = CompileCache(compiler.folder, "")
    monkeypatch.setattr(os, "stat", stat)
    assert compile_all(cache, compiler, ["1111"]) == [True]
    monkeypatch.undo()
    with cache.counted() as lookup:
        other = threading.Thread(target=compiler, args=("3333",))
        other.start()
        compiler("1111")
        other.join()
    assert not lookup.hit  # a miss where it might be a hit, never the reverse
    compiler.folder.joinpath(compiler.path("3333")).unlink()
    assert compile_all(cache, compiler, ["1111"]) == [True]


# ---- who chooses the folder ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lane", ["compile", "trace"])
def test_the_default_is_a_folder_of_the_users_cache(lane: str, tmp_path: Path) -> None:
    found = set_up(NeuronOptions(), lane, {"XDG_CACHE_HOME": str(tmp_path)})
    folder = tmp_path / "lineshaft" / "neuron"
    assert found.cache.folder == folder and folder.is_dir() and "cache_dir" in found.cache.said
    names = FOLDERS if lane == "compile" else ("NEURON_COMPILE_CACHE_URL",)
    assert {name: found.variables[name] for name in names} == dict.fromkeys(names, str(folder))


def test_a_home_folder_serves_where_no_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert set_up(NeuronOptions(), "trace", {}).cache.folder == tmp_path / ".cache" / "lineshaft" / "neuron"


@pytest.mark.parametrize("lane", ["compile", "trace"])
def test_a_cache_that_is_off_is_off_for_the_vendor_too(lane: str) -> None:
    found = set_up(NeuronOptions(cache_dir="off"), lane, {"NEURON_CC_FLAGS": "-O2"})
    assert found.cache.folder is None and found.cache.said == "off: cache_dir" and found.flags == ("-O2",)
    if lane == "compile":
        assert found.variables["TORCH_NEURONX_NEFF_DISABLE_CACHE"] == "1"
        assert found.variables["NEURON_CC_FLAGS"] == "-O2"
    else:
        assert found.variables == {"NEURON_CC_FLAGS": "-O2 --no_cache"}


@pytest.mark.parametrize("lane", ["compile", "trace"])
@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("NEURON_CC_FLAGS", "--cache_dir={}", "NEURON_CC_FLAGS --cache_dir"),
        ("NEURON_CC_FLAGS", "-O1 --cache_dir {}", "NEURON_CC_FLAGS --cache_dir"),
        ("NEURON_CC_FLAGS", "--cache_dir=/absent --cache_dir={}", "NEURON_CC_FLAGS --cache_dir"),
        ("NEURON_COMPILE_CACHE_URL", "{}", "NEURON_COMPILE_CACHE_URL"),
    ],
)
def test_a_folder_of_the_users_own_wins_and_is_said(
    lane: str, variable: str, value: str, said: str, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    environment = {variable: value.format(own), "XDG_CACHE_HOME": str(tmp_path)}
    for options in (NeuronOptions(), NeuronOptions(cache_dir=str(tmp_path / "mine")), NeuronOptions(cache_dir="off")):
        found = set_up(options, lane, environment)
        assert found.cache.folder == own and found.cache.said == f"{own}: {said}"
        assert found.variables["TORCH_NEURONX_NEFF_CACHE_DIR" if lane == "compile" else "NEURON_COMPILE_CACHE_URL"]
    assert not (tmp_path / "mine").exists()


def test_a_flag_wins_over_a_variable_as_it_does_for_the_vendor(tmp_path: Path) -> None:
    environment = {"NEURON_CC_FLAGS": f"--cache_dir={tmp_path / 'a'}", "NEURON_COMPILE_CACHE_URL": str(tmp_path / "b")}
    assert set_up(NeuronOptions(), "trace", environment).cache.folder == tmp_path / "a"


def test_the_lane_compile_has_variables_of_its_own(tmp_path: Path) -> None:
    neff, hlo = str(tmp_path / "neff"), str(tmp_path / "hlo")
    found = set_up(NeuronOptions(), "compile", {FOLDERS[0]: neff, FOLDERS[2]: hlo})
    assert str(found.cache.folder) == neff and found.cache.said.endswith(FOLDERS[0])
    assert found.variables[FOLDERS[1]] == neff and found.variables[FOLDERS[2]] == hlo
    assert set_up(NeuronOptions(), "compile", {"TORCH_NEURONX_NEFF_DISABLE_CACHE": "1"}).cache.folder is None


def test_a_cache_that_is_no_folder_is_kept_and_not_counted() -> None:
    found = set_up(NeuronOptions(), "trace", {"NEURON_COMPILE_CACHE_URL": "s3://bucket/programs"})
    assert found.cache.folder is None and "no hit is counted" in found.cache.said
    with pytest.raises(InvalidValue, match="the lane compile keeps its programs in a folder"):
        set_up(NeuronOptions(), "compile", {"NEURON_COMPILE_CACHE_URL": "s3://bucket/programs"})


@pytest.mark.parametrize("variable", ["", "NEURON_COMPILE_CACHE_URL"])
def test_a_folder_that_cannot_be_written_to_is_refused(variable: str, tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.touch()
    folder = str(taken / "cache")
    options = NeuronOptions() if variable else NeuronOptions(cache_dir=folder)
    with pytest.raises(InvalidValue, match=f"{variable or 'cache_dir'} = .* cannot be written to .*; name another"):
        set_up(options, "trace", {variable: folder})


def test_a_folder_that_may_only_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **more: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lineshaft_neuron.caching.tempfile.TemporaryFile", denied)
    with pytest.raises(InvalidValue, match=r"cannot be written to \(Permission denied\)"):
        set_up(NeuronOptions(cache_dir=str(tmp_path)), "compile", {})


# ---- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lane", ["compile", "trace"])
def test_flags_of_the_options_come_before_the_users_which_are_kept(lane: str, tmp_path: Path) -> None:
    environment = {"NEURON_CC_FLAGS": "--optlevel 2 --log_level=INFO", "XDG_CACHE_HOME": str(tmp_path)}
    found = set_up(NeuronOptions(compiler_flags="--optlevel 1 --auto-cast=none"), lane, environment)
    assert found.flags == ("--optlevel", "1", "--auto-cast=none", "--optlevel", "2")
    assert found.variables["NEURON_CC_FLAGS"].startswith("--optlevel 1 --auto-cast=none --optlevel 2")
    assert ("--log_level" in found.variables["NEURON_CC_FLAGS"]) is (lane == "trace")


def test_the_compiler_gets_no_flag_of_the_wrapper() -> None:
    flags = ["--cache_dir", "x", "-O1", "--no_cache", "--log_level=INFO", "--retry_failed_compilation", "--lnc", "2"]
    assert compilers_own(flags) == ["-O1", "--lnc", "2"] and compilers_own([]) == []


@pytest.mark.parametrize(
    ("options", "environment", "name"),
    [({"compiler_flags": "--a='"}, {}, "compiler_flags"), ({}, {"NEURON_CC_FLAGS": '"'}, "NEURON_CC_FLAGS")],
)
def test_flags_that_cannot_be_read_are_refused(options: dict[str, str], environment: dict[str, str], name: str) -> None:
    with pytest.raises(InvalidValue, match=f"{name} = .* cannot be read"):
        set_up(NeuronOptions(**options), "trace", environment)  # type: ignore[arg-type]
