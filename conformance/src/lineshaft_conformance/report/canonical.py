"""One way to write results as JSON, so that equal content is equal bytes; and text that every format can hold.

Knows no field of a result.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

CONTROL = re.compile(r"[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML cannot hold, or that a terminal obeys."""


def visible(text: str) -> str:
    """The text with control characters and lone surrogates written as escapes: `\\x1b`."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def plain(value: Any) -> Any:
    """The value in JSON's types: non-finite floats become "nan", "inf" and "-inf", what JSON lacks becomes text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {visible(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return visible(str(value))


def canonical(value: Any) -> bytes:
    """The value as JSON: sorted keys, ASCII, one line each."""
    return json.dumps(plain(value), sort_keys=True, indent=1, allow_nan=False).encode("ascii") + b"\n"


def sha256(content: bytes) -> str:
    """64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()
