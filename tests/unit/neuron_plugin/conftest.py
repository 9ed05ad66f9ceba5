"""What the tests of sessions on the stand-in share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.unit.neuron_plugin.static_sessions import started

from lineshaft_neuron import stand_in


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The stand-in's device; what was compiled for it is forgotten after the test."""
    yield stand_in.start()
    torch._dynamo.reset()


@pytest.fixture
def session() -> Iterator[Any]:
    """A session on the stand-in."""
    made = started()
    yield made
    made.close()
    torch._dynamo.reset()
