"""The pages of the documentation, taken apart: fenced blocks, prose, code spans."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "changelog.d").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)(?: ([^\n]*))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block, with the words after its language: `title=FILE` or `no-run REASON`."""

    page: Path
    language: str
    words: str
    text: str

    @property
    def title(self) -> str:
        """The file that it is an excerpt of."""
        return self.words.removeprefix("title=") if self.words.startswith("title=") else ""

    @property
    def reason(self) -> str | None:
        """Why a program is not run; None: it is."""
        word, _, reason = self.words.partition(" ")
        return reason if word == "no-run" else None

    def __str__(self) -> str:
        return f"{self.page.name}-{self.text.split()[0]}"


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(language: str = "", excerpt: bool = False) -> list[Block]:
    """The blocks of one language ("" = any), those with a title or those without."""
    found = [Block(page, *match.groups("")) for page in PAGES for match in FENCE.finditer(page.read_text("utf-8"))]
    found = [block for block in found if "#" not in block.title]  # edits to a file: see test_docs_tutorial.py
    return [block for block in found if language in ("", block.language) and bool(block.title) == excerpt]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def spans(page: Path) -> list[str]:
    """The code spans of a page."""
    return [span for _, span in re.findall(r"(`+) ?(.+?) ?\1", prose(page))]


def script(name: str) -> ModuleType:
    """A file of docs/ that is a script and in no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
