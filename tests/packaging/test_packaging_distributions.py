"""Each distribution is built, looked into and installed; nothing here uses the source tree once it is built."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(
    path.parent
    for pattern in ("contract", "core", "kits/*", "plugins/*", "conformance", "bench")
    for path in ROOT.glob(f"{pattern}/pyproject.toml")
)
NAMES = [tomllib.loads((folder / "pyproject.toml").read_text())["project"]["name"] for folder in FOLDERS]
COMPILED = {"lineshaft-cpu": "lineshaft_cpu/_native.so"}
"""What a build compiles, by distribution, with the C compiler that these tests need; a text beside it may say more."""
CORE = ("lineshaft-contract", "lineshaft")
TORCH_FREE = "import sys; assert not {'torch', 'jax', 'triton'} & set(sys.modules), 'a tensor library was imported'"


@dataclass(frozen=True)
class Built:
    """One distribution and its two files."""

    source: Path
    name: str
    package: str
    requirements: tuple[str, ...]
    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """Every distribution: the sdist from the tree, the wheel from the sdist, as a release does it.

    Processes of pytest share the work: whoever finds one under way begins another, and waits at the end.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "dist"
    folder.mkdir(exist_ok=True)
    for seconds in (0, -1):
        for source in FOLDERS:
            with suppress(Timeout), FileLock(folder / f"{source.name}.lock", timeout=seconds):
                build(source, folder / source.name)
    projects = [find(source, folder / source.name) for source in FOLDERS]
    return {project.name: project for project in projects}


def build(source: Path, target: Path) -> None:
    """Once; a build that failed leaves nothing."""
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source)
            shutil.copytree(folder, target)


def find(source: Path, target: Path) -> Built:
    (wheel,), (sdist,) = target.glob("*.whl"), target.glob("*.tar.gz")
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    name = project["name"]
    return Built(source, name, name.replace("-", "_"), tuple(project["dependencies"]), wheel, sdist)


def run(*command: str | Path, cwd: Path | None = None, **variables: str) -> str:
    """What the command prints; its whole output if it fails. No variable of Python leads back to the source tree."""
    env = clean_environment() | variables
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, env=env)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST_"))}


@pytest.mark.parametrize("name", NAMES)
def test_a_wheel_holds_the_typed_package_its_license_and_nothing_else(name: str, built: dict[str, Built]) -> None:
    project = built[name]
    held = names_in(project.wheel)
    code = {str(path.relative_to(project.source / "src")) for path in sources(project)}
    compiled = {COMPILED[name]} if name in COMPILED else set()
    metadata = {path for path in held if ".dist-info/" in path}
    assert held - metadata - {text_beside(path) for path in compiled} == code | compiled, "is there a C compiler?"
    assert f"{project.package}/py.typed" in held
    assert any(path.endswith("licenses/LICENSE") for path in metadata)


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def text_beside(library: str) -> str:
    return library.removesuffix(".so") + ".txt"


@pytest.mark.parametrize("name", NAMES)
def test_a_wheel_with_a_library_is_for_its_platform_and_any_python(name: str, built: dict[str, Built]) -> None:
    *_, python, abi, machine = built[name].wheel.stem.split("-")
    with zipfile.ZipFile(built[name].wheel) as archive:
        (path,) = [path for path in archive.namelist() if path.endswith(".dist-info/WHEEL")]
        metadata = Parser().parsestr(archive.read(path).decode())
    assert (python, abi) == ("py3", "none")
    assert machine == (re.sub(r"\W", "_", sysconfig.get_platform()) if name in COMPILED else "any")
    assert metadata["Root-Is-Purelib"] == ("false" if name in COMPILED else "true")


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CC": "false"}, "false failed: exit status 1, no message"),
        ({"CC": "", "PATH": ""}, "no C compiler was found (cc, gcc, clang)"),
    ],
    ids=["broken", "absent"],
)
@pytest.mark.parametrize("name", COMPILED)
def test_without_a_compiler_a_wheel_is_pure_and_says_why(
    name: str, variables: dict[str, str], reason: str, built: dict[str, Built], tmp_path: Path
) -> None:
    with tarfile.open(built[name].sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    command = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source)
    run(*command, **variables)
    (wheel,) = tmp_path.glob("*-py3-none-any.whl")
    assert names_in(wheel) & {COMPILED[name], text_beside(COMPILED[name])} == {text_beside(COMPILED[name])}
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(text_beside(COMPILED[name])).decode() == f"{reason}\n"


def sources(project: Built) -> list[Path]:
    """The files of a distribution's package as they lie in the tree."""
    found = (project.source / "src").rglob("*")
    return [path for path in found if path.is_file() and not any(map(is_made, path.relative_to(project.source).parts))]


def is_made(name: str) -> bool:
    return name.startswith((".", "_native.")) or name == "__pycache__"


@pytest.mark.parametrize("name", NAMES)
def test_an_sdist_holds_what_the_wheel_is_built_from(name: str, built: dict[str, Built]) -> None:
    project = built[name]
    with tarfile.open(project.sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "PKG-INFO"} <= held
    compiled = {*project.source.glob("native/*"), *project.source.glob("hatch_build.py")}
    assert bool(compiled) == (name in COMPILED)
    assert {str(path.relative_to(project.source)) for path in {*sources(project), *compiled}} <= held
    assert not any("_native." in path for path in held)
    assert not any(path.startswith("test") for path in held)


def test_the_metadata_say_what_is_needed(built: dict[str, Built]) -> None:
    for project in built.values():
        with zipfile.ZipFile(project.wheel) as archive:
            (path,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
            metadata = Parser().parsestr(archive.read(path).decode())
        assert metadata["License-Expression"] == "Apache-2.0"
        assert metadata["Requires-Python"] == ">=3.11"
        always = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
        assert set(map(bare, always)) == set(map(bare, project.requirements))
    for name in CORE:
        assert {bare(line) for line in built[name].requirements} & {"torch", "jax", "triton"} == set()
    for name in ("lineshaft-triton", "lineshaft-rocm"):  # PyTorch for ROCm brings a Triton of another distribution
        assert "triton" not in map(bare, built[name].requirements)
        assert "[triton]" not in "".join(built[name].requirements)


def bare(requirement: str) -> str:
    """The name of a requirement without its versions."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found
    return found[0].lower().replace("_", "-")


@pytest.fixture(scope="module")
def core_alone(built: dict[str, Built], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a clean environment: the wheels of contract and core and, from the index, what they need."""
    folder = tmp_path_factory.mktemp("core")
    venv.EnvBuilder(with_pip=True).create(folder)
    run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", *(built[name].wheel for name in CORE))
    return folder / "bin"


def test_core_alone_with_its_dependencies_from_the_index(core_alone: Path, tmp_path: Path) -> None:
    assert "lineshaft" in run(core_alone / "lineshaft", "--help", cwd=tmp_path)
    listed = json.loads(run(core_alone / "lineshaft", "backends", "--json", cwd=tmp_path))
    assert [backend["name"] for backend in listed["backends"]] == ["numpy"]
    assert [backend["usable"] for backend in listed["backends"]] == [True]
    assert listed["rejected"] == []


def test_core_alone_imports_every_module_and_checks_out(core_alone: Path, tmp_path: Path) -> None:
    code = (
        "import pkgutil, importlib, lineshaft\n"
        "for module in pkgutil.walk_packages(lineshaft.__path__, 'lineshaft.'): importlib.import_module(module.name)\n"
        "assert lineshaft.__version__ == '0.1.0' and 'site-packages' in lineshaft.__file__\n"
    )
    run(core_alone / "python", "-c", code + TORCH_FREE, cwd=tmp_path)
    run(core_alone / "python", "-m", "pip", "check")


def test_wheels_together_reuse_the_third_party_packages_at_hand(built: dict[str, Built], tmp_path: Path) -> None:
    """All wheels without their dependencies; those are found in the environment that runs the tests, not installed."""
    python = borrowing_environment(tmp_path / "all")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", *(project.wheel for project in built.values()))
    homes = json.loads(run(python, "-c", homes_of([project.package for project in built.values()]), cwd=tmp_path))
    assert all(Path(home).is_relative_to(tmp_path) for home in homes), homes
    print_reason = "from lineshaft_cpu import native; print(native.reason('auto'))"
    assert run(python, "-c", print_reason, cwd=tmp_path).strip() == "None"
    listed = json.loads(run(python.parent / "lineshaft", "backends", "--json", cwd=tmp_path))
    assert {"numpy", "cpu"} <= {backend["name"] for backend in listed["backends"] if backend["usable"]}
    assert listed["rejected"] == []


@pytest.mark.parametrize("name", ["cpu", "cuda", "rocm"])
def test_a_plugin_without_its_kits_is_listed_and_breaks_nothing(
    name: str, built: dict[str, Built], tmp_path: Path
) -> None:
    """The core's and the plugin's wheels alone: third-party packages as above, the kits and PyTorch hidden."""
    python = borrowing_environment(tmp_path / "few", hidden=("torch", "lineshaft_torch", "lineshaft_triton"))
    wheels = [built[each].wheel for each in (*CORE, f"lineshaft-{name}")]
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", *wheels)
    listed = json.loads(run(python.parent / "lineshaft", "backends", "--json", cwd=tmp_path))
    (found,) = [backend for backend in listed["backends"] if backend["name"] == name]
    assert not found["usable"]
    assert "not installed" in found["reason"] or "No module named 'lineshaft_triton'" in found["reason"]


WITHOUT_CORE = """
import importlib, pkgutil, sys
from lineshaft_contract.backends import World
plugin, options, names = sys.argv[1], eval(sys.argv[2]), sys.argv[3:]
backend = importlib.import_module(f"{plugin}.backend")  # what settles how kernels are run comes first
made = getattr(importlib.import_module(f"{plugin}.options"), f"{plugin.removeprefix('lineshaft_').title()}Options")
kernels = backend.create(made(**options), World(threads=1)).kernels()
assert {"linear", "attend", "write_kv", "rms_norm"} <= {kernel.op for kernel in kernels}
for name in ("lineshaft_contract", *names, plugin):
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, f"{name}."):
        if not module.name.endswith(("._native", "_worker")):  # a library, and what runs in a process of its own
            importlib.import_module(module.name)
assert "lineshaft" not in sys.modules and importlib.util.find_spec("lineshaft") is None
"""
KITS = {
    "lineshaft-cpu": (("lineshaft-torch",), {}),
    "lineshaft-cuda": (("lineshaft-torch", "lineshaft-triton"), {"interpret": True}),
    "lineshaft-rocm": (("lineshaft-torch", "lineshaft-triton"), {"interpret": True}),
}
"""Plugins on PyTorch: the kits that each is built on, and options under which it starts anywhere."""


@pytest.mark.parametrize("plugin", KITS)
def test_contract_kits_and_plugin_do_without_core(plugin: str, built: dict[str, Built], tmp_path: Path) -> None:
    kits, options = KITS[plugin]
    python = borrowing_environment(tmp_path / "outside")
    wheels = [built[name].wheel for name in ("lineshaft-contract", *kits, plugin)]
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", *wheels)
    packages = [built[name].package for name in (plugin, *kits)]
    run(python, "-c", WITHOUT_CORE, packages[0], repr(options), *packages[1:], cwd=tmp_path)


def borrowing_environment(folder: Path, hidden: tuple[str, ...] = ()) -> Path:
    """The python of a new environment that sees links to this one's packages, but none of lineshaft nor of `hidden`."""
    venv.EnvBuilder(with_pip=True).create(folder)
    links = folder / "borrowed"
    links.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        module = path.name.partition("-")[0].partition(".")[0].lstrip("_").lower()
        if "lineshaft" not in path.name and module not in {*hidden, "pip"} and path.suffix != ".pth":
            (links / path.name).symlink_to(path)
    site = next((folder / "lib").glob("python3*/site-packages"))
    (site / "borrowed.pth").write_text(f"{links}\n")
    return folder / "bin" / "python"


def homes_of(packages: list[str]) -> str:
    return f"import importlib, json; print(json.dumps([importlib.import_module(p).__file__ for p in {packages!r}]))"


# ---- what a third party does -----------------------------------------------------------------------------------------

FROM_SOURCE = ("install", "--quiet", "--no-deps", "--no-build-isolation")


def test_a_backend_on_plain_numpy_answers_and_is_certified(built: dict[str, Built], tmp_path: Path) -> None:
    """The example is installed from its folder, beside the wheels of core and suite; no PyTorch is to be had."""
    python = borrowing_environment(tmp_path / "outside", hidden=("torch", "jax", "lineshaft_torch"))
    source = shutil.copytree(ROOT / "examples" / "numpy_backend", tmp_path / "numpy_backend")
    wheels = [built[name].wheel for name in (*CORE, "lineshaft-conformance")]
    run(python, "-m", "pip", *FROM_SOURCE, *wheels, source)
    (home,) = json.loads(run(python, "-c", homes_of(["lineshaft_plainnp"]), cwd=tmp_path))
    assert Path(home).is_relative_to(tmp_path / "outside")
    question = ("--prompt", "What is the capital of France?", "--max-tokens", "32", "--temperature", "0")
    demo = ("generate", "--config", ROOT / "examples" / "demo.toml", "--backend", "plainnp", *question)
    answer = run(python.parent / "lineshaft", *demo, "--json", cwd=tmp_path)
    assert json.loads(answer)["outputs"][0]["text"] == "The capital of France is Paris."
    certify = ("conformance", "run", "--backend", "plainnp", "--level", "L4")
    assert "plainnp is certified at L4" in run(python.parent / "lineshaft", *certify, cwd=tmp_path)


@pytest.mark.parametrize("kit", ["jax", "torch", "numpy"])  # the longest first, beside the others
def test_a_new_plugin_installs_and_passes_its_own_tests(kit: str, built: dict[str, Built], tmp_path: Path) -> None:
    """`new-plugin` and the suite come from wheels; the repository's tests run levels 0 and 1."""
    python = borrowing_environment(tmp_path / "author")
    names = {*CORE, "lineshaft-conformance", *({f"lineshaft-{kit}"} & set(built))}
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", *(built[name].wheel for name in names))
    run(python.parent / "lineshaft", "new-plugin", "mychip", "--kit", kit, cwd=tmp_path)
    folder = tmp_path / "lineshaft-mychip"
    run(python, "-m", "pip", *FROM_SOURCE, folder)
    shown = run(python, "-m", "pytest", "-q", cwd=folder)
    assert "3 passed" in shown
