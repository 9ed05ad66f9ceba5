"""What the tests of sessions on the stand-in share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.unit.neuron_plugin.static_sessions import started


@pytest.fixture
def session() -> Iterator[Any]:
    """A session on the stand-in, over one thread: Dynamo compiles anew where their number changes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    made = started()
    yield made
    made.close()
    torch._dynamo.reset()
    torch.set_num_threads(before)
