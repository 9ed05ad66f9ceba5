"""What the site does to pages that are written to be read in the repository."""

from __future__ import annotations

from pathlib import PurePosixPath
from types import SimpleNamespace

import pytest
from tests.unit.docs.pages import script

HOOKS = script("site_hooks")
PAGE = SimpleNamespace(file=SimpleNamespace(src_uri="a.md"))


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("```python title=b/c.py#part\n", '```python title="b/c.py"\n'),
        ("```python no-run it never ends\n", "```python\n"),
        ("```sh\n", "```sh\n"),
    ],
)
def test_what_stands_after_a_language_is_what_the_highlighter_knows(written: str, shown: str) -> None:
    assert HOOKS.fences(written) == shown


@pytest.mark.parametrize(
    ("folder", "written", "shown"),
    [
        (".", "[`examples/b`](../examples/b)", "`examples/b`"),
        (".", "see [the kit's](../kits/b.py).", "see the kit's (`kits/b.py`)."),
        (".", "[b](b.md#c) [d](https://e)", "[b](b.md#c) [d](https://e)"),
        ("adr", "[b](../b.md)", "[b](../b.md)"),
        ("adr", "[b](../../README.md)", "b (`README.md`)"),
    ],
)
def test_a_link_that_leaves_the_documentation_becomes_a_path(folder: str, written: str, shown: str) -> None:
    assert HOOKS.links(written, PurePosixPath(folder)) == shown


@pytest.mark.parametrize(
    "tag",
    [
        '<script src="https://cdn.example/x.js">',
        '<link rel="stylesheet" href="//fonts.example/css">',
        "<img alt='' src='http://example/x.png'>",
    ],
)
def test_a_page_that_loads_from_another_host_stops_the_build(tag: str) -> None:
    with pytest.raises(HOOKS.LoadsFromElsewhere, match=r"a\.md"):
        HOOKS.on_post_page(f"<p>{tag}</p>", PAGE)


def test_a_link_to_another_host_does_not() -> None:
    page = '<a href="https://example/">b</a><script src="assets/x.js"></script>'
    assert HOOKS.on_post_page(page, PAGE) == page
