"""What `lineshaft new-plugin` writes is clean, loads as installed and passes checks; or nothing is written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import pytest

from lineshaft.errors import InvalidValue
from lineshaft_conformance.checks import Check, Failure, NotClaimed
from lineshaft_conformance.cli import new_plugin
from lineshaft_conformance.levels import collect
from lineshaft_conformance.scaffold import KITS, render
from lineshaft_conformance.subject import Subject, Target

ROOT = Path(__file__).parents[3]
LONGEST = "a" * new_plugin.LONGEST
UNREAD = '[[tool.mypy.overrides]]\nmodule = ["torch.*", "jax.*"]\nfollow_imports = "skip"\n'
"""To read the types of PyTorch takes mypy half a minute, those of JAX some seconds."""
FIRST_CHECKS = ("L1/minimum/", "L1/linear/", "L1/argmax/")


def make(name: str, *more: str) -> int:
    """The command as the command line runs it."""
    parser = ArgumentParser()
    new_plugin.add_arguments(parser)
    return new_plugin.run(parser.parse_args([name, *more]))


def ruff(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *arguments, "--no-cache", "."], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kit", KITS)
@pytest.mark.parametrize("name", ["x", "my-chip_2", LONGEST])
def test_a_new_repository_is_clean_whatever_its_name(kit: str, name: str, tmp_path: Path) -> None:
    out = tmp_path / "new"
    assert make(name, "--kit", kit, "--out", str(out)) == 0
    ruff(out, "check")
    ruff(out, "format", "--check")
    assert not [path for path in out.rglob("*") if "$" in path.name or path.suffix == ".tmpl"]
    assert not [path for path in out.rglob("*.py") if "$" in path.read_text()]
    project = tomllib.loads((out / "pyproject.toml").read_text())["project"]
    ((found, module),) = project["entry-points"]["lineshaft.backends"].items()
    assert (found, project["name"]) == (name, f"lineshaft-{name}")
    assert (out / "src" / Path(*module.split("."))).with_suffix(".py").is_file()


@pytest.mark.parametrize("kit", KITS)
def test_what_it_needs_of_lineshaft_is_installed_from_a_checkout_first(kit: str) -> None:
    files = render("mychip", kit)
    project = tomllib.loads(files["pyproject.toml"])["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for file in ("README.md", ".github/workflows/ci.yml"):
        (folders, own) = re.findall(r"pip install (.*)", files[file])
        read = [tomllib.loads((ROOT / folder / "pyproject.toml").read_text()) for folder in folders.split()]
        assert {found["project"]["name"] for found in read} == {
            word.partition(">")[0] for word in needed if word.startswith("lineshaft")
        }
        assert own == '-e ".[dev]"'


def test_the_workflow_says_which_variable_it_lacks(tmp_path: Path) -> None:
    workflow = render("mychip", "torch")[".github/workflows/ci.yml"]
    assert "REPOSITORY_OF_LINESHAFT: ${{ vars.REPOSITORY_OF_LINESHAFT }}\n" in workflow
    (line,) = re.findall(r"^ +(address=.*)$", workflow, re.MULTILINE)
    for address, status in (("", 1), ("https://example.org/lineshaft", 0)):
        done = subprocess.run(
            ["bash", "-e", "-c", f'{line}\necho "$address"'], env={"REPOSITORY_OF_LINESHAFT": address},
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode != 0, done.stdout.strip()) == (bool(status), address)
        assert ("REPOSITORY_OF_LINESHAFT: set this variable" in done.stderr) == bool(status)


def test_new_packages_have_correct_types(tmp_path: Path) -> None:
    for kit in KITS:
        make(f"{kit}-chip", "--kit", kit, "--out", str(tmp_path / kit))
    with (tmp_path / "torch" / "pyproject.toml").open("a") as settings:
        settings.write(UNREAD)
    path = os.pathsep.join(entry for entry in sys.path if Path(entry, "lineshaft").is_dir())
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "torch/pyproject.toml", *(f"{kit}/src" for kit in KITS)],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "MYPYPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kit", KITS)
def test_a_new_backend_passes_its_first_checks(kit: str, install: Callable[[Path], None], tmp_path: Path) -> None:
    make("mychip", "--kit", kit, "--out", str(tmp_path / "new"))
    install(tmp_path / "new")
    subject = Subject(Target("mychip"))
    chosen = [
        check
        for check in collect(subject, "smoke", 1)
        if check.level == 0 or (check.id.startswith(FIRST_CHECKS) and check.dtype in ("", "float32"))
    ]
    assert len(chosen) > 20
    assert "mychip_linear" in {kernel for check in chosen for kernel in kernels_run(check, subject)}


def kernels_run(check: Check, subject: Subject) -> tuple[str, ...]:
    """The kernels that a check ran; none where the backend declines with a reason. A failure is raised."""
    try:
        return check.run(subject, 0).kernels
    except NotClaimed as declined:
        assert str(declined), check.id
        return ()


def test_a_wrong_kernel_in_a_new_backend_is_found(install: Callable[[Path], None], tmp_path: Path) -> None:
    make("mychip", "--kit", "numpy", "--out", str(tmp_path / "new"))
    kernels = tmp_path / "new" / "src" / "lineshaft_mychip" / "kernels.py"
    right = 'x.values @ w.arrays["data"].T'
    assert right in kernels.read_text()
    kernels.write_text(kernels.read_text().replace(right, f'({right}).astype("float16").astype("float32")'))
    install(tmp_path / "new")
    subject = Subject(Target("mychip"))
    (check,) = [check for check in collect(subject, "smoke", 1) if check.id == "L1/linear/decode/m1-n48-k32-f32"]
    with pytest.raises(Failure, match="mychip_linear"):
        check.run(subject, 0)


def test_it_prints_what_to_type_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("mychip", "--out", str(tmp_path / "new"))
    shown = capsys.readouterr().out
    assert f"cd {tmp_path / 'new'}\n" in shown
    assert "lineshaft conformance run --backend mychip --level L1\n" in shown


def test_the_folder_is_named_after_the_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make("mychip")
    files = {str(path.relative_to(tmp_path / "lineshaft-mychip")) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == set(render("mychip", "torch"))
    assert {".gitignore", ".github/workflows/ci.yml", "LICENSE", "README.md", "tests/test_conformance.py"} <= files


def test_an_empty_folder_is_filled_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    make("mychip", "--out", ".")
    assert Path("pyproject.toml").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("name", ["", "Chip", "9x", "a--b", "a-", "auto", "é", "a" + LONGEST])
def test_a_name_that_no_backend_can_have_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="allowed are a-z"):
        make(name, "--out", str(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "reason"), [("numpy", "registers a backend"), ("conformance", "lineshaft_conformance is installed")]
)
def test_a_name_that_is_taken_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match=reason):
        make(name, "--out", str(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["file", "full", "absent/new"])
def test_a_folder_that_cannot_be_used_is_refused_and_left_alone(out: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(InvalidValue, match=f"--out {tmp_path / out}: .*(--out|make it first)"):
        make("mychip", "--out", str(tmp_path / out))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "mine"]


def test_a_failure_on_the_way_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.write_text

    def full(path: Path, text: str, **how: str) -> int:
        if path.name == "README.md":
            raise OSError(28, "No space left on device")
        return real(path, text, **how)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        make("mychip", "--out", str(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []
