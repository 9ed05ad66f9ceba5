"""`lineshaft new-plugin`: writes the repository of a new backend, whole or not at all."""

from __future__ import annotations

import re
import tempfile
from argparse import ArgumentParser, Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lineshaft.errors import InvalidValue
from lineshaft_conformance.scaffold import KITS, distribution, package, render

if TYPE_CHECKING:
    from lineshaft.registry import Registry

HELP = "write the repository of a new backend, which installs, loads and passes the first levels as it is"
NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")
LONGEST = 32


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="what users will write as `backend`, such as mychip")
    parser.add_argument("--kit", choices=sorted(KITS), default="torch", help="what it is built on (default: torch)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the new folder (default: lineshaft-NAME)")


def run(args: Namespace) -> int:
    from lineshaft.registry import discover

    check_name(args.name, discover())
    out = Path(distribution(args.name)) if args.out is None else args.out
    check_folder(out)
    files = render(args.name, args.kit)
    write(files, out)
    print(f"wrote {len(files)} files to {out}; next:\n\n{next_commands(args.name, out)}")
    return 0


def check_name(name: str, registry: Registry) -> None:
    """Raises InvalidValue for a name that no backend can have or that one has already."""
    if not NAME.fullmatch(name) or len(name) > LONGEST or name == "auto":
        raise InvalidValue(
            f"NAME {name!r}: allowed are a-z, 0-9 and single - or _ between them, a letter first, at most {LONGEST} "
            "characters, and not 'auto'; choose such a name, for instance 'mychip'"
        )
    taken = {status.name: status.distribution for status in registry.status()}
    if name in taken:
        raise InvalidValue(f"NAME {name!r}: {taken[name]} registers a backend of this name; choose another")
    if find_spec(package(name)) is not None:
        raise InvalidValue(f"NAME {name!r}: a package {package(name)} is installed already; choose another name")


def check_folder(out: Path) -> None:
    """Raises InvalidValue where there is something, or where no folder can be made."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidValue(f"--out {out}: it exists and is not an empty folder; name another with --out")
    if not out.absolute().parent.is_dir():
        raise InvalidValue(f"--out {out}: there is no folder {out.absolute().parent}; make it first")


def write(files: dict[str, str], out: Path) -> None:
    """Write beside `out` and move there at the end, so that a failure leaves nothing behind."""
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=".new-plugin-") as holder:
        made = Path(holder) / "repository"
        for path, text in files.items():
            file = made / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        if not out.exists():
            made.rename(out)
            return
        for child in sorted(made.iterdir()):
            child.rename(out / child.name)


def next_commands(name: str, out: Path) -> str:
    commands = (
        f"cd {out}", 'pip install -e ".[dev]"', "lineshaft backends",
        f"lineshaft conformance run --backend {name} --level L1",
    )  # fmt: skip
    return "\n".join(f"    {command}" for command in commands)
