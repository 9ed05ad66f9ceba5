"""Makes the pages, which are written to be read in the repository, fit for the site; mkdocs calls the two functions.

A link to a file outside `docs/` becomes that file's path, and the words after a fence's language become what the
highlighter knows. A page that would load anything from elsewhere stops the build.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)\s]+)\)")
FENCE = re.compile(r"^```(\w+) (.+)$", re.MULTILINE)
LOADED = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^>]*>""")


class LoadsFromElsewhere(Exception):
    """A page names a resource on another host."""


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page's text as the site shows it."""
    return links(fences(markdown), PurePosixPath(page.file.src_uri).parent)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """The page as it is. Raises LoadsFromElsewhere."""
    found = LOADED.findall(output)
    if found:
        raise LoadsFromElsewhere(f"{page.file.src_uri}: {found[0]}; a page must load nothing from another host")
    return output


def fences(markdown: str) -> str:
    """The title, if there is one, in quotes, and no other word after a fence's language."""
    return FENCE.sub(lambda match: f"```{match[1]}{title(match[2])}", markdown)


def title(words: str) -> str:
    found = re.search(r"title=(\S+)", words)
    return f' title="{found[1].partition("#")[0]}"' if found else ""


def links(markdown: str, folder: PurePosixPath) -> str:
    """Links that leave `docs/`, of a page in that folder of it, as text: the words and the path from the root."""
    return LINK.sub(lambda match: outside(match, folder), markdown)


def outside(match: re.Match[str], folder: PurePosixPath) -> str:
    up = match[2].count("../")
    if up <= len(folder.parts):
        return match[0]
    path = match[2].replace("../", "")
    return match[1] if match[1].strip("`") in path else f"{match[1]} (`{path}`)"
