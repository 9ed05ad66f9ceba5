"""What a user may write under `[backend_options]` for this backend."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class ToyOptions(BaseModel):
    """`program`: "tape" replays what was recorded before the first step, "eager" runs the forward each step."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    program: Literal["tape", "eager"] = "tape"
